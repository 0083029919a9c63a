"""Data sets for zero-shot retrieval: files, training and test classes, batches.

A network trains on one half of a data set's classes and retrieves images of the other
half, which it has never seen. In reading order: what all scripts share, namely errors,
processes and progress; splits and how they are loaded; the readers of CUB200-2011,
Cars196, Stanford Online Products (SOP) and a folder of one's own; downloads; the
built-in `toy` characters; images; batches.
"""
import contextlib
import errno
import http.client
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
import torch
import torch.distributed as dist
from PIL import ExifTags, Image
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5


class UserError(ValueError):
    """A user's mistake, told in one sentence.

    The sentence names the file, option or value and says what to do.
    """


@contextlib.contextmanager
def clear_errors(action, remedy):
    """Raise a failure of network, disk or another process as a UserError.

    It reads "ACTION failed (REASON); REMEDY". A UserError passes unchanged.
    """
    try:
        yield
    # RuntimeError: torch.save, a lost process. HTTPException: an answer that is cut.
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            remedy = "the disk is full: make room and run again"
        reason = str(getattr(error, "reason", error)).partition("\n")[0]
        raise UserError(f"{action} failed ({reason}); {remedy}") from None


def processes():
    """The rank of this process and the number of processes that torchrun has started.

    Rank 0 alone prints and writes files.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def progress(items, total, what):
    """Yield from `items`, and show on stderr how many of `total` are done and the time left.

    In a terminal that is one line, rewritten twice a second; in a log file it is a line
    a minute.
    """
    is_terminal = sys.stderr.isatty()
    interval = 0.5 if is_terminal else 60
    is_first = processes()[0] == 0
    start = last_shown = time.monotonic()

    for done, item in enumerate(items):
        now = time.monotonic()
        if is_first and done > 0 and now - last_shown > interval:
            last_shown = now
            seconds_left = int((now - start) / done * (total - done))
            minutes, seconds = divmod(seconds_left, 60)
            text = f"  {what} {done}/{total}, {minutes}:{seconds:02d} left"
            if is_terminal:
                # \r goes to the start of the line, \x1b[K erases what is right of it.
                print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                print(text, file=sys.stderr, flush=True)
        yield item

    if is_terminal and last_shown != start:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ splits

class Split(NamedTuple):
    """Images with their labels and class names.

    It is a whole data set, or the classes to train, validate or test with. Labels run from
    0 to `len(class_names) - 1`. Ambiguity says how hard an image is to recognise; it is
    known for toy only.
    """
    images: list  # N paths, or N uint8 arrays (H, W)
    labels: torch.Tensor  # (N,) int64
    class_names: list
    ambiguity: torch.Tensor | None = None  # (N,) in [0, 1]


def usual_ks(dataset):
    """The k for which papers report Recall@k on a data set."""
    return (1, 10, 100, 1000) if dataset == "sop" else (1, 2, 4, 8)


# Numbers of training and test images in the published splits.
PUBLISHED = {
    "cub200": (5864, 5924),
    "cars196": (8054, 8131),
    "sop": (59551, 60502),
}


def load(name, root, download=True):
    """The training and the test Split of the data set `name` in the folder `root`.

    Downloads CUB200-2011 and SOP where they are missing, unless `download` is False.
    Classes without an image are left out, because their proxies would have no positives.
    Warns of them, of numbers of images that are not the published ones, and of training
    classes with a single image. Raises UserError for a download that fails, for files that
    are missing or cannot be read, and where fewer than two classes train or test.
    """
    if name not in LOADERS:
        raise UserError(
            f"no reader is known for the data set {name}: add the one of the run to "
            "data.LOADERS"
        )
    folder = root
    if name in ARCHIVES:
        folder = find_or_fetch(root, *ARCHIVES[name], download)
    train, test = LOADERS[name](folder)

    check_files(train.images + test.images)
    train, test = without_empty_classes(train, root), without_empty_classes(test, root)
    check_counts(name, root, train, test)
    return train, test


def check_files(images):
    """Raise UserError where files are listed that are not there."""
    paths = [image for image in images if isinstance(image, (str, Path))]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"{len(missing)} listed images are missing, the first is {missing[0]}: "
            "unpack the data again, or put them back"
        )


def check_counts(name, root, train, test):
    """Warn of unusual numbers of images; raise UserError for fewer than two classes."""
    counts = len(train.images), len(test.images)
    published = PUBLISHED.get(name)  # None for a data set of one's own
    if published and counts != published:
        warnings.warn(
            f"{root} holds {counts[0]} training and {counts[1]} test images of {name}, "
            f"the published split {published[0]} and {published[1]}: "
            "results on a subset cannot be compared with a paper's"
        )

    # Within a single class, any retrieval is right.
    classes = len(train.class_names), len(test.class_names)
    if min(classes) < 2:
        raise UserError(
            f"{root} holds images of {classes[0]} training and {classes[1]} test classes "
            f"of {name}, but both need two: get the whole set"
        )

    both = set(train.class_names).intersection(test.class_names)
    if both:
        warnings.warn(
            f"{len(both)} class(es) of {name} have the same name in training and test: "
            "retrieval is measured on classes never seen in training"
        )

    single = int((torch.bincount(train.labels) == 1).sum())
    if single:
        warnings.warn(
            f"{single} training class(es) have one image, which is paired with itself"
        )


def load_splits(args, download=True):
    """The training, validation and test Splits of a run; validation may be None.

    Uses the options `dataset`, `data_root` and `val_fraction` of `args`. Unless `download`
    is False, a data set that is missing is downloaded.
    """
    rank, world = processes()

    # Rank 0 loads first, because it may have to download. The others wait for it; where
    # it fails, so does their wait.
    if rank > 0:
        with clear_errors("waiting for the first process", "its own message says why"):
            dist.barrier()
    train, test = load(args.dataset, args.data_root, download)
    if rank == 0 and world > 1:
        dist.barrier()

    validation = None
    if args.val_fraction:
        train, validation = hold_out(train, args.val_fraction)
    return train, validation, test


def class_range(split, first, last):
    """The classes `first` to `last - 1` of a Split, as a Split of their own."""
    chosen = torch.nonzero((split.labels >= first) & (split.labels < last)).flatten()
    return Split(
        images=[split.images[i] for i in chosen],
        labels=split.labels[chosen] - first,
        class_names=split.class_names[first:last],
        ambiguity=None if split.ambiguity is None else split.ambiguity[chosen],
    )


def check_split(split):
    """Raise UserError for a Split that a reader has put together wrongly."""
    labels = torch.as_tensor(split.labels)
    N, C = len(split.images), len(split.class_names)
    in_range = (labels >= 0) & (labels < C)
    if labels.shape != (N,) or labels.is_floating_point() or not in_range.all():
        raise UserError(
            f"a reader gives {N} images and {C} class names, but labels that do not fit them: "
            f"{N} whole numbers from 0 to {C - 1} are needed"
        )


def without_empty_classes(split, root):
    """The Split without the classes that have no image, of which a warning tells."""
    check_split(split)
    classes, labels = torch.as_tensor(split.labels).unique(return_inverse=True)
    num_empty = len(split.class_names) - len(classes)
    if num_empty > 0:
        warnings.warn(f"{root}: left out {num_empty} class(es) without an image")
    names = [str(split.class_names[c]) for c in classes]
    return split._replace(labels=labels, class_names=names)


def halves(split):
    """The first half of the classes, to train with, and the second half, to test with.

    This is the field's protocol, except for SOP.
    """
    check_split(split)
    num_classes = len(split.class_names)
    middle = num_classes // 2
    return class_range(split, 0, middle), class_range(split, middle, num_classes)


def hold_out(split, fraction):
    """The Split without the last `fraction` of its classes, and a Split of those classes.

    At least two classes are held out, because retrieval within one class is trivial.
    """
    num_classes = len(split.class_names)
    remaining = num_classes - max(2, round(fraction * num_classes))
    if remaining < 2:
        raise UserError(
            f"--val_fraction {fraction} leaves {remaining} of {num_classes} training "
            "classes: at least two have to remain on either side"
        )
    return class_range(split, 0, remaining), class_range(split, remaining, num_classes)


# ----------------------------------------------------------------------------- readers

# `root` is --data_root, `base` the folder of one data set, which is there already.

def load_cub200(base):
    """CUB200-2011, from three lists that are joined by their ids."""
    class_names = dict(read_table(base / "classes.txt", 2))  # by class id
    paths = dict(read_table(base / "images.txt", 2))  # by image id
    class_of_image = dict(read_table(base / "image_class_labels.txt", 2))
    label_of_class = {class_id: label for label, class_id in enumerate(class_names)}

    try:
        labels = [label_of_class[class_of_image[image_id]] for image_id in paths]
    except KeyError as error:
        raise UserError(
            f"{base} has no class for the id {error}: unpack the archive again"
        ) from None

    images = [base / "images" / path for path in paths.values()]
    return halves(Split(images, torch.tensor(labels), list(class_names.values())))


def load_cars196(root):
    """Cars196, in either of the two layouts in circulation.

    The older layout has cars_annos.mat and car_ims/. The newer one has devkit/,
    cars_train/, cars_test/ and cars_test_annos_withlabels.mat. Both list the same
    images, numbered differently. The authors' own training and test images share all
    classes, so all images are put together and split by class: 1 to 98 train, 99 to
    196 test.
    """
    root = Path(root)
    archive = root / "car_ims.tgz"
    if archive.exists() and not (root / "car_ims").exists():
        check_md5(archive, CARS_IMAGES_MD5)
        check_md5(root / "cars_annos.mat", CARS_LIST_MD5)
        unpack(archive, "car_ims")

    for base in (root / "stanford_cars", root / "cars196", root):
        older_list = base / "cars_annos.mat"
        if older_list.exists() and (base / "car_ims").is_dir():
            folders = {older_list: base}
            return halves(read_cars196(folders, "relative_im_path", older_list))

        train_list = base / "devkit/cars_train_annos.mat"
        test_list = base / "cars_test_annos_withlabels.mat"
        if train_list.exists():
            if not test_list.exists():
                raise UserError(
                    f"{test_list} is missing: "
                    "put it there, it holds half of Cars196's labels"
                )
            folders = {train_list: base / "cars_train", test_list: base / "cars_test"}
            return halves(read_cars196(folders, "fname", base / "devkit/cars_meta.mat"))

    raise UserError(
        f"Cars196 was not found in {root}, and its official address is dead: "
        "put there either car_ims.tgz and cars_annos.mat, or the folders devkit/, "
        "cars_train/, cars_test/ and cars_test_annos_withlabels.mat "
        "(both are in circulation as 'Stanford Cars')"
    )


def read_cars196(folders, path_field, names_file):
    """A Split of all images of Cars196.

    `folders` maps each list of images to the folder that its paths are relative to.
    `names_file` holds the class names; in the older layout that is the same list.
    """
    paths, labels = [], []
    for image_list, folder in folders.items():
        rows = read_mat(image_list, "annotations", path_field, "class")
        for path, class_number in rows:
            paths.append(folder / str(path))
            labels.append(int(class_number) - 1)  # class numbers begin at 1
    names = [str(name) for name in read_mat(names_file, "class_names")]
    return Split(paths, torch.tensor(labels), names)


def read_mat(path, variable, *fields):
    """The values of a variable in one of Cars196's MATLAB files, or some of their fields.

    Raises UserError for a file that cannot be read.
    """
    try:
        mat = scipy.io.loadmat(path, squeeze_me=True, variable_names=variable)
        values = np.atleast_1d(mat[variable])
        return values[list(fields)] if fields else values
    # For a damaged file scipy raises errors of any kind.
    except Exception as error:
        raise UserError(
            f"{path} is not a readable Cars196 annotation file ({error}): "
            "fetch it again"
        ) from None


def load_sop(base):
    """Stanford Online Products, split by its own two lists."""
    return read_sop(base, "Ebay_train.txt"), read_sop(base, "Ebay_test.txt")


def read_sop(base, name):
    """A Split of the images that one of SOP's two lists names."""
    # Below a line of headings: image id, class id, super-class id, path.
    rows = read_table(base / name, 4)[1:]
    paths = [base / path for _, _, _, path in rows]
    class_ids = [int(class_id) for _, class_id, _, _ in rows]
    classes, labels = np.unique(class_ids, return_inverse=True)
    names = [str(class_id) for class_id in classes]
    return Split(paths, torch.as_tensor(labels), names)


