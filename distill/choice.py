"""What a notebook's run uses: the Qwen models of its form, or the micro world. Decided here, by values alone."""

from dataclasses import dataclass
from itertools import islice

from . import store
from .compare import prompt_problems
from .config import BACKENDS
from .data import DISTILQWEN
from .endpoint import PROMPTS, Endpoint
from .errors import ConfigError, did_you_mean
from .generation import MAX_NEW_TOKENS
from .microlab import MAX_NEW_TOKENS as MICRO_TOKENS
from .microlab import MICRO, SYSTEM1_FAMILIES, SYSTEM2_FAMILIES
from .selection import HIGHEST, LOWEST
from .sources import following
from .traces import OMNITHOUGHT

MICRO_WORLD_CHOICES = ("auto", "yes", "no")
TEACHERS = ("dataset", "local-8bit", "endpoint")
# A short run, to see every step within minutes; the full one takes the form's own numbers.
SHORT = {"rows_system1": 200, "rows_system2": 100, "epochs": 1}
MICRO_SLICES = {False: ("train[:6000]", "train[:3000]"), True: ("train", "train")}
# What the presets ask of the built-in engine alone: LoRA, and batches of rows of one length.
FOR_EASYDISTILL = {"lora_rank": 0, "group_by_length": False}
# for a teacher that is asked for its own traces
MICRO_QUESTIONS = {
    full: {"slice_str": rows, "rows": None, "max_new_tokens": 256} for full, rows in ((False, "train[:1500]"), (True, "train"))
}
# Through a server on a CPU a few questions a second are answered; so many show the way.
MICRO_ASKED = {"system1": 200, "system2": 60}
HELDOUT_ROWS = {False: 100, True: 200}  # questions that each system is examined with
HELDOUT_TRACES = 5  # source rows read for each of System 2's: not every one has a trace that can be used
MICRO_EVALUATION = {False: {"limit": 150, "speed_runs": 4}, True: {"limit": None, "speed_runs": 20}}
MICRO_FIELDS = "slices, rows, RV, CD, LONG_SHARE, epochs and prompts"


@dataclass(frozen=True)
class Wanted:
    """The notebook's form.

    use_micro_world  "auto" decides by GPU and hub, "yes" and "no" force it
    full_run         False caps rows and epochs at SHORT
    rv_…, cd_…       levels 0 to 9; long_share: 0 to 1, or None
    backend          which engine trains: "auto", "easydistill" or "builtin"
    teacher          whose answers the students learn from: the "dataset"'s, those of teacher_model ("local-8bit"), or an "endpoint"'s
    endpoint_url     of an OpenAI-compatible API; empty: the lab serves teacher_model itself
    endpoint_model   the model's name there; empty: teacher_model
    """

    use_micro_world: str = "auto"
    full_run: bool = False
    teacher_model: str = "Qwen/Qwen2.5-7B-Instruct"
    student_system1: str = "Qwen/Qwen2.5-0.5B-Instruct"
    student_system2: str = "Qwen/Qwen2.5-1.5B-Instruct"
    slice_system1: str = "train[:1000]"
    slice_system2: str = "train[:20000]"
    rows_system2: int = 1000
    rv_min: float = 0
    rv_max: float = 9
    cd_min: float = 0
    cd_max: float = 9
    long_share: float | None = None
    epochs_system1: int = 3
    epochs_system2: int = 3
    backend: str = "auto"
    teacher: str = "dataset"
    endpoint_url: str = ""
    endpoint_model: str = ""
    compare_prompts: tuple = ()


@dataclass(frozen=True)
class Choice:
    """What a run uses: each dict is handed on as it is, and may be changed before.

    data_system1, data_system2  arguments of prepare_system1_dataset and prepare_system2_dataset
    traces                      arguments of write_traces, whose traces take the place of the data set's; None where those are learnt
    judge                       who scores these traces first, where the form's windows need their RV and CD; None where nobody
    system1, system2            settings of distill_system1 and distill_system2
    compare                     arguments of compare_models, without the students' paths
    heldout                     mode → a file of held-out questions, or the arguments of the preparation that makes one; None: those
                                validation rows that each student's data were split off
    evaluation                  arguments of evaluate_student, without students and questions
    questions                   mode → a question to try the student with
    notes                       what a user should be told
    """

    data_system1: dict
    data_system2: dict
    traces: dict | None
    judge: Endpoint | None
    system1: dict
    system2: dict
    compare: dict
    heldout: dict | None
    evaluation: dict
    questions: dict
    notes: tuple[str, ...]


def choose(gpu: bool, hub: bool, wanted: Wanted, here: bool = False) -> Choice:
    """The models, data and settings of a run.

    gpu, hub  whether a GPU is there, and whether the model hub answers
    here      whether the form's models are here, so that no hub is needed for them
    Raises ConfigError for a value that is none of the form's, and for a GPU with neither hub nor models.
    """
    _check(wanted)
    if wanted.use_micro_world == "auto" and gpu and not (hub or here):
        raise ConfigError(
            "There is a GPU, but the model hub cannot be reached, so the Qwen models cannot be loaded. Turn the network on "
            "(or check a proxy and HF_HUB_OFFLINE) and run this cell again; or set USE_MICRO_WORLD = 'yes', which needs no hub. "
            "Where your models and data lie in folders here, set USE_MICRO_WORLD = 'no'."
        )
    micro = wanted.use_micro_world == "yes" or (wanted.use_micro_world == "auto" and not gpu)
    reason = _reason(gpu, hub, wanted.use_micro_world)
    return _micro(wanted, reason) if micro else _qwen(wanted, gpu, reason)


def _check(wanted: Wanted) -> None:
    fields = [("USE_MICRO_WORLD", wanted.use_micro_world, MICRO_WORLD_CHOICES), ("TEACHER", wanted.teacher, TEACHERS)]
    fields.append(("BACKEND", wanted.backend, BACKENDS))
    problems = [
        f"{name} = {value!r}: is not one of {', '.join(choices)}.{did_you_mean(value, choices)}"
        for name, value, choices in fields
        if value not in choices
    ]
    for name, value in (("ENDPOINT_URL", wanted.endpoint_url), ("ENDPOINT_MODEL", wanted.endpoint_model)):
        if value and wanted.teacher != "endpoint":
            problems.append(f"{name} = {value!r}: has no effect under TEACHER = {wanted.teacher!r}; set TEACHER = 'endpoint', or empty it.")
    if problems:
        raise ConfigError.from_problems("the form", problems)


def _reason(gpu: bool, hub: bool, asked: str) -> str:
    if asked != "auto":
        return f"USE_MICRO_WORLD = {asked!r}"
    if gpu:
        return "a GPU is there, and the hub answers" if hub else "a GPU is there, and so are the models"
    return "no GPU is there, and on a CPU a teacher of 7B takes hours" if hub else "no GPU is there, and the hub cannot be reached"


