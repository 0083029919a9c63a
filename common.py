"""What all scripts share: the training protocol, the network, the command line, checkpoints.

A script brings its criterion, a module with these methods, and hands it to `train`:

    losses(embeddings, labels) -> {name: scalar}          their sum is minimised
    param_groups() -> [parameter groups for Adam]         each loss parameter has its own rate
    diagnostics(embeddings, labels) -> {name: float}      what else log.csv shows, once an epoch

It may have one more, which is called before each epoch. EL-nivMF makes its warm start there,
before epoch 0.

    start_epoch(epoch, network, train_split, args, device)

Where the protocol of the papers is found:

    two images a class, class-disjoint halves    data.ClassBatches, data.halves
    crops, flips, test-time crop                 data.train_transform, data.test_transform
    backbone and linear layer, psi(x)            Network
    BatchNorm frozen                             Network.train
    Adam, weight decay for the network alone     make_optimizer
    warm-up                                      train
    best epoch                                   save_epoch
    metrics                                      evaluate.all_metrics

In reading order: the training; the network; the command line; files; several processes.
"""
import argparse
import contextlib
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import data
import evaluate
from data import UserError, processes, progress

# ---------------------------------------------------------------------------------- the training


def train(args, make_criterion, name):
    """Train, select, evaluate: the whole protocol. Returns the final metrics.

    `make_criterion(num_classes)` gives the criterion. Files go to args.out, or to
    runs/`name`. All random numbers follow from the seed and the epoch, so a resumed run gives
    the numbers of one that was never stopped. (On a GPU up to rounding, as its sums have no
    fixed order.)
    """
    device = make_device(args.device)
    join_processes(device)

    # Data. The best epoch is chosen on the validation classes if there are any, else on the
    # test classes, as in the official code.
    train_split, val_split, test_split = data.load_splits(args, download=not args.resume)
    selection = "test" if val_split is None else "val"
    selection_split = test_split if val_split is None else val_split
    check_splits(args, selection_split, test_split)
    loader = training_loader(args, train_split, device)

    # Network, criterion, optimiser.
    checkpoint = load_checkpoint(args.resume, "--resume") if args.resume else None
    torch.manual_seed(args.seed % data.MAX_SEED)
    network = build_network(args, checkpoint, device)
    criterion = make_criterion(len(train_split.class_names)).to(device)
    model = Model(network, criterion)
    out = make_run_folder(args, name)
    optimizer, scheduler = make_optimizer(args, network, criterion)
    history = []
    if checkpoint:
        check_classes(checkpoint, train_split.class_names, args)
        history = restore(checkpoint, args, criterion, optimizer, scheduler)
        if len(history) == args.epochs:
            print(f"the run in {out} is finished: it is only evaluated again", flush=True)
    print_start(name, train_split, test_split, device, out)

    for epoch in range(len(history), args.epochs):
        # Warm-up: only the embedding layer and the criterion are trained.
        network.backbone.requires_grad_(epoch >= args.warmup)
        if hasattr(criterion, "start_epoch"):
            criterion.start_epoch(epoch, network, train_split, args, device)
        model = distribute(model)               # anew when the warm-up ends

        # A seed for each epoch: what a criterion draws is the same after --resume, and in all
        # processes. Batches and crops have seeds of their own: data.ClassBatches.
        torch.manual_seed((args.seed + 7919 * (epoch + 1)) % data.MAX_SEED)

        start = time.monotonic()
        losses, diagnostics = train_one_epoch(model, loader, optimizer, epoch, device, out)
        scheduler.step()
        seconds = time.monotonic() - start
        recall = recall_at_1(network, selection_split, args, device)
        epoch_seconds = time.monotonic() - start

        row = {"epoch": epoch + 1, **losses, **diagnostics, "seconds": seconds}
        row[f"{selection}_recall@1"] = recall
        history.append(row)
        save_epoch(out, args, train_split.class_names, network, criterion, optimizer, scheduler,
                   history, selection)
        print_epoch(args, row, losses, selection, len(loader), epoch_seconds)

    return evaluate_checkpoints(args, out, test_split, selection, device)


def train_one_epoch(model, loader, optimizer, epoch, device, out):
    """One pass over the training batches: mean losses, and diagnostics of the first batch."""
    model.train()                                   # but for frozen BatchNorm: Network.train
    loader.batch_sampler.epoch = epoch
    sums, diagnostics = {}, {}
    batches = progress(loader, len(loader), f"epoch {epoch + 1}")
    for step, (images, labels) in enumerate(batches):
        with errors_name_step(epoch, step, out):
            labels = labels.to(device, non_blocking=True)       # the network moves the images
            losses, embeddings, labels = model(images, labels)
            loss = sum(losses.values())
            check_finite(loss, losses)
            if step == 0:
                diagnostics = first_batch_diagnostics(model, losses, embeddings, labels)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    copy_buffers(model)
    mean_losses = {name: float(value) / len(loader) for name, value in sums.items()}
    return mean_losses, diagnostics


