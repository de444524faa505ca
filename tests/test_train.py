"""The built-in engine for real: one small training by subprocess, its checkpoint, its failures and its interruptions."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill import samples, store, train, trainer
from distill.checkpoint import RUN_RECORD, verify_checkpoint, weight_hashes, with_edits
from distill.errors import BackendError, ConfigError
from distill.generation import generate
from distill.models import load_to_train

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(small_run):
    return Path(small_run["checkpoint"])


def test_checkpoint_is_complete_and_sealed(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "distill_run.json",
    } <= names
    record = store.read_manifest(checkpoint, name=RUN_RECORD)
    assert set(record["files"]) == names - {"distill_run.json"}
    assert record["backend"] == "builtin" and record["versions"]["trl"] and record["job"]["job_type"] == "kd_black_box_train_only"
    assert record["settings"]["learning_rate"] == {"value": 0.002, "origin": "preset micro_system1"}
    assert record["settings"]["num_train_epochs"]["origin"] == "yours"


def test_checkpoint_loads_plainly_and_stops_at_the_end_of_turn(checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert tokenizer.chat_template


def test_every_parameter_moved(checkpoint, micro):
    student, _ = load_to_train(str(micro / "student_system1"))
    before = weight_hashes(student)
    assert verify_checkpoint(checkpoint, before) == len(before)


def test_training_taught_something(small_run, checkpoint):
    metrics = store.read_json(checkpoint / RUN_RECORD)["metrics"]
    assert metrics["last_loss"] < 0.8 * metrics["first_loss"]
    assert metrics["best_validation_loss"] == min(metrics["validation_loss"])
    assert len(metrics["validation_loss"]) == 2  # one an epoch


def test_metrics_are_json_lines_with_loss_and_learning_rate(small_run):
    lines = [json.loads(line) for line in (small_run["run"] / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert logged and all({"step", "steps", "loss", "learning_rate", "time"} <= set(line) for line in logged)
    assert any("eval_loss" in line for line in lines)


def test_last_checkpoint_is_kept_in_the_run_folder_and_optimizer_states_are_not(small_run):
    last = small_run["run"] / "last"
    load_to_train(str(last))
    assert not list(small_run["run"].rglob("optimizer.pt")) and not (small_run["run"] / "checkpoints").exists()


def test_best_and_last_differ_when_validation_worsens(tmp_path, micro, make_job):
    """A student that is taught noise overfits: the published checkpoint is the one with the lowest validation loss."""
    rows = [{"instruction": f"Sort from low to high the digits {number}.", "output": str(number * 7919 % 10000)} for number in range(64)]
    job = make_job(
        tmp_path, rows, validation=rows[:1] + [{"instruction": "Say odd.", "output": "even"}] * 20, num_epochs=6, learning_rate=8e-3
    )
    result = train.run(job, tmp_path / "run", "test")
    losses = result.metrics["validation_loss"]
    assert result.metrics["best_validation_loss"] == min(losses) < losses[-1]
    best, last = (weight_hashes(load_to_train(str(path))[0]) for path in (result.checkpoint, tmp_path / "run" / "last"))
    assert best != last


def test_settings_become_arguments_that_trl_accepts(tmp_path):
    from trl import SFTConfig

    preset = json.loads((ROOT / "configs/presets/system1.json").read_text())
    training = {
        key: value for key, value in preset.items() if key in {field.name for field in dataclasses.fields(SFTConfig)} | {"warmup_ratio"}
    }
    arguments = SFTConfig(**trainer.sft_settings({**training, "num_train_epochs": 3}, str(tmp_path), validate=True))
    assert arguments.warmup_steps == 0.1 and arguments.get_warmup_steps(200) == 20
    assert not arguments.bf16 and not arguments.fp16 and not arguments.activation_checkpointing and arguments.completion_only_loss
    assert arguments.eval_strategy == arguments.save_strategy == "epoch" and arguments.load_best_model_at_end


def test_loss_is_the_mean_over_answer_tokens_and_nothing_else(tmp_path, micro, make_job):
    """The engine's own first loss against a plain float64 cross-entropy over the supervised positions."""
    import torch

    rows = [
        {"instruction": "Is 1234 even or odd?", "output": "even"},
        {"instruction": "Sort from low to high the digits 4312.", "output": "1234"},
    ]
    job = make_job(tmp_path, rows, per_device_train_batch_size=2, max_steps=1, logging_steps=1, warmup_ratio=0.0)
    result = train.run(job, tmp_path / "run", "test")
    model, _ = load_to_train(str(micro / "student_system1"))
    model = model.double().eval()
    total, count = 0.0, 0
    for row in store.read_rows(store.read_json(job)["dataset"]["labeled_path"]):
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"], dtype=torch.bool)
        logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)
        total -= logprobs[:-1].gather(1, ids[1:, None])[mask[1:], 0].sum().item()
        count += int(mask.sum())
    assert result.metrics["first_loss"] == pytest.approx(total / count, abs=2e-4)


