"""``dfkd`` and ``python -m dfkd_cli``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; the process's exit code is its result."""
    # Threads that wait should sleep: spinning ones cost ten times the run time as soon as anything else runs on the
    # machine, and sleeping ones cost nothing when nothing does. Read when torch loads, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dfkd_cli.cli.app import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
