"""Out of memory for real, by a limit on the address space: fewer rows at a time, the same rows a step, the loss curve of what fitted."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from distill import backoff, models, store, train, trainer
from distill.errors import BackendError

ROWS_A_STEP = 32
# a third of the rows is long, and the batch of the long ones is not the first
ROWS = [
    {"instruction": f"Sort from low to high the digits {number}.", "output": str(number * 7919 % 10000) * (1 if number % 3 else 60)}
    for number in range(96)
]
TRAINING = """
import json, resource, sys
from distill import train
limit_bytes = int(sys.argv[3])
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
try:
    result = train.run(sys.argv[1], Path(sys.argv[2]), "test")
except Exception as error:
    print("failed:", error)
else:
    print("trained:", json.dumps({"checkpoint": result.checkpoint, "metrics": result.metrics, "resumed_from": result.resumed_from}))
"""


@pytest.fixture
def run(tmp_path, make_job, start_python):
    """Train with so many rows at a time, within a limit of address space; in a process of its own, whose children inherit the limit."""

    def go(name: str, micro_batch: int, limit_bytes: int = 0, **settings) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        split = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": ROWS_A_STEP // micro_batch}
        shape = {"max_length": 512, "logging_steps": 1, "max_steps": 6, "seed": 1, "warmup_ratio": 0.0}
        job = make_job(folder, ROWS, **{**shape, **split, **settings})
        process = start_python(TRAINING, job, folder / "run", limit_bytes)
        peak = _Peak(process.pid)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines() if (folder / "run" / "metrics.jsonl").is_file() else []
        losses = [(line["step"], line["loss"]) for line in map(json.loads, lines) if "loss" in line]
        return {"said": said, "losses": losses, "peak_bytes": peak.bytes, "folder": folder}

    return go


class _Peak(threading.Thread):
    """Watches the engine that a process starts; `bytes` is the most address space that it had."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.lab, self.bytes = psutil.Process(pid), 0
        self.start()

    def run(self) -> None:
        while self.lab.is_running() and self.lab.status() != psutil.STATUS_ZOMBIE:
            for child in self.lab.children(recursive=True):
                try:
                    self.bytes = max(self.bytes, child.memory_info().vms)
                except psutil.NoSuchProcess:  # it has ended
                    continue
            time.sleep(0.05)


def test_a_forced_out_of_memory_backs_off_and_gives_the_loss_curve_of_the_run_that_fitted(run):
    fitted = run("fitted", 8)
    forced = run("forced", 32, limit_bytes=fitted["peak_bytes"] + 100 * 2**20)
    assert "trained:" in forced["said"], forced["said"]
    record = store.read_json(forced["folder"] / "out" / "distill_run.json")
    splits = [(entry["from"]["micro_batch"], entry["to"]["micro_batch"]) for entry in record["backed_off"]]
    assert splits in ([(32, 16)], [(32, 16), (16, 8)])
    assert all(entry["to"]["micro_batch"] * entry["to"]["accumulation"] == ROWS_A_STEP for entry in record["backed_off"])
    assert record["chosen"]["micro_batch"]["reason"] == f"{splits[-1][0]} rows at a time ran out of memory"
    assert record["job"]["training"]["per_device_train_batch_size"] == 32  # what was asked for
    # the step before is done once: the engine saved it when the next one did not fit
    step = record["backed_off"][0]["step"]
    assert step == 2 and record["sessions"] == [0, 2] and '"resumed_from": null' in forced["said"]
    assert f"out of memory after step {step}: goes on with 16 × 2 rows in place of 32 × 1, the same in a step" in forced["said"]
    assert [step for step, _ in forced["losses"]] == [step for step, _ in fitted["losses"]] == [1, 2, 3, 4, 5, 6]
    differences = [abs(left[1] - right[1]) for left, right in zip(forced["losses"], fitted["losses"], strict=True)]
    assert max(differences) < 1e-4


