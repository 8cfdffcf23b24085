"""``dfkd`` and ``python -m dfkd_cli``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the process's exit code is its result."""
    from dfkd_cli.cli.app import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
