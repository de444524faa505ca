"""Work that outlives the session: real copies on a real disk, killed, filled, unmounted, damaged, and taken back."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from distill import copies, environment, hub_cache, items, mirror, notebook, persist, restore, resume, rotation, store
from distill.errors import ConfigError, DataError, DistillError

OTHER_SESSION = "0123456789abcdef"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Looks every 0.05 s; a hub's cache of the test's own; what a test leaves open is ended."""
    from huggingface_hub import constants

    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "HURRIED_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    yield
    if persist._active:
        persist._active.close(0.1)
    persist._end()


@pytest.fixture
def drive(tmp_path) -> Path:
    """A folder that stands for a mounted drive; the folder of copies is made in it."""
    place = tmp_path / "drive"
    place.mkdir()
    return place / "qwen-lab"


@pytest.fixture
def new_session(tmp_path, monkeypatch):
    """End the session and begin another on an empty disk. Returns the new project's folder."""

    def begin(name: str = "second") -> Path:
        from huggingface_hub import constants

        persist._end()
        root = tmp_path / name
        root.mkdir()
        monkeypatch.setattr(store, "ROOT", root)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"hf-{name}" / "hub"))
        return root

    return begin


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_training(run: Path, step: int, best: int | None = None, size_bytes: int = 1000, key: str = "k") -> Path:
    """A training checkpoint as the engine seals it."""
    place = run / "checkpoints" / f"checkpoint-{step}"
    write(place / "model.safetensors", os.urandom(size_bytes))
    write(place / "optimizer.pt", os.urandom(size_bytes))
    store.write_json(place / "trainer_state.json", {"global_step": step, "best_global_step": best})
    store.write_manifest(place, {"step": step, "resume_key": key})
    return place


def write_published(root: Path, run: str = "system1-x", key: str = "k") -> Path:
    """A checkpoint as the engine publishes it."""
    place = root / "distilled-qwen"
    write(place / "model.safetensors", os.urandom(1000))
    job = {"dataset": {"labeled_path": str(root / "runs" / run / "train_tokenized.json")}}
    store.write_manifest(place, {"resume_key": key, "job": job}, name="distill_run.json")
    return place


def write_project(root: Path) -> Path:
    """One of everything that is kept. Returns the run's folder."""
    rows = write(root / "data" / "train_labeled.json", '[\n{"instruction": "Is 12 even?", "output": "even"}\n]\n')
    store.write_manifest(rows, {"rows": 1})
    write(root / "runs" / "labels" / "ab12.jsonl", '{"id": "1"}\n{"id": "2"}\n')
    run = root / "runs" / "system1-0123456789ab"
    for name in ("job.json", "plan.json", "train_tokenized.json"):
        store.write_json(run / name, {"name": name})
    write(run / "metrics.jsonl", '{"step": 1}\n')
    store.write_json(run / "checkpoints" / "key.json", {"key": "k"})
    for step in (10, 20):
        write_training(run, step)
    student = root / "distilled-qwen"
    write(student / "model.safetensors", os.urandom(3 * MIB))
    write(student / "config.json", "{}")
    store.write_manifest(student, {"run_id": "1"}, name="distill_run.json")
    write(root / "reports" / "comparison" / "comparison.html", "<p>سلام</p>")
    return run


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder, without the lab's own notes and what is held while it is copied."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_own(name)]
        places = [Path(folder, name) for name in files if not is_own(name)]
        found |= {place.relative_to(root).as_posix(): place.read_bytes() for place in places}
    return found


def is_own(name: str) -> bool:
    """Whether a name is one of the lab's own notes, or of one that is being written."""
    return name.lstrip(".").startswith("persist.")


def copied(drive: Path) -> set[str]:
    """Names of the items that have a copy."""
    return {path.parent.parent.relative_to(drive).as_posix() for path in drive.rglob(copies.COPY) if not path.parent.name.startswith(".")}


def copied_steps(drive: Path) -> set[int]:
    """Steps of the training checkpoints that have a copy."""
    return {int(name.rpartition("-")[2]) for name in copied(drive) if "/checkpoints/checkpoint-" in name}


def steps_in(run: Path) -> set[int]:
    """Steps of the training checkpoints that stand in a run's folder."""
    return {int(place.name.rpartition("-")[2]) for place in (run / "checkpoints").glob("checkpoint-*")}


def the_copy(drive: Path, name: str) -> Path:
    """The only copy of an item."""
    (place,) = (drive / name).glob("v*")
    return place


def wait_for(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)
    return found


