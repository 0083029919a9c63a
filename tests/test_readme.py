"""README.md: its commands are accepted, its Python runs, its names, links and pictures exist."""
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT
from torch.testing import assert_close

import common
import data
import nir
import objectives
import prob_dml

README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def python_with(word):
    """The README's block of Python in which a word stands."""
    return next(block for language, block in BLOCKS if language == "python" and word in block)


def run_python(word, **names):
    """Run that block, and return its variables."""
    exec(python_with(word), names)
    return names


@pytest.fixture
def runs(monkeypatch):
    """The settings of the runs that are begun; none of them trains."""
    begun = []
    monkeypatch.setattr(common, "train", lambda args, *_: begun.append(args))
    return begun


def test_every_function_that_is_named_exists():
    guide = README.split("## The paper in the code")[1].split("\n## ")[0]
    names = set(re.findall(r"`(\w+(?:\.\w+)+)`", guide))
    assert len(names) > 20
    for name in names:
        module, *attributes = name.split(".")
        found = importlib.import_module(module)
        for attribute in attributes:
            found = getattr(found, attribute)


def test_the_readmes_commands_are_accepted(runs):
    """Every command that starts a training, up to the training itself; in shell loops as well."""
    scripts = {"nir": nir, "prob_dml": prob_dml, "objectives": objectives}
    code = "\n".join(block for _, block in BLOCKS).splitlines()
    code += re.findall(r"`([^`\n]+)`", README)
    trainings = []
    for line in code:
        command = re.search(r"(?:python|torchrun \S+) (\w+)\.py (--dataset.*?)(?:; done)?$", line)
        if command and command[1] in scripts and "--help" not in line:
            trainings.append(command.groups())
    assert len(trainings) > 10
    for name, options in trainings:
        argv = shlex.split(options.replace("$seed", "0"), comments=True)
        scripts[name].main(argv)
    assert len(runs) == len(trainings)


def test_the_readmes_own_backbone_loss_and_data_set_can_be_trained(runs, monkeypatch):
    monkeypatch.setattr(common, "BACKBONES", dict(common.BACKBONES))
    monkeypatch.setattr(nir, "LOSSES", dict(nir.LOSSES))
    monkeypatch.setattr(data, "LOADERS", dict(data.LOADERS))
    monkeypatch.setattr("sys.argv", ["mine.py", "--seed", "3"])
    run_python("BACKBONES", __name__="__main__")
    args, = runs
    assert args.dataset in data.LOADERS
    assert args.seed == 3
    network = common.Network(args.arch, args.embed_dim, args.image_size)
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    embeddings = network.eval()(images)
    loss = nir.LOSSES[args.loss](5, args.embed_dim)
    loss(embeddings, torch.arange(4)).backward()
    assert embeddings.shape == (4, 128)
    assert loss.proxies.grad.any()


def test_the_readmes_vmf():
    names = run_python("sample_vmf")
    assert names["log_C"].shape == (2,)
    assert_close(names["samples"].norm(dim=2), torch.ones(10, 2))
    assert names["samples"].requires_grad


def test_the_readmes_proxy_loss():
    names = run_python("ProxyAnchor")
    assert names["embeddings"].grad.any()
    assert names["loss"].proxies.grad.any()


def test_the_readmes_flow():
    names = run_python("GlowFlow")
    assert_close(names["again"], names["psi"], rtol=0, atol=1e-4)
    assert names["log_p"].shape == names["log_det"].shape == (90,)


def test_the_readmes_lines_embed_a_list_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    args = dict(arch="conv4", embed_dim=5, image_size=16, pooling="average", weights="none",
                augment="light")
    weights = common.Network("conv4", 5, 16).state_dict()
    torch.save({"args": args, "network": weights, "epoch": 1}, "runs/mine/best.pt")
    Path("my_photos/a").mkdir(parents=True)
    for i in range(3):
        torchvision.utils.save_image(torch.rand(3, 20, 30), f"my_photos/a/{i}.jpg")
    names = run_python("load_network")
    assert names["embeddings"].shape == (3, 5)
    assert len(names["embeddings"].unique(dim=0)) == 3


def test_every_file_that_the_readme_links_is_there():
    linked = re.findall(r"\]\(([\w./]*)#?([\w-]*)\)", README)
    assert linked
    for name, heading in linked:
        text = README
        if name:
            assert (ROOT / name).exists(), name
        if heading:
            text = (ROOT / name).read_text() if name else README
            headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            slugs = [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings]
            assert heading in slugs, heading


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert 0 < (ROOT / picture).stat().st_size < 300_000, picture
