"""Load a tokenizer, a teacher or a student, knowing before whether they are there.

A model plays one of two roles: a student is loaded in fp32, to be trained; a teacher only answers, in as many bits as asked.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from . import prompt, store
from .config import is_hub_name, model_name
from .console import say
from .errors import ConfigError, shortened
from .faults import is_out_of_memory

EXAMPLES = {"student": "Qwen/Qwen2.5-0.5B-Instruct", "teacher": "Qwen/Qwen2.5-7B-Instruct"}
BITS = (4, 8, 16, 32)
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # no code, no pickles
PICKLES = ("*model*.bin", "*model*.pt", "consolidated*.pth", "*.ckpt")
ADAPTER = "adapter_config.json"  # beside a model, transformers would add what it names to the weights, from a pickle too
ADAPTER_ALONE = f"it holds an adapter ({ADAPTER}). Merge it into its base (peft's merge_and_unload), and give the merged model's folder."
RUN_RECORD = "distill_run.json"  # the seal of a checkpoint of the lab
BF16_CAPABILITY = (8, 0)  # what computes bf16 itself; torch.cuda.is_bf16_supported says yes to a T4 too, which imitates it slowly
FLASH_CAPABILITY = (8, 0)  # what torch has flash attention for
BUSY = (429, 503)  # the hub's HTTP status
BUSY_PAUSES_SECONDS = (1, 2, 4, 8)
LONGEST_PAUSE_SECONDS = 60  # that a busy hub may ask for


def check_student(name: str):
    """Make sure that a student can be loaded, without loading its weights. Returns its tokenizer.

    name  a folder, or a name on the hub
    Raises ConfigError: `Invalid student model: …`, or `Cannot reach the hub for …`, which blames nobody; DataError for a checkpoint of
    the lab that is not as it was published.
    """
    return check_model(name, "student")


def check_model(name: str, role: str):
    """`check_student` for either role ("student" or "teacher"): the message names the role."""
    if not is_hub_name(name):
        missing = missing_in_folder(Path(name))
        if missing:
            raise _invalid(name, role, missing)
        store.read_manifest(name, name=RUN_RECORD)
    elif missing := _missing_on_hub(name, role):
        raise _invalid(name, role, missing)
    return load_tokenizer(name, role)


def missing_in_folder(folder: Path) -> str | None:
    """What a model folder lacks, in words; None where it is complete."""
    if not store.is_dir(folder):
        return "there is no such folder, and it is no name on the hub."
    if store.is_file(folder / ADAPTER):
        return ADAPTER_ALONE
    if not store.is_file(folder / "config.json"):
        return "the folder holds no config.json."
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return _no_weights(folder)
    if not any(store.is_file(folder / file) for file in ("tokenizer.json", "tokenizer_config.json")):
        return "the folder holds no tokenizer."
    return next((f"{file.name} holds no readable weights." for file in weights if not _is_safetensors(file)), None)


def _missing_on_hub(name: str, role: str) -> str | None:
    """What a model on the hub lacks, in words; None where it is complete. The hub is not asked about one whose weights are here."""
    if _is_cached(name, ADAPTER):
        return ADAPTER_ALONE
    if is_here(name):
        return None
    files = [file.rfilename for file in hub_info("model", name, role).siblings or []]
    if ADAPTER in files:
        return ADAPTER_ALONE
    return None if any(file.endswith(".safetensors") for file in files) else "it has no safetensors weights."


def _no_weights(folder: Path) -> str:
    """What a model folder without safetensors has in their place, in words."""
    pickles = sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)})
    if not pickles:
        return "the folder holds no weights (model.safetensors)."
    return (
        f"the folder holds only a pickle ({pickles[0]}), which can run code when it is opened, so the lab never does. "
        "Take a copy in safetensors; or, where you trust it, open it elsewhere and save_pretrained the model."
    )


def _is_safetensors(file: Path) -> bool:
    """Whether a weights file's header can be read and its length is what the header says; no weight is loaded."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def is_here(name: str) -> bool:
    """Whether a model lies in a folder or in the hub's cache, so that nothing large has to come."""
    return not is_hub_name(name) or _is_cached(name, "model.safetensors", "model.safetensors.index.json")


def _is_cached(name: str, *files: str) -> bool:
    """Whether the hub's cache has one of a model's files."""
    return any(_file_here(name, file) for file in files)


