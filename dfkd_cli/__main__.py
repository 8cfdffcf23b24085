"""``dfkd`` and ``python -m dfkd_cli``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; the process's exit code is its result."""
    # Waiting threads of GNU OpenMP spin for long by default. On a machine that does anything else too that costs ten
    # times the run time; not to spin at all costs a third of the speed of two threads. Read when torch loads: set here.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are no part of this command's conversation
    from dfkd_cli.processes import end_with_parent, first_process, leave_on_signals
    from dfkd_cli.streams import open_streams

    open_streams(as_json="--json" in sys.argv)
    leave_on_signals()
    if not first_process():
        end_with_parent()
    from dfkd_cli.cli.app import main as run
    from dfkd_cli.processes import dedicate

    dedicate()
    sys.exit(run())


if __name__ == "__main__":
    main()
