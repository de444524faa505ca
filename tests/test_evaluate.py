"""Evaluation for real: teacher, student before and after; broken students are called out; what was asked is not asked again."""

import shutil

import pytest

import distill_app
from distill import cli_evaluate, evaluate, examine, store, students
from distill.cli import main
from distill.diagnosis import diagnose
from distill.errors import ConfigError
from distill.models import load_to_train, load_tokenizer
from distill.quality import beside_before, beside_teacher, quality

LIMITS = {"system1": 60, "system2": 60}  # long enough to show a loop


def random_weights(path, micro):
    from distill.microlab import new_model

    new_model("student_system1", load_tokenizer(str(path)), seed=7).save_pretrained(path)


def wrong_template(path, micro):
    tokenizer = load_tokenizer(str(path))
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [end]<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(path)


def no_stop_token(path, micro):
    """Its template ends a turn with a token that it never learnt to write."""
    tokenizer = load_tokenizer(str(path))
    tokenizer.eos_token = "<|fim_pad|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n'", "'<|fim_pad|>\\n'")
    tokenizer.save_pretrained(path)
    model, _ = load_to_train(str(path))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)


def repeating(path, micro):
    """Without attention and feed-forward layers the next token is the last one again."""
    model, tokenizer = load_to_train(str(path))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(path)


