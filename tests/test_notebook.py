"""The notebook as it is committed, and what it calls: the choice of models, the token, and what is shown."""

import ast
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_benchmark

from distill import choice, console, notebook, prompt, store
from distill.choice import Wanted, choose
from distill.errors import ConfigError, DataError
from distill.notebook import Machine

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [(number, "".join(cell["source"])) for number, cell in enumerate(CELLS) if cell["cell_type"] == "code"]
FIELDS = """
    LAB_REPO PERSIST_TO TEACHER_MODEL STUDENT_SYS1 STUDENT_SYS2 FULL_RUN USE_MICRO_WORLD DATASET_SLICE_SYS1 DATASET_SLICE_SYS2 ROWS_SYS2
    RV_MIN RV_MAX CD_MIN CD_MAX LONG_SHARE EPOCHS_SYS1 EPOCHS_SYS2 BACKEND TEACHER ENDPOINT_URL ENDPOINT_MODEL COMPARE_PROMPTS RATINGS
""".split()  # noqa: SIM905
SECRET = "hf_aSecretThatNobodyMayRead"


# The notebook's file


@pytest.mark.parametrize("number, source", CODE)
def test_a_cell_is_short_and_holds_no_logic(number, source):
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Try, ast.For, ast.While, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, forbidden)]
    assert len(source.splitlines()) <= 15


@pytest.mark.parametrize("number, source", CODE)
def test_above_each_code_cell_stand_a_simple_and_a_technical_sentence(number, source):
    above = CELLS[number - 1]
    text = "".join(above["source"])
    assert above["cell_type"] == "markdown" and "*In short:*" in text and "*Technically:*" in text


def test_the_notebook_is_committed_without_outputs():
    assert len(CODE) > 10
    assert not [number for number, _ in CODE if CELLS[number]["outputs"] or CELLS[number]["execution_count"]]


@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_is_a_field_of_colabs_form(field):
    lines = [line for _, source in CODE for line in source.splitlines() if re.match(rf"{field} = .*# @param ", line)]
    assert len(lines) == 1


def test_the_first_lines_say_what_to_expect():
    text = "".join(CELLS[0]["source"])
    assert "Run all" in text and "GPU" in text and "minutes" in text and "GiB" in text


def test_badge_and_repository_name_the_same_owner():
    owner = re.search(r'LAB_REPO = "https://github.com/([^"]+)"', CODE[0][1])[1]
    assert f"colab.research.google.com/github/{owner}/blob/" in "".join(CELLS[0]["source"])


def test_the_form_offers_the_defaults_of_the_lab():
    values = {}
    for _, source in CODE:
        if "# @param" in source and "LAB_REPO" not in source:
            exec(source, values)
    wanted = Wanted()
    assert (values["TEACHER_MODEL"], values["STUDENT_SYS1"]) == (wanted.teacher_model, wanted.student_system1)
    assert values["STUDENT_SYS2"] == wanted.student_system2 and values["ROWS_SYS2"] == wanted.rows_system2
    assert (values["DATASET_SLICE_SYS1"], values["DATASET_SLICE_SYS2"]) == (wanted.slice_system1, wanted.slice_system2)


# Which models


@pytest.mark.parametrize(
    "gpu, hub, asked, micro",
    [
        (True, True, "auto", False),
        (False, False, "auto", True),
        (False, True, "auto", True),
        (True, True, "yes", True),
        (True, False, "yes", True),
        (False, False, "yes", True),
        (True, True, "no", False),
        (True, False, "no", False),
        (False, True, "no", False),
        (False, False, "no", False),
    ],
)
def test_the_choice_follows_gpu_hub_and_wish(gpu, hub, asked, micro):
    chosen = choose(gpu, hub, Wanted(use_micro_world=asked))
    assert ("micro" in chosen.system1["preset"]) == ("micro" in chosen.system2["preset"]) == micro
    assert str(choice.MICRO) in chosen.compare["teacher_path"] if micro else chosen.compare["teacher_path"] == Wanted().teacher_model
    assert "micro world is used" in chosen.notes[0] if micro else "Models of the form" in chosen.notes[0]


def test_a_gpu_without_hub_is_an_error_that_names_both_choices():
    with pytest.raises(ConfigError, match="Turn the network on") as error:
        choose(True, False, Wanted())
    assert "USE_MICRO_WORLD = 'yes'" in str(error.value)


