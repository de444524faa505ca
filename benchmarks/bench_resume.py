"""A stage killed at random moments and run again: does it end with what the run ended with that nobody killed?

    python benchmarks/bench_resume.py [--stage train|prepare|label] [--kills 20] [--seed 0] [--rows 2000] [--set NAME=VALUE]

Runs System 1's training in the micro world, its preparation, or a labelling once without a break, then again and again with `kill -9` on
everything that the lab's command started, at moments drawn evenly over the time that the unbroken run took; what was killed is started
again by the same command. Prints each kill, where the next session went on, and whether what each finished run left is the unbroken
one's: of a training weights, losses and sample answers; of a preparation its files; of a labelling its rows and who was asked how often.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill import store  # noqa: E402

BY_THE_CLOCK = ("time", "train_runtime", "eval_runtime", "train_samples_per_second", "train_steps_per_second")
BY_THE_CLOCK += ("eval_samples_per_second", "eval_steps_per_second")
ROWS = 200_000  # to prepare


@dataclass(frozen=True)
class Stage:
    """What is killed.

    command  the lab's, as a user types it
    result   of a finished run: what must be equal
    leaves   patterns of what it leaves, which goes before it begins anew
    stood    what the latest session found, in words
    """

    command: list[str]
    result: Callable[[Path], dict]
    leaves: tuple[str, ...]
    stood: Callable[[Path, str], str]


def main() -> None:
    """Run the command line; exit status 0 only where every finished run equals the unbroken one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=STAGES, default="train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the micro world to read (default 2000: about 40 s of training)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting of the training; may be repeated")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        lab = make_lab(Path(folder) / "lab", ROWS if options.stage == "prepare" else 0)
        if options.stage == "train":
            finish(start(lab, prepare(f"train[:{options.rows}]")))
        sys.exit(0 if compare(lab, options.kills, options.seed, STAGES[options.stage](options.set)) else 1)