def load_folder(root):
    """One's own photographs, in a sub-folder for each class.

    Classes are sorted by name. Pictures in no sub-folder are left out with a warning.
    Raises UserError where there are fewer than four classes, two to train and two to test.
    """
    split = load_pictures(root, loose=False)
    names = split.class_names
    if len(names) < 4 or {"train", "test"} <= {name.lower() for name in names}:
        raise UserError(
            f"{root} holds {len(names)} sub-folder(s), {', '.join(names[:5])}, but four "
            "classes are needed, two to train and two to test: "
            "give a folder that holds a sub-folder for each class"
        )
    return halves(split)


# Of the pictures in a folder. Not all that Pillow registers: a video is none.
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".mpo", ".jp2", ".tga")


def load_pictures(folder, loose=True):
    """A Split of all pictures below a folder, sorted by path, without hidden ones.

    A picture's class is the first folder of its path below `folder`, or "" if there is
    none. Such loose pictures are left out if `loose` is False. Links are followed. Warns of
    what is left out, and raises UserError where there is no picture.
    """
    folder = Path(folder)
    left_out = Counter()  # how many, by reason
    class_folders = set()
    paths = []

    for base, names in walk(folder, left_out):
        if base.parent == folder:
            class_folders.add(base.name)
        for path in [base / name for name in names if not name.startswith(".")]:
            suffix = path.suffix.lower()
            if not os.path.isfile(path):
                left_out["broken link(s), or no files"] += 1
            elif suffix not in SUFFIXES:
                left_out[f"{suffix or 'other'} file(s), which are not read"] += 1
            elif base == folder and not loose:
                left_out["picture(s) beside the class folders"] += 1
            else:
                paths.append(path)

    paths.sort()
    below = [path.relative_to(folder).parts for path in paths]
    classes = [parts[0] if len(parts) > 1 else "" for parts in below]
    left_out["folder(s) without an image"] = len(class_folders - set(classes))
    reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common(7) if n > 0)

    if not paths:
        because = f" (left out: {reasons})" if reasons and folder.is_dir() else ""
        raise UserError(
            f"{folder} is no folder, or there is no image below it{because}: "
            "give a folder with images; to train, with a sub-folder for each class"
        )
    if reasons:
        warnings.warn(f"{folder}: left out {reasons}")
    names, labels = np.unique(classes, return_inverse=True)
    return Split(paths, torch.as_tensor(labels), names.tolist())


