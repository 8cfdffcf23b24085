"""Measures the models of a comparison, each once: what was measured is kept for a continued run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.files import digest, write_json
from dfkd_cli.artifacts.records import read_json
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.data import datasets
from dfkd_cli.data.sources import RealSource
from dfkd_cli.models.names import LoadedModel, Location
from dfkd_cli.report.entries import Model
from dfkd_cli.stages.measures import Examiner, top1
from dfkd_cli.stages.snapshots import look_back
from dfkd_cli.trust import Code
from dfkd_cli.ui import Progress, finite

MEASUREMENTS = "measurements.json"


class Meter:
    """Measures every model with the same code, once: a continued run takes the numbers that were kept."""

    def __init__(self, run: RunDirectory, examiner: Examiner, code: Code, progress: Progress) -> None:
        self.run, self.file, self.examiner, self.progress = run, run.path / MEASUREMENTS, examiner, progress
        self.open: Callable[[Location], LoadedModel] = lambda location: location.open(code)
        self.open_teacher = functools.lru_cache(1)(self.open)
        self.taken = {} if run.kept(self.file) is None else read_json(self.file, dict[str, dict[str, Any]])
        self.contents = functools.cache(datasets.contents)  # once for all models
        self.done = 0

    def measure(self, model: Model, teacher: Model, dataset: str) -> dict[str, Any]:
        """What is measured of a model on test images, its agreement with the teacher included."""
        contents = [content["sha256"] for content in self.contents(dataset, self.examiner.data_dir)]
        names = digest([model.record.get("classes"), teacher.record.get("classes")])
        key = " ".join([model.sha256, teacher.sha256, names, dataset, *contents])
        if key not in self.taken:
            opened = self.open(model.location)
            measures = self.examiner.measure(opened, self.open_teacher(teacher.location), dataset)
            self.taken[key] = finite(measures | {"snapshots": self._look_back(model.path, opened, dataset)})
            self.run.keep(self.file, write_json(self.file, self.taken))
            self.run.save()
        self.done += 1
        self.progress.update(self.done)
        return self.taken[key]

    def _look_back(self, path: Path, model: LoadedModel, dataset: str) -> list[dict[str, Any]]:
        """Top-1 of the model at each round that it kept, ``{"round": ..., "top1": ...}``."""
        classifier = model.classifier.to(self.examiner.device)
        source = RealSource(self.examiner.images(dataset, classifier.info, model.path))
        share = functools.partial(top1, classifier, source, self.examiner.batch_size)
        return [{"round": index, "top1": share()} for index in look_back(path, classifier)]
