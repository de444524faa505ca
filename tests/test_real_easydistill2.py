"""The real EasyDistill 2.x, with a real `transformers serve` of the micro teacher or a small server that records what it receives.

Run by `EASYDISTILL_HOME=CHECKOUT make test-easydistill`; skipped elsewhere.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from openai_server import OpenAIServer, by_rule
from test_endpoint import HOSTILE, questions

from distill import asking, easydistill, judge, label, store, trace_tools
from distill.endpoint import PROMPTS, Endpoint
from distill.errors import BackendError

REAL, REASON = easydistill.find(2)  # where the repository is the root, before a test has another
HERE = bool(REAL and os.environ.get(easydistill.HOME) and (REAL.home / "configs").is_dir())
pytestmark = [
    pytest.mark.easydistill,
    pytest.mark.skipif(not HERE, reason=f"EASYDISTILL_HOME names no checkout of EasyDistill 2.x that is ready: {REASON}"),
]
SERVER, CLI = "transformers.cli.transformers", "easydistill.cli"
FIND = f"""
from distill import easydistill, label
from distill.endpoint import Endpoint
project, store.ROOT = store.ROOT, Path({str(Path(__file__).resolve().parent.parent)!r})
real, store.ROOT = easydistill.require(2), project
easydistill.require = lambda major: real
"""


@pytest.fixture(autouse=True)
def real(monkeypatch, project):
    monkeypatch.setattr(easydistill, "require", lambda major: REAL)
    monkeypatch.setattr(asking, "PAUSES_SECONDS", (0,))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def journal(project: Path) -> list[str]:
    return [entry["id"] for path in (project / "runs" / "labels").glob("*.jsonl") for entry in store.read_journal(path)]


def started(word: str, parent: int | None = None) -> list[psutil.Process]:
    """The lab's children whose command holds a word."""
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and word in child.cmdline()]


def wait_for(project: Path, count: int, lab=None) -> None:
    end = time.monotonic() + 300
    while len(journal(project)) < count and time.monotonic() < end and (lab is None or lab.poll() is None):
        time.sleep(0.05)


def at_work(word: str, parent: int | None = None) -> psutil.Process:
    """A child whose command holds a word; waits until there is one, since between two chunks no command line is at work."""
    end = time.monotonic() + 60
    while not (found := started(word, parent)):
        assert time.monotonic() < end, f"no {word}"
        time.sleep(0.02)
    return found[-1]


def micro_rows(heldout: list[dict], system: int, count: int) -> list[dict]:
    chosen = [row for row in heldout if row["system"] == system]
    return label.rows_of([{"instruction": row["instruction"]} for row in chosen[:: len(chosen) // count][:count]])


def outputs(labeled: label.Labeled) -> dict:
    return {row["id"]: row["output"] for row in labeled.rows}


# With a real server


def test_200_rows_are_labelled_though_server_and_command_line_are_killed_in_the_middle(project, micro, heldout, capsys):
    rows, killed = micro_rows(heldout, 1, 200), []

    def killer():
        for count, word in ((20, CLI), (60, SERVER), (120, CLI), (140, SERVER)):
            wait_for(project, count)
            at_work(word).kill()
            killed.append(word)

    thread = threading.Thread(target=killer)
    thread.start()
    where = Endpoint(str(micro / "teacher"), chunk_rows=20)
    labeled = label.label_rows(rows, label.teacher_of(where), max_new_tokens=16)
    thread.join()
    assert killed == [CLI, SERVER, CLI, SERVER] and "starting it anew" in capsys.readouterr().out
    assert sorted(journal(project)) == sorted({row["id"] for row in rows}) and len(labeled.rows) == 200 and not labeled.dropped
    assert not psutil.Process().children(recursive=True)
    local = label.label_rows(rows, label.teacher_of(str(micro / "teacher"), bits=32), max_new_tokens=16)
    assert outputs(labeled) == outputs(local)


def test_a_killed_lab_leaves_nothing_at_work_and_goes_on_with_traces(project, micro, heldout, start_python):
    rows = micro_rows(heldout, 2, 60)
    store.write_rows(project / "rows.json", rows)
    where = {"chunk_rows": 10, "prompt_file": str(PROMPTS / "plain.txt")}
    code = (
        "rows = label.rows_of(list(store.read_rows('rows.json')))\nwhere = Endpoint(sys.argv[1], chunk_rows=10, prompt_file=sys.argv[2])\n"
    )
    ask = "label.label_rows(rows, label.teacher_of(where), mode='system2', max_new_tokens=256)"
    lab = start_python(FIND + code + ask, micro / "teacher", where["prompt_file"])
    wait_for(project, 20, lab)
    assert lab.poll() is None, lab.communicate()
    assert at_work(SERVER, lab.pid) and at_work(CLI, lab.pid)
    children = psutil.Process(lab.pid).children(recursive=True)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    assert not psutil.wait_procs(children, timeout=15)[1]
    stood = journal(project)
    labeled = label.label_rows(rows, label.teacher_of(Endpoint(str(micro / "teacher"), **where)), mode="system2", max_new_tokens=256)
    assert 20 <= len(stood) < 60 and labeled.reused == len(stood) and journal(project)[: len(stood)] == stood
    assert sorted(journal(project)) == sorted(row["id"] for row in rows) and len(labeled.rows) == 60
    local = label.label_rows(rows, label.teacher_of(str(micro / "teacher"), bits=32), mode="system2", max_new_tokens=256)
    assert outputs(labeled) == outputs(local)


def test_a_wrong_model_name_at_a_real_server_is_named(project, micro, tmp_path):
    from distill.server import serving

    with serving(str(micro / "teacher"), tmp_path / "server.log") as one:
        with pytest.raises(BackendError, match="refuses the requests without a reason, as .* at a wrong model name \\(here 'another'\\)"):
            label.label_rows(questions(2), label.teacher_of(Endpoint("another", one.base_url, attempts=1)))


# With a server that records


def behind(one: OpenAIServer, **settings) -> Endpoint:
    return Endpoint(settings.pop("model", "teacher"), one.base_url, **settings)


@pytest.mark.parametrize("name", ["$HOME", "${NO_SUCH}", "$(touch pwned); touch pwned", "two\nlines 'and' \"quotes\""])
def test_hostile_text_and_names_reach_the_server_and_come_back_unchanged(name, project):
    with OpenAIServer(model=name) as one:
        labeled = label.label_rows(label.rows_of(HOSTILE), label.teacher_of(behind(one, model=name)))
    assert sorted(one.texts) == sorted(HOSTILE) and {body["model"] for body in one.received} == {name}
    assert [row["output"] for row in labeled.rows] == [by_rule(text) for text in HOSTILE]
    assert not list(project.parent.rglob("pwned"))


def test_hostile_prompts_reach_the_server_unchanged(project):
    prompt = 'Use $HOME, ${X}, {braces}, {}, {{two}} and \\frac{1}{2} on "it":\n{instruction}\n\nend'
    (project / "p.txt").write_text(prompt + "\n")
    with OpenAIServer(answer=lambda text: "<think>\na {b} $c\n</think>\n\nd") as one:
        labeled = label.label_rows(label.rows_of(HOSTILE), label.teacher_of(behind(one, prompt_file="p.txt")), mode="system2")
    assert sorted(one.texts) == sorted(prompt.replace("{instruction}", text) for text in HOSTILE)
    assert {row["output"] for row in labeled.rows} == {"<think>\na {b} $c\n</think>\n\nd"}


def test_empty_and_cut_off_answers_come_back_as_such(project):
    with OpenAIServer(answer=lambda text: "" if text == "question 0" else "one two three") as one:
        labeled = label.label_rows(questions(2), label.teacher_of(behind(one)), max_new_tokens=2)
    assert labeled.dropped == {label.EMPTY: 1, label.CUT_OFF: 1} and len(one.received) == 2


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"model": "another"}, "wrong model name: the server has no 'teacher'"),
        ({"key": "right"}, "the server refuses the key. Put the right key into OPENAI_API_KEY"),
        ({"dies_after": 0}, "the server is down or cannot be reached"),
        ({"usage": False}, "does not report how many tokens"),
        ({"refuse": lambda text: (422, {"error": "no"})}, "the server refuses the requests"),
    ],
)
def test_faults_at_exit_status_0_are_named(server, said, project):
    with OpenAIServer(**server) as one, pytest.raises(BackendError, match=said):
        label.label_rows(questions(2), label.teacher_of(behind(one, attempts=1)))
    assert not [path for path in (project / "runs" / "labels").iterdir() if path.is_dir()]