def walk(folder, left_out):
    """Yield each folder below `folder`, and itself, with the names of its files.

    Hidden folders are passed over. Links are followed, unless they lead in a circle. What
    is passed over is counted in `left_out`.
    """
    def note_unreadable(error):
        left_out[f"folder(s) that cannot be read ({error.strerror})"] += 1

    for base, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        yield Path(base), names

        visible = [name for name in folders if not name.startswith(".")]
        folders.clear()  # os.walk goes on with what is put here
        if not visible:
            continue
        above = {os.path.realpath(path) for path in (base, *Path(base).parents)}
        for name in visible:
            if os.path.realpath(os.path.join(base, name)) in above:
                left_out["link(s) to a folder above"] += 1
            else:
                folders.append(name)


def read_table(path, columns):
    """The rows of a text file of space-separated columns; the last may hold spaces."""
    try:
        # utf-8-sig skips the byte order mark that some editors put at the beginning.
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    rows = [line.strip().split(None, columns - 1) for line in lines if line.strip()]
    if not rows or any(len(row) != columns for row in rows):
        raise UserError(
            f"{path} is missing, empty, no UTF-8 text or does not have {columns} columns: "
            "unpack the archive again"
        )
    return rows


# A reader of one's own is added here. It gets the folder --data_root, and returns the
# training and the test Split.
LOADERS = {
    "toy": lambda root: load_toy(),
    "cub200": load_cub200,
    "cars196": load_cars196,
    "sop": load_sop,
    "folder": load_folder,
}


