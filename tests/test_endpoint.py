"""A teacher behind an API, asked by a stand-in EasyDistill 2.x over real sockets: every row once, text unchanged, each fault named."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import standin_easydistill2
from openai_server import OpenAIServer, by_rule

from distill import asking, endpoint, label, server, store
from distill.data import prepare_system1_dataset
from distill.endpoint import Endpoint, as_template, filled, whole_trace
from distill.errors import BackendError, ConfigError, DataError
from distill.prompt import format_prompt

TESTS = Path(__file__).resolve().parent
HOSTILE = [
    "What does $HOME mean, and ${HOME}, ${NO_SUCH}, $(touch pwned) and `touch pwned`?",
    "Solve {x}: $\\frac{a}{b}$, {instruction}, {0}, {{double}}, %s, \\n and \\u0041",
    "One line\nand another\r\n\tand \"quotes\" and 'single' ones; touch pwned",
    "Ünïcödé 🙂 \u2028 a line separator, <|im_end|> and --- !!python/object: {a: [1, 2]}",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch, project, tmp_path):
    """No pauses, no key of the user's, and a stand-in EasyDistill 2.x."""
    monkeypatch.setattr(asking, "PAUSES_SECONDS", (0,))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill2.build(tmp_path)))


@pytest.fixture
def behaves(tmp_path):
    return lambda behaviour: standin_easydistill2.build(tmp_path, behaviour)


@pytest.fixture
def teacher():
    with OpenAIServer() as one:
        yield one


def behind(one: OpenAIServer, **settings) -> Endpoint:
    return Endpoint("teacher", one.base_url, **settings)


def questions(count: int) -> list[dict]:
    return label.rows_of([f"question {number}" for number in range(count)])


def label_by(where: Endpoint, rows: list[dict], **settings) -> label.Labeled:
    return label.label_rows(rows, label.teacher_of(where), **settings)


def journal_ids(project: Path) -> list[str]:
    (journal,) = (project / "runs" / "labels").glob("*.jsonl")
    return [entry["id"] for entry in store.read_journal(journal)]


def nothing_left(project: Path) -> bool:
    """No working folder, and no process."""
    folders = [path for path in (project / "runs").rglob("*") if path.is_dir() and path.name != "labels"]
    return not folders and not psutil.Process().children(recursive=True)


