"""Train a smaller student from a teacher and a transfer set.

Reads a teacher and transfer sets, writes a model directory (student/). The flags of an objective: dfkd distill
--objective NAME --help
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dfkd_cli import catalog
from dfkd_cli.artifacts.run import RunDirectory
from dfkd_cli.catalog import Choice, Command
from dfkd_cli.config import build, option
from dfkd_cli.data.seal import check_kept, kept, kept_by, sealed
from dfkd_cli.data.sources import Classified, Concat, Source, first, of_each_class
from dfkd_cli.errors import ConfigError
from dfkd_cli.models.black_box import BlackBox
from dfkd_cli.models.classifier import Classifier, undisturbed
from dfkd_cli.models.names import LoadedModel, locate, together
from dfkd_cli.objectives.base import Objective
from dfkd_cli.options import Assisted, PerClass, SeenTeacher, Training
from dfkd_cli.regimes.base import Task
from dfkd_cli.settings import Component, Settings
from dfkd_cli.stages.calibrate import calibrate, check
from dfkd_cli.stages.chain import follow, who_teaches_whom
from dfkd_cli.stages.inputs import TransferSet, may_be_real, open_transfer_set, real_data
from dfkd_cli.stages.measures import agreement
from dfkd_cli.stages.quantization import calibrate_copies
from dfkd_cli.stages.training import Work, architectures, connect, fresh, rehearse, students, taught_by, train
from dfkd_cli.ui import Terminal

REHEARSED = 20  # images, of which the share that a regime keeps is a batch of two


@dataclass(frozen=True, kw_only=True)
class Inputs(PerClass, Training, SeenTeacher):
    """What is read, and how."""

    teacher: tuple[str, ...] = option(
        ("teacher",), "teacher: model directory or SPEC; of several, their mean", parent=True
    )
    combine: Literal["probabilities", "logits"] = option("probabilities", "what of several teachers is averaged")
    queries: int | None = option(None, "most images that a black box is asked about, each once", low=1, volatile=True)
    transfer_set: tuple[str, ...] = option(
        ("shards",),
        "shard or generator directory, real, real:N, a dataset's name, NAME:N, noise:N, folder of images",
        parent=True,
    )
    num_images: int | None = option(
        None, "take the first so many images of the transfer sets (default: all)", low=1, rehearsal=2
    )
    student: str = option(
        "lenet5-half", "student model SPEC, as of train-teacher --model; of a directory, the architecture"
    )
    epochs: int = 30
    # Mild, so that any network's images stay images to it. From impressions, which are alike, small networks without
    # BatchNorm learn more where these are changed strongly, as in the recipes for LeNets.
    rotate: float = 10.0
    translate: float = 0.1
    scale: float = 0.1
    data_dir: str | None = option(None, "where datasets lie, for real images", volatile=True)
    holdout: float = option(0.02, "share of the images that only measures agreement")

    def __post_init__(self) -> None:
        """Only answers are counted."""
        super().__post_init__()
        if self.queries is not None and not self.only_asked:
            raise ConfigError(f"--queries {self.queries}: only a black box counts them", "give --answers too")


def data_free(inputs: Inputs) -> bool:
    """Unless a transfer set is real, no dataset may be opened."""
    return not any(map(may_be_real, inputs.transfer_set))


COMMAND = Command(
    position=40,
    out="student",
    choices=(
        Choice("method", "regimes", "offline"),
        Choice("objective", "objectives", "response", several=True, beside="objective"),
    ),
    shared=True,
    examples=("dfkd distill --transfer-set shards/", "dfkd distill --transfer-set real:200 --student lenet5-half"),
    next="dfkd evaluate",
)


@dataclass
class Job:
    """What a distillation works on.

    Attributes:
        members: The models that the command names as its teacher.
        first: The teacher that the command names, which agreement is with.
        teacher: Who teaches now: that one, or an assistant that it has taught.
        sets: The transfer sets.
        sealed: No dataset can be opened: all of them are named by themselves.
        student: The network to train.
        peers: More of them, where the method has several students.
        objectives: The losses between teacher and students by name, with their weights.
        needing: The method and the objectives that learn from labels, by name.
        chosen: The images that were chosen so far, by how many were wanted of each class and of all.
    """

    members: list[LoadedModel]
    first: LoadedModel
    teacher: LoadedModel
    sets: list[TransferSet]
    sealed: bool
    student: Classifier
    peers: list[Classifier]
    objectives: dict[str, tuple[float, Objective]]
    needing: Sequence[str] = ()
    chosen: dict[tuple[int | None, int | None], Source] = field(default_factory=dict)

    def task(self, settings: Settings) -> Task:
        """The networks, the losses, and as many of the images as the settings say."""
        inputs, seed = settings.inputs, settings.run.seed
        wanted = inputs.images_per_class, inputs.num_images
        if wanted not in self.chosen:
            self.chosen[wanted] = self._choose(*wanted)
        images = self.chosen[wanted]
        return Task(self.student, self.teacher.classifier, images, self.objectives, inputs, seed, self.peers)

    def _choose(self, of_each: int | None, count: int | None) -> Source:
        source: Source = Concat([s.source for s in self.sets])
        if of_each:
            info = self.first.classifier.info
            source = of_each_class(source, of_each, info.classes or [str(index) for index in range(info.num_classes)])
        elif count is not None:
            if count > len(source):
                raise ConfigError(f"--num-images: {count} images are wanted, the transfer sets have {len(source)}")
            source = first(source, count)
        return Classified(source, self.classes) if self.needing and not source.labelled else source

    def between(self, teacher: LoadedModel, student: Classifier, settings: Settings) -> Job:
        """The same for other networks, with objectives that are connected to these."""
        losses = connect(settings.components["objective"], student, teacher.classifier, settings.run.seed)
        return dataclasses.replace(self, teacher=teacher, student=student, peers=[], objectives=losses)

    def classes(self, pixels: Tensor) -> Tensor:
        """The classes (B,) that the first teacher gives to pixels (B, C, H, W), all on the CPU."""
        teacher = self.first.classifier
        with undisturbed(teacher):
            return teacher(pixels.to(teacher.mean.device)).argmax(1).cpu()

    @property
    def labels_note(self) -> str | None:
        """What is said where labels are learned from that are not the images' own."""
        hard = [name for name, (weight, loss) in self.objectives.items() if weight and getattr(loss.config, "hard", 0)]
        labelled = [s for s in self.sets if s.source.labelled]
        who = [*self.needing, *(f"hard labels of {name}" for name in hard if name not in self.needing)]
        if not who or len(labelled) == len(self.sets):
            return None
        whose = (
            "not all transfer sets have labels, so also for real images" if labelled else "the images have no labels"
        )
        return f"{', '.join(who)}: {whose}, the teacher's classes are taken"

    @property
    def data_free(self) -> bool:
        """Whether none of the images is real, nor made of real ones."""
        return self.sealed and not any(s.real for s in self.sets)

    @property
    def uses(self) -> list[str]:
        """What was made from real images and used for the transfer sets."""
        return sorted({use for s in self.sets for use in s.uses})


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Train a student. Unless a transfer set is real, no dataset can be opened meanwhile."""
    alone = {
        "the hops of a chain are trained": isinstance(settings.method.config, Assisted),
        "a black box is asked": settings.inputs.only_asked,
    }
    for what in (what for what, holds in alone.items() if holds and settings.run.devices * settings.run.num_nodes > 1):
        raise ConfigError(f"{what} by one process", "give --devices 1 --num-nodes 1")
    with opened(settings) as job:
        settings = with_answers(settings, job, terminal)
        task = job.task(settings)
        if task.objectives:
            check(task)
        if isinstance(settings.method.config, Assisted):
            _check_hops(settings, job)
        if note := job.labels_note:
            terminal.say(note)
        if not dry_run:
            return learn(settings, job, terminal)
        settings.method.entry.load()(task, settings.method.config)  # of all images: are they, and --queries, enough?
        known = "teacher" in settings.method.entry.needs and not isinstance(task.teacher, BlackBox)  # which costs
        if known:
            calibrate_copies(task, Terminal(silent=True))  # until then a copy answers as the teacher does
        measured = calibrate(task) if known else []

        def short(cut: Settings, quiet: Terminal) -> dict[str, Any]:
            if not isinstance(task.teacher, BlackBox):  # whose answers cost
                cut = cut.replace(num_images=min(len(task.source), REHEARSED))
            losses = connect(cut.components["objective"], job.student, job.teacher.classifier, cut.run.seed)
            return learn(cut, dataclasses.replace(job, objectives=losses), quiet)

        answer = rehearse(settings, short, terminal)
    for term in measured:
        terminal.answer(str(term))
    return answer | {"terms": [dataclasses.asdict(term) for term in measured]}


def _check_hops(settings: Settings, job: Job) -> None:
    """Make every network of a chain, and pair each two that a hop has, before the first of them is trained."""
    networks: dict[str | None, Classifier] = {None: job.teacher.classifier}
    for teacher, taught in who_teaches_whom(settings.method.config, settings.inputs.student):
        if taught not in networks:
            networks[taught] = _assistant(settings, job.teacher, taught, "assistant")
        connect(settings.components["objective"], networks[taught], networks[teacher], settings.run.seed)


def _assistant(settings: Settings, teacher: LoadedModel, spec: str, role: str) -> Classifier:
    """A network that learns between the teacher and the student, or in the student's place."""
    info = dataclasses.replace(teacher.classifier.info, spec=spec)
    return fresh(info, role, settings.run.seed, settings.code, taught_by(settings))