# --------------------------------------------------------------------------- downloads

# Address, MD5 digest, the folder in it, a file in that folder.
ARCHIVES = {
    "cub200": (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "97eceeb196236b17998738112f37df78",
        "CUB_200_2011",
        "images.txt",
    ),
    "sop": (
        "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "7f73d41a2f44250d4779881525aea32e",
        "Stanford_Online_Products",
        "Ebay_train.txt",
    ),
}
CARS_IMAGES_MD5 = "d5c8f0aa497503f355e17dc7886c3f14"  # of car_ims.tgz
CARS_LIST_MD5 = "b407c6086d669747186bd1d764ff9dbc"  # of cars_annos.mat


def find_or_fetch(root, url, md5, folder, marker, may_download):
    """The folder that holds the file `marker`: `folder` below `root`, or `root` itself.

    Where neither does, the data set is downloaded and unpacked. Raises UserError for a
    `folder` that is there without the file, and where a download is needed but not allowed.
    """
    root = Path(root)
    target = root / folder
    for base in (target, root):
        if (base / marker).exists():
            return base
    if target.exists():
        raise UserError(
            f"{target} holds no {marker}: delete the folder to download it again"
        )

    archive = root / url.rsplit("/", 1)[1]
    if archive.exists():
        check_md5(archive, md5)
    elif may_download:
        download(url, archive, md5)
    else:
        raise UserError(
            f"{folder} is not in {root}: give --data_root the folder that holds it"
        )
    unpack(archive, folder)
    return target


