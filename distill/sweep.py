"""A small grid of experiments: prepare → distil → score each cell of a preset, then one table and one plot.

Every step is a stage of the lab's own, so that a sweep that was cut short goes on, and a finished one trains and asks nothing. Cells that
differ in how they are asked alone share one training.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from . import store
from .console import say
from .errors import ConfigError, DataError, DistillError
from .generation import token_limit
from .intervals import wilson
from .models import RUN_RECORD
from .perturb import perturbed
from .pipeline import distill_system1, distill_system2
from .prompt import MODES, format_prompt, is_unicode, row_id
from .scores import score
from .sweep_plan import PREPARE, Cell, Sweep, cells_of, data_arguments, read_sweep, settings_of, slug

DISTILL = {"system1": distill_system1, "system2": distill_system2}


def run_sweep(preset: str, *, out: str | Path | None = None, fresh: bool = False, limit: int | None = None) -> dict:
    """Run every cell of a sweep; write its table and plot as sweep.json, .md, .html and .svg.

    preset  a name in `configs/sweeps`, or the path of a JSON file
    out     folder of the report; None: `reports/sweep/<name>`, with a limit `reports/sweep/<name>-limit-<limit>`; where the report of
            another sweep of that name stands there, a folder beside it
    fresh   do it all anew; else what is finished stays, and what was cut short goes on
    limit   held-out questions of each family that are asked, the first ones; None: all
    Returns what sweep.json holds: {"name", "key" (tells sweeps of a name apart), "system", "axes", "questions", "cells": [{"axes", "seed",
    "status": "done" | "failed", "error", "checkpoint", "run", "rows", "train_seconds", "parameters", "scores"}], "over_seeds", "failed":
    how many, "files"}. A cell that fails is recorded with its error and the others go on.
    Raises ConfigError that lists every problem of the preset, DataError for questions that cannot be asked; then nothing was written.
    """
    sweep = read_sweep(preset)
    questions = _questions(sweep, limit)
    place, work = store.resolve(out or _folder(sweep, limit)), store.ROOT / "runs" / "sweeps" / f"{sweep.name}-{sweep.key}"
    store.check_writable(place / "sweep.json")
    with store.lock(work):
        runner = _Runner(sweep, work, questions, fresh)
        cells = cells_of(sweep)
        done = []
        for number, cell in enumerate(cells, start=1):
            say(f"\ncell {number} of {len(cells)}: {cell.name}")
            done.append(runner.run(cell))
        result = _result(sweep, done, questions, f"python distill_app.py sweep {preset}" + (f" --limit {limit}" if limit else ""))
        from . import sweep_page  # its plots are no part of importing the lab

        sweep_page.show(result)
        return result | {"files": sweep_page.write(result, place)}


def _folder(sweep: Sweep, limit: int | None) -> Path:
    """Where the report goes: no report of another sweep, or of another limit, is overwritten."""
    usual = Path("reports") / "sweep" / (f"{sweep.name}-limit-{limit}" if limit else sweep.name)
    there = store.read_json(usual / "sweep.json") if store.is_file(store.resolve(usual / "sweep.json")) else {"key": sweep.key}
    if isinstance(there, dict) and there.get("key") == sweep.key:
        return usual
    own = usual.with_name(f"{usual.name}-{sweep.key}")
    say(f"note: {usual} holds the report of another sweep of this name; this one goes to {own}")
    return own


# The held-out questions


def _questions(sweep: Sweep, limit: int | None) -> list[dict]:
    """The questions of the sweep's system, or of none, input folded in; the first `limit` of each family.

    Raises DataError for a row without question or answer, and where none is left.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit!r}: give a whole number above 0, or leave it out.")
    system, seen, kept = MODES.index(sweep.system) + 1, Counter(), []
    for number, row in enumerate(store.read_rows(sweep.questions)):
        if row.get("system", system) != system:
            continue
        if missing := [field for field in ("instruction", "answer") if not isinstance(row.get(field), str) or not row[field].strip()]:
            raise DataError(f"row {number} of {store.shown(sweep.questions)} has no {' and no '.join(missing)}: it cannot be scored.")
        texts = {field: row.get(field) or "" for field in ("instruction", "input", "answer")}
        texts |= {field: str(row.get(field) or "") for field in ("id", "family")}
        if unusable := [field for field, text in texts.items() if not isinstance(text, str) or not is_unicode(text)]:
            raise DataError(f"row {number} of {store.shown(sweep.questions)}: its {' and '.join(unusable)} is no valid text.")
        family = str(row.get("family") or "all")
        seen[family] += 1
        if limit is None or seen[family] <= limit:
            text = format_prompt(row["instruction"], row.get("input") or "")
            kept.append(
                {"id": str(row.get("id") or row_id(text)), "family": family, "system": system, "instruction": text, "answer": row["answer"]}
            )
    if not kept:
        raise DataError(f"{store.shown(sweep.questions)} has no question for {sweep.system}.")
    return kept


