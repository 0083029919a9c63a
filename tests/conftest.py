"""What several test files need: photographs, settings, trained runs.

Beside the tests, this folder has four scripts:

    experiments.py    lists the experiments behind RESULTS.md, and runs them
    benchmark.py      speed and memory, beside the plainest code that does the same
    pretrained.py     an example: trains a pretrained EfficientNet-Lite0 without a GPU
    pictures.py       draws the pictures of README.md and RESULTS.md

All tests run on one thread: on these sizes, more threads only wait for each other.
"""
import argparse
import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torchvision

import common
import data
import nir

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]

# A folder with real data sets, and the marker of the tests that need it.
REAL = Path(os.environ.get("DML_TEST_DATA", "not given"))
needs_real = pytest.mark.skipif(
    not REAL.is_dir(),
    reason="set DML_TEST_DATA to a folder with CUB_200_2011 and others",
)

# The options of a small run on photographs. The folder comes with --data_root.
SMALL = (
    "--dataset folder --arch conv4 --image_size 16 --embed_dim 8 "
    "--batch_size 8 --workers 0 --device cpu"
).split()

parametrize = pytest.mark.parametrize
not_finite = parametrize("bad", [math.nan, math.inf, -math.inf])

ONES, ZEROS, FIRST = torch.ones(4, 5), torch.zeros(4).long(), torch.tensor([1, 0, 0, 0])
WRONG = [
    (ONES, ZEROS[:, None], ValueError, r"embeddings must be .* not \(4, 5\) and \(4, 1\)"),
    (ONES, ZEROS[:3], ValueError, r"embeddings must be .* and \(3,\)"),
    (ONES[..., None], ZEROS, ValueError, "embeddings must be"),
    (ONES, ZEROS.float(), ValueError, "labels must be integers, not torch.float32"),
    (ONES, ZEROS.double(), ValueError, "labels must be integers, not torch.float64"),
    (ONES.numpy(), ZEROS.numpy(), TypeError, "must be tensors"),
    (ONES.numpy(), ZEROS, TypeError, "must be tensors"),
    (ONES, ZEROS.tolist(), TypeError, "must be tensors"),
]
WRONG_FOR_PROXIES = [
    (torch.ones(4, 6), ZEROS, ValueError, r"must be \(B, 5\) and labels \(B,\), not \(4, 6\) and"),
    (ONES, 4 * FIRST, ValueError, "labels must lie in 0 .. 3, not 0 .. 4"),
    (ONES, -FIRST, ValueError, "not -1 .. 0"),
    # cross_entropy would leave it out.
    (ONES, -100 * FIRST, ValueError, "not -100 .. 0"),
]
# Batches that no loss takes, and none with proxies of four classes in five dimensions.
wrong_batches = parametrize("x, y, error, message", WRONG)
wrong_for_proxies = parametrize("x, y, error, message", WRONG + WRONG_FOR_PROXIES)


@contextlib.contextmanager
def refused(message, error=data.UserError):
    """An error of one line is raised, in which the message is found."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def error_of(run, capsys):
    """What a script prints, which has to end with exit code 2."""
    with pytest.raises(SystemExit, match="^2$"):
        common.command(run)
    return capsys.readouterr().err


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def read_json(path):
    return json.loads(path.read_text())


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def make_photos(root, sizes=(5,) * 8, noise=0.1):
    """Write noisy pictures of their class's colour; returns root. Much noise makes them hard.

    `sizes` has each class's number of images: root/class0/0.png and so on, of 20 x 20 pixels.
    """
    rng = torch.Generator().manual_seed(0)
    for c, size in enumerate(sizes):
        folder = root / f"class{c}"
        folder.mkdir(parents=True)
        colour = torch.rand(3, 1, 1, generator=rng)
        for i in range(size):
            image = colour + noise * torch.randn(3, 20, 20, generator=rng)
            torchvision.utils.save_image(image.clamp(0, 1), folder / f"{i}.png")
    return root


def small_settings(**changes):
    """All settings of a small run of nir.py, as `common.train` gets them, with some changed."""
    args = common.parse(nir.make_parser(), nir.preset, SMALL)
    return argparse.Namespace(**{**vars(args), **changes})


def started(monkeypatch, script, *argv):
    """What a command line hands to `common.train`: settings, make_criterion, name of the run."""
    caught = []
    monkeypatch.setattr(common, "train", lambda *given: caught.extend(given))
    script.main(list(argv))
    return caught


def train(photos, out, *argv, main=nir.main):
    """Train a small run in this process; returns its last.pt."""
    main([*SMALL, "--data_root", str(photos), "--out", str(out), *map(str, argv)])
    return read_checkpoint(out / "last.pt")


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
        both_nan = a != a and b != b
        assert a == b or both_nan


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of eight classes of five photographs: four train, four test."""
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """The folder of a run of one epoch on `photos`. Copy it before changing files in it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(photos, out, "--epochs", 1)
    return out


@pytest.fixture(scope="session")
def toy():
    """The training and the test Split of toy, which takes seconds to draw."""
    return data.load_toy()


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory):
    """The folder of a run of ProxyAnchor on toy: five epochs, at half the resolution."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    argv = "--dataset toy --device cpu --image_size 16 --epochs 5 --nir_weight 0"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "load_toy", lambda: toy)
        nir.main([*argv.split(), "--out", str(out)])
    return out