class Model(nn.Module):
    """Network and loss as one module, which DistributedDataParallel asks for.

    Takes images and labels of a batch, and gives the losses {name: scalar}, the embeddings
    (B, D), in float32 or better, and the labels (B,). With several processes, each takes its
    own part of the batch, and all give the losses, embeddings and labels of the whole.
    """

    def __init__(self, network, criterion):
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images, labels):
        embeddings = gather(self.network(images))
        labels = gather(labels)
        losses = self.criterion.losses(embeddings, labels)
        return losses, embeddings, labels


@torch.no_grad()
def embed(network, split, args, device, what="embedding"):
    """Embeddings (N, D) of a split's images under the test transform, in the split's order."""
    network.eval()
    rank, world = processes()
    pictures = data.Images(split, data.test_transform(args.image_size, args.augment))
    every_nth = DistributedSampler(pictures, world, rank, shuffle=False)
    loader = DataLoader(pictures, batch_size=128, sampler=every_nth, num_workers=args.workers)
    batches = progress(loader, len(loader), what)
    rows = torch.cat([network(images) for images, _ in batches])
    # Image i was embedded by process i % world: put them back in their order.
    by_process = gather(rows).view(world, *rows.shape)          # (world, n, D)
    in_order = by_process.transpose(0, 1).flatten(0, 1)         # (n * world, D)
    return in_order[:len(split.images)]             # the sampler repeats some to make equal parts


def recall_at_1(network, split, args, device):
    embeddings = embed(network, split, args, device)
    labels = split.labels.to(device)
    recalls = evaluate.recall_at_k(embeddings, labels, (1,))    # {k: Recall@k}
    return recalls[1]


def make_optimizer(args, network, criterion):
    """Adam and its schedule. Weight decay is for backbone and embedding layer alone."""
    groups = []
    for part in (network.backbone, network.embedding):
        groups.append({"params": list(part.parameters()), "lr": args.lr,
                       "weight_decay": args.weight_decay})
    groups += criterion.param_groups()
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_steps, args.lr_gamma)
    return optimizer, scheduler


