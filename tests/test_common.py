"""The network, the loop and its checkpoints; whole runs as a user starts them; every mistake in one sentence."""
import argparse
import concurrent.futures
import csv
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import data
import evaluate
import nir
import prob_dml
from data import UserError

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("DML_TEST_DATA", "not given"))
SMALL = ["--dataset", "folder", "--arch", "conv4", "--image_size", "16", "--embed_dim", "8", "--batch_size", "8",
         "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight classes of five noisy one-coloured pictures."""
    root = tmp_path_factory.mktemp("photos")
    rng = torch.Generator().manual_seed(0)
    for c in range(8):
        colour = torch.rand(3, 1, 1, generator=rng)
        for i in range(5):
            path = root / f"class{c}" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            noisy = (colour + 0.1 * torch.randn(3, 20, 20, generator=rng)).clamp(0, 1)
            torchvision.utils.save_image(noisy, path)
    return root


def run(*argv, script="nir.py", **options):
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}, timeout=250, **options)


def train(photos, out, *argv, main=nir.main):
    """A run in this process."""
    main([*SMALL, "--data_root", str(photos), "--out", str(out), *map(str, argv)])
    return torch.load(out / "last.pt", weights_only=True)


def started(monkeypatch, script, *argv):
    """What a command line hands to common.train: settings, criterion, name of the run."""
    caught = []
    monkeypatch.setattr(common, "train", lambda *given: caught.extend(given))
    script.main(list(argv))
    return caught


def assert_same(a, b):
    """Bit-identical, all the way down, but for the times and places of a run."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "out", "resume", "workers"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b or a != a and b != b                   # not a number in both

# -------------------------------------------------------------------------------------------------------- network

def test_resnet50_pools_torchvisions_features():
    torch.manual_seed(0)
    reference = torchvision.models.resnet50().eval()
    features = torch.nn.Sequential(*list(reference.children())[:-2])
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    x = torch.randn(2, 3, 64, 64)
    for pooling in ("average", "double"):
        network = common.Network("resnet50", 7, pooling=pooling, freeze_norm=True)
        network.backbone.load_state_dict(state)
        maps = features(x)
        pooled = maps.mean((2, 3)) + (maps.amax((2, 3)) if pooling == "double" else 0)
        torch.testing.assert_close(network.train()(x), network.embedding(pooled))


def test_conv4_is_four_blocks_of_64_channels():
    network = common.Network("conv4", 5, image_size=48)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64] * 4 and network.embedding.in_features == 64 * 3 * 3
    assert network(torch.randn(2, 3, 48, 48)).shape == (2, 5)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_batchnorm_stays_frozen_and_the_other_does_not(freeze):
    network = common.Network("conv4", 4, image_size=16, freeze_norm=freeze).train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network(3 + torch.randn(8, 3, 16, 16))
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) == freeze


def test_batchnorm_is_frozen_with_pretrained_weights_only(tmp_path):
    state = torchvision.models.resnet50().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    for weights, frozen in ((str(tmp_path / "weights.pth"), True), ("none", False)):
        args = type("Args", (), dict(arch="resnet50", embed_dim=4, image_size=64, pooling="average", weights=weights))
        network = common.build_network(args).train()
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) == 53 and all(m.training != frozen for m in norms)
        if frozen:
            assert torch.equal(network.backbone.conv1.weight, state["conv1.weight"])
            assert torch.equal(network.backbone.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_imagenet_weights_are_fetched_with_their_digest_checked(tmp_path, monkeypatch):
    """Both through torchvision: the file, served from file://, has to match the digest in its name."""
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    entry = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    network = common.Network("resnet50", 4)
    for name, fits in ((f"resnet50-{digest}.pth", True), ("resnet50-00000000.pth", False)):
        (tmp_path / name).write_bytes((tmp_path / "x.pth").read_bytes())
        monkeypatch.setattr(type(entry), "url", (tmp_path / name).as_uri(), raising=False)
        if fits:
            common.load_weights(network, "imagenet")
        else:
            with pytest.raises(UserError, match="fetch resnet50-00000000.pth by hand and give --weights PATH"):
                common.load_weights(network, "imagenet")


@pytest.mark.parametrize("make, message", [
    (lambda path: path.write_bytes(b"nothing"), "is not a checkpoint"),
    (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "does not fit the network"),
    (lambda path: torch.save([1, 2], path), "does not fit the network"),
    (lambda path: None, "does not exist"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, make, message):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(UserError, match=f"--weights .*weights.pth {message}"):
        common.load_weights(common.Network("resnet50", 4), str(path))


def test_uint8_images_are_normalised_with_the_backbones_statistics_and_float_ones_are_not(monkeypatch):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    pixels = images.float() / 255
    imagenet = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for statistics, expected in (((), (pixels - imagenet[0]) / imagenet[1]), (((0.5,) * 3, (0.25,) * 3), (pixels - 0.5) / 0.25),
                                 ((None, None), images.float())):
        monkeypatch.setitem(common.BACKBONES, "own", lambda image_size: (Mean(), 3, *statistics))
        network = common.Network("own", 4)
        torch.testing.assert_close(network(images), network.embedding(expected.mean((2, 3))))
        for dtype in (torch.float32, torch.float64, torch.float16):
            torch.testing.assert_close(network(pixels.to(dtype)), network.embedding(pixels.to(dtype).float().mean((2, 3))))
        assert set(network.state_dict()) == {"embedding.weight", "embedding.bias"}


def test_ones_own_backbone_trains_from_its_weights_and_is_offered(photos, tmp_path, monkeypatch, capsys):
    def own(image_size):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5, stride=4), torch.nn.BatchNorm2d(6), torch.nn.AdaptiveAvgPool2d(1)), 6
    monkeypatch.setitem(common.BACKBONES, "own", own)
    weights = own(0)[0].state_dict()
    torch.save({**weights, "classifier.weight": torch.zeros(3)}, tmp_path / "own.pth")
    argv = ["--dataset", "folder", "--data_root", str(photos), "--arch", "own", "--weights", str(tmp_path / "own.pth"), "--device",
            "cpu", "--workers", "0", "--epochs", "1", "--warmup", "1", "--out", str(tmp_path / "run")]
    nir.main(argv)
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert (saved["args"]["image_size"], saved["args"]["augment"], saved["args"]["batch_size"]) == (224, "photo", 8)
    assert torch.equal(saved["network"]["backbone.0.weight"], weights["0.weight"])
    with pytest.raises(SystemExit):
        nir.main(["--arch", "other"])
    assert "own" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="--arch other is not known here: choose .*own"):
        common.Network("other", 4)


