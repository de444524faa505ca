"""The lab's public API and its command line: `python distill_app.py --help`.

>>> import distill_app
>>> distill_app.distill_system1({"preset": "micro_system1"})        # doctest: +SKIP
'…/distilled-micro-system1'
"""

from importlib import import_module

from distill.chat import chat
from distill.compare import Comparison, compare_models
from distill.data import prepare_system1_dataset
from distill.doctor import doctor
from distill.easydistill import setup_easydistill
from distill.endpoint import Endpoint
from distill.environment import setup_engine
from distill.errors import BackendError, ConfigError, DataError, DistillError, PreflightError
from distill.generation import infer_student
from distill.judge import judge
from distill.label import label_with_teacher
from distill.models import load_student, load_teacher
from distill.notebook import (
    ask_student,
    choose_models,
    plot_loss,
    prepare_heldout,
    setup_lab,
    show_memory,
    show_training_row,
    trace_arguments,
)
from distill.own_traces import write_traces
from distill.persist import persist_to, wait_for_copies
from distill.pipeline import distill_system1, distill_system2, run_easy_distill, write_system1_config, write_system2_config
from distill.planning import plan
from distill.preparation import Prepared
from distill.prompt import format_prompt
from distill.trace_tools import score_traces, shorten_traces
from distill.traces import prepare_system2_dataset
from distill.train import TrainResult

# What comes behind a training is imported when it is first asked for: importing the lab must not wait for it.
_LATER = {
    "Evaluation": "report",
    "compare_runs": "registry",
    "evaluate_student": "evaluate",
    "export_with_scores": "publish",
    "list_runs": "registry",
    "prefer": "preference",
    "push_to_hub": "publish",
    "rate_answers": "rating",
    "run_benchmarks": "harness",
    "run_sweep": "sweep",
    "serve": "publish",
    "write_model_card": "card",
}


def __getattr__(name: str):
    """One of `_LATER` (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"distill.{_LATER[name]}"), name)


__all__ = [
    *_LATER,
    "BackendError",
    "Comparison",
    "ConfigError",
    "DataError",
    "DistillError",
    "Endpoint",
    "PreflightError",
    "Prepared",
    "TrainResult",
    "ask_student",
    "chat",
    "choose_models",
    "compare_models",
    "distill_system1",
    "distill_system2",
    "doctor",
    "format_prompt",
    "infer_student",
    "judge",
    "label_with_teacher",
    "load_student",
    "load_teacher",
    "persist_to",
    "plan",
    "plot_loss",
    "prepare_heldout",
    "prepare_system1_dataset",
    "prepare_system2_dataset",
    "run_easy_distill",
    "score_traces",
    "setup_easydistill",
    "setup_engine",
    "setup_lab",
    "shorten_traces",
    "show_memory",
    "show_training_row",
    "trace_arguments",
    "wait_for_copies",
    "write_system1_config",
    "write_system2_config",
    "write_traces",
]

if __name__ == "__main__":
    import sys

    from distill.cli import main

    sys.exit(main())
