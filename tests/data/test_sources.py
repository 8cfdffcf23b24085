"""Sources of images and their shuffled batches: every image once an epoch, in bounded memory, from any step on."""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_cli import catalog
from dfkd_cli.artifacts.shards import ShardReader, ShardWriter
from dfkd_cli.config import build
from dfkd_cli.data import datasets, sources
from dfkd_cli.data.batches import Batches
from dfkd_cli.data.sources import (
    ANSWERS,
    Concat,
    FolderSource,
    Images,
    NoiseSource,
    RealSource,
    ShardSource,
    Source,
    Subset,
    concatenated,
    first,
    hold_out,
    of_each_class,
)
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.directory import load_model
from dfkd_cli.synthesizers.base import SynthesisTask

CPU = torch.device("cpu")
IMAGE = 4  # bytes of an image of Numbers


class Numbers(Source):
    """Images of one float32 pixel that say their own number; the label is the number, too."""

    def __init__(self, sizes: list[int], labelled: bool = False, first: int = 0) -> None:
        self.sizes, self.shape, self.dtype, self.labelled, self.first = sizes, (1, 1, 1), torch.float32, labelled, first
        self.loaded: list[int] = []

    def chunk(self, index: int) -> Images:
        self.loaded.append(index)
        start = self.first + sum(self.sizes[:index])
        numbers = torch.arange(start, start + self.sizes[index])
        return Images(numbers.float().view(-1, 1, 1, 1), numbers if self.labelled else None)


class Readable(Numbers):
    """What another thread can read."""

    only_read = True

    def chunk(self, index: int) -> Images:
        self.threads = {*getattr(self, "threads", ()), threading.current_thread().name}
        return super().chunk(index)


class Answered(Numbers):
    """The same with stored answers: logits that start with the number, and targets that start with its square."""

    def __init__(self, sizes: list[int], answers: tuple[str, ...] = ANSWERS, classes: int = 3, **more) -> None:
        super().__init__(sizes, **more)
        self.answers = dict.fromkeys(answers, classes)

    def chunk(self, index: int) -> Images:
        images = super().chunk(index)
        columns = torch.arange(self.answers.get("logits", 3)) + images.pixels.flatten(1)
        answers = {"logits": columns, "targets": columns**2}
        return replace(images, **{name: answers[name] for name in self.answers})


def answers_hold(images: Images, classes: int = 3) -> bool:
    """Whether each image has the answers that are its own."""
    columns = torch.arange(classes) + images.pixels.flatten(1)
    return torch.equal(images.logits, columns) and torch.equal(images.targets, columns**2)


def numbers(images: Images) -> list[int]:
    return images.pixels.flatten().int().tolist()


def everything(source: Source) -> list[int]:
    return [number for index in range(len(source.sizes)) for number in numbers(source.chunk(index))]


def epoch(batches: Batches, index: int = 0) -> list[list[int]]:
    start = index * batches.steps_per_epoch
    return [numbers(images) for images in batches.steps(start, start + batches.steps_per_epoch)]


