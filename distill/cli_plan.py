"""The command `plan`: what fits where, with which settings, in how many minutes."""

import argparse

from .console import console

PRESETS = ("system1", "system2")


def add_plan(commands) -> argparse.ArgumentParser:
    """Add the command; returns its parser."""
    parser = commands.add_parser("plan", help="each stage's settings, memory and minutes on T4, L4, A100, H100, H200 and this machine")
    parser.add_argument(
        "--preset", nargs=2, default=PRESETS, metavar=("SYSTEM1", "SYSTEM2"), help="settings to plan for (default system1 system2)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="this GPU alone, e.g. T4")
    parser.set_defaults(run=_plan)
    return parser


def _plan(options) -> dict:
    from .planning import plan

    first, second = ({"preset": name} for name in options.preset)
    found = plan(first, second, gpu=options.gpu)
    console.print(repr(found), markup=False)
    return found.to_dict()
