"""System 2's data at OmniThought's shape: how fast traces are chosen, when reading stops, and whether memory stays flat.

Writes Parquet sets of 10,000 and 100,000 questions (three traces each, of about 100 to 4,000 characters) into a temporary folder, then
prepares them in processes of their own. Usage: python benchmarks/bench_traces.py [--questions 10000 100000]
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distill import store  # noqa: E402
from distill.console import on_stderr, say  # noqa: E402
from distill.traces import prepare_system2_dataset  # noqa: E402

MAX_LENGTH = 700
WORDS = "first then so we keep add carry check this again the digit is because hence wait let me see total sum".split()  # noqa: SIM905


def main() -> None:
    """Make the sets, prepare each in a process of its own, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--prepare", nargs=3, metavar=("FILE", "ROWS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        _prepare(*options.prepare)
        return
    say("| questions | rows | read | kept | seconds | source rows/s | kept rows/s | peak MiB |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.questions:
            source = Path(folder) / f"omni{count}.parquet"
            write_set(source, count)
            for rows in (2_000, None):
                say(_measured(source, count, rows, Path(folder) / "cot.json"))


def write_set(path: Path, count: int) -> None:
    """A set in OmniThought's schema, 1,000 questions a row group; reproducible."""
    import pyarrow
    import pyarrow.parquet

    draw, writer = random.Random(0), None
    for start in range(0, count, 1_000):
        table = pyarrow.Table.from_pylist([_question(number, draw) for number in range(start, min(start + 1_000, count))])
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    writer.close()


def _question(number: int, draw: random.Random) -> dict:
    return {"question": f"How much is {number} and {draw.randrange(1000)}?", "reasoning": [_trace(draw) for _ in range(3)]}


def _trace(draw: random.Random) -> dict:
    rv = draw.randrange(10)
    thought = " ".join(draw.choices(WORDS, k=int(20 * 2 ** (rv * draw.uniform(0.4, 0.6)) * draw.uniform(1, 2))))
    solution = str(draw.randrange(2000))
    return {
        "Cognitive_Difficulty": {"judge": "bench", "level": draw.randrange(10)},
        "Reasoning_Verbosity": {"judge": "bench", "level": rv},
        "full_response": f"<think>\n{thought}\n</think>\n\n{solution}",
        "solution": solution,
        "teacher": draw.choice(["DeepSeek-R1", "QwQ-32B"]),
        "thought": thought,
        "thought_correctness_verify": draw.random() < 0.8,
    }


def _measured(source: Path, count: int, rows: int | None, out: Path) -> str:
    command = [sys.executable, __file__, "--prepare", str(source), str(rows or 0), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout)
    total, seconds = found["kept"] + found["validation"], found["seconds"]
    cells = [f"{count:,}", f"{rows:,}" if rows else "all", f"{found['read']:,}", f"{total:,}", f"{seconds:.1f}"]
    return "| " + " | ".join([*cells, f"{found['read'] / seconds:.0f}", f"{total / seconds:.0f}", str(found["peak_mib"])]) + " |"


def _prepare(source: str, rows: str, out: str) -> None:
    store.ROOT = Path(out).parent
    started = time.perf_counter()
    settings = {"rows": int(rows) or None, "rv_min": 1, "cd_max": 8, "max_length": MAX_LENGTH, "out_cot": out}
    with on_stderr():
        prepared = prepare_system2_dataset("train", source=source, student_model=str(ROOT / "data/micro/student_system2"), **settings)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    facts = {"read": prepared.read, "kept": prepared.kept, "validation": prepared.validation, "seconds": seconds, "peak_mib": peak}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
