"""Read given answers with models: how likely each token was, and which one the model would have put there.

Models read in a subprocess (`python -m distill.probing --request FILE`), one in memory at a time. What one has read stays in a
*journal*, a line an answer, so that no answer is read twice, also where a run was killed.
Letters: N supervised tokens of a batch, V vocabulary.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from . import engine, models, stages, store
from .answers import in_bits_of_journal
from .console import progress, say
from .errors import ConfigError, DistillError
from .models import bits_for, load_to_answer, load_tokenizer
from .prompt import MODES, REASONING_TAGS, asked_ids, is_unicode, trained_ids

PROBING = ("probing.py", "models.py", "prompt.py")  # what decides an entry, for `stages.code`
READ_TOKENS = 4_096  # of a batch, padding included; a longer row is read alone
TILE_LOGITS = 2**26  # held at once, in fp32 and twice: 512 MiB


def probe_all(requests: list[dict], run_folder: Path, title: str = "Reading", *, fresh: bool = False) -> dict[str, list[dict | None]]:
    """Have models read answers, in one subprocess; what a model has read before it does not read again.

    requests    [{"name", "path", "role", "bits", "rows"}]
        role    "student" or "teacher"
        bits    of a weight, 4, 8, 16 or 32; None takes a teacher's of before, else 8, or 4 where 8 do not fit; a student's by device
        rows    [{"instruction", "mode", "text"}] and, where wanted, "input"; text is the whole answer, with its reasoning
    run_folder  where the log goes, probing.log
    fresh       read all of it anew
    Returns {name: entries in the order of the rows}; an entry is
        tokens             supervised ones: the answer's and its end of turn
        nll                sum of their −log p, in nats
        top1               id of the likeliest token at each of them
        final_probability  of all tokens behind the reasoning and of the end of turn together, given what stands before
        token_confidence   mean probability of the likeliest token
        token_right        share of tokens that are the likeliest
    None stands for a row that cannot be read: without text, no valid Unicode, longer than the model's positions, or by weights that give
    numbers that are not finite; that is said.
    The entries lie in `runs/probes/<key>.jsonl`; the key hashes the model's files, its role, its bits, the kind of device and PROBING.
    Raises PreflightError where a teacher does not fit, BackendError with the end of the log.
    """
    kept = [_Kept(request) for request in requests]
    with ExitStack() as locks:
        for journal in {one.journal for one in kept}:
            store.make_folder(journal.parent)
            locks.enter_context(store.lock(journal))
        waiting = [request for one in kept if (request := one.to_read(fresh))["rows"]]
        if waiting:
            _read(waiting, run_folder, title)
        return {one.request["name"]: one.entries() for one in kept}


class _Kept:
    """One model's rows, and its journal of what it has read of them."""

    def __init__(self, request: dict) -> None:
        self.request, self.is_teacher = request, request["role"] == "teacher"
        own = [self.is_teacher, request["bits"], engine.gpu_is_visible(), stages.code(*PROBING)]
        self.journal = store.ROOT / "runs" / "probes" / f"{store.hash_json([models.fingerprint(request['path']), *own])[:24]}.jsonl"
        rows = [[row["mode"], row["instruction"], row.get("input") or "", row["text"]] for row in request["rows"]]
        self.names = [store.hash_json(row)[:24] for row in rows]

    def to_read(self, fresh: bool) -> dict:
        """The request for the readable rows that the journal does not hold, each once; a teacher's says how it is held."""
        known = set() if fresh else {entry["id"] for entry in store.read_journal(self.journal)}
        if count := sum(name in known for name in self.names):
            say(f"{self.request['name']}: {count:,} of {len(self.names):,} answers had been read before ({store.shown(self.journal)})")
        rows = dict(zip(self.names, self.request["rows"], strict=True))
        missing = [{**row, "id": name} for name, row in rows.items() if name not in known and not _unreadable(row)]
        request = {**self.request, "rows": missing, "journal": str(self.journal)}
        if self.is_teacher and missing:
            bits = self.request["bits"]
            return request | in_bits_of_journal(request["path"], _as_asked(request), bits, self.journal, fresh=fresh)
        if fresh:
            store.remove_file(self.journal)
        return request

    def entries(self) -> list[dict | None]:
        """What was read, in the order of the rows; rows that could not be are counted by reason, and that is said."""
        read = {entry.pop("id"): entry for entry in store.read_journal(self.journal)}
        found = [read.get(name, {"skipped": _unreadable(row)}) for name, row in zip(self.names, self.request["rows"], strict=True)]
        for reason, count in Counter(entry["skipped"] for entry in found if "skipped" in entry).items():
            say(f"{self.request['name']}: {count:,} of {len(found):,} answers cannot be read: {reason}")
        return [None if "skipped" in entry else entry for entry in found]


