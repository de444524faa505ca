"""How fast models answer: to the first token, to a given length, in tokens a second, one question at a time and in batches.

Models are measured in a subprocess (`python -m distill.timing --request FILE`), in turn and in rounds (A B C, A B C), so that what the
machine does meanwhile falls on all of them. Every answer is made as long as is asked, whatever the model would stop at, with a timestamp
at each token: an answer of the longest length tells of the shorter ones too.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from . import engine, intervals, store
from .console import progress
from .errors import BackendError, ConfigError, DistillError
from .machine import teacher_settings
from .models import bits_for, check_model, load_to_answer
from .prompt import MODES, asked_ids

BATCHED_RUNS = 2  # of a round, after one to warm up
LEAST = {"runs": 1, "rounds": 1, "warm_up": 0, "batch_size": 1, "lengths": 2}
FACTS = ("bits", "device", "parameters", "weight_bytes")  # that are the same in each turn


def measure(
    requests: list[dict],
    run_folder: Path,
    *,
    runs: int = 20,
    lengths: tuple[int, ...] = (128, 256),
    batch_size: int = 8,
    rounds: int = 2,
    warm_up: int = 2,
    title: str = "Timing",
) -> dict:
    """Measure how fast models answer, in one subprocess, one model in memory at a time.

    requests    [{"name", "path", "role", "bits", "prompts": [{"instruction", "mode"}]}] and, where wanted, "model", another name for it
        role    "teacher" or "student"; each student is compared with each teacher
        bits    of a weight, 4, 8, 16 or 32; None takes a teacher's 8, or 4 where 8 do not fit; a student's by device
    run_folder  where the log goes, timing.log
    runs        answers of each model, one at a time, over all rounds; at least 1
    lengths     of an answer, in tokens
    batch_size  questions of a batch, whose answers are as long as the shortest length
    rounds      how often each model has its turn, at most `runs`; it is loaded anew each time
    warm_up     answers of a turn that do not count, as long as the shortest length; of batches it is one
    Returns {"runs", "rounds", "warm_up", "lengths", "batch_size", "models": {name: figures}, "ratios": [{"student", "teacher", "speed",
    "memory_saved", "parameters_saved"}]}. Seconds count from the question's tokens to an answer's, its own pass included; tokens a second
    from the first token to the last, so without it; the same in batches, of all answers together. "samples" holds what was measured.
    Raises ConfigError where a model's positions are too few for prompt and answer, PreflightError where a teacher does not fit,
    BackendError with the model's name and the end of the log.
    """
    _check({"runs": runs, "rounds": rounds, "warm_up": warm_up, "batch_size": batch_size, "lengths": min(lengths, default=0)})
    job = {"runs": runs, "rounds": min(rounds, runs), "warm_up": warm_up, "lengths": sorted(lengths), "batch_size": batch_size}
    held = [{**request, **_held(request, job)} for request in requests]
    turns = _measure(held, job, run_folder, title)
    figures = {request["name"]: _figures(request, turns[request["name"]], job) for request in requests}
    return {**job, "models": figures, "ratios": _ratios(requests, figures)}


def _check(given: dict[str, int]) -> None:
    """Raise ConfigError for numbers that cannot be."""
    if wrong := [f"{name} = {value!r}: give at least {LEAST[name]}." for name, value in given.items() if value < LEAST[name]]:
        raise ConfigError.from_problems("what is to be timed", wrong)


def _held(request: dict, job: dict) -> dict:
    """How a model is held, {"bits"}, once it is known that prompt and answer fit its positions, and a teacher this machine."""
    from transformers import PreTrainedConfig

    tokenizer, longest = check_model(request["path"], request["role"]), job["lengths"][-1]
    positions = PreTrainedConfig.get_config_dict(request["path"])[0].get("max_position_embeddings")
    needed = max(len(ids) for ids in _asked(tokenizer, request["prompts"])) + longest
    if positions and needed > positions:
        raise ConfigError(
            f"{request['name']} cannot be timed over {longest:,} tokens: with its longest prompt that is {needed:,}, and it has "
            f"{positions:,} positions. Take shorter lengths or prompts."
        )
    if request["role"] == "student":
        return {"bits": request["bits"]}
    asked = {"questions": request["prompts"], "max_new_tokens": dict.fromkeys(MODES, longest), "batch_size": job["batch_size"]}
    return {"bits": teacher_settings(request["path"], asked, request["bits"])["bits"]}


def _asked(tokenizer, prompts: list[dict]) -> list[list[int]]:
    return [asked_ids(tokenizer, prompt["instruction"], prompt.get("input") or "", prompt["mode"]) for prompt in prompts]


def _measure(requests: list[dict], job: dict, run_folder: Path, title: str) -> dict[str, list[dict]]:
    """Name → what each of its turns measured (`_turn`)."""
    store.make_folder(run_folder)
    log, at = run_folder / "timing.log", requests[0]["name"]
    total = len(requests) * (job["runs"] + job["rounds"] * (job["warm_up"] + 1 + BATCHED_RUNS))
    with TemporaryDirectory(dir=run_folder) as folder, progress(title, total=total) as update:

        def hear(event: dict) -> None:
            nonlocal at
            at = event["name"]
            update(event["done"], note=at)

        file, results = Path(folder) / "request.json", Path(folder) / "results.json"
        store.write_json(file, {"requests": requests, "job": job, "results": str(results)})
        ended = engine.run_module("distill.timing", ["--request", str(file)], log, hear)
        if ended.status or not results.is_file():
            raise engine.failure(f"{title} ({at})", ended, log)
        return store.read_json(results)


# Figures


def _figures(request: dict, turns: list[dict], job: dict) -> dict:
    """What a model's turns say, with intervals.

    turns  what `_turn` returned, of each round
    """
    single, batched = ([stamps for turn in turns for stamps in turn[kind]] for kind in ("single", "batched"))
    size = job["batch_size"]
    samples = {
        "first_token_seconds": [stamps[0] for stamps in single],
        "seconds": {str(length): [stamps[length - 1] for stamps in single] for length in job["lengths"]},
        "tokens_per_second": [_pace(stamps) for stamps in single],
        "batched": {
            "tokens_per_second": [size * _pace(stamps) for stamps in batched],
            "answers_per_second": [size / stamps[-1] for stamps in batched],
        },
    }
    return {
        "model": request.get("model", request["name"]),
        **{fact: turns[0][fact] for fact in FACTS},
        "peak_bytes": max((turn["peak_bytes"] for turn in turns if turn["peak_bytes"] is not None), default=None),
        "load_seconds": fmean(turn["load_seconds"] for turn in turns),
        "first_token_seconds": intervals.quantiles(samples["first_token_seconds"]),
        "seconds": {length: intervals.quantiles(values) for length, values in samples["seconds"].items()},
        "tokens_per_second": intervals.bootstrap_mean(samples["tokens_per_second"]),
        "batched": {name: intervals.bootstrap_mean(values) for name, values in samples["batched"].items()},
        "samples": samples,
    }


def _pace(stamps: list[float]) -> float:
    """Tokens a second once the first is there."""
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def _ratios(requests: list[dict], figures: dict) -> list[dict]:
    """Each student against each teacher."""
    named = {role: [request["name"] for request in requests if request["role"] == role] for role in ("student", "teacher")}
    return [
        {
            "student": student,
            "teacher": teacher,
            "speed": intervals.ratio_of_means(*(figures[name]["samples"]["tokens_per_second"] for name in (student, teacher))),
            "memory_saved": 1 - figures[student]["weight_bytes"] / figures[teacher]["weight_bytes"],
            "parameters_saved": 1 - figures[student]["parameters"] / figures[teacher]["parameters"],
        }
        for student in named["student"]
        for teacher in named["teacher"]
    ]


# In the engine's process


def main() -> None:
    """Measure the models of a request file in turn, round after round, then write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m distill.timing", description="How fast models answer, one model at a time.")
    parser.add_argument("--request", required=True, help="JSON: {requests, job, results}, as distill.timing.measure writes it")
    given, done = store.read_json(parser.parse_args().request), 0
    job, turns = given["job"], {request["name"]: [] for request in given["requests"]}

    def tell(name: str, count: int) -> None:
        nonlocal done
        done += count
        engine.emit(name=name, done=done)

    try:
        for number in range(job["rounds"]):
            runs = job["runs"] // job["rounds"] + (number < job["runs"] % job["rounds"])
            for request in given["requests"]:
                turns[request["name"]].append(_turn(request, job, runs, lambda count, name=request["name"]: tell(name, count)))
                _let_go()
        store.write_json(given["results"], turns)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _turn(request: dict, job: dict, runs: int, tell: Callable[[int], None]) -> dict:
    """Load a model and measure it: its facts, and the stamps of its answers, {"single": [stamps of a run], "batched": […]}."""
    tell(0)
    started, bits = time.perf_counter(), bits_for(request["path"], request["bits"])
    model, tokenizer = load_to_answer(request["path"], request["role"], bits)
    load_seconds = time.perf_counter() - started
    print(f"{request['name']}: {bits}-bit on {model.device}, loaded in {load_seconds:.1f} s")
    shortest, longest, asked = job["lengths"][0], job["lengths"][-1], cycle(_asked(tokenizer, request["prompts"]))

    def stamps(size: int, count: int, tokens: int) -> list[list[float]]:
        made = []
        for _ in range(count):
            made.append(answer_stamps(model, tokenizer, list(islice(asked, size)), tokens))
            tell(1)
        return made

    stamps(1, job["warm_up"], shortest)
    single = stamps(1, runs, longest)
    stamps(job["batch_size"], 1, shortest)
    batched = stamps(job["batch_size"], BATCHED_RUNS, shortest)
    facts = {"bits": bits, "device": str(model.device), "parameters": model.num_parameters(), "weight_bytes": model.get_memory_footprint()}
    return {**facts, "load_seconds": load_seconds, "peak_bytes": _peak_bytes(), "single": single, "batched": batched}


