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
from distill.demo import margin, retained, run_demo  # noqa: E402
from distill.microlab import SYSTEM1_FAMILIES, SYSTEM2_FAMILIES  # noqa: E402
from distill.scores import mean_exact_match  # noqa: E402

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
    """Two Markdown tables, a row a seed: means of exact match over System 1's families, and over System 2's."""
    first = {
        "teacher": lambda report: report["teacher"],
        "before": lambda report: report["system1"]["before"],
        "student": lambda report: report["system1"]["after"],
        "gold labels": lambda report: report["controls"]["gold_labels"],
        "shuffled": lambda report: report["controls"]["shuffled_labels"],
    }
    second = {
        "teacher": lambda report: report["teacher"],
        "before": lambda report: report["system2"]["before"],
        "student": lambda report: report["system2"]["after"],
        "bare answers": lambda report: report["controls"]["bare_answers"],
        "System 1": lambda report: report["system1"]["after"],
        "wrong traces": lambda report: report["controls"]["wrong_traces"],
        "truncated": lambda report: report["controls"]["truncated_traces"],
    }
    lines = _table(["seed", *first, "chance", "kept", "training s", "demo s"])
    for seed, report in reports.items():
        chance = sum(report["chance"][family] for family in SYSTEM1_FAMILIES) / len(SYSTEM1_FAMILIES)
        means = [f"{mean_exact_match(model(report), SYSTEM1_FAMILIES):.3f}" for model in first.values()]
        timing = [f"{report['train_seconds']['system1']:.0f}", f"{seconds[seed]:.0f}"]
        lines.append(_line([seed, *means, f"{chance:.3f}", f"{retained(report):.3f}", *timing]))
    lines += ["", *_table(["seed", *second, "kept", "margin", "reason first", "stop", "training s"])]
    for seed, report in reports.items():
        means = [f"{mean_exact_match(model(report), SYSTEM2_FAMILIES):.3f}" for model in second.values()]
        shares = [f"{report['system2']['after'][share]['value']:.3f}" for share in ("reasoned", "stopped")]
        kept = [f"{retained(report, 'system2'):.3f}", f"{margin(report):.3f}"]
        lines.append(_line([seed, *means, *kept, *shares, f"{report['train_seconds']['system2']:.0f}"]))
    return "\n".join(lines)


def _table(heads: list[str]) -> list[str]:
    return [_line(heads), "|" + "---|" * len(heads)]


def _line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
