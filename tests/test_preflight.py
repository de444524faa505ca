"""Preflight: shapes against real models, what is chosen and refused, the table of GPUs, and QLoRA and 8-bit Adam that really train."""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill import checkpoint, config, machine, models, server, store, train, trainer
from distill.choice import SHORT, Wanted
from distill.config import Settings, resolve
from distill.errors import ConfigError, PreflightError
from distill.generation import BATCH_TOKENS
from distill.memory import GIB, Asking, Training, asking_need, cast_bytes, disk_need, kept_bytes, loading_need, training_need
from distill.pace import GPUS, gpu_rate, known_gpu, training_minutes
from distill.planning import USUAL_ROWS, plan, rate_of
from distill.preflight import Disk, Machine, as_trained, choose, machine_of
from distill.resume import ResumableTrainer
from distill.shapes import SHIPPED, find_shape, shape_of
from distill.teacher import check_served, choose_teacher

SMALL, LARGE, TEACHER = (f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "7B"))
QWEN3 = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN3 |= {"head_dim": 32, "vocab_size": 100, "tie_word_embeddings": False, "model_type": "qwen3"}
T4 = GPUS["T4"]


def on(gpu) -> Machine:
    return Machine(gpu.name, gpu.free_gib, gpu.capability)


def with_gib(gib: float, capability=(8, 0), **more) -> Machine:
    return Machine("a GPU", gib, capability, **more)


def shape(name: str):
    return shape_of(SHIPPED[name])


# Shapes


def on_meta(form: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**form))


@pytest.mark.parametrize("form", [*SHIPPED.values(), QWEN3], ids=[*SHIPPED, "Qwen3"])
def test_a_shape_counts_every_weight_of_the_real_architecture(form):
    from peft import LoraConfig, get_peft_model

    model, counted = on_meta(form), shape_of(form)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert counted.lora(16) == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", ["teacher", "student_system1", "student_system2"])
def test_a_shape_is_read_from_a_models_folder(micro, name):
    from safetensors.torch import load_file

    found, source = find_shape(str(micro / name))
    held = load_file(micro / name / "model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in held.values()) and source == "the model's folder"


def test_default_models_have_a_shape_without_a_hub_and_others_blame_nobody():
    found, source = find_shape(SMALL)
    assert found.parameters == 494_032_768 and source == "shape shipped with the lab"
    with pytest.raises(ConfigError, match="Cannot reach the hub for Qwen/Qwen2.5-14B"):
        find_shape("Qwen/Qwen2.5-14B")


def silence(*arguments):
    raise ConnectionError("the hub fell silent")


def test_a_configuration_that_does_not_come_down_blames_the_hub(monkeypatch):
    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")])
    monkeypatch.setattr(models, "hub_info", lambda kind, name: listing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", silence)  # the real one tries for 20 seconds
    with pytest.raises(ConfigError, match="Cannot reach the hub for Qwen/Qwen2.5-14B"):
        find_shape("Qwen/Qwen2.5-14B")
    assert find_shape(SMALL)[1] == "shape shipped with the lab"


def test_a_model_of_another_form_is_refused_by_name():
    with pytest.raises(ConfigError, match="gpt2 takes cannot be told: its config.json names no num_hidden_layers, hidden_size"):
        shape_of({"model_type": "gpt2", "n_embd": 768, "vocab_size": 50_257}, "gpt2")
    with pytest.raises(ConfigError, match="mixture of experts"):
        shape_of({**SHIPPED[SMALL], "num_experts": 64})


# Memory


def need(**changes) -> float:
    how = {"micro_batch": 4, "accumulation": 1, "length_tokens": 512, "precision": "bf16", "gpu": True, **changes}
    return training_need(shape(SMALL), Training(**how)).bytes


def test_full_fine_tuning_holds_sixteen_bytes_a_weight_and_eight_bit_adam_fewer():
    parameters, embedding = shape(SMALL).parameters, shape(SMALL).embedding
    found = training_need(shape(SMALL), Training(1, 2, 1, gpu=True)).entries
    assert found["weights"] == 4 * parameters and found["optimizer"] == 8 * parameters
    assert found["gradients"] + found["embedding gradients"] >= 4 * parameters
    eight = training_need(shape(SMALL), Training(1, 1, 1, optimizer="adamw_bnb_8bit", gpu=True)).entries["optimizer"]
    assert eight == pytest.approx(8 * embedding + 2 * (parameters - embedding), rel=0.02)  # the embedding's stays exact


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"micro_batch": 5}),
        ({}, {"length_tokens": 600}),
        ({}, {"accumulation": 2}),
        ({"checkpointing": True}, {}),
        ({"optimizer": "adamw_bnb_8bit"}, {}),
        ({"lora_rank": 16}, {}),
        ({"lora_rank": 16, "quantize_bits": 4, "checkpointing": True}, {"lora_rank": 16, "checkpointing": True}),
        ({"lora_rank": 8}, {"lora_rank": 64}),
        ({"lora_rank": 8}, {"lora_rank": 8, "lora_dropout": 0.1}),
        ({}, {"fused_attention": False}),
        ({}, {"packing": True}),
        ({}, {"precision": "fp32"}),
        ({}, {"optimizer": "adamw_torch", "micro_batch": 1, "length_tokens": 1, "accumulation": 2}),
    ],
)
def test_memory_grows_with_what_takes_it(less, more):
    smallest = {name: more[name] for name in ("micro_batch", "length_tokens", "accumulation") if "optimizer" in more}
    assert need(**less, **smallest) < need(**more)


