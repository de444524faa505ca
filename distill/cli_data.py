"""The commands that make data, or have a model judge it: each adds its arguments to the command line's parser."""

import argparse
from dataclasses import asdict

from . import store
from .errors import ConfigError

ASKING = ("key_variable", "chunk_rows", "workers")


def _add_prepare_system1(commands) -> argparse.ArgumentParser:
    from .data import DISTILQWEN

    parser = commands.add_parser("prepare-system1", help="make the labelled rows that System 1 is trained on")
    _add_source(parser, DISTILQWEN, "train[:1000]", "instruction=question,output=answer")
    parser.add_argument("--rows", type=int, help="how many rows to keep (default: all that are read)")
    parser.add_argument("--teacher", help="teacher for --relabel: a folder or a name on the hub")
    parser.add_argument("--relabel", nargs="?", const=True, default=False, type=int, metavar="N", help="relabel all rows, or the first N")
    parser.add_argument("--out-instructions", default="data/train_instructions.json", metavar="FILE")
    parser.add_argument("--out-labeled", default="data/train_labeled.json", metavar="FILE")
    parser.set_defaults(run=_prepare_system1)
    return parser


def add_fresh(parser: argparse.ArgumentParser) -> None:
    """`--fresh`, for the commands that else take up what an earlier run left."""
    parser.add_argument("--fresh", action="store_true", help="do it all anew; else what is finished stays, and what was cut short goes on")


def _add_source(parser: argparse.ArgumentParser, source: str, rows: str, columns: str) -> None:
    """What both preparations read from."""
    parser.add_argument("--source", default=source, help=f"hub dataset, or JSON, JSONL or Parquet file or folder (default {source})")
    parser.add_argument("--mix", metavar="FILE", help="instead: a JSON list of {source, columns, weight, slice} to mix")
    parser.add_argument("--slice", default=rows, help=f"source rows to read: train, train[:1000], train[10%%:20%%] (default {rows})")
    parser.add_argument("--columns", metavar="FIELD=COLUMN,…", help=f"e.g. {columns}")
    parser.add_argument("--validation", type=float, default=0.05, help="share of the rows split off for validation (default 0.05)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the split and of a mixture (default 42)")
    add_fresh(parser)


def _prepare_system1(options) -> dict:
    from .data import prepare_system1_dataset

    prepared = prepare_system1_dataset(
        options.slice,
        source=read_list(options.mix) if options.mix else options.source,
        columns=_columns(options.columns),
        rows=options.rows,
        validation=options.validation,
        teacher_model=options.teacher,
        relabel_with_teacher=options.relabel,
        seed=options.seed,
        out_instructions=options.out_instructions,
        out_labeled=options.out_labeled,
        fresh=options.fresh,
    )
    return asdict(prepared)


def _add_prepare_system2(commands) -> argparse.ArgumentParser:
    from .traces import OMNITHOUGHT

    parser = commands.add_parser("prepare-system2", help="choose the traces that System 2 is trained on")
    _add_source(parser, OMNITHOUGHT, "train[:20000]", "instruction=problem,output=trace,rv=verbosity,cd=difficulty")
    parser.add_argument("--rows", type=int, default=2000, help="how many rows to keep; reading stops there (default 2000)")
    for bound, meaning in (("rv", "reasoning verbosity"), ("cd", "cognitive difficulty")):
        parser.add_argument(f"--{bound}-min", type=float, default=0, help=f"least {meaning}, a level from 0 to 9 (default 0)")
        parser.add_argument(f"--{bound}-max", type=float, default=9, help=f"greatest {meaning} (default 9)")
    parser.add_argument("--long-share", type=float, help="share of rows whose trace is long, RV 6 or more (default: as they come)")
    parser.add_argument(
        "--student",
        default="Qwen/Qwen2.5-1.5B-Instruct",
        metavar="NAME",
        help="whose tokenizer counts tokens (default Qwen2.5-1.5B-Instruct)",
    )
    parser.add_argument("--max-length", type=int, default=4096, help="tokens; a longer trace is not taken, none is cut (default 4096)")
    parser.add_argument("--out", default="data/omnithought_cot.json", metavar="FILE")
    parser.set_defaults(run=_prepare_system2)
    return parser


