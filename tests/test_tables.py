"""Tables on terminals of every width: columns are left out whole, and said to be; figures are never cut."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import HANGS
from rich.console import Console

from dfkd_cli.report.table import _EXPENDABLE, reached, terminal_table
from dfkd_cli.tables import Columns

FIGURES = {"ROW": ["a student of a long name", "b"], "TOP-1 %": ["12.34 ± 0.56", "-"], "BYTES": ["1,234,567", "89"]}


def shown(table: Columns, width: int, terminal: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, soft_wrap=True, highlight=False)
    console.print(table)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", [1, 20, 30, 40, 48, 49, 80, 200])
def test_a_column_is_there_whole_or_named(width):
    text = shown(Columns(FIGURES, ("ROW",), folds="ROW", spare=("QUERIES", "BYTES"), rest="table.md"), width)
    flat = " ".join(text.split())
    assert all(figure in text for figure in ("12.34 ± 0.56", "TOP-1 %"))
    assert ("1,234,567" in text) == ("table.md also has BYTES" not in flat)
    assert ("BYTES" in text.splitlines()[0]) == (width >= 24 + 2 + 12 + 2 + 9)


def test_the_lines_fit_where_they_can():
    columns = {"NAME": ["n" * 10], "SUMMARY": ["many words " * 20], "PAPER": ["p" * 30]}
    for width in (60, 80, 120):
        text = shown(Columns(columns, [*columns], folds="SUMMARY", spare=("PAPER",)), width)
        assert max(map(len, text.splitlines())) <= width
        assert ("p" * 30 in text) == (width >= 10 + 2 + 24 + 2 + 30)
        assert " ".join(re.findall("many|words", text)) == " ".join(["many words"] * 20)


def test_a_pipe_has_every_column_on_one_line_a_row():
    columns = {"ROW": ["r" * 300], "BYTES": ["1,234,567"]}
    head, row = shown(Columns(columns, ("ROW",), folds="ROW", spare=("BYTES",)), 200, terminal=False).splitlines()
    assert (head.split(), row.split()) == (["ROW", "BYTES"], ["r" * 300, "1,234,567"])


def test_wide_characters_take_two_columns():
    text = shown(Columns({"SET": ["데이터"], "N": ["1"]}, ("SET",), folds="SET"), 80)
    assert text.splitlines()[1].rstrip() == "데이터  1"


@pytest.mark.parametrize("width", [20, 40, 80, 100, 120, 200])
def test_a_comparison_can_be_shown_on_every_terminal(width):
    """Most comparisons have nothing in some of the columns that are left out."""
    row = dict.fromkeys(
        ("published", "selected", "best_test", "gap", "agreement", "num_images", "parameters", "model", "series")
    )
    row |= {"label": "noise:50 -> response", "role": "student", "seeds": [0], "top1": {"mean": 0.5, "sd": None}}
    row |= {"seconds": dict.fromkeys(("training", "total", "synthesis")), "data_free": True, "uses": [], "model": "m"}
    table = terminal_table({"rows": [row], "failed": []})
    assert not {"BEST TEST %", "SELECTED %"} & set(table.columns)  # or this shows nothing
    assert set(table.columns) & set(_EXPENDABLE)
    assert "50.00" in shown(table, width)


def test_a_published_figure_is_reached_by_the_first_snapshot_that_is_as_good():
    def run(synthesis, training, *top1s, path="student", work=None):  # one snapshot of every second round of ten
        seconds = {"synthesis": synthesis, "training": training, "total": (synthesis or 0) + (training or 0)}
        snapshots = [{"round": 2 * index + 1, "top1": top1} for index, top1 in enumerate(top1s)]
        shards = [{"path": "shards", "seconds": synthesis}]
        measured = {"rounds": 10, "measures": {"snapshots": snapshots}}
        return {"path": path, "seconds": seconds, "shards": shards, **measured, **({"work": work} if work else {})}

    row = {"role": "student", "published": 0.8}
    of_shards, never = run(100, 50, 0.5, 0.8, 0.7), run(10, 10, 0.79)
    in_the_loop = run(200, None, 0.9, path="shards/student", work={"shards": 200})
    work = {"shards": 100, "student/assistants/resnet8": 30, "student": 20}
    of_a_chain = run(100, 50, 0.5, 0.8, 0.7, work=work)
    assert reached(row | {"runs": [of_shards]})["mean"] == pytest.approx(100 + 0.4 * 50)
    both = reached(row | {"runs": [of_shards, in_the_loop]})
    assert both["values"] == pytest.approx([120, 0.2 * 200])
    assert reached(row | {"runs": [of_a_chain]})["mean"] == pytest.approx(100 + 30 + 0.4 * 20)
    assert reached(row | {"runs": [of_shards, never]}) is None  # of all seeds, or of none
    assert reached(row | {"published": None, "runs": [of_shards]}) is None
    assert reached(row | {"runs": [of_shards | {"measures": {}}]}) is None


def test_commands_on_narrow_terminals(teacher, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--transfer-set", "noise:8", "--steps", "1", "--batch-size", "8", "--device", "cpu"]
    assert cli("distill", "--teacher", str(teacher), *options)[0] == 0
    text = typed(["compare", "student"], tmp_path, 80)
    assert "table.md also has PARAMS" in text
    assert json.loads(Path("comparison", "run.json").read_text())["status"] == "done"
    assert "adaptive-deepinversion" in typed(["ls", "methods"], tmp_path, 40)


def typed(arguments: list[str], cwd, columns: int) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pytest.importorskip("pty").openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dfkd_cli", *arguments], cwd=cwd, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    while True:
        if not select.select([ours], [], [], HANGS)[0]:
            process.kill()
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0, said.decode()
    return said.decode()
