"""What the lab says while it works: plain lines, tables and one progress bar, all through one console."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

NOTEBOOK_COLUMNS = 110
NOTEBOOK_SECONDS = 0.5  # between two drawings of a bar

_LINE_ENDS = re.compile("\r\n|[\u0085\u2028\u2029]")
# C0 without tab and line feed, DEL, C1, and what embeds, overrides or isolates a writing direction
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which renders what a cell returns."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


# in a notebook too as plain text: lines then follow one another in one output, where rich would make each an output of its own
console = Console(highlight=False, soft_wrap=True, force_jupyter=False, width=NOTEBOOK_COLUMNS if in_notebook() else None)


@contextmanager
def on_stderr(wanted: bool = True) -> Iterator[None]:
    """Within the block, where that is wanted, send everything that is said to standard error: standard output then holds JSON alone."""
    before, console.stderr = console.stderr, wanted or console.stderr
    try:
        yield
    finally:
        console.stderr = before


def visible(text: str) -> str:
    """Text with a sign in place of every character that would act on a terminal or a page instead of being seen.

    >>> visible("a\\x1b[31m")
    'a␛[31m'
    """
    return _UNSEEN.sub(lambda found: _sign(ord(found[0])), _LINE_ENDS.sub("\n", text))


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def say(text: str = "", end: str = "\n") -> None:
    """Print one plain line; text from data is never taken for markup."""
    console.print(text, markup=False, end=end)


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Say nothing within the block, where that is wanted."""
    before, console.quiet = console.quiet, wanted or console.quiet
    try:
        yield
    finally:
        console.quiet = before


def table(title: str, columns: list[str], rows: list[list], justify: str = "right") -> None:
    """Print a table; all but the first column are aligned to the right, or as `justify` says."""
    shown = Table(title=_plain(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        shown.add_column(_plain(column), justify=justify if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*[_plain(cell) for cell in row])
    console.print(shown)


def _plain(cell) -> str:
    from rich.markup import escape

    return escape(str(cell))


_bars_lock = threading.Lock()
_bars: Progress | None = None
_bars_open = 0


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator:
    """A progress bar with time elapsed and left. Yields update(done, total=None, note="").

    Bars that are open at the same time, in several threads, stand below one another.
    """
    bars = _open_bars()
    try:
        task = bars.add_task(title, total=total, note="")

        def update(done: int, total: int | None = None, note: str | None = None) -> None:
            known = {key: value for key, value in (("total", total), ("note", note)) if value is not None}
            bars.update(task, completed=done, **known)

        yield update
    finally:
        _close_bars()


def _open_bars() -> Progress:
    """The display of all open bars: a console can show only one."""
    global _bars, _bars_open
    with _bars_lock:
        if not _bars_open:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            _bars = (_NotebookBars if in_notebook() else Progress)(*columns, console=console)
            _bars.start()
        _bars_open += 1
        return _bars


class _NotebookBars(Progress):
    """The bars as one output of a notebook, drawn anew in its place; rich's own way needs ipywidgets, which not every kernel has."""

    def start(self) -> None:
        from IPython.display import display

        self._drawn_at = time.monotonic()
        self._place = display({"text/plain": ""}, raw=True, display_id=True)

    def update(self, task_id, **changes) -> None:
        super().update(task_id, **changes)
        if time.monotonic() - self._drawn_at > NOTEBOOK_SECONDS:
            self._draw()

    def stop(self) -> None:
        self._draw()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        page = Console(file=StringIO(), width=NOTEBOOK_COLUMNS, color_system=None, force_jupyter=False)
        page.print(self)
        self._place.update({"text/plain": page.file.getvalue().rstrip()}, raw=True)


def _close_bars() -> None:
    global _bars_open
    with _bars_lock:
        _bars_open -= 1
        if not _bars_open:
            _bars.stop()