# Naming an endpoint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": " "}, "model = ' ': is no name"),
        ({"model": "a\0b"}, "is no name"),
        ({"chunk_rows": 0}, "chunk_rows = 0: give a whole number above 0"),
        ({"workers": True}, "workers = True"),
        ({"attempts": 1.5}, "attempts = 1.5"),
        ({"timeout_seconds": 0}, "timeout_seconds = 0: give a number above 0"),
        ({"base_url": "localhost:8000"}, "base_url: is no address. Write e.g. http://127.0.0.1:8000/v1"),
        ({"base_url": "file:///etc/passwd"}, "base_url: is no address"),
        ({"base_url": "http://h:99999999/v1"}, "base_url: is no address"),
        ({"key_variable": "sk-verysecret"}, "key_variable: is no name of an environment variable"),
        ({"base_url": "https://me:verysecret@host/v1"}, "base_url: holds a user name, password or query"),
        ({"base_url": "https://host/v1?api_key=verysecret"}, "base_url: holds a user name, password or query"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_and_no_secret_is_repeated(settings, said):
    with pytest.raises(ConfigError, match="problem in the endpoint") as caught:
        Endpoint(**{"model": "m", "base_url": "http://127.0.0.1:1/v1", **settings})
    assert said in str(caught.value) and "verysecret" not in str(caught.value)


def test_the_key_is_in_no_text_of_an_endpoint(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-verysecret")
    where = Endpoint("m", "https://host/v1", key_variable="MY_KEY")
    assert where.key == "sk-verysecret" and "verysecret" not in repr(where) + str(where.identity())


def test_address_model_and_prompt_say_who_a_teacher_is_and_batches_do_not(project):
    (project / "other.txt").write_text("Reason. {instruction}")
    base = Endpoint("m", "http://h/v1")
    same = [Endpoint("m", "http://h/v1/"), Endpoint("m", "http://h/v1", chunk_rows=7, workers=1, attempts=9, timeout_seconds=5)]
    others = [Endpoint("n", "http://h/v1"), Endpoint("m", "http://i/v1"), Endpoint("m", "http://h/v1", prompt_file="other.txt")]
    assert all(one.identity() == base.identity() for one in same)
    assert len({json.dumps(one.identity()) for one in [base, *others]}) == 4


def test_a_served_teacher_is_known_by_its_files(micro):
    where = Endpoint(str(micro / "teacher"))
    assert where.identity()[0] == "served" and len(where.identity()[1]) == 64 and where.key is None


def test_a_served_teacher_that_is_not_there_is_refused_before_anything_starts(project):
    with pytest.raises(ConfigError, match="Invalid teacher model"):
        label.teacher_of(Endpoint("./no/such/folder"))


# Prompts


def test_a_prompts_own_braces_and_dollars_are_taken_literally():
    prompt = "{a} {} {0} $HOME {{x}} {instruction} \\frac{1}{2} {instruction"
    assert as_template(prompt).format(instruction="Q {b}") == prompt.replace("{instruction}", "Q {b}")
    assert filled("{a}{b} {c}", a="{b}", b="$x") == "{b}$x {c}"


def test_shipped_prompts_ask_as_the_lab_does():
    question = "What is 2 + 2?"
    plain = endpoint.read_prompt(endpoint.PROMPTS / "plain.txt", "{instruction}")
    assert filled(plain, instruction=question) == format_prompt(question, mode="system2")
    asked = filled(Endpoint("m", "http://h/v1").prompt, instruction=question)
    assert asked.startswith(format_prompt(question, mode="system2")) and "<think>" in asked and "</think>" in asked


@pytest.mark.parametrize(("text", "said"), [("No place.", "has no {instruction}"), (None, "cannot be read")])
def test_a_prompt_file_without_a_place_for_the_question_is_refused(text, said, project):
    if text:
        (project / "p.txt").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Endpoint("m", "http://h/v1", prompt_file="p.txt").prompt  # noqa: B018


def test_a_thought_that_the_generation_prompt_had_opened_gets_its_tag_back():
    assert whole_trace("2+2=4\n</think>\n\n4") == "<think>\n2+2=4\n</think>\n\n4"
    assert whole_trace(" <think>a</think>b\n") == "<think>a</think>b" and whole_trace("4") == "4"


# Labels


def test_every_row_gets_its_own_answer_in_its_place(project, teacher):
    rows = questions(70)
    labeled = label_by(behind(teacher), rows)
    assert [row["output"] for row in labeled.rows] == [f"answer to question {number}" for number in range(70)]
    assert {row["teacher"] for row in labeled.rows} == {"teacher"} and not labeled.dropped and nothing_left(project)
    assert sorted(journal_ids(project)) == sorted(row["id"] for row in rows)
    assert (project.parent / "checkout2" / "started").read_text() == "3"  # chunks


def test_a_second_call_asks_nobody(project, teacher):
    first, second = (label_by(behind(teacher), questions(5)) for _ in range(2))
    assert (first.rows, 5) == (second.rows, second.reused) and len(teacher.received) == 5


def test_hostile_text_reaches_the_server_and_comes_back_unchanged(project, teacher):
    labeled = label_by(behind(teacher), label.rows_of(HOSTILE))
    assert sorted(teacher.texts) == sorted(HOSTILE)
    assert [row["output"] for row in labeled.rows] == [by_rule(text) for text in HOSTILE]
    assert not list(project.parent.rglob("pwned"))


def test_hostile_prompts_reach_the_server_unchanged(project, teacher):
    prompt = 'Use $HOME, ${X}, $(touch pwned), {braces}, {}, {{two}} and \\frac{1}{2} on "it":\n{instruction}\n\n<think>?'
    (project / "p.txt").write_text(prompt + "\n")
    teacher.answer = lambda text: f"<think>\n{text.replace('<think>', '')}\n</think>\n\ndone"
    labeled = label_by(behind(teacher, prompt_file="p.txt"), label.rows_of(HOSTILE), mode="system2")
    assert sorted(teacher.texts) == sorted(prompt.replace("{instruction}", text) for text in HOSTILE)
    assert len(labeled.rows) == len(HOSTILE) and not list(project.parent.rglob("pwned"))


def test_input_is_folded_in_and_reasoning_is_asked_for_in_the_default_words(project, teacher):
    teacher.answer = lambda text: "<think>\nadd\n</think>\n\n3"
    rows = label.rows_of([{"instruction": "Add.", "input": "1 2"}])
    labeled = label_by(behind(teacher), rows, mode="system2")
    assert teacher.texts == [filled(endpoint.DEFAULT_PROMPT.read_text().rstrip("\n"), instruction="Add.\n\n1 2")]
    assert labeled.rows[0]["output"] == "<think>\nadd\n</think>\n\n3"


@pytest.mark.parametrize("name", ["$HOME", "${HOME}", "$NO_SUCH", "$(touch pwned)", "a b; touch pwned", "quote\"s'", "two\nlines", "{x}"])
def test_a_models_name_reaches_the_server_unchanged(name, project):
    with OpenAIServer(model=name) as one:
        labeled = label_by(Endpoint(name, one.base_url), questions(2))
    assert {body["model"] for body in one.received} == {name} == {row["teacher"] for row in labeled.rows}
    assert not list(project.parent.rglob("pwned"))


def test_limits_and_temperature_reach_the_server(project, teacher):
    label_by(behind(teacher), questions(1), max_new_tokens=77, temperature=0.5)
    assert {key: teacher.received[0][key] for key in ("max_tokens", "temperature")} == {"max_tokens": 77, "temperature": 0.5}


@pytest.mark.parametrize(
    ("setting", "said"), [({"top_p": 0.9}, "top_p = 0.9: EasyDistill 2.x hands no"), ({"batch_size": 4}, "batch_size")]
)
def test_settings_that_an_endpoint_cannot_follow_are_refused(setting, said, project, teacher):
    with pytest.raises(ConfigError, match=said):
        label_by(behind(teacher), questions(1), **setting)
    assert not teacher.received


def test_a_public_call_and_a_preparation_take_an_endpoint(project, teacher):
    assert label.label_with_teacher(behind(teacher), None, ["question 1"])[0]["output"] == "answer to question 1"
    store.write_rows(project / "rows.json", [{"instruction": f"question {number}", "output": "theirs"} for number in range(20)])
    places = {"out_instructions": "i.json", "out_labeled": "l.json"}
    relabel = {"relabel_with_teacher": True, "teacher_model": behind(teacher)}
    prepared = prepare_system1_dataset("train", source="rows.json", validation=0, **relabel, **places)
    assert {row["output"] for row in store.read_rows(prepared.path)} == {f"answer to question {number}" for number in range(20)}


def test_a_file_is_labelled_and_its_manifest_names_the_endpoint(project, teacher, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-verysecret")
    store.write_rows(project / "rows.json", [{"instruction": "question 1"}])
    label.label_file("rows.json", behind(teacher), "out.json")
    manifest = store.read_manifest("out.json")
    assert (manifest["teacher"], manifest["base_url"]) == ("teacher", teacher.base_url) and "bits" not in manifest
    texts = [path.read_text() for path in project.rglob("*") if path.is_file()]
    assert teacher.keys == {"sk-verysecret"} and not any("verysecret" in text for text in texts)


# Answers that are of no use


def test_cut_off_and_empty_answers_are_dropped_counted_and_not_asked_again(project, teacher):
    teacher.answer = lambda text: {"question 0": "", "question 1": "one two three four five"}.get(text, "fine")
    dropped = {label.EMPTY: 1, label.CUT_OFF: 1}
    for _ in range(2):
        labeled = label_by(behind(teacher), questions(3), max_new_tokens=5)
        assert labeled.dropped == dropped and len(labeled.rows) == 1
    assert len(teacher.received) == 3


def test_reasoning_without_its_tags_is_dropped_and_counted(project, teacher):
    teacher.answer = lambda text: "<think>\na\n</think>\n\nb" if "question 1" in text else "I think it is b."
    labeled = label_by(behind(teacher), questions(3), mode="system2")
    assert [row["instruction"] for row in labeled.rows] == ["question 1"] and labeled.dropped == {label.NO_TRACE: 2}


def test_where_no_answer_of_the_first_chunk_is_of_use_the_rest_is_not_asked(project, teacher):
    teacher.answer = lambda text: "I think it is b." if "question 1" in text else "one " * 9
    with pytest.raises(BackendError, match=r"None of the first 4 answers of teacher can be used: 3 cut off .*, 1 without the form <think>"):
        label_by(behind(teacher, chunk_rows=4), questions(12), mode="system2", max_new_tokens=9)
    assert len(teacher.received) == 4 and not journal_ids_or_none(project) and nothing_left(project)


def test_one_row_that_the_server_fails_at_stops_nobody_though_it_is_a_chunk_of_its_own(project, teacher):
    teacher.refuse = lambda text: (500, {"error": {"message": "no"}}) if text == "question 0" else None
    where = behind(teacher, workers=1, attempts=1)
    labeled = label_by(where, questions(4))
    assert len(labeled.rows) == 3 and labeled.dropped == {asking.no_answer(where): 1}


def test_eight_rows_in_sequence_without_an_answer_end_it_and_what_was_answered_stays(project, teacher, monkeypatch):
    monkeypatch.setattr(asking, "CHUNK_SECONDS", 0)  # a row at a time
    teacher.refuse = lambda text: None if text in ("question 0", "question 2") else (500, {"error": {"message": "no"}})
    with pytest.raises(BackendError, match="the server fails at the requests"):
        label_by(behind(teacher, workers=1, attempts=1), questions(20))
    assert len(journal_ids(project)) == 2 and "question 10" in teacher.texts and "question 19" not in teacher.texts


def test_the_first_answers_may_be_of_no_use_as_long_as_one_of_chunk_rows_is(project, teacher):
    teacher.answer = lambda text: "<think>\na\n</think>\n\nb" if "question 2" in text else "I think it is b."
    labeled = label_by(behind(teacher, workers=1, chunk_rows=3), questions(4), mode="system2")
    assert labeled.dropped == {label.NO_TRACE: 3} and len(journal_ids(project)) == 4


def journal_ids_or_none(project: Path) -> list[str]:
    return [entry["id"] for journal in (project / "runs" / "labels").glob("*.jsonl") for entry in store.read_journal(journal)]


def test_a_server_that_reports_no_usage_is_an_error_that_says_so(project):
    with OpenAIServer(usage=False) as one, pytest.raises(BackendError, match="does not report how many tokens an answer has"):
        label_by(behind(one), questions(2))
    assert nothing_left(project)


# Faults at exit status 0


def test_half_of_the_rows_missing_are_asked_again_and_what_stays_missing_is_counted(project, teacher, behaves):
    behaves("half")
    where = behind(teacher, chunk_rows=16)
    labeled = label_by(where, questions(16))
    assert len(labeled.rows) == 14 and labeled.dropped == {asking.no_answer(where): 2}  # 16 → 8 → 4 → 2 stay missing
    behaves("works")
    again = label_by(where, questions(16))
    assert len(again.rows) == 16 and again.reused == 14 and len(set(journal_ids(project))) == len(journal_ids(project)) == 16


def test_rows_that_come_twice_and_a_line_cut_short_do_no_harm(project, teacher, behaves):
    for behaviour, temperature in (("twice", 0.1), ("broken line", 0.2)):
        behaves(behaviour)
        assert len(label_by(behind(teacher), questions(5), temperature=temperature).rows) == 5


def test_all_rows_missing_at_exit_0_is_an_error(project, teacher, behaves):
    behaves("none")
    with pytest.raises(BackendError, match="brought no answer: it ended with exit status 0 and no output") as caught:
        label_by(behind(teacher, attempts=2), questions(3))
    assert "Answers given before are kept" in str(caught.value) and "| 2026-01-01 - easydistill" in str(caught.value)
    assert nothing_left(project) and not journal_ids_or_none(project)


def test_a_command_line_killed_in_the_middle_is_started_again(project, teacher, behaves):
    behaves("killed once")
    assert len(label_by(behind(teacher, chunk_rows=5), questions(15)).rows) == 15
    assert sorted(journal_ids(project)) == sorted(row["id"] for row in questions(15))


def test_a_command_line_killed_every_time_is_named(project, teacher, behaves):
    behaves("killed")
    with pytest.raises(BackendError, match="it was ended by SIGKILL, as happens when memory runs out and no output"):
        label_by(behind(teacher), questions(3))
    assert nothing_left(project)


def test_a_command_line_that_hangs_is_ended(project, teacher, behaves, monkeypatch):
    behaves("hangs")
    monkeypatch.setattr(asking, "GRACE_SECONDS", 0.3)
    with pytest.raises(BackendError, match="it was silent for too long and was ended"):
        label_by(behind(teacher, attempts=1, timeout_seconds=0.1), questions(1))
    assert nothing_left(project)


def test_a_job_that_is_refused_shows_why(project, teacher, behaves):
    behaves("fails")
    with pytest.raises(BackendError, match=r"exit status 1 and no output(.|\n)*\| ValueError: Extra inputs are not permitted"):
        label_by(behind(teacher), questions(1))


def test_a_server_that_is_down_is_named(project):
    with OpenAIServer() as one:
        pass
    with pytest.raises(BackendError, match="the server is down or cannot be reached. Check that it runs"):
        label_by(behind(one), questions(3))
    assert nothing_left(project)


def test_a_server_that_dies_midway_keeps_what_was_answered_and_a_later_call_goes_on(project):
    with OpenAIServer(dies_after=11) as one:
        where = Endpoint("teacher", one.base_url, chunk_rows=4)
        with pytest.raises(BackendError, match="the server is down or cannot be reached"):
            label_by(where, questions(20))
        assert len(journal_ids(project)) in (8, 11)
        one.dies_after, one.dead = None, False
        labeled = label_by(where, questions(20))
    assert len(labeled.rows) == 20 and sorted(journal_ids(project)) == sorted(row["id"] for row in questions(20))


def test_a_wrong_model_name_is_named(project):
    with OpenAIServer(model="another") as one, pytest.raises(BackendError, match="wrong model name: the server has no 'teacher'"):
        label_by(behind(one), questions(2))


def test_a_wrong_key_is_named_and_never_shown(project, behaves, monkeypatch, capsys):
    behaves("says the key")
    monkeypatch.setenv("MY_KEY", "sk-verysecret")
    with (
        OpenAIServer(key="sk-right") as one,
        pytest.raises(BackendError, match="the server refuses the key. Put the right key into MY_KEY") as caught,
    ):
        label_by(behind(one, key_variable="MY_KEY"), questions(2))
    logs = [path.read_text() for path in (project / "runs").rglob("*.log")]
    assert one.keys == {"sk-verysecret"} and any("the key is ***" in log for log in logs)
    assert "verysecret" not in str(caught.value) + capsys.readouterr().out + "".join(logs)


def test_rows_that_the_server_refuses_for_their_length_stop_nobody(project, teacher):
    too_long = 400, {"error": {"message": "This model's maximum context length is 10 tokens."}}
    teacher.refuse = lambda text: too_long if text in ("question 2", "question 4", "question 5") else None
    where = behind(teacher, chunk_rows=2)
    labeled = label_by(where, questions(6))
    assert len(labeled.rows) == 3 and labeled.dropped == {asking.no_answer(where): 3}


def test_without_easydistill_2_nothing_is_started(project, teacher, monkeypatch):
    monkeypatch.setenv("EASYDISTILL_HOME", str(project / "nowhere"))
    with pytest.raises(BackendError, match="EasyDistill 2.x is needed and cannot be used"):
        label_by(behind(teacher), questions(1))
    assert not teacher.received and nothing_left(project)


def test_two_runs_never_write_one_journal(project, teacher):
    where = label.teacher_of(behind(teacher))
    teacher.answer = lambda text: label_twice(where)
    assert "Another run is writing" in label.label_rows(questions(1), where).rows[0]["output"]


def label_twice(where) -> str:
    from distill.errors import DistillError

    try:
        label.label_rows(questions(1), where)
    except DistillError as error:
        return str(error)
    return "both"


def test_where_no_row_gets_a_label_no_file_is_written(project, teacher):
    teacher.answer = lambda text: ""
    store.write_rows(project / "rows.json", [{"instruction": "question 1"}])
    with pytest.raises(DataError, match="No row of rows.json has a label"):
        label.label_file("rows.json", behind(teacher), "out.json")
    assert not (project / "out.json").exists()


# How much is asked at a time


def took(size: asking._ChunkSize, chunks: int, answer_seconds: float, side_by_side: int) -> list[tuple[int, float]]:
    """(rows, seconds) of chunks at a server that answers so many questions side by side, each in as many seconds."""
    passed = []
    for _ in range(chunks):
        seconds = -(-size.rows // side_by_side) * answer_seconds
        passed.append((size.rows, seconds))
        size.learn(size.rows, size.rows, seconds)
    return passed


def test_a_chunk_takes_three_minutes_at_most_at_the_pace_seen_and_begins_with_a_row_for_each_worker():
    assert took(asking._ChunkSize(8, 32), 3, 1, 8) == [(8, 1), (32, 4), (32, 4)]  # chunk_rows bounds it
    assert took(asking._ChunkSize(8, 1000), 3, 60, 8) == [(8, 60), (24, 180), (24, 180)]
    assert took(asking._ChunkSize(8, 32), 5, 60, 1) == [(8, 480), (4, 240), (2, 120), (3, 180), (3, 180)]  # one after another
    assert took(asking._ChunkSize(8, 4), 1, 1, 8) == [(4, 1)]


def test_a_chunk_is_not_made_smaller_where_fewer_rows_would_take_as_long():
    assert took(asking._ChunkSize(8, 32), 4, 205, 8) == [(8, 205), (4, 205), (8, 205), (8, 205)]


def test_a_chunk_without_answers_says_nothing_of_the_pace_and_a_slower_server_gets_fewer_rows():
    size = asking._ChunkSize(8, 32)
    size.learn(8, 0, 0.1)
    assert size.rows == 8
    size.learn(32, 32, 720)
    assert size.rows == 8
    size.learn(8, 2, 30)  # the others came to nothing
    assert size.rows == 8


def wait_for_answers(project: Path, lab, count: int) -> None:
    end = time.monotonic() + 60
    while len(journal_ids_or_none(project)) < count:
        assert time.monotonic() < end and lab.poll() is None
        time.sleep(0.02)


LAB = (
    "from distill import asking, label\nfrom distill.endpoint import Endpoint\n"
    "rows = label.rows_of([f'question {number}' for number in range(int(sys.argv[2]))])\n"
    "asking.CHUNK_SECONDS = float(sys.argv[3])\n"
    "label.label_rows(rows, label.teacher_of(Endpoint('teacher', sys.argv[1], workers=4, chunk_rows=1000)))"
)


def test_a_kill_loses_what_is_answered_in_a_chunks_seconds_however_many_rows_may_be_asked(project, teacher, start_python):
    by_its_rule = teacher.answer
    teacher.answer = lambda text: time.sleep(0.2) or by_its_rule(text)
    lab = start_python(LAB, teacher.base_url, 300, 1)
    wait_for_answers(project, lab, 40)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    # 4 at a time and 0.2 s each: 20 rows in a second, and those that the server had begun with
    assert len(teacher.received) - len(journal_ids(project)) <= 24


def test_a_kill_while_missing_rows_are_asked_again_loses_none_that_were_answered(project, teacher, behaves, start_python):
    behaves("half")
    by_its_rule = teacher.answer
    teacher.answer = lambda text: by_its_rule(text) if teacher.given <= 4 else time.sleep(60)
    lab = start_python(LAB, teacher.base_url, 4, 180)
    wait_for_answers(project, lab, 2)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    behaves("works")
    teacher.answer = by_its_rule
    labeled = label_by(behind(teacher), questions(4))
    assert labeled.reused == 2 and len(labeled.rows) == 4


# The lab's own server, and the lab itself, killed


def serve_small(monkeypatch, **environment: str) -> None:
    """The lab's own server is the small one of these tests."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(server, "choose", lambda: (server.LIGHT, "no GPU is visible", "cpu"))
    start = [sys.executable, str(TESTS / "openai_server.py"), "serve", server.SERVED, "--port"]
    monkeypatch.setattr(server, "command", lambda kind, device, port: [*start, str(port)])


def test_the_labs_own_server_that_dies_again_and_again_costs_no_row(project, micro, monkeypatch, capsys):
    serve_small(monkeypatch, DIES_AFTER="11")
    labeled = label_by(Endpoint(str(micro / "teacher"), chunk_rows=8), questions(30))
    assert [row["output"] for row in labeled.rows] == [f"answer to question {number}" for number in range(30)]
    assert sorted(journal_ids(project)) == sorted(row["id"] for row in questions(30)) and nothing_left(project)
    assert "starting it anew" in capsys.readouterr().out


def test_a_killed_lab_goes_on_and_every_id_is_there_once(project, teacher, start_python):
    """SIGKILL to the lab in the middle: EasyDistill ends too, finished chunks stay, the second run asks the rest."""
    slow = teacher.answer

    def answer(text):
        time.sleep(0.02)
        return slow(text)

    teacher.answer = answer
    code = (
        "from distill import label\nfrom distill.endpoint import Endpoint\n"
        "rows = label.rows_of([f'question {number}' for number in range(200)])\n"
        "label.label_rows(rows, label.teacher_of(Endpoint('teacher', sys.argv[1], chunk_rows=10, workers=2)))"
    )
    lab = start_python(code, teacher.base_url)
    end = time.monotonic() + 60
    while not len(journal_ids_or_none(project)) >= 30:
        assert time.monotonic() < end and lab.poll() is None
        time.sleep(0.02)
    children = psutil.Process(lab.pid).children(recursive=True)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    gone, alive = psutil.wait_procs(children, timeout=15)
    stood = journal_ids(project)
    asked = len(teacher.received)
    assert not alive and asked - len(stood) <= 20  # the chunk that was under way
    labeled = label_by(behind(teacher, chunk_rows=10), questions(200))
    ids = journal_ids(project)
    assert 30 <= len(stood) < 200 and labeled.reused == len(stood) and ids[: len(stood)] == stood
    assert len(ids) == len(set(ids)) == len(labeled.rows) == 200 and nothing_left(project)


def test_a_key_may_end_in_a_line_break_and_what_can_be_no_key_is_refused_without_being_repeated(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-verysecret\n")
    assert Endpoint("m", "https://host/v1", key_variable="MY_KEY").key == "sk-verysecret"
    monkeypatch.setenv("MY_KEY", "sk-very\nsecret")
    with pytest.raises(ConfigError, match="What MY_KEY holds is no key") as raised:
        _ = Endpoint("m", "https://host/v1", key_variable="MY_KEY").key
    assert "secret" not in str(raised.value)


def test_every_prompt_that_asks_for_reasoning_holds_the_labs_sentence():
    for name in ("plain.txt", "cot_generation.txt"):
        assert format_prompt("{instruction}", mode="system2") in (endpoint.PROMPTS / name).read_text()
