"""Tables and pictures of a page: each is made from what the comment before it names.

``python tests/readme.py PAGE ...`` writes all of them anew, each up to the next ``<!-- end of results -->``
or ``<!-- end of methods -->``. Paths are relative to the page:

    <!-- results/zskd-mnist.json -->            a kept results.json, whole but for some columns
    <!-- results/q.json with BYTES, PARAMS -->   which of these stay
    <!-- rows WHEN, ROW, TOP-1 %                these columns of some rows of several
    results/zskd-mnist.json few-200 zskd        ROW, of several teachers TEACHER/ROW
    results/synthesizers-mnist.json lenet5/lopes: there is metadata        which stands under WHEN
    -->
    <!-- synthesizers -->                       what dfkd ls says of every method in that folder of the package
    <!-- plot results/frontier.svg: results/a.json, results/b.json resnet -->
                                                a picture of all their students, of several teachers those of one
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfkd_cli import catalog
from dfkd_cli.artifacts.files import write_atomic, write_text
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.report import charts
from dfkd_cli.report.table import LEFT, cells, escape, markdown, markdown_table

# report.html has room for them
_LEFT_OUT = ("AGREEMENT %", "SYNTHESIS s", "DISTILLATION s", "REACHED s", "PARAMS", "BYTES", "LATENCY ms", "SEEDS")
_BLOCK = re.compile(
    r"(<!-- (\S+\.json|rows|synthesizers|objectives|regimes)\b(.*?)-->\n).*?(<!-- end of \w+ -->)", re.DOTALL
)
_PLOT = re.compile(r"<!-- plot (\S+\.svg): (.*?)-->", re.DOTALL)
_METHOD = ("NAME", "KIND", "NEEDS", "SUMMARY", "PAPER")
_SITES = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}


def fill(text: str, root: Path) -> str:
    """The text with every table made anew.

    Args:
        text: Markdown with comments as above.
        root: What the files' paths are relative to.

    Raises:
        ArtifactError: A file is missing or damaged.
        KeyError: There is no such row or column.
    """

    def table(block: re.Match[str]) -> str:
        start, what, more, end = block.groups()
        if what.endswith(".json"):
            left_out = {*_LEFT_OUT} - {*more.removeprefix(" with ").strip().split(", ")}
            lines = markdown(read_json(root / what, dict[str, Any]), left_out).splitlines()
        elif what == "rows":
            columns, *rows = more.strip().splitlines()
            lines = _rows(columns.split(", "), rows, root)
        else:
            lines = _methods(what)
        # Where a page is narrow, a figure stays on one line with its deviation.
        return "\n".join([start, *lines, "", end]).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")

    return _BLOCK.sub(table, text)


def pictures(text: str, root: Path) -> dict[str, bytes]:
    """The pictures of a page, by path: each row's top-1 over its seconds, a panel for each dataset and teacher.

    Raises:
        ArtifactError: A file is missing or damaged.
        KeyError: There is no such teacher.
    """
    drawn = {}
    for path, chosen in _PLOT.findall(text):
        panels: dict[str, list[Any]] = {}
        for file, *teacher in map(str.split, chosen.split(",")):
            sections = {s["teacher"]: s for s in read_json(root / file, dict[str, Any])["sections"]}
            section = sections["".join(teacher)]
            students = [row for row in section["rows"] if row["role"] != "teacher"]
            title = f"{section['dataset']}, {section['rows'][0]['model']} to {students[0]['model']}"
            panels.setdefault(title, []).extend(students)
        drawn[path] = charts.frontier(panels)
    return drawn


def _rows(columns: Sequence[str], chosen: Sequence[str], root: Path) -> list[str]:
    """Rows of kept results, chosen by lines ``FILE ROW ...`` or ``FILE ROW: when``."""
    lines = []
    for line in chosen:
        words, _, when = line.partition(": ")
        file, *names = words.split()
        sections = read_json(root / file, dict[str, Any])["sections"]
        rows = {f"{s['teacher']}/{row['label']}".strip("/"): (s, row) for s in sections for row in s["rows"]}
        for section, row in map(rows.__getitem__, names):
            teacher = cells(section["rows"][0])
            texts = {"WHEN": when, "DATASET": section["dataset"], **cells(row)}
            texts["TEACHER"] = f"{teacher['STUDENT']}, {teacher['TOP-1 %']} %"
            lines.append([escape(texts[column]) for column in columns])
    return markdown_table(columns, lines, (*LEFT, "WHEN", "DATASET", "TEACHER"))


def _methods(package: str) -> list[str]:
    """The methods in a folder of the package, by kind."""
    entries = sorted(catalog.entries(package).values(), key=lambda entry: (entry.kind, entry.name))
    rows = ([f"`{e.name}`", e.kind, ", ".join(e.needs), escape(e.summary), _link(e.paper)] for e in entries)
    return markdown_table(_METHOD, rows, _METHOD)


def _link(paper: str) -> str:
    """``arXiv:1905.08114`` or a doi as a link to it."""
    site, _, number = paper.partition(":")
    return f"[{paper}]({_SITES[site]}{number})" if paper else ""


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        write_text(path, fill(text, path.parent))
        for picture, data in pictures(text, path.parent).items():
            write_atomic(path.parent / picture, data)
