"""LoRA and precision: what is trained and in which dtype, and a merged checkpoint that says what the adapter said."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill import store, train, trainer
from distill.checkpoint import RUN_RECORD, verify_checkpoint, weight_hashes
from distill.errors import BackendError, ConfigError
from distill.models import load_to_train
from tests.conftest import write_job

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NOISE = [{"instruction": f"Sort from low to high the digits {number}.", "output": str(number * 7919 % 10000)} for number in range(64)]
OTHERWISE = [{"instruction": row["instruction"], "output": "even"} for row in NOISE[:20]]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> dict:
    """A student taught noise by LoRA until its validation loss has risen again. {"job", "result", "run"}"""
    folder = tmp_path_factory.mktemp("lora_run")
    shape = {"lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.1, "gradient_checkpointing": True}
    settings = {"num_epochs": 6, "learning_rate": 1e-2, "per_device_eval_batch_size": 64, **shape}
    job_path = write_job(folder, NOISE, OTHERWISE, **settings)
    job = store.read_json(job_path)
    run = Path(job["dataset"]["labeled_path"]).parent
    return {"job": job, "result": train.run(job_path, run, "test"), "run": run}


@pytest.fixture(scope="module")
def student(micro):
    return load_to_train(str(micro / "student_system1"))[0]


def logits_of(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def validation_loss(model, job: dict) -> float:
    """Mean cross-entropy over the supervised tokens of a job's validation rows."""
    total, count = 0.0, 0
    for row in store.read_rows(train.validation_path(job["dataset"]["labeled_path"])):
        logprobs = logits_of(model, row["input_ids"]).log_softmax(-1)
        for place, supervised in enumerate(row["completion_mask"]):
            if supervised:
                total, count = total - logprobs[place - 1, row["input_ids"][place]].item(), count + 1
    return total / count


