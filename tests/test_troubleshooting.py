"""docs/troubleshooting.md lists every error that the lab can raise, and none besides."""

import re
from functools import cache
from pathlib import Path

import pytest
from lab_messages import FILLED, messages, unread, words

from distill import config, generation, models, prompt, store
from distill.endpoint import Endpoint
from distill.errors import DistillError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST_WORDS = 1
# Said of what went well: by `easydistill.find` of one that it found, by the engine of a training that goes on.
NO_ERROR = {"EasyDistill … in …, by …", "continues at step … of …", "; … step… of the last session are done again"}
PASSED_ON = {"compare", "hub_rows"}  # their errors carry on what others said, with nothing before it


@cache
def lab_messages() -> dict[str, str]:
    return {text: place for text, place in messages(ROOT / "distill").items() if text not in NO_ERROR}


@cache
def entries() -> tuple[str, ...]:
    """The opening words of each row: every code span of a table's first cell."""
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return tuple(span.strip().replace("\\|", "|") for row in rows for _, span in re.findall(r"(`+)(.+?)\1", row))


def opens(entry: str, message: str) -> bool:
    """Whether a message begins with an entry's words, `…` standing for a word or two that are filled in."""
    pattern = re.escape(entry).replace(re.escape(FILLED), rf"(?:{FILLED}|\S+(?: \S+)?)")
    return any(re.match(pattern, start) for start in (message, message.lstrip(FILLED)))


def test_the_words_of_every_error_can_be_read():
    found = [place for place in unread(ROOT / "distill") if place.split(":")[0] not in PASSED_ON]
    assert not found, "give these errors their words where they are raised, or in a helper that returns them"


def test_every_message_of_the_lab_has_an_entry():
    missing = [f"{place}: {text[:110]}" for text, place in lab_messages().items() if not any(opens(entry, text) for entry in entries())]
    assert not missing, "add a row to docs/troubleshooting.md for each of:\n" + "\n".join(missing)


def test_every_entry_is_a_message_of_the_lab():
    stale = [entry for entry in entries() if not any(opens(entry, text) for text in lab_messages())]
    assert not stale, "no code raises, so drop from docs/troubleshooting.md:\n" + "\n".join(stale)


def test_an_entry_says_something_and_stands_once():
    assert not [entry for entry in entries() if len(words(entry)) < LEAST_WORDS]
    assert sorted(set(entries())) == sorted(entries())


def test_every_row_has_a_cause_and_a_remedy():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| message"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 3 and all(cells), line


def found(message: str) -> list[str]:
    """The entries that a user finds by a message's own words, from its beginning or from the reason in its middle."""
    starts = [0, *(place.end() for place in re.finditer(r"[:.,] ", message))]
    return [entry for entry in entries() if any(opens(entry, message[start:]) for start in starts)]


def raised(action) -> str:
    with pytest.raises(DistillError) as error:
        action()
    return str(error.value)


@pytest.mark.parametrize(
    "action",
    [
        lambda: models.check_student("/no/such/folder"),
        lambda: store.read_json("/no/such/file.json"),
        lambda: store.read_json(__file__),
        lambda: store.resolve("a\0b"),
        lambda: config.resolve({"preset": "systm1"}, "system1"),
        lambda: config.resolve([1], "system1"),
        lambda: generation.token_limit(0, "system1"),
        lambda: prompt.format_prompt("?", mode="system3"),
    ],
)
def test_a_message_as_a_user_meets_it_finds_its_entry(action):
    assert found(raised(action))


def test_each_problem_of_several_finds_its_entry():
    problems = raised(lambda: config.resolve({"learning_rat": 1, "max_length": 0, "bf16": True, "fp16": True, "packing": 1}, "system1"))
    problems += "\n" + raised(lambda: Endpoint("m", "ftp://x", workers=0, key_variable="a b"))
    lines = [line.strip() for line in problems.splitlines() if line.startswith("  ")]
    assert len(lines) >= 6
    assert not [line for line in lines if not found(line)]


# The reader of messages itself

MODULE = """
from .errors import ConfigError
CAUSES = {"a": "the first cause of it", "b": "the second cause of it"}

def check(value):
    if value:
        raise ConfigError(f"Plain words with {value} in them")
    problems = [f"{key}: listed in advance" for key in value]
    problems.append("appended" + " in two parts")
    problems += more_problems(value)
    if problems:
        raise ConfigError.from_problems("here", problems)

def more_problems(value):
    if value:
        return ["returned by a helper"]
    return [next((f"{one} comes next" for one in value), None)]

def failure(what):
    return ConfigError(f"It failed: {what}. The end")

def fail(kind):
    why = CAUSES[kind]
    raise failure(why if kind else "a reason that is given")
"""


def test_the_reader_follows_a_message_to_its_words(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    assert set(messages(tmp_path)) == {
        "Plain words with … in them",
        "…: listed in advance",
        "appended in two parts",
        "returned by a helper",
        "… comes next",
        "It failed: …. The end",
        "the first cause of it",
        "the second cause of it",
        "a reason that is given",
    }


def test_the_reader_names_an_error_whose_words_it_cannot_tell(tmp_path):
    (tmp_path / "module.py").write_text("from .errors import DataError\n\ndef check(row):\n    raise DataError(row['text'])\n")
    assert unread(tmp_path) == ["module:4"]


@pytest.mark.parametrize(
    "entry, message, found",
    [
        ("Cannot write", "Cannot write …: …. Choose", True),
        ("… is empty", "… is empty: prepare the data first.", True),
        ("… is empty", "data/x.json is empty: prepare the data first.", True),
        ("save_steps = …: has", "…save_steps = …: has no effect", True),
        ("No data for System … distillation: … has", "No data for System 1 distillation: … has no column", True),
        ("Cannot read", "Cannot write …", False),
        ("write", "Cannot write …", False),
    ],
)
def test_an_entry_is_the_opening_words(entry, message, found):
    assert opens(entry, message) is found
