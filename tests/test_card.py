"""Model cards: read back by huggingface_hub, their code run."""

import copy
import re
import time
from pathlib import Path

import pytest
from sealed_checkpoint import sealed

from distill import card, models, store
from distill.cli_publish import PUBLISH_COMMANDS
from distill.errors import ConfigError, DataError, without_secrets
from distill.models import RUN_RECORD

HOSTILE = 'a`<script>alert(1)</script>|*x*\n---\nlicense: mit\n# Title [click](javascript:1) www.evil.example "{{ 7*7 }}"'


def measured(value: float, n: int = 200) -> dict:
    return {"value": value, "n": n, "ci": [value - 0.05, value + 0.05]}


@pytest.fixture
def checkpoint(prepared_rows, project) -> Path:
    return sealed(project, prepared_rows)


@pytest.fixture
def evaluation(checkpoint) -> dict:
    quality = {"exact_match": measured(0.9), "token_f1": measured(0.92), "math_verified": None, "perplexity": measured(1.2)}
    student = {"name": "system1", "role": "after", "path": str(checkpoint), "quality": {"system1": quality}}
    student["fingerprint"] = models.fingerprint(str(checkpoint))
    teacher = {"name": "teacher", "role": "teacher", "path": "acme/teacher", "quality": {"system1": {"exact_match": measured(0.95)}}}
    questions = {"source": "/home/me/heldout.jsonl", "sha256": "ab" * 32, "leakage": {"checked_against": 500, "removed": 3}}
    system = {
        "student": "system1",
        "teacher": "teacher",
        "before": "gone",
        "questions": questions,
        "retained": {"exact_match": measured(0.947)},
    }
    ratio = {"student": "system1", "teacher": "teacher 8-bit", "speed": measured(5.2), "memory_saved": 0.679, "parameters_saved": 0.734}
    return {
        "models": {"system1": student, "teacher": teacher},
        "systems": {"system1": system},
        "speed": {"ratios": [ratio]},
        "device": {"name": "CPU, 2 cores"},
    }


def reseal(folder: Path, change) -> dict:
    """A checkpoint whose record says something else, sealed as the lab would."""
    record = store.read_manifest(folder, name=RUN_RECORD)
    files = [folder / name for name in record.pop("files")]
    record = copy.deepcopy(record)
    change(record)
    store.write_manifest(folder, record, name=RUN_RECORD, files=files)
    return record


