"""The command line: `python distill_app.py COMMAND`. Each command is one call of the public API."""

import argparse
import json
import sys

from . import console, store
from .cli_data import DATA_COMMANDS, add_fresh, add_judge, add_prefer, read_list
from .cli_evaluate import add_evaluate
from .cli_plan import add_plan
from .cli_publish import PUBLISH_COMMANDS
from .cli_runs import RUN_COMMANDS
from .errors import BackendError, ConfigError, DistillError

DESCRIPTION = "Turn a big Qwen teacher into a small student. Start with `demo`: it needs no GPU, no network and no model hub."
EPILOG = """examples:
  python distill_app.py demo
  python distill_app.py prepare-system1 --source my_rows.jsonl --columns instruction=question,output=answer
  python distill_app.py system1 --set student_model=Qwen/Qwen2.5-0.5B-Instruct --set num_epochs=1
  python distill_app.py prepare-system2 --rows 2000 --rv-max 5 && python distill_app.py system2
  python distill_app.py compare "Why is the sky blue?"
  python distill_app.py evaluate ./distilled-qwen2.5-0.5b ./distilled-qwen2.5-1.5b-cot --questions heldout.jsonl
  python distill_app.py chat ./distilled-qwen2.5-1.5b-cot
"""
SYSTEMS = {"system1": "System-1 student (answers at once)", "system2": "System-2 student (reasons first)"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 only where everything was done."""
    options = _parser().parse_args(arguments)
    try:
        with console.on_stderr(options.json):
            result = options.run(options)
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        return 1
    except KeyboardInterrupt:
        print(
            "Interrupted. Run the same command again: it goes on where it stood. What stood at the output places stands there still.",
            file=sys.stderr,
        )
        return 130
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill_app.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    models = [_add_system1, _add_system2, _add_compare, add_evaluate, add_judge, add_prefer, _add_chat, *PUBLISH_COMMANDS, *RUN_COMMANDS]
    for add in (_add_demo, *DATA_COMMANDS, add_plan, *models, _add_doctor, _add_setup_easydistill, _add_build_micro):
        add(commands).add_argument(
            "--json", action="store_true", help="print the result as JSON on standard output, all else on standard error"
        )
    return parser


def _add_demo(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("demo", help="the whole job on the models and data that ship with the lab; a few minutes on 2 CPU cores")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the data order and the training (default 0)")
    add_fresh(parser)
    parser.set_defaults(run=_demo)
    return parser


def _demo(options) -> dict:
    from .demo import run_demo

    return run_demo(seed=options.seed, fresh=options.fresh)


def _add_system1(commands) -> argparse.ArgumentParser:
    return _add_system(commands, "system1")


def _add_system2(commands) -> argparse.ArgumentParser:
    return _add_system(commands, "system2")


def _add_system(commands, system: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(system, help=f"train the {SYSTEMS[system]} on the prepared rows")
    parser.add_argument("--preset", help=f"settings to start from: a name in configs/presets or a JSON file (default {system})")
    parser.add_argument("--config", metavar="FILE", help="JSON object of settings over the preset")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="one setting over both; may be repeated")
    add_fresh(parser)
    parser.set_defaults(run=_distil, system=system)
    return parser


def _distil(options) -> dict:
    from . import pipeline

    distil = {"system1": pipeline.distill_system1, "system2": pipeline.distill_system2}[options.system]
    settings = user_settings(options.config, options.set, options.preset)
    return {"checkpoint": distil(settings | ({"fresh": True} if options.fresh else {}))}


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


def _add_compare(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("compare", help="show teacher and students side by side; a model that is not there is left out")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a question, asked in both modes")
    parser.add_argument("--prompts-file", metavar="FILE", help='JSON list of texts or {"prompt", "modes": ["system1", "system2"]}')
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct", help="folder or hub name (default Qwen/Qwen2.5-7B-Instruct)")
    parser.add_argument("--system1", default="./distilled-qwen2.5-0.5b", metavar="PATH", help="default ./distilled-qwen2.5-0.5b")
    parser.add_argument("--system2", default="./distilled-qwen2.5-1.5b-cot", metavar="PATH", help="default ./distilled-qwen2.5-1.5b-cot")
    for name, limit in (("teacher", 256), ("sys1", 256), ("sys2", 1024)):
        parser.add_argument(f"--max-tokens-{name}", type=int, default=limit, help=f"limit of an answer (default {limit})")
    add_fresh(parser)
    parser.set_defaults(run=_compare)
    return parser


def _compare(options) -> dict:
    from .compare import compare_models

    prompts = [*options.prompts, *(read_list(options.prompts_file) if options.prompts_file else [])]
    limits = {name: getattr(options, name) for name in ("max_tokens_teacher", "max_tokens_sys1", "max_tokens_sys2")}
    return compare_models(prompts, options.teacher, options.system1, options.system2, **limits, fresh=options.fresh).to_dict()


def _add_chat(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("chat", help="ask a student, or any model, question by question; answers appear as they are written")
    parser.add_argument("path", help="a checkpoint's folder, or a name on the hub")
    parser.add_argument("--mode", choices=("system1", "system2"), help="how to ask (default: as the checkpoint was trained)")
    parser.add_argument("--max-new-tokens", type=int, help="limit of an answer (default 256, 1024 for system2)")
    parser.set_defaults(run=_chat)
    return parser


def _chat(options) -> dict:
    from .chat import chat

    return {"answers": chat(options.path, mode=options.mode, max_new_tokens=options.max_new_tokens)}


def _add_doctor(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("doctor", help="show what this machine has, which backend each job would take, and what is missing")
    parser.set_defaults(run=_doctor)
    return parser


def _doctor(options) -> dict:
    from .doctor import doctor

    return doctor()


def _add_setup_easydistill(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("setup-easydistill", help="fetch EasyDistill into an environment of its own, .easydistill")
    parser.add_argument(
        "majors", nargs="*", type=int, metavar="MAJOR", help="1 trains students (default); 2 makes data with a teacher behind an API"
    )
    parser.add_argument("--with", nargs="+", default=[], dest="extras", metavar="EXTRA", help="vllm, deepspeed: for 1.x jobs of your own")
    parser.set_defaults(run=_setup_easydistill)
    return parser


def _setup_easydistill(options) -> dict:
    from .easydistill import setup_easydistill

    found = setup_easydistill(*options.majors, extras=options.extras)
    if missing := [f"{major}.x" for major, installation in found.items() if installation is None]:
        raise BackendError(f"EasyDistill {' and '.join(missing)} could not be set up; the lines above say why.")
    return {
        f"{major}.x": installation and {"version": installation.version, "home": str(installation.home)}
        for major, installation in found.items()
    }


def _add_build_micro(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("build-micro", help="make the shipped micro world anew: teacher, students and data; minutes long")
    parser.add_argument("--out", default="data/micro", metavar="FOLDER", help="where to (default data/micro)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data (default 0)")
    parser.set_defaults(run=_build_micro)
    return parser


def _build_micro(options) -> dict:
    from .microlab import build_micro

    return build_micro(options.out, seed=options.seed)
