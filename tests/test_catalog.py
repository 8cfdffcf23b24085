"""The catalogue: what is read off the text of a file is what importing it gives, and a file is all that is needed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline import run_in_turn

import dfkd_cli
from dfkd_cli import catalog
from dfkd_cli.config import defaults, hints, options
from dfkd_cli.errors import ConfigError
from dfkd_cli.unimported import Module

METHODS = [
    entry for package in ("synthesizers", "objectives", "regimes") for entry in catalog.entries(package).values()
]


# -- text and import ---------------------------------------------------------------------------------------------------


def alike(read: type, imported: type) -> bool:
    """Whether two configuration classes have the same fields, in the same order."""
    same = all(look(read) == look(imported) for look in (hints, defaults, options))
    return same and list(hints(read)) == list(hints(imported))


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_a_method_is_what_its_text_says(entry):
    worker = entry.load()
    assert (entry.kind, entry.needs) == (worker.kind, worker.needs)
    assert entry.weight == getattr(worker, "default_weight", 1.0)
    assert alike(entry.config, sys.modules[worker.__module__].Config)


@pytest.mark.parametrize("command", catalog.commands().values(), ids=lambda command: command.name)
def test_a_command_is_what_its_text_says(command):
    module = sys.modules[command.load().__module__]
    assert replace(command, name="", help="") == module.COMMAND
    assert alike(command.inputs, module.Inputs)
    assert command.help.startswith(module.__doc__.partition("\n")[0])


def test_no_two_commands_stand_in_one_place():
    positions = [command.position for command in catalog.commands().values()]
    assert positions == sorted(set(positions))


BASES = """
import torch
from torch import nn
from dfkd_cli.synthesizers.deepinversion import DeepInversion
from dfkd_cli.synthesizers.cotraining import PoolTrainer
from dfkd_cli.synthesizers import deepinversion as inversion
import dfkd_cli.synthesizers.cotraining as pool

class Own(nn.Module):
    kind = "own"

class Restated(PoolTrainer, DeepInversion):
    needs: tuple[str, ...] = ("batchnorm", "student")

class Inherited(DeepInversion):
    scaled = True

class Computed(Own):
    kind = "".join(["no", "literal"])

class Mixed(Own, DeepInversion):
    pass

class Qualified(inversion.DeepInversion):
    pass

class Dotted(pool.PoolTrainer):
    pass
"""


def test_traits_are_inherited_as_python_inherits_them():
    module = Module(Path("bases.py"), BASES)
    inherited, mixed = module.traits("Inherited"), module.traits("Mixed")
    assert (inherited.kind, inherited.needs, inherited.scaled) == ("images", ("batchnorm",), True)
    assert module.traits("Restated").needs == ("batchnorm", "student")
    assert (mixed.kind, mixed.needs) == ("own", ("batchnorm",))
    assert module.traits("Computed").kind == "own"
    assert module.computed("Computed") == {"kind"} and module.computed("Own") == set()
    assert module.traits("Qualified").kind == "images"
    assert module.traits("Dotted").needs == module.traits("PoolTrainer").needs == ("student",)
    assert module.traits("nn") is module.traits("torch") is module.traits("absent") is object


DRAWN = """
import math
import torch
from dfkd_cli.models.taps import LOGITS
from dfkd_cli.regimes.offline import Config as Offline
COUNT, (TWICE, *MORE) = 3, (6, 7)
AREA: float = math.pi * COUNT ** 2
def half(): return TWICE / 2
class Both(Offline):
    place = LOGITS
    def slow(self): return torch.zeros(COUNT)
