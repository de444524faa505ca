"""The plan: each stage on each GPU, with the settings that fit, GiB and minutes. Minutes are estimates, by the rates of `pace`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

from . import console, engine, store
from .config import Settings, is_hub_name, resolve
from .console import visible
from .errors import ConfigError, PreflightError, did_you_mean
from .machine import ANSWER_TOKENS, QUESTION_TOKENS, disks_of, download_bytes, this_machine
from .memory import Asking
from .pace import GPUS, Rate, asking_minutes, cpu_rate, gpu_rate, known_gpu, training_minutes
from .preflight import Machine, as_trained, choose
from .shapes import Shape, find_shape
from .teacher import choose_teacher

COLUMNS = ("machine", "stage", "settings", "GiB", "of", "minutes (estimate)")
USUAL_ROWS = (1000, 1000)  # of System 1 and 2, as the notebook's form has them (choice.Wanted)
COMPARED = 4  # answers of a teacher in a comparison: two prompts, asked in both ways
COMPARED_TOKENS = 1024
CHARACTERS_PER_TOKEN = 4  # English text: assumed


@dataclass(frozen=True, repr=False)
class Plan:
    """What would be done where. It shows itself in a terminal and in Jupyter.

    rows   [{"machine", "stage", "settings", "gib", "free_gib", "minutes"}]; settings say why where a stage does not fit, and gib is None
    notes  what was assumed
    """

    rows: list[dict]
    notes: list[str]

    def to_dict(self) -> dict:
        """Everything as plain values that JSON can hold."""
        return asdict(self)

    def __repr__(self) -> str:
        with console.console.capture() as shown:
            console.table("Plan", list(COLUMNS), [_cells(row) for row in self.rows], justify="left")
            for note in self.notes:
                console.say(note)
        return shown.get().rstrip()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{escape(visible(cell))}</td>" for cell in _cells(row)) + "</tr>" for row in self.rows)
        notes = "".join(f"<li>{escape(visible(note))}</li>" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{notes}</ul>"


def _cells(row: dict) -> list[str]:
    figures = [(row["gib"], ",.1f"), (row["free_gib"], ",.1f"), (row["minutes"], ",.0f")]
    return [row["machine"], row["stage"], row["settings"], *["–" if value is None else format(value, form) for value, form in figures]]


@dataclass(frozen=True)
class Work:
    """What a system's training has to do: its settings, the student's shape, and its rows.

    rows, mean_tokens  how many, and how long on average
    """

    stage: str
    settings: Settings
    shape: Shape
    rows: int
    mean_tokens: float


def plan(config1: Mapping | None = None, config2: Mapping | None = None, gpu: str | None = None) -> Plan:
    """Each stage's settings, memory and minutes on the usual GPUs and on this machine. Nothing is loaded, made or changed.

    config1, config2  settings over the presets `system1` and `system2`, as `distill_system1` and `distill_system2` take them
    gpu               one of GPUS alone, e.g. "T4"
    Raises ConfigError for settings that cannot work, or a GPU that is not known.
    """
    if gpu is not None and gpu not in GPUS:
        raise ConfigError(f"gpu = {gpu!r}: is not one of {', '.join(GPUS)}.{did_you_mean(gpu, GPUS)}")
    notes: list[str] = []
    works = [
        _work("train System 1", resolve(config1, preset="system1"), USUAL_ROWS[0], notes),
        _work("train System 2", resolve(config2, preset="system2"), USUAL_ROWS[1], notes),
    ]
    name = works[0].settings.values.get("teacher_model")
    teacher = name and _shape(name, notes)
    machines = [Machine(each.name, each.free_gib, each.capability, gib=each.free_gib) for each in GPUS.values() if gpu in (None, each.name)]
    machines += [] if gpu else [this_machine()]
    notes.append(f"A teacher is asked questions of at most {QUESTION_TOKENS} tokens and answers in {ANSWER_TOKENS}: assumed.")
    rows = []
    for machine in machines:
        rate = rate_of(machine)
        notes.append(f"{machine.name}: {f'{rate.words}, assumed' if rate else 'its speed is not known, so no minutes are told'}.")
        rows += _rows(machine, rate, teacher, works)
    return Plan(rows, notes)


def rate_of(machine: Machine) -> Rate | None:
    """What is assumed of a machine's speed; None for a GPU that is none of GPUS."""
    if not machine.gpu:
        return cpu_rate(engine.usable_cores())
    known = known_gpu(machine.name, machine.gib)
    return known and gpu_rate(known)


