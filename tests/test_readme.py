"""The README's commands are accepted, its names exist, its pictures are small, and no public function is left out."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import common
import nir
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


@pytest.mark.parametrize("script", ["nir", "prob_dml"])
def test_every_public_function_and_class_is_in_the_reading_guide(script):
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert f"{script}.{node.name}" in NAMED


def test_every_test_that_the_readme_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`(test_\w+)(?:\.\.\.)?`", README)
    assert len(names) > 5 and all(f"def {name}" in tests for name in names)


def test_the_readmes_commands_are_accepted(monkeypatch):
    """Every command line that starts one of the two scripts, up to the training itself."""
    lines = re.findall(r"^    (?:.*&& )?(?:python|torchrun \S+) (nir|prob_dml)\.py(.*)",
                       README.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 10
    runs = []
    monkeypatch.setattr(common, "train", lambda args, *_: runs.append(args))
    for script, options in lines:
        {"nir": nir, "prob_dml": prob_dml}[script].main(shlex.split(options, comments=True))
    assert len(runs) == len(lines)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures and all(0 < (ROOT / picture).stat().st_size < 300_000 for picture in pictures)
