"""What notebook.ipynb calls besides the pipeline, so that it holds no logic: set-up, choice of models, and things to look at.

Nothing here loads torch or a model in the kernel: its memory stays for the work.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import answers, environment, generation, models, persist, prompt, store
from .choice import Choice, Wanted, choose
from .config import model_name
from .console import say, visible
from .data import prepare_system1_dataset
from .easydistill import setup_easydistill
from .errors import DataError
from .metrics import final_answer, reasoning
from .models import is_here
from .own_traces import write_traces
from .students import read_losses
from .trace_tools import score_traces
from .traces import prepare_system2_dataset

HUB_SECONDS = 10
SCORED = "data/teacher_traces_scored.json"
LOOK = "padding:8px;border:1px solid #8886;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere"
COLORS = {True: "rgba(46,160,67,.35)", False: "rgba(128,128,128,.15)"}


@dataclass(frozen=True)
class Machine:
    """What there is to work with.

    gpu       {"name", "gib", "capability"}, or None
    hub       whether the model hub answers
    versions  package → version in the engine's environment
    """

    gpu: dict | None
    hub: bool
    versions: dict


def setup_lab(persist_to: str | Path = "") -> Machine:
    """Take HF_TOKEN, make the engine's environment where one is needed, fetch EasyDistill 1.x, and say what this machine is.

    persist_to  a folder on a drive that outlives this machine: what an earlier session left there comes back, and what this one makes is
                copied there in the background (`persist.persist_to`); empty: nothing is
    Where EasyDistill cannot be fetched, that is said, and the built-in engine trains in its place.
    Raises BackendError where the engine's environment cannot be made, ConfigError for a folder that cannot be copied to.
    """
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's wish for ipywidgets, which the lab's own bars do without
    say(_take_token())
    if persist_to:
        persist.mount_drive(persist_to)
        persist.persist_to(persist_to)
    found = environment.probe(environment.setup_engine())
    setup_easydistill(1)
    machine = Machine(found["gpu"], hub_answers(), found["versions"])
    gpu = "none"
    if machine.gpu:
        gpu = f"{machine.gpu['name']}, {machine.gpu['gib']} GiB, compute capability {machine.gpu['capability']}"
    say(f"GPU: {gpu}")
    say(f"model hub: {'answers' if machine.hub else 'cannot be reached'}")
    say(f"Python {found['python']}, " + ", ".join(f"{package} {version}" for package, version in machine.versions.items()))
    show_memory("at the start")
    return machine


def _take_token() -> str:
    """Put HF_TOKEN from Colab's secrets into the environment, where subprocesses find it. Returns what to say, never the token."""
    if os.environ.get("HF_TOKEN"):
        return "HF_TOKEN: from the environment"
    if "google.colab" not in sys.modules:
        return "HF_TOKEN: not set; public models and data need none"
    from google.colab import errors, userdata

    try:
        token = userdata.get("HF_TOKEN").strip()
    # the last where nobody watches the notebook; older images have no such error
    except (errors.Error, userdata.NotebookAccessError, getattr(userdata, "TimeoutException", errors.Error)) as error:
        return f"HF_TOKEN: none from Colab's secrets ({type(error).__name__}); public models and data need none"
    if token:
        os.environ["HF_TOKEN"] = token
    return "HF_TOKEN: from Colab's secrets" if token else "HF_TOKEN: empty in Colab's secrets; public models and data need none"


def hub_answers() -> bool:
    """Whether the model hub can be asked; a proxy's page in its place is no answer."""
    from urllib.request import urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_SECONDS) as response:
            return isinstance(json.load(response), list)
    except (OSError, ValueError):
        return False


def choose_models(machine: Machine, **wanted) -> Choice:
    """Decide what this run uses: the Qwen models of the form, or the micro world; says which and why.

    wanted  the form's fields (`Wanted`), e.g. use_micro_world="no", rows_system2=500
    Raises ConfigError for a GPU with neither hub nor models, naming both ways on.
    """
    asked = Wanted(**wanted)
    names = (asked.teacher_model, asked.student_system1, asked.student_system2)
    chosen = choose(machine.gpu is not None, machine.hub, asked, here=all(map(is_here, names)))
    for note in chosen.notes:
        say(note)
    if wanted.get("teacher") == "endpoint":
        setup_easydistill(2)
    return chosen


def trace_arguments(chosen: Choice) -> dict:
    """The arguments of prepare_system2_dataset. Where the students learn from a teacher of their own, it is asked for its traces first."""
    if not chosen.traces:
        return chosen.data_system2
    source = write_traces(**chosen.traces)
    if chosen.judge:
        score_traces(source, SCORED, chosen.judge)
        source = SCORED
    return {**chosen.data_system2, "source": source, "slice_str": "train"}


# What is asked at the end

HELDOUT = {
    "system1": {"out_labeled": "data/heldout_system1.json", "out_instructions": "data/heldout_system1_instructions.json"},
    "system2": {"out_cot": "data/heldout_system2.json"},
}


def prepare_heldout(chosen: Choice) -> dict | None:
    """The files of held-out questions, by mode, prepared where they have to be; None: the validation rows are asked, which is said."""
    return chosen.heldout and {mode: _heldout(mode, given) for mode, given in chosen.heldout.items()}


def _heldout(mode: str, given: str | dict) -> str | None:
    if isinstance(given, str):
        return given
    try:
        return {"system1": prepare_system1_dataset, "system2": prepare_system2_dataset}[mode](**given, **HELDOUT[mode]).path
    except DataError as error:  # the source ends before, or has nothing there that can be used
        say(f"{error}\nSo {mode} is asked the validation rows of its data, by which its checkpoint was chosen.")
        return None


# Memory


def show_memory(when: str = "now") -> None:
    """Print one line: GPU and system memory in use, in GiB."""
    parts = [f"{name} {used:.1f} of {total:.1f} GiB used" for name, (used, total) in memory_gib().items()]
    say(f"memory {when}: {'; '.join(parts) or 'unknown on this system'}")


def memory_gib() -> dict[str, tuple[float, float]]:
    """Memory used and in all, in GiB: {"GPU": (used, total), "RAM": (used, total)}, each where it can be known."""
    found = {}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
        asked = subprocess.run(query, capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip():
            used, total = (float(mib) / 1024 for mib in asked.stdout.splitlines()[0].split(","))
            found["GPU"] = (used, total)
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        found["RAM"] = ((kib["MemTotal"] - kib["MemAvailable"]) / 2**20, kib["MemTotal"] / 2**20)
    return found


# One row, as the student sees it


@dataclass(frozen=True, repr=False)
class RenderedRow:
    """One training row in tokens; a notebook shows it with its supervised tokens marked, a terminal as two texts.

    pieces  [(text of one token, whether it is supervised)]; several tokens where only together they are whole characters
    counts  {"asked": tokens, "supervised": tokens}
    """

    pieces: list[tuple[str, bool]]
    counts: dict

    def __repr__(self) -> str:
        parts = {name: "".join(text for text, supervised in self.pieces if supervised == learnt) for name, learnt in _PARTS}
        return "\n".join(f"{name}, {self.counts[name]:,} tokens:\n{visible(text)}" for name, text in parts.items())

    def _repr_html_(self) -> str:
        legend = " ".join(f'<b style="background:{COLORS[learnt]}">{name}: {self.counts[name]:,} tokens</b>' for name, learnt in _PARTS)
        tokens = "".join(_token_html(text, supervised) for text, supervised in self.pieces)
        return f'<div style="{LOOK};font-family:monospace;line-height:1.8">{legend}\n\n{tokens}</div>'


_PARTS = (("asked", False), ("supervised", True))


def _token_html(text: str, supervised: bool) -> str:
    text = escape(visible(text)).replace("\n", "⏎\n")
    return f'<bdi style="background:{COLORS[supervised]};border-right:1px solid #8884">{text}</bdi>'


def show_training_row(labeled_path: str | Path, student_model: str, mode: str, limit_tokens: int = 400) -> RenderedRow:
    """The first row of a labelled file as the student is trained on it: chat markup and all, supervised tokens marked.

    mode          "system1" or "system2"
    limit_tokens  of a longer row only so many pieces are shown, from both its ends
    Raises DataError for a file without rows.
    """
    row = next(iter(store.read_rows(labeled_path)), None)
    if row is None:
        raise DataError(f"{store.shown(labeled_path)} is empty: prepare the data first.")
    tokenizer = models.load_tokenizer(model_name(student_model))
    ids, mask = prompt.trained_ids(tokenizer, row["instruction"], row["output"], row.get("input") or "", mode)
    pieces = _pieces(tokenizer, ids, mask)
    if len(pieces) > limit_tokens:
        half = limit_tokens // 2
        pieces = [*pieces[:half], (f" […{len(pieces) - 2 * half:,} more…] ", pieces[-half][1]), *pieces[-half:]]
    return RenderedRow(pieces, {"asked": len(mask) - sum(mask), "supervised": sum(mask)})


def _pieces(tokenizer, ids: list[int], mask: list[int], longest: int = 8) -> list[tuple[str, bool]]:
    """Tokens as text, each by itself; those that hold parts of a character together, until it is whole."""
    pieces, waiting = [], []
    for place, (token, learnt) in enumerate(zip(ids, mask, strict=True)):
        waiting.append(token)
        text = tokenizer.decode(waiting, skip_special_tokens=False)
        last = place + 1 == len(ids) or mask[place + 1] != learnt
        if last or len(waiting) == longest or not text.endswith("\ufffd"):
            pieces.append((text, bool(learnt)))
            waiting = []
    return pieces


# What the training did, and what the student says


def plot_loss(checkpoint: str | Path):
    """The losses of the run that made a checkpoint, over its steps, as a matplotlib figure.

    checkpoint  folder that a distillation returned
    Raises ConfigError for another folder, DataError where the run's metrics are gone.
    """
    import matplotlib.pyplot as plt

    losses = read_losses(checkpoint)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, points), style in zip(losses.items(), ("-", "o--"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=f"{name}, last {points[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per supervised token", title=Path(checkpoint).name)
    axes.legend()
    axes.grid(alpha=0.3)
    plt.close(figure)  # a notebook shows what a cell returns; an open figure it would show twice
    return figure


@dataclass(frozen=True, repr=False)
class StudentAnswer:
    """One answer: its reasoning and what it says in the end, with its length in tokens and its seconds."""

    question: str
    reasoning: str
    final: str
    tokens: int
    seconds: float
    stopped: bool

    @property
    def facts(self) -> str:
        return f"{self.tokens:,} tokens in {self.seconds:.2f} s; {'stopped by itself' if self.stopped else 'cut off at its limit'}"

    def __repr__(self) -> str:
        thought = f"\n[reasoning]\n{visible(self.reasoning)}\n[answer]" if self.reasoning else ""
        return f"{visible(self.question)}{thought}\n{visible(self.final)}\n({self.facts})"

    def _repr_html_(self) -> str:
        question, thought, final = (escape(visible(text)) for text in (self.question, self.reasoning, self.final))
        thought = f'<summary>reasoning</summary><div dir="auto" style="opacity:.75">{thought}</div>' if thought else ""
        folded = f"<details open>{thought}</details>" if thought else ""
        answer = f'<div dir="auto" style="font-size:120%;margin:4px 0">{final}</div>'
        return f'<div style="{LOOK}"><b dir="auto">{question}</b>{folded}{answer}<small style="opacity:.7">{self.facts}</small></div>'


def ask_student(path: str | Path, question: str, mode: str = "system1", max_new_tokens: int | None = None) -> StudentAnswer:
    """Ask a student one question, in a subprocess whose memory is free again afterwards.

    path            checkpoint folder, or hub name
    mode            "system1" asks plainly, "system2" asks for reasoning first
    max_new_tokens  limit of the answer; None takes `generation.MAX_NEW_TOKENS` of the mode
    Raises ConfigError for a model that is not there, BackendError with the end of the log.
    """
    limit = generation.token_limit(max_new_tokens, mode)
    name = model_name(path)
    models.check_student(name)
    request = {
        "name": "student",
        "path": name,
        "bits": None,
        "questions": [{"instruction": question, "mode": mode}],
        "max_new_tokens": {mode: limit},
    }
    made = answers.ask([request], store.ROOT / "runs" / "ask", "Asking the student")
    (answer,) = made["student"]["answers"]
    parts = {"reasoning": reasoning(answer["text"]), "final": final_answer(answer["text"])}
    return StudentAnswer(question, **parts, **{key: answer[key] for key in ("tokens", "seconds", "stopped")})