def test_a_gpu_without_hub_takes_the_forms_models_where_they_are_here(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "is_here", lambda name: name.startswith("Qwen/"))
    gpu = {"name": "T4", "gib": 14.6, "free_gib": 14.5, "capability": "7.5"}
    assert notebook.choose_models(Machine(gpu, False, {})).system1["student_model"] == Wanted().student_system1
    assert "a GPU is there, and so are the models" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Turn the network on"):
        notebook.choose_models(Machine(gpu, False, {}), student_system2="Elsewhere/Qwen")


@pytest.mark.parametrize("wrong", ["Yes", "", None, True])
def test_another_value_of_the_field_is_an_error(wrong):
    with pytest.raises(ConfigError, match="USE_MICRO_WORLD"):
        choose(False, False, Wanted(use_micro_world=wrong))


def test_the_micro_world_says_what_stands_in_place_of_what():
    notes = "\n".join(choose(False, True, Wanted()).notes)
    assert "takes hours" in notes
    for theirs, ours in (("Qwen2.5-7B", "micro/teacher"), ("Qwen2.5-0.5B", "student_system1"), ("Qwen2.5-1.5B", "student_system2")):
        assert re.search(f"{re.escape(theirs)}.*→.*{ours}", notes)
    assert re.search(r"DistilQwen_100k.*→.*distilqwen.parquet", notes) and re.search(r"OmniThought.*→.*omnithought.parquet", notes)


def test_without_gpu_the_forced_qwen_models_come_with_a_warning():
    assert any("takes hours" in note for note in choose(False, True, Wanted(use_micro_world="no")).notes)


def test_a_short_run_caps_rows_and_epochs_and_a_full_one_takes_the_forms():
    wanted = Wanted(use_micro_world="no", rows_system2=500, epochs_system1=4, epochs_system2=5)
    short, full = choose(True, True, wanted), choose(True, True, replace(wanted, full_run=True))
    assert (short.data_system1["rows"], short.data_system2["rows"]) == (200, 100)
    assert (short.system1["num_epochs"], short.system2["num_epochs"]) == (1, 1)
    assert (full.data_system1["rows"], full.data_system2["rows"]) == (None, 500)
    assert (full.system1["num_epochs"], full.system2["num_epochs"]) == (4, 5)


@pytest.mark.parametrize("prompts", ["What is 17 + 25?", [{"text": "?"}], [""], [3]])
def test_prompts_that_cannot_be_asked_are_refused_before_anything_is_trained(prompts):
    with pytest.raises(ConfigError, match="COMPARE_PROMPTS"):
        choose(True, True, Wanted(compare_prompts=prompts))


def test_the_teacher_may_reason_as_long_as_its_student():
    assert choose(True, True, Wanted()).compare["max_tokens_teacher"] == 1024


def test_a_short_run_asks_for_no_more_than_the_form():
    wanted = Wanted(use_micro_world="no", rows_system2=7)
    assert choose(True, True, wanted).data_system2["rows"] == 7


@pytest.mark.parametrize("micro", ["yes", "no"])
def test_a_local_teacher_labels_and_writes_traces_where_asked(micro):
    chosen = choose(True, True, Wanted(use_micro_world=micro, teacher="local-8bit"))
    assert chosen.data_system1["relabel_with_teacher"] is True
    assert chosen.data_system1["teacher_model"] == chosen.traces["teacher_model"] == chosen.compare["teacher_path"]


@pytest.mark.parametrize("micro", ["yes", "no"])
def test_the_data_sets_own_answers_need_no_teacher(micro):
    chosen = choose(True, True, Wanted(use_micro_world=micro))
    assert "teacher_model" not in chosen.data_system1 and chosen.traces is None


def test_an_endpoint_is_asked_for_the_model_of_the_form():
    served = choose(True, True, Wanted(teacher="endpoint")).traces["teacher_model"]
    assert (served.model, served.base_url) == ("Qwen/Qwen2.5-7B-Instruct", None)
    there = Wanted(teacher="endpoint", endpoint_url="http://127.0.0.1:9/v1", endpoint_model="big")
    asked = choose(True, True, there).data_system1["teacher_model"]
    assert (asked.model, asked.base_url) == ("big", "http://127.0.0.1:9/v1")


def test_a_server_on_a_cpu_is_asked_for_little_unless_the_full_run_is_wanted():
    short, full = (choose(False, False, Wanted(teacher="endpoint", full_run=full)) for full in (False, True))
    assert (short.data_system1["relabel_with_teacher"], short.traces["rows"]) == (200, 60)
    assert any("200 labels and 60 traces" in note for note in short.notes)
    assert (full.data_system1["relabel_with_teacher"], full.traces["rows"]) == (True, None)