def test_the_network_moves_its_input_to_its_own_device():
    with FakeTensorMode():
        network = on("cuda", common.Network("conv4", 8, 32))
        for images in (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 32, 32)):
            assert images.device.type == "cpu" and network(images).device.type == "cuda"


def test_a_classifier_is_left_out_but_not_what_the_backbone_has(tmp_path, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "own", lambda size: (torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)}), 2))
    network = common.Network("own", 4)
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2), "head.weight": torch.ones(9)}, tmp_path / "w")
    common.load_weights(network, str(tmp_path / "w"))
    assert torch.equal(network.backbone["fc"].weight, torch.ones(2, 2))


# ------------------------------------------------------------------------------------------------------ precision

def test_bfloat16_is_the_backbones_alone_and_trains_on_a_cpu(photos, tmp_path):
    seen = set()

    def hook(module, inputs, output):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            seen.add((type(module).__name__, output.dtype))
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        for main, name in ((nir.main, "nir"), (prob_dml.main, "elk")):
            for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)):
                seen.clear()
                saved = train(photos, tmp_path / f"{name}-{precision}", "--epochs", 1, "--precision", precision, main=main)
                assert seen == {("Conv2d", dtype), ("Linear", torch.float32)}
                assert all(value.dtype == torch.float32 for value in saved["network"].values() if value.is_floating_point())
    finally:
        handle.remove()
    rows = [json.loads((tmp_path / f"elk-{name}/results.json").read_text())["last"]["recall@1"] for name in ("bfloat16", "float32")]
    assert rows[0] == pytest.approx(rows[1], abs=0.2)