BROKEN = {"random": random_weights, "template": wrong_template, "endless": no_stop_token, "repeating": repeating}


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory, micro, heldout):
    """What is said of students that are the teacher itself, whole or broken: {name: (quality, diagnosis)}."""
    folder = tmp_path_factory.mktemp("broken")
    rows = {"system1": [{**row, "mode": "system1"} for row in heldout if row["system"] == 1][::28]}
    panel = [examine.Examined("teacher", "teacher", "Teacher", str(micro / "teacher"), ("system1",), 32)]
    panel.append(examine.Examined("before", "before", "Before", str(micro / "student_system1"), ("system1",)))
    for name, damage in {"good": lambda path, micro: None, **BROKEN}.items():
        path = shutil.copytree(micro / "teacher", folder / name)
        damage(path, micro)
        panel.append(examine.Examined(name, "after", name, str(path), ("system1",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        answered = examine.ask(panel, rows, LIMITS, 65_536, folder, False)
        scored, bleu, _ = examine.score_answers(panel, rows, answered, folder, False)
    figures = {one.name: quality(scored[one.name, "system1"], bleu[one.name, "system1"]) for one in panel}
    template = students.tokenizer_hash(load_tokenizer(str(micro / "teacher")))
    return {
        one.name: (
            figures[one.name],
            diagnose(
                figures[one.name],
                figures["before"],
                {
                    "retained": beside_teacher(scored[one.name, "system1"], scored["teacher", "system1"])[0],
                    "against_before": beside_before(scored[one.name, "system1"], scored["before", "system1"]),
                },
                {
                    "template_differs": students.tokenizer_hash(load_tokenizer(one.path)) != template,
                    "limit_tokens": LIMITS["system1"],
                    "vocabulary": len(load_tokenizer(one.path)),
                    "mode": "system1",
                },
            ),
        )
        for one in panel
        if one.role == "after"
    }


def test_a_good_student_has_nothing_to_mend(diagnosed):
    found, said = diagnosed["good"]
    assert found["exact_match"]["value"] == 1.0 and found["stopped"]["value"] == 1.0 and said == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("random", "no more than chance"),
        ("template", "chat template is not the one"),
        ("endless", "do not stop by themselves"),
        ("repeating", "repeats itself"),
    ],
)
def test_a_broken_student_is_called_out_as_such(diagnosed, name, words):
    found, said = diagnosed[name]
    assert any(words in one["what"] for one in said), (found, said)
    assert all(one["evidence"] and one["advice"] for one in said)


@pytest.fixture
def evaluation(project, small_run, micro, heldout):
    store.write_jsonl(project / "heldout.jsonl", [row for row in heldout if row["system"] == 1][::35])

    def run(**settings):
        places = {"teacher": str(micro / "teacher"), "teacher_bits": 32, "questions": "heldout.jsonl", "max_new_tokens": LIMITS}
        return distill_app.evaluate_student(small_run["checkpoint"], **{**places, "speed_runs": 0, **settings})

    return run


def test_a_student_is_examined_beside_its_teacher_and_what_it_was(evaluation, project, small_run, capsys):
    found = evaluation().to_dict()
    assert list(found["models"]) == ["teacher", "before_system1", "system1"]
    teacher, student = (found["models"][name]["quality"]["system1"] for name in ("teacher", "system1"))
    assert teacher["exact_match"]["value"] > 0.95 and teacher["n"] == student["n"] == 40
    assert teacher["perplexity"]["value"] < student["perplexity"]["value"] and 0 < student["agreement"]["value"] < 1
    system = found["systems"]["system1"]
    assert system["headline"] == "exact_match" and system["questions"]["leakage"]["checked_against"] == 560
    assert system["training"]["rows"] == 500 and len(system["cases"]) == 40
    assert found["speed"] is None and found["speed_skipped"] == "it was not asked for"
    assert found["models"]["system1"]["disk_bytes"] == (project / small_run["checkpoint"] / "model.safetensors").stat().st_size
    page = (project / "reports" / "evaluation" / "report.html").read_text()
    assert "teacher → out" in page and store.read_json(project / "reports" / "evaluation" / "report.json")["title"] == "teacher → out"
    kept = store.read_json(small_run["run"] / "evaluation.json")
    assert kept["quality"] == student and kept["retained"] == system["retained"]
    # a second one asks and reads nothing
    capsys.readouterr()
    again = evaluation().to_dict()
    said = capsys.readouterr().out
    assert "Asking" not in said and "Reading" not in said and again["systems"]["system1"]["retained"] == system["retained"]


@pytest.mark.slow
def test_the_speed_of_teacher_and_student_stands_in_the_report(evaluation):
    found = evaluation(speed_runs=2).to_dict()
    assert set(found["speed"]["models"]) == {"teacher 8-bit", "teacher 16-bit", "system1"}
    assert {target["met"] for target in found["targets"] if target["name"].startswith(("Speed", "95%"))} <= {True, False}


@pytest.mark.parametrize(
    ("checkpoints", "settings", "words"),
    [
        ([], {}, "no student to evaluate"),
        (["out", "out"], {}, "2 students of system1"),
        (["teacher"], {"mode": "system1"}, "Give before = its base model"),
        (["teacher"], {"mode": "system1", "before": "teacher", "teacher": None}, "do not say who their teacher is"),
        (["out"], {"limit": -1, "seed": -1, "speed_runs": -2, "teacher_bits": 5}, "4 problems in the evaluation"),
        (["out"], {"max_new_tokens": 60}, "max_new_tokens = 60"),
        (["out"], {"benchmarks": ("a/b",)}, "is no name of a task"),
        (["out", "out"], {"before": "teacher"}, "mode and before are of one student"),
        (["teacher"], {"mode": "system1", "before": "gone"}, "was before its training cannot be asked"),
        (["out"], {"questions": {"system2": "x"}}, "no file for system1"),
    ],
)
def test_what_cannot_be_examined_is_refused_before_anybody_is_asked(project, small_run, micro, checkpoints, settings, words):
    shutil.copytree(small_run["checkpoint"], project / "out")
    shutil.copytree(micro / "teacher", project / "teacher")
    before = sorted(project.rglob("*"))
    settings = {"teacher": "teacher", "questions": micro / "heldout.jsonl", **settings}
    with pytest.raises(ConfigError, match=words):
        distill_app.evaluate_student(*checkpoints, **settings)
    assert sorted(project.rglob("*")) == before


def test_checkpoints_are_compared_with_the_first_of_them(project, micro):
    paths = {"whole": str(micro / "teacher"), "untrained": str(micro / "student_system1")}
    found = evaluate.compare_checkpoints(paths, "system1", micro / "heldout.jsonl", limit=20, max_new_tokens=12)
    assert found["whole"]["exact_match"]["value"] > 0.9 and found["whole"]["agreement"] is None
    assert found["untrained"]["agreement"]["value"] < 0.1


@pytest.mark.parametrize(
    ("given", "found"),
    [([], None), (["a.json"], "a.json"), (["system1=a", "system2=b"], {"system1": "a", "system2": "b"}), (["system2=b"], {"system2": "b"})],
)
def test_an_option_may_be_given_once_or_for_each_system(given, found):
    assert cli_evaluate.by_mode("--questions", given) == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--questions", "a", "--questions", "b"], "--questions: give it once for both systems"),
        (["--max-tokens", "many"], "--max-tokens many: give a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused_on_the_command_line(project, capsys, arguments, words):
    assert main(["evaluate", "nowhere", *arguments]) == 1
    assert words in capsys.readouterr().err
