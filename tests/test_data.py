"""Readers on miniature trees in each official layout and on real data; downloads from a local server; batches."""
import argparse
import hashlib
import http.server
import io
import math
import os
import re
import shutil
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats
import torch
from PIL import Image

import data
from data import UserError

REAL = Path(os.environ.get("DML_TEST_DATA", "not given"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="set DML_TEST_DATA to a folder with CUB_200_2011 and others")


def picture(path, colour=(200, 30, 30), size=(8, 8), mode="RGB", **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


# -------------------------------------------------------------------------------------------------------- readers

def make_cub(root, classes=4):
    """Ids neither sorted nor dense, so that only a join by id reads them right."""
    base = root / "CUB_200_2011"
    names = [f"{c + 1:03d}.Bird {c}" for c in range(classes)]
    rows = [(100 - 7 * i, i % classes) for i in range(3 * classes)]
    for image_id, c in rows:
        picture(base / "images" / names[c] / f"{image_id}.jpg")
    (base / "classes.txt").write_text("".join(f"{c + 1} {name}\n" for c, name in enumerate(names)))
    (base / "images.txt").write_text("".join(f"{i} {names[c]}/{i}.jpg\n" for i, c in rows))
    (base / "image_class_labels.txt").write_text("".join(f"{i} {c + 1}\n" for i, c in sorted(rows)))
    return names


def assert_labels_name_the_folders(split):
    assert len(split.images) == len(split.labels) > 0
    for path, label in zip(split.images, split.labels):
        assert path.parent.name == split.class_names[label]


def test_cub_joins_its_files_by_image_id(tmp_path):
    names = make_cub(tmp_path)
    with pytest.warns(UserWarning, match="6 training and 6 test images of cub200, the published split 5864 and 5924"):
        train, test = data.load("cub200", tmp_path)
    assert train.class_names == names[:2] and test.class_names == names[2:]
    assert_labels_name_the_folders(train)
    assert_labels_name_the_folders(test)


def write_cars(path, images, classes, field="relative_im_path", names=True):
    rows = np.zeros(len(images), dtype=[(field, object), ("class", object), ("test", object)])
    for i, (image, c) in enumerate(zip(images, classes)):
        rows[i] = (image, c, i % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = {"class_names": np.array([f"Car {c}" for c in range(1, 5)], dtype=object)}
    scipy.io.savemat(path, {"annotations": rows.reshape(1, -1), **(extra if names else {})})


def make_old_cars(root):
    images = [f"car_ims/{i:06d}.jpg" for i in range(1, 9)]
    for image in images:
        picture(root / image)
    write_cars(root / "cars_annos.mat", images, [1, 1, 2, 2, 3, 3, 4, 4])


def test_cars_in_the_older_layout(tmp_path):
    make_old_cars(tmp_path)
    with pytest.warns(UserWarning, match="8054 and 8131"):
        train, test = data.load("cars196", tmp_path)
    assert train.class_names == ["Car 1", "Car 2"] and train.labels.tolist() == [0, 0, 1, 1]
    assert [p.name for p in test.images] == [f"{i:06d}.jpg" for i in (5, 6, 7, 8)] and test.labels.tolist() == [0, 0, 1, 1]


def make_new_cars(root):
    base = root / "stanford_cars"
    for part in ("train", "test"):
        for i in range(1, 5):
            picture(base / f"cars_{part}" / f"{i:05d}.jpg")
    fnames = [f"{i:05d}.jpg" for i in range(1, 5)]
    write_cars(base / "devkit/cars_train_annos.mat", fnames, [1, 2, 3, 4], "fname", names=False)
    write_cars(base / "cars_test_annos_withlabels.mat", fnames, [4, 3, 2, 1], "fname", names=False)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([f"Car {c}" for c in range(1, 5)], dtype=object)})
    return base


def test_cars_in_the_newer_layout_splits_by_class_not_by_the_authors_halves(tmp_path):
    base = make_new_cars(tmp_path)
    with pytest.warns(UserWarning, match="subset"):
        train, test = data.load("cars196", tmp_path)
    assert train.images == [base / "cars_train/00001.jpg", base / "cars_train/00002.jpg",
                            base / "cars_test/00003.jpg", base / "cars_test/00004.jpg"]
    assert train.labels.tolist() == [0, 1, 1, 0] and test.class_names == ["Car 3", "Car 4"]


def test_cars_without_the_test_labels_says_which_file_to_bring(tmp_path):
    base = make_new_cars(tmp_path)
    (base / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(UserError, match="cars_test_annos_withlabels.mat is missing"):
        data.load("cars196", tmp_path)


def test_cars_archives_that_a_user_brings_are_both_checked_and_unpacked_once(tmp_path, monkeypatch):
    make_old_cars(tmp_path)
    with tarfile.open(tmp_path / "car_ims.tgz", "w:gz") as archive:
        archive.add(tmp_path / "car_ims", "car_ims")
    shutil.rmtree(tmp_path / "car_ims")
    with pytest.raises(UserError, match="car_ims.tgz has the MD5 digest .* instead of d5c8f0aa497503f355e17dc7886c3f14"):
        data.load("cars196", tmp_path)
    checked = []
    monkeypatch.setattr(data, "check_md5", lambda path, md5: checked.append((path.name, md5)))
    for _ in range(2):
        with pytest.warns(UserWarning, match="subset"):
            assert len(data.load("cars196", tmp_path)[0].images) == 4
    assert checked == [("car_ims.tgz", "d5c8f0aa497503f355e17dc7886c3f14"), ("cars_annos.mat", "b407c6086d669747186bd1d764ff9dbc")]


def test_missing_cars_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=r"put there either car_ims.tgz and cars_annos.mat"):
        data.load("cars196", tmp_path)


def test_sop_uses_its_own_lists(tmp_path):
    base = tmp_path / "Stanford_Online_Products"
    for name, first in (("train", 1), ("test", 3)):
        rows = [(first * 10 + i, first + i // 2, 1, f"bike_final/{first + i // 2}_{i}.JPG") for i in range(4)]
        for row in rows:
            picture(base / row[3], format="JPEG")
        text = "image_id class_id super_class_id path\n" + "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (base / f"Ebay_{name}.txt").write_text(text)
    with pytest.warns(UserWarning, match="59551 and 60502"):
        train, test = data.load("sop", tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert train.class_names == ["1", "2"] and test.class_names == ["3", "4"]


def test_folder_takes_one_class_per_sub_folder_and_skips_empty_ones(tmp_path):
    for name in "badc":
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning, match="empty holds no image"):
        train, test = data.load("folder", tmp_path)
    assert train.class_names == ["a", "b"] and test.class_names == ["c", "d"]
    assert_labels_name_the_folders(train)
    assert_labels_name_the_folders(test)


def test_pictures_of_any_folder_have_its_sub_folders_as_classes_and_hidden_ones_are_left_out(tmp_path):
    shown = ["0.png", "a/1.png", "a/deep/2.jpg", "a-b/0.PNG", "c.png"]
    for name in [*shown, ".hidden.png", "a/.1.png", ".cache/a.png", "a/.cache/a.png"]:
        picture(tmp_path / name, format="PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    split = data.load_pictures(tmp_path)
    assert split.images == sorted(tmp_path / name for name in shown) and split.class_names == ["", "a", "a-b"]
    assert [split.class_names[label] for label in split.labels] == [
        path.relative_to(tmp_path).parts[0] if path.parent != tmp_path else "" for path in split.images]
    single = data.load_pictures(str(tmp_path / "a" / "deep"))
    assert single.class_names == [""] and single.labels.tolist() == [0]
    for folder in (tmp_path / "none", tmp_path / "0.png", tmp_path / "a/.cache/none"):
        with pytest.raises(UserError, match=f"{folder} is no folder, or there is no image below it"):
            data.load_pictures(folder)


def test_a_class_with_one_training_image_is_used_with_a_warning(tmp_path):
    for name, count in (("a", 1), ("b", 3), ("c", 2), ("d", 2)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png")
    with pytest.warns(UserWarning, match="1 training class.* one image"):
        train, _ = data.load("folder", tmp_path)
    indices = [[i for i, _ in batch] for batch in data.ClassBatches(train.labels, 4)]
    assert len(indices) == 2 and all(sorted(train.labels[batch].tolist()) == [0, 0, 1, 1] for batch in indices)
    assert all(batch.count(0) == 2 for batch in indices)


@pytest.mark.parametrize("make, message", [
    (lambda root: root.rmdir(), "is no folder"), (lambda root: root.rmdir() or root.touch(), "is no folder"),
    (lambda root: None, "no image below it"),
    (lambda root: picture(root / "loose.png"), "photos holds 0 class.*: give the folder that holds a sub-folder for each class"),
    (lambda root: picture(root / "one" / "a.png"), "photos holds 1 class.*, but training and test need at least one each"),
])
def test_bad_folders_are_named(tmp_path, make, message):
    root = tmp_path / "photos"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=message) as caught:
        data.load("folder", root)
    assert str(root) in str(caught.value)


def test_listed_but_missing_images_are_named(tmp_path):
    make_cub(tmp_path)
    next((tmp_path / "CUB_200_2011/images").rglob("100.jpg")).unlink()
    with pytest.raises(UserError, match="1 listed images are missing, the first is .*100.jpg"):
        data.load("cub200", tmp_path)


def test_a_table_of_the_wrong_shape_is_named(tmp_path):
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1\n")
    with pytest.raises(UserError, match="image_class_labels.txt is empty or does not have 2 columns"):
        data.load("cub200", tmp_path)


def test_a_folder_that_is_no_cub_is_not_overwritten(tmp_path):
    (tmp_path / "CUB_200_2011").mkdir()
    with pytest.raises(UserError, match="CUB_200_2011 holds no images.txt: delete the folder"):
        data.load("cub200", tmp_path)


def test_an_image_without_a_class_is_named(tmp_path):
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(UserError, match="no class for the id '100'"):
        data.load("cub200", tmp_path)


def test_an_unreadable_annotation_file_is_named(tmp_path):
    make_old_cars(tmp_path)
    (tmp_path / "cars_annos.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cars_annos.mat is not a readable"):
        data.load("cars196", tmp_path)


@needs_real
def test_real_birds_are_read():
    with pytest.warns(UserWarning, match="282 training and 261 test"):
        train, test = data.load("cub200", REAL)
    assert len(train.class_names) == len(test.class_names) == 5
    assert_labels_name_the_folders(train)
    assert_labels_name_the_folders(test)
    image, label = data.Images(test, data.test_transform(224, "photo"))[0]
    assert image.shape == (3, 224, 224) and image.dtype == torch.uint8 and label == 0 and 20 < image.float().std() < 100


@needs_real
def test_real_cars_annotations_in_both_layouts_agree():
    with pytest.warns(UserWarning, match="4052 training and 4092 test"):
        train, test = data.load("cars196", REAL)
    assert len(train.class_names) == 98 and train.class_names[0] == "AM General Hummer SUV 2000"
    rows = data.read_mat(REAL / "stanford_cars/devkit/cars_train_annos.mat", "annotations", "fname", "class")
    names = [str(name) for name in data.read_mat(REAL / "stanford_cars/devkit/cars_meta.mat", "class_names")]
    assert len(rows) == 8144 and rows[0] == ("00001.jpg", 14) and names[:98] == train.class_names
    counts = np.bincount([c for _, c in rows], minlength=197)[1:]
    assert counts[:98].tolist() == torch.bincount(train.labels).tolist()
    assert counts[98:].tolist() == torch.bincount(test.labels).tolist()


def test_hidden_class_folders_are_left_out_and_a_folder_named_as_a_picture_is_none(tmp_path):
    for name in (".thumbnails/0.png", "a/0.png", "a/1.png", "b/0.png"):
        picture(tmp_path / name)
    (tmp_path / "a/album.png").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        train, test = data.load("folder", tmp_path)
    assert (train.class_names, test.class_names, len(train.images)) == (["a"], ["b"], 2)
    assert not [warning for warning in caught if ".thumbnails" in str(warning.message)]          # nor does it "hold no image"


def test_folders_and_archives_in_the_other_documented_places(tmp_path):
    make_cub(tmp_path)
    with pytest.warns(UserWarning, match="subset"):
        assert len(data.load("cub200", tmp_path / "CUB_200_2011")[0].images) == 6                  # the root itself
    (tmp_path / "CUB_200_2011/images.txt").write_text("100 001.Bird 0/100.jpg\n")
    with pytest.warns(UserWarning, match="subset"), pytest.raises(UserError, match="holds no test images of cub200"):
        data.load("cub200", tmp_path)


# ------------------------------------------------------------------------------------------------------ downloads

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; understands Range; cuts the connection after `cut` bytes."""
    files, cut, requests = {}, None, []

    def do_GET(self):
        content = self.files[self.path]
        self.requests.append(self.headers.get("Range"))
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"]).group(1)) if self.headers.get("Range") else 0
        if start >= len(content) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.files, Handler.cut, Handler.requests = {}, None, []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def tgz(root):
    make_cub(root)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(root / "CUB_200_2011", "CUB_200_2011")
    return buffer.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cub(server, tmp_path, monkeypatch):
    """CUB200's archive on the local server, and what data.load does with it."""
    content = tgz(tmp_path / "source")
    Handler.files["/CUB_200_2011.tgz"] = content
    monkeypatch.setattr(data, "CUB_URL", server + "/CUB_200_2011.tgz")
    real_fetch = data.fetch
    monkeypatch.setattr(data, "fetch", lambda root, url, _, folder: real_fetch(root, url, md5(content), folder))
    return content


def load_cub(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.load("cub200", root)


def test_a_missing_data_set_downloads_itself_once(cub, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    assert len(load_cub(root)[0].images) == 6
    assert len(load_cub(root)[0].images) == 6 and len(Handler.requests) == 1
    assert sorted(p.name for p in root.iterdir()) == ["CUB_200_2011", "CUB_200_2011.tgz"]


def test_a_cut_download_is_resumed_where_it_stopped(cub, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    Handler.cut = len(cub) // 2
    with pytest.raises(UserError, match="was cut .* run again to go on"):
        load_cub(root)
    assert not (root / "CUB_200_2011").exists() and not (root / "CUB_200_2011.tgz").exists()
    Handler.cut = None
    assert len(load_cub(root)[0].images) == 6
    assert Handler.requests == [None, f"bytes={len(cub) // 2}-"]


def test_a_download_complete_but_for_its_name_is_used(cub, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "CUB_200_2011.tgz.part").write_bytes(cub)
    assert len(load_cub(root)[0].images) == 6


def test_a_wrong_digest_is_refused_until_the_file_is_deleted(server, tmp_path):
    Handler.files["/a.tgz"] = b"something else"
    for _ in range(2):
        with pytest.raises(UserError, match="a.tgz has the MD5 digest .*: delete and fetch it again"):
            data.fetch(tmp_path, server + "/a.tgz", "0" * 32, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_no_network_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="http://127.0.0.1:9/a.tgz failed .*by hand"):
        data.fetch(tmp_path, "http://127.0.0.1:9/a.tgz", "0" * 32, "a")


def test_no_disk_space_is_said_before_the_download(cub, tmp_path, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="make room"):
        load_cub(root)


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="the disk is full: make room and run again"):
        with data.clear_errors("writing x", "never mind"):
            raise OSError(28, "No space left on device")


def test_a_half_unpacked_archive_is_not_taken_for_complete(tmp_path):
    content = tgz(tmp_path / "source")
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.tgz").write_bytes(content[:len(content) - 200])
    with pytest.raises(UserError, match="not a readable archive"):
        data.unpack(root / "a.tgz", root, "CUB_200_2011")
    assert not (root / "CUB_200_2011").exists()
    (root / "a.tgz").write_bytes(content)
    data.unpack(root / "a.tgz", root, "CUB_200_2011")
    assert sorted(p.name for p in root.iterdir()) == ["CUB_200_2011", "a.tgz"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_cannot_escape_its_folder(tmp_path, kind):
    root = tmp_path / "inner"
    root.mkdir()
    if kind == "tar":
        with tarfile.open(root / "a", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("../../escaped"), io.BytesIO())
    else:
        with zipfile.ZipFile(root / "a", "w") as archive:
            archive.writestr("../../escaped", "")
    with pytest.raises(UserError, match="unpacking .*a failed" if kind == "zip" else "not a readable archive .*escaped"):
        data.unpack(root / "a", root, "a")
    assert not [path for path in tmp_path.rglob("escaped") if path.parent != root / ".unpacking-a"]


def test_zip_archives_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("Stanford_Online_Products/Ebay_train.txt", "text")
    data.unpack(tmp_path / "a.zip", tmp_path, "Stanford_Online_Products")
    assert (tmp_path / "Stanford_Online_Products/Ebay_train.txt").read_text() == "text"


def test_a_download_makes_its_folder_and_starts_anew_where_nothing_can_be_resumed(tmp_path):
    content = tgz(tmp_path / "source")
    (tmp_path / "a.tgz").write_bytes(content)
    new = tmp_path / "new/data"
    with pytest.raises(UserError, match="new/data/a.tgz has the MD5 digest"):
        data.fetch(new, (tmp_path / "a.tgz").as_uri(), "0" * 32, "CUB_200_2011")
    (new / "a.tgz").unlink()
    (new / "a.tgz.part").write_bytes(b"half a file")
    data.fetch(new, (tmp_path / "a.tgz").as_uri(), hashlib.md5(content).hexdigest(), "CUB_200_2011")
    assert (new / "CUB_200_2011/images.txt").exists()
    with pytest.raises(UserError, match="a.tgz has the MD5 digest"):                         # also one that was put there
        data.fetch(new, "file:///none/a.tgz", "0" * 32, "CUB_200_2011")


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
    with pytest.raises(UserError, match="unpacking .*a failed"):
        data.unpack(tmp_path / "a", tmp_path, "b")
    assert not Path("/tmp/escaped-absolutely").exists()
    (tmp_path / "big").write_bytes(bytes(1000))
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1500})())
    with pytest.raises(UserError, match="make room"):                                     # the archive and its contents
        data.download((tmp_path / "big").as_uri(), tmp_path / "part")


# ------------------------------------------------------------------------------------------------- toy characters

def test_toy_has_the_promised_shape_and_is_deterministic():
    train, test = data.load("toy", None)
    again, _ = data.load("toy", None)
    for split in (train, test):
        assert torch.bincount(split.labels).tolist() == [20] * 100 and len(set(split.class_names)) == 100
        assert 0 <= split.ambiguity.min() < 0.05 and 0.95 < split.ambiguity.max() <= 1
    assert not set(train.class_names) & set(test.class_names)
    assert all(np.array_equal(a, b) for a, b in zip(train.images, again.images))
    assert train.images[0].shape == (32, 32) and train.images[0].dtype == np.uint8


def test_toy_ambiguity_takes_sharpness_and_ink_away():
    for split in data.load("toy", None):
        ink = 255.0 - np.stack(split.images)
        clear, unclear = split.ambiguity.numpy() < 0.2, split.ambiguity.numpy() > 0.8
        assert ink[unclear].max((1, 2)).mean() < 0.7 * ink[clear].max((1, 2)).mean()
        assert ink[unclear].sum((1, 2)).mean() < ink[clear].sum((1, 2)).mean()


def test_toy_classes_are_non_isotropic_each_in_its_own_way():
    """The amount of ink varies mostly with thickness: in a third of the classes far more than in the others."""
    train, _ = data.load("toy", None)
    dark = (255.0 - np.stack(train.images)).sum((1, 2))
    clear = train.ambiguity.numpy() < 0.6
    spread = np.sort([np.log(dark[clear & (train.labels.numpy() == c)]).std() for c in range(100)])
    assert spread[70:].mean() > 2 * spread[:50].mean()


# --------------------------------------------------------------------------------------------- images and batches

@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("1", "a.png"), ("P", "a.gif"), ("RGBA", "a.png"), ("CMYK", "a.jpg")])
def test_every_colour_mode_becomes_rgb(tmp_path, mode, name):
    path = picture(tmp_path / name, (255, 255, 255), mode=mode)
    for source in (path, str(path), Image.open(path)):
        image = data.read_image(source)
        assert image.mode == "RGB" and np.asarray(image).min() > 250


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match="bad.jpg is not a readable image"):
        data.read_image(tmp_path / "bad.jpg")


def test_a_truncated_image_is_named(tmp_path):
    path = picture(tmp_path / "cut.jpg", size=(300, 300))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="cut.jpg is not a readable image"):
        data.read_image(path)


