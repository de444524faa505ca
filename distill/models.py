"""Load a tokenizer and a student, knowing before whether they are there; answer questions in batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import prompt, store
from .config import is_hub_name
from .errors import ConfigError, shortened

EXAMPLE_STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"


def check_student(name: str) -> None:
    """Make sure that a student can be loaded, without loading it.

    name  a folder, or a name on the hub
    Raises ConfigError: `Invalid student model: …`, or `Cannot reach the hub for …`, which blames nobody.
    """
    if not is_hub_name(name):
        missing = _missing_in_folder(Path(name))
        if missing:
            raise _invalid_student(name, missing)
    elif not _is_cached(name):
        info = hub_info("model", name)
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings or []):
            raise _invalid_student(name, "it has no safetensors weights.")
    load_tokenizer(name)


def _missing_in_folder(folder: Path) -> str | None:
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


def _invalid_student(name: str, why: str) -> ConfigError:
    return ConfigError(f"Invalid student model: {name}: {why} Example: {EXAMPLE_STUDENT}")


def hub_info(kind: str, name: str):
    """What the hub knows of a model or dataset.

    kind  "model" or "dataset"
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
        raise (_invalid_student(name, why) if kind == "model" else ConfigError(f"No dataset {name}: {why}")) from error
    except Exception as error:
        raise cannot_reach_hub(name, error) from error


def cannot_reach_hub(name: str, error: Exception) -> ConfigError:
    """The message for a hub that does not answer."""
    return ConfigError(
        f"Cannot reach the hub for {name}: {shortened(error, 120)}. "
        "Check the network, or give the path of a folder that is on this machine (the shipped micro world needs no hub)."
    )


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub name, with a padding token set; never runs code from the model's repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise _cannot_load(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_student(path: str, attention: str | None = None) -> tuple:
    """A student and its tokenizer, in fp32, ready to answer or to be trained.

    attention  transformers' name of an implementation of attention; None leaves the choice to it
    Returns (model, tokenizer). Raises ConfigError `Invalid student model: …` where the weights cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True, attn_implementation=attention)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _cannot_load(path, error) from error
    return model, tokenizer


def _cannot_load(name: str, error: Exception) -> ConfigError:
    """The message for a model that did not load: the hub's silence blames nobody, anything else names the student."""
    silent = is_network_error(error) and is_hub_name(name)
    return cannot_reach_hub(name, error) if silent else _invalid_student(name, f"{shortened(error)}.")


def is_network_error(error: Exception) -> bool:
    """Whether an error, or what caused it, is a connection that failed."""
    kinds = [kind for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__]
    clients = ("httpx", "httpx2", "requests")
    return any(kind in (ConnectionError, TimeoutError) or kind.__module__.split(".")[0] in clients for kind in kinds)


def device() -> tuple[str, str]:
    """Where models answer questions, and why."""
    import torch

    return ("cuda", torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ("cpu", "no GPU is visible")


def stop_ids(model, tokenizer) -> list[int]:
    """Ids that end an answer: the chat template's and the tokenizer's (`prompt.stop_ids`), then the model's own others."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    stops = prompt.stop_ids(tokenizer)
    return stops + [token for token in own if token not in stops]


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text without the end of turn, its length, and whether it ended by itself."""

    text: str
    tokens: int
    stopped: bool


def generate(
    model,
    tokenizer,
    asked: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 16_384,
    update: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer many questions in batches, each until its end of turn; answers come in the order of the questions.

    asked           token ids of each question (`prompt.asked_ids`)
    max_new_tokens  limit of an answer, in tokens
    temperature     0 is greedy; above, tokens are sampled, reproducibly by `seed`
    batch_tokens    a batch holds as many questions as fit, each counted as the batch's longest plus `max_new_tokens`
    update          called with the number of answers so far
    """
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    stops = stop_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    # a whole configuration of its own: the model's may sample, penalise repetition or stop elsewhere
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **sampling)
    answers: list[Answer | None] = [None] * len(asked)
    done = 0
    for batch in _batches([len(ids) for ids in asked], max_new_tokens, batch_tokens):
        inputs = _left_padded([asked[number] for number in batch], tokenizer.pad_token_id, model.device)
        with torch.inference_mode():
            made = model.generate(**inputs, generation_config=settings)
        for number, ids in zip(batch, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[number] = _answer(tokenizer, ids, stops)
        done += len(batch)
        update(done)
    return answers


def _batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches, longest first, so that a batch wastes little padding and the largest need shows at once."""
    waiting = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while waiting:
        size = max(1, batch_tokens // (lengths[waiting[0]] + max_new_tokens))
        yield waiting[:size]
        waiting = waiting[size:]


def _left_padded(rows: list[list[int]], pad_id: int, device) -> dict:
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _answer(tokenizer, ids: list[int], stops: list[int]) -> Answer:
    length = next((place for place, token in enumerate(ids) if token in stops), None)
    kept = ids[:length]
    return Answer(tokenizer.decode(kept, skip_special_tokens=False), len(kept), stopped=length is not None)