def learn(settings: Settings, job: Job, terminal: Terminal) -> dict[str, Any]:
    """Train the student of a job into its model directory."""
    task, teacher = job.task(settings), job.teacher
    parents = [
        *(model.parent("teacher") for model in ([teacher] if teacher is not job.first else job.members)),
        *(s.parent for s in job.sets),
        *(parent for named in architectures(settings, settings.inputs.student) for parent in named.parents),
    ]
    facts = {"data_free": job.data_free, "uses": job.uses, "num_images": len(task.source)}
    directory = RunDirectory(settings.out, settings, parents, facts, kept_by() if job.sealed else None)

    def work(teacher: LoadedModel, finished: Path | None = None) -> Work:
        task = (job if teacher is job.teacher else job.between(teacher, job.student, settings)).task(settings)

        def score(model: Classifier) -> dict[str, float]:
            at_once = task.training.at_once
            alike, most = agreement(model, job.first.classifier, task.source, at_once)
            scores = {"agreement_on_transfer_set": alike, "largest_class_of_transfer_set": most}
            if teacher is not job.first:
                scores["agreement_with_last_teacher"], _ = agreement(model, teacher.classifier, task.source, at_once)
            return scores

        provenance = {
            "command": "distill",
            "dataset": teacher.dataset,
            "data_free": job.data_free,
            "uses": job.uses,
            "seed": settings.run.seed,
            "teacher": teacher.sha256,
            "line": list(teacher.ancestry),
            "transfer_set": [{k: v for k, v in s.parent.items() if k in ("spec", "sha256")} for s in job.sets],
            "num_images": len(task.source),
        }
        return Work(task, provenance, score, finished)

    def teach(hop: Settings, mentor: LoadedModel, role: str, aside: Terminal) -> None:
        student = _assistant(settings, teacher, hop.inputs.student, role)
        learn(hop, job.between(mentor, student, hop), aside)

    def begin() -> Work:
        return work(*follow(settings, teacher, teach, terminal))

    chained = isinstance(settings.method.config, Assisted)
    answer = train(work(teacher), directory, terminal, begin if chained else None)
    shown = f"{directory.metric('agreement_on_transfer_set'):.2%} agreement with the teacher on the transfer set"
    terminal.answer(f"{answer['artifacts']['student']}: {shown}")
    return answer


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Job]:
    """Open the inputs. Unless a transfer set is real, no dataset can be opened inside the ``with`` block."""
    inputs, seed = settings.inputs, settings.run.seed
    without_data, locations = data_free(inputs), [locate(name, inputs) for name in inputs.teacher]
    with contextlib.ExitStack() as seals:
        if without_data:
            places = [place for location in locations for place in real_data(location, inputs.data_dir)]
            seals.enter_context(sealed("the transfer set is data-free", places))
            seals.enter_context(kept())
        members = [location.open(settings.code) for location in locations]
        teacher = together(members, inputs.combine).seen(inputs, inputs.queries)
        entries = [component.entry for chosen in settings.components.values() for component in chosen]
        needs = [need for entry in entries for need in entry.needs]
        sets = [open_transfer_set(name, teacher, inputs.data_dir, seed, needs) for name in inputs.transfer_set]
        info = dataclasses.replace(teacher.classifier.info, spec=inputs.student)
        student, peers = students(settings, info, "student")
        objectives = connect(settings.components["objective"], student, teacher.classifier, seed)
        check_kept()
        needing = [entry.name for entry in entries if "labels" in entry.needs]
        yield Job(members, teacher, teacher, sets, without_data, student, peers, objectives, needing)


def with_answers(settings: Settings, job: Job, terminal: Terminal) -> Settings:
    """The settings and, where all objectives are between features and the images have labels, these as an objective.

    Published figures of such objectives are beside labels: of features alone a student's head learns nothing.
    """
    losses = [loss for weight, loss in job.objectives.values() if weight]
    if not losses or any(loss.of_answers for loss in losses):
        return settings
    alone = f"{', '.join(job.objectives)}: from features alone the student's head learns nothing"
    if "response" in job.objectives or not all(s.source.labelled for s in job.sets):
        terminal.say(f"warning: {alone}: add --objective response")
        return settings
    entry = catalog.find("objectives", "response", "objective")
    labels = Component(entry, build(entry.config, {"soft": 0, "hard": 1}))
    job.objectives |= connect([labels], job.student, job.teacher.classifier, settings.run.seed)
    terminal.say(f"{alone}: it learns the labels beside them (--objective response=0: it does not)")
    objectives = (*settings.components["objective"], labels)
    return dataclasses.replace(settings, components=settings.components | {"objective": objectives})