def training_loader(args, split, device):
    """A split's training batches; with several processes, this one's part of each.

    Sets args.batch_size if it was not given: to the preset's, `usual_batch_size`, but to no more
    than half of the images.
    """
    if args.batch_size is None:
        half = max(2, len(split.images) // 4 * 2)       # an even number
        args.batch_size = min(args.usual_batch_size, half)
    batches = data.ClassBatches(split.labels, args.batch_size, seed=args.seed)
    rank, world = processes()
    if args.batch_size % world:
        # An even multiple of world: the next one below, or the smallest.
        unit = math.lcm(2, world)
        fits = max(unit, args.batch_size // unit * unit)
        raise UserError(f"--batch_size {args.batch_size} cannot be shared by {world} processes: "
                        f"try {fits}")
    size = args.batch_size // world
    batches.process_slice = slice(rank * size, (rank + 1) * size)
    return DataLoader(
        data.Images(split, data.train_transform(args.image_size, args.augment)),
        batch_sampler=batches,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )


def check_splits(args, *splits):
    """Fail before the training if all classes of a split have one image: Recall@k needs pairs."""
    for split in splits:
        if split.labels.bincount().max() < 2:
            raise UserError(f"no test or validation class of {args.data_root} has two images, so "
                            "Recall@k has nothing to find: add images")


def check_finite(loss, losses):
    if torch.isfinite(loss):
        return
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    names = ", ".join(bad) or "sum"                 # finite losses may add up to infinity
    raise ValueError(f"the loss term {names} is not finite: lower --lr or its weight")


@contextlib.contextmanager
def errors_name_step(epoch, step, out):
    """Turn a step's ValueError, "problem: remedy", into a UserError that names the step."""
    try:
        yield
    except ValueError as error:
        problem, colon, remedy = str(error).partition(": ")
        where = f"in epoch {epoch + 1}, step {step + 1}"
        if epoch > 0:
            remedy += f"; the last good checkpoint is {out / 'last.pt'}"
        raise UserError(f"{problem} {where}{colon}{remedy}") from None


def first_batch_diagnostics(model, losses, embeddings, labels):
    """For log.csv: each loss's share of the gradient, and the criterion's own diagnostics."""
    criterion = getattr(model, "module", model).criterion
    shares = gradient_shares(losses, embeddings)
    return {**shares, **criterion.diagnostics(embeddings.detach(), labels)}


def gradient_shares(losses, embeddings):
    """The norm of each loss's gradient at the embeddings, divided by the sum of these norms."""
    norms = {}
    for name, loss in losses.items():
        norms[name] = 0.0
        if loss.requires_grad:
            gradient, = torch.autograd.grad(loss, embeddings, retain_graph=True)
            norms[name] = float(gradient.norm())
    total = sum(norms.values()) or 1.0
    return {f"grad_share_{name}": norm / total for name, norm in norms.items()}


def print_start(name, train_split, test_split, device, out):
    training = f"{len(train_split.images)} images of {len(train_split.class_names)} classes train"
    test = f"{len(test_split.images)} of {len(test_split.class_names)} test"
    print(f"{name}: {training}, {test}, on {device}; files in {out}", flush=True)


def print_epoch(args, row, losses, selection, num_batches, epoch_seconds):
    """One line for an epoch: losses, images a second, time left, Recall@1."""
    epochs_left = args.epochs - row["epoch"]
    seconds_left = int(epochs_left * epoch_seconds)
    values = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
    rate = num_batches * args.batch_size / row["seconds"]
    recall = row[f"{selection}_recall@1"]
    print(f"epoch {row['epoch']:3d}/{args.epochs}  {values}  {rate:.0f} images/s  "
          f"{seconds_left // 60}:{seconds_left % 60:02d} left  "
          f"{selection} Recall@1 {100 * recall:.1f}", flush=True)


def evaluate_checkpoints(args, out, test_split, selection, device):
    """Metrics of the last and of the best epoch on the test classes: {"last": ..., "best": ...}."""
    wait_for_all()                                  # for process 0, which writes the checkpoints
    columns = {}
    for title in ("last", "best"):
        if title == "best" and not (out / "best.pt").exists():
            warnings.warn(f"{out / 'best.pt'} is missing, so only the last epoch is evaluated")
            continue
        checkpoint = load_checkpoint(out / f"{title}.pt", "checkpoint")
        network = build_network(args, checkpoint, device)
        embeddings = embed(network, test_split, args, device)
        labels = test_split.labels.to(device)
        metrics = evaluate.all_metrics(embeddings, labels, data.usual_ks(args.dataset))
        norm_metrics, _ = evaluate.uncertainty(embeddings, labels, test_split.ambiguity)
        columns[title] = {"epoch": checkpoint["epoch"], **metrics, **norm_metrics}
    save_file(out / "results.json", json.dumps(columns, indent=1))
    print(f"\ntest classes; the best epoch is chosen by {selection} Recall@1\n{table(columns)}",
          flush=True)
    # A script of one's own may have a backbone that evaluate.py does not know.
    if Path(sys.argv[0]).name in ("nir.py", "prob_dml.py", "objectives.py"):
        words = [script_beside("evaluate.py"), "--checkpoint", str(out / "best.pt"), "--pictures"]
        print(f"\npictures: {LAUNCHER} {shlex.join(words)}")
    return columns


# ----------------------------------------------------------------------------------- the network
# BACKBONES holds functions of the image size that return (module, width of its features), or
# (module, width, mean, deviation). Mean and deviation, three numbers in [0, 1] each, are what
# images are normalised with: ImageNet's if left out. If both are None, the backbone gets pixels
# from 0 to 255.


def resnet50(image_size):
    """torchvision's, globally pooled to 2048 features. `load_weights` fills it."""
    module = torchvision.models.resnet50()
    module.fc = nn.Identity()
    return module, 2048


def conv4(image_size):
    """The few-shot network: four blocks of convolution, BatchNorm, ReLU and pooling, flattened."""
    blocks = []
    for width in (3, 64, 64, 64):
        convolution = nn.Conv2d(width, 64, 3, padding=1, bias=False)
        block = [convolution, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
        blocks.append(nn.Sequential(*block))
    side = image_size // 16
    return nn.Sequential(*blocks), 64 * side ** 2


BACKBONES = {"resnet50": resnet50, "conv4": conv4}      # add one's own here: README.md


class AverageAndMaximum(nn.Module):
    def forward(self, features):
        return features.mean((2, 3)) + features.amax((2, 3))


class Network(nn.Module):
    """Backbone and one linear layer: images (B, 3, H, W) -> embeddings (B, D), not normalised.

    Images may be on any device. uint8 images are normalised first; float ones go to the
    backbone as they are. `pooling` double puts average + maximum in place of the backbone's
    layer `avgpool`. `freeze_norm` keeps BatchNorm in eval mode, as both papers do with ImageNet
    weights; a network that starts from nothing has no statistics to keep. The attribute
    `precision`, float32 or bfloat16, is the backbone's; the embedding layer computes in the
    precision of its weights. Raises UserError for an unknown backbone, or with `double` for one
    without that layer.
    """

    def __init__(self, arch, embed_dim, image_size=224, pooling="average", freeze_norm=False):
        super().__init__()
        if arch not in BACKBONES:
            raise UserError(f"--arch {arch} is not known here: choose {', '.join(BACKBONES)}, or "
                            "add it to common.BACKBONES")
        self.freeze_norm = freeze_norm
        self.precision = "float32"
        self.backbone, width, *statistics = BACKBONES[arch](image_size)
        if pooling == "double":
            if not hasattr(self.backbone, "avgpool"):
                raise UserError("--pooling double needs a backbone with a layer `avgpool`, which "
                                f"{arch} has not: leave it out")
            self.backbone.avgpool = AverageAndMaximum()
        if not statistics:
            statistics = data.MEAN, data.DEVIATION
        mean, deviation = statistics
        # They follow from the backbone's name, so they are not part of a checkpoint.
        self.register_buffer("mean", by_channel(mean), persistent=False)
        self.register_buffer("deviation", by_channel(deviation), persistent=False)
        self.embedding = nn.Linear(width, embed_dim)

    def forward(self, images):
        weight = self.embedding.weight
        are_pixels = images.dtype == torch.uint8
        images = images.to(weight.device, non_blocking=weight.is_cuda)
        # Convolutions are faster in channels_last. Floats may be features of any dimension.
        layout = torch.channels_last if are_pixels else torch.preserve_format
        images = images.to(weight.dtype, memory_format=layout)
        if are_pixels and self.mean is not None:
            images = (images / 255 - self.mean) / self.deviation
        device = images.device.type
        is_bfloat16 = self.precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
            features = self.backbone(images).flatten(1)
        with torch.autocast(device, enabled=False):     # also where the caller has it on
            return self.embedding(features.to(weight.dtype))

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_norm:
            # No statistics of a batch are used, and the running averages stay as they are:
            # every later change of the weights is seen through the same normalisation.
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def by_channel(values):
    return None if values is None else torch.tensor(values).view(3, 1, 1)


def build_network(args, checkpoint=None, device=torch.device("cpu")):  # noqa: B008
    """The network of a run on `device`, with its first weights or with those of a checkpoint."""
    network = Network(args.arch, args.embed_dim, args.image_size, args.pooling,
                      freeze_norm=args.weights != "none")
    if checkpoint is None:
        load_weights(network, args.weights)
    else:
        try:
            network.load_state_dict(checkpoint["network"])
        except RuntimeError as error:
            raise UserError("the checkpoint does not hold the network its settings name "
                            f"({args.arch}, D = {args.embed_dim}): {last_line(error)}") from None
    # A run keeps the precision that it was trained with; an old checkpoint has none.
    network.precision = getattr(args, "precision", "float32")
    return network.to(device, memory_format=torch.channels_last)


def load_weights(network, weights):
    """Fill the backbone with `weights`, or raise a UserError where that is not possible.

    imagenet: torchvision's V1 weights for resnet50, downloaded once, their digest checked.
    none: it starts from nothing. Else the path of the backbone's state dict, with or without
    its classifier.
    """
    if weights == "none":
        return
    state = imagenet_weights() if weights == "imagenet" else load_file(weights, "--weights")
    try:
        own = network.backbone.state_dict()
        network.backbone.load_state_dict(without_classifier(state, own))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"--weights {weights} does not fit the network: give a state dict of its "
                        f"backbone ({last_line(error)})") from None


def imagenet_weights():
    """torchvision's V1 weights of ResNet50, downloaded once."""
    imagenet = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", imagenet.url.rsplit("/", 1)[1])
    was_there = file.exists()
    try:
        return imagenet.get_state_dict(check_hash=True)
    except Exception as error:      # unpickling a broken file can raise anything
        if was_there:
            raise UserError(f"{file} is broken ({type(error).__name__}): delete it, and it is "
                            "fetched again") from None
        raise UserError(f"the ImageNet weights could not be fetched ({error}): fetch {file.name} "
                        "by hand and give --weights PATH, or start from nothing with --weights "
                        "none") from None


def without_classifier(state, own):
    """Drop the classifier's tensors from a state dict, unless the backbone has them too."""
    classifiers = ("fc", "_fc", "classifier", "head")
    kept = {}
    for key, value in state.items():
        if key in own or key.split(".")[0] not in classifiers:
            kept[key] = value
    return kept


def load_network(path, device="auto"):
    """(network, prepare) of a run's best.pt or last.pt, for embedding one's own images.

    `prepare` turns a PIL image or a file into a (3, H, W) uint8 tensor. `network` embeds a
    batch of them, without gradients. Raises UserError if `path` is no checkpoint.
    """
    checkpoint = load_checkpoint(path, "checkpoint")
    args = argparse.Namespace(**checkpoint["args"])
    network = build_network(args, checkpoint, make_device(device))
    network.eval().requires_grad_(False)
    transform = data.test_transform(args.image_size, args.augment)

    def prepare(image):
        # Told the transform, read_image decodes a large JPEG no larger than that needs.
        return transform(data.read_image(image, transform))

    return network, prepare


def make_device(name):
    """The torch.device of --device, or a UserError where it cannot be used.

    auto is a GPU if there is one, under torchrun the process's own, else the CPU.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif ":" in name and local_world > 1:
        raise UserError(f"--device {name} names one device for {local_world} processes: with "
                        f"torchrun give --device {name.split(':')[0]}, and each takes its own")
    try:
        # Fails now if the device cannot be used.
        torch.empty(1, device=name, dtype=torch.float64)
        return torch.device(name)
    except TypeError:
        raise UserError(f"--device {name} has no float64, which all metrics need: try --device "
                        "cpu") from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]      # pages may follow
        raise UserError(f"--device {name} cannot be used ({reason}): try --device cpu") from None


# ------------------------------------------------------------------------------ the command line

LAUNCHER = "python"         # printed before a script's name; a program that starts it may set it
current_run = None          # folder of the run that is being trained, a Path
started_anew = False        # whether it is a new run, not a resumed one
made_folder = False         # whether this run has made the folder


def command(main):
    """Run a script's main. A user's mistake is one line on stderr and exit code 2."""
    global current_run, started_anew
    current_run, started_anew = None, False
    warnings.showwarning = print_warning
    try:
        try:
            main()
        finally:
            remove_unused_folder()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        # From a DataLoader's worker the message is a traceback; its last line is the error.
        sentence = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        signs = ("DataLoader worker (pid", "/torch_")       # the second: a file in /dev/shm
        if isinstance(error, torch.OutOfMemoryError):
            sentence = "the GPU has too little memory: give a smaller --batch_size"
        elif any(sign in str(error) for sign in signs):
            sentence = ("a process that loads images was ended, perhaps for want of shared "
                        "memory: use --workers 0, or give a container more of it (docker run "
                        "--shm-size 8g)")
        else:
            raise
        print(f"error: {sentence}{resume_advice()}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                                 # nobody reads on, as behind `| head`
        sys.stdout = open(os.devnull, "w")
        sys.exit(1)
    except KeyboardInterrupt:
        rank, _ = processes()
        if rank == 0:
            print(f"\ninterrupted{resume_advice()}", file=sys.stderr, flush=True)
        # Ended by the signal itself: a shell then ends its loop over seeds, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def resume_advice():
    """How to go on with a run that was ended: the end of a sentence."""
    if current_run is None:
        return ""
    if not (current_run / "last.pt").exists():
        return "; no epoch is complete, so there is nothing to resume"
    words = [sys.argv[0], "--resume", str(current_run / "last.pt")]
    return f"; go on with {LAUNCHER} {shlex.join(words)}"


def script_beside(name):
    """The path of another script, as somebody types it who has typed this one's."""
    return str(Path(sys.argv[0]).with_name(name))


def remove_unused_folder():
    """Remove the folder of a new run that ended before its first epoch was complete."""
    rank, _ = processes()
    if rank == 0 and started_anew and not (current_run / "last.pt").exists():
        (current_run / "args.json").unlink(missing_ok=True)
        if made_folder:
            with contextlib.suppress(OSError):          # somebody has put files there
                current_run.rmdir()


def print_warning(message, *_, **__):
    rank, _ = processes()
    if rank == 0:
        print(f"warning: {message}", file=sys.stderr)


def parser(docstring):
    """The options that all scripts share. A default of None is filled in by `parse`."""
    p = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=docstring.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add_data_and_network_options(p)
    add_training_options(p)
    add_run_options(p)
    return p


def add_data_and_network_options(p):
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=data.LOADERS, default="cub200",
        help="The data set; toy is built in. Default: cub200.")
    add("--data_root", type=os.path.abspath, default="data",
        help="Folder that holds, or receives, the data set. Default: data.")

    add = p.add_argument_group("network").add_argument
    add("--arch", choices=BACKBONES,
        help="The backbone. Default: conv4 for toy, resnet50 for the others.")
    add("--weights",
        help="Its first weights: imagenet, none, or the path of a state dict. Default: imagenet "
             "for resnet50, else none.")
    add("--pooling", choices=("average", "double"), default="average",
        help="How features are pooled; double adds the maximum to the average. Default: average.")
    add("--image_size", type=positive(int),
        help="Pixels on a side. Default: 224; for conv4 64, on toy 32.")
    add("--augment", choices=("photo", "light"),
        help="photo is the papers' crop and flip, light is less. Default: light for conv4, else "
             "photo.")
    add("--embed_dim", type=positive(int),
        help="D, the dimension of the embeddings. Default: 128; for toy 64.")


def add_training_options(p):
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=positive(int), help="Number of epochs. Default: the preset's.")
    add("--warmup", type=not_negative(int),
        help="Epochs in which the backbone is not trained. Default: the preset's.")
    add("--batch_size", type=positive(int),
        help="Images in a batch, drawn in pairs of a class; an even number. Default: the "
             "preset's, but at most half of the training images.")
    add("--lr", type=positive(float),
        help="Adam's learning rate of backbone and embedding layer. Default: the preset's.")
    add("--lr_steps", type=positive(int), nargs="*",
        help="Epochs after which all learning rates are cut. Default: the preset's.")
    add("--lr_gamma", type=positive(float),
        help="The factor by which the rates are cut at --lr_steps. Default: the preset's.")
    add("--weight_decay", type=not_negative(float), default=4e-4,
        help="Weight decay of the network; loss parameters have none. Default: 4e-4.")
    add("--val_fraction", type=not_negative(float, below=1), default=0.0,
        help="Part of the training classes to hold out for validation. Default: 0.")


