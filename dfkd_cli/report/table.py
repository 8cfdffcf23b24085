"""The rows of a comparison as a table for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from dfkd_cli.report.results import curves, spread
from dfkd_cli.tables import Columns

LEFT = ("ROW", "STUDENT", "SEEDS", "DATA")  # columns of words
# Left out of a narrow terminal, in this order.
_EXPENDABLE = (
    "PARAMS", "BYTES", "LATENCY ms", "BEST TEST %", "SELECTED %", "REACHED s", "IMAGES", "QUERIES", "SEEDS",
    "STUDENT", "AGREEMENT %", "DISTILLATION s", "SYNTHESIS s", "TOTAL s",
)  # fmt: skip
_SEEDS_SHOWN = 5


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row's texts by column. Top-1, gap and agreement are in percentage points.

    Top-1 is the last epoch's. ``SELECTED`` is that of the snapshot with the best agreement on held-out images of the
    transfer set; ``BEST TEST`` that of the best snapshot on the test images, which many papers print.
    ``REACHED`` is after how many of the seconds a snapshot was as good on the test images as the published figure.
    """
    training, total = (row["seconds"][name] if row["role"] == "student" else None for name in ("training", "total"))
    seeds = [str(seed) for seed in row["seeds"] if seed is not None]
    return {
        "ROW": row["label"],
        "STUDENT": (row["model"] or "") + (", in the loop" if row.get("cotrained") else ""),
        "TOP-1 %": _points(row["top1"]),
        "PUBLISHED %": "-" if row["published"] is None else f"{100 * row['published']:.2f}",
        "SELECTED %": _points(row["selected"]),
        "BEST TEST %": _points(row["best_test"]),
        "GAP": _points(row["gap"], sign="+"),
        "AGREEMENT %": _points(row["agreement"]),
        "IMAGES": _count(row["num_images"]),
        "QUERIES": _count(row.get("queries")),  # of a black box; older results have none
        "SYNTHESIS s": seconds(row["seconds"]["synthesis"]),
        "DISTILLATION s": seconds(training),
        "TOTAL s": seconds(total),
        "REACHED s": seconds(reached(row)),
        "PARAMS": _count(row["parameters"]),
        "BYTES": _count(row.get("bytes")),  # older results have neither
        "LATENCY ms": _number(row.get("latency_ms"), 2),
        "SEEDS": " ".join(seeds) if len(seeds) <= _SEEDS_SHOWN else f"{len(seeds)} seeds",
        "DATA": data(row),
    }


def data(row: Mapping[str, Any]) -> str:
    """Whether real images were needed: to learn from, or for something the images were made with."""
    if not row["data_free"]:
        return "real data"
    return f"uses {', '.join(row['uses'])}" if row["uses"] else "data-free"


