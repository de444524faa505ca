"""Speed: answers of exact lengths, a timestamp a token, models in turn."""

from itertools import groupby
from operator import itemgetter

import pytest

from distill import timing
from distill.errors import BackendError, ConfigError, PreflightError
from distill.prompt import asked_ids

PROMPTS = [{"instruction": "What is 3 + 4?", "mode": "system1"}, {"instruction": "What is 347 + 285?", "mode": "system2"}]


def request(micro, name: str, folder: str, role: str, bits: int | None, **more) -> dict:
    return {"name": name, "path": str(micro / folder), "role": role, "bits": bits, "prompts": PROMPTS, **more}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, micro) -> dict:
    """A real measurement of three runs in two rounds: {"speed", "events", "log"}."""
    folder, events, run = tmp_path_factory.mktemp("timing"), [], timing.engine.run_module

    def hear(module, arguments, log, on_event):
        return run(module, arguments, log, lambda event: events.append(event) or on_event(event))

    requests = [
        request(micro, "teacher 8-bit", "teacher", "teacher", 8, model="teacher"),
        request(micro, "teacher 16-bit", "teacher", "teacher", 16, model="teacher"),
        request(micro, "system1", "student_system1", "student", None),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.engine, "run_module", hear)
        speed = timing.measure(requests, folder, runs=3, rounds=2, warm_up=1, lengths=(6, 3), batch_size=4)
    return {"speed": speed, "events": events, "log": (folder / "timing.log").read_text(encoding="utf-8")}


def test_models_are_measured_in_turn_and_loaded_anew_in_each_round(measured):
    order = [name for name, _ in groupby(measured["events"], key=itemgetter("name"))]
    assert order == ["teacher 8-bit", "teacher 16-bit", "system1"] * 2
    loaded = [line.partition(":")[0] for line in measured["log"].splitlines() if "loaded in" in line]
    assert loaded == order


def test_runs_are_spread_over_the_rounds_and_what_warms_up_does_not_count(measured):
    for figures in measured["speed"]["models"].values():
        samples = figures["samples"]
        assert [len(values) for values in samples["seconds"].values()] == [3, 3] and len(samples["tokens_per_second"]) == 3
        assert [len(values) for values in samples["batched"].values()] == [4, 4], "two of each round"
    done = 3 * (3 + 2 * (1 + 1 + 2))  # of each model: runs, and in each round a warm-up, one of the batch, and two batches
    assert measured["events"][-1]["done"] == done


def test_figures_follow_from_the_samples(measured):
    for figures in measured["speed"]["models"].values():
        samples = figures["samples"]
        assert list(samples["seconds"]) == ["3", "6"] == list(figures["seconds"])
        for first, short, long in zip(samples["first_token_seconds"], *samples["seconds"].values(), strict=True):
            assert 0 < first < short < long
        pairs = zip(samples["tokens_per_second"], samples["first_token_seconds"], samples["seconds"]["6"], strict=True)
        assert all(pace == pytest.approx(5 / (last - first)) for pace, first, last in pairs)
        assert figures["first_token_seconds"]["p50"]["value"] == pytest.approx(sorted(samples["first_token_seconds"])[1])
        assert figures["tokens_per_second"]["n"] == 3 and figures["load_seconds"] > 0


def test_eight_bits_are_bitsandbytes_and_sixteen_are_half_of_thirty_two(measured):
    models = measured["speed"]["models"]
    eight, sixteen, student = (models[name] for name in ("teacher 8-bit", "teacher 16-bit", "system1"))
    assert (eight["bits"], sixteen["bits"], student["bits"]) == (8, 16, 32)
    linear = 4 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)  # of the decoder layers: one byte each saved
    assert sixteen["weight_bytes"] - eight["weight_bytes"] == linear
    assert sixteen["weight_bytes"] == pytest.approx(2 * sixteen["parameters"], rel=1e-3)  # and the positions' buffers
    assert student["weight_bytes"] == pytest.approx(4 * student["parameters"], rel=1e-3)
    assert eight["parameters"] == sixteen["parameters"] and eight["model"] == "teacher" and eight["peak_bytes"] is None


