"""EasyDistill 1.x as a backend, by a stand-in: what it is given, what the lab makes of its log, and what is published."""

import json
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import standin_easydistill

from distill import checkpoint, config, easydistill, launch, machine, store, workplace
from distill.checkpoint import RUN_RECORD, weight_hashes
from distill.errors import ConfigError, DataError
from distill.models import load_to_train
from distill.shapes import SHIPPED

ROWS = [{"instruction": f"Is {number} even or odd?", "output": "odd" if number % 2 else "even"} for number in range(1000, 1024)]
STANDIN = "a standin's folder; touch pwned $(touch pwned)"
T4 = {"name": "Tesla T4", "gib": 14.7, "free_gib": 14.1, "capability": "7.5"}
EQUAL = {"group_by_length": False, "num_epochs": 1, "logging_steps": 2}


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Makes a stand-in of the given behaviour and returns its installation; temporary files go to `tmp_path/tmp`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def make(behaviour: str = "trains") -> easydistill.Installation:
        monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill.build(tmp_path / STANDIN, behaviour)))
        return easydistill.require(1)

    return make


def left_behind(tmp_path: Path) -> list[str]:
    """What a run should not leave: temporary folders, working folders, processes."""
    files = [path.name for path in (tmp_path / "tmp").glob(f"{workplace.SAFE_NAME}*")]
    files += [str(path) for path in tmp_path.rglob("*") if path.name in ("easydistill", "pwned", "cache") and "standin" not in str(path)]
    files += [str(path) for path in tmp_path.rglob(".*.tmp-*")]
    return files + processes_in(tmp_path)