def download(url, archive, md5):
    """Download `url` to the file `archive`, the whole of it or nothing."""
    root = archive.parent
    remedy = (
        f"run again, put the file into {root} by hand, "
        "or try --dataset toy, which needs no download"
    )
    show_progress = sys.stderr.isatty() and processes()[0] == 0
    usual_timeout = socket.getdefaulttimeout()
    print(f"downloading {url}", flush=True)
    with clear_errors(f"the download of {url}", remedy):
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=root) as staging:
            part = Path(staging, archive.name)
            socket.setdefaulttimeout(60)  # seconds without an answer
            try:
                torch.hub.download_url_to_file(url, str(part), progress=show_progress)
            finally:
                socket.setdefaulttimeout(usual_timeout)

            # torch.hub does not notice that a connection was cut.
            if calculate_md5(part) != md5:
                raise OSError("its MD5 digest is wrong: it was cut, or has changed")
            os.replace(part, archive)


def check_md5(path, md5):
    """Raise UserError for a file that is missing or has another MD5 digest."""
    if not path.exists():
        raise UserError(f"{path} is missing: put it there")
    digest = calculate_md5(path)
    if digest != md5:
        raise UserError(
            f"{path} has the MD5 digest {digest} instead of {md5}: "
            "delete it and run again"
        )


def unpack(archive, folder):
    """Unpack `folder` of a .tgz or .zip archive beside it, all of it or nothing."""
    # The filter refuses a tar's members that point outside of the folder. A zip's are
    # always left out.
    tar_filter = None if archive.suffix == ".zip" else "data"
    root = archive.parent
    remedy = f"see to it that {root} can be written, and run again"
    print(f"unpacking {archive}", flush=True)
    with clear_errors(f"unpacking {archive}", remedy):
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=root) as staging:
            shutil.unpack_archive(archive, staging, filter=tar_filter)
            os.replace(Path(staging, folder), root / folder)


