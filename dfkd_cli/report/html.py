"""``report.html``: a comparison as one file that needs nothing else, neither scripts nor a network.

The page is a tree of elements, and the standard library writes it: text is escaped there, wherever it comes from.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

from dfkd_cli.artifacts.integrity import present
from dfkd_cli.report import charts, table
from dfkd_cli.report.entries import read_curves
from dfkd_cli.report.places import opened
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
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# Of whatever text might still become, nothing is run, fetched, sent or shown but this style and pictures in the page.
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'"


def page(results: Mapping[str, Any]) -> str:
    """The report of what is in ``results.json``; curves and previews are read from the directories it names."""
    rows = [row for section in results["sections"] for row in section["rows"]]
    runs = sum(len(row["runs"]) for row in rows)
    facts = f"{len(rows)} rows from {runs} models, {results['started'].partition('T')[0]}, "
    head = [
        _element("meta", charset="utf-8"),
        _element("meta", {"http-equiv": "Content-Security-Policy"}, content=_POLICY),
        _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _element("title", "dfkd comparison"),
        _element("style", _STYLE),
    ]
    body = [
        _element("h1", "dfkd comparison"),
        _element("p", {"class": "soft"}, facts, f"dfkd {results['versions']['dfkd']}"),
        *(part for section in results["sections"] for part in _section(section)),
        *_galleries(results["shards"]),
        *_provenance(rows, results),
    ]
    html = _element("html", _element("head", *head), _element("body", *body), lang="en")
    return f"<!doctype html>\n{tostring(html, encoding='unicode', method='html')}\n"


def _element(tag: str, *content: Element | str | Mapping[str, str], **attributes: str) -> Element:
    """An element with attributes, also those of mappings, and its content: elements and text, which is only text."""
    element = Element(tag, attributes)
    for item in content:
        if isinstance(item, Element):
            element.append(item)
        elif isinstance(item, Mapping):
            element.attrib.update(item)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + str(item)
        else:
            element.text = (element.text or "") + str(item)
    return element


def _section(section: Mapping[str, Any]) -> list[Element]:
    rows = table.plain_rows(section)
    columns = table.filled(section)
    roles = [row["role"] for row in rows] + ["failed"] * len(table.failed_cells(section))
    texts = list(zip(roles, zip(*columns.values(), strict=True), strict=True))
    return [
        _element("h2", f"{section['dataset']}, teacher {section['teacher'] or rows[0]['model'] or ''}"),
        _element(
            "p",
            f"{table.headline(section)}. Means over the seeds, with the sample standard deviation. ",
            "The gap is in percentage points, below zero where the student is worse than its teacher.",
        ),
        _table(list(columns), texts),
        *(_element("p", {"class": "failure"}, line) for line in table.failures(section)),
        _element("h3", "Top-1"),
        _figure(
            charts.top1(rows),
            "top-1 of every row",
            "Every dot is one seed, a diamond the mean, a whisker one standard deviation. "
            "The dashed line is the teacher. Blue is data-free, brown had or used real data.",
        ),
        *_sizes(section),
        _element("h3", "Top-1 per class, %"),
        _classes(section),
        _element("h3", "Training"),
        _element("p", "A line for each seed; a round is a stretch of optimiser steps."),
        _element("div", {"class": "cards"}, *(figure for row in rows for figure in _curves(row))),
    ]


def _sizes(section: Mapping[str, Any]) -> list[Element]:
    pivot = table.by_size(section)
    if not pivot:
        return []
    drawn = charts.sizes(curves(section["rows"]), section["rows"][0]["top1"]["mean"])
    return [
        _element("h3", "Top-1 by images in the transfer set, %"),
        _table(pivot[0], [("", row) for row in pivot[1:]], left=("IMAGES",)),
        _figure(drawn, "top-1 over the number of images", "The dashed line is the teacher."),
    ]


def _classes(section: Mapping[str, Any]) -> Element:
    rows = table.plain_rows(section)
    texts = []
    for name in section["classes"]:
        shares = [[run["measures"]["per_class"][name] for run in row["runs"]] for row in rows]
        texts.append(("", [name, *(_mean_share(values) for values in shares)]))
    shown = _table(["CLASS", *(row["label"] for row in rows)], texts, left=("CLASS",))
    if len(texts) <= _CLASSES_OPEN:
        return shown
    return _element("details", _element("summary", "all classes"), shown)


def _mean_share(values: Sequence[float | None]) -> str:
    shares = [value for value in values if value is not None]
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else "-"


def _curves(row: Mapping[str, Any]) -> list[Element]:
    columns = [read_curves(opened(run["path"]) / "metrics.csv") for run in row["runs"]]
    drawn = charts.curves([run for run in columns if run])
    if drawn is None:
        return []
    caption: list[Element | str] = [_element("b", row["label"])]
    caption.append(f", {table.seconds(row['seconds']['training'])} s of training")
    for run in row["runs"]:
        caption += _warnings(run["concerns"], f" seed {run['seed']}")
    return [_figure(drawn, f"curves of {row['label']}", *caption)]


def _warnings(concerns: Iterable[str], of: str = "") -> list[Element | str]:
    """Lines of a caption."""
    return [part for what in concerns for part in (_element("br"), _element("b", f"Warning:{of}"), f" {what}")]


def _galleries(shards: Iterable[Mapping[str, Any]]) -> list[Element]:
    cards = []
    for facts in shards:
        if (preview := present(opened(facts["path"]) / "preview.png")) is None:
            continue
        confidence = "" if facts["confidence"] is None else f", mean teacher confidence {facts['confidence']:.3f}"
        seed = "" if facts["seed"] is None else f", seed {facts['seed']}"
        used = f", uses {', '.join(facts['uses'])}" if facts["uses"] else ""
        caption: list[Element | str] = [_element("b", facts["method"])]
        caption += [f"{used}{seed}: {facts['count']:,} images{confidence}", *_warnings(facts["concerns"])]
        caption += [_element("br"), _element("code", facts["path"])]
        images = _figure(preview.read_bytes(), f"images of {facts['path']}", *caption, style="pixels")
        cards.append(_element("div", images, *_terms(facts)))
    if not cards:
        return []
    note = "From the first rounds, on top, to the last. Each image is stretched to the full range by itself."
    return [_element("h2", "Transfer sets"), _element("p", note), _element("div", {"class": "cards"}, *cards)]


def _terms(facts: Mapping[str, Any]) -> list[Element]:
    """The loss terms that the images of each round ended with, below them; nothing where none were optimised."""
    drawn = charts.curves([read_curves(opened(facts["path"]) / "metrics.csv")])
    caption = "Its loss terms, unweighted, and what is watched, over the rounds"
    return [_figure(drawn, f"loss terms of {facts['path']}", caption)] if drawn else []


def _provenance(rows: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> list[Element]:
    columns = ("DIRECTORY", "SHA-256", "COMMAND", "VERSIONS")
    directories = [run for row in rows for run in row["runs"]] + list(results["shards"])
    texts = [("", [m["path"], m["sha256"][:16], _command(m["argv"]), _versions(m["versions"])]) for m in directories]
    command = _element("code", _command(results["argv"]))
    return [
        _element("h2", "Provenance"),
        _element("p", "This report: ", command, f" ({_versions(results['versions'])})"),
        _table(columns, texts, left=columns),
    ]


def _table(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], left: Sequence[str] = table.LEFT
) -> Element:
    """A table that scrolls by itself; each row has a class and its texts."""

    def line(tag: str, texts: Sequence[str], role: str = "plain") -> Element:
        styles: list[dict[str, str]] = [{"class": "words"} if column in left else {} for column in columns]
        cells = (_element(tag, style, text) for style, text in zip(styles, texts, strict=True))
        return _element("tr", {"class": role}, *cells)

    body = [line("td", texts, role or "plain") for role, texts in rows]
    whole = _element("table", _element("thead", line("th", columns)), _element("tbody", *body))
    return _element("div", {"class": "scroll"}, whole)


def _figure(png: bytes, alt: str, *caption: Element | str, style: str = "") -> Element:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    image = _element("img", {"class": style}, alt=alt, src=f"data:image/png;base64,{data}")
    return _element("figure", image, _element("figcaption", *caption))


def _command(argv: Sequence[str] | None) -> str:
    return " ".join(map(str, argv or ["-"]))


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
