"""A user's settings ↔ an EasyDistill 1.0 job: every problem gathered and shown at once, unknown keys refused.

The shipped presets (`configs/presets/*.json`) are the one place where defaults stand; a user's own settings go over them. A job is
the nested JSON that `easydistill --config` and the built-in engine both read, all paths absolute.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import store
from .errors import ConfigError, DataError, did_you_mean

PRESETS = store.ROOT / "configs" / "presets"
TEMPLATE = store.ROOT / "configs" / "easydistill_template.jinja"
JOB_TYPES = ("kd_black_box_train_only",)
BACKENDS = ("auto", "easydistill", "builtin")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt")
# one decision under two names: where you say one, the preset's gives way
ALTERNATIVES = (("warmup_ratio", "warmup_steps"), ("save_strategy", "save_steps"), ("bf16", "fp16"), ("packing", "group_by_length"))
OTHER_NAMES = {"num_epochs": "num_train_epochs", "cot_path": "labeled_path"}
LAB_OPTIMIZERS = ("adamw_bnb_8bit",)  # only the built-in engine has bitsandbytes
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", *LAB_OPTIMIZERS)


@dataclass(frozen=True)
class Setting:
    """One setting's type and range; `why` ends the message when a value lies outside it."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    why: str = ""

    def problem(self, value) -> str | None:
        """What is wrong with a value, or None."""
        accepted = (int, float) if self.kind is float else (self.kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            return f"is no {_KIND_NAMES[self.kind]}.{self._advice()}"
        if self.choices and value not in self.choices:
            return f"is not one of {', '.join(map(str, self.choices))}.{did_you_mean(str(value), map(str, self.choices))}{self._advice()}"
        if self.kind in (int, float) and not self.low <= value <= self.high:
            return f"lies outside {self.low:g} to {self.high:g}.{self._advice()}"
        return None

    def _advice(self) -> str:
        return f" {self.why}" if self.why else ""


_KIND_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_HALF = "Leave it out: the engine chooses by device and says why."

# EasyDistill's `training` block: names as in its trl's SFTConfig; the engine translates those that a newer trl calls otherwise.
TRAINING = {
    "num_train_epochs": Setting(float, 0.001, 1000),
    "max_steps": Setting(int, -1, 10_000_000, why="-1 trains whole epochs."),
    "per_device_train_batch_size": Setting(int, 1, 4096),
    "per_device_eval_batch_size": Setting(int, 1, 4096),
    "gradient_accumulation_steps": Setting(int, 1, 4096),
    "max_length": Setting(int, 2, 1_048_576, why="In tokens; a row needs at least one to ask and one to answer. Set 64 to 4096."),
    "learning_rate": Setting(float, 1e-9, 1, why="Usual: 1e-5 to 5e-5 for full fine-tuning of a pretrained student."),
    "weight_decay": Setting(float, 0, 1),
    "warmup_ratio": Setting(float, 0, 0.99, why="A share of all steps."),
    "warmup_steps": Setting(int, 0, 10_000_000),
    "lr_scheduler_type": Setting(str, choices=SCHEDULERS),
    "optim": Setting(str, choices=OPTIMIZERS),
    "adam_beta1": Setting(float, 0, 0.99999),
    "adam_beta2": Setting(float, 0, 0.99999),
    "adam_epsilon": Setting(float, 1e-12, 1),
    "max_grad_norm": Setting(float, 0, 1e6),
    "label_smoothing_factor": Setting(float, 0, 0.99),
    "neftune_noise_alpha": Setting(float, 0, 1000),
    "gradient_checkpointing": Setting(bool),
    "group_by_length": Setting(bool),
    "bf16": Setting(bool, why=_HALF),
    "fp16": Setting(bool, why=_HALF),
    "completion_only_loss": Setting(bool, choices=(True,), why="The lab supervises the answer alone."),
    "logging_steps": Setting(int, 1, 1_000_000),
    "save_strategy": Setting(str, choices=("epoch", "steps")),
    "save_steps": Setting(int, 1, 10_000_000),
    "save_total_limit": Setting(int, 1, 1000),
    "seed": Setting(int, 0, 2**32 - 1),
    "disable_tqdm": Setting(bool),
    "report_to": Setting(str, choices=("none",), why="Metrics are in the run's folder, metrics.jsonl."),
}
# What only the built-in engine can do: a job's section `lab`; flat names in a user's dict.
LAB = {
    "lora_rank": Setting(int, 0, 4096, why="0 trains every weight; usual for LoRA: 8 to 64."),
    "lora_alpha": Setting(float, 0.001, 65_536, why="Usual: twice lora_rank."),
    "lora_dropout": Setting(float, 0, 0.9),
    "quantize_bits": Setting(int, choices=(0, 4), why="4 holds what LoRA freezes in NF4 (QLoRA); 0 quantizes nothing."),
    "packing": Setting(bool),
    "sample_answers": Setting(int, 0, 5, why="Validation questions answered at every save."),
}
LAB_DEFAULTS = {"lora_rank": 0, "lora_alpha": None, "lora_dropout": 0.0, "quantize_bits": 0, "packing": False, "sample_answers": 3}
OF_LORA = ("lora_alpha", "lora_dropout", "quantize_bits")
LORA_ALPHA_PER_RANK = 2
# What decides how a job is run, and is not part of it.
RUN = {
    "time_limit_minutes": Setting(float, 0.01, 100_000, why="Wall-clock time after which a training is ended; leave it out for none."),
    "fresh": Setting(bool, why="True trains anew, whatever an earlier run left."),
    "fall_back": Setting(bool, why="True has the built-in engine train where EasyDistill fails."),
}
# What a user's dict holds besides the settings of training, lab and run.
USER_KEYS = ("preset", "teacher_model", "student_model", "labeled_path", "out_dir", "config_path", "backend", "template_path", *OTHER_NAMES)
NEEDED = ("student_model", "labeled_path", "out_dir", "config_path", "num_train_epochs", "max_length", "learning_rate", "seed")
JOB_SECTIONS = {
    "dataset": ("instruction_path", "labeled_path", "template", "seed"),
    "models": ("teacher", "student"),
    "training": ("output_dir", *TRAINING),
    "lab": tuple(LAB),
    # A train-only job reads neither; EasyDistill's own job files carry them.
    "inference": (
        "base_url", "enable_chunked_prefill", "enforce_eager", "gpu_memory_utilization", "max_model_len",
        "max_new_tokens", "seed", "stream", "system_prompt", "temperature", "top_logits_num", "trust_remote_code",
    ),
    "distillation": ("distillation_type", "kd_ratio", "max_seq_length"),
}  # fmt: skip
NEEDED_IN_JOB = {"dataset": ("labeled_path",), "models": ("student",), "training": ("output_dir", "max_length", "num_train_epochs")}


@dataclass(frozen=True)
class Settings:
    """A user's settings over a preset, checked.

    values   every setting by its flat name; paths absolute
    origins  where each came from: "yours", "your preset <file>" or "preset <name>"
    notes    what a user should be told about them
    """

    values: dict
    origins: dict
    notes: list = field(default_factory=list)

    @property
    def yours(self) -> set[str]:
        """Names of the settings that a user gave, in a file or not: they are obeyed or refused, never changed."""
        return {name for name, origin in self.origins.items() if origin.startswith("your")}


def resolve(user: Mapping | None, preset: str) -> Settings:
    """Lay a user's settings over a preset and check them all.

    Raises ConfigError that lists every problem at once.
    """
    if not isinstance(user or {}, Mapping):
        raise ConfigError(
            f"The configuration is a {type(user).__name__}; give a dict such as {{'student_model': 'Qwen/Qwen2.5-0.5B-Instruct'}}."
        )
    user = dict(user or {})
    preset = user.pop("preset", None) or preset
    unset = _unknown_keys(key for key, value in user.items() if value is None)
    yours, problems = _one_name_each({key: value for key, value in user.items() if value is not None})
    base, twice = _one_name_each(read_preset(preset))
    values = {**_giving_way(base, yours), **yours}
    origin = f"your preset {preset}" if str(preset).endswith(".json") else f"preset {preset}"
    origins = {key: "yours" if key in yours else origin for key in values}
    problems += twice + unset + _flat_problems(values)
    if not problems:
        values = _with_absolute_paths(values)
        problems = _place_problems(values)
    if problems:
        raise ConfigError.from_problems("your configuration" if user else f"preset {preset}", problems)
    notes = []
    if values.pop("template_path", None):
        origins.pop("template_path")
        notes.append("template_path is not used: the student's own chat template is, in training and asking alike.")
    return Settings(values, origins, notes)


def _one_name_each(settings: dict) -> tuple[dict, list[str]]:
    """Settings under their upstream names; one under both its names is a problem."""
    twice = [(other, name) for other, name in OTHER_NAMES.items() if other in settings and name in settings]
    renamed = {OTHER_NAMES.get(key, key): value for key, value in settings.items()}
    return renamed, [f"{other} and {name} are one setting under two names: give only one." for other, name in twice]


def _giving_way(base: dict, yours: dict) -> dict:
    """A preset's settings without those that yours take the place of; a false one of yours takes no other's place."""
    replaced = {key for together in ALTERNATIVES if any(yours.get(key, False) is not False for key in together) for key in together}
    if yours.get("lora_rank") == 0:
        replaced |= set(OF_LORA)
    return {key: value for key, value in base.items() if key not in replaced}


def read_preset(name: str) -> dict:
    """A preset by its name in `configs/presets`, or by the path of a JSON file."""
    shipped = sorted(path.stem for path in PRESETS.glob("*.json"))
    path = store.resolve(name) if str(name).endswith(".json") else store.resolve(PRESETS / f"{name}.json")
    if not path.is_file():
        raise ConfigError(f"preset = {name!r}: there is no such preset.{did_you_mean(name, shipped)} Shipped: {', '.join(shipped)}.")
    preset = store.read_json(path)
    if not isinstance(preset, dict):
        raise ConfigError(f"{store.shown(path)} holds no JSON object of settings.")
    return preset


def _unknown_keys(keys: Iterable) -> list[str]:
    known = (*USER_KEYS, *TRAINING, *LAB, *RUN)
    return [f"{key}: no such setting.{did_you_mean(key, known)}" for key in keys if key not in known]


def _flat_problems(values: dict) -> list[str]:
    problems = _unknown_keys(values)
    problems += [f"{key}: is needed and has no value." for key in NEEDED if key not in values]
    for key in ("teacher_model", "student_model", "labeled_path", "out_dir", "config_path", "template_path"):
        if key in values and not (isinstance(values[key], str | Path) and str(values[key]).strip()):
            problems.append(f"{key} = {values[key]!r}: is no path or name.")
    if values.get("backend", "auto") not in BACKENDS:
        problems.append(backend_problem(values["backend"]))
    if values.get("fall_back") is True and values.get("backend") == "builtin":
        problems.append("fall_back = True: has no effect under backend = 'builtin'; drop one.")
    problems += _value_problems(values, RUN, prefix="")
    return problems + _training_problems(values, prefix="") + _lab_problems(values, values, prefix="", training_prefix="")


def backend_problem(backend) -> str:
    """What is wrong with a backend that is none of BACKENDS."""
    return f"backend = {backend!r}: is not one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"


def _value_problems(values: dict, settings: dict, prefix: str) -> list[str]:
    found = [(key, settings[key].problem(value)) for key, value in values.items() if key in settings]
    return [f"{prefix}{key} = {values[key]!r}: {what}" for key, what in found if what]


def _training_problems(values: dict, prefix: str) -> list[str]:
    problems = _value_problems(values, TRAINING, prefix)
    if values.get("bf16") is True and values.get("fp16") is True:
        problems.append(f"{prefix}bf16 and {prefix}fp16 are two ways to compute: give only one, or neither.")
    if values.get("warmup_ratio") and values.get("warmup_steps"):
        problems.append(f"{prefix}warmup_ratio and {prefix}warmup_steps are two ways to say one thing: give only one.")
    if values.get("save_strategy") == "epoch" and "save_steps" in values:
        problems.append(f"{prefix}save_steps = {values['save_steps']!r}: has no effect under {prefix}save_strategy = 'epoch'; drop one.")
    if values.get("save_strategy") == "steps" and "save_steps" not in values:
        problems.append(f"{prefix}save_strategy = 'steps' needs {prefix}save_steps.")
    return problems


def _lab_problems(values: dict, training: dict, prefix: str, training_prefix: str) -> list[str]:
    problems = _value_problems(values, LAB, prefix)
    if not values.get("lora_rank"):
        problems += [
            f"{prefix}{key} = {values[key]!r}: has no effect without {prefix}lora_rank; set that too, or drop it."
            for key in OF_LORA
            if values.get(key)
        ]
    if values.get("packing") is True and training.get("group_by_length") is True:
        problems.append(f"{prefix}packing and {training_prefix}group_by_length both decide which rows train together: give only one.")
    return problems


def _with_absolute_paths(values: dict) -> dict:
    paths = {key: str(store.resolve(values[key])) for key in ("labeled_path", "out_dir", "config_path")}
    models = {key: model_name(values[key]) for key in ("teacher_model", "student_model") if key in values}
    return {**values, **paths, **models}


def _place_problems(values: dict) -> list[str]:
    """Places that would overwrite one another; absolute paths."""
    job, out_dir = Path(values["config_path"]), Path(values["out_dir"])
    problems = []
    for name in ("labeled_path", "out_dir"):
        place = Path(values[name])
        if job == place or place in job.parents or (name == "out_dir" and job in place.parents):
            problems.append(f"config_path = {store.shown(job)}: lies in or over {name}. Name another file, such as configs/my_job.json.")
    if out_dir in Path(values["labeled_path"]).parents or out_dir == Path(values["labeled_path"]):
        problems.append(f"out_dir = {store.shown(out_dir)}: holds labeled_path. Name a folder of its own.")
    if store.is_dir(job) or (store.is_file(job) and not _is_job(job)):
        problems.append(f"config_path = {store.shown(job)}: something stands there that is no job file. Name another place.")
    return problems


def _is_job(path: Path) -> bool:
    try:
        job = store.read_json(path)
    except DataError:
        return False
    return isinstance(job, dict) and "job_type" in job


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `owner/model` (or `model`) of the hub, and no such folder lies here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)) and not store.is_dir(store.resolve(name))