FORM = {"hidden_size": 96, "intermediate_size": 400, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
FORM |= {"vocab_size": 50, "tie_word_embeddings": True, "model_type": "qwen2"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rank", [0, 16])
def test_what_the_layers_keep_is_what_autograd_saves(rank, attention, precision):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows, length, half = 4, 64, precision != "fp32"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FORM), attn_implementation=attention)
    if rank and half:
        trainer._halve(model, precision)
    if rank:
        from peft import get_peft_model

        model = get_peft_model(model, trainer._lora({"lora_rank": rank, "lora_alpha": 32, "lora_dropout": 0.0})).base_model.model
    weights, saved = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.model(input_ids=torch.randint(0, 50, (rows, length)), use_cache=False)
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)
    how = Training(rows, 1, length, lora_rank=rank, precision=precision, fused_attention=attention == "sdpa")
    counted = kept_bytes(shape_of(FORM), how) + cast_bytes(shape_of(FORM), how)
    assert found <= counted <= 1.1 * found  # keys are counted as repeated, which they are not in a batch without padding


def test_a_need_names_its_moment_and_all_its_parts():
    found = training_need(shape(SMALL), Training(4, 8, 1024, precision="bf16", gpu=True))
    assert found.moment == "the output head's gradient" and found.bytes == sum(found.entries.values())
    assert all(name in found.listed() for name in ("weights", "gradients", "optimizer", "activations", "logits", "fragmentation"))


def test_a_larger_validation_batch_has_a_moment_of_its_own_and_a_smaller_one_changes_nothing():
    assert need(eval_batch=4) == need()
    found = training_need(shape(SMALL), Training(4, 1, 512, precision="bf16", gpu=True, eval_batch=256))
    assert found.moment == "a validation's layer" and found.bytes > 1.1 * need()
    assert "gradients" not in found.entries and need(eval_batch=256, full_logits="label smoothing") > 4 * 4 * 256 * 512 * shape(SMALL).vocab


def test_disk_holds_as_many_checkpoints_as_the_trainer_keeps(settings):
    each = 12 * shape(SMALL).parameters
    for yours, kept in (({}, ResumableTrainer.kept), ({"save_total_limit": 1}, 2), ({"save_total_limit": 10}, 10)):
        how = as_trained(settings(**yours).values, 512, on(T4))
        assert disk_need(shape(SMALL), how).entries["training checkpoints"] == (kept + 2) * each  # the best, and one being written


def test_disk_holds_checkpoints_to_go_on_from_or_the_published_ones():
    full = disk_need(shape(SMALL), Training(1, 1, 512), download_bytes=GIB)
    assert full.moment == "training" and full.entries["training checkpoints"] == 4 * 12 * shape(SMALL).parameters
    assert full.entries["downloads"] == GIB
    lora = disk_need(shape(SMALL), Training(1, 1, 512, lora_rank=16))
    assert lora.moment == "publishing the checkpoint" and lora.bytes < full.bytes


# Choosing


@pytest.fixture
def settings(project):
    """Settings over a preset, in a project of their own."""
    return lambda preset="system1", **yours: resolve(yours, preset=preset)


@pytest.mark.parametrize("preset", ["micro_system1", "micro_system2"])
def test_nothing_changes_for_the_micro_world_on_a_cpu(preset, micro):
    given = resolve({}, preset=preset)
    found = choose(given, find_shape(given.values["student_model"])[0], given.values["max_length"], Machine("this CPU", 2.0))
    assert found.settings == given and found.need.gib < 1.5
    assert found.chosen["method"] == ("full fine-tuning", "default") and found.chosen["batch"] == ("16 × 1", f"preset {preset}")


