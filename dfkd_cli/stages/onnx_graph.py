"""A classifier as an ONNX model: pixels in [0,1] to logits, any number of images at once.

What rounds (:mod:`dfkd_cli.models.quantized`) becomes pairs of QuantizeLinear and DequantizeLinear, which runtimes
turn into kernels of integers. The integers of a weight are those that the network computes with in training: that of a
channel is w = s n, and BatchNorm makes of it a (s n) + c. As the range of n is symmetric, a goes into the scale, |a| s,
and its sign into the integers; c, and the bias, become integers of 32 bits with the scale of the products. Integers of
few bits are multiplied by a whole number first, for biases are rounded to that scale: from a random ResNet-8 with 4 and
4 bits, logits then differ by 0.35 % of the largest from those that are simulated, else by 0.64 %. Of weights of up to 4
bits two share a byte in the file; a runtime unpacks them once, when it loads it, and computes as fast.

onnx and onnxscript, which only this needs, are imported here alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkd_cli.errors import ArtifactError, ConfigError
from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.exported import INSTALL
from dfkd_cli.models.quantized import RoundingLayer, integers, unchanging

OPSET, WITH_INT4 = 20, 21  # runtimes need to know no more than the file has
EXPORTS = "2.11"  # the first PyTorch whose exporter takes rounding
INPUT, OUTPUT = "pixels", "logits"
PACKED = 4  # bits of which two share a byte
TINY = 1e-30  # the least scale of a channel that BatchNorm multiplies by 0
_ATEN = torch.ops.aten


def to_onnx(classifier: Classifier, facts: dict[str, Any]) -> bytes:
    """An ONNX model that answers as the classifier does in evaluation, with its classes and ``facts`` as metadata.

    Raises:
        ConfigError: onnx or onnxscript is not installed, or PyTorch is too old.
        ArtifactError: The network cannot be exported.
    """
    try:
        import onnx_ir
        import onnxscript  # noqa: F401  # torch's exporter needs it
        from onnx_ir.passes import common
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", INSTALL) from None
    if torch.__version__ < EXPORTS:
        raise ConfigError(f"export: PyTorch {torch.__version__} is too old for it", INSTALL)

    with unchanging(classifier.net):
        model = _exported(classifier.eval())
    layers = {
        f"net.{path}.weight": layer
        for path, layer in classifier.net.named_modules()
        if isinstance(layer, RoundingLayer)
    }
    _join_rounding(model.graph)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and node.inputs[0].name in layers:
            _Weight(model.graph, node, layers[node.inputs[0].name]).put()
    if any(layer.weight_bits <= PACKED for layer in layers.values()):
        model.opset_imports[""], model.ir_version = WITH_INT4, max(model.ir_version, 10)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # of nodes: paths of this machine are among it
    model.producer_name, model.doc_string = "dfkd", "pixels in [0,1], float32 (B, C, H, W), to logits (B, K)"
    model.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
    return onnx_ir.to_proto(model).SerializeToString()


def opset(made: bytes) -> int:
    """The version of the operators of an ONNX model."""
    import onnx

    return next(int(known.version) for known in onnx.load_model_from_string(made).opset_import if not known.domain)


def _exported(classifier: Classifier) -> Any:
    """What torch's exporter makes of a classifier, with pairs of operators where it rounds."""
    image = torch.zeros(2, *classifier.info.input_size, device=classifier.mean.device)
    table: Any = {
        _ATEN.fake_quantize_per_tensor_affine.tensor_qparams: _rounded_values,
        _ATEN.fake_quantize_per_channel_affine.default: _rounded_weight,
    }
    try:
        with _shapes_of_rounding(), warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                classifier,
                (image,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                custom_translation_table=table,
                verbose=False,
            )
    except Exception as error:  # foreign code, in an exporter, can raise anything
        first = error
        while first.__cause__ is not None:
            first = first.__cause__  # type: ignore[assignment]
        reason = next((line for line in str(first).splitlines() if line.strip()), type(first).__name__)
        raise ArtifactError(f"{classifier.info.spec}: cannot be exported: {reason[:200]}") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Any:
    """What the exporter says while it looks for a way is not what the user has to know."""
    disabled, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _shapes_of_rounding() -> Any:
    """Tell torch.export, while the block runs, the shapes that rounding gives: PyTorch itself does not."""
    library: Any = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[no-untyped-call]

    def alike(values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)

    try:
        library.impl("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", alike)
        library.impl("fake_quantize_per_channel_affine_cachemask", alike)
        yield
    finally:
        library._destroy()