def metadata(text: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def written(folder: Path, *arguments, **settings) -> str:
    return Path(card.write_model_card(folder, *arguments, **settings)).read_text()


def test_a_card_leaves_the_checkpoint_whole_and_says_how_it_was_made(checkpoint):
    text = written(checkpoint)
    assert store.read_manifest(checkpoint, name=RUN_RECORD)
    found = metadata(text)
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation" and "system-1" in found["tags"]
    assert "base_model" not in found and r"student\_system1" in text and "has no name on the hub" in text
    assert r"| learning\_rate | 0.002 |" in text and "500 to train on, 60 for validation" in text
    assert "distilqwen.parquet (500)" in text and "nothing is claimed of its quality" in text
    assert "python distill_app.py system1 --preset micro_system1" in text


def test_no_path_of_this_machine_is_in_a_card(checkpoint, evaluation):
    text = written(checkpoint, evaluation)
    assert str(store.ROOT) not in text and "/home/me" not in text and not re.search(r"(?<![\w.:/])/(tmp|home|root|work)/", text)


@pytest.mark.parametrize(
    ("base", "asked", "license"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", None, {"license": "apache-2.0"}),
        ("Qwen/Qwen2.5-3B", None, {"license": "other", "license_name": "qwen-research"}),
        ("Qwen/Qwen2.5-72B-Instruct", None, {"license": "other", "license_name": "qwen"}),
        ("acme/model", None, {"license": "other"}),
        ("acme/model", "mit", {"license": "mit"}),
    ],
)
def test_base_model_and_license_are_the_hubs(checkpoint, base, asked, license):
    reseal(checkpoint, lambda record: record["job"]["models"].update(student=base))
    text = written(checkpoint, license=asked)
    assert metadata(text).items() >= {"base_model": base, "base_model_relation": "finetune", **license}.items()
    assert bool(card.problems(text)) == (license == {"license": "other"})


def test_data_sets_of_the_hub_are_in_the_metadata_with_their_language(checkpoint, project):
    rows = project / "rows.json"
    facts = {"source": "alibaba-pai/OmniThought", "revision": "c" * 40, "teacher": "DeepSeek-R1"}
    store.write_rows(rows, [{"instruction": "q", "output": "a", **facts}] * 3)
    reseal(checkpoint, lambda record: record["data"].update(labeled_path=str(rows), labeled_sha256=store.hash_file(rows)))
    text = written(checkpoint)
    assert (metadata(text)["datasets"], metadata(text)["language"]) == (["alibaba-pai/OmniThought"], ["en"])
    assert f"alibaba-pai/OmniThought at {'c' * 40} (3)" in text and "Answers written by: DeepSeek-R1 (3)" in text
    store.write_rows(rows, [])
    assert "was not at hand any more" in written(checkpoint)


def test_scores_stand_in_the_metadata_and_in_a_table_with_n_and_intervals(checkpoint, evaluation):
    from huggingface_hub import ModelCard

    text = written(checkpoint, evaluation)
    results = {result.metric_type: result for result in ModelCard(text).data.eval_results}
    assert set(results) == {"exact_match", "f1", "perplexity"} and results["exact_match"].metric_value == 0.9
    assert results["exact_match"].metric_args == {"n": 200, "interval_95": [0.85, 0.9500000000000001]}
    assert "| exact match | 200 | 0.9 [0.85, 0.95] | – | 0.95 [0.9, 1] | 0.947 [0.897, 0.997] |" in text
    assert (
        "near-duplicates of training rows: 3 removed, 500 training rows looked at" in text
        and "memory of the weights -67.9%, parameters -73.4% (on CPU, 2 cores)" in text
        and "heldout.jsonl" in text
    )


def test_an_evaluation_of_other_models_is_refused(checkpoint, evaluation, tmp_path):
    evaluation["models"]["system1"]["path"] = str(tmp_path / "another")
    with pytest.raises(ConfigError, match="The evaluation is of other models than student: another, acme/teacher"):
        card.write_model_card(checkpoint, evaluation)
    with pytest.raises(ConfigError, match="names no models and systems"):
        card.write_model_card(checkpoint, {"scores": 1})
    assert not (checkpoint / card.CARD).exists()


def test_scores_of_the_model_that_stood_there_before_are_refused(checkpoint, evaluation):
    reseal(checkpoint, lambda record: (checkpoint / "generation_config.json").write_text("{}"))
    with pytest.raises(ConfigError, match="The evaluation is of other models than student"):
        card.write_model_card(checkpoint, evaluation)
    del evaluation["models"]["system1"]["fingerprint"]
    with pytest.raises(ConfigError, match="The evaluation is of other models than student"):
        card.write_model_card(checkpoint, evaluation)


def test_what_was_not_checked_is_no_clean_bill(checkpoint, evaluation):
    leakage = {"checked_against": None, "removed": 0, "why_unchecked": "the rows that it learnt from are gone"}
    evaluation["systems"]["system1"]["questions"]["leakage"] = leakage
    text = written(checkpoint, evaluation)
    assert "near-duplicates of training rows: not checked: the rows that it learnt from are gone." in text and "0 removed" not in text


def test_an_unedited_card_takes_another_name_with_all_that_it_says(checkpoint, evaluation):
    text = written(checkpoint, evaluation, license="mit")
    record = card.read_record(checkpoint)
    assert card.renamed(text, "me/x") == card.compose(checkpoint, record, evaluation, "mit", name="me/x") != text
    edited = text.replace("System-1", "System-2")
    assert card.is_unedited(text) and not card.is_unedited(edited) and card.renamed(edited, "me/x") == edited


def test_hostile_names_are_shown_and_neither_metadata_nor_markup(checkpoint, project, evaluation):
    rows = project / "rows.json"
    store.write_rows(rows, [{"instruction": "q", "output": "a", "source": HOSTILE, "teacher": HOSTILE, "revision": HOSTILE}])

    def change(record):
        record["data"].update(labeled_path=str(rows), labeled_sha256=store.hash_file(rows))
        record["job"]["models"].update(student=HOSTILE, teacher=HOSTILE)
        record["settings"]["report_to"] = {"value": HOSTILE, "origin": HOSTILE}
        record["settings"]["seed"] = {"value": HOSTILE, "origin": "yours"}

    reseal(checkpoint, change)
    moved = checkpoint.rename(checkpoint.with_name(HOSTILE.partition("/")[0]))
    evaluation["models"]["system1"]["path"] = str(moved)
    evaluation["systems"]["system1"]["questions"]["source"] = HOSTILE
    evaluation["models"]["system1"]["fingerprint"] = models.fingerprint(str(moved))
    text = written(moved, evaluation)
    assert card.is_unedited(text) and card.renamed(text, "me/x") == card.compose(moved, card.read_record(moved), evaluation, name="me/x")
    assert metadata(text)["license"] == "other" and text.count("\n---\n") == 1
    prose = re.sub(r"```.*?```", "", text.partition("\n---\n")[2], flags=re.DOTALL)
    assert not re.search(r"(?<!\\)(<script|\[click|\*x|`<)|^# Title|^license|www\.evil", prose, re.MULTILINE)


def test_another_text_that_stands_there_is_kept(checkpoint):
    (checkpoint / card.CARD).write_text("mine")
    written(checkpoint)
    assert (checkpoint / "README.md.previous").read_text() == "mine"


def test_what_is_no_checkpoint_or_damaged_gets_no_card(checkpoint, project, micro):
    with pytest.raises(ConfigError, match="Model not found at nothing"):
        card.write_model_card(project / "nothing")
    with pytest.raises(ConfigError, match="is no checkpoint of the lab: it holds no distill_run.json"):
        card.write_model_card(micro / "teacher", out=project / "card.md")
    with pytest.raises(ConfigError, match="license = 'my own: yes': is no identifier"):
        card.write_model_card(checkpoint, license="my own: yes")
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(DataError, match="missing or is not what"):
        card.write_model_card(checkpoint)
    assert not (project / "card.md").exists() and not (checkpoint / card.CARD).exists()


def test_problems_of_a_card_are_named():
    assert "cannot be read" in card.problems("---\nlicense: [\n---\nx")[0]
    assert card.problems("no metadata")[0] == "its metadata name no license"


def test_places_and_keys_are_cut_from_a_record():
    found = card.for_strangers(
        {
            "a": "/home/jane doe/models/mine",
            "b": ["in '/srv/x/y.log', file:///tmp/run/z", r"C:\Users\me\model"],
            "c": "data/micro/teacher",
            "d": 1,
        }
    )
    assert found == {"a": "mine", "b": ["in 'y.log', z", "model"], "c": "data/micro/teacher", "d": 1}
    assert "hf_" not in card.for_strangers("key hf_" + "a" * 30)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /home/Jane Doe/models/x", "see x"),
        ("../alice/private/x", "x"),
        ("log: ../alice/private/x, whole", "log: x, whole"),
        ("models/../../alice/x", "x"),
        (r"at \\server\alice\share\x now", "at x now"),
        (r"\\server\alice\x", "x"),
        ("/home/alice", "~"),
        ("log at /home/alice/", "log at ~"),
        (r"C:\Users\alice", "~"),
        ("~alice", "~"),
        ("~5 min", "~5 min"),
        (r"\frac{a}{b} 1/2/3 and https://host/a/b", r"\frac{a}{b} 1/2/3 and https://host/a/b"),
    ],
)
def test_a_place_keeps_its_last_name_alone_and_a_home_none(text, shown):
    assert card.for_strangers(text) == shown


