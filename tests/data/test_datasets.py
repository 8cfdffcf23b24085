"""Datasets, and the seal that keeps data-free code away from them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from dfkd_cli.artifacts.files import digest, take_lock
from dfkd_cli.data import datasets
from dfkd_cli.data.batches import Batches
from dfkd_cli.data.datasets import DATASETS, class_balanced, load
from dfkd_cli.data.image_files import fingerprint
from dfkd_cli.data.seal import DataSealed, dataset_roots, sealed
from dfkd_cli.data.sources import RealSource
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import ModelInfo

REAL_DATA = Path(os.environ.get("DFKD_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_mnist = pytest.mark.skipif(not (REAL_DATA / "MNIST" / "raw").is_dir(), reason="MNIST is not on this machine")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No test sees the datasets of the machine unless it says so, and none reaches the network."""
    monkeypatch.delenv("DFKD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", offline)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def make_tree(root: Path, shape: tuple[int, ...] = (6, 8), train: int = 5, test: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for half, count in (("train", train), ("test", test)):
        for label in ("cat", "dog"):
            for number in range(count):
                write_image(root / half / label / f"{number}.png", rng.integers(0, 256, shape))
    return root


def everything(dataset: datasets.Dataset) -> torch.Tensor:
    return dataset.images(torch.arange(len(dataset)))


def contents(dataset: datasets.Dataset) -> dict[bytes, str]:
    """The class of each image."""
    labels = dataset.labels.tolist()
    return {
        image.numpy().tobytes(): dataset.classes[label]
        for image, label in zip(everything(dataset), labels, strict=True)
    }


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_and_always_the_same():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 32, 32)
    assert train.classes == tuple("0123456789")
    assert train.labels.dtype == torch.int64
    total = np.bincount(load_digits().target)
    assert np.all(np.abs(test.labels.bincount().numpy() - total * 360 / 1797) < 1)
    assert torch.equal(everything(load("digits", "test")), everything(test))


def test_digits_pixels_are_the_bundled_ones_enlarged():
    images = torch.cat([everything(load("digits", split)) for split in ("train", "test")])
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 32, 32)
    assert images.min() == 0 and images.max() == 255
    # An enlarged 8x8 grid averages back to about what it was; sorting makes the order of the split irrelevant.
    means = images.double().mean(dim=(1, 2, 3)).sort().values.numpy()
    expected = np.sort(load_digits().data.mean(axis=1)) * 255 / 16
    np.testing.assert_allclose(means, expected, atol=6)
    corner = images[:, 0, :2, :2].double().mean(dim=(1, 2)).sort().values.numpy()
    np.testing.assert_allclose(corner, np.sort(load_digits().images[:, 0, 0]) * 255 / 16, atol=0.51)


# -- torchvision's datasets --------------------------------------------------------------------------------------------


@needs_mnist
def test_mnist_is_padded(monkeypatch):
    monkeypatch.setenv("DFKD_DATA", str(REAL_DATA))
    test = load("mnist", "test", download=False)
    raw = torchvision.datasets.MNIST(REAL_DATA, train=False)
    assert len(test) == 10_000 and test.image_shape == (1, 32, 32)
    assert torch.equal(test.labels, raw.targets)
    some = torch.tensor([3, 9_999])
    images = test.images(some)
    assert torch.equal(images[:, 0, 2:30, 2:30], raw.data[some])
    assert images.sum() == raw.data[some].sum()
    original = load("mnist", "test", data_dir=str(REAL_DATA), image_shape=(1, 28, 28))
    assert torch.equal(original.images(some)[:, 0], raw.data[some])


@needs_mnist
def test_data_dir_comes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DFKD_DATA", str(REAL_DATA))
    tree = make_tree(tmp_path / "mine" / "mnist", (28, 28))
    found = load("mnist", "test", data_dir=str(tmp_path / "mine"))
    assert found.classes == ("cat", "dog") and found.image_shape == (1, 32, 32)
    files = (tree / "test").rglob("*.png")
    assert contents(found) == {np.pad(np.array(Image.open(file)), 2).tobytes(): file.parent.name for file in files}


def test_download_failure_is_one_line_with_a_way_out(tmp_path, capfd):
    with pytest.raises(ArtifactError) as caught:
        load("cifar10", "train", data_dir=str(tmp_path))
    assert caught.value.exit_code == 3
    assert "no network in tests" in caught.value.message and "\n" not in str(caught.value)
    assert str(tmp_path) in caught.value.hint and "DFKD_DATA" in caught.value.hint
    assert capfd.readouterr() == ("", "")


