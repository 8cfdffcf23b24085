"""What a SPEC says, by examples of every form."""

from pathlib import Path

import pytest

from dfkd_cli.spec import Spec

FORMS = {
    "resnet8": Spec("", "resnet8", "", "resnet8"),
    "teacher/": Spec("", "teacher/", "", "teacher/"),
    "w4a8:": Spec("w4a8:", "", "", ""),
    "w4a8:teacher/": Spec("w4a8:", "teacher/", "", "teacher/"),
    "torchvision:resnet18": Spec("", "torchvision:resnet18", "torchvision", "resnet18"),
    "w8a8:timm:resnet10t": Spec("w8a8:", "timm:resnet10t", "timm", "resnet10t"),
    "zoo.nets:Zoo.build": Spec("", "zoo.nets:Zoo.build", "zoo.nets", "Zoo.build"),
    "./net.py:Zoo.build": Spec("", "./net.py:Zoo.build", "./net.py", "Zoo.build"),
    "w2a2:a:b/net.py:build": Spec("w2a2:", "a:b/net.py:build", "a:b/net.py", "build"),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_spec_is_taken_apart(text):
    assert Spec.read(text) == FORMS[text]


def test_what_is_code_is_told_from_names_libraries_and_directories():
    code = {text for text in FORMS if Spec.read(text).is_code}
    assert code == {"zoo.nets:Zoo.build", "./net.py:Zoo.build", "w2a2:a:b/net.py:build"}


def test_the_file_with_the_factory_is_known():
    assert Spec.read("w2a2:a:b/net.py:build").file == Path("a:b/net.py")
    assert Spec.read("zoo.nets:Zoo.build").file is None
    assert Spec.read("net.py").file is None