def _unreadable(row: dict) -> str:
    """Why no model can read a row; empty where one can."""
    if not row["text"].strip():
        return "no text"
    texts = (row["instruction"], row.get("input") or "", row["text"])
    return "" if all(is_unicode(text) for text in texts) else "no valid Unicode"


def _as_asked(request: dict) -> dict:
    """Reading as `machine.teacher_settings` takes it: like an answer that is as long as the longest text of its mode."""
    tokenizer = load_tokenizer(request["path"], "teacher")
    longest = dict.fromkeys(MODES, 0)
    for row in request["rows"]:
        longest[row["mode"]] = max(longest[row["mode"]], sum(_tokens(tokenizer, row)[1]))
    return {"questions": request["rows"], "max_new_tokens": longest}


def _read(requests: list[dict], run_folder: Path, title: str) -> None:
    """Have the missing rows read in a subprocess, into the journals."""
    store.make_folder(run_folder)
    log, at = run_folder / "probing.log", requests[0]["name"]
    with TemporaryDirectory(dir=run_folder) as folder, progress(title, total=sum(len(request["rows"]) for request in requests)) as update:

        def hear(event: dict) -> None:
            nonlocal at
            at = event["name"]
            update(event["done"], note=at)

        file = store.write_json(Path(folder) / "request.json", requests)
        ended = engine.run_module("distill.probing", ["--request", str(file)], log, hear)
    if ended.status:
        raise engine.failure(f"{title} ({at})", ended, log)


# In the engine's process


def main() -> None:
    """Read the rows of a request file, one model after the other."""
    parser = argparse.ArgumentParser(prog="python -m distill.probing", description="Have models read answers, one model at a time.")
    parser.add_argument("--request", required=True, help="JSON: the requests, as distill.probing.probe_all writes them")
    done = 0
    try:
        for request in store.read_json(parser.parse_args().request):
            done = _read_one(request, done)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _read_one(request: dict, done: int) -> int:
    """Have one model read its rows, then let it go; returns how many rows are done with these."""
    engine.emit(name=request["name"], done=done)
    model, tokenizer = load_to_answer(request["path"], request["role"], bits_for(request["path"], request["bits"]))
    print(f"{request['name']}: on {model.device}")
    for entries in read_rows(model, tokenizer, request["rows"], request.get("batch_tokens", READ_TOKENS)):
        for number, entry in entries.items():
            store.add_to_journal(request["journal"], {"id": request["rows"][number]["id"], **entry})
        done += len(entries)
        engine.emit(name=request["name"], done=done)
    return done


