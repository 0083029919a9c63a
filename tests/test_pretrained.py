"""The pretrained example: its network is the published one, and its kept features are what the network would compute."""
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pretrained
import pytest
import torch
import torchvision

import common
import data
import evaluate
from data import UserError

REAL = Path(os.environ.get("DML_TEST_DATA", "not given"))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """One epoch on eight classes of four pictures of noise, with random weights in place of ImageNet's."""
    torch.manual_seed(0)
    network = pretrained.EfficientNetLite0()
    torch.save({**network.state_dict(), "_fc.weight": torch.zeros(5, 1280)}, tmp_path / "weights.pth")
    for c in range(8):
        (tmp_path / f"photos/{c}").mkdir(parents=True)
        for i in range(4):
            torchvision.utils.save_image(torch.rand(3, 40, 40), tmp_path / f"photos/{c}/{i}.png")
    monkeypatch.chdir(tmp_path)
    for module, name in ((data, "load_splits"), (data, "Images")):                    # put back afterwards
        monkeypatch.setattr(module, name, getattr(module, name))
    argv = ["pretrained.py", "nir.py", "--views", "3", "--dataset", "folder", "--data_root", "photos", "--weights", "weights.pth",
            "--image_size", "64", "--embed_dim", "8", "--epochs", "2", "--workers", "0", "--device", "cpu", "--out", "run"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(common, "LAUNCHER", "python")
    real = data.Images
    pretrained.main()
    return network.eval(), real


def test_features_are_what_the_frozen_stages_make_of_views_and_central_crops(trained):
    network, images = trained
    file, = Path("runs/features").iterdir()
    rows = np.load(file)
    assert rows.shape == (32 + 16 * 3, 112, 4, 4) and rows.dtype == np.float16 and file.name.endswith("-64-photo-3.npy")
    train, test = data.load("folder", "photos")
    plain, augmented = data.test_transform(64, "photo"), data.train_transform(64, "photo")
    expected = {0: images(train, plain)[0], 16 + 5: images(test, plain)[5]}
    expected |= {32 + 3 * 7 + view: images(train, augmented)[7, 1_000_003 * 7 + view] for view in range(3)}
    for row, (image, _) in expected.items():
        with torch.no_grad():
            made = network.frozen((image[None] / 255 - 0.5) / 0.5)[0]
        torch.testing.assert_close(torch.from_numpy(rows[row]).float(), made, rtol=2e-3, atol=2e-3)
    found = data.Images(train, augmented)[7, 3 * 12345 + 1][0]                           # a seed's view is its remainder
    assert torch.equal(found, torch.from_numpy(rows[32 + 3 * 7 + 1]).float())


def test_training_moves_the_last_stages_alone_and_pictures_give_what_the_features_gave(trained, monkeypatch):
    network, images = trained
    saved = torch.load("run/last.pt", weights_only=True)["network"]
    cut = tuple(f"_blocks.{i}." for i in range(11)) + ("_conv_stem", "_bn0")
    for name, value in network.named_parameters():
        assert torch.equal(saved[f"backbone.{name}"], value) == name.startswith(cut), name
    monkeypatch.setattr(data, "Images", images)
    evaluate.main(["--checkpoint", "run/last.pt", "--device", "cpu"])
    results = json.loads(Path("run/results.json").read_text())["last"]
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["recall@8"] == pytest.approx(results["recall@8"], abs=0.1)
    assert metrics["density"] == pytest.approx(results["density"], rel=0.02)


def test_a_run_tells_how_to_repeat_and_how_to_show_it(trained):
    command = json.loads(Path("run/args.json").read_text())["command"]
    assert command.startswith("python pretrained.py nir.py --views 3 --dataset folder") and command.endswith("--out run")
    assert common.LAUNCHER == "python pretrained.py"             # of `python pretrained.py evaluate.py --checkpoint ...`


def test_weights_and_clean_images_are_asked_for(tmp_path, monkeypatch):
    for module, name in ((data, "load_splits"), (data, "Images")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for more in (["--dataset", "toy", "--weights", "x.pth"], ["--dataset", "folder", "--weights", "x.pth", "--corrupt"],
                 ["--arch", "conv4"], ["--dataset", "folder"]):
        monkeypatch.setattr("sys.argv", ["pretrained.py", "nir.py", "--device", "cpu", *more])
        monkeypatch.setattr(common, "LAUNCHER", "python")
        with pytest.raises(UserError, match="give these, and leave --dataset toy and --corrupt out"):
            pretrained.main()


@pytest.mark.skipif(not REAL.is_dir(), reason="set DML_TEST_DATA to a folder with cub_half and others")
def test_untrained_recall_on_half_of_cub_is_the_published_networks():
    """76.6 % on the 1280 pooled features: architecture, weights and preprocessing are right."""
    args = common.argparse.Namespace(arch="efficientnet_lite0", embed_dim=8, image_size=128, pooling="average", augment="photo",
                                     weights=str(REAL / "efficientnet_lite0.pth"), workers=0)
    network = common.build_network(args).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                                  # it is half of CUB
        _, test = data.load("cub200", REAL / "cub_half")
    network.embedding = torch.nn.Linear(1280, 1280, bias=False)
    torch.nn.init.eye_(network.embedding.weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    with torch.no_grad():
        features = common.embed(network, test, args, torch.device("cpu"))
    torch.set_num_threads(threads)
    assert evaluate.recall_at_k(features, test.labels, (1,))[1] == pytest.approx(0.766, abs=0.01)
