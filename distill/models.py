"""Load a tokenizer, a teacher or a student, knowing before whether they are there.

A model plays one of two roles: a student is loaded in fp32, to be trained; a teacher only answers, in as many bits as asked.
"""

import logging
from pathlib import Path

from . import prompt, store
from .config import is_hub_name, model_name
from .errors import ConfigError, shortened

EXAMPLES = {"student": "Qwen/Qwen2.5-0.5B-Instruct", "teacher": "Qwen/Qwen2.5-7B-Instruct"}
BITS = (4, 8, 16, 32)
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # no code, no pickles
RUN_RECORD = "distill_run.json"  # the seal of a checkpoint of the lab
BF16_CAPABILITY = (8, 0)  # what computes bf16 itself; torch.cuda.is_bf16_supported says yes to a T4 too, which imitates it slowly


def check_student(name: str):
    """Make sure that a student can be loaded, without loading its weights. Returns its tokenizer.

    name  a folder, or a name on the hub
    Raises ConfigError: `Invalid student model: …`, or `Cannot reach the hub for …`, which blames nobody.
    """
    return check_model(name, "student")


def check_model(name: str, role: str):
    """`check_student` for either role ("student" or "teacher"): the message names the role."""
    if not is_hub_name(name):
        missing = missing_in_folder(Path(name))
        if missing:
            raise _invalid(name, role, missing)
    elif not _is_cached(name):
        info = hub_info("model", name, role)
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
            raise _invalid(name, role, "it has no safetensors weights.")
    return load_tokenizer(name, role)


def missing_in_folder(folder: Path) -> str | None:
    """What a model folder lacks, in words; None where it is complete."""
    if not store.is_dir(folder):
        return "there is no such folder, and it is no name on the hub."
    if not store.is_file(folder / "config.json"):
        return "the folder holds no config.json."
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return "the folder holds no weights (model.safetensors)."
    if not any(store.is_file(folder / file) for file in ("tokenizer.json", "tokenizer_config.json")):
        return "the folder holds no tokenizer."
    return next((f"{file.name} holds no readable weights." for file in weights if not _is_safetensors(file)), None)


