"""``ls`` and ``info``: what there is, and what this installation or an artifact is."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dfkd_cli import __version__, catalog
from dfkd_cli.artifacts.copies import fetch
from dfkd_cli.config import dump_yaml
from dfkd_cli.ui import Terminal
from dfkd_cli.urls import copies, is_url, know_copies

KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "methods": lambda: [e.item() for package in ("synthesizers", "regimes") for e in catalog.entries(package).values()],
    "objectives": lambda: [e.item() for e in catalog.entries("objectives").values()],
    "models": catalog.models,
    "datasets": catalog.datasets,
    "recipes": catalog.recipe_items,
}
PACKAGES = (
    "torch", "torchvision", "lightning", "torchmetrics", "numpy", "safetensors", "typer", "rich", "timm", "tensorboard",
)  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def register(app: typer.Typer, terminal: Terminal) -> None:
    """Add the two commands to the application."""

    @app.command("ls", help="List methods, objectives, models, datasets or recipes.")
    def ls(
        kind: Annotated[
            Literal["methods", "objectives", "models", "datasets", "recipes"], typer.Argument()
        ] = "methods",
        json: AsJson = False,
    ) -> None:
        from dfkd_cli.tables import Columns

        items = KINDS[kind]()
        names = [name for name in ("name", "kind", "needs", "paper", "summary") if any(item[name] for item in items)]
        columns = {
            name.upper(): [" ".join(item[name]) if name == "needs" else item[name] for item in items] for name in names
        }
        terminal.answer(Columns(columns, [*columns], folds="SUMMARY", spare=("PAPER", "NEEDS", "KIND")))
        terminal.document({"ok": True, "items": items})

    @app.command("info", help="Show versions and devices, or (with PATH) an artifact and its lineage.")
    def info(
        path: Annotated[str | None, typer.Argument(help="directory that dfkd wrote", show_default=False)] = None,
        json: AsJson = False,
    ) -> None:
        if path is not None:
            from dfkd_cli.stages.lineage import describe

            if is_url(path):
                know_copies(fetch([path], terminal))
            facts = describe(Path(copies().get(path, path)))
        else:
            facts = {"dfkd": __version__, "python": platform.python_version(), "platform": platform.platform()}
            facts |= {name: _version(name) for name in PACKAGES} | {"devices": _devices()}
            facts["recipes"] = str(catalog.recipes_directory())
        terminal.answer(dump_yaml(facts).rstrip())
        terminal.document({"ok": True, "command": "info", "info": facts})


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])