def model_name(name: str | Path) -> str:
    """A model's hub name as it is, or its folder's absolute path."""
    return str(name) if is_hub_name(str(name)) else str(store.resolve(name))


def build_job(settings: Settings, tokenized_path: Path) -> dict:
    """The EasyDistill 1.0 job of checked settings; `tokenized_path` is the run's own tokenized file."""
    values = settings.values
    training = {"output_dir": values["out_dir"], **{key: values[key] for key in TRAINING if key in values}}
    models = {"teacher": values.get("teacher_model"), "student": values["student_model"]}
    lab = {key: values[key] for key, unused in LAB_DEFAULTS.items() if values.get(key, unused) != unused}
    return {
        "job_type": JOB_TYPES[0],
        "dataset": {
            "instruction_path": values["labeled_path"],
            "labeled_path": str(tokenized_path),
            "template": str(TEMPLATE),
            "seed": values["seed"],
        },
        "models": {key: name for key, name in models.items() if name},
        "training": training,
        **({"lab": lab} if lab else {}),
    }


def split_of(training: Mapping) -> tuple[int, int]:
    """How a step's rows are split: rows at a time, and how many times; what settings leave out is transformers' default."""
    return training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)


def lab_settings(job: dict) -> dict:
    """A job's `lab` section with what it leaves out: every key of LAB, `lora_rank` 0 where all weights are trained."""
    settings = {**LAB_DEFAULTS, **job.get("lab", {})}
    if settings["lora_alpha"] is None:
        settings["lora_alpha"] = LORA_ALPHA_PER_RANK * settings["lora_rank"]
    return settings