def processes_in(tmp_path: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(tmp_path) in command and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def log_of(folder: Path) -> str:
    return (folder / "run" / "train.log").read_text()


def said(folder: Path, word: str) -> str:
    return next(line.split(f"{word} ", 1)[1] for line in log_of(folder).splitlines() if f" - {word} " in line)


def test_a_training_is_published_as_any_other_checkpoint(tmp_path, standin, make_job, micro):
    result = launch.run(make_job(tmp_path, ROWS, **EQUAL), tmp_path / "run", "asked for", standin())
    out = Path(result.checkpoint)
    record = store.read_manifest(out, name=RUN_RECORD)
    assert (result.backend, record["backend"], result.reason) == ("easydistill", "easydistill", "asked for")
    assert record["easydistill"]["version"] == "1.0" and record["easydistill"]["versions"]["trl"] == "0.17.0"
    assert record["versions"]["trl"] != "0.17.0" and record["chosen"]["precision"]["reason"]
    student, tokenizer = load_to_train(str(micro / "student_system1"))
    trained, saved = load_to_train(str(out))
    assert record["metrics"]["tensors_moved"] == len(weight_hashes(student)) and saved.chat_template == tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in trained.generation_config.eos_token_id
    assert weight_hashes(load_to_train(str(tmp_path / "run" / "last"))[0]) == weight_hashes(trained)
    differences = [(after - before).abs().max().item() for after, before in zip(trained.parameters(), student.parameters(), strict=True)]
    assert max(differences) == pytest.approx(0.01, abs=1e-3)  # what the stand-in adds
    assert left_behind(tmp_path) == []


def test_its_log_becomes_the_labs_metrics_and_bars_are_not_logged(tmp_path, standin, make_job):
    result = launch.run(make_job(tmp_path, ROWS, **EQUAL), tmp_path / "run", "test", standin())
    lines = list(store.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [(line["step"], line["steps"], line["loss"]) for line in lines if "loss" in line] == [(2, 4, 2.0), (4, 4, 1.0)]
    assert all("time" in line for line in lines) and lines[0]["grad_norm"] is None
    wanted = {"rows": 24, "steps": 4, "train_seconds": 1.5, "train_loss": 2.0, "first_loss": 2.0, "last_loss": 1.0}
    assert wanted.items() <= result.metrics.items()
    assert "'loss': 2.0" in log_of(tmp_path) and "it/s" not in log_of(tmp_path)


def test_the_record_says_what_was_trained_on_though_the_rows_are_changed_in_the_midst(tmp_path, standin, make_job, monkeypatch):
    job_path, train_there = make_job(tmp_path, ROWS, **EQUAL), launch._launch
    job = store.read_json(job_path)
    before, tokens = checkpoint.identity(job, "easydistill"), Path(job["dataset"]["labeled_path"])

    def train_and_change(*arguments) -> dict:
        facts = train_there(*arguments)
        tokens.write_text(tokens.read_text() + "\n")
        return facts

    monkeypatch.setattr(launch, "_launch", train_and_change)
    launch.run(job_path, tmp_path / "run", "test", standin())
    assert before.items() <= store.read_manifest(tmp_path / "out", name=RUN_RECORD).items()
    assert checkpoint.resume_key(job, "easydistill") != before["resume_key"]


def test_an_error_in_a_harmless_line_is_no_fault(tmp_path, standin, make_job):
    result = launch.run(make_job(tmp_path, ROWS, **EQUAL), tmp_path / "run", "test", standin("says_error"))
    assert "0 errors, nothing failed" in log_of(tmp_path) and Path(result.checkpoint).is_dir()


def test_a_project_path_of_any_letters_works_and_runs_nothing(tmp_path, standin, make_job, monkeypatch):
    folder = tmp_path / 'a b it\'s "quoted" $(touch pwned); touch pwned; `touch pwned` &\n雪'
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = launch.run(make_job(folder, ROWS[:4], **EQUAL), folder / "run", "test", standin())
    assert Path(result.checkpoint) == folder / "out" and left_behind(tmp_path) == []
    assert workplace.PLAIN.fullmatch(said(folder, "Running command:").replace(" ", "/"))


def test_a_temporary_folder_of_hostile_name_is_not_used(tmp_path, standin, make_job, monkeypatch):
    hostile = tmp_path / "x; touch pwned"
    hostile.mkdir()
    installation = standin()
    monkeypatch.setattr(tempfile, "tempdir", str(hostile))
    launch.run(make_job(tmp_path, ROWS[:4], **EQUAL), tmp_path / "run", "test", installation)
    assert "pwned" not in said(tmp_path, "Running command:") and not list(tmp_path.rglob("pwned"))


def test_it_gets_one_process_plain_paths_and_no_keys(tmp_path, standin, make_job, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "ACCELERATE_USE_DEEPSPEED", "PYTHONHOME_X", "WORLD_SIZE"):
        monkeypatch.setenv(name, "sesame")
    job = make_job(tmp_path, ROWS, save_strategy="steps", save_steps=4, **EQUAL)
    launch.run(job, tmp_path / "run", "test", standin())
    assert said(tmp_path, "accelerate").startswith("--num_processes 1 --num_machines 1")
    given, wanted = json.loads(said(tmp_path, "job")), store.read_json(job)
    changed = {"output_dir", "save_strategy", "save_steps"}
    assert {key: given["training"][key] for key in wanted["training"] if key not in changed} == {
        key: value for key, value in wanted["training"].items() if key not in changed
    }
    assert given["training"]["save_strategy"] == "no" and given["dataset"]["seed"] == wanted["dataset"]["seed"] and "lab" not in given
    variables, _, places = said(tmp_path, "variables").partition("] ")
    path, python_path, home = places.split(" ")
    assert not {"OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "WORLD_SIZE"} & set(json.loads(variables + "]"))
    assert "sesame" not in log_of(tmp_path) and {"PYTHONUNBUFFERED", "OMP_NUM_THREADS", "WANDB_MODE"} <= set(json.loads(variables + "]"))
    safe = Path(given["training"]["output_dir"]).parent
    assert path.startswith(f"{safe}/bin:{safe}/env/bin:") and python_path == f"{safe}/home" and home == f"{safe}/cache"


def test_several_gpus_that_the_user_names_get_a_process_each(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3")
    assert workplace.processes_for(gpu=True)[0] == 3 and workplace.processes_for(gpu=False)[0] == 1
    assert (
        workplace.environment_variables(tmp_path, 3)["CUDA_VISIBLE_DEVICES"] == "0,1,3"
        and workplace.environment_variables(tmp_path, 1)["CUDA_VISIBLE_DEVICES"] == "0"
    )
    workplace._write_accelerate(tmp_path / "bin" / "accelerate", 3)
    text = (tmp_path / "bin" / "accelerate").read_text()
    assert "'3'" in text and "--multi_gpu" in text and (tmp_path / "bin" / "accelerate").stat().st_mode & stat.S_IXUSR


def test_rows_without_tokens_are_refused_before_anything_starts(tmp_path, standin, make_job):
    """On these the real one trains bare end tokens, saves, and exits 0."""
    job = make_job(tmp_path, ROWS, **EQUAL)
    changed = store.read_json(job)
    store.write_rows(tmp_path / "text.json", [{"instruction": "a"}])
    changed["dataset"]["labeled_path"] = str(tmp_path / "text.json")
    store.write_json(job, changed)
    with pytest.raises(DataError, match="no token file of the lab"):
        launch.run(job, tmp_path / "run", "test", standin())
    assert not (tmp_path / "out").exists() and left_behind(tmp_path) == []


# Interruptions


def test_an_interrupt_ends_every_process_and_changes_nothing(tmp_path, standin, make_job, monkeypatch):
    job, installation = make_job(tmp_path, ROWS, **EQUAL), standin("hangs")

    def interrupt(follower, line):
        if "it/s" in line:
            assert processes_in(tmp_path)
            raise KeyboardInterrupt

    monkeypatch.setattr(launch.Follower, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch.run(job, tmp_path / "run", "test", installation)
    assert not (tmp_path / "out").exists() and left_behind(tmp_path) == []


def test_a_killed_lab_leaves_no_process_and_the_next_run_sweeps_up(tmp_path, standin, make_job, start_python):
    job, installation = make_job(tmp_path, ROWS[:4], **EQUAL), standin("hangs")
    code = """
from distill import easydistill, launch
launch.run(sys.argv[1], Path(sys.argv[2]), "test", easydistill.require(1))
"""
    lab = start_python(code, job, tmp_path / "run", TMPDIR=str(tmp_path / "tmp"), EASYDISTILL_HOME=os.environ["EASYDISTILL_HOME"])
    wait_for(lambda: any("kd/train.py" in command and "python3" in command for command in processes_in(tmp_path)), 60)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    wait_for(lambda: not processes_in(tmp_path), 20)
    assert list((tmp_path / "tmp").glob("qwen-lab-easydistill-*")) and not (tmp_path / "out").exists()
    standin("trains")
    launch.run(job, tmp_path / "run", "test", installation)
    assert left_behind(tmp_path) == []


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_a_temporary_folder_of_a_living_run_stays(tmp_path):
    living = tmp_path / f"{workplace.SAFE_NAME}{os.getpid()}-x"
    living.mkdir()
    workplace._sweep(tmp_path)
    assert living.is_dir()


# What a student and a job must be


def test_a_configuration_of_transformers_5_is_put_into_the_words_of_4_51():
    plain = {
        "model_type": "qwen2",
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "dtype": "bfloat16",
        "auto_map": {"a": "b"},
    }
    assert workplace.translated_config(plain) == {"model_type": "qwen2", "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    yarn = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}}
    wanted = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "partial_rotary_factor": 0.5}
    assert workplace.translated_config(yarn) == wanted
    older = {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32"}
    assert workplace.translated_config(older) == older
    with pytest.raises(ConfigError, match="each kind of layer"):
        workplace.translated_config({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}})


def test_the_student_lies_there_by_links_with_no_code_and_no_generation_settings(tmp_path, micro):
    workplace.write_student(micro / "student_system1", tmp_path / "student")
    assert {path.name for path in (tmp_path / "student").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "student" / "model.safetensors").is_symlink()


@pytest.fixture
def job(tmp_path, make_job):
    return store.read_json(make_job(tmp_path, ROWS, **EQUAL))


@pytest.fixture
def refused(standin, job):
    """What EasyDistill refuses of a job with other training or lab settings, or another student."""
    installation = standin()

    def ask(student: Path | None = None, lab: dict | None = None, **training) -> list[str]:
        changed = {**job, "training": {**job["training"], **training}, "lab": lab or {}}
        changed["models"] = {"student": str(student or job["models"]["student"])}
        return launch.refusals(changed, installation)

    return ask


def test_memory_is_not_asked_where_the_job_is_still_to_be_fitted(standin, job, monkeypatch):
    monkeypatch.setattr(machine, "free_ram_gib", lambda: 0.01)
    (refused,) = launch.refusals(job, standin())
    assert "holds a whole batch's logits" in refused and launch.refusals(job, standin(), memory=False) == []


def copy_of(student: Path, place: Path, **changes) -> Path:
    """A student's copy with its configuration changed."""
    place.mkdir()
    for file in student.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    store.write_json(place / "config.json", {**store.read_json(place / "config.json"), **changes})
    return place


def test_an_ordinary_job_is_not_refused(refused):
    assert refused() == [] and refused(bf16=True) == [] and refused(lab={"sample_answers": 2, "packing": False}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lab": {"lora_rank": 8, "lora_alpha": 16.0}}, "lab.lora_rank = 8: only the built-in engine"),
        ({"lab": {"packing": True}}, "lab.packing = True"),
        ({"group_by_length": True}, "trains far worse"),
        ({"fp16": True}, "not trained on a CPU"),
    ],
)
def test_what_only_the_built_in_engine_does_is_refused(refused, change, said):
    problems = refused(**change)
    assert problems and said in problems[0]


def test_bf16_is_refused_on_a_gpu_that_only_imitates_it(refused, monkeypatch):
    monkeypatch.setattr(machine, "gpu", lambda: T4)
    assert "bf16 needs 8.0" in refused(bf16=True)[0] and refused(fp16=True) == []


def test_a_student_that_brings_code_is_refused(refused, tmp_path, micro):
    coded = copy_of(micro / "student_system1", tmp_path / "coded", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map" in refused(student=coded)[0]
    by_tokenizer = copy_of(micro / "student_system1", tmp_path / "tokenizer")
    settings = store.read_json(by_tokenizer / "tokenizer_config.json")
    store.write_json(by_tokenizer / "tokenizer_config.json", {**settings, "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    assert "auto_map" in refused(student=by_tokenizer)[0]


def test_a_student_that_its_transformers_does_not_know_is_refused(refused, tmp_path, micro):
    assert refused(student=copy_of(micro / "student_system1", tmp_path / "a", model_type="qwen9")) == []  # nothing is known of it here
    models = next((tmp_path / STANDIN / "environment" / "lib").glob("python*/site-packages")) / "transformers" / "models"
    (models / "qwen2").mkdir(parents=True)
    assert refused() == [] and "does not know the student's model_type qwen9" in refused(student=tmp_path / "a")[0]


def test_a_student_without_safetensors_is_no_student_and_one_of_other_names_is_refused(refused, tmp_path, micro):
    bare = copy_of(micro / "student_system1", tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="Invalid student model: .*holds only a pickle"):
        refused(student=bare)
    (bare / "pytorch_model.bin").rename(bare / "other.safetensors")
    assert "other names than model.safetensors" in refused(student=bare)[0]


def test_a_student_on_the_hub_is_looked_for_there_and_its_silence_blames_nobody(refused):
    with pytest.raises(ConfigError, match="Cannot reach the hub for Qwen/Nowhere"):
        refused(student="Qwen/Nowhere")


def shape_of_qwen(size: str) -> dict:
    shape = SHIPPED[f"Qwen/Qwen2.5-{size}-Instruct"]
    return shape | {"layer_types": ["full_attention"] * shape["num_hidden_layers"]}


def test_a_student_too_large_for_the_memory_is_refused_with_both_figures(refused, monkeypatch, tmp_path, micro):
    monkeypatch.setattr(machine, "free_ram_gib", lambda: 0.005)
    (problem,) = refused()
    assert "takes 0.2 GiB for this student" in problem and "this machine has 0.0 GiB free" in problem and "lora_rank" in problem
    monkeypatch.setattr(machine, "gpu", lambda: T4)
    large = copy_of(micro / "student_system1", tmp_path / "large", **shape_of_qwen("1.5B"))
    assert "optimizer 11.50" in refused(student=large)[0] and "the GPU (Tesla T4) has 14.1 GiB free" in refused(student=large)[0]


def test_the_logits_of_a_whole_batch_are_counted_since_easydistill_holds_them(refused, monkeypatch, tmp_path, micro):
    monkeypatch.setattr(machine, "gpu", lambda: T4)
    small = copy_of(micro / "student_system1", tmp_path / "small", **shape_of_qwen("0.5B"))
    assert refused(student=small, max_length=1024, per_device_train_batch_size=1) == []
    (problem,) = refused(student=small, max_length=1024, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert "logits 6.96" in problem and "per_device_train_batch_size" in problem


def test_a_student_whose_shape_is_not_known_is_not_refused_and_that_is_said(refused, tmp_path, micro, capsys):
    experts = copy_of(micro / "student_system1", tmp_path / "experts", num_experts=4)
    assert refused(student=experts) == [] and "it is a mixture of experts" in capsys.readouterr().out
    assert "not trained on a CPU" in refused(student=experts, fp16=True)[0]


def test_free_memory_is_known_on_linux():
    assert machine.free_ram_gib() > 0.1


def test_every_setting_of_a_job_is_one_that_its_trl_knows(job):
    """trl 0.17's names, of those that a job may hold: an unknown one ends the training there."""
    given = workplace.training_for({"training": {**job["training"], "gradient_checkpointing": True}}, "bf16", gpu=False)
    ours = {"gradient_checkpointing_kwargs", "use_cpu", "bf16", "fp16", "optim", "output_dir"}
    assert set(given) <= ours | set(config.TRAINING) and given["bf16"] and given["use_cpu"] and not given["fp16"]


# Its log


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("2026-11-21 14:27:44,359 - INFO -   4%|▍         | 3/76 [00:00<00:05, 12.80it/s]", {"step": 3, "steps": 76}),
        ("2026-11-21 14:27:44,061 - INFO -   0%|    | 0/76 [00:00<?, ?it/s]/x/dataloader.py:759: UserWarning", {"step": 0, "steps": 76}),
        ("2026-11-21 14:27:43,813 - INFO - Truncating train dataset: 100%|██████████| 600/600 [00:00<00:00, 25224.09 examples/s]", {}),
        ("2026-11-21 14:27:43,813 - INFO - Loading checkpoint shards:  50%|█████     | 1/2 [00:01<00:01]", {}),
        ("2026-11-21 14:27:44,279 - INFO - {'loss': 6.7916, 'learning_rate': 1e-05, 'epoch': 0.05}",
         {"loss": 6.7916, "learning_rate": 1e-05, "epoch": 0.05}),
        ("2026-11-21 14:27:44,279 - INFO - {'loss': nan, 'grad_norm': inf}", {"loss": None, "grad_norm": None}),
        ("2026-11-21 14:27:47,698 - INFO - {'train_runtime': 3.6392, 'train_loss': 2.65}", {"train_runtime": 3.6392, "train_loss": 2.65}),
        ("2026-11-21 14:27:44,279 - INFO - {'instruction': 'a', 'loss': 1}", {}),
        ("a line", {}),
    ],
)  # fmt: skip
def test_a_line_of_its_log_says_steps_figures_or_nothing(line, read):
    assert launch.read_line(line) == read


def test_the_bar_shows_loss_while_steps_go_by(tmp_path):
    events = []
    follower = launch.Follower(tmp_path / "metrics.jsonl", 2, events.append)
    lines = ["  0%|   | 0/4 [00:00<?, ?it/s]", "{'loss': 3.0, 'epoch': 0.5}", " 50%|##  | 2/4 [00:00<?, ?it/s]", "{'train_runtime': 1.0}"]
    kept = [follower(f"2026-11-21 14:27:44,279 - INFO - {line}") for line in lines]
    assert kept == [False, True, False, True]
    assert events == [
        {"step": 0, "steps": 4},
        {"step": 2, "steps": 4, "loss": 3.0, "epoch": 0.5},
        {"step": 2, "steps": 4},
        {"step": 4, "steps": 4, "train_runtime": 1.0},
    ]


def test_what_a_container_keeps_of_files_counts_as_free(monkeypatch, tmp_path):
    stat = tmp_path / "memory.stat"
    stat.write_text("anon 100\ninactive_file 4096\nactive_file 7\n")
    assert machine._reclaimable(stat) == 4096 and machine._reclaimable(tmp_path / "none") == 0


def test_a_large_figure_is_read_whole():
    assert launch.read_line("2026-01-01 00:00:00,000 - INFO - {'loss': 1.5e+17, 'grad_norm': 2e-05}") == {
        "loss": 1.5e17,
        "grad_norm": 2e-05,
    }