def test_no_download_when_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("downloaded"))
    with pytest.raises(ArtifactError, match="downloading is off"):
        load("mnist", "train", data_dir=str(tmp_path), download=False)


def test_who_waits_for_a_download_takes_what_it_has_brought(monkeypatch, tmp_path):
    waits, pause = threading.Event(), time.sleep

    def sleep(seconds: float) -> None:
        waits.set()
        pause(0.01)

    monkeypatch.setattr(datasets.time, "sleep", sleep)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with ThreadPoolExecutor() as pool, take_lock(tmp_path / ".mnist.lock"):
        loaded = pool.submit(load, "mnist", "test", data_dir=str(tmp_path))
        assert waits.wait(60)
        for half in ("train", "t10k"):
            (raw / f"{half}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 2, 28, 28) + bytes(2 * 28 * 28))
            (raw / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 2) + b"\x07\x03")
    assert loaded.result().labels.tolist() == [7, 3]


@pytest.mark.parametrize("kind", [b"\x08", b"\x0a"])  # of numbers, the second of no known one
def test_damaged_files_are_an_artifact_error(kind, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0" + kind + b"\x01\0\0\0\x09short")
    with pytest.raises(ArtifactError):
        load("mnist", "train", data_dir=str(tmp_path))


# -- directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "expected"), [((6, 8), (1, 6, 8)), ((6, 8, 3), (3, 6, 8))])
def test_directory_pixels_and_labels(tmp_path, shape, expected):
    root = make_tree(tmp_path, shape)
    train = load(str(root), "train")
    assert (len(train), train.image_shape, train.classes) == (10, expected, ("cat", "dog"))
    files = {
        np.array(Image.open(file)).reshape(6, 8, -1).transpose(2, 0, 1).tobytes(): file.parent.name
        for file in (root / "train").rglob("*.png")
    }
    assert contents(train) == files


@pytest.mark.parametrize("budget", [100, 1 << 30])
def test_classes_are_mixed_however_large_the_set(tmp_path, monkeypatch, budget):
    """On disk images lie class by class; in every stretch of a set that is too large for the memory there are all."""
    monkeypatch.setattr(datasets, "_MEMORY_BUDGET", budget)
    dataset = load(str(make_tree(tmp_path, train=100)), "train")
    source = RealSource(dataset, chunk=20)
    for images in Batches(source, 20, 0, torch.device("cpu"), memory=40 * source.bytes_per_image).steps(0, 10):
        assert set(images.true_labels.tolist()) == {0, 1}
    assert torch.equal(load(str(tmp_path), "train").labels, dataset.labels)


def test_lazy_decoding_gives_the_same_images(tmp_path, monkeypatch):
    root = make_tree(tmp_path, (6, 8, 3))
    in_memory = load(str(root), "train")
    monkeypatch.setattr(datasets, "_MEMORY_BUDGET", 100)
    lazy = load(str(root), "train")
    assert isinstance(in_memory.pixels, torch.Tensor) and isinstance(lazy.pixels, datasets.ImageFiles)
    indices = torch.tensor([7, 0, 0, 3])
    assert torch.equal(in_memory.images(indices), lazy.images(indices))
    assert in_memory.mean_std() == lazy.mean_std()


def test_labels_are_counted_as_the_model_counts_them(tmp_path):
    """A tree's classes are in the order of the alphabet; a model may have learned them in another."""
    dataset = load(str(make_tree(tmp_path)), "train")

    def model(*classes: str) -> ModelInfo:
        return ModelInfo("lenet5", len(classes), (1, 6, 8), (0.0,), (1.0,), classes)

    assert dataset.labelled_for(model("cat", "dog"), "m") is dataset
    assert dataset.labelled_for(replace(model("cat", "dog"), classes=None), "m") is dataset
    assert dataset.labelled_for(model("Katze", "Hund"), "m") is dataset
    other = dataset.labelled_for(model("dog", "cat"), "m")
    assert other.classes == ("dog", "cat")
    assert contents(other) == contents(dataset)
    assert other.labels.tolist() == (1 - dataset.labels).tolist()
    for classes, words in (
        (("bird", "cat"), "m has no classes dog"),
        (("cat", "dog", "emu"), "2 classes, m 3.* are cat, dog"),
    ):
        with pytest.raises(ArtifactError, match=words):
            dataset.labelled_for(model(*classes), "m")


def test_sixteen_bits_are_brought_to_eight(tmp_path):
    """As X-rays come; Pillow alone would make white of nearly all of it."""
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1394
    for half in ("train", "test"):
        (tmp_path / half / "a").mkdir(parents=True)
        Image.fromarray(deep).save(tmp_path / half / "a" / "0.png")
    dataset = load(str(tmp_path), "train")
    assert dataset.image_shape == (1, 6, 8)
    np.testing.assert_array_equal(everything(dataset)[0, 0], np.rint(deep / 257))
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "train" / "a" / "0.tiff")
    with pytest.raises(ArtifactError, match=r"0\.tiff: .* no known range"):
        load(str(tmp_path), "train")


