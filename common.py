"""What all scripts share: the network, the command line, the training loop and its checkpoints.

A script brings its criterion, an `nn.Module` with three methods,

    terms(embeddings, labels) -> {name: scalar}     the loss is the sum; names become columns of log.csv
    groups(lr) -> [parameter groups for Adam]       each loss parameter has its own learning rate
    log_values(embeddings, labels) -> {name: float}         whatever else a reader should see in log.csv, once an epoch

and hands it to `train`, which is the whole protocol: one loop, read it from top to bottom.
"""
import argparse
import datetime
import functools
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import data                                               # before torch: see its first lines
import torch
import torch.distributed as dist
from torch import nn
import torchvision

import evaluate
from data import UserError, processes, progress

# ----------------------------------------------------------------------------------------------------- the network

# A backbone is a function of the image size that returns (module, width of its features) or (module, width, mean,
# deviation), the two being what its input is normalised with, three numbers in [0, 1] each; without them they are
# ImageNet's, and where both are None the input is used as it is. `load_weights` fills the module.

def resnet50(image_size):
    """torchvision's, globally pooled to 2048 features."""
    module = torchvision.models.resnet50()
    module.fc = nn.Identity()
    return module, 2048


def conv4(image_size):
    """The few-shot network: four blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max-pooling, flattened at the end."""
    blocks = [nn.Sequential(nn.Conv2d(width, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
                            nn.MaxPool2d(2)) for width in (3, 64, 64, 64)]
    return nn.Sequential(*blocks), 64 * (image_size // 16) ** 2


BACKBONES = {"resnet50": resnet50, "conv4": conv4}        # add one's own here: README.md


class AverageAndMaximum(nn.Module):
    def forward(self, features):
        return features.mean((2, 3)) + features.amax((2, 3))


class Network(nn.Module):
    """Backbone and one linear layer: images (B, 3, H, W) on any device -> embeddings (B, D), not normalised.

    uint8 images are normalised first; float ones are taken as normalised already. `pooling` double adds the maximum to
    the average (resnet50). `freeze_norm` keeps BatchNorm in eval mode, as both papers do with ImageNet weights; a
    network that starts from nothing has no statistics to keep. `precision` (float32 or bfloat16) is the backbone's:
    the embedding layer, and all that follows, computes in the precision of its weights. Raises UserError for an
    unknown backbone, or one without the average pooling that `double` replaces.
    """

    def __init__(self, arch, embed_dim, image_size=224, pooling="average", freeze_norm=False):
        super().__init__()
        if arch not in BACKBONES:
            raise UserError(f"--arch {arch} is not known here: choose {', '.join(BACKBONES)}, or add it to common.BACKBONES")
        self.freeze_norm, self.precision = freeze_norm, "float32"
        self.backbone, width, *statistics = BACKBONES[arch](image_size)
        mean, deviation = statistics or (data.MEAN, data.DEVIATION)
        if pooling == "double":
            if not hasattr(self.backbone, "avgpool"):
                raise UserError(f"--pooling double needs a backbone with a layer `avgpool`, which {arch} has not: leave it out")
            self.backbone.avgpool = AverageAndMaximum()
        # Not part of a checkpoint: they follow from the backbone's name.
        for name, values in (("mean", mean), ("deviation", deviation)):
            values = None if values is None else torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.embedding = nn.Linear(width, embed_dim)

    def forward(self, images):
        weight = self.embedding.weight
        pixels = images.dtype == torch.uint8
        images = images.to(weight.device, non_blocking=weight.is_cuda)
        layout = torch.channels_last if pixels else torch.preserve_format             # the faster one for convolutions
        images = images.to(weight.dtype, memory_format=layout)
        if pixels and self.mean is not None:
            images = (images / 255 - self.mean) / self.deviation
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.backbone(images).flatten(1)
        with torch.autocast(images.device.type, enabled=False):
            return self.embedding(features.to(weight.dtype))

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_norm:          # neither statistics of the batch nor running averages: every later change of
            for module in self.modules():             # the weights is seen through the same fixed normalisation
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def load_weights(network, weights):
    """Fill the backbone: `imagenet` (torchvision's V1 weights for resnet50, downloaded once, digest checked), `none`,
    or the path of its state dict, with or without its classifier. Raises UserError where that is not possible."""
    if weights == "none":
        return
    entry = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    try:
        state = entry.get_state_dict(check_hash=True) if weights == "imagenet" else load_file(weights, "--weights")
    except (OSError, RuntimeError) as error:
        raise UserError(f"the ImageNet weights could not be fetched ({error}): fetch {entry.url.rsplit('/', 1)[1]} by "
                        "hand and give --weights PATH, or start from nothing with --weights none") from None
    try:
        own = network.backbone.state_dict()
        network.backbone.load_state_dict({key: value for key, value in state.items() if key in own or
                                          key.split(".")[0] not in ("fc", "_fc", "classifier", "head")})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--weights {weights} does not fit the network: give a state dict of its backbone "
                        f"({str(error).splitlines()[-1].strip()[:100]})") from None


def load_file(path, option):
    """torch.load without code: UserError for a file that is missing, is no checkpoint, or carries code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # a file of other content makes the unpickler fail in any way whatever
        reason = {FileNotFoundError: "does not exist", IsADirectoryError: "is a folder"}.get(
            type(error), f"is not a checkpoint, or holds more than tensors and plain values ({type(error).__name__})")
        raise UserError(f"{option} {path} {reason}: give another file") from None


def save_file(path, content):
    """Write a text, a checkpoint or what `content(file)` writes, and its folder. `path` is always the old file or the new."""
    part = Path(f"{path}.part")
    if processes()[0]:
        return
    with data.clear_errors(f"writing {path}", "make room, or give another path"):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(content):
                with open(part, "wb") as file:
                    content(file)
            else:
                part.write_text(content, encoding="utf-8") if isinstance(content, str) else torch.save(content, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the command line

def parser(description, epilog):
    """The options that all scripts share. A default of None is filled in by the preset of the data set."""
    p = argparse.ArgumentParser(None, "%(prog)s ...", description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=data.DATASETS, default="cub200", help="default: cub200; toy is built in")
    add("--data_root", default="data", help="folder that holds, or receives, the data set (default: data)")
    add = p.add_argument_group("network").add_argument
    add("--arch", choices=BACKBONES, help="default: conv4 for toy, resnet50 for the others")
    add("--weights", help="imagenet, none or a state dict's path (default: imagenet for resnet50, else none)")
    add("--pooling", choices=("average", "double"), default="average", help="double: + maximum (default: average)")
    add("--image_size", type=positive(int), help="pixels (default: 224; conv4: 32 for toy, else 64)")
    add("--augment", choices=("photo", "light"), help="the papers' crop and flip, or less (default: light for conv4)")
    add("--corrupt", action="store_true", help="add noise and erasing to each image, known amounts (default: off)")
    add("--embed_dim", type=positive(int), help="D (default: 128; toy 64)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=positive(int), help="default: by preset")
    add("--warmup", type=not_negative(int), help="epochs in which the backbone is not trained (default: by preset)")
    add("--batch_size", type=positive(int), help="two images per class (default: by preset, or less if need be)")
    add("--lr", type=positive(float), help="Adam's rate for the network (default: by preset)")
    add("--lr_steps", type=int, nargs="*", help="epochs after which rates are cut (default: by preset)")
    add("--lr_gamma", type=positive(float), help="... by this factor (default: by preset)")
    add("--weight_decay", type=not_negative(float), default=4e-4, help="for the network alone (default: 4e-4)")
    add("--val_fraction", type=not_negative(float, below=1), default=0.0, help="of training classes to hold out (default: 0)")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the backbone; auto: bfloat16 on a GPU that has it in hardware (default: auto)")
    add("--workers", type=not_negative(int), help="processes that load images (default: the CPUs it may use; toy 0)")
    add("--out", help="the run's folder (default: runs/NAME)")
    add("--resume", help="last.pt of a run that was stopped; its own settings are used")
    return p


def positive(kind, zero=False, below=math.inf):
    """An argparse type: an int or float above zero, or also zero, and below `below`."""
    def convert(text):
        value = kind(text)
        if not (0 < value < below or zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if zero else 'above'} 0 and below {below:g}")
        return value
    convert.__name__ = f"{'non-negative' if zero else 'positive'} {kind.__name__}"         # as argparse will call it
    return convert


not_negative = functools.partial(positive, zero=True)


def parse(p, preset, argv=None):
    """The settings: what the command line says, else a resumed run's own, else the preset's. `preset(args) -> dict` is
    asked last. Its batch size becomes `usual_batch_size`, which may be reduced; the user's own may not."""
    free = {"device", "workers", "resume", "out", "data_root"}       # these do not change what is computed
    args = p.parse_args(argv)
    if args.resume:
        saved = load_checkpoint(args.resume, "--resume")["args"]
        if unknown := vars(args).keys() - saved.keys():
            raise UserError(f"--resume {args.resume} is a run of another script or version, which knows no "
                            f"{', '.join(f'--{key}' for key in sorted(unknown))}: resume it with its own")
        given = p.parse_args(argv, argparse.Namespace(**{key: saved.get(key) for key in vars(args)}))
        for key, value in vars(given).items():
            if key not in free and value != saved.get(key, value):
                raise UserError(f"--{key} {value} contradicts the run in {args.resume}, which has {saved.get(key)}: "
                                "leave the option out to resume, or start a new run")
        given.resume, given.out = args.resume, str(Path(args.resume).parent)
        return argparse.Namespace(**{**saved, **{key: getattr(given, key) for key in free}})
    toy = args.dataset == "toy"
    args.arch = args.arch or ("conv4" if toy else "resnet50")
    args.embed_dim = args.embed_dim or (64 if toy else 128)
    args.weights = args.weights or ("imagenet" if args.arch == "resnet50" else "none")
    args.image_size = args.image_size or (224 if args.arch != "conv4" else 32 if toy else 64)
    args.augment = args.augment or ("light" if args.arch == "conv4" else "photo")
    if args.workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = 0 if toy else max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    settings = preset(args)
    args.usual_batch_size = settings.pop("batch_size")
    vars(args).update({key: value for key, value in settings.items() if getattr(args, key) is None})
    if args.image_size < 16:
        raise UserError(f"--image_size {args.image_size} is too small for four poolings: use at least 16")
    if args.arch != "resnet50" and args.weights == "imagenet":
        raise UserError(f"--weights imagenet needs --arch resnet50: for {args.arch} give a state dict's path, or none")
    return args


def table(columns):
    """Plain text of {title: metrics}: a row per metric, fractions in percent, "-" where a column lacks the metric."""
    return aligned(columns, lambda name, metrics: evaluate.spread(name, [metrics.get(name, math.nan)]))


def aligned(columns, cell=lambda name, column: str(column.get(name, "")).replace(" ", "")):
    """Plain text of {title: {name: value}}: a row per name, whose cells are `cell(name, column)`."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [["", *columns]] + [[name, *(cell(name, column) for column in columns.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def make_device(name):
    """`auto` is the first GPU, or the process's own of several, else the CPU. UserError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif ":" in name and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {name} names one device for {os.environ['LOCAL_WORLD_SIZE']} processes: with torchrun "
                        f"give --device {name.split(':')[0]}, and each takes its own")
    try:
        torch.empty(1, device=name, dtype=torch.float64)
        return torch.device(name)
    except TypeError:
        raise UserError(f"--device {name} has no float64, which all metrics need: try --device cpu") from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device cpu") from None


