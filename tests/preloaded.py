"""Imported by the process of which the commands of tests are forks (``forks.py``): what they import, find and read."""

from __future__ import annotations

import contextlib
import importlib
import io

from forks import STAGES

from dfkd_cli.catalog import commands
from dfkd_cli.cli import app

LATE = """
    matplotlib.backends.backend_agg PIL.BmpImagePlugin PIL.GifImagePlugin PIL.JpegImagePlugin PIL.PpmImagePlugin
    pydantic sklearn.datasets sklearn.model_selection torch.utils.serialization
"""
for name in (*STAGES, *LATE.split()):
    importlib.import_module(name)
with contextlib.redirect_stdout(io.StringIO()):  # finds the methods, models and recipes, and reads their options
    for words in (*commands(), "synthesize --method zskd", "distill --method offline --objective response"):
        assert app.main([*words.split(), "--help"]) == 0
    for kind in ("models", "recipes"):
        assert app.main(["ls", kind]) == 0

importlib.import_module("dfkd_cli.frozen")
