"""A training that is interrupted ends as if it had not been: weights, figures, sample answers; a damaged state is never used."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import load_benchmark

from distill import checkpoint, resume, store, train
from distill.checkpoint import RUN_RECORD
from distill.models import fingerprint, load_to_train
from tests.conftest import write_job
from tests.test_repository import imported

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    return load_benchmark("bench_resume")


class Killed(BaseException):
    """Stands for a kill in this process: nothing of the lab catches it."""


def train_until(patch: pytest.MonkeyPatch, job_path: Path, run_folder: Path, stop_after: int | None = None) -> dict:
    """Train a job in this process, and stop dead after a step. Returns the record of what was published."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == stop_after:
                raise Killed

        on_epoch_end = on_step_begin

    job = store.read_json(job_path)
    with patch.context() as inner:
        inner.setattr(train, "_callbacks", lambda validation, count, run: [*CALLBACKS(validation, count, run), Stop()])
        if stop_after is None:
            train.train(job, run_folder)
            return store.read_manifest(job["training"]["output_dir"], name=RUN_RECORD)
        with pytest.raises(Killed):
            train.train(job, run_folder)
    return {}


CALLBACKS = train._callbacks


@pytest.fixture
def train_here(monkeypatch):
    return lambda *arguments: train_until(monkeypatch, *arguments)


def save_at_every_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "SHORTEST_SAVE_SECONDS", 0)
    patch.setattr(resume, "SAVE_SECONDS", 0)


@pytest.fixture
def saving_at_every_step(monkeypatch):
    save_at_every_step(monkeypatch)