def test_what_is_tried_first_is_what_changes_least(settings):
    given = settings()
    given = Settings(given.values | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, given.origins)
    seen = []
    for tenth_gib in range(300, 10, -1):
        try:
            found = choose(given, shape(SMALL), 1024, with_gib(tenth_gib / 10)).settings
        except PreflightError:
            break
        values = found.values
        batch = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
        assert math.prod(batch) == 8
        state = tuple(values.get(name) for name in ("gradient_checkpointing", "optim", "lora_rank", "quantize_bits"))
        seen += [state] if not seen or seen[-1] != state else []
        assert all(origin == "preflight" for name, origin in found.origins.items() if values[name] != given.values.get(name))
    eight = "adamw_bnb_8bit"
    full, lora = (None, None), (16, None)
    assert seen == [(None, None, *full), (True, None, *full), (True, eight, *full), (True, None, *lora), (True, None, 16, 4)]


def test_smaller_micro_batches_come_before_checkpointing(settings):
    given = settings()
    given = Settings(given.values | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, given.origins)
    whole = training_need(shape(SMALL), as_trained(given.values, 1024, with_gib(100))).gib
    found = choose(given, shape(SMALL), 1024, with_gib(whole - 0.1))
    assert found.chosen["batch"][0] == "4 × 4" and not found.chosen["checkpointing"][0]
    assert f"as asked it would take {whole:.1f} GiB, and a GPU has {whole - 0.1:.1f} GiB free" in found.chosen["batch"][1]


def test_lora_takes_ten_times_the_learning_rate_unless_that_is_yours(settings):
    for yours, rate in (({}, 2e-4), ({"learning_rate": 3e-5}, 3e-5)):
        found = choose(settings(**yours), shape(SMALL), 1024, with_gib(4.5))
        assert found.settings.values["lora_rank"] == 16 and found.settings.values["learning_rate"] == pytest.approx(rate)
        assert ("learning_rate" in found.chosen) == (not yours)
        assert found.chosen["backend"] == ("builtin", "only the built-in engine does that")
    assert config.job_problems(config.build_job(found.settings, Path("/tokens.json"))) == []


@pytest.mark.parametrize(
    ("yours", "gib"),
    [
        ({"per_device_train_batch_size": 64}, 12),
        ({"gradient_checkpointing": False, "optim": "adamw_torch_fused", "lora_rank": 0}, 9),
        ({"lora_rank": 0}, 4),
        ({"lora_rank": 32, "quantize_bits": 0, "gradient_checkpointing": False}, 3),
    ],
)
def test_settings_of_yours_are_refused_with_figures_and_never_changed(settings, yours, gib):
    with pytest.raises(PreflightError) as refused:
        choose(settings(**yours), shape(SMALL), 1024, with_gib(gib))
    message = str(refused.value)
    assert "Training does not fit: it needs" in message and f"a GPU has {gib:.1f} GiB free" in message and "weights" in message
    assert "This would fit: " in message


def test_a_preset_file_of_your_own_is_refused_too_and_never_changed(project):
    store.write_json(project / "mine.json", config.read_preset("system1") | {"per_device_train_batch_size": 64})
    given = resolve({}, preset="mine.json")
    assert given.origins["learning_rate"] == "your preset mine.json" and given.yours == set(given.values)
    with pytest.raises(PreflightError, match="This would fit: per_device_train_batch_size = "):
        choose(given, shape(SMALL), 1024, with_gib(12))


def test_beside_a_gpu_the_machines_own_memory_is_asked_too(settings):
    needed = loading_need(shape(LARGE))
    assert needed.gib == pytest.approx(2 + 4 * shape(LARGE).parameters / GIB, rel=1e-6)
    with pytest.raises(PreflightError, match=r"needs 7\.8 GiB of this machine's own memory .*weights 5\.75.*, and 7\.0 GiB are free"):
        choose(settings(), shape(LARGE), 1024, with_gib(80, free_ram_gib=7.0))
    assert choose(settings(), shape(LARGE), 1024, with_gib(80, free_ram_gib=8.0)).need.gib


def test_a_training_that_was_begun_keeps_what_decides_its_weights_on_any_machine(settings):
    begun = {"lora_rank": 16, "lora_alpha": 32, "learning_rate": 2e-4}
    found = choose(settings(), shape(SMALL), 1024, with_gib(80), begun=begun)
    assert {name: found.settings.values[name] for name in begun} == begun
    assert found.chosen["method"] == ("LoRA of rank 16", "as the training was begun")
    whole = choose(settings(), shape(SMALL), 1024, with_gib(80)).need.gib
    smaller = choose(settings(), shape(SMALL), 1024, with_gib(whole - 0.1), begun={}).settings.values
    assert "lora_rank" not in smaller and "optim" not in smaller and smaller["gradient_checkpointing"]
    with pytest.raises(PreflightError, match="begun with these settings and can go on with no others; fresh = true"):
        choose(settings(), shape(SMALL), 1024, with_gib(4.5), begun={})


