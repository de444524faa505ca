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
    from . import report_markdown, report_page

    folder = store.resolve(out)
    pages = {"html": ("report.html", report_page.page), "markdown": ("report.md", report_markdown.markdown)}
    written = {"json": str(store.write_json(folder / "report.json", evaluation))}
    for kind, (name, made_by) in pages.items():
        with store.atomic_file(folder / name) as file:
            file.write(made_by(evaluation))
        written[kind] = str(folder / name)
    return written


def add(evaluation: dict, part: str, mode: str, found: dict) -> None:
    """Put into an evaluation what was found after it was made, and into its report, where that still stands.

    part  "judge" or "ratings";  mode  the system that it is of
    """
    evaluation[part] = {**evaluation[part], mode: found}
    place = store.resolve(evaluation["out"]) / "report.json"
    if store.is_file(place) and store.read_json(place)["made"] == evaluation["made"]:
        write(evaluation, place.parent)
        say(f"  added to {store.shown(place.with_suffix('.html'))}")