# ---------------------------------------------------------------------- toy characters

def load_toy(seed=0, classes=200, per_class=20, size=32):
    """Made-up characters: 100 training and 100 test classes of 20 drawings, 32 x 32.

    A class has two to four curved strokes. Its drawings vary in slant, thickness and size:
    much in one of the three, little in the others, so that classes are non-isotropic. A
    drawing's ambiguity, uniform in [0, 1], says how much of it may be missing and how
    blurred it is. All pixels have a little noise. Everything follows from `seed`.
    """
    rng = torch.Generator().manual_seed(seed)

    # What the drawings of a class have in common: the control points of its strokes
    # in [-1, 1]^2, and how much slant, thickness and size vary.
    control = 2 * torch.rand(classes, 4, 3, 2, generator=rng) - 1
    num_strokes = torch.randint(2, 5, (classes, 1), generator=rng)
    has_stroke = torch.arange(4) < num_strokes  # (classes, 4)
    variation = torch.full((classes, 3), 0.25)
    most_varied = torch.randint(3, (classes,), generator=rng)
    variation[torch.arange(classes), most_varied] = 1.0

    labels = torch.arange(classes).repeat_interleave(per_class)  # (N,)
    ambiguity = torch.rand(len(labels), generator=rng)
    t = torch.linspace(0, 1, 24)  # positions along a stroke, (T,)
    points, log_thickness = vary_strokes(control[labels], variation[labels], t, rng)

    # Each stroke has a gap, of up to 90 % of its length in the most ambiguous drawings.
    length = torch.rand(len(labels), 4, 1, generator=rng)
    length = 0.9 * ambiguity.view(-1, 1, 1) * length
    start = (1 - length) * torch.rand(len(labels), 4, 1, generator=rng)
    missing = (t >= start) & (t < start + length)  # (N, 4, T)
    points[missing | ~has_stroke[labels].unsqueeze(2)] = 99.0  # off the paper

    ink = render(points, log_thickness, size)
    ink = blur(ink, ambiguity)
    ink = ink + 0.05 * torch.randn(ink.shape, generator=rng)
    images = (255 * (1 - ink.clamp(0, 1))).to(torch.uint8).numpy()  # dark on white
    names = [f"character{c:03d}" for c in range(classes)]
    return halves(Split(list(images), labels, names, ambiguity))


def vary_strokes(control, variation, t, rng):
    """The points (N, 4, T, 2) of each drawing's strokes, and its log thickness (N,).

    `control` (N, 4, 3, 2) and `variation` (N, 3) are those of the drawing's class. Each
    drawing moves the control points, and is slanted, scaled and shifted in its own way.
    A stroke is a quadratic Bezier curve: with control points p0, p1, p2, position t is

        (1 - t)^2 p0 + 2 t (1 - t) p1 + t^2 p2
    """
    control = control + 0.12 * torch.randn(control.shape, generator=rng)
    normal = torch.randn(variation.shape, generator=rng)
    slant, log_thickness, log_scale = (normal * variation).unbind(1)

    # Drawing n, stroke s, control point k, position t, coordinate c.
    basis = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t ** 2], dim=1)  # (T, 3)
    points = torch.einsum("tk,nskc->nstc", basis, control)  # (N, 4, T, 2)

    x, y = points.unbind(3)
    x = x + (0.4 * slant).view(-1, 1, 1) * y
    scale = 0.62 * torch.exp(0.22 * log_scale)
    shift = 0.08 * torch.randn(len(points), 1, 1, 2, generator=rng)
    points = torch.stack([x, y], dim=3) * scale.view(-1, 1, 1, 1) + shift
    return points, log_thickness


