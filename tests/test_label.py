"""Teacher labelling for real: 8-bit and 4-bit loading, batches, the journal that survives a kill, and every bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill import answers, generation, label, models, store
from distill.data import prepare_system1_dataset
from distill.errors import BackendError, ConfigError, DataError, PreflightError
from distill.memory import Asking, asking_need
from distill.prompt import asked_ids
from distill.shapes import find_shape

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def teacher(micro):
    return str(micro / "teacher")


@pytest.fixture(scope="module")
def plain_questions(heldout):
    return [row for row in heldout if row["system"] == 1][::40]


def journals(project: Path) -> list[Path]:
    return sorted((project / "runs" / "labels").glob("*.jsonl"))


def ids_in(journal: Path) -> list[str]:
    # as it is: read_journal would mend it, under the hands of whoever writes
    lines = journal.read_bytes().splitlines(keepends=True)
    return [entry["id"] for _, entry in store.intact_lines(lines) if entry["id"] != store.MODEL]


# Loading


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt"), (16, "Linear"), (32, "Linear")])
def test_a_teacher_is_loaded_in_as_many_bits_as_asked(bits, kind, teacher):
    model, tokenizer = models.load_teacher(teacher, bits=bits)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == kind
    assert not model.training and tokenizer.chat_template


def test_fewer_bits_take_fewer_bytes(teacher):
    sizes = [models.load_teacher(teacher, bits=bits)[0].get_memory_footprint() for bits in (4, 8, 16, 32)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < 0.6 * sizes[2]


@pytest.mark.parametrize(("bits", "least"), [(16, 0.97), (8, 0.97), (4, 0.9)])
def test_a_quantized_teacher_answers_nearly_as_in_fp32(bits, least, teacher, heldout):
    asked = [{"instruction": row["instruction"], "mode": f"system{row['system']}"} for row in heldout[::10]]
    request = {"questions": asked, "max_new_tokens": {"system1": 12, "system2": 120}}
    full, quantized = (answers.answer_all(*models.load_teacher(teacher, bits=width), request)["answers"] for width in (32, bits))
    same = sum(left["text"] == right["text"] for left, right in zip(full, quantized, strict=True))
    assert same >= least * len(asked)


def test_other_bits_are_refused(teacher):
    with pytest.raises(ConfigError, match="bits = 3: is not one of 4, 8, 16, 32"):
        models.load_teacher(teacher, bits=3)


def test_a_teacher_that_is_not_there_is_named_as_a_teacher(project):
    with pytest.raises(ConfigError, match=r"^Invalid teacher model: .*nowhere.*Example: Qwen/Qwen2.5-7B-Instruct"):
        label.label_with_teacher("./no/such/nowhere", None, ["?"])
    assert not any(project.iterdir())


def test_a_teacher_without_a_chat_template_is_refused_before_it_is_loaded(tmp_path, teacher, project):
    folder = tmp_path / "base"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    for call in (lambda: models.load_teacher(str(folder)), lambda: label.label_with_teacher(str(folder), None, ["?"])):
        with pytest.raises(ConfigError, match="has no chat template"):
            call()
    assert not any(project.iterdir())


# Answers


def test_seconds_and_stops_are_those_of_each_answer(teacher):
    model, tokenizer = models.load_teacher(teacher, bits=32)
    asked = [asked_ids(tokenizer, "Tell me the parity of 4322."), asked_ids(tokenizer, "What is 347 + 285?", mode="system2")]
    short, long = generation.generate(model, tokenizer, asked, 200)
    assert short.stopped and long.stopped and short.tokens < long.tokens and 0 < short.seconds < long.seconds
    (cut,) = generation.generate(model, tokenizer, asked[1:], 5)
    assert not cut.stopped and cut.tokens == 5


def test_a_streamed_answer_is_the_whole_answer(teacher):
    model, tokenizer = models.load_teacher(teacher, bits=32)
    seen = []
    asked = asked_ids(tokenizer, "What is 347 + 285?", mode="system2")
    (answer,) = generation.generate(model, tokenizer, [asked], 200, on_text=seen.append)
    assert "".join(seen) == answer.text and len(seen) > 3


def test_asking_leaves_the_callers_random_numbers_alone_and_is_reproducible(teacher):
    import torch

    model, tokenizer = models.load_student(teacher)
    asked = [asked_ids(tokenizer, "What is 347 + 285?", mode="system2")] * 3
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    sampled = [
        [answer.text for answer in generation.generate(model, tokenizer, asked, 60, temperature=2.0, seed=seed)] for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5])
def test_a_limit_that_cannot_be_is_refused(wrong, teacher):
    from distill.chat import chat

    model, tokenizer = models.load_student(teacher)
    for call in (
        lambda: generation.infer_student(model, tokenizer, "?", max_new_tokens=wrong),
        lambda: chat(teacher, max_new_tokens=wrong),
    ):
        with pytest.raises(ConfigError, match=f"max_new_tokens = {wrong}"):
            call()


def test_infer_student_takes_the_raw_question(teacher):
    model, tokenizer = models.load_student(teacher)
    assert generation.infer_student(model, tokenizer, "Tell me the parity of 4322.") == "even"
    assert generation.infer_student(model, tokenizer, "What is 347 + 285?", mode="system2").endswith("</think>\n\n632")
    assert generation.infer_student(model, tokenizer, "What is 347 + 285?", mode="system2", max_new_tokens=3).count("\n") < 3


def test_models_are_asked_in_one_subprocess_and_say_what_they_are(teacher, micro, tmp_path):
    questions = [{"instruction": "Tell me the parity of 4322.", "mode": "system1"}, {"instruction": "Add 100 and 5.", "mode": "system2"}]
    request = {"questions": questions, "max_new_tokens": {"system1": 12, "system2": 100}}
    requests = [
        {"name": "a", "path": teacher, "bits": 8, **request},
        {"name": "b", "path": str(micro / "student_system1"), "bits": 32, **request},
    ]
    made = answers.ask(requests, tmp_path / "run")
    assert list(made) == ["a", "b"] and made["a"]["parameters"] > made["b"]["parameters"]
    assert made["a"]["weight_bytes"] < made["b"]["weight_bytes"] and made["a"]["device"] == "cpu" and made["a"]["load_seconds"] > 0
    assert made["a"]["answers"][0]["text"] == "even" and len(made["b"]["answers"]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["answers.log"]


@pytest.mark.parametrize(("place", "bits"), [("cpu", 32), ("cuda", 16)])
def test_bits_that_nobody_chose_suit_the_device(place, bits, monkeypatch):
    monkeypatch.setattr(models, "device", lambda: (place, "pretended"))
    assert [models.bits_for("acme/model", wanted) for wanted in (None, 8, 32)] == [bits, 8, 32]


def test_a_model_that_fails_is_an_error_with_the_log(tmp_path):
    request = {
        "name": "x",
        "role": "teacher",
        "path": str(tmp_path / "none"),
        "bits": 8,
        "questions": [{"instruction": "?", "mode": "system1"}],
    }
    with pytest.raises(BackendError, match="Invalid teacher model"):
        answers.ask([{**request, "max_new_tokens": {"system1": 1}}], tmp_path / "run")


# Labels and their journal


def test_labels_are_the_teachers_answers_in_order(project, teacher, plain_questions):
    rows = label.label_with_teacher(teacher, None, [row["instruction"] for row in plain_questions], max_new_tokens=12)
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in plain_questions]
    assert sum(row["output"] == question["answer"] for row, question in zip(rows, plain_questions, strict=True)) >= 0.95 * len(rows)
    assert {row["teacher"] for row in rows} == {teacher}


def test_a_loaded_teacher_gives_the_same_labels(project, teacher, plain_questions):
    items = [{"instruction": row["instruction"], "note": number} for number, row in enumerate(plain_questions)]
    model, tokenizer = models.load_teacher(teacher, bits=32)
    rows = label.label_with_teacher(model, tokenizer, items, max_new_tokens=12)
    again = label.label_rows(label.rows_of(items), label.teacher_of(teacher, bits=32), max_new_tokens=12)
    assert [row["output"] for row in rows] == [row["output"] for row in again.rows] and again.reused == 0
    assert [row["note"] for row in rows] == list(range(len(items)))


def test_a_row_is_known_by_its_question_not_by_the_id_it_brings(project, teacher):
    model, tokenizer = models.load_student(teacher)
    items = [{"id": 7, "instruction": "Tell me the parity of 4322."}, {"id": 7, "instruction": "Tell me the parity of 4323."}]
    rows = label.label_with_teacher(model, tokenizer, items, max_new_tokens=12)
    assert [(row["id"], row["output"]) for row in rows] == [(7, "even"), (7, "odd")]


def test_a_second_run_asks_only_what_is_new(project, teacher, plain_questions):
    rows = label.rows_of([row["instruction"] for row in plain_questions])
    first = label.label_rows(rows[:5], label.teacher_of(teacher), max_new_tokens=12)
    second = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    third = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    assert (first.reused, second.reused, third.reused) == (0, 5, len(rows))
    assert second.rows == third.rows
    (journal,) = journals(project)
    assert sorted(ids_in(journal)) == sorted(row["id"] for row in rows)


def test_another_request_never_takes_the_answers_of_this_one(project, teacher):
    model, tokenizer = models.load_student(teacher)
    settings = {"max_new_tokens": 12, "mode": "system1", "temperature": 0.0, "top_p": 1.0}
    changes = [{}, {"max_new_tokens": 13}, {"mode": "system2"}, {"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.9}]
    same = [{}, {"temperature": 0}, {"top_p": 0.9}, {"batch_size": 1}]
    for count, change in enumerate(changes + same, start=1):
        label.label_with_teacher(model, tokenizer, ["Tell me the parity of 4322."], **settings | change)
        assert len(journals(project)) == min(count, len(changes))
    assert [len(ids_in(journal)) for journal in journals(project)] == [1] * len(changes)


def test_other_bits_or_other_files_are_another_teacher(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "copy")
    same = label._Named(str(tmp_path / "copy"), 8).identity()
    assert same == label._Named(teacher, 8).identity() != label._Named(teacher, 4).identity()
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert label._Named(str(tmp_path / "copy"), 8).identity() != same


PARITY = [f"Tell me the parity of {number}." for number in range(4320, 4324)]


def needs_gib(teacher: str, bits: int) -> float:
    """Memory for one question of PARITY at a time, with an answer of 12 tokens."""
    tokenizer = models.load_tokenizer(teacher)
    longest = max(len(asked_ids(tokenizer, text, "", "system1")) for text in PARITY)
    return asking_need(find_shape(teacher)[0], Asking(bits, longest + 12, 1)).gib


def test_momentary_memory_makes_no_other_teacher_and_one_journal_holds_one_precision(project, teacher, memory, capsys):
    eight, four = needs_gib(teacher, 8), needs_gib(teacher, 4)
    store.write_rows(project / "few.json", [{"instruction": text} for text in PARITY[:2]])
    store.write_rows(project / "many.json", [{"instruction": text} for text in PARITY])
    memory((eight + four) / 2)
    assert label.label_file("few.json", teacher, "out.json", max_new_tokens=12).bits == 4
    memory(eight + 1)
    labeled = label.label_file("many.json", teacher, "out.json", max_new_tokens=12)
    assert (labeled.reused, labeled.bits, len(journals(project))) == (2, 4, 1)
    assert store.read_manifest(project / "out.json")["bits"] == 4
    assert "teacher: 4 bits (those of its earlier answers)" in capsys.readouterr().out


def test_memory_is_asked_for_only_where_a_question_is(project, teacher, memory):
    asked = memory(40)
    rows = label.rows_of(PARITY)
    first = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    assert len(asked) == 1 and first.bits == 8
    memory(0)
    second = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    assert asked == [40] and second.reused == len(rows) and second.bits == 8
    with pytest.raises(PreflightError, match="The teacher does not fit: in 8 bits"):
        label.label_rows(label.rows_of(["Tell me the parity of 17."]), label.teacher_of(teacher), max_new_tokens=12)


def engine_that_dies(*arguments):
    raise BackendError("killed")


def test_bits_of_an_attempt_that_answered_nothing_bind_no_later_one(project, teacher, memory, monkeypatch):
    memory(40)
    rows = label.rows_of(PARITY[:1])
    with monkeypatch.context() as patch, pytest.raises(BackendError, match="killed"):
        patch.setattr(label, "ask", engine_that_dies)
        label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    memory(needs_gib(teacher, 4) + 1e-5)
    assert label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12).bits == 4


def test_changed_weights_are_another_teacher(project, teacher):
    import torch

    model, tokenizer = models.load_student(teacher)
    before = models.probe(model)
    label.label_with_teacher(model, tokenizer, ["Tell me the parity of 4322."], max_new_tokens=12)
    with torch.no_grad():
        model.model.norm.weight *= 2
    assert models.probe(model) != before
    label.label_with_teacher(model, tokenizer, ["Tell me the parity of 4322."], max_new_tokens=12)
    assert len(journals(project)) == 2


def test_cut_off_and_empty_answers_are_dropped_and_counted(project, teacher, capsys):
    rows = label.rows_of(["Write backwards the letters TNIG.", "Tell me the parity of 4322."])
    labeled = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=2)
    assert [row["output"] for row in labeled.rows] == ["even"] and labeled.dropped == {label.CUT_OFF: 1}
    assert "dropped 1: an answer cut off at max_new_tokens" in capsys.readouterr().out
    kept = label._kept(rows, {label._key(row): {"stopped": True, "text": " \n"} for row in rows}, "t", 0)
    assert not kept.rows and kept.dropped == {label.EMPTY: 2}


def test_damaged_lines_are_taken_off_the_journal_and_the_others_stay(tmp_path, capsys):
    journal = tmp_path / "journal.jsonl"
    for number in range(4):
        store.add_to_journal(journal, {"id": number, "text": "é \u2028 </think>"})
    lines = journal.read_bytes().splitlines(keepends=True)
    for damaged in (
        lines[1][:-9],
        lines[1].replace(b"think", b"thinc"),
        lines[1].replace(b'"id": 1', b'"id": 7'),
        b"hello\n",
        b"{}\n",
        b"\n",
    ):
        journal.write_bytes(lines[0] + damaged + b"\n" * (not damaged.endswith(b"\n")) + lines[2] + lines[3][:-3])
        assert [entry["id"] for entry in store.read_journal(journal)] == [0, 2]
        assert journal.read_bytes() == lines[0] + lines[2]
        assert "2 damaged lines are dropped" in capsys.readouterr().out
    store.add_to_journal(journal, {"id": 9})
    assert [entry["id"] for entry in store.read_journal(journal)] == [0, 2, 9] and not capsys.readouterr().out
    assert [row["id"] for row in store.read_rows(journal)] == [0, 2, 9]  # JSON lines to anybody


def test_a_label_that_was_damaged_on_disk_is_asked_for_again_and_no_other(project, teacher, plain_questions):
    rows = label.rows_of([row["instruction"] for row in plain_questions])
    first = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    (journal,) = journals(project)
    text = bytearray(journal.read_bytes())
    text[len(text) // 2] ^= 1
    journal.write_bytes(text)
    second = label.label_rows(rows, label.teacher_of(teacher), max_new_tokens=12)
    assert second.reused == len(rows) - 1 and [row["output"] for row in second.rows] == [row["output"] for row in first.rows]


def test_a_killed_labelling_goes_on_and_every_id_is_there_once(project, teacher, heldout, start_python):
    """SIGKILL to the lab in the middle: its engine ends too, what was answered stays, the second run asks the rest."""
    store.write_rows(project / "rows.json", [{"instruction": row["instruction"]} for row in heldout if row["system"] == 1])
    code = (
        "from distill.label import label_file\nlabel_file('rows.json', sys.argv[1], 'out.json', bits=32, max_new_tokens=12, batch_size=2)"
    )
    process = start_python(code, teacher)
    end = time.monotonic() + 90
    while not (journals(project) and len(ids_in(journals(project)[0])) >= 20):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert not alive and not (project / "out.json").exists()
    (journal,) = journals(project)
    stood = ids_in(journal)
    labeled = label.label_file("rows.json", teacher, "out.json", bits=32, max_new_tokens=12)
    assert 20 <= len(stood) < 1400 and labeled.reused == len(stood)
    ids = ids_in(journal)
    assert ids[: len(stood)] == stood and len(ids) == len(set(ids)) == 1400
    written = list(store.read_rows(project / "out.json"))
    assert len(written) == 1400 and len({row["id"] for row in written}) == 1400 and store.read_manifest(project / "out.json")


@pytest.mark.parametrize("damage", ["a bit", "its end"])
def test_a_label_file_that_was_damaged_is_no_source(project, teacher, damage):
    store.write_rows(project / "rows.json", [{"instruction": f"Tell me the parity of {number}."} for number in range(4320, 4340)])
    label.label_file("rows.json", teacher, "labeled.json", max_new_tokens=12)
    labeled = project / "labeled.json"
    text = bytearray(labeled.read_bytes())
    text[text.index(b"odd")] ^= 1
    labeled.write_bytes(text if damage == "a bit" else labeled.read_bytes()[:-40])
    places = {"out_labeled": "data/a.json", "out_instructions": "data/b.json"}
    with pytest.raises(DataError, match=r"labeled\.json is missing or is not what .* recorded.* To keep changes of your own, remove"):
        prepare_system1_dataset("train[:5]", source="labeled.json", **places)
    (project / "labeled.json.manifest.json").unlink()
    if damage == "a bit":
        assert prepare_system1_dataset("train[:5]", source="labeled.json", **places).read == 5


def test_a_file_is_labelled_with_its_validation_rows(project, teacher):
    store.write_rows(project / "rows.json", [{"instruction": "Tell me the parity of 4322.", "output": "no idea", "source": "mine"}])
    store.write_rows(project / "rows_validation.json", [{"instruction": "Tell me the parity of 4323."}])
    label.label_file("rows.json", teacher, "labeled.json", max_new_tokens=12)
    (row,) = store.read_rows(project / "labeled.json")
    assert (row["output"], row["source"], row["teacher"]) == ("even", "mine", teacher)
    assert [row["output"] for row in store.read_rows(project / "labeled_validation.json")] == ["odd"]
    assert store.read_manifest(project / "labeled.json")["teacher"] == teacher


def test_labelling_never_changes_its_source(project, teacher):
    row = {"instruction": "Tell me the parity of 4322.", "output": "mine"}
    for name in ("rows.json", "rows_validation.json"):
        store.write_rows(project / name, [row])
    for out in ("rows.json", "rows_validation.json"):
        with pytest.raises(ConfigError, match="is the source, which labelling never changes"):
            label.label_file("rows.json", teacher, out)
    assert list(store.read_rows(project / "rows.json")) == [row]


def test_no_validation_rows_of_an_earlier_labelling_stay_beside_new_rows(project, teacher):
    store.write_rows(project / "a.json", [{"instruction": "Tell me the parity of 4322."}])
    store.write_rows(project / "a_validation.json", [{"instruction": "Tell me the parity of 4324."}])
    store.write_rows(project / "b.json", [{"instruction": "Tell me the parity of 4324."}])
    for source in ("a.json", "b.json"):
        label.label_file(source, teacher, "out.json", max_new_tokens=12)
    assert not (project / "out_validation.json").exists()
    assert [row["output"] for row in store.read_rows(project / "out.json")] == ["even"] and store.read_manifest(project / "out.json")


def test_where_no_row_gets_a_label_nothing_is_written(project, teacher):
    store.write_rows(project / "rows.json", [{"instruction": "Write backwards the letters TNIG."}])
    with pytest.raises(DataError, match="Raise max_new_tokens"):
        label.label_file("rows.json", teacher, "labeled.json", max_new_tokens=1)
    assert not (project / "labeled.json").exists()


# Relabelling at preparation


@pytest.fixture(scope="module")
def loaded(teacher):
    return dict(zip(("teacher_model", "teacher_tokenizer"), models.load_student(teacher), strict=True))


def prepare(project, rows, **settings) -> tuple:
    store.write_rows(project / "mine.json", rows)
    prepared = prepare_system1_dataset("train", source="mine.json", validation=0, **settings)
    return prepared, list(store.read_rows(prepared.path))


def test_rows_without_labels_are_prepared_when_the_teacher_labels_them(project, loaded):
    rows = [{"instruction": f"Tell me the parity of {number}."} for number in range(4320, 4326)]
    prepared, written = prepare(project, rows, relabel_with_teacher=True, **loaded)
    assert [row["output"] for row in written] == ["even", "odd"] * 3 and prepared.kept == 6
    assert prepared.teachers == {loaded["teacher_model"].name_or_path: 6}
    assert "output" not in next(store.read_rows(prepared.instructions_path))


def test_a_part_of_the_rows_is_relabelled_the_rest_keeps_its_labels(project, loaded):
    rows = [{"instruction": f"Tell me the parity of {number}.", "output": "who knows"} for number in range(4320, 4324)]
    prepared, written = prepare(project, rows, relabel_with_teacher=2, **loaded)
    assert [row["output"] for row in written] == ["even", "odd", "who knows", "who knows"]
    assert sorted(prepared.teachers.values()) == [2, 2] and "whoever wrote mine.json" in str(prepared)


def test_what_label_wrote_keeps_its_teacher_when_it_is_prepared(project):
    rows = [{"instruction": "a", "output": "b", "teacher": "my teacher"}, {"instruction": "c", "output": "d", "teacher": 7}]
    prepared, written = prepare(project, rows)
    assert [row.get("teacher") for row in written] == ["my teacher", None]
    assert prepared.teachers == {"my teacher": 1, "whoever wrote mine.json": 1}


def test_rows_whose_label_is_cut_off_are_dropped_and_counted(project, loaded, monkeypatch):
    monkeypatch.setattr("distill.data.label_rows", lambda rows, teacher, fresh: label.label_rows(rows, teacher, max_new_tokens=2))
    rows = [{"instruction": "Tell me the parity of 4322."}, {"instruction": "Write backwards the letters TNIG."}]
    prepared, written = prepare(project, rows, relabel_with_teacher=True, **loaded)
    assert [row["output"] for row in written] == ["even"] and prepared.dropped == {label.CUT_OFF: 1} and prepared.read == 2


def test_relabelling_needs_a_teacher_and_a_number_that_makes_sense(project):
    store.write_rows(project / "mine.json", [{"instruction": "a", "output": "b"}])
    for relabel, words in ((True, "needs a teacher_model"), (-1, "relabel_with_teacher = -1"), ("yes", "relabel_with_teacher = 'yes'")):
        with pytest.raises(ConfigError, match=words):
            prepare_system1_dataset("train", source="mine.json", relabel_with_teacher=relabel)
    with pytest.raises(ConfigError, match="Invalid teacher model"):
        prepare_system1_dataset("train", source="mine.json", relabel_with_teacher=True, teacher_model="./nobody")
    assert [path.name for path in project.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"batch_size": True}, "batch_size = True"),
        ({"temperature": -1}, "temperature = -1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"mode": "system3"}, "mode = 'system3'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words, project, teacher):
    with pytest.raises(ConfigError, match=words):
        label.label_with_teacher(teacher, None, ["?"], **settings)
    assert not any(project.iterdir())


@pytest.mark.parametrize("item", [3, "", {"question": "?"}, {"instruction": None}, None, {"instruction": "a", "input": 5}, "a\ud800"])
def test_an_item_that_is_no_question_is_named(item, project, teacher):
    with pytest.raises(DataError, match="item 1 is no question"):
        label.label_with_teacher(teacher, None, ["fine", item])


def test_a_loaded_teacher_needs_its_tokenizer(project):
    with pytest.raises(ConfigError, match="needs its teacher_tokenizer"):
        label.label_with_teacher(object(), None, ["?"])


# Chat


def test_chat_answers_each_line_as_the_checkpoint_was_trained(teacher):
    done = subprocess.run(
        [sys.executable, "distill_app.py", "chat", teacher, "--mode", "system2"],
        cwd=ROOT, input="What is 347 + 285?\n\nAdd 100 and 5.\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "7+5=12" in done.stdout and "\n632\n" in done.stdout and "tokens/s" in done.stdout


def test_chat_takes_the_mode_from_the_checkpoints_record(small_run, capsys):
    from distill.chat import chat

    made = chat(small_run["checkpoint"], questions=["Tell me the parity of 4322."])
    assert "system1 (as it was trained)" in capsys.readouterr().out
    assert made[0]["question"] == "Tell me the parity of 4322." and made[0]["tokens"] > 0


def test_chat_with_no_model_says_where_it_looked(tmp_path):
    from distill.chat import chat

    with pytest.raises(ConfigError, match=f"^Model not found at {tmp_path}"):
        chat(str(tmp_path), questions=[])


def test_a_models_own_generation_settings_change_no_answer(project, micro, heldout, tmp_path):
    """Qwen2.5-Instruct's ship with a penalty on repetition, which `generate` would add to whatever is asked."""
    import shutil

    penalised = tmp_path / "penalised"
    shutil.copytree(micro / "teacher", penalised)
    own = store.read_json(penalised / "generation_config.json")
    store.write_json(penalised / "generation_config.json", {**own, "repetition_penalty": 2.5, "do_sample": True, "top_k": 3})
    items = [row["instruction"] for row in heldout if row["system"] == 1][::70]
    models_ = [models.load_teacher(str(path), bits=32) for path in (micro / "teacher", penalised)]
    plain, other = ([row["output"] for row in label.label_with_teacher(*loaded, items)] for loaded in models_)
    assert plain == other and len(plain) == len(items) > 10
    assert models_[1][0].generation_config.repetition_penalty == 2.5  # as it was