def test_where_only_shorter_rows_fit_their_length_is_named_and_where_none_do_that_is_said(settings):
    with pytest.raises(PreflightError, match=r"This would fit: max_length = \d+, .*longer rows are then left out"):
        choose(settings(max_length=32_768, lora_rank=16, quantize_bits=4), shape(LARGE), 32_768, with_gib(6))
    with pytest.raises(PreflightError, match="No settings fit: take a smaller student"):
        choose(settings(), shape(LARGE), 1024, with_gib(1))


def test_easydistill_is_offered_nothing_that_only_the_engine_does(settings):
    with pytest.raises(PreflightError):
        choose(settings(backend="easydistill"), shape(SMALL), 1024, with_gib(4.5))
    assert choose(settings(), shape(SMALL), 1024, with_gib(4.5)).settings.values["lora_rank"] == 16


def test_a_disk_that_is_too_small_is_refused_with_figures(settings):
    disks = (Disk(5.0, ("runs", "out_dir", "HF_HOME")),)
    wanted = r"2\d\.\d GiB of disk for runs, out_dir, HF_HOME \(training: .*training checkpoints.*, and 5\.0 GiB are free there\. Free"
    with pytest.raises(PreflightError, match=wanted):
        choose(settings(), shape(SMALL), 1024, with_gib(40, disks=disks))


@pytest.mark.parametrize(
    ("frees", "refused"),
    [
        (
            {"runs": 24.0, "out_dir": 4.0, "HF_HOME": 3.0},
            r"disk for out_dir \(publishing .* 5\.5.* 4\.0 GiB are free .*or put out_dir elsewhere\.",
        ),
        ({"runs": 24.0, "out_dir": 6.0, "HF_HOME": 1.0}, r"2\.0 GiB of disk for HF_HOME .*or put the hub's cache \(HF_HOME\) elsewhere\."),
        (
            {"runs": 9.0, "out_dir": 6.0, "HF_HOME": 3.0},
            r"disk for runs \(.*or have the project on a larger disk: its runs/ alone takes 22\.3 GiB",
        ),
        ({"runs": 24.0, "out_dir": 6.0, "HF_HOME": 3.0}, None),
    ],
)
def test_every_disk_that_a_run_writes_to_is_asked_with_advice_that_helps(settings, frees, refused):
    machine_here = with_gib(40, disks=tuple(Disk(free_gib, (place,)) for place, free_gib in frees.items()))

    def chosen():
        return choose(settings(), shape(SMALL), 1024, machine_here, download_bytes=2 * GIB)

    if refused is None:
        assert chosen().need.gib
        return
    with pytest.raises(PreflightError, match=refused) as error:
        chosen()
    assert len(str(error.value).splitlines()) == 1


def test_places_on_one_disk_are_summed_and_a_high_save_total_limit_is_named(settings):
    disks = (Disk(30.0, ("runs", "out_dir")), Disk(3.0, ("HF_HOME",)))
    assert choose(settings(), shape(SMALL), 1024, with_gib(40, disks=disks), 2 * GIB).need.gib
    with pytest.raises(PreflightError, match=r"for runs, out_dir .*Free some space, lower save_total_limit, or have the project"):
        choose(settings(save_total_limit=10), shape(SMALL), 1024, with_gib(40, disks=disks), 2 * GIB)


def test_the_disks_of_this_machine_are_told_apart_by_their_file_system(project, monkeypatch):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == project.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "cache" / "hub"))
    here, there = machine.disks_of(elsewhere / "no such folder" / "out", project / "runs" / "x")
    assert (here.places, there.places) == (("runs", "HF_HOME"), ("out_dir",))
    assert [disk.places for disk in machine.disks_of(project / "out")] == [("runs", "out_dir", "HF_HOME")]
    (project / "runs" / "x").mkdir(parents=True)
    with open(project / "runs" / "x" / "optimizer.pt", "wb") as file:
        file.truncate(100 * GIB)  # sparse: it takes no room here
    again = machine.disks_of(elsewhere / "out", project / "runs" / "x")[0]
    assert again.free_gib - here.free_gib == pytest.approx(100, abs=5)  # a rerun takes the place of what it left


def test_memory_counts_the_longest_row_and_not_the_limit(settings):
    long, short = (choose(settings(), shape(SMALL), tokens, with_gib(40)).need.gib for tokens in (1024, 100))
    assert short < long
    packed = settings(packing=True)
    assert choose(packed, shape(SMALL), 100, with_gib(40)).need.gib > long  # packs are filled up to the limit


