"""A pretrained network without a GPU: EfficientNet-Lite0, registered as one's own backbone, only its last stages trained.

    python tests/pretrained.py nir.py --dataset cub200 --data_root FOLDER --weights efficientnet_lite0.pth --epochs 15 ...
    python tests/pretrained.py prob_dml.py ...                       # or objectives.py
    python tests/pretrained.py evaluate.py --checkpoint runs/NAME/best.pt

Everything behind the script's name goes to the script. The stem and stages 0 to 4 stay as they are, so what they make of
`--views` (8) augmented views of each training image, and of every image's central crop, is computed once and kept in
float16 in the folder features/ below $RUNS (default: runs). The views are drawn at random from those: an epoch takes
seconds on one core.

`--loss proxyanchor-positions` is one more loss of nir.py: ProxyAnchor as the official code has it.
"""
import argparse
import hashlib
import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # before torch is loaded, as the scripts have it
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop

import common
import data
import evaluate
import nir
import objectives
import prob_dml
from data import UserError, progress

# ----------------------------------------------------------------------------------------------------- the backbone
# EfficientNet-Lite0 (Tan, Le: EfficientNet, ICML 2019, without squeeze-and-excitation and with ReLU6). The names of its
# layers are those of the file of weights.

STAGES = [  # blocks, kernel, stride of the first block, expansion, width
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320)]
FROZEN_STAGES = 5


def norm(width):
    return nn.BatchNorm2d(width, eps=1e-3)


def same(x, convolution):
    """The convolution with TensorFlow's SAME padding: stride 2 pads more at the bottom and at the right."""
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    pads = []
    for length in (x.shape[3], x.shape[2]):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    left, right, top, bottom = pads
    if left == right and top == bottom:                      # the convolution's own zeros are faster than F.pad's
        return F.conv2d(x, convolution.weight, None, convolution.stride, (top, left), 1, convolution.groups)
    return convolution(F.pad(x, pads))


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise k x k, 1x1 projection without activation, and a shortcut where it fits."""

    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        width = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = norm(width)
        self._project_conv, self._bn2 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(same(y, self._depthwise_conv)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W), or what `frozen` has made of them (B, 112, H/16, W/16), -> pooled features (B, 1280)."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), norm(32)
        self._blocks, width = nn.ModuleList(), 32
        for blocks, kernel, stride, expansion, outputs in STAGES:
            for i in range(blocks):
                self._blocks.append(Block(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self._conv_head, self._bn1 = nn.Conv2d(width, 1280, 1, bias=False), norm(1280)
        self.cut = sum(stage[0] for stage in STAGES[:FROZEN_STAGES])

    def frozen(self, images):
        x = F.relu6(self._bn0(same(images, self._conv_stem)))
        for block in self._blocks[:self.cut]:
            x = block(x)
        return x

    def forward(self, x):
        if x.shape[1] == 3:
            x = self.frozen(x)
        for block in self._blocks[self.cut:]:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def requires_grad_(self, mode=True):
        super().requires_grad_(mode)
        for module in (self._conv_stem, self._bn0, *self._blocks[:self.cut]):
            module.requires_grad_(False)
        return self


ARCH = "efficientnet_lite0"
common.BACKBONES[ARCH] = lambda image_size: (EfficientNetLite0(), 1280, (0.5,) * 3, (0.5,) * 3)

# ----------------------------------------------------------------------------------------------------- the features


def reading_code():
    """The source of what decides an image's pixels. Features made by another version are not taken."""
    parts = (data.read_image, data.to_rgb, data.reduction, data.train_transform, data.test_transform,
             EfficientNetLite0, Block, same)
    return "".join(inspect.getsource(part) for part in parts)


