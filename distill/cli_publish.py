"""The commands that give a checkpoint to others: `card`, `push`, `export`, `serve`."""

import argparse


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a checkpoint's folder")


def _add_card_facts(parser: argparse.ArgumentParser) -> None:
    """What a card says besides what the checkpoint knows."""
    parser.add_argument("--evaluation", metavar="FILE", help="report.json of `evaluate` whose scores the card shows (default: none)")
    parser.add_argument("--license", metavar="ID", help="e.g. apache-2.0 (default: the base model's where it is known, else other)")


def _add_card(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("card", help="write a checkpoint's model card, README.md, with the metadata that the hub reads")
    _add_path(parser)
    _add_card_facts(parser)
    parser.add_argument("--out", metavar="FILE", help="where to (default README.md in the checkpoint)")
    parser.set_defaults(run=_card)
    return parser


def _card(options) -> dict:
    from .card import write_model_card
    from .console import say

    written = write_model_card(options.path, options.evaluation, license=options.license, out=options.out)
    say(f"card: {written}")
    return {"card": written}


def _add_push(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("push", help="show what would go to the hub, a private repository; with --yes, send it")
    _add_path(parser)
    parser.add_argument("repo_id", metavar="REPO", help="owner/name on the hub")
    _add_card_facts(parser)
    parser.add_argument("--public", action="store_true", help="everybody may read it (default: private)")
    parser.add_argument("--yes", action="store_true", help="send it (default: only show what would be sent)")
    parser.set_defaults(run=_push)
    return parser


def _push(options) -> dict:
    from .publish import push_to_hub

    facts = {"evaluation": options.evaluation, "license": options.license}
    return push_to_hub(options.path, options.repo_id, private=not options.public, dry_run=not options.yes, **facts)


def _add_export(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("export", help="write a checkpoint in 8 or 4 bits or as GGUF, with its scores before and after")
    _add_path(parser)
    parser.add_argument("--bits", required=True, choices=("8", "4", "gguf"), help="8: LLM.int8, 4: NF4, gguf: by llama.cpp, in 16 bits")
    parser.add_argument("--questions", metavar="FILE", help="held-out questions to score both by (default: no scores)")
    parser.add_argument("--out", metavar="FOLDER", help="where to (default PATH-int8, PATH-nf4, PATH-gguf)")
    parser.set_defaults(run=_export)
    return parser


def _export(options) -> dict:
    from .publish import export_with_scores

    bits = int(options.bits) if options.bits.isdecimal() else options.bits
    return export_with_scores(options.path, bits, options.questions, out=options.out)


def _add_serve(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("serve", help="serve a checkpoint behind OpenAI's protocol until Ctrl-C")
    _add_path(parser)
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; anything but the default lets others ask, without a key")
    parser.set_defaults(run=_serve)
    return parser


def _serve(options) -> dict:
    from .publish import serve

    return serve(options.path, port=options.port, host=options.host)


PUBLISH_COMMANDS = (_add_card, _add_push, _add_export, _add_serve)
