"""The command line: `python distill_app.py COMMAND`. Each command is one call of the public API."""

import argparse
import json
import sys
from dataclasses import asdict

from . import console, store
from .errors import ConfigError, DistillError

DESCRIPTION = "Turn a big Qwen teacher into a small student. Start with `demo`: it needs no GPU, no network and no model hub."
EPILOG = """examples:
  python distill_app.py demo
  python distill_app.py prepare-system1 --source my_rows.jsonl --columns instruction=question,output=answer
  python distill_app.py system1 --set student_model=Qwen/Qwen2.5-0.5B-Instruct --set num_epochs=1
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 only where everything was done."""
    options = _parser().parse_args(arguments)
    if options.json:
        console.use_stderr()
    try:
        result = options.run(options)
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What stood at the output places stands there still.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill_app.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_prepare_system1, _add_system1, _add_build_micro):
        add(commands).add_argument(
            "--json", action="store_true", help="print the result as JSON on standard output, all else on standard error"
        )
    return parser


def _add_demo(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("demo", help="the whole job on the models and data that ship with the lab; a few minutes on 2 CPU cores")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the data order and the training (default 0)")
    parser.set_defaults(run=_demo)
    return parser


def _demo(options) -> dict:
    from .demo import run_demo

    return run_demo(seed=options.seed)


def _add_prepare_system1(commands) -> argparse.ArgumentParser:
    from .data import DISTILQWEN

    parser = commands.add_parser("prepare-system1", help="make the labelled rows that System 1 is trained on")
    parser.add_argument(
        "--source", default=DISTILQWEN, help=f"hub dataset, or JSON, JSONL or Parquet file or folder (default {DISTILQWEN})"
    )
    parser.add_argument("--mix", metavar="FILE", help="instead: a JSON list of {source, columns, weight, slice} to mix")
    parser.add_argument(
        "--slice", default="train[:1000]", help="source rows to read: train, train[:1000], train[10%%:20%%] (default train[:1000])"
    )
    parser.add_argument("--columns", metavar="FIELD=COLUMN,…", help="e.g. instruction=question,output=answer")
    parser.add_argument("--rows", type=int, help="how many rows to keep (default: all that are read)")
    parser.add_argument("--validation", type=float, default=0.05, help="share of the rows split off for validation (default 0.05)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split and of a mixture (default 42)")
    parser.add_argument("--out-instructions", default="data/train_instructions.json", metavar="FILE")
    parser.add_argument("--out-labeled", default="data/train_labeled.json", metavar="FILE")
    parser.set_defaults(run=_prepare_system1)
    return parser


def _prepare_system1(options) -> dict:
    from .data import prepare_system1_dataset

    prepared = prepare_system1_dataset(
        options.slice,
        source=_read_list(options.mix) if options.mix else options.source,
        columns=_columns(options.columns),
        rows=options.rows,
        validation=options.validation,
        seed=options.seed,
        out_instructions=options.out_instructions,
        out_labeled=options.out_labeled,
    )
    return asdict(prepared)


def _read_list(path: str) -> list:
    entries = store.read_json(path)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} holds no JSON list of sources.")
    return entries


def _columns(text: str | None) -> dict | None:
    if not text:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    wrong = [field for field, _, column in pairs if not field.strip() or not column.strip()]
    if wrong:
        raise ConfigError(f"--columns {text}: write FIELD=COLUMN, e.g. instruction=question,output=answer")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _add_system1(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("system1", help="train the System-1 student on the prepared rows")
    parser.add_argument("--preset", help="settings to start from: a name in configs/presets or a JSON file (default system1)")
    parser.add_argument("--config", metavar="FILE", help="JSON object of settings over the preset")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting over both; may be repeated")
    parser.set_defaults(run=_system1)
    return parser


def _system1(options) -> dict:
    from .pipeline import distill_system1

    return {"checkpoint": distill_system1(user_settings(options.config, options.set, options.preset))}


def user_settings(config_file: str | None, assignments: list[str], preset: str | None) -> dict:
    """A user's settings from the command line: a file's, then NAME=VALUE pairs, whose values are JSON or else text."""
    settings = store.read_json(config_file) if config_file else {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{config_file} holds no JSON object of settings.")
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {assignment}: write NAME=VALUE, e.g. --set learning_rate=1e-5")
        settings[name.strip()] = _value(value)
    return settings | ({"preset": preset} if preset else {})


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _add_build_micro(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("build-micro", help="make the shipped micro world anew: teacher, students and data; minutes long")
    parser.add_argument("--out", default="data/micro", metavar="FOLDER", help="where to (default data/micro)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data (default 0)")
    parser.set_defaults(run=_build_micro)
    return parser


def _build_micro(options) -> dict:
    from .microlab import build_micro

    return build_micro(options.out, seed=options.seed)