@pytest.mark.parametrize("most", [4095, 65535])
def test_grey_maps_of_more_than_eight_bits_are_brought_to_eight(tmp_path, most):
    deep = np.arange(48).reshape(6, 8) * most // 47
    (tmp_path / "train" / "a").mkdir(parents=True)
    head = b"P5\n8 6\n%d\n" % most
    (tmp_path / "train" / "a" / "0.pgm").write_bytes(head + deep.astype(">u2").tobytes())
    found = everything(load(str(tmp_path), "train"))[0, 0].numpy()
    np.testing.assert_array_equal(found, np.rint(np.rint(deep / most * 65535) / 257))


def test_other_sizes_are_resized_and_cropped_in_the_centre(tmp_path):
    root = make_tree(tmp_path, (4, 4))
    wide = np.zeros((8, 24))
    wide[:, 6:18] = 200  # the centre square and what the resizing filter reads beside it
    write_image(root / "train" / "dog" / "9.png", wide)
    assert sum(bool((image == 200).all()) for image in everything(load(str(root), "train"))) == 1


def test_requested_shape(tmp_path):
    root = make_tree(tmp_path, (6, 6, 3))
    gray = everything(load(str(root), "train", image_shape=(1, 12, 12)))
    means = [np.array(Image.open(file).convert("L")).mean() for file in (root / "train").rglob("*.png")]
    np.testing.assert_allclose(sorted(gray.double().mean((1, 2, 3)).tolist()), sorted(means), atol=2)
    digits, rgb = load("digits", "test"), load("digits", "test", image_shape=(3, 16, 16))
    some = torch.arange(4)
    images = rgb.images(some)
    assert images.shape == (4, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])
    halves = torch.nn.functional.interpolate(
        digits.images(some).double(), size=(16, 16), mode="bilinear", antialias=True
    )
    assert (images[:, :1] - halves).abs().max() <= 1
    for channels in (2, 4):
        with pytest.raises(ArtifactError, match=f"1 or 3 channels, not {channels}"):
            load("digits", "test", image_shape=(channels, 32, 32))
    with pytest.raises(ArtifactError, match="1, 3 or 4 channels, not 2"):
        load(str(root), "test", image_shape=(2, 32, 32))


def corrupt(root: Path) -> None:
    path = root / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:50])


def drop_test(root: Path) -> None:
    (root / "test").rename(root / "holdout")


def empty_class(root: Path) -> None:
    (root / "test" / "bird").mkdir()
    write_image(root / "train" / "bird" / "0.png", np.zeros((6, 8)))


def other_classes(root: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "wolf")


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (corrupt, "train", "1.png"),
        (drop_test, "test", "has no test/"),
        (empty_class, "test", "bird"),
        (other_classes, "train", "dog, wolf"),
    ],
)
def test_bad_directories(tmp_path, damage, split, message):
    root = make_tree(tmp_path)
    damage(root)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(str(root), split)
    assert caught.value.exit_code == 3
    if damage is not other_classes:
        assert load(str(root), "test" if split == "train" else "train"), "only what is read has to be there"