def test_easydistill_is_sized_with_the_logits_of_a_whole_batch(settings):
    values = settings().values
    tiled, full = (
        training_need(shape(SMALL), as_trained(values | {"backend": backend}, 1024, on(T4))) for backend in ("auto", "easydistill")
    )
    each = 4 * 1024 * values["per_device_train_batch_size"] * shape(SMALL).vocab
    assert full.entries["logits"] == 3 * each > tiled.entries["logits"]
    smoothed = as_trained(values | {"label_smoothing_factor": 0.1}, 1024, on(T4))  # TRL does that without its fused head
    assert training_need(shape(SMALL), smoothed).entries["logits"] >= 3 * each


def test_a_validation_batch_is_cut_down_with_the_training_s_and_refused_where_it_is_yours(settings):
    given = settings()
    given = Settings(given.values | {"per_device_eval_batch_size": 256}, given.origins)
    found = choose(given, shape(SMALL), 1024, on(T4))
    rows = found.settings.values["per_device_train_batch_size"]
    assert (
        found.settings.values["per_device_eval_batch_size"] <= rows and found.settings.origins["per_device_eval_batch_size"] == "preflight"
    )
    assert found.chosen["validation"][0] == f"{found.settings.values['per_device_eval_batch_size']} rows at a time"
    with pytest.raises(PreflightError, match="a validation's .*This would fit: .*per_device_eval_batch_size = "):
        choose(settings(per_device_eval_batch_size=256, lora_rank=0), shape(SMALL), 1024, on(T4))


def test_a_t4_trains_in_fp16_and_an_l4_in_bf16(settings):
    values = settings().values
    found = [as_trained(values, 1024, on(GPUS[name])) for name in ("T4", "L4")]
    assert [how.precision for how in found] == ["fp16", "bf16"] and all(how.fused_attention for how in found)
    disks = (Disk(50.0, ("runs",)),)
    found = machine_of({"name": "Tesla T4", "gib": 14.7, "free_gib": 14.5, "capability": "7.5"}, 10.0, disks)
    assert found == Machine("Tesla T4", 14.5, (7, 5), disks, 10.0, 14.7)
    assert machine_of(None, None).free_gib == math.inf


# A teacher


def test_a_teacher_is_held_in_8_bits_or_else_in_4_with_batches_that_fit():
    found = choose_teacher(shape(TEACHER), 512, 256, on(T4))
    assert found.bits == (8, "fits") and found.batch_tokens[0] == BATCH_TOKENS
    found = choose_teacher(shape(TEACHER), 512, 256, with_gib(7.5))
    assert found.bits == (4, "8 bits do not fit") and 768 <= found.batch_tokens[0] < BATCH_TOKENS and found.need.gib <= 7.5
    assert choose_teacher(shape(TEACHER), 512, 256, with_gib(40), bits=16).bits == (16, "asked for")
    with pytest.raises(PreflightError, match=r"The teacher does not fit: in 16 bits it needs 1\d\.\d GiB .* Ask for 4 or 8 bits"):
        choose_teacher(shape(TEACHER), 512, 256, on(T4), bits=16)
    with pytest.raises(PreflightError, match="in 4 bits it needs"):
        choose_teacher(shape(TEACHER), 512, 256, with_gib(3))


def test_one_question_at_a_time_is_tried_before_a_teacher_is_refused():
    one = 512 + 988  # no half, quarter or eighth of BATCH_TOKENS
    least = asking_need(shape(TEACHER), Asking(8, one, 1, True)).gib
    found = choose_teacher(shape(TEACHER), 512, 988, with_gib(least + 0.001), bits=8)
    assert found.batch_tokens == (one, "1 questions at once")
    with pytest.raises(PreflightError, match=r"in 8 bits it needs .*Ask for 4 bits"):
        choose_teacher(shape(TEACHER), 512, 988, with_gib(least - 0.001), bits=8)


def test_a_teacher_is_sized_for_the_batch_and_the_answers_that_are_asked_for(monkeypatch, capsys):
    found = choose_teacher(shape(TEACHER), 512, 256, with_gib(9.0))
    assert found.bits[0] == 8
    assert choose_teacher(shape(TEACHER), 512, 4096, with_gib(9.0)).bits[0] == 4
    with pytest.raises(
        PreflightError, match=r"in 4 bits it needs 1\d\.\d GiB .* for 64 at once of 512 tokens and 256 of an answer, .*smaller batch_size"
    ):
        choose_teacher(shape(TEACHER), 512, 256, with_gib(9.0), batch_size=64)
    assert choose_teacher(shape(TEACHER), 512, 256, with_gib(20.0), batch_size=64).batch_tokens == (64 * 768, "64 questions at once")