def _rounded_values(values: Any, scale: Any, zero: Any, low: int, high: int) -> Any:
    """Rounding of activations: integers are cut where they have less than 8 bits."""
    from onnx import TensorProto, helper
    from onnxscript import opset20 as op

    zero = op.Cast(zero, to=TensorProto.UINT8)
    rounded = op.QuantizeLinear(values, scale, zero)
    if high < 255:
        ends = (op.Constant(value=helper.make_tensor("end", TensorProto.UINT8, [], [end])) for end in (low, high))
        rounded = op.Clip(rounded, *ends)
    return op.DequantizeLinear(rounded, scale, zero)


def _rounded_weight(weight: Any, scale: Any, zero: Any, axis: int, low: int, high: int) -> Any:
    """Rounding of weights, where the integers will be put."""
    from onnx import TensorProto
    from onnxscript import opset20 as op

    zero = op.Cast(zero, to=TensorProto.INT8)
    return op.DequantizeLinear(op.QuantizeLinear(weight, scale, zero, axis=axis), scale, zero, axis=axis)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _array(value: Any) -> Any:
    """What a constant of the graph is, None of any other value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _constant(graph: Any, array: np.ndarray, name: str) -> Any:
    import onnx_ir

    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _join_rounding(graph: Any) -> None:
    """Round once what is rounded twice alike: one value for several layers, or one after the other."""
    seen: dict[Any, Any] = {}
    for node in list(graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Clip"):
            continue
        settings = [_array(value) for value in node.inputs[1:]]
        if any(value is None for value in settings):
            continue
        shared = *((value.dtype.str, value.tobytes()) for value in settings), node.op_type
        before = node.inputs[0].producer()
        key = (node.inputs[0], *shared)
        if node.op_type == "QuantizeLinear" and before is not None and before.op_type == "DequantizeLinear":
            same = all(np.array_equal(_array(a), b) for a, b in zip(before.inputs[1:], settings, strict=True))
            if same and before.inputs[0].type == node.outputs[0].type:
                node.outputs[0].replace_all_uses_with(before.inputs[0])
                continue
        if key in seen:
            node.outputs[0].replace_all_uses_with(seen[key])
        else:
            seen[key] = node.outputs[0]


class _Weight:
    """The integers of a layer's weight, where they take the place of the float weight that is rounded.

    Args:
        graph: The graph.
        rounding: The QuantizeLinear of the float weight.
        layer: The layer whose weight it is.
    """

    def __init__(self, graph: Any, rounding: Any, layer: RoundingLayer) -> None:
        self.graph, self.rounding, self.name = graph, rounding, rounding.inputs[0].name
        self.packed = layer.weight_bits <= PACKED
        self.numbers, scale = integers(layer)
        # Products of two weights with two inputs still fit into 16 bits, where a CPU without VNNI adds them up, if
        # those of the integers themselves do.
        top, most = 2 ** (layer.weight_bits - 1) - 1, 2 ** (layer.input_bits or 8) - 1
        self.times = max(1, min(127 // top, (2**15 - 1) // (2 * top * most)))
        self.scale = scale.astype(np.float64) / self.times

    def put(self) -> None:
        """For each reader of the weight."""
        (floats,) = {use.node for use in self.rounding.outputs[0].uses()}
        for at, use in enumerate(list(floats.outputs[0].uses())):
            name = f"{self.name}.{at}" if at else self.name
            if use.node.op_type in ("Conv", "Gemm") and use.idx == 1:
                self._of_layer(use.node, name)
            elif use.node.op_type == "Transpose" and self.numbers.ndim == 2:  # of a linear layer, in a matrix product
                turned = self._weight(use.node, self.numbers.T, self.scale, name, axis=1)
                use.node.outputs[0].replace_all_uses_with(turned)
            else:
                use.node.replace_input_with(use.idx, self._weight(use.node, self.numbers, self.scale, name))

    def _of_layer(self, node: Any, name: str) -> None:
        """A convolution or linear layer, with the BatchNorm that follows it."""
        numbers, scale = self.numbers, self.scale
        given = _array(node.inputs[2]) if len(node.inputs) > 2 else None
        bias = np.zeros(len(scale)) if given is None else given.astype(np.float64)
        norm = self._norm(node)
        if norm is not None:
            gamma, beta, mean, variance = (_array(value).astype(np.float64) for value in norm.inputs[1:5])
            factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].value)
            bias, scale = factor * (bias - mean) + beta, scale * np.abs(factor)
            numbers = (numbers * np.sign(factor).reshape(-1, *[1] * (numbers.ndim - 1))).astype(np.int8)
        source = node.inputs[0].producer()
        of_input = float(_array(source.inputs[1])) if source is not None and source.op_type == "DequantizeLinear" else 0
        if of_input:
            # Where next to nothing comes from the weights, the bias is what has to fit into 32 bits.
            least = np.maximum(np.abs(bias) / 2**30 / of_input, TINY)
            ratio = (scale / np.maximum(scale, least)).reshape(-1, *[1] * (numbers.ndim - 1))
            numbers, scale = np.rint(numbers * ratio).astype(np.int8), np.maximum(scale, least)
        weight = self._weight(node, numbers, scale, name)
        rest = []
        if given is not None or norm is not None:
            rest = [self._bias(node, bias, of_input * scale, name.removesuffix("weight") + "bias")]
        self._replace(node, [node.inputs[0], weight, *rest], norm)

    def _norm(self, node: Any) -> Any:
        users = [use.node for use in node.outputs[0].uses()]
        alone = len(users) == 1 and not node.outputs[0].is_graph_output()
        return users[0] if alone and users[0].op_type == "BatchNormalization" else None

    def _bias(self, node: Any, bias: np.ndarray, scale: np.ndarray, name: str) -> Any:
        if not scale.any():
            return _constant(self.graph, bias.astype(np.float32), f"{name}.float")
        whole = np.rint(bias / scale.astype(np.float32)).astype(np.int32)
        return self._dequantized(node, _constant(self.graph, whole, f"{name}.integers"), scale, name, kind=np.int32)

    def _weight(self, node: Any, numbers: np.ndarray, scale: np.ndarray, name: str, axis: int = 0) -> Any:
        """The value ``scale x times x numbers``, just before a node."""
        if not self.packed:
            made = _constant(self.graph, np.ascontiguousarray(numbers * np.int8(self.times)), f"{name}.integers")
            return self._dequantized(node, made, scale, name, axis)
        import onnx_ir
        from ml_dtypes import int4

        stored = _constant(self.graph, np.ascontiguousarray(numbers).astype(int4), f"{name}.integers")
        times = _constant(self.graph, np.array(self.times, np.int32), f"{name}.times")
        made = self._before(node, "Cast", [stored], to=onnx_ir.DataType.INT32)  # no runtime multiplies smaller ones
        made = self._before(node, "Cast", [self._before(node, "Mul", [made, times])], to=onnx_ir.DataType.INT8)
        return self._dequantized(node, made, scale, name, axis)

    def _dequantized(
        self, node: Any, numbers: Any, scale: np.ndarray, name: str, axis: int = 0, kind: Any = np.int8
    ) -> Any:
        """The value ``scale x numbers``, just before a node."""
        named = {"scale": scale.astype(np.float32), "zero": np.zeros(len(scale), kind)}
        inputs = [numbers, *(_constant(self.graph, array, f"{name}.{key}") for key, array in named.items())]
        return self._before(node, "DequantizeLinear", inputs, axis=axis)

    def _before(self, node: Any, operator: str, inputs: list[Any], **attributes: Any) -> Any:
        """What an operator makes of values, just before a node."""
        import onnx_ir

        made = onnx_ir.node(operator, inputs, attributes=attributes)
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def _replace(self, node: Any, inputs: list[Any], norm: Any) -> None:
        """Put a node with other inputs in the place of one, and of the BatchNorm that follows it."""
        import onnx_ir

        made = onnx_ir.node(node.op_type, inputs, attributes=dict(node.attributes))
        self.graph.insert_before(node, made)
        old = node.outputs[0] if norm is None else norm.outputs[0]
        made.outputs[0].type, made.outputs[0].shape, name = old.type, old.shape, old.name
        old.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        old.name, made.outputs[0].name = f"{name}.before", name
