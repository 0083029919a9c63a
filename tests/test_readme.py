"""README.md: its commands are accepted, its Python runs, its names, links and pictures exist."""
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT

import common
import nir
import objectives
import prob_dml

README = (ROOT / "README.md").read_text()


def python_with(word):
    """The README's block of Python in which a word stands."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if word in block)


@pytest.fixture
def runs(monkeypatch):
    """The settings of the runs that are begun; none of them trains."""
    begun = []
    monkeypatch.setattr(common, "train", lambda args, *_: begun.append(args))
    return begun


def test_every_name_in_the_reading_guide_exists():
    guide = README.split("## Reading guide")[1].split("\n## ")[0]
    names = set(re.findall(r"`(\w+\.\w+)`", guide))
    assert len(names) > 10
    for name in names:
        module, attribute = name.split(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_readmes_commands_are_accepted(runs):
    """Every command that starts a training, up to the training itself; in shell loops as well."""
    scripts = {"nir": nir, "prob_dml": prob_dml, "objectives": objectives}
    lines = README.replace("\\\n", " ")
    before = r"^    (?:.*&& |for .*; do )?(?:python|torchrun \S+) "
    commands = re.findall(before + r"(\w+)\.py(.*?)(?:; done)?$", lines, re.MULTILINE)
    trainings = [(name, options) for name, options in commands if name in scripts]
    assert len(trainings) > 10
    for name, options in trainings:
        argv = shlex.split(options.replace("$seed", "0"), comments=True)
        scripts[name].main(argv)
    assert len(runs) == len(trainings)


def test_the_readmes_own_backbone_can_be_trained(runs, monkeypatch):
    monkeypatch.setattr(common, "BACKBONES", dict(common.BACKBONES))
    exec(python_with("BACKBONES"), {"__name__": "__main__"})
    args, = runs
    network = common.Network(args.arch, args.embed_dim, args.image_size)
    assert network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 128)


def test_the_readmes_lines_embed_a_list_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/NAME").mkdir(parents=True)
    args = dict(arch="conv4", embed_dim=5, image_size=16, pooling="average", weights="none",
                augment="light")
    weights = common.Network("conv4", 5, 16).state_dict()
    torch.save({"args": args, "network": weights, "epoch": 1}, "runs/NAME/best.pt")
    Path("my_photos/a").mkdir(parents=True)
    for i in range(3):
        torchvision.utils.save_image(torch.rand(3, 20, 30), f"my_photos/a/{i}.jpg")
    names = {}
    exec(python_with("load_network"), names)
    assert names["embeddings"].shape == (3, 5)
    assert len(names["embeddings"].unique(dim=0)) == 3


def test_every_file_that_the_readme_links_is_there():
    linked = re.findall(r"\]\(([\w./]+)\)", README)
    assert linked
    for name in linked:
        assert (ROOT / name).exists(), name


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert 0 < (ROOT / picture).stat().st_size < 300_000, picture
