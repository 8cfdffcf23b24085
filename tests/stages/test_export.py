"""``dfkd export``, and what is exported in ``evaluate`` and ``compare``."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from ml_dtypes import int4  # noqa: E402  # which onnx needs

import dfkd_cli  # noqa: E402
from dfkd_cli.models.classifier import Classifier, ModelInfo  # noqa: E402
from dfkd_cli.models.directory import identity, load_model, read_record, save_model  # noqa: E402
from dfkd_cli.models.exported import OnnxNetwork  # noqa: E402
from dfkd_cli.models.quantized import RoundingLayer, find_ranges, integers, quantisers, quantize  # noqa: E402
from dfkd_cli.stages.onnx_graph import to_onnx  # noqa: E402

SIZE = (3, 8, 8)
NETWORKS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 10)
    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        return self.head(torch.relu(x + self.bn(self.conv(x))).mean((2, 3)))

def small():
    return Block()

def several():
    layers = nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    return nn.Sequential(nn.Flatten(), *layers)

class Loop(Block):
    def forward(self, x):
        return super().forward(x) * (1 if x.sum() > 0 else 2)

def deciding():
    return Loop()
"""


def network(bits: tuple[int, int]) -> Classifier:
    """Convolutions, and linear layers; BatchNorm has seen images, and has negative factors, and one of zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    classifier = Classifier(net, ModelInfo("test", 5, SIZE, (0.5,) * 3, (0.2,) * 3, tuple("abcde")))
    with torch.no_grad():
        for layer in classifier.batch_norms():
            layer.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0, -0.1, 1e-9, 1.0, 1.0]))
            layer.bias.normal_()
        for _ in range(20):
            classifier(torch.rand(32, *SIZE))
        classifier.eval()
        quantize(net, *bits, SIZE, "test")
        find_ranges(classifier, [torch.rand(64, *SIZE)])
    return classifier


def initialisers(model) -> dict[str, np.ndarray]:
    return {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}


@pytest.fixture(scope="module")
def exported() -> tuple[Classifier, bytes]:
    classifier = network((4, 5))
    return classifier, to_onnx(classifier, {"classes": list("abcde")})


def test_exported_integers_are_those_that_are_trained(exported):
    classifier, made = exported
    model = onnx.load_from_string(made)
    onnx.checker.check_model(model, full_check=True)
    constants, net = initialisers(model), classifier.net
    layers = {path: layer for path, layer in net.named_modules() if isinstance(layer, RoundingLayer)}
    assert len(layers) == 4
    for path, layer in layers.items():
        numbers, scale = integers(layer)
        simulated = layer.weight.detach().double().numpy()
        np.testing.assert_allclose(
            numbers * scale.reshape(-1, *[1] * (numbers.ndim - 1)).astype(float), simulated, rtol=1e-6, atol=1e-12
        )
        found, of_bit = (constants[f"net.{path}.weight.{what}"] for what in ("integers", "scale"))
        alive = np.ones(len(found), bool)
        if isinstance(layer, nn.Conv2d):
            norm = net[int(path) + 1]
            factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
            alive = np.abs(factor) > 1e-6
            numbers = numbers * np.sign(factor).reshape(-1, 1, 1, 1).astype(np.int8)
            scale = scale * np.abs(factor)
        times = constants.get(f"net.{path}.weight.times", np.array(1))  # so that a bias is finer
        assert times == {8: 1, 4: 18}[layer.weight_bits]
        assert times == 1 or 2 * np.abs(times * found.astype(int)).max() * (2**layer.input_bits - 1) < 2**15
        assert found.dtype == {8: np.int8, 4: int4}[layer.weight_bits]
        assert np.array_equal(found[alive].astype(np.int8), numbers[alive]), path
        np.testing.assert_allclose(of_bit[alive] * times, scale[alive], rtol=1e-6)
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def test_a_bias_is_that_of_batch_norm(exported):
    classifier, made = exported
    constants = initialisers(onnx.load_from_string(made))
    conv, norm = classifier.net[3], classifier.net[4]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    wanted = (factor * (conv.bias.double() - norm.running_mean.double()) + norm.bias.double()).detach().numpy()
    numbers, scale = constants["net.3.bias.integers"].astype(float), constants["net.3.bias.scale"].astype(float)
    assert (np.abs(numbers * scale - wanted) <= 0.501 * scale + 1e-6).all()  # to the nearest
    low, high = classifier.net[3].input_range.tolist()
    np.testing.assert_allclose(scale[[0, 1]], (high - low) / 31 * constants["net.3.weight.scale"][[0, 1]], rtol=1e-6)


def test_onnxruntime_computes_what_is_simulated(exported):
    classifier, made = exported
    network, pixels = OnnxNetwork(made, "test"), torch.rand(300, *SIZE)
    with torch.no_grad():
        simulated = classifier(pixels)
        for module in quantisers(classifier.net):
            module.calibrated = False
        floats = classifier(pixels)
        for module in quantisers(classifier.net):
            module.calibrated = True
    error = (network(pixels) - simulated).abs().mean()  # a bias is a multiple of one weight's bit times one input's
    assert error < 0.2 * (simulated - floats).abs().mean()
    assert torch.equal(network(pixels[:1]), network(pixels)[:1])  # any number of images


def test_the_model_says_what_it_takes_and_nothing_of_this_machine(exported):
    model = onnx.load_from_string(exported[1])
    (given,), (taken,) = model.graph.output, model.graph.input
    assert (taken.name, given.name) == ("pixels", "logits")
    shape = [dim.dim_param or dim.dim_value for dim in taken.type.tensor_type.shape.dim]
    assert shape == ["batch", *SIZE]
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {"classes": list("abcde")}
    assert b"/" + b"site-packages" not in exported[1] and b".py" not in exported[1]


def test_no_file_needs_what_only_exports_need():
    package = Path(dfkd_cli.__file__).parent
    for path in package.rglob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in statement.names] + [getattr(statement, "module", None) or ""]
                assert not [name for name in names if name.split(".")[0].startswith("onnx")], path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher of the user's own code, whose BatchNorm has seen images, and a copy of it with few bits."""
    path = tmp_path_factory.mktemp("exports")
    (path / "nets.py").write_text(NETWORKS)
    sys.path.insert(0, str(path))
    import nets

    sys.path.remove(str(path))
    for name in ("small", "several", "deciding"):
        torch.manual_seed(0)
        info = ModelInfo(f"nets.py:{name}", 10, (1, 16, 16), (0.3,), (0.4,), tuple("0123456789"))
        classifier = Classifier(getattr(nets, name)(), info)
        with torch.no_grad():
            for _ in range(20):
                classifier(torch.rand(32, 1, 16, 16))
        save_model(path / name, classifier.eval(), metrics={}, provenance={"dataset": "digits"})
    return path