def add_run_options(p):
    add = p.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="Seed of all random numbers. Default: 0.")
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:1, ... Default: auto, a GPU where there is one.")
    add("--precision", choices=("float32", "bfloat16"), default="float32",
        help="The backbone's precision; bfloat16 is faster on a recent GPU. Default: float32.")
    add("--workers", type=not_negative(int),
        help="Processes that load images. Default: as many as there are CPUs; for toy 0.")
    add("--out", help="Folder of a new run. Default: runs/NAME.")
    add("--resume",
        help="last.pt of a run that was stopped. Its settings are used, see the args.json there.")
    add("-h", "--help", action="store_true", default=argparse.SUPPRESS,
        help="Show this, and the settings that result from the options beside it.")


def positive(kind, zero=False, below=math.inf):
    """An argparse type: 0 < value < below, or with `zero` 0 <= value < below."""

    def convert(text):
        value = kind(text)
        fits = 0 < value < below or (zero and value == 0)
        if not fits:
            least = "at least" if zero else "above"
            raise argparse.ArgumentTypeError(f"{text} is not {least} 0 and below {below:g}")
        return value

    sign = "non-negative" if zero else "positive"
    convert.__name__ = f"{sign} {kind.__name__}"        # for argparse's error messages
    return convert


not_negative = functools.partial(positive, zero=True)