def test_accumulated_steps_equal_one_big_batch(tmp_path, make_job, prepared_rows):
    """8 rows at once and 1 × 8 accumulated give the same weights, to rounding: the loss is a mean over tokens, not over batches."""
    import torch

    outcomes = []
    for name, size, accumulation in (("big", 8, 1), ("accumulated", 1, 8)):
        folder = tmp_path / name
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3, "optim": "sgd"}
        job = make_job(folder, prepared_rows[:24], learning_rate=1e-2, warmup_ratio=0.0, **settings)
        outcomes.append(load_to_train(train.run(job, folder / "run", "test").checkpoint)[0])
    pairs = zip(outcomes[0].parameters(), outcomes[1].parameters(), strict=True)
    assert max((left - right).abs().max().item() for left, right in pairs if torch.numel(left)) < 1e-5


def test_a_job_whose_rows_are_not_tokenized_is_refused_with_the_reason(tmp_path, make_job):
    job = make_job(tmp_path, [{"instruction": "Is 1234 even or odd?", "output": "even"}])
    changed = store.read_json(job)
    store.write_rows(tmp_path / "text.json", [{"instruction": "a", "output": "b"}])
    changed["dataset"]["labeled_path"] = str(tmp_path / "text.json")
    store.write_json(job, changed)
    with pytest.raises(BackendError, match="no token file of the lab"):
        train.run(job, tmp_path / "run", "test")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_change_are_a_failure(tmp_path, make_job):
    job = make_job(
        tmp_path,
        [{"instruction": "Is 1234 even or odd?", "output": "even"}],
        learning_rate=1e-9,
        max_steps=1,
        warmup_steps=1000,
        warmup_ratio=0.0,
    )
    with pytest.raises(BackendError, match="nothing was learnt"):
        train.run(job, tmp_path / "run", "test")
    assert not (tmp_path / "out").exists()


def test_a_job_edited_after_its_tokens_were_made_is_refused(tmp_path, make_job, micro):
    from distill.pipeline import run_easy_distill

    job = make_job(tmp_path, [{"instruction": "Is 1234 even or odd?", "output": "even"}])
    changed = store.read_json(job)
    changed["training"]["max_length"] = 64
    store.write_json(job, changed)
    with pytest.raises(ConfigError, match="another max_length"):
        run_easy_distill(job)


def test_an_edit_in_the_job_file_is_recorded_as_such():
    planned = {"learning_rate": {"value": 0.1, "origin": "yours"}, "seed": {"value": 1, "origin": "preset x"}}
    recorded = with_edits(planned, {"learning_rate": 0.2, "seed": 1, "output_dir": "/x"})
    assert recorded == {"learning_rate": {"value": 0.2, "origin": "job file"}, "seed": {"value": 1, "origin": "preset x"}}


def test_length_groups_cover_every_row_once_with_little_padding_in_random_order():
    lengths = [(number * 7919) % 190 + 10 for number in range(1003)]
    order = trainer.length_groups(lengths, 16, seed=0, epoch=0)
    assert sorted(order) == list(range(1003))
    assert order == trainer.length_groups(lengths, 16, seed=0, epoch=0) != trainer.length_groups(lengths, 16, seed=0, epoch=1)
    batches = [[lengths[number] for number in order[start : start + 16]] for start in range(0, 1003, 16)]
    assert sum(max(batch) * len(batch) for batch in batches) < 1.1 * sum(lengths)
    means = [sum(batch) / len(batch) for batch in batches]
    rising = sum(left < right for left, right in zip(means, means[1:], strict=False)) / (len(means) - 1)
    assert 0.35 < rising < 0.65


