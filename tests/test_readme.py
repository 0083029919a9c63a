"""The README's commands are accepted, its names exist, its pictures are small, and no public function is left out."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

import common
import nir
import objectives
import prob_dml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = README.split("## Reading guide")[1].split("\n## ")[0]
NAMED = set(re.findall(r"`(\w+\.\w+)`", GUIDE))


def test_every_name_in_the_reading_guide_exists():
    assert len(NAMED) > 30
    for name in NAMED:
        module, attribute = name.split(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("script", ["nir", "prob_dml", "objectives"])
def test_every_public_function_and_class_is_in_the_reading_guide(script):
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert f"{script}.{node.name}" in NAMED


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every command line that starts one of the scripts, up to the training itself; the shell's loops as well."""
    lines = re.findall(r"^    (?:.*&& |for .*; do )?(?:python|torchrun \S+) (nir|prob_dml|objectives)\.py(.*?)(?:; done)?$",
                       README.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 10
    runs = []
    monkeypatch.setattr(common, "train", lambda args, *_: runs.append(args))
    for script, options in lines:
        {"nir": nir, "prob_dml": prob_dml, "objectives": objectives}[script].main(shlex.split(options.replace("$seed", "0"), comments=True))
    assert len(runs) == len(lines)


def test_the_readmes_own_backbone_can_be_trained(monkeypatch):
    """The Python of the README, up to the training itself; the network that the training would build takes images."""
    runs = []
    monkeypatch.setattr(common, "train", lambda args, *_: runs.append(args))
    monkeypatch.setattr(common, "BACKBONES", dict(common.BACKBONES))
    block = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "BACKBONES" in block)
    exec(block, {"__name__": "__main__"})
    args, = runs
    network = common.Network(args.arch, args.embed_dim, args.image_size)
    assert network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 128)


def test_the_readmes_lines_embed_a_list_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/NAME").mkdir(parents=True)
    args = dict(arch="conv4", embed_dim=5, image_size=16, pooling="average", weights="none", augment="light")
    torch.save({"args": args, "network": common.Network("conv4", 5, 16).state_dict(), "epoch": 1}, "runs/NAME/best.pt")
    Path("my_photos/a").mkdir(parents=True)
    for i in range(3):
        torchvision.utils.save_image(torch.rand(3, 20, 30), f"my_photos/a/{i}.jpg")
    names = {}
    exec(next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_network" in block), names)
    assert names["embeddings"].shape == (3, 5) and len(names["embeddings"].unique(dim=0)) == 3


def test_every_file_that_the_readme_links_is_there():
    linked = re.findall(r"\]\(([\w./]+)\)", README)
    assert linked and all((ROOT / name).exists() for name in linked)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all(0 < (ROOT / picture).stat().st_size < 300_000 for picture in pictures)
