"""``report.html``: a comparison as one file that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.integrity import present
from dfkd_cli.report import charts, table
from dfkd_cli.report.entries import read_curves
from dfkd_cli.report.results import curves

_CLASSES_OPEN = 20  # a longer table of classes is folded

_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --back: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 16px;
  border-top: 1px solid var(--line); } h3 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; max-width: 80ch; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--back); color: var(--soft); font-size: 12px; font-weight: 600; }
.words { text-align: left; } tr.teacher td { background: var(--back); font-weight: 600; }
tr.failed td { color: #a40e26; }
.failure { color: #a40e26; margin-top: 10px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(520px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; }
figure + figure { margin-top: 4px; }
figcaption { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; } figcaption b { color: var(--ink); }
img { max-width: 100%; height: auto; display: block; margin: 0 auto 6px; }
img.pixels { width: 100%; image-rendering: pixelated; }
code { font: 12px/1.4 ui-monospace, Consolas, monospace; overflow-wrap: anywhere; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 600px) { body { padding: 14px; } th, td { padding: 6px 8px; } }
"""


def page(results: Mapping[str, Any]) -> str:
    """The report of what is in ``results.json``; curves and previews are read from the directories it names."""
    rows = [row for section in results["sections"] for row in section["rows"]]
    runs = sum(len(row["runs"]) for row in rows)
    body = [
        "<h1>dfkd comparison</h1>",
        f'<p class="soft">{len(rows)} rows from {runs} models, {escape(results["started"].partition("T")[0])}, '
        f"dfkd {escape(results['versions']['dfkd'])}</p>",
        *map(_section, results["sections"]),
        _galleries(results["shards"]),
        _provenance(rows, results),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dfkd comparison</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _section(section: Mapping[str, Any]) -> str:
    rows = table.plain_rows(section)
    columns = table.filled(section)
    roles = [row["role"] for row in rows] + ["failed"] * len(table.failed_cells(section))
    texts = list(zip(roles, zip(*columns.values(), strict=True), strict=True))
    failures = "".join(f'<p class="failure">{escape(line)}</p>' for line in table.failures(section))
    return "\n".join(
        [
            f"<h2>{escape(section['dataset'])}, teacher {escape(section['teacher'] or rows[0]['model'] or '')}</h2>",
            f"<p>{escape(table.headline(section))}. Means over the seeds, with the sample standard deviation. "
            "The gap is in percentage points, below zero where the student is worse than its teacher.</p>",
            _table(list(columns), texts),
            failures,
            "<h3>Top-1</h3>",
            _figure(
                charts.top1(rows),
                "Every dot is one seed, a diamond the mean, a whisker one standard deviation. "
                "The dashed line is the teacher. Blue is data-free, brown had or used real data.",
                "top-1 of every row",
            ),
            _sizes(section),
            "<h3>Top-1 per class, %</h3>",
            _classes(section),
            "<h3>Training</h3>",
            "<p>A line for each seed; a round is a stretch of optimiser steps.</p>",
            f'<div class="cards">{"".join(filter(None, map(_curves, rows)))}</div>',
        ]
    )


def _sizes(section: Mapping[str, Any]) -> str:
    pivot = table.by_size(section)
    if not pivot:
        return ""
    drawn = charts.sizes(curves(section["rows"]), section["rows"][0]["top1"]["mean"])
    shown = _table(pivot[0], [("", row) for row in pivot[1:]], left=("IMAGES",))
    picture = _figure(drawn, "The dashed line is the teacher.", "top-1 over the number of images")
    return f"<h3>Top-1 by images in the transfer set, %</h3>{shown}{picture}"


def _classes(section: Mapping[str, Any]) -> str:
    rows = table.plain_rows(section)
    texts = []
    for name in section["classes"]:
        shares = [[run["measures"]["per_class"][name] for run in row["runs"]] for row in rows]
        texts.append(("", [name, *(_mean_share(values) for values in shares)]))
    shown = _table(["CLASS", *(row["label"] for row in rows)], texts, left=("CLASS",))
    fold = "" if len(texts) <= _CLASSES_OPEN else "<summary>all classes</summary>"
    return f"<details>{fold}{shown}</details>" if fold else shown


def _mean_share(values: Sequence[float | None]) -> str:
    shares = [value for value in values if value is not None]
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else "-"


def _curves(row: Mapping[str, Any]) -> str:
    columns = [read_curves(Path(run["path"], "metrics.csv")) for run in row["runs"]]
    drawn = charts.curves([run for run in columns if run])
    if drawn is None:
        return ""
    seconds = table.seconds(row["seconds"]["training"])
    return _figure(
        drawn, f"<b>{escape(row['label'])}</b>, {escape(seconds)} s of training", f"curves of {row['label']}"
    )


def _galleries(shards: Iterable[Mapping[str, Any]]) -> str:
    cards = []
    for facts in shards:
        if (preview := present(Path(facts["path"], "preview.png"))) is None:
            continue
        confidence = "" if facts["confidence"] is None else f", mean teacher confidence {facts['confidence']:.3f}"
        seed = "" if facts["seed"] is None else f", seed {facts['seed']}"
        used = f", uses {', '.join(facts['uses'])}" if facts["uses"] else ""
        caption = f"<b>{escape(facts['method'])}</b>{escape(used)}{seed}: {facts['count']:,} images{confidence}<br>"
        caption += "".join(f"<b>Warning:</b> {escape(concern)}<br>" for concern in facts["concerns"])
        caption += f"<code>{escape(facts['path'])}</code>"
        images = _figure(preview.read_bytes(), caption, f"images of {facts['path']}", "pixels")
        cards.append(f"<div>{images}{_terms(facts)}</div>")
    if not cards:
        return ""
    note = "<p>From the first rounds, on top, to the last. Each image is stretched to the full range by itself.</p>"
    return f'<h2>Transfer sets</h2>{note}<div class="cards">{"".join(cards)}</div>'


def _terms(facts: Mapping[str, Any]) -> str:
    """The loss terms that the images of each round ended with, below them; nothing where none were optimised."""
    drawn = charts.curves([read_curves(Path(facts["path"], "metrics.csv"))])
    caption = "Its loss terms, unweighted, and what is watched, over the rounds"
    return _figure(drawn, caption, f"loss terms of {facts['path']}") if drawn else ""


def _provenance(rows: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    columns = ("DIRECTORY", "SHA-256", "COMMAND", "VERSIONS")
    directories = [run for row in rows for run in row["runs"]] + list(results["shards"])
    texts = [("", [m["path"], m["sha256"][:16], _command(m["argv"]), _versions(m["versions"])]) for m in directories]
    command = f"<p>This report: <code>{escape(_command(results['argv']))}</code> "
    command += f"({escape(_versions(results['versions']))})</p>"
    return f"<h2>Provenance</h2>{command}{_table(columns, texts, left=columns)}"


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], left: Sequence[str] = table.LEFT) -> str:
    """A table that scrolls by itself; each row has a class and its texts."""

    def cell(tag: str, column: str, text: str) -> str:
        return f"<{tag}{' class=words' * (column in left)}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in columns)
    lines = []
    for role, texts in rows:
        cells = "".join(cell("td", column, text) for column, text in zip(columns, texts, strict=True))
        lines.append(f"<tr class={role or 'plain'}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _figure(png: bytes, caption: str, alt: str, style: str = "") -> str:
    """A picture inside the page; ``caption`` is HTML, ``alt`` is not."""
    data = base64.b64encode(png).decode()
    image = f'<img class="{style}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _command(argv: Sequence[str] | None) -> str:
    return " ".join(argv or ["-"])


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
