"""A model SPEC: what builds a network, and with how few bits."""

import re
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("torchvision", "timm")


@dataclass(frozen=True)
class Spec:
    """A SPEC taken apart: ``[wXaY:]NAME``, or ``[wXaY:]SOURCE:NAME`` with a library, a module or a file as its source.

    Attributes:
        bits: What asks for few bits, such as ``w4a8:``, or nothing.
        rest: What is behind it. It may be a directory as well.
        source: ``torchvision``, ``timm``, ``package.module`` or ``./file.py``; nothing where there is no colon.
        name: What the source calls it, or all of ``rest``.
    """

    bits: str
    rest: str
    source: str
    name: str

    @classmethod
    def read(cls, text: str) -> "Spec":
        """Take apart what a user or a record says; every text is some SPEC."""
        match = re.fullmatch(r"(w\d+a\d+:|)((?:(.*\.py|[^:]*):)?(.*))", text, re.DOTALL)
        assert match is not None
        bits, rest, source, name = match.groups("")
        return cls(bits, rest, source, name)

    @property
    def is_code(self) -> bool:
        """Whether building it runs code that is neither ours nor a library's."""
        return ":" in self.rest and self.source not in LIBRARIES

    @property
    def file(self) -> Path | None:
        """The Python file that has the factory; None where there is none, or it is in a module."""
        return Path(self.source) if self.source.endswith(".py") else None
