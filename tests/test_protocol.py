"""The protocol of a run, what a data set is made of, and the defaults: what goes wrong without a word if it is wrong."""
import argparse
import hashlib
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import evaluate
import nir
import prob_dml
from data import UserError
from test_common import SMALL, _nir_parser, assert_same, photos, train                                    # noqa: F401
from test_data import make_cub, make_old_cars, picture, tgz


# ------------------------------------------------------------------------------------------------------- the protocol

def test_best_is_the_epoch_of_the_highest_recall_and_has_its_column(photos, tmp_path, monkeypatch):
    real, values = evaluate.recall_at_k, iter([0.5, 0.9, 0.2])
    monkeypatch.setattr(evaluate, "recall_at_k", lambda e, y, ks: {1: next(values)} if ks == (1,) else real(e, y, ks))
    last = train(photos, tmp_path, "--epochs", 3)
    best, table = torch.load(tmp_path / "best.pt", weights_only=True), json.loads((tmp_path / "results.json").read_text())
    assert (best["epoch"], last["epoch"], table["best"]["epoch"], table["last"]["epoch"]) == (2, 3, 2, 3)


def test_validation_classes_choose_the_epoch_and_test_classes_make_the_table(photos, tmp_path, monkeypatch):
    seen, names, embed = [], [], common.embed
    monkeypatch.setattr(common, "embed", lambda network, split, *more: seen.append(split.class_names) or embed(network, split, *more))
    monkeypatch.setattr(evaluate, "usual_ks", lambda name: names.append(name) or (1,))
    train(photos, tmp_path, "--epochs", 1, "--val_fraction", 0.5, "--batch_size", 4)
    test = [f"class{c}" for c in (4, 5, 6, 7)]
    assert seen == [["class2", "class3"], test, test] and names == ["folder"] * 2


def test_every_epoch_and_seed_draws_and_augments_anew(photos, tmp_path, monkeypatch):
    items, drawn, real, terms = [], [], data.Images.__getitem__, nir.NIR.terms

    def spy(self, item):
        if isinstance(item, tuple):
            assert "RandomResizedCrop(size=(16, 16), scale=(0.08, 1.0)" in str(self.transform)
            items.append(item[1])
        return real(self, item)
    monkeypatch.setattr(data.Images, "__getitem__", spy)
    monkeypatch.setattr(nir.NIR, "terms", lambda *args: drawn.append(torch.rand(()).item()) or terms(*args))
    saved = [train(photos, tmp_path / str(seed), "--epochs", 2, "--warmup", 2, "--augment", "photo", "--seed", seed)["network"]
             for seed in (0, 1)]
    assert len(items) == 4 * 24 == len(set(items)) and len(drawn) == 4 * 3 == len(set(drawn))
    assert not torch.equal(*(network["backbone.0.0.weight"] for network in saved))           # their first values differ


def test_corrupted_runs_see_corrupted_images(photos, tmp_path):
    train(photos, tmp_path, "--epochs", 1, "--corrupt")
    assert "norm_clarity" in json.loads((tmp_path / "results.json").read_text())["last"]
    args = argparse.Namespace(dataset="folder", data_root=photos, corrupt=True, val_fraction=0.0)
    first, _, test = common.load_splits(args)
    assert torch.equal(first.ambiguity, first.corruption) and not torch.equal(first.corruption, test.corruption)


def test_an_image_has_its_own_noise_the_same_in_every_epoch():
    split = data.Split([np.full((32, 32), 128, np.uint8)] * 2, torch.tensor([0, 0]), ["a"], corruption=torch.tensor([0.5, 0.5]))
    images = data.Images(split, data.test_transform(32, "light"))
    assert (images[0][0] != 128).float().mean() > 0.5 and not torch.equal(images[0][0], images[1][0])
    assert torch.equal(images[0][0], images[0, 99][0])