def asked_of(micro, monkeypatch, gib: float, question: str = "Is 2 odd?", **more) -> dict:
    """The settings of the micro teacher on a CPU of so much memory."""
    monkeypatch.setattr(machine, "this_machine", lambda: Machine("this CPU", gib))
    asked = {"questions": [{"instruction": question, "mode": "system1"}], "max_new_tokens": {"system1": 8}, **more}
    return machine.teacher_settings(str(micro / "teacher"), asked)


def test_what_a_teacher_is_really_asked_decides_whether_it_fits(micro, monkeypatch):
    held = find_shape(str(micro / "teacher"))[0]
    gib = asking_need(held, Asking(4, 100, 1)).gib
    assert asked_of(micro, monkeypatch, gib)["bits"] in (8, 4)
    for more in ({"question": "Is 2 odd? " * 200}, {"max_new_tokens": {"system1": 4096}}, {"batch_size": 100}):
        with pytest.raises(PreflightError, match="The teacher does not fit"):
            asked_of(micro, monkeypatch, gib, **more)


def test_a_teacher_that_has_still_to_come_needs_room_where_the_hubs_cache_lies(monkeypatch):
    here = Machine("this CPU", 40.0, disks=(Disk(50.0, ("runs", "out_dir")), Disk(5.0, ("HF_HOME",))))
    assert choose_teacher(shape(TEACHER), 512, 256, here).bits[0] == 8
    for check in (choose_teacher, check_served):
        with pytest.raises(PreflightError, match=r"download takes 14\.2 GiB of disk, and 5\.0 GiB are free .*HF_HOME"):
            check(shape(TEACHER), 512, 256, here, download_bytes=2 * shape(TEACHER).parameters)


def test_a_teacher_that_the_lab_serves_itself_is_checked_in_the_bits_that_it_is_stored_in(micro, tmp_path, monkeypatch):
    check_served(shape(TEACHER), 512, 256, with_gib(16.5))
    with pytest.raises(PreflightError, match=r"cannot be served here: in 16 bits it needs 1\d\.\d GiB"):
        check_served(shape(TEACHER), 512, 256, on(T4))
    monkeypatch.setattr(machine, "this_machine", lambda: Machine("this CPU", 0.05))
    with pytest.raises(PreflightError, match="cannot be served here: in 32 bits"), server.serving(str(micro / "teacher"), tmp_path / "log"):
        raise AssertionError("it was started")


def test_a_teachers_weights_are_what_bitsandbytes_makes_of_them(micro):
    from distill.models import load_teacher

    found = find_shape(str(micro / "teacher"))[0]
    for bits in (32, 16, 8, 4):
        model, _ = load_teacher(str(micro / "teacher"), bits=bits)
        counted = asking_need(found, Asking(bits, 1, 1)).entries["weights"]
        # transformers does not count the fp32 scales of blocks
        assert counted == pytest.approx(model.get_memory_footprint(), rel=0.1), bits


# The plan


def test_the_default_notebook_fits_a_t4(settings):
    small = choose(settings(), shape(SMALL), 1024, on(T4))
    large = choose(settings("system2"), shape(LARGE), 4096, on(T4))
    assert small.chosen["method"][0] == "full fine-tuning" and small.need.gib <= T4.free_gib
    assert large.chosen["method"][0] == "LoRA of rank 16" and large.need.gib <= T4.free_gib
    assert choose_teacher(shape(TEACHER), 512, 256, on(T4)).bits[0] == 8


def minutes(preset: str, name: str, rows: int, epochs: int, settings) -> float:
    values = choose(settings(preset), shape(name), settings(preset).values["max_length"], on(T4)).settings.values
    how = as_trained(values, values["max_length"], on(T4))
    return training_minutes(shape(name), how, rows * epochs, values["max_length"] / 2, gpu_rate(T4))


def test_the_short_run_gives_a_first_answer_within_ten_minutes_on_a_t4(settings):
    assert minutes("system1", SMALL, SHORT["rows_system1"], SHORT["epochs"], settings) < 5  # which leaves as much for downloads


def test_both_full_trainings_take_less_than_two_hours_on_a_t4_with_a_thousand_rows_each(settings):
    taken = [minutes(*system, 1000, 3, settings) for system in (("system1", SMALL), ("system2", LARGE))]
    assert sum(taken) < 100  # which leaves twenty minutes for data and comparison


def test_gpus_are_known_by_the_names_that_drivers_give():
    names = {"Tesla T4": "T4", "NVIDIA L4": "L4", "NVIDIA A100-SXM4-40GB": "A100-40", "NVIDIA A100 80GB PCIe": "A100-80"}
    sizes = {"A100-40": 39.4, "A100-80": 79.2}
    for name, known in (names | {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}).items():
        assert known_gpu(name, sizes.get(known, 20)).name == known
    assert known_gpu("NVIDIA GeForce RTX 4090", 24) is None