def _file_here(name: str, file: str) -> Path | None:
    """A model's file in its folder or in the hub's cache; None where it is in neither. Nothing is fetched."""
    if not is_hub_name(name):
        return Path(name) / file if store.is_file(Path(name) / file) else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def disk_bytes(name: str) -> int | None:
    """Bytes that a model's weights take in its folder or in the hub's cache; None where none are there. Nothing is fetched."""
    config = _file_here(name, "config.json")
    return sum(file.stat().st_size for file in config.parent.glob("*.safetensors")) or None if config else None


def _invalid(name: str, role: str, why: str) -> ConfigError:
    return ConfigError(f"Invalid {role} model: {name}: {why} Example: {EXAMPLES[role]}")


def hub_info(kind: str, name: str, role: str = "student"):
    """What the hub knows of a model or dataset.

    kind  "model" or "dataset"
    role  what a model is wanted as, for the message
    A busy hub is asked again, with pauses. Raises ConfigError: not there, closed to this user, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return _while_busy(name, lambda: HfApi().repo_info(name, repo_type=kind, timeout=20))
    except GatedRepoError as error:
        raise ConfigError(f"{name} is gated: accept its terms on its hub page, then set HF_TOKEN.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "the hub knows no such name (or it is private and HF_TOKEN is not set)."
        raise (_invalid(name, role, why) if kind == "model" else ConfigError(f"No dataset {name}: {why}")) from error
    except Exception as error:
        raise cannot_reach_hub(name, error) from error


def _while_busy(name: str, ask: Callable):
    """What `ask` gets from the hub, asked again while that is busy; by itself huggingface_hub does so for files alone."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause_seconds in BUSY_PAUSES_SECONDS:
        try:
            return ask()
        except HfHubHTTPError as error:
            status, wanted = error.response.status_code, error.response.headers.get("Retry-After", "")
            if status not in BUSY:
                raise
        pause_seconds = min(int(wanted), LONGEST_PAUSE_SECONDS) if wanted.isdecimal() else pause_seconds
        say(f"The hub is busy ({status}): it is asked for {name} again in {pause_seconds} s")
        time.sleep(pause_seconds)
    return ask()


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
        raise cannot_download(name, error) from error


def cannot_download(name: str, error: Exception) -> ConfigError:
    """The message for a download that failed: the disk's fault, or the hub's silence."""
    return _cannot_keep(name, error) or cannot_reach_hub(name, error)


def _cannot_keep(name: str, error: Exception) -> ConfigError | None:
    """The message for a download that the disk does not take; None where the error is another."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not (fault := store.disk_error(error)):
        return None
    return ConfigError(
        f"The disk of the hub's cache fails for {name}: {fault.strerror} ({store.shown(HF_HUB_CACHE)}). "
        "Set HF_HOME to a folder on another disk, or free some space."
    )


def load_tokenizer(name: str, role: str = "student"):
    """The tokenizer of a folder or hub name, with a padding token set; never runs code from the model's repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unsaid, transformers asks on standard input
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


def load_quantized(path: str, precision: str, attention: str | None = None) -> tuple:
    """A student and its tokenizer for QLoRA (arXiv:2305.14314): linear layers frozen in NF4, all else in fp32, where training takes place.

    precision  what the linear layers compute in: "fp32", "bf16" or "fp16"
    Returns and raises as `load_to_train` does.
    """
    import torch

    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    place = {"device_map": {"": device()[0]}, "quantization_config": _quantization(4, compute)}
    model, tokenizer = _load(path, "student", dtype=torch.float32, attn_implementation=attention, **place), load_tokenizer(path)
    for module in model.modules():
        # an answer would lay the weights out anew for a CPU's bf16 units, and training could not go on: that layout has no backward pass
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()  # the file's own pages: they would keep the whole file in memory
    return model, tokenizer


def load_teacher(name: str, *, bits: int = 8) -> tuple:
    """A teacher and its tokenizer, ready to answer, on the GPU where there is one.

    name  a folder, or a name on the hub
    bits  of a weight: 8 (LLM.int8, arXiv:2208.07339) or 4 (NF4, arXiv:2305.14314), by bitsandbytes, on a CPU too; 16 or 32 unquantized
    Returns (model, tokenizer). Raises ConfigError `Invalid teacher model: …`, or for a tokenizer without a chat template.
    """
    return load_to_answer(name, "teacher", bits)


def bits_for(name: str, wanted: int | None) -> int:
    """Bits of a weight: those that a model was stored in quantised, those that are wanted, or what suits the device."""
    return stored_bits(name) or wanted or (16 if device()[0] == "cuda" else 32)


def stored_bits(name: str) -> int | None:
    """Bits of a weight of a model that bitsandbytes quantised before it was saved, 8 or 4; None for any other.

    name  a folder, or a name on the hub: then it is None as long as the hub's cache holds no configuration of it
    """
    found = _stored_quantization(name)
    return 4 if found.get("load_in_4bit") else 8 if found.get("load_in_8bit") else None