def _qwen(wanted: Wanted, gpu: bool, reason: str) -> Choice:
    rows = (None, wanted.rows_system2) if wanted.full_run else (SHORT["rows_system1"], min(wanted.rows_system2, SHORT["rows_system2"]))
    epochs = [number if wanted.full_run else min(number, SHORT["epochs"]) for number in (wanted.epochs_system1, wanted.epochs_system2)]
    windows = {name: getattr(wanted, name) for name in ("rv_min", "rv_max", "cd_min", "cd_max", "long_share")}
    notes = [f"Models of the form ({reason}): {wanted.teacher_model} → {wanted.student_system1}, {wanted.student_system2}"]
    if not wanted.full_run:
        notes.append(f"Short run: at most {rows[0]} and {rows[1]} rows, {SHORT['epochs']} epoch. FULL_RUN = True takes the form's numbers.")
    if wanted.backend == "easydistill":
        notes.append("EasyDistill trains every weight, in fp32: 16 bytes a parameter, about 8 GiB for 0.5B and 25 GiB for 1.5B.")
    if wanted.teacher == "endpoint" and not wanted.endpoint_url:
        notes.append(
            "The lab serves the teacher in the precision that it is stored in: in 16 bits a 7B model takes about 15 GiB of the GPU."
        )
    if not gpu:
        notes.append("Without a GPU this takes hours. USE_MICRO_WORLD = 'yes' shows every step in minutes.")
    prompts = wanted.compare_prompts or ["What is 17 + 25?"]
    if problems := prompt_problems(prompts):
        raise ConfigError.from_problems("COMPARE_PROMPTS", problems)
    return Choice(
        data_system1={"slice_str": wanted.slice_system1, "rows": rows[0], **_relabelling(wanted, wanted.teacher_model)},
        data_system2={"slice_str": wanted.slice_system2, "rows": rows[1], **windows, "student_model": wanted.student_system2},
        traces=_tracing(wanted, wanted.teacher_model, {"slice_str": wanted.slice_system2, "rows": rows[1]}),
        judge=_judge(wanted, windows),
        system1=_settings(wanted, "system1", wanted.teacher_model, wanted.student_system1) | {"num_epochs": epochs[0]},
        system2=_settings(wanted, "system2", wanted.teacher_model, wanted.student_system2) | {"num_epochs": epochs[1]},
        compare={"prompts": prompts, "teacher_path": wanted.teacher_model, "max_tokens_teacher": MAX_NEW_TOKENS["system2"]},
        heldout=_heldout(wanted),
        evaluation={"teacher": wanted.teacher_model, "limit": HELDOUT_ROWS[wanted.full_run]},
        questions=dict.fromkeys(("system1", "system2"), prompts[0] if isinstance(prompts[0], str) else prompts[0]["prompt"]),
        notes=tuple(notes),
    )


def _heldout(wanted: Wanted) -> dict | None:
    """What makes held-out questions of the source rows that follow each training's; None where one reads to its source's end."""
    rows = HELDOUT_ROWS[wanted.full_run]
    first, second = following(wanted.slice_system1, rows), following(wanted.slice_system2, HELDOUT_TRACES * rows)
    if not (first and second):
        return None
    own = {"rows": rows, "validation": 0}
    return {
        "system1": {"slice_str": first, **own},
        "system2": {"slice_str": second, "student_model": wanted.student_system2, **own},
    }


def _micro(wanted: Wanted, reason: str) -> Choice:
    """The micro world in place of every name of the form; its presets hold the rest."""
    names = {name: str(MICRO / name) for name in ("teacher", "student_system1", "student_system2")}
    sources = {name: str(MICRO / f"{name}.parquet") for name in ("distilqwen", "omnithought")}
    slices = MICRO_SLICES[wanted.full_run]
    student2, prompts = names["student_system2"], micro_prompts()
    return Choice(
        data_system1={"slice_str": slices[0], "source": sources["distilqwen"], **_relabelling(wanted, names["teacher"])},
        data_system2={"slice_str": slices[1], "source": sources["omnithought"], "rows": None, "student_model": student2, "max_length": 256},
        judge=None,
        traces=_tracing(wanted, names["teacher"], _micro_questions(wanted) | {"source": sources["omnithought"]}),
        system1=_settings(wanted, "micro_system1", names["teacher"], names["student_system1"]),
        system2=_settings(wanted, "micro_system2", names["teacher"], student2),
        compare={"prompts": prompts, "teacher_path": names["teacher"]},
        heldout=dict.fromkeys(("system1", "system2"), str(MICRO / "heldout.jsonl")),
        evaluation={"teacher": names["teacher"], "max_new_tokens": MICRO_TOKENS, **MICRO_EVALUATION[wanted.full_run]},
        questions={mode: next(one["prompt"] for one in prompts if mode in one["modes"]) for mode in ("system1", "system2")},
        notes=tuple(_micro_notes(wanted, reason, names, sources)),
    )


def _micro_questions(wanted: Wanted) -> dict:
    few = {"rows": MICRO_ASKED["system2"]} if wanted.teacher == "endpoint" and not wanted.full_run else {}
    return MICRO_QUESTIONS[wanted.full_run] | few