def learning_rate(text):
    """An argparse type for the rate of a loss's parameters: 0 < rate <= 1."""
    rate = float(text)
    if not 0 < rate <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1: rates are "
                                         "absolute, not multiples of --lr")
    return rate


learning_rate.__name__ = "learning rate"        # for argparse's error messages


def parse(p, preset, argv=None, fixed=None):
    """The settings of a run: what the command line says, and where it is silent the preset's.

    `preset(args) -> {option: value}` fills in what is not given. Its batch size goes to
    `usual_batch_size`: `training_loader` lowers it where the classes are few, but never the
    user's. `fixed(args) -> {name: value}` are constants without an option, for --help and
    args.json. With --resume the settings are the run's.
    """
    args = p.parse_args(argv)
    show_help = "help" in args                      # set only if -h was given
    if args.resume is not None and not show_help:
        return resumed_settings(p, args, argv)
    fill_defaults(args)
    settings = preset(args)
    args.usual_batch_size = settings.pop("batch_size")
    for key, value in settings.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.fixed = fixed(args) if fixed else {}
    if show_help:
        p.epilog = settings_text(args)
        p.print_help()
        p.exit()
    if args.image_size < 16:
        raise UserError(f"--image_size {args.image_size} is too small: use at least 16")
    if args.arch != "resnet50" and args.weights == "imagenet":
        raise UserError(f"--weights imagenet needs --arch resnet50: for {args.arch} give a state "
                        "dict's path, or none")
    return args


