"""Readers on miniature trees and on real data, downloads from this machine, images, batches."""
import argparse
import functools
import hashlib
import http.client
import http.server
import itertools
import math
import os
import re
import shutil
import socket
import struct
import sys
import tarfile
import threading
import urllib.error
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats
import torch
from conftest import REAL, needs_real, parametrize, refused
from PIL import Image, ImageOps
from torch.testing import assert_close

import data
from data import ClassBatches, UserError, load_pictures, read_image

# All miniature trees are subsets.
pytestmark = pytest.mark.filterwarnings("ignore:.*published split")

RED = Image.new("RGB", (8, 8), "red")
GRADIENT = Image.linear_gradient("L")


def picture(path, image=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def settings(dataset, root, val_fraction=0):
    """What `data.load_splits` asks of a run."""
    return argparse.Namespace(dataset=dataset, data_root=root, val_fraction=val_fraction)


# ------------------------------------------------------------------------ errors and progress

@parametrize("error, sentence", [
    (RuntimeError("writer failed\nstack"), "a failed (writer failed); b"),
    (urllib.error.URLError("no route"), "a failed (no route); b"),
    (http.client.IncompleteRead(b""), "a failed (IncompleteRead(0 bytes read)); b"),
    (OSError(28, "x"), "a failed ([Errno 28] x); the disk is full: make room and run again"),
    (UserError("as it is"), "as it is"),
])
def test_failures_of_network_and_disk_are_one_sentence(error, sentence):
    with pytest.raises(UserError) as caught, data.clear_errors("a", "b"):
        raise error
    assert str(caught.value) == sentence


def test_progress_shows_the_time_left_from_the_time_taken(monkeypatch, capsys):
    monkeypatch.setattr(data.time, "monotonic", itertools.count(step=61).__next__)
    assert list(data.progress("abc", 10, "images")) == ["a", "b", "c"]

    # The second item comes after 122 s, so that nine more take 1098 s.
    shown = capsys.readouterr().err
    assert shown == "  images 1/10, 18:18 left\n  images 2/10, 12:12 left\n"


# ------------------------------------------------------------------------------------ readers

def make_cub(root, images=None, labels=None, classes=range(4), listed=4):
    """Ids neither sorted nor dense, so that only a join by id reads them right.

    More classes may be `listed` than those `classes` that have pictures.
    """
    base = root / "CUB_200_2011"
    names = [f"{c + 1:03d}.Bird {c}" for c in range(listed)]
    rows = [(100 - 7 * i, classes[i % len(classes)]) for i in range(12)]
    for i, c in rows:
        picture(base / "images" / names[c] / f"{i}.jpg")

    tables = {
        "classes": [f"{c + 1} {name}" for c, name in enumerate(names)],
        "images": images or [f"{i} {names[c]}/{i}.jpg" for i, c in rows],
        "image_class_labels": labels or [f"{i} {c + 1}" for i, c in sorted(rows)],
    }
    for table, lines in tables.items():
        (base / f"{table}.txt").write_text("\n".join(lines))


def assert_labels_name_the_folders(*splits):
    for split in splits:
        names = [split.class_names[label] for label in split.labels]
        assert [path.parent.name for path in split.images] == names != []


@parametrize("folder", ["", "CUB_200_2011"])
def test_cub200_joins_its_three_lists_by_id(tmp_path, folder):
    make_cub(tmp_path)
    with pytest.warns(match="6 training and 6 test images .* published split 5864 and 5924"):
        train, test = data.load("cub200", tmp_path / folder)
    assert train.class_names == ["001.Bird 0", "002.Bird 1"]
    assert test.class_names == ["003.Bird 2", "004.Bird 3"]
    assert_labels_name_the_folders(train, test)


# Of six classes, the first three train.
@parametrize("classes, middle", [
    ([1, 2, 3, 5], 2), ([0, 1, 4, 5], 2), ([0, 2, 3, 4], 2), ([0, 1, 2, 3, 4], 3),
])
def test_classes_without_a_picture_are_left_out_after_the_split(tmp_path, classes, middle):
    make_cub(tmp_path, classes=classes, listed=6)
    with pytest.warns(match=r"left out . class\(es\) .*without an image"):
        splits = data.load("cub200", tmp_path)
    for split, expected in zip(splits, (classes[:middle], classes[middle:])):
        assert split.class_names == [f"{c + 1:03d}.Bird {c}" for c in expected]
        assert split.labels.unique().tolist() == list(range(len(expected)))
    assert_labels_name_the_folders(*splits)


@parametrize("name", ["classes", "images", "image_class_labels"])
def test_a_list_may_begin_with_a_byte_order_mark(tmp_path, name):
    make_cub(tmp_path)
    plain = repr(data.load("cub200", tmp_path))
    path = tmp_path / f"CUB_200_2011/{name}.txt"
    path.write_text(path.read_text(), "utf-8-sig")
    assert repr(data.load("cub200", tmp_path)) == plain

    path.write_text(path.read_text(), "utf-16")
    with refused(f"{name}.txt is missing, empty, no UTF-8 text or does"):
        data.load("cub200", tmp_path)


CAR_NAMES = {"class_names": np.array(["Car 1", "Car 2", "Car 3", "Car 4"], dtype=object)}


def write_cars(path, field, images, classes, **more):
    rows = np.zeros((1, len(images)), dtype=[(field, object), ("class", object)])
    rows[0] = list(zip(images, classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": rows, **more}, do_compression=True)


def make_old_cars(root):
    images = [f"car_ims/{i}.jpg" for i in range(8)]
    for image in images:
        picture(root / image)
    path = root / "cars_annos.mat"
    write_cars(path, "relative_im_path", images, [1, 1, 2, 2, 3, 3, 4, 4], **CAR_NAMES)
    return path


def make_new_cars(root):
    images = [f"{i}.jpg" for i in range(4)]
    for part, image in itertools.product(("cars_train", "cars_test"), images):
        picture(root / part / image)
    write_cars(root / "devkit/cars_train_annos.mat", "fname", images, [1, 2, 3, 4])
    scipy.io.savemat(root / "devkit/cars_meta.mat", CAR_NAMES)
    test_list = root / "cars_test_annos_withlabels.mat"
    write_cars(test_list, "fname", images, [4, 3, 2, 1])
    return test_list


@parametrize("folder", ["", "cars196", "stanford_cars"])
def test_cars196_in_the_older_layout(tmp_path, folder):
    make_old_cars(tmp_path / folder)
    with pytest.warns(match="8054 and 8131"):
        train, test = data.load("cars196", tmp_path)
    assert train.class_names + test.class_names == ["Car 1", "Car 2", "Car 3", "Car 4"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in test.images] == ["4.jpg", "5.jpg", "6.jpg", "7.jpg"]


def test_cars196_in_the_newer_layout_is_split_by_class(tmp_path):
    make_new_cars(tmp_path)
    train, test = data.load("cars196", tmp_path)
    listed = [path.relative_to(tmp_path).as_posix() for path in train.images]
    assert listed == ["cars_train/0.jpg", "cars_train/1.jpg", "cars_test/2.jpg", "cars_test/3.jpg"]
    assert train.labels.tolist() == [0, 1, 1, 0]
    assert test.class_names == ["Car 3", "Car 4"]


def test_cars196_is_unpacked_once_from_archives_with_the_right_digests(tmp_path, monkeypatch):
    make_old_cars(tmp_path)
    archive = shutil.make_archive(tmp_path / "a", "gztar", tmp_path, "car_ims")
    os.rename(archive, tmp_path / "car_ims.tgz")
    shutil.rmtree(tmp_path / "car_ims")

    digests = {"car_ims.tgz": "wrong", "cars_annos.mat": "wrong"}
    monkeypatch.setattr(data, "calculate_md5", lambda path: digests[path.name])
    for name, published in {
        "car_ims.tgz": "d5c8f0aa497503f355e17dc7886c3f14",
        "cars_annos.mat": "b407c6086d669747186bd1d764ff9dbc",
    }.items():
        message = f"{name} has the MD5 digest wrong instead of {published}: delete it and run"
        with refused(message):
            data.load("cars196", tmp_path)
        digests[name] = published

    assert len(data.load("cars196", tmp_path)[0].images) == 4
    digests.clear()
    assert len(data.load("cars196", tmp_path)[0].images) == 4
    with refused("none is missing: put it there"):
        data.check_md5(tmp_path / "none", "0")


def test_sop_is_split_by_its_own_lists(tmp_path):
    base = tmp_path / "Stanford_Online_Products"
    for name, classes in {"train": [3, 3, 4, 4], "test": [7, 7, 9, 9]}.items():
        lines = ["image_id class_id super_class_id path"]
        for i, c in enumerate(classes):
            picture(base / f"bike_final/{c}_{i}.JPG")
            lines.append(f"{10 + i} {c} 1 bike_final/{c}_{i}.JPG")
        (base / f"Ebay_{name}.txt").write_text("\n".join(lines))

    with pytest.warns(match="59551 and 60502"):
        train, test = data.load("sop", tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert train.class_names == ["3", "4"] and test.class_names == ["7", "9"]
    assert test.images[3] == base / "bike_final/9_3.JPG"


def test_a_folder_has_a_class_for_each_sub_folder_with_pictures(tmp_path):
    names = ["a/0.png", "a/1.png", "a/2.png", "b/0.png"]
    for name in [*names, "c/0.png", "d/0.png", "loose.png", ".hidden/0.png"]:
        picture(tmp_path / name)
    (tmp_path / "a/album.png").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.warns() as caught:
        train, test = data.load("folder", tmp_path)

    assert train.class_names == ["a", "b"] and test.class_names == ["c", "d"]
    assert train.images == [tmp_path / name for name in names]
    assert_labels_name_the_folders(train, test)
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}: left out 1 picture(s) beside the class folders, 1 folder(s) without an image",
        "1 training class(es) have one image, which is paired with itself",
    ]


@parametrize("folders", [
    ["test", "train"], ["all"], ["test", "train", "val"], ["cub/images", "cub/more"],
    ["Test", "extra", "train", "val"],
])
def test_a_folder_of_fewer_than_four_classes_is_told_by_its_sub_folders(tmp_path, folders):
    for folder, c in itertools.product(folders, "abcd"):
        picture(tmp_path / folder / c / "0.png")
    names = ", ".join(sorted({folder.split("/")[0] for folder in folders}))
    with refused(rf"sub-folder\(s\), {names}, but four .*: give a folder that holds a sub-folder"):
        data.load("folder", tmp_path)


def test_pictures_below_a_folder_have_the_first_folder_of_their_path_as_class(
        tmp_path, monkeypatch):
    shown = ["0.png", "a/1.png", "a/deep/2.jpg", "a-b/0.PNG", "c.png"]
    for name in [*shown, ".hidden.png", "a/.1.png", ".cache/a.png", "a/.cache/a.png"]:
        picture(tmp_path / name)

    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="error"):
        split = load_pictures(str(tmp_path))
        assert torch.equal(load_pictures(".").labels, split.labels)
    assert split.images == [tmp_path / name for name in shown]
    assert split.class_names == ["", "a", "a-b"]
    assert split.labels.tolist() == [0, 1, 1, 2, 0]
    for folder in (tmp_path / "none", tmp_path / "0.png"):
        with refused(f"{folder} is no folder, or there is no image below"):
            load_pictures(folder)


def test_links_to_folders_and_files_are_followed_but_not_in_a_circle(tmp_path):
    root = tmp_path / "photos"
    picture(root / "a/0.png")
    picture(tmp_path / "elsewhere/1.png")
    picture(tmp_path / "elsewhere/deep/2.png")
    for link, target in {
        "b": tmp_path / "elsewhere",
        "a/single.png": tmp_path / "elsewhere/1.png",
        "a/up": root,
        "a/self": ".",
        "a/best": tmp_path / "elsewhere/deep",
    }.items():
        (root / link).symlink_to(target)

    with pytest.warns(match=r"left out 2 link\(s\) to a folder above$"):
        split = load_pictures(root)
    names = [path.relative_to(root).as_posix() for path in split.images]
    assert names == ["a/0.png", "a/best/2.png", "a/single.png", "b/1.png", "b/deep/2.png"]
    assert split.class_names == ["a", "b"]


def test_links_of_two_folders_to_each_other_end(tmp_path):
    picture(tmp_path / "a/0.png")
    picture(tmp_path / "b/1.png")
    (tmp_path / "a/other").symlink_to(tmp_path / "b")
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    with pytest.warns(match=r"left out 2 link\(s\) to a folder above$"):
        split = load_pictures(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in split.images]
    assert names == ["a/0.png", "a/other/1.png", "b/1.png", "b/other/0.png"]


def test_what_is_left_out_of_a_folder_is_counted_in_one_warning(tmp_path, monkeypatch):
    for c in "abcd":
        picture(tmp_path / c / "0.png")
    for name in ("a/1.HEIC", "b/1.heic", "b/2.heic", "c/clip.mpg", "d/README", "d/.hidden.heic"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "b/b.png").symlink_to("b.png")
    picture(tmp_path / "loose.jpg")
    locked = tmp_path / "c/locked"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    both = {
        "3 .heic file(s), which are not read",
        "1 .mpg file(s), which are not read",
        "1 other file(s), which are not read",
        "1 folder(s) that cannot be read (Permission denied)",
        "2 broken link(s), or no files",
    }
    beside = {"1 picture(s) beside the class folders"}
    for read, left_out in {data.load_folder: both | beside, load_pictures: both}.items():
        with pytest.warns() as caught:
            read(tmp_path)
        warning, = caught
        folder, _, message = str(warning.message).partition(": left out ")
        assert folder == str(tmp_path)
        assert {*re.split(r", (?=\d)", message)} == left_out


def test_a_folder_without_one_readable_picture_says_what_it_holds(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / f"a/{i}.heic").write_bytes(b"")
    with refused(r"image below it \(left out: 3 .heic file\(s\), which are not read, 1 folder"):
        load_pictures(tmp_path)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A reader of one's own: four classes of a file and an array each."""
    def read(root):
        assert root == str(tmp_path)
        files = [picture(tmp_path / f"{i}.png") for i in range(4)]
        arrays = list(np.zeros((4, 8, 8), dtype=np.uint8))
        return data.halves(data.Split([*files, *arrays], torch.arange(4).repeat(2), [*"abcd"]))

    monkeypatch.setitem(data.LOADERS, "mine", read)


def test_a_reader_of_ones_own_is_registered_in_one_place(mine, tmp_path):
    train, _, test = data.load_splits(settings("mine", str(tmp_path)))
    assert (train.class_names, test.class_names) == (["a", "b"], ["c", "d"])
    assert train.labels.tolist() == test.labels.tolist() == [0, 1, 0, 1]


def test_a_readers_own_kinds_of_names_and_labels_can_be_saved(tmp_path, monkeypatch):
    """A checkpoint that holds numpy's strings could not be read again."""
    arrays = list(np.zeros((8, 8, 8), dtype=np.uint8))
    for kind in (np.array, list, torch.tensor):
        half = data.Split(arrays, kind([0, 0, 0, 0, 1, 1, 1, 1]), np.array(["a", "b"]))
        test = half._replace(class_names=[Path("c"), 4])
        monkeypatch.setitem(data.LOADERS, "mine", lambda root: (half, test))  # noqa: B023
        train, test = data.load("mine", tmp_path)
        assert [type(name) for name in train.class_names + test.class_names] == [str] * 4
        assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@parametrize("labels", [[0, 1], [0, 1, 2, -1], [0, 1, 2, 4], [0.0, 1, 2, 3], [[0], [1], [2], [3]]])
def test_labels_that_do_not_fit_images_and_names_are_refused(mine, tmp_path, monkeypatch, labels):
    images = list(np.zeros((4, 8, 8), dtype=np.uint8))
    wrong = data.Split(images, torch.tensor(labels), [*"efgh"])
    with refused("4 images and 4 class names, but labels that do not fit"):
        data.halves(wrong)
    train, test = data.LOADERS["mine"](str(tmp_path))
    for splits in ((train, wrong), (wrong, test)):
        monkeypatch.setitem(data.LOADERS, "mine", lambda root: splits)  # noqa: B023
        with refused("4 images and 4 class names, but labels that do not fit"):
            data.load("mine", tmp_path)


def test_classes_that_train_and_test_are_told(mine, tmp_path, monkeypatch):
    train, test = data.LOADERS["mine"](str(tmp_path))
    test = test._replace(class_names=["b", "d"])
    monkeypatch.setitem(data.LOADERS, "mine", lambda root: (train, test))
    with pytest.warns(match=r"^1 class\(es\) of mine have the same name in training and test"):
        data.load("mine", tmp_path)


def test_a_published_split_of_ones_own_is_compared(mine, tmp_path, monkeypatch):
    monkeypatch.setitem(data.PUBLISHED, "mine", (4, 5))
    with pytest.warns(match="4 training and 4 test images of mine, the published split 4 and 5"):
        data.load("mine", str(tmp_path))


@parametrize("name, make, message", [
    ("cub200", lambda root: make_cub(root, images=["1 gone"]), "no class for the id '1'"),
    ("cub200", lambda root: make_cub(root, labels=["100 9"]), "no class for the id '9'"),
    ("cub200", lambda root: make_cub(root, labels=["1"]), "labels.txt is .* or does not have 2"),
    ("cub200", lambda root: make_cub(root, labels=[" "]), "labels.txt is missing, empty,"),
    ("cub200", lambda root: make_cub(root, images=["100 gone.jpg"]),
     "1 listed images are missing, the first is .*images/gone.jpg: unpack"),
    ("cub200", lambda root: make_cub(root, images=["100 001.Bird 0/100.jpg"]),
     "images of 1 training and 0 test classes of cub200, but both need two: get the whole"),
    ("cub200", lambda root: make_cub(root, ["100 001.Bird 0/100.jpg", "86 003.Bird 2/86.jpg"]),
     "images of 1 training and 1 test classes of cub200"),
    ("cub200", lambda root: (root / "CUB_200_2011").mkdir(), "holds no images.txt: delete the"),
    ("cars196", lambda root: None, "not found in .*data, .* put there either car_ims.tgz and"),
    ("cars196", lambda root: make_new_cars(root).unlink(), "withlabels.mat is missing: put it"),
    ("folder", Path.rmdir, "data is no folder"),
    ("folder", lambda root: None, "data is no folder, or there is no image below it"),
    ("folder", lambda root: picture(root / "a.png"), "below it .left out: 1 picture.* beside the"),
    ("folder", lambda root: picture(root / "a/a.png"), "data holds 1 sub-folder.s., a, but four"),
])
@pytest.mark.filterwarnings("ignore:.*left out . class")
def test_mistakes_in_data_sets_are_named(tmp_path, name, make, message):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with refused(message):
        data.load(name, root)


def test_a_damaged_annotation_file_is_named(tmp_path):
    path = make_old_cars(tmp_path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (b"nothing", whole[:middle], whole[:middle] + b"what" + whole[middle + 4:]):
        path.write_bytes(content)
        with refused("cars_annos.mat is not a readable Cars196"):
            data.load("cars196", tmp_path)


@needs_real
def test_real_birds_are_read():
    with pytest.warns(match="282 training and 261 test"):
        train, test = data.load("cub200", REAL)
    assert len(train.class_names) == len(test.class_names) == 5
    assert_labels_name_the_folders(train, test)
    image, label = data.Images(test, data.test_transform(224, "photo"))[0]
    assert image.shape == (3, 224, 224) and image.float().std() > 20 and label == 0


@needs_real
def test_real_cars_have_the_same_classes_in_both_layouts():
    train, test = data.load("cars196", REAL)
    devkit = REAL / "stanford_cars/devkit"
    names = data.read_mat(devkit / "cars_meta.mat", "class_names").tolist()
    assert names == train.class_names + test.class_names
    assert len(train.class_names) == 98

    rows = data.read_mat(devkit / "cars_train_annos.mat", "annotations", "fname", "class")
    labels = torch.cat([train.labels, test.labels + 98])
    assert rows["fname"][0] == "00001.jpg"
    assert np.bincount(rows["class"].astype(int) - 1).tolist() == labels.bincount().tolist()


# ---------------------------------------------------------------------------------- downloads

class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends files, but hangs up after `cut` bytes."""

    def copyfile(self, source, output):
        self.server.timeouts.append(socket.getdefaulttimeout())
        output.write(source.read(self.server.cut))

    def log_message(self, *args):
        pass


@pytest.fixture
def root(tmp_path):
    return tmp_path / "new/data"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """CUB200's archive on this machine."""
    make_cub(tmp_path)
    archive = shutil.make_archive(tmp_path / "birds", "gztar", tmp_path, "CUB_200_2011")
    handler = functools.partial(Handler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.archive = Path(archive)
    server.cut = -1
    server.timeouts = []
    url = f"http://127.0.0.1:{server.server_port}/birds.tar.gz"
    server.digest = hashlib.md5(server.archive.read_bytes()).hexdigest()
    entry = (url, server.digest, "CUB_200_2011", "images.txt")
    monkeypatch.setitem(data.ARCHIVES, "cub200", entry)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_missing_data_set_downloads_itself_once(server, root):
    for _ in range(2):
        assert len(data.load("cub200", root)[0].images) == 6
    assert sorted(os.listdir(root)) == ["CUB_200_2011", "birds.tar.gz"]
    assert server.timeouts == [60]
    assert socket.getdefaulttimeout() is None


@parametrize("name, folder", [
    ("cub200", "CUB_200_2011"), ("sop", "Stanford_Online_Products"),
])
def test_nothing_is_downloaded_where_that_is_not_allowed(tmp_path, name, folder):
    message = f"^{folder} is not in {tmp_path}: give --data_root the folder that holds it$"
    with refused(message):
        data.load(name, tmp_path, download=False)
    with refused(message):
        data.load_splits(settings(name, tmp_path), download=False)
    assert os.listdir(tmp_path) == []


def test_what_is_there_loads_without_a_download(tmp_path):
    make_cub(tmp_path)
    make_old_cars(tmp_path)
    for name, classes in {"cub200": 2, "cars196": 2, "toy": 100}.items():
        train, _ = data.load(name, tmp_path, download=False)
        assert len(train.class_names) == classes


def test_a_cut_download_leaves_nothing_so_that_running_again_works(server, root):
    server.cut = 1000
    message = "gz failed .its MD5 digest is wrong.*; run again, put the file into .*data by hand"
    with refused(message):
        data.load("cub200", root)
    assert os.listdir(root) == []
    server.cut = -1
    assert len(data.load("cub200", root)[0].images) == 6


def test_a_failed_download_is_one_sentence_and_leaves_nothing(server, root, monkeypatch):
    def full(url, path, progress):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def assert_fails(message):
        with refused(message):
            data.load("cub200", root)
        assert os.listdir(root) == []
        assert socket.getdefaulttimeout() is None

    server.archive.unlink()
    assert_fails("birds.tar.gz failed .File not found.; run again")
    entry = ("http://127.0.0.1:9/a.tgz", *data.ARCHIVES["cub200"][1:])
    monkeypatch.setitem(data.ARCHIVES, "cub200", entry)
    assert_fails("a.tgz failed .*refused.; run again")
    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    assert_fails("the disk is full: make room and run again")


def test_an_archive_in_place_is_unpacked_if_its_digest_is_right_and_never_overwritten(server, root):
    root.mkdir(parents=True)
    archive = root / "birds.tar.gz"
    archive.write_bytes(b"mine")
    digests = f"{hashlib.md5(b'mine').hexdigest()} instead of {server.digest}"
    with refused(f"{archive} has the MD5 digest {digests}: delete it and"):
        data.load("cub200", root)
    assert archive.read_bytes() == b"mine"

    archive.write_bytes(server.archive.read_bytes())
    assert len(data.load("cub200", root)[0].images) == 6
    assert server.timeouts == []


def test_the_first_process_shows_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    source = picture(tmp_path / "source.png")
    digest = hashlib.md5(source.read_bytes()).hexdigest()
    for is_terminal, rank in ((True, 0), (True, 1), (False, 0)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
        monkeypatch.setattr(data, "processes", lambda: (rank, 2))
        data.download(source.as_uri(), tmp_path / "copy", digest)
        assert ("100" in capsys.readouterr().err) == (is_terminal and rank == 0)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_half_unpacked_archive_is_not_taken_for_whole(server, root):
    root.mkdir(parents=True)
    archive = root / "a.tgz"
    archive.write_bytes(server.archive.read_bytes()[:-200])
    with pytest.raises((EOFError, tarfile.ReadError)):
        data.unpack(archive, "CUB_200_2011")
    assert os.listdir(root) == ["a.tgz"]


def test_an_archive_cannot_escape_its_folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for member in ("../../escaped", f"{tmp_path}/escaped"):
        with zipfile.ZipFile(root / "a.zip", "w") as archive:
            archive.writestr(member, "")
        with tarfile.open(root / "a.tgz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(member))
        for name in ("a.zip", "a.tgz"):
            with pytest.raises((UserError, tarfile.FilterError), match="escaped|unpacking .* run"):
                data.unpack(root / name, "a")
    assert not list(tmp_path.rglob("escaped"))


def test_zip_archives_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/list.txt", "text")
    data.unpack(tmp_path / "a.zip", "folder")
    assert (tmp_path / "folder/list.txt").read_text() == "text"


def test_published_archives_are_known_by_name_and_digest(tmp_path, monkeypatch):
    def download(url, archive, md5):
        raise UserError(f"{archive.name} {md5}")

    monkeypatch.setattr(data, "download", download)
    for name, archive in {
        "cub200": "CUB_200_2011.tgz 97eceeb196236b17998738112f37df78",
        "sop": "Stanford_Online_Products.zip 7f73d41a2f44250d4779881525aea32e",
    }.items():
        with refused(archive):
            data.load(name, tmp_path)


# ----------------------------------------------------------------------------- toy characters

def test_toy_has_100_classes_of_20_drawings_on_either_side(toy):
    for split, again in zip(toy, data.load("toy", None)):
        assert split.labels.bincount().tolist() == [20] * 100
        assert split.images[0].shape == (32, 32) and split.images[0].dtype == np.uint8
        assert np.array_equal(split.images, again.images)
        assert 0 <= split.ambiguity.min() < 0.05 and 0.95 < split.ambiguity.max() <= 1
    assert len({*toy[0].class_names, *toy[1].class_names}) == 200


def test_toy_ambiguity_takes_sharpness_and_ink_away(toy):
    for split in toy:
        ink = 255.0 - np.stack(split.images)
        clear = ink[split.ambiguity < 0.2]
        unclear = ink[split.ambiguity > 0.8]
        assert unclear.max((1, 2)).mean() < 0.7 * clear.max((1, 2)).mean()
        assert unclear.mean() < 0.9 * clear.mean()


def test_toy_classes_are_non_isotropic_each_in_its_own_way(toy):
    """Ink varies mostly with thickness: in a third of the classes far more than in others."""
    train, _ = toy
    ink = 255.0 - np.stack(train.images)
    log_ink = np.log(ink.sum((1, 2)))
    clear = train.ambiguity < 0.6
    spread = sorted(log_ink[clear & (train.labels == c)].std() for c in range(100))
    assert np.mean(spread[70:]) > 2 * np.mean(spread[:50])


# ------------------------------------------------------------------------------------- splits

def test_a_run_validates_with_the_last_training_classes(toy):
    train, test = toy
    rest, held, untouched = data.load_splits(settings("toy", None, 0.2))
    assert rest.class_names + held.class_names == train.class_names
    assert len(held.class_names) == 20 and len(held.images) == 400
    assert held.labels.unique().tolist() == list(range(20))
    assert torch.equal(torch.cat([rest.ambiguity, held.ambiguity]), train.ambiguity)
    assert untouched.class_names == test.class_names

    # Within a single class, Recall@1 is always 100 %.
    rest, held = data.hold_out(train, 0.001)
    assert (len(rest.class_names), len(held.class_names)) == (98, 2)
    with refused("--val_fraction 0.99 leaves 1 of 100"):
        data.hold_out(train, 0.99)


def test_recall_is_reported_at_the_papers_ks():
    assert data.usual_ks("sop") == (1, 10, 100, 1000)
    assert data.usual_ks("cub200") == (1, 2, 4, 8)


# ------------------------------------------------------------------------------------- images

def test_every_colour_mode_becomes_rgb(tmp_path):
    white = Image.new("RGB", (8, 8), "white")
    for mode, suffix in {"L": "png", "1": "png", "P": "gif", "RGBA": "png", "CMYK": "jpg"}.items():
        path = picture(tmp_path / f"{mode}.{suffix}", white.convert(mode))
        for source in (path, str(path), Image.open(path)):
            image = read_image(source)
            assert image.mode == "RGB" and np.asarray(image).min() > 250


def test_a_file_that_is_no_whole_image_is_named(tmp_path):
    path = picture(tmp_path / "bad.jpg", GRADIENT)
    for content in (b"", b"not an image", path.read_bytes()[:1500]):
        path.write_bytes(content)
        with refused("bad.jpg is not a readable image .*: unpack the data"):
            read_image(path)


@pytest.fixture
def corner():
    """A white picture of 40 x 20 pixels, whose upper left corner is black."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 10, 10))
    return image


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def dark_corners(image):
    """(row, column) of black corners: 0 is above or left, -1 is below or right."""
    grey = np.asarray(image.convert("L"))
    return [corner for corner in itertools.product((0, -1), repeat=2) if grey[corner] < 50]


@parametrize("suffix", ["jpg", "png", "webp", "tif"])
@parametrize("orientation", range(10))
def test_pictures_are_turned_as_exif_says(tmp_path, corner, suffix, orientation):
    """By Pillow's own function, which knows orientations 1 to 8."""
    path = tmp_path / f"a.{suffix}"
    corner.save(path, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(path))
    for source in (path, Image.open(path)):
        image = read_image(source)
        assert image.mode == "RGB" and np.array_equal(image, expected)


@parametrize("mode, suffix", [
    ("RGBA", "png"), ("I;16", "png"), ("1", "png"),
    ("L", "tif"), ("I;16", "tif"), ("RGBA", "tif"), ("CMYK", "tif"),
])
def test_pictures_of_any_mode_are_turned(tmp_path, corner, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    grey = np.asarray(corner.convert("L"))
    image = Image.fromarray(grey * np.uint16(257)) if mode == "I;16" else corner.convert(mode)
    image.save(path, exif=exif(6))
    assert dark_corners(read_image(path)) == [(0, -1)]


WHOLE = exif(6).tobytes()


# The last two are an orientation in text, and one that is missing.
@parametrize("block", [
    b"Exif\0\0", b"Exif\0\0what is this", WHOLE[:12], WHOLE.replace(b"\x12\0\3", b"\x12\0\2"),
    WHOLE[:-9],
])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_as_good_as_none(tmp_path, corner, block):
    path = tmp_path / "a.jpg"
    corner.save(path, exif=block)
    assert dark_corners(read_image(path)) == [(0, 0)]


def test_a_picture_is_turned_even_if_another_tag_is_broken(tmp_path, corner):
    tags = exif(6)
    tags[0x011A] = 72.0
    # A fraction, which Pillow cannot write as the height that it now claims to be.
    block = tags.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x01\x00\x05")
    path = tmp_path / "a.jpg"
    corner.save(path, exif=block)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(path))
    assert dark_corners(read_image(path)) == [(0, -1)]


DEEP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def assert_deep(source):
    image = read_image(source)
    assert image.mode == "RGB"
    assert_close(np.asarray(image)[..., 0] / 255, DEEP / 65535, atol=1.5 / 255, rtol=0)


@parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_files_of_16_bit_grey_keep_their_range(tmp_path, name):
    path = picture(tmp_path / name, Image.fromarray(DEEP))
    assert_deep(path)
    assert_deep(Image.open(path))


# Pillows may read 16 bits as 32.
@parametrize("mode, kind, format", [
    ("I;16", "<u2", None), ("I;16L", "<u2", None), ("I;16B", ">u2", None), ("I;16N", "u2", None),
    ("I", "i4", "PNG"), ("I", "i4", "PPM"),
])
def test_16_bit_grey_is_scaled_in_all_byte_orders_and_modes(mode, kind, format):
    image = Image.frombytes(mode, (8, 8), DEEP.astype(kind).tobytes())
    image.format = format
    assert_deep(image)


@parametrize("maximum", [300, 1023, 65535])
def test_grey_maps_of_any_depth_keep_their_range(tmp_path, maximum):
    levels = (DEEP / 65535 * maximum).round().astype(">u2")
    path = tmp_path / "a.pgm"
    path.write_bytes(f"P5 8 8 {maximum}\n".encode() + levels.tobytes())
    assert_deep(path)


@parametrize("mode, name", [("I", "a.tif"), ("F", "a.tif"), ("F", "a.pfm")])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode, name):
    image = Image.fromarray(DEEP.astype(np.int32)).convert(mode)
    path = picture(tmp_path / name, image)
    for source, shown in ((path, name), (Image.open(path), "PIL.*"), (image, "PIL.Image.Image.*")):
        with refused(f"{shown} is not a readable image .mode {mode} has no known range, unlike 8"):
            read_image(source)


@parametrize("tags", [{258: 12}, {262: 0}])
def test_tiffs_of_12_bits_and_of_16_where_0_is_white_are_refused(tmp_path, tags):
    path = tmp_path / "a.tif"
    Image.fromarray(DEEP).save(path, tiffinfo=tags)
    image = Image.open(path)
    image.tag_v2.update({tag: (value,) if tag == 258 else value for tag, value in tags.items()})
    with refused("a TIFF of 12 bits, or of 16 bits where 0 is white"):
        read_image(image)


def glyph(mode):
    """A black square on a transparent ground, which is black below."""
    alpha = Image.new("L", (8, 8))
    alpha.paste(255, (2, 2, 6, 6))
    image = Image.new({"LA": "L", "PA": "P"}.get(mode, "RGB"), (8, 8))
    image.putalpha(alpha)
    return image.convert(mode)


def key_glyph(mode, ground):
    """A black square on a ground whose colour or index counts as transparent."""
    image = Image.new(mode, (8, 8), ground)
    image.paste(0, (2, 2, 6, 6))
    image.info["transparency"] = ground
    return image


def assert_black_on_white(source):
    image = read_image(source)
    expected = np.full((8, 8, 3), 255, dtype=np.uint8)
    expected[2:6, 2:6] = 0
    assert image.mode == "RGB" and np.array_equal(image, expected)


@parametrize("mode, suffixes", [
    ("RGBA", ["png", "webp", "tif", "gif"]), ("LA", ["png"]), ("PA", []), ("RGBa", []),
])
def test_what_is_transparent_becomes_white(tmp_path, mode, suffixes):
    assert_black_on_white(glyph(mode))
    for suffix in suffixes:
        path = tmp_path / f"a.{suffix}"
        glyph(mode).save(path, lossless=True)
        assert_black_on_white(path)
        assert_black_on_white(Image.open(path))


@parametrize("mode, ground", [
    ("L", 90), ("RGB", (90, 0, 9)), ("P", 7), ("I;16", 30000),
])
def test_a_transparent_colour_becomes_white(tmp_path, mode, ground):
    image = key_glyph(mode, ground)
    if mode == "P":
        image.putpalette([0, 0, 0] * 8)
    assert_black_on_white(image)
    image.save(tmp_path / "a.png", transparency=ground)
    assert_black_on_white(tmp_path / "a.png")


def test_half_transparent_ink_is_grey():
    image = Image.new("RGB", GRADIENT.size)
    image.putalpha(GRADIENT)
    assert np.array_equal(read_image(image).convert("L"), 255 - np.asarray(GRADIENT))


def test_opaque_colours_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(read_image(image.convert("RGBA")), pixels)


def images_of(path, transform):
    return data.Images(data.Split([path], torch.zeros(1), ["a"]), transform)


@parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_at_the_size_needed_and_turned(tmp_path, mode):
    path = tmp_path / "large.jpg"
    GRADIENT.resize((4000, 3000)).convert(mode).save(path, exif=exif(6))
    central = data.test_transform(224, "photo")
    for transform, size in {
        None: (3000, 4000),
        torch.nn.Identity(): (3000, 4000),
        data.train_transform(224, "photo"): (1500, 2000),
        data.train_transform(224, "light"): (375, 500),
        central: (375, 500),
    }.items():
        image = read_image(path, transform)
        assert (image.mode, image.size) == ("RGB", size)
        # What was above is on the right.
        assert image.getpixel((0, 0)) > (250,) * 3 and image.getpixel((size[0] - 1, 0)) < (5,) * 3

    # Either way, grey values are rounded more than once.
    reduced, _ = images_of(path, central)[0]
    whole = central(read_image(path))
    assert_close(reduced.float(), whole.float(), atol=3, rtol=0)


SIZES = [(1024, 1023), (1024, 1024), (1280, 853), (3456, 4608), (8000, 6000), (12000, 500)]
SIZES += np.random.default_rng(0).integers(200, 9000, (60, 2)).tolist()


@parametrize("size", [16, 64, 224, 448])
@parametrize("augment, area, ratio", [("photo", 0.08, 3 / 4), ("light", 0.6, 0.8)])
def test_jpegs_are_reduced_as_far_as_no_crop_is_enlarged(size, augment, area, ratio):
    train = data.train_transform(size, augment)
    test = data.test_transform(size, augment)
    crop, resize = train.transforms[0], test.transforms[0]
    torch.manual_seed(0)
    for width, height in SIZES:
        short_side = min(width, height)
        narrowest = min(short_side, math.sqrt(area * ratio * width * height))
        for transform, side, needed in (train, narrowest, size), (test, short_side, resize.size):
            allowed = [f for f in (2, 4, 8) if f * needed <= side and width * height >= 2 ** 20]
            assert data.reduction(transform, width, height) == max(allowed, default=1)

        # `narrowest` is right: no crop is narrower.
        factor = data.reduction(train, width, height)
        reduced = Image.new("1", (math.ceil(width / factor), math.ceil(height / factor)))
        crops = [crop.get_params(reduced, crop.scale, crop.ratio)[2:] for _ in range(30)]
        assert factor == 1 or np.min(crops) >= size


@parametrize("name, size", [("a.jpg", (500, 375)), ("a.png", (1300, 1100))])
def test_small_jpegs_and_other_formats_are_decoded_whole(tmp_path, name, size):
    path = picture(tmp_path / name, GRADIENT.resize(size))
    whole = Image.open(path).convert("RGB")
    transform = data.train_transform(64, "photo")
    assert np.array_equal(read_image(path, transform), whole)
    torch.manual_seed(5)
    assert torch.equal(transform(whole), images_of(path, transform)[0, 5][0])


def test_photographs_are_cropped_and_mirrored_as_in_the_papers():
    train = str(data.train_transform(224, "photo"))
    assert "RandomResizedCrop(size=(224, 224), scale=(0.08, 1.0), ratio=(0.75, 1.3333)" in train
    assert "RandomHorizontalFlip(p=0.5)" in train
    for size, short_side in ((112, 128), (224, 256), (448, 512)):
        resize, crop, _ = data.test_transform(size, "photo").transforms
        assert resize.size == short_side and crop.size == (size, size)


def test_drawings_are_tested_whole_and_never_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = data.test_transform(32, "light")(Image.fromarray(pixels))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    assert "Flip" not in str(data.train_transform(32, "light"))


def test_augmentation_follows_the_seed_and_leaves_the_global_generator_alone(toy):
    images = data.Images(toy[0], data.train_transform(32, "light"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = images[0, 11][0]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(images[0, 11][0], first)
    assert not torch.equal(images[0, 12][0], first)


# ------------------------------------------------------------------------------------ batches

# Classes of very unequal sizes in mixed order, and two labels without an image.
COUNTS = torch.tensor([40, 0, 2, 1, 0, 9])
LABELS = torch.arange(6).repeat_interleave(COUNTS)
LABELS = LABELS[torch.randperm(52, generator=torch.Generator().manual_seed(0))]


def draw(batch_size, epochs):
    """Image indices (number of batches, batch size) of some epochs."""
    batches = ClassBatches(LABELS, batch_size)
    drawn = []
    for batches.epoch in range(epochs):
        drawn += batches
    return torch.tensor(drawn)[..., 0]


@pytest.fixture(scope="module")
def pairs():
    """Pairs (number of batches, 2, 2) of 400 epochs."""
    return draw(4, epochs=400).view(-1, 2, 2)


def assert_uniform(counts):
    # One seed in 1000 would fail; ours is fixed.
    assert scipy.stats.chisquare(counts).pvalue > 0.001


def test_a_pair_has_one_class(pairs):
    assert torch.equal(LABELS[pairs[..., 0]], LABELS[pairs[..., 1]])


def test_pairs_draw_their_classes_uniformly_and_independently(pairs):
    first, second = LABELS[pairs[..., 0]].T
    assert first.unique().tolist() == [0, 2, 3, 5]
    counts = (6 * first + second).bincount(minlength=36).view(6, 6)
    assert_uniform(counts[COUNTS > 0][:, COUNTS > 0].flatten())


@parametrize("c", [0, 2, 5])
def test_both_images_of_a_pair_are_drawn_uniformly_with_replacement(pairs, c):
    images = torch.nonzero(LABELS == c).flatten()
    drawn = pairs[LABELS[pairs[..., 0]] == c]
    first, second = torch.searchsorted(images, drawn).T
    size = len(images)
    assert_uniform((size * first + second).bincount(minlength=size ** 2))
    same = int((first == second).sum())
    assert scipy.stats.binomtest(same, len(drawn), 1 / size).pvalue > 0.001


@parametrize("batch_size, expected", [(2, 26), (4, 13), (6, 8), (52, 1), (80, 1)])
def test_an_epoch_has_n_over_b_batches_and_at_least_one(batch_size, expected):
    assert len(ClassBatches(LABELS, batch_size)) == expected
    assert draw(batch_size, epochs=1).shape == (expected, batch_size)


def test_a_time_stamp_may_be_the_seed():
    for seed in (20251125204300, 2 ** 63 - 1, -1):
        assert len(list(ClassBatches(torch.arange(20) % 4, 6, seed=seed))) == 3


def test_batches_follow_from_seed_and_epoch_alone():
    runs = [(1, 4), (1, 5), (2, 4), (2, 3)]
    drawn = set()
    for seed, epoch in runs + runs:
        batches = ClassBatches(LABELS, 4, seed)
        batches.epoch = epoch
        drawn.add(str(list(batches)))
    assert len(drawn) == len(runs)


def test_every_image_of_an_epoch_has_an_augmentation_seed_of_its_own():
    seeds = [seed for batch in ClassBatches(LABELS, 4) for _, seed in batch]
    assert len(set(seeds)) == 52 and max(seeds) > 2 ** 55


def test_processes_divide_each_batch_among_them():
    batches = ClassBatches(LABELS, 6)
    whole = list(batches)
    for start in (0, 3):
        batches.process_slice = slice(start, start + 3)
        assert list(batches) == [batch[start:start + 3] for batch in whole]


def test_an_odd_batch_size_is_named():
    with refused("--batch_size 5 is odd, .*: try 6"):
        ClassBatches(LABELS, 5)