# Running


class _Runner:
    """Runs cells, each training once."""

    def __init__(self, sweep: Sweep, work: Path, questions: list[dict], fresh: bool) -> None:
        self.sweep, self.work, self.questions, self.fresh = sweep, work, questions, fresh
        self.trained: dict[str, dict | DistillError] = {}
        self.prepared: set[Path] = set()

    def run(self, cell: Cell) -> dict:
        """A cell's facts and scores, or the error that it failed with."""
        known = {"axes": cell.axes, "seed": cell.seed}
        try:
            facts = self._train_once(cell.trained)
            return {**known, "status": "done", **facts, "scores": self._score(cell, facts["checkpoint"])}
        except DistillError as error:
            say(f"this cell failed: {error}")
            return {**known, "status": "failed", "error": f"{type(error).__name__}: {error}"}

    def _train_once(self, cell: Cell) -> dict:
        """The facts of a cell's training; one that failed fails again without a try."""
        key = slug(cell)
        if key not in self.trained:
            try:
                self.trained[key] = self._train(cell, self.work / key)
            except DistillError as error:
                self.trained[key] = error
        if isinstance(known := self.trained[key], DistillError):
            raise known
        return known

    def _train(self, cell: Cell, folder: Path) -> dict:
        arguments = data_arguments(self.sweep, cell)
        labeled = self.work / f"data-{store.hash_json(arguments)[:12]}" / "labeled.json"
        if self.sweep.system == "system1":
            places = {"out_labeled": str(labeled), "out_instructions": str(labeled.with_name("instructions.json"))}
        else:
            places = {"out_cot": str(labeled)}
        PREPARE[self.sweep.system](**arguments, **places, fresh=self.fresh and labeled not in self.prepared)
        self.prepared.add(labeled)
        settings = settings_of(self.sweep, cell, folder, labeled)
        checkpoint = DISTILL[self.sweep.system](settings | ({"fresh": True} if self.fresh else {}))
        record = store.read_json(Path(checkpoint) / RUN_RECORD)
        return {
            "checkpoint": store.shown(checkpoint),
            "run": Path(record["job"]["dataset"]["labeled_path"]).parent.name,
            **{name: record["metrics"][name] for name in ("rows", "train_seconds", "best_validation_loss", "parameters")},
        }

    def _score(self, cell: Cell, checkpoint: str) -> dict:
        """Exact match by family and over all of them, and the shares of answers that reason first and that stop by themselves."""
        with_sentence = cell.axes.get("cot_sentence", self.sweep.system == "system2")
        mode, kind = "system2" if with_sentence else "system1", cell.axes.get("prompt", "as written")
        place = self.work / "questions" / f"{kind.replace(' ', '_')}.jsonl"
        store.write_jsonl(place, [{**row, "instruction": perturbed(row["instruction"], kind, row["id"])} for row in self.questions])
        asked = [{"name": "student", "path": checkpoint, "mode": mode}]
        limit = token_limit(self.sweep.max_new_tokens, self.sweep.system)  # the same for all cells: what differs between them is the axes
        found = score(asked, place, self.work, {mode: limit}, fresh=self.fresh)["student"]
        families = found["exact_match"]
        right = sum(round(share["value"] * share["n"]) for share in families.values())
        overall = wilson(right, sum(share["n"] for share in families.values()))
        return {"exact_match": overall, "families": families, "reasoned": found["reasoned"], "stopped": found["stopped"]}


def _result(sweep: Sweep, cells: list[dict], questions: list[dict], command: str) -> dict:
    asked = {"source": store.shown(sweep.questions), "rows": len(questions), "sha256": store.hash_json(questions)}
    return {
        "schema": 1,
        "name": sweep.name,
        "key": sweep.key,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "note": sweep.note,
        "system": sweep.system,
        "preset": sweep.preset,
        "design": sweep.design,
        "axes": sweep.axes,
        "questions": asked,
        "cells": cells,
        "over_seeds": _over_seeds(cells) if len(sweep.seeds) > 1 else [],
        "failed": sum(cell["status"] == "failed" for cell in cells),
    }


def _over_seeds(cells: list[dict]) -> list[dict]:
    """For each choice of the axes, what its seeds scored: mean, lowest and highest exact match."""
    by_axes: dict = {}
    for cell in cells:
        if cell["status"] == "done":
            by_axes.setdefault(store.hash_json(cell["axes"]), []).append(cell)
    summary = []
    for same in by_axes.values():
        shares = [cell["scores"]["exact_match"]["value"] for cell in same]
        summary.append(
            {"axes": same[0]["axes"], "seeds": len(same), "mean": sum(shares) / len(shares), "lowest": min(shares), "highest": max(shares)}
        )
    return summary