def test_each_student_is_compared_with_each_teacher(measured):
    speed = measured["speed"]
    models = speed["models"]
    assert [(each["student"], each["teacher"]) for each in speed["ratios"]] == [("system1", "teacher 8-bit"), ("system1", "teacher 16-bit")]
    for each in speed["ratios"]:
        pace = [sum(models[each[role]]["samples"]["tokens_per_second"]) for role in ("student", "teacher")]
        assert each["speed"]["value"] == pytest.approx(pace[0] / pace[1])
        assert each["parameters_saved"] == pytest.approx(1 - models["system1"]["parameters"] / models["teacher 8-bit"]["parameters"])
    assert (speed["runs"], speed["rounds"], speed["warm_up"], speed["lengths"], speed["batch_size"]) == (3, 2, 1, [3, 6], 4)


# In this process


@pytest.fixture(scope="module")
def student(micro):
    from distill.models import load_student

    return load_student(str(micro / "student_system1"))


@pytest.mark.parametrize("count", [1, 3])
def test_lengths_are_exact_and_timestamps_grow_whatever_the_model_stops_at(student, count):
    model, tokenizer = student
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))  # every token ends its answers
    asked = [asked_ids(tokenizer, "?" * number) for number in range(1, count + 1)]
    stamps = timing.answer_stamps(model, tokenizer, asked, 12)
    assert len(stamps) == 12 and stamps == sorted(set(stamps)) and stamps[0] > 0


def test_an_answer_that_broke_off_is_no_measurement(student, monkeypatch):
    model, tokenizer = student
    monkeypatch.setattr(model, "generate", lambda stopping_criteria, **rest: None)
    with pytest.raises(BackendError, match="An answer of 12 tokens was asked for, and 0 were made"):
        timing.answer_stamps(model, tokenizer, [asked_ids(tokenizer, "?")], 12)


def test_more_tokens_than_positions_are_refused_before_anything_is_loaded(micro, tmp_path):
    with pytest.raises(ConfigError, match=r"^system1 cannot be timed over 1,000 tokens: .* it has 1,024 positions"):
        timing.measure([request(micro, "system1", "student_system1", "student", 32)], tmp_path, lengths=(128, 1000))
    assert not (tmp_path / "timing.log").exists()


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_loaded(micro, memory, tmp_path):
    looks = memory(0.001)
    with pytest.raises(PreflightError, match="The teacher does not fit: in 16 bits .* for 8 at once"):
        timing.measure([request(micro, "teacher 16-bit", "teacher", "teacher", 16)], tmp_path)
    assert looks and not (tmp_path / "timing.log").exists()


def test_numbers_that_cannot_be_are_named_together(micro, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)^2 problems in .* timed.*runs = 0: give at least 1.*lengths = 1: give at least 2"):
        timing.measure([], tmp_path, runs=0, lengths=(1, 9))


@pytest.mark.slow
def test_a_single_run_takes_one_round(micro, tmp_path):
    alone = request(micro, "system1", "student_system1", "student", 32)
    speed = timing.measure([alone], tmp_path, runs=1, rounds=2, lengths=(2,), warm_up=0, batch_size=1)
    assert (speed["runs"], speed["rounds"]) == (1, 1) and speed["models"]["system1"]["tokens_per_second"]["n"] == 1


@pytest.mark.slow
def test_the_model_that_fails_is_named(micro, tmp_path):
    both = [request(micro, "good", "student_system1", "student", 32), request(micro, "broken", "student_system1", "student", 7)]
    with pytest.raises(BackendError, match=r"(?s)^Timing \(broken\) failed: .*ConfigError: bits = 7"):
        timing.measure(both, tmp_path, runs=2, lengths=(2,), warm_up=0, batch_size=1)
