"""Traces scored and shortened, answers judged: by a stand-in EasyDistill 2.x over real sockets, with judges that misbehave."""

import json

import pytest
import standin_easydistill2
from openai_server import OpenAIServer

from distill import asking, judge, store, trace_tools
from distill.compare import Comparison
from distill.endpoint import Endpoint, score_of
from distill.errors import BackendError, ConfigError, DataError
from distill.intervals import wilson
from distill.traces import prepare_system2_dataset

HOSTILE = 'Solve {x} for $HOME, \\frac{1}{2} and "it"\nin two lines.'


@pytest.fixture(autouse=True)
def quick(monkeypatch, project, tmp_path):
    monkeypatch.setattr(asking, "PAUSES_SECONDS", (0,))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill2.build(tmp_path)))


@pytest.fixture
def server():
    with OpenAIServer(answer=lambda text: "<score>1</score>") as one:
        yield one


def behind(server: OpenAIServer, **settings) -> Endpoint:
    return Endpoint("teacher", server.base_url, **settings)


def trace(number: int, thought: str | None = None) -> dict:
    return {"instruction": f"question {number}", "output": f"<think>\n{thought or 'a long thought ' * 5}\n</think>\n\nanswer {number}"}


def write(project, rows: list[dict]) -> None:
    store.write_rows(project / "traces.json", rows)


def read(name: str) -> list[dict]:
    return list(store.read_rows(name))


# Scores of traces


def test_scores_are_written_beside_each_trace_and_the_selection_takes_them(project, server, micro):
    levels = {"reasoning_verbosity": "<score>3</score>", "cognitive_difficulty": "I say 4", "logical_correctness": "<score>1</score>"}
    server.answer = lambda text: levels[text.split(":")[0]]
    write(project, [{**trace(number), "teacher": "t", "RV": 9, "Cognitive_Difficulty": 9} for number in range(10)])
    made = trace_tools.score_traces("traces.json", "scored.json", behind(server))
    scores = {"reasoning_verbosity": 3, "cognitive_difficulty": 4, "logical_correctness": 1}
    assert read("scored.json") == made.rows == [{**trace(number), "teacher": "t", **scores} for number in range(10)]
    assert not made.dropped and store.read_manifest("scored.json")["teacher"] == "teacher"
    student = {"student_model": str(micro / "student_system2"), "max_length": 512}
    prepared = prepare_system2_dataset("train", source="scored.json", rv_min=3, rv_max=3, cd_min=4, cd_max=4, validation=0, **student)
    assert {(row["RV"], row["CD"]) for row in store.read_rows(prepared.path)} == {(3, 4)} and prepared.kept == 10


def test_scores_that_are_none_are_dropped_and_counted_and_wrong_traces_are_kept_as_wrong(project, server):
    said = {
        "reasoning_verbosity: question 0": "no idea",
        "cognitive_difficulty: question 1": "<score>10</score>",
        "logical_correctness: question 2": "I would rather not say",
        "logical_correctness: question 3": "<score>0</score>",
    }
    server.answer = lambda text: said.get(text.split(" =>")[0], "<score>1</score>")
    write(project, [trace(number) for number in range(5)])
    made = trace_tools.score_traces("traces.json", "scored.json", behind(server))
    assert made.dropped == {trace_tools.NO_SCORE: 3}
    assert [(row["instruction"], row["logical_correctness"]) for row in made.rows] == [("question 3", 0), ("question 4", 1)]


def test_a_row_with_one_score_missing_is_asked_again(project, server):
    refused = []

    def refuse(text):
        if text.startswith("cognitive_difficulty: question 1") and not refused:
            refused.append(text)
            return 400, {"error": "hiccup"}
        return None

    server.refuse = refuse
    write(project, [trace(number) for number in range(3)])
    assert len(trace_tools.score_traces("traces.json", "scored.json", behind(server)).rows) == 3
    assert len(refused) == 1 and len(server.received) == 3 * 3 + 3


