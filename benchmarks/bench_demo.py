"""The demo under several seeds: `make bench-demo`. Prints the table that stands in benchmarks/RESULTS.md and keeps every report.

Usage: python benchmarks/bench_demo.py [--seeds 0 1 2]
"""

import argparse
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import store  # noqa: E402
from distill.console import say  # noqa: E402
from distill.demo import retained, run_demo  # noqa: E402
from distill.evaluate import mean_exact_match  # noqa: E402
from distill.microlab import SYSTEM1_FAMILIES, SYSTEM2_FAMILIES  # noqa: E402

REPORTS = store.ROOT / "reports" / "bench-demo"


def main() -> None:
    """Run the demo once a seed, then print mean exact match by model and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reports, seconds, peak = {}, {}, PeakMemory()
    for seed in parser.parse_args().seeds:
        started = time.monotonic()
        reports[seed] = store.read_json(store.write_json(REPORTS / f"seed{seed}.json", run_demo(seed)))
        seconds[seed] = time.monotonic() - started
    say(results_table(reports, seconds))
    say(f"\nPeak memory of all processes together: {peak.bytes / 2**30:.2f} GiB (resident, shared pages counted once a process).")


class PeakMemory(threading.Thread):
    """Watches this process and its children twice a second; `bytes` is the largest sum of their resident memory so far."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        lab = psutil.Process()
        while True:
            self.bytes = max(self.bytes, sum(map(_resident_bytes, [lab, *lab.children(recursive=True)])))
            time.sleep(0.5)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:  # it ended between being listed and being asked
        return 0


def results_table(reports: dict, seconds: dict) -> str:
    """A Markdown table, a row a seed: means over the instruction families, and over the reasoning families for the student."""
    lines = ["| seed | teacher | before | student | kept | gold labels | shuffled | chance | student, reasoning | training s | demo s |"]
    lines.append("|" + "---|" * 11)
    for seed, report in reports.items():
        models = (report["teacher"], report["system1"]["before"], report["system1"]["after"], *report["controls"].values())
        teacher, before, after, shuffled, gold = (f"{mean_exact_match(model, SYSTEM1_FAMILIES):.3f}" for model in models)
        chance = sum(report["chance"][family] for family in SYSTEM1_FAMILIES) / len(SYSTEM1_FAMILIES)
        reasoning = mean_exact_match(report["system1"]["after"], SYSTEM2_FAMILIES)
        cells = [seed, teacher, before, after, f"{retained(report):.3f}", gold, shuffled, f"{chance:.3f}", f"{reasoning:.3f}"]
        cells += [f"{report['train_seconds']['system1']:.0f}", f"{seconds[seed]:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
