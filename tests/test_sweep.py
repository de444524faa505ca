"""Sweeps: which cells a preset makes, that each is trained and asked once, and what a failure or a kill costs the others: nothing."""

import argparse
import json
import random
import re
import signal
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import engine, store, sweep, sweep_page
from distill.cli_runs import RUN_COMMANDS
from distill.errors import BackendError, ConfigError, DataError
from distill.generation import token_limit
from distill.perturb import PROMPTS, misspelt, perturbed, rephrased
from distill.sweep import run_sweep
from distill.sweep_plan import SWEEPS, cells_of, data_arguments, read_sweep, trainings_of

# The same question in other words

NUMBER, CODE = re.compile(r"\d+(?:[.,]\d+)*"), re.compile(r"(?<![^\W\d_])[A-Z]{2,}(?![^\W\d_])")
PIECES = st.sampled_from(
    [
        "what",
        "Reverse",
        "letters",
        "GINT",
        "347",
        "3.5",
        "1,000",
        "+",
        "$x_{max}$",
        "`code here`",
        '"as quoted"',
        "seven",
        ".",
        "?",
        "\n",
        "über",
    ]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=20).map(" ".join))


@pytest.mark.parametrize("change", [rephrased, misspelt])
@given(text=TEXTS, seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_numbers_and_codes_survive_every_change_in_order(change, text, seed):
    changed = change(text, random.Random(seed))
    assert NUMBER.findall(changed) == NUMBER.findall(text) and CODE.findall(changed) == CODE.findall(text)
    assert changed == change(text, random.Random(seed))


@given(text=TEXTS, seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_misspelling_keeps_every_word_that_is_short_quoted_or_no_prose(text, seed):
    before, after = text.split(" "), misspelt(text, random.Random(seed)).split(" ")
    assert len(before) == len(after)
    for word, other in zip(before, after, strict=True):
        assert word == other or (len(re.findall(r"[^\W\d_]", word)) >= 4 and abs(len(word) - len(other)) <= 1)


@given(text=TEXTS, seed=st.integers(0, 2**32))
def test_a_rephrased_question_holds_the_question(text, seed):
    changed = rephrased(text, random.Random(seed))
    assert changed != text and text[1:].rstrip(".?!") in changed


@pytest.mark.parametrize(
    "text",
    [
        "Solve $alpha + beta$ for \\gamma.",
        "`return value`",
        'Say "hello there"',
        "Say 'hello there'",
        "347 + 285 = ?",
        "https://example.org/path",
        "ab_cdef",
        "",
    ],
)
def test_nothing_is_misspelt_where_there_is_no_ordinary_word(text):
    assert {misspelt(text, random.Random(seed)) for seed in range(50)} <= {text}


def test_about_one_word_in_five_is_misspelt_and_at_least_one():
    text = " ".join(["ordinary"] * 50)
    assert sum(word != "ordinary" for word in misspelt(text, random.Random(0)).split()) == 10
    assert all(misspelt("Reverse the letters GINT.", random.Random(seed)) != "Reverse the letters GINT." for seed in range(50))


def test_a_question_is_changed_the_same_in_whatever_order_it_comes(heldout):
    for kind in PROMPTS:
        there, back = ([perturbed(row["instruction"], kind, row["id"]) for row in rows] for rows in (heldout[:50], heldout[:50][::-1]))
        assert there == back[::-1]
        assert (there == [row["instruction"] for row in heldout[:50]]) == (kind == "as written")


# The plan


def preset(**changes) -> dict:
    plan = {
        "system": "system1",
        "preset": "micro_system1",
        "data": {"slice_str": "train"},
        "questions": "heldout.jsonl",
        "vary": {"rows": [1, 2]},
    }
    return {**plan, **changes}


def read(**changes):
    return read_sweep(str(store.write_json("mine.json", preset(**changes))))


def test_a_grid_holds_every_combination_and_keeps_together_what_shares_a_training(project):
    plan = read(vary={"prompt": ["as written", "misspelt"], "rows": [10, 20], "cot_sentence": [False, True]}, repeat_seeds=[0, 1])
    cells = cells_of(plan)
    assert len(cells) == 16 and len({cell.name for cell in cells}) == 16
    trained = [(cell.axes["rows"], cell.seed) for cell in cells]
    assert [trained[number] for number in range(0, 16, 4)] == [(10, 0), (20, 0), (10, 1), (20, 1)] and trained[0] == trained[3]
    assert len(trainings_of(plan)) == 4


def test_one_at_a_time_changes_one_axis_from_the_first_value_of_each(project):
    plan = read(vary={"rows": [10, 20, 30], "num_epochs": [1, 2]}, design="one_at_a_time")
    assert [tuple(cell.axes.values()) for cell in cells_of(plan)] == [(10, 1), (20, 1), (30, 1), (10, 2)]


def test_axes_of_the_data_become_arguments_of_the_preparation(project):
    plan = read(
        vary={"rows": [10], "relabelled": [False, True]}, data={"slice_str": "train", "teacher_model": "t", "relabel_with_teacher": 5}
    )
    plain, relabelled = (data_arguments(plan, cell) for cell in cells_of(plan))
    assert plain == {"slice_str": "train", "rows": 10} and relabelled == plain | {"teacher_model": "t", "relabel_with_teacher": 5}
    plan = read(system="system2", preset="micro_system2", vary={"rv": [[0, 2]], "cd": [[1, 9]], "max_length": [99]})
    found = data_arguments(plan, cells_of(plan)[0])
    assert found.pop("student_model").endswith("data/micro/student_system2")
    assert found == {"slice_str": "train", "rv_min": 0, "rv_max": 2, "cd_min": 1, "cd_max": 9, "max_length": 99}


PROBLEMS = {
    "sistem: no such key. Did you mean system?": {"sistem": 1},
    "vary = []: is no dict.": {"vary": []},
    "system = 'system3': is not one of system1, system2.": {"system": "system3"},
    "design = 'gird': is not one of grid, one_at_a_time. Did you mean grid?": {"design": "gird"},
    "repeat_seeds = [0, 0]: give whole numbers of 0 or more, each once": {"repeat_seeds": [0, 0]},
    "max_new_tokens = 0: give a whole number above 0.": {"max_new_tokens": 0},
    "vary: names no axis": {"vary": {}},
    "vary.seed: repeat_seeds says that.": {"vary": {"seed": [1]}},
    "vary.rowz: no such axis. Did you mean rows?": {"vary": {"rowz": [1]}},
    "vary.rv: is an axis of system2 alone.": {"vary": {"rv": [[0, 1]]}},
    "vary.rows = []: give a list of values, each once.": {"vary": {"rows": []}},
    "vary.rows = True: give a whole number of rows above 0.": {"vary": {"rows": [True, 5]}},
    "vary.prompt = ['as written']: give": {"vary": {"prompt": [["as written"]]}},
    'vary.prompt = \'mispelt\': give "as written" or "rephrased" or "misspelt".': {"vary": {"prompt": ["mispelt"]}},
    "data.rows: the sweep decides it; leave it out.": {"data": {"rows": 5}},
    "data.out_labeled: the sweep decides it; leave it out.": {"data": {"out_labeled": "x"}},
    "data.sources: no such argument. Did you mean source?": {"data": {"sources": "x"}},
    "learning_rate = 'fast': is no number.": {"vary": {"learning_rate": ["fast"]}},
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_preset_that_cannot_work_is_refused_before_anything_is_written(project, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        run_sweep(str(store.write_json("mine.json", preset(**PROBLEMS[problem]))))
    assert [path.name for path in project.iterdir()] == ["mine.json"]


def test_a_sweep_that_is_not_there_is_named_with_a_near_miss():
    with pytest.raises(
        ConfigError, match=r"there is no such sweep. Did you mean micro_system1\? Shipped: micro_system1, micro_system2, qwen"
    ):
        read_sweep("micro_sistem1")


@pytest.mark.parametrize("name", [path.stem for path in sorted(SWEEPS.glob("*.json"))])
def test_every_shipped_sweep_is_valid_and_says_what_it_is(name):
    plan = read_sweep(name)
    assert len(cells_of(plan)) >= 4 and plan.note and ("never run" in plan.note) == name.startswith("qwen")


# The questions


def test_questions_are_those_of_the_system_and_the_first_of_each_family(project):
    rows = [
        {"family": family, "system": system, "instruction": f"{family}{n}", "answer": "x"}
        for n in range(3)
        for family, system in (("a", 1), ("b", 1), ("c", 2))
    ]
    store.write_jsonl("heldout.jsonl", [*rows, {"instruction": "no family", "input": "and more", "answer": "x"}])
    found = sweep._questions(read(), limit=2)
    assert [row["instruction"] for row in found] == ["a0", "b0", "a1", "b1", "no family\n\nand more"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "answer": " "}, "row 0 of heldout.jsonl has no answer: it cannot be scored."),
        ({"instruction": "a", "answer": "\ud800"}, "row 0 of heldout.jsonl: its answer is no valid text."),
        (
            {"instruction": "a", "answer": "b", "input": 5, "family": "\ud800"},
            "row 0 of heldout.jsonl: its input and family is no valid text.",
        ),
        ({"system": 2}, "has no question for system1"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(project, row, message):
    (project / "heldout.jsonl").write_text(json.dumps(row))
    store.write_json("mine.json", preset())
    with pytest.raises(DataError, match=message):
        run_sweep("mine.json")
    assert not (project / "runs").exists()


# Real ones


def write_preset(micro, vary: dict) -> str:
    plan = {
        "preset": str(REPOSITORY / "configs" / "presets" / "micro_system1.json"),
        "data": {"slice_str": "train[:400]", "source": str(micro / "distilqwen.parquet")},
        "questions": str(micro / "heldout.jsonl"),
        "vary": {"max_steps": [4], **vary},
        "max_new_tokens": 12,
    }
    return str(store.write_json("mine.json", preset(**plan)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, micro):
    """A sweep of four cells, two of which cannot be trained: {"root", "preset", "result"}."""
    root = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", root)
        students = [str(micro / "student_system1"), str(root / "nowhere")]
        preset = write_preset(micro, {"rows": [60], "student_model": students, "prompt": ["as written", "misspelt"]})
        # without a word that could be misspelt: the second asking costs no process
        store.write_jsonl("heldout.jsonl", [{"family": "code", "instruction": f"{n} + {n}?", "answer": str(2 * n)} for n in range(14)])
        store.write_json(preset, {**store.read_json(preset), "questions": "heldout.jsonl"})
        yield {"root": root, "preset": preset, "result": run_sweep(preset, limit=12)}


def test_cells_that_share_a_training_train_once_and_each_is_scored(swept):
    plain, other = swept["result"]["cells"][:2]
    assert plain["status"] == other["status"] == "done" and plain["run"] == other["run"] and plain["rows"] == 57
    assert len(list((swept["root"] / "runs").glob("system1-*"))) == 1
    for cell in (plain, other):
        assert cell["scores"]["exact_match"]["n"] == sum(share["n"] for share in cell["scores"]["families"].values()) == 12
        assert cell["scores"]["stopped"]["n"] == 12 and (swept["root"] / cell["checkpoint"] / "distill_run.json").is_file()


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(swept):
    failed = swept["result"]["cells"][2:]
    assert swept["result"]["failed"] == 2
    assert all(cell["status"] == "failed" and cell["error"].startswith("ConfigError: Invalid student model") for cell in failed)


def test_a_second_call_trains_nothing_and_asks_nothing(swept, monkeypatch, capsys):
    def refuse(*arguments, **named):
        raise AssertionError("a process was started")

    monkeypatch.setattr(engine, "run_module", refuse)
    again = run_sweep(swept["preset"], limit=12)
    assert {**again, "made": ""} == {**swept["result"], "made": ""}
    assert "cell 4 of 4" in capsys.readouterr().out


def test_the_command_exits_with_an_error_where_cells_failed_and_the_report_stands(swept, monkeypatch):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in RUN_COMMANDS:
        add(commands)
    options = parser.parse_args(["sweep", swept["preset"], "--limit", "12", "--out", "elsewhere"])
    with pytest.raises(BackendError, match="2 of 4 cells of the sweep failed"):
        options.run(options)
    written = json.loads((swept["root"] / "elsewhere/sweep.json").read_text())
    assert (swept["root"] / "reports/sweep/mine-limit-12/sweep.json").is_file()
    assert [place.name for place in (swept["root"] / "runs/sweeps").iterdir()] == [f"mine-{written['key']}"]
    assert written["cells"] == swept["result"]["cells"]


def test_the_report_holds_every_cell_and_runs_nothing(swept):
    places = swept["result"]["files"]
    page, plain, drawn = (Path(places[kind]).read_text(encoding="utf-8") for kind in ("html", "md", "svg"))
    assert "default-src 'none'" in page and not re.search(r"<script|https?://(?!www\.w3\.org|purl\.org|creativecommons)", page)
    for text in (page, plain):
        assert text.count("ConfigError: Invalid student model") == 2 and "Exact match by family" in text
    assert "<svg" in page and drawn.startswith("<?xml") and "Exact match, %" in drawn


def test_hostile_names_and_errors_stay_text_in_every_report(swept, tmp_path):
    hostile = "<script>alert(1)</script>|\u202e[x](javascript:1)\x1b[31m"
    axes = {"student_model": [hostile, "b"]}
    scored = {**swept["result"]["cells"][0], "axes": {"student_model": hostile}}
    failed = {"axes": {"student_model": "b"}, "seed": 0, "status": "failed", "error": hostile}
    sweep_page.write({**swept["result"], "axes": axes, "note": hostile, "cells": [scored, failed]}, tmp_path)
    for kind in ("html", "svg", "md"):
        text = (tmp_path / f"sweep.{kind}").read_text()
        assert not re.search(r"(?<!\\)<script", text) and "\u202e" not in text and "\x1b" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", (tmp_path / "sweep.md").read_text())


def test_seeds_are_summed_up_by_their_mean_and_range(swept):
    cells = [{**swept["result"]["cells"][0], "seed": seed} for seed in (0, 1)]
    cells[1]["scores"] = {**cells[1]["scores"], "exact_match": {"value": 1.0, "n": 12, "ci": [0.76, 1.0]}}
    (found,) = sweep._over_seeds(cells)
    value = cells[0]["scores"]["exact_match"]["value"]
    assert (found["seeds"], found["mean"], found["lowest"], found["highest"]) == (2, (value + 1) / 2, value, 1.0)


def asked_limits(monkeypatch, **changes) -> list[dict]:
    """The limits of an answer in each cell of a sweep over the CoT sentence."""
    plan, given = read(vary={"cot_sentence": [False, True]}, **changes), []
    share = {"value": 1.0, "n": 1, "ci": [0.2, 1.0]}

    def fake(models, place, folder, limits, *, fresh):
        given.append(limits)
        return {"student": {"exact_match": {"all": share}, "reasoned": share, "stopped": share}}

    monkeypatch.setattr(sweep, "score", fake)
    runner = sweep._Runner(plan, store.resolve("work"), [{"id": "a", "instruction": "b", "answer": "c"}], False)
    for cell in cells_of(plan):
        runner._score(cell, "checkpoint")
    return given


@pytest.mark.parametrize("system", ["system1", "system2"])
def test_the_sentence_that_asks_for_reasoning_changes_no_limit(project, monkeypatch, system):
    limit = token_limit(None, system)
    assert asked_limits(monkeypatch, system=system, preset=f"micro_{system}") == [{"system1": limit}, {"system2": limit}]
    assert asked_limits(monkeypatch, max_new_tokens=7) == [{"system1": 7}, {"system2": 7}]


def test_data_that_trainings_share_are_prepared_anew_once(project, monkeypatch):
    plan, prepared = read(vary={"num_epochs": [1, 2], "rows": [5, 6]}), []

    def distil(settings):
        raise BackendError("not here")

    monkeypatch.setitem(sweep.PREPARE, "system1", lambda **arguments: prepared.append((arguments["rows"], arguments["fresh"])))
    monkeypatch.setitem(sweep.DISTILL, "system1", distil)
    runner = sweep._Runner(plan, store.resolve("work"), [], True)
    assert {runner.run(cell)["status"] for cell in cells_of(plan)} == {"failed"}
    assert sorted(prepared) == [(5, False), (5, True), (6, False), (6, True)]


def test_sweeps_of_one_name_and_other_limits_have_folders_of_their_own(project, capsys):
    plan, other = read(), read(data={"slice_str": "train[:9]"})
    assert plan.name == other.name and plan.key != other.key and read(vary={"rows": [7]}).key == plan.key
    folder = sweep._folder(plan, None)
    assert folder == sweep._folder(other, None) == Path("reports/sweep/mine") != sweep._folder(plan, 5)
    store.write_json(folder / "sweep.json", {"key": plan.key})
    assert sweep._folder(plan, None) == folder and capsys.readouterr().out == ""
    assert sweep._folder(other, None) == Path(f"reports/sweep/mine-{other.key}")
    assert "reports/sweep/mine holds the report of another sweep of this name" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_grid_of_trainings_is_scored(project, micro, start_python):
    preset = write_preset(
        micro, {"rows": [200, 400], "student_model": [str(micro / "student_system1")], "prompt": ["as written", "misspelt"]}
    )
    process = start_python("from distill.sweep import run_sweep\nrun_sweep(sys.argv[1], limit=5)", preset)
    for line in process.stdout:
        if line.startswith("cell 2 of 4"):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (first,) = (project / "runs/sweeps").glob("mine-*/*/checkpoint/distill_run.json")
    stood = first.stat().st_mtime_ns
    result = run_sweep(preset, limit=5)
    assert first.stat().st_mtime_ns == stood and result["failed"] == 0
    assert [cell["rows"] for cell in result["cells"]] == [190, 190, 380, 380]
    assert len({cell["run"] for cell in result["cells"]}) == 2
    asked = [(first.parents[2] / "questions" / f"{name}.jsonl").read_text() for name in ("as_written", "misspelt")]
    assert asked[0] != asked[1]
