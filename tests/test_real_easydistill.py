"""The real EasyDistill 1.x, where EASYDISTILL_HOME names one: both students of the micro world, the same tokens, the same faults."""

import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from test_launch import left_behind, processes_in

from distill import data, easydistill, launch, process, store, traces, train, trainer, workplace
from distill.checkpoint import RUN_RECORD
from distill.errors import BackendError
from distill.models import load_to_train

HOME = os.environ.get(easydistill.HOME, "")
INSTALLATION, REASON = easydistill.find(1) if HOME else (None, f"{easydistill.HOME} names no EasyDistill")
pytestmark = [pytest.mark.easydistill, pytest.mark.skipif(INSTALLATION is None, reason=f"needs the real EasyDistill 1.x: {REASON}")]
EQUAL = {"group_by_length": False, "backend": "easydistill", "logging_steps": 2}
ROWS = 10

# EasyDistill's own trainer, run as it is up to the training itself: its first rows, and what its collator makes of them.
ITS_ROWS = """
import json, runpy, sys
from trl import SFTTrainer

count, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script

def show(trainer):
    rows = [trainer.train_dataset[number] for number in range(int(count))]
    batch = {name: values.tolist() for name, values in trainer.data_collator(rows).items()}
    print("@rows", json.dumps({"ids": [row["id"] for row in rows], **batch}))
    sys.exit()

SFTTrainer.train = show
runpy.run_path(script, run_name="__main__")
"""
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = json.loads(sys.argv[2])
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, -1]
print("@rows", json.dumps([logits.tolist(), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer(sys.argv[3])["input_ids"]]))
"""


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """The environment by its own name, since a test's root is not the one that the environment was made in."""
    monkeypatch.setenv(easydistill.HOME, str(INSTALLATION.python.parent.parent))


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def system1_rows(project, micro) -> Path:
    return Path(data.prepare_system1_dataset("train[:400]", source=str(micro / "distilqwen.parquet"), validation=0).path)


