"""Data sets for zero-shot retrieval: where the files come from, how the classes are split, how batches are drawn.

The first half of a data set's classes trains, the second half is only ever retrieved. In reading order: readers of CUB200-2011,
Cars196, Stanford Online Products (SOP), a folder of one's own; downloads; the built-in `toy` characters; images; batches.
"""
import contextlib
import errno
import hashlib
import math
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional

# Before torch is loaded, so scripts import this file first: OpenMP's idle threads would spin and starve other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
from PIL import Image
from torchvision import transforms


class UserError(ValueError):
    """A user's mistake: one sentence that names the file, option or value and says what to do."""


def processes():
    """(rank of this process, number of processes) of those that torchrun has started; rank 0 speaks and writes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Split(NamedTuple):
    """One half of a data set. Labels run from 0 to `len(class_names) - 1`."""
    images: list                              # N paths, or N uint8 arrays (H, W)
    labels: torch.Tensor                      # (N,) int64
    class_names: list
    ambiguity: Optional[torch.Tensor] = None  # (N,) in [0, 1] where it is known (toy, corrupted images)
    corruption: Optional[torch.Tensor] = None  # (N,) in [0, 1]: how much noise and erasing to add


def progress(items, total, what):
    """Yield from `items` while showing how far `what` is and the time left: one line in a terminal, a plain line a
    minute in a log file."""
    start = shown = time.monotonic()
    terminal, speaks = sys.stderr.isatty(), processes()[0] == 0
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and speaks and now - shown > (0.5 if terminal else 60):
            left = int((now - start) / done * (total - done))
            text = f"  {what} {done}/{total}, {left // 60}:{left % 60:02d} left"
            print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
            shown = now
        yield item
    if terminal and shown != start:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the readers

def class_range(split, first, last):
    """The classes first .. last - 1 of a Split, as a Split of their own."""
    chosen = torch.nonzero((split.labels >= first) & (split.labels < last)).flatten()
    known = [None if values is None else values[chosen] for values in (split.ambiguity, split.corruption)]
    return Split([split.images[i] for i in chosen], split.labels[chosen] - first, split.class_names[first:last], *known)


def halves(split, root):
    """Split by class: the first half of the classes listed trains, the second half tests (the field's protocol)."""
    number = len(split.class_names)
    if number < 2:
        raise UserError(f"{root} holds {number} class(es), but training and test need at least one each: give the folder that "
                        "holds a sub-folder for each class")
    return class_range(split, 0, number // 2), class_range(split, number // 2, number)


def find(root, folder, marker, url, md5):
    """The folder below `root`, or `root` itself, that holds the file `marker`; downloaded if it is not there."""
    for base in (Path(root) / folder, Path(root)):
        if (base / marker).exists():
            return base
    if (Path(root) / folder).exists():
        raise UserError(f"{Path(root) / folder} holds no {marker}: delete the folder to download it again")
    fetch(root, url, md5, folder)
    return Path(root) / folder


def read_table(path, columns):
    """Rows of a text file of space-separated columns, the last of which may hold spaces."""
    rows = [line.split(None, columns - 1) for line in Path(path).read_text().splitlines() if line.strip()]
    if not rows or any(len(row) != columns for row in rows):
        raise UserError(f"{path} is empty or does not have {columns} columns: unpack the archive again")
    return [[*row[:-1], row[-1].strip()] for row in rows]


def load_cub200(root):
    """CUB200-2011: three text files joined by image id. 5,864 training and 5,924 test images."""
    base = find(root, "CUB_200_2011", "images.txt", CUB_URL, "97eceeb196236b17998738112f37df78")
    names = read_table(base / "classes.txt", 2)
    label_of = {class_id: label for label, (class_id, _) in enumerate(names)}
    class_of = dict(read_table(base / "image_class_labels.txt", 2))
    rows = read_table(base / "images.txt", 2)
    try:
        labels = [label_of[class_of[image_id]] for image_id, _ in rows]
    except KeyError as error:
        raise UserError(f"{base} has no class for the id {error} of images.txt: unpack the archive again") from None
    return halves(Split([base / "images" / path for _, path in rows], torch.tensor(labels), [name for _, name in names]), base)


def load_cars196(root):
    """Cars196 in either layout in circulation; both list the same 16,185 images, numbered differently.

    Older: cars_annos.mat and car_ims/. Newer: devkit/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat.
    8,054 training and 8,131 test images (classes 1-98 and 99-196 of all images, not the authors' own train and test).
    """
    root = Path(root)
    if (root / "car_ims.tgz").exists() and not (root / "car_ims").exists():       # brought by the user
        check_md5(root / "car_ims.tgz", "d5c8f0aa497503f355e17dc7886c3f14")
        check_md5(root / "cars_annos.mat", "b407c6086d669747186bd1d764ff9dbc")
        unpack(root / "car_ims.tgz", root, "car_ims")
    for base in (root / "stanford_cars", root / "cars196", root):
        if (base / "cars_annos.mat").exists() and (base / "car_ims").is_dir():
            rows, names = read_mat(base / "cars_annos.mat", "annotations", "relative_im_path", "class_names")
            break
        if (base / "devkit/cars_train_annos.mat").exists() and (base / "cars_train").is_dir():
            names = [str(name) for name in read_mat(base / "devkit/cars_meta.mat")["class_names"]]
            files = {"cars_train": base / "devkit/cars_train_annos.mat", "cars_test": base / "cars_test_annos_withlabels.mat"}
            if not files["cars_test"].exists():
                raise UserError(f"{files['cars_test']} is missing: half of Cars196's labels are in it; put it there")
            rows = [(f"{folder}/{path}", label) for folder, file in files.items()
                    for path, label in read_mat(file, "annotations", "fname")[0]]
            break
    else:
        raise UserError(f"Cars196 was not found in {root}, and its official address is dead: put there either car_ims.tgz and "
                        "cars_annos.mat, or the folders devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat "
                        "(both are in circulation as 'Stanford Cars')")
    return halves(Split([base / path for path, _ in rows], torch.tensor([label - 1 for _, label in rows]), names), base)


def read_mat(path, variable=None, file_field=None, names_variable=None):
    """A MATLAB file; with `variable`, its [(file name, class from 1)] rows and the class names."""
    try:
        mat = scipy.io.loadmat(path, squeeze_me=True)
        if variable is None:
            return mat
        rows = [(str(row[file_field]), int(row["class"])) for row in np.atleast_1d(mat[variable])]
        return rows, [str(name) for name in mat[names_variable]] if names_variable else None
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, scipy.io.matlab.MatReadError) as error:
        raise UserError(f"{path} is not a readable Cars196 annotation file ({error}): fetch it again") from None


def load_sop(root):
    """Stanford Online Products by its own lists: 11,318 classes, 59,551 images train; 11,316, 60,502 test."""
    base = find(root, "Stanford_Online_Products", "Ebay_train.txt", SOP_URL, "7f73d41a2f44250d4779881525aea32e")
    splits = []
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        rows = read_table(base / name, 4)[1:]                     # image_id class_id super_class_id path, with a header
        classes = sorted({int(row[1]) for row in rows})
        label_of = {class_id: label for label, class_id in enumerate(classes)}
        splits.append(Split([base / row[3] for row in rows], torch.tensor([label_of[int(row[1])] for row in rows]),
                            [str(class_id) for class_id in classes]))
    return tuple(splits)


def pictures_below(folder):
    """Sorted paths of the pictures at any depth below a folder, but for what is hidden."""
    kinds = set(Image.registered_extensions())
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds and not p.is_dir()
                  and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def load_pictures(folder):
    """A Split of all pictures below a folder. Their classes are its sub-folders, "" for pictures that are in none."""
    paths = pictures_below(folder)
    if not paths:
        raise UserError(f"{folder} is no folder, or there is no image below it: give one with images")
    names, labels = np.unique([(*path.relative_to(folder).parts[:-1], "")[0] for path in paths], return_inverse=True)
    return Split(paths, torch.as_tensor(labels), names.tolist())


def load_folder(root):
    """One's own photographs, one sub-folder per class: the first half of the sorted class folders trains."""
    if not Path(root).is_dir():
        raise UserError(f"{root} is no folder: give --data_root the folder that holds a sub-folder for each class")
    split = load_pictures(root)
    for folder in sorted(p for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in split.class_names:
            warnings.warn(f"{folder} holds no image and is left out")
    return halves(class_range(split, split.class_names.count(""), len(split.class_names)), root)    # "": in no sub-folder


# Published number of training and test images: fewer means a subset, and its numbers compare with nobody else's.
PUBLISHED = {"cub200": (5864, 5924), "cars196": (8054, 8131), "sop": (59551, 60502)}


def usual_ks(dataset):
    """The k for which papers report Recall@k on a data set."""
    return (1, 10, 100, 1000) if dataset == "sop" else (1, 2, 4, 8)


def load(name, root):
    """(training Split, test Split) of the data set `name` below the folder `root`.

    Downloads CUB200-2011 and SOP where they are missing. Warns of a subset and of classes with one training image.
    Raises UserError for whatever is missing, empty or unreadable.
    """
    if name == "toy":
        return load_toy()
    splits = LOADERS[name](root)
    if missing := [path for split in splits for path in split.images if not os.path.exists(path)]:
        raise UserError(f"{len(missing)} listed images are missing, the first is {missing[0]}: unpack the data again")
    counts = tuple(len(split.images) for split in splits)
    if name in PUBLISHED and counts != PUBLISHED[name]:
        warnings.warn(f"{root} holds {counts[0]} training and {counts[1]} test images of {name}, the published split "
                      f"{PUBLISHED[name][0]} and {PUBLISHED[name][1]}: results on a subset compare with no paper")
    if min(counts) == 0:
        raise UserError(f"{root} holds no {'training' if counts[0] == 0 else 'test'} images of {name}")
    if single := int((torch.bincount(splits[0].labels) == 1).sum()):
        warnings.warn(f"{single} training class(es) have one image, which is paired with itself")
    return splits


LOADERS = {"cub200": load_cub200, "cars196": load_cars196, "sop": load_sop, "folder": load_folder}
DATASETS = ("toy", *LOADERS)


def hold_out(split, fraction):
    """Cut the last `fraction` of a split's classes off for validation: (remaining Split, validation Split)."""
    number = len(split.class_names)
    held = max(2, round(fraction * number))       # one class alone would make retrieval trivial
    if number - held < 2:
        raise UserError(f"--val_fraction {fraction} leaves {number - held} of {number} training classes: "
                        "at least two have to remain on either side")
    return class_range(split, 0, number - held), class_range(split, number - held, number)


def load_splits(args):
    """(training, validation or None, test) Splits of a run."""
    rank, world = processes()
    if rank:
        with clear_errors("waiting for the first process", "its own message says why"):
            dist.barrier()                  # rank 0 comes first: it may have to download
    train, test = load(args.dataset, args.data_root)
    if world > 1 and not rank:
        dist.barrier()
    if args.corrupt:
        train, test = corrupted(train, seed=1), corrupted(test, seed=2)
    if args.val_fraction:
        return (*hold_out(train, args.val_fraction), test)
    return train, None, test


# ------------------------------------------------------------------------------------------------------ downloads

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
SOP_URL = "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip"


@contextlib.contextmanager
def clear_errors(action, remedy):
    """Turn what can go wrong between a server and a disk into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:       # the latter is what torch.save makes of a full disk
        if getattr(error, "errno", None) == errno.ENOSPC:
            remedy = "the disk is full: make room and run again"
        reason = str(getattr(error, "reason", error)).partition("\n")[0]
        raise UserError(f"{action} failed ({reason}); {remedy}") from None


def check_md5(path, md5):
    if not Path(path).exists():
        raise UserError(f"{path} is missing: put it there")
    digest = hashlib.md5()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != md5:
        raise UserError(f"{path} has the MD5 digest {digest.hexdigest()} instead of {md5}: delete and fetch it again")


def download(url, path):
    """Append to `path` what it lacks of `url` (HTTP), or fetch it from the beginning (FTP, file)."""
    done = path.stat().st_size if path.exists() else 0
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:                      # nothing is left to send: the digest decides what we have
            return
        raise
    with response, open(path, "ab" if getattr(response, "status", None) == 206 else "wb") as file:
        length, start = int(response.headers.get("Content-Length") or 0), file.tell()
        free = shutil.disk_usage(path.parent).free
        if 2 * length > free:                      # the archive, and what comes out of it
            raise UserError(f"{path.parent} has {free >> 20} MiB free, but {url} needs about {2 * length >> 20} MiB "
                            "with its contents: make room and run again")
        print(f"downloading {url} ({length >> 20} MiB)", flush=True)
        for block in progress(iter(lambda: response.read(1 << 20), b""), math.ceil(length / (1 << 20)), "MiB"):
            file.write(block)
        if file.tell() - start < length:
            raise OSError(f"the connection was cut {length - file.tell() + start} bytes before the end")


def fetch(root, url, md5, folder):
    """Download `url` into `root`, check its MD5 digest and unpack the `folder` in it. Run again to resume."""
    archive = Path(root) / url.rsplit("/", 1)[1]
    part = archive.with_name(archive.name + ".part")
    if not archive.exists():
        with clear_errors(f"the download of {url}", f"run again to go on, put the file into {root} by hand, or "
                          "try --dataset toy, which needs none"):
            archive.parent.mkdir(parents=True, exist_ok=True)
            download(url, part)
            os.replace(part, archive)
    check_md5(archive, md5)
    unpack(archive, root, folder)


def unpack(archive, root, folder):
    """Unpack `folder` of a .tgz or .zip archive below `root`, all or nothing, and nothing outside of it."""
    staging = Path(root) / f".unpacking-{folder}"
    shutil.rmtree(staging, ignore_errors=True)     # what an interrupted run has left
    print(f"unpacking {archive}", flush=True)
    with clear_errors(f"unpacking {archive}", "delete the archive and run again"):
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    file.extractall(staging)       # which puts members that point outside inside
            else:
                with tarfile.open(archive) as file:
                    file.extractall(staging, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{archive} is not a readable archive ({error}): delete it and run again") from None
        os.replace(staging / folder, Path(root) / folder)    # only now does the data set exist
        shutil.rmtree(staging)


# ------------------------------------------------------------------------------------------------ toy characters

def load_toy(seed=0, classes=200, per_class=20, size=32):
    """Hand-drawn-like characters, made from `seed` alone: 100 training and 100 test classes of 20 images, 32 x 32.

    A class is two to four curved strokes, and three numbers that say how much its drawings differ in slant, in
    thickness and in size: one of the three varies much, the others little, so that a class is non-isotropic and each
    class in its own way. A drawing's ambiguity, uniform in [0, 1], is how much of it is blurred and missing.
    """
    rng = torch.Generator().manual_seed(seed)
    n, steps = classes * per_class, 24

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=rng)

    # Classes: two to four quadratic Bezier strokes of three control points in [-1, 1]^2.
    control = uniform(classes, 4, 3, 2, low=-1, high=1)
    present = torch.arange(4) < torch.randint(2, 5, (classes, 1), generator=rng)                  # (classes, 4)
    spread = torch.full((classes, 3), 0.25)                                                      # slant, thickness, size
    spread[torch.arange(classes), torch.randint(3, (classes,), generator=rng)] = 1.0

    # Drawings: a wobble of the control points, then slant, thickness and size by the class's own spread.
    labels = torch.arange(classes).repeat_interleave(per_class)
    ambiguity = uniform(n)
    control = control[labels] + 0.12 * torch.randn(n, 4, 3, 2, generator=rng)
    slant, thickness, scale = (torch.randn(n, 3, generator=rng) * spread[labels]).unbind(1)
    t = torch.linspace(0, 1, steps).view(-1, 1)
    basis = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t ** 2], dim=1)                             # (steps, 3)
    points = torch.einsum("sk,nbkc->nbsc", basis, control)                                        # (n, 4, steps, 2)
    points[..., 0] = points[..., 0] + (0.4 * slant).view(-1, 1, 1) * points[..., 1]
    points = points * (0.62 * torch.exp(0.22 * scale)).view(-1, 1, 1, 1) + 0.08 * torch.randn(n, 1, 1, 2, generator=rng)

    # A gap of each stroke is missing: up to 90 % of its length for the most ambiguous drawings.
    gap = 0.9 * ambiguity.view(-1, 1, 1) * uniform(n, 4, 1)
    start = uniform(n, 4, 1) * (1 - gap)
    drawn = present[labels].unsqueeze(2) & ~((t.mT >= start) & (t.mT < start + gap))              # (n, 4, steps)
    points[~drawn] = 99.0                                                                         # off the paper
    points = points.flatten(1, 2)                                                                 # (n, 4 * steps, 2)

    # Ink falls off with the distance to the nearest stroke point; then a Gaussian blur along rows and columns.
    grid = torch.linspace(-1, 1, size)
    distance = torch.cat([((grid.view(1, 1, -1, 1) - part[:, None, None, :, 0]) ** 2 +
                           (grid.view(1, -1, 1, 1) - part[:, None, None, :, 1]) ** 2).amin(3)
                          for part in points.split(100)]).sqrt()                                  # (n, size, size)
    width = (0.07 * torch.exp(0.45 * thickness)).view(-1, 1, 1)
    ink = torch.sigmoid((width - distance) / 0.02)
    pixel = torch.arange(size)
    sigma = 0.3 + 2.2 * ambiguity.view(-1, 1, 1)
    blur = torch.exp(-(pixel.view(-1, 1) - pixel) ** 2 / (2 * sigma ** 2))                        # (n, size, size)
    blur = blur / blur.sum(2, keepdim=True)
    ink = blur @ ink @ blur.mT + 0.05 * torch.randn(n, size, size, generator=rng)
    images = (255 * (1 - ink.clamp(0, 1))).to(torch.uint8).numpy()                                # dark on white
    return halves(Split(list(images), labels, [f"character{c:03d}" for c in range(classes)], ambiguity), "toy")


# ---------------------------------------------------------------------------------------------- images and batches

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # ImageNet's, of red, green and blue in [0, 1]


def reduction(transform, width, height):
    """1, 2, 4 or 8: by how much a JPEG may be reduced in decoding, which is several times faster, such that `transform`
    enlarges nothing that it would not have enlarged anyway. Resize takes the short side. RandomResizedCrop's narrowest
    crop is sqrt(least area x least ratio x width x height) pixels wide, or as the short side if that is less. Below a
    megapixel there is little to gain, and the answer 1."""
    first, short, possible = next(iter(getattr(transform, "transforms", ())), None), min(width, height), 1
    if isinstance(first, transforms.RandomResizedCrop):
        possible = min(math.sqrt(first.scale[0] * first.ratio[0] * width * height), short) / max(first.size)
    elif isinstance(first, transforms.Resize) and isinstance(first.size, int):
        possible = short / first.size
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or scale <= possible and width * height >= 2 ** 20)


def read_image(source, transform=None):
    """A path, a uint8 array (H, W) or a PIL image as an RGB picture; grey, palette, RGBA and CMYK are converted. A large
    JPEG file is decoded at the size that `transform`, which is to come, has use for."""
    try:
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(source) as image:
            scale = reduction(transform, *image.size)
            if scale > 1:                                           # files of other formats take no notice
                image.draft(None, (image.width // scale, image.height // scale))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source} is not a readable image ({error}): replace or remove it") from None


def train_transform(size, augment):
    """`photo`: the papers' crop and flip. `light`: for drawings, which neither survive a crop of 8 % nor a mirror."""
    crops = {"photo": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
             "light": [transforms.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.8, 1.25))]}
    return transforms.Compose([*crops[augment], transforms.PILToTensor()])


