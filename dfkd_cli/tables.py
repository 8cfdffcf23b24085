"""Tables on a terminal: where room is short, whole columns are left out and named. No figure is ever cut."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

LEAST = 24  # characters of a line of the column that takes several


class Columns:
    """A table with all its columns, of which a terminal shows those that it has room for.

    Args:
        columns: The texts of each column, by its heading.
        words: Columns of words, which begin at the left.
        folds: The one of them whose texts may take several lines.
        spare: The columns that are left out of a narrow terminal, in this order.
        rest: Where they are then found.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[str]],
        words: Container[str],
        folds: str = "",
        spare: Iterable[str] = (),
        rest: str = "--json",
    ) -> None:
        self.columns, self.words, self.folds, self.rest = columns, words, folds, rest
        self.spare = [name for name in spare if name in columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full = {name: max(map(cell_len, (name, *texts))) for name, texts in self.columns.items()}
        widths, left_out, room = full, 0, options.max_width
        if console.is_terminal:
            widths = {name: min(size, LEAST) if name == self.folds else size for name, size in full.items()}
            while _total(widths) > room and left_out < len(self.spare):
                del widths[self.spare[left_out]]
                left_out += 1
            if self.folds in widths:
                unused = max(0, room - _total(widths))
                widths[self.folds] = min(full[self.folds], widths[self.folds] + unused)
        note = f"{self.rest} also has {', '.join(self.spare[:left_out])}" if left_out else None
        table = Table(box=None, header_style="bold", pad_edge=False, caption=note, caption_justify="left")
        for name, width in widths.items():
            justify: Literal["left", "right"] = "left" if name in self.words else "right"
            table.add_column(Text(name), justify=justify, width=width, overflow="fold")
        for row in zip(*(self.columns[name] for name in widths), strict=True):
            table.add_row(*map(Text, row))
        yield from console.render(table, options.update_width(max(room, _total(widths))))


def _total(widths: Mapping[str, int]) -> int:
    """The characters of a line, with two between columns."""
    return sum(widths.values()) + 2 * (len(widths) - 1)