def left_by(bench, run_folder: Path, out: Path) -> dict:
    """What a training left, without what goes by the clock."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    record = store.read_manifest(out, name=RUN_RECORD)
    samples = run_folder / "samples.jsonl"
    return {
        "weights": store.hash_file(out / "model.safetensors"),
        "last": store.hash_file(run_folder / "last" / "model.safetensors"),
        "figures": [{name: value for name, value in line.items() if name not in bench.BY_THE_CLOCK} for line in lines],
        "samples": samples.read_text() if samples.is_file() else "",
        "metrics": {name: value for name, value in record["metrics"].items() if name != "train_seconds"},
    }


VARIANTS = {
    "whole weights, rows by length, the best of two epochs": {"num_epochs": 2, "logging_steps": 3},
    "any order, accumulated, a save every third step": {
        "group_by_length": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "save_steps": 3, "num_epochs": 1,
    },
    "LoRA": {"lora_rank": 4, "num_epochs": 2, "learning_rate": 1e-2},
    "LoRA with dropout": {"lora_rank": 4, "lora_dropout": 0.2, "num_epochs": 2, "learning_rate": 1e-2},
    "packed": {"packing": True, "per_device_train_batch_size": 2, "num_epochs": 2},
    "an end in the midst of an epoch": {"max_steps": 9, "logging_steps": 4},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_training_ends_as_the_unbroken_one(variant, tmp_path, make_job, prepared_rows, train_here, bench, request):
    rows, validation = prepared_rows[:96], prepared_rows[96:112]
    found = {}
    for name in ("unbroken", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        job = make_job(folder, rows, validation, **{"logging_steps": 2, **VARIANTS[variant]})
        if name == "broken":
            request.getfixturevalue("saving_at_every_step")
            for stop_after in (2, 5, 6, 8):
                train_here(job, folder / "run", stop_after)
        record = train_here(job, folder / "run")
        found[name] = left_by(bench, folder / "run", folder / "out")
        assert record["sessions"] == ([0] if name == "unbroken" else record["sessions"])
    assert len(record["sessions"]) > 2 and record["sessions"][0] == 0
    assert found["broken"] == found["unbroken"]


def test_a_kill_between_the_last_step_and_the_publication_adds_no_step(tmp_path, make_job, prepared_rows, train_here, bench, monkeypatch):
    found = {}
    for name in ("unbroken", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        job = make_job(folder, prepared_rows[:64], prepared_rows[64:72], max_steps=6, logging_steps=2)
        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(train, "_keep_last", lambda *arguments: (_ for _ in ()).throw(Killed))
                train.train(store.read_json(job), folder / "run")
        record = train_here(job, folder / "run")
        found[name] = left_by(bench, folder / "run", folder / "out")
    assert found["broken"] == found["unbroken"] and record["sessions"] == [0, 6]


def test_train_seconds_are_those_of_all_sessions(tmp_path, make_job, prepared_rows, train_here, saving_at_every_step):
    job = make_job(tmp_path, prepared_rows[:64], max_steps=8)
    started = time.monotonic()
    train_here(job, tmp_path / "run", 6)
    before = store.read_json(resume.saved(tmp_path / "run" / "checkpoints")[-1] / resume.STATE)["seconds"]
    record = train_here(job, tmp_path / "run")
    assert 0 < before < record["metrics"]["train_seconds"] < time.monotonic() - started and record["sessions"] == [0, 6]


# What lies there


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, prepared_rows) -> dict:
    """A training that stopped after step 8, its best checkpoints being those of steps 4 and 8. {"job", "run", "key"}"""
    folder = tmp_path_factory.mktemp("stopped")
    job = write_job(folder, prepared_rows[:64], prepared_rows[64:72], save_steps=4, num_epochs=5, logging_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        save_at_every_step(patch)
        train_until(patch, job, folder / "run", 8)
    return {"job": job, "run": folder / "run", "key": checkpoint.resume_key(store.read_json(job), "builtin")}


@pytest.fixture
def broken_off(tmp_path, stopped) -> dict:
    """A copy of `stopped`, to be damaged. {"job", "run", "key", "checkpoints"}"""
    run = shutil.copytree(stopped["run"], tmp_path / "run")
    return {**stopped, "run": run, "checkpoints": run / "checkpoints"}


def steps_in(checkpoints: Path) -> list[int]:
    return [resume.step_of(folder) for folder in resume.saved(checkpoints)]


def test_the_last_two_and_the_best_are_kept_sealed_and_without_a_pickle(broken_off):
    folders = resume.saved(broken_off["checkpoints"])
    assert steps_in(broken_off["checkpoints"]) == [4, 7, 8]  # 4 was the best when 7 was saved
    for folder in folders:
        manifest = store.read_manifest(folder)
        assert manifest["resume_key"] == broken_off["key"] and {"optimizer.pt", "rng_state.pth", resume.STATE} <= set(manifest["files"])
        assert not (folder / "training_args.bin").exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", resume.STATE, "manifest.json", None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(broken_off, file):
    last, before = reversed(resume.saved(broken_off["checkpoints"])[-2:])
    if file:
        flip(last / file)
    else:
        (last / store.MANIFEST).unlink()  # killed in the midst of a save
    found, problems = resume.claim(broken_off["checkpoints"], broken_off["key"])
    assert found == before and len(problems) == 1 and problems[0].startswith(f"{last.name} cannot be gone on from: ")
    assert not list(last.iterdir()) and resume.sealed(broken_off["checkpoints"], broken_off["key"])[-1] == before


def test_a_truncated_checkpoint_is_damaged_too(broken_off):
    last, before = reversed(resume.saved(broken_off["checkpoints"])[-2:])
    os.truncate(last / "optimizer.pt", 100)
    assert resume.claim(broken_off["checkpoints"], broken_off["key"])[0] == before


@pytest.mark.parametrize("left", [4, None])
def test_without_its_best_checkpoint_a_training_goes_on_with_the_best_that_is_left(
    broken_off, stopped, left, train_here, saving_at_every_step, capsys
):
    checkpoints = broken_off["checkpoints"]
    train_here(broken_off["job"], broken_off["run"], 10)
    assert steps_in(checkpoints) == [8, 9, 10]  # the validations were after 4 and 8
    flip(checkpoints / "checkpoint-8" / "model.safetensors")
    if left:
        shutil.copytree(stopped["run"] / "checkpoints" / "checkpoint-4", checkpoints / "checkpoint-4")
    found, problems = resume.claim(checkpoints, broken_off["key"])
    said = "checkpoint-4 is the best of those that are left" if left else "the next validation begins anew"
    assert resume.step_of(found) == 10 and problems[1:] == [f"the best one so far was checkpoint-8, which is damaged or missing: {said}."]
    train_here(broken_off["job"], broken_off["run"], 11)
    state = store.read_json(checkpoints / "checkpoint-11" / "trainer_state.json")
    assert state["best_global_step"] == left and [resume.step_of(one) for one in resume.sealed(checkpoints, broken_off["key"])][-2:] == [
        10,
        11,
    ]
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["best_metric"] == losses.get(left) and train_here(broken_off["job"], broken_off["run"])["sessions"][-1] == 11


def test_another_jobs_checkpoints_stay_until_this_one_has_saved_and_it_says_what_differs(
    broken_off, train_here, saving_at_every_step, monkeypatch, capsys
):
    manifest = store.read_manifest(broken_off["checkpoints"] / "checkpoint-8")
    for part, words in (("engine_sha256", "engine code"), ("tokens_sha256", "rows"), ("backend", "its settings or its student")):
        found, problems = resume.claim(broken_off["checkpoints"], "another key", {**manifest, part: "another"})
        assert found is None and len(problems) == 3
        assert problems[0].startswith(f"checkpoint-8 cannot be gone on from: another job made it, with other {words}. It stays until")
    monkeypatch.setattr(checkpoint, "engine_sha256", lambda backend="builtin": "edited")
    for stop_after, stands in ((0, [4, 7, 8]), (1, [1])):
        train_here(broken_off["job"], broken_off["run"], stop_after)
        assert steps_in(broken_off["checkpoints"]) == stands
        assert all(store.read_manifest(one) for one in resume.saved(broken_off["checkpoints"]))


def test_why_a_training_begins_anew_is_said_to_the_lab(broken_off, monkeypatch, capsys):
    events = []
    monkeypatch.setattr(train.engine, "emit", lambda **event: events.append(event))
    train._open_session(broken_off["run"], {"resume_key": "another"}, {})
    capsys.readouterr()
    train._progress(lambda *arguments, **named: None)(events[0])
    assert "checkpoint-8 cannot be gone on from: another job made it" in " ".join(capsys.readouterr().out.split())


def test_a_kill_in_the_midst_of_a_save_leaves_the_one_before(broken_off, train_here, monkeypatch, saving_at_every_step):
    write, times = store.write_manifest, iter(range(100))

    def cut_short(target, facts, **named):
        if Path(target).name.startswith("checkpoint-") and next(times) == 2:
            raise Killed
        return write(target, facts, **named)

    monkeypatch.setattr(store, "write_manifest", cut_short)
    train_here(broken_off["job"], broken_off["run"], 99)
    assert steps_in(broken_off["checkpoints"])[-2:] == [10, 11]
    found, problems = resume.claim(broken_off["checkpoints"], broken_off["key"])
    assert resume.step_of(found) == 10 and problems == ["checkpoint-11 cannot be gone on from: it was not saved to its end."]


def test_a_job_that_learns_otherwise_has_another_key_and_one_that_only_shows_otherwise_the_same(tmp_path, make_job, prepared_rows):
    job = store.read_json(make_job(tmp_path, prepared_rows[:8], prepared_rows[8:12]))

    def key(backend="builtin", lab=None, **training) -> str:
        changed = {**job, "training": {**job["training"], **training}, **({"lab": lab} if lab else {})}
        return checkpoint.resume_key(changed, backend)

    same = [
        key(logging_steps=7),
        key(output_dir="/elsewhere"),
        key(save_total_limit=9),
        key(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        key(lab={"sample_answers": 0}),
        key(gradient_checkpointing=True),
    ]
    others = [key(learning_rate=1e-5), key(num_train_epochs=9), key(seed=5), key(backend="easydistill"), key(lab={"lora_rank": 4})]
    others += [key(per_device_train_batch_size=8)]
    assert set(same) == {key()} and len({key(), *others}) == 1 + len(others)
    tokens = Path(job["dataset"]["labeled_path"])
    before = key()
    tokens.write_text(tokens.read_text().replace("even", "odd ", 1) + "\n")
    assert key() != before


def test_the_lists_of_modules_that_decide_a_checkpoint_are_complete():
    # modules that bring settings and files to it, watch it and report on it, and decide nothing of what is published
    plumbing = {"errors", "console", "store", "config", "stages", "faults", "engine", "process", "machine", "easydistill", "workplace"}
    plumbing |= {"preflight", "shapes", "memory", "samples", "watch", "data", "rotation"}
    for backend, modules in checkpoint.MODULES.items():
        found = set().union(*[imported(ROOT / "distill" / module) for module in modules])
        mates = {"train", "resume"} if backend == "easydistill" else set()  # `train.publish` and what the trainer is made of
        assert {f"{name}.py" for name in found - plumbing - mates} <= set(modules), backend


def test_code_that_is_edited_while_a_process_runs_is_no_other_job(monkeypatch):
    before = checkpoint.engine_sha256()
    monkeypatch.setattr(store, "hash_file", lambda path: "edited")
    assert checkpoint.engine_sha256() == before


@pytest.mark.parametrize("file", ["merges.txt", "tokenizer.model", "chat_template.jinja", "config.json"])
def test_every_kind_of_file_that_a_model_is_made_of_tells_it_from_another(tmp_path, micro, file):
    folder = shutil.copytree(micro / "student_system1", tmp_path / "student")
    before = fingerprint(str(folder))
    (folder / RUN_RECORD).write_text("{}")
    (folder / "notes.md").write_text("")
    assert fingerprint(str(folder)) == before
    (folder / file).write_text("{} ")
    assert fingerprint(str(folder)) != before


def test_a_record_says_what_the_training_was_made_of_though_its_rows_are_changed_in_its_midst(
    tmp_path, make_job, prepared_rows, monkeypatch
):
    job = store.read_json(make_job(tmp_path, prepared_rows[:16], max_steps=2, warmup_ratio=0.0))
    before, tokens, free = checkpoint.identity(job, "builtin"), Path(job["dataset"]["labeled_path"]), train._free

    def change(trainer) -> None:
        tokens.write_text(tokens.read_text() + "\n")
        free(trainer)

    monkeypatch.setattr(train, "_free", change)
    train.train(job, tmp_path / "run")
    record = store.read_manifest(tmp_path / "out", name=RUN_RECORD)
    assert before.items() <= record.items() and checkpoint.resume_key(job, "builtin") != before["resume_key"]
    assert train.finished(job, "builtin") is None


def test_finished_says_whether_exactly_this_job_made_the_checkpoint(tmp_path, make_job, prepared_rows, capsys):
    job_path = make_job(tmp_path, prepared_rows[:16], max_steps=2, warmup_ratio=0.0)
    job = store.read_json(job_path)
    assert train.finished(job, "builtin") is None
    result = train.run(job_path, tmp_path / "run", "test")
    assert not result.reused and result.resumed_from is None
    assert train.finished(job, "builtin")["metrics"] == result.metrics
    assert train.finished(job, "easydistill") is None
    assert train.finished({**job, "training": {**job["training"], "learning_rate": 0.5}}, "builtin") is None
    flip(tmp_path / "out" / "model.safetensors")
    capsys.readouterr()
    assert train.finished(job, "builtin") is None
    assert "model.safetensors is missing or is not what" in " ".join(capsys.readouterr().out.split())


# Saves in an uneasy moment


@pytest.fixture
def spikes(monkeypatch):
    """Steps 4 and 8 are told to the watch with a gradient norm that is a million times the usual one."""
    from dataclasses import replace

    from distill.watch import Watch

    add = Watch.add
    spiked = lambda watch, figures: add(watch, replace(figures, norm=1e6 if figures.step in (4, 8) else figures.norm))  # noqa: E731
    monkeypatch.setattr(Watch, "add", spiked)


def test_a_save_at_a_spike_is_sealed_once_that_has_passed(tmp_path, make_job, prepared_rows, train_here, bench, spikes):
    found = {}
    for name in ("unbroken", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        job = make_job(folder, prepared_rows[:64], prepared_rows[64:72], max_steps=8, save_steps=2, logging_steps=1)
        checkpoints = folder / "run" / "checkpoints"
        sealed = lambda: {resume.step_of(one): (one / store.MANIFEST).is_file() for one in resume.saved(checkpoints)}  # noqa: B023, E731
        if name == "broken":
            train_here(job, folder / "run", 4)
            assert sealed() == {2: True, 4: False}
            train_here(job, folder / "run", 5)
            assert sealed() == {2: True, 4: True}
            assert store.read_json(checkpoints / "checkpoint-4" / resume.STATE)["levels"]["gradient norm"]["above"] == 1
        record = train_here(job, folder / "run")  # the spike of its last step is not in the way of its publication
        found[name] = left_by(bench, folder / "run", folder / "out")
    assert record["sessions"] == [0, 2, 4] and found["broken"] == found["unbroken"]


# Saves by the clock


def test_saving_takes_at_most_a_twentieth_of_the_time_and_three_minutes_are_the_most_between_two():
    for takes, pause in ((0.01, 10), (0.5, 10), (1, 19), (5, 95), (9, 171), (20, 180)):
        found, reason = resume.pause_after(takes)
        assert found == pytest.approx(pause) and f"{takes:.1f} s" in reason
    assert resume.SAVE_SECONDS < 300


def test_what_the_clock_saves_is_not_evaluated_and_changes_nothing(tmp_path, make_job, prepared_rows, train_here, bench, request):
    found = {}
    for name in ("by the settings", "by the clock too"):
        folder = tmp_path / name
        folder.mkdir()
        job = make_job(folder, prepared_rows[:64], prepared_rows[64:72], num_epochs=2, logging_steps=1)
        if name == "by the clock too":
            request.getfixturevalue("saving_at_every_step")
        train_here(job, folder / "run")
        found[name] = left_by(bench, folder / "run", folder / "out")
    assert found["by the settings"] == found["by the clock too"]
    assert [line["step"] for line in found["by the clock too"]["figures"] if "eval_loss" in line] == [4, 8]


def test_a_validation_loss_is_a_mean_over_tokens_however_many_rows_fit(tmp_path, make_job, prepared_rows, micro):
    from distill import trainer

    rows = [{**row, "output": f"{row['output']} " * (number % 5 + 1)} for number, row in enumerate(prepared_rows[:24])]
    losses = []
    for rows_at_once in (1, 5, 24):
        job = store.read_json(make_job(tmp_path, rows, rows, per_device_eval_batch_size=rows_at_once))
        data = trainer.datasets(Path(job["dataset"]["labeled_path"]), tmp_path / "cache")
        student = load_to_train(str(micro / "student_system1"), attention="eager")
        made = trainer.build_trainer(job, "fp32", student, data, tmp_path / "checkpoints", [])
        losses.append(made.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_memory_of_the_optimizer_is_given_back_before_the_publication(tmp_path, make_job, prepared_rows, monkeypatch):
    import gc
    import weakref

    held, free = [], train._free

    def watched(trainer):
        assert not (tmp_path / "run" / "last").exists()  # the first that takes a second model
        held.extend(weakref.ref(value) for values in trainer.optimizer.state.values() for value in values.values())
        free(trainer)
        gc.collect()
        assert held and not [one for one in held if one() is not None]
        assert all(parameter.grad is None for parameter in trainer.model.parameters())

    monkeypatch.setattr(train, "_free", watched)
    train.train(store.read_json(make_job(tmp_path, prepared_rows[:8], max_steps=2, warmup_ratio=0.0)), tmp_path / "run")
    assert (tmp_path / "out" / RUN_RECORD).is_file()


# Real processes


@pytest.fixture
def lab(tmp_path, bench, prepared_rows):
    """The lab's code in a folder of its own, with rows for a training of some seconds."""
    folder = bench.make_lab(tmp_path / "lab")
    store.write_rows(folder / "data" / "train_labeled.json", prepared_rows[:500])
    store.write_rows(folder / "data" / "train_labeled_validation.json", prepared_rows[500:540])
    return folder


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, "lab"), (signal.SIGTERM, "lab"), (signal.SIGTERM, "engine")])
def test_a_signal_leaves_no_process_and_a_state_to_go_on_from(lab, bench, number, to):
    settings = ["num_epochs=40", "save_steps=5"]
    process = bench.start(lab, bench.training(settings).command)
    wait_for(lambda: process.poll() is not None or list(lab.glob("runs/*/checkpoints/checkpoint-10/manifest.json")), 120)
    assert process.poll() is None, process.communicate()[0]
    started = psutil.Process(process.pid).children(recursive=True)
    engine = next(child for child in started if child.cmdline()[1:3] == ["-m", "distill.train"])
    os.kill(process.pid if to == "lab" else engine.pid, number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    wait_for(lambda: not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], 15)
    assert not (lab / "distilled-micro-system1").exists()
    checkpoints = next(lab.glob("runs/*/checkpoints"))
    key = store.read_manifest(resume.saved(checkpoints)[0])["resume_key"]
    assert resume.step_of(resume.claim(checkpoints, key)[0]) >= 10


