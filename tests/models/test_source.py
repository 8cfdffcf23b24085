"""What of a file belongs to a function in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dfkd_cli.models.registry import code_hashes
from dfkd_cli.models.source import LARGE, used

FILE = '''"""What people keep in one file."""
import os, sys
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, "lib")  # may do anything
WIDTH = 8
DEPTH, LENGTH = 3, 4
names = ["a"]
names += ["b"]

class Block(nn.Module):
    def forward(self, x):
        return F.relu(x) * WIDTH


@torch.jit.unused
def helper():  # of build
    return Block()

def build(num_classes):
    return helper()

def smaller():
    return os.getcwd(), DEPTH

tuned = smaller()
if __name__ == "__main__":
    smaller()
'''


def kept(name: str, text: str = FILE) -> list[str]:
    """The first line of each statement that is used."""
    return [line for line in used(text, name).splitlines() if line and not line.startswith(" ")]


def test_what_a_function_uses_directly_or_not_belongs_to_it():
    always = ["import os, sys", 'sys.path.insert(0, "lib")  # may do anything', 'names += ["b"]', "def smaller():"]
    mine = ["from torch import nn", "from torch.nn import functional as F", "WIDTH = 8", "class Block(nn.Module):"]
    mine += ["def build(num_classes):"]
    always += ["@torch.jit.unused", "def helper():  # of build"]  # a decorator may put it on a list
    # What is assigned from a call may do anything, too; `a, b =` is not looked into.
    always += ["DEPTH, LENGTH = 3, 4", "tuned = smaller()", 'names = ["a"]']
    assert sorted(kept("build")) == sorted(always + mine)
    of_helper = mine[:4]  # what that uses
    assert sorted(kept("smaller")) == sorted(always + of_helper)
    assert [line for line in FILE.splitlines() if line in kept("build")] == kept("build")  # in the order of the file


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("def smaller():\n", "# smaller\n\n\ndef other(): pass\n\ndef smaller():\n", True),
        ('"""What people keep', '"""What others keep', True),
        ("    smaller()\n", "    print(smaller())\n", True),
        ("import os, sys\n", "import os, sys\nimport json\n", True),
        ("\n", "   \n", True),
        ("WIDTH = 8", "WIDTH = 9", False),
        ("F.relu(x)", "F.gelu(x)", False),
        ("@torch.jit.unused\n", "@other\n", False),
        ('"lib"', '"libs"', False),
        ("import functional as F", "import other as F", False),
        ('names += ["b"]', 'names += ["c"]', False),
        ("tuned = smaller()", "tuned = smaller(1)", False),
        ("import os, sys\n", "import os, sys\nfrom layers import *\n", False),
        ("import os, sys\n", "import os, sys\nnn.init.zeros_ = None\n", False),
    ],
)
def test_only_that_counts(before, after, same):
    assert before in FILE
    changed = FILE.replace(before, after)
    ast.parse(changed)
    assert (used(changed, "build") == used(FILE, "build")) == same


@pytest.mark.parametrize(
    "text", ["def build(:\n", "build\0", "from networks import *\n", "try:\n    build = 1\nfinally: pass\n"]
)
def test_of_what_cannot_be_told_apart_all_counts(text):
    assert used(text, "build") == text


FILES = {
    "zoo/net.py": """
from layers import Block, other
from zoo.parts import deep as below
import tools.more
import plots
import json, absent

def build():
    from . import late
    c = json.load(open(f"{HERE}/" + "act.json")), "sizes.yaml"
    return Block(below.x, tools.more.y, late, c)

def drawn():
    return plots.draw(other())
""",
    "zoo/parts/__init__.py": "from .deep import x",
    "zoo/parts/deep.py": "x = 1",
    "zoo/late.py": "z = 1",
    "zoo/act.json": "{}",
    "zoo/sizes.yaml": " " * LARGE,
    "zoo/plots.py": "def draw(x): pass",
    "layers.py": "class Block: pass\n\ndef other(): pass\n",
    "tools/more.py": "y = 1",
    "other.json": "{}",
}
USED = {"zoo/net.py", "zoo/parts/__init__.py", "zoo/parts/deep.py", "zoo/late.py", "zoo/act.json", "layers.py",
        "tools/more.py"}  # fmt: skip


@pytest.mark.parametrize("spec", ["zoo/net.py:build", "w8a8:./zoo/net.py:build", "zoo.net:build"])
def test_what_a_function_uses_of_other_files_belongs_to_it_wherever_all_lie(spec, tmp_path, monkeypatch):
    def write(root: Path, changed: str = "", text: str = " # changed\nx = 3") -> str:
        for name, content in FILES.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + text * (name == changed))
        monkeypatch.chdir(root)
        return code_hashes(spec)[0]

    before = write(tmp_path / "a")
    assert {name for name in FILES if write(tmp_path / "a", name) != before} == USED - {"layers.py", "zoo/net.py"}
    assert write(tmp_path / "a", "layers.py", "\ndef more(): pass") == before
    assert write(tmp_path / "a", "layers.py", "\nBlock = other") != before
    assert write(tmp_path / "b") == before


def test_what_stood_for_code_before_is_known(tmp_path, monkeypatch):
    """As it stands where nothing of another file is used: no hash on record has changed."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("import torch\ndef build(): return torch.nn.Flatten()\n")
    alone = code_hashes("net.py:build")
    assert len(alone) == 2
    Path("net.py").write_text("import torch\nimport more\ndef build(): return torch.nn.Flatten()\n")
    assert code_hashes("net.py:build")[0] == alone[0]
    Path("more.py").write_text("x = 1")
    Path("net.py").write_text("import more\ndef build(): return more.x\n")
    assert len(code_hashes("net.py:build")) == 3
    assert (code_hashes("torch.nn:Flatten"), code_hashes("lenet5")) == ([], [])
