"""From models and what was measured of them to the rows of a comparison: plain values, as in ``results.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkd_cli.report.entries import Model
from dfkd_cli.report.sections import Section

Measures = Mapping[str, Any]  # of one model: top1, agreement, ...


def spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, sample standard deviation (None of one value) and the values themselves; None where one is not known.

    The mean of some seeds alone would stand beside those of all.
    """
    given = list(values)
    numbers = [value for value in given if value is not None]
    if not numbers or len(numbers) < len(given):
        return None
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "sd": sd, "values": numbers}


def rows(section: Section, measured: Mapping[Path, Measures]) -> list[dict[str, Any]]:
    """The section's rows: teacher, then the others by mean top-1, best first.

    Args:
        section: The models.
        measured: What was measured of each model, by its path.
    """
    groups: dict[str, list[Model]] = {}
    for model in section.members:
        group = groups.setdefault(model.key, [])
        if model.sha256 not in {other.sha256 for other in group}:  # a copy is no repeat
            group.append(model)
    labels = _labels([group[0] for group in groups.values()])
    teachers = list(section.teachers.values())
    teacher_row = [_row("teacher", "teacher", teachers, section, measured)]
    students = [
        _row("student" if group[0].teacher else "baseline", label, group, section, measured)
        for label, group in zip(labels, groups.values(), strict=True)
    ]
    return teacher_row + sorted(students, key=lambda row: -row["top1"]["mean"])


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows that are points of curves over the number of images: by curve, smallest set first."""
    by_series: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted((row for row in rows if row["series"]), key=lambda row: (row["series"], row["num_images"])):
        by_series.setdefault(row["series"], []).append(row)
    return by_series


def _row(
    role: str, label: str, models: Sequence[Model], section: Section, measured: Mapping[Path, Measures]
) -> dict[str, Any]:
    models = sorted(models, key=lambda model: _seed(model) or 0)
    runs = [_run(model, section, measured) for model in models]
    first = models[0]
    return {
        "label": label,
        "role": role,
        "model": first.record.get("spec"),
        "cotrained": _cotrained(first),
        "data_free": bool(first.provenance.get("data_free")),
        "uses": list(first.provenance.get("uses", ())),
        "series": first.series,
        "num_images": first.provenance.get("num_images"),
        "queries": first.run.get("metrics", {}).get("queries"),
        "parameters": first.parameters,
        "bytes": runs[0]["measures"].get("bytes"),
        "latency_ms": spread([runs[0]["measures"].get("latency_ms")]),  # measured once: repeats are of one architecture
        "seeds": [run["seed"] for run in runs],
        "top1": spread(run["measures"]["top1"] for run in runs),
        "published": first.published,
        "gap": spread(run["gap"] for run in runs) if role != "teacher" else None,
        "agreement": spread(run["measures"].get("agreement") for run in runs) if role != "teacher" else None,
        **{name: spread((run[name] or {}).get("top1") for run in runs) for name in ("selected", "best_test")},
        "seconds": {name: spread(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]},
        "settings": first.settings,
        "runs": runs,
    }


def _run(model: Model, section: Section, measured: Mapping[Path, Measures]) -> dict[str, Any]:
    teacher = section.teacher_of(model)
    curves = model.curves()
    kept = measured[model.path].get("snapshots", [])
    return {
        "path": str(model.path),
        "sha256": model.sha256,
        "seed": _seed(model),
        "teacher": None if model is teacher else teacher.sha256,
        "measures": dict(measured[model.path]),
        "gap": measured[model.path]["top1"] - measured[teacher.path]["top1"],  # below zero: worse than the teacher
        "seconds": model.seconds,
        "work": {str(directory): seconds for directory, seconds in model.work.items()},
        "selected": None if _cotrained(model) else _selected(kept, curves.get("agreement", [])),
        "best_test": max(kept, key=lambda snapshot: snapshot["top1"], default=None),
        "rounds": len(curves.get("round", [])),
        "last": {name: column[-1] for name, column in curves.items() if math.isfinite(column[-1])},
        "shards": [s.facts() for s in model.shards],
        "concerns": model.run.get("concerns", []),
        **{key: model.run.get(key) for key in ("device", "sealed", "argv", "versions", "started")},
    }


def _cotrained(model: Model) -> bool:
    """Whether it is a student in the loop: it is measured on the images of a round before that, and kept after it."""
    return bool(model.provenance.get("command") == "synthesize")


def _selected(kept: Sequence[Mapping[str, Any]], agreement: Sequence[float]) -> Mapping[str, Any] | None:
    """The snapshot that agrees most with the teacher, the latest of equals: no test data is used."""
    measured = [snapshot for snapshot in kept if snapshot["round"] < len(agreement)]
    return max(measured, key=lambda snapshot: (agreement[snapshot["round"]], snapshot["round"]), default=None)


def _seed(model: Model) -> int | None:
    return model.provenance.get("seed")


def _labels(models: Sequence[Model]) -> list[str]:
    """The models' labels; where two of them are the same, with the settings, or the teachers, that tell them apart."""

    def facts(model: Model) -> dict[str, Any]:
        return {**_flat(model.settings), "teacher": (model.taught_by or "")[:8]}

    labels = []
    for model in models:
        same = [facts(other) for other in models if other.label == model.label]
        own = facts(model)
        if "student" in own:
            own.pop("model", None)  # which says the same
        varying = [k for k in own if any(own[k] != other.get(k) for other in same)]
        told = ", ".join(f"{key.rpartition('.')[2]} {own[key]}" for key in varying)
        labels.append(f"{model.label} ({told})" if told else model.label)
    return labels


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in items:
        flat |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat
