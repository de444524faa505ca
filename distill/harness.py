"""Public benchmarks by lm-evaluation-harness (Gao et al. 2024, doi:10.5281/zenodo.12608602), each in a subprocess, on any checkpoint."""

import glob
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from . import engine, machine, models, process, stages, store
from .config import model_name
from .console import progress
from .environment import CONSTRAINTS, engine_python
from .errors import ConfigError, DataError, DistillError, shortened
from .prompt import MODES, REASONING_TAGS, format_prompt

# What the lab calls a benchmark → the harness's task. All take their questions from the hub.
PUBLIC = {
    "gsm8k": "gsm8k",  # openai/gsm8k, with five examples
    "math500": "minerva_math500",  # HuggingFaceH4/MATH-500, with four examples; needs antlr4-python3-runtime 4.11
    "ifeval": "ifeval",  # google/IFEval; needs langdetect, immutabledict, and nltk's punkt_tab, which it downloads
    "gpqa": "gpqa_diamond_cot_zeroshot",  # Idavidrein/gpqa, which is gated: its terms must be accepted
}
TEMPLATE = Path(__file__).resolve().parent.parent / "configs" / "lm_eval" / "heldout.yaml"
BATCH_ROWS = 8
REASONING_TOKENS = 2048  # at most, and no more than half of a model's positions; by itself the harness stops at 256
SEED = 0
_HUB_IS_SILENT = re.compile(
    r"^.*(?:Couldn't reach|LocalEntryNotFoundError|OfflineModeIsEnabled|ConnectError|ConnectionError).*$", re.MULTILINE
)
_HUB_IS_CLOSED = re.compile(r"^.*(?:gated dataset|GatedRepoError).*$", re.MULTILINE)
_BAR = re.compile(r"^Running .*?(\d+)/(\d+) \[")


def run_benchmarks(
    path: str | Path,
    tasks: list[str],
    *,
    limit: int | None = None,
    mode: str | None = None,
    include_path: str | Path | None = None,
    batch_size: int = BATCH_ROWS,
    out: str | Path = "runs/harness",
    fresh: bool = False,
) -> dict:
    """Measure a checkpoint on benchmarks, one after the other; what was measured before is read back, and that is said.

    path          a folder, or a name on the hub
    tasks         names of `PUBLIC`, or the harness's own, or of tasks in `include_path`
    limit         questions of a task, its first ones; None takes all
    mode          "system1" or "system2": whether the chat template opens a thought; None leaves that to the template. In system2
                  answers may be longer. What follows the reasoning is scored. Public tasks keep their own words: no CoT sentence is added
    include_path  folder with tasks of your own; a task there may run Python code, so take one that you trust
    batch_size    questions answered at once
    out           where results and logs go, a folder for each task
    fresh         measure anew
    Returns {"tasks": {task: {metric: {"value", "stderr": float | None, "n": int | None}}}, "versions": {package: version},
    "command": the harness's command lines}; a metric that the harness reads in several ways is named with the way, as
    "exact_match (strict-match)".
    Raises ConfigError for a checkpoint, task or limit that cannot work, `Cannot reach the hub for …`, or a gated data set; BackendError
    with the log's end where the harness leaves no result.
    """
    path = model_name(path)
    check_benchmarks(tasks, limit, mode, batch_size)
    models.check_student(path)
    settings = {"limit": limit, "mode": mode, "batch_size": batch_size}
    settings |= {"include_path": str(store.resolve(include_path)) if include_path else None}
    measured = {task: _measure(path, PUBLIC.get(task, task), settings, store.resolve(out), fresh) for task in dict.fromkeys(tasks)}
    return {
        "tasks": {task: each["metrics"] for task, each in measured.items()},
        "versions": next(iter(measured.values()))["versions"],
        "command": "\n".join(each["command"] for each in measured.values()),
    }


def write_heldout_task(questions: str | Path, mode: str, folder: str | Path) -> str:
    """Write a task of the harness over a held-out file, for `include_path`. Returns its name, `heldout_<mode>`.

    questions  JSON lines with "instruction", "answer" and, where known, "input" and "system" (1 or 2; rows of the other are left out)
    mode       "system1" or "system2": as the questions are asked (`prompt.format_prompt`)
    folder     gets the task and its questions
    Raises DataError where no question is left.
    """
    folder, name = store.resolve(folder), f"heldout_{mode}"
    own = [row for row in store.read_rows(questions) if row.get("system") in (None, MODES.index(mode) + 1)]
    if not own:
        raise DataError(f"{store.shown(questions)} has no question for {mode}. Give a file with rows of that system.")
    asked = [{"question": format_prompt(row["instruction"], row.get("input") or "", mode), "answer": row["answer"].strip()} for row in own]
    store.make_folder(folder)
    store.write_jsonl(folder / f"{name}.jsonl", asked)
    filled = {"TASK": name, "DATA_FILE": glob.escape(str(folder / f"{name}.jsonl"))}  # datasets takes a file's name for a pattern
    with store.atomic_file(folder / f"{name}.yaml") as file:
        text = TEMPLATE.read_text(encoding="utf-8")
        file.write(re.sub("|".join(filled), lambda found: json.dumps(filled[found[0]]), text))
    return name


def check_benchmarks(tasks: Iterable[str], limit: int | None = None, mode: str | None = None, batch_size: int = BATCH_ROWS) -> None:
    """Raise ConfigError for names and numbers that cannot be, all of them at once; whether a task is known only the harness can tell."""
    problems = [] if tasks else [f"tasks = {tasks!r}: name at least one, e.g. {', '.join(PUBLIC)}."]
    for task in tasks:
        if not isinstance(task, str) or not re.fullmatch(r"\w[\w+-]*", task):  # a file, a pattern, an option
            named = shortened(repr(task), 80)
            problems.append(f"tasks: {named} is no name of a task. Use {', '.join(PUBLIC)}, or one of `lm-eval ls tasks`.")
    counts = {"batch_size": batch_size} | ({"limit": limit} if limit is not None else {})
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name} = {value!r}: set a whole number from 1.")
    if mode not in (None, *MODES):
        problems.append(f"mode = {mode!r}: there is no such mode. Use 'system1', 'system2' or None.")
    if problems:
        raise ConfigError.from_problems("the benchmarks", problems)


def _measure(path: str, task: str, settings: dict, out: Path, fresh: bool) -> dict:
    """One task's {"metrics", "versions", "command"}, measured or read back."""
    folder = out / f"{task}-{store.hash_json([path, settings])[:12]}"
    inputs = {"the checkpoint": models.fingerprint(path), "constraints.txt": store.hash_file(CONSTRAINTS)}
    if settings["include_path"]:
        inputs["include_path"] = _content(Path(settings["include_path"]))
    stage = stages.Stage(f"Benchmark {task}", {"task": task, **settings}, inputs, stages.code("harness.py"))
    place, log = folder / "result.json", folder / "harness.log"
    store.make_folder(folder)
    with store.lock(folder):
        if stages.reuse(stage, place, fresh=fresh):
            return store.read_json(place)
        store.remove_file(place)
        with TemporaryDirectory(dir=folder) as made:
            command = _command(path, task, settings, Path(made) / "results.json")
            ended = _run(command, task, log)
            found = [store.read_json(file) for file in Path(made).glob("results_*.json")]
        if not (found and task in found[0]["results"]):
            raise _failure(task, ended, log)
        result = {"metrics": _metrics(found[0], task), "versions": _versions(found[0]), "command": shlex.join(["python", *command[1:]])}
        store.write_json(place, result)
        store.write_manifest(place, {"stage": stage.record()})
        return result


def _content(folder: Path) -> str:
    """A hash of the tasks of a folder, with their data."""
    if not store.is_dir(folder):
        raise ConfigError(f"include_path = {store.shown(folder)}: there is no such folder. Give one with the YAML files of tasks.")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return store.hash_json({str(file.relative_to(folder)): store.hash_file(file) for file in files})


def _command(path: str, task: str, settings: dict, results: Path) -> list[str]:
    model = {"pretrained": path, "dtype": _dtype(), "think_end_token": REASONING_TAGS[1]}
    if settings["mode"]:
        model["enable_thinking"] = settings["mode"] == "system2"
    # as JSON: in the harness's own form a path could not have a comma
    command = [engine_python()[0], "-m", "lm_eval", "run", "--model", "hf", "--model_args", json.dumps(model), "--apply_chat_template"]
    command += ["--tasks", task, "--batch_size", str(settings["batch_size"]), "--seed", str(SEED), "--output_path", str(results)]
    if settings["mode"] == "system2":
        command += ["--gen_kwargs", f"max_gen_toks={_reasoning_tokens(path)}"]
    for name in ("limit", "include_path"):
        command += [f"--{name}", str(settings[name])] if settings[name] else []
    return command


def _dtype() -> str:
    """The type that weights are held in, as the harness calls it: 16 bits on a GPU, 32 on a CPU, as for the lab's own answers."""
    gpu = machine.gpu()
    return {"bf16": "bfloat16", "fp16": "float16"}[models.half_precision(models.capability_of(gpu))[0]] if gpu else "float32"


def _reasoning_tokens(path: str) -> int:
    from transformers import AutoConfig

    positions = AutoConfig.from_pretrained(path, trust_remote_code=False).max_position_embeddings
    return min(REASONING_TOKENS, positions // 2)


def _run(command: list[str], task: str, log: Path) -> process.Ended:
    with progress(f"Benchmark {task}") as update:

        def hear(line: str) -> bool:
            if bar := _BAR.search(line):
                update(int(bar[1]), total=int(bar[2]))
            return not bar  # a bar's every state would be a line of the log

        return process.run(command, log, hear, cwd=log.parent, env={**engine.child_environment(), "PYTHONUNBUFFERED": "1"})


def _failure(task: str, ended: process.Ended, log: Path) -> DistillError:
    """The error for a harness that left no result: the hub's silence, its terms, or the end of the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if closed := _HUB_IS_CLOSED.findall(text):
        return ConfigError(f"The data of {task} is gated: accept its terms on its hub page, then set HF_TOKEN ({shortened(closed[-1])}).")
    if silent := _HUB_IS_SILENT.findall(text):
        return models.cannot_reach_hub(f"the data of {task}", silent[-1])
    return engine.failure(f"Benchmark {task}", ended, log)


def _metrics(found: dict, task: str) -> dict:
    """The harness's {"exact_match,none": …, "exact_match_stderr,none": …} as {metric: {"value", "stderr", "n"}}."""
    results, n = found["results"][task], found["n-samples"].get(task, {}).get("effective")
    metrics = {}
    for key, value in results.items():
        metric, comma, way = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{way}")
            shown = metric if way == "none" else f"{metric} ({way})"
            metrics[shown] = {"value": value, "stderr": stderr if isinstance(stderr, float) else None, "n": n}  # "N/A" for a single row
    return metrics


def _versions(found: dict) -> dict:
    return {"lm_eval": found["lm_eval_version"], "transformers": found["transformers_version"]}
