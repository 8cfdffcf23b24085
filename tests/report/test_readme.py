"""The pages of the repository: nothing in them is typed that is kept elsewhere, and what they point to is there."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from readme import fill, pictures

from dfkd_cli import catalog

ROOT = Path(__file__).parents[2]
RENDERED = [ROOT / "README.md", ROOT / "results" / "README.md"]
PAGES = [*RENDERED, ROOT / "recipes" / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RENDERED, ids=names)
def test_tables_are_made_from_what_is_kept(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, page.parent) == text, "run `make readme`"


def test_every_kept_result_has_one_table():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    kept = sorted(path.name for path in (ROOT / "results").glob("*.json"))
    assert sorted(re.findall(r"^<!-- (\S+\.json)(?: with .*)? -->$", text, re.MULTILINE)) == kept


@pytest.mark.parametrize("package", ["synthesizers", "objectives", "regimes"])
def test_every_method_is_listed_with_what_it_needs(package):
    text = "".join(page.read_text(encoding="utf-8") for page in RENDERED)
    (table,) = re.findall(rf"<!-- {package} -->(.*?)<!-- end of", text, re.DOTALL)
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert lines.keys() == catalog.entries(package).keys()
    for name, entry in catalog.entries(package).items():
        assert all(word in lines[name] for word in (entry.kind, *entry.needs, entry.paper)), name


def test_rows_of_several_results_stand_in_one_table(tmp_path):
    for file in ("zskd-mnist.json", "generators-mnist-lenet5.json"):
        (tmp_path / file).write_bytes((ROOT / "results" / file).read_bytes())
    block = (
        "<!-- rows WHEN, DATASET, TEACHER, ROW, TOP-1 %, PUBLISHED %\nzskd-mnist.json teacher zskd\n"
        "generators-mnist-lenet5.json lenet5/dafl: a | b: c\n-->\nby hand\n<!-- end of results -->\n"
    )
    page = f"before\n{block}after\n"
    text = fill(page, tmp_path)
    assert text.startswith(page.partition("by hand")[0])
    assert text.endswith("\n<!-- end of results -->\nafter\n")
    assert "by hand" not in text
    *_, teacher, zskd, dafl, _ = [line.replace("\N{NO-BREAK SPACE}", " ") for line in text.splitlines() if line][:-1]
    assert teacher == "|  | mnist | lenet5, 99.34 % | teacher | 99.34 | 99.34 |"
    (row,) = (r for r in sections("zskd-mnist")[0]["rows"] if r["label"] == "zskd")
    mean, sd = (100 * of(row["top1"]["values"]) for of in (statistics.fmean, statistics.stdev))
    assert zskd == f"|  | mnist | lenet5, 99.34 % | zskd | {mean:.2f} ± {sd:.2f} | 98.77 |"
    assert dafl.startswith("| a \\| b: c | mnist | lenet5, 99.32 % | dafl | ")
    assert fill(text, tmp_path) == text
    for wrong in (page.replace("teacher zskd", "zksd"), page.replace("lenet5/dafl", "dafl"), page.replace("ROW", "RW")):
        with pytest.raises(KeyError):
            fill(wrong, tmp_path)


def test_columns_of_a_whole_table_can_be_kept(tmp_path):
    (tmp_path / "a.json").write_bytes((ROOT / "results" / "zskd-mnist.json").read_bytes())
    heads = []
    for more in ("", " with PARAMS, SEEDS"):
        text = fill(f"<!-- a.json{more} -->\n<!-- end of results -->\n", tmp_path)
        assert text.startswith(f"<!-- a.json{more} -->\n")
        heads.append({cell.strip() for cell in re.search(r"^\| ROW .*$", text, re.MULTILINE)[0].split("|")})
    assert heads[1] - heads[0] == {"PARAMS", "SEEDS"}


def test_pictures_are_made_from_what_is_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((path, drawn),) = pictures(text, ROOT).items()
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    kept, now = (ROOT / path).read_text(encoding="utf-8"), drawn.decode()
    assert re.sub(number, "0", kept) == re.sub(number, "0", now), "run `make readme`"
    ours, theirs = ([float(part) for part in re.findall(number, svg)] for svg in (kept, now))
    np.testing.assert_allclose(ours, theirs, atol=1e-2)  # of a point of 1/72 inch, on another CPU


def test_a_picture_has_every_student_at_its_seconds(tmp_path):
    (tmp_path / "a.json").write_bytes((ROOT / "results" / "synthesizers-fashion-mnist.json").read_bytes())
    (svg,) = pictures("<!-- plot a.svg: a.json resnet,\na.json lenet5 -->", tmp_path).values()
    root = ElementTree.fromstring(svg)
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    students = [row for s in sections("synthesizers-fashion-mnist") for row in s["rows"] if row["role"] != "teacher"]
    for label in {row["label"] for row in students}:
        assert texts.count(label) == sum(row["label"] == label for row in students), label
    for panel, teacher in enumerate(("resnet", "lenet5"), 1):
        (axes,) = (element for element in root.iter() if element.get("id") == f"axes_{panel}")
        dots = [use for group in axes.iter() if group.get("clip-path") for use in group if use.tag.endswith("use")]
        (section,) = (s for s in sections("synthesizers-fashion-mnist") if s["teacher"] == teacher)
        rows = [row for row in section["rows"] if row["role"] != "teacher"]
        places = np.array(sorted((float(dot.get("x")), -float(dot.get("y"))) for dot in dots))
        values = np.array(sorted((row["seconds"]["total"]["mean"], row["top1"]["mean"]) for row in rows))
        for axis in (0, 1):  # the same up to scale and shift
            scale, shift = np.polyfit(values[:, axis], places[:, axis], 1)
            assert scale > 0
            np.testing.assert_allclose(scale * values[:, axis] + shift, places[:, axis], atol=0.1)
    with pytest.raises(KeyError):
        pictures("<!-- plot a.svg: a.json nobody -->", tmp_path)


def sections(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["sections"]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        file, _, heading = target.partition("#")
        if "://" not in file:
            other = page.parent / file if file else page
            assert other.is_file(), target
            if heading:
                heads = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target
    for command, recipe in re.findall(r"dfkd\s+([\w-]+)[^`\n]*?\s--recipe\s+([\w-]+)(?![\w./-])", text):
        assert f"{command}/{recipe}" in catalog.recipes(), f"{command} --recipe {recipe}"