def test_rows_that_are_no_traces_are_dropped_and_counted(project, server):
    rows = [
        trace(0),
        trace(0),
        {"instruction": "q", "output": "no thought"},
        {"instruction": " ", **{"output": trace(0)["output"]}},
        {"a": 1},
    ]
    write(project, rows)
    made = trace_tools.score_traces("traces.json", "scored.json", behind(server))
    assert made.dropped == {trace_tools.SAME: 1, trace_tools.OTHER_FORM: 1, "no question": 2} and len(made.rows) == 1


def test_a_second_scoring_asks_nobody_and_goes_on_where_the_first_ended(project, server):
    server.dies_after = 3 * 4
    write(project, [trace(number) for number in range(10)])
    with pytest.raises(BackendError, match="the server is down"):
        trace_tools.score_traces("traces.json", "scored.json", behind(server, chunk_rows=2))
    assert not (project / "scored.json").exists()
    server.dies_after, server.dead = None, False
    made = [trace_tools.score_traces("traces.json", "scored.json", behind(server, chunk_rows=2)) for _ in range(2)]
    assert [len(one.rows) for one in made] == [10, 10] and made[0].reused == 4 and made[1].reused == 10


def test_hostile_traces_reach_the_judge_unchanged(project, server):
    output = f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}"
    write(project, [{"question": HOSTILE, "full_response": output}])
    trace_tools.score_traces("traces.json", "scored.json", behind(server))
    assert sorted(server.texts) == sorted(f"{metric}: {HOSTILE} => {output}" for metric in trace_tools.METRICS)


def test_a_judge_without_easydistills_prompts_is_an_error_that_says_where_they_are(project, server, tmp_path, monkeypatch):
    wheel = standin_easydistill2.build(tmp_path / "wheel", prompts=False)
    monkeypatch.setenv("EASYDISTILL_HOME", str(wheel))
    write(project, [trace(0)])
    with pytest.raises(
        BackendError, match=r"without its judge's prompts .*default_cot_eval_prompts.yaml.* Let EASYDISTILL_HOME name a checkout"
    ):
        trace_tools.score_traces("traces.json", "scored.json", behind(server))


@pytest.mark.parametrize(("out", "said"), [("traces.json", "is the source, which is never changed"), ("x.json", "is no Endpoint")])
def test_a_scoring_that_cannot_work_is_refused(out, said, project, server):
    write(project, [trace(0)])
    with pytest.raises(ConfigError, match=said):
        trace_tools.score_traces("traces.json", out, behind(server) if out == "traces.json" else "teacher")


def test_where_no_trace_is_left_nothing_is_written(project, server):
    server.answer = lambda text: "no idea"
    write(project, [trace(0)])
    with pytest.raises(DataError, match=r"No trace of traces.json could be scored: .*a score that is not 0 to 9"):
        trace_tools.score_traces("traces.json", "scored.json", behind(server))
    assert not (project / "scored.json").exists()


# Shorter traces


def test_a_shorter_thought_stands_before_the_same_solution(project, server):
    server.answer = lambda text: "<think>hm <short>no</short></think>Here: <short>\nshort $HOME {x}\n</short>"
    solution = f"answer\n\n{HOSTILE}"
    row = {"id": "7", "instruction": HOSTILE, "output": f"<think>\n{'long ' * 30}\n</think>\n\n{solution}", "teacher": "t"}
    write(project, [{**row, "RV": 8, "CD": 3, "logical_correctness": 1}])
    made = trace_tools.shorten_traces("traces.json", "short.json", behind(server))
    expected = {**row, "output": f"<think>\nshort $HOME {{x}}\n</think>\n\n{solution}", "shortened_by": "teacher"}
    assert read("short.json") == made.rows == [expected]
    (asked,) = server.texts
    assert HOSTILE in asked and ("long " * 30).strip() in asked and solution in asked and "{instruction}" not in asked


