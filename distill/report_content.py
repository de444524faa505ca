"""What an evaluation's report says below its top, section by section: every page shows these blocks and decides nothing itself.

Texts stand here as they came: whoever shows a block makes it harmless.
"""

from collections.abc import Iterator

from .metrics import final_answer, reasoning
from .quality import FIRSTSIGHT
from .report_blocks import Answer, Case, Cases, Code, Folded, Heading, Note, Plots, Prose, Section, Table, Terms
from .report_plots import drawn
from .report_words import (
    METRICS,
    NOT_MEASURED,
    OTHER_TERMS,
    SYSTEM_TITLES,
    Cell,
    chance,
    count,
    difference,
    duration,
    joined,
    measured,
    memory,
    parameters,
    quality_of,
    saved,
    written,
)

FOR_SCALE = (
    f"For scale: FirstSight's Qwen2-VL 8.3B → 2.2B came to {FIRSTSIGHT['speed']} × the speed, {FIRSTSIGHT['memory_saved']:.1%} less memory "
    f"and {FIRSTSIGHT['parameters_saved']:.1%} fewer parameters."
)
PREFERENCE_FACTS = ("judge", "equal", "malformed", "unanswered")
PARTS = {"judge": "Pairs judged by a model", "ratings": "Pairs rated blind by a person"}
PREFERENCE_NAMES = {
    "student": "the student's is better",
    "teacher": "the teacher's is better",
    "tie": "tie",
    "preferred": "the student's, of those that are no tie",
    "inconsistent": "the two orders differ",
    "position_bias": "the first shown, of replies that name one (50% is no bias)",
}


def sections(facts: dict) -> list[Section]:
    """Everything below the top, in order; a section without blocks is left out."""
    every = [
        Section("quality", "Quality", [*_each(facts, _quality_blocks), Note(_quality_note(facts))]),
        Section("speed", "Speed and size", list(_speed_blocks(facts))),
        Section("plots", "Plots", [Plots(found)] if (found := drawn(facts)) else []),
        Section("answers", "Answers side by side", _each(facts, _case_blocks)),
        Section("questions", "Held-out questions", _each(facts, _question_blocks)),
        Section("training", "Training", _each(facts, _training_blocks)),
        Section("benchmarks", "Public benchmarks", list(_benchmark_blocks(facts))),
        Section("preferences", "Preferences", list(_preference_blocks(facts))),
        Section("extras", "Further tables", list(_extra_blocks(facts))),
        Section("method", "How it was measured", list(_method_blocks(facts))),
    ]
    return [section for section in every if section.blocks]


def _each(facts: dict, blocks_of) -> list:
    """The blocks of every system, under its name."""
    found = []
    for mode, system in facts["systems"].items():
        blocks = list(blocks_of(facts, system))
        found += [Heading(SYSTEM_TITLES[mode]), *blocks] if blocks else []
    return found


def _quality_blocks(facts: dict, system: dict) -> Iterator:
    who = {name: quality_of(facts, system, name) for name in ("teacher", "before", "student")}
    title = SYSTEM_TITLES[system["mode"]]
    rows = [row for key in METRICS if (row := _quality_row(key, who, system))]
    columns = ["measure", "n", "teacher", "before training", "student", "kept", "student − teacher"]
    yield Prose(f"Judged by {METRICS[system['headline']].name}: {system['headline_reason']}.")
    yield Table(f"Quality of {title}", columns, rows)
    yield Note(_read_note(facts, system))
    if gained := system["against_before"].get("exact_match"):
        yield Prose(_against_before(gained))
    if families := who["student"]["families"]:
        rows = [[family, f"{families[family]['n']:,}", *[_family(who[name], family) for name in who]] for family in families]
        yield Table(f"Exact match of {title} by family", ["family", "n", "teacher", "before training", "student"], rows)