# Whose fault it was


def test_the_errors_of_every_allocator_are_known_and_others_are_not():
    import torch

    known = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()]
    known += [RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")]
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**60, dtype=torch.uint8)
    assert all(map(backoff.is_out_of_memory, [*known, on_cpu.value]))
    assert not backoff.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_that_the_kernel_killed_counts_where_its_counter_rose(tmp_path):
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert backoff.kernel_kills((str(tmp_path / "none"), str(counter))) == 2
    assert backoff.kernel_kills((str(tmp_path / "none"),)) == 0
    assert backoff.kernel_kills() >= 0
    assert backoff.ran_out(-signal.SIGKILL, 2, 3) and backoff.ran_out(backoff.STATUS, 2, 2)
    assert not backoff.ran_out(-signal.SIGKILL, 2, 2) and not backoff.ran_out(1, 2, 3)


def test_an_engine_that_was_killed_for_its_memory_is_started_again_with_fewer_rows(tmp_path, make_job, prepared_rows, monkeypatch):
    """The kill is real; that the kernel did it for the memory is what it counted, as it is told here."""
    kills = iter([0, 1, 1, 1])
    monkeypatch.setattr(backoff, "kernel_kills", lambda: next(kills))
    job = make_job(tmp_path, prepared_rows[:64], num_epochs=8, save_steps=4, logging_steps=1)

    def kill_once() -> None:
        while not list((tmp_path / "run" / "checkpoints").glob("checkpoint-8/manifest.json")):
            time.sleep(0.02)
        for child in psutil.Process().children(recursive=True):
            if child.cmdline()[1:3] == ["-m", "distill.train"]:
                os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=kill_once, daemon=True).start()
    result = train.run(job, tmp_path / "run", "test")
    record = store.read_json(Path(result.checkpoint) / "distill_run.json")
    assert [entry["to"] for entry in record["backed_off"]] == [{"micro_batch": 8, "accumulation": 2}]
    assert record["sessions"][0] == 0 and record["sessions"][1] >= 8 and result.resumed_from is None


@pytest.mark.parametrize("is_moment", [lambda event: "session" in event, lambda event: event.get("in_steps") is False])
def test_a_kill_for_memory_while_loading_or_publishing_halves_nothing(tmp_path, make_job, prepared_rows, monkeypatch, is_moment):
    """The kill is real; that the kernel did it for the memory is what it counted, as it is told here."""
    kills = iter([0, 1])
    monkeypatch.setattr(backoff, "kernel_kills", lambda: next(kills))

    def kill(event: dict) -> None:
        if is_moment(event):
            for child in psutil.Process().children(recursive=True):
                if child.cmdline()[1:3] == ["-m", "distill.train"]:
                    os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(train, "_progress", lambda update: kill)
    job = make_job(tmp_path, prepared_rows[:16], max_steps=1, warmup_ratio=0.0)
    with pytest.raises(BackendError, match="out of memory where the model is loaded or published, not in a step. This would fit: "):
        train.run(job, tmp_path / "run", "test")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run" / "checkpoints" / backoff.RECORD).exists()


@pytest.mark.parametrize("where", ["load_student", "_keep_last"])
def test_an_engine_without_memory_outside_of_the_steps_says_so_by_its_status(tmp_path, make_job, prepared_rows, monkeypatch, capsys, where):
    import torch

    job = make_job(tmp_path, prepared_rows[:8], max_steps=1, warmup_ratio=0.0)
    monkeypatch.setattr(train, where, lambda *arguments: torch.empty(2**60, dtype=torch.uint8))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(job), "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == backoff.STATUS and "out of memory outside of the steps" in capsys.readouterr().out


