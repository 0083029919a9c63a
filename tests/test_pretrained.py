"""The pretrained example: its network is the published one, its features what that computes."""
import argparse
import importlib
import os
import types
from pathlib import Path

import experiments
import numpy as np
import pretrained
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import REAL, needs_real, read_checkpoint, read_json, refused
from torch.testing import assert_close

import common
import data
import evaluate
import nir


def start(patch, *words):
    """Run pretrained.main. `patch`, a MonkeyPatch, puts back what it replaces."""
    for module, name in ((common, "LAUNCHER"), (data, "load_splits"), (data, "Images")):
        patch.setattr(module, name, getattr(module, name))
    patch.setitem(nir.LOSSES, "proxyanchor-positions", None)  # which main puts there
    patch.setattr("sys.argv", ["pretrained.py", *words])
    pretrained.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on eight classes of four pictures of noise, with random weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    network = pretrained.EfficientNetLite0()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 2.5)  # else random layers make all images equal
    state = {**network.state_dict(), "_fc.weight": torch.zeros(5, 1280)}
    torch.save(state, folder / "weights.pth")
    for c in range(8):
        (folder / f"photos/{c}").mkdir(parents=True)
        for i in range(4):
            torchvision.utils.save_image(torch.rand(3, 40, 40), folder / f"photos/{c}/{i}.png")

    opened = [[]]  # the pictures that are opened before the first epoch, in each epoch
    read_image, train_one_epoch = data.read_image, common.train_one_epoch

    def noted(source, transform=None):
        opened[-1].append(source)
        return read_image(source, transform)

    def one_epoch(*args):
        opened.append([])
        return train_one_epoch(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RUNS", raising=False)
        patch.setattr(data, "read_image", noted)
        patch.setattr(common, "train_one_epoch", one_epoch)
        patch.setattr(pretrained, "reading_code", lambda: "of this test")
        start(patch, *(
            "nir.py --views 3 --dataset folder --data_root photos --weights weights.pth "
            "--image_size 64 --embed_dim 8 --epochs 2 --workers 0 --device cpu --out run"
        ).split())
        features, launcher = data.Images, common.LAUNCHER
    return types.SimpleNamespace(folder=folder, network=network.eval(), opened=opened,
                                 features=features, launcher=launcher)


@pytest.fixture
def splits(trained, monkeypatch):
    """Training and test Split of the pictures, in whose folder the test works."""
    monkeypatch.chdir(trained.folder)
    return data.load("folder", os.path.abspath("photos"))


def test_features_are_what_the_frozen_stages_make_of_views_and_central_crops(trained, splits):
    file, = Path("runs/features").iterdir()
    rows = np.load(file)
    assert file.name.endswith("-64-photo-3.npy")
    assert rows.shape == (32 + 16 * 3, 112, 4, 4)
    assert rows.dtype == np.float16

    train, test = splits
    plain = data.test_transform(64, "photo")
    augmented = data.train_transform(64, "photo")
    expected = {0: data.Images(train, plain)[0], 16 + 5: data.Images(test, plain)[5]}
    for view in range(3):
        expected[32 + 3 * 7 + view] = data.Images(train, augmented)[7, 1_000_003 * 7 + view]
    for row, (image, _) in expected.items():
        with torch.no_grad():
            made = trained.network.frozen((image[None] / 255 - 0.5) / 0.5)[0]
        found = torch.from_numpy(rows[row]).float()
        assert_close(found, made, rtol=2e-3, atol=2e-3)

    # An item's view is the remainder of its seed.
    found, _ = trained.features(train, augmented)[7, 3 * 12345 + 1]
    assert torch.equal(found, torch.from_numpy(rows[32 + 3 * 7 + 1]).float())


def test_every_photograph_is_opened_before_the_first_epoch_and_none_later(trained):
    before, first_epoch, second_epoch = trained.opened
    assert len(set(before)) == 32
    assert not first_epoch and not second_epoch


def test_other_reading_code_makes_other_features(trained, splits, monkeypatch, tmp_path):
    args = argparse.Namespace(**read_json(Path("run/args.json")))
    monkeypatch.setenv("RUNS", str(tmp_path))
    for version in ("of this test", "of this test", "another"):
        monkeypatch.setattr(pretrained, "reading_code", lambda version=version: version)
        pretrained.make_features(args, *splits, views=1)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_the_version_is_the_code_that_reads_and_crops_images():
    for part in ("def read_image", "RandomResizedCrop(size)", "CenterCrop", "class Block"):
        assert part in pretrained.reading_code()


def test_training_moves_the_last_stages_alone(trained):
    saved = read_checkpoint(trained.folder / "run/last.pt")["network"]
    frozen = ("_conv_stem", "_bn0", *(f"_blocks.{i}." for i in range(11)))
    for name, value in trained.network.named_parameters():
        assert torch.equal(saved[f"backbone.{name}"], value) == name.startswith(frozen), name


def test_pictures_give_what_the_features_gave(trained, splits):
    evaluate.main(["--checkpoint", "run/last.pt", "--device", "cpu"])
    results = read_json(Path("run/results.json"))["last"]
    metrics = read_json(Path("run/metrics.json"))
    assert metrics["recall@8"] == pytest.approx(results["recall@8"], abs=0.1)
    assert metrics["density"] == pytest.approx(results["density"], rel=0.02)


def test_a_run_tells_how_to_repeat_it(trained):
    args = read_json(trained.folder / "run/args.json")
    assert args["command"].startswith("python pretrained.py nir.py --views 3 --dataset folder")
    assert trained.launcher == "python pretrained.py"


@pytest.mark.parametrize("words", [
    "--dataset toy --weights x.pth", "--arch conv4", "--dataset folder",
])
def test_weights_and_photographs_are_asked_for(monkeypatch, words):
    with refused("give these, and leave --dataset toy out"):
        start(monkeypatch, "nir.py", "--device", "cpu", *words.split())


def test_the_official_proxyanchor_averages_its_positive_term_over_the_batch():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])  # and none of class 2
    embeddings = torch.randn(6, 5)
    loss = pretrained.ProxyAnchorByPosition(3, 5)
    s = F.normalize(embeddings) @ F.normalize(loss.proxies).T
    positive, negative = 0.0, 0.0
    for i in range(6):
        own = [(-32 * (s[j, labels[i]] - 0.1)).exp() for j in range(6) if labels[j] == labels[i]]
        positive += torch.log1p(sum(own)) / 6
    for c in range(3):
        others = [(32 * (s[j, c] + 0.1)).exp() for j in range(6) if labels[j] != c]
        negative += torch.log1p(sum(others)) / 3
    assert_close(loss(embeddings, labels), positive + negative)