def _read_note(facts: dict, system: dict) -> str:
    """Over what perplexity and agreement were read, and whose cannot be compared."""
    others = [model["title"] for name in ("before", "student") if not (model := facts["models"][system[name]])["same_tokens"]]
    apart = f" {' and '.join(others)}: cuts text into other tokens than the teacher, so neither can be compared." if others else ""
    return f"Perplexity and next tokens: read over {system['references_read']}.{apart}"


def _quality_note(facts: dict) -> str:
    """Under what conditions the numbers on quality were measured."""
    held = ", ".join(f"{model['title']} in {model['bits']} bits" for model in facts["models"].values())
    return f"Greedy answers on {facts['device']['name']}: {held}. Small figures are 95% intervals; {NOT_MEASURED}: not measured."


def _quality_row(key: str, who: dict, system: dict) -> list | None:
    """A measure of all three models; None where nobody has it."""
    metric, values = METRICS[key], [who[name][key] for name in who]
    if key == "calibration":
        values = [value and {**value, "value": value["ece"]} for value in values]
    if not any(values):
        return None
    counts = dict.fromkeys(f"{value['n']:,}" for value in values if value)
    kept = measured(system["retained"][key], "share") if key in system["retained"] else ""
    against = system["against_teacher"].get(key)
    cells = [measured(value, metric.kind) for value in values]
    return [metric.name, " / ".join(counts), *cells, kept, difference(against, metric.kind) if against else ""]


def _family(quality: dict, family: str) -> Cell:
    return measured(quality["families"].get(family), "share", drawn=True)


def _against_before(gained: dict) -> str:
    change = difference(gained, "share")
    text = f"Against the student before training: {change.text} points of exact match ({change.detail}, n = {gained['n']:,})"
    if pairs := gained.get("mcnemar"):
        text += f"; {pairs['gained']:,} questions gained, {pairs['lost']:,} lost (McNemar {chance(pairs['p'])})"
    return f"{text}."


# Speed and size


def _speed_blocks(facts: dict) -> Iterator:
    models = facts["models"].values()
    rows = [[Cell(model["title"], model["path"]), *_held(model)] for model in models]
    yield Table("Models", ["model", "parameters", "weights in memory", "bits", "on disk"], rows)
    if not facts["speed"]:
        yield Prose(f"Speed was not measured: {facts['speed_skipped']}.")
        return
    speed = facts["speed"]
    yield Table(
        "Speed, one answer at a time unless said otherwise",
        ["measure", *[_title(facts, name) for name in speed["models"]]],
        list(_speed_rows(speed)),
    )
    condition = (
        f"on {facts['device']['name']}, {count(facts['device']['threads'], 'thread')}, models in turn ({count(speed['rounds'], 'round')})"
    )
    yield Note(f"{speed['runs']} runs a model after {speed['warm_up']} to warm up, {condition}; greedy, every answer at its full length.")
    if facts["speed_skipped"]:
        yield Note(f"Not timed: {facts['speed_skipped']}.")
    rows = [[Cell(_title(facts, ratio["student"]), f"against {ratio['teacher']}"), *_ratio_cells(ratio)] for ratio in speed["ratios"]]
    if rows:
        yield Table("Student against teacher", ["student", "tokens/s", "memory", "parameters"], rows)
        yield Note(FOR_SCALE)


def _held(model: dict) -> list[str]:
    return [parameters(model["parameters"]), memory(model["weight_bytes"]), str(model["bits"]), memory(model["disk_bytes"])]


def _ratio_cells(ratio: dict) -> list:
    return [measured(ratio["speed"], "times"), saved(ratio["memory_saved"]), saved(ratio["parameters_saved"], "fewer")]