def test_transform(size, augment):
    """Resize(256) and CenterCrop(224), or the same ratio at other sizes; `light` keeps the whole picture."""
    resize = transforms.Resize(size if augment == "light" else round(size * 256 / 224))
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])


def corrupted(split, seed):
    """The split with an amount of corruption, uniform in [0, 1], given to each image. It is the image's ambiguity;
    toy's own comes on top: an image is clear to the extent that it is neither."""
    amount = torch.rand(len(split.images), generator=torch.Generator().manual_seed(seed))
    own = 0 if split.ambiguity is None else split.ambiguity
    return split._replace(corruption=amount, ambiguity=1 - (1 - amount) * (1 - own))


def corrupt(image, amount, seed):
    """Add noise of `amount` colour deviations to a picture (3, H, W) uint8, clip it to 0 .. 255, and make a square of up
    to half its area the mean colour."""
    rng = torch.Generator().manual_seed(seed)
    mean, deviation = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    image = (image + amount * deviation * torch.randn(image.shape, generator=rng)).round().clamp(0, 255).to(torch.uint8)
    side = round(math.sqrt(0.5 * amount) * min(image.shape[1:]))
    top, left = (int(torch.randint(length - side + 1, (), generator=rng)) for length in image.shape[1:])
    image[:, top:top + side, left:left + side] = mean.round().to(torch.uint8)
    return image


