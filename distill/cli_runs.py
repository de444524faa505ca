"""The commands `runs`, which lists and compares trainings, and `sweep`, which makes a grid of them."""

import argparse

from .cli_data import add_fresh
from .errors import BackendError


def _add_runs(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("runs", help="list every training run; with the names of some, show how they differ")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of two runs or more; the first letters of one will do")
    parser.set_defaults(run=_runs)
    return parser


def _runs(options) -> dict:
    from .registry import compare_runs, show_runs

    return compare_runs(*options.runs) if options.runs else show_runs()


def _add_sweep(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("sweep", help="train and score a small grid of students; one table and plot")
    parser.add_argument("preset", help="a name in configs/sweeps, e.g. micro_system1, or a JSON file")
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (default reports/sweep/NAME, with --limit NAME-limit-N)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N held-out questions of each family alone")
    add_fresh(parser)
    parser.set_defaults(run=_sweep)
    return parser


def _sweep(options) -> dict:
    from .sweep import run_sweep

    result = run_sweep(options.preset, out=options.out, fresh=options.fresh, limit=options.limit)
    if result["failed"]:
        raise BackendError(
            f"{result['failed']} of {len(result['cells'])} cells of the sweep failed, each for the reason that its row says; the others "
            f"are in {result['files']['html']}. Mend the cause and run the same command again: what is done stays."
        )
    return result


RUN_COMMANDS = (_add_runs, _add_sweep)