def flip(path: Path) -> None:
    """Change one bit in the midst of a file, as a failing disk does: size and time stay."""
    facts = path.stat()
    with open(path, "r+b") as file:
        file.seek(facts.st_size // 2)
        byte = file.read(1)[0]
        file.seek(facts.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# There and back


def test_what_a_session_made_comes_back_byte_for_byte_in_an_empty_project(project, drive, new_session, capsys):
    write_project(project)
    before = tree(project)
    assert persist.persist_to(drive).flush() == []
    second = new_session()
    persist.persist_to(drive)
    assert tree(second) == before
    assert "restored 12 items" in capsys.readouterr().out


def test_each_copy_says_what_it_holds_and_holds_it(project, drive):
    write_project(project)
    persist.persist_to(drive).flush()
    place = the_copy(drive, "project/distilled-qwen")
    made = store.read_json(place / copies.COPY)
    assert made["kind"] == "published" and set(made["files"]) == {"model.safetensors", "config.json", "distill_run.json"}
    for name, fact in made["files"].items():
        assert fact == {"bytes": (place / name).stat().st_size, "sha256": store.hash_file(place / name)}


def test_what_is_no_work_of_the_lab_is_not_copied(project, drive, tmp_path):
    secret = write(tmp_path / "hf" / "token", "hf_secret")
    write(tmp_path / "hf" / "stored_tokens", "hf_secret")
    write(project / ".venv" / "distill_run.json", "{}")
    write(project / "data" / "micro" / "manifest.json", "{}")
    write(project / "runs" / "ask" / "answers.log", "log")
    write(project / "distill" / "store.py", "pass")
    write(project / "distilled.previous" / "distill_run.json", '{"files": {}}')
    write(project / "runs" / "system1-x" / "checkpoints" / "checkpoint-5" / "model.safetensors", "half")
    for place in (project / "data" / "linked.json", project / "runs" / "labels" / "linked.jsonl"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(secret)
    (project / "reports").symlink_to(tmp_path / "hf", target_is_directory=True)
    assert persist.persist_to(drive).flush() == []
    assert copied(drive) == set()
    assert not any(b"hf_secret" in content for content in tree(drive).values())


def test_only_changed_content_is_copied_again(project, drive):
    write_project(project)
    rows = project / "data" / "train_labeled.json"
    lab = persist.persist_to(drive)
    lab.flush()
    name = "project/data/train_labeled.json"
    os.utime(rows, (1, 1))  # the clock goes back, the content stays
    lab.flush()
    assert lab.folder.newest(name).number == int(the_copy(drive, name).name[1:])
    before = the_copy(drive, name)
    store.write_json(rows, [{"instruction": "?", "output": "!"}])
    lab.flush()
    assert the_copy(drive, name).name > before.name and (the_copy(drive, name) / rows.name).read_bytes() == rows.read_bytes()


def test_another_session_on_the_same_disk_copies_nothing_anew(project, drive):
    write_project(project)
    persist.persist_to(drive).flush()
    before = sorted(path.name for path in drive.rglob("v0*"))
    persist._end()
    assert persist.persist_to(drive).flush() == []
    assert sorted(path.name for path in drive.rglob("v0*")) == before


def test_a_journal_is_copied_up_to_its_last_whole_line(project, drive):
    journal = write(project / "runs" / "labels" / "ab.jsonl", '{"id": 1}\n{"id": 2}\n{"id"')
    lab = persist.persist_to(drive)
    lab.flush()
    name = "project/runs/labels/ab.jsonl"
    assert (the_copy(drive, name) / "ab.jsonl").read_text() == '{"id": 1}\n{"id": 2}\n'
    with open(journal, "a") as file:
        file.write(": 3}\n")
    lab.flush()
    assert (the_copy(drive, name) / "ab.jsonl").read_text() == journal.read_text()


@pytest.mark.parametrize(
    "here, there, after", [("1\n", "1\n2\n", "1\n2\n"), ("1\n2\n3\n", "1\n2\n", "1\n2\n3\n"), ("7\n", "1\n2\n", "7\n")]
)
def test_a_journal_grows_by_restoring_and_never_shrinks(project, drive, new_session, here, there, after):
    write(project / "runs" / "labels" / "ab.jsonl", there)
    persist.persist_to(drive).flush()
    journal = write(new_session() / "runs" / "labels" / "ab.jsonl", here)
    persist.persist_to(drive)
    assert journal.read_text() == after


def write_labels(path: Path, **labels: str) -> Path:
    """A journal of answers."""
    store.make_folder(path.parent)
    for name, text in labels.items():
        store.add_to_journal(path, {"id": name, "text": text})
    return path


def labels_in(path: Path) -> dict[str, str]:
    return {entry["id"]: entry["text"] for entry in store.read_journal(path)}


def test_answers_of_two_sessions_become_one_journal_here_and_there(project, drive, new_session):
    name = "runs/labels/ab.jsonl"
    write_labels(project / name, **{f"q{number}": "there" for number in range(9)})
    persist.persist_to(drive).flush()
    here = write_labels(new_session() / name, q3="here", q9="here")
    lab = persist.persist_to(drive)
    wanted = {f"q{number}": "there" for number in range(9)} | {"q3": "here", "q9": "here"}
    assert labels_in(here) == wanted and lab.flush() == []
    assert labels_in(the_copy(drive, f"project/{name}") / here.name) == wanted


@pytest.mark.parametrize("here", ["", "4 bits", "8 bits"])
def test_answers_of_a_teacher_in_other_bits_are_not_mixed(project, drive, new_session, here):
    name = "runs/labels/ab.jsonl"
    write_labels(project / name, model="4 bits", q1="there", q2="there", q3="there")
    persist.persist_to(drive).flush()
    fewer = {"model": here, "q1": "here", "q2": "here"} if here else {}
    place = write_labels(new_session() / name, **fewer)
    persist.persist_to(drive)
    found = labels_in(place)
    assert found["model"] == "4 bits" and found["q3"] == "there" and found["q1"] == ("here" if here == "4 bits" else "there")


def test_where_more_answers_in_other_bits_are_here_they_stay(project, drive, new_session):
    name = "runs/labels/ab.jsonl"
    write_labels(project / name, model="4 bits", q1="there")
    persist.persist_to(drive).flush()
    place = write_labels(new_session() / name, model="8 bits", q2="here", q3="here")
    persist.persist_to(drive)
    assert labels_in(place) == {"model": "8 bits", "q2": "here", "q3": "here"}


@pytest.mark.parametrize("damage", ["a bit", "its end"])
def test_of_a_damaged_copy_of_a_journal_the_whole_lines_come_back_and_a_new_copy_is_made(project, drive, new_session, capsys, damage):
    name = "runs/labels/ab.jsonl"
    write_labels(project / name, **{f"q{number}": "text" for number in range(100)})
    persist.persist_to(drive).flush()
    copy = the_copy(drive, f"project/{name}") / "ab.jsonl"
    flip(copy) if damage == "a bit" else os.truncate(copy, copy.stat().st_size - 9)
    here = new_session() / name
    lab = persist.persist_to(drive)
    assert len(labels_in(here)) == 99 and "Its 99 whole lines are taken" in " ".join(capsys.readouterr().out.split())
    assert lab.flush() == [] and labels_in(the_copy(drive, f"project/{name}") / "ab.jsonl") == labels_in(here)


@pytest.mark.parametrize("here, there, after", [(2, 5, 5), (5, 2, 5), (0, 2, 2)])
def test_of_the_rows_of_a_source_the_longer_journal_stays(project, drive, new_session, here, there, after):
    def write_rows(path: Path, count: int, text: str) -> Path:
        store.make_folder(path.parent)
        for number in range(count):
            store.add_to_journal(path, {"number": number, "row": {"text": text}})
        return path

    name = "runs/sources/ab.jsonl"
    write_rows(project / name, there, "there")
    persist.persist_to(drive).flush()
    place = write_rows(new_session() / name, here, "here!")
    persist.persist_to(drive).flush()
    assert len(list(store.replay_journal(place))) == after
    assert (the_copy(drive, f"project/{name}") / place.name).read_bytes() == place.read_bytes()


def test_work_of_a_session_on_another_disk_is_gone_on_with(project, drive, new_session, monkeypatch):
    """A: copies 1. B, elsewhere: restores it, makes 2. A again has 1 as it was copied: 2 comes. Then A makes 3 and B has 2: 3 comes."""
    rows = "data/train_labeled.json"
    write(project / rows, "[1]")
    persist.persist_to(drive).flush()
    second = new_session()
    persist.persist_to(drive).flush()
    write(second / rows, "[2]")
    persist._end()
    monkeypatch.setattr(store, "ROOT", project)
    persist.persist_to(drive)
    assert (project / rows).read_text() == "[2]"
    write(project / rows, "[3]")
    persist._end()
    monkeypatch.setattr(store, "ROOT", second)
    os.utime(second / rows, (4e9, 4e9))  # a clock that says that the older one is newer
    persist.persist_to(drive)
    assert (second / rows).read_text() == "[3]"


def test_newer_work_here_is_kept_and_copied(project, drive, capsys):
    rows = write(project / "data" / "train_labeled.json", "[1]")
    persist.persist_to(drive).flush()
    persist._end()
    rows.write_text("[2]")
    os.utime(rows, (1, 1))
    persist.persist_to(drive).flush()
    assert rows.read_text() == "[2]" and (the_copy(drive, "project/data/train_labeled.json") / rows.name).read_text() == "[2]"
    assert "kept as they are here: project/data/train_labeled.json: what is here is newer, or another" in capsys.readouterr().out


FACT, OTHER = {"f": {"bytes": 1, "sha256": "a"}}, {"f": {"bytes": 1, "sha256": "b"}}


@pytest.mark.parametrize(
    "local, last, continues, wanted",
    [
        (None, None, False, True),
        (FACT, None, False, False),
        (OTHER, None, False, False),
        (OTHER, None, True, True),
        (OTHER, {"number": 4, "files_sha256": store.hash_json(OTHER)}, False, True),
        (OTHER, {"number": 5, "files_sha256": store.hash_json(OTHER)}, False, False),
        (OTHER, {"number": 4, "files_sha256": store.hash_json(FACT)}, False, False),
        (FACT, {"number": 4, "files_sha256": store.hash_json(FACT)}, False, False),
    ],
)
def test_a_copy_is_wanted_only_where_it_is_missing_or_goes_on(local, last, continues, wanted):
    copy = copies.Copy("project/data/f", "file", 5, FACT, Path("/nowhere"))
    assert restore.is_wanted(copy, local, last, continues) is wanted


# Training checkpoints


def test_of_a_training_the_last_two_checkpoints_and_the_best_are_kept(project, drive):
    run = project / "runs" / "system1-x"
    lab = persist.persist_to(drive)
    for step, best in ((10, None), (20, 20), (30, 20), (40, 20), (100, 20)):
        write_training(run, step, best)
        assert lab.flush() == []
    kept = {name.rpartition("-")[2] for name in copied(drive) if "checkpoint-" in name}
    assert kept == {"20", "40", "100"} and set(lab.folder.copies) >= copied(drive)


def test_of_a_training_begun_anew_its_own_checkpoints_are_kept_and_come_back(project, drive, new_session):
    run = project / "runs" / "system1-x"
    lab = persist.persist_to(drive)
    for step in (80, 90):
        write_training(run, step)
        lab.flush()
    shutil.copytree(run / "checkpoints" / "checkpoint-90", run / "last")  # of the former training
    shutil.rmtree(run / "checkpoints")
    for step in (10, 20):
        write_training(run, step)
        lab.flush()
    assert copied_steps(drive) == {10, 20}
    second = new_session()
    persist.persist_to(drive)
    assert steps_in(second / "runs" / "system1-x") == {10, 20}


def test_a_former_trainings_checkpoints_go_before_the_first_of_a_training_begun_anew_is_copied(project, tmp_path, unmount):
    lab = persist.persist_to(mount_small(tmp_path, unmount, "2m"))
    write(project / "data" / "big.json", os.urandom(4 * MIB))  # no round ends well
    run = project / "runs" / "system1-x"
    for step in (80, 90):
        write_training(run, step)
    lab.flush(0.5)
    assert 90 in copied_steps(lab.folder.folder)
    shutil.rmtree(run / "checkpoints")
    write_training(run, 10)
    wait_for(lambda: 10 in copied_steps(lab.folder.folder))
    assert copied_steps(lab.folder.folder) == {10}


def test_checkpoints_of_a_former_training_do_not_come_back_beside_those_of_one_begun_anew(project, drive):
    run = project / "runs" / "system1-x"
    for step in (10, 90):
        write_training(run, step)
    persist.persist_to(drive).flush()
    persist._end()
    shutil.rmtree(run / "checkpoints")
    write_training(run, 10)
    lab = persist.persist_to(drive)
    assert steps_in(run) == {10} and lab.flush() == [] and copied_steps(drive) == {10}


def test_checkpoints_of_a_session_that_went_on_elsewhere_come_back_beside_earlier_ones(project, drive, new_session, monkeypatch):
    write_training(project / "runs" / "system1-x", 10)
    persist.persist_to(drive).flush()
    second = new_session()
    lab = persist.persist_to(drive)
    for step in (20, 30):
        write_training(second / "runs" / "system1-x", step)
        lab.flush()
    assert copied_steps(drive) == {20, 30}
    persist._end()
    monkeypatch.setattr(store, "ROOT", project)
    persist.persist_to(drive)
    assert steps_in(project / "runs" / "system1-x") == {10, 20, 30}


def test_where_the_same_training_stands_further_on_there_it_comes_back_with_its_figures_and_is_kept(project, drive, new_session):
    """A session without PERSIST_TO, then one with it."""
    run = project / "runs" / "system1-x"
    for step in (100, 900, 1000):
        write_training(run, step, best=100)
    figures = write(run / "metrics.jsonl", '{"step": 1000}\n')
    persist.persist_to(drive).flush()
    second = new_session() / "runs" / "system1-x"
    write_training(second, 10)
    write(second / figures.name, '{"step": 10}\n')
    lab = persist.persist_to(drive)
    assert steps_in(second) == {10, 100, 900, 1000} and (second / figures.name).read_text() == figures.read_text()
    assert lab.flush() == [] and copied_steps(drive) == {100, 900, 1000}


def test_of_two_jobs_in_one_run_each_has_its_checkpoints_until_those_of_the_former_are_removed(project, drive, new_session):
    for step in (900, 1000):
        write_training(project / "runs" / "system1-x", step, key="of the former code")
    persist.persist_to(drive).flush()
    second = new_session() / "runs" / "system1-x"
    write_training(second, 10)
    lab = persist.persist_to(drive)
    assert lab.flush() == [] and steps_in(second) == copied_steps(drive) == {10, 900, 1000}
    for step in (20, 30):
        write_training(second, step)
    assert lab.flush() == [] and copied_steps(drive) == {20, 30, 900, 1000}
    resume.rotate(second / "checkpoints", "k")
    assert lab.flush() == [] and steps_in(second) == copied_steps(drive) == {20, 30}


def test_the_best_checkpoint_that_is_damaged_here_comes_back_and_figures_here_stay(project, drive):
    run = project / "runs" / "system1-x"
    best = write_training(run, 5)
    for step in (10, 20):
        write_training(run, step, best=5)
    before = tree(best)
    figures = write(run / "metrics.jsonl", '{"step": 20}\n')
    persist.persist_to(drive).flush()
    persist._end()
    shutil.rmtree(run / "checkpoints" / "checkpoint-10")
    write_training(run, 30, best=5)
    flip(best / "model.safetensors")
    figures.write_text('{"step": 30}\n')
    persist.persist_to(drive)
    assert tree(best) == before and steps_in(run) == {5, 20, 30} and figures.read_text() == '{"step": 30}\n'


def test_the_folder_of_a_damaged_checkpoint_keeps_its_copy_which_comes_back(project, drive):
    run = project / "runs" / "system1-x"
    for step in (10, 20):
        write_training(run, step)
    damaged = run / "checkpoints" / "checkpoint-20"
    before, lab = tree(damaged), persist.persist_to(drive)
    lab.flush()
    flip(damaged / "optimizer.pt")
    assert resume.claim(run / "checkpoints", "k")[0].name == "checkpoint-10" and tree(damaged) == {}
    write_training(run, 15)
    assert lab.flush() == [] and copied_steps(drive) == {15, 20}
    persist._end()
    persist.persist_to(drive)
    assert tree(damaged) == before


def test_a_removed_copy_is_emptied_before_it_is_removed(project, drive, monkeypatch):
    sizes, unlink = [], os.unlink
    run = project / "runs" / "system1-x"
    lab = persist.persist_to(drive)
    monkeypatch.setattr(os, "unlink", lambda path, **given: (sizes.append((str(path), os.lstat(path).st_size)), unlink(path, **given)))
    for step in (10, 20, 30):
        write_training(run, step)
        lab.flush()
    removed = [size for path, size in sizes if path.startswith(str(drive)) and path.endswith((".safetensors", ".pt"))]
    assert removed == [0, 0] and not list(drive.rglob(".tmp-*"))


def test_training_checkpoints_go_when_their_training_has_ended(project, drive):
    run = project / "runs" / "system1-x"
    lab = persist.persist_to(drive)
    write_training(run, 10)
    lab.flush()
    shutil.copytree(run / "checkpoints" / "checkpoint-10", run / "last")
    shutil.rmtree(run / "checkpoints")
    lab.flush()
    assert copied(drive) == {"project/runs/system1-x/last"}


def test_a_training_that_dies_while_it_is_published_has_its_checkpoints(project, drive, new_session):
    """`last/` is written before the merge, the check and the publication."""
    run = project / "runs" / "system1-x"
    lab = persist.persist_to(drive)
    for step in (10, 20):
        write_training(run, step)
    lab.flush()
    shutil.copytree(run / "checkpoints" / "checkpoint-20", run / "last")
    assert lab.flush() == []
    second = new_session()
    persist.persist_to(drive)
    assert steps_in(second / "runs" / "system1-x") == {10, 20}


@pytest.mark.parametrize(
    "run, key, steps", [("system1-x", "k", set()), ("system1-x", "another job", {10, 20}), ("system1-y", "k", {10, 20})]
)
def test_a_published_checkpoint_ends_the_training_of_its_own_job_and_run(project, drive, new_session, monkeypatch, run, key, steps):
    for step in (10, 20):
        write_training(project / "runs" / "system1-x", step)
    write_published(project, run, key)
    with monkeypatch.context() as dies:
        dies.setattr(rotation, "thin", lambda folder: None)  # before it thins what is copied
        persist.persist_to(drive).flush()
        second = new_session()
    lab = persist.persist_to(drive)
    assert steps_in(second / "runs" / "system1-x") == steps
    assert lab.flush() == [] and copied_steps(drive) == steps


def test_where_the_published_copy_is_damaged_the_trainings_checkpoints_come_back(project, drive, new_session, monkeypatch):
    write_training(project / "runs" / "system1-x", 10)
    write_published(project)
    with monkeypatch.context() as dies:
        dies.setattr(rotation, "thin", lambda folder: None)
        persist.persist_to(drive).flush()
        second = new_session()
    flip(the_copy(drive, "project/distilled-qwen") / "model.safetensors")
    persist.persist_to(drive)
    assert steps_in(second / "runs" / "system1-x") == {10} and not (second / "distilled-qwen").exists()


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_comes_back(project, drive, new_session, capsys):
    run = project / "runs" / "system1-x"
    for step in (10, 20):
        write_training(run, step)
    before = tree(run / "checkpoints" / "checkpoint-10")
    persist.persist_to(drive).flush()
    damaged = the_copy(drive, "project/runs/system1-x/checkpoints/checkpoint-20")
    second = new_session()
    flip(damaged / "optimizer.pt")
    lab = persist.persist_to(drive)
    checkpoints = second / "runs" / "system1-x" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-10"] and tree(checkpoints / "checkpoint-10") == before
    said = capsys.readouterr().out
    assert "damaged copy" in said and str(damaged / "optimizer.pt") in said
    write_training(second / "runs" / "system1-x", 20)  # made again, it is copied in place of the damaged one
    assert lab.flush() == [] and damaged.exists() is False and the_copy(drive, damaged.parent.relative_to(drive).as_posix())


def test_a_checkpoint_that_is_damaged_here_is_not_copied_and_comes_back(project, drive, capsys):
    run = project / "runs" / "system1-x"
    good = write_training(run, 10)
    before = tree(good)
    persist.persist_to(drive).flush()
    persist._end()
    flip(good / "model.safetensors")
    damaged = write_training(run, 20)
    flip(damaged / "optimizer.pt")
    persist.persist_to(drive).flush()
    assert tree(good) == before and copied(drive) == {"project/runs/system1-x/checkpoints/checkpoint-10"}
    assert "checkpoint-20 is not what its manifest recorded (optimizer.pt)" in capsys.readouterr().out
    flip(damaged / "optimizer.pt")
    flip(good / "model.safetensors")
    persist._end()
    persist.persist_to(drive)
    assert tree(good) != before  # a later one stands here, and is whole: this one is of no use


def test_data_that_does_not_verify_here_comes_back_and_is_found_beside_it(project, drive):
    rows = write(project / "data" / "train_labeled.json", "[1, 2, 3]")
    store.write_manifest(rows, {"rows": 3})
    persist.persist_to(drive).flush()
    persist._end()
    rows.write_text("[1, 2")
    persist.persist_to(drive)
    assert rows.read_text() == "[1, 2, 3]" and rows.with_name("train_labeled.json.replaced").read_text() == "[1, 2"


@pytest.mark.parametrize("has_links", [True, False])
def test_checkpoints_that_rotate_while_they_are_copied_are_whole_or_absent(project, drive, monkeypatch, has_links):
    """A training that writes and removes checkpoints faster than they are copied: every copy equals what was sealed."""
    if not has_links:  # as on exFAT

        def refuse(*given, **named):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    run = project / "runs" / "system1-x"
    lab, sealed = persist.persist_to(drive), {}
    for step in range(1, 40):
        place = write_training(run, step, size_bytes=MIB)
        sealed[step] = (place / store.MANIFEST).read_bytes()
        if step > 2:
            shutil.rmtree(run / "checkpoints" / f"checkpoint-{step - 2}")
    assert lab.flush() == []
    kept = {name: the_copy(drive, name) for name in copied(drive)}
    assert len(kept) == 2 and max(int(name.rpartition("-")[2]) for name in kept) == 39
    for name, place in kept.items():
        assert (place / store.MANIFEST).read_bytes() == sealed[int(name.rpartition("-")[2])]
        assert store.read_manifest(place)["step"] == int(name.rpartition("-")[2])
    assert not list((project / "runs").glob(".persist.tmp-*"))


# What is removed here


def test_what_is_removed_here_is_removed_there_and_does_not_come_back(project, drive, new_session):
    write_project(project)
    split = write(project / "data" / "train_labeled_validation.json", "[1]")
    lab = persist.persist_to(drive)
    lab.flush()
    gone = [split, project / "data" / "train_labeled.json.manifest.json", project / "runs" / "system1-0123456789ab" / "metrics.jsonl"]
    for place in gone:
        place.unlink()
    before = tree(project)
    assert lab.flush() == []
    second = new_session()
    persist.persist_to(drive)
    assert tree(second) == before and not any((second / place.relative_to(project)).exists() for place in gone)


def test_a_published_checkpoint_that_is_removed_here_has_its_copy(project, drive, new_session):
    student = write_published(project)
    before = tree(student)
    lab = persist.persist_to(drive)
    lab.flush()
    shutil.rmtree(student)
    assert lab.flush() == []
    second = new_session()
    persist.persist_to(drive)
    assert tree(second / student.name) == before


def test_where_the_labs_folder_is_removed_as_a_whole_its_copies_stay(project, drive):
    write_project(project)
    lab = persist.persist_to(drive)
    lab.flush()
    before = copied(drive)
    project.rename(project.with_name("removed"))
    write(project / "data" / "rows.json", "[1]")
    assert lab.flush() == [] and lab.flush() == [] and copied(drive) == before | {"project/data/rows.json"}


# Drives that fail


KILLED = """
import time
from distill import mirror, persist
mirror.POLL_SECONDS = 0.01
lab = persist.persist_to(sys.argv[1])
print("going", flush=True)
time.sleep(600)
"""


def whole_copies(drive: Path) -> list[str]:
    """The items that have a copy; every file of every copy is checked."""
    for place in drive.rglob(copies.COPY):
        if not place.parent.name.startswith(".tmp-"):
            for name, fact in store.read_json(place)["files"].items():
                assert copies.is_whole(place.parent / name, fact) and fact["bytes"] == (place.parent / name).stat().st_size
    return sorted(copied(drive))


def test_killed_in_the_midst_of_a_copy_only_whole_copies_stand_and_the_next_session_finishes(project, drive, start_python):
    for number in range(12):
        write(project / "data" / f"part{number}.json", os.urandom(15 * MIB))
    moments, left = Random(0), []
    for _ in range(4):
        session = start_python(KILLED, drive)
        wait_for(lambda: list(drive.rglob(".tmp-*/part*.json")), 30)
        time.sleep(moments.uniform(0, 0.2))
        session.send_signal(signal.SIGKILL)
        session.wait()
        left += drive.rglob(".tmp-*")
        assert len(whole_copies(drive)) < 12
    assert left
    assert persist.persist_to(drive).flush(30) == []
    assert len(whole_copies(drive)) == 12 and not list(drive.rglob(".tmp-*"))


RESTORED = """
from distill import persist
persist.persist_to(sys.argv[1])
"""


def test_killed_in_the_midst_of_restoring_nothing_half_stands_here_and_the_next_session_finishes(project, drive, start_python):
    student = project / "distilled-qwen"
    write(student / "model.safetensors", os.urandom(60 * MIB))
    store.write_manifest(student, {"run_id": "1"}, name="distill_run.json")
    before = tree(project)
    persist.persist_to(drive)
    persist._end()
    shutil.rmtree(student)
    session = start_python(RESTORED, drive)
    wait_for(lambda: list(project.glob(".distilled-qwen.tmp-*/model.safetensors")), 30)
    session.send_signal(signal.SIGKILL)
    session.wait()
    assert not student.exists()
    persist.persist_to(drive)
    assert tree(project) == before and not list(project.glob(".distilled-qwen.tmp-*"))


def test_what_a_killed_copy_held_of_a_removed_checkpoint_is_let_go(project, drive, start_python):
    run = project / "runs" / "system1-x"
    write_training(run, 10, size_bytes=40 * MIB)
    session = start_python(KILLED, drive)
    wait_for(lambda: list(drive.rglob(".tmp-*/optimizer.pt")), 30)
    session.send_signal(signal.SIGKILL)
    session.wait()
    assert list((project / "runs").glob(".persist.tmp-*/model.safetensors"))
    shutil.rmtree(run / "checkpoints")
    persist.persist_to(drive)
    assert not list((project / "runs").glob(".persist.tmp-*"))


def test_what_a_kill_leaves_between_two_copies_is_taken_away(project, drive):
    rows = write(project / "data" / "rows.json", "[1]")
    persist.persist_to(drive).flush()
    first = the_copy(drive, "project/data/rows.json")
    shutil.copytree(first, first.with_name("v000009"))
    persist._end()
    lab = persist.persist_to(drive)
    assert lab.flush() == [] and the_copy(drive, "project/data/rows.json").name == "v000009"
    rows.write_text("[2]")
    assert lab.flush() == [] and the_copy(drive, "project/data/rows.json").name == "v000010"


def mount(*arguments) -> None:
    """Mount, or skip the test where this user may not."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs more rights than this user has: {done.stderr.strip()}")


@pytest.fixture
def unmount():
    """Unmount folders at the end, whatever happened."""
    places = []
    yield places.append
    for place in places:
        persist._end() if persist._active is None else persist._active.close(0.1)
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


def mount_small(tmp_path: Path, unmount, size: str) -> Path:
    """A small drive of its own. Returns the folder of copies to make on it."""
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    unmount(place)
    return place / "lab"


@pytest.mark.parametrize("best, size, kept", [(None, "2600k", {40, 50}), (10, "3600k", {10, 40, 50})])
def test_a_full_drive_gives_room_to_the_newest_checkpoint(project, tmp_path, unmount, best, size, kept):
    """Each is 1 MiB: there is room for what is kept, and not for one more."""
    lab = persist.persist_to(mount_small(tmp_path, unmount, size))
    for step in (10, 20, 30, 40, 50):
        write_training(project / "runs" / "system1-x", step, best, size_bytes=MIB // 2)
        assert lab.flush(5) == [] and step in copied_steps(lab.folder.folder)
    assert copied_steps(lab.folder.folder) == kept and lab.status().state == "well"


def test_a_full_drive_gives_the_room_of_runs_that_are_no_more(project, tmp_path, unmount):
    lab = persist.persist_to(mount_small(tmp_path, unmount, "1600k"))
    write_training(project / "runs" / "system1-x", 10, size_bytes=MIB // 2)
    lab.close()
    wait_for(lambda: lab.status().state == "ended")
    item = items.Item("project/data/rows.json", "file", write(project / "data" / "rows.json", os.urandom(MIB)))
    shutil.rmtree(project / "runs" / "system1-x")
    assert lab._copy_or_make_room(item).name == item.name and copied(lab.folder.folder) == {item.name}


def test_a_full_drive_is_told_of_once_and_caught_up_with_when_there_is_room(project, tmp_path, unmount, capsys):
    place = mount_small(tmp_path, unmount, "2m").parent
    lab = persist.persist_to(place / "lab")
    write(project / "data" / "big.json", os.urandom(4 * MIB))
    small = write(project / "reports" / "small.json", "{}")  # comes behind the big one, and fits
    assert lab.flush(1) == ["project/data/big.json"] and lab.status().state == "full"
    assert copied(place / "lab") == {"project/reports/small.json"} and small.is_file()
    wait_for(lambda: not list((place / "lab").rglob(".tmp-*")))  # between two tries
    subprocess.run(["mount", "-o", "remount,size=16m", str(place)], check=True)
    assert lab.flush(10) == [] and lab.status().state == "well"
    said = capsys.readouterr().out
    assert said.count("is full") == 1 and said.count("takes copies again") == 1


def test_a_drive_that_becomes_read_only_is_told_of_and_tried_again(project, tmp_path, unmount, capsys):
    place = tmp_path / "small"
    place.mkdir()
    mount("-t", "tmpfs", "tmpfs", place)
    unmount(place)
    lab = persist.persist_to(place / "lab")
    assert lab.flush() == []
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    write(project / "data" / "rows.json", "[1]")
    assert lab.flush(0.5) == ["project/data/rows.json"] and lab.status().state == "failing"
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    assert lab.flush() == [] and capsys.readouterr().out.count("cannot be written to ([Errno 30] Read-only file system") == 1


def train_on(run: Path, first: int) -> int:
    """Twelve checkpoints, the last two kept. Returns the next step."""
    for step in range(first, first + 12):
        write_training(run, step)
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step - 2}", ignore_errors=True)
    return first + 12


def check_it_catches_up(lab, project: Path, capsys, go, come_back) -> None:
    run = project / "runs" / "system1-x"
    step = train_on(run, 1)
    assert lab.flush() == []
    go()
    step = train_on(run, step)
    assert lab.flush(0.5) and lab.status().state == "gone"
    come_back()
    step = train_on(run, step)
    assert lab.flush() == [] and {name.rpartition("-")[2] for name in copied(lab.folder.folder)} == {"35", "36"}
    said = capsys.readouterr().out
    assert said.count("is gone (is the drive still mounted?)") == 1 and said.count("takes copies again") == 1


def test_a_drive_that_vanishes_is_told_of_and_never_made_anew_and_training_goes_on(project, drive, capsys):
    away = drive.parent.with_name("away")
    lab = persist.persist_to(drive)

    def come_back():
        assert not drive.parent.exists()
        away.rename(drive.parent)

    check_it_catches_up(lab, project, capsys, lambda: drive.parent.rename(away), come_back)


def test_a_drive_that_vanishes_when_a_copy_begins_is_not_made_anew(project, drive, monkeypatch):
    away, check, looks = drive.parent.with_name("away"), copies.CopyFolder.check, []

    def check_and_vanish(self):
        check(self)
        looks.append(drive.parent.exists())
        if len(looks) == 2:  # the first look is the round's, the second the copy's
            drive.parent.rename(away)

    monkeypatch.setattr(copies.CopyFolder, "check", check_and_vanish)
    write(project / "data" / "rows.json", "[1]")
    lab = persist.persist_to(drive)
    assert lab.flush(0.5) and lab.status().state == "gone"
    assert away.exists() and not drive.parent.exists()


@pytest.mark.parametrize("below", ["", "lab"])
def test_an_unmounted_drive_leaves_nothing_in_the_folder_below_it(project, tmp_path, unmount, capsys, below):
    real, place = tmp_path / "real", tmp_path / "mounted"
    real.mkdir(), place.mkdir()
    mount("--bind", real, place)
    unmount(place)
    lab = persist.persist_to(place / below)

    def come_back():
        assert not list(place.iterdir())
        mount("--bind", real, place)

    check_it_catches_up(lab, project, capsys, lambda: subprocess.run(["umount", "-l", str(place)], check=True), come_back)


def test_a_drive_that_crawls_is_told_of_once_and_nobody_waits(project, drive, monkeypatch, capsys):
    digest = items.digest
    monkeypatch.setattr(mirror, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(items, "digest", lambda path, *given, **named: (time.sleep(0.3), digest(path, *given, **named))[1])
    write_training(project / "runs" / "system1-x", 10)
    started = time.monotonic()
    lab = persist.persist_to(drive)
    assert time.monotonic() - started < 1
    wait_for(lambda: lab.status().state == "slow")
    assert "checkpoint-10" in lab.status().copying
    assert lab.flush(30) == [] and lab.status().state == "well"
    assert capsys.readouterr().out.count("is slow (project/runs/system1-x/checkpoints/checkpoint-10, 0 MiB in ") == 1


def test_a_copy_that_is_read_back_otherwise_is_none(project, drive, monkeypatch, capsys):
    """A disk that keeps another bit than it was given."""
    lab = persist.persist_to(drive)
    advise = os.posix_fadvise

    def lose_a_bit(descriptor, *given):
        advise(descriptor, *given)
        flip(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "posix_fadvise", lose_a_bit)
    write(project / "data" / "rows.json", "[1, 2, 3]")
    assert lab.flush(0.3) == ["project/data/rows.json"] and copied(drive) == set()
    assert "read back otherwise" in capsys.readouterr().out
    monkeypatch.undo()
    assert lab.flush() == [] and not list(drive.rglob(".tmp-*"))


def test_a_fault_that_nobody_foresaw_is_told_of_and_copying_goes_on(project, drive, monkeypatch, capsys):
    lab = persist.persist_to(drive)
    with monkeypatch.context() as faulty:

        def fail(*given):
            raise RuntimeError("unforeseen")

        faulty.setattr(copies.CopyFolder, "write", fail)
        write(project / "data" / "rows.json", "[1]")
        assert lab.flush(0.5) == ["project/data/rows.json"] and lab.status().state == "failing"
    assert lab.flush() == [] and lab.status().state == "well"
    assert capsys.readouterr().out.count("failed (RuntimeError('unforeseen')): it is tried again") == 1


# Two sessions


def test_a_second_run_on_the_same_machine_is_refused(project, drive, start_python):
    session = start_python(KILLED, drive)
    assert any(line == "going\n" for line in session.stdout)
    with pytest.raises(DistillError, match="Another run is writing"):
        persist.persist_to(drive)


def test_where_another_machine_takes_over_the_first_stops_copying_and_says_so(project, drive, capsys):
    lab = persist.persist_to(drive)
    lab.flush()
    store.write_json(drive / copies.MARKER, {"id": lab.folder.id, "session": OTHER_SESSION})
    write(project / "data" / "rows.json", "[1]")
    assert lab.flush(5) == ["project/data/rows.json"] and lab.stopped and lab.status().state == "ended"
    assert copied(drive) == set()
    assert "another session of the lab copies there now" in capsys.readouterr().out
    back = persist.persist_to(drive)  # asked again, it is the one that came last
    assert back is not lab and back.flush() == [] and copied(drive) == {"project/data/rows.json"}


def test_the_same_folder_again_is_the_same_mirror_and_another_ends_it(project, drive):
    write_project(project)
    lab = persist.persist_to(drive)
    assert persist.persist_to(drive) is lab
    other = persist.persist_to(drive.with_name("other"))
    assert other is not lab and lab.stopped and copied(drive) and other.flush() == []


def test_what_is_made_last_is_copied_when_the_session_ends(project, drive, start_python):
    code = "from distill import persist\npersist.persist_to(sys.argv[1])\n"
    code += "(store.ROOT / 'data').mkdir()\n(store.ROOT / 'data' / 'rows.json').write_text('[1]')\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    session = start_python(code, drive)
    said, errors = session.communicate(timeout=60)
    assert session.returncode == 0 and said.splitlines()[-1] == "[]", errors
    assert copied(drive) == {"project/data/rows.json"}


# What may not be


@pytest.mark.parametrize("inside", ["backup", "data", "."])
def test_a_folder_within_what_is_copied_is_refused(project, inside):
    with pytest.raises(ConfigError, match="lies in what is copied"):
        persist.persist_to(project / inside)
    with pytest.raises(ConfigError, match="or over it"):
        persist.persist_to(project.parent)


def test_a_missing_parent_is_no_folder_to_make(project, tmp_path):
    with pytest.raises(ConfigError, match="Mount the drive first"):
        persist.persist_to(tmp_path / "no" / "lab")
    assert not (tmp_path / "no").exists()


def test_a_folder_of_others_files_is_refused(project, drive):
    write(drive / "holiday.jpg", b"")
    with pytest.raises(ConfigError, match="holiday.jpg"):
        persist.persist_to(drive)
    assert [path.name for path in drive.iterdir()] == ["holiday.jpg"]


def test_google_drive_that_is_not_mounted_is_named(project, tmp_path, monkeypatch):
    monkeypatch.setattr(persist, "DRIVE", str(tmp_path / "content"))
    with pytest.raises(ConfigError, match="Google Drive is not mounted"):
        persist.persist_to(tmp_path / "content" / "MyDrive" / "lab")


def test_colab_is_asked_to_mount_drive_only_where_it_is_needed(monkeypatch, tmp_path):
    asked, drive_module = [], ModuleType("google.colab.drive")
    drive_module.mount = asked.append
    package = ModuleType("google.colab")
    package.drive = drive_module
    for name, module in (("google", ModuleType("google")), ("google.colab", package), ("google.colab.drive", drive_module)):
        monkeypatch.setitem(sys.modules, name, module)
    persist.mount_drive(tmp_path / "elsewhere")
    assert asked == []
    persist.mount_drive("/content/drive/MyDrive/lab")
    assert asked == ["/content/drive"]


HOSTILE_FILES = ["../../../../escaped.json", "/tmp/escaped.json", "a/../../x.json", ".hidden.json", "distill.py", "a\\b.json", ""]


@pytest.mark.parametrize("file", HOSTILE_FILES)
def test_names_that_lead_out_of_a_copy_are_refused(project, drive, tmp_path, file, capsys):
    persist.persist_to(drive).flush()
    persist._end()
    place = drive / "project" / "student" / "v000001"
    write(place / "config.json", "{}")
    files = {"config.json": items.digest(place / "config.json"), file: {"bytes": 0, "sha256": "0"}}
    store.write_json(place / copies.COPY, {"kind": "published", "files": files})
    before = set(tmp_path.rglob("*"))
    persist.persist_to(drive)
    made = {path for path in set(tmp_path.rglob("*")) - before if drive not in path.parents}
    assert not made and "left alone: project/student/v000001: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, kind",
    [("project/distill", "file"), ("project/.git/hooks", "published"), ("project/a.json", "file"), ("project/runs/x/last", "blob"),
     ("hub/models--a--b/blobs/../x", "blob"), ("hub/token", "file"), ("project/../x", "published"), ("project/data/x.py", "file")],
)  # fmt: skip
def test_a_name_that_the_lab_never_copies_is_no_item(name, kind):
    assert not items.is_kind(kind, name)


def test_a_folder_of_the_labs_own_is_never_replaced(project, drive, capsys):
    write(project / "distill" / "store.py", "pass")
    persist.persist_to(drive).flush()
    persist._end()
    place = drive / "project" / "distill" / "v000001"
    write(place / "distill_run.json", '{"files": {}}')
    files = {"distill_run.json": items.digest(place / "distill_run.json")}
    store.write_json(place / copies.COPY, {"kind": "published", "files": files})
    persist.persist_to(drive)
    assert tree(project) == {"distill/store.py": b"pass"} and "no checkpoint of the lab" in capsys.readouterr().out


def test_links_in_the_folder_of_copies_are_not_followed(project, drive, tmp_path, capsys):
    secret = write(tmp_path / "secret.json", "[1]")
    persist.persist_to(drive).flush()
    persist._end()
    place = drive / "project" / "data" / "rows.json" / "v000001"
    place.mkdir(parents=True)
    (place / "rows.json").symlink_to(secret)
    store.write_json(place / copies.COPY, {"kind": "file", "files": {"rows.json": items.digest(secret)}})
    persist.persist_to(drive)
    assert not (project / "data").exists() and "damaged copy" in capsys.readouterr().out


# The hub's cache


def write_cache(hub: Path, micro: Path, name: str = "models--acme--micro") -> Path:
    """A model in the hub's cache, as huggingface_hub lays it out."""
    model, commit = hub / name, "a" * 40
    for number, path in enumerate(sorted((micro / "student_system1").iterdir())):
        blob = f"{number:040x}" if path.suffix != ".safetensors" else store.hash_file(path)
        write(model / "blobs" / blob, path.read_bytes())
        link = model / "snapshots" / commit / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../blobs/{blob}")
    write(model / "refs" / "main", commit)
    write(model / "blobs" / "c1", "*.bin filter=lfs")  # as snapshot_download fetches it with every repository
    (model / "snapshots" / commit / ".gitattributes").symlink_to("../../blobs/c1")
    write(model / "blobs" / f"{'b' * 40}.incomplete", "half")
    return model


LOADS = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("acme/micro"), AutoTokenizer.from_pretrained("acme/micro")
print(model.num_parameters(), len(tokenizer))
"""


def test_a_restored_model_of_the_hub_loads_without_the_hub(project, drive, new_session, micro, tmp_path):
    lab = persist.persist_to(drive)
    model = write_cache(tmp_path / "hf" / "hub", micro)
    assert lab.flush() == [] and not any(path.is_symlink() for path in drive.rglob("*"))
    assert not any(content == b"half" for content in tree(drive).values())
    new_session()
    persist.persist_to(drive)
    restored = tmp_path / "hf-second" / "hub" / model.name
    links = {path.relative_to(model): path.readlink() for path in model.rglob("[!.]*") if path.is_symlink()}
    assert {path.relative_to(restored): path.readlink() for path in restored.rglob("*") if path.is_symlink()} == links != {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf-second")}
    done = subprocess.run([sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 600_000, done.stderr


def test_of_the_hubs_models_only_those_that_the_lab_uses_are_copied(project, drive, micro, tmp_path):
    hub = tmp_path / "hf" / "hub"
    write_cache(hub, micro, "models--others--big")
    write_cache(hub, micro, "models--acme--named")
    store.write_json(project / "runs" / "system1-x" / "job.json", {"models": {"student": "acme/named", "teacher": "/a/folder"}})
    lab = persist.persist_to(drive)
    write_cache(hub, micro, "models--acme--downloaded")
    lab.flush()
    assert {name.split("/")[1] for name in copied(drive) if name.startswith("hub/")} == {"models--acme--named", "models--acme--downloaded"}


@pytest.mark.parametrize(
    "kept",
    [
        {"refs": {"../../main": "a" * 40}, "links": {}},
        {"refs": {"main": "not a commit"}, "links": {}},
        {"refs": {}, "links": {"../../../x.json": "b1"}},
        {"refs": {}, "links": {"c/x.json": "../../../../etc/passwd"}},
        {"refs": {}, "links": {"/etc/x": "b1"}},
        {"links": {}},
        [],
    ],
)
def test_links_that_lead_out_of_a_model_are_refused(tmp_path, kept):
    model = tmp_path / "hub" / "models--a--b"
    write(model / "blobs" / "b1", "x")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError):
        hub_cache.write_links(model, kept)
    assert set(tmp_path.rglob("*")) == before


# What a user asks


def test_waiting_says_that_everything_is_copied_or_that_nothing_is(project, drive, capsys):
    persist.wait_for_copies()
    assert "nothing is copied (PERSIST_TO is empty)" in capsys.readouterr().out
    write_project(project)
    persist.persist_to(drive)
    persist.wait_for_copies()
    assert "12 copies, 0.00 GiB, everything is copied" in capsys.readouterr().out
    shutil.rmtree(drive)
    write(project / "data" / "rows.json", "[1]")
    persist.wait_for_copies(0.3)
    assert "not copied yet: project/data/rows.json (gone)" in capsys.readouterr().out


def test_set_up_restores_and_copies(project, drive, monkeypatch, capsys):
    monkeypatch.setattr(notebook, "setup_easydistill", lambda version: None)
    monkeypatch.setattr(environment, "setup_engine", lambda: sys.executable)
    monkeypatch.setattr(environment, "probe", lambda python: {"gpu": None, "versions": {}, "python": "3.13.1"})
    monkeypatch.setattr(notebook, "hub_answers", lambda: False)
    notebook.setup_lab()
    assert persist._active is None
    notebook.setup_lab(persist_to=str(drive))
    assert f"{drive}: nothing to restore; what this session makes is copied there" in capsys.readouterr().out
    assert json.loads((drive / copies.MARKER).read_text())["session"] == persist._active.folder.session


TRAINS = """
from distill import persist, pipeline
persist.persist_to(sys.argv[1])
result = pipeline.run_easy_distill(sys.argv[2], backend="builtin")
print("resumed from", result.resumed_from, flush=True)
"""


@pytest.mark.slow
def test_a_training_that_dies_with_its_machine_goes_on_on_another(project, drive, make_job, prepared_rows, start_python, tmp_path):
    job = make_job(project, prepared_rows[:500], prepared_rows[500:560], num_epochs=6, per_device_train_batch_size=4)
    kept = shutil.copytree(project, tmp_path / "kept")
    session = start_python(TRAINS, drive, job)
    wait_for(lambda: session.poll() is not None or [name for name in copied(drive) if "/checkpoint-" in name], 120)
    assert session.poll() is None, session.communicate()
    session.send_signal(signal.SIGKILL)
    session.wait()
    wait_for(lambda: not subprocess.run(["pgrep", "-f", str(project)], capture_output=True).stdout)
    shutil.rmtree(project)
    shutil.copytree(kept, project)  # what the user has: the job and its data; nothing of the run
    session = start_python(TRAINS, drive, job)
    said, errors = session.communicate(timeout=300)
    assert session.returncode == 0, said + errors
    assert said.rpartition("resumed from ")[2].strip().isdigit(), said
    assert "project/out" in copied(drive) and not [name for name in copied(drive) if "/checkpoint-" in name]