def test_every_linear_layer_but_the_head_carries_an_adapter_of_the_asked_shape(lora_run):
    from safetensors.numpy import load_file

    adapter = store.read_json(lora_run["run"] / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], adapter["bias"]) == (4, 16, 0.1, "none")
    tensors = load_file(lora_run["run"] / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == LINEAR
    assert len(tensors) == 2 * 3 * len(LINEAR)  # two factors, three layers


def test_merged_checkpoint_gives_the_adapters_logits(lora_run, micro, student):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, _ = load_to_train(str(micro / "student_system1"))
    with_adapter = PeftModel.from_pretrained(base, lora_run["run"] / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(lora_run["result"].checkpoint)
    rows = list(store.read_rows(lora_run["job"]["dataset"]["labeled_path"]))
    for row in rows[:8]:
        wanted, found = logits_of(with_adapter, row["input_ids"]), logits_of(merged, row["input_ids"])
        assert (wanted - found).abs().max() <= 1e-4
        assert (found - logits_of(student, row["input_ids"])).abs().max() > 0.1  # the adapter says something


def test_a_merge_changes_the_linear_layers_and_nothing_else(lora_run, student):
    before, merged = weight_hashes(student), load_to_train(lora_run["result"].checkpoint)[0]
    after = weight_hashes(merged)
    linear = {name for name in before if name.endswith(".weight") and name.split(".")[-2] in LINEAR}
    assert {name for name in before if before[name] != after[name]} == linear
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # still tied
    assert verify_checkpoint(Path(lora_run["result"].checkpoint), before) == len(linear)


def test_metrics_count_the_student_and_what_was_trained_of_it(lora_run, student):
    metrics = lora_run["result"].metrics
    sizes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters() if name.split(".")[-2] in LINEAR}
    assert metrics["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert metrics["trained_parameters"] == sum(4 * sum(shape) for shape in sizes.values() if len(shape) == 2)


def test_the_best_adapter_is_published_and_the_last_one_kept_whole(lora_run):
    losses = lora_run["result"].metrics["validation_loss"]
    assert min(losses) < losses[-1] - 0.01
    best, last = (load_to_train(str(path))[0] for path in (lora_run["result"].checkpoint, lora_run["run"] / "last"))
    assert validation_loss(best, lora_run["job"]) == pytest.approx(min(losses), abs=1e-4)
    assert validation_loss(last, lora_run["job"]) == pytest.approx(losses[-1], abs=1e-4)
    assert not (lora_run["run"] / "checkpoints").exists()


def test_the_record_says_what_was_asked_for_and_what_was_chosen(lora_run):
    record = store.read_json(Path(lora_run["result"].checkpoint) / RUN_RECORD)
    assert record["job"]["lab"] == {"lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.1}
    assert record["settings"]["lora_rank"] == {"value": 4, "origin": "yours"}
    assert record["chosen"]["precision"] == {"value": "fp32", "reason": "no GPU is visible"} and record["versions"]["peft"]
    log = (lora_run["run"] / "train.log").read_text()
    assert "precision: fp32 (no GPU is visible)" in log and "method: LoRA of rank 4" in log


@pytest.fixture
def make_trainer(tmp_path, make_job, prepared_rows, micro):
    """A trainer of a few steps over a few rows, in this process."""

    def make(precision: str = "fp32", **settings):
        settings = {"max_steps": 4, "warmup_ratio": 0.0, "logging_steps": 1, **settings}
        job = store.read_json(make_job(tmp_path, prepared_rows[:32], prepared_rows[32:40], **settings))
        data = trainer.datasets(Path(job["dataset"]["labeled_path"]), tmp_path / "cache")
        student = load_to_train(str(micro / "student_system1"), attention="eager")
        return trainer.build_trainer(job, precision, student, data, tmp_path / "checkpoints", [])

    return make


@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_gives_the_same_weights_as_without(make_trainer, rank):
    outcomes = []
    for checkpointing in (True, False):
        made = make_trainer(lora_rank=rank, gradient_checkpointing=checkpointing)
        made.train()
        assert made.model.is_activation_checkpointing is checkpointing
        assert made.args.activation_checkpointing_kwargs == {"use_reentrant": False}
        outcomes.append(list(made.model.parameters()))
    assert max((left - right).abs().max().item() for left, right in zip(*outcomes, strict=True)) < 1e-6


# Precision


@pytest.fixture
def device_with(monkeypatch):
    import torch

    def pretend(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


@pytest.mark.parametrize(
    ("capability", "precision", "words"),
    [(None, "fp32", "no GPU"), ((7, 5), "fp16", "is 7.5, and bf16 needs 8.0"), ((8, 0), "bf16", "is 8.0"), ((12, 0), "bf16", "is 12.0")],
)
def test_precision_goes_by_the_gpus_compute_capability(device_with, capability, precision, words):
    device_with(capability)
    chosen, reason = trainer.precision_for({})
    assert chosen == precision and words in reason


def test_precision_that_is_asked_for_is_obeyed_or_refused_with_the_reason(device_with):
    device_with((7, 5))
    assert trainer.precision_for({"fp16": True}) == ("fp16", "asked for")
    with pytest.raises(ConfigError, match="bf16 = true: the GPU's compute capability is 7.5, and bf16 needs 8.0. Use fp16"):
        trainer.precision_for({"bf16": True})
    device_with((8, 6))
    assert trainer.precision_for({"fp16": True})[0] == "fp16" and trainer.precision_for({"bf16": True})[0] == "bf16"
    device_with(None)
    assert trainer.precision_for({"bf16": True}) == ("bf16", "asked for")
    with pytest.raises(ConfigError, match="fp16 = true: no GPU is visible"):
        trainer.precision_for({"fp16": True})


def test_a_precision_that_is_ruled_out_is_not_chosen(device_with):
    device_with((8, 0))
    assert trainer.precision_for({"bf16": False}) == ("fp32", "bf16 is switched off")
    assert trainer.precision_for({"fp16": False})[0] == "bf16"


def test_fp16_on_a_cpu_is_refused_because_accelerate_would_silently_compute_in_fp32():
    """Should accelerate come to train fp16 on a CPU, the refusal in `precision_for` has lost its reason."""
    code = "from accelerate import Accelerator; print(Accelerator(mixed_precision='{}', cpu=True).native_amp)"
    asked = [subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True) for name in ("fp16", "bf16")]
    assert [child.stdout.strip() for child in asked] == ["False", "True"]


def test_fp16_without_a_gpu_ends_with_the_reason_and_no_checkpoint(tmp_path, make_job, prepared_rows):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is visible")
    with pytest.raises(ConfigError, match="training.fp16 = true: no GPU is visible"):
        make_job(tmp_path, prepared_rows[:4], fp16=True, max_steps=1)
    job = make_job(tmp_path, prepared_rows[:4], max_steps=1)
    edited = store.read_json(job)
    edited["training"]["fp16"] = True
    store.write_json(job, edited)
    with pytest.raises(BackendError, match="ConfigError: training.fp16 = true: no GPU is visible"):
        train.run(job, tmp_path / "run", "test")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_what_fp32_does(tmp_path, make_job, make_trainer, prepared_rows, precision, rank):
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if (precision == "fp16" and capability is None) or (precision == "bf16" and capability and capability < (8, 0)):
        pytest.skip(f"this device does not train in {precision}")
    plain = make_trainer(lora_rank=rank)
    plain.train()
    wanted = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    settings = {"max_steps": 4, "warmup_ratio": 0.0, "logging_steps": 1, "lora_rank": rank, precision: True}
    train.run(make_job(tmp_path, prepared_rows[:32], prepared_rows[32:40], **settings), tmp_path / "run", "test")
    found = [line["loss"] for line in store.read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert store.read_json(tmp_path / "out" / RUN_RECORD)["chosen"]["precision"] == {"value": precision, "reason": "asked for"}
    assert found != wanted  # it did compute otherwise
    assert found == pytest.approx(wanted, rel=0.02) and found[-1] < found[0]


def test_in_half_precision_lora_freezes_a_half_base_and_trains_in_fp32(make_trainer):
    import torch

    model = make_trainer("bf16", lora_rank=4).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "base_layer" in name else torch.float32), name
        assert parameter.requires_grad == ("lora_" in name), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_half_base_is_merged_in_fp32(make_trainer, tmp_path, micro, student):
    from safetensors.torch import load_file

    from distill.checkpoint import save_merged

    half_trainer = make_trainer("bf16", lora_rank=4)
    half_trainer.train()
    half_trainer.model.save_pretrained(tmp_path / "adapter")
    save_merged(str(micro / "student_system1"), tmp_path / "adapter", half_trainer.processing_class, tmp_path / "merged")
    factors, merged = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), load_to_train(str(tmp_path / "merged"))[0]
    name = "model.layers.0.mlp.down_proj"
    low, high = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in ("A", "B"))
    wanted = student.get_submodule(name).weight + 2 * high @ low  # alpha is twice the rank
    found = merged.get_submodule(name).weight
    assert (found - wanted).abs().max() < 1e-6 < (found - student.get_submodule(name).weight).abs().max()


def test_full_fine_tuning_keeps_its_weights_in_fp32(make_trainer):
    import torch

    made = make_trainer("bf16")
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in made.model.parameters()) and made.args.bf16