TRANSFORMS = [(kind, size, augment, getattr(data, f"{kind}_transform")(size, augment))
              for kind in ("train", "test") for size in (16, 64, 224, 448) for augment in ("photo", "light")]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_at_the_scale_needed(tmp_path, mode):
    path = tmp_path / "large.jpg"
    gradient = np.add.outer(np.arange(300), np.arange(400)) * 255 // 700
    Image.fromarray(gradient.astype(np.uint8)).resize((4000, 3000)).convert(mode).save(path)
    assert data.read_image(path).size == (4000, 3000)
    for transform, size in ((data.train_transform(224, "photo"), (2000, 1500)), (data.test_transform(224, "photo"), (500, 375)),
                            (data.train_transform(224, "light"), (500, 375)), (lambda image: image, (4000, 3000))):
        image = data.read_image(path, transform)
        assert (image.mode, image.size) == ("RGB", size)
    images = data.Images(data.Split([path], torch.zeros(1), ["a"]), data.test_transform(224, "photo"))
    whole = images.transform(data.read_image(path))
    assert images[0][0].shape == whole.shape and (images[0][0].float() - whole.float()).abs().max() <= 3


@pytest.mark.parametrize("kind, size, augment, transform", TRANSFORMS)
def test_nothing_is_enlarged_for_having_been_reduced(kind, size, augment, transform):
    first, seen = transform.transforms[0], set()
    area, ratio = (0.08, 3 / 4) if augment == "photo" else (0.6, 0.8)
    sizes = [(1024, 1023), (1024, 1024), (1280, 853), (3456, 4608), (4000, 3000), (8000, 6000), (12000, 500), (700, 40000)]
    sizes += np.random.default_rng(0).integers(200, 9000, (60, 2)).tolist()
    for width, height in sizes:
        scale = data.reduction(transform, width, height)
        reduced = math.ceil(width / scale), math.ceil(height / scale)                       # what PIL makes of a JPEG
        seen.add(scale)
        if kind == "test":
            needed, narrowest, found = first.size, min(width, height), min(reduced)
        else:
            needed, narrowest = size, min(width, height, (area * ratio * width * height) ** 0.5)
            torch.manual_seed(0)
            crops = [first.get_params(Image.new("1", reduced), first.scale, first.ratio)[2:] for _ in range(30)]
            found = min(min(crop) for crop in crops)
        assert scale == 1 or found >= needed
        assert scale in (1, 2, 4, 8) and (scale == 1 or scale * needed <= narrowest)
        assert scale == 8 or width * height < 2 ** 20 or 2 * scale * needed > narrowest            # and no smaller
    assert len(seen) > 1


