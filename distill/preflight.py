"""Does a run fit? Memory and disk needed against what is there, and settings that fit, each with its reason.

Pure arithmetic: shapes, settings and a machine go in, settings and reasons come out. What is yours is kept or refused, never changed.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .config import LAB_DEFAULTS, LORA_ALPHA_PER_RANK, Settings, split_of
from .errors import PreflightError
from .memory import Need, Training, disk_need, loading_need, publishing_need, training_need
from .models import capability_of
from .resume import kept_last
from .rotation import KEPT_CHECKPOINTS
from .shapes import Shape
from .trainer import attention_on, precision_on

ORIGIN = "preflight"  # of a setting that was changed
# of what it may change, what decides the weights
LEARNT = {"lora_rank", "lora_alpha", "lora_dropout", "quantize_bits", "optim", "learning_rate"}
BEGUN = "The training was begun with these settings and can go on with no others; fresh = true begins it anew, with what fits."
LORA_RANK = 16
LORA_LEARNING_RATE = 10  # times that of full fine-tuning, for a pretrained student
EIGHT_BIT = "adamw_bnb_8bit"
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers'
EXACT_ADAM = ("adamw_torch", DEFAULT_OPTIMIZER)
SHORTEST_TOKENS = 64
LIGHTER = 0.8  # of an estimate that memory has shown to be too low
# what moves off a full disk, by what lies on it; a run's own folder stays with the project
ELSEWHERE = {"out_dir": "out_dir", "HF_HOME": "the hub's cache (HF_HOME)"}


@dataclass(frozen=True)
class Disk:
    """A file system.

    free_gib  what is free on it, with what a rerun takes the place of
    places    what lies on it, of "runs", "out_dir" and "HF_HOME" (the hub's cache)
    """

    free_gib: float
    places: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What a run has.

    name          as a message calls it
    free_gib      memory that is free where models live: the GPU's, or this machine's; math.inf where it is not known
    capability    the GPU's compute capability; None is a CPU
    disks         that a run writes to; none where they are not known
    free_ram_gib  beside a GPU's memory, this machine's own; math.inf where it is not known, and on a CPU, where `free_gib` is that
    gib           all of the GPU's memory, free or not
    """

    name: str
    free_gib: float
    capability: tuple[int, int] | None = None
    disks: tuple[Disk, ...] = ()
    free_ram_gib: float = math.inf
    gib: float = math.inf

    @property
    def gpu(self) -> bool:
        return self.capability is not None

    @property
    def free(self) -> str:
        """Its free memory in words."""
        return f"{self.free_gib:.1f} GiB" if math.isfinite(self.free_gib) else "an unknown amount"


def machine_of(gpu: dict | None, free_ram_gib: float | None, disks: tuple[Disk, ...] = ()) -> Machine:
    """The machine that `environment.probe` (its "gpu"), `machine.free_ram_gib` and `machine.disks_of` tell of."""
    free_ram_gib = math.inf if free_ram_gib is None else free_ram_gib
    if gpu:
        return Machine(gpu["name"], gpu["free_gib"], capability_of(gpu), disks, free_ram_gib, gpu["gib"])
    return Machine("this CPU", free_ram_gib, None, disks)


def as_trained(values: dict, longest_tokens: int, machine: Machine) -> Training:
    """How settings are trained on a machine, as `memory` counts it.

    values          settings by their flat names
    longest_tokens  of the longest row, at most `max_length`; with packing `max_length` itself
    Raises ConfigError for a precision that the machine does not train in.
    """
    lab = {**LAB_DEFAULTS, **{key: value for key, value in values.items() if key in LAB_DEFAULTS}}
    micro_batch, accumulation = split_of(values)
    length = values["max_length"] if lab["packing"] else min(longest_tokens, values["max_length"])
    attention, _ = attention_on(machine.capability, values["max_length"] * (micro_batch if lab["packing"] else 1))
    smoothing = "label smoothing" if values.get("label_smoothing_factor") else ""
    return Training(
        micro_batch=micro_batch,
        accumulation=accumulation,
        length_tokens=length,
        lora_rank=lab["lora_rank"],
        lora_dropout=lab["lora_dropout"],
        quantize_bits=lab["quantize_bits"],
        checkpointing=values.get("gradient_checkpointing", False),
        optimizer=values.get("optim", DEFAULT_OPTIMIZER),
        precision=precision_on(machine.capability, values)[0],
        fused_attention=attention == "sdpa",
        packing=lab["packing"],
        gpu=machine.gpu,
        full_logits="EasyDistill" if values.get("backend") == "easydistill" else smoothing,
        eval_batch=values.get("per_device_eval_batch_size", 0),
        kept_last=kept_last(values),
    )


# Choosing


@dataclass(frozen=True)
class Fit:
    """Settings that fit a machine.

    settings  those to use; what was changed has the origin "preflight"
    chosen    what was decided → (value, reason)
    need      memory at the training's fullest moment
    """

    settings: Settings
    chosen: dict[str, tuple]
    need: Need


def choose(
    settings: Settings, shape: Shape, longest_tokens: int, machine: Machine, download_bytes: float = 0, begun: dict | None = None
) -> Fit:
    """The settings to train with: as asked where that fits, else the first that does of a fixed order, each with its reason.

    Smaller micro-batches with more accumulation (the effective batch stays), then gradient checkpointing, 8-bit Adam, LoRA, QLoRA.

    longest_tokens  of the longest row that is trained on
    download_bytes  of models that the hub's cache does not hold yet
    begun           what was changed when the training that is to go on was begun: it and all else that decides the weights stays; None
                    for a training that begins
    Raises PreflightError with the figures, and the nearest settings that fit, where yours leave none.
    """
    if begun is not None:
        settings = Settings(settings.values | begun, settings.origins | dict.fromkeys(begun, ORIGIN), settings.notes)
    yours = settings.yours | (LEARNT if begun is not None else set())
    asked = _need(settings.values, shape, longest_tokens, machine)
    found = _first_fit(settings.values, _attempts(settings.values, yours), shape, longest_tokens, machine)
    how = as_trained(settings.values | (found or {}), longest_tokens, machine)
    problems = [] if found is not None else [_memory_problem(settings.values, asked, shape, longest_tokens, machine)]
    problems += [BEGUN] if problems and begun is not None else []
    problems += _disk_problems(shape, how, download_bytes, machine.disks)
    problems += [_loading_problem(loading_need(shape), machine)] if machine.gpu and loading_need(shape).gib > machine.free_ram_gib else []
    if problems:
        raise PreflightError("\n".join(problems))
    values = settings.values | found
    origins = settings.origins | dict.fromkeys(found, ORIGIN)
    need = _need(values, shape, longest_tokens, machine)
    return Fit(Settings(values, origins, settings.notes), _chosen(values, origins, found, asked, need, machine), need)


def _need(values: dict, shape: Shape, longest_tokens: int, machine: Machine) -> Need:
    how = as_trained(values, longest_tokens, machine)
    step = training_need(shape, how)
    return step if machine.gpu else max(step, publishing_need(shape, how), key=lambda need: need.bytes)


def _first_fit(values: dict, attempts: Iterable[dict], shape: Shape, longest_tokens: int, machine: Machine) -> dict | None:
    """The first changes with which a training fits, {} for none; None where no changes do."""
    for changes in attempts:
        if _need(values | changes, shape, longest_tokens, machine).gib <= machine.free_gib:
            return changes
    return None


def _attempts(values: dict, yours: set) -> Iterator[dict]:
    """Changes of settings in the order in which they are tried, none of them yours."""
    for level in _levels(values, yours):
        for split in _splits(values, yours):
            yield level | split


def _levels(values: dict, yours: set) -> Iterator[dict]:
    """What each level changes besides the split of the batch. EasyDistill trains every weight, with an optimizer of torch."""
    level: dict = {}
    yield level
    if "gradient_checkpointing" not in yours and not values.get("gradient_checkpointing"):
        level = {"gradient_checkpointing": True}
        yield level
    if values.get("backend") == "easydistill":
        return
    lora = bool(values.get("lora_rank"))
    if not lora and "optim" not in yours and values.get("optim", DEFAULT_OPTIMIZER) in EXACT_ADAM:
        yield level | {"optim": EIGHT_BIT}
    if not lora and "lora_rank" not in yours:
        is_kept = "learning_rate" in yours or "learning_rate" not in values
        rate = {} if is_kept else {"learning_rate": values["learning_rate"] * LORA_LEARNING_RATE}
        level, lora = level | {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA_PER_RANK * LORA_RANK, **rate}, True
        yield level
    if lora and "quantize_bits" not in yours and not values.get("quantize_bits"):
        yield level | {"quantize_bits": 4}


def _splits(values: dict, yours: set) -> Iterator[dict]:
    """The batch as asked, then in ever smaller micro-batches with the more accumulation: the same rows an optimizer step.

    A validation's batch that is too large is cut down to the training's, and follows it.
    """
    yield {}
    (rows, passes), key = split_of(values), "per_device_eval_batch_size"
    validated = values[key] if key in values and key not in yours else 0
    if validated > rows:
        yield {key: rows}
    if yours & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        return
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:
            split = {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": passes * rows // fewer}
            yield split | ({key: min(fewer, validated)} if validated else {})


def _chosen(values: dict, origins: dict, changes: dict, asked: Need, need: Need, machine: Machine) -> dict[str, tuple]:
    """What was decided → (value, reason)."""
    why = f"as asked it would take {asked.gib:.1f} GiB, and {machine.name} has {machine.free} free"

    def reason(*names: str) -> str:
        if any(name in changes for name in names):
            return why
        origin = next((origins[name] for name in names if name in origins), "default")
        return "as the training was begun" if origin == ORIGIN else origin

    rows, passes = split_of(values)
    chosen = {
        "method": (method(values), reason("quantize_bits", "lora_rank")),
        "precision": precision_on(machine.capability, values),
        "batch": (f"{rows} × {passes}", reason("per_device_train_batch_size", "gradient_accumulation_steps")),
        "checkpointing": (values.get("gradient_checkpointing", False), reason("gradient_checkpointing")),
        "optimizer": (values.get("optim", DEFAULT_OPTIMIZER), reason("optim")),
        "memory": (f"{need.gib:.1f} GiB of {machine.free}", f"in GiB, at its fullest ({need.moment}): {need.listed()}"),
    }
    if "learning_rate" in changes:
        rate = f"LoRA learns at about {LORA_LEARNING_RATE} times the rate of full fine-tuning; {origins['lora_rank']} took LoRA"
        chosen["learning_rate"] = (values["learning_rate"], rate)
    if "per_device_eval_batch_size" in changes:
        chosen["validation"] = (f"{values['per_device_eval_batch_size']} rows at a time", why)
    if values.get("backend") == "auto" and changes.keys() & {"lora_rank", "quantize_bits", "optim"}:
        chosen["backend"] = ("builtin", "only the built-in engine does that")
    return chosen


def method(values: dict) -> str:
    """What is trained, in words."""
    rank = values.get("lora_rank")
    if not rank:
        return "full fine-tuning"
    return f"QLoRA of rank {rank}, {values['quantize_bits']}-bit" if values.get("quantize_bits") else f"LoRA of rank {rank}"


# Refusing


def _memory_problem(values: dict, asked: Need, shape: Shape, longest_tokens: int, machine: Machine) -> str:
    return (
        f"Training does not fit: it needs {asked.gib:.1f} GiB ({asked.moment}: {asked.listed()}), and {machine.name} has "
        f"{machine.free} free. {_way_out(values, shape, longest_tokens, machine)}"
    )


def lighter(values: dict, shape: Shape, capability: tuple[int, int] | None) -> str:
    """The nearest settings that take at most LIGHTER of what these do, in words: for a training that ran out of memory all the same.

    values  settings by their flat names, none of them yours
    """
    machine = Machine("", math.inf, capability)
    most = LIGHTER * _need(values, shape, values["max_length"], machine).gib
    return _way_out(values, shape, values["max_length"], replace(machine, free_gib=most))


def _way_out(values: dict, shape: Shape, longest_tokens: int, machine: Machine) -> str:
    """The nearest settings that fit, with shorter rows where nothing else does, in words."""
    nearest = _first_fit(values, _attempts(values, set()), shape, longest_tokens, machine)
    if nearest is not None:
        return f"This would fit: {_assigned(nearest)}."
    length = longest_tokens // 2
    while length >= SHORTEST_TOKENS:
        cut = values | {"max_length": length}
        changes = _first_fit(cut, _attempts(cut, set()), shape, length, machine)
        if changes is not None:
            return f"This would fit: {_assigned({'max_length': length} | changes)}; longer rows are then left out."
        length //= 2
    return "No settings fit: take a smaller student, or a machine with more memory."


def _assigned(changes: dict) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in changes.items())


def _disk_problems(shape: Shape, how: Training, download_bytes: float, disks: tuple[Disk, ...]) -> list[str]:
    """What is wrong with each disk that is too small, with advice that helps: a run's own folder stays with the project."""
    problems = []
    for disk in disks:
        need, staying = (disk_need(shape, how, download_bytes, places) for places in (disk.places, {"runs"} & {*disk.places}))
        if need.gib <= disk.free_gib:
            continue
        fewer = ", lower save_total_limit" if how.kept_last > KEPT_CHECKPOINTS else ""
        where = " and ".join(ELSEWHERE[place] for place in disk.places if place in ELSEWHERE)
        if staying.gib > disk.free_gib:
            advice = f"have the project on a larger disk: its runs/ alone takes {staying.gib:.1f} GiB"
        else:
            advice = f"put {where} elsewhere"
        problems.append(
            f"Training needs {need.gib:.1f} GiB of disk for {', '.join(disk.places)} ({need.moment}: {need.listed()}), and "
            f"{disk.free_gib:.1f} GiB are free there. Free some space{fewer}, or {advice}."
        )
    return problems


def _loading_problem(loading: Need, machine: Machine) -> str:
    return (
        f"Training needs {loading.gib:.1f} GiB of this machine's own memory beside the GPU's ({loading.moment}: {loading.listed()}), and "
        f"{machine.free_ram_gib:.1f} GiB are free. Free some, take a smaller student, or a machine with more memory."
    )