def read_rows(model, tokenizer, rows: list[dict], batch_tokens: int = READ_TOKENS) -> Iterator[dict[int, dict]]:
    """Have a loaded model read rows, in this process; yields {row number: entry} after each batch.

    A row that is longer than the model's positions, or read as numbers that are not finite, gets {"skipped": why} for an entry. For models
    whose logits are their output head's as they come (Qwen, Llama), not those that scale or cap them behind it (Gemma 2, Granite, Cohere):
    ConfigError.
    """
    _check_head(model, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    tokens = {number: _tokens(tokenizer, row) for number, row in enumerate(rows)}
    if long := [number for number, (ids, _) in tokens.items() if len(ids) > positions]:
        yield {number: {"skipped": f"longer than the model's {positions:,} positions"} for number in long}
    waiting = sorted(tokens.keys() - set(long), key=lambda number: -len(tokens[number][0]))
    while waiting:
        size = max(1, min(batch_tokens, READ_TOKENS) // len(tokens[waiting[0]][0]))
        batch, waiting = waiting[:size], waiting[size:]
        read = _read_batch(model, tokenizer, [tokens[number] for number in batch])
        yield {number: _entry(*found, _final_from(tokenizer, rows[number])) for number, found in zip(batch, read, strict=True)}


def _tokens(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    return trained_ids(tokenizer, row["instruction"], row["text"], row.get("input") or "", row["mode"])


def _final_from(tokenizer, row: dict) -> int:
    """Which supervised token is the first of the final answer: as many as the text up to the end of its reasoning has come before it."""
    thought, closed, _ = row["text"].rpartition(REASONING_TAGS[1])
    return sum(_tokens(tokenizer, {**row, "text": thought + closed})[1]) - 1  # without that text's own end of turn


def _check_head(model, tokenizer) -> None:
    """Raise ConfigError where the model's logits are not what its output head makes of the last layer."""
    import torch

    ids = torch.tensor([asked_ids(tokenizer, "?")], device=model.device)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ConfigError(
            f"{model.config.name_or_path} cannot be read token by token: it changes its logits behind the output head. "
            "Take a Qwen2, Qwen2.5, Qwen3 or Llama model."
        )


def _read_batch(model, tokenizer, rows: list[tuple[list[int], list[int]]]) -> list[list[list]]:
    """What `_read_tile` returns, as lists, for the supervised tokens of each (ids, mask) of a batch.

    Logits are made at supervised positions alone, a tile of them at a time: (B, T, V) is never held.
    """
    import torch

    padded = tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt").to(model.device)
    wanted = [(row, place) for row, (_, mask) in enumerate(rows) for place, one in enumerate(mask) if one]
    of_row, places = torch.tensor(wanted, device=model.device).T
    with torch.inference_mode():
        hidden = model.get_decoder()(**padded, use_cache=False).last_hidden_state[of_row, places - 1]
        targets, head = padded["input_ids"][of_row, places], model.get_output_embeddings()
        tile = max(1, TILE_LOGITS // model.config.vocab_size)
        tiles = [_read_tile(head(part), target) for part, target in zip(hidden.split(tile), targets.split(tile), strict=True)]
    columns = [torch.cat(parts).tolist() for parts in zip(*tiles, strict=True)]
    ends = list(accumulate((sum(mask) for _, mask in rows), initial=0))
    return [[column[start:end] for column in columns] for start, end in pairwise(ends)]


def _read_tile(logits, targets) -> tuple:
    """(log p of the target, log p of the likeliest, the likeliest, whether it is the target), each (N,); logits (N, V), targets (N,)."""
    logarithms = logits.float().log_softmax(-1)
    best, top1 = logarithms.max(-1)
    return logarithms.gather(-1, targets[:, None])[:, 0], best, top1, top1 == targets


def _entry(logarithms: list[float], best: list[float], top1: list[int], right: list[bool], final_from: int) -> dict:
    """An entry of `probe_all`, of one row's supervised tokens."""
    if not all(map(math.isfinite, (*logarithms, *best))):
        return {"skipped": "its weights give numbers that are not finite"}
    count = len(top1)
    return {
        "tokens": count,
        "nll": -math.fsum(logarithms),
        "top1": top1,
        "final_probability": math.exp(math.fsum(logarithms[final_from:])),
        "token_confidence": math.fsum(map(math.exp, best)) / count,
        "token_right": sum(right) / count,
    }


if __name__ == "__main__":
    main()