def _is_safetensors(file: Path) -> bool:
    """Whether a weights file's header can be read and its length is what the header says; no weight is loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in weights)


def _invalid(name: str, role: str, why: str) -> ConfigError:
    return ConfigError(f"Invalid {role} model: {name}: {why} Example: {EXAMPLES[role]}")


def hub_info(kind: str, name: str, role: str = "student"):
    """What the hub knows of a model or dataset.

    kind  "model" or "dataset"
    role  what a model is wanted as, for the message
    Raises ConfigError: not there, closed to this user, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=20)
    except GatedRepoError as error:
        raise ConfigError(f"{name} is gated: accept its terms on its hub page, then set HF_TOKEN.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "the hub knows no such name (or it is private and HF_TOKEN is not set)."
        raise (_invalid(name, role, why) if kind == "model" else ConfigError(f"No dataset {name}: {why}")) from error
    except Exception as error:
        raise cannot_reach_hub(name, error) from error


def cannot_reach_hub(name: str, error: Exception) -> ConfigError:
    """The message for a hub that does not answer."""
    return ConfigError(
        f"Cannot reach the hub for {name}: {shortened(error, 120)}. "
        "Check the network, or give the path of a folder that is on this machine (the shipped micro world needs no hub)."
    )


def local_folder(name: str) -> Path:
    """A model's folder; one on the hub is downloaded first, without code and pickles."""
    if not is_hub_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # of huggingface_hub, of its client, of the disk
        raise cannot_reach_hub(name, error) from error


def load_tokenizer(name: str, role: str = "student"):
    """The tokenizer of a folder or hub name, with a padding token set; never runs code from the model's repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise _cannot_load(name, role, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_student(path: str) -> tuple:
    """A student and its tokenizer, ready to answer, on the GPU where there is one; 16 bits a weight there, 32 on a CPU.

    Returns (model, tokenizer). Raises ConfigError `Invalid student model: …` where it cannot be loaded.
    """
    return load_to_answer(path, "student", None)


def load_to_train(path: str, attention: str | None = None) -> tuple:
    """A student and its tokenizer, in fp32 on the CPU, ready to be trained or looked at.

    attention  transformers' name of an implementation of attention; None leaves the choice to it
    Returns (model, tokenizer). Raises ConfigError `Invalid student model: …` where the weights cannot be loaded.
    """
    import torch

    tokenizer = load_tokenizer(path)
    return _load(path, "student", dtype=torch.float32, attn_implementation=attention), tokenizer


def load_teacher(name: str, *, bits: int = 8) -> tuple:
    """A teacher and its tokenizer, ready to answer, on the GPU where there is one.

    name  a folder, or a name on the hub
    bits  of a weight: 8 (LLM.int8, arXiv:2208.07339) or 4 (NF4, arXiv:2305.14314), by bitsandbytes, on a CPU too; 16 or 32 unquantized
    Returns (model, tokenizer). Raises ConfigError `Invalid teacher model: …`, or for a tokenizer without a chat template.
    """
    return load_to_answer(name, "teacher", bits)


def bits_for(wanted: int | None) -> int:
    """Bits of a weight: those that are wanted, or what suits the device."""
    return wanted or (16 if device()[0] == "cuda" else 32)


def load_to_answer(name: str, role: str, bits: int | None) -> tuple:
    """`load_teacher` for either role ("teacher" or "student"), which the messages name; `bits` None takes what suits the device."""
    import torch

    bits = bits_for(bits)
    if bits not in BITS:
        raise ConfigError(f"bits = {bits!r}: is not one of {', '.join(map(str, BITS))}.")
    name = model_name(name)
    tokenizer = check_model(name, role)
    prompt.chat_format(tokenizer, "system1")  # no template, no question: said before gigabytes are loaded
    capability = gpu_capability()
    half = half_precision(capability)[0] if capability else "bf16"  # a CPU computes no fp16
    dtype = torch.float32 if bits == 32 else {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    settings = {"quantization_config": _quantization(bits, dtype)} if bits < 16 else {}
    model = _load(name, role, dtype=dtype, device_map={"": device()[0]}, **settings)
    return model.eval(), tokenizer


def _quantization(bits: int, dtype):
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """bitsandbytes warns in every layer and step that int8 rounds by way of fp16, which is how it is meant to work."""
    return "inputs will be cast" not in record.getMessage()


def _load(name: str, role: str, **settings):
    """A model's weights, from safetensors alone; never runs code from the model's repository."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **settings)
    except OutOfMemoryError:
        raise  # a RuntimeError too, and no fault of the files
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(name, role, error) from error


def fingerprint(path: str) -> str:
    """What tells a model's files from any other's: the hub's commit, or a hash of a folder's weights, configuration and tokenizer."""
    if is_hub_name(path):
        return _cached_commit(path) or hub_info("model", path).sha
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix in (".safetensors", ".json", ".jinja") and store.is_file(file)]
    return store.hash_json({file.name: store.hash_file(file) for file in files if file.name != RUN_RECORD})


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


def probe(model) -> str:
    """What tells a loaded model from another: a hash of its logits on a few tokens, so that changed weights are another model."""
    import hashlib

    import torch

    with torch.inference_mode():
        logits = model(torch.arange(1, 17, device=model.device)[None]).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def _cannot_load(name: str, role: str, error: Exception) -> ConfigError:
    """The message for a model that did not load: the hub's silence blames nobody, anything else names the model."""
    silent = is_network_error(error) and is_hub_name(name)
    return cannot_reach_hub(name, error) if silent else _invalid(name, role, f"{shortened(error)}.")


def is_network_error(error: Exception) -> bool:
    """Whether an error, or what caused it, is a connection that failed."""
    kinds = [kind for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__]
    clients = ("httpx", "httpx2", "requests")
    return any(kind in (ConnectionError, TimeoutError) or kind.__module__.split(".")[0] in clients for kind in kinds)


def device() -> tuple[str, str]:
    """Where models answer questions, and why."""
    import torch

    return ("cuda", torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ("cpu", "no GPU is visible")


def gpu_capability() -> tuple[int, int] | None:
    """The GPU's compute capability, None where no GPU is visible."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def capability_of(gpu: dict | None) -> tuple[int, int] | None:
    """The compute capability of a GPU as `environment.probe` tells of it; None where there is none."""
    return tuple(map(int, gpu["capability"].split("."))) if gpu else None


def half_precision(capability: tuple[int, int]) -> tuple[str, str]:
    """The 16-bit type that a GPU of this compute capability computes in, "bf16" or "fp16", and why."""
    needed, found = (".".join(map(str, version)) for version in (BF16_CAPABILITY, capability))
    if capability >= BF16_CAPABILITY:
        return "bf16", f"the GPU's compute capability is {found}; bf16 needs {needed}"
    return "fp16", f"the GPU's compute capability is {found}, and bf16 needs {needed}"