# -- by which names the halves go --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("Training", "Testing"),
        ("Train", "Test"),
        ("train_set", "VAL"),
        ("train", "valid"),
        ("train", "validation"),
        ("TRAIN", "test"),
    ],
)
def test_halves_by_other_names(tmp_path, train, test):
    expected = make_tree(tmp_path / "plain")
    root = make_tree(tmp_path / "other")
    (root / "train").rename(root / train)
    (root / "test").rename(root / test)
    write_image(root / "single_prediction" / "0.png", np.zeros((6, 8)))  # as Kaggle's cats and dogs have beside
    assert {half: place.name for half, place in datasets.halves_of(root).items()} == {"train": train, "test": test}
    for split in ("train", "test"):
        dataset = load(str(root), split)
        assert dataset.classes == ("cat", "dog")
        assert contents(dataset) == contents(load(str(expected), split))
    (root / test / "cat").rename(tmp_path / "cat")
    with pytest.raises(ArtifactError, match=f"not in both {train}/ and {test}/: cat"):
        load(str(root), "train")


def test_a_single_half_by_another_name(tmp_path):
    expected = make_tree(tmp_path / "plain")
    root = make_tree(tmp_path / "other")
    (root / "train").rename(root / "Training")
    (root / "test").rename(tmp_path / "test")
    assert contents(load(str(root), "train")) == contents(load(str(expected), "train"))
    with pytest.raises(ArtifactError, match="has no test/"):
        load(str(root), "test")


def test_plain_names_come_first(tmp_path):
    """What was read before other names were known is read still, and has the same hash."""
    root = make_tree(tmp_path / "pets")
    (before,) = datasets.contents(str(root))
    files = sorted(str(path) for half in ("train", "test") for path in (root / half).rglob("*.png"))
    assert before["sha256"] == digest([[os.path.relpath(file, root), *fingerprint(file)] for file in files])
    for extra in ("valid", "Testing", "Train", "training_set"):
        write_image(root / extra / "emu" / "0.png", np.zeros((6, 8)))
    assert {place.name for place in datasets.halves_of(root).values()} == {"train", "test"}
    assert datasets.contents(str(root))[0]["sha256"] == before["sha256"]
    (root / "test").rename(root / "val")
    assert datasets.halves_of(root)["test"].name == "val"


@pytest.mark.parametrize(
    "folders", [("Train", "Car"), ("valid", "invalid"), ("Test/mouse-1", "Test/mouse-2", "Control/mouse-3")]
)
def test_classes_may_be_called_like_a_half(tmp_path, folders):
    for number, folder in enumerate(folders):
        write_image(tmp_path / folder / "0.png", np.full((6, 8), number))
    assert load(str(tmp_path), "test").classes == tuple(sorted({folder.partition("/")[0] for folder in folders}))


@pytest.mark.parametrize(
    ("halves", "split", "words"),
    [
        (
            ("fold1", "fold2"),
            "test",
            r"no images in fold1, fold2, but in the same folders of each: cat, dog -- .*fold1",
        ),
        (("train/images", "test/images"), "train", r"train: no images in images, but .*: cat, dog -- .*train/images"),
        (("data", None), "test", r"no images in data, but .*: cat, dog -- .*/data, "),
        (("Training", "holdout"), "test", r"no images in Training, holdout, but"),
    ],
)
def test_folders_around_the_classes_are_no_classes(tmp_path, halves, split, words):
    plain, root = make_tree(tmp_path / "plain"), tmp_path / "set"
    for name, half in zip(halves, ("train", "test"), strict=True):
        if name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (plain / half).rename(root / name)
    with pytest.raises(ArtifactError, match=words) as caught:
        load(str(root), split)
    assert "\n" not in str(caught.value)


def test_images_may_lie_deeper_than_their_class(tmp_path):
    """In one folder, as in Tiny ImageNet, or in folders that are not the same in all; beside other files, too."""
    for place in ("cat/images", "dog/images"):
        write_image(tmp_path / "one" / place / "0.png", np.zeros((6, 8)))
        (tmp_path / "one" / place.replace("images", "boxes")).mkdir()
        (tmp_path / "one" / place.replace("images", "boxes") / "0.xml").write_text("<box/>")
    for place in ("cat/a", "cat/b", "dog/a", "dog/c"):
        write_image(tmp_path / "several" / place / "0.png", np.zeros((6, 8)))
    for name, count in (("one", 2), ("several", 4)):
        dataset = load(str(tmp_path / name), "test")
        assert (dataset.classes, len(dataset)) == (("cat", "dog"), count)