# Sizes of chunks, images of a batch, images that fit into memory.
CUTS = [
    ([12], 4, 100),
    ([5, 4, 3], 4, 100),
    ([4, 4, 4], 4, 4),
    ([5, 4, 3], 4, 5),
    ([5, 4, 3], 4, 9),
    ([1] * 12, 4, 5),
    ([7, 1, 4], 6, 1),  # a chunk that does not fit, batches over several windows
    ([3, 3, 3, 3], 12, 3),
]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "batch", "memory"), CUTS)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [Numbers, Readable])
def test_every_image_once_an_epoch(sizes, batch, memory, kind, index):
    batches = Batches(kind(sizes, labelled=True), batch, seed=0, device=CPU, memory=memory * IMAGE)
    drawn = epoch(batches, index)
    assert [len(part) for part in drawn] == [batch] * (12 // batch)
    assert sorted(itertools.chain(*drawn)) == list(range(12))


@pytest.mark.parametrize(("sizes", "batch", "memory"), CUTS)
def test_labels_stay_with_their_images(sizes, batch, memory):
    batches = Batches(Numbers(sizes, labelled=True), batch, seed=0, device=CPU, memory=memory * IMAGE)
    for images in batches.steps(0, 2 * batches.steps_per_epoch):
        assert images.labels.tolist() == numbers(images)


@pytest.mark.parametrize(("sizes", "batch", "memory"), CUTS)
def test_answers_stay_with_their_images_and_count_as_memory(sizes, batch, memory):
    whole = Answered(sizes)
    assert whole.bytes_per_image == IMAGE + 2 * 3 * 4
    for source in (whole, Concat([whole]), Subset(whole, np.arange(12) % 5 > 0), first(whole, 7)):
        fits = memory * whole.bytes_per_image
        batches = Batches(source, batch, seed=0, device=CPU, memory=fits)
        for images in batches.steps(0, 2 * batches.steps_per_epoch):
            assert answers_hold(images)
            assert answers_hold(images[1:].to(CPU))
            held = sum(v.nbytes for w in batches._windows.values() for v in (w.pixels, w.logits, w.targets))
            assert held <= max(fits, max(source.sizes) * whole.bytes_per_image)


def test_answers_that_nobody_wants_change_no_order():
    with_answers, without = Answered([4] * 6), Numbers([4] * 6)
    more = with_answers.bytes_per_image // IMAGE
    orders = [
        [epoch(Batches(source, 3, seed=2, device=CPU, memory=memory * IMAGE), index) for index in range(3)]
        for source, memory in ((without, 9), (Answered([4] * 6, ()), 9), (with_answers, 9 * more))
    ]
    assert orders[0] == orders[1] == orders[2]
    (images,) = Batches(Answered([4], ()), 4, seed=0, device=CPU).steps(0, 1)
    assert images.logits is images.targets is None


@pytest.mark.parametrize(("sizes", "batch", "memory"), CUTS)
def test_batches_know_where_their_images_stand(sizes, batch, memory):
    for source in (Numbers(sizes), Subset(Numbers(sizes), np.arange(12) % 5 > 0)):
        order = everything(source)
        batches = Batches(source, batch, seed=0, device=CPU, memory=memory * IMAGE)
        for images in batches.steps(0, 2 * batches.steps_per_epoch):
            assert [order[position] for position in images.positions] == numbers(images)
            assert images[1:].to(CPU).positions.tolist() == images.positions[1:].tolist()


@pytest.mark.parametrize(("sizes", "batch", "memory"), CUTS)
@pytest.mark.parametrize("kind", [Numbers, Readable])
def test_any_step_can_be_found_from_its_number(sizes, batch, memory, kind):
    def batches() -> Batches:
        return Batches(kind(sizes), batch, seed=5, device=CPU, memory=memory * IMAGE)

    total = 3 * batches().steps_per_epoch
    whole = [numbers(images) for images in batches().steps(0, total)]
    for start in range(total):
        assert [numbers(images) for images in batches().steps(start, total)] == whole[start:]
    interleaved = batches()
    pairs = zip(interleaved.steps(0, total), interleaved.steps(0, total), strict=True)
    assert [(numbers(one), numbers(other)) for one, other in pairs] == [(each, each) for each in whole]
    used = batches()
    backwards = [numbers(next(used.steps(step, step + 1))) for step in reversed(range(total))]
    assert backwards == whole[::-1]


@pytest.mark.parametrize("memory", [100, 4])
def test_order_is_new_in_every_epoch_and_for_every_seed(memory):
    def order(seed: int, index: int) -> list[int]:
        return list(itertools.chain(*epoch(Batches(Numbers([4] * 5), 5, seed, CPU, memory * IMAGE), index)))

    orders = [order(seed, index) for seed in range(3) for index in range(3)]
    assert len({tuple(part) for part in orders}) == 9
    assert list(range(20)) not in orders
    assert order(1, 2) == order(1, 2)


def test_incomplete_last_batch_is_left_out_unless_it_is_the_only_one():
    batches = Batches(Numbers([10]), 4, seed=0, device=CPU)
    assert batches.steps_per_epoch == 2
    assert len(set(itertools.chain(*epoch(batches)))) == 8
    missed = [set(range(10)) - set(itertools.chain(*epoch(batches, index))) for index in range(200)]
    assert set.union(*missed) == set(range(10))  # not always the same images
    assert [len(part) for part in epoch(Batches(Numbers([3]), 4, seed=0, device=CPU))] == [3]


def test_what_fits_is_loaded_once():
    source = Numbers([5, 4, 3])
    list(Batches(source, 4, seed=0, device=CPU, memory=12 * IMAGE).steps(0, 9))
    assert source.loaded == [0, 1, 2]


def test_what_does_not_fit_is_loaded_once_an_epoch():
    source = Numbers([4] * 6)
    batches = Batches(source, 3, seed=0, device=CPU, memory=8 * IMAGE)
    list(batches.steps(0, 2 * batches.steps_per_epoch))
    assert sorted(source.loaded) == sorted([*range(6)] * 2)


@pytest.mark.parametrize(
    ("sizes", "batch", "memory"),
    CUTS,
)
def test_memory_is_bounded(sizes, batch, memory):
    batches = Batches(Numbers(sizes), batch, seed=0, device=CPU, memory=memory * IMAGE)
    for _ in batches.steps(0, 3 * batches.steps_per_epoch):
        held = sum(len(images.pixels) for images in batches._windows.values())
        assert held <= max(memory, max(sizes))


def test_batches_are_float32_in_pixel_space():
    class Bytes(Numbers):
        def chunk(self, index: int) -> Images:
            return Images(super().chunk(index).pixels.byte())

    source = Bytes([256])
    source.dtype = torch.uint8
    (images,) = Batches(source, 256, seed=0, device=CPU).steps(0, 1)
    assert images.pixels.dtype == torch.float32
    torch.testing.assert_close(images.pixels.flatten().sort().values, torch.arange(256) / 255)


def test_batches_do_not_share_memory_with_the_source():
    batches = Batches(Numbers([4]), 4, seed=0, device=CPU)
    first = next(batches.steps(0, 1))
    first.pixels.zero_()
    assert sorted(numbers(next(batches.steps(0, 1)))) == [0, 1, 2, 3]


# -- read ahead --------------------------------------------------------------------------------------------------------


def settle(batches: Batches) -> None:
    """Wait for what is being read."""
    for reading in list(batches._reading.values()):
        reading.result()


def test_two_windows_at_most_are_held_and_the_second_is_read_by_a_thread():
    source = Readable([4] * 6)
    batches = Batches(source, 2, seed=0, device=CPU, memory=17 * IMAGE)  # of 8 images each
    loaded = []
    for _ in batches.steps(0, 2 * batches.steps_per_epoch):
        settle(batches)
        held = [*batches._windows.values(), *(reading.result() for reading in batches._reading.values())]
        assert sum(len(images.pixels) for images in held) <= 16
        loaded.append(len(source.loaded))
    assert loaded[:9] == [4] * 4 + [6] * 4 + [8]  # the next epoch's first window at the end of this one
    assert len(source.threads) == 2
    assert sorted(source.loaded[:6]) == list(range(6))


def test_what_fits_is_read_once_by_nobody_else():
    source = Readable([4] * 6)
    list(Batches(source, 2, seed=0, device=CPU, memory=24 * IMAGE).steps(0, 30))
    assert sorted(source.loaded) == list(range(6))
    assert source.threads == {threading.current_thread().name}


def test_sources_that_ask_networks_are_not_read_by_a_thread():
    both = Concat([Readable([4] * 3), Numbers([4] * 3, first=12)])
    list(Batches(both, 2, seed=0, device=CPU, memory=8 * IMAGE).steps(0, 12))
    assert both.parts[0].threads == {threading.current_thread().name}
    assert Concat([Readable([4]), Readable([4])]).only_read and Subset(Readable([4]), np.ones(4, bool)).only_read


def test_what_fails_while_it_is_read_ahead_fails_when_it_is_wanted():
    class Damaged(Readable):
        def chunk(self, index: int) -> Images:
            if index == 3:
                raise ArtifactError("chunk 3 is damaged")
            return super().chunk(index)

    batches = Batches(Damaged([4] * 6), 4, seed=0, device=CPU, memory=8 * IMAGE)
    drawn = []
    with pytest.raises(ArtifactError, match="chunk 3"):
        for images in batches.steps(0, 6):
            settle_quietly(batches)
            drawn += numbers(images)
    assert not {12, 13, 14, 15} & {*drawn}
    (place,) = (index for index, (window, _) in enumerate(batches._plan(0)) if window == (3,))
    assert len(drawn) == 4 * place  # everything before it was drawn


def settle_quietly(batches: Batches) -> None:
    with contextlib.suppress(ArtifactError):
        settle(batches)


# -- parts and sums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100], [20] * 5, [1] * 100, [3, 90, 7]])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.5])
def test_held_out_and_kept_parts_cover_the_source_and_share_nothing(sizes, share):
    kept, held_out = hold_out(Numbers(sizes, labelled=True), share, seed=0)
    assert len(held_out) == round(share * 100)
    assert sorted(everything(kept) + everything(held_out)) == list(range(100))
    for part in (kept, held_out):
        assert [len(part.chunk(i).pixels) for i in range(len(part.sizes))] == part.sizes
        assert all(part.chunk(i).labels.tolist() == numbers(part.chunk(i)) for i in range(len(part.sizes)))


def test_what_is_held_out_depends_on_the_seed_and_may_be_nothing():
    source = Numbers([50, 50])
    first, again, other = (everything(hold_out(source, 0.2, seed)[1]) for seed in (0, 0, 1))
    assert first == again != other
    for share, count in ((0.0, 100), (0.02, 10)):
        source = Numbers([count])
        assert hold_out(source, share, seed=0) == (source, None)


def test_what_is_held_out_keeps_its_answers_and_can_be_held_at_once(monkeypatch):
    kept, held_out = hold_out(Answered([20] * 5), 0.25, seed=0)
    assert answers_hold(kept.all())
    assert answers_hold(held_out.all())
    monkeypatch.setattr(sources, "MEMORY", 1 << 20)
    classes = sources.MEMORY // 4 // 10  # of which one answer of ten images fits
    assert len(hold_out(Answered([1] * 100, ("logits",), classes), 0.5, seed=0)[1]) == 9


def test_subset_leaves_out_chunks_of_which_nothing_is_chosen():
    source = Numbers([2, 3, 2])
    subset = Subset(source, np.array([0, 0, 1, 0, 1, 0, 1], dtype=bool))
    assert subset.sizes == [2, 1]
    assert everything(subset) == [2, 4, 6]
    assert 0 not in source.loaded


def test_concat_is_one_after_the_other():
    both = Concat([Numbers([2, 3]), Numbers([4], first=5)])
    assert both.sizes == [2, 3, 4]
    assert everything(both) == list(range(9))
    assert sorted(itertools.chain(*epoch(Batches(both, 3, seed=0, device=CPU)))) == list(range(9))


def test_concat_keeps_labels_only_where_all_have_them():
    labelled, unlabelled = Numbers([2], labelled=True), Numbers([2])
    assert Concat([labelled, labelled]).chunk(1).labels.tolist() == [0, 1]
    mixed = Concat([labelled, unlabelled])
    assert not mixed.labelled
    assert mixed.chunk(0).labels is None


def test_concat_keeps_answers_only_where_all_have_the_same():
    whole, logits, neither, other = (
        Answered([2]), Answered([2], ("logits",)), Numbers([2]), Answered([2], classes=4)
    )  # fmt: skip
    for parts, shared in (
        ([whole, whole], {"logits": 3, "targets": 3}),
        ([whole, logits], {"logits": 3}),
        ([logits, whole], {"logits": 3}),
        ([whole, neither], {}),
        ([neither, whole], {}),
        ([whole, other], {}),
    ):
        both = Concat(parts)
        assert both.answers == shared
        assert both.bytes_per_image == IMAGE + 4 * sum(shared.values())
        (images,) = Batches(both, 4, seed=0, device=CPU).steps(0, 1)
        for part in (images, both.chunk(0), both.chunk(1), both.all()):
            assert {name for name in ANSWERS if getattr(part, name) is not None} == shared.keys()


def test_parts_together_have_what_all_of_them_have():
    labelled = Images(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), torch.tensor([5, 6]), logits=torch.ones(2, 3))
    bare = Images(torch.ones(1, 1, 1, 1), positions=torch.tensor([7]))
    for parts in ([labelled, bare], [bare, labelled]):
        both = concatenated(parts)
        assert (both.labels, both.logits, both.targets) == (None, None, None)
        assert both.positions.tolist() == [int(place) for part in parts for place in part.positions]
    both = concatenated([labelled, labelled[1:]])
    assert both.labels.tolist() == [0, 1, 1]
    assert both.logits.shape == (3, 3)


