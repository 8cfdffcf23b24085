"""Assistants between a teacher and a student: each hop is a distillation into a model directory of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dfkd_cli import catalog
from dfkd_cli.artifacts.integrity import read_run
from dfkd_cli.models.names import LoadedModel, ModelDirectory
from dfkd_cli.options import Assisted
from dfkd_cli.settings import Component, Settings
from dfkd_cli.stages.snapshots import SNAPSHOTS
from dfkd_cli.ui import Terminal

ASSISTANTS = "assistants"
STUDENT = "student"  # the role of what a search trains for the student's place


@dataclasses.dataclass(frozen=True)
class Hop:
    """A network and who has taught it.

    Attributes:
        path: The SPECs from the first assistant to this one; of the teacher none.
        model: It.
        agreement: Its agreement with the first teacher on the transfer set.
    """

    path: tuple[str, ...]
    model: LoadedModel
    agreement: float


class Chain:
    """Hops that are made as they are asked for, each once: those that are finished are taken as they are.

    Args:
        settings: Of the whole command.
        teacher: The first teacher.
        teach: Trains a network with a teacher, by the settings of a hop; the role decides its first weights.
    """

    def __init__(
        self, settings: Settings, teacher: LoadedModel, teach: Callable[[Settings, LoadedModel, str], object]
    ) -> None:
        self.settings, self.teach, self.start = settings, teach, Hop((), teacher, 1.0)
        self.snapshots = settings.inputs.snapshots  # of what is trained in the student's place

    def hop(self, teacher: Hop, spec: str, role: str | None = None, snapshots: int = 0) -> Hop:
        """A network of that SPEC, taught by a teacher: an assistant, or something else by its role."""
        path = (*teacher.path, spec)
        name = "--".join(re.sub(r"[^\w.-]+", "_", name).lstrip("._") for name in path)
        place = self.settings.out / ASSISTANTS / (f"{name}.{SNAPSHOTS}" if snapshots else name)
        offline, own = catalog.find("regimes", "offline", "method"), self.settings.method.config
        taught = offline.config(teacher_epochs=own.teacher_epochs, fade=own.fade)
        hop = dataclasses.replace(
            self.settings,
            inputs=dataclasses.replace(self.settings.inputs, student=spec, snapshots=snapshots),
            run=dataclasses.replace(self.settings.run, out=str(place), overwrite=False),
            components=self.settings.components | {"method": (Component(offline, taught),)},
        )
        self.teach(hop, teacher.model, role or f"assistant {len(path)}")
        agreement = read_run(place)["metrics"]["agreement_on_transfer_set"]
        return Hop(path, ModelDirectory(str(place)).open(self.settings.code), agreement)

    def dense(self, assistants: Sequence[str]) -> Hop:
        """The last of all assistants, each taught by the one before."""
        last = self.start
        for spec in assistants:
            last = self.hop(last, spec)
        return last

    def midway(self, assistants: Sequence[str], student: str) -> Hop:
        """Of assistants that the teacher has taught the one whose agreement lies midway to that of such a student."""
        middle = (1 + self.hop(self.start, student, STUDENT).agreement) / 2
        return min((self.hop(self.start, spec) for spec in assistants), key=lambda hop: abs(hop.agreement - middle))

    def best(self, assistants: Sequence[str], student: str) -> Hop:
        """The student of the path on which it agrees most. The best path to each network goes on to those after it."""
        reached = [self.start]
        for spec in assistants:
            reached.append(self._best(reached, spec))
        return self._best(reached, student, STUDENT, self.snapshots)

    def _best(self, teachers: Sequence[Hop], spec: str, role: str | None = None, snapshots: int = 0) -> Hop:
        return max((self.hop(teacher, spec, role, snapshots) for teacher in teachers), key=lambda hop: hop.agreement)


def who_teaches_whom(config: Assisted, student: str) -> Iterable[tuple[str | None, str]]:
    """The SPECs of each teacher, None for the first, and the network that it teaches on some way to such a student."""
    assistants, way = config.through(student), getattr(config, "path", "dense")
    if way == "auto":
        return [(None, student), *((None, spec) for spec in assistants), *((spec, student) for spec in assistants)]
    stations = [None, *assistants, student]
    pairs = itertools.pairwise(stations) if way == "dense" else itertools.combinations(stations, 2)
    return ((teacher, taught) for teacher, taught in pairs if taught is not None)


def follow(
    settings: Settings,
    teacher: LoadedModel,
    teach: Callable[[Settings, LoadedModel, str, Terminal], object],
    terminal: Terminal,
) -> tuple[LoadedModel, Path | None]:
    """Go the way from the teacher to the student that the method's settings say.

    Args:
        settings: Of the command; its method has assistants.
        teacher: The first teacher.
        teach: Trains a network with a teacher, by the settings of a hop and a role.
        terminal: Where progress goes.

    Returns:
        Who is to teach the student, and the directory of the student where the search has trained it already.
    """
    config: Assisted = settings.method.config
    student = settings.inputs.student
    aside = Terminal(terminal.verbosity, as_json=True, silent=terminal.silent)  # a hop is no answer

    def said(hop: Settings, taught_by: LoadedModel, role: str) -> None:
        terminal.say(f"{taught_by.path} teaches {hop.inputs.student} -> {hop.out}")
        teach(hop, taught_by, role, aside)

    chain, assistants = Chain(settings, teacher, said), config.through(student)
    way = getattr(config, "path", "dense")
    if way == "dense":
        return chain.dense(assistants).model, None
    if way == "auto":
        return chain.midway(assistants, student).model, None
    best = chain.best(assistants, student)
    return teacher if len(best.path) == 1 else chain.dense(best.path[:-1]).model, Path(best.model.path)