def test_the_commands_of_all_experiments_are_accepted(monkeypatch):
    started = []
    monkeypatch.setattr(common, "train", lambda args, *_: started.append(args))
    for stage in experiments.STAGES:
        for folder, command in experiments.runs_of(stage):
            script, *words = command.split()
            if script == "tests/pretrained.py":
                start(monkeypatch, *words)
            else:
                importlib.import_module(script.removesuffix(".py")).main(words)
            assert started[-1].out == str(folder)
    assert len({args.out for args in started}) == len(started) > 0


@needs_real
@pytest.mark.filterwarnings("ignore:.*published split")
def test_untrained_recall_on_half_of_cub_is_the_published_networks(monkeypatch):
    """76.6 % on the 1280 pooled features: architecture, weights and preprocessing are right."""
    args = argparse.Namespace(arch=pretrained.ARCH, embed_dim=1280, image_size=128,
                              pooling="average", augment="photo", workers=0,
                              weights=str(REAL / "efficientnet_lite0.pth"))
    network = common.build_network(args).eval()
    torch.nn.init.eye_(network.embedding.weight)
    torch.nn.init.zeros_(network.embedding.bias)
    _, test = data.load("cub200", REAL / "cub_half")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    features = common.embed(network, test, args, torch.device("cpu"))
    torch.set_num_threads(threads)
    recall = evaluate.recall_at_k(features, test.labels, (1,))[1]
    assert recall == pytest.approx(0.766, abs=0.01)