@pytest.mark.parametrize("backend", ["auto", "easydistill", "builtin"])
@pytest.mark.parametrize("micro", ["yes", "no"])
def test_the_backend_of_the_form_trains_both_students(micro, backend):
    chosen = choose(True, True, Wanted(use_micro_world=micro, backend=backend))
    assert chosen.system1["backend"] == chosen.system2["backend"] == backend
    assert chosen.system1.get("group_by_length") is (False if backend == "easydistill" else None)


def test_the_forms_mistakes_are_named_together():
    wanted = Wanted(use_micro_world="maybe", backend="easydistil", teacher="api", endpoint_url="http://x/v1")
    with pytest.raises(ConfigError) as raised:
        choose(True, True, wanted)
    for line in (
        "USE_MICRO_WORLD = 'maybe': is not one of auto, yes, no.",
        "BACKEND = 'easydistil': is not one of auto, easydistill, builtin. Did you mean easydistill?",
        "TEACHER = 'api': is not one of dataset, local-8bit, endpoint.",
        "ENDPOINT_URL = 'http://x/v1': has no effect under TEACHER = 'api'",
    ):
        assert line in str(raised.value)


def test_every_choice_names_settings_that_exist():
    import inspect

    from distill.compare import compare_models
    from distill.config import resolve
    from distill.data import prepare_system1_dataset
    from distill.own_traces import write_traces
    from distill.traces import prepare_system2_dataset

    for micro in ("yes", "no"):
        chosen = choose(True, True, Wanted(use_micro_world=micro, teacher="local-8bit", backend="easydistill"))
        inspect.signature(prepare_system1_dataset).bind(**chosen.data_system1)
        inspect.signature(prepare_system2_dataset).bind(**chosen.data_system2)
        inspect.signature(write_traces).bind(**chosen.traces)
        inspect.signature(compare_models).bind(**chosen.compare)
        for settings, prepared in ((chosen.system1, "data/train_labeled.json"), (chosen.system2, "data/omnithought_cot.json")):
            assert resolve(settings, preset="system1").values["labeled_path"] == str(store.resolve(prepared))


def test_choose_models_says_its_notes(capsys):
    notebook.choose_models(Machine(None, False, {}))
    assert "The micro world is used" in capsys.readouterr().out


# The machine


@pytest.fixture
def colab(monkeypatch):
    """A google.colab whose secrets a test sets; HF_TOKEN unset before and after."""
    google, package, errors, userdata = (ModuleType(f"google{name}") for name in ("", ".colab", ".colab.errors", ".colab.userdata"))
    errors.Error = type("Error", (Exception,), {})
    userdata.SecretNotFoundError = type("SecretNotFoundError", (errors.Error,), {})
    userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})
    google.colab, package.errors, package.userdata = package, errors, userdata
    for module in (google, package, errors, userdata):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("HF_TOKEN", "")
    return userdata


def refusing(error):
    def get(key):
        raise error(key)

    return get


def set_up(monkeypatch, gpu: dict | None = None, fetched: list | None = None) -> Machine:
    """Run the set-up cell; nothing is installed. `fetched` takes the versions of EasyDistill that were asked for."""
    from distill import environment

    monkeypatch.setattr(notebook, "setup_easydistill", (fetched if fetched is not None else []).append)
    monkeypatch.setattr(environment, "setup_engine", lambda: sys.executable)
    monkeypatch.setattr(environment, "probe", lambda python: {"gpu": gpu, "versions": {"torch": "2.11"}, "python": "3.13.1"})
    monkeypatch.setattr(notebook, "hub_answers", lambda: False)
    return notebook.setup_lab()


def test_the_set_up_cell_fetches_what_trains_and_an_endpoint_what_asks(monkeypatch):
    fetched = []
    machine = set_up(monkeypatch, fetched=fetched)
    assert fetched == [1]
    notebook.choose_models(machine)
    assert fetched == [1]
    notebook.choose_models(machine, teacher="endpoint")
    assert fetched == [1, 2]


def test_the_token_is_taken_from_colabs_secrets_and_never_shown(colab, monkeypatch, capsys):
    colab.get = {"HF_TOKEN": f" {SECRET}\n"}.__getitem__
    machine = set_up(monkeypatch)
    shown = capsys.readouterr()
    assert os.environ["HF_TOKEN"] == SECRET
    assert "HF_TOKEN: from Colab's secrets" in shown.out
    assert SECRET not in shown.out + shown.err + repr(machine)


