"""The commands for a teacher behind an API: from arguments to files, by a stand-in EasyDistill 2.x over real sockets."""

import json

import pytest
import standin_easydistill2
from openai_server import OpenAIServer

from distill import asking, store
from distill.cli import main

TRACE = "<think>\nit is so\n</think>\n\nyes"


@pytest.fixture(autouse=True)
def quick(monkeypatch, project, tmp_path):
    monkeypatch.setattr(asking, "PAUSES_SECONDS", (0,))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill2.build(tmp_path)))
    rows = [{"instruction": f"question {number}"} for number in range(5)]
    store.write_rows(project / "rows.json", rows)
    store.write_rows(project / "traces.json", [{**row, "output": "<think>\nso " + "and so " * 9 + "\n</think>\n\nyes"} for row in rows])


@pytest.fixture
def server():
    with OpenAIServer(answer=lambda text: TRACE) as one:
        yield one


def run(server: OpenAIServer, *arguments: str) -> int:
    return main([*arguments, "--endpoint", server.base_url, "--workers", "2", "--chunk-rows", "2"])


def test_label_asks_the_endpoint_and_says_so_as_json(project, server, capsys):
    assert run(server, "label", "rows.json", "--teacher", "teacher", "--mode", "system2", "--out", "labeled.json", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["dropped"], said["reused"]) == (5, {}, 0)
    assert [(row["output"], row["teacher"]) for row in store.read_rows(project / "labeled.json")] == [(TRACE, "teacher")] * 5


def test_traces_reads_questions_of_a_source(project, server):
    store.write_rows(project / "questions.json", [{"problem": "why?"}, {"problem": "how?"}])
    asked = ("--source", "questions.json", "--slice", "train", "--columns", "instruction=problem")
    assert run(server, "traces", "--teacher", "teacher", *asked) == 0
    rows = list(store.read_rows(project / "data" / "teacher_traces.json"))
    assert [row["instruction"] for row in rows] == ["why?", "how?"] and {row["output"] for row in rows} == {TRACE}


def test_score_and_judge_ask_for_numbers(project, server):
    server.answer = lambda text: "<score>1</score>"
    assert run(server, "score", "traces.json", "--model", "teacher", "--out", "scored.json") == 0
    assert {row["reasoning_verbosity"] for row in store.read_rows(project / "scored.json")} == {1}
    store.write_rows(project / "answers.json", [{"model": "m", "mode": "system1", "instruction": "2+2?", "output": "4"}])
    assert run(server, "judge", "answers.json", "--model", "teacher") == 0
    assert store.read_json(project / "reports" / "judge.json")["scores"]["m"]["system1"]["helpfulness"]["value"] == 1


def test_shorten_takes_a_prompt_of_ones_own(project, server):
    (project / "short.txt").write_text("Shorter! {instruction} {reasoning} {solution}")
    server.answer = lambda text: f"<short>{'so' if text.startswith('Shorter!') else 'as long as it was before, and longer'}</short>"
    assert run(server, "shorten", "traces.json", "--model", "teacher", "--prompt-file", "short.txt", "--out", "short.json") == 0
    assert {row["output"] for row in store.read_rows(project / "short.json")} == {"<think>\nso\n</think>\n\nyes"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "4", "--endpoint", "http://127.0.0.1:9/v1"], "--bits is for a teacher that is loaded here"),
        (["--prompt-file", "p.txt", "--workers", "2"], "--prompt-file and --workers: for a teacher behind an API"),
        (["--endpoint", "nowhere"], "base_url: is no address"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--top-p", "0.5"], "hands no top_p on"),
    ],
)
def test_what_does_not_go_together_is_refused(project, capsys, arguments, said):
    assert main(["label", "rows.json", "--teacher", "teacher", "--out", "labeled.json", *arguments]) == 1
    assert said in capsys.readouterr().err and not (project / "labeled.json").exists()


def test_setup_of_another_easydistill_is_refused(capsys):
    assert main(["setup-easydistill", "3"]) == 1
    assert "There is no EasyDistill 3.x" in capsys.readouterr().err