def fill_defaults(args):
    """Fill in what does not depend on a script's preset, but on other options."""
    is_toy = args.dataset == "toy"
    args.arch = args.arch or ("conv4" if is_toy else "resnet50")
    args.embed_dim = args.embed_dim or (64 if is_toy else 128)
    args.weights = args.weights or ("imagenet" if args.arch == "resnet50" else "none")
    args.augment = args.augment or ("light" if args.arch == "conv4" else "photo")
    if args.image_size is None:
        conv4_size = 32 if is_toy else 64
        args.image_size = conv4_size if args.arch == "conv4" else 224
    if args.workers is None:
        per_process = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if is_toy else max(1, per_process)


def available_cpus():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settings_text(args):
    """The epilog of --help: all that a run with the options that are given would use."""
    used = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER}
    usual_batch_size = used.pop("usual_batch_size")
    used["batch_size"] = args.batch_size or usual_batch_size
    used.update(used.pop("fixed"))
    del used["help"]
    width = max(map(len, used))
    lines = ["settings of a run with the options that are given beside --help:"]
    for name, value in used.items():
        lines.append(f"  {name.ljust(width)}  {value}")
    return "\n".join(lines)


# Options in which a resumed run may differ.
MAY_DIFFER = {"device", "workers", "resume", "data_root"}