def test_no_error_of_a_model_that_is_not_there_shows_the_token(colab, monkeypatch, capsys):
    colab.get = {"HF_TOKEN": SECRET}.__getitem__
    set_up(monkeypatch)
    with pytest.raises(ConfigError) as error:
        notebook.ask_student("no-such-owner/no-such-model", "?")
    assert SECRET not in "".join([str(error.value), repr(error.value.__cause__), *capsys.readouterr()])


def test_unwatched_where_colab_waits_in_vain_for_a_click_the_lab_goes_on(colab, monkeypatch, capsys):
    colab.TimeoutException = type("TimeoutException", (Exception,), {})
    colab.get = refusing(colab.TimeoutException)
    set_up(monkeypatch)
    assert "TimeoutException" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["SecretNotFoundError", "NotebookAccessError"])
def test_a_missing_secret_is_said_and_no_error(colab, monkeypatch, capsys, kind):
    colab.get = refusing(getattr(colab, kind))
    set_up(monkeypatch)
    assert kind in capsys.readouterr().out and os.environ["HF_TOKEN"] == ""


def test_set_up_says_what_the_machine_is(monkeypatch, capsys):
    gpu = {"name": "Tesla T4", "gib": 14.6, "capability": "7.5"}
    assert set_up(monkeypatch, gpu) == Machine(gpu, False, {"torch": "2.11"})
    shown = capsys.readouterr().out
    assert "GPU: Tesla T4, 14.6 GiB, compute capability 7.5\n" in shown and "model hub: cannot be reached" in shown
    assert "Python 3.13.1, torch 2.11\n" in shown and "memory at the start: " in shown


def test_a_token_of_the_environment_stays(colab, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    colab.get = refusing(AssertionError)
    set_up(monkeypatch)
    assert os.environ["HF_TOKEN"] == "hf_other" and "hf_other" not in capsys.readouterr().out


def test_a_hub_that_is_off_or_silent_is_no_hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert notebook.hub_answers() is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert notebook.hub_answers() is False


@pytest.mark.parametrize("body, hub", [(b'[{"id": "a/b"}]', True), (b"<html>blocked</html>", False), (b'{"error": 1}', False)])
def test_only_a_hubs_answer_makes_a_hub(monkeypatch, body, hub):
    import io
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(body))
    assert notebook.hub_answers() is hub


def test_memory_is_said_in_gib(capsys, monkeypatch):
    monkeypatch.setattr(notebook, "memory_gib", lambda: {"GPU": (0.5, 15.0), "RAM": (2.0, 12.7)})
    notebook.show_memory("before")
    assert capsys.readouterr().out == "memory before: GPU 0.5 of 15.0 GiB used; RAM 2.0 of 12.7 GiB used\n"