class Images(torch.utils.data.Dataset):
    """Pictures of a Split as uint8 tensors (3, H, W) with their labels; the network normalises them.

    An item is asked for by its index, or by (index, seed): then its augmentation depends on the seed alone, and not
    on which worker process draws it, how many there are, or what was drawn before.
    """

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, item):
        index, seed = item if isinstance(item, (tuple, list)) else (item, 0)
        image = read_image(self.split.images[index], self.transform)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        image = self.transform(image)
        torch.set_rng_state(state)
        if self.split.corruption is not None:              # the same noise in every epoch: it belongs to the image
            image = corrupt(image, float(self.split.corruption[index]), seed=index)
        return image, self.split.labels[index]


def largest_batch(labels, per_class=2):
    """Two images of each class; where classes are few but large, a quarter of the images."""
    return max(per_class * len(labels.unique()), len(labels) // 4 // per_class * per_class)


class ClassBatches:
    """Batches of `per_class` images of each of `batch_size / per_class` different classes, drawn at random.

    A class's images are shuffled and cut into groups, and each batch takes the next group of the classes it draws. A
    class is drawn in proportion to the groups it has left; one with as many groups left as there are batches left
    must be in all of them. So every image is seen in every epoch. (Unless a class has more groups than the epoch has
    room for: then as many as fit, others each time.) Too few classes for a batch each give several groups (a warning).

    Yields lists of (image index, augmentation seed), or the `share` of each; all follows from the seed and `epoch`
    alone. Raises UserError for a batch size that does not fit.
    """

    def __init__(self, labels, batch_size, per_class=2, seed=0):
        if batch_size < per_class or batch_size % per_class:
            raise UserError(f"--batch_size {batch_size} is not a multiple of {per_class}, the images per class: "
                            f"try {max(per_class, batch_size - batch_size % per_class)}")
        if batch_size > largest_batch(labels, per_class):
            raise UserError(f"--batch_size {batch_size} is more than {len(labels)} images of {len(labels.unique())} "
                            f"training classes allow: use at most {largest_batch(labels, per_class)}")
        self.members = [torch.nonzero(labels == c).flatten() for c in range(int(labels.max()) + 1)]
        self.per_class, self.seed, self.epoch, self.share = per_class, seed, 0, slice(None)
        self.groups = torch.tensor([math.ceil(len(m) / per_class) for m in self.members])
        self.length = math.ceil(int(self.groups.sum()) / (batch_size // per_class))
        self.everywhere, self.drawn = divmod(batch_size // per_class, len(self.members))
        if self.everywhere and (self.everywhere > 1 or self.drawn):
            warnings.warn(f"{len(self.members)} training classes cannot fill a batch of {batch_size} with {per_class} "
                          f"images each: it holds up to {per_class * (self.everywhere + (self.drawn > 0))} of a class")

    def __len__(self):
        return self.length

    def __iter__(self):
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        queues = [[] for _ in self.members]
        left = (self.groups - self.everywhere * self.length).clamp(0, self.length)
        for batches_left in range(self.length, 0, -1):
            # Gumbel-top-k: a weighted draw without replacement. Classes with nothing left only fill up.
            keys = left.clamp(min=1e-9).log() - torch.rand(len(left), generator=rng).clamp(min=1e-30).log().neg().log()
            keys[left >= batches_left] = math.inf
            chosen = keys.topk(self.drawn).indices
            left[chosen] = (left[chosen] - 1).clamp(min=0)
            batch = []
            for c in [*range(len(self.members))] * self.everywhere + chosen.tolist():
                if len(queues[c]) < self.per_class:        # reshuffle; an incomplete last group is filled from here
                    fresh = self.members[c][torch.randperm(len(self.members[c]), generator=rng)].tolist()
                    while len(queues[c]) < self.per_class:
                        queues[c] += [i for i in fresh if i not in queues[c]] or fresh
                batch += [queues[c].pop(0) for _ in range(self.per_class)]
            seeds = torch.randint(2 ** 62, (len(batch),), generator=rng).tolist()
            yield list(zip(batch, seeds))[self.share]