def reached(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds of all the work until the first snapshot that is as good on the test images as the published figure.

    Rounds of one run count alike. None where a seed has no such snapshot, or there is no figure.
    """
    if row["published"] is None or row["role"] != "student":
        return None
    return spread(_reached(run, row["published"]) for run in row["runs"])


def _reached(run: Mapping[str, Any], top1: float) -> float | None:
    good = (snapshot["round"] for snapshot in run["measures"].get("snapshots", []) if snapshot["top1"] >= top1)
    # A student in the loop lies in the run that trained it.
    own = (took for place, took in _work(run).items() if took is not None and Path(run["path"]).is_relative_to(place))
    first, last, total = next(good, None), next(own, None), run["seconds"]["total"]
    if first is None or last is None or total is None:
        return None
    return float(total - last * (1 - (first + 1) / run["rounds"]))


def _work(run: Mapping[str, Any]) -> Mapping[str, float | None]:
    """The seconds of everything that was done for a model, by directory."""
    # Results that were kept before this was in them have one model of each run.
    return run.get("work") or {
        run["path"]: run["seconds"]["training"],
        **{shards["path"]: shards["seconds"] for shards in run["shards"]},
    }


def failed_cells(section: Mapping[str, Any]) -> list[dict[str, str]]:
    """The texts, as far as there are any, of the rows that failed in whole or in part."""
    seeds: dict[str, list[str]] = {}
    for failure in section["failed"]:
        seeds.setdefault(failure["row"], []).append(str(failure["seed"]))
    return [{"ROW": row, "TOP-1 %": "failed", "SEEDS": " ".join(failed)} for row, failed in seeds.items()]


def headline(section: Mapping[str, Any]) -> str:
    """One line: test images, teacher, repeats, what kept data out, and for how long all runs worked, on what."""
    teacher = section["rows"][0]
    name = f"{section['teacher']} ({teacher['model']})" if section["teacher"] else teacher["model"]
    seeds = {seed for row in section["rows"][1:] for seed in row["seeds"]}
    repeats = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}" if seeds else "no students"
    top1 = _points(teacher["top1"])
    runs = [run for row in section["rows"] for run in row["runs"]]
    works = [work for run in runs for work in (run, *run["shards"])]
    devices = {work["device"] for work in works} - {None}
    seals = {"landlock", "python"} & {str(work.get("sealed")) for work in works}
    kept = f"data kept out by {' and '.join(sorted(seals))}; " if seals else ""
    return (
        f"{section['test_images']:,} test images of {section['dataset']}; teacher {name}: top-1 {top1} %; "
        f"{repeats}; {kept}{worked(section)} of work on {', '.join(sorted(devices)) or 'unknown devices'}"
    )


def worked(section: Mapping[str, Any]) -> timedelta:
    """The time that the runs of a section took in all, as far as it is known; each counts once."""
    took: dict[str, float | None] = {}
    for run in (run for row in section["rows"] for run in row["runs"]):
        took |= _work(run)
    return timedelta(seconds=round(sum(seconds or 0.0 for seconds in took.values())))


def failures(section: Mapping[str, Any]) -> list[str]:
    """One line for each way in which a row failed."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for f in section["failed"]:
        why = f"{f['command']} failed: {f['message']}" + (f" -- {f['hint']}" if f["hint"] else "")
        seeds.setdefault((f["row"], why), []).append(str(f["seed"]))
    return [f"{row}, seed {' '.join(failed)}: {why}" for (row, why), failed in seeds.items()]


def terminal_table(section: Mapping[str, Any]) -> Columns:
    """The rows of a section."""
    return Columns(filled(section), LEFT, folds="ROW", spare=_EXPENDABLE, rest="table.md")


def for_terminal(results: Mapping[str, Any]) -> Iterator[str | Columns]:
    """The parts of what is in ``results.json`` for a terminal, from top to bottom."""
    for section in results["sections"]:
        yield headline(section)
        yield terminal_table(section)
        if pivot := by_size(section):
            yield "top-1 % by images in the transfer set:"
            columns = {head: texts for head, *texts in zip(*pivot, strict=True)}
            yield Columns(columns, ("IMAGES",), folds="IMAGES")
        yield from failures(section)


def markdown(results: Mapping[str, Any], left_out: Container[str] = ()) -> str:
    """``table.md`` of what is in ``results.json``, without the columns that are to be left out."""
    blocks = []
    for section in results["sections"]:
        columns = {name: texts for name, texts in filled(section).items() if name not in left_out}
        rows = (map(escape, row) for row in zip(*columns.values(), strict=True))
        lines = [escape(headline(section)), "", *markdown_table(list(columns), rows)]
        if pivot := by_size(section):
            points = (map(escape, row) for row in pivot[1:])
            lines += [
                "",
                "Top-1 by images in the transfer set:",
                "",
                *markdown_table(pivot[0], points, left=("IMAGES",)),
            ]
        lines += [f"\n{escape(line)}" for line in failures(section)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]], left: Container[str] = LEFT) -> list[str]:
    """The lines of a table whose cells are Markdown; the columns in ``left`` hold words."""
    rule = [":--" if name in left else "--:" for name in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def plain_rows(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that are not points of a curve."""
    return [row for row in section["rows"] if not row["series"]]


def by_size(section: Mapping[str, Any]) -> list[list[str]]:
    """Top-1 in per cent over the number of images: the head, then a row for each curve. Empty without curves."""
    series = curves(section["rows"])
    sizes = sorted({row["num_images"] for rows in series.values() for row in rows})
    texts = []
    for name, rows in series.items():
        by_count = {row["num_images"]: _points(row["top1"]) for row in rows}
        texts.append([name, *(by_count.get(size, "-") for size in sizes)])
    return [["IMAGES", *map(_count, sizes)], *texts] if texts else []


def filled(section: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns in which any row has something, each with the texts of all rows, those that failed last."""
    rows = [*map(cells, plain_rows(section)), *failed_cells(section)]
    columns = {name: tuple(row.get(name, "") for row in rows) for name in rows[0]}
    return {name: texts for name, texts in columns.items() if set(texts) - {"", "-"}}


def escape(text: str) -> str:
    """Text as Markdown on one line, in which no character has a meaning."""
    for mark in "\\|<`*_[":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def seconds(spread: Mapping[str, Any] | None) -> str:
    """Seconds, mean and standard deviation."""
    return _number(spread, 1)


def _points(spread: Mapping[str, Any] | None, sign: str = "") -> str:
    """Fractions in per cent."""
    return _number(spread, 2, 100, sign)


def _number(spread: Mapping[str, Any] | None, digits: int, scale: float = 1, sign: str = "") -> str:
    if spread is None:
        return "-"
    text = f"{scale * spread['mean']:{sign}z.{digits}f}"  # z: no -0.00
    return text if spread["sd"] is None else f"{text} ± {scale * spread['sd']:.{digits}f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
