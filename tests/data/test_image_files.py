"""Folders of images as people have them, and as nobody should hand them over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_cli.data import image_files
from dfkd_cli.data.datasets import load
from dfkd_cli.data.sources import FolderSource
from dfkd_cli.errors import ArtifactError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import save_model
from dfkd_cli.models.registry import build

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n(victim) (w) file closefile showpage\n"


def write(path: Path, pixels: np.ndarray | int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 8), pixels) if isinstance(pixels, int) else pixels
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)
    return path


def every(folder: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    return FolderSource(folder, shape).all().pixels


@pytest.fixture
def photos(tmp_path) -> Path:
    for number, label in enumerate(("cat", "dog")):
        for image in range(3):
            write(tmp_path / "photos" / label / f"{image}.png", 100 * number + image)
    return tmp_path / "photos"


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, suffix, orientation):
    """As a camera writes them: turned, with a note of how to turn them back."""
    upright = np.zeros((32, 48), dtype=np.uint8)
    upright[:16, :16], upright[16:, 32:] = 255, 128
    turn = [
        lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, np.transpose,
        lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2).T, lambda a: np.rot90(a, 3),
    ][orientation - 1]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "train" / "a" / f"0.{suffix}", np.ascontiguousarray(turn(upright)), exif=exif)
    dataset = load(str(tmp_path), "train", image_shape=(1, 32, 48))
    assert (dataset.images(torch.tensor([0]))[0, 0].int() - torch.from_numpy(upright).int()).abs().max() <= 8
    assert load(str(tmp_path), "train").image_shape[1:] == (32, 48)


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(photos):
    for name in (".git", "__MACOSX", ".ipynb_checkpoints", "__pycache__", "@eaDir"):
        write(photos / name / "0.png")
        write(photos / "cat" / name / "0.png")
    (photos / "dog" / "._0.png").write_bytes(b"Mac OS X")
    assert load(str(photos), "test").classes == ("cat", "dog")
    assert len(load(str(photos), "test")) == len(every(photos, (1, 6, 8))) == 6


def test_links_lead_to_every_folder_once(photos, tmp_path):
    for place, target in (("cat/up", ".."), ("cat/self", "self"), ("dog/cat", "../cat"), ("cat/dog", "../dog")):
        (photos / place).symlink_to(target)
    write(tmp_path / "elsewhere" / "0.png", 7)
    (photos / "emu").symlink_to(tmp_path / "elsewhere")
    dataset = load(str(photos), "test")
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.labels.bincount().tolist() == [6, 6, 1], "what is linked into a folder is of its class"
    assert len(every(photos, (1, 6, 8))) == 7


def test_pipes_sockets_and_devices_are_never_opened(photos, tmp_path, monkeypatch):
    os.mkfifo(photos / "cat" / "pipe.png")
    (photos / "cat" / "zero.png").symlink_to("/dev/zero")
    (photos / "dog" / "pipe.jpg").symlink_to(photos / "cat" / "pipe.png")
    monkeypatch.chdir(photos / "dog")
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind("socket.png")
        assert len(load(str(photos), "test")) == len(every(photos, (1, 6, 8))) == 6


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.png", EPS), ("a.jpg", b"GIF89a\1\0\1\0\0\0\0;"), ("a.png", b"hello"), ("a.tif", b""), ("a.gif", b"GIF89a")],
)
def test_only_the_named_formats_are_decoded(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("handed to Ghostscript"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        every(tmp_path, (3, 6, 8))
    assert caught.value.exit_code == 3
    assert all(word in caught.value.hint for word in image_files.FORMATS)


def test_damaged_files_are_read_or_refused(photos):
    good = write(photos / "cat" / "1.jpg", np.random.default_rng(0).integers(0, 256, (40, 40))).read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(200):
        bad = np.frombuffer(good, np.uint8).copy()
        bad[generator.integers(0, len(bad), 5)] = generator.integers(0, 256, 5)
        (photos / "cat" / "1.jpg").write_bytes(bad[: generator.integers(1, len(bad) + 1)])
        with contextlib.suppress(ArtifactError):
            load(str(photos), "test")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "RGBA"])
def test_four_channels_are_those_of_the_file(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(pixels) if mode == "RGBA" else Image.fromarray(pixels[:, :, 0]).convert("RGB").convert(mode)
    image.save(tmp_path / ("0.tif" if mode in ("CMYK", "YCbCr") else "0.png"))
    if "A" not in mode:
        with pytest.raises(ArtifactError, match=r"0\.\w+: .*no fourth channel"):
            every(tmp_path, (4, 6, 8))
        return
    (taken,) = every(tmp_path, (4, 6, 8))
    expected = pixels if mode == "RGBA" else np.dstack([*[pixels[:, :, 0]] * 3, np.full((6, 8), 255, np.uint8)])
    np.testing.assert_array_equal(taken.permute(1, 2, 0), expected)


@pytest.mark.parametrize("name", ["0.jfif", "0.JPE", "0.pnm"])
def test_less_common_names_of_the_formats_are_read(tmp_path, name):
    pixels = np.arange(48).reshape(6, 8) * 5
    write(tmp_path / name, pixels, format="PPM" if name.endswith("pnm") else "JPEG", quality=100)
    (taken,) = every(tmp_path, (1, 6, 8))
    assert (taken[0].int() - torch.from_numpy(pixels)).abs().max() <= 2


# -- what is left out --------------------------------------------------------------------------------------------------


def test_files_of_other_kinds_are_told_once(photos, caplog):
    for number in range(9):
        write(photos / ("cat", "dog")[number % 2] / "deep" / f"{number}.GIF")
    np.save(photos / "dog" / "0.npy", np.zeros((6, 8)))
    for name in (".hidden.gif", "labels.txt", "boxes.JSON", "t.csv", "README", "a.md", "a.xml", "a.yaml", "Thumbs.db"):
        (photos / "cat" / name).write_bytes(b"x")
    (photos / "dog" / "empty.gif").mkdir()
    assert len(every(photos, (1, 6, 8))) == 6
    assert [record.getMessage() for record in caplog.records] == [f"{photos}: left out: 9 files of .gif, 1 of .npy"]
    caplog.clear()
    assert len(load(str(photos), "test")) == 6  # of all classes together
    assert [record.getMessage() for record in caplog.records] == [f"{photos}: left out: 9 files of .gif, 1 of .npy"]


def test_nothing_is_told_where_nothing_is_left_out(photos, caplog):
    (photos / "cat" / "labels.txt").write_text("x")
    assert len(every(photos, (1, 6, 8))) == len(load(str(photos), "test")) == 6
    assert not caplog.records


def test_a_file_without_an_extension_is_one_of_another_kind(photos, caplog):
    (photos / "cat" / "0001").write_bytes((photos / "cat" / "0.png").read_bytes())
    assert len(every(photos, (1, 6, 8))) == 6
    assert f"{photos}: left out: 1 file of no extension" in caplog.text


def test_a_command_tells_what_it_leaves_out(teacher, tmp_path, cli):
    for number in range(3):
        write(tmp_path / "set" / f"{number}.png", np.zeros((32, 32)))
        write(tmp_path / "set" / f"{number}.gif", np.zeros((32, 32)))
    command = ["distill", "--teacher", teacher, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "student"]
    code, _, err = cli(*command, "--transfer-set", tmp_path / "set", "--dry-run")
    line = f"note: {tmp_path / 'set'}: left out: 3 files of .gif"
    assert (code, err.splitlines().count(line)) == (0, 1), err


# -- of which shape ----------------------------------------------------------------------------------------------------


def test_one_odd_file_does_not_decide_for_all(tmp_path):
    for number in range(9):
        write(tmp_path / "train" / "a" / f"{number}.png", np.zeros((6, 8, 3)))
    assert (load(str(tmp_path), "train").image_shape, load(str(tmp_path), "train").note) == ((3, 6, 8), "")
    write(tmp_path / "train" / "a" / "0.png", np.zeros((600, 800)))
    dataset = load(str(tmp_path), "train")
    assert dataset.image_shape == (3, 6, 8)
    assert "3 x 6 x 8" in dataset.note and "--input-size" in dataset.note
    assert load(str(tmp_path), "train", image_shape=(1, 4, 4)).note == ""


def test_train_teacher_says_what_was_taken(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for half in ("train", "test"):
        for label in "ab":
            write(tmp_path / "set" / half / label / "0.png", np.zeros((40, 40) if label == "a" else (32, 32, 3)))
            write(tmp_path / "set" / half / label / "1.png", np.zeros((32, 32, 3)))
    command = ("train-teacher", "--dataset", "set", "--steps", "1", "--batch-size", "2", "--model", "resnet8")
    code, _, err = cli(*command)
    assert (code, "3 x 32 x 32" in err) == (0, True), err
    for half in ("train", "test"):
        (tmp_path / "set" / half / "a").rename(tmp_path / half)
    code, _, err = cli(*command, "--out", "other")
    assert (code, "set: all images are of one class -- give each class a folder" in err) == (2, True), err


# -- where it lies -----------------------------------------------------------------------------------------------------


def test_test_images_alone_will_do(photos, tmp_path):
    """In test/, in val/, or with nothing around the classes; empty folders for training images change nothing."""
    expected = load(str(photos), "test")
    for half, empty in (("test", ()), ("val", ()), ("test", ("train",)), ("val", ("train/cat", "train/dog"))):
        root = tmp_path / half / str(len(empty))
        for folder in empty:
            (root / folder).mkdir(parents=True)
        root.mkdir(parents=True, exist_ok=True)
        (root / half).symlink_to(photos)
        dataset = load(str(root), "test")
        assert dataset.classes == expected.classes
        assert torch.equal(dataset.images(torch.arange(6)), expected.images(torch.arange(6)))
        with pytest.raises(ArtifactError, match=r"has no train/|no folders of classes|no image files of class cat"):
            load(str(root), "train")
    write(root / "test" / "0.png")  # without labels
    assert torch.equal(load(str(root), "test").images(torch.arange(6)), dataset.images(torch.arange(6)))
    with pytest.raises(ArtifactError, match="has no train/"):
        load(str(photos), "train")
    (tmp_path / "loose").mkdir()
    with pytest.raises(ArtifactError, match="no folders of classes"):
        load(str(tmp_path / "loose"), "test")


def test_a_model_of_four_channels_is_evaluated_on_test_images_alone(photos, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    for path in photos.rglob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    info = ModelInfo("resnet8", 2, (4, 32, 32), (0.5,) * 4, (0.5,) * 4, ("dog", "cat"))
    classifier = Classifier(build(info.spec, info.num_classes, info.input_size), info).eval()
    save_model(tmp_path / "model", classifier, metrics={}, provenance={})
    dataset = load(str(photos), "test", image_shape=info.input_size).labelled_for(info, "model")
    with torch.no_grad():
        answers = classifier(dataset.images(torch.arange(6)).float() / 255).argmax(1)
    code, out, err = cli("evaluate", "model", "--dataset", photos, "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["top1"] == float((answers == dataset.labels).double().mean())
    assert cli("compare", "model", "--dataset", photos)[0] == 0
    code, out, err = cli("evaluate", photos, "--teacher", "model", "--json")
    assert (code, json.loads(out)["results"][0]["count"]) == (0, 6), err
