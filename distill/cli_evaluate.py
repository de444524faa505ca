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
    parser.add_argument("--teacher-bits", type=int, help="of a weight of the teacher (default 8, or 4 where 8 do not fit)")
    parser.add_argument(
        "--max-tokens",
        action="append",
        default=[],
        metavar="[SYSTEM=]N",
        help="limit of an answer (default 256, system2=1024); may be repeated",
    )
    parser.add_argument("--speed-runs", type=int, help="answers that each model is timed on; 0 measures no speed (default 20)")
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

    names = ("teacher", "teacher_bits", "before", "mode", "limit", "speed_runs", "benchmark_limit", "seed", "out", "fresh")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = given | {"benchmarks": tuple(options.benchmark)}
    questions = by_mode("--questions", options.questions)
    limits = by_mode("--max-tokens", options.max_tokens)
    limits = {
        mode: _number(limit) for mode, limit in (limits if isinstance(limits, dict) else dict.fromkeys(MODES, limits)).items() if limit
    }
    return evaluate_student(*options.checkpoints, questions=questions, max_new_tokens=limits, **settings).to_dict()


def by_mode(option: str, given: list[str]) -> str | dict | None:
    """What an option says that may be given once for both systems, or as system1=… and system2=…; None where it was not given."""
    named = [entry.partition("=") for entry in given]
    found = {mode: value for mode, equals, value in named if equals and mode in MODES}
    if len(found) == len(given):
        return found or None
    if len(given) > 1:
        raise ConfigError(f"{option}: give it once for both systems, or as system1=… and system2=….")
    return given[0]


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"--max-tokens {text}: give a whole number, or system1=N and system2=N.") from error