def _stored_quantization(name: str) -> dict:
    """What a model's configuration says of how it was quantised before it was saved; {} where it was not, or where none is here."""
    config = _file_here(name, "config.json")
    return store.read_json(config).get("quantization_config") or {} if config else {}


def load_to_answer(name: str, role: str, bits: int | None) -> tuple:
    """`load_teacher` for either role ("teacher" or "student"), which the messages name; `bits` None takes what suits the device."""
    import torch

    name = model_name(name)
    tokenizer = check_model(name, role)  # after it a hub name's configuration is in the cache, which tells its bits
    _check_quantization(name)
    bits = bits_for(name, bits)
    if bits not in BITS:
        raise ConfigError(f"bits = {bits!r}: is not one of {', '.join(map(str, BITS))}.")
    prompt.chat_format(tokenizer, "system1")  # no template, no question: said before gigabytes are loaded
    capability = gpu_capability()
    half = half_precision(capability)[0] if capability else "bf16"  # a CPU computes no fp16
    dtype = torch.float32 if bits == 32 else {"bf16": torch.bfloat16, "fp16": torch.float16}[half]
    settings = {"quantization_config": _quantization(bits, dtype)} if bits < 16 and not stored_bits(name) else {}
    model = _load(name, role, dtype=dtype, device_map={"": device()[0]}, **settings)
    return model.eval(), tokenizer


def _check_quantization(name: str) -> None:
    """Raise ConfigError for a model that anything but bitsandbytes quantised before it was saved."""
    found = _stored_quantization(name)
    if found and not stored_bits(name):
        method = shortened(found.get("quant_method"), 40)
        raise ConfigError(f"{name} is quantised by {method}, which the lab does not load. Take the model in 16 bits, or bitsandbytes'.")


def _quantization(bits: int, dtype):
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """bitsandbytes warns in every layer and step that int8 rounds by way of fp16, which is how it is meant to work."""
    return "inputs will be cast" not in record.getMessage()


def repeat_keys() -> None:
    """Have transformers repeat keys and values for each head before torch's attention, in this process.

    On a GPU that has no flash attention, torch's other fused one cannot share keys among heads: asked to, as transformers does, it
    falls back to holding all scores (huggingface/transformers#48633).
    """
    from types import SimpleNamespace

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    def repeated(module, query, key, value, attention_mask, **more):
        ungrouped, groups = SimpleNamespace(is_causal=module.is_causal), module.num_key_value_groups
        return sdpa_attention_forward(ungrouped, query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, **more)

    AttentionInterface.register("sdpa", repeated)


def _load(name: str, role: str, **settings):
    """A model's weights, from safetensors alone; never runs code from the model's repository."""
    if not is_hub_name(name) and (missing := missing_in_folder(Path(name))):
        raise _invalid(name, role, missing)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    capability = gpu_capability()
    if capability and capability < FLASH_CAPABILITY:
        repeat_keys()
    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **settings)
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise  # no fault of the files
        raise _cannot_load(name, role, error) from error


def fingerprint(path: str) -> str:
    """What tells a model's files from any other's: the hub's commit, or a hash of a folder's weights, configuration and tokenizer."""
    if is_hub_name(path):
        return _cached_commit(path) or hub_info("model", path).sha
    files = sorted(file for pattern in MODEL_FILES for file in Path(path).glob(pattern) if store.is_file(file))
    return store.hash_json({file.name: store.hash_file(file) for file in files if file.name != RUN_RECORD})


def _cached_commit(name: str) -> str | None:
    config = _file_here(name, "config.json")
    return config.parent.name if config else None


def probe(model) -> str:
    """What tells a loaded model from another: a hash of its logits on a few tokens, so that changed weights are another model."""
    import hashlib

    import torch

    with torch.inference_mode():
        logits = model(torch.arange(1, 17, device=model.device)[None]).logits
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def _cannot_load(name: str, role: str, error: Exception) -> ConfigError:
    """The message for a model that did not load: a full disk and the hub's silence blame nobody, anything else names the model."""
    if is_hub_name(name) and (full := _cannot_keep(name, error)):
        return full
    if is_network_error(error) and is_hub_name(name):
        return cannot_reach_hub(name, error)
    if "trust_remote_code" in str(error):  # transformers advises to set it
        return _invalid(name, role, "it brings code of its own (auto_map), which the lab never runs. Take one that transformers knows.")
    return _invalid(name, role, f"{shortened(error)}.")


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
