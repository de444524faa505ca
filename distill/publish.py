"""A checkpoint goes to others: pushed to the hub, exported to fewer bits, served on a port.

The child process (`python -m distill.publish --request FILE`) quantises: it alone loads the model.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from . import card, checkpoint, engine, models, process, server, store
from .console import progress, say, table
from .environment import engine_python
from .errors import BackendError, ConfigError, DataError, DistillError, shortened, without_secrets
from .generation import MAX_NEW_TOKENS
from .models import MODEL_FILES, RUN_RECORD
from .prompt import format_prompt
from .questions import read_questions

SENT = (*MODEL_FILES, "*.gguf")
FORMATS = {8: "int8", 4: "nf4", "gguf": "gguf"}
PACKAGES = ("torch", "transformers", "bitsandbytes")
CONVERTER = "convert_hf_to_gguf.py"
GGUF_MAGIC = b"GGUF"
LEAST_SHARE = 0.4  # of the checkpoint's weights, that 16-bit weights take: half where those are fp32, all of it where they are 16-bit
SERVED = "student"
EDITED = "it is not as the lab wrote it, so it is sent as it stands: see that its code loads the model by its name on the hub"
LOOK_SECONDS = 2


# Push


def push_to_hub(
    path: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = True, evaluation=None, license: str | None = None
) -> dict:
    """Show what would be sent to the hub of a checkpoint; send it only where `dry_run` is False.

    repo_id     `owner/name`; the repository is made where it is not there
    private     whether the repository is; one that is public already is refused, and left alone
    evaluation, license  for the card (`card.write_model_card`); with neither, the README.md that stands in the checkpoint is taken:
                the lab's own with the name `repo_id`, one that somebody edited as it is
    Sent are the files that the checkpoint's record lists, of the kinds SENT alone, the card, and the record without this machine's paths.
    The token is huggingface_hub's own (HF_TOKEN, or `hf auth login`).
    Returns {"repo_id", "private", "files": [{"name", "bytes"}], "bytes", "left_out": [name], "problems": [text], "sent", "url"}.
    Raises ConfigError for what is no checkpoint, a name that the hub cannot have, a file that holds a key, or where the hub refuses;
    DataError for a damaged checkpoint.
    """
    _check_repo_id(repo_id)
    folder = store.resolve(path)
    contents = _contents(folder, repo_id, evaluation, license)
    plan = _plan(folder, contents, repo_id, private)
    _show(plan)
    if dry_run:
        say("Nothing was sent. With --yes (dry_run=False) it is.")
        return plan
    return plan | {"sent": True, "url": _send(contents, plan)}


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id = {shortened(repr(repo_id), 80)}: is no name on the hub: {shortened(error)}") from error
    if "/" not in repo_id:
        raise ConfigError(f"repo_id = {repo_id!r}: names no owner. Write owner/name, e.g. {shortened('me/' + repo_id, 80)}.")


def _contents(folder: Path, repo_id: str, evaluation, license: str | None) -> dict[str, Path | bytes]:
    """Name → file, or its text as it is sent. Raises ConfigError for a text that holds a key."""
    record = card.read_record(folder)
    files = {name: folder / name for name in record["files"] if any(fnmatch(name, pattern) for pattern in SENT)}
    readme = folder / card.CARD
    if store.is_file(readme) and evaluation is None and license is None:
        text = card.renamed(readme.read_text(encoding="utf-8", errors="replace"), repo_id)
    else:
        text = card.compose(folder, record, evaluation, license, name=repo_id)
    small = {name: file.read_text(encoding="utf-8", errors="replace") for name, file in files.items() if not _is_large(name)}
    for name, content in {**small, card.CARD: text}.items():
        if content != without_secrets(content):
            raise ConfigError(f"{name} of {store.shown(folder)} holds what looks like a key or a password. Take it out before it is sent.")
    return {**files, card.CARD: text.encode(), RUN_RECORD: _public_record(record, files)}


def _is_large(name: str) -> bool:
    """Whether a file is weights or a vocabulary, which hold no words of a user."""
    return name.endswith(".safetensors") or name in ("tokenizer.json", "vocab.json", "merges.txt")


def _public_record(record: dict, sent: dict) -> bytes:
    """A record of the files that are sent, without this machine's paths and without keys, sealed anew."""
    cleaned = card.for_strangers({**record, "files": {name: fact for name, fact in record["files"].items() if name in sent}})
    return json.dumps({**cleaned, store.SEAL: store.hash_json(cleaned)}, indent=2, ensure_ascii=False).encode()