def _prepare_system2(options) -> dict:
    from .traces import prepare_system2_dataset

    prepared = prepare_system2_dataset(
        options.slice,
        source=read_list(options.mix) if options.mix else options.source,
        columns=_columns(options.columns),
        rows=options.rows,
        rv_min=_level(options.rv_min),
        rv_max=_level(options.rv_max),
        cd_min=_level(options.cd_min),
        cd_max=_level(options.cd_max),
        long_share=options.long_share,
        student_model=options.student,
        max_length=options.max_length,
        validation=options.validation,
        seed=options.seed,
        out_cot=options.out,
        fresh=options.fresh,
    )
    return asdict(prepared)


def _level(number: float) -> float:
    """A whole number as such: 1 is a level, where 1.0 might be meant as a share."""
    return int(number) if float(number).is_integer() else number


def _add_label(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("label", help="let a teacher answer the rows of a file; goes on where an interrupted run stood")
    parser.add_argument("source", metavar="FILE", help="JSON list or JSON lines of rows with an instruction")
    parser.add_argument("--teacher", required=True, help="a folder or a name on the hub")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the labelled rows go")
    _add_teachers_place(parser)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16, 32), help="of a local teacher's weights (default 8)")
    parser.add_argument(
        "--mode", default="system1", choices=("system1", "system2"), help="system2 asks for reasoning first (default system1)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="an answer cut off there is dropped (default 256, 1024 for system2)")
    parser.add_argument("--batch-size", type=int, help="questions a batch (default: as many as fit a budget of tokens)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="when sampling (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="when sampling (default 0)")
    add_fresh(parser)
    parser.set_defaults(run=_label)
    return parser


def _add_teachers_place(parser: argparse.ArgumentParser) -> None:
    """Where a teacher that need not be loaded here is to be found."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--endpoint", metavar="URL", help="the teacher is behind this OpenAI-compatible API, e.g. http://127.0.0.1:8000/v1")
    where.add_argument("--serve", action="store_true", help="the lab serves the teacher itself, and EasyDistill 2 asks it")
    _add_asking(parser)
    parser.add_argument("--prompt-file", metavar="FILE", help="text with {instruction} that asks for reasoning, for an endpoint's system2")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    """How an endpoint is asked."""
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the API's key (default OPENAI_API_KEY)")
    parser.add_argument("--chunk-rows", type=int, help="rows asked at a time, at most (default 32)")
    parser.add_argument("--workers", type=int, help="questions under way at the same time (default 8)")


def _teacher(options):
    """The teacher that the options name: a folder or hub name, or an endpoint."""
    if options.endpoint or options.serve:
        if getattr(options, "bits", None):
            raise ConfigError("--bits is for a teacher that is loaded here; one behind an API keeps its own precision. Leave it out.")
        return _endpoint(options, options.teacher)
    if given := [f"--{name.replace('_', '-')}" for name in ("prompt_file", *ASKING) if getattr(options, name) is not None]:
        raise ConfigError(f"{' and '.join(given)}: for a teacher behind an API; give --endpoint or --serve too.")
    return options.teacher


def _endpoint(options, model: str):
    from .endpoint import Endpoint

    asked = {name: value for name in ASKING if (value := getattr(options, name)) is not None}
    return Endpoint(model, options.endpoint, prompt_file=getattr(options, "prompt_file", None), **asked)


def _label(options) -> dict:
    from .generation import token_limit
    from .label import label_file

    settings = {name: getattr(options, name) for name in ("mode", "batch_size", "temperature", "top_p", "seed", "fresh")}
    settings |= {"bits": options.bits} if options.bits else {}
    settings["max_new_tokens"] = token_limit(options.max_new_tokens, options.mode)
    return _labeled(label_file(options.source, _teacher(options), options.out, **settings), options.out)


def _labeled(labeled, out: str) -> dict:
    return {"path": str(store.resolve(out)), "rows": len(labeled.rows), "dropped": labeled.dropped, "reused": labeled.reused}


def _add_traces(commands) -> argparse.ArgumentParser:
    from .traces import OMNITHOUGHT

    parser = commands.add_parser("traces", help="let a teacher of your own reason about a data set's questions, for prepare-system2")
    parser.add_argument("--teacher", required=True, help="a folder or a name on the hub; with --endpoint, its name there")
    _add_teachers_place(parser)
    parser.add_argument(
        "--source", default=OMNITHOUGHT, help=f"hub dataset, or JSON, JSONL or Parquet file or folder (default {OMNITHOUGHT})"
    )
    parser.add_argument("--slice", default="train[:20000]", help="source rows to read (default train[:20000])")
    parser.add_argument("--columns", metavar="FIELD=COLUMN,…", help="e.g. instruction=problem")
    parser.add_argument("--rows", type=int, default=2000, help="how many questions to ask (default 2000)")
    parser.add_argument("--max-new-tokens", type=int, help="limit of reasoning and answer together (default 1024)")
    parser.add_argument("--out", default="data/teacher_traces.json", metavar="FILE")
    add_fresh(parser)
    parser.set_defaults(run=_traces)
    return parser


def _traces(options) -> dict:
    from .generation import token_limit
    from .own_traces import write_traces

    asked = {"slice_str": options.slice, "source": options.source, "columns": _columns(options.columns), "rows": options.rows}
    limit = token_limit(options.max_new_tokens, "system2")
    return {"path": write_traces(_teacher(options), **asked, max_new_tokens=limit, out=options.out, fresh=options.fresh)}


def _add_score(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "score", help="let a judge say of each trace how verbose (RV) and difficult (CD) it is, and whether it is right"
    )
    return _add_changing(parser, _score)


def _add_shorten(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("shorten", help="let a teacher rewrite each trace's reasoning to a shorter one")
    parser.add_argument("--prompt-file", metavar="FILE", help="text with {instruction}, {reasoning} and {solution}")
    return _add_changing(parser, _shorten)


def _add_changing(parser: argparse.ArgumentParser, run) -> argparse.ArgumentParser:
    """What works on a file of traces by way of a model behind an API."""
    parser.add_argument("source", metavar="FILE", help="JSON list or JSON lines of rows with an instruction and a trace")
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where the rows go")
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="who is asked: its name at the endpoint; without one a folder or hub name")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible API; without it the lab serves the model itself")
    _add_asking(parser)
    parser.add_argument("--max-new-tokens", type=int, help="limit of what it says at a time (default 512; 2048 for shorten)")


def _limit(options) -> dict:
    return {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}


def _score(options) -> dict:
    from .trace_tools import score_traces

    return _labeled(score_traces(options.source, options.out, _endpoint(options, options.model), **_limit(options)), options.out)


def _shorten(options) -> dict:
    from .trace_tools import shorten_traces

    asked = {"prompt_file": options.prompt_file, **_limit(options)}
    options.prompt_file = None  # it is the rewriting's, not the endpoint's
    return _labeled(
        shorten_traces(options.source, options.out, _endpoint(options, options.model), **asked),
        options.out,
    )


def add_judge(commands) -> argparse.ArgumentParser:
    """`judge`: scores of answers."""
    parser = commands.add_parser("judge", help="let a model score the answers of teacher and students")
    parser.add_argument("answers", metavar="FILE", help="a comparison.json of compare, or rows {model, mode, instruction, output}")
    _add_model(parser)
    parser.add_argument("--out", default="reports/judge.json", metavar="FILE")
    parser.set_defaults(run=_judge)
    return parser


def _judge(options) -> dict:
    from .judge import judge

    return judge(options.answers, _endpoint(options, options.model), out=options.out, **_limit(options))


def add_prefer(commands) -> argparse.ArgumentParser:
    """`prefer`: pairs of answers, each judged in both orders."""
    parser = commands.add_parser("prefer", help="let a model say whose answers are better, the teacher's or the student's; both orders")
    parser.add_argument("report", metavar="FILE", help="report.json of evaluate, to which the result is added")
    parser.add_argument("--mode", choices=("system1", "system2"), help="whose answers (default: the first system of the report)")
    _add_model(parser)
    parser.add_argument("--out", default="reports/preference.json", metavar="FILE")
    parser.set_defaults(run=_prefer)
    return parser


def _prefer(options) -> dict:
    from .preference import prefer

    return prefer(options.report, _endpoint(options, options.model), mode=options.mode, out=options.out, **_limit(options))


def read_list(path: str) -> list:
    """A JSON list from a file. Raises ConfigError for another value."""
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


DATA_COMMANDS = (_add_prepare_system1, _add_prepare_system2, _add_label, _add_traces, _add_score, _add_shorten)
