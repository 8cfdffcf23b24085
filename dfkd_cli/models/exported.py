"""An export directory: ``model.onnx``, which onnxruntime runs, and ``export.json``, which says what that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from torch import Tensor, nn

from dfkd_cli.artifacts.integrity import check_finished, intact
from dfkd_cli.artifacts.records import Hashed, read_json
from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier, ModelInfo
from dfkd_cli.models.directory import Input, Provenance, read_info

RECORD, FILE = "export.json", "model.onnx"
INSTALL = "pip install 'dfkd[export]'"
# Without it, on x86 CPUs that have no VNNI, sums of two products of 8 bits are cut to 16 bits.
EXACT = ("session.x64quantprecision", "1")


class ExportRecord(Input):
    """``export.json``."""

    schema: Literal[1]
    kind: Literal["export"]
    weights: Hashed
    opset: int
    parameters: int
    macs: int
    metrics: NotRequired[dict[str, Any]]
    provenance: NotRequired[Provenance]


class OnnxNetwork(nn.Module):
    """Pixels in [0,1], float (B, C, H, W), to logits (B, K) as onnxruntime computes them, on the CPU.

    Args:
        model: The ONNX model.
        name: What it is called.
        exact: Whether integers are computed with as they are on any CPU.

    Raises:
        ConfigError: onnxruntime is not installed.
        ArtifactError: It cannot run the model.
    """

    def __init__(self, model: bytes, name: str, exact: bool = True) -> None:
        super().__init__()
        self.model, self.name, self.exact = model, name, exact
        self.sessions: dict[int, Any] = {}  # by the number of threads
        self._session()

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits (B, K), where the pixels are."""
        (logits,) = self._session().run(None, {"pixels": pixels.detach().float().cpu().numpy()})
        return torch.from_numpy(logits).to(pixels.device)

    def _session(self) -> Any:
        """With as many threads as torch has now."""
        threads = torch.get_num_threads()
        if threads not in self.sessions:
            self.sessions[threads] = self._opened(threads)
        return self.sessions[threads]

    def _opened(self, threads: int) -> Any:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it reports home what it runs, from version 1.32 on
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError("onnxruntime is not installed", INSTALL) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4  # what it would log, it also raises
        if self.exact:
            options.add_session_config_entry(*EXACT)
        try:
            return onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no class in common
            raise ArtifactError(f"{self.name}: onnxruntime cannot run it: {str(error)[:200]}") from error


class Exported(Classifier):
    """What onnxruntime runs, as a classifier; what it costs is on record, as nobody can count it from outside."""

    opaque = True

    def __init__(self, net: OnnxNetwork, info: ModelInfo, parameters: int, macs: int) -> None:
        super().__init__(net, info.of_pixels())  # the graph normalises them
        self.recorded = {"parameters": parameters, "macs": macs}

    @property
    def num_parameters(self) -> int:
        """Of the network that was exported."""
        return self.recorded["parameters"]


def read_export(directory: Path) -> dict[str, Any]:
    """``export.json``.

    Raises:
        ArtifactError: It is missing, damaged, or of another kind or version.
    """
    check_finished(directory)
    return dict(read_json(intact(directory / RECORD), ExportRecord))


def load_export(directory: Path) -> tuple[Exported, dict[str, Any]]:
    """Read and check an export. Returns the classifier, and the record in ``export.json``.

    Raises:
        ConfigError: onnxruntime is not installed.
        ArtifactError: The directory is missing or damaged, or onnxruntime cannot run it.
    """
    record = read_export(directory)
    info = read_info(record, directory / RECORD)
    file = intact(directory / FILE, record["weights"]["sha256"])
    net = OnnxNetwork(file.read_bytes(), str(file))
    return Exported(net, info, record["parameters"], record["macs"]), record