def _plan(folder: Path, contents: dict, repo_id: str, private: bool) -> dict:
    sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in contents.items()}
    text = contents[card.CARD].decode()
    return {
        "repo_id": repo_id,
        "private": private,
        "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "left_out": sorted(place.name for place in folder.iterdir() if place.name not in contents),
        "problems": [*card.problems(text), *([] if card.is_unedited(text) else [EDITED])],
        "sent": False,
        "url": None,
    }


def _show(plan: dict) -> None:
    rows = [[each["name"], f"{each['bytes']:,}"] for each in plan["files"]]
    visibility = "private" if plan["private"] else "PUBLIC"
    table(f"To {plan['repo_id']} ({visibility})", ["file", "bytes"], [*rows, ["all", f"{plan['bytes']:,}"]])
    if plan["left_out"]:
        say(f"Not sent: {shortened(', '.join(plan['left_out']))}")
    for problem in plan["problems"]:
        say(f"Card: {problem}")


def _send(contents: dict, plan: dict) -> str:
    """Make the repository where it is not there, and one commit of all files. Returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    name = plan["repo_id"]
    if not get_token():
        raise ConfigError(f"No token for the hub, which takes {name} from its owner alone: set HF_TOKEN, or run `hf auth login`.")
    api = HfApi()
    files = [CommitOperationAdd(place, one if isinstance(one, bytes) else str(one)) for place, one in contents.items()]
    try:
        url = api.create_repo(name, private=plan["private"], exist_ok=True)
        if plan["private"] and not api.repo_info(name).private:
            raise ConfigError(f"{name} is public on the hub, and private was asked for. Say --public, make it private, or name another.")
        api.create_commit(name, files, commit_message="Checkpoint of the Qwen Distillation Lab")
    except DistillError:
        raise
    except Exception as error:  # of huggingface_hub, of its client, of the disk
        raise _refused(name, error) from error
    say(f"sent: {url}")
    return str(url)


def _refused(name: str, error: Exception) -> ConfigError:
    """The message for a hub that does not take a checkpoint, or cannot be reached."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ConfigError(f"The hub refuses {name} with {status}: HF_TOKEN must be a token with write access to {name.split('/')[0]}.")
    if not status and _is_unreachable(error):
        return models.cannot_reach_hub(name, error)
    return ConfigError(f"The hub does not take {name}: {f'{status}, ' if status else ''}{shortened(error)}.")


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether a connection failed, however deep in what was raised."""
    while error and not models.is_network_error(error):
        error = error.__cause__ or error.__context__
    return error is not None


# Export


def export(path: str | Path, bits: int | str, *, out: str | Path | None = None) -> dict:
    """Write a checkpoint with its linear layers in 8 or 4 bits (bitsandbytes: LLM.int8, NF4), or as GGUF, to a folder beside it.

    bits  8, 4, or "gguf" (16-bit weights by llama.cpp's converter, where LLAMA_CPP names its folder or PATH has it)
    out   None: `<path>-int8`, `<path>-nf4` or `<path>-gguf`
    The folder holds tokenizer, stop tokens, a card, and a record that names what it was made of; it was loaded once, and answered as before
    it was saved. Returns {"path", "bits", "bytes_before", "bytes_after"}, bytes of the weights' files.
    Raises ConfigError, DataError for a damaged checkpoint, BackendError with the log's end.
    """
    if bits not in FORMATS:
        raise ConfigError(f"bits = {bits!r}: is not one of {', '.join(map(str, FORMATS))}.")
    folder = store.resolve(path)
    record = card.read_record(folder)
    if "export" in record:
        raise ConfigError(
            f"{store.shown(folder)} was exported already, to {record['export']['format']}. Give the checkpoint it was made of."
        )
    place = store.resolve(out) if out else folder.with_name(f"{folder.name}-{FORMATS[bits]}")
    if place == folder:
        raise ConfigError(f"out = {store.shown(place)}: is the checkpoint itself. Choose another place.")
    checkpoint.check_out_dir(place)
    make = _convert if bits == "gguf" else _quantise
    with store.lock(place), store.atomic_folder(place) as made:
        versions = make(folder, made, bits)
        sizes = {"bytes_before": _weight_bytes(folder), "bytes_after": _weight_bytes(made)}
        facts = {"of": folder.name, "of_run": record.get("run_id"), "bits": 16 if bits == "gguf" else bits, "format": FORMATS[bits]}
        # without the key of its training, which would take this for that training's own checkpoint
        kept = {key: value for key, value in record.items() if key not in ("files", "resume_key")}
        _seal(made, {**kept, "export": {**facts, **sizes, "versions": versions}}, place.name)
    say(f"{store.shown(place)}: {sizes['bytes_before']:,} → {sizes['bytes_after']:,} bytes of weights")
    return {"path": str(place), "bits": bits, **sizes}


def _seal(folder: Path, record: dict, name: str) -> None:
    """Write card and record of an exported model; the record comes last."""
    with store.atomic_file(folder / card.CARD) as file:
        file.write(card.compose(folder, record, name=name))
    store.write_manifest(folder, record, name=RUN_RECORD, files=[f for f in folder.iterdir() if f.name not in (card.CARD, RUN_RECORD)])


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


def _log(folder: Path) -> Path:
    store.make_folder(store.ROOT / "runs")
    return store.ROOT / "runs" / f"export-{store.hash_json(str(folder))[:12]}.log"


def _quantise(folder: Path, made: Path, bits: int) -> dict:
    """Quantise in a process of its own. Returns the versions of what did it."""
    log = _log(folder)
    with TemporaryDirectory() as temporary, progress(f"Quantising to {FORMATS[bits]}") as update:
        request, done = Path(temporary) / "request.json", Path(temporary) / "done.json"
        store.write_json(request, {"path": str(folder), "bits": bits, "out": str(made), "done": str(done)})
        ended = engine.run_module("distill.publish", ["--request", str(request)], log, lambda event: update(event["done"], total=3))
        if ended.status or not done.is_file():
            raise engine.failure(f"Quantising {store.shown(folder)}", ended, log)
        return store.read_json(done)


def _convert(folder: Path, made: Path, bits: str) -> dict:
    """Convert by llama.cpp. Returns what did it."""
    script, log = _converter(), _log(folder)
    target = made / f"{folder.name}.gguf"
    command = [engine_python()[0], str(script), str(folder), "--outfile", str(target), "--outtype", "f16"]
    ended = process.run(command, log, cwd=made, env=engine.child_environment())
    if ended.status:
        raise engine.failure(f"Converting {store.shown(folder)} to GGUF", ended, log)
    _check_gguf(target, _weight_bytes(folder), script)
    return {"converter": script.name}


def _converter() -> Path:
    """llama.cpp's converter. Raises ConfigError that says how to get it."""
    named = os.environ.get("LLAMA_CPP")
    found = shutil.which(CONVERTER)
    candidates = [Path(named), Path(named) / CONVERTER] if named else [Path(found)] if found else []
    for place in candidates:
        if store.is_file(place):
            return place.resolve()
    where = f"LLAMA_CPP = {named}" if named else "PATH"
    raise ConfigError(
        f"GGUF needs llama.cpp's {CONVERTER}, which is not at {where}. `git clone https://github.com/ggml-org/llama.cpp`, "
        "`pip install gguf`, and set LLAMA_CPP to its folder; or export to 8 or 4 bits."
    )


def _check_gguf(file: Path, before_bytes: int, script: Path) -> None:
    """Raise BackendError unless a file is GGUF and large enough to hold all weights."""
    magic = b""
    if file.is_file():
        with open(file, "rb") as opened:
            magic = opened.read(len(GGUF_MAGIC))
    size = file.stat().st_size if file.is_file() else 0
    if magic != GGUF_MAGIC or size < LEAST_SHARE * before_bytes:
        raise BackendError(
            f"{script.name} left no whole GGUF file: {size:,} bytes that begin with {magic!r}, of {before_bytes:,} in the checkpoint."
        )


def export_with_scores(
    path: str | Path, bits: int | str, questions: str | Path | None = None, *, out: str | Path | None = None, **asked: int
) -> dict:
    """`export`, then ask both models the same held-out questions, and show and keep the scores before and after.

    questions  a held-out file; None: no scores
    asked      limit, max_new_tokens, seed, as `evaluate.compare_checkpoints` takes them
    Returns what `export` returns, with "scores": {"before": Q, "after": Q}, the quality of an evaluation; None without questions, and for
    GGUF, which the lab does not load. They stand in the exported folder's card and record, and in `reports/export/<name>/export.json`.
    Raises as `export` does, and DataError for a file without a question for this checkpoint.
    """
    if questions is not None and bits != "gguf":
        _check_questions(path, questions)  # before minutes are spent on quantising
    made = export(path, bits, out=out)
    if bits == "gguf" or questions is None:
        say(f"Its scores are not measured: {'the lab does not load GGUF' if bits == 'gguf' else 'no held-out questions were given'}.")
        return made | {"scores": None}
    from . import evaluate

    place = Path(made["path"])
    record = card.read_record(place)
    scores = evaluate.compare_checkpoints(
        {"before": str(store.resolve(path)), "after": str(place)}, card.mode_of(record), questions, **asked
    )
    files = {key: value for key, value in record.items() if key != "files"}
    _seal(place, {**files, "export": {**record["export"], "scores": scores}}, place.name)
    _show_scores(made, scores)
    store.write_json(store.ROOT / "reports" / "export" / place.name / "export.json", {**made, "scores": scores})
    return made | {"scores": scores}


def _check_questions(path: str | Path, questions: str | Path) -> None:
    """Raise DataError unless a file holds questions for a checkpoint."""
    mode = card.mode_of(card.read_record(store.resolve(path)))
    if not list(read_questions(store.resolve(questions), mode)):
        raise DataError(f"{store.shown(questions)} holds no question for {mode}: each row names another system. Give other questions.")


def _show_scores(made: dict, scores: dict) -> None:
    sizes = ["bytes of weights", "", f"{made['bytes_before']:,}", f"{made['bytes_after']:,}"]
    table(f"Scores at {made['bits']} bits", ["", "n", "before", "after"], [*card.before_and_after(scores), sizes])


# Serve


def serve(path: str | Path, *, port: int = 8000, host: str = server.HOST, wait: Callable[[float], None] = time.sleep) -> dict:
    """Serve a checkpoint behind OpenAI's protocol until Ctrl-C: `transformers serve`, or vLLM where a GPU and vLLM are there.

    host  the address to listen at; other than 127.0.0.1, whoever reaches this machine may ask, without a key
    wait  how the time between two looks at the server is spent
    Returns {"base_url", "model"} once it has ended. Raises ConfigError for a port that is taken, for GGUF or for what is no checkpoint,
    BackendError with the log's end where the server does not start.
    """
    folder = store.resolve(path)
    record = card.read_record(folder)
    _refuse_gguf(folder, record, host, port)
    _check_port(host, port)
    store.make_folder(store.ROOT / "runs")
    with server.serving(str(folder), store.ROOT / "runs" / f"serve-{port}.log", port=port, host=host, name=SERVED) as one:
        found = {"base_url": one.base_url, "model": one.model_id}
        say(
            f"base_url: {one.base_url}   model: {one.model_id}   log: {store.shown(one.log)}\n{curl(one.base_url, record)}\nCtrl-C ends it."
        )
        try:
            while True:
                wait(LOOK_SECONDS)
                one.ensure()
        except KeyboardInterrupt:
            say("The server has ended.")
    return found


def _refuse_gguf(folder: Path, record: dict, host: str, port: int) -> None:
    """Raise ConfigError, with the line that serves it, for a folder that holds a model as GGUF."""
    file = next((name for name in record["files"] if name.endswith(".gguf")), None)
    if file:
        line = shlex.join(["llama-server", "-m", str(folder / file), "--host", host, "--port", str(port)])
        raise ConfigError(f"{store.shown(folder)} holds GGUF, which llama.cpp serves, and the lab does not. Run `{line}`.")


def curl(base_url: str, record: dict) -> str:
    """A command line that asks the server one question, as the checkpoint was trained to be asked."""
    mode = card.mode_of(record)
    messages = [{"role": "user", "content": format_prompt(card.QUESTION, mode=mode)}]
    asked = {"model": SERVED, "messages": messages, "max_tokens": MAX_NEW_TOKENS[mode], "temperature": 0}
    return shlex.join(["curl", f"{base_url}/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(asked)])


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError unless this process may listen there."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(f"port = {port!r}: give a whole number from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that has just ended holds nothing
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"Cannot serve at {host}, port = {port}: {error.strerror or error}. Choose another port.") from error


# In the engine's process


def main() -> None:
    """Quantise the model of a request file, save it before it has answered anything, and prove that it comes back the same."""
    parser = argparse.ArgumentParser(prog="python -m distill.publish", description="Quantise a checkpoint.")
    parser.add_argument("--request", required=True, help="JSON: {path, bits, out, done}, as distill.publish.export writes it")
    request = store.read_json(parser.parse_args().request)
    try:
        store.write_json(request["done"], _save_quantised(request["path"], request["bits"], Path(request["out"])))
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _save_quantised(path: str, bits: int, out: Path) -> dict:
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM

    model, tokenizer = models.load_to_answer(path, "student", bits)
    engine.emit(done=1)
    model.save_pretrained(out)  # the first answer lays 4-bit weights out anew for some CPUs, and they would be saved so
    tokenizer.save_pretrained(out)
    engine.emit(done=2)
    before = models.probe(model)
    del model
    again = AutoModelForCausalLM.from_pretrained(out, device_map={"": models.device()[0]}, trust_remote_code=False)
    if models.probe(again) != before:
        raise BackendError(f"The {bits}-bit model that was saved answers otherwise than the one in memory; nothing is kept. Report it.")
    return {package: version(package) for package in PACKAGES}


if __name__ == "__main__":
    main()