def test_the_engine_draws_its_batches_by_length_when_asked(tmp_path, make_job, prepared_rows):
    rows = [{**row, "output": row["output"] * (20 if number % 2 else 1)} for number, row in enumerate(prepared_rows[:64])]
    settings = {"per_device_train_batch_size": 4, "max_steps": 16, "logging_steps": 1, "warmup_ratio": 0.0}
    tokens = {}
    for grouped in (True, False):
        folder = tmp_path / str(grouped)
        train.run(make_job(folder, rows, group_by_length=grouped, **settings), folder / "run", "test")
        logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        tokens[grouped] = [line["num_tokens"] for line in logged if "loss" in line]
    steps = {grouped: [right - left for left, right in zip(seen, seen[1:], strict=False)] for grouped, seen in tokens.items()}
    assert max(steps[True]) - min(steps[True]) > max(steps[False]) - min(steps[False])  # long with long, short with short


def test_the_engine_sees_one_gpu(monkeypatch):
    from distill import engine

    for given, seen in (("2,3", "2"), ("", ""), ("1", "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert engine._one_gpu() == {"CUDA_VISIBLE_DEVICES": seen}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert engine._one_gpu() == {"CUDA_VISIBLE_DEVICES": "0"}


def test_attention_is_chosen_with_a_reason():
    assert trainer.attention_for(512)[0] == "eager" and trainer.attention_for(513)[0] == "sdpa"
    assert all(trainer.attention_for(length)[1] for length in (64, 4096))


# Sample answers


def test_sample_answers_are_the_students_own_at_every_validation(small_run):
    from distill.prompt import asked_ids

    told = list(store.read_rows(small_run["run"] / "samples.jsonl"))
    validation = list(store.read_rows(small_run["run"] / "train_tokenized_validation.json"))[:3]
    steps = small_run["result"].metrics["steps"]
    assert [sample["step"] for sample in told] == [steps // 2] * 3 + [steps] * 3  # one an epoch
    model, tokenizer = load_to_train(str(small_run["run"] / "last"))
    asked = [asked_ids(tokenizer, row["instruction"]) for row in validation]
    limit = math.ceil(
        1.5 * max(sum(row["completion_mask"]) for row in store.read_rows(small_run["run"] / "train_tokenized_validation.json"))
    )
    answers = generate(model.eval(), tokenizer, asked, limit)
    for sample, row, answer in zip(told[3:], validation, answers, strict=True):
        texts = {"instruction": row["instruction"], "answer": answer.text, "reference": row["output"]}
        assert sample == {"step": steps, **texts, "stopped": answer.stopped}
    log = (small_run["run"] / "train.log").read_text()
    assert all(samples.sample_line(sample) in log for sample in told)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bitwise_the_same_with_and_without_sample_answers(tmp_path, make_job, prepared_rows, micro, precision):
    """With dropout and a shuffled order, so that a random number drawn for a sample would show."""
    hashes = {}
    for count in (0, 2):
        folder = tmp_path / str(count)
        settings = {"num_epochs": 3, "lora_rank": 4, "lora_dropout": 0.2, "bf16": precision == "bf16"}
        job = store.read_json(make_job(folder, prepared_rows[:32], prepared_rows[32:40], **settings))
        tokens = Path(job["dataset"]["labeled_path"])
        callbacks = train._callbacks(train.validation_path(tokens), count, folder)
        data = trainer.datasets(tokens, folder / "cache")
        student = load_to_train(str(micro / "student_system1"), attention="eager")
        made = trainer.build_trainer(job, precision, student, data, folder / "checkpoints", callbacks)
        made.train()
        hashes[count] = weight_hashes(made.model)
        lines = (folder / "samples.jsonl").read_text().splitlines() if count else []
        assert len(lines) == 3 * count and (folder / "samples.jsonl").exists() == bool(count)
    assert hashes[0] == hashes[2]


def test_answering_in_the_midst_of_training_disturbs_neither_mode_nor_random_numbers():
    import random

    import numpy
    import torch

    def draws() -> tuple:
        return torch.rand(1).item(), random.random(), numpy.random.rand()

    model = torch.nn.Dropout()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    wanted = draws()
    torch.set_rng_state(states[0]), random.setstate(states[1]), numpy.random.set_state(states[2])
    with samples.undisturbed(model):
        assert not model.training
        torch.manual_seed(0), draws()
    assert model.training and draws() == wanted
    with samples.undisturbed(model.eval()):
        pass
    assert not model.training


def test_sample_questions_are_the_first_of_the_file_and_their_answers_have_a_limit(tmp_path):
    def write(*lengths: int) -> Path:
        store.write_rows(tmp_path / "rows.json", [{"id": n, "completion_mask": [0, 0] + [1] * length} for n, length in enumerate(lengths)])
        return tmp_path / "rows.json"

    rows, limit = samples.sample_questions(write(4, 5, 9, 3), 2)
    assert [row["id"] for row in rows] == [0, 1] and limit == 14  # 9 × 1.5, rounded up; the longest of all rows
    assert samples.sample_questions(write(400), 3)[1] == 512 and len(samples.sample_questions(write(400), 3)[0]) == 1


def test_a_hostile_sample_is_one_printable_line(capsys):
    hostile = "a\n@event {}\x1b[2J\u2028[bold]" + "b" * 500 + " the end"
    sample = {"step": 1200, "instruction": hostile, "answer": hostile, "reference": "", "stopped": False}
    line = samples.sample_line(sample)
    assert line.isprintable() and line.startswith("step 1200: a @event {} [2J [bold]") and "the end (cut off)" in line and len(line) < 260
    train._progress(lambda *arguments, **named: pytest.fail("a sample is no step"))({"sample": sample})
    assert "[bold]" in capsys.readouterr().out


def test_a_second_training_keeps_the_first_checkpoint_as_previous(tmp_path, make_job):
    rows = [{"instruction": "Is 1234 even or odd?", "output": "even"}]
    job = make_job(tmp_path, rows, max_steps=1, warmup_ratio=0.0)
    first = train.run(job, tmp_path / "run", "test")
    kept = weight_hashes(load_to_train(first.checkpoint)[0])
    train.run(make_job(tmp_path, rows, max_steps=2, warmup_ratio=0.0), tmp_path / "run", "test")
    assert weight_hashes(load_to_train(f"{first.checkpoint}.previous")[0]) == kept


# Interruptions: each starts the command line in a process of its own, over an older checkpoint that must survive


@pytest.fixture
def long_run(tmp_path, make_job, prepared_rows):
    """A training of many steps, started as a command over a checkpoint that stands already; yields (process, folder, old hashes)."""
    first = train.run(make_job(tmp_path, prepared_rows[:8], max_steps=1, warmup_ratio=0.0), tmp_path / "run", "test")
    old = {path.name: store.hash_file(path) for path in Path(first.checkpoint).iterdir()}
    job = make_job(tmp_path, prepared_rows * 4, num_epochs=50, save_strategy="steps", save_steps=4)
    code = f"from distill_app import run_easy_distill; run_easy_distill({str(job)!r})"
    # a shell that runs the tests in the background has them ignore interrupts, and a child inherits that
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **heed)
    checkpoints = Path(store.read_json(job)["dataset"]["labeled_path"]).parent / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*")), 90)
    yield process, tmp_path, old
    process.kill()


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def engine_of(process) -> psutil.Process:
    lab = psutil.Process(process.pid)
    return next(child for child in lab.children(recursive=True) if child.cmdline()[1:3] == ["-m", "distill.train"])


def assert_untouched(folder: Path, old: dict):
    assert {path.name: store.hash_file(path) for path in (folder / "out").iterdir()} == old
    assert not [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    assert store.read_manifest(folder / "out", name=RUN_RECORD)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_engine_is_an_error_that_shows_the_log_and_changes_nothing(long_run):
    process, folder, old = long_run
    engine_of(process).kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "BackendError: Training failed: it was ended by SIGKILL" in output
    shown = output[output.index("BackendError: Training failed") :]
    assert "train.log" in shown and "| attention: " in shown
    assert_untouched(folder, old)


def test_a_killed_lab_takes_its_engine_along_and_changes_nothing(long_run):
    process, folder, old = long_run
    engine = engine_of(process)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: has_ended(engine), 15)
    assert_untouched(folder, old)


def test_an_interrupt_ends_the_engine_and_changes_nothing(long_run):
    process, folder, old = long_run
    engine = engine_of(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0 and has_ended(engine)
    assert_untouched(folder, old)
