"""The page and the table of a comparison: whatever text stands in the records, it is only text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparisons import check_self_contained
from torchvision.io import encode_png

from dfkd_cli.artifacts.files import write_json, write_text
from dfkd_cli.report import html, table

HOSTILE = (
    "</title></style></code>\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    "&lt;$\\bad{$\x1b\udc80 | `[a](javascript:b)"
)
KEPT = Path(__file__).parents[2] / "results"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr",
    "th", "td", "figure", "figcaption", "img", "b", "br", "code", "details", "summary",
}  # fmt: skip


class Attributes(HTMLParser):
    """The attributes of every element, and what a policy is about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.policy = self.style = ""
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.names |= {name for name, _ in attrs}
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        self.style += data if self.tag == "style" else ""


def hostile(value: Any, key: str = "") -> Any:
    """The same records, with text where somebody can have put it, also in the place of numbers that are only shown."""
    if isinstance(value, dict):
        extra = HOSTILE if key == "per_class" else ""  # its keys are names
        return {name + extra: hostile(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, key) for inner in value]
    return (
        value + HOSTILE if isinstance(value, str) and key != "path" else HOSTILE if key in ("seed", "seeds") else value
    )


@pytest.fixture
def results(tmp_path) -> dict[str, Any]:
    """Kept results, every text of which is hostile, with pictures and curves of a directory that is so called."""
    place = tmp_path / HOSTILE.replace("/", "")
    place.mkdir()
    (place / "preview.png").write_bytes(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)).numpy().tobytes())
    (place / "metrics.csv").write_text("round,loss\n0,1\n1,2\n")
    results = hostile(json.loads((KEPT / "generators-cifar10-small.json").read_text()))
    del results["sections"][0]["rows"][3:], results["shards"][2:]
    for facts in (*results["shards"], *(run for s in results["sections"] for row in s["rows"] for run in row["runs"])):
        facts["path"] = str(place)
        facts["concerns"] = facts["uses"] = [HOSTILE]
    results["sections"][0]["failed"] = [
        dict.fromkeys(("row", "command", "message", "hint", "seed", "teacher"), HOSTILE)
    ]
    return results


def test_text_is_only_text(results, tmp_path):
    """Nothing is an element, an attribute or an address that is not the page's own."""
    write_text(tmp_path / "report.html", html.page(results))
    text = (tmp_path / "report.html").read_text()
    page, seen = check_self_contained(text), Attributes(text)
    assert set(page.tags) <= TAGS
    assert seen.names <= {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src"}
    shown = HOSTILE.replace("\udc80", "\\udc80")
    for word in (shown, *(word + shown for word in ("real", "noise", "cifar10")), f"seed {shown}", "airplane" + shown):
        assert any(word in part for part in page.texts), word
    assert len(page.addresses) > 2, "curves and previews are there"


def test_the_policy_lets_only_the_pages_own_style_and_pictures_in(results):
    seen = Attributes(html.page(results))
    style = base64.b64encode(hashlib.sha256(seen.style.encode()).digest()).decode()
    policy = dict(rule.split(maxsplit=1) for rule in seen.policy.split("; "))
    expected = {"style-src": f"'sha256-{style}'", "img-src": "data:"}
    assert policy == expected | dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")


def test_the_table_is_only_text(results, tmp_path):
    write_text(tmp_path / "table.md", table.markdown(results))
    text = (tmp_path / "table.md").read_text()
    assert "script" in text
    assert not re.search(r"(?<!\\)(?:\\\\)*[<`\[]", text)


def test_records_keep_names_that_are_not_utf8(tmp_path):
    write_json(tmp_path / "a.json", {HOSTILE: [HOSTILE]})
    assert json.loads((tmp_path / "a.json").read_text()) == {HOSTILE: [HOSTILE]}