TENSOR = torch.zeros(3)
raise RuntimeError("the module is not run")
"""


def test_a_definition_is_run_with_what_it_draws_on_and_nothing_else():
    module = Module(Path("drawn.py"), DRAWN)
    assert module.value("AREA") == pytest.approx(28.274, abs=1e-3)
    assert module.value("half")() == 3
    assert module.value("Both").place == "logits"
    assert module.value("Both").__mro__[1] is catalog.entries("regimes")["offline"].config
    for name in ("TENSOR", "torch", "absent"):
        with pytest.raises(NameError):
            module.value(name)


def test_what_cannot_be_read_is_said_with_its_place(tmp_path):
    broken, unbased = tmp_path / "broken.py", tmp_path / "unbased.py"
    with pytest.raises(SyntaxError) as caught:
        Module(broken, "def half(:")
    assert (caught.value.filename, caught.value.lineno) == (str(broken), 1)
    with pytest.raises(NameError, match=r"unbased.py: 'Config' draws on 'torch', which only importing"):
        Module(unbased, "import torch\nclass Config(torch.nn.Module): pass").value("Config")


WORKER = "class Config: pass\nclass Worker:\n kind = 'images'\n "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Config(:", "invalid syntax"),
        ("class Config: pass\nclass Worker: pass", "no class in it has a literal `kind`"),
        ("import torch\nclass Config(torch.nn.Module): pass\nclass Worker: kind = 'images'", "'Config' draws on"),
        (WORKER + "needs = 'batchnorm'", "Worker.needs is 'batchnorm', and no tuple"),
        (WORKER + "needs = ('bachnorm',)", "Worker.needs is ('bachnorm',), and no tuple"),
        (WORKER + "needs = (*A, 'student')", "write needs of Worker as literals"),
        (WORKER + "default_weight = 2000.0 / 2", "write default_weight of Worker as literals"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_also_to_who_wants_another(text, words, tmp_path, monkeypatch):
    (tmp_path / "synthesizers").mkdir()
    (tmp_path / "synthesizers" / "broken.py").write_text(text)
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)
    monkeypatch.setattr(catalog, "read", catalog.read.__wrapped__)  # it knows files by name, which may come again
    with pytest.raises(ConfigError, match=rf"^reading synthesizers/broken\.py: {re.escape(words)}"):
        catalog.entries.__wrapped__("synthesizers")


# -- one new file ------------------------------------------------------------------------------------------------------

SYNTHESIZER = '''"""Grey images: a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dfkd_cli.config import option
from dfkd_cli.synthesizers.base import Impressions
from dfkd_cli.synthesizers.noise import Config as NoiseConfig
from dfkd_cli.synthesizers.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Config(NoiseConfig):
    """Grey images."""

    batch_size: int = 4
    grey: float = option(0.5, "what every pixel is", low=0, high=1)


class Grey(Noise):
    """Images without anything on them."""

    def make(self, first: int, count: int) -> Impressions:
        images = torch.full((count, *self.teacher.info.input_size), self.config.grey)
        return Impressions(images.to(self.device), None, {})
'''
OBJECTIVE = '''"""The gap between the logits: a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_cli.config import option
from dfkd_cli.objectives.answers import AnswerObjective
from dfkd_cli.options import Answers


@dataclass(frozen=True, kw_only=True)
class Config(Answers):
    """Gaps."""

    gap: float = option(1.0, "weight of the gap", low=0)


class Gap(AnswerObjective):
    """Absolute differences."""

    default_weight = 0.25
    terms = ("gap", "hard")

    def forward(self, student, teacher, images):
        one, other = self.answers(student, teacher)
        return {"gap": (one - other).abs().mean()} | self.hard(student, teacher, images)
'''
REGIME = '''"""Offline distillation, louder: a baseline."""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_cli.config import option
from dfkd_cli.regimes.offline import Config as OfflineConfig
from dfkd_cli.regimes.offline import Offline


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Loud distillation."""

    loudness: float = option(2.0, "what the loss is multiplied by", above=0)


class Louder(Offline):
    """A loss that is multiplied."""

    def loss(self, images):
        loss, terms = super().loss(images)
        return self.config.loudness * loss, terms
'''
COMMAND = '''"""Count the images of shards.

Reads shard directories, writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_cli.artifacts.shards import ShardReader
from dfkd_cli.catalog import Command
from dfkd_cli.config import option
from dfkd_cli.errors import GateNotMet
from dfkd_cli.settings import Settings
from dfkd_cli.ui import Terminal


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read."""

    paths: tuple[str, ...] = option(("shards",), "shard directories", argument="PATH ...")
    least: int = option(1, "gate: exit 5 when there are fewer", low=1)


COMMAND = Command(position=35, examples=("dfkd count-images shards/",), next="dfkd distill")


