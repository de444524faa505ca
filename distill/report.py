"""The report of an evaluation: shown in a notebook or terminal, and written as HTML, Markdown and the JSON behind both.

The pages are imported where they are made, since importing the lab must not wait for them.
"""

from dataclasses import dataclass
from pathlib import Path

from . import store
from .console import say, visible


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured of teacher and students. It shows itself in Jupyter; `show()` prints it, `save(folder)` keeps it.

    facts  the dict of report.json
    """

    facts: dict

    def to_dict(self) -> dict:
        """Everything as plain values that JSON can hold; `Evaluation(values)` is the way back."""
        return self.facts

    def show(self) -> None:
        """Print what a reader wants first: figures, diagnosis, targets. The pages hold the rest."""
        from . import report_terminal

        report_terminal.show(self.facts)

    def save(self, folder: str | Path) -> dict[str, str]:
        """Write report.json, report.html (a page that stands alone) and report.md. Returns their paths by kind."""
        return write(self.facts, folder)

    def _repr_html_(self) -> str:
        from . import report_page

        return report_page.fragment(self.facts)

    def __repr__(self) -> str:
        return f"<Evaluation of {visible(self.facts['title'])}; .show(), .to_dict(), .save(folder)>"


def write(evaluation: dict, out: str | Path) -> dict[str, str]:
    """Write an evaluation's report into a folder.

    evaluation  the dict of report.json
    out         the folder, made where it is missing
    Returns {"json", "html", "markdown"}: the paths of report.json, report.html and report.md.
    """
    return _write(evaluation, store.resolve(out) / "report.json")


def _write(evaluation: dict, place: Path) -> dict[str, str]:
    """Write an evaluation as JSON, and its pages beside it."""
    from . import report_markdown, report_page

    pages = {"html": (place.with_suffix(".html"), report_page.page), "markdown": (place.with_suffix(".md"), report_markdown.markdown)}
    written = {"json": str(store.write_json(place, evaluation))}
    for kind, (page, made_by) in pages.items():
        with store.atomic_file(page) as file:
            file.write(made_by(evaluation))
        written[kind] = str(page)
    return written


def add(given, facts: dict, part: str, mode: str, found: dict) -> None:
    """Put into an evaluation what was found after it was made, and into its report on disk, which may hold more than memory does by now.

    given  as the caller was given it: the path of its report.json, which is the one that is written; else the one in `facts["out"]` is
    facts  the evaluation's dict
    part   "judge" or "ratings";  mode  the system that it is of
    Says so where no report is there to add to. Raises DistillError where another run is writing that report.
    """
    facts[part] = {**(facts.get(part) or {}), mode: found}
    if not isinstance(given, str | Path) and "out" not in facts:
        return say("  added to no report: the evaluation does not say where its own is. Give the path of its report.json instead.")
    place = store.resolve(given) if isinstance(given, str | Path) else store.resolve(facts["out"]) / "report.json"
    with store.lock(place):
        stored = store.read_json(place) if store.is_file(place) else {}
        if not isinstance(stored, dict) or not stored.get("made") or stored["made"] != facts.get("made"):
            return say(f"  added to no report: {store.shown(place)} is gone or of another evaluation. Give the path of its report.json.")
        stored[part] = {**(stored.get(part) or {}), mode: found}
        _write(stored, place)
    return say(f"  added to {store.shown(place.with_suffix('.html'))}")
