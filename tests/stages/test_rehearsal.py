"""``--dry-run`` cuts everything that is a length: however long a run is to be, its rehearsal does the same work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tiny_regimes import beside
from tiny_synthesizers import teacher_spec
from torch import nn

from dfkd_cli import catalog
from dfkd_cli.config import build, convert, hints, options, shortened, strip_none
from dfkd_cli.options import FOREIGN
from dfkd_cli.synthesis_options import ImageOptimization

CASES = [
    pytest.param(command, choice, entry, id=f"{command.name}-{choice.flag}-{entry.name}")
    for command in catalog.commands().values()
    for choice in command.choices
    for entry in catalog.entries(choice.package).values()
    # What looks into a teacher goes where there is one.
    if "teacher" in hints(command.inputs)
    or not ("teacher" in entry.needs or (choice.several and entry.kind != "response"))
]


@contextmanager
def rows_through_layers() -> Iterator[list[int]]:
    """How many rows every layer with weights is given inside the ``with`` block, networks of any kind."""
    rows: list[int] = []

    def count(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            rows.append(len(output))

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


def longer(config: type, more: int, keep: tuple[str, ...]) -> dict[str, int]:
    """All whole numbers of a configuration that are no limits, by so much larger than they are by default."""
    numbers = {
        field.name: 100 if field.default is None else field.default
        for field in dataclasses.fields(config)
        if strip_none(hints(config)[field.name])[0] is int and field.name not in (*FOREIGN, "queries", *keep)
    }
    return {name: value + more for name, value in numbers.items()}


def flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def typed(command: catalog.Command, choice: catalog.Choice | None, entry: catalog.Entry | None, more: int) -> list[str]:
    """A command line on which everything is by so much longer than by default."""
    # What is measured of distill's terms before its rehearsal takes whole batches of the images.
    keep = ("num_images", "batch_size") if command.name == "distill" else ()
    has_student = entry is None or command.name != "synthesize" or "student" in entry.needs
    left_out = (*keep, "images_per_class", *["accumulate"] * bool(keep), *["snapshots"] * (not has_student))
    values: dict[str, Any] = longer(command.inputs, more, left_out) | dict(zip(keep, (8, 4), strict=False))
    chosen = []
    if choice is not None:
        values |= longer(entry.config, more, (*keep, "shard_size"))  # which is a multiple of another length
        values |= {"width": 0.1} if hints(entry.config).get("width") is float else {}  # small generators do as well
        values |= {"project": "both"} if "project" in hints(entry.config) else {}  # width is of that
        chosen = [*beside(command, choice), f"--{choice.flag}", *(["response"] if choice.several else []), entry.name]
    return [command.name, *chosen, *flags(values), "--dry-run"]


@pytest.mark.parametrize(("command", "choice", "entry"), CASES)
def test_a_rehearsal_is_as_long_for_a_long_run_as_for_a_short_one(
    command, choice, entry, cli, make_teacher, make_metadata, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more: list[Any] = ["--device", "cpu"]
    if "teacher" in hints(command.inputs):
        needy = entry is not None and entry.package == "synthesizers"
        more += ["--teacher", make_teacher(teacher_spec(entry, "resnet8") if needy else "resnet8")]
    if command.name == "distill":
        more += ["--transfer-set", "real:20" if "labels" in entry.needs else "noise:20", "--student", "resnet8"]
        more += ["--answers", "label"] * ("answers" in entry.needs)
    if command.name == "synthesize":
        more += ["--student", "resnet8"] * ("student" in entry.needs)
        more += ["--metadata", make_metadata("resnet8")] * ("metadata" in entry.needs)
    work = []
    for length, precision in ((3, "32"), (7, "bf16")):  # in which nothing may be mixed that does not fit
        with rows_through_layers() as rows:
            code, _, err = cli(*typed(command, choice, entry, length), *more, "--precision", precision)
        assert code == 0, err
        work.append(rows)
    assert len(work[0]) == len(work[1])
    assert work[0] == work[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [c for c in catalog.commands().values() if not c.choices and "teacher" in hints(c.inputs) and c.name != "bench"],
    ids=lambda c: c.name,
)
def test_so_it_is_for_commands_that_choose_nothing(command, cli, make_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher("resnet8")
    paths = [teacher] if "paths" in hints(command.inputs) else []
    named = [teacher] if "argument" in options(command.inputs)["teacher"] else ["--teacher", teacher]
    work = []
    for length in (3, 7):
        with rows_through_layers() as rows:
            code, _, err = cli(*typed(command, None, None, length), *paths, *named, "--device", "cpu")
        assert code == 0, err
        work.append(rows)
    assert work[0] == work[1]


def test_what_is_trained_on_is_a_length_in_distill_too():
    traits = options(catalog.command("distill").inputs)
    assert [traits[name]["rehearsal"] for name in ("num_images", "batch_size")] == [2, 2]


def test_lengths_are_cut_and_nothing_else_is_changed():
    inputs = catalog.command("distill").inputs
    made = build(inputs, {"steps": None, "epochs": 9, "batch_size": 1, "num_images": 5, "lr": 0.5})
    assert shortened(made) == dataclasses.replace(made, steps=1, epochs=1, num_images=2)
    deepinversion = catalog.entries("synthesizers")["deepinversion"].config
    off = build(deepinversion, {"iterations": 7, "coarse_iterations": 0})
    assert shortened(off) == dataclasses.replace(off, iterations=1, batch_size=2)
    assert shortened(dataclasses.replace(off, coarse_iterations=3)).coarse_iterations == 1


def test_an_option_that_is_restated_stays_a_length():
    config = catalog.entries("synthesizers")["lopes"].config
    assert config().iterations != ImageOptimization().iterations
    assert options(config)["iterations"] == options(ImageOptimization)["iterations"]
    assert convert("3", hints(config)["iterations"], "iterations") == 3


def test_a_rehearsal_says_how_strongly_terms_pull_at_images(cli, make_teacher, tmp_path):
    """What a weight is worth depends on the teacher: so it is said before hours are spent."""
    args = [
        "--teacher",
        make_teacher("resnet8"),
        "--device",
        "cpu",
        "--out",
        tmp_path / "shards",
        "--dry-run",
        "--json",
    ]
    found = {}
    for weight in (1, 3):
        code, out, err = cli("synthesize", "--method", "deepinversion", "--statistics", weight, *args)
        assert code == 0, err
        found[weight] = {term["term"]: term for term in json.loads(out)["terms"]}
    assert found[1].keys() == {"cross_entropy", "total_variation", "statistics"}
    once, thrice = found[1]["statistics"], found[3]["statistics"]
    assert (thrice["value"], thrice["weight"]) == (once["value"], 3)
    assert thrice["gradient"] == pytest.approx(3 * once["gradient"], rel=1e-4)
    assert found[1]["cross_entropy"] == found[3]["cross_entropy"]
    code, out, _ = cli("synthesize", "--method", "noise", *args)
    assert code == 0 and json.loads(out)["terms"] == []
