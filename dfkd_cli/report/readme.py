"""Tables of a README that nobody types: each is made from a kept ``results.json``.

A table stands between two comments, and ``python -m dfkd_cli.report.readme README.md`` writes all of them anew:

    <!-- results/zskd-mnist.json -->
    <!-- end of results -->
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dfkd_cli.artifacts.files import read_json, write_atomic
from dfkd_cli.report.table import COLUMNS, markdown

# The others are in report.html; a README has less room.
_LEFT_OUT = ("AGREEMENT %", "SYNTHESIS s", "DISTILLATION s", "PARAMS", "SEEDS")
_TABLE = re.compile(r"(<!-- (\S+\.json) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def fill(text: str, root: Path) -> str:
    """The text with every table made anew.

    Args:
        text: Markdown with comments as above.
        root: What the files' paths are relative to.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    columns = [name for name in COLUMNS if name not in _LEFT_OUT]

    def table(found: re.Match[str]) -> str:
        head, file, end = found.groups()
        return f"{head}\n{markdown(read_json(root / file), columns)}\n{end}"

    return _TABLE.sub(table, text)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write_atomic(path, fill(path.read_text(encoding="utf-8"), path.parent).encode())
