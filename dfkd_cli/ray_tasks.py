"""Calls as tasks of a Ray cluster. Ray is an extra: it is imported when it is used.

A task is retried on another node when its own dies. So a call must be one that continues where it was: commands do,
in a directory that all nodes see under the same name. Every node has the same ``dfkd``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import io
import logging
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from dfkd_cli.errors import ConfigError, DfkdError, Interrupted, RunFailed
from dfkd_cli.processes import stop_on_signals
from dfkd_cli.workers import Inside, Launcher, Workers

RETRIES = 10  # of a task whose node or worker is lost; what kills it each time must end
ENDS = 60.0  # seconds that cancelled calls have to save their state
ANSWERS = 5.0  # seconds that a cluster has to answer
MADE_HERE = {  # of a cluster that is started on this machine, unless the environment says otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(2**27),  # commands exchange files
}
_SENT = "DFKD_DATA", "GOMP_SPINCOUNT", "TORCH_CPP_LOG_LEVEL"  # variables that reach every node
LOG = logging.getLogger(__name__)


class RayTasks(Launcher):
    """Tasks of a Ray cluster, each in a process of its own. Ray decides how many run at a time: what it has room for.

    Args:
        address: Of the cluster that this machine is a node of, ``HOST:PORT``. None for Ray's default: ``RAY_ADDRESS``,
            the cluster that was started on this machine, or a new one of this machine alone.
        cpus: Of each call; also its threads.
        gpus: Of each call; a part of one is shared.

    Raises:
        ConfigError: Ray is not installed, or these are no address and no number of GPUs.
    """

    free = retries = True  # Ray has a queue

    def __init__(self, address: str | None, cpus: int, gpus: float) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--engine ray: Ray is not installed", "pip install 'dfkd[ray]'")
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError(
                f"--gpus-per-run {gpus:g}: more than one are whole", "give a whole number, or a part of 1"
            )
        self.place = re.fullmatch(r"\[?([^/\s]+?)\]?:(\d{1,5})", address or "")
        if address not in (None, "auto", "local") and self.place is None:
            raise ConfigError(f"--address {address}: not an address", "give HOST:PORT, as `ray start` says it")
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.running: dict[concurrent.futures.Future[DfkdError | None], tuple[Any, Any]] = {}  # name and task of each

    def __enter__(self) -> RayTasks:
        """Connect.

        Raises:
            RunFailed: There is no such cluster, or it does not fit.
        """
        for name, value in MADE_HERE.items():
            os.environ.setdefault(name, value)
        import ray

        where = "Ray" if self.address is None else f"--address {self.address}"
        with contextlib.ExitStack() as end:
            end.enter_context(contextlib.redirect_stdout(_Told()))  # until its threads have ended, which print
            try:
                if self.place is not None:  # Ray itself would try for minutes
                    socket.create_connection((self.place[1], int(self.place[2])), ANSWERS).close()
                ray.init(self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except SystemExit:
                raise Interrupted(signal.SIGTERM) from None
            except Exception as error:
                raise RunFailed(
                    f"{where}: {error or type(error).__name__}", "is a Ray cluster running there?"
                ) from error
            finally:
                stop_on_signals()  # Ray has handlers of its own
            end.callback(ray.shutdown)
            listed: Any = ray.nodes
            nodes = [node["Resources"] for node in listed() if node["Alive"]]
            if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
                what = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
                LOG.warning("no node of the Ray cluster has the %s that each command takes: they wait for one", what)
            self.end = end.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for _, task in self.running.values():
            ray.cancel(task)
        concurrent.futures.wait(self.running, ENDS)
        self.end.close()

    @property
    def busy(self) -> int:
        return len(self.running)

    def submit(self, name: Any, call: Callable[..., Any], *arguments: Any, inside: Inside | None = None) -> None:
        import ray

        wanted = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": RETRIES}
        variables = {variable: os.environ[variable] for variable in _SENT if variable in os.environ}
        if not self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves it alone
        place = os.getcwd(), variables, sys.argv, self.cpus
        task = ray.remote(_carry_out).options(name=str(name), **wanted).remote(*place, call, arguments, inside)
        self.running[task.future()] = name, task

    def next(self) -> tuple[Any, DfkdError | None]:
        # Not `ray.wait`, in which what a signal raises is lost.
        ended = concurrent.futures.wait(self.running, return_when=concurrent.futures.FIRST_COMPLETED).done.pop()
        name, _ = self.running.pop(ended)
        from ray.exceptions import RayError, RayTaskError

        try:
            return name, ended.result()
        except RayTaskError:
            raise
        except RayError as error:
            return name, RunFailed(f"lost by Ray: {str(error).partition('. ')[0]}", "the same command continues")


class _Told(io.TextIOBase):
    """What Ray prints, such as that a node is lost, as notes: the first line of each, without colours."""

    def write(self, text: str) -> int:
        if line := re.sub(r"\x1b\[[\d;]*m", "", text).strip().partition("\n")[0]:
            LOG.warning("%s", line)
        return len(text)


def _carry_out(
    directory: str,
    variables: dict[str, str],
    typed: list[str],
    threads: int,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    inside: Inside | None,
) -> DfkdError | None:
    """What a node does. Ray raises KeyboardInterrupt in it when the task is cancelled."""
    try:
        os.chdir(directory)
    except OSError as error:
        return RunFailed(f"{platform.node()}: {directory}: {error.strerror}", "every node has to see this directory")
    os.environ.update(variables)
    sys.argv = typed  # for the records
    vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's: the new process would import it, and Ray
    with Workers(1, threads) as workers:
        workers.submit(None, call, *arguments, inside=inside or contextlib.nullcontext)
        return workers.next()[1]