def test_a_gpu_that_others_use_too_keeps_its_rate():
    busy = machine_of({"name": "NVIDIA A100-SXM4-80GB", "gib": 79.3, "free_gib": 45.0, "capability": "8.0"}, 100.0)
    assert rate_of(busy) == gpu_rate(GPUS["A100-80"])


@pytest.fixture(scope="module")
def planned():
    return plan({"preset": "micro_system1"}, {"preset": "micro_system2"})


def test_the_plan_has_every_stage_on_every_machine(planned):
    found = {(row["machine"], row["stage"]) for row in planned.rows}
    machines, stages = {row["machine"] for row in planned.rows}, {row["stage"] for row in planned.rows}
    assert len(found) == len(machines) * len(stages) and machines > set(GPUS) and len(machines) == len(GPUS) + 1
    assert stages == {"label", "train System 1", "train System 2", "compare"}
    assert all(row["gib"] < row["free_gib"] and row["minutes"] > 0 for row in planned.rows)
    assert any("assumed" in note and note.startswith("T4: 20% of 65 TFLOPS") for note in planned.notes)


def test_the_plan_shows_itself_and_escapes_everything(planned):
    words = repr(planned).split()
    assert {"fine-tuning,", "fp16,", "T4", "H200", "(estimate)"} <= set(words)
    hostile = type(planned)([{**planned.rows[0], "settings": "<script>"}], ["<img>"])
    assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_() and "<img>" not in hostile._repr_html_()


def test_what_does_not_fit_says_so_in_the_plan(settings):
    found = plan({"lora_rank": 0, "student_model": LARGE}, gpu="T4")
    (row,) = (row for row in found.rows if row["stage"] == "train System 1")
    assert row["gib"] is None and row["settings"].startswith("Training does not fit: it needs")
    (row,) = (row for row in plan({"bf16": True}, gpu="T4").rows if row["stage"] == "train System 1")
    assert row["gib"] is None and "bf16 needs 8.0" in row["settings"]
    with pytest.raises(ConfigError, match="gpu = 'T5': is not one of T4, L4"):
        plan(gpu="T5")


def test_a_row_that_holds_no_text_is_counted_and_the_plan_goes_on(project):
    store.write_rows(project / "rows.json", [{"instruction": None, "output": 5}, {"instruction": "a" * 99, "output": "b" * 100}])
    found = plan({"labeled_path": "rows.json"}, gpu="T4")
    assert "train System 1: 2 rows of 25 tokens on average" in found.notes[0] + found.notes[1]


def test_the_plan_asks_the_disk_of_each_system_s_own_out_dir(project, monkeypatch):
    monkeypatch.setattr("distill.planning.this_machine", lambda: Machine("this CPU", 100.0, disks=(Disk(0.0, ("runs",)),)))
    places = []
    monkeypatch.setattr("distill.planning.disks_of", lambda out_dir: places.append(out_dir.name) or (Disk(1.0, ("out_dir",)),))
    found = plan({"out_dir": "one"}, {"out_dir": "two"})
    refused = [row["settings"] for row in found.rows if row["machine"] == "this CPU" and row["gib"] is None]
    assert places == ["one", "two"] and len(refused) == 2 and all("of disk for out_dir" in each for each in refused)


def test_the_command_prints_the_plan_and_gives_json(capsys, project):
    from distill.cli_plan import add_plan

    parser = argparse.ArgumentParser()
    add_plan(parser.add_subparsers())
    options = parser.parse_args(["plan", "--gpu", "T4"])
    rows = json.loads(json.dumps(options.run(options)))["rows"]
    assert {row["machine"] for row in rows} == {"T4"} and "LoRA of rank 16" in capsys.readouterr().out


def test_the_plans_rows_are_those_of_the_form():
    assert (Wanted().slice_system1, Wanted().rows_system2) == (f"train[:{USUAL_ROWS[0]}]", USUAL_ROWS[1])


# What is chosen really trains


@pytest.fixture
def attention(monkeypatch):
    """Which function transformers computes "sdpa" with; what a test registers is taken back."""
    from transformers import AttentionInterface

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    return lambda: AttentionInterface()["sdpa"]


