"""No stage takes a stale result for its own, whatever was changed, killed or damaged; and none does again what is finished."""

import ast
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distill import stages, store
from distill.stages import Stage

DISTILL = Path(stages.__file__).parent
# Modules that bring a stage's settings and files to it, and decide nothing of what it makes.
PLUMBING = {"errors", "console", "faults", "stages", "store", "config", "engine", "process", "easydistill", "server", "models", "machine"}
PLUMBING |= {"sources"}


# What decides a stage


def test_the_lists_of_modules_that_decide_a_stage_are_complete():
    lists = {"answering": stages.ANSWERING, "labelling": stages.LABELLING}  # the tokens' half of data.py imports what preparing does
    lists |= {f"preparing {name}": modules for name, modules in stages.PREPARING.items()}
    lists["preparing system1"] += stages.LABELLING  # which count where a teacher relabels
    lists["preparing traces"] += stages.LABELLING
    for name, modules in lists.items():
        imported = {
            node.module or alias.name
            for module in modules
            for node in ast.walk(ast.parse((DISTILL / module).read_text()))
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        assert {f"{one}.py" for one in imported - PLUMBING} <= set(modules), name


def test_a_change_in_a_module_is_another_code():
    assert stages.code("prompt.py") != stages.code("prompt.py", "data.py") == stages.code("data.py", "prompt.py")


@pytest.fixture
def made(project) -> tuple[Stage, Path]:
    """A finished stage and its output."""
    stage = Stage("System 2's data", {"rv_max": 9, "slice_str": "train", "rows": None}, {"what a.jsonl holds": "aa"}, "code")
    output = project / "data" / "out.json"
    store.write_rows(output, [{"id": 1}])
    store.write_manifest(output, {"read": 3, "stage": stage.record()})
    return stage, output


def test_a_finished_stage_gives_its_manifest_and_says_so(made, capsys):
    stage, output = made
    assert stages.reuse(stage, output)["read"] == 3
    assert capsys.readouterr().out == "System 2's data: done before, nothing has changed (data/out.json)\n"
    for touched in (0, 10**10):
        os.utime(output, (touched, touched))
        assert stages.reuse(stage, output)


def changed_settings(stage, **settings):
    return replace(stage, settings=stage.settings | settings)


CHANGES = {
    "rv_max was 9 and is 5": lambda stage: changed_settings(stage, rv_max=5),
    "slice_str was train and is train[:9] and rows was not set and is 7": lambda stage: changed_settings(
        stage, rows=7, slice_str="train[:9]"
    ),
    "rv_max was 9 and is true": lambda stage: changed_settings(stage, rv_max=True),
    "seed was not set and is 0": lambda stage: changed_settings(stage, seed=0),
    "what a.jsonl holds changed": lambda stage: replace(stage, inputs={"what a.jsonl holds": "ab"}),
    "what b.jsonl holds changed and what a.jsonl holds is read no more": lambda stage: replace(stage, inputs={"what b.jsonl holds": None}),
    "the lab's code for it changed": lambda stage: replace(stage, code="other"),
    "System 2's data stands there": lambda stage: replace(stage, name="System 1's data"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_whatever_decides_a_stage_makes_it_anew_with_the_reason_said(made, capsys, reason):
    stage, output = CHANGES[reason](made[0]), made[1]
    assert stages.reuse(stage, output) is None
    assert capsys.readouterr().out == f"{stage.name}: made anew, since {reason}\n"


def damage_last_byte(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flipped_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 2
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, damage_last_byte, damage_flipped_bit])
@pytest.mark.parametrize("name", ["out.json", "out.json.manifest.json"])
def test_a_damaged_output_or_manifest_is_none(made, damage, name, capsys):
    stage, output = made
    damage(output.with_name(name))
    if (damage, name) == (damage_last_byte, "out.json.manifest.json"):
        assert stages.reuse(stage, output)  # only the line break at its end is gone
        return
    assert stages.reuse(stage, output) is None and "System 2's data: made anew, since data/out.json" in capsys.readouterr().out


def test_what_was_never_made_is_made_without_a_word_and_fresh_makes_anew(made, capsys):
    stage, output = made
    assert stages.finished(stage, output.with_name("new.json")) == (None, "") and not stages.reuse(stage, output.with_name("new.json"))
    assert not capsys.readouterr().out
    assert not stages.reuse(stage, output, fresh=True) and "made anew, since that is asked for" in capsys.readouterr().out
    store.write_rows(output.with_name("mine.json"), [])
    store.write_manifest(output, {"read": 3})
    assert stages.finished(stage, output.with_name("mine.json"))[1] == "data/mine.json was not finished"
    assert stages.finished(stage, output)[1] == "what stands there does not say how it was made"


def test_all_outputs_of_a_stage_must_stand(made):
    stage, output = made
    second = output.with_name("second.json")
    assert stages.finished(stage, output, second) == (None, "")
    store.write_rows(second, [])
    store.write_manifest(second, {"stage": stage.record()})
    assert stages.finished(stage, output, second)[0]["read"] == 3
    store.write_manifest(second, {"stage": changed_settings(stage, rv_max=1).record()})
    assert stages.finished(stage, output, second) == (None, "rv_max was 1 and is 9")


def test_an_output_that_is_whole_and_not_complete_is_made_anew(made):
    stage, output = made
    store.write_manifest(output, {"stage": stage.record("3 rows had no answer")})
    assert stages.finished(stage, output) == (None, "3 rows had no answer")


def test_an_input_that_cannot_be_asked_for_counts_as_unchanged_and_that_is_said(made, capsys):
    stage, output = made
    silent = replace(stage, inputs=dict.fromkeys(stage.inputs, stages.UNKNOWN))
    assert stages.reuse(silent, output)
    assert capsys.readouterr().out.endswith("(data/out.json); whether what a.jsonl holds changed since cannot be known now\n")
    assert stages.reuse(changed_settings(silent, rv_max=1), output) is None


# No sequence of runs, kills, changes and damage ever gives a stale result


VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def made_from(step: str, setting: int, given: list[int], code: str) -> list[int]:
    """What a step makes: each another function of all that decides it."""
    makes = {"prepare": lambda value: value % (setting + 2), "label": lambda value: 10 * value + setting}
    makes["train"] = lambda value: value - setting
    return [makes[step](value) + len(code) for value in given]


def die_at_rename(number: int, before: bool):
    """In a child: end the process as a kill does, before or after its rename of that number."""
    left = [number]

    def dying(rename):
        def call(*arguments):
            if left[0] == 0 and before:
                os._exit(9)
            made = rename(*arguments)
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return made

        return call

    os.replace, Path.rename = dying(os.replace), dying(Path.rename)


class Workflow(RuleBasedStateMachine):
    """Three stages, each on the one before, that work by `stages` and `store` as the lab's own do; the last makes a folder."""

    steps = ("prepare", "label", "train")

    @initialize(values=VALUES)
    def begin(self, values):
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.settings, self.code, self.work = dict.fromkeys(self.steps, 0), dict.fromkeys(self.steps, "c"), Counter()
        self.stale = set(self.steps)  # what may have to be done again since the last run that was completed
        self.is_completed = False
        self.write_source(values)

    def teardown(self):
        shutil.rmtree(self.folder)

    def changes(self, *steps: str):
        """These steps and all behind them may have to be done."""
        if steps:
            self.stale |= set(self.steps[min(map(self.steps.index, steps)) :])
        self.is_completed = False

    def write_source(self, values):
        self.source = values
        store.write_json(self.folder / "source.json", values)

    def output(self, step: str) -> Path:
        return self.folder / ("train" if step == "train" else f"{step}.json")

    def do(self):
        """Run the workflow; count the work that it does."""
        given = self.folder / "source.json"
        for step in self.steps:
            out = self.output(step)
            with store.lock(out):
                store.recover(out)
                stage = Stage(step, {"setting": self.settings[step]}, {"what it reads": self.hashed(given)}, self.code[step])
                if not stages.reuse(stage, out):
                    self.work[step] += 1
                    self.write(out, made_from(step, self.settings[step], self.values(given), self.code[step]), stage)
            given = out

    @staticmethod
    def hashed(place: Path) -> str:
        return store.hash_file(place / "weights.json" if place.is_dir() else place)

    @staticmethod
    def values(place: Path) -> list[int]:
        return store.read_json(place / "weights.json" if place.is_dir() else place)

    @staticmethod
    def write(out: Path, values: list[int], stage: Stage):
        if out.suffix:
            store.write_json(out, values)
            store.write_manifest(out, {"stage": stage.record()})
            return
        with store.atomic_folder(out) as folder:
            store.write_json(folder / "weights.json", values)
            store.write_manifest(folder, {"stage": stage.record()})

    @rule()
    def run(self):
        self.work.clear()
        self.do()
        assert set(self.work) <= self.stale, "work was done again that nothing asked for"
        self.stale, self.is_completed = set(), True

    @rule(writes=st.integers(0, 9), before=st.booleans())
    def run_and_be_killed(self, writes, before):
        """A process is ended at one of its writes, before or after the rename that makes it count; nothing is cleaned up."""
        child = os.fork()
        if not child:
            die_at_rename(writes, before)
            self.do()
            os._exit(0)
        os.waitpid(child, 0)
        self.changes()

    @rule(step=st.sampled_from(steps), setting=st.integers(0, 2))
    def change_a_setting(self, step, setting):
        if setting != self.settings[step]:
            self.settings[step] = setting
            self.changes(step)

    @rule(values=VALUES)
    def change_the_source(self, values):
        self.write_source(values)
        self.changes(*self.steps)

    @rule(step=st.sampled_from(steps), code=st.sampled_from(("c", "cc")))
    def change_the_code(self, step, code):
        if code != self.code[step]:
            self.code[step] = code
            self.changes(step)

    @rule(data=st.data(), how=st.sampled_from(("truncate", "flip", "delete")))
    def damage(self, data, how):
        files = sorted(file for file in self.folder.rglob("*.json") if file.name != "source.json" and ".tmp-" not in str(file))
        if not files:
            return
        file = data.draw(st.sampled_from(files))
        content = file.read_bytes() or b"x"
        place = data.draw(st.integers(0, len(content) - 1))
        if how == "delete":
            file.unlink()
        else:
            file.write_bytes(content[:place] + (b"" if how == "truncate" else bytes([content[place] ^ 4]) + content[place + 1 :]))
        self.changes(*[step for step in self.steps if file.relative_to(self.folder).parts[0].startswith(step)])

    @rule(seconds=st.sampled_from((0, 1, 10**9, 10**10)))
    def move_the_clock(self, seconds):
        for file in self.folder.rglob("*"):
            os.utime(file, (seconds, seconds))

    @invariant()
    def outputs_of_a_completed_run_are_those_of_a_fresh_one(self):
        if not getattr(self, "is_completed", False):
            return
        values = self.source
        for step in self.steps:
            values = made_from(step, self.settings[step], values, self.code[step])
            assert self.values(self.output(step)) == values


class TestWorkflow(Workflow.TestCase):
    settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


@pytest.mark.slow
class TestWorkflowAtLength(Workflow.TestCase):
    settings = settings(max_examples=2_000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
