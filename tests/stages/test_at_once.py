"""How many images a network is shown at once: in no pass, of training or after it, more than there is room for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stand_ins import classifier, synthesizer
from torch.nn.modules.module import register_module_forward_pre_hook

from dfkd_cli.models.classifier import Classifier
from dfkd_cli.models.exported import OnnxNetwork

FEW = ("--batch-size", 40, "--accumulate", 2, "--steps", 3, "--holdout", 0.2, "--device", "cpu")


@pytest.fixture
def shown() -> Iterator[set[int]]:
    """The numbers of images in all passes of classifiers and of what onnxruntime runs."""
    sizes: set[int] = set()

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, (Classifier, OnnxNetwork)) and not torch.compiler.is_compiling():
            sizes.add(len(inputs[0]))

    hook = register_module_forward_pre_hook(watch)
    yield sizes
    hook.remove()


@pytest.mark.parametrize(
    "method", [("supervised",), ("kdcl", "--students", "lenet5", "lenet5", "--ensemble", "general")]
)
def test_what_measures_a_teacher_sees_no_more_than_a_pass_of_its_training(method, tmp_path, shown, cli):
    code, _, err = cli("train-teacher", "--method", *method, *FEW, "--out", tmp_path / "teacher")
    assert (code, max(shown)) == (0, 20), err


@pytest.mark.parametrize("method", [("offline",), ("kcd", "--period", 1, "--keep", 0.5)])
def test_what_measures_a_student_sees_no_more_than_a_pass_of_its_training(method, teacher, tmp_path, shown, cli):
    """Nor does the teacher, of what is left of a set."""
    images = ("--transfer-set", "noise:120", "--student", "lenet5-half")
    code, _, err = cli("distill", "--teacher", teacher, "--method", *method, *images, *FEW, "--out", tmp_path / "s")
    assert (code, max(shown)) == (0, 20), err


@pytest.mark.parametrize(("name", "size"), [("dfad", "batch_size"), ("adaptive-deepinversion", "student_batch_size")])
def test_what_measures_a_student_in_the_loop_sees_no_more_than_its_step(name, size, tmp_path, shown):
    method = synthesizer(name, tmp_path, classifier(), {size: 20}, student=classifier(spec="lenet5-half"))
    images, answers = torch.randint(256, (30, 1, 32, 32), dtype=torch.uint8), torch.rand(30, 10)
    stored, converted = (method.health(pixels, answers) for pixels in (images, images / 255))
    assert max(shown) == 20
    assert stored == converted


def test_evaluate_shows_as_many_images_at_once_as_are_said(teacher, shown, cli):
    code, _, err = cli("evaluate", teacher, "--batch-size", 7, "--device", "cpu")
    assert (code, max(shown)) == (0, 7), err


def test_an_export_is_checked_in_parts(teacher, tmp_path, shown, cli):
    pytest.importorskip("onnxscript")
    images = ("--calibrate", "noise:120", "--images", 120, "--bits", 8, "--device", "cpu")
    code, _, err = cli("export", teacher, *images, "--out", tmp_path / "export")
    assert (code, max(shown)) == (0, 50), err