def run(settings: Settings, terminal: Terminal, dry_run: bool = False) -> dict[str, Any]:
    """Count."""
    count = sum(sum(ShardReader(Path(path)).sizes) for path in settings.inputs.paths)
    terminal.answer(f"{count} images")
    answer = {"metrics": {"count": count}}
    if count < settings.inputs.least:
        raise GateNotMet(f"{count} images", answer=answer)
    return answer
'''
BUG = '''"""Divide by zero."""

from __future__ import annotations

from dataclasses import dataclass

from dfkd_cli.catalog import Command


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Nothing is read."""


COMMAND = Command(position=99, ignores=("device",), examples=("dfkd divide",), next="dfkd info")


def run(settings, terminal, dry_run=False):
    """Divide."""
    return {"metrics": {"ratio": 1 / 0}}
'''
FILES = {
    "synthesizers/grey.py": SYNTHESIZER,
    "objectives/gap.py": OBJECTIVE,
    "regimes/louder.py": REGIME,
    "stages/count_images.py": COMMAND,
    "stages/divide.py": BUG,
}


@pytest.fixture(scope="module")
def extended(teacher, tmp_path_factory) -> Callable[..., list[str]]:
    """``extended(*lines)``: what command lines of the package with the new files write, beside a teacher.

    The last one ends with ``code``.
    """
    package, here = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("work")
    shutil.copytree(Path(dfkd_cli.__file__).parent, package / "dfkd_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (package / "dfkd_cli" / name).write_text(text)
    shutil.copytree(teacher, here / "teacher")

    def run(*lines: str, code: int = 0, stream: str = "stdout") -> list[str]:
        answers = run_in_turn([line.split() for line in lines], here, {"PYTHONPATH": str(package)})
        codes = [0] * (len(lines) - 1) + [code]
        assert [done.returncode for done in answers] == codes, [done.stderr for done in answers]
        return [getattr(done, stream) for done in answers]

    return run


def test_new_methods_are_listed(extended):
    listed = extended("ls methods --json", "ls objectives --json")
    items = [item for text in listed for item in json.loads(text)["items"]]
    new = {item["name"]: (item["kind"], item["needs"], item["summary"]) for item in items}
    assert new["grey"] == ("noise", [], "Grey images: a baseline")
    assert new["gap"] == ("response", [], "The gap between the logits: a baseline")
    assert new["louder"] == ("regime", ["teacher", "objective"], "Offline distillation, louder: a baseline")


def test_a_new_command_is_in_the_help_at_its_place(extended):
    whole, alone = extended("--help", "count-images --help")
    commands = [line.split()[0] for line in whole.splitlines() if line.startswith("  ") and line.strip()]
    at = commands.index("count-images")
    assert commands.index("synthesize") < at < commands.index("distill")
    text = " ".join(alone.split())
    for part in ("Count the images of shards.", "[PATH ...]", "--least INT", "(default: 1)", "Next: dfkd distill"):
        assert part in text


def test_new_methods_have_their_flags_and_those_of_their_bases(extended):
    grey, louder = extended("synthesize --method grey --help", "distill --method louder --objective gap --help")
    text = " ".join(grey.split())
    for part in (
        "--grey FLOAT what every pixel is (default: 0.5)",
        "--batch-size INT images of one shard (default: 4)",
    ):
        assert part in text
    text = " ".join(louder.split())
    for part in ("--loudness FLOAT", "--gap FLOAT", "--hard FLOAT", "louder: Offline distillation, louder"):
        assert part in text


def test_new_files_work_from_end_to_end(extended):
    images, counted, student, gate = extended(
        "synthesize --method grey --num-images 6 --json",
        "count-images",
        "distill --method louder --objective gap --steps 1 --batch-size 2 --json",
        "count-images shards shards --least 13 --json",
        code=5,
    )
    assert json.loads(images)["metrics"]["count"] == 6
    assert counted == "6 images\n"
    assert json.loads(student)["artifacts"] == {"student": "student"}
    assert json.loads(gate)["metrics"] == {"count": 12}


def test_a_bug_is_one_line_after_its_traceback(extended):
    (said,) = extended("divide", code=1, stream="stderr")
    first, *_, last = said.splitlines()
    assert last.startswith("error: ZeroDivisionError: division by zero -- ") and "please report it" in last
    assert first.startswith("Traceback") and "\nZeroDivisionError: division by zero\nerror: " in said
    assert said.count("error: ") == 1