def test_rewritings_that_are_of_no_use_are_dropped_and_counted(project, server):
    said = {
        "question 0": "<short>a long thought that is by no means shorter than what stood there before it at all ok yes</short>",
        "question 1": "shorter, without tags",
        "question 2": "<short>one</short> or <short>two</short>",
        "question 3": "<short> </short>",
        "question 4": "<short>a</think>b</short>",
        "question 5": "one " * 60,
        "question 6": "<short>fine</short>",
    }
    server.answer = lambda text: next(answer for question, answer in said.items() if question in text)
    write(project, [trace(number) for number in range(7)])
    made = trace_tools.shorten_traces("traces.json", "short.json", behind(server), max_new_tokens=50)
    assert [row["instruction"] for row in made.rows] == ["question 6"]
    assert made.dropped == {trace_tools.NOT_SHORTER: 1, trace_tools.NO_REWRITE: 4, trace_tools.CUT_OFF: 1}


def test_each_shorter_thought_belongs_to_its_own_question(project, server):
    server.answer = lambda text: f"<short>{next(word for word in text.split() if word.isdigit())}</short>"
    write(project, [trace(number) for number in range(40)])
    made = trace_tools.shorten_traces("traces.json", "short.json", behind(server, chunk_rows=7))
    assert made.rows == [{**trace(number, str(number)), "shortened_by": "teacher"} for number in range(40)]


def test_a_prompt_without_a_place_for_the_reasoning_is_refused(project, server):
    (project / "p.txt").write_text("{instruction} {solution}")
    with pytest.raises(ConfigError, match="has no {reasoning}"):
        trace_tools.shorten_traces("traces.json", "short.json", behind(server), prompt_file="p.txt")


# Judging


def answers(model: str, outputs: list[str], mode: str = "system1") -> list[dict]:
    return [{"model": model, "mode": mode, "instruction": f"question {number}", "output": text} for number, text in enumerate(outputs)]


@pytest.mark.parametrize(
    ("metric", "value", "score"),
    [
        ("helpfulness", 0, 0),
        ("helpfulness", 9, 9),
        ("helpfulness", 10, None),
        ("helpfulness", -1, None),
        ("helpfulness", None, None),
        ("helpfulness", 4.5, None),
        ("helpfulness", "4", None),
        ("correctness", True, 1),
        ("correctness", False, 0),
        ("correctness", 7, None),
        ("logical_correctness", None, None),
    ],
)
def test_only_scores_in_their_range_are_scores(metric, value, score):
    assert score_of(metric, value) == score


def test_the_interval_is_wilsons_on_the_scale_of_the_score():
    assert judge.mean_score([1, 0, 1, 1], 1) == wilson(3, 4)
    found = judge.mean_score([9, 0, 3], 9)
    assert found["value"] == 4 and found["n"] == 3 and 0 < found["ci"][0] < 4 < found["ci"][1] < 9
    assert judge.mean_score([9] * 5, 9)["ci"][1] == 9 > judge.mean_score([9] * 5, 9)["ci"][0]
    assert judge.mean_score([], 9) == {"value": None, "n": 0, "ci": None}


def test_teacher_and_students_are_judged_metric_by_metric(project, server, capsys):
    scores = {"good": "<score>8</score>", "bad": "<score>2</score>"}

    def answer(text):
        if text.startswith("correctness"):
            return "<score>1</score>" if "good" in text else "<score>0</score>"
        return scores["good" if "good" in text else "bad"]

    server.answer = answer
    rows = answers("big", ["good"] * 4) + answers("small", ["good", "bad", "bad", " "])
    report = judge.judge(rows, behind(server))
    big, small = report["scores"]["big"]["system1"], report["scores"]["small"]["system1"]
    assert set(big) == set(judge.METRICS["system1"]) and big["helpfulness"]["value"] == 8 and big["correctness"]["value"] == 1
    assert small["helpfulness"]["value"] == pytest.approx(4) and small["correctness"]["value"] == pytest.approx(1 / 3)
    assert small["helpfulness"]["n"] == 3 and report["empty"] == {"small": 1}
    assert json.loads((project / "reports" / "judge.json").read_text()) == json.loads(json.dumps(report))
    out = capsys.readouterr().out
    assert "helpfulness" in out and "1 answers of small have no text" in out and "4.00" in out