def export(cli, model, out, *args):
    return cli("export", model, "--calibrate", "noise:64", "--allow-code", "--device", "cpu", "--out", out, *args)


def test_eight_bits_are_exported_checked_and_evaluated(cli, place, tmp_path):
    out = tmp_path / "export"
    code, said, err = export(cli, place / "small", out, "--bits", 8, "--min-agreement", 0.5, "--json")
    assert code == 0, err
    metrics = json.loads(said)["metrics"]
    assert metrics["float_difference"] <= 1e-4
    assert metrics["logit_error"] <= max(metrics["rounding_error"], 1e-3)
    names = {
        f"latency_ms_{name}_{threads}" for name in ("float", "integers") for threads in ("one_thread", "all_threads")
    }
    assert names < metrics.keys() and metrics["bytes"] == (out / "model.onnx").stat().st_size
    record, run = (json.loads((out / name).read_text()) for name in ("export.json", "run.json"))
    assert (record["spec"], record["opset"], record["rounded"]) == ("onnx:w8a8:nets.py:small", 20, True)
    assert record["parents"][0]["sha256"] == identity(read_record(place / "small"))
    assert (run["data_free"], run["status"]) == (True, "done")
    for name, gate in (("small", ()), ("small", ("--min-agreement", 0.4)), ("./small/", ())):
        assert export(cli, f"{place}/{name}", out, "--bits", 8, *gate)[2].startswith(f"{out} is already")
    paths = [place / "small", out]
    code, said, err = cli("evaluate", *paths, "--teacher", place / "small", "--allow-code", "--device", "cpu", "--json")
    assert code == 0, err
    own, other = json.loads(said)["results"]
    assert (other["parameters"], other["macs"]) == (own["parameters"], own["macs"]) and other["agreement"] > 0.5
    code, said, err = cli(
        "compare", *paths, "--teacher", place / "small", "--allow-code", "--out", tmp_path / "c", "--device", "cpu"
    )
    assert code == 0, err
    assert str(out) in said
    code, said, _ = cli("info", out)
    assert (code, "onnx:w8a8" in said) == (0, True)
    code, _, err = cli("synthesize", "--method", "zskd", "--num-images", 2, "--teacher", out, "--out", tmp_path / "s")
    assert (code, "only answers are seen of it" in err) == (2, True)
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:-1])
    code, _, err = cli("evaluate", out, "--device", "cpu")
    assert (code, "model.onnx is damaged" in err) == (3, True)


