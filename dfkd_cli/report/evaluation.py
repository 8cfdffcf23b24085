"""The tables of an evaluation: a row for each path, by kinds, and one for each line between models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfkd_cli.tables import Columns
from dfkd_cli.urls import named

# Left out of a narrow terminal, in this order.
_EXPENDABLE = (
    "MACS", "PARAMS", "BYTES", "LATENCY", "USES", "TARGET MATCH", "BN DISTANCE", "DIVERSITY", "ECE", "NLL", "TOP-5",
    "BALANCE", "CONFIDENCE",
)  # fmt: skip
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
        ("TEACHER", "teacher", str),
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


def rows(results: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Columns:
    """What was measured; a column in which no result has anything is left out, and a teacher that all have."""
    if len({result.get("teacher") for result in results}) == 1:
        columns = [column for column in columns if column[1] != "teacher"]
    texts = {
        heading: ["-" if result.get(key) in (None, []) else show(result[key]) for result in results]
        for heading, key, show in columns
        if any(result.get(key) not in (None, []) for result in results)
    }
    words = [heading for heading, key, _ in columns if key in ("path", "teacher")]
    return Columns(texts, words, folds=next(iter(words), ""), spare=_EXPENDABLE)


def layers(results: Sequence[Mapping[str, Any]]) -> Columns:
    """The divergence of every set in each BatchNorm layer of its teacher."""
    measured = {result["path"]: result["bn_divergence_layers"] for result in results}
    names = list(dict.fromkeys(layer for of_one in measured.values() for layer in of_one))
    columns = {path: [_divergence(of_one.get(layer)) for layer in names] for path, of_one in measured.items()}
    return Columns({"BN DIVERGENCE": names, **columns}, ("BN DIVERGENCE",))


def _divergence(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