def test_weight_decay_is_what_was_asked_for(photos, tmp_path):
    saved = train(photos, tmp_path, "--epochs", 1, "--weight_decay", 0.01)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.01, 0.01, 0, 0]
    assert saved["args"]["precision"] == "float32"                                  # not "auto": as it was, on this CPU


def test_a_stopped_run_with_a_warm_start_goes_on_without_another(photos, tmp_path, monkeypatch):
    calls, setup, save = [], prob_dml.setup, common.save_file
    monkeypatch.setattr(prob_dml, "setup", lambda *args: calls.append(1) or setup(*args))
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
    with pytest.raises(UserError, match="does not fit .* resume from the last.pt"):
        prob_dml.main(["--resume", str(tmp_path / "cut/best.pt")])


def test_the_log_has_the_mean_of_each_term_and_no_share_where_there_is_no_gradient(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(nir.NIR, "terms", lambda self, embeddings, labels: {"proxy": 2 + 0 * embeddings.sum()})
    row, = train(photos, tmp_path, "--epochs", 1)["history"]
    assert row["proxy"] == 2 and row["grad_share_proxy"] == 0


# ---------------------------------------------------------------------------------------------------------- the data

def test_hidden_class_folders_are_left_out_and_a_folder_named_as_a_picture_is_none(tmp_path):
    for name in (".thumbnails/0.png", "a/0.png", "a/1.png", "b/0.png"):
        picture(tmp_path / name)
    (tmp_path / "a/album.png").mkdir()
    train, test = data.load("folder", tmp_path)
    assert (train.class_names, test.class_names, len(train.images)) == (["a"], ["b"], 2)


def test_the_ambiguity_of_both_toy_halves_takes_ink_away():
    for split in data.load("toy", None):
        ink = (255.0 - np.stack(split.images)).max((1, 2))
        assert ink[split.ambiguity.numpy() > 0.8].mean() < 0.7 * ink[split.ambiguity.numpy() < 0.2].mean()


def test_test_images_have_the_papers_ratio_at_any_size_and_light_ones_are_whole():
    assert data.test_transform(448, "photo").transforms[0].size == 512 and data.test_transform(112, "photo").transforms[0].size == 128
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert torch.equal(data.test_transform(32, "light")(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert "Flip" not in str(data.train_transform(32, "light"))                                # drawings survive no mirror


def test_two_classes_at_least_are_held_out():
    rest, held = data.hold_out(data.load("toy", None)[0], 0.001)
    assert (len(rest.class_names), len(held.class_names)) == (98, 2)          # one alone: Recall@1 is always 100 %


def test_classes_are_drawn_in_proportion_to_what_they_have_left():
    batches = data.ClassBatches(torch.tensor([0] * 40 + [c for c in range(1, 41) for _ in range(2)]), 4)
    first = 0
    for batches.epoch in range(200):
        first += any(i < 40 for i, _ in next(iter(batches)))
    assert first / 200 == pytest.approx(1 / 3 + 2 / 3 * 20 / 59, abs=0.15)               # two draws of 60 groups, 20 of them its


def test_folders_and_archives_in_the_other_documented_places(tmp_path):
    make_cub(tmp_path)
    with pytest.warns(UserWarning, match="subset"):
        assert len(data.load("cub200", tmp_path / "CUB_200_2011")[0].images) == 6                  # the root itself
    (tmp_path / "CUB_200_2011/images.txt").write_text("100 001.Bird 0/100.jpg\n")
    with pytest.warns(UserWarning, match="subset"), pytest.raises(UserError, match="holds no test images of cub200"):
        data.load("cub200", tmp_path)


def test_a_download_makes_its_folder_and_starts_anew_where_nothing_can_be_resumed(tmp_path):
    content = tgz(tmp_path / "source")
    (tmp_path / "a.tgz").write_bytes(content)
    new = tmp_path / "new/data"
    with pytest.raises(UserError, match="not the published file"):
        data.fetch(new, (tmp_path / "a.tgz").as_uri(), "0" * 32, "CUB_200_2011")
    (new / "a.tgz.part").write_bytes(b"half a file")
    data.fetch(new, (tmp_path / "a.tgz").as_uri(), hashlib.md5(content).hexdigest(), "CUB_200_2011")
    assert (new / "CUB_200_2011/images.txt").exists()
    with pytest.raises(UserError, match="a.tgz has the MD5 digest"):                         # also one that was put there
        data.fetch(new, "file:///none/a.tgz", "0" * 32, "CUB_200_2011")


def test_cars_archives_are_both_checked_and_unpacked_once(tmp_path, monkeypatch):
    make_old_cars(tmp_path)
    with tarfile.open(tmp_path / "car_ims.tgz", "w:gz") as archive:
        archive.add(tmp_path / "car_ims", "car_ims")
    shutil.rmtree(tmp_path / "car_ims")
    checked = []
    monkeypatch.setattr(data, "check_md5", lambda path, md5: checked.append((path.name, md5)))
    for _ in range(2):
        with pytest.warns(UserWarning, match="subset"):
            data.load("cars196", tmp_path)
    assert checked == [("car_ims.tgz", "d5c8f0aa497503f355e17dc7886c3f14"), ("cars_annos.mat", "b407c6086d669747186bd1d764ff9dbc")]


def test_published_archives_are_known_by_address_and_digest(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "fetch", lambda root, url, md5, folder: asked.append((url.rsplit("/", 1)[1], md5)))
    for name in ("cub200", "sop"):
        with pytest.raises(FileNotFoundError):
            data.load(name, tmp_path)
    assert asked == [("CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),
                     ("Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e")]


def test_small_mishaps_of_files_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is missing: put it there"):
        data.check_md5(tmp_path / "cars_annos.mat", "0")
    with pytest.raises(UserError, match="writing a failed .PytorchStreamWriter"), data.clear_errors("writing a", "make room"):
        raise RuntimeError("PytorchStreamWriter failed")                                  # torch.save on a full disk
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("/tmp/escaped-absolutely", "")
    with pytest.raises(UserError, match="points outside"):
        data.unpack(tmp_path / "a", tmp_path, "b")
    (tmp_path / "big").write_bytes(bytes(1000))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1500})())
    with pytest.raises(UserError, match="make room"):                                     # the archive and its contents
        data.download((tmp_path / "big").as_uri(), tmp_path / "part")


# -------------------------------------------------------------------------------------------------- the command line

def test_defaults_are_those_of_the_help():
    def parse(*argv):
        args = common.parse(*_nir_parser(), list(argv))
        return args.image_size, args.augment, args.data_root
    assert parse("--dataset", "toy") == (32, "light", "data") and parse("--arch", "conv4") == (64, "light", "data")
    assert parse() == (224, "photo", "data")
    with pytest.raises(UserError, match=r"--val_fraction -0.1 is not in"):
        parse("--val_fraction=-0.1")
    with pytest.raises(SystemExit):
        parse("--lr", "inf")


def test_a_classifier_is_left_out_but_not_what_the_backbone_has(tmp_path, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "own", lambda size: (torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)}), 2))
    network = common.Network("own", 4)
    torch.save({"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2), "head.weight": torch.ones(9)}, tmp_path / "w")
    common.load_weights(network, str(tmp_path / "w"))
    assert torch.equal(network.backbone["fc"].weight, torch.ones(2, 2))


def test_an_interrupt_before_there_is_a_run_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(common.command, "folder", None)
    with pytest.raises(SystemExit) as caught:
        common.command(interrupted)
    assert caught.value.code == 130 and "nothing to resume" in capsys.readouterr().err


def test_the_commit_has_a_plus_where_files_differ(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "common.py").write_text("a")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    clean = common.commit()
    (tmp_path / "common.py").write_text("b")
    assert not clean.endswith("+") and common.commit() == clean + "+"
