"""The tables of an evaluation: a row for each path, by kinds, and one for each line between models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dfkd_cli.urls import named

Column = tuple[str, str, Callable[[Any], str]]  # heading, key of a result, how its value is shown


TABLES: dict[tuple[str, ...], list[Column]] = {  # by the kinds of results
    ("model",): [
        ("MODEL", "path", str),
        ("TOP-1", "top1", "{:.2%}".format),
        ("TOP-5", "top5", "{:.2%}".format),
        ("NLL", "nll", "{:.4f}".format),
        ("ECE", "ece", "{:.2%}".format),
        ("AGREEMENT", "agreement", "{:.2%}".format),
        ("SHARPNESS", "sharpness", "{:.4g}".format),
        ("PARAMS", "parameters", "{:,}".format),
        ("BYTES", "bytes", "{:,}".format),
        ("MACS", "macs", "{:,}".format),
        ("LATENCY", "latency_ms", "{:.2f} ms".format),
        ("USES", "uses", " ".join),
    ],
    ("shards", "images"): [
        ("SET", "path", str),
        ("IMAGES", "count", "{:,}".format),
        ("CONFIDENCE", "confidence", "{:.3f}".format),
        ("BALANCE", "class_balance", "{:.3f}".format),
        ("TARGET MATCH", "target_match", "{:.2%}".format),
        ("AGREEMENT", "agreement", "{:.2%}".format),
        ("DIVERSITY", "diversity", "{:.3f}".format),
        ("BN DISTANCE", "bn_distance", "{:.3f}".format),
        ("BN DIVERGENCE", "bn_divergence", "{:.4g}".format),
        ("USES", "uses", " ".join),
    ],
}


def tables(unlabelled: Sequence[str]) -> dict[tuple[str, ...], list[Column]]:
    """The columns, with those of agreement on images without labels, by the kinds of results.

    In results, URLs stand for their copies.
    """

    def shown(name: str) -> Callable[[Any], str]:
        return lambda shares: f"{shares[name]:.2%}"

    more = [(f"AGREEMENT ON {name}", "agreement_on", shown(name)) for name in named(unlabelled)]
    return TABLES | {("model",): [*TABLES["model",], *more]}


def _loss_at(at: float) -> Callable[[Any], str]:
    """How the loss at a point of a line is shown."""

    def show(points: list[dict[str, Any]]) -> str:
        (loss,) = (point["loss"] for point in points if point["at"] == at)
        return "-" if loss is None else f"{loss:.4f}"

    return show


BETWEEN: list[Column] = [
    ("LINE", "path", str),
    ("LOSS", "points", _loss_at(0)),
    ("HALFWAY", "points", _loss_at(0.5)),
    ("AT THE END", "points", _loss_at(1)),
    ("BARRIER", "barrier", "{:.4f}".format),
]


def rows(results: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Table:
    """What was measured; a column in which no result has anything is left out."""
    table = Table(box=None, header_style="bold")
    columns = [column for column in columns if any(result.get(column[1]) not in (None, []) for result in results)]
    for heading, key, _ in columns:
        path = key == "path"
        table.add_column(Text(heading), justify="left" if path else "right", no_wrap=not path, overflow="fold")
    for result in results:
        table.add_row(*(Text("-" if result.get(key) in (None, []) else show(result[key])) for _, key, show in columns))
    return table


def layers(results: Sequence[Mapping[str, Any]]) -> Table:
    """The divergence of every set in each BatchNorm layer."""
    table = Table(box=None, header_style="bold")
    table.add_column("BN DIVERGENCE")
    for result in results:
        table.add_column(Text(result["path"]), justify="right", overflow="fold")
    for layer in results[0]["bn_divergence_layers"]:
        table.add_row(Text(layer), *(f"{result['bn_divergence_layers'][layer]:.4g}" for result in results))
    return table