def test_malformed_and_missing_scores_are_counted_and_not_averaged(project, server):
    said = {
        "helpfulness: question 0": "no idea",
        "helpfulness: question 1": "<score>42</score>",
        "helpfulness: question 2": "<score>6</score>",
    }
    server.answer = lambda text: said.get(text.split(" =>")[0], "<score>1</score>")
    server.refuse = lambda text: (400, {"error": "maximum context length"}) if "question 3" in text else None
    wanted = {"system1": ["helpfulness"]}
    report = judge.judge(answers("m", ["a", "b", "c", "d"]), behind(server), metrics=wanted)
    found = report["scores"]["m"]["system1"]["helpfulness"]
    assert (found["value"], found["n"], found["malformed"], found["unanswered"]) == (6, 1, 2, 1)


def test_reasoning_is_judged_as_reasoning_and_equal_answers_once(project, server):
    rows = answers("a", ["x", "y"], "system2") + answers("b", ["x", "z"], "system2") + answers("c", ["x"])
    report = judge.judge(rows, behind(server))
    assert set(report["scores"]["a"]["system2"]) == set(trace_tools.METRICS) and set(report["scores"]["c"]) == {"system1"}
    assert len(server.received) == 3 * 3 + 4
    judge.judge(rows, behind(server))
    assert len(server.received) == 3 * 3 + 4


def comparison() -> Comparison:
    columns = [{"role": "teacher", "name": "Teacher", "path": "Qwen/big"}, {"role": "system1", "name": "System 1", "path": "out/small"}]
    said = [
        {"prompt": 0, "mode": mode, "role": role, "text": f"{role} {mode} {HOSTILE}"}
        for role, mode in [("teacher", "system1"), ("teacher", "system2"), ("system1", "system1")]
    ]
    return Comparison([{"prompt": HOSTILE, "modes": ["system1", "system2"]}], columns, said, {}, "now")


def test_a_comparison_can_be_judged_as_it_is_and_as_it_was_saved(project, server):
    store.write_json("comparison.json", comparison().to_dict())
    report = judge.judge("comparison.json", behind(server))
    assert set(report["scores"]) == {"Qwen/big", "out/small"} and set(report["scores"]["Qwen/big"]) == {"system1", "system2"}
    assert f"helpfulness: {HOSTILE} => system1 system1 {HOSTILE}" in server.texts
    assert judge.judge(comparison(), behind(server)) == report


def test_answers_can_be_read_from_a_file_of_rows(project, server):
    rows = answers("m", ["a", "b"])
    store.write_rows("list.json", rows)
    store.write_jsonl("lines.jsonl", rows)
    store.write_jsonl("one.jsonl", rows[:1])
    counts = [
        judge.judge(name, behind(server))["scores"]["m"]["system1"]["helpfulness"]["n"]
        for name in ("list.json", "lines.jsonl", "one.jsonl")
    ]
    assert counts == [2, 2, 1]


@pytest.mark.parametrize(
    ("given", "settings", "error", "said"),
    [
        ([{"model": "m"}], {}, DataError, "answer 0 is no row"),
        ([{"model": "m", "instruction": "q", "output": "a", "mode": "system3"}], {}, DataError, "answer 0 is no row"),
        (answers("m", [" "]), {}, DataError, "There is nothing to judge"),
        ("none.json", {}, DataError, "does not exist"),
        (answers("m", ["a"]), {"metrics": {"system1": ["beauty"]}}, ConfigError, "'beauty' is not one of informativeness"),
        (answers("m", ["a"]), {"metrics": {"system9": []}}, ConfigError, "'system9' is not one of system1, system2"),
    ],
)
def test_what_cannot_be_judged_is_named(given, settings, error, said, project, server):
    with pytest.raises(error, match=said):
        judge.judge(given, behind(server), **settings)
    assert not server.received


@pytest.mark.parametrize("text", ["5", "null", '{"prompts": ["a"]}', '{"prompts": 1, "columns": [], "answers": [{"role": "x"}]}', '"text"'])
def test_a_file_that_holds_no_answers_is_refused(project, server, text):
    (project / "answers.json").write_text(text)
    with pytest.raises(DataError):
        judge.judge("answers.json", behind(server))
    with pytest.raises(DataError):
        judge.judge({"foo": 1}, behind(server))
