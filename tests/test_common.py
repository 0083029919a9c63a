"""common.py: the network, the training protocol, checkpoints, mistakes, several processes."""
import argparse
import concurrent.futures
import csv
import hashlib
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import (
    REAL,
    ROOT,
    SMALL,
    assert_same,
    error_of,
    make_photos,
    needs_real,
    parametrize,
    read_checkpoint,
    read_json,
    refused,
    small_settings,
    started,
    train,
)
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import common
import data
import evaluate
import nir
import objectives
import prob_dml

CPU = torch.device("cpu")


def assert_same_runs(a, b):
    for name in ("last.pt", "best.pt"):
        assert_same(read_checkpoint(a / name), read_checkpoint(b / name))
    assert_same(read_json(a / "results.json"), read_json(b / "results.json"))


def write(path, content):
    """Write bytes, or what torch.save can write; None is no file. Returns the path as a text."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    return str(path)


def start(*argv, processes=1):
    """Start a script, with torchrun if there are several processes.

    Ctrl-C reaches it also where it does not reach the tests, as in a job in the background.
    """
    command = [sys.executable]
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node"
        command += [*torchrun.split(), str(processes)]
    return subprocess.Popen(
        [*command, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def tiny(monkeypatch):
    """A backbone of one's own, known as --arch tiny. One of its layers has a classifier's name."""

    def make(image_size):
        convolution = nn.Conv2d(3, 6, 5, stride=4)
        layers = {"head": convolution, "norm": nn.BatchNorm2d(6), "pool": nn.AdaptiveAvgPool2d(1)}
        return nn.Sequential(OrderedDict(layers)), 6

    monkeypatch.setitem(common.BACKBONES, "tiny", make)
    return make


# ----------------------------------------------------------------------------------- the network


@parametrize("pooling", ["average", "double"])
def test_resnet50_pools_torchvisions_feature_maps(pooling):
    torch.manual_seed(0)
    network = common.Network("resnet50", 7, pooling=pooling).eval()
    reference = torchvision.models.resnet50().eval()
    reference.fc = nn.Identity()
    reference.load_state_dict(network.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    maps = nn.Sequential(*list(reference.children())[:-2])(images)
    pooled = maps.mean((2, 3))
    if pooling == "double":
        pooled += maps.amax((2, 3))
    assert_close(network(images), network.embedding(pooled))


def test_conv4_has_four_blocks_of_64_channels():
    network = common.Network("conv4", 5, image_size=48)
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [64] * 4
    assert network.embedding.in_features == 64 * 3 * 3
    assert network(torch.randn(2, 3, 48, 48)).shape == (2, 5)


def test_batchnorm_is_frozen_with_pretrained_weights_alone(tmp_path):
    state = common.Network("conv4", 8, 16).backbone.state_dict()
    path = write(tmp_path / "weights.pt", state)
    for weights, frozen in ((path, True), ("none", False)):
        network = common.build_network(small_settings(weights=weights)).train()
        network(3 + torch.randn(8, 3, 16, 16))
        norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        assert [norm.training for norm in norms] == [not frozen] * 4
        for name, value in network.backbone.state_dict().items():
            assert torch.equal(value, state[name]) or not frozen
        assert torch.equal(norms[0].running_mean, torch.zeros(64)) == frozen


@parametrize("statistics, mean, deviation", [
    ([], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ([(0.5, 0.4, 0.3), (0.1, 0.2, 0.3)], [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]),
    ([None, None], 0, 1 / 255),
])
def test_pixels_are_normalised_with_the_backbones_statistics_and_floats_are_not(
        statistics, mean, deviation, monkeypatch):
    pool = nn.AdaptiveAvgPool2d(1)
    monkeypatch.setitem(common.BACKBONES, "pool", lambda image_size: (pool, 3, *statistics))
    network = common.Network("pool", 4)
    assert network.state_dict().keys() == {"embedding.weight", "embedding.bias"}
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    features = pixels.double().mean((2, 3)) / 255
    features = (features - torch.tensor(mean)) / torch.tensor(deviation)
    assert_close(network(pixels), network.embedding(features.float()))
    for dtype in (torch.float32, torch.float64, torch.float16):
        images = torch.rand(2, 3, 8, 8, dtype=dtype)
        features = images.float().mean((2, 3))
        assert_close(network(images), network.embedding(features))


def test_imagenet_weights_are_fetched_and_their_digest_is_checked(tiny, tmp_path, monkeypatch):
    """torchvision's function fetches them. A classifier is left out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    state = tiny(0)[0].state_dict()
    file = tmp_path / "weights"
    torch.save({**state, "fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    network = common.Network("tiny", 4)

    def fetch(name):
        url = shutil.copy(file, tmp_path / name).as_uri()
        imagenet = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        monkeypatch.setattr(imagenet.value, "url", url)
        common.load_weights(network, "imagenet")

    name = f"resnet50-{digest}.pth"
    fetch(name)
    assert torch.equal(network.backbone.head.weight, state["head.weight"])
    with refused("fetch resnet50-00000000.pth by hand and give --weights"):
        fetch("resnet50-00000000.pth")
    fetched = tmp_path / "home/hub/checkpoints" / name
    fetched.write_bytes(b"text")
    with refused(f"{fetched} is broken .*: delete it"):
        fetch(name)


@parametrize("content, message", [
    (None, "cannot be read .No such file"),
    (b"text", "is not a checkpoint"),
    ({"0.0.weight": torch.zeros(1)}, "does not fit the network"),
    ([1, 2], "does not fit the network"),
])
def test_weights_that_do_not_fit_are_named(content, message, tmp_path):
    path = write(tmp_path / "a.pt", content)
    with refused(f"--weights .*a.pt {message}"):
        common.load_weights(common.Network("conv4", 4, 16), path)


def test_a_backbone_of_ones_own_trains_from_its_weights(tiny, photos, tmp_path, capsys):
    start = tiny(0)[0].state_dict()
    path = write(tmp_path / "tiny.pt", start)
    argv = "--arch", "tiny", "--weights", path, "--epochs", 1, "--warmup", 1
    saved = train(photos, tmp_path / "run", *argv)
    assert torch.equal(saved["network"]["backbone.head.weight"], start["head.weight"])
    assert "tiny" in error_of(lambda: nir.main(["--arch", "other"]), capsys)
    with refused("--arch other is not known here: choose .*tiny"):
        common.Network("other", 4)


@parametrize("outer", [False, True])
@parametrize("name", ["bfloat16", "float32"])
def test_bfloat16_is_the_backbones_alone(name, outer):
    """Embedding layer and flow compute in float32, also in a caller's autocast."""
    network = common.build_network(small_settings(precision=name))
    model = common.Model(network, nir.NIR(nir.ProxyAnchor(2, 8), 8))
    seen = set()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda module, inputs, output: seen.add((type(module), output.dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        losses, embeddings, _ = model(torch.rand(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]))
    assert seen == {(nn.Conv2d, getattr(torch, name)), (nn.Linear, torch.float32)}
    sum(losses.values()).backward()
    assert network.backbone[0][0].weight.grad.dtype == embeddings.dtype == torch.float32


def test_losses_of_bfloat16_embeddings_are_computed_in_float32():
    embeddings = torch.randn(6, 8).bfloat16()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    losses = [kind(3, 8) for kind in nir.LOSSES.values()]
    losses.append(prob_dml.ProbabilisticProxies(3, 8, "elk", "vmf"))
    for loss in losses:
        expected = loss(embeddings.float(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(loss(embeddings, labels), expected)
            assert_close(loss(embeddings=embeddings, labels=labels), expected)


def to_fake_gpu(module):
    """The module with its tensors on a GPU; `Module.to` cannot do this with fake tensors."""
    for part in module.modules():
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else value.to("cuda")
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(value.to("cuda"))
    return module


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_network_and_all_losses_stay_on_a_fake_gpu(monkeypatch):
    """Fake tensors have no values, but a device: mixing a CPU's with a GPU's is an error.

    The images come from the CPU; the network moves them.
    """
    # The sampler loops until all values are accepted.
    monkeypatch.setattr(prob_dml, "sample_angle", lambda kappa, D, rng: torch.ones_like(kappa))
    cells = [(metric, "vmf", "exact") for metric in prob_dml.SIMILARITIES]
    nivmf = "elk", "bhattacharyya", "kl", "loglik"
    cells += itertools.product(nivmf, ["nivmf"], prob_dml.FORMS)
    with FakeTensorMode():
        criteria = []
        for loss, form in itertools.product(nir.LOSSES.values(), ("nll", "exp")):
            criteria.append(nir.NIR(loss(5, 8), 8, form=form))
        for cell in cells:
            proxies = prob_dml.ProbabilisticProxies(5, 8, *cell)
            criteria.append(prob_dml.Criterion(proxies, proxyanchor_weight=1.0))
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        for criterion in criteria:
            network = common.Network("conv4", 8, 32)
            network.precision = "bfloat16"
            model = to_fake_gpu(common.Model(network, criterion))
            losses, embeddings, _ = model(images, labels)
            devices = {value.device.type for value in (embeddings, *losses.values())}
            assert devices == {"cuda"}
        assert network(images.float()).device.type == "cuda"

        # What stays on the CPU is noticed.
        model.criterion.proxies.proxies = nn.Parameter(torch.zeros(5, 8))
        with pytest.raises(RuntimeError, match="device"):
            model(images, labels)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.make_device("auto") == common.make_device("cuda") == torch.device("cuda:1")
    with refused("cuda:0 names one device for 2 processes: .*--device cuda"):
        common.make_device("cuda:0")


def test_a_device_without_float64_is_refused(monkeypatch):

    def empty(*shape, device, dtype):
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}")

    monkeypatch.setattr(torch, "empty", empty)
    with refused("--device mps has no float64, .* try --device cpu"):
        common.make_device("mps")


# ------------------------------------------------------------------------------------ the protocol


def test_gradient_shares_are_the_norms_of_the_losses_gradients():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    losses = {"a": 3 * x.sum(), "b": x.square().sum() / 2, "c": torch.tensor(1.0)}
    a, b = 3 * 2 ** 0.5, 5 ** 0.5
    expected = {"grad_share_a": a / (a + b), "grad_share_b": b / (a + b), "grad_share_c": 0}
    assert common.gradient_shares(losses, x) == pytest.approx(expected)


def test_the_log_has_mean_losses_and_the_first_batchs_diagnostics(photos, tmp_path, monkeypatch):
    """A loss without a gradient has no share of it."""
    calls = []

    def losses(self, embeddings, labels):
        calls.append(1)
        return {"proxy": len(calls) + 0 * embeddings.sum()}

    monkeypatch.setattr(nir.NIR, "losses", losses)
    monkeypatch.setattr(nir.NIR, "diagnostics", lambda *args: {"number": len(calls)})
    row, = train(photos, tmp_path, "--epochs", 1)["history"]
    assert (row["proxy"], row["number"], row["grad_share_proxy"]) == (1.5, 1, 0)


def test_a_run_leaves_its_settings_log_checkpoints_and_results(photos, tmp_path, capsys):
    train(photos, tmp_path, "--epochs", 3)
    files = "args.json best.pt last.pt log.csv results.json".split()
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    rows = list(csv.DictReader(open(tmp_path / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"proxy", "nir", "class_cosine", "test_recall@1", "seconds"} <= rows[0].keys()
    for row in rows:
        shares = float(row["grad_share_proxy"]), float(row["grad_share_nir"])
        assert sum(shares) == pytest.approx(1)
    shown = capsys.readouterr().out
    assert "20 images of 4 classes train, 20 of 4 test" in shown
    assert shown.count(" images/s  ") == 3
    results = read_json(tmp_path / "results.json")["last"]
    assert {"recall@8", "map@1000", "nmi", "norm_auroc"} <= results.keys()
    for metric in results:
        assert f"\n{metric} " in shown


def test_the_warm_up_trains_everything_but_the_backbone(photos, tmp_path):
    torch.manual_seed(0)
    start = common.Network("conv4", 8, 16)
    epoch1 = train(photos, tmp_path / "1", "--epochs", 1, "--warmup", 1)["network"]
    for name, value in start.named_parameters():
        assert torch.equal(epoch1[name], value) == name.startswith("backbone")
    epoch2 = train(photos, tmp_path / "2", "--epochs", 2, "--warmup", 1)["network"]
    for name, _ in start.named_parameters():
        assert not torch.equal(epoch2[name], epoch1[name])


def test_each_group_has_its_rate_and_the_network_alone_decays(photos, tmp_path):
    argv = "--lr 0.01 --proxy_lr 1 --flow_lr 0.002 --weight_decay 0.03".split()
    schedule = "--epochs 2 --lr_steps 1 --lr_gamma 0.5".split()
    groups = train(photos, tmp_path, *argv, *schedule)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 0.005, 0.5, 0.001])
    assert [group["weight_decay"] for group in groups] == [0.03, 0.03, 0, 0]


def test_a_presets_batch_is_an_even_number_of_at_most_half_of_the_images():
    for size in (1, 2, 3, 4, 7, 8, 20, 179, 180, 1000):
        split = data.Split([None] * size, torch.zeros(size, dtype=torch.long), ["a"])
        even = [batch for batch in range(2, 91, 2) if batch <= size / 2]
        for given, expected in ((None, max(even, default=2)), (64, 64)):
            args = small_settings(batch_size=given, usual_batch_size=90)
            loader = common.training_loader(args, split, CPU)
            assert args.batch_size == loader.batch_sampler.batch_size == expected


def test_each_epoch_of_each_seed_draws_and_crops_anew(photos, tmp_path, monkeypatch):
    crops, draws, starts = [], [], []
    getitem, losses = data.Images.__getitem__, nir.NIR.losses

    def note_crop(self, item):
        if isinstance(item, tuple):                         # in training
            assert "RandomResizedCrop(size=(16, 16), scale=(0.08, 1.0)" in str(self.transform)
            crops.append(item[1])
        return getitem(self, item)

    def note_draw(*args):
        draws.append(float(torch.rand(())))
        return losses(*args)

    monkeypatch.setattr(data.Images, "__getitem__", note_crop)
    monkeypatch.setattr(nir.NIR, "losses", note_draw)
    for seed in (0, 1):
        argv = "--epochs", 2, "--warmup", 2, "--augment", "photo", "--seed", seed
        saved = train(photos, tmp_path / str(seed), *argv)
        starts.append(saved["network"]["backbone.0.0.weight"])
    # Two seeds of two epochs of two batches of 8.
    assert len(crops) == len(set(crops)) == 64
    assert len(draws) == len(set(draws)) == 8
    assert not torch.equal(*starts)


def test_the_number_of_workers_changes_no_number(photos, tmp_path):
    without = train(photos, tmp_path / "0", "--epochs", 2)
    assert_same(train(photos, tmp_path / "2", "--epochs", 2, "--workers", 2), without)


@parametrize("fraction, selection", [(0.5, "val"), (0, "test")])
def test_validation_classes_choose_the_epoch_and_test_classes_make_the_table(
        fraction, selection, photos, tmp_path, monkeypatch):
    recalls, chosen_on = [0.5, 0.9, 0.9, 0.2], []
    left = iter(recalls)

    def recall(network, split, args, device):
        chosen_on.append(split.class_names)
        return next(left)

    def metrics(embeddings, labels, ks):
        return {"images": len(embeddings), "last k": ks[-1]}

    monkeypatch.setattr(common, "recall_at_1", recall)
    monkeypatch.setattr(evaluate, "all_metrics", metrics)
    last = train(photos, tmp_path, "--epochs", 4, "--val_fraction", fraction)
    classes = (2, 3) if selection == "val" else (4, 5, 6, 7)
    assert chosen_on == [[f"class{c}" for c in classes]] * 4
    assert [row[f"{selection}_recall@1"] for row in last["history"]] == recalls
    # Of two best epochs it is the first.
    table = read_json(tmp_path / "results.json")
    for name, epoch in (("best", 2), ("last", 4)):
        assert read_checkpoint(tmp_path / f"{name}.pt")["epoch"] == epoch
        expected = {"epoch": epoch, "images": 20, "last k": 8}
        assert expected.items() <= table[name].items()


def test_start_epoch_follows_the_warm_ups_freezing_and_precedes_the_epochs_seed(
        photos, tmp_path, monkeypatch):
    """It is called in every epoch, and what it draws changes no number."""
    losses, calls = nir.NIR.losses, []

    def random_losses(*args):
        return {name: value * torch.rand(()) for name, value in losses(*args).items()}

    def start_epoch(self, epoch, network, train_split, args, device):
        is_trained = network.backbone[0][0].weight.requires_grad
        calls.append((epoch, is_trained, len(train_split.images), args.epochs, device))
        common.embed(network, train_split, args, device)
        torch.rand(7)

    argv = "--epochs", 3, "--warmup", 1
    monkeypatch.setattr(nir.NIR, "losses", random_losses)
    plain = train(photos, tmp_path / "plain", *argv)
    monkeypatch.setattr(nir.NIR, "start_epoch", start_epoch, raising=False)
    assert_same(train(photos, tmp_path / "drawn", *argv), plain)
    assert calls == [(epoch, epoch > 0, 20, 3, CPU) for epoch in range(3)]


def not_finite(losses):
    losses["nir"] = losses["nir"] * math.nan


def too_large(losses):
    raise ValueError("kappa is too large: lower --lr")


@parametrize("fail, problem, remedy", [
    (not_finite, "the loss term nir is not finite", "lower --lr or its weight"),
    (too_large, "kappa is too large", "lower --lr"),
])
def test_a_failing_loss_names_epoch_step_and_the_last_checkpoint(
        fail, problem, remedy, photos, tmp_path, monkeypatch, capsys):
    """The fourth call is in epoch 2, step 2."""
    calls = itertools.count(1)
    real = nir.NIR.losses

    def losses(*args):
        values = real(*args)
        if next(calls) == 4:
            fail(values)
        return values

    monkeypatch.setattr(nir.NIR, "losses", losses)
    last = tmp_path / "last.pt"
    assert error_of(lambda: train(photos, tmp_path, "--epochs", 4), capsys) == (
        f"error: {problem} in epoch 2, step 2: {remedy}; the last good checkpoint is {last}\n")
    assert read_checkpoint(last)["epoch"] == 1


def test_a_run_that_fails_in_its_first_epoch_leaves_nothing(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nir.NIR, "losses", lambda *args: too_large({}))
    there = tmp_path / "there"
    there.mkdir()
    for out in (there, tmp_path / "new"):
        message = "error: kappa is too large in epoch 1, step 1: lower --lr\n"
        assert error_of(lambda: train(photos, out), capsys) == message
    assert list(tmp_path.rglob("*")) == [there]


def test_training_on_toy_beats_an_untrained_network(toy, toy_run):
    checkpoint = read_checkpoint(toy_run / "last.pt")
    args = argparse.Namespace(**checkpoint["args"])
    torch.manual_seed(args.seed)
    untrained = common.recall_at_1(common.build_network(args), toy[1], args, CPU)
    trained = read_json(toy_run / "results.json")["last"]["recall@1"]
    assert untrained < 0.35 and trained > untrained + 0.15


@needs_real
def test_real_drawings_are_learned(tmp_path):
    argv = "--epochs", 1, "--batch_size", 90, "--embed_dim", 128
    train(REAL / "omniglot", tmp_path, *argv)
    assert read_json(tmp_path / "results.json")["last"]["recall@1"] > 0.2


@pytest.mark.filterwarnings("ignore:.*training class.es. have one image")
def test_single_images_alone_are_refused_before_the_training(tmp_path, monkeypatch):
    """Four classes train, of which two validate, and four test."""
    monkeypatch.setattr(common, "make_run_folder", lambda *_: pytest.fail("the run has begun"))
    message = "no test or validation class of .* has two images"
    no_test_pairs = make_photos(tmp_path / "a", (2, 2, 2, 2, 1, 1, 1, 1))
    no_validation_pairs = make_photos(tmp_path / "b", (2, 2, 1, 1, 1, 1, 1, 2))
    for photos in (no_test_pairs, no_validation_pairs):
        with refused(message):
            train(photos, tmp_path / "run", "--val_fraction", 0.5)


# -------------------------------------------------------------------------- stopped, then resumed


@parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(how, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    photos = make_photos(tmp_path / "photos", noise=1)
    train(photos, whole, "--epochs", 20)
    argv = *SMALL, "--data_root", photos, "--out", stopped, "--epochs", 20
    process = start(ROOT / "nir.py", *argv)
    next(line for line in process.stdout if line.startswith("epoch   3/"))
    time.sleep(0.1)                                         # into the next epoch
    process.send_signal(how)
    _, error = process.communicate(timeout=100)
    last = stopped / "last.pt"
    assert process.returncode == -how
    if how == signal.SIGINT:
        advice = f"interrupted; go on with python {ROOT / 'nir.py'} --resume {last}"
        assert error.splitlines()[-1] == advice
    assert 2 <= read_checkpoint(last)["epoch"] < 20
    settings = (stopped / "args.json").read_text()
    nir.main(["--resume", str(last)])
    assert_same_runs(stopped, whole)
    assert (stopped / "args.json").read_text() == settings


def test_a_resumed_run_has_no_second_warm_start(photos, tmp_path, monkeypatch):
    """It stays in its folder, which may have moved. It may have other workers."""
    calls = []
    save_file, warm_start = common.save_file, prob_dml.ProbabilisticProxies.warm_start

    def count(*args):
        calls.append(1)
        return warm_start(*args)

    def save_and_stop(path, content):
        save_file(path, content)
        if path.name == "log.csv":
            raise KeyboardInterrupt

    monkeypatch.setattr(prob_dml.ProbabilisticProxies, "warm_start", count)
    whole = train(photos, tmp_path / "whole", "--epochs", 2, main=prob_dml.main)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(common, "save_file", save_and_stop)
        train(photos, tmp_path / "run", "--epochs", 2, main=prob_dml.main)
    last = (tmp_path / "run").rename(tmp_path / "moved") / "last.pt"
    with refused("--out elsewhere contradicts the run in"):
        prob_dml.main(["--resume", str(last), "--out", "elsewhere"])
    prob_dml.main(["--resume", str(last), "--workers", "1"])
    assert_same(read_checkpoint(last), whole)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.*best.pt is missing")
def test_a_finished_run_is_evaluated_again_and_its_data_is_not_fetched_again(
        photos, tmp_path, monkeypatch, capsys):
    """The folder of the data may have been given in a way that depends on the current one."""
    load, fetched = data.load, []

    def note(name, root, download):
        fetched.append(download)
        return load(name, root, download)

    monkeypatch.setattr(data, "load", note)
    monkeypatch.chdir(photos.parent)
    train(photos.name, tmp_path, "--epochs", 1)
    monkeypatch.chdir(tmp_path)
    results = read_json(tmp_path / "results.json")
    (tmp_path / "best.pt").unlink()
    nir.main(["--resume", "last.pt"])
    assert "is finished: it is only evaluated again" in capsys.readouterr().out
    assert_same(read_json(tmp_path / "results.json"), {"last": results["last"]})
    assert fetched == [True, False]


@parametrize("script, argv, message", [
    (nir, ["--arch", "resnet50"], "--arch resnet50 contradicts the run in .*, which has conv4"),
    (nir, ["--dataset", "cub200"], "--dataset cub200 contradicts the run in .*, which has folder"),
    (nir, ["--nir_weight", "0.5"], "--nir_weight 0.5 contradicts .* which has 0.01: leave"),
    (prob_dml, [], "is a run of another script, which knows no --concentration_init, "),
])
def test_resuming_with_other_settings_names_the_contradiction(script, argv, message, trained):
    with refused(message):
        script.main(["--resume", str(trained / "last.pt"), *argv])


@parametrize("change, message", [
    (lambda saved: saved.pop("version"), "was written by an older version, .* multiples of --lr"),
    (lambda saved: saved.update(version=1), "was written by an older version"),
    (lambda saved: saved.pop("optimizer"), "is not the last.pt of a run .*KeyError: 'optimizer'"),
    (lambda saved: saved["criterion"].popitem(), "is not the last.pt of a run .*RuntimeError: "),
    (lambda saved: saved["class_names"].append("x"), "was trained with other classes .* now .x.:"),
    (lambda saved: saved["args"].update(embed_dim=9), "does not hold the network .*conv4, D = 9"),
])
def test_a_checkpoint_that_cannot_be_resumed_says_why(change, message, trained, tmp_path):
    saved = read_checkpoint(trained / "last.pt")
    change(saved)
    path = write(tmp_path / "last.pt", saved)
    with refused(message):
        nir.main(["--resume", path])


def test_an_older_checkpoint_is_still_evaluated_and_loaded(trained, tmp_path):
    saved = read_checkpoint(trained / "last.pt")
    del saved["version"], saved["args"]["precision"], saved["args"]["usual_batch_size"]
    old = write(tmp_path / "last.pt", saved)
    evaluate.main(["--checkpoint", old, "--device", "cpu"])
    results = read_json(trained / "results.json")["last"]
    assert read_json(tmp_path / "metrics.json")["recall@1"] == results["recall@1"]
    network, _ = common.load_network(old, "cpu")
    assert_same(network.state_dict(), saved["network"])


# ----------------------------------------------------------------------------------------- files


def test_runs_never_overwrite_each_other(trained, photos, tmp_path, monkeypatch):
    with refused("already holds a run: resume it with --resume .*last.pt"):
        train(photos, trained, "--epochs", 1)
    for name in ("best.pt", "results.json"):
        folder = tmp_path / f"only {name}"
        folder.mkdir()
        shutil.copy(trained / name, folder)
        with refused("already holds a run"):
            train(photos, folder, "--epochs", 1)

    # Runs of one name that start together have folders of their own.
    monkeypatch.chdir(tmp_path)
    start = threading.Barrier(8)

    def begin(number):
        args = argparse.Namespace(out=None, resume=None, number=number)
        start.wait()
        return args, common.make_run_folder(args, "x")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(begin, range(8)))
    names = {"runs/x", *(f"runs/x-{i}" for i in range(2, 9))}
    assert {str(out) for _, out in begun} == names
    for args, out in begun:
        assert args.out == str(out)
        assert read_json(out / "args.json")["number"] == args.number


def test_a_killed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_file(tmp_path / "a.pt", {"x": 1})

    def half(content, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        common.save_file(tmp_path / "a.pt", {"x": 2})
    assert read_checkpoint(tmp_path / "a.pt") == {"x": 1}
    (tmp_path / "folder").mkdir()
    with refused("writing .*folder failed .*its folder can be written"):
        common.save_file(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "folder"]


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@parametrize("content, message", [
    (None, "cannot be read .No such file"),
    (b"", "is not a checkpoint"),
    (b"text", "is not a checkpoint"),
    ({"args": Code(), "network": {}, "epoch": 1}, "is not a checkpoint, or holds more than tens"),
    ({"epoch": 1}, "is not a checkpoint of these scripts"),
])
def test_no_code_of_a_checkpoint_is_run_and_other_files_are_refused(
        content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path("a.pt"), content)
    with refused(f"checkpoint a.pt {message}"):
        common.load_network(path)
    assert not Path("executed").exists()


def test_a_run_says_how_it_was_made(photos, tmp_path, monkeypatch, capsys):
    argv = ["nir.py", "--data_root", "my photos"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(common, "commit", lambda: "abc")
    train(photos, tmp_path, "--epochs", 1)
    made = read_json(tmp_path / "args.json")
    assert made["command"] == "python nir.py --data_root 'my photos'"
    assert (made["commit"], made["torch"], made["epochs"]) == ("abc", torch.__version__, 1)
    assert made["fixed"] == common.defaults(nir.ProxyAnchor, nir.GlowFlow)
    pictures = f"python evaluate.py --checkpoint {tmp_path / 'best.pt'} --pictures"
    assert pictures in capsys.readouterr().out


def test_the_commit_has_a_plus_where_files_differ(tmp_path, monkeypatch):
    file = tmp_path / "common.py"
    monkeypatch.setattr(common, "__file__", str(file))
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    assert common.commit() == "unknown"
    file.write_text("a")
    for command in ("init -q", "add .", "commit -qm a"):
        subprocess.run([*git, *command.split()], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    clean = common.commit()
    file.write_text("b")
    assert head.startswith(clean) and common.commit() == clean + "+"


def test_a_trained_network_embeds_images_as_the_evaluation_does(trained, photos):
    network, prepare = common.load_network(trained / "best.pt", device="cpu")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    test = data.load("folder", photos)[1]
    pixels = torch.stack([prepare(Image.open(path)) for path in test.images])
    args = argparse.Namespace(**read_json(trained / "args.json"))
    embeddings = network(pixels)
    assert torch.equal(common.embed(network.train(), test, args, CPU), embeddings)
    assert torch.equal(prepare(test.images[0]), pixels[0])


def test_evaluate_alone_finds_what_the_training_found(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    argv = "--checkpoint", folder / "best.pt", "--pictures", "--device", "cpu"
    process = start(ROOT / "evaluate.py", *argv)
    shown, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    results, metrics = read_json(folder / "results.json"), read_json(folder / "metrics.json")
    assert_same(metrics, results["best"])
    for name in ("rejection.csv", "retrieval.png", "norms.png"):
        assert (folder / name).exists() and str(folder / name) in shown


# ------------------------------------------------------------------------------ the command line


@parametrize("argv, message", [
    ("--dataset cars", "invalid choice: 'cars'"),
    ("--loss triplet", "invalid choice: 'triplet'"),
    ("--nirweight 0", "unrecognized arguments: --nirweight 0"),
    ("--batch_size -2", "--batch_size: -2 is not above 0 and below inf"),
    ("--batch_size 7", "--batch_size 7 is odd"),
    ("--lr fast", "invalid positive float value: 'fast'"),
    ("--lr inf", "--lr: inf is not above 0 and below inf"),
    ("--lr nan", "--lr: nan is not above 0 and below inf"),
    ("--proxy_lr 4000", "4000 is not above 0 and at most 1: rates are absolute, not multiples"),
    ("--proxy_lr 0", "--proxy_lr: 0 is not above 0"),
    ("--flow_lr fast", "invalid learning rate value: 'fast'"),
    ("--nir_weight -1", "--nir_weight: -1 is not at least 0 and below inf"),
    ("--nir_weight much", "invalid non-negative float value: 'much'"),
    ("--warmup 1.5", "invalid non-negative int value: '1.5'"),
    ("--val_fraction 1", "--val_fraction: 1 is not at least 0 and below 1"),
    ("--weights imagenet", "--weights imagenet needs --arch resnet50: for conv4 give"),
    ("--pooling double", "--pooling double needs a backbone with a layer `avgpool`"),
    ("--device gpu", "--device gpu cannot be used"),
    ("--image_size 15", "--image_size 15 is too small"),
    ("--embed_dim 1", "error: --embed_dim 1 is too small: a coupling flow needs at least two"),
    ("--data_root nowhere", "nowhere is no folder, or there is no image below it"),
    ("--dataset cars196 --data_root .", "official address is dead"),
    ("--out /proc/nothing", "give another one with --out"),
    ("--resume nothing.pt", "--resume nothing.pt cannot be read (No such file"),
    ("--resume=", "--resume  cannot be read (No such file"),
    ("--lr_steps -3", "-3 is not above 0"),
    ("--resume .", "--resume . is a folder"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(
        argv, message, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*SMALL, "--data_root", str(photos), *argv.split()]
    *usage, error = error_of(lambda: nir.main(given), capsys).strip().splitlines()
    assert message in error and error.count("error: ") == 1
    assert usage in ([], [f"usage: {Path(sys.argv[0]).name} [options]"])


@parametrize("workers", [0, 1])
def test_a_broken_image_is_named_also_by_a_worker(workers, tmp_path, capfd):
    photos = make_photos(tmp_path / "photos")
    broken = photos / "class0/0.png"
    broken.write_bytes(b"broken")
    argv = "--workers", workers, "--batch_size", 40
    error = error_of(lambda: train(photos, tmp_path / "run", *argv), capfd)
    assert error.splitlines()[-1].startswith(f"error: {broken} is not a readable")
    assert "Traceback" not in error


@parametrize("raised, message", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "a process that loads images was ended, .*: use --workers 0, .*"),
    (torch.OutOfMemoryError("CUDA out of memory"),
     "the GPU has too little memory: give a smaller --batch_size"),
])
def test_failures_that_have_a_remedy_are_told_in_one_line(raised, message, capsys):

    def fail():
        raise raised

    error, = error_of(fail, capsys).splitlines()
    assert re.fullmatch(f"error: {message}", error)


def test_a_reader_that_reads_no_further_loses_no_epoch(tmp_path):
    """As `| head -1` does, which closes the pipe."""
    photos = make_photos(tmp_path / "photos")
    run = tmp_path / "run"
    process = start(ROOT / "nir.py", *SMALL, "--data_root", photos, "--out", run, "--epochs", 3)
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=100)
    assert process.stderr.read() == ""
    assert read_checkpoint(run / "last.pt")["epoch"] >= 1


def test_a_resumed_run_that_fails_keeps_its_files(trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "last.pt").unlink()
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise common.UserError("a mistake")

    monkeypatch.setattr(common, "make_optimizer", fail)
    error_of(lambda: nir.main(["--resume", str(folder / "best.pt")]), capsys)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


@parametrize("seed", [-1, 20251125204300123456789, 2 ** 64 - 7919])
def test_any_whole_number_is_a_seed(seed, photos, tmp_path):
    whole = train(photos, tmp_path / "run", "--seed", seed, "--epochs", 2)
    assert len(whole["history"]) == 2


@parametrize("error", [ValueError, RuntimeError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):

    def wrong():
        raise error("not the user's")

    with pytest.raises(error, match="not the user's"):
        common.command(wrong)


def test_an_interrupt_before_there_is_a_checkpoint_is_one_line(monkeypatch, capsys):
    signals = []
    monkeypatch.setattr(signal, "signal", lambda *given: signals.append(given))
    monkeypatch.setattr(signal, "raise_signal", signals.append)

    def interrupted():
        raise KeyboardInterrupt

    common.command(interrupted)
    assert signals == [(signal.SIGINT, signal.SIG_DFL), signal.SIGINT]
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_interrupt_in_the_first_epoch_says_that_nothing_can_be_resumed(
        photos, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train_one_epoch", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", lambda *_: None)
    common.command(lambda: train(photos, tmp_path / "run"))
    assert capsys.readouterr().err.endswith("interrupted; no epoch is complete, so there is "
                                            "nothing to resume\n")


@parametrize("argv, expected", [
    ("", "resnet50 128 imagenet 224 photo"),
    ("--weights none", "resnet50 128 none 224 photo"),
    ("--arch conv4", "conv4 128 none 64 light"),
    ("--dataset toy", "conv4 64 none 32 light"),
    ("--dataset toy --arch resnet50", "resnet50 64 imagenet 224 photo"),
    ("--arch conv4 --image_size 48 --augment photo", "conv4 128 none 48 photo"),
])
def test_network_and_images_fit_each_other_by_default(argv, expected, monkeypatch):
    args = vars(started(monkeypatch, nir, *argv.split())[0])
    names = "arch embed_dim weights image_size augment".split()
    assert [str(args[name]) for name in names] == expected.split()


def test_each_process_has_as_many_workers_as_cpus(monkeypatch):

    def workers(*argv):
        return started(monkeypatch, nir, *argv)[0].workers

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert workers() == 24
    assert workers("--dataset", "toy") == 0
    assert workers("--dataset", "toy", "--workers", "3") == 3
    for processes, expected in (("5", 4), ("24", 1), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert workers() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delattr(os, "sched_getaffinity")            # other systems have none
    assert workers() == 7


@parametrize("script, options", [
    (nir, "--dataset sop --epochs 7 --nir_weight 0"),
    (prob_dml, "--dataset toy --epochs 7"),
    (objectives, "--dataset toy --epochs 7"),
])
def test_help_lists_all_options_with_defaults_and_the_settings_that_result(
        script, options, monkeypatch, capsys):
    argv = options.split()
    with pytest.raises(SystemExit, match="^0$"):
        script.main([*argv, "--help"])
    options, settings = capsys.readouterr().out.split("\nsettings of")
    blocks = options.split("\n  --")[1:]
    assert len(blocks) > 25
    assert all("Default:" in block or block.startswith("resume") for block in blocks)
    shown = dict(line.split(maxsplit=1) for line in settings.splitlines()[1:])
    args = vars(started(monkeypatch, script, *argv)[0])
    expected = {**args.pop("fixed"), **args, "batch_size": args.pop("usual_batch_size")}
    for name in args.keys() - common.MAY_DIFFER:
        assert shown[name] == str(expected[name])


BORROWED = """
import sys
import torch
embeddings, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
others = {"common", "data", "evaluate", "torchvision", "scipy"}
for name, loss in [
    ("nir", "nir.NIR(nir.ProxyAnchor(3, 8), 8)"),
    ("prob_dml", "prob_dml.Criterion(prob_dml.ProbabilisticProxies(3, 8), 1.0)"),
    ("objectives", "objectives.Objective(objectives.Margin(3), 'distance')"),
]:
    exec(f"import {name}")
    sum(eval(loss).losses(embeddings, labels).values()).backward()
    print(name, sorted({*others, "objectives", "prob_dml"} & set(sys.modules)))
    others -= {name}
"""


def test_losses_can_be_borrowed_without_the_rest(tmp_path):
    """In a folder of their own they need torch and numpy alone."""
    for name in ("nir", "prob_dml", "objectives"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", BORROWED], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "nir []", "prob_dml ['prob_dml']", "objectives ['objectives', 'prob_dml']"]


WAITING = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2])
"""


@parametrize("script", ["nir", "prob_dml", "objectives", "evaluate"])
def test_idle_threads_sleep_unless_the_user_wants_otherwise(script):
    """The variable is set before torch is loaded."""
    unset = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", WAITING, ROOT, script]
    for given, expected in (({}, "PASSIVE\n"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE\n")):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**unset, **given})
        assert (done.stdout, done.stderr) == (expected, "")


# ----------------------------------------------------------------------------- several processes

SEVERAL = """
import os
import sys
import common, nir, prob_dml
import torch

folder, *settings = sys.argv[1:]
os.chdir(folder)
plain, save_file = common.Network, common.save_file


class Network(common.Network):
    '''In float64 and with frozen BatchNorm: no rounding, no statistics of a process's own.'''

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "freeze_norm": True})

    def forward(self, images):
        return super().forward(images.double())


def save_and_stop(path, content):
    save_file(path, content)
    if path.name == "log.csv":
        raise KeyboardInterrupt


common.Network = Network
torch.set_default_dtype(torch.float64)
nir.main([*settings, "--out", "nir", "--nir_weight", "0.1"])
prob_dml.main([*settings, "--out", "elk", "--proxyanchor_weight", "1"])

common.Network = plain
torch.set_default_dtype(torch.float32)
free = [*settings, "--lr", "0.01", "--nir_weight", "0"]
os.makedirs("runs/folder-proxyanchor-baseline-seed0", exist_ok=True)
nir.main(free)
common.save_file = save_and_stop
try:
    nir.main([*free, "--out", "stopped"])
except KeyboardInterrupt:
    pass
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()           # as common.command does
"""


# Its name is taken, so the run gets another.
FREE = "runs/folder-proxyanchor-baseline-seed0-2"


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """Folders of the runs of SEVERAL in one process and in two, and what the two printed."""
    root = tmp_path_factory.mktemp("several")
    photos = make_photos(root / "photos", sizes=(5,) * 7 + (4,), noise=1)
    script = root / "several.py"
    script.write_text(SEVERAL)
    argv = *SMALL, "--data_root", photos, "--epochs", 2, "--warmup", 1
    started = []
    for number in (1, 2):
        folder = root / str(number)
        folder.mkdir()
        started.append(start(script, folder, *argv, processes=number))
    outputs = [process.communicate(timeout=250) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return root / "1", root / "2", outputs[1]


@parametrize("name", ["nir", "elk"])
def test_two_processes_train_what_one_does(name, one_and_two):
    """In the first epoch the backbone is fixed, in the second it is trained."""
    one, two = [read_checkpoint(folder / name / "last.pt") for folder in one_and_two[:2]]
    # Adam hides the scale of gradients; their averages, which it keeps, show it.
    states = one["optimizer"]["state"], two["optimizer"]["state"]
    for a, b in zip(*(state.values() for state in states)):
        assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-6, atol=1e-9)
    for part in ("network", "criterion"):
        assert_close(one[part], two[part], rtol=0, atol=1e-6)
    for a, b in zip(one["history"], two["history"]):
        a["seconds"] = b["seconds"]
        assert a == pytest.approx(b, abs=1e-6)


def test_the_first_process_alone_prints_and_finds_a_new_folder(one_and_two):
    _, two, (printed, errors) = one_and_two
    assert printed.count("epoch   1/2") == 3         # the stopped run's is saved, not printed
    assert "arning" not in errors
    assert (two / FREE).is_dir() and len(list((two / "runs").iterdir())) == 2


def test_two_processes_evaluate_with_the_averages_that_are_saved(one_and_two):
    """Where BatchNorm is trained, each process normalises its own part of a batch."""
    free = one_and_two[1] / FREE
    last = read_checkpoint(free / "last.pt")["history"][-1]
    assert last["test_recall@1"] == read_json(free / "results.json")["last"]["recall@1"]


def test_two_processes_stopped_and_resumed_equal_two_that_were_not_stopped(one_and_two):
    _, two, _ = one_and_two
    stopped = two / "stopped"
    assert read_checkpoint(stopped / "last.pt")["epoch"] == 1
    resumed = start(ROOT / "nir.py", "--resume", stopped / "last.pt", processes=2)
    output = resumed.communicate(timeout=250)
    assert resumed.returncode == 0, output
    assert_same_runs(stopped, two / FREE)


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    split = data.Split([None] * 100, torch.zeros(100, dtype=torch.long), ["a"])
    for world, size, fits in ((3, 8, 6), (3, 2, 6), (4, 90, 88)):
        monkeypatch.setattr(common, "processes", lambda n=world: (0, n))
        message = f"--batch_size {size} cannot be shared by {world} processes: try {fits}$"
        with refused(message):
            common.training_loader(small_settings(batch_size=size), split, CPU)


def test_rank_0_alone_warns_and_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", None)
    monkeypatch.setattr(data.time, "monotonic", itertools.count(step=100).__next__)

    def main():
        warnings.showwarning("careful")
        list(data.progress(range(3), 3, "counting"))

    for rank in (0, 1):
        for module in (common, data):
            monkeypatch.setattr(module, "processes", lambda r=rank: (r, 2))
        common.command(main)
        error = capsys.readouterr().err
        assert ("careful" in error, "counting 1/3" in error) == (rank == 0, rank == 0)


def test_what_ends_the_first_process_is_told_by_that_alone(monkeypatch):

    def barrier():
        raise RuntimeError("Connection closed by peer\nand where in C++")

    monkeypatch.setattr(data, "processes", lambda: (1, 2))
    monkeypatch.setattr(data.dist, "barrier", barrier)
    message = "the first process failed .Connection closed by peer.; its own message says why"
    with refused(message):
        data.load_splits(None)
