"""The lab's public API and its command line: `python distill_app.py --help`.

>>> import distill_app
>>> distill_app.distill_system1({"preset": "micro_system1"})        # doctest: +SKIP
'…/distilled-micro-system1'
"""

from distill.card import write_model_card
from distill.chat import chat
from distill.compare import Comparison, compare_models
from distill.data import prepare_system1_dataset
from distill.doctor import doctor
from distill.easydistill import setup_easydistill
from distill.endpoint import Endpoint
from distill.environment import setup_engine
from distill.errors import BackendError, ConfigError, DataError, DistillError, PreflightError
from distill.evaluate import evaluate_student
from distill.generation import infer_student
from distill.harness import run_benchmarks
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
from distill.preference import prefer
from distill.preparation import Prepared
from distill.prompt import format_prompt
from distill.publish import export_with_scores, push_to_hub, serve
from distill.rating import rate_answers
from distill.registry import compare_runs, list_runs
from distill.report import Evaluation
from distill.sweep import run_sweep
from distill.trace_tools import score_traces, shorten_traces
from distill.traces import prepare_system2_dataset
from distill.train import TrainResult

__all__ = [
    "BackendError",
    "Comparison",
    "ConfigError",
    "DataError",
    "DistillError",
    "Endpoint",
    "Evaluation",
    "PreflightError",
    "Prepared",
    "TrainResult",
    "ask_student",
    "chat",
    "choose_models",
    "compare_models",
    "compare_runs",
    "distill_system1",
    "distill_system2",
    "doctor",
    "evaluate_student",
    "export_with_scores",
    "format_prompt",
    "infer_student",
    "judge",
    "label_with_teacher",
    "list_runs",
    "load_student",
    "load_teacher",
    "persist_to",
    "plan",
    "plot_loss",
    "prefer",
    "prepare_heldout",
    "prepare_system1_dataset",
    "prepare_system2_dataset",
    "push_to_hub",
    "rate_answers",
    "run_benchmarks",
    "run_easy_distill",
    "run_sweep",
    "score_traces",
    "serve",
    "setup_easydistill",
    "setup_engine",
    "setup_lab",
    "shorten_traces",
    "show_memory",
    "show_training_row",
    "trace_arguments",
    "wait_for_copies",
    "write_model_card",
    "write_system1_config",
    "write_system2_config",
    "write_traces",
]

if __name__ == "__main__":
    import sys

    from distill.cli import main

    sys.exit(main())