@pytest.mark.parametrize("name, size", [("a.jpg", (500, 375)), ("a.jpg", (375, 500)), ("a.jpg", (500, 500)), ("a.jpg", (231, 167)),
                                        ("a.png", (500, 375)), ("a.png", (1300, 1100))])
def test_pictures_as_small_as_cubs_and_other_formats_decode_as_ever_to_the_bit(tmp_path, name, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    expected = Image.open(tmp_path / name).convert("RGB")
    for *_, transform in TRANSFORMS:
        assert np.array_equal(data.read_image(tmp_path / name, transform), expected)
    images = data.Images(data.Split([tmp_path / name], torch.zeros(1), ["a"]), data.train_transform(224, "photo"))
    torch.manual_seed(5)
    assert torch.equal(images.transform(expected), images[0, 5][0])


def test_photo_transforms_are_the_papers():
    text = str(data.train_transform(224, "photo")) + str(data.test_transform(224, "photo"))
    for part in ("RandomResizedCrop(size=(224, 224), scale=(0.08, 1.0)", "RandomHorizontalFlip(p=0.5)",
                 "Resize(size=256", "CenterCrop(size=(224, 224))"):
        assert part in text


def test_augmentation_follows_the_seed_and_leaves_the_global_generator_alone():
    train, _ = data.load("toy", None)
    images = data.Images(train, data.train_transform(32, "light"))
    torch.manual_seed(5)
    a = images[0, 11][0]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.rand(3)
    assert torch.equal(a, images[0, 11][0]) and not torch.equal(a, images[0, 12][0])


LABELS = torch.tensor([0] * 7 + [1] * 4 + [2] * 1 + [3] * 9 + [4] * 6 + [5] * 5)


def test_an_epoch_sees_every_image_in_batches_of_two_per_class():
    batches = data.ClassBatches(LABELS, 6, seed=3)
    for batches.epoch in range(20):
        indices = [[i for i, _ in batch] for batch in batches]
        assert len(indices) == len(batches)
        assert {i for batch in indices for i in batch} == set(range(len(LABELS)))
        for batch in indices:
            labels = LABELS[batch]
            assert len(batch) == 6 and torch.equal(labels[::2], labels[1::2]) and len(labels.unique()) == 3
            assert all(a != b or LABELS[a] == 2 for a, b in zip(batch[::2], batch[1::2]))    # two different images


def test_batches_follow_from_seed_and_epoch_alone():
    def epoch_of(seed, epoch):
        batches = data.ClassBatches(LABELS, 6, seed=seed)
        batches.epoch = epoch
        return list(batches)
    assert epoch_of(1, 4) == epoch_of(1, 4)
    assert epoch_of(1, 4) != epoch_of(1, 5) and epoch_of(1, 4) != epoch_of(2, 4)


def test_a_class_larger_than_all_others_does_not_stretch_the_epoch():
    labels = torch.tensor([0] * 100 + [1] * 4 + [2] * 4)
    batches = data.ClassBatches(labels, 4)
    indices = [[i for i, _ in batch] for batch in batches]
    assert len(indices) == 27 and {i for batch in indices for i in batch} >= set(range(100, 108))
    assert all(len(labels[batch].unique()) == 2 for batch in indices)
    seen = set()
    for batches.epoch in range(30):
        seen |= {i for batch in batches for i, _ in batch}
    assert seen == set(range(108))


def test_few_large_classes_give_several_pairs_to_a_batch():
    labels = torch.tensor([0] * 57 + [1] * 60 + [2] * 52)
    with pytest.warns(UserWarning, match="3 training classes cannot fill a batch of 16 .* up to 6 of a class"):
        batches = data.ClassBatches(labels, 16)
    for batches.epoch in range(5):
        indices = [[i for i, _ in batch] for batch in batches]
        assert len(indices) == len(batches) == 11 and {i for batch in indices for i in batch} == set(range(169))
        assert all(sorted(torch.bincount(labels[batch]).tolist()) == [4, 6, 6] for batch in indices)
        assert all(len(set(batch)) >= 15 for batch in indices)


@pytest.mark.parametrize("size, message", [(5, "--batch_size 5 is not a multiple of 2.*try 4"), (1, "try 2"),
                                           (14, "14 is more than 32 images of 6 training classes allow: use at most 12")])
def test_batch_sizes_that_do_not_fit_are_named(size, message):
    with pytest.raises(UserError, match=message):
        data.ClassBatches(LABELS, size)


def test_held_out_classes_are_disjoint_and_the_test_classes_untouched():
    train, _ = data.load("toy", None)
    rest, held = data.hold_out(train, 0.2)
    assert rest.class_names + held.class_names == train.class_names and len(held.class_names) == 20
    assert held.labels.min() == 0 and held.labels.max() == 19 and len(held.images) == 400
    assert torch.equal(torch.cat([rest.ambiguity, held.ambiguity]), train.ambiguity)
    with pytest.raises(UserError, match="--val_fraction 0.99 leaves 1 of 100"):
        data.hold_out(train, 0.99)


def test_corruption_is_known_repeatable_and_grows_with_its_amount():
    train, _ = data.load("toy", None)
    spoiled = data.corrupted(train, seed=1)
    assert torch.equal(spoiled.corruption, data.corrupted(train, seed=1).corruption)
    torch.testing.assert_close(1 - spoiled.ambiguity, (1 - spoiled.corruption) * (1 - train.ambiguity))
    transform = data.test_transform(32, "light")
    clean, noisy = data.Images(train, transform), data.Images(spoiled, transform)
    assert torch.equal(noisy[3][0], noisy[3][0])
    held = data.hold_out(spoiled, 0.2)[1]
    assert torch.equal(data.Images(held, transform).split.corruption, spoiled.corruption[-400:])
    mean = (255 * torch.tensor(data.MEAN)).round().view(3, 1, 1)
    image = torch.full((3, 400, 400), 128, dtype=torch.uint8)
    for amount in (0.3, 0.6, 1.0):
        result = data.corrupt(image, amount, seed=0)
        square = (result == mean).all(0)                     # the noise alone hardly ever hits the mean colour
        assert result.dtype == torch.uint8 and square.float().mean().item() == pytest.approx(amount / 2, abs=0.01)
        noise = (result[:, ~square].float() - 128) / (255 * torch.tensor(data.DEVIATION).view(3, 1))
        inside = noise.abs() < 1.5                           # what cannot have been clipped at 0 or 255
        expected = scipy.stats.truncnorm(-1.5 / amount, 1.5 / amount, scale=amount).std()
        assert noise[inside].std().item() == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(data.corrupt(image, 0.0, seed=0), image)
    bright = data.corrupt(torch.full_like(image, 250), 1.0, seed=0)
    assert 0.2 < (bright == 255).float().mean() < 0.26       # clipped, not wrapped around: 46 % of the unerased half
    assert clean[3][0].shape == noisy[3][0].shape


def test_an_image_has_its_own_noise_the_same_in_every_epoch():
    split = data.Split([np.full((32, 32), 128, np.uint8)] * 2, torch.tensor([0, 0]), ["a"], corruption=torch.tensor([0.5, 0.5]))
    images = data.Images(split, data.test_transform(32, "light"))
    assert (images[0][0] != 128).float().mean() > 0.5 and not torch.equal(images[0][0], images[1][0])
    assert torch.equal(images[0][0], images[0, 99][0])


def test_test_images_have_the_papers_ratio_at_any_size_and_light_ones_are_whole():
    assert data.test_transform(448, "photo").transforms[0].size == 512 and data.test_transform(112, "photo").transforms[0].size == 128
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert torch.equal(data.test_transform(32, "light")(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert "Flip" not in str(data.train_transform(32, "light"))                                # drawings survive no mirror


def test_papers_report_stanford_online_products_at_1_10_100_1000():
    assert data.usual_ks("sop") == (1, 10, 100, 1000) and data.usual_ks("cub200") == (1, 2, 4, 8)


def test_a_run_holds_out_the_fraction_of_its_classes_that_it_names():
    args = argparse.Namespace(dataset="toy", data_root=None, corrupt=False, val_fraction=0.2)
    assert [len(split.class_names) for split in data.load_splits(args)] == [80, 20, 100]


def test_two_classes_at_least_are_held_out():
    rest, held = data.hold_out(data.load("toy", None)[0], 0.001)
    assert (len(rest.class_names), len(held.class_names)) == (98, 2)          # one alone: Recall@1 is always 100 %


def test_classes_are_drawn_in_proportion_to_what_they_have_left():
    batches = data.ClassBatches(torch.tensor([0] * 40 + [c for c in range(1, 41) for _ in range(2)]), 4)
    first = 0
    for batches.epoch in range(200):
        first += any(i < 40 for i, _ in next(iter(batches)))
    assert first / 200 == pytest.approx(1 / 3 + 2 / 3 * 20 / 59, abs=0.15)               # two draws of 60 groups, 20 of them its
