"""What is examined: which questions, which bits, and what becomes of an evaluation whose timing fails."""

import shutil
from functools import partial

import pytest

from distill import examine, models, store, timing
from distill.errors import ConfigError
from distill.examine import Examined

ROOM_FOR_ONE_GIB = 0.106  # the micro teacher needs 0.103 for one question at a time in 8 bits, 0.110 for eight
FAST = {"lengths": (2, 3), "warm_up": 0}
ROWS = {
    "system1": [{"instruction": text, "mode": "system1"} for text in ("Is 4322 even? " * 300, "What is 3 + 4?", "What is 30 + 4?")],
    "system2": [{"instruction": "What is 347", "input": "+ 285?", "mode": "system2"}, {"instruction": "1 + 1?", "mode": "system2"}],
}


@pytest.fixture
def panel(micro) -> list[Examined]:
    """A teacher and two students, one of each system."""
    students = [Examined(name, "after", name, str(micro / "student_system1"), (name,)) for name in ROWS]
    return [Examined("teacher", "teacher", "Teacher", str(micro / "teacher"), tuple(ROWS)), *students]


@pytest.fixture
def fast(monkeypatch) -> None:
    """Measures a few tokens, for real."""
    monkeypatch.setattr(examine, "measure", partial(timing.measure, **FAST))


@pytest.fixture
def requests(monkeypatch) -> list[dict]:
    """What would be measured."""
    asked = []
    monkeypatch.setattr(examine, "measure", lambda requests, *rest, **more: asked.extend(requests) or {})
    return asked


# Timing


def test_all_models_are_timed_on_the_same_shortest_questions_each_in_its_own_mode(panel, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "SPEED_BATCH", 4)
    assert examine.time_answers(panel, ROWS, 1, tmp_path) == ({}, None)
    assert [each["name"] for each in requests] == ["teacher 8-bit", "teacher 16-bit", "system1", "system2"]
    shortest = [
        {"instruction": "What is 3 + 4?", "input": "", "mode": "system1"},
        {"instruction": "1 + 1?", "input": "", "mode": "system2"},
        {"instruction": "What is 30 + 4?", "input": "", "mode": "system1"},
        {"instruction": "What is 347", "input": "+ 285?", "mode": "system2"},
    ]
    assert all(each["prompts"] == shortest for each in requests)


def test_questions_that_are_all_too_long_cost_the_speed_alone(panel, fast, tmp_path, capsys):
    speed, why = examine.time_answers(panel, {"system1": ROWS["system1"][:1]}, 1, tmp_path)
    assert speed is None and why.startswith("teacher 8-bit cannot be timed over 3 tokens") and why.endswith("shorter lengths or prompts")
    assert "not timed: teacher 8-bit cannot be timed" in capsys.readouterr().out


def test_a_measurement_that_breaks_off_costs_the_speed_alone(panel, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "STUDENT_BITS", 7)
    speed, why = examine.time_answers(panel[1:], {"system1": ROWS["system1"][1:]}, 1, tmp_path)
    assert speed is None and "\n" not in why and why.startswith("Timing (system1) failed") and "ConfigError: bits = 7: is not one of" in why


def test_memory_that_is_gone_when_the_measurement_begins_costs_the_speed_alone(panel, tmp_path, memory, monkeypatch):
    monkeypatch.setattr(examine, "teacher_settings", lambda *known: memory(0.001))  # there was room for it a moment ago
    speed, why = examine.time_answers(panel, {"system1": ROWS["system1"][1:]}, 1, tmp_path)
    assert speed is None and why.startswith("The teacher does not fit: in 8 bits")


def test_a_teacher_that_fits_with_one_question_but_not_with_a_batch_is_left_out(panel, requests, tmp_path, memory):
    from distill.machine import teacher_settings

    rows = {"system1": ROWS["system1"][1:]}
    memory(ROOM_FOR_ONE_GIB)
    assert teacher_settings(panel[0].path, {"questions": rows["system1"], "max_new_tokens": {"system1": 256}}, 8)
    _, why = examine.time_answers(panel[:2], rows, 1, tmp_path)
    assert [each["name"] for each in requests] == ["system1"]
    assert [part[:24] for part in why.split("; ")] == ["the teacher in 8 bits: T", "the teacher in 16 bits: "]


# Models that were quantised before they were saved


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, micro):
    """The micro teacher as bitsandbytes saves it in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised") / "teacher-4bit"
    model, tokenizer = models.load_teacher(str(micro / "teacher"), bits=4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def on_hub(quantised, tmp_path, monkeypatch):
    """Puts a folder's files into a hub's cache as acme/<name>; returns that name."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it is asked again and again, for minutes

    def put(folder, name: str, *patterns: str) -> str:
        place, commit = tmp_path / "hub" / f"models--acme--{name}", "a" * 40
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)
        for file in [file for pattern in patterns or ("*",) for file in folder.glob(pattern)]:
            shutil.copy(file, place / "snapshots" / commit)
        return f"acme/{name}"

    return put


def test_a_teacher_that_is_stored_quantised_is_timed_once_by_its_own_bits(panel, fast, quantised, tmp_path):
    teacher = Examined("teacher", "teacher", "Teacher", str(quantised), ("system1",))
    speed, left_out = examine.time_answers([teacher, panel[1]], {"system1": ROWS["system1"][1:]}, 1, tmp_path)
    assert left_out is None and list(speed["models"]) == ["teacher 4-bit", "system1"] and len(speed["ratios"]) == 1
    assert speed["models"]["teacher 4-bit"]["bits"] == 4


def test_the_bits_of_a_hub_name_are_read_from_the_hubs_cache(on_hub, quantised, micro):
    assert models.stored_bits(str(quantised)) == 4 == models.stored_bits(on_hub(quantised, "teacher-4bit", "config.json"))
    assert models.bits_for("acme/teacher-4bit", 8) == 4
    assert models.stored_bits(on_hub(micro / "teacher", "teacher", "config.json")) is None
    assert models.stored_bits("acme/never-fetched") is None


def test_a_quantised_model_of_the_hub_is_not_quantised_again(on_hub, quantised, monkeypatch):
    given, load = [], models._load
    monkeypatch.setattr(models, "_load", lambda *known, **settings: given.append(settings) or load(*known, **settings))
    model, _ = models.load_teacher(on_hub(quantised, "teacher-4bit"), bits=8)
    assert "quantization_config" not in given[0] and model.is_loaded_in_4bit


@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_that_others_quantised_is_refused(micro, tmp_path, bits):
    folder = shutil.copytree(micro / "student_system1", tmp_path / "student")
    config = store.read_json(folder / "config.json")
    store.write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ConfigError, match="student is quantised by gptq, which the lab does not load. Take the model in 16 bits, or bits"):
        models.load_to_answer(str(folder), "student", bits)


def test_the_size_on_disk_is_that_of_what_lies_here_and_nothing_is_fetched(on_hub, micro, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **more: pytest.fail("it would fetch"))
    size = (micro / "teacher" / "model.safetensors").stat().st_size
    assert models.disk_bytes(str(micro / "teacher")) == size == models.disk_bytes(on_hub(micro / "teacher", "whole"))
    assert models.disk_bytes(on_hub(micro / "teacher", "begun", "config.json")) is None
    assert models.disk_bytes("acme/never-fetched") is None
