"""What CONTRIBUTING says how to add can be added: in a copy of the repository, one file each, and no list is edited."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / ".github" / "CONTRIBUTING.md"
# Files, each as its name and what is in the block of code below.
EXAMPLES = re.compile(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = ("README.md", "results/README.md")
NAMES = ("class-models", "projectors", "noisy-teacher", "classes")  # what they add


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy with all the examples, and with pages that list them."""
    root = tmp_path_factory.mktemp("stranger") / "repository"
    for name in (".github", "dfkd_cli", "recipes", "results", "tests"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    examples = EXAMPLES.findall(PAGE.read_text(encoding="utf-8"))
    assert len(examples) == 3 * len(NAMES) - 1  # the method, its recipe and its test; a command needs no recipe
    for file, text in examples:
        assert not (root / file).exists(), f"{file} is there already"
        (root / file).write_text(text, encoding="utf-8")
    python(root, "tests/readme.py", *PAGES)
    return root


def python(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_examples_have_the_style_of_the_rest(repository):
    python(repository, "-m", "ruff", "check", ".")
    python(repository, "-m", "ruff", "format", "--check", ".")


def test_listings_know_the_examples(repository):
    listed = [python(repository, "-m", "dfkd_cli", *what) for what in (["ls", "methods"], ["ls", "objectives"], ["-h"])]
    page = "".join((repository / page).read_text(encoding="utf-8") for page in PAGES)
    for name in NAMES:
        assert re.search(rf"^ *{name} ", "".join(listed), re.MULTILINE), name
        assert name == "classes" or f"| `{name}` |" in page, name
    recipes = python(repository, "-m", "dfkd_cli", "ls", "recipes")
    assert all(f"{name}-digits " in recipes for name in NAMES[:-1])


def test_examples_keep_all_promises(repository):
    """Their own tests, and those of what every method and command promises."""
    # The command by the tests that have it as a parameter: many others have something to do with classes.
    methods = [spelling for name in NAMES[:-1] for spelling in (name, name.replace("-", "_"))]
    wanted = " or ".join((*methods, "[classes", "classes]", "test_classes.py", "test_readme", "test_imports"))
    chosen = [f"--deselect={Path(__file__).relative_to(ROOT)}", "-k", wanted]
    report = python(repository, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "tests")
    assert int(re.search(r"(\d+) passed", report)[1]) > 150