def test_a_trained_copy_is_exported_with_its_own_bits(cli, place, tmp_path):
    student, out = tmp_path / "student", tmp_path / "export"
    train = ["--teacher", place / "small", "--transfer-set", "noise:64", "--student", f"w4a4:{place / 'small'}"]
    code, _, err = cli("distill", *train, "--steps", 2, "--out", student, "--allow-code", "--device", "cpu")
    assert code == 0, err
    for bits in (8, 32):
        code, _, err = export(cli, student, out, "--bits", bits)
        assert (code, "has few bits already" in err) == (2, True)
    code, _, err = export(cli, student, out, "--check", "real:20")
    assert code == 0, err
    record, run = (json.loads((out / name).read_text()) for name in ("export.json", "run.json"))
    assert [parent.get("spec") for parent in run["parents"]] == [None, "noise:64", "real:20 digits"]
    assert run["metrics"]["images"] == 20  # which are looked at, and change nothing
    assert (run["data_free"], record["provenance"]["data_free"]) == (True, True)
    copy, _ = load_model(student, allow_code=True)
    constants = initialisers(onnx.load(out / "model.onnx"))
    numbers, _ = integers(copy.net.conv)
    factor = copy.net.bn.weight.detach().sign().view(-1, 1, 1, 1).numpy().astype(np.int8)
    found = constants["net.conv.weight.integers"].astype(np.int8)
    assert np.array_equal(found, numbers * factor) and np.abs(numbers).max() == 7
    assert (constants["net.conv.weight.times"], record["opset"]) == (18, 21)


@pytest.mark.parametrize("first", ["student", "export"])
def test_an_export_and_its_student_are_measured_against_their_teacher(cli, place, tmp_path, first):
    teacher, student, out = place / "small", tmp_path / "student", tmp_path / "export"
    learned = ["--teacher", teacher, "--transfer-set", "noise:64", "--student", f"w2a2:{teacher}", "--steps", 0]
    assert cli("distill", *learned, "--out", student, "--allow-code", "--device", "cpu")[0] == 0
    assert export(cli, student, out)[0] == 0
    paths = sorted((student, out), key=lambda path: path.name != first)
    agreements = []
    for named in ((), ("--teacher", teacher)):
        code, said, err = cli("evaluate", *paths, *named, "--allow-code", "--device", "cpu", "--json")
        assert code == 0, err
        agreements.append([result["agreement"] for result in json.loads(said)["results"]])
    assert agreements[0] == agreements[1]
    code, _, err = cli("compare", *paths, "--allow-code", "--out", tmp_path / "c", "--device", "cpu")
    assert code == 0, err
    (section,) = json.loads((tmp_path / "c" / "results.json").read_text())["sections"]
    found = {(row["role"], row["runs"][0]["path"]) for row in section["rows"]}
    assert found == {("teacher", str(teacher)), ("student", str(student)), ("student", str(out))}


