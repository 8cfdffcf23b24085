"""What several test files share: a tiny teacher on disk, and the command line as a process and as a call."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch
from forks import STAGES, start_server
from pipeline import run
from stand_ins import statistics_of

from dfkd_cli.artifacts.files import sha256_file
from dfkd_cli.artifacts.metadata import write_metadata
from dfkd_cli.cli.app import main
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import identity, load_model, save_model
from dfkd_cli.models.registry import build

torch.set_num_threads(1)  # the tensors of tests are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes of commands, too
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as `dfkd` has it: what is forked does not begin there
os.environ.pop("DFKD_DEBUG", None)  # the user's own: errors would be more than one line
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reads it when it is imported, which tests do by themselves


# What runs whole commands, or starts processes: fixtures, and functions.
COMMANDS = {"cli", "session_cli", "dfkd", "reference", "repository", "extended"}
COMMANDS |= {"Fork", "start_fresh", "run_in_turn", "finish", "finish_on_two", "kill_after_saving"}
COMMANDS |= {"faults", "shell", "subprocess"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole commands, and of large networks, are slow: ``make quick`` leaves them out."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        large = any(library in item.name for library in ("timm:", "torchvision:"))
        if large or COMMANDS & {*item.fixturenames, *_names(item.function.__code__)}:
            item.add_marker(pytest.mark.slow)


def _names(code: CodeType) -> set[str]:
    """What a function calls by name, in comprehensions and functions within it too."""
    within = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*within)


@pytest.fixture(scope="session", autouse=True)
def imports(request) -> Iterator[None]:
    """What commands need is imported before the first test; looking for garbage in it took an eighth of the time.

    The server of ``forks.py`` does the same meanwhile. From then on nothing that is compiled is kept: of networks that
    tests write and change within a second, it would be taken for the new one.
    """
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    if any(item.get_closest_marker("slow") for item in request.session.items):
        start_server()
        for name in STAGES:
            importlib.import_module(name)
    sys.dont_write_bytecode = True
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers(request) -> None:
    """What a test draws does not depend on the tests before it: torch's numbers, and those of its module's ``RNG``."""
    torch.manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """``make_teacher(spec)``: the directory of a random classifier of digits. Made once; no test may change it."""
    made: dict[str, tuple[Path, dict[Path, str]]] = {}

    def make(spec: str) -> Path:
        if spec not in made:
            path = tmp_path_factory.mktemp(spec) / "teacher"
            info = ModelInfo(spec, 10, (1, 32, 32), (0.3,), (0.4,), tuple("0123456789"))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                classifier = Classifier(build(spec, info.num_classes, info.input_size), info).eval()
            save_model(path, classifier, metrics={}, provenance={"dataset": "digits"})
            made[spec] = path, {file: sha256_file(file) for file in path.iterdir()}
        return made[spec][0]

    yield make
    for path, intact in made.values():
        assert {file: sha256_file(file) for file in path.iterdir()} == intact, f"a test changed {path}"


@pytest.fixture(scope="session")
def make_metadata(make_teacher, tmp_path_factory) -> Callable[[str], Path]:
    """``make_metadata(spec)``: a metadata directory of the classifier of ``make_teacher``. Made once."""

    @functools.cache
    def make(spec: str) -> Path:
        path = tmp_path_factory.mktemp(spec) / "metadata"
        classifier, record = load_model(make_teacher(spec))
        write_metadata(path, statistics_of(classifier), {"teacher": {"sha256": identity(record), "spec": spec}})
        return path

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher) -> Path:
    """The model directory of a random LeNet-5."""
    return make_teacher("lenet5")


@pytest.fixture(scope="session")
def dfkd() -> Callable[..., subprocess.CompletedProcess]:
    """``dfkd(*args, cwd, env)``: the command line in a process of its own."""

    def call(*args: str, cwd: Path, env: Mapping[str, str] | None = None):
        return run(list(args), cwd, env)

    return call


@pytest.fixture
def cli(capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``cli(*args)``: the command line in this process, for what needs no isolation: exit code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def session_cli():
    """``session_cli(cwd, *args)``: the command line in this process, somewhere else; its exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(cwd: Path, *args: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            return main([*args, "-q"])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