def backbone_precision(precision, device):
    """What `auto` means on a device: bfloat16 emulated in software is slower than the authors' float32."""
    hardware = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision if precision != "auto" else "bfloat16" if hardware else "float32"


def command(main):
    """Run a script's main: a user's mistake is one line and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: processes()[0] or print(f"warning: {message}", file=sys.stderr)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:      # from a worker process it arrives as the last line of a traceback
        print("error: " + str(error).strip().splitlines()[-1].removeprefix("data.UserError: "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        last = Path(command.folder or "no run yet") / "last.pt"
        processes()[0] or print("\ninterrupted: " + (
            f"go on with {command.launcher} {sys.argv[0]} --resume {last}" if last.exists() else
            "no epoch is complete, so there is nothing to resume"), file=sys.stderr)
        sys.exit(130)


command.folder, command.launcher = None, "python"        # the run's folder, once it has one; what starts a script


# ------------------------------------------------------------------------------------------------- checkpoints

def load_checkpoint(path, option):
    """A checkpoint of this project as a dictionary; UserError for anything else."""
    checkpoint = load_file(path, option)
    if not isinstance(checkpoint, dict) or not {"args", "network", "epoch"} <= checkpoint.keys():
        raise UserError(f"{option} {path} is not a checkpoint of these scripts: give the last.pt or best.pt of a run")
    return checkpoint


def build_network(args, checkpoint=None, device=torch.device("cpu")):
    """The network of a run on `device`, with the weights it starts from or those of its checkpoint."""
    network = Network(args.arch, args.embed_dim, args.image_size, args.pooling, freeze_norm=args.weights != "none")
    if checkpoint is None:
        load_weights(network, args.weights)
    else:
        try:
            network.load_state_dict(checkpoint["network"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint does not hold the network its settings name ({args.arch}, "
                            f"D = {args.embed_dim}): {str(error).splitlines()[-1].strip()[:100]}") from None
    network.precision = backbone_precision(vars(args).get("precision", "auto"), device)
    return network.to(device, memory_format=torch.channels_last)


def load_network(path, device="auto"):
    """(network, prepare) of a run's best.pt or last.pt, without gradients: `prepare` makes a PIL image, or a file, the
    (3, H, W) uint8 tensor of which `network` takes batches. UserError for what is no checkpoint."""
    checkpoint = load_checkpoint(path, "checkpoint")
    args = argparse.Namespace(**checkpoint["args"])
    network = build_network(args, checkpoint, make_device(device)).eval().requires_grad_(False)
    transform = data.test_transform(args.image_size, args.augment)
    return network, lambda image: transform(data.read_image(image, transform))


# ------------------------------------------------------------------------------------------------- several GPUs
# `torchrun --nproc_per_node=N nir.py ...` starts N processes. Each embeds its share of every batch, then all embeddings
# are gathered. So each computes the same loss of the whole batch, from the same random numbers; rank 0 alone writes.

def join_processes(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2),
                                device_id=device if device.type == "cuda" else None)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def gather(rows):
    """Every process's rows (n, ...), one below the other: (N n, ...). A gradient reaches the own rows."""
    rank, world = processes()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    if rows.requires_grad:
        # The loss is the same everywhere, so the gradient of the own rows is here already. Over the processes the
        # network's gradients add up, where DistributedDataParallel takes the mean: hence times N.
        parts[rank] = parts[rank] + world * (rows - rows.detach())
    return torch.cat(parts)