def make_lab(folder: Path, rows: int = 0) -> Path:
    """The lab's code and the micro world in a folder of their own, so that runs and data of this one stay as they are.

    rows  made-up ones in `rows.jsonl`
    """
    folder.mkdir()
    for name in ("distill", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "kd_*.json"))
    for name in ("distill_app.py", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    (folder / "data" / "micro").symlink_to(ROOT / "data" / "micro")
    store.write_jsonl(folder / "rows.jsonl", ({"instruction": f"Question {n}", "output": f"{n} " * 20} for n in range(rows)))
    return folder


def compare(lab: Path, kills: int, seed: int, stage: Stage) -> bool:
    """Run a stage without a break, then with that many kills; prints what happened. Returns whether all runs ended alike."""
    draw, all_alike = random.Random(seed), True
    started = time.monotonic()
    finish(start(lab, stage.command))
    seconds, wanted = time.monotonic() - started, stage.result(lab)
    print(f"without a break: {seconds:.0f} s, {', '.join(wanted)}: {store.hash_json(wanted)[:12]}")
    while kills:
        remove(lab, stage.leaves)
        used, log = run_with_kills(lab, stage, kills, lambda: draw.uniform(0, seconds))
        kills -= used
        found = stage.result(lab)
        alike = {name: found[name] == wanted[name] for name in wanted}
        all_alike = all_alike and all(alike.values())
        print("\n".join(log))
        print(f"run ended after {used} kills: " + ", ".join(f"{name} {'equal' if same else 'DIFFERENT'}" for name, same in alike.items()))
    return all_alike


def remove(lab: Path, patterns: tuple[str, ...]) -> None:
    for found in [found for pattern in patterns for found in lab.glob(pattern)]:
        shutil.rmtree(found) if found.is_dir() else found.unlink()


def run_with_kills(lab: Path, stage: Stage, most: int, moment: Callable[[], float]) -> tuple[int, list[str]]:
    """Start a stage, kill it at `moment()` seconds and start it again, until it ends or has been killed `most` times and then ends.

    Returns how many kills it took, and a line for each session.
    """
    log: list[str] = []
    for used in range(most):
        process, after = start(lab, stage.command), moment()
        try:
            said, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            kill(process)
            log.append(f"  kill {used + 1} after {after:.1f} s ({stage.stood(lab, process.communicate()[0])})")
        else:
            log.append(f"  ended before its kill ({stage.stood(lab, said)})")
            return used, log
    log.append(f"  ended ({stage.stood(lab, finish(start(lab, stage.command)))})")
    return most, log


def start(lab: Path, arguments: list[str]) -> subprocess.Popen:
    """The lab's own command."""
    command = [sys.executable, "distill_app.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(lab)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # a shell that runs this in the background has it ignore interrupts, and a child inherits that
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, cwd=lab, env=environment, start_new_session=True, **output, **heed)


def finish(process: subprocess.Popen) -> str:
    """Wait for a command that must succeed. Returns what it printed."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the command failed:\n{said}")
    return said


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the command and all that it started, at once."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:  # it went with the one before
            continue


# The stages


def training(settings: list[str] = ()) -> Stage:
    """System 1's training, with settings of one's own."""
    arguments = [part for setting in ("backend=builtin", *settings) for part in ("--set", setting)]
    leaves = ("runs", "distilled-micro-system1")
    return Stage(["system1", "--preset", "micro_system1", *arguments], trained, leaves, lambda lab, said: _step_in(said))


def _step_in(said: str) -> str:
    found = re.search(r"continues at step [\d,]+ of [\d,]+[^\n]*", said)
    return found[0] if found else "it was done before" if "done before" in said else "began at step 0"


def preparing(_: list[str] = ()) -> Stage:
    """The preparation of ROWS made-up rows."""
    return Stage(prepare("train", "rows.jsonl"), prepared, ("data/train_*",), lambda lab, said: f"{len(prepared(lab))} files stood")


def prepare(rows: str, source: str = "data/micro/distilqwen.parquet") -> list[str]:
    return ["prepare-system1", "--slice", rows, "--source", source]


def prepared(lab: Path) -> dict:
    """The files of a preparation and their hashes; what was begun and not finished counts too."""
    return {file.name: store.hash_file(file) for file in sorted(lab.glob("data/train_*"))}


def labelling(_: list[str] = ()) -> Stage:
    """The labelling of the held-out questions by the micro teacher in fp32, four at a time."""
    settings = ["--out", "data/labels.json", "--bits", "32", "--max-new-tokens", "24", "--batch-size", "4"]
    command = ["label", "data/micro/heldout.jsonl", "--teacher", "data/micro/teacher", *settings]
    return Stage(command, labeled, ("runs", "data/labels*"), lambda lab, said: f"{sum(asked(lab).values()):,} answered")


def labeled(lab: Path) -> dict:
    """The labelled rows, and how often each question was answered."""
    return {"rows": store.hash_file(lab / "data" / "labels.json"), "answers a question": sorted(asked(lab).values())}


def asked(lab: Path) -> Counter:
    """Question → how many answers of it stand in the journal, as it lies there."""
    lines = [line for journal in lab.glob("runs/labels/*.jsonl") for line in journal.read_bytes().splitlines(keepends=True)]
    return Counter(entry["id"] for _, entry in store.intact_lines(lines) if entry["id"] != store.MODEL)


def trained(lab: Path) -> dict:
    """What a finished training left, without what goes by the clock: a hash of the weights, the figures, the sample answers."""
    run = max((lab / "runs").glob("system1-*"), key=lambda folder: folder.stat().st_mtime)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if name not in BY_THE_CLOCK} for line in lines]
    answers = run / "samples.jsonl"
    return {
        "weights": store.hash_file(lab / "distilled-micro-system1" / "model.safetensors"),
        "last weights": store.hash_file(run / "last" / "model.safetensors"),
        "metrics": figures,
        "samples": answers.read_text() if answers.is_file() else "",
    }


STAGES = {"train": training, "prepare": preparing, "label": labelling}

if __name__ == "__main__":
    main()
