"""No sequence of trainings, copies, kills, damage, lost machines and restorings loses a later state, or takes one of another job."""

import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from distill import copies, persist, restore, resume, store
from distill.errors import DataError
from distill.mirror import Mirror
from tests.test_stages import die_at_rename

JOBS = ("even", "odd")  # a job's checkpoints have steps of its own: of two in one folder, the one that was saved last would stay
KILLS = st.one_of(st.none(), st.none(), st.none(), st.tuples(st.integers(0, 12), st.booleans()))


def loss_after(job: str, step: int) -> float:
    return Random(f"{job}{step}").random()


class Sessions(RuleBasedStateMachine):
    """A training of two jobs in one run, and a journal of answers, on machines that come and go beside one drive.

    The lab's own claiming, rotating, copying and restoring; only the steps of the training and the answers are toys.
    """

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        (self.folder / "drive").mkdir()
        self.drive, self.patch, self.machines = self.folder / "drive" / "lab", pytest.MonkeyPatch(), 0
        self.job, self.answered = JOBS[0], 0
        self.reached, self.answers = dict.fromkeys(JOBS, 0), set()  # what must not be lost
        self.take_a_machine()

    def teardown(self):
        try:
            self.open_and_copy(None)
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    def take_a_machine(self):
        self.machines += 1
        self.root = self.folder / f"machine{self.machines}"
        (self.root / "runs" / "x").mkdir(parents=True)
        self.checkpoints, self.journal = self.root / "runs" / "x" / "checkpoints", self.root / "runs" / "labels" / "ab.jsonl"
        self.patch.setattr(store, "ROOT", self.root)
        self.lab = None

    # What stands where

    def here(self, job: str) -> int:
        """The last step of a job that stands here whole."""
        return max([0, *(resume.step_of(one) for one in self.checkpoints.glob("checkpoint-*") if self.is_whole(one, job))])

    def there(self, job: str) -> int:
        """The last step of a job that has a whole copy."""
        places = self.drive.glob("project/runs/x/checkpoints/checkpoint-*/v*")
        return max([0, *(resume.step_of(one.parent) for one in places if self.is_whole_copy(one) and self.is_whole(one, job))])

    @staticmethod
    def is_whole(place: Path, job: str) -> bool:
        try:
            manifest = store.read_manifest(place)
        except DataError:
            return False
        return manifest is not None and manifest["resume_key"] == job

    def is_whole_copy(self, place: Path) -> bool:
        copy = self.copy_at(place)
        return copy is not None and all(copies.is_whole(place / file, fact) for file, fact in copy.files.items())

    def copy_at(self, place: Path) -> copies.Copy | None:
        """What a folder of copies says that it holds; None where that is damaged."""
        try:
            return copies.read_copy(place, self.drive)
        except DataError:
            return None

    def answers_in(self, journal: Path) -> set[str]:
        lines = journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []
        return {entry["id"] for _, entry in store.intact_lines(lines)}

    def answers_there(self) -> set[str]:
        places = (self.drive / "project/runs/labels/ab.jsonl").glob("v*")
        return set().union(*[self.answers_in(place / "ab.jsonl") for place in places if self.copy_at(place)])

    def nothing_is_lost(self):
        for job in JOBS:
            assert max(self.here(job), self.there(job)) >= self.reached[job], f"a later state of {job} is lost"
        assert self.answers_in(self.journal) | self.answers_there() >= self.answers, "answers are lost"

    def count_losses(self):
        """After a fault: what is left whole is all that can be asked for."""
        self.reached = {job: min(self.reached[job], max(self.here(job), self.there(job))) for job in JOBS}
        self.answers &= self.answers_in(self.journal) | self.answers_there()

    # A training

    def go_on(self, saves: int):
        """A session of the engine."""
        found, _ = resume.claim(self.checkpoints, self.job)
        state = {"global_step": -(self.job == "odd"), "best_global_step": None, "best_metric": None, "log_history": []}
        if found:
            state = store.read_json(found / "trainer_state.json")
            trainer = SimpleNamespace(state=SimpleNamespace(**state), resume_key=self.job)
            trainer._folder_of = lambda step: self.checkpoints / f"checkpoint-{step}"
            resume.ResumableTrainer._find_best(trainer, found)
            state = {**vars(trainer.state)}
            assert state.pop("best_model_checkpoint") is None or self.is_whole(
                found.with_name(f"checkpoint-{state['best_global_step']}"), self.job
            )
        for _ in range(saves):
            self.save(state)

    def save(self, state: dict):
        state["global_step"] += 2
        step = state["global_step"]
        if step % 3:
            state["log_history"].append({"step": step, "eval_loss": loss_after(self.job, step)})
            if state["best_metric"] is None or loss_after(self.job, step) < state["best_metric"]:
                state |= {"best_global_step": step, "best_metric": loss_after(self.job, step)}
        place = self.checkpoints / f"checkpoint-{step}"
        store.empty_folder(place)
        place.mkdir(parents=True, exist_ok=True)
        (place / "model.safetensors").write_text(f"{self.job} after {step}")
        store.write_json(place / "trainer_state.json", state)
        store.write_manifest(place, {"resume_key": self.job})
        resume.rotate(self.checkpoints, self.job)

    def in_a_process(self, work, kill):
        """Do some work; where `kill` says so, in a process that ends at one of its renames, cleaning up nothing."""
        if kill is None:
            work()
            return
        child = os.fork()
        if not child:
            try:
                die_at_rename(*kill)
                work()
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    @rule(saves=st.integers(1, 4), kill=KILLS)
    def train(self, saves, kill):
        stood, before = self.here(self.job), [one.name for one in resume.sealed(self.checkpoints, self.job)]
        found, _ = resume.claim(self.checkpoints, self.job)
        assert (resume.step_of(found) if found else 0) == stood, "it goes on from another than the last whole one"
        assert found is None or (found / "model.safetensors").read_text() == f"{self.job} after {stood}"
        self.nothing_is_lost()
        self.in_a_process(lambda: self.go_on(saves), kill)
        if [one.name for one in resume.sealed(self.checkpoints, self.job)] != before:
            self.reached |= {other: 0 for other in JOBS if other != self.job}  # its checkpoints may go now
        self.nothing_is_lost()
        self.reached[self.job] = max(self.reached[self.job], self.here(self.job))
        if self.lab:
            self.copy(None)

    @rule(is_fresh=st.booleans())
    def change_the_training(self, is_fresh):
        """Another job in the same run; or the same one with `fresh`."""
        if is_fresh:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.reached = dict.fromkeys(JOBS, 0)
        else:
            self.job = JOBS[1 - JOBS.index(self.job)]

    @rule(count=st.integers(1, 3))
    def answer(self, count):
        store.read_journal(self.journal)
        store.make_folder(self.journal.parent)
        for _ in range(count):
            self.answered += 1
            store.add_to_journal(self.journal, {"id": f"q{self.answered}", "text": "answer"})
            self.answers.add(f"q{self.answered}")

    # Copies

    def open_session(self):
        roots = {"project": self.root, "hub": self.root / "hub"}
        folder = copies.CopyFolder(self.drive)
        record = persist._read_record(folder.id, self.root)
        restore.restore(folder, roots, record)
        self.lab = Mirror(folder, roots, record, persist._remember(folder.id, self.root))

    @rule(kill=KILLS)
    def open_and_copy(self, kill):
        """A session begins with what is on the drive, and copies there."""
        self.lab = None
        self.in_a_process(self.open_session, kill)
        self.nothing_is_lost()
        if kill is None:
            assert all(self.here(job) >= self.reached[job] for job in JOBS), "a later state did not come back"
            assert self.answers_in(self.journal) >= self.answers, "answers did not come back"
            self.copy(None)

    @precondition(lambda self: self.lab)
    @rule(kill=KILLS)
    def copy(self, kill):
        self.in_a_process(self.lab._cycle, kill)
        if kill:
            self.lab = None  # the copying goes with the session
        self.nothing_is_lost()

    # Faults

    @rule(is_lost=st.booleans(), saves=st.integers(0, 2))
    def end_the_session(self, is_lost, saves):
        """What comes next is not copied; on another machine, where this one is lost."""
        self.lab = None
        if is_lost:
            shutil.rmtree(self.root)
            self.take_a_machine()
            self.count_losses()
        if saves:
            self.train(saves, None)

    @rule(which=st.integers(0, 9_999), at=st.integers(0, 9_999), bit=st.integers(0, 7), is_seen=st.booleans())
    def flip_a_bit(self, which, at, bit, is_seen):
        """In any file that there is; by numbers, since which files there are is not the same in every run."""
        places = [self.checkpoints, self.journal.parent, self.drive / "project"]
        files = sorted(one for place in places for one in place.rglob("*") if one.is_file() and ".tmp-" not in str(one))
        if not files:
            return
        file = files[which % len(files)]
        facts, content = file.stat(), bytearray(file.read_bytes())
        content[at % len(content)] ^= 1 << bit
        before = self.answers_in(file)
        file.write_bytes(content)
        if not is_seen:  # as a failing disk does
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        self.answers -= before - self.answers_in(file)  # where it is damaged in one place, it may be taken for the newer
        self.count_losses()


class TestSessions(Sessions.TestCase):
    settings = settings(max_examples=150, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
class TestSessionsAtLength(Sessions.TestCase):
    settings = settings(max_examples=2_000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