def test_a_gate_holds_before_an_export_is_written_and_after(cli, place, tmp_path):
    """Two bits of a hidden layer of the copy: it answers some images otherwise than in float."""
    teacher, student, out = place / "several", tmp_path / "student", tmp_path / "export"
    learned = ["--teacher", teacher, "--transfer-set", "noise:64", "--student", f"w2a2:{teacher}", "--steps", 0]
    assert cli("distill", *learned, "--out", student, "--allow-code", "--device", "cpu")[0] == 0
    code, _, err = export(cli, student, out, "--min-agreement", 1)
    assert (code, "agreement with the float model is 0." in err, (out / "model.onnx").exists()) == (5, True, False), err
    assert export(cli, student, out)[0] == 0
    code, _, err = export(cli, student, out, "--min-agreement", 1)
    assert (code, "it was exported without this gate" in err, (out / "model.onnx").exists()) == (5, True, True), err


@pytest.fixture(scope="module")
def finished(place, session_cli) -> Path:
    """An export, beside the model that it is of."""
    calibrate = ("--calibrate", "noise:64", "--allow-code", "--device", "cpu")
    assert session_cli(place, "export", "small", *calibrate, "--out", "finished") == 0
    return place / "finished"


def test_what_is_exported_is_copied_and_checked_without_the_record_of_its_run(cli, finished, tmp_path):
    bare = Path(shutil.copytree(finished, tmp_path / "bare"))
    (bare / "run.json").unlink()
    assert cli("cp", bare, f"file://{tmp_path}/server/bare")[0] == 0
    assert cli("cp", f"file://{tmp_path}/server/bare", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.onnx").read_bytes() == (finished / "model.onnx").read_bytes()
    assert cli("info", tmp_path / "back")[0] == 0
    record = json.loads((bare / "export.json").read_text())
    (bare / "export.json").write_text(json.dumps(record | {"parameters": 138_357_544}))  # a VGG-16
    assert cli("info", bare)[0] == 0
    (bare / "model.onnx").write_bytes((bare / "model.onnx").read_bytes()[:-1])
    for command in (("info", bare), ("cp", bare, f"file://{tmp_path}/server/damaged")):
        code, _, err = cli(*command)
        assert (code, "model.onnx is damaged" in err) == (3, True), err


def test_lineage_tells_whether_an_export_is_still_the_same(cli, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "export")
    code, _, err = cli("evaluate", "export", "--device", "cpu", "--out", "ev")
    assert code == 0, err

    def found() -> list[tuple[str, str]]:
        lineage = json.loads(cli("info", "ev", "--json")[1])["info"]["lineage"]
        return [(parent["role"], parent["found"]) for parent in lineage if "found" in parent]

    assert found() == [("model", "same")]
    Path("export/model.onnx").write_bytes(Path("export/model.onnx").read_bytes()[:-1])
    assert found() == [("model", "another")]


def test_what_is_only_asked_is_not_exported(cli, finished, tmp_path):
    small, noise = finished.parent / "small", ("--method", "noise", "--num-images", 4, "--device", "cpu")
    assert cli("synthesize", "--teacher", small, "--allow-code", *noise, "--out", tmp_path / "s")[0] == 0
    for model in (finished, tmp_path / "s"):
        code, _, err = export(cli, model, tmp_path / "again")
        assert (code, "only answers are seen of it" in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "again").exists()


GRID = """
grid:
  teacher: small
  export: {images: 16, calibrate: 'noise:32'}
  rows:
    float: {export: {model: teacher}}
    low: {distill: {student: 'w4a4:', transfer_set: ['real:20'], steps: 0}, export: {}}
"""


def test_what_a_grid_exports_is_a_row_of_its_own(cli, place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    code, _, err = cli("compare", "--recipe", "grid.yaml", "--allow-code", "--out", "c", "--device", "cpu")
    assert code == 0, err
    (section,) = json.loads(Path("c/results.json").read_text())["sections"]
    rows = {row["label"]: row for row in section["rows"]}
    runs = Path("c/runs")
    places = {"teacher": Path("small"), "float": runs / "float/seed0/export"}
    places |= {"low": runs / "low/seed0/student", "low/export": runs / "low/seed0/export"}
    assert {label: Path(row["runs"][0]["path"]) for label, row in rows.items()} == places
    exports = [json.loads((places[label] / "run.json").read_text()) for label in ("float", "low/export")]
    assert [run["metrics"]["images"] for run in exports] == [16, 16]
    for label, path in places.items():
        file = json.loads((path / ("export.json" if "export" in path.name else "model.json")).read_text())
        assert rows[label]["bytes"] == (path / file["weights"]["file"]).stat().st_size
        assert rows[label]["latency_ms"]["mean"] > 0
    # What needed real images: the ranges of the copy, which its export has too; the teacher's own float has none.
    assert {label: row["data_free"] for label, row in rows.items() if label != "teacher"} == {
        "float": True, "low": False, "low/export": False,
    }  # fmt: skip
    assert (rows["low"]["model"], rows["low/export"]["model"]) == ("w4a4:nets.py:small", "onnx:w4a4:nets.py:small")
    assert "BYTES" in Path("c/table.md").read_text()


def test_three_lines_run_where_there_is_no_torch(cli, place, tmp_path):
    out = tmp_path / "export"
    code, _, err = export(cli, place / "small", out)
    assert code == 0, err
    lines = json.loads((out / "export.json").read_text())["use"]
    script = [
        "import sys; sys.modules['torch'] = None",
        "import numpy",
        "pixels = numpy.full((3, 1, 16, 16), 0.5, 'f')",
    ]
    script += [*lines, "print(logits.shape, float(logits[0, 0]))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=out, capture_output=True, text=True, check=True
    )
    classifier, _ = load_model(place / "small", allow_code=True)
    with torch.no_grad():
        expected = classifier.eval()(torch.full((3, 1, 16, 16), 0.5))
    assert done.stdout.startswith("(3, 10)")
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected[0, 0]), rel=1e-4)