def test_the_gpus_memory_is_what_its_driver_says(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '512, 15360'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert notebook.memory_gib()["GPU"] == (0.5, 15.0)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert "GPU" not in notebook.memory_gib()


# What is shown


def rendered(tmp_path, student, instruction, output, mode="system1", **settings):
    path = store.write_json(tmp_path / "rows.json", [{"instruction": instruction, "output": output}])
    return notebook.show_training_row(path, student, mode, **settings)


@pytest.fixture
def student(micro):
    return str(micro / "student_system1")


def test_a_rendered_row_is_the_trained_tokens(tmp_path, student, tokenizer):
    row = rendered(tmp_path, student, "Is 12 even?", "even")
    ids, mask = prompt.trained_ids(tokenizer, "Is 12 even?", "even")
    assert "".join(text for text, _ in row.pieces) == tokenizer.decode(ids)
    assert row.counts == {"asked": mask.count(0), "supervised": mask.count(1)}
    assert "".join(text for text, learnt in row.pieces if learnt) == "even<|im_end|>"
    assert re.search(r"supervised, \d+ tokens:\neven<\|im_end\|>$", repr(row))


def test_supervised_tokens_are_marked_and_nothing_else(tmp_path, student):
    page = rendered(tmp_path, student, "Is 12 even?", "even")._repr_html_()
    tokens = re.findall(r'<bdi style="background:([^;]+);[^>]*>(.*?)</bdi>', page, re.S)
    marked = "".join(text for color, text in tokens if color == notebook.COLORS[True])
    assert marked == "even&lt;|im_end|&gt;" and any(color == notebook.COLORS[False] for color, _ in tokens)


def test_hostile_text_stays_text(tmp_path, student):
    hostile = "<script>alert(1)</script> <|im_end|> \x1b[31m \u202e {{ x }}"
    row = rendered(tmp_path, student, hostile, hostile)
    assert "<script" not in row._repr_html_() and "\x1b" not in repr(row) + row._repr_html_() and "\u202e" not in repr(row)


def test_a_character_of_several_tokens_is_shown_whole(tmp_path, student):
    row = rendered(tmp_path, student, "😀 سلام", "日本")
    assert "".join(text for text, learnt in row.pieces if learnt).startswith("日本")
    assert not any("\ufffd" in text for text, _ in row.pieces)


def test_a_long_row_is_shown_from_both_ends(tmp_path, student):
    row = rendered(tmp_path, student, "Add.", "<think>\n" + "1+1=2\n" * 500 + "</think>\n\n2", "system2", limit_tokens=100)
    text = "".join(text for text, _ in row.pieces)
    assert len(row.pieces) == 101 and "more…]" in text and text.endswith("2<|im_end|>") and row.counts["supervised"] > 1000


def test_a_file_without_rows_is_an_error(tmp_path, student):
    with pytest.raises(DataError, match="is empty"):
        notebook.show_training_row(store.write_json(tmp_path / "rows.json", []), student, "system1")


@pytest.mark.parametrize("checkpoint", ["no/such/folder", "data"])
def test_the_losses_of_no_checkpoint_are_an_error(checkpoint):
    with pytest.raises(ConfigError, match="holds no distill_run.json"):
        notebook.plot_loss(checkpoint)


def test_the_losses_are_the_runs_own(small_run):
    losses = notebook.read_losses(small_run["checkpoint"])
    lines = [json.loads(line) for line in (small_run["run"] / "metrics.jsonl").read_text().splitlines()]
    assert losses["training"] == [(line["step"], line["loss"]) for line in lines if "loss" in line] != []
    assert losses["validation"] == [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] != []


def test_the_figure_shows_both_losses(small_run, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    (axes,) = notebook.plot_loss(small_run["checkpoint"]).axes
    losses = notebook.read_losses(small_run["checkpoint"])
    assert [list(line.get_ydata()) for line in axes.lines] == [[loss for _, loss in points] for points in losses.values()]
    assert "nats" in axes.get_ylabel()


def test_a_student_answers_in_a_process_of_its_own(student, project):
    answer = notebook.ask_student(student, "Is 12 even?", max_new_tokens=5)
    assert 0 < answer.tokens <= 5 and answer.seconds > 0 and answer.facts in answer._repr_html_()


@pytest.mark.parametrize("mode", ["system3", None])
def test_another_mode_is_an_error(student, mode):
    with pytest.raises(ConfigError, match="is not one of system1, system2"):
        notebook.ask_student(student, "?", mode)


def test_an_answer_is_escaped_and_its_reasoning_folded():
    answer = notebook.StudentAnswer("<b>?</b>", "<i>think</i>\x1b[0m", "<u>4</u>", 3, 0.5, True)
    page = answer._repr_html_()
    assert not re.search(r"<[iu]>|\x1b", page) and "<details open>" in page and "&lt;u&gt;4" in page
    assert "\x1b" not in repr(answer) and "3 tokens in 0.50 s; stopped by itself" in repr(answer)


def test_an_answer_without_reasoning_has_nothing_to_fold():
    answer = notebook.StudentAnswer("?", "", "4", 3, 0.5, False)
    assert "<details" not in answer._repr_html_() and "[reasoning]" not in repr(answer) and "cut off" in repr(answer)


# In a notebook


def test_a_bar_is_drawn_in_place(monkeypatch):
    """One display, changed while the work goes on, whatever the number of updates."""
    import IPython.display

    shown, updates = [], []
    place = type("Place", (), {"update": lambda self, bundle, raw: updates.append(bundle["text/plain"])})()
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw, display_id: shown.append(bundle) or place)
    monkeypatch.setattr(console, "in_notebook", lambda: True)
    monkeypatch.setattr(console, "NOTEBOOK_SECONDS", 0.05)
    with console.progress("Training", total=2000) as update:
        for step in range(2000):
            update(step + 1, note=f"loss {step}")
    assert len(shown) == 1 and 1 <= len(updates) < 100
    assert "Training" in updates[-1] and "2000/2000" in updates[-1] and "loss 1999" in updates[-1] and "left" in updates[-1]


# Executing it


@pytest.fixture(scope="module")
def runner():
    return load_benchmark("run_notebook")


def write_notebook(folder: Path, *sources: str) -> Path:
    import nbformat

    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    return folder


def test_execution_sets_a_field_and_keeps_what_cells_show(runner, tmp_path):
    folder = write_notebook(tmp_path, 'NAME = "auto"  # @param {type:"string"}', "print(NAME)")
    assert runner.run(folder, tmp_path / "out", {"NAME": "another"}) == 0
    assert "another\n" in (tmp_path / "out" / "notebook.ipynb").read_text().replace("\\n", "\n")
    assert "another" in (tmp_path / "out" / "notebook.html").read_text()
    assert "another" not in (folder / "notebook.ipynb").read_text()


def test_a_cell_that_fails_ends_the_execution_with_an_error(runner, tmp_path, capsys):
    folder = write_notebook(tmp_path, "raise ValueError('what went wrong')", "print('never')")
    assert runner.run(folder, tmp_path / "out", {}) == 1
    assert "what went wrong" in capsys.readouterr().err
    page = (tmp_path / "out" / "notebook.html").read_text()
    assert "what went wrong" in page


@pytest.mark.parametrize("fields", [{"NO_SUCH": "x"}, {"NUMBER": "x"}])
def test_only_a_text_field_can_be_set(runner, tmp_path, fields):
    folder = write_notebook(tmp_path, "NUMBER = 3")
    with pytest.raises(SystemExit, match="must be one once"):
        runner.run(folder, tmp_path / "out", fields)


def test_the_copy_to_run_in_is_the_project_without_what_runs_made(runner, tmp_path):
    copy = runner.copy_project(tmp_path / "lab")
    assert (copy / "notebook.ipynb").is_file() and (copy / "data" / "micro" / "teacher").is_dir()
    assert not [path for path in (copy / "data").iterdir() if path.is_file()]
    assert not any((copy / name).exists() for name in (".git", ".venv", ".train-env", "runs", "reports"))


# What is asked at the end


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("train[:1000]", "train[1000:1200]"),
        ("train[500:1500]", "train[1500:1700]"),
        ("train[10%:20%]", "train[20%:21%]"),
        ("train", None),
        ("train[5:]", None),
        ("train[:100%]", None),
        ("train[:-5]", None),
    ],
)
def test_held_out_rows_follow_those_of_the_training(text, behind):
    from distill.sources import following

    assert following(text, 200) == behind


