"""What the lab says while it works: plain lines, tables and one progress bar, all through one console."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def use_stderr() -> None:
    """Send everything that is said to standard error, so that standard output holds a command's JSON alone."""
    console.stderr = True


def say(text: str = "") -> None:
    """Print one plain line; text from data is never taken for markup."""
    console.print(text, markup=False)


def table(title: str, columns: list[str], rows: list[list]) -> None:
    """Print a table; all but the first column are aligned to the right."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*[_plain(cell) for cell in row])
    console.print(shown)


def _plain(cell) -> str:
    from rich.markup import escape

    return escape(str(cell))


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator:
    """A progress bar with time elapsed and left. Yields update(done, total=None, note="")."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(done: int, total: int | None = None, note: str | None = None) -> None:
            known = {key: value for key, value in (("total", total), ("note", note)) if value is not None}
            bar.update(task, completed=done, **known)

        yield update
