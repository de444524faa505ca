"""Does a run fit? Memory and disk needed against what is there, and settings that fit, each with its reason.

Pure arithmetic: shapes, settings and a machine go in, settings and reasons come out. What is yours is kept or refused, never changed.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .config import LAB_DEFAULTS, LORA_ALPHA_PER_RANK, Settings, split_of
from .errors import PreflightError
from .generation import BATCH_TOKENS
from .memory import Asking, Need, Training, asking_need, disk_need, loading_need, publishing_need, training_need
from .models import capability_of
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
TEACHER_BITS = (8, 4)
SHORTEST_TOKENS = 64
LIGHTER = 0.8  # of an estimate that memory has shown to be too low


@dataclass(frozen=True)
class Machine:
    """What a run has.

    name           as a message calls it
    free_gib       memory that is free where models live: the GPU's, or this machine's; math.inf where it is not known
    capability     the GPU's compute capability; None is a CPU
    free_disk_gib  of the project's disk; math.inf where it is not known
    free_ram_gib   beside a GPU's memory, this machine's own; math.inf where it is not known, and on a CPU, where `free_gib` is that
    """

    name: str
    free_gib: float
    capability: tuple[int, int] | None = None
    free_disk_gib: float = math.inf
    free_ram_gib: float = math.inf

    @property
    def gpu(self) -> bool:
        return self.capability is not None

    @property
    def free(self) -> str:
        """Its free memory in words."""
        return f"{self.free_gib:.1f} GiB" if math.isfinite(self.free_gib) else "an unknown amount"


def machine_of(gpu: dict | None, free_ram_gib: float | None, free_disk_gib: float) -> Machine:
    """The machine that `environment.probe` (its "gpu"), `machine.free_ram_gib` and the disk tell of."""
    free_ram_gib = math.inf if free_ram_gib is None else free_ram_gib
    if gpu:
        return Machine(gpu["name"], gpu["free_gib"], capability_of(gpu), free_disk_gib, free_ram_gib)
    return Machine("this CPU", free_ram_gib, None, free_disk_gib)


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
        full_logits=values.get("backend") == "easydistill",
    )


# Choosing


@dataclass(frozen=True)
class Fit:
    """Settings that fit a machine.

    settings  those to use; what was changed has the origin "preflight"
    chosen    what was decided → (value, reason)
    need      memory at the training's fullest moment
    disk      disk at its fullest
    """

    settings: Settings
    chosen: dict[str, tuple]
    need: Need
    disk: Need


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
    disk = disk_need(shape, as_trained(settings.values | (found or {}), longest_tokens, machine), download_bytes)
    problems = [] if found is not None else [_memory_problem(settings.values, asked, shape, longest_tokens, machine)]
    problems += [BEGUN] if problems and begun is not None else []
    problems += [_disk_problem(disk, machine)] if disk.gib > machine.free_disk_gib else []
    problems += [_loading_problem(loading_need(shape), machine)] if machine.gpu and loading_need(shape).gib > machine.free_ram_gib else []
    if problems:
        raise PreflightError("\n".join(problems))
    values = settings.values | found
    origins = settings.origins | dict.fromkeys(found, ORIGIN)
    need = _need(values, shape, longest_tokens, machine)
    return Fit(Settings(values, origins, settings.notes), _chosen(values, origins, found, asked, need, machine), need, disk)


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
    """The batch as asked, then in ever smaller micro-batches with the more accumulation: the same rows an optimizer step."""
    yield {}
    if yours & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        return
    rows, passes = split_of(values)
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:
            yield {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": passes * rows // fewer}


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
        "memory": (f"{need.gib:.1f} GiB of {machine.free}", f"{need.moment}, in GiB: {need.listed()}"),
    }
    if "learning_rate" in changes:
        rate = f"LoRA learns at about {LORA_LEARNING_RATE} times the rate of full fine-tuning; {origins['lora_rank']} took LoRA"
        chosen["learning_rate"] = (values["learning_rate"], rate)
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


def _disk_problem(disk: Need, machine: Machine) -> str:
    return (
        f"Training needs {disk.gib:.1f} GiB of disk ({disk.moment}: {disk.listed()}), and {machine.free_disk_gib:.1f} GiB are free. "
        "Free some space, or put out_dir and the hub's cache (HF_HOME) elsewhere."
    )


def _loading_problem(loading: Need, machine: Machine) -> str:
    return (
        f"Training needs {loading.gib:.1f} GiB of this machine's own memory beside the GPU's ({loading.moment}: {loading.listed()}), and "
        f"{machine.free_ram_gib:.1f} GiB are free. Free some, take a smaller student, or a machine with more memory."
    )


# A teacher


@dataclass(frozen=True)
class TeacherFit:
    """How a teacher is held and asked: (value, reason) of both, and the memory that it takes."""

    bits: tuple[int, str]
    batch_tokens: tuple[int, str]
    need: Need


def choose_teacher(shape: Shape, question_tokens: int, max_new_tokens: int, machine: Machine, bits: int | None = None) -> TeacherFit:
    """A teacher's bits and batches: 8 bits where they fit, else 4; batches as large as memory allows, at most BATCH_TOKENS.

    question_tokens  of the longest question, `max_new_tokens` of an answer
    bits             those that you ask for, 4, 8, 16 or 32; None leaves the choice
    Raises PreflightError with the figures where not even one question at a time fits.
    """
    one = question_tokens + max_new_tokens
    for wanted in (bits,) if bits else TEACHER_BITS:
        for tokens in _batches(one):
            need = asking_need(shape, Asking(wanted, tokens, tokens // one, machine.gpu))
            if need.gib <= machine.free_gib:
                return TeacherFit((wanted, _bits_reason(wanted, bits)), (tokens, f"{tokens // one} questions at once"), need)
    fewest = bits or TEACHER_BITS[-1]
    fewer = " or ".join(str(each) for each in reversed(TEACHER_BITS) if each < fewest)
    least = asking_need(shape, Asking(fewest, one, 1, machine.gpu))
    raise PreflightError(
        f"The teacher does not fit: in {fewest} bits it needs {least.gib:.1f} GiB ({least.listed()}), and {machine.name} has "
        f"{machine.free} free. {f'Ask for {fewer} bits' if fewer else 'Take a smaller teacher'}, "
        "or a teacher behind an API."
    )


def _batches(one: int) -> Iterator[int]:
    """Tokens of a batch, halved from BATCH_TOKENS down to one question's."""
    tokens = max(BATCH_TOKENS, one)
    yield tokens
    while tokens > one:
        tokens = max(one, tokens // 2)
        yield tokens


def _bits_reason(taken: int, asked: int | None) -> str:
    if asked:
        return "asked for"
    return "fits" if taken == TEACHER_BITS[0] else f"{TEACHER_BITS[0]} bits do not fit"