def test_no_memory_for_loading_is_not_the_models_fault(micro, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *arguments, **named: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        models.load_to_train(str(micro / "student_system1"))


# The split of a step


def test_rows_are_halved_and_an_odd_number_is_divided_so_that_a_step_keeps_its_rows():
    splits, split = [], {"micro_batch": 24, "accumulation": 2}
    while split:
        splits.append((split["micro_batch"], split["accumulation"]))
        split = backoff.smaller(split)
    assert splits == [(24, 2), (12, 4), (6, 8), (3, 16), (1, 48)]


def test_the_order_of_rows_is_the_same_however_a_step_is_split():
    lengths = [number * 7919 % 97 + 3 for number in range(100)]
    orders = []
    for micro_batch in (16, 4, 1):
        order = trainer.length_groups(lengths, micro_batch * (16 // micro_batch), seed=3, epoch=1)
        orders.append([order[start : start + 16] for start in range(0, 100, 16)])
    assert orders[0] == orders[1] == orders[2]


def test_the_split_that_fitted_is_kept_for_the_next_session_of_this_job_alone(tmp_path, make_job, prepared_rows):
    job = store.read_json(make_job(tmp_path, prepared_rows[:8], per_device_eval_batch_size=64))
    session = {"resume_key": "this", "split": backoff.split_of(job["training"])}
    assert "goes on with 8 × 2 rows in place of 16 × 1" in backoff.back_off(job, session, 5, tmp_path)
    training = backoff.fitted(job, backoff.history(tmp_path, "this", job["training"]))["training"]
    assert backoff.split_of(training) == {"micro_batch": 8, "accumulation": 2} and training["per_device_eval_batch_size"] == 32
    assert backoff.history(tmp_path, "another", job["training"]) == []


def test_a_split_that_is_asked_for_anew_is_not_overridden_by_what_fitted(tmp_path, make_job, prepared_rows):
    job = store.read_json(make_job(tmp_path, prepared_rows[:8]))
    backoff.back_off(job, {"resume_key": "this", "split": backoff.split_of(job["training"])}, 5, tmp_path)
    asked = {**job["training"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}  # of the same key
    assert backoff.history(tmp_path, "this", asked) == []
    session = {"resume_key": "this", "split": backoff.split_of(asked)}
    assert "1 × 16 rows in place of 2 × 8" in backoff.back_off({**job, "training": asked}, session, 6, tmp_path)
    assert [entry["step"] for entry in backoff.history(tmp_path, "this", asked)] == [6]


@pytest.mark.parametrize(("times", "rows"), [(4, 8), (0, 1)])
def test_after_four_times_or_with_one_row_it_fails_with_what_needs_less(tmp_path, make_job, prepared_rows, times, rows):
    job = store.read_json(make_job(tmp_path, prepared_rows[:8], max_length=4096))
    entry = {"from": backoff.split_of(job["training"])}
    store.write_json(tmp_path / backoff.RECORD, {"resume_key": "this", "backed_off": [entry] * times})
    session = {"resume_key": "this", "split": {"micro_batch": rows, "accumulation": 1}, "capability": None}
    with pytest.raises(BackendError, match=f"out of memory after step 7, with {rows} row") as caught:
        backoff.back_off(job, session, 7, tmp_path)
    assert str(caught.value).endswith(backoff.advice(job, session)) and "This would fit: " in str(caught.value)
    assert backoff.history(tmp_path, "this", job["training"]) == []


def test_the_advice_is_the_nearest_settings_that_take_less(tmp_path, make_job, prepared_rows):
    session = {"split": {"micro_batch": 1, "accumulation": 8}, "capability": None}
    job = store.read_json(make_job(tmp_path, prepared_rows[:8], max_length=4096))
    assert backoff.advice(job, session) == "This would fit: gradient_checkpointing = True."
    job = store.read_json(make_job(tmp_path, prepared_rows[:8], lora_rank=8, quantize_bits=4, gradient_checkpointing=True, max_length=4096))
    assert backoff.advice(job, session).startswith("This would fit: max_length = ")
