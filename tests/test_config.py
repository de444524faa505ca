"""Settings and jobs: every problem at once, nothing unknown let through, a job that EasyDistill's own files would recognise."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from distill import config, store
from distill.config import build_job, job_problems, read_job, resolve
from distill.errors import ConfigError, DataError

# The sections and keys of EasyDistill 1.0's own job files, configs/kd_*.json of its repository taken together.
EASYDISTILL_KD = {
    "dataset": {"instruction_path", "labeled_path", "logits_path", "template", "seed"},
    "inference": {
        "base_url", "api_key", "stream", "system_prompt", "enable_chunked_prefill", "seed", "gpu_memory_utilization", "temperature",
        "trust_remote_code", "enforce_eager", "max_model_len", "max_new_tokens", "top_logits_num",
    },
    "distillation": {"kd_ratio", "max_seq_length", "distillation_type"},
    "models": {"teacher", "student"},
    "training": {
        "output_dir", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "save_steps",
        "logging_steps", "learning_rate", "weight_decay", "warmup_ratio", "lr_scheduler_type",
    },
}  # fmt: skip
USER_PRESETS = [path.stem for path in sorted(config.PRESETS.glob("*.json")) if "student_model" in json.loads(path.read_text())]


def problems_of(user, preset="system1"):
    with pytest.raises(ConfigError) as caught:
        resolve(user, preset)
    return str(caught.value).split("\n  ")


# A user's settings


def test_all_problems_are_named_at_once_each_with_its_value_and_the_nearest_name(project):
    lines = problems_of(
        {"learnin_rate": 1, "max_length": 0, "student_modle": "x", "seed": -1, "lr_scheduler_type": "cosin", "backend": "gpu"}
    )
    assert lines[0] == "6 problems in your configuration"
    assert "learnin_rate: no such setting. Did you mean learning_rate?" in lines
    assert "student_modle: no such setting. Did you mean student_model?" in lines
    assert any(line.startswith("max_length = 0: lies outside 2 to ") and "Set 64 to 4096" in line for line in lines)
    assert any(line.startswith("seed = -1: lies outside 0 to ") for line in lines)
    assert any(line.startswith("lr_scheduler_type = 'cosin'") and "Did you mean cosine?" in line for line in lines)
    assert "backend = 'gpu': is not one of auto, easydistill, builtin." in lines


def test_a_name_that_is_near_nothing_gets_no_suggestion(project):
    assert problems_of({"zzzzqqqq": 1}) == ["1 problem in your configuration", "zzzzqqqq: no such setting."]


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_key_is_an_error_even_without_a_value(project, value):
    assert "learnin_rate: no such setting. Did you mean learning_rate?" in problems_of({"learnin_rate": value})


@pytest.mark.parametrize("key", [7, ("a",), None])
def test_a_key_that_is_no_text_is_an_error(project, key):
    assert f"{key}: no such setting." in problems_of({key: 1})


@pytest.mark.parametrize(("other", "name", "value"), [("num_epochs", "num_train_epochs", 2), ("cot_path", "labeled_path", "data/x.json")])
def test_both_names_of_a_setting_are_an_error_and_either_alone_is_the_same_setting(project, other, name, value):
    assert problems_of({other: value, name: value}) == [
        "1 problem in your configuration",
        f"{other} and {name} are one setting under two names: give only one.",
    ]
    found = [resolve(user, "system2") for user in ({other: value}, {name: value}, {other: None, name: value})]
    for settings in found:
        assert settings == found[0] and settings.origins[name] == "yours" and other not in settings.values
    assert found[0].values[name] in (value, str(project / str(value)))


BAD_VALUES = [
    ("max_length", True),
    ("max_length", 64.0),
    ("max_length", "64"),
    ("max_length", 1),
    ("max_length", 10**30),
    ("max_length", [64]),
    ("learning_rate", True),
    ("learning_rate", "2e-5"),
    ("learning_rate", math.nan),
    ("learning_rate", math.inf),
    ("learning_rate", -math.inf),
    ("learning_rate", 0),
    ("learning_rate", 1.5),
    ("num_epochs", 0),
    ("num_epochs", math.nan),
    ("seed", -1),
    ("seed", 2**32),
    ("weight_decay", -0.1),
    ("warmup_ratio", 1),
    ("per_device_train_batch_size", 0),
    ("gradient_accumulation_steps", 0),
    ("gradient_checkpointing", 1),
    ("bf16", 0),
    ("fp16", 1),
    ("lora_rank", -1),
    ("lora_rank", 8.0),
    ("packing", 1),
    ("sample_answers", 6),
    ("sample_answers", True),
    ("completion_only_loss", False),
    ("report_to", ["wandb"]),
    ("save_strategy", "never"),
    ("labeled_path", ""),
    ("labeled_path", " "),
    ("student_model", 5),
    ("out_dir", ["x"]),
    ("config_path", False),
    ("backend", ["auto"]),
    ("backend", "easydistil"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=str)
def test_a_value_of_the_wrong_type_or_range_is_the_one_problem(project, key, value):
    shown = {"num_epochs": "num_train_epochs"}.get(key, key)
    head, *lines = problems_of({key: value})
    assert head == "1 problem in your configuration"
    assert len(lines) == 1 and lines[0].startswith(f"{shown} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", 2),
        ("learning_rate", 1),
        ("learning_rate", 1e-9),
        ("num_epochs", 0.5),
        ("seed", 0),
        ("max_steps", -1),
        ("bf16", False),
        ("bf16", True),
        ("fp16", True),
        ("lora_rank", 1),
        ("lora_rank", 0),
        ("packing", True),
        ("sample_answers", 0),
        ("sample_answers", 5),
        ("out_dir", Path("x")),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(project, key, value):
    settings = resolve({key: value}, "system1")
    assert settings.origins[{"num_epochs": "num_train_epochs"}.get(key, key)] == "yours"


def test_a_warmup_of_yours_takes_the_place_of_the_presets_and_two_of_yours_are_an_error(project):
    values = resolve({"warmup_steps": 10}, "system1").values
    assert values["warmup_steps"] == 10 and "warmup_ratio" not in values
    assert any("give only one" in line for line in problems_of({"warmup_steps": 10, "warmup_ratio": 0.1}))


def test_saving_by_steps_needs_how_many(project):
    assert any("needs save_steps" in line for line in problems_of({"save_strategy": "steps"}))
    assert resolve({"save_strategy": "steps", "save_steps": 5}, "system1").values["save_steps"] == 5


def test_bf16_and_fp16_are_one_choice(project):
    assert any("give only one, or neither" in line for line in problems_of({"bf16": True, "fp16": True}))
    store.write_json("half.json", {**json.loads((config.PRESETS / "system1.json").read_text()), "bf16": True})
    assert "bf16" not in resolve({"fp16": True}, "half.json").values
    assert resolve({"fp16": False}, "half.json").values["bf16"] is True  # a false one takes no other's place


def test_lora_settings_without_lora_and_packing_with_length_groups_are_errors(project):
    for user in ({"lora_alpha": 8}, {"lora_dropout": 0.1}):
        (key, value), (_, line) = *user.items(), problems_of(user)
        assert line == f"{key} = {value!r}: has no effect without lora_rank; set that too, or drop it."
    both = problems_of({"packing": True, "group_by_length": True})
    assert both[1:] == ["packing and group_by_length both decide which rows train together: give only one."]


def test_packing_of_yours_takes_the_place_of_the_presets_length_groups(project):
    assert "group_by_length" not in resolve({"packing": True}, "micro_system1").values
    assert resolve({"packing": False}, "micro_system1").values["group_by_length"] is True


def test_a_rank_of_0_switches_the_presets_lora_off(project):
    store.write_json("lora.json", {**json.loads((config.PRESETS / "system2.json").read_text()), "lora_alpha": 8, "lora_dropout": 0.1})
    assert "lab" not in build_job(resolve({"lora_rank": 0}, "lora.json"), project / "tokens.json")


@pytest.mark.parametrize("user", [[1], "student_model=x", 5])
def test_a_configuration_that_is_no_dict_is_a_config_error(project, user):
    with pytest.raises(ConfigError, match=f"is a {type(user).__name__}; give a dict"):
        resolve(user, "system1")


def test_every_setting_says_where_it_came_from_and_none_means_the_presets(project):
    settings = resolve({"learning_rate": 1e-4, "seed": None, "preset": None}, "system1")
    assert settings.origins.keys() == settings.values.keys()
    assert settings.origins["learning_rate"] == "yours"
    assert settings.origins["seed"] == "preset system1"
    assert settings.values["seed"] == 42
    assert resolve(None, "system1").values == resolve({}, "system1").values


def test_the_users_dict_is_left_as_it_was(project):
    user = {"preset": "system1", "num_epochs": 2, "out_dir": "x", "template_path": "y.jinja"}
    before = dict(user)
    resolve(user, "system1")
    assert user == before


def test_a_template_path_is_accepted_and_noted_as_unused(project):
    settings = resolve({"template_path": "mine.jinja"}, "system1")
    assert "template_path" not in settings.values and "template_path" not in settings.origins
    assert "not used" in settings.notes[0]
    assert resolve({}, "system1").notes == []


def test_paths_are_absolute_and_count_from_the_root(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (project / "student").mkdir()
    values = resolve(
        {"labeled_path": "data/x.json", "out_dir": "./out", "config_path": str(tmp_path / "job.json"), "student_model": "student"},
        "system1",
    ).values
    assert values["labeled_path"] == str(project / "data" / "x.json")
    assert values["out_dir"] == str(project / "out")
    assert values["config_path"] == str(tmp_path / "job.json")
    assert values["student_model"] == str(project / "student")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B-Instruct", "gpt2", "a/b_c.d-e"])
def test_a_hub_name_stays_a_hub_name(project, name):
    assert config.model_name(name) == name


@pytest.mark.parametrize("name", ["./student", "a/b/c", "/abs/student", "-x/y", "../x", "a b/c"])
def test_what_cannot_be_a_hub_name_is_a_path(project, name):
    assert Path(config.model_name(name)).is_absolute()


# Presets


def test_there_are_presets_to_test():
    assert "system1" in USER_PRESETS


@pytest.mark.parametrize("name", USER_PRESETS)
def test_a_shipped_preset_is_valid_by_itself(project, name):
    settings = resolve({}, name)
    assert set(settings.origins.values()) == {f"preset {name}"}
    assert job_problems(build_job(settings, project / "tokens.json")) == []


def test_the_presets_are_the_designs():
    presets = {path.stem: json.loads(path.read_text()) for path in config.PRESETS.glob("*.json")}
    assert presets.keys() == {"system1", "system2", "micro_system1", "micro_system2"} == set(USER_PRESETS)
    system2 = presets["system2"]
    assert (system2["student_model"], system2["out_dir"]) == ("Qwen/Qwen2.5-1.5B-Instruct", "./distilled-qwen2.5-1.5b-cot")
    assert system2["config_path"] == "configs/kd_cot_qwen_1_5b.json" and system2["lora_rank"] and system2["gradient_checkpointing"]
    assert {presets[name]["cot_path"] for name in ("system2", "micro_system2")} == {"data/omnithought_cot.json"}


def test_an_unknown_preset_is_an_error_that_names_the_shipped_ones(project):
    with pytest.raises(ConfigError, match=r"preset = 'sistem1': there is no such preset. Did you mean \w*system1\? Shipped: .*system1"):
        resolve({"preset": "sistem1"}, "system1")
    with pytest.raises(ConfigError, match="no such preset"):
        resolve({"preset": "none/of/these.json"}, "system1")


@pytest.mark.parametrize("key", ["preset", "student_model", "out_dir", "labeled_path", "config_path"])
def test_a_name_too_long_for_any_disk_is_a_config_error(project, key):
    with pytest.raises(ConfigError, match="is no path: a name in it is longer than 255 bytes"):
        resolve({key: "n" * 300}, "system1")


@pytest.mark.parametrize(
    ("text", "error", "words"), [("[]", ConfigError, "no JSON object"), ("{", DataError, "mine.json cannot be read as JSON")]
)
def test_a_preset_file_that_is_no_object_is_an_error_that_names_it(project, text, error, words):
    (project / "mine.json").write_text(text)
    with pytest.raises(error, match=words):
        resolve({"preset": "mine.json"}, "system1")


def test_problems_of_a_users_own_preset_are_named_too(project):
    (project / "mine.json").write_text('{"student_model": "a/b", "learning_rte": 1, "num_epochs": 1, "num_train_epochs": 1}')
    lines = problems_of({"preset": "mine.json"})
    assert lines[0] == f"{len(lines) - 1} problems in preset mine.json"
    assert "learning_rte: no such setting. Did you mean learning_rate?" in lines
    assert "num_epochs and num_train_epochs are one setting under two names: give only one." in lines
    assert {f"{key}: is needed and has no value." for key in ("labeled_path", "out_dir", "config_path", "max_length", "seed")} <= set(lines)


# Jobs


@pytest.fixture
def job(project):
    return build_job(resolve({"num_epochs": 2}, "system1"), project / "runs" / "tokens.json")


def test_a_job_written_and_read_is_the_same_job(project, job):
    store.write_json("job.json", job)
    assert read_job("job.json") == job
    assert json.loads((project / "job.json").read_text()) == job


def test_a_job_holds_the_settings_and_only_absolute_paths(project, job):
    values = resolve({"num_epochs": 2}, "system1").values
    assert job["training"] == {"output_dir": values["out_dir"]} | {key: values[key] for key in config.TRAINING if key in values}
    assert job["dataset"] == {
        "instruction_path": values["labeled_path"],
        "labeled_path": str(project / "runs" / "tokens.json"),
        "template": str(config.TEMPLATE),
        "seed": values["seed"],
    }
    assert job["models"] == {"teacher": "Qwen/Qwen2.5-7B-Instruct", "student": "Qwen/Qwen2.5-0.5B-Instruct"}
    assert config.TEMPLATE.is_file()


def test_what_only_the_lab_can_do_is_a_section_of_its_own_absent_when_unused(project):
    def lab_of(user: dict) -> dict:
        return build_job(resolve(user, "system1"), project / "tokens.json").get("lab")

    assert lab_of({}) is None
    assert lab_of({"lora_rank": 0, "lora_dropout": 0.0, "packing": False, "sample_answers": 3}) is None
    assert lab_of({"lora_rank": 8, "packing": True}) == {"lora_rank": 8, "packing": True}
    assert lab_of({"sample_answers": 0}) == {"sample_answers": 0}


def test_lab_settings_fill_in_what_a_job_leaves_out(job):
    lora = {"lora_rank": 0, "lora_alpha": 0, "lora_dropout": 0.0, "quantize_bits": 0}
    assert config.lab_settings(job) == {**lora, "packing": False, "sample_answers": 3}
    assert config.lab_settings({**job, "lab": {"lora_rank": 8}})["lora_alpha"] == 16
    assert config.lab_settings({**job, "lab": {"lora_rank": 8, "lora_alpha": 4}})["lora_alpha"] == 4
    assert config.LAB_DEFAULTS.keys() == config.LAB.keys()


def test_a_job_has_easydistills_own_sections_and_keys(job):
    assert job["job_type"] == "kd_black_box_train_only"
    assert set(job) - {"job_type"} <= set(EASYDISTILL_KD)
    for section in ("dataset", "models"):
        assert set(job[section]) <= EASYDISTILL_KD[section]
    assert set(job["training"]) - set(config.TRAINING) == {"output_dir"}
    assert EASYDISTILL_KD["training"] - {"save_steps"} <= set(job["training"])


def test_a_job_file_may_have_easydistills_own_sections_and_keys_and_no_others():
    # a train-only job asks no server and reads no logits; and an API key must never lie in a file
    unused = {"api_key", "logits_path"}
    known = {section: set(keys) for section, keys in config.JOB_SECTIONS.items()}
    own = {section: keys - unused for section, keys in EASYDISTILL_KD.items()}
    assert known.pop("lab") == set(config.LAB)  # what only the lab's own engine can do
    assert own["training"] | set(config.TRAINING) == known.pop("training")
    assert {section: keys for section, keys in own.items() if section != "training"} == known


def test_every_training_setting_reaches_trls_configuration_under_a_name_that_it_has():
    from trl.trainer.sft_config import SFTConfig

    from distill.trainer import sft_settings

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    settings = sft_settings(dict.fromkeys(config.TRAINING, 1), "x", validate=True)
    assert settings.keys() <= fields
    # EasyDistill's TRL has these, a newer one calls them otherwise
    translated = {"warmup_ratio", "group_by_length", "gradient_checkpointing"}
    assert set(config.TRAINING) - settings.keys() <= translated


BAD_JOBS = {
    "job_type = 'kd_white_box'": lambda job: job.update(job_type="kd_white_box"),
    "job_type = None": lambda job: job.pop("job_type"),
    "trainning: no such section. Did you mean training?": lambda job: job.update(trainning={}),
    "models: is missing or no JSON object.": lambda job: job.pop("models"),
    "dataset: is missing or no JSON object.": lambda job: job.update(dataset=[]),
    "distillation: is missing or no JSON object.": lambda job: job.update(distillation=None),
    "training.learnin_rate: no such setting. Did you mean learning_rate?": lambda job: job["training"].update(learnin_rate=1),
    "training.num_epochs: no such setting.": lambda job: job["training"].update(num_epochs=1),
    "training.learning_rate = nan: ": lambda job: job["training"].update(learning_rate=math.nan),
    "training.max_length = True: is no whole number.": lambda job: job["training"].update(max_length=True),
    "training.max_length: is needed and has no value.": lambda job: job["training"].pop("max_length"),
    "training.output_dir = 'out': must be an absolute path.": lambda job: job["training"].update(output_dir="out"),
    "dataset.labeled_path = 'x.json': must be an absolute path.": lambda job: job["dataset"].update(labeled_path="x.json"),
    "dataset.labeled_path: is needed": lambda job: job["dataset"].update(labeled_path=""),
    "lab: is missing or no JSON object.": lambda job: job.update(lab=[]),
    "lab.lora_rnk: no such setting. Did you mean lora_rank?": lambda job: job.update(lab={"lora_rnk": 8}),
    "lab.lora_rank = -1: lies outside 0 to ": lambda job: job.update(lab={"lora_rank": -1}),
    "lab.lora_dropout = 1: lies outside": lambda job: job.update(lab={"lora_rank": 8, "lora_dropout": 1}),
    "lab.lora_alpha = 8: has no effect without lab.lora_rank": lambda job: job.update(lab={"lora_alpha": 8}),
    "lab.packing and training.group_by_length both decide": lambda job: (
        job.update(lab={"packing": True}),
        job["training"].update(group_by_length=True),
    ),
    "training.bf16 and training.fp16 are two ways": lambda job: job["training"].update(bf16=True, fp16=True),
    "models.student = 5: is no path or name.": lambda job: job["models"].update(student=5),
    "models.student: is needed": lambda job: job["models"].update(student=None),
}


@pytest.mark.parametrize("problem", BAD_JOBS)
def test_a_job_edited_by_hand_is_refused_with_the_place_of_the_mistake(project, job, problem):
    BAD_JOBS[problem](job)
    assert [line for line in job_problems(job) if line.startswith(problem)], job_problems(job)


def test_all_problems_of_a_job_file_are_named_at_once(project, job):
    job["training"].update(max_length=0, seed="x")
    job["models"]["studnt"] = 1
    store.write_json("job.json", job)
    with pytest.raises(ConfigError) as caught:
        read_job("job.json")
    assert str(caught.value).startswith("4 problems in job.json\n  models.studnt: no such setting. Did you mean student?")
    for place in ("training.max_length = 0", "training.seed = 'x'"):
        assert place in str(caught.value)


@pytest.mark.parametrize("value", [[], None, "text", 5])
def test_a_job_that_is_no_object_is_one_problem(value):
    assert job_problems(value) == ["it is no JSON object."]