def ask_its_python(code: str, *arguments: str) -> dict:
    done = subprocess.run([INSTALLATION.python, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("@rows ", 1)[1])


def job_of(system: str, labeled: Path, micro: Path, **settings) -> str:
    from distill import pipeline

    write = {"system1": pipeline.write_system1_config, "system2": pipeline.write_system2_config}[system]
    student = str(micro / f"student_{system}")
    return write({"preset": f"micro_{system}", "student_model": student, "labeled_path": str(labeled), **EQUAL, **settings})


def system2_rows(project, micro) -> Path:
    source, student = str(micro / "omnithought.parquet"), str(micro / "student_system2")
    made = traces.prepare_system2_dataset(
        "train[:600]", source=source, rows=None, rv_max=2, student_model=student, max_length=256, validation=0
    )
    return Path(made.path)


# Training


def distil(system: str, labeled: Path, micro: Path, **settings) -> dict:
    from distill import pipeline

    distill = {"system1": pipeline.distill_system1, "system2": pipeline.distill_system2}[system]
    student = str(micro / f"student_{system}")
    out = distill({"preset": f"micro_{system}", "student_model": student, "labeled_path": str(labeled), **EQUAL, **settings})
    load_to_train(out)
    return store.read_manifest(out, name=RUN_RECORD)


def test_system1_trains_to_its_end(tmp_path, temporary, project, micro, system1_rows):
    record = distil("system1", system1_rows, micro, num_epochs=3)
    metrics = record["metrics"]
    assert record["backend"] == "easydistill" and record["mode"] == "system1"
    assert record["easydistill"]["versions"]["trl"] == INSTALLATION.versions["trl"]
    assert metrics["steps"] == 75 and metrics["last_loss"] < 0.5 * metrics["first_loss"]
    assert metrics["tensors_moved"] == 38 and left_behind(tmp_path) == []


def test_system2_trains_to_its_end(tmp_path, temporary, project, micro):
    record = distil("system2", system2_rows(project, micro), micro, num_epochs=2)
    metrics = record["metrics"]
    assert record["backend"] == "easydistill" and record["mode"] == "system2"
    assert metrics["last_loss"] < 0.5 * metrics["first_loss"] and left_behind(tmp_path) == []


def test_it_trains_with_the_settings_that_a_job_may_hold(tmp_path, temporary, project, micro, system1_rows):
    extra = {"gradient_checkpointing": True, "bf16": True, "max_steps": 4, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 1.0}
    extra |= {"optim": "adafactor", "gradient_accumulation_steps": 2, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
    record = distil("system1", system1_rows, micro, **extra)
    assert record["metrics"]["steps"] == 4 and record["chosen"]["precision"]["value"] == "bf16"


def test_in_the_same_order_the_losses_are_the_built_in_engines(tmp_path, temporary, project, micro, system1_rows):
    """EasyDistill shuffles the rows before the trainer does: laid out the other way round, they come in the built-in order. Without
    weight decay, which its transformers applies to the last norm too, rounding alone is left, and grows."""
    import numpy

    job = Path(job_of("system1", system1_rows, micro, num_epochs=2, weight_decay=0.0))
    settings = store.read_json(job)
    rows = list(store.read_rows(settings["dataset"]["labeled_path"]))
    laid_out: list = [None] * len(rows)
    for place, row in zip(numpy.random.default_rng(settings["dataset"]["seed"]).permutation(len(rows)), rows, strict=True):
        laid_out[place] = row
    losses = {}
    for name, given in (("built-in", rows), ("easydistill", laid_out)):
        folder = tmp_path / name
        folder.mkdir()
        settings["training"]["output_dir"], settings["dataset"]["labeled_path"] = str(folder / "out"), str(folder / "tokens.json")
        store.write_rows(folder / "tokens.json", given)
        own = store.write_json(folder / "job.json", settings)
        train.run(own, folder, "test") if name == "built-in" else launch.run(own, folder, "test", INSTALLATION)
        losses[name] = [line["loss"] for line in store.read_rows(folder / "metrics.jsonl") if "loss" in line]
    gaps = [abs(ours - theirs) for ours, theirs in zip(losses["built-in"], losses["easydistill"], strict=True)]
    print(f"{len(gaps)} losses from {losses['built-in'][0]:.3f} to {losses['built-in'][-1]:.3f}, largest gap {max(gaps):.5f}")
    assert len(gaps) == 25 and max(gaps) < 2e-4


# The same tokens, the same student


@pytest.mark.parametrize("system", ["system1", "system2"])
def test_ids_and_supervised_positions_of_ten_rows_are_the_built_in_engines(tmp_path, temporary, project, micro, system1_rows, system):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    labeled = system1_rows if system == "system1" else system2_rows(project, micro)
    job = store.read_json(job_of(system, labeled, micro))
    for name in ("out", "cache"):
        (tmp_path / "work" / name).mkdir(parents=True)
    training = workplace.training_for(job, "fp32", gpu=False)
    with workplace.safe_folder(job, tmp_path / "work", INSTALLATION, training, 1) as place:
        train = str(INSTALLATION.home / "easydistill" / "kd" / "train.py")
        theirs = ask_its_python(ITS_ROWS, str(ROWS), train, "--config", str(place / "job.json"))
    tokens = Path(job["dataset"]["labeled_path"])
    places = {row["id"]: number for number, row in enumerate(store.read_rows(tokens))}
    rows, _ = trainer.datasets(tokens, tmp_path / "cache")
    _, tokenizer = load_to_train(job["models"]["student"])
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    ours = {name: values.tolist() for name, values in collate([rows[places[name]] for name in theirs["ids"]]).items()}
    assert len(ours["labels"]) == ROWS and theirs["input_ids"] == ours["input_ids"] and theirs["labels"] == ours["labels"]
    for number in range(ROWS):
        supervised = [[position for position, label in enumerate(made["labels"][number]) if label != -100] for made in (theirs, ours)]
        print(f"row {number}: EasyDistill {theirs['input_ids'][number]} {supervised[0]}")
        print(f"       built-in    {ours['input_ids'][number]} {supervised[1]}")
        assert supervised[0] == supervised[1] and supervised[0]


@pytest.mark.parametrize("rope", [{"rope_theta": 10000.0, "rope_type": "default"}, {"rope_theta": 1e6, "rope_type": "default"},
                                  {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}])  # fmt: skip
def test_a_student_gives_the_same_logits_in_its_transformers(tmp_path, micro, rope):
    """Written by transformers 5, whose rope_parameters 4.51 would overlook."""
    import torch

    from distill.prompt import asked_ids

    model, tokenizer = load_to_train(str(micro / "student_system1"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    model.config.rope_parameters = rope
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    model, tokenizer = load_to_train(str(tmp_path / "student"))
    ids = asked_ids(tokenizer, "Sort from low to high the digits 4312. " * 8)
    workplace.write_student(tmp_path / "student", tmp_path / "for_easydistill")
    text = "Is 1234 even?<|im_end|> 雪"
    logits, eos, pad, text_ids = ask_its_python(LOGITS, str(tmp_path / "for_easydistill"), json.dumps(ids), text)
    with torch.no_grad():
        ours = model.eval()(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(logits), ours, atol=1e-4)
    assert (eos, pad, text_ids) == (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer(text)["input_ids"])


# Faults


@pytest.fixture
def fail(tmp_path, temporary, project, micro, system1_rows, monkeypatch):
    """Runs a job whose safe folder was sabotaged, and returns the message; nothing may be left."""
    job = job_of("system1", system1_rows, micro, num_epochs=1)

    def run(sabotage=lambda place: None, **settings) -> str:
        real = process.run

        def sabotaged(command, log, on_line, *, cwd, **named):
            if (Path(cwd) / "job.json").is_file():
                sabotage(Path(cwd))
            return real(command, log, on_line, cwd=cwd, **named)

        monkeypatch.setattr(launch.process, "run", sabotaged)
        out, run_folder = Path(store.read_json(job)["training"]["output_dir"]), tmp_path / "run"
        run_folder.mkdir()
        with pytest.raises(BackendError) as caught:
            launch.run(job, run_folder, "test", INSTALLATION, **settings)
        assert not out.exists() and left_behind(tmp_path) == []
        print(caught.value)
        return str(caught.value)

    return run


def change(place: Path, name: str, section: str | None = None, **values) -> None:
    found = store.read_json(place / name)
    store.write_json(place / name, {**found, section: {**found[section], **values}} if section else {**found, **values})


def test_an_unknown_setting_is_named(fail):
    assert "its trl does not know: learnin_rate" in fail(lambda place: change(place, "job.json", "training", learnin_rate=1))


def test_missing_data_is_named(fail):
    assert "data that is missing" in fail(lambda place: (place / "tokens.json").unlink())


def test_a_missing_student_is_named(fail):
    assert "a student that is not there" in fail(lambda place: (place / "student" / "config.json").unlink())


def test_a_student_without_weights_is_named(fail):
    assert "a student that is not there" in fail(lambda place: (place / "student" / "model.safetensors").unlink())


def test_a_student_of_a_newer_transformers_is_named(fail):
    assert "a newer transformers" in fail(lambda place: change(place, "student/config.json", model_type="qwen9"))


def test_a_tokenizer_of_a_newer_transformers_is_named(fail):
    assert "a newer transformers" in fail(lambda place: change(place, "student/tokenizer_config.json", extra_special_tokens=["<|x|>"]))


def test_a_tokenizer_that_its_library_cannot_read_is_named(fail):
    assert "a newer transformers" in fail(lambda place: change(place, "student/tokenizer.json", "model", type="New"))


def test_its_own_deepspeed_settings_are_named(fail):
    plain = "import os, sys\nos.execv(sys.executable, [sys.executable, '-m', 'accelerate.commands.launch', *sys.argv[2:]])\n"

    def leave_as_it_is(place: Path) -> None:
        (place / "bin" / "accelerate").write_text(f"#!/usr/bin/env python3\n{plain}")

    assert "its environment lacks: DeepSpeed" in fail(leave_as_it_is)


def test_an_invalid_value_is_named(fail):
    assert "its trl does not take: steep" in fail(lambda place: change(place, "job.json", "training", lr_scheduler_type="steep"))


def test_a_full_disk_is_named(fail):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda place: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # noqa: E731
    try:
        assert "a full disk" in fail(limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_lack_of_memory_is_named(fail):
    def narrow(place: Path) -> None:
        train = place / "home" / "easydistill" / "kd" / "train.py"
        shim = (place / "bin" / "accelerate").read_text()
        limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        (place / "bin" / "accelerate").write_text(shim.replace("import sys\n", f"import sys\n{limit}", 1))
        change(place, "job.json", "training", per_device_train_batch_size=400)
        assert train.is_file()
        wide = [{**row, "input_ids": row["input_ids"] * 40, "completion_mask": row["completion_mask"] * 40}
                for row in store.read_rows(place / "tokens.json")]  # fmt: skip
        (place / "tokens.json").unlink()
        store.write_rows(place / "tokens.json", wide)
        change(place, "job.json", "training", max_length=4096)

    assert "out of memory" in fail(narrow)


def test_a_killed_training_is_named(fail, tmp_path, monkeypatch):
    followed = launch.Follower.__call__

    def kill(follower, line):
        if "steps" in launch.read_line(line):
            for each in psutil.process_iter(["cmdline"]):
                if str(tmp_path) in " ".join(each.info["cmdline"] or []) and (each.info["cmdline"] or [""])[1].endswith("kd/train.py"):
                    each.kill()
        return followed(follower, line)

    monkeypatch.setattr(launch.Follower, "__call__", kill)
    assert "the training was killed" in fail()


def test_a_time_limit_ends_every_process(fail, tmp_path):
    started = time.monotonic()
    message = fail(lambda place: change(place, "job.json", "training", num_train_epochs=1000), limit_seconds=20)
    assert "past its time limit" in message and time.monotonic() - started < 60 and not processes_in(tmp_path)
