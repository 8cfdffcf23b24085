"""Tiny recipes of grids, and what a comparison has written."""

from __future__ import annotations

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from dfkd_cli.data import datasets
from dfkd_cli.models.directory import load_model

SMALL = ("--steps", "2", "--batch-size", "8")

GRID = """
command: compare
grid:
  seeds: [0, 1]
  teacher: {steps: 3, batch_size: 8}
  synthesize: {num_images: 8}
  student: {steps: 3, batch_size: 4}
  rows:
    zskd: {synthesize: {method: zskd, batch_size: 4, iterations: 2}}
    zskd-hot: {shards: zskd, distill: {temperature: 2}}
    growing: {shards: zskd, sizes: [6, 4], seeds: [1]}
"""
TEACHERS = """
grid:
  seeds: [0, 1]
  teachers:
    large: {steps: 20, batch_size: 16, per_seed: true}
    small: {model: lenet5-half, steps: 10, batch_size: 16, student: {student: lenet5-half-dafl, steps: 2}}
  synthesize: {num_images: 8}
  student: {steps: 3, batch_size: 4}
  rows:
    zskd: {synthesize: {method: zskd, batch_size: 4, iterations: 2}}
    again: {teachers: [small], shards: zskd, seeds: [1]}
    bad: {teachers: [large], distill: {transfer_set: [nowhere]}, seeds: [0]}
"""


def results_in(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def accuracy(path: Path) -> float:
    """Top-1 on the digits test images, by hand."""
    test = datasets.load("digits", "test")
    classifier, _ = load_model(path)
    with torch.no_grad():
        given = classifier.eval()(test.images(torch.arange(len(test))).float() / 255).argmax(1)
    return float(np.mean(given.numpy() == test.labels.numpy()))


def tree(root: Path, *names: str) -> dict[str, str]:
    """The hash of every file below some directories."""
    files = sorted(file for name in names for file in (root / name).rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def students(directory: Path) -> dict[str, str]:
    """The hash of every model of a grid."""
    runs = directory / "runs"
    return {name: sha for name, sha in tree(runs, ".").items() if name.endswith("model.safetensors")}


class Page(HTMLParser):
    """What a browser would fetch, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def check_self_contained(text: str) -> Page:
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    return page
