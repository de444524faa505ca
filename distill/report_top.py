"""The top of an evaluation's report: what a reader sees in ten seconds."""

from .report_blocks import Student, Table, Top
from .report_words import (
    METRICS,
    NOT_MEASURED,
    SYSTEM_TITLES,
    Cell,
    count,
    duration,
    joined,
    measured,
    memory,
    parameters,
    quality_of,
    saved,
    short_path,
    span,
    verdict,
    written,
)


def top(facts: dict) -> Top:
    """What was distilled, how good, how fast, at what cost, and which targets are met."""
    kicker = f"Distillation report · {facts['made'][:10]} · {facts['device']['name']}"
    students = [_student(facts, system) for system in facts["systems"].values()]
    return Top(kicker, facts["title"], _lede(facts), students, _verdict_line(facts["targets"]), _targets(facts))


def _lede(facts: dict) -> str:
    models = facts["models"]
    taught = [
        f"{short_path(models[system['student']]['path'])} ({SYSTEM_TITLES[mode]}, {parameters(models[system['student']]['parameters'])})"
        for mode, system in facts["systems"].items()
    ]
    teacher = f"{short_path(models['teacher']['path'])} ({parameters(models['teacher']['parameters'])} parameters)"
    return f"The teacher {teacher} taught {' and '.join(taught)}. {_asked(facts)}"


def _asked(facts: dict) -> str:
    """On how many questions, and what is known of whether training saw them."""
    systems = [system["questions"] for system in facts["systems"].values()]
    asked = " and ".join(f"{questions['rows']:,}" for questions in systems)
    removed = sum(questions["leakage"]["removed"] for questions in systems)
    seen = f"{removed:,} more that training had seen were left out" if removed else "none was found among the rows of training"
    if any(questions["note"] for questions in systems):
        seen += "; validation rows are among them, by which the checkpoint was chosen"
    if any(not questions["leakage"]["checked_against"] for questions in systems):
        seen = "whether training had seen them was not checked"
    return f"Scored on {asked} held-out questions; {seen}."


def _student(facts: dict, system: dict) -> Student:
    model = facts["models"][system["student"]]
    ratios = [ratio for ratio in (facts["speed"] or {"ratios": []})["ratios"] if ratio["student"] == system["student"]]
    ratios.sort(key=lambda ratio: ratio["speed"]["value"])  # what counts is the faster teacher
    timed = facts["speed"]["models"].get(system["student"]) if facts["speed"] else None
    figures = [
        *_goodness(facts, system),
        *_pace(ratios, timed, facts["speed_skipped"]),
        _effort(system),
        _size(facts, timed or model, ratios),
    ]
    named = f"{short_path(model['path'])} · {parameters(model['parameters'])} parameters"
    return Student(system["mode"], model["title"], named, figures, system["diagnosis"])


def _goodness(facts: dict, system: dict) -> list[tuple]:
    """What was kept of the teacher's quality, and the quality itself."""
    metric = METRICS[system["headline"]]
    of = {name: quality_of(facts, system, name)[system["headline"]] for name in ("teacher", "before", "student")}
    kept = measured(system["retained"].get(system["headline"]), "share")
    own, teacher, before = (measured(of[name], metric.kind) for name in ("student", "teacher", "before"))
    n = f"n = {of['student']['n']:,}" if of["student"] else ""
    return [
        ("Quality kept", kept.text, [*_interval(kept), f"of the teacher's {metric.name}", n]),
        (metric.name.capitalize(), own.text, [*_interval(own), f"teacher {teacher.text}", f"before training {before.text}", n]),
    ]


def _interval(cell: Cell) -> list[str]:
    return [f"95%: {cell.detail}"] if cell.detail else []


def _pace(ratios: list[dict], timed: dict | None, why_not: str | None) -> list[tuple]:
    """Speed against the teacher, and how long an answer takes."""
    if not timed:
        return [("Speed", NOT_MEASURED, [why_not or "not timed"])]
    pace = f"{written(timed['tokens_per_second']['value'], 'number')} tokens/s"
    figures = [("Speed", pace, ["one answer at a time"])]
    if ratios:
        (first, name), *others = [(measured(ratio["speed"], "times"), ratio["teacher"]) for ratio in ratios]
        also = [f"{cell.text} {teacher}" for cell, teacher in others]
        figures = [("Speed", first.text, [*_interval(first), name, *also, pace])]
    shortest = min(timed["seconds"], key=int)
    p95 = timed["seconds"][shortest]["p95"]
    shown = measured(p95, "seconds")
    return [*figures, ("Answer at p95", shown.text, [*_interval(shown), f"{shortest} tokens", f"n = {p95['n']}"])]


def _effort(system: dict) -> tuple:
    training = system["training"]
    if not training:
        return "Training", NOT_MEASURED, ["no record of its run"]
    lines = [count(training["rows"], "row"), count(training["epochs"], "epoch"), count(training["steps"], "step")]
    return "Training", duration(training["seconds"]), lines


def _size(facts: dict, model: dict, ratios: list[dict]) -> tuple:
    """What its weights take, as it was timed where it was."""
    fewer = saved(1 - model["parameters"] / facts["models"]["teacher"]["parameters"], "fewer")
    less = [f"{saved(ratio['memory_saved'])} than {ratio['teacher']}" for ratio in ratios]
    return "Weights", memory(model["weight_bytes"]), [*less, f"{fewer} parameters"]


def _targets(facts: dict) -> Table | None:
    """A row a target, a column a system; what only one of them says stands under its own verdict."""
    if not facts["targets"]:
        return None
    systems = list(dict.fromkeys(target["system"] for target in facts["targets"]))
    by_name: dict = {}
    for target in facts["targets"]:
        by_name.setdefault((target["name"], target["wanted"]), {})[target["system"]] = target
    rows = [_target_row(name, wanted, found, systems) for (name, wanted), found in by_name.items()]
    titles = [SYSTEM_TITLES.get(system, "all") for system in systems]
    return Table("What a lab of this kind should reach", ["target", *titles], rows)


def _target_row(name: str, wanted: str, found: dict, systems: list) -> list:
    notes = {target["note"] for target in found.values()}
    shared = notes.pop() if len(notes) == 1 else ""
    cells = [_target_cell(found[system], shared) if system in found else Cell("") for system in systems]
    return [Cell(f"{name}: {wanted}", shared), *cells]


def _target_cell(target: dict, shared_note: str) -> Cell:
    """The verdict over what was measured, its interval in the same unit."""
    scale = (100, 1) if target["shown"].endswith("%") else (1, 2)
    interval = span(target["ci"], *scale)
    shown = f"{target['shown']}, 95%: {interval}" if target["shown"] and interval else target["shown"]
    return Cell(verdict(target["met"]), joined(shown, "" if target["note"] == shared_note else target["note"]))


def _verdict_line(targets: list[dict]) -> str:
    """How many targets are met, in words."""
    met, missed, unknown = ([target["met"] for target in targets].count(which) for which in (True, False, None))
    parts = [f"{met} of {count(len(targets), 'target')} met"]
    parts += [f"{missed} not met"] * bool(missed) + [f"{unknown} not measured"] * bool(unknown)
    return ", ".join(parts)