class Model(nn.Module):
    """Network and loss as the one module that DistributedDataParallel wants: its share of a batch -> the loss terms
    of the whole batch, with all embeddings (B, D), in float32 or better, and labels (B,)."""

    def __init__(self, network, criterion):
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images, labels):
        embeddings, labels = gather(self.network(images)), gather(labels)
        return self.criterion.terms(embeddings, labels), embeddings, labels


# ----------------------------------------------------------------------------------------------------- training

@torch.no_grad()
def embed(network, split, args, device, what="embedding"):
    """Embeddings (N, D) float32 on `device` of a split's test-time images, in the split's order."""
    network.eval()
    rank, world = processes()
    images = data.Images(split, data.test_transform(args.image_size, args.augment))
    share = torch.utils.data.DistributedSampler(images, world, rank, shuffle=False)             # every world-th image
    loader = torch.utils.data.DataLoader(images, batch_size=128, sampler=share, num_workers=args.workers)
    rows = torch.cat([network(images) for images, _ in progress(loader, len(loader), what)])
    return gather(rows).view(world, *rows.shape).transpose(0, 1).flatten(0, 1)[:len(split.images)]


def gradient_shares(terms, embeddings):
    """Each term's share of the gradient that reaches the embeddings: its Frobenius norm over the sum of the norms."""
    norms = {name: float(torch.autograd.grad(term, embeddings, retain_graph=True)[0].norm()) if term.requires_grad
             else 0.0 for name, term in terms.items()}
    total = sum(norms.values()) or 1.0
    return {f"grad_share_{name}": norm / total for name, norm in norms.items()}


