"""The numbers of each round, in ``metrics.csv``."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dfkd_cli.artifacts.files import digest, write_text
from dfkd_cli.artifacts.records import read_table
from dfkd_cli.errors import ArtifactError


class MetricsFile(Logger):
    """``metrics.csv``: one row per round. Rows that a continued run repeats are replaced by themselves.

    Attributes:
        rows: Of each round; of a file that is damaged none.
    """

    name = "metrics"
    version = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(ArtifactError, KeyError, ValueError):
            self.rows = {int(row["round"]): row for row in read_table(path)}

    def digest(self, rounds: int) -> str | None:
        """A hash of the first rows, as they are in the file; None where some are missing."""
        rows = [self.rows.get(index, {}) for index in range(rounds)]
        return (
            digest([{key: str(value) for key, value in row.items() if value != ""} for row in rows])
            if all(rows)
            else None
        )

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take a row; ``epoch`` is Lightning's name of the round."""
        index = int(metrics.pop("epoch"))
        self.rows[index] = {"round": index, **metrics}

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file."""
        write_csv(self.path, [self.rows[index] for index in sorted(self.rows)])

    def finalize(self, status: str) -> None:
        """Curves of an interrupted run are saved with its checkpoints."""
        if status == "success":
            self.save()


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys."""
    rows = list(rows)
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