def render(points, log_thickness, size):
    """Ink (N, size, size) in [0, 1], which fades away from the strokes.

    With a pixel's distance from the nearest point, and the width of the strokes,

        ink = sigmoid((width - distance) / 0.02)
    """
    grid = torch.linspace(-1, 1, size)
    pixel_x = grid.view(1, 1, -1, 1)
    pixel_y = grid.view(1, -1, 1, 1)

    # In chunks of 100 drawings, because all distances at once would take gigabytes.
    nearest = []
    for chunk in points.flatten(1, 2).split(100):  # (100, 4 T, 2)
        x, y = chunk[:, None, None].unbind(-1)  # (100, 1, 1, 4 T)
        squared = (pixel_x - x) ** 2 + (pixel_y - y) ** 2  # (100, size, size, 4 T)
        nearest.append(squared.amin(3))
    distance = torch.cat(nearest).sqrt()

    width = 0.07 * torch.exp(0.45 * log_thickness)
    return torch.sigmoid((width.view(-1, 1, 1) - distance) / 0.02)


def blur(ink, ambiguity):
    """Ink (N, size, size) after a Gaussian blur, the wider the more ambiguous."""
    pixel = torch.arange(ink.shape[1])
    offset = pixel.view(-1, 1) - pixel
    sigma = 0.3 + 2.2 * ambiguity.view(-1, 1, 1)  # in pixels
    kernel = torch.exp(-offset ** 2 / (2 * sigma ** 2))  # (N, size, size)
    kernel = kernel / kernel.sum(2, keepdim=True)
    return kernel @ ink @ kernel.mT  # along the columns, then along the rows


# ------------------------------------------------------------------------------ images

# ImageNet's mean and standard deviation of red, green and blue, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class Images(torch.utils.data.Dataset):
    """Pictures of a Split as uint8 tensors (3, H, W), with their labels.

    The network normalises them. An item is asked for by its index, or by (index, seed).
    How it is augmented depends on the seed alone, and not on the worker process that
    loads it, or on what was loaded before.
    """

    def __init__(self, split, transform):
        self.split = split
        self.transform = transform

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, item):
        index, seed = item if isinstance(item, tuple) else (item, 0)
        image = read_image(self.split.images[index], self.transform)

        # Transforms use torch's CPU generator, which is put back afterwards.
        # torch.manual_seed would also seed the GPUs' generators, which would stay changed.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        image = self.transform(image)
        torch.set_rng_state(state)
        return image, self.split.labels[index]


def train_transform(size, augment):
    """Random crops of `size` x `size` pixels for training.

    `photo` crops and mirrors as the papers do. `light` is for drawings, which survive
    neither a crop to 8 % of their area nor a mirror.
    """
    crops = {
        "photo": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        "light": [transforms.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.8, 1.25))],
    }
    return transforms.Compose([*crops[augment], transforms.PILToTensor()])


def test_transform(size, augment):
    """The central `size` x `size` pixels for testing.

    `photo` resizes to 256 and crops 224, as the papers do, or the same ratio at other
    sizes. `light` crops nothing but what makes the picture square.
    """
    short_side = size if augment == "light" else round(size * 256 / 224)
    return transforms.Compose([
        transforms.Resize(short_side),
        transforms.CenterCrop(size),
        transforms.PILToTensor(),
    ])


