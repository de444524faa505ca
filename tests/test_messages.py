"""Every bad input on the command line: its message, exit status 1, no traceback, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_benchmark

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def lab_of_our_own(tmp_path_factory):
    """Run the commands in a copy of the lab: `runs/` and `reports/` of whoever runs the tests stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", load_benchmark("bench_resume").make_lab(tmp_path_factory.mktemp("copy") / "lab"))
        yield


def lab(*arguments, cwd=None, app=None, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, str(app or ROOT / "distill_app.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})


def tree(*folders: Path) -> set[str]:
    found = {path for folder in folders for path in folder.rglob("*") if ".venv" not in path.parts and ".git" not in path.parts}
    return {str(path) for path in found if "__pycache__" not in path.parts}


@pytest.fixture
def refused(tmp_path):
    """Run a command that must fail; returns its message after checking that it left nothing."""

    def run(*arguments, **environment) -> str:
        watched = (tmp_path, ROOT)
        before = tree(*watched)
        done = lab(*arguments, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert tree(*watched) == before
        return done.stderr

    return run


def prepare(tmp_path, source, *more):
    places = ("--out-labeled", tmp_path / "out" / "labeled.json", "--out-instructions", tmp_path / "out" / "instructions.json")
    return ("prepare-system1", "--source", source, *places, *more)


def system1(tmp_path, labeled, **settings):
    values = {
        "preset": "micro_system1",
        "labeled_path": labeled,
        "out_dir": tmp_path / "new" / "student",
        "config_path": tmp_path / "job.json",
    }
    values |= settings
    return ("system1", *[part for name, value in values.items() for part in ("--set", f"{name}={value}")])


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"instruction": "Is 1234 even or odd?", "output": "even"}, {"instruction": "Is 1235 even or odd?", "output": "odd"}])
    )
    return path