@pytest.mark.parametrize(
    "key", ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1" * 18, "github_pat_" + "A1_" * 20, "https://me:pw@host/x", "https://pw@host"]
)
def test_keys_are_known_by_their_form(key):
    assert key not in without_secrets(f"see {key}, please") and "***" in without_secrets(key)


@pytest.mark.parametrize(
    "link", ["https://medium.com/@me/post", "https://host:8080/@me/x", "ssh://git@host/x", '{"a":"https://b.example","c":"me@d"}']
)
def test_a_link_without_a_password_is_no_key(link):
    assert without_secrets(link) == link


@pytest.mark.parametrize("hostile", ["x " + "/a b c d " * 9_000, "../" * 30_000, "://a:" * 15_000, "https://" * 9_000])
def test_a_long_text_is_cut_in_no_long_time(hostile):
    start = time.process_time()
    card.for_strangers(hostile)
    assert time.process_time() - start < 5


def test_the_cards_code_runs_on_the_checkpoint_and_answers_as_the_lab_does(checkpoint, monkeypatch, capsys):
    from distill import generation

    code = re.search(r"```python\n(.*?)```", written(checkpoint), re.DOTALL)[1]
    expected = generation.infer_student(*models.load_student(str(checkpoint)), card.QUESTION)
    monkeypatch.chdir(checkpoint.parent)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() == expected


def test_the_command_writes_the_card(checkpoint, capsys):
    import argparse

    commands = argparse.ArgumentParser().add_subparsers()
    for add in PUBLISH_COMMANDS:
        add(commands)
    options = commands.choices["card"].parse_args([str(checkpoint), "--license", "mit"])
    assert metadata(Path(options.run(options)["card"]).read_text())["license"] == "mit"