def test_held_out_questions_are_never_rows_of_the_training_slice():
    chosen = choose(True, True, Wanted(full_run=True))
    assert chosen.heldout["system1"] == {"slice_str": "train[1000:1200]", "rows": 200, "validation": 0}
    assert chosen.heldout["system2"]["slice_str"] == "train[20000:21000]" and chosen.evaluation["limit"] == 200
    assert choose(True, True, Wanted(slice_system1="train")).heldout is None
    micro = choose(False, False, Wanted())
    assert set(micro.heldout) == {"system1", "system2"} and all(Path(place).is_file() for place in micro.heldout.values())


def test_held_out_files_are_prepared_where_they_have_to_be(project, micro):
    chosen = choose(True, True, Wanted(slice_system1="train[:300]", slice_system2="train[:50]"))
    sources = {"system1": str(micro / "distilqwen.parquet"), "system2": str(micro / "omnithought.parquet")}
    heldout = {mode: {**given, "source": sources[mode], "rows": 5} for mode, given in chosen.heldout.items()}
    heldout["system2"] |= {"student_model": str(micro / "student_system2")}
    places = notebook.prepare_heldout(replace(chosen, heldout=heldout))
    assert [Path(place).name for place in places.values()] == ["heldout_system1.json", "heldout_system2.json"]
    assert [len(list(store.read_rows(place))) for place in places.values()] == [5, 5]
    assert notebook.prepare_heldout(replace(chosen, heldout=None)) is None


def test_where_nothing_lies_behind_the_training_slice_the_validation_rows_are_asked(project, micro, capsys):
    behind = {"slice_str": "train[900000:900100]", "source": str(micro / "distilqwen.parquet"), "rows": 5, "validation": 0}
    heldout = {"system1": behind, "system2": str(micro / "heldout.jsonl")}
    places = notebook.prepare_heldout(replace(choose(False, False, Wanted()), heldout=heldout))
    assert places == {"system1": None, "system2": str(micro / "heldout.jsonl")}
    assert "system1 is asked the validation rows of its data" in capsys.readouterr().out
