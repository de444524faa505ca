"""The lab's public API and its command line: `python distill_app.py --help`.

>>> import distill_app
>>> distill_app.distill_system1({"preset": "micro_system1"})        # doctest: +SKIP
'…/distilled-micro-system1'
"""

from distill.data import Prepared, prepare_system1_dataset
from distill.errors import BackendError, ConfigError, DataError, DistillError, PreflightError
from distill.pipeline import distill_system1, run_easy_distill, write_system1_config
from distill.prompt import format_prompt
from distill.train import TrainResult

__all__ = [
    "BackendError",
    "ConfigError",
    "DataError",
    "DistillError",
    "PreflightError",
    "Prepared",
    "TrainResult",
    "distill_system1",
    "format_prompt",
    "prepare_system1_dataset",
    "run_easy_distill",
    "write_system1_config",
]

if __name__ == "__main__":
    import sys

    from distill.cli import main

    sys.exit(main())