def read_job(path: str | Path) -> dict:
    """Read and check a job file. Raises ConfigError that lists every problem at once."""
    job = store.read_json(path)
    problems = job_problems(job)
    if problems:
        raise ConfigError.from_problems(store.shown(path), problems)
    return job


def job_problems(job) -> list[str]:
    """Everything that is wrong with a job, each with its place in the file."""
    if not isinstance(job, dict):
        return ["it is no JSON object."]
    problems = []
    if job.get("job_type") not in JOB_TYPES:
        problems.append(f"job_type = {job.get('job_type')!r}: is not one of {', '.join(JOB_TYPES)}.")
    problems += [
        f"{key}: no such section.{did_you_mean(key, JOB_SECTIONS)}" for key in job if key != "job_type" and key not in JOB_SECTIONS
    ]
    for section, known in JOB_SECTIONS.items():
        block = job.get(section)
        if not isinstance(block, dict):
            if section in job or section in NEEDED_IN_JOB:
                problems.append(f"{section}: is missing or no JSON object.")
            continue
        problems += [f"{section}.{key}: no such setting.{did_you_mean(key, known)}" for key in block if key not in known]
        problems += [
            f"{section}.{key}: is needed and has no value." for key in NEEDED_IN_JOB.get(section, ()) if block.get(key) in (None, "")
        ]
    models = _section(job, "models")
    problems += [f"models.{key} = {models[key]!r}: is no path or name." for key in models if not isinstance(models[key], str | None)]
    training, lab = _section(job, "training"), _section(job, "lab")
    problems += _path_problems(job) + _training_problems(training, prefix="training.")
    return problems + _lab_problems(lab, training, prefix="lab.", training_prefix="training.")


def _path_problems(job: dict) -> list[str]:
    places = [("dataset", key) for key in ("instruction_path", "labeled_path", "template")] + [("training", "output_dir")]
    named = [(f"{section}.{key}", _section(job, section).get(key)) for section, key in places]
    return [f"{name} = {path!r}: must be an absolute path." for name, path in named if path and not Path(str(path)).is_absolute()]


def _section(job: dict, name: str) -> dict:
    block = job.get(name)
    return block if isinstance(block, dict) else {}