def test_full_precision_reaches_positional_and_keyword_arguments():
    embeddings, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    for loss in [kind(3, 8) for kind in nir.LOSSES.values()] + [prob_dml.ProbabilisticProxies(3, 8, "elk", "vmf")]:
        half = embeddings.bfloat16()
        expected = loss(half.float(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            for actual in (loss(half, labels), loss(embeddings=half, labels=labels)):
                assert actual.dtype == torch.float32
                torch.testing.assert_close(actual, expected)


def on(device, module):
    """The module's own tensors on another device; `Module.to` does not know fake ones."""
    for part in module.modules():
        part._buffers.update({name: value.to(device) for name, value in part._buffers.items() if value is not None})
        part._parameters.update({name: torch.nn.Parameter(value.to(device)) for name, value in part._parameters.items()
                                 if value is not None})
    return module


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_network_and_every_loss_stay_on_a_pretended_gpu(monkeypatch):
    """Fake tensors have a device and a shape, but no values: a CPU tensor among those of a GPU is an error here too."""
    monkeypatch.setattr(prob_dml, "sample_angle", lambda kappa, D, generator: torch.ones_like(kappa))   # loops by values
    cells = [(metric, "vmf", "exact") for metric in prob_dml.SIMILARITIES]
    cells += [(metric, "nivmf", form) for metric in ("elk", "bhattacharyya", "kl", "loglik") for form in prob_dml.FORMS]
    with FakeTensorMode():
        made = [nir.NIR(loss(5, 8), 8, form=form) for loss in nir.LOSSES.values() for form in ("nll", "exp")]
        made += [prob_dml.Criterion(prob_dml.ProbabilisticProxies(5, 8, *cell), proxyanchor_weight=1.0) for cell in cells]
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        for arch, criterion in [("resnet50", made[0]), *(("conv4", criterion) for criterion in made)]:
            network = common.Network(arch, 8, 32)
            network.precision = "bfloat16"
            model = on("cuda", common.Model(network, criterion))
            for dtype in (torch.uint8, torch.float32):
                images = torch.zeros(4, 3, 32, 32, device="cuda", dtype=dtype)
                losses, embeddings, _ = model(images, labels)
                assert all(value.device.type == "cuda" for value in (embeddings, *losses.values()))
                assert embeddings.dtype == torch.float32 and embeddings.shape == (4, 8)
        model.criterion.proxies.proxies = torch.nn.Parameter(torch.zeros(5, 8))          # and it would have been noticed
        with pytest.raises(RuntimeError, match="device"):
            model(images, labels)


def test_a_device_for_all_processes_or_without_float64_is_one_sentence(monkeypatch):
    def no_float64(*shape, device, dtype):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
    monkeypatch.setattr(torch, "empty", no_float64)
    with pytest.raises(UserError, match="--device mps has no float64, .* try --device cpu"):
        common.make_device("mps")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:0 names one device for 2 processes: with torchrun give --device cuda"):
        common.make_device("cuda:0")


# ----------------------------------------------------------------------------------------------------------- loop

def test_gradient_shares_are_those_of_the_terms():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    shares = common.gradient_shares({"a": 3 * x.sum(), "b": (x * x).sum() / 2, "c": torch.tensor(1.0)}, x)
    a, b = 3 * 2 ** 0.5, 5 ** 0.5
    assert shares == pytest.approx({"grad_share_a": a / (a + b), "grad_share_b": b / (a + b), "grad_share_c": 0})


def test_a_run_writes_its_files_and_learns(photos, tmp_path, capsys):
    saved = train(photos, tmp_path / "run", "--epochs", 3, "--val_fraction", 0.5, "--batch_size", 4)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "args.json", "best.pt", "last.pt", "log.csv", "results.json"]
    rows = list(csv.DictReader(open(tmp_path / "run/log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"proxy", "nir", "grad_share_proxy", "grad_share_nir", "val_recall@1", "seconds"} <= rows[0].keys()
    assert float(rows[0]["grad_share_proxy"]) + float(rows[0]["grad_share_nir"]) == pytest.approx(1)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best["best"] == max(float(row["val_recall@1"]) for row in rows) and saved["epoch"] == 3
    assert json.loads((tmp_path / "run/args.json").read_text())["epochs"] == 3
    text = capsys.readouterr().out
    assert text.count("images/s") == 3 and text.count("left  val Recall@1") == 3
    for metric in ("recall@1", "recall@8", "map@1000", "map@r", "nmi", "f1", "uniformity", "spectral_decay", "density",
                   "concentration_variance"):
        assert f"\n{metric} " in text
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["last"]["epoch"] == 3 and set(results) == {"last", "best"}


def test_warm_up_leaves_the_backbone_alone_and_trains_the_rest(photos, tmp_path):
    torch.manual_seed(0)
    start = common.Network("conv4", 8, 16)
    saved = train(photos, tmp_path / "run", "--epochs", 1, "--warmup", 1)["network"]
    weights = [k for k, _ in start.named_parameters()]
    assert all(torch.equal(saved[k], start.state_dict()[k]) == k.startswith("backbone") for k in weights)
    assert train(photos, tmp_path / "again", "--epochs", 2, "--warmup", 1)["network"]["backbone.0.0.weight"].ne(
        saved["backbone.0.0.weight"]).any()


def test_each_loss_parameter_has_its_own_rate_and_no_weight_decay_and_the_schedule_cuts_all(photos, tmp_path):
    saved = train(photos, tmp_path / "run", "--epochs", 2, "--lr", 0.01, "--proxy_lr", 3, "--flow_lr", 5,
                  "--lr_steps", 1, "--lr_gamma", 0.5)
    groups = saved["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.005, 0.005, 0.015, 0.025])
    assert [group["weight_decay"] for group in groups] == [4e-4, 4e-4, 0, 0]


def test_the_number_of_workers_changes_no_number(photos, tmp_path):
    a = train(photos, tmp_path / "a", "--epochs", 2)
    b = train(photos, tmp_path / "b", "--epochs", 2, "--workers", 2)
    assert_same(a, b)
    c = train(photos, tmp_path / "c", "--epochs", 2, "--seed", 1)
    assert not torch.equal(a["network"]["embedding.weight"], c["network"]["embedding.weight"])


def test_a_run_killed_mid_epoch_and_resumed_equals_the_uninterrupted_one(photos, tmp_path):
    whole = train(photos, tmp_path / "whole", "--epochs", 12)
    argv = [*SMALL, "--data_root", str(photos), "--out", str(tmp_path / "killed"), "--epochs", "12"]
    process = subprocess.Popen([sys.executable, "-u", ROOT / "nir.py", *argv], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    for line in process.stdout:
        if line.startswith("epoch   3/"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = torch.load(tmp_path / "killed/last.pt", weights_only=True)["epoch"]
    assert 2 <= before < 12
    nir.main(["--resume", str(tmp_path / "killed/last.pt")])
    assert_same(torch.load(tmp_path / "killed/last.pt", weights_only=True), whole)
    assert_same(torch.load(tmp_path / "killed/best.pt", weights_only=True),
                torch.load(tmp_path / "whole/best.pt", weights_only=True))
    assert_same(json.loads((tmp_path / "killed/results.json").read_text()),
                json.loads((tmp_path / "whole/results.json").read_text()))


def test_ctrl_c_leaves_a_run_to_resume_and_says_how(photos, tmp_path):
    argv = [*SMALL, "--data_root", str(photos), "--out", str(tmp_path / "run"), "--epochs", "1000"]
    process = subprocess.Popen([sys.executable, "-u", ROOT / "nir.py", *argv], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("epoch   2/"))
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == f"interrupted: go on with python {ROOT / 'nir.py'} --resume {tmp_path}/run/last.pt"
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"] >= 1


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_file(tmp_path / "a.pt", {"x": 1})

    def half(content, path):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        common.save_file(tmp_path / "a.pt", {"x": 2})
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"x": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="writing .*folder failed .*give another path"):
        common.save_file(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "folder"]                 # no half files


def test_a_loss_that_is_not_finite_names_epoch_step_and_term_and_keeps_the_checkpoint(photos, tmp_path, monkeypatch):
    calls, real = [], nir.NIR.nir

    def breaks(self, embeddings, labels):
        calls.append(1)
        return real(self, embeddings, labels) * (float("nan") if len(calls) == 5 else 1)
    monkeypatch.setattr(nir.NIR, "nir", breaks)
    with pytest.raises(UserError, match="the loss term nir is not finite in epoch 2, step 2"):   # three steps an epoch
        train(photos, tmp_path / "run", "--epochs", 4)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("step", [1, 5])                                           # three steps an epoch
def test_a_criterions_value_error_becomes_a_sentence_with_epoch_step_and_checkpoint(step, photos, tmp_path, monkeypatch, capsys):
    calls = []

    def losses(self, embeddings, labels):
        calls.append(1)
        if len(calls) == step:
            raise ValueError("kappa is not finite: lower the learning rates")
        return {"proxy": embeddings.square().mean()}
    monkeypatch.setattr(nir.NIR, "losses", losses)
    with pytest.raises(SystemExit) as caught:
        common.command(lambda: train(photos, tmp_path / "run", "--epochs", 4))
    epoch, number = divmod(step - 1, 3)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (f"error: kappa is not finite in epoch {epoch + 1}, step {number + 1}: lower the learning "
                                       f"rates; the last good checkpoint is in {tmp_path / 'run'}\n")


def test_a_mistake_in_the_code_keeps_its_traceback():
    def wrong():
        raise ValueError("not the user's")
    with pytest.raises(ValueError, match="not the user's"):
        common.command(wrong)


def test_start_epoch_comes_after_the_warm_ups_freezing_and_before_the_epochs_seed(photos, tmp_path, monkeypatch):
    """Called in every epoch; what it draws changes no number, and what it freezes stays frozen."""
    plain = train(photos, tmp_path / "plain", "--epochs", 3, "--warmup", 1)
    seen = []

    def start_epoch(self, epoch, network, train_split, args, device):
        trained = [parameter.requires_grad for parameter in network.backbone.parameters()]
        seen.append((epoch, all(trained), any(trained), len(train_split.images), args.epochs, device.type))
        common.embed(network, train_split, args, device)                             # a pass over a DataLoader
        torch.rand(7)
        if freeze:
            network.backbone[0].requires_grad_(False)
    monkeypatch.setattr(nir.NIR, "start_epoch", start_epoch, raising=False)
    freeze = False
    assert_same(train(photos, tmp_path / "drawn", "--epochs", 3, "--warmup", 1), plain)
    assert seen == [(0, False, False, 20, 3, "cpu"), (1, True, True, 20, 3, "cpu"), (2, True, True, 20, 3, "cpu")]
    freeze = True
    frozen = train(photos, tmp_path / "frozen", "--epochs", 3, "--warmup", 1)["network"]
    torch.manual_seed(0)
    start = common.Network("conv4", 8, 16).state_dict()
    assert torch.equal(frozen["backbone.0.0.weight"], start["backbone.0.0.weight"])
    assert not torch.equal(frozen["backbone.1.0.weight"], start["backbone.1.0.weight"])


@pytest.mark.parametrize("main, argv, expected", [
    (nir.main, [], {"ProxyAnchor.margin": 0.1, "ProxyAnchor.alpha": 32.0, "GlowFlow.depth": 8, "GlowFlow.clamp": 2.0}),
    (nir.main, ["--loss", "softtriple"], {"SoftTriple.centers": 10, "SoftTriple.la": 20.0}),
    (prob_dml.main, [], {"min_concentration": 0.1, "min_temperature": 1e-3, "ProxyAnchor.alpha": 32.0})])
def test_what_no_option_changes_is_written_down(main, argv, expected, photos, tmp_path):
    saved = train(photos, tmp_path, "--epochs", 1, *argv, main=main)
    for fixed in (json.loads((tmp_path / "args.json").read_text())["fixed"], saved["args"]["fixed"]):
        assert {name: fixed[name] for name in expected} == expected


BORROWED = """
import sys
import {name}
import torch
embeddings, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
loss = {loss}
sum(loss.losses(embeddings, labels).values()).backward()
print(sorted({{"common", "data", "evaluate", "torchvision", "scipy"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("files, loss", [
    (["nir"], "nir.NIR(nir.ProxyAnchor(3, 8), 8)"),
    (["prob_dml", "nir"], "prob_dml.Criterion(prob_dml.ProbabilisticProxies(3, 8), 1.0)"),
    (["objectives", "nir"], "objectives.Objective(objectives.Margin(3), 'distance')")])
def test_a_script_can_be_borrowed(files, loss, tmp_path):
    """In a folder of its own it needs torch and numpy alone."""
    for name in files:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", BORROWED.format(name=files[0], loss=loss)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_run_never_overwrites_another(photos, tmp_path, monkeypatch):
    train(photos, tmp_path / "run", "--epochs", 1)
    with pytest.raises(UserError, match="already holds a run: resume it with --resume .*last.pt"):
        train(photos, tmp_path / "run", "--epochs", 1)
    monkeypatch.chdir(tmp_path)
    for name in ("runs/x", "runs/x-2", "runs/x-3"):
        args = type("Args", (), {"out": None, "resume": None})()
        assert str(common.make_run_folder(args, "x")) == name
        (tmp_path / name / "last.pt").touch()


def test_runs_of_one_name_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = threading.Barrier(8)

    def begin(number):
        args = argparse.Namespace(out=None, resume=None, number=number)
        start.wait()
        return args, common.make_run_folder(args, "x")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(begin, range(8)))
    assert {str(out) for _, out in made} == {"runs/x", *(f"runs/x-{i}" for i in range(2, 9))}
    for args, out in made:
        assert args.out == str(out) and json.loads((out / "args.json").read_text())["number"] == args.number


def test_workers_are_as_many_as_the_cpus_that_each_process_may_use(monkeypatch):
    def workers(*argv):
        return common.parse(*_nir_parser(), list(argv)).workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(24)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert workers() == 24 and workers("--dataset", "toy") == 0 and workers("--dataset", "toy", "--workers", "3") == 3
    for processes, expected in (("5", 4), ("24", 1), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert workers() == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.delattr(os, "sched_getaffinity")                                            # as on other systems
    assert workers() == 7


def test_one_function_says_which_process_this_is_and_rank_0_alone_speaks(monkeypatch, capsys):
    assert common.processes is data.processes and data.processes() == (0, 1)
    monkeypatch.setattr(warnings, "showwarning", None)
    for rank in (0, 1):
        for module in (common, data):
            monkeypatch.setattr(module, "processes", lambda: (rank, 2))
        monkeypatch.setattr(data.time, "monotonic", itertools.count(step=100).__next__)
        common.command(lambda: [warnings.showwarning("careful")] + list(data.progress(range(3), 3, "counting")))
        error = capsys.readouterr().err
        assert ("counting 1/3" in error, "warning: careful" in error) == (rank == 0, rank == 0)


def test_toy_training_beats_an_untrained_network_by_a_wide_margin(tmp_path):
    """A few epochs of the toy preset, at half its resolution."""
    from evaluate import recall_at_k
    args = common.parse(*_nir_parser(), ["--dataset", "toy", "--device", "cpu", "--image_size", "16"])
    _, test = data.load("toy", None)
    untrained = recall_at_k(common.embed(common.build_network(args), test, args, torch.device("cpu")), test.labels, [1])[1]
    nir.main(["--dataset", "toy", "--device", "cpu", "--image_size", "16", "--epochs", "5", "--nir_weight", "0", "--out", str(tmp_path)])
    trained = json.loads((tmp_path / "results.json").read_text())["last"]["recall@1"]
    assert untrained < 0.35 and trained > untrained + 0.15


def _nir_parser():
    p = common.parser("")
    for option in ("loss", "nir_weight", "nir_form", "nir_noise", "proxy_weight", "proxy_lr", "flow_lr"):
        p.add_argument(f"--{option}", default="proxyanchor" if option == "loss" else None)
    return p, nir.preset


def test_best_is_the_epoch_of_the_highest_recall_and_has_its_column(photos, tmp_path, monkeypatch):
    real, values = evaluate.recall_at_k, iter([0.5, 0.9, 0.9, 0.2])                      # of equal ones the first
    monkeypatch.setattr(evaluate, "recall_at_k", lambda e, y, ks: {1: next(values)} if ks == (1,) else real(e, y, ks))
    last = train(photos, tmp_path, "--epochs", 4)
    best, table = torch.load(tmp_path / "best.pt", weights_only=True), json.loads((tmp_path / "results.json").read_text())
    assert (best["epoch"], last["epoch"], table["best"]["epoch"], table["last"]["epoch"]) == (2, 4, 2, 4)


def test_validation_classes_choose_the_epoch_and_test_classes_make_the_table(photos, tmp_path, monkeypatch):
    seen, names, embed = [], [], common.embed
    monkeypatch.setattr(common, "embed", lambda network, split, *more: seen.append(split.class_names) or embed(network, split, *more))
    monkeypatch.setattr(data, "usual_ks", lambda name: names.append(name) or (1,))
    train(photos, tmp_path, "--epochs", 1, "--val_fraction", 0.5, "--batch_size", 4)
    test = [f"class{c}" for c in (4, 5, 6, 7)]
    assert seen == [["class2", "class3"], test, test] and names == ["folder"] * 2


def test_every_epoch_and_seed_draws_and_augments_anew(photos, tmp_path, monkeypatch):
    items, drawn, real, losses = [], [], data.Images.__getitem__, nir.NIR.losses

    def spy(self, item):
        if isinstance(item, tuple):
            assert "RandomResizedCrop(size=(16, 16), scale=(0.08, 1.0)" in str(self.transform)
            items.append(item[1])
        return real(self, item)
    monkeypatch.setattr(data.Images, "__getitem__", spy)
    monkeypatch.setattr(nir.NIR, "losses", lambda *args: drawn.append(torch.rand(()).item()) or losses(*args))
    saved = [train(photos, tmp_path / str(seed), "--epochs", 2, "--warmup", 2, "--augment", "photo", "--seed", seed)["network"]
             for seed in (0, 1)]
    assert len(items) == 4 * 24 == len(set(items)) and len(drawn) == 4 * 3 == len(set(drawn))
    assert not torch.equal(*(network["backbone.0.0.weight"] for network in saved))           # their first values differ


def test_corrupted_runs_see_corrupted_images(photos, tmp_path):
    train(photos, tmp_path, "--epochs", 1, "--corrupt")
    assert "norm_clarity" in json.loads((tmp_path / "results.json").read_text())["last"]
    args = argparse.Namespace(dataset="folder", data_root=photos, corrupt=True, val_fraction=0.0)
    first, _, test = data.load_splits(args)
    assert torch.equal(first.ambiguity, first.corruption) and not torch.equal(first.corruption, test.corruption)


def test_weight_decay_is_what_was_asked_for(photos, tmp_path):
    saved = train(photos, tmp_path, "--epochs", 1, "--weight_decay", 0.01)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.01, 0.01, 0, 0]
    assert saved["args"]["precision"] == "float32"                                  # not "auto": as it was, on this CPU


def test_a_stopped_run_with_a_warm_start_goes_on_without_another(photos, tmp_path, monkeypatch):
    calls, warm_start, save = [], prob_dml.ProbabilisticProxies.warm_start, common.save_file
    monkeypatch.setattr(prob_dml.ProbabilisticProxies, "warm_start", lambda *args: calls.append(1) or warm_start(*args))
    whole = train(photos, tmp_path / "whole", "--epochs", 2, main=prob_dml.main)

    def stop(path, content):
        save(path, content)
        if path.name == "log.csv":
            raise KeyboardInterrupt
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(common, "save_file", stop)
        train(photos, tmp_path / "cut", "--epochs", 2, main=prob_dml.main)
    made = (tmp_path / "cut/args.json").read_text()
    prob_dml.main(["--resume", str(tmp_path / "cut/last.pt"), "--workers", "1", "--device", "cpu"])
    assert_same(torch.load(tmp_path / "cut/last.pt", weights_only=True), whole)
    assert len(calls) == 2 and (tmp_path / "cut/args.json").read_text() == made
    with pytest.raises(UserError, match="best.pt is not the last.pt of a run .*KeyError: .optimizer.*: resume from that"):
        prob_dml.main(["--resume", str(tmp_path / "cut/best.pt")])


def test_the_log_has_the_mean_of_each_term_and_no_share_where_there_is_no_gradient(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(nir.NIR, "losses", lambda self, embeddings, labels: {"proxy": 2 + 0 * embeddings.sum()})
    row, = train(photos, tmp_path, "--epochs", 1)["history"]
    assert row["proxy"] == 2 and row["grad_share_proxy"] == 0


def test_defaults_are_those_of_the_help():
    def parse(*argv):
        args = common.parse(*_nir_parser(), list(argv))
        return args.image_size, args.augment, args.data_root
    assert parse("--dataset", "toy") == (32, "light", "data") and parse("--arch", "conv4") == (64, "light", "data")
    assert parse() == (224, "photo", "data")
    for wrong in ("--val_fraction=-0.1", "--val_fraction=1", "--lr=inf", "--lr=nan"):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_the_commit_has_a_plus_where_files_differ(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "common.py").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    clean = common.commit()
    (tmp_path / "common.py").write_text("b")
    assert not clean.endswith("+") and common.commit() == clean + "+"


# ------------------------------------------------------------------------------------------------------- mistakes

@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(photos, out, "--epochs", 1)
    return out


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("argv, message", [
    (["--dataset", "cars"], "invalid choice: 'cars'"),
    (["--loss", "triplet"], "invalid choice: 'triplet'"),
    (["--batch_size", "-2"], "--batch_size: -2 is not above 0 and below inf"),
    (["--lr", "fast"], "invalid positive float value: 'fast'"),
    (["--nir_weight", "-1"], "--nir_weight: -1 is not at least 0 and below inf"),
    (["--nir_weight", "much"], "invalid non-negative float value: 'much'"),
    (["--warmup", "1.5"], "invalid non-negative int value: '1.5'"),
    (["--val_fraction", "1.5"], "--val_fraction: 1.5 is not at least 0 and below 1"),
    (["--dataset", "toy", "--weights", "imagenet"], "--weights imagenet needs --arch resnet50"),
    (["--dataset", "toy", "--pooling", "double"], "--pooling double needs a backbone with a layer `avgpool`"),
    (["--dataset", "toy", "--device", "gpu"], "--device gpu cannot be used"),
    (["--image_size", "8"], "--image_size 8 is too small"),
    (["--dataset", "toy", "--embed_dim", "1"], "error: --embed_dim 1 is too small: a coupling flow needs at least two dimensions"),
    (["--dataset", "toy", "--batch_size", "7"], "--batch_size 7 is not a multiple of 2"),
    (["--dataset", "toy", "--batch_size", "900"], "--batch_size 900 is more than 2000 images of 100 training classes allow: use at most 500"),
    (["--dataset", "folder", "--data_root", "nowhere", "--arch", "conv4"], "error: nowhere is no folder"),
    (["--dataset", "cars196", "--data_root", ".", "--arch", "conv4"], "official address is dead"),
    (["--resume", "nothing.pt"], "--resume nothing.pt does not exist"), (["--resume", "."], "--resume . is a folder"),
    (["--nirweight", "0"], "unrecognized arguments: --nirweight 0"),
    (["--dataset", "toy", "--out", "/proc/nothing"], "give another"),
])
def test_mistakes_are_one_sentence_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        common.command(lambda: nir.main(argv))
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and message in error[-1] and error[-1].count("error: ") == 1
    assert error[:-1] in ([], [f"usage: {Path(sys.argv[0]).name} [options]"])


def test_a_broken_image_ends_a_run_with_its_name_also_from_a_worker_process(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/class0/0.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as caught:
        common.command(lambda: train(tmp_path / "photos", tmp_path / "out0", "--workers", 0))
    done = run(*SMALL, "--data_root", tmp_path / "photos", "--workers", 1, "--out", tmp_path / "out1")
    for code, error in ((caught.value.code, capsys.readouterr().err), (done.returncode, done.stderr)):
        assert code == 2, error
        assert error.strip().splitlines()[-1].startswith(f"error: {tmp_path}/photos/class0/0.png is not a readable")
        assert "Traceback" not in error


def test_a_checkpoint_that_carries_code_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Code(), "network": {}, "epoch": 1}, "evil.pt")
    for content in (b"text", b""):
        Path("text.pt").write_bytes(content)
        with pytest.raises(UserError, match="text.pt is not a checkpoint"):
            common.load_checkpoint("text.pt", "--resume")
    with pytest.raises(UserError, match="evil.pt is not a checkpoint, or holds more than tensors"):
        common.load_checkpoint("evil.pt", "--resume")
    assert not Path("executed").exists()
    torch.save({"something": 1}, "other.pt")
    with pytest.raises(UserError, match="other.pt is not a checkpoint of these scripts"):
        common.load_checkpoint("other.pt", "--resume")


@pytest.mark.parametrize("argv, message", [
    (["--arch", "resnet50"], "--arch resnet50 contradicts"), (["--dataset", "toy"], "--dataset toy contradicts"),
    (["--nir_weight", "0.5"], "--nir_weight 0.5 contradicts")])
def test_resuming_with_other_settings_names_the_contradiction(trained, argv, message):
    with pytest.raises(UserError, match=message):
        nir.main(["--resume", str(trained / "last.pt"), *argv])


def test_resuming_with_the_other_script_is_refused(trained):
    with pytest.raises(UserError, match="is a run of another script or version"):
        prob_dml.main(["--resume", str(trained / "last.pt")])


def test_a_checkpoint_of_before_is_evaluated_and_resuming_it_names_what_changed(photos, tmp_path):
    """Its settings know no --form and no --precision, its loss holds the logarithm of T."""
    saved = train(photos, tmp_path / "run", "--epochs", 1, main=prob_dml.main)
    args = {key: value for key, value in saved["args"].items() if key not in ("form", "precision", "usual_batch_size")}
    saved["args"] = {**args, "normalizer": "exact"}
    saved["criterion"]["proxies.log_temperature"] = saved["criterion"].pop("proxies.temperature").log()
    torch.save(saved, tmp_path / "run/last.pt")
    with pytest.raises(UserError, match="another script or version, which knows no --form, --precision"):
        prob_dml.main(["--resume", str(tmp_path / "run/last.pt")])
    evaluate.main(["--checkpoint", str(tmp_path / "run/last.pt"), "--device", "cpu"])
    expected = json.loads((tmp_path / "run/results.json").read_text())["last"]["recall@1"]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["recall@1"] == expected


def test_a_run_says_how_it_was_made(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "nir.py"), "--data_root", "my photos"])
    monkeypatch.chdir(ROOT)
    train(photos, tmp_path / "run", "--epochs", 1)
    made = json.loads((tmp_path / "run/args.json").read_text())
    assert made["command"] == "python nir.py --data_root 'my photos'" and made["torch"] == torch.__version__
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert made["commit"] == "unknown" if git.returncode else git.stdout.startswith(made["commit"].rstrip("+"))


def test_resuming_on_other_data_is_refused(trained, photos, tmp_path):
    for c in range(6):
        shutil.copytree(photos / f"class{c}", tmp_path / f"class{c}")
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["args"]["batch_size"] = 6
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not the last.pt of a run with this data set and loss .RuntimeError: size mismatch"):
        nir.main(["--resume", str(tmp_path / "last.pt"), "--data_root", str(tmp_path)])


def test_a_checkpoint_whose_network_is_another_is_refused(trained, tmp_path):
    saved = torch.load(trained / "last.pt", weights_only=True)
    saved["args"]["arch"] = "resnet50"
    with pytest.raises(UserError, match="does not hold the network its settings name"):
        common.build_network(type("Args", (), saved["args"]), saved)


def test_an_interrupt_before_there_is_a_run_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as caught:
        common.command(interrupted)
    assert caught.value.code == 130 and "nothing to resume" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- as a user

def test_evaluate_runs_alone_on_a_checkpoint(trained):
    done = run("--checkpoint", trained / "best.pt", "--pictures", "--retrieval", "elk", "--device", "cpu",
               script="evaluate.py")
    assert done.returncode == 0, done.stderr
    results = json.loads((trained / "results.json").read_text())["best"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert_same({key: metrics[key] for key in results}, results)
    assert "norm_auroc" in results and "map@1000" in done.stdout
    assert 0 < metrics["recall@1 elk"] <= metrics["recall@8 elk"] <= 1
    assert (trained / "rejection.csv").read_text().startswith("rejected,error\n0.0,")
    for name in ("retrieval.png", "norms.png"):
        assert Image.open(trained / name).size[0] > 100
        assert str(trained / name) in done.stdout
    done = run("--checkpoint", trained / "args.json", script="evaluate.py")
    assert done.returncode == 2 and done.stderr.startswith("error: --checkpoint")


def test_a_trained_network_embeds_pictures_of_any_mode_as_the_evaluation_does(trained, photos):
    network, prepare = common.load_network(str(trained / "best.pt"), device="cpu")
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    test = data.load("folder", photos)[1]
    embeddings = network(torch.stack([prepare(Image.open(path)) for path in test.images]))
    args = argparse.Namespace(**json.loads((trained / "args.json").read_text()))
    torch.testing.assert_close(embeddings, common.embed(network, test, args, torch.device("cpu")), rtol=0, atol=0)
    assert torch.equal(prepare(test.images[0]), prepare(Image.open(test.images[0])))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"):
        image = Image.open(test.images[0]).convert("L" if mode in ("I;16", "F") else "RGB").convert(mode)
        pixels = prepare(image)
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
        assert torch.equal(pixels, prepare(image.convert("RGB")))
        assert network(torch.stack([pixels])).shape == (1, 8)


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"text", "is not a checkpoint, or holds more"),
                                              ({"epoch": 1}, "is not a checkpoint of these scripts")])
def test_no_network_is_loaded_from_what_is_no_checkpoint(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "a.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt {message}") as caught:
        common.load_network(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


WAITING = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ["OMP_WAIT_POLICY"])
            os._exit(sys.stdout.flush() or 0)
sys.meta_path.insert(0, Watch())
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2])
"""


@pytest.mark.parametrize("script", ["nir", "prob_dml", "objectives", "evaluate"])
def test_idle_threads_sleep_in_every_script_unless_the_user_wants_otherwise(script):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for own, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run([sys.executable, "-c", WAITING, ROOT, script], capture_output=True, text=True,
                              env={**environment, **own})
        assert (done.stdout, done.stderr) == (expected + "\n", "")                  # so before torch was loaded


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        nir.main(["--help"])
    shown = capsys.readouterr().out
    assert "nir_weight" in shown
    options = shown.split("\nsettings of")[0].split("\n  --")[1:]
    assert all("Default:" in block for block in options if not block.startswith("resume")) and len(options) > 25


@pytest.mark.skipif(not REAL.is_dir(), reason="set DML_TEST_DATA to a folder with CUB_200_2011 and others")
def test_real_drawings_train_and_evaluate(tmp_path):
    done = run("--dataset", "folder", "--data_root", REAL / "omniglot", "--arch", "conv4", "--image_size", 16,
               "--epochs", 1, "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["last"]["recall@1"] > 0.2


# ---------------------------------------------------------------------------------------------------- several processes

SEVERAL = '''
import os, sys
sys.path.insert(0, {root!r})
import common, nir, prob_dml
import torch
torch.set_default_dtype(torch.float64)

class Network(common.Network):
    frozen = True                                    # BatchNorm as with ImageNet weights

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{{**kwargs, "freeze_norm": self.frozen}})

    def forward(self, images):
        return super().forward(images.double())

common.Network = Network
settings = {settings!r} + ["--epochs", "2", "--warmup", "1"]
nir.main(settings + ["--out", sys.argv[1] + "/nir", "--nir_form", "nll", "--nir_weight", "0.1"])
prob_dml.main(settings + ["--out", sys.argv[1] + "/elk", "--proxyanchor_weight", "1"])
Network.frozen = False
os.makedirs(sys.argv[1] + "/runs/folder-proxyanchor-baseline-seed0", exist_ok=True)
os.chdir(sys.argv[1])
nir.main(settings + ["--lr", "0.1", "--nir_weight", "0"])                     # its name is taken: rank 0 finds another
'''


def test_two_processes_train_what_one_does(photos, tmp_path):
    """Three steps with the backbone fixed, then three that train it."""
    script = tmp_path / "several.py"
    script.write_text(SEVERAL.format(root=str(ROOT), settings=SMALL + ["--data_root", str(photos)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one, two = [subprocess.Popen([*start, script, tmp_path / str(number)], env=environment, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                for number, start in ((1, [sys.executable]), (2, torchrun))]
    outputs = [process.communicate(timeout=250) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    assert outputs[1][0].count("epoch   1/2") == 3 and "arning" not in outputs[1][1]      # rank 0 alone prints
    for name in ("nir", "elk"):
        single, shared = [torch.load(tmp_path / number / name / "last.pt", weights_only=True) for number in "12"]
        for a, b in zip(single["optimizer"]["state"].values(), shared["optimizer"]["state"].values()):
            assert torch.allclose(a["exp_avg"], b["exp_avg"], rtol=1e-6, atol=1e-9)    # Adam itself hides gradients' scale
        for part in ("network", "criterion"):
            for key, value in single[part].items():
                assert torch.allclose(value.double(), shared[part][key].double(), rtol=0, atol=1e-6), (name, key)
        for a, b in zip(single["history"], shared["history"]):
            assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in b.items() if k != "seconds"}, abs=1e-6)
    # Where BatchNorm learns, each process normalises by its own share; but all evaluate with the averages that are saved.
    free = tmp_path / "2/runs/folder-proxyanchor-baseline-seed0-2"
    history = torch.load(free / "last.pt", weights_only=True)["history"]
    saved = json.loads((free / "results.json").read_text())["last"]
    assert len(list(free.parent.iterdir())) == 2
    assert history[-1]["test_recall@1"] == saved["recall@1"]


def test_what_ends_the_first_process_is_told_by_that_alone(monkeypatch):
    def cut():
        raise RuntimeError("Connection closed by peer\nand where in C++")
    monkeypatch.setattr(data, "processes", lambda: (1, 2))
    monkeypatch.setattr(data.dist, "barrier", cut)
    with pytest.raises(UserError, match="waiting for the first process failed .Connection closed by peer.; its own message says why"):
        data.load_splits(None)


@pytest.mark.filterwarnings("ignore:.*training class.es. have one image")
def test_classes_of_one_image_are_refused_before_the_training(tmp_path, monkeypatch):
    for c in range(8):
        for i in range(2 if c < 2 else 1):                             # 2 classes train, with 0.5 two validate, 4 test
            (tmp_path / f"data/{c}").mkdir(parents=True, exist_ok=True)
            torchvision.utils.save_image(torch.rand(3, 20, 20), tmp_path / f"data/{c}/{i}.png")
    monkeypatch.setattr(common, "make_run_folder", lambda *_: pytest.fail("the run has begun"))
    with pytest.raises(UserError, match="no test or validation class of .*data has two images"):
        train(tmp_path / "data", tmp_path / "run")
    shutil.copy(tmp_path / "data/7/0.png", tmp_path / "data/7/1.png")                              # one will do
    with pytest.raises(UserError, match="no test or validation class of .*data has two images"):
        train(tmp_path / "data", tmp_path / "run", "--val_fraction", 0.5)
    assert data.load_splits(argparse.Namespace(dataset="folder", data_root=tmp_path / "data", corrupt=False, val_fraction=0.0))


def test_a_batch_that_the_processes_cannot_share_is_an_error(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: (0, 3))
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    with pytest.raises(UserError, match="--batch_size 8 cannot be shared by 3 processes: try 6"):
        train(photos, tmp_path / "run")