LOADS = {
    "to train": lambda folder: models.load_to_train(folder),
    "for QLoRA": lambda folder: models.load_quantized(folder, "fp32"),
    "to answer": lambda folder: models.load_to_answer(folder, "student", 32),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(("capability", "is_repeated"), [((7, 5), True), ((8, 0), False), (None, False)])
def test_keys_are_repeated_on_a_gpu_without_flash_attention(load, capability, is_repeated, attention, monkeypatch, micro):
    before = attention()
    monkeypatch.setattr(models, "gpu_capability", lambda: capability)
    load(str(micro / "student_system1"))
    assert (attention() is not before) == is_repeated


def test_keys_that_are_repeated_for_each_head_give_the_same_attention(attention):
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    models.repeat_keys()
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (6, 2, 2))
    given = torch.randn(2, 7, 6, 8)
    outcomes = []
    for attend in (sdpa_attention_forward, attention()):
        answer = attend(module, query, key, value, None)[0]
        outcomes.append([answer, *torch.autograd.grad((answer * given).sum(), [query, key, value])])
    assert max((left - right).abs().max().item() for left, right in zip(*outcomes, strict=True)) < 1e-5


@pytest.fixture
def make_trainer(tmp_path, make_job, prepared_rows, micro):
    """A trainer over a few rows of the micro student, in this process."""

    def make(**settings):
        settings = {"max_steps": 30, "warmup_ratio": 0.0, "logging_steps": 1, "seed": 0, **settings}
        job = store.read_json(make_job(tmp_path, prepared_rows[:64], prepared_rows[64:72], **settings))
        student = trainer.load_student(job["models"]["student"], config.lab_settings(job), "fp32", "eager")
        data = trainer.datasets(Path(job["dataset"]["labeled_path"]), tmp_path / "cache")
        return trainer.build_trainer(job, "fp32", student, data, tmp_path / "checkpoints", [])

    return make


def losses(made) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_qlora_trains_its_adapter_over_frozen_nf4_weights_and_merges_into_fp32(make_trainer, tmp_path, micro):
    import torch
    from safetensors.torch import load_file

    made = make_trainer(lora_rank=8, quantize_bits=4, learning_rate=1e-2, save_strategy="steps", save_steps=10)
    frozen = {name: p.clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in made.model.named_parameters() if name.endswith("base_layer.weight")} == {torch.uint8}
    made.train()  # with a validation every ten steps, after which it must go on learning
    assert losses(made)[-1] < losses(made)[19] < losses(made)[0]
    assert all(torch.equal(p, frozen[name]) for name, p in made.model.named_parameters() if name in frozen)
    made.model.save_pretrained(tmp_path / "adapter")
    student = str(micro / "student_system1")
    checkpoint.save_merged(student, tmp_path / "adapter", made.processing_class, tmp_path / "merged")
    factors, name = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), "model.layers.0.mlp.down_proj"
    low, high = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in ("A", "B"))
    before, after = (trainer.load_to_train(folder)[0].get_submodule(name).weight for folder in (student, str(tmp_path / "merged")))
    assert (after - before - 2 * high @ low).abs().max() < 1e-6 < (after - before).abs().max()


def test_the_engine_publishes_what_qlora_learnt_as_an_ordinary_checkpoint(tmp_path, make_job, prepared_rows, micro):
    settings = {"lora_rank": 8, "quantize_bits": 4, "learning_rate": 1e-2, "max_steps": 8, "warmup_ratio": 0.0, "logging_steps": 1}
    result = train.run(make_job(tmp_path, prepared_rows[:64], prepared_rows[64:72], **settings), tmp_path / "run", "test")
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    assert result.metrics["tensors_moved"] == 3 * 7  # the linear layers' weights, by the merge; nothing else


def test_eight_bit_adam_trains_on_a_cpu_with_its_moments_in_bytes(make_trainer):
    import torch

    made = make_trainer(optim="adamw_bnb_8bit", learning_rate=2e-3)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    held = {state["state1"].dtype for state in made.optimizer.optimizer.state.values()}
    assert torch.uint8 in held


def test_4_bits_need_lora_and_no_other_number_of_bits_is_taken(project):
    with pytest.raises(ConfigError, match="quantize_bits = 4: has no effect without lora_rank"):
        resolve({"quantize_bits": 4}, preset="system1")
    with pytest.raises(ConfigError, match="quantize_bits = 8: is not one of 0, 4. 4 holds what LoRA freezes in NF4"):
        resolve({"quantize_bits": 8, "lora_rank": 8}, preset="system1")
    assert "quantize_bits" not in resolve({"lora_rank": 0}, preset="system2").values


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 10])
def test_measured_memory_is_within_15_percent_of_the_estimate(number):
    from benchmarks import bench_preflight

    found = bench_preflight.compare(*bench_preflight.CPU_RUNS[number])
    assert found["estimated_gib"] == pytest.approx(found["measured_gib"], rel=0.15)