def _shape(name: str, notes: list[str]) -> Shape:
    shape, source = find_shape(name)
    note = f"{name if is_hub_name(name) else store.shown(name)}: {shape.parameters:,} weights ({source})."
    notes += [note] if note not in notes else []
    return shape


def _work(stage: str, settings: Settings, usual_rows: int, notes: list[str]) -> Work:
    values = settings.values
    place, longest = Path(values["labeled_path"]), values["max_length"]
    if store.is_file(place):
        characters = [sum(len(str(row.get(name) or "")) for name in ("instruction", "output")) for row in store.read_rows(place)]
        mean = min(longest, sum(characters) / max(1, len(characters)) / CHARACTERS_PER_TOKEN)
        rows, source = len(characters), f"{store.shown(place)}, {CHARACTERS_PER_TOKEN} characters a token assumed"
    else:
        rows, mean, source = usual_rows, longest / 2, "no data are prepared: half of max_length assumed"
    notes.append(f"{stage}: {rows:,} rows of {mean:,.0f} tokens on average ({source}); memory is for rows of {longest:,}.")
    return Work(stage, settings, _shape(values["student_model"], notes), rows, mean)


def _rows(machine: Machine, rate: Rate | None, teacher: Shape | None, works: list[Work]) -> list[dict]:
    """The table's rows for one machine."""
    found = []
    if teacher:
        found.append(_asking_row("label", machine, rate, teacher, works[0].rows, ANSWER_TOKENS))
    found += [_training_row(machine, rate, work) for work in works]
    if teacher:
        found.append(_asking_row("compare", machine, rate, teacher, COMPARED, COMPARED_TOKENS))
    return found


def _training_row(machine: Machine, rate: Rate | None, work: Work) -> dict:
    given, student = work.settings.values, work.settings.values["student_model"]
    if machine.disks:  # this machine, of whose disks it writes to its own
        machine = replace(machine, disks=disks_of(Path(given["out_dir"])))
    try:
        fit = choose(work.settings, work.shape, given["max_length"], machine, download_bytes(student, work.shape))
    except (PreflightError, ConfigError) as error:  # too large for it, or a precision that it has not
        return _row(machine, work.stage, str(error))
    values, chosen = fit.settings.values, fit.chosen
    how = as_trained(values, values["max_length"], machine)
    checkpointing = ["checkpointing"] if chosen["checkpointing"][0] else []
    words = [chosen["method"][0], chosen["precision"][0], chosen["batch"][0], *checkpointing, chosen["optimizer"][0]]
    steps = values.get("max_steps", -1)
    rows = steps * how.micro_batch * how.accumulation if steps > 0 else work.rows * values["num_train_epochs"]
    minutes = rate and training_minutes(work.shape, how, rows, work.mean_tokens, rate)
    return _row(machine, work.stage, ", ".join(words), fit.need.gib, minutes)


def _asking_row(stage: str, machine: Machine, rate: Rate | None, teacher: Shape, questions: int, answer_tokens: int) -> dict:
    try:
        fit = choose_teacher(teacher, QUESTION_TOKENS, answer_tokens, machine)
    except PreflightError as error:
        return _row(machine, stage, str(error))
    at_once = max(1, min(questions, fit.batch_tokens[0] // (QUESTION_TOKENS + answer_tokens)))
    how = Asking(fit.bits[0], fit.batch_tokens[0], at_once, machine.gpu)
    minutes = rate and asking_minutes(teacher, how, questions, answer_tokens, rate)
    return _row(machine, stage, f"teacher in {fit.bits[0]} bits, {at_once} questions at once", fit.need.gib, minutes)


def _row(machine: Machine, stage: str, settings: str, gib: float | None = None, minutes: float | None = None) -> dict:
    figures = {"gib": gib, "free_gib": machine.free_gib if math.isfinite(machine.free_gib) else None, "minutes": minutes}
    return {"machine": machine.name, "stage": stage, "settings": settings, **figures}