def make_features(args, train, test, views):
    """The frozen stages' float16 output for the central crop of every image, training images first, then for `views`
    augmented views of each training image: (N + N_train views, 112, H, W), read from the disk when asked for."""
    common.load_file(args.weights, "--weights")
    digest = hashlib.sha256(Path(args.weights).read_bytes())
    digest.update(reading_code().encode())
    for path in train.images + test.images:
        digest.update(f"{Path(path).parent.name}/{Path(path).name} {os.path.getsize(path)}\n".encode())
    folder = Path(os.environ.get("RUNS", "runs")) / "features"
    file = folder / f"{digest.hexdigest()[:12]}-{args.image_size}-{args.augment}-{views}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        network = common.build_network(args).eval()
        plain, augmented = data.test_transform(args.image_size, args.augment), data.train_transform(args.image_size, args.augment)
        sources = [data.Images(train, plain), data.Images(test, plain)]
        sources += [torch.utils.data.Subset(data.Images(train, augmented), [(i, 1_000_003 * i + view) for view in range(views)])
                    for i in range(len(train.images))]
        loader = torch.utils.data.DataLoader(torch.utils.data.ConcatDataset(sources), batch_size=64, num_workers=args.workers)
        part, done, rows = file.with_name(f"{file.name}.{os.getpid()}.part"), 0, None
        with torch.no_grad():
            for images, _ in progress(loader, len(loader), "features: batches of 64"):
                images = (images.float() / 255 - network.mean) / network.deviation
                out = network.backbone.frozen(images.contiguous(memory_format=torch.channels_last)).half().contiguous().numpy()
                if rows is None:
                    rows = np.lib.format.open_memmap(part, "w+", np.float16, (len(loader.dataset), *out.shape[1:]))
                rows[done:done + len(out)] = out
                done += len(out)
        del rows                                             # which writes it to the disk
        os.replace(part, file)
    return np.load(file, mmap_mode="r")


def use_features(views):
    """From here on `common.train` finds features where it looks for images: the central crop's where the transform is
    the test's, else one of the views, by the item's seed."""
    load_splits, table = data.load_splits, {}

    class Features(data.Images):
        def __getitem__(self, item):
            index, seed = item if isinstance(item, (tuple, list)) else (item, 0)
            row = table["row"][self.split.images[index]]
            if any(isinstance(part, RandomResizedCrop) for part in self.transform.transforms):
                row = len(table["row"]) + row * views + seed % views
            return torch.from_numpy(table["features"][row].astype(np.float32)), self.split.labels[index]

    def with_features(args, download=True):
        if args.arch != "efficientnet_lite0" or args.weights == "none" or args.dataset == "toy":
            raise UserError("tests/pretrained.py keeps features of --arch efficientnet_lite0 with --weights PATH, of photographs: "
                            "give these, and leave --dataset toy out")
        if vars(args).setdefault("views", views) != views:
            raise UserError(f"--views {views} contradicts the run, which has {args.views}: give that")
        whole = argparse.Namespace(**{**vars(args), "val_fraction": 0.0})
        train, _, test = load_splits(whole, download)
        table["row"] = {path: i for i, path in enumerate(train.images + test.images)}
        data.Images = real
        table["features"] = make_features(args, train, test, views)
        data.Images = Features
        return load_splits(args, download)

    real = data.Images
    data.load_splits = with_features


# ------------------------------------------------------------------------------------------ the official ProxyAnchor


class ProxyAnchorByPosition(nir.ProxyAnchor):
    """ProxyAnchor as in the official code: the positive term is the mean over the images of the batch, not over the
    proxies with a positive. A class that is in the batch k times counts k times."""

    @nir.full_precision
    def forward(self, embeddings, labels):
        paper = super().forward(embeddings, labels)
        s = nir.cosines(embeddings, self.proxies)                                       # (B, C)
        positive = F.one_hot(labels, len(self.proxies)).bool()
        pull = -self.alpha * (s - self.margin)
        lowest = torch.finfo(s.dtype).min
        terms = F.softplus(pull.masked_fill(~positive, lowest).logsumexp(0))            # (C,)
        by_proxy = terms.sum() / positive.any(0).sum()
        by_position = terms[labels].mean()
        return paper - by_proxy + by_position


def main():
    nir.LOSSES["proxyanchor-positions"] = ProxyAnchorByPosition
    scripts = {"nir.py": nir, "prob_dml.py": prob_dml, "objectives.py": objectives, "evaluate.py": evaluate}
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="all other options are the script's", add_help=False)
    p.add_argument("script", choices=scripts)
    p.add_argument("--views", type=common.positive(int), default=8, help="augmented views of each training image (default: 8)")
    own, argv = p.parse_known_args()
    common.LAUNCHER = f"python {os.path.relpath(sys.argv.pop(0))}"       # for advice, and the command in args.json
    sys.argv.remove(own.script)
    sys.argv.insert(0, own.script)
    if own.script != "evaluate.py":                          # which takes its settings from the checkpoint, and real pictures
        use_features(own.views)
        if not any(word.startswith("--res") for word in argv):
            argv = ["--arch", "efficientnet_lite0", "--image_size", "128", *argv]
    scripts[own.script].main(argv)


if __name__ == "__main__":
    common.command(main)