def _speed_rows(speed: dict) -> Iterator[list]:
    """A row a measure, a column a model."""
    timed = speed["models"].values()
    for share in ("p50", "p95"):
        yield [f"first token, {share}", *[measured(model["first_token_seconds"][share], "seconds") for model in timed]]
    for length in map(str, speed["lengths"]):
        for share in ("p50", "p95"):
            yield [f"{length} tokens, {share}", *[measured(model["seconds"].get(length, {}).get(share), "seconds") for model in timed]]
    yield ["tokens/s", *[measured(model["tokens_per_second"], "number") for model in timed]]
    batch = f"in batches of {speed['batch_size']}"
    yield [f"tokens/s, {batch}", *[measured(model["batched"]["tokens_per_second"], "number") for model in timed]]
    yield [f"answers/s, {batch}", *[measured(model["batched"]["answers_per_second"], "number") for model in timed]]
    yield ["weights in memory", *[memory(model["weight_bytes"]) for model in timed]]
    if any(model["peak_bytes"] for model in timed):
        yield ["peak of GPU memory", *[memory(model["peak_bytes"]) for model in timed]]
    yield ["seconds to load", *[written(model["load_seconds"], "seconds") for model in timed]]
    yield ["runs", *[f"{model['tokens_per_second']['n']:,}" for model in timed]]


# Answers


def _case_blocks(facts: dict, system: dict) -> Iterator:
    cases = system["cases"]
    if not cases:
        return
    right = [tuple(case["answers"][system[who]]["right"] for who in ("teacher", "student")) for case in cases]
    right = [both for both in right if None not in both]
    counts = {both: right.count(both) for both in ((True, True), (True, False), (False, True), (False, False))}
    if right:
        yield Prose(
            f"Of {count(len(right), 'question')} teacher and student are both right on {counts[True, True]:,}, the teacher alone on "
            f"{counts[True, False]:,}, the student alone on {counts[False, True]:,}, neither on {counts[False, False]:,}."
        )
    yield Cases(SYSTEM_TITLES[system["mode"]], [_case(facts, system, case) for case in cases])


def _case(facts: dict, system: dict, case: dict) -> Case:
    family = f" · {case['family']}" if case["family"] else ""
    question = "\n\n".join(filter(None, [case["instruction"], case.get("input")]))
    names = [system[who] for who in ("teacher", "before", "student")]
    answers = [_answer(facts["models"][name]["title"], case["answers"][name]) for name in names if name in case["answers"]]
    return Case(f"{case['id']}{family}", question, case["reference"], answers)


def _answer(title: str, answer: dict) -> Answer:
    end = "stopped by itself" if answer["stopped"] else "cut off at its limit"
    return Answer(
        title, answer["right"], f"{count(answer['tokens'], 'token')}, {end}", reasoning(answer["text"]), final_answer(answer["text"])
    )


# Questions and training


def _question_blocks(facts: dict, system: dict) -> Iterator:
    questions, leakage = system["questions"], system["questions"]["leakage"]
    found = f"{leakage['removed']:,} ({leakage['same']:,} the same, {leakage['n_grams']:,} by n-grams)"
    against = leakage["checked_against"]
    checked = f"not checked: {leakage['why_unchecked']}" if against is None else f"{count(against, 'row')} of its data"
    rows = [
        ("source", questions["source"]),
        ("SHA-256", questions["sha256"]),
        ("asked", f"{questions['rows']:,} of {questions['read']:,} read"),
        ("looked for among", checked),
        ("removed as known to training", found if against is not None else NOT_MEASURED),
        ("selection", questions["note"]),
    ]
    yield Terms([(term, text) for term, text in rows if text])
    if examples := leakage["examples"]:
        removed = [[example["instruction"], example["training"], example["how"]] for example in examples]
        table = Table("Questions that training saw, removed", ["question", "training row", "how it was found"], removed, numbers=False)
        yield Folded(f"Removed questions, {count(len(examples), 'example')}", [table])


