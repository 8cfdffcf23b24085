"""Datasets in directories that change between commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_comparisons import results_in

pytestmark = pytest.mark.usefixtures("quick_latency")
STEP = ("--steps", "1", "--batch-size", "2")
RNG = np.random.default_rng(0)


def photo(path: str) -> None:
    """A random image in a format whose files are all of one size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with photos/, a dataset."""
    monkeypatch.chdir(tmp_path)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        photo(f"photos/{place}/0.bmp")
    return tmp_path


def test_students_of_other_real_images_are_no_repeats(here, cli):
    assert cli("train-teacher", "--dataset", "photos", *STEP)[0] == 0
    for seed in (0, 1, 2):
        if seed == 2:
            photo("photos/train/a/1.bmp")
        assert cli("distill", "--transfer-set", "real", *STEP, "--seed", seed, "--out", f"student{seed}")[0] == 0
    code, _, err = cli("compare", "student0", "student1", "student2")
    assert code == 0, err
    rows = results_in(here / "comparison")["sections"][0]["rows"]
    assert sorted(row["seeds"] for row in rows if row["role"] == "student") == [[0, 1], [2]]
    assert len({row["label"] for row in rows}) == 3