def test_nothing_is_reported_home(exported, tmp_path):
    """onnxruntime keeps what it will send in the user's cache."""
    (tmp_path / "model.onnx").write_bytes(exported[1])
    (tmp_path / "home").mkdir()
    script = "from dfkd_cli.models.exported import OnnxNetwork; OnnxNetwork(open('model.onnx', 'rb').read(), 'model')"
    clean = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=clean | {"HOME": str(tmp_path / "home")}, check=True
    )
    assert not list(tmp_path.glob("home/**/*onnxruntime*"))


def test_a_pytorch_that_cannot_is_named(cli, place, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1+cu128"))
    code, _, err = export(cli, place / "small", tmp_path / "export")
    assert (code, "PyTorch 2.10.1+cu128 is too old for it -- pip install 'dfkd[export]'" in err) == (2, True), err


def test_what_fails_leaves_no_model(cli, place, tmp_path, monkeypatch):
    out = tmp_path / "deciding"
    code, _, err = export(cli, place / "deciding", out)
    assert (code, "cannot be exported" in err, err.count("\n"), (out / "model.onnx").exists()) == (3, True, 1, False), (
        err
    )
    out = tmp_path / "wrong"
    monkeypatch.setattr(OnnxNetwork, "forward", lambda self, pixels: torch.zeros(len(pixels), 10))
    code, _, err = export(cli, place / "small", out)
    assert (code, "nothing is written" in err, (out / "model.onnx").exists()) == (4, True, False), err
    assert export(cli, place / "small", tmp_path / "sixteen", "--bits", 16)[0] == 2