def read_image(source, transform=None):
    """A PIL image in RGB, from a path, a uint8 array (H, W) or a PIL image of any mode.

    It is turned as its EXIF orientation says, and stands on white where it is transparent.
    A large JPEG file is decoded at a reduced size that suffices for `transform`, which
    the caller applies afterwards. Raises UserError for what cannot be read, and for pixels
    of 32 bits, whose range is unknown.
    """
    try:
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            return to_rgb(source)
        # Opened here: Pillow maps the file of a path into memory, and mixes up its rows if it
        # is a TIFF that has to be turned.
        with open(source, "rb") as file, Image.open(file) as image:
            factor = reduction(transform, *image.size)
            if factor > 1:
                # This has no effect on other formats than JPEG.
                image.draft(None, (image.width // factor, image.height // factor))
            return to_rgb(image)
    # For a damaged file Pillow raises errors of any kind.
    except Exception as error:
        raise UserError(
            f"{source} is not a readable image ({error}): "
            "unpack the data again, or replace or remove a picture of your own"
        ) from None


# How a picture is turned upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image):
    """A PIL image with three channels of 8 bits, opaque and upright."""
    image.load()
    # ImageOps.exif_transpose would also write the other tags anew, and fail if one is broken.
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        turn = None

    # Pillow would clip grey values of 16 bits, rather than scale them. Its PNG and PPM
    # readers may give them the mode I.
    is_scaled = image.mode == "I" and image.format in ("PNG", "PPM")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: bits, and whether 0 is black
    if tags.get(258, (16,))[0] == 12 or (image.mode[0] == "I" and tags.get(262) == 0):
        raise ValueError("a TIFF of 12 bits, or of 16 bits where 0 is white, is not known")
    if image.mode.startswith("I;16") or is_scaled:
        grey = np.array(image)
        grey[grey == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((grey // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range, unlike 8 or 16 bits")

    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def reduction(transform, width, height):
    """By which factor, 1, 2, 4 or 8, a JPEG may be reduced while it is decoded.

    That is several times faster. It is the largest factor at which even the smallest crop
    is not smaller than the output of `transform`, or 1. Images of less than a megapixel are
    not reduced, because little would be gained.
    """
    first = None
    if width * height >= 2 ** 20 and getattr(transform, "transforms", None):
        first = transform.transforms[0]

    largest = 1
    short_side = min(width, height)
    if isinstance(first, transforms.Resize) and isinstance(first.size, int):
        largest = short_side / first.size
    elif isinstance(first, transforms.RandomResizedCrop):
        # A crop of area a and ratio r = width / height is sqrt(a r) wide, or as wide as the
        # short side, if that is less. The narrowest has the least a and r; the lowest is as
        # low, because the ratios are r and 1 / r.
        narrowest = math.sqrt(first.scale[0] * first.ratio[0] * width * height)
        largest = min(narrowest, short_side) / max(first.size)
    return max([factor for factor in (2, 4, 8) if factor <= largest], default=1)


# ----------------------------------------------------------------------------- batches

MAX_SEED = 2 ** 63  # torch takes no seed from here on; --seed may be a long time stamp


class ClassBatches:
    """Random batches, drawn in pairs of images of one class, as in the official code.

    Each pair draws its class from all classes that have images, and then its two images
    from that class, both with replacement. So a class can stand in a batch several times,
    and an epoch does not show every image. It has floor(N / `batch_size`) batches, at least
    one.

    Iterating yields lists of (image index, augmentation seed), as `Images` takes them.
    All follows from `seed` and from `epoch`, which the caller sets. Where there are
    several processes, each sets `process_slice` to its own part of these lists. Raises
    UserError for an odd batch size.
    """

    def __init__(self, labels, batch_size, seed=0):
        if batch_size % 2:
            raise UserError(
                f"--batch_size {batch_size} is odd, but images are drawn in pairs: "
                f"try {batch_size + 1}"
            )
        self.batch_size = batch_size
        self.num_batches = max(1, len(labels) // batch_size)
        self.seed = seed
        self.epoch = 0
        self.process_slice = slice(None)
        by_class = labels.argsort(stable=True).split(labels.bincount().tolist())
        self.images_of = [images for images in by_class if len(images)]

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        # No epoch of one seed repeats one of another: no run has that many epochs.
        seed = (self.seed * 1_000_003 + self.epoch) % MAX_SEED
        rng = torch.Generator().manual_seed(seed)
        for _ in range(self.num_batches):
            batch = []
            num_pairs = self.batch_size // 2
            for c in torch.randint(len(self.images_of), (num_pairs,), generator=rng):
                images = self.images_of[c]
                pair = torch.randint(len(images), (2,), generator=rng)
                batch += images[pair].tolist()
            seeds = torch.randint(2 ** 62, (self.batch_size,), generator=rng).tolist()
            yield list(zip(batch, seeds))[self.process_slice]