def test_unknown_name(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        load("cifar-10", "train")
    assert caught.value.exit_code == 2 and "cifar10" in caught.value.hint
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("", str(tmp_path / "absent")):
        with pytest.raises(ConfigError):
            load(name, "train")


# -- statistics and choices --------------------------------------------------------------------------------------------


def test_mean_std(tmp_path, monkeypatch):
    rgb = load(str(make_tree(tmp_path, (6, 8, 3))), "train")
    pixels = everything(rgb).double().numpy() / 255
    mean, std = rgb.mean_std()
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    monkeypatch.setattr(datasets, "_STATISTICS_IMAGES", 5)
    np.testing.assert_allclose(rgb.mean_std()[0], pixels[::2].mean(axis=(0, 2, 3)), rtol=1e-12)


def test_class_balanced():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    chosen = class_balanced(labels, 12, seed=0)
    assert labels[chosen].bincount().tolist() in ([5, 3, 4], [4, 3, 5])
    assert len(chosen.unique()) == 12
    assert torch.equal(chosen, class_balanced(labels, 12, seed=0))
    assert torch.equal(chosen[:6], class_balanced(labels, 6, seed=0))
    assert not torch.equal(chosen, class_balanced(labels, 12, seed=1))
    assert sorted(class_balanced(labels, 73, seed=0).tolist()) == list(range(73))
    for count in (0, 74):
        with pytest.raises(ConfigError):
            class_balanced(labels, count, seed=0)


# -- the seal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_sealed_names(name):
    with sealed("zskd is data-free"), pytest.raises(DataSealed, match="zskd is data-free") as caught:
        load(name, "test", download=False)
    assert (caught.value.exit_code, caught.value.code) == (4, "data_sealed")


def test_sealed_directory_and_its_files(tmp_path):
    root = make_tree(tmp_path / "pets")
    path = root / "train" / "cat" / "0.png"
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "dogs").symlink_to(make_tree(tmp_path / "elsewhere"))
    lazy = datasets.ImageFiles([str(path)], (1, 6, 8))
    with sealed("it is data-free", roots=[root, tmp_path / "linked"]):
        for read in (
            lambda: load(str(root), "train"),
            lambda: path.read_bytes(),
            lambda: os.open(os.fsencode(path), os.O_RDONLY),
            lambda: Image.open(tmp_path / "link" / "train" / "cat" / "0.png"),
            lambda: Image.open(tmp_path / "linked" / "dogs" / "train" / "cat" / "0.png"),
            lambda: lazy[torch.tensor([0])],
        ):
            with pytest.raises(DataSealed):
                read()
        write_image(tmp_path / "pets-of-mine.png", np.zeros((2, 2)))  # a sibling is no part of it
    assert len(load(str(root), "train")) == 10


def test_sealed_working_directory_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "data" / "work").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data" / "work")
    with sealed("it is data-free", roots=[tmp_path / "link"]), pytest.raises(ConfigError, match="where datasets"):
        (tmp_path / "link" / "work" / "out").write_bytes(b"x")


@needs_mnist
def test_sealed_torchvision(monkeypatch):
    monkeypatch.setenv("DFKD_DATA", str(REAL_DATA))
    with sealed("it is data-free"), pytest.raises(DataSealed):
        torchvision.datasets.MNIST(REAL_DATA, train=False)
    assert len(torchvision.datasets.MNIST(REAL_DATA, train=False)) == 10_000


def test_sealed_scikit_learn():
    with sealed("it is data-free"), pytest.raises(DataSealed, match=r"digits\.csv\.gz"):
        load_digits()
    assert len(load_digits().target) == 1797


def test_sealed_cache(tmp_path):
    cached = dataset_roots()[-1] / "MNIST" / "file"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    with sealed("it is data-free"), pytest.raises(DataSealed):
        cached.read_bytes()
    assert cached.read_bytes() == b"x"


def test_seals_nest_and_end_with_an_exception(tmp_path):
    path = tmp_path / "data" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x")
    with pytest.raises(KeyError), sealed("outer", roots=[path.parent]):
        with sealed("inner"):
            pass
        with pytest.raises(DataSealed, match="outer"):
            path.read_bytes()
        raise KeyError
    assert path.read_bytes() == b"x"
    assert len(load("digits", "test")) == 360


def test_the_seal_holds_in_other_threads(tmp_path):
    path = tmp_path / "data" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x")
    raised = []

    def read() -> None:
        try:
            path.read_bytes()
        except DataSealed as error:
            raised.append(error)

    with sealed("it is data-free", roots=[path.parent]):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert len(raised) == 1


def test_the_seal_does_not_import_torch():
    code = "import sys, dfkd_cli.data.seal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
