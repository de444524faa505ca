"""System 1 killed at random moments and run again: does it end with the weights of the run that nobody killed?

    python benchmarks/bench_resume.py [--kills 20] [--seed 0] [--rows 2000] [--set NAME=VALUE]

Trains the micro student once without a break, then again and again with `kill -9` on everything that the lab's command started, at
moments drawn evenly over the time that the unbroken run took; what was killed is started again by the same command. Prints each kill,
the step that the next session went on from, and whether weights, losses and sample answers of each finished run are the unbroken one's.
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
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill import store  # noqa: E402

BY_THE_CLOCK = ("time", "train_runtime", "eval_runtime", "train_samples_per_second", "train_steps_per_second")
BY_THE_CLOCK += ("eval_samples_per_second", "eval_steps_per_second")


def main() -> None:
    """Run the command line; exit status 0 only where every finished run equals the unbroken one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the micro world to read (default 2000: about 40 s of training)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting of the training; may be repeated")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        lab = make_lab(Path(folder) / "lab")
        prepare = ["prepare-system1", "--slice", f"train[:{options.rows}]", "--source", "data/micro/distilqwen.parquet"]
        subprocess.run([sys.executable, "distill_app.py", *prepare], cwd=lab, check=True, stdout=subprocess.DEVNULL)
        sys.exit(0 if compare(lab, options.kills, options.seed, options.set) else 1)


def make_lab(folder: Path) -> Path:
    """The lab's code and the micro world in a folder of their own, so that runs and data of this one stay as they are."""
    folder.mkdir()
    for name in ("distill", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "kd_*.json"))
    for name in ("distill_app.py", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    (folder / "data" / "micro").symlink_to(ROOT / "data" / "micro")
    return folder


def compare(lab: Path, kills: int, seed: int, settings: list[str]) -> bool:
    """Train without a break, then with that many kills; prints what happened. Returns whether all runs ended alike."""
    draw, all_alike = random.Random(seed), True
    started = time.monotonic()
    finish(start(lab, settings))
    seconds, wanted = time.monotonic() - started, result_of(lab)
    print(f"without a break: {seconds:.0f} s, {wanted['metrics'][-1]['step']} steps, weights {wanted['weights'][:12]}")
    while kills:
        shutil.rmtree(lab / "runs")
        shutil.rmtree(lab / "distilled-micro-system1")
        used, log = run_with_kills(lab, settings, kills, lambda: draw.uniform(0, seconds))
        kills -= used
        found = result_of(lab)
        alike = {name: found[name] == wanted[name] for name in wanted}
        all_alike = all_alike and all(alike.values())
        print("\n".join(log))
        print(f"run ended after {used} kills: " + ", ".join(f"{name} {'equal' if same else 'DIFFERENT'}" for name, same in alike.items()))
    return all_alike


def run_with_kills(lab: Path, settings: list[str], most: int, moment) -> tuple[int, list[str]]:
    """Start a training, kill it at `moment()` seconds and start it again, until it ends or has been killed `most` times and then ends.

    Returns how many kills it took, and a line for each session.
    """
    log: list[str] = []
    for used in range(most):
        process, after = start(lab, settings), moment()
        try:
            said, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            kill(process)
            log.append(f"  kill {used + 1} after {after:.1f} s{_began(process.communicate()[0])}")
        else:
            log.append(f"  ended before its kill{_began(said)}")
            return used, log
    log.append(f"  ended{_began(finish(start(lab, settings)))}")
    return most, log


def _began(said: str) -> str:
    found = re.search(r"continues at step [\d,]+ of [\d,]+[^\n]*", said)
    return f" ({found[0] if found else 'began at step 0'})"


def start(lab: Path, settings: list[str]) -> subprocess.Popen:
    """The lab's own command, as a user types it."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "distill_app.py", "system1", "--preset", "micro_system1", "--set", "backend=builtin", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(lab)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # a shell that runs this in the background has it ignore interrupts, and a child inherits that
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, cwd=lab, env=environment, start_new_session=True, **output, **heed)


def finish(process: subprocess.Popen) -> str:
    """Wait for a command that must succeed. Returns what it printed."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the training failed:\n{said}")
    return said


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the command and all that it started, at once."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:  # it went with the one before
            continue


def result_of(lab: Path) -> dict:
    """What a finished run left, without what goes by the clock: a hash of the weights, the figures, the sample answers."""
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


if __name__ == "__main__":
    main()