def resumed_settings(p, args, argv):
    """The settings of the run in --resume; an option that contradicts them is a UserError."""
    checkpoint = load_checkpoint(args.resume, "--resume")
    if checkpoint.get("version") != VERSION:
        raise UserError(f"--resume {args.resume} was written by an older version, whose learning "
                        "rates were multiples of --lr: resume it with that version")
    saved = checkpoint["args"]
    unknown = sorted(vars(args).keys() - saved.keys())
    if unknown:
        options = ", ".join(f"--{key}" for key in unknown)
        raise UserError(f"--resume {args.resume} is a run of another script, which knows no "
                        f"{options}: resume it with its own")
    # Parse again with the run's settings as defaults: what differs was typed by the user.
    as_before = argparse.Namespace(**{key: saved[key] for key in vars(args)})
    given = p.parse_args(argv, as_before)
    for key, value in vars(given).items():
        if key not in MAY_DIFFER and value != saved[key]:
            raise UserError(f"--{key} {value} contradicts the run in {args.resume}, which has "
                            f"{saved[key]}: leave the option out to resume, or start a new run")
    # What is saved has also what `parse` adds, such as `fixed`. The folder may have moved.
    differing = {key: getattr(given, key) for key in MAY_DIFFER}
    out = str(Path(args.resume).parent)
    return argparse.Namespace(**{**saved, **differing, "out": out})


def defaults(*classes):
    """The default arguments of classes, {"ProxyAnchor.margin": 0.1, ...}, for `parse`'s `fixed`."""
    values = {}
    for cls in classes:
        for parameter in inspect.signature(cls).parameters.values():
            if parameter.default is not parameter.empty:
                values[f"{cls.__name__}.{parameter.name}"] = parameter.default
    return values


def check_options(make_criterion):
    """Make the criterion once, so that options that do not fit are named before data is read.

    A ValueError of its construction begins with the parameter's name. The option has the same
    name, except that `dim` is --embed_dim.
    """
    try:
        make_criterion(num_classes=2)
    except ValueError as error:
        parameter, _, rest = str(error).partition(" ")
        option = "embed_dim" if parameter == "dim" else parameter
        raise UserError(f"--{option} {rest}") from None


def refuse(args, options, run):
    """Raise UserError if one of the options is given, though it means nothing to a run."""
    for option in options:
        value = getattr(args, option)
        if value is not None:
            raise UserError(f"--{option} {value} means nothing to {run}: leave it out")


def table(columns):
    """Plain text of {title: metrics}, a row for each metric; "-" is for one that is missing."""
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    lines = [" " * 22 + "".join(title.rjust(12) for title in columns)]
    for name in names:
        line = name.ljust(22)
        for metrics in columns.values():
            value = metrics.get(name, math.nan)         # nan is shown as "-"
            line += evaluate.format_metric(name, [value]).rjust(12)
        lines.append(line)
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- files
# A run's folder holds args.json, log.csv, last.pt, best.pt and results.json.

# Of the checkpoints. --resume takes no older one, whose settings meant something else;
# evaluate.py and load_network do.
VERSION = 2


def make_run_folder(args, name):
    """Make the run's folder, and write args.json there.

    A folder that is given with --out may not hold a run already. Without --out the folder is
    always a new one, also if two runs start at once.
    """
    global current_run, started_anew, made_folder
    rank, world = processes()
    out = Path(args.out or f"runs/{name}")
    made_folder = not (args.out and out.exists())
    files = [out / name for name in ("last.pt", "best.pt", "results.json")]
    if args.out and not args.resume and any(file.exists() for file in files):
        raise UserError(f"--out {out} already holds a run: resume it with --resume {files[0]}, "
                        "or give another folder")
    with data.clear_errors(f"making the folder {out}", "give another one with --out"):
        if args.out:
            out.mkdir(parents=True, exist_ok=True)
        elif rank == 0:
            out = make_new_folder(out)
    if world > 1:
        chosen = [out]
        dist.broadcast_object_list(chosen)
        out = chosen[0]
    current_run, started_anew = out, not args.resume
    args.out = str(out)
    if not args.resume:
        script = os.path.relpath(sys.argv[0] or "-")        # nothing: standard input
        settings = {
            **vars(args),
            "command": f"{LAUNCHER} {shlex.join([script, *sys.argv[1:]])}",
            "torch": torch.__version__,
            "commit": commit(),
        }
        save_file(out / "args.json", json.dumps(settings, indent=1))
    return out


def make_new_folder(path):
    """Make `path`, or the first of path-2, path-3, ... that is not there yet."""
    for number in itertools.count(1):
        folder = path if number == 1 else Path(f"{path}-{number}")
        try:
            folder.mkdir(parents=True)              # which fails if another run was faster
            return folder
        except FileExistsError:
            continue


def save_epoch(out, args, class_names, network, criterion, optimizer, scheduler, history,
               selection):
    """Write log.csv, last.pt, and best.pt if the epoch's Recall@1 is the highest so far."""
    recalls = [row[f"{selection}_recall@1"] for row in history]
    content = {
        "version": VERSION,
        "args": vars(args),
        "class_names": class_names,         # of the training classes
        "network": network.state_dict(),
        "criterion": criterion.state_dict(),
        "epoch": len(history),
        "best": max(recalls),
        "history": history,
    }
    if recalls[-1] > max(recalls[:-1], default=-1.0):
        save_file(out / "best.pt", content)
    # last.pt comes after best.pt: a kill between the two only repeats this epoch.
    content["optimizer"] = optimizer.state_dict()
    content["scheduler"] = scheduler.state_dict()
    save_file(out / "last.pt", content)
    save_file(out / "log.csv", csv_text(history))