def _training_blocks(facts: dict, system: dict) -> Iterator:
    training = system["training"]
    if not training:
        return
    rows = [
        ("rows", f"{training['rows']:,}, and {training['validation_rows']:,} for validation"),
        ("length", f"{count(training['epochs'], 'epoch')}, {count(training['steps'], 'step')}, {duration(training['seconds'])}"),
        ("engine", training["backend"]),
        ("labels by", training["labels_by"]),
        *[(f"loss, {part}", _loss_words(lost)) for part, lost in training["loss_reduction"].items() if lost],
    ]
    yield Terms([(term, str(text)) for term, text in rows])
    source = [(name, str(value)) for name, value in (training["source"] or {}).items() if value is not None]
    settings = [[name, str(known["value"]), known["origin"]] for name, known in training["settings"].items()]
    title = SYSTEM_TITLES[system["mode"]]
    if source:
        yield Folded("Where the rows came from", [Terms(source)])
    table = Table(f"Settings of {title}", ["setting", "value", "origin"], settings, numbers=False)
    yield Folded(f"{count(len(settings), 'setting')}, each with its origin", [table])


def _loss_words(lost: dict) -> str:
    return f"{lost['first']:.3f} → {lost['last']:.3f} nats a token ({saved(lost['share'])})"


# Benchmarks, preferences, extras, method


def _benchmark_blocks(facts: dict) -> Iterator:
    """A row a task and metric, a column a model."""
    found: dict = {}
    for name, tasks in facts["benchmarks"].items():
        for task in tasks.keys() - {"versions", "command"}:
            for metric, score in tasks[task].items():
                found.setdefault((task, metric), {})[name] = _benchmark_cell(score)
    names = list(facts["benchmarks"])
    rows = [
        [Cell(task, metric), *[cells.get(name, Cell(NOT_MEASURED)) for name in names]] for (task, metric), cells in sorted(found.items())
    ]
    if rows:
        yield Table("lm-evaluation-harness", ["task", *[_title(facts, name) for name in names]], rows)
        yield Note("Small figures: the standard error that the harness gives, and the number of questions.")


def _benchmark_cell(score: dict) -> Cell:
    if score["value"] is None:
        return Cell(NOT_MEASURED)
    error = "" if score.get("stderr") is None else f"± {score['stderr']:.3f}"
    return Cell(f"{score['value']:.3f}", joined(error, f"n = {score['n']:,}" if score.get("n") else ""))


def _title(facts: dict, name: str) -> str:
    """A model's or timing's name as one reads it."""
    return facts["models"].get(name, {}).get("title", name)


def _preference_blocks(facts: dict) -> Iterator:
    by_mode = [(PARTS[part], mode, found) for part in PARTS for mode, found in facts[part].items()]
    for title, mode, found in by_mode:
        shares = {key: value for key, value in found.items() if isinstance(value, dict) and {"value", "n"} <= set(value)}
        rows = [
            [PREFERENCE_NAMES.get(key, key.replace("_", " ")), f"{value['n']:,}", measured(value, "share")] for key, value in shares.items()
        ]
        yield Table(f"{title}: {SYSTEM_TITLES[mode]}", ["verdict", "of", "share"], rows)
        named = [
            (key.replace("_", " "), str(value)) for key, value in found.items() if key in ("judge", "equal", "malformed", "unanswered")
        ]
        if agreed := found.get("agreement"):
            chance = "none: one verdict for all" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
            named += [("agreement with", agreed["judge"]), ("Cohen's kappa", chance)]
        yield Terms(named)


def _extra_blocks(facts: dict) -> Iterator:
    for extra in facts["extras"]:
        yield Table(extra["title"], extra["columns"], extra["rows"])
        if extra["note"]:
            yield Note(extra["note"])


def _method_blocks(facts: dict) -> Iterator:
    yield Prose(f"Resampling has seed {facts['seed']}. A share is of its n.")
    yield Heading("The measures in plain words")
    yield Terms([*[(metric.name, metric.meaning) for metric in METRICS.values()], *OTHER_TERMS.items()])
    yield Heading("Do it again")
    yield Code(facts["command"])
    versions = [("device", facts["device"]["name"]), ("made", facts["made"]), *facts["versions"].items()]
    yield Folded("Versions", [Terms(versions)])