def test_a_server_that_is_down_at_the_start_is_named(project):
    with OpenAIServer() as one:
        pass
    with pytest.raises(BackendError, match="the server is down or cannot be reached"):
        label.label_rows(questions(2), label.teacher_of(behind(one, attempts=1)))


def test_a_key_reaches_the_server_and_no_file(project, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-verysecret$HOME")
    with OpenAIServer(key="sk-verysecret$HOME") as one:
        assert len(label.label_rows(questions(2), label.teacher_of(behind(one, key_variable="MY_KEY"))).rows) == 2
    assert not any("verysecret" in path.read_text() for path in project.rglob("*") if path.is_file())


def test_traces_are_scored_and_malformed_scores_dropped(project):
    def answer(text):
        if "question 1" in text and "Cognitive Difficulty" in text:
            return "<score>12</score>"
        return "nothing" if "question 2" in text else "<score>1</score>"

    rows = [
        {"instruction": f"question {number}: {HOSTILE[number]}", "output": f"<think>\na {{b}} $c\n</think>\n\n{number}"}
        for number in range(4)
    ]
    store.write_rows("traces.json", rows)
    with OpenAIServer(answer=answer) as one:
        made = trace_tools.score_traces("traces.json", "scored.json", behind(one))
    assert made.dropped == {trace_tools.NO_SCORE: 2}
    assert made.rows == [{**rows[number], **dict.fromkeys(trace_tools.METRICS, 1)} for number in (0, 3)]
    assert len(one.texts) == 12 and all(any(row["instruction"] in text and row["output"] in text for row in rows) for text in one.texts)


def test_traces_are_shortened(project):
    rows = [{"instruction": HOSTILE[0], "output": "<think>\nlong $HOME {long}\n</think>\n\n$x = {1}$"}]
    store.write_rows("traces.json", rows)
    with OpenAIServer(answer=lambda text: "<short>$H {l}</short>") as one:
        made = trace_tools.shorten_traces("traces.json", "short.json", behind(one))
    assert [row["output"] for row in made.rows] == ["<think>\n$H {l}\n</think>\n\n$x = {1}$"]


@pytest.mark.parametrize("mode", ["system1", "system2"])
def test_answers_are_judged_on_every_metric(mode, project):
    rows = [{"model": "m", "mode": mode, "instruction": text, "output": f"{text}!"} for text in HOSTILE]
    with OpenAIServer(answer=lambda text: "<score>1</score>") as one:
        report = judge.judge(rows, behind(one))
    found = report["scores"]["m"][mode]
    assert list(found) == judge.METRICS[mode] and {(one["value"], one["n"]) for one in found.values()} == {(1, 4)}
    assert len(one.texts) == 4 * len(found) and all(any(row["output"] in text for row in rows) for text in one.texts)