def train(args, criterion, name, setup=None):
    """Train, select, evaluate: the whole protocol. Files go to args.out or runs/`name`; returns the final metrics.

    `criterion(num_classes)` makes the loss; `setup(criterion, network, train_split, args, device)` may prepare it (a
    warm start). Everything random follows from --seed and the epoch, so on the CPU a resumed run computes the very
    numbers of one that was not stopped. (On a GPU nearly so: there sums of floats are taken in changing order.)
    """
    device = make_device(args.device)
    args.precision = backbone_precision(args.precision, device)      # as it is, for whoever resumes or evaluates elsewhere
    join_processes(device)
    rank, world = processes()
    train_split, val_split, test_split = data.load_splits(args)
    judge, judged = (val_split, "val") if val_split else (test_split, "test")
    if min(split.labels.bincount().max() for split in (judge, test_split)) < 2:                   # now, not after an epoch
        raise UserError(f"no test or validation class of {args.data_root} has two images, so none can be found: add images")
    checkpoint = load_checkpoint(args.resume, "--resume") if args.resume else None
    args.batch_size = args.batch_size or min(args.usual_batch_size, data.largest_batch(train_split.labels))
    batches = data.ClassBatches(train_split.labels, args.batch_size, seed=args.seed)
    if args.batch_size % world:
        raise UserError(f"--batch_size {args.batch_size} cannot be shared by {world} processes: try "
                        f"{args.batch_size - args.batch_size % math.lcm(2, world) or math.lcm(2, world)}")
    batches.share = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    torch.manual_seed(args.seed)
    network = build_network(args, checkpoint, device)
    if device.type == "cuda" and world > 1 and not network.freeze_norm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)                 # exists on GPUs alone
    criterion = criterion(len(train_split.class_names)).to(device)
    model = Model(network, criterion)
    out = run_folder(args, name)

    optimizer = torch.optim.Adam([
        *({"params": list(part.parameters()), "lr": args.lr, "weight_decay": args.weight_decay}
          for part in (network.backbone, network.embedding)), *criterion.groups(args.lr)])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_steps, args.lr_gamma)
    history, best, first = [], -1.0, 0
    if checkpoint:
        try:
            criterion.load_state_dict(checkpoint["criterion"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["scheduler"])
            history, best, first = checkpoint["history"], checkpoint["best"], checkpoint["epoch"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"--resume {args.resume} is not the last.pt of a run with this data set and loss "
                            f"({type(error).__name__}: {str(error).splitlines()[-1].strip()[:80]}): resume from that") from None
    elif setup:
        setup(criterion, network, train_split, args, device)

    loader = torch.utils.data.DataLoader(
        data.Images(train_split, data.train_transform(args.image_size, args.augment)), batch_sampler=batches,
        num_workers=args.workers, persistent_workers=args.workers > 0, pin_memory=device.type == "cuda")
    print(f"{name}: {len(train_split.images)} images of {len(train_split.class_names)} classes train, "
          f"{len(test_split.images)} of {len(test_split.class_names)} test, on {device}; files in {out}", flush=True)

    for epoch in range(first, args.epochs):
        batches.epoch = epoch
        torch.manual_seed(args.seed + 7919 * (epoch + 1))    # for a loss that draws samples; images have seeds of their own
        network.train()
        network.backbone.requires_grad_(epoch >= args.warmup)
        if world > 1 and epoch in (first, args.warmup):                   # anew where other parameters have gradients
            model = nn.parallel.DistributedDataParallel(Model(network, criterion))
        sums, shares, start = {}, {}, time.monotonic()
        for step, (images, labels) in enumerate(progress(loader, len(loader), f"epoch {epoch + 1}")):
            terms, embeddings, labels = model(images, labels.to(device, non_blocking=True))
            loss = sum(terms.values())
            if not torch.isfinite(loss):
                bad = [term for term, value in terms.items() if not torch.isfinite(value)] or ["sum"]
                raise UserError(f"the loss term {', '.join(bad)} is not finite in epoch {epoch + 1}, step {step + 1}: "
                                f"lower --lr or its weight; the last good checkpoint is in {out}")
            if not shares:
                shares = {**gradient_shares(terms, embeddings), **criterion.log_values(embeddings.detach(), labels)}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums = {term: sums.get(term, 0.0) + value.detach() for term, value in terms.items()}
        for buffer in network.buffers() if world > 1 else ():              # BatchNorm's averages: all take rank 0's
            dist.broadcast(buffer, 0)
        scheduler.step()
        seconds = time.monotonic() - start
        recall = evaluate.recall_at_k(embed(network, judge, args, device), judge.labels.to(device), (1,))[1]
        row = {"epoch": epoch + 1, **{term: float(value) / len(loader) for term, value in sums.items()}, **shares,
               "seconds": seconds, f"{judged}_recall@1": recall}
        history = history + [row]
        left = int((args.epochs - epoch - 1) * (time.monotonic() - start))
        print(f"epoch {epoch + 1:3d}/{args.epochs}  " + "  ".join(f"{term} {row[term]:.4g}" for term in sums) +
              f"  {len(loader) * args.batch_size / seconds:.0f} images/s  {left // 60}:{left % 60:02d} left"
              f"  {judged} Recall@1 {100 * recall:.1f}", flush=True)
        content = {"args": vars(args), "network": network.state_dict(), "criterion": criterion.state_dict(),
                   "epoch": epoch + 1, "best": max(best, recall), "history": history}
        if recall > best:
            best = recall
            save_file(out / "best.pt", content)
        # last.pt comes after best.pt: a kill between the two only repeats this epoch.
        content |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        save_file(out / "last.pt", content)
        save_file(out / "log.csv", csv_text(history))

    if world > 1:
        dist.barrier()                                                    # until rank 0 has written its last checkpoint
    columns = {}
    for title in ("last", "best"):
        saved = load_checkpoint(out / f"{title}.pt", "checkpoint")
        rows = embed(build_network(args, saved, device), test_split, args, device)
        metrics = evaluate.all_metrics(rows, test_split.labels.to(device), data.usual_ks(args.dataset))
        metrics.update(evaluate.uncertainty(rows, test_split.labels, test_split.ambiguity)[0])
        columns[title] = {"epoch": saved["epoch"], **metrics}
    print(f"\ntest classes; the best epoch is chosen by {judged} Recall@1\n" + table(columns), flush=True)
    save_file(out / "results.json", json.dumps(columns, indent=1))
    print(f"\npictures: {command.launcher} evaluate.py --checkpoint {out / 'best.pt'} --pictures")
    return columns


def run_folder(args, name):
    """Make the run's folder and write its settings: never over another run's checkpoint, and a new folder, also among
    runs that start together, where the name is ours to choose."""
    rank, world = processes()
    out = Path(args.out or f"runs/{name}")
    if args.out and not args.resume and (out / "last.pt").exists():
        raise UserError(f"--out {out} already holds a run: resume it with --resume {out / 'last.pt'}, or give another folder")
    with data.clear_errors(f"making the folder {out}", "give another one with --out"):
        if args.out:
            out.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2) if not args.out and rank == 0 else ():
            try:
                out.mkdir(parents=True)              # two runs that only asked first could find the same name free
                break
            except FileExistsError:
                out = Path(f"runs/{name}-{number}")
    if world > 1:
        chosen = [out]
        dist.broadcast_object_list(chosen)
        out = chosen[0]
    args.out = command.folder = str(out)
    if not args.resume:
        script = shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        made_by = {"command": f"{command.launcher} {script}", "torch": torch.__version__, "commit": commit()}
        save_file(out / "args.json", json.dumps({**vars(args), **made_by}, indent=1))
    return out


def commit():
    """This checkout's commit, with a + where files differ from it; unknown without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def csv_text(rows):
    return "\n".join(",".join(map(str, values)) for values in [rows[0], *(row.values() for row in rows)]) + "\n"
