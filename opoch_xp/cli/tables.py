"""How results look: one table type, the words for figures, and where tables, progress and JSON go."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from opoch_xp.writing import check_target, replaceable, whole_file

STDOUT = "-"
GUTTER = 2  # spaces between columns
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")  # powers of 1,000


@dataclass(frozen=True)
class Table:
    """A title, lines that say what was measured, columns (the first is text, the rest figures), rows and notes."""

    title: str
    about: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    text_columns: int = 1


class Sink:
    """Where a command's results go: tables to stdout, and the same figures to a JSON or CSV file if one was named.

    "-" is stdout; tables then go to stderr. Commands write before they show: what was measured is not lost to a stdout
    that takes no more. Raises FileNotFoundError, IsADirectoryError or PermissionError before anything is measured when
    a file cannot be written where it was named, ValueError when two are named alike.
    """

    def __init__(self, json_path: Path | None = None, csv_path: Path | None = None) -> None:
        self.json_path, self.csv_path = json_path, csv_path
        named = {"--json": json_path, "--csv": csv_path}
        for option, path in named.items():
            if path is not None and str(path) != STDOUT:
                check_target(option, path)
        if json_path is not None and json_path == csv_path:
            raise ValueError(f"--json and --csv must name two files, got {json_path} twice")
        self.console = Console(stderr=STDOUT in map(str, named.values()), highlight=False)

    def show(self, table: Table) -> None:
        """Print a table; as Markdown where the output is no terminal, at full width, so that it can be pasted."""
        if not self.console.is_terminal:
            self.console.file.write(_markdown(table))
            return
        self.console.print(Text(table.title, style="bold"))
        for line in table.about:
            self.console.print(Text(line))
        for columns in _pages(table, self.console.width):
            grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
            for number in columns:
                text = number < table.text_columns
                grid.add_column(
                    table.columns[number], justify="left" if text else "right", overflow="fold", no_wrap=not text
                )
            for row in table.rows:
                grid.add_row(*(Text(row[number]) for number in columns))
            self.console.print(grid)
        for line in table.notes:
            self.console.print(Text(line, style="dim"))
        self.console.print()

    def show_text(self, title: str, text: str) -> None:
        """Print a text under its title, as it is; as a block of code where the output is no terminal."""
        if self.console.is_terminal:
            self.console.print(Text(title, style="bold"))
            self.console.print(Text(text))
            self.console.print()
            return
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        self.console.file.write(f"{title}\n\n{fence}text\n{text}\n{fence}\n\n")

    def write_json(self, results: Any, done: bool = True) -> None:
        """The figures of every table, whole or not at all; of those so far, where a file can take them back."""
        if self.json_path is None or not (done or _is_file(self.json_path)):
            return
        _write(self.json_path, json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")

    def write_csv(self, rows: Sequence[dict[str, Any]]) -> None:
        """One line a row of every table, the columns named in the first, whole or not at all."""
        if self.csv_path is None:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        _write(self.csv_path, text.getvalue())


def _write(path: Path, text: str) -> None:
    """To stdout, or to the file, whole or not at all."""
    if str(path) == STDOUT:
        print(text, end="")
        return
    with whole_file(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # names of files that are no UTF-8


def _is_file(path: Path) -> bool:
    return str(path) != STDOUT and replaceable(path)


def _finite(figures: Any) -> Any:
    """The same with None for numbers that JSON has not."""
    if isinstance(figures, dict):
        return {key: _finite(value) for key, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [_finite(value) for value in figures]
    return None if isinstance(figures, float) and not isfinite(figures) else figures


def _pages(table: Table, width: int) -> list[list[int]]:
    """The columns, in pages that fit the width beside the columns of text, which lead each; text may be folded."""
    wide = [max(map(len, (name, *(row[number] for row in table.rows)))) for number, name in enumerate(table.columns)]
    lead = list(range(table.text_columns))
    room = width - sum(min(wide[number] + GUTTER, width // 2) for number in lead)
    pages, left = [lead.copy()], room
    for number in range(table.text_columns, len(table.columns)):
        if wide[number] + GUTTER > left and len(pages[-1]) > len(lead):
            pages.append(lead.copy())
            left = room
        pages[-1].append(number)
        left -= wide[number] + GUTTER
    return pages


def _markdown(table: Table) -> str:
    """The table as Markdown, its columns padded so that it reads as plain text too."""
    grid = [list(table.columns), *(list(row) for row in table.rows)]
    widths = [max(len(row[column]) for row in grid) for column in range(len(table.columns))]

    def line(row: list[str]) -> str:
        cells = (
            cell.ljust(width) if column < table.text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = ("-" * (width + 2) if n < table.text_columns else "-" * (width + 1) + ":" for n, width in enumerate(widths))
    body = [line(grid[0]), f"|{'|'.join(rule)}|", *map(line, grid[1:])]
    parts = ([table.title, *table.about], body, list(table.notes))
    return "\n".join("\n".join([*part, ""]) for part in parts if part) + "\n"


@contextmanager
def progress(steps: float, weighed: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on stderr, when that is a terminal; call what is yielded with the name of each step as it begins, and where
    steps are weighed with the step's weight, of `steps` altogether: the bar then tells the time that is left."""
    console = Console(stderr=True)
    told = (TaskProgressColumn(), TimeRemainingColumn()) if weighed else (MofNCompleteColumn(), TimeElapsedColumn())
    columns = (SpinnerColumn(), BarColumn(), *told, TextColumn("{task.description}"))
    # two frames a second: the thread that draws must not take time from what is being measured
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps)
        last = 0.0

        def begin(description: str, weight: float = 1.0) -> None:
            nonlocal last
            bar.update(task, advance=last, description=description, refresh=True)
            last = weight

        yield begin


def seconds(value: float | None, extrapolated: bool = False) -> str:
    """12 ms, 1.06 s, 837 s; ~ before what was extrapolated."""
    if value is None:
        return ""
    text = f"{1000 * value:.3g} ms" if value < 0.9995 else f"{_three(value)} s"
    return f"~{text}" if extrapolated else text


def micro(value: float) -> str:
    """The time of one query: 3.4 us, 120 us, 3.1 ms."""
    return f"{1e6 * value:.3g} us" if value < 0.9995e-3 else seconds(value)


def size(value: float | None, extrapolated: bool = False) -> str:
    """Bytes in powers of 1,000: 4.0 TB."""
    if value is None:
        return "n/a"
    unit = 0
    while value >= 999.5 and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    text = f"{value:.1f} {BYTE_UNITS[unit]}" if value < 9.95 and unit else f"{value:.0f} {BYTE_UNITS[unit]}"
    return f"~{text}" if extrapolated else text


def percent(value: float | None) -> str:
    """A share or a relative error in percent, to two or three figures."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if value < 1e-6:
        return "<0.0001%"
    return (
        f"{100 * value:.0f}%"
        if value >= 0.9995
        else f"{100 * value:.1f}%"
        if value >= 0.0995
        else f"{100 * value:#.2g}%"
    )


def factor(value: float | None) -> str:
    """A speed-up: 52x, 0.8x."""
    return "" if value is None else f"{_three(value)}x"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