def test_a_killed_training_that_is_run_again_says_where_it_goes_on_and_ends_as_the_unbroken_one(lab, bench):
    """Two kills, at moments that the training itself gives; `make test-slow` has twenty at random ones."""
    stage = bench.training(["num_epochs=3", "save_steps=10"])
    bench.finish(bench.start(lab, stage.command))
    unbroken = stage.result(lab)
    bench.remove(lab, stage.leaves)
    for step in (10, 40):
        process = bench.start(lab, stage.command)
        wait_for(lambda seal=f"runs/*/checkpoints/checkpoint-{step}/{store.MANIFEST}": list(lab.glob(seal)), 120)
        assert process.poll() is None
        bench.kill(process)
        process.communicate()
    said = bench.finish(bench.start(lab, stage.command))
    assert re.search(r"continues at step [4-9]\d of", said), said
    assert stage.result(lab) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "label"])
def test_twenty_kills_of_preparing_and_labelling_change_nothing(tmp_path, bench, stage, capsys):
    assert bench.compare(bench.make_lab(tmp_path / "lab", bench.ROWS), 20, 0, bench.STAGES[stage]())
    assert capsys.readouterr().out.count("  kill ") == 20


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path, bench, prepared_rows):
    folder = bench.make_lab(tmp_path / "lab")
    store.write_rows(folder / "data" / "train_labeled.json", prepared_rows)
    store.write_rows(folder / "data" / "train_labeled_validation.json", prepared_rows[:50])
    assert bench.compare(folder, 20, 0, bench.training(["num_epochs=12"]))
