"""Where EasyDistill 1.x works: a *safe folder*, whose path no shell takes apart.

EasyDistill builds shell strings of the paths that it is given and of its own, starts 8 DeepSpeed processes, and reads a model as its
transformers 4.51 does. So the safe folder holds links to its environment, its checkout and the job's rows, the student in the form that its
transformers reads, a job with these paths, and an `accelerate` of ours that starts one process a GPU.
"""

import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import config, engine, faults, models, store
from .easydistill import Installation
from .errors import BackendError, ConfigError

PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
# this machine's, so that another container that shares the folder for temporary files leaves it alone
SAFE_NAME = f"qwen-lab-easydistill-{hashlib.sha256(platform.node().encode()).hexdigest()[:6]}-"
WEIGHTS = "model*.safetensors"
# not handed on: keys, which EasyDistill has no use for, and what would lead its Python, accelerate, wandb or bars elsewhere
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL", re.I)
LEADS_ELSEWHERE = re.compile(
    r"(?:PYTHON|ACCELERATE|WANDB|TQDM|HF_DATASETS|HF_HUB_CACHE|VIRTUAL_ENV|TRANSFORMERS_CACHE)|(?:LOCAL_)?(?:RANK|WORLD_SIZE)$|MASTER_"
)
ACCELERATE = """#!/usr/bin/env python3
import os
import sys

at = sys.argv.index("--config_file")  # EasyDistill's own file asks for DeepSpeed on 8 processes
settings = {settings!r}
os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", *settings, *sys.argv[at + 2 :]])
"""


# The student, as transformers 4.51 reads it


def translated_config(settings: dict) -> dict:
    """A model's config.json, as transformers 5 or 4 wrote it, in the words of transformers 4.51.

    In: {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}; out: {"rope_theta": 1e6, "torch_dtype":
    "bfloat16"}. Read as it is, 4.51 would take its own rope_theta, 10,000, and say nothing.
    Raises ConfigError for what 4.51 cannot be told.
    """
    renamed = {
        {"dtype": "torch_dtype"}.get(key, key): value for key, value in settings.items() if key not in ("auto_map", "rope_parameters")
    }
    rope = dict(settings.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("the student has RoPE of its own for each kind of layer, which EasyDistill's transformers does not know.")
    moved = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        moved["rope_scaling"] = rope
    return {**renamed, **moved}


def write_student(student: Path, folder: Path) -> None:
    """The student for EasyDistill: its weights by links, its configuration in 4.51's words, and of its tokenizer what a padded batch needs.

    The rows are tokenized already. Generation settings are left out: 4.51 refuses to save some that 5 accepts.
    """
    with faults.naming_full_disk(folder):
        folder.mkdir()
        for file in [*student.glob(WEIGHTS), *student.glob("model.safetensors.index.json")]:
            (folder / file.name).symlink_to(file.resolve())
    store.write_json(folder / "config.json", translated_config(store.read_json(student / "config.json")))
    tokenizer = models.load_tokenizer(str(student))
    with faults.naming_full_disk(folder / "tokenizer.json"):
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    store.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


# The safe folder


@contextmanager
def safe_folder(job: dict, work: Path, installation: Installation, training: dict, processes: int) -> Iterator[Path]:
    """Yield the folder that EasyDistill works in, its job in `job.json`; it is gone afterwards.

    work      where the checkpoint and the caches really lie: its `out` and `cache`
    training  the job's block as EasyDistill gets it, without `output_dir`
    """
    # hexadecimal: transformers takes a model whose configuration is missing for one that is named in its path, such as t5
    place = _plain_folder() / f"{SAFE_NAME}{os.getpid()}-{secrets.token_hex(8)}"
    with store.cannot_write(place):
        place.mkdir(mode=0o700)
    try:
        links = {"env": environment_of(installation), "home": installation.home, "out": work / "out", "cache": work / "cache"}
        links |= {"tokens.json": job["dataset"]["labeled_path"], "template.jinja": config.TEMPLATE}
        with faults.naming_full_disk(place):
            for name, target in links.items():
                (place / name).symlink_to(Path(target).absolute())
        write_student(models.local_folder(job["models"]["student"]), place / "student")
        _write_accelerate(place / "bin" / "accelerate", processes)
        dataset = {"labeled_path": "tokens.json", "template": "template.jinja"}
        made = {
            "job_type": job["job_type"],
            "dataset": {key: str(place / name) for key, name in dataset.items()} | {"seed": job["dataset"].get("seed", 0)},
            "models": {"student": str(place / "student")},
            "training": {**training, "output_dir": str(place / "out")},
        }
        store.write_json(place / "job.json", made)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _plain_folder() -> Path:
    """A folder for temporary files whose path no shell takes apart; what killed runs left there is removed."""
    for place in (tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if PLAIN.fullmatch(place) and os.access(place, os.W_OK):
            _sweep(Path(place))
            return Path(place)
    raise BackendError(
        f"EasyDistill needs a folder for temporary files whose path is plain ({PLAIN.pattern}); {tempfile.gettempdir()} is none. "
        "Set TMPDIR to such a folder."
    )


def _sweep(place: Path) -> None:
    for left in place.glob(f"{SAFE_NAME}*"):
        pid = left.name.removeprefix(SAFE_NAME).split("-")[0]
        if pid.isdigit() and not store.is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def environment_of(installation: Installation) -> Path:
    """The folder of an installation's environment."""
    return installation.python.parent.parent


def _write_accelerate(place: Path, processes: int) -> None:
    settings = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with store.cannot_write(place):
        place.parent.mkdir()
        place.write_text(ACCELERATE.format(settings=settings + (["--multi_gpu"] if processes > 1 else [])), encoding="utf-8")
        place.chmod(0o700)


def training_for(job: dict, precision: str, gpu: bool) -> dict:
    """The job's training block as EasyDistill's trl 0.17 gets it.

    No checkpoint on the way: nothing resumes from one there. Where the two trl's defaults differ, the built-in engine's are set.
    """
    dropped = ("save_strategy", "save_steps", "output_dir")
    defaults = {"completion_only_loss": True, "logging_steps": 10, "optim": "adamw_torch_fused", "report_to": "none"}
    fixed = {"save_strategy": "no", "disable_tqdm": False, "bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": not gpu}
    fixed |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if job["training"].get("gradient_checkpointing") else {}
    return {**defaults, **{key: value for key, value in job["training"].items() if key not in dropped}, **fixed}


def environment_variables(place: Path, processes: int) -> dict:
    """EasyDistill's environment variables: the lab's own without keys, everything of Python and of caches within the safe folder."""
    kept = {name: value for name, value in engine.child_environment().items() if not (SECRET.search(name) or LEADS_ELSEWHERE.match(name))}
    search = os.pathsep.join([str(place / "bin"), str(place / "env" / "bin"), kept.get("PATH", os.defpath)])
    several = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"]} if processes > 1 else {}
    ours = {
        "PATH": search,
        "PYTHONPATH": str(place / "home"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    return {**kept, **several, **ours, "HF_HOME": str(place / "cache"), "TOKENIZERS_PARALLELISM": "false"}


def processes_for(gpu: bool) -> tuple[int, str]:
    """How many processes train, and why: one, or one for each GPU where the user names several."""
    named = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if gpu and len(named) > 1:
        return len(named), "CUDA_VISIBLE_DEVICES names so many GPUs; each takes a batch of its own"
    return 1, "one GPU" if gpu else "no GPU is visible"