def test_images_are_cut_in_order_with_all_that_belongs_to_them():
    images = Answered([7], labelled=True).chunk(0)
    parts = images.split(3)
    assert [part.labels.tolist() for part in parts] == [numbers(part) for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(map(answers_hold, parts))


def test_stored_answers_hold_for_the_pixels_that_they_were_given_for():
    images = replace(Answered([3], labelled=True).chunk(0), positions=torch.arange(3))
    assert images.changed(images.pixels) is images
    changed = images.changed(images.pixels.clone())  # who cannot tell whether pixels have changed takes them for new
    assert changed.logits is changed.targets is None
    assert (changed.labels is images.labels, changed.positions is images.positions) == (True, True)
    assert answers_hold(images)
    with pytest.raises(AttributeError):
        images.pixels = images.pixels + 1


def test_concat_brings_different_storage_to_one_space():
    noise, real = NoiseSource(4, (1, 32, 32), seed=0), RealSource(datasets.load("digits", "test"), torch.arange(3))
    both = Concat([real, noise])
    assert both.dtype == torch.float32
    torch.testing.assert_close(both.chunk(0).pixels, real.chunk(0).pixels / 255)
    assert torch.equal(both.chunk(1).pixels, noise.chunk(0).pixels)


# -- the sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_noise_source_is_what_the_noise_method_makes(tmp_path, teacher, dtype):
    classifier, _ = load_model(teacher)
    entry, count, seed = catalog.entries("synthesizers")["noise"], 1200, 3
    head = {"method": "noise", "shape": [1, 32, 32], "dtype": dtype, "num_classes": 10, "teacher": {"sha256": "0"}}
    writer = ShardWriter(tmp_path, head, 2)
    method = entry.load()(SynthesisTask(classifier, count, seed, writer), build(entry.config, {"dtype": dtype}))
    for index in range(method.rounds):
        method.round(index)
    writer.write_manifest()
    stored, streamed = ShardSource(ShardReader(tmp_path)), NoiseSource(count, (1, 32, 32), seed)
    assert stored.sizes == streamed.sizes == [1000, 200]
    for index in range(2):
        assert torch.equal(stored.chunk(index).pixels, streamed.chunk(index).pixels.to(stored.dtype))


@pytest.mark.parametrize("everywhere", [True, False])
def test_shard_source_carries_the_answers_that_are_wanted_and_stored(tmp_path, everywhere):
    head = {"method": "noise", "shape": [1, 2, 2], "dtype": "float16", "num_classes": 3, "teacher": {"sha256": "0"}}
    writer = ShardWriter(tmp_path, head, 2)
    shards = [
        {"images": torch.randn(count, 1, 2, 2).half(), "logits": torch.randn(count, 3), "targets": torch.rand(count, 3)}
        for count in (4, 2)
    ]
    if not everywhere:
        del shards[1]["targets"]
    for index, shard in enumerate(shards):
        writer.write(index, shard, {})
    writer.write_manifest()
    reader = ShardReader(tmp_path)
    stored = ["logits", "targets"] if everywhere else ["logits"]
    for wanted in ((), ("labels", "teacher"), ("logits",), ("targets",), ("targets", "logits", "teacher")):
        source = ShardSource(reader, wanted)
        carried = [name for name in stored if name in wanted]
        assert source.answers == dict.fromkeys(carried, 3)
        assert source.bytes_per_image == 4 * 2 + len(carried) * 3 * 4
        for index, shard in enumerate(shards):
            images = source.chunk(index)
            assert torch.equal(images.pixels, shard["images"])
            assert all(torch.equal(getattr(images, name), shard[name]) for name in carried)
            assert all(getattr(images, name) is None for name in set(ANSWERS) - set(carried))


def test_real_source_gives_the_chosen_images_with_their_labels():
    dataset = datasets.load("digits", "test")
    chosen = datasets.class_balanced(dataset.labels, 50, seed=0)
    source = RealSource(dataset, chosen, chunk=20)
    assert source.sizes == [20, 20, 10]
    assert source.labelled
    chunks = [source.chunk(i) for i in range(3)]
    assert torch.equal(torch.cat([c.pixels for c in chunks]), dataset.images(chosen))
    assert torch.equal(torch.cat([c.labels for c in chunks]), dataset.labels[chosen])


def test_folder_source_reads_any_depth_and_knows_its_content(tmp_path):
    (tmp_path / "deep er").mkdir()
    for number, name in enumerate(["b.png", "deep er/ä.png", "c.png"]):
        Image.fromarray(np.full((6, 6), 50 * number, dtype=np.uint8)).save(tmp_path / name)
    source = FolderSource(tmp_path, (1, 6, 6), chunk=2)
    assert source.sizes == [2, 1]
    assert sorted(int(image.float().mean()) for i in range(2) for image in source.chunk(i).pixels) == [0, 50, 100]
    assert FolderSource(tmp_path, (1, 6, 6)).sha256 == source.sha256
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    assert FolderSource(tmp_path, (1, 6, 6)).sha256 != source.sha256


def test_a_large_folder_is_known_without_being_read_whole(tmp_path, monkeypatch):
    for number in range(2):
        Image.fromarray(np.random.default_rng(number).integers(256, size=(300, 300), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    whole = FolderSource(tmp_path, (1, 6, 6)).sha256
    monkeypatch.setattr(sources, "HASHED", 100_000)
    read = []
    monkeypatch.setattr(sources, "sha256_file", read.append)
    known = FolderSource(tmp_path, (1, 6, 6)).sha256
    assert known == FolderSource(tmp_path, (1, 6, 6)).sha256 != whole
    assert read == []
    Image.fromarray(np.zeros((300, 300), dtype=np.uint8)).save(tmp_path / "1.png")
    assert FolderSource(tmp_path, (1, 6, 6)).sha256 != known


def test_images_by_the_class_are_those_of_their_labels():
    """Of real images, whose classes do not take turns, and of several sets."""
    digits = RealSource(datasets.load("digits", "train"), chunk=100)
    source = Concat([digits, Subset(digits, np.arange(len(digits)) % 2 == 0)])
    assert torch.equal(source.classes(), torch.cat([digits.dataset.labels, digits.dataset.labels[::2]]))
    assert Concat([digits, NoiseSource(3, digits.shape, seed=0)]).classes() is None
    chosen = of_each_class(source, 7, "0123456789").all()
    labels = digits.dataset.labels.numpy()
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:7] for k in range(10)]))
    assert np.array_equal(chosen.labels.numpy(), labels[rows])
    assert torch.equal(chosen.pixels, digits.dataset.images(torch.from_numpy(rows)))
    with pytest.raises(ConfigError, match=r"of class \d the transfer sets have \d+ images"):
        of_each_class(digits, 200, "0123456789")


def test_memory_of_an_image_is_that_of_its_storage():
    assert NoiseSource(1, (3, 8, 8), seed=0).bytes_per_image == 3 * 8 * 8 * 4
    assert RealSource(datasets.load("digits", "test")).bytes_per_image == 32 * 32