NO_DATA = "No data for System 1 distillation"
BAD_FILES = {
    "empty": ("", "empty"),
    "not_json": ("hello", "not a JSON list"),
    "cut": ('[{"instruction": "a", "output": "b"}, {"instr', "breaks off"),
    "empty_list": ("[]", "empty"),
    "no_output": ('[{"instruction": "a"}]', "output"),
    "blank_output": ('[{"instruction": "a", "output": " "}]', "output"),
    "wrong_columns": ('[{"question": "a", "answer": "b"}]', "instruction"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_labelled_file_is_refused(case, tmp_path, refused):
    text, word = BAD_FILES[case]
    path = tmp_path / "bad.json"
    path.write_text(text)
    message = refused(*system1(tmp_path, path))
    assert NO_DATA in message and word in message and "bad.json" in message


def test_a_missing_labelled_file_is_refused_with_the_next_command(tmp_path, refused):
    message = refused(*system1(tmp_path, tmp_path / "nowhere.json"))
    assert NO_DATA in message and "does not exist" in message and "prepare-system1" in message


@pytest.mark.parametrize("case", [case for case in BAD_FILES if case != "blank_output"])
def test_a_bad_source_is_refused(case, tmp_path, refused):
    path = tmp_path / "bad.json"
    path.write_text(BAD_FILES[case][0])
    assert NO_DATA in refused(*prepare(tmp_path, path, "--slice", "train"))


def test_an_empty_slice_is_refused(tmp_path, rows, refused):
    message = refused(*prepare(tmp_path, rows, "--slice", "train[5:9]"))
    assert NO_DATA in message and "train[5:9]" in message


def test_a_missing_source_is_refused(tmp_path, refused):
    assert NO_DATA in refused(*prepare(tmp_path, tmp_path / "nowhere.parquet"))


def test_wrong_columns_are_refused_naming_those_that_are_there(tmp_path, refused):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    message = refused(*prepare(tmp_path, path, "--slice", "train"))
    assert NO_DATA in message and "'question', 'answer'" in message and "columns=" in message


def test_an_unknown_student_is_refused_with_an_example(tmp_path, rows, refused):
    message = refused(*system1(tmp_path, rows, student_model="./no/such/student"))
    assert "Invalid student model: " in message and "no/such/student" in message and "Example: Qwen/Qwen2.5-0.5B-Instruct" in message


def test_a_student_folder_without_weights_is_refused(tmp_path, rows, refused, micro):
    folder = tmp_path / "student"
    shutil.copytree(micro / "student_system1", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused(*system1(tmp_path, rows, student_model=folder))
    assert f"Invalid student model: {folder}" in message and "weights" in message


def test_a_student_whose_weights_are_garbage_is_refused(tmp_path, rows, refused, micro):
    folder = tmp_path / "student"
    shutil.copytree(micro / "student_system1", folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    message = refused(*system1(tmp_path, rows, student_model=folder))
    assert f"Invalid student model: {folder}" in message


def test_a_student_whose_tokenizer_is_garbage_is_refused(tmp_path, rows, refused, micro):
    folder = tmp_path / "student"
    shutil.copytree(micro / "student_system1", folder)
    (folder / "tokenizer.json").write_text("{}")
    assert f"Invalid student model: {folder}" in refused(*system1(tmp_path, rows, student_model=folder))


def test_a_job_place_that_holds_the_data_is_refused(tmp_path, rows, refused):
    kept = rows.read_text()
    assert "config_path" in refused(*system1(tmp_path, rows, config_path=rows))
    assert rows.read_text() == kept


# root may enter any folder unless it gives these two capabilities up
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root needs setpriv to give up entering any folder")
@pytest.mark.parametrize("setting", ["out_dir", "labeled_path", "config_path", "student_model"])
def test_places_that_this_user_may_not_enter_are_refused_in_words(setting, tmp_path, rows):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    command = [*(ORDINARY if os.geteuid() == 0 else []), sys.executable, str(ROOT / "distill_app.py")]
    arguments = system1(tmp_path, rows, **{setting: locked / "x" / "y.json"})
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    locked.chmod(0o700)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Permission denied" in done.stderr and "locked" in done.stderr


def test_a_hub_that_cannot_be_reached_blames_nobody(tmp_path, rows, refused):
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    message = refused(*system1(tmp_path, rows, student_model=name), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert f"Cannot reach the hub for {name}" in message and "Invalid" not in message


def test_an_unreachable_dataset_hub_is_named(tmp_path, refused):
    message = refused(*prepare(tmp_path, "alibaba-pai/DistilQwen_100k"), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert "Cannot reach the hub for alibaba-pai/DistilQwen_100k" in message


@pytest.mark.parametrize("place", ["/proc/nowhere/student", "{file}/student"])
def test_an_unwritable_output_folder_is_refused(place, tmp_path, rows, refused):
    assert "Cannot write" in refused(*system1(tmp_path, rows, out_dir=place.format(file=rows)))


def test_a_folder_of_other_work_is_not_replaced(tmp_path, rows, refused):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    assert "no checkpoint of the lab" in refused(*system1(tmp_path, rows, out_dir=tmp_path / "thesis"))


def test_all_wrong_settings_are_named_at_once_with_the_nearest_name(tmp_path, rows, refused):
    message = refused(*system1(tmp_path, rows, learnin_rate=1, max_length=0))
    assert (
        "2 problems" in message and "learnin_rate: no such setting. Did you mean learning_rate?" in message and "max_length = 0" in message
    )


def test_two_epoch_keys_are_refused(tmp_path, rows, refused):
    message = refused(*system1(tmp_path, rows, num_epochs=1, num_train_epochs=2))
    assert "num_epochs and num_train_epochs" in message


def test_a_max_length_below_every_row_is_refused_with_the_shortest(tmp_path, rows, refused):
    message = refused(*system1(tmp_path, rows, max_length=3))
    assert NO_DATA in message and "max_length = 3" in message and "shortest" in message


# System 2, labelling, comparison, chat


NO_DATA_2 = "No data for System 2 distillation"
THOUGHT = "<think>\n1+1=2\n</think>\n\n2"


def trace(**changes) -> dict:
    levels = {"Cognitive_Difficulty": {"judge": "j", "level": 3}, "Reasoning_Verbosity": {"judge": "j", "level": 4}}
    texts = {"full_response": THOUGHT, "solution": "2", "teacher": "t", "thought": "1+1=2", "thought_correctness_verify": True}
    return {**levels, **texts, **changes}


def prepare2(tmp_path, rows: list[dict], *more):
    source = tmp_path / "omni.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = ROOT / "data" / "micro" / "student_system2"
    return ("prepare-system2", "--source", source, "--student", student, "--slice", "train", "--out", tmp_path / "new" / "cot.json", *more)


GOOD = [{"question": "1+1?", "reasoning": [trace()]}]


def test_another_omnithought_schema_is_refused_with_the_row(tmp_path, refused):
    message = refused(*prepare2(tmp_path, [{"problem": "1+1?", "traces": ["2"]}]))
    assert "Unexpected OmniThought schema, please inspect omni[0]" in message and '"problem"' in message


def test_windows_that_keep_nothing_say_which_bound_to_widen(tmp_path, refused):
    message = refused(*prepare2(tmp_path, GOOD, "--rv-min", 6))
    assert NO_DATA_2 in message and "rv_min = 0 alone would bring 1 more" in message


def test_a_max_length_below_every_trace_says_what_would_do(tmp_path, refused):
    message = refused(*prepare2(tmp_path, GOOD, "--max-length", 8))
    assert NO_DATA_2 in message and "max_length = 8" in message and "the shortest correct trace needs max_length = " in message


def test_a_window_upside_down_is_refused(tmp_path, refused):
    assert "rv_min = 5 is above rv_max = 2" in refused(*prepare2(tmp_path, GOOD, "--rv-min", 5, "--rv-max", 2))


def test_a_missing_cot_file_is_refused_with_the_next_command(tmp_path, refused):
    message = refused("system2", "--set", "preset=micro_system2", "--set", f"cot_path={tmp_path / 'nowhere.json'}")
    assert NO_DATA_2 in message and "prepare-system2" in message


def test_a_comparison_without_one_model_skips_it_and_succeeds(tmp_path, micro):
    arguments = ("--teacher", micro / "teacher", "--system1", tmp_path / "none", "--system2", tmp_path / "none2", "--max-tokens-teacher", 8)
    done = lab("compare", "Tell me the parity of 4322.", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"Model not found at {tmp_path / 'none'}" in done.stdout.replace("\n", "") and "even" in done.stdout


def test_a_comparison_without_any_model_is_refused(tmp_path, refused):
    models = [part for name in ("teacher", "system1", "system2") for part in (f"--{name}", tmp_path / name)]
    assert f"Model not found at {tmp_path / 'teacher'}" in refused("compare", "Hello?", *models)


def test_a_comparison_without_prompts_is_refused(refused):
    assert "prompts" in refused("compare")


def test_chat_with_no_model_is_refused(tmp_path, refused):
    assert f"Model not found at {tmp_path / 'none'}" in refused("chat", tmp_path / "none")


def test_a_teacher_without_a_chat_template_cannot_label(tmp_path, rows, refused, micro):
    folder = tmp_path / "base"
    shutil.copytree(micro / "teacher", folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert "has no chat template" in refused("label", rows, "--teacher", folder, "--out", tmp_path / "new.json")


def test_labelling_a_file_from_the_command_line(tmp_path, micro):
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Tell me the parity of {number}."}) + "\n" for number in (1234, 1235)))
    done = lab("label", rows, "--teacher", micro / "teacher", "--out", tmp_path / "labeled.json", "--max-new-tokens", 12, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 2
    assert [row["output"] for row in json.loads((tmp_path / "labeled.json").read_text())] == ["even", "odd"]


def test_system2_from_the_command_line_learns_whole_traces(tmp_path, micro):
    prepared = lab(
        "prepare-system2", "--source", micro / "omnithought.parquet", "--student", micro / "student_system2", "--rows", 40, "--rv-max", 2,
        "--out", tmp_path / "cot.json", "--json",
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads(prepared.stdout)["kept"] == 38
    places = {"cot_path": tmp_path / "cot.json", "out_dir": tmp_path / "out", "config_path": tmp_path / "job.json", "num_epochs": 1}
    done = lab("system2", "--preset", "micro_system2", "--json", *[part for name in places for part in ("--set", f"{name}={places[name]}")])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "distill_run.json").read_text())["mode"] == "system2"


def test_the_error_is_json_where_json_is_asked_for(tmp_path):
    done = lab("system1", "--json", "--set", "max_length=0")
    assert done.returncode == 1 and json.loads(done.stdout)["error"]["type"] == "ConfigError"


def test_json_output_is_json_alone(tmp_path, rows):
    done = lab(*prepare(tmp_path, rows, "--slice", "train", "--json"))
    assert done.returncode == 0 and json.loads(done.stdout)["kept"] == 1


def test_relative_paths_count_from_the_project_even_where_its_name_has_spaces_and_quotes(tmp_path):
    clone = tmp_path / 'it\'s a "lab" $(touch pwned)'
    clone.mkdir()
    for part in ("distill", "configs", "data/micro", "distill_app.py", "requirements.txt", "constraints.txt"):
        source, copy = ROOT / part, clone / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    app = clone / "distill_app.py"
    prepared = lab("prepare-system1", "--source", "data/micro/distilqwen.parquet", "--slice", "train[:40]", cwd=tmp_path, app=app)
    assert prepared.returncode == 0, prepared.stderr
    assert (clone / "data" / "train_labeled.json").is_file()
    done = lab("system1", "--preset", "micro_system1", "--set", "num_epochs=1", "--json", cwd=tmp_path, app=app)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (Path(json.loads(done.stdout)["checkpoint"]) / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {clone.name}