def check_classes(checkpoint, class_names, args):
    """Fail if a run was trained with other classes: its proxies would stand for new ones."""
    trained = checkpoint.get("class_names", [])
    if trained != class_names:
        changed = sorted(set(trained) ^ set(class_names))
        raise UserError(f"--resume {args.resume} was trained with other classes than there are in "
                        f"{args.data_root} now ({', '.join(changed[:3])}): make the folder as it "
                        "was")


def restore(checkpoint, args, criterion, optimizer, scheduler):
    """Put a last.pt's state into criterion, optimiser and scheduler; return its history."""
    try:
        criterion.load_state_dict(checkpoint["criterion"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        return checkpoint["history"]
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {last_line(error)}"
        raise UserError(f"--resume {args.resume} is not the last.pt of a run with this data set "
                        f"and loss ({reason}): resume from that") from None


def load_checkpoint(path, option):
    """A checkpoint of this project as a dictionary; UserError for anything else."""
    checkpoint = load_file(path, option)
    needed = {"args", "network", "epoch"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{option} {path} is not a checkpoint of these scripts: give the last.pt "
                        "or best.pt of a run")
    return checkpoint


def load_file(path, option):
    """torch.load that runs no code from the file. Raises UserError if it fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except IsADirectoryError:
        reason = "is a folder; of a run, last.pt or best.pt is meant"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except Exception as error:      # unpickling some other file can raise anything
        reason = ("is not a checkpoint, or holds more than tensors and plain values "
                  f"({type(error).__name__})")
    raise UserError(f"{option} {path} {reason}: give another file")


def save_file(path, content):
    """Write a file beside its place, then rename it: a crash never leaves half a file.

    content: a text, a function that writes to a file, or a checkpoint. Only the first of
    several processes writes.
    """
    rank, _ = processes()
    if rank != 0:
        return
    part = Path(f"{path}.part")
    with data.clear_errors(f"writing {path}", "see to it that its folder can be written"):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(content, str):
                part.write_text(content, encoding="utf-8")
            elif callable(content):
                with open(part, "wb") as file:
                    content(file)
            else:
                torch.save(content, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def csv_text(rows):
    """The CSV text of rows, which are dictionaries with the same keys."""
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(str(value) for value in row.values()))
    return "\n".join(lines) + "\n"


def commit():
    """This checkout's commit, with a + where files differ from it; unknown without git."""
    folder = str(Path(__file__).parent)
    # --exclude: the commit's hash, never a tag.
    git = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def last_line(error):
    return str(error).splitlines()[-1].strip()[:100]


# ----------------------------------------------------------------------------- several processes
# `torchrun --nproc_per_node=N nir.py ...` starts N processes. Each embeds its part of every
# batch, then all embeddings are gathered. So each computes the same loss of the whole batch,
# from the same random numbers. Only the first one prints and writes files.


def join_processes(device):
    """Join the processes that torchrun has started, if it has."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        timeout=datetime.timedelta(hours=2),        # the first may have to download the data
        device_id=device if is_cuda else None,
    )
    if dist.get_rank() != 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_all():
    _, world = processes()
    if world > 1:
        dist.barrier()


def distribute(model):
    """The model itself, or with several processes wrapped in DistributedDataParallel.

    It is wrapped anew when other parameters are trained than before, as after the warm-up.
    """
    _, world = processes()
    if world == 1:
        return model
    inner = getattr(model, "module", model)
    trained = [parameter.requires_grad for parameter in inner.parameters()]
    if getattr(model, "trained", None) == trained:
        return model
    network = inner.network
    if network.embedding.weight.is_cuda and not network.freeze_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)        # in place; exists on GPUs alone
    parallel = DistributedDataParallel(inner)
    parallel.trained = trained
    return parallel


def copy_buffers(model):
    """Copy the first process's buffers to all, so that all evaluate with the same.

    DistributedDataParallel does this before each step, but not after an epoch's last. On CPUs,
    without SyncBatchNorm, the running averages differ by then.
    """
    _, world = processes()
    if world > 1:
        for buffer in model.module.network.buffers():
            dist.broadcast(buffer, 0)


def gather(rows):
    """All processes' rows (n, ...), one below the other: (world * n, ...).

    A gradient reaches the process's own rows.
    """
    rank, world = processes()
    if world == 1:
        return rows
    all_rows = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(all_rows, rows.detach().contiguous())
    if rows.requires_grad:
        # A process's own rows give its part of the network's gradient. The parts should add up,
        # but DistributedDataParallel averages them: hence the factor world. (The criterion's
        # gradients are equal in all processes, so their mean is right.) rows - rows.detach() is
        # 0, and has the gradient 1.
        all_rows[rank] = all_rows[rank] + world * (rows - rows.detach())
    return torch.cat(all_rows)