def answer_stamps(model, tokenizer, asked: list[list[int]], tokens: int) -> list[float]:
    """Answer a batch greedily, all answers exactly `tokens` long. Returns the seconds from its start to each token, `tokens` of them.

    model  its own generation settings are lost: they may stop, sample or penalise
    """
    import torch
    from transformers import GenerationConfig

    inputs = tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt").to(model.device)
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)  # no eos: nothing stops it
    model.generation_config, clock = settings, _clock()
    with torch.inference_mode():
        model.generate(**inputs, generation_config=settings, stopping_criteria=[clock])
    if len(clock.stamps) != tokens:
        raise BackendError(f"An answer of {tokens:,} tokens was asked for, and {len(clock.stamps):,} were made.")
    return clock.stamps


def _clock():
    """A stopping criterion that stops nothing and notes when each token was there."""
    import torch
    from transformers import StoppingCriteria

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU works on behind what it was given

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            synchronize()
            self.started, self.stamps = time.perf_counter(), []

        def __call__(self, input_ids, scores, **kwargs):
            synchronize()
            self.stamps.append(time.perf_counter() - self.started)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Clock()


def _peak_bytes() -> int | None:
    """The most that was allocated on the GPU in this turn; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _let_go() -> None:
    """Free what the last turn's model held, and forget its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
