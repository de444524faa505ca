"""The command `evaluate`: teacher and students on held-out questions, and the report."""

import argparse

from .cli_data import add_fresh
from .errors import ConfigError
from .prompt import MODES


def add_evaluate(commands) -> argparse.ArgumentParser:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "evaluate", help="are the students nearly as good as the teacher, and how much faster? Scores and a report"
    )
    parser.add_argument("checkpoints", nargs="+", metavar="PATH", help="a student's folder; both systems' for one report")
    parser.add_argument("--teacher", help="folder or hub name (default: the one that the student's record names)")
    parser.add_argument(
        "--questions",
        action="append",
        default=[],
        metavar="[SYSTEM=]FILE",
        help="held-out rows {instruction, answer}; system1=FILE and system2=FILE for one each (default: the validation rows)",
    )
    parser.add_argument("--limit", type=int, help="questions a system, drawn by the seed (default: all)")
    parser.add_argument("--before", help="the base model of a checkpoint that the lab did not make")
    parser.add_argument("--mode", choices=MODES, help="how a checkpoint is asked that the lab did not make")
    parser.add_argument("--max-tokens", type=int, help="limit of an answer (default 256, 1024 for system2)")
    parser.add_argument("--speed-runs", type=int, default=20, help="answers that each model is timed on; 0 measures no speed (default 20)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME",
        help="a public one by lm-evaluation-harness: gsm8k, math500, ifeval, gpqa; may be repeated",
    )
    parser.add_argument("--benchmark-limit", type=int, help="questions of each benchmark (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of questions and of every interval (default 0)")
    parser.add_argument("--out", default="reports/evaluation", metavar="FOLDER", help="default reports/evaluation")
    add_fresh(parser)
    parser.set_defaults(run=_evaluate)
    return parser


def _evaluate(options) -> dict:
    from .evaluate import evaluate_student

    limits = dict.fromkeys(MODES, options.max_tokens) if options.max_tokens else None
    names = ("teacher", "before", "mode", "limit", "speed_runs", "benchmark_limit", "seed", "out", "fresh")
    settings = {name: getattr(options, name) for name in names} | {"benchmarks": tuple(options.benchmark)}
    return evaluate_student(*options.checkpoints, questions=questions_of(options.questions), max_new_tokens=limits, **settings).to_dict()


def questions_of(given: list[str]) -> str | dict | None:
    """Files of questions from the command line: one for all, or one for each system."""
    named = [entry.partition("=") for entry in given]
    by_mode = {mode: file for mode, equals, file in named if equals and mode in MODES}
    if len(by_mode) == len(given):
        return by_mode or None
    if len(given) > 1:
        raise ConfigError("--questions: give one file for all, or system1=FILE and system2=FILE.")
    return given[0]
