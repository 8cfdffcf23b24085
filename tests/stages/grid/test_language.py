"""What a grid may not say is refused before anything runs."""

from __future__ import annotations

import json

import pytest
from tiny_comparisons import GRID, TEACHERS


@pytest.mark.parametrize(
    "published, words",
    [
        ({"zksd": {"large": 98}}, "about.published.zksd: unknown key -- did you mean 'zskd'"),
        ({"zskd": {"larg": 98}}, "about.published.zskd.larg: unknown key -- did you mean 'large'"),
        ({"zskd": 98}, "about.published.zskd: must be a mapping"),
        ({"zskd": {"large": 9877}}, "about.published.zskd.large: 9877.0 is out of range"),
        ({"zskd": {"large": "most"}}, "about.published.zskd.large: 'most' is not a number"),
    ],
)
def test_wrong_published_numbers_are_refused(tmp_path, monkeypatch, cli, published, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(f"about: {json.dumps({'published': published})}\n{TEACHERS}")
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--dry-run")
    assert (code, words in err) == (2, True), err


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("  teachers:", "  teacher: other\n  teachers:", "both teacher and teachers"),
        ("teachers: [large]", "teachers: [larg]", "did you mean 'large'"),
        ("teachers: [large]", "teachers: []", "grid.rows.bad.teachers"),
        ("teachers: [large]", "teachers: {}", "grid.rows.bad.teachers"),
        ("teachers: [large]", "teachers: {larg: }", "did you mean 'large'"),
        ("teachers: [large]", "teachers: {large: {shards: zskd}}", "grid.rows.bad.teachers.large.shards: unknown key"),
        ("teachers: [large]", "teachers: {large: {distill: 3}}", "grid.rows.bad.teachers.large.distill: must be"),
        ("teachers: [large]", "teachers: {large: {synthesize: {lr: 1}}}", "large.synthesize: the row has none"),
        ("distill: {transfer_set: [nowhere]}", "distill: 3", "grid.rows.bad.distill: must be"),
        ("    zskd: {", "    zskd: {teachers: [large], ", "no row 'zskd' with synthesize and teacher small"),
        ("    large:", "    ../large:", "not a name for a row or a teacher"),
        ("{model: lenet5-half, ", "{path: other, ", "grid.teachers.small.steps: the teacher is already there"),
        ("{student: lenet5-half-dafl", "{studnt: x", "grid.teachers.small.student.studnt: unknown key"),
        ("  synthesize: {num", "  metadata: somewhere\n  synthesize: {num", "give it as grid.teachers.large.metadata"),
    ],
)
def test_wrong_teachers_are_refused_before_anything_runs(tmp_path, monkeypatch, cli, old, new, words):
    monkeypatch.chdir(tmp_path)
    assert old in TEACHERS
    (tmp_path / "grid.yaml").write_text(TEACHERS.replace(old, new))
    code, out, err = cli("compare", "--recipe", "grid.yaml")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize(
    "row, words",
    [
        ("{export: {model: both}}", "grid.rows.bad.export.model"),
        ("{export: {model: teacher}}", "grid.rows.bad.export: on which images? -- give export.calibrate"),
        ("{export: {model: teacher}, sizes: [2]}", "has both export.model teacher and sizes"),
        ("{export: {}}", "grid.rows.bad: nothing to distill from"),
        ("{distill: {transfer_set: ['noise:4', 'noise:8']}, export: {}}", "on which images?"),
        ("{distill: {transfer_set: ['noise:4']}, export: {out: here}}", "grid.rows.bad.export.out: the grid itself"),
        ("{distill: {transfer_set: ['noise:4']}, taught_by: float}", "row 'float' has no student of seed 0"),
    ],
)
def test_wrong_exports_are_refused_before_anything_runs(tmp_path, monkeypatch, cli, row, words):
    monkeypatch.chdir(tmp_path)
    rows = f"{{float: {{export: {{model: teacher, calibrate: 'noise:4'}}}}, bad: {row}}}"
    (tmp_path / "grid.yaml").write_text(f"grid: {{rows: {rows}}}")
    code, _, err = cli("compare", "--recipe", "grid.yaml")
    assert (code, words in err) == (2, True), err


