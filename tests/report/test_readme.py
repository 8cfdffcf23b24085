"""The pages of the repository: nothing in them is typed that is kept elsewhere, and what they point to is there."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from dfkd_cli import catalog
from dfkd_cli.report.readme import fill

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