def _micro_notes(wanted: Wanted, reason: str, names: dict, sources: dict) -> list[str]:
    replaced = [
        (wanted.teacher_model, names["teacher"]),
        (wanted.student_system1, names["student_system1"]),
        (wanted.student_system2, names["student_system2"]),
        (DISTILQWEN, sources["distilqwen"]),
        (OMNITHOUGHT, sources["omnithought"]),
    ]
    return [
        f"The micro world is used ({reason}):",
        "models of a million weights or so that ship with the lab, on tasks made for them.",
        *[f"  {theirs}  →  {store.shown(ours)}" for theirs, ours in replaced],
        f"The form's {MICRO_FIELDS} are for the Qwen models;",
        "here the micro world's own stand in their place.",
        *_asked_note(wanted),
    ]


def _asked_note(wanted: Wanted) -> list[str]:
    if wanted.teacher != "endpoint" or wanted.full_run:
        return []
    first, traces = MICRO_ASKED.values()
    return [f"The endpoint is asked for {first} labels and {traces} traces, which show the way; FULL_RUN = True asks for all."]


def _settings(wanted: Wanted, preset: str, teacher: str, student: str) -> dict:
    settings = {"preset": preset, "teacher_model": teacher, "student_model": student, "backend": wanted.backend}
    return settings | (FOR_EASYDISTILL if wanted.backend == "easydistill" else {})


def _relabelling(wanted: Wanted, teacher: str) -> dict:
    if wanted.teacher == "dataset":
        return {}
    few = wanted.teacher == "endpoint" and teacher == str(MICRO / "teacher") and not wanted.full_run
    return {"relabel_with_teacher": MICRO_ASKED["system1"] if few else True, "teacher_model": _teacher(wanted, teacher)}


def _tracing(wanted: Wanted, teacher: str, questions: dict) -> dict | None:
    return None if wanted.teacher == "dataset" else {"teacher_model": _teacher(wanted, teacher), **questions}


def _judge(wanted: Wanted, windows: dict) -> Endpoint | None:
    """Who scores an own teacher's traces. A model on this machine cannot: only an endpoint is asked for scores."""
    free = {"rv_min": LOWEST, "rv_max": HIGHEST, "cd_min": LOWEST, "cd_max": HIGHEST, "long_share": None}
    narrowed = [name.upper() for name, value in windows.items() if value != free[name]]
    if wanted.teacher == "local-8bit" and narrowed:
        raise ConfigError(
            f"TEACHER = 'local-8bit' gives traces without RV and CD, which {', '.join(narrowed)} would need. Leave the windows open and "
            "LONG_SHARE at None, or set TEACHER = 'endpoint', which scores its traces too."
        )
    return _teacher(wanted, wanted.teacher_model) if wanted.teacher == "endpoint" and narrowed else None


def _teacher(wanted: Wanted, teacher: str) -> str | Endpoint:
    """Whom to ask: a model's name, which is loaded in 8 bits, or an endpoint."""
    if wanted.teacher != "endpoint":
        return teacher
    # the micro teacher reasons of itself, and understands no more words than it was taught
    prompt = {"prompt_file": str(PROMPTS / "plain.txt")} if teacher == str(MICRO / "teacher") and not wanted.endpoint_url else {}
    return Endpoint(wanted.endpoint_model or teacher, wanted.endpoint_url or None, **prompt)


def micro_prompts(a_system: int = 3) -> list[dict]:
    """Held-out questions, the first of each family: of System 1's asked plainly, of System 2's in both ways."""
    chosen = {}
    for row in store.read_rows(MICRO / "heldout.jsonl"):
        chosen.setdefault(row["family"], row["instruction"])
    plain = [{"prompt": chosen[family], "modes": ["system1"]} for family in islice(SYSTEM1_FAMILIES, a_system)]
    return plain + [{"prompt": chosen[family], "modes": ["system1", "system2"]} for family in islice(SYSTEM2_FAMILIES, a_system)]