@pytest.mark.parametrize("per_seed, seeds, missing", [(False, [0, 2], 1), (True, [1], 0)])
@pytest.mark.parametrize("key, what", [("shards", "shards"), ("taught_by", "student")])
def test_a_row_needs_what_serves_each_of_its_seeds(here, cli, per_seed, seeds, missing, key, what):
    """What a row of one seed makes serves all seeds, but not where each has a teacher of its own."""
    rows = {"pool": {"synthesize": {"method": "noise"}, "seeds": seeds}}
    rows["student"] = {key: "pool", "distill": {"transfer_set": ["real:8"]}}
    grid = {"seeds": [0, 1, 2], "teacher": {"per_seed": per_seed}, "rows": rows}
    (here / "seeds.yaml").write_text(json.dumps({"grid": grid}))
    code, _, err = cli("compare", "--recipe", "seeds.yaml", "--dry-run")
    assert (code, f"row 'pool' has no {what} of seed {missing}" in err) == (2, True), err


def test_a_teacher_that_is_not_used_is_refused(here, cli):
    grid = {"teachers": {"a": "teacher", "b": "teacher"}}
    grid["rows"] = {"noise": {"teachers": ["a"], "distill": {"transfer_set": ["noise:4"]}}}
    (here / "unused.yaml").write_text(json.dumps({"grid": grid}))
    code, _, err = cli("compare", "--recipe", "unused.yaml", "--dry-run")
    assert (code, "grid.teachers.b: no row is run with it" in err) == (2, True)


def test_a_typed_teacher_is_not_one_of_several(here, cli):
    (here / "several.yaml").write_text(TEACHERS)
    code, _, err = cli("compare", "--recipe", "several.yaml", "--teacher", "teacher", "--out", "several")
    assert (code, "--teacher teacher: the grid has teachers of its own: large, small" in err) == (2, True)
    assert not (here / "several").exists()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("seeds: [0, 1]", "seedz: [0]", "grid.seedz: unknown key -- did you mean 'seeds'"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "grid.seeds"),
        ("seeds: [0, 1]", "seeds: [-1]", "grid.seeds"),
        ("steps: 3, batch_size: 8", "stepz: 3", "grid.teacher.stepz: unknown key -- did you mean 'steps'"),
        ("iterations: 2", "iterationz: 2", "grid.rows.zskd.synthesize.iterationz: unknown key"),
        ("{temperature: 2}", "{temperature: warm}", "grid.rows.zskd-hot.distill.temperature"),
        ("{shards: zskd,", "{shards: zksd,", "did you mean 'zskd'"),
        ("{shards: zskd,", "{", "nothing to distill from"),
        ("distill: {temperature", "distil: {temperature", "did you mean 'distill'"),
        ("zskd-hot: {", "../zskd: {", "not a name for a row"),
        ("zskd-hot: {", f"{'z' * 201}: {{", "at most 200 letters"),
        ("sizes: [6, 4]", "sizes: [9, 4]", "row growing: a student from 9 images, of 8"),
        ("{num_images: 8}", "{num_images: 8, out: x}", "grid.synthesize.out"),
        ("{num_images: 8}", "[8]", "grid.synthesize: must be a mapping"),
        ("{num_images: 8}", "{num_images: 8, devices: 2}", "synthesize on 2 devices: each command has one"),
        ("steps: 3, batch_size: 4", "steps: 3, num_nodes: 2", "distill on 2 devices: each command has one"),
        ("  rows:", "  export: {model: teacher}\n  rows:", "grid.export.model: a row says which model it exports"),
        ("{num_images: 8}", "{recipe: nothing-of-the-kind}", "unknown recipe"),
        ("steps: 3, batch_size: 8", "model: resnet99, steps: 3", "resnet99: unknown model"),
        ("{temperature: 2}", "{student: 'w8a8:lenet'}", "lenet: unknown model"),
        ("{temperature: 2}", "{method: kdcl, students: [lenet5, lenet6]}", "lenet6: unknown model"),
        ("{temperature: 2}", "{method: takd, assistants: [lenet7]}", "lenet7: unknown model"),
        ("{shards: zskd,", "{teachers: [lenet5], shards: zskd,", "the grid has one"),
        ("hot: {shards: zskd,", "hot: {taught_by: zksd, shards: zskd,", "did you mean 'zskd'"),
        ("hot: {shards: zskd,", "hot: {taught_by: growing, shards: zskd,", "row 'growing' has no student of seed 0"),
        ("hot: {shards: zskd,", "hot: {taught_by: zskd-hot, shards: zskd,", "rows that wait for each other"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(tmp_path, monkeypatch, cli, old, new, words):
    monkeypatch.chdir(tmp_path)
    assert old in GRID
    (tmp_path / "grid.yaml").write_text(GRID.replace(old, new))
    code, out, err = cli("compare", "--recipe", "grid.yaml")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "comparison").exists()
