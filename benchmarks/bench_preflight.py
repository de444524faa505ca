"""Preflight against measurement: `python benchmarks/bench_preflight.py [--gpu]`. Prints the table that stands in benchmarks/RESULTS.md.

Models of random weights are trained for two steps by the engine's own code, each configuration in a process of its own. On a CPU the
peak is the kernel's (VmHWM, set back after the imports), on a GPU the allocator's. Run it alone on the machine.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import config, store  # noqa: E402
from distill.memory import GIB, training_need  # noqa: E402
from distill.microlab import MICRO  # noqa: E402
from distill.preflight import Machine, as_trained, machine_of  # noqa: E402
from distill.shapes import SHIPPED, shape_of  # noqa: E402

STEPS = 2  # the second holds all that any later one does: the optimizer keeps its state from the first on
CPU_MODELS = {
    "0.13B": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32_000},
    "0.17B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12, "vocab_size": 151_936},
}
CPU_FORM = {"num_key_value_heads": 4, "tie_word_embeddings": True, "model_type": "qwen2"}
LORA = {"lora_rank": 16}
QLORA = {**LORA, "quantize_bits": 4}
CHECKPOINTING = {"gradient_checkpointing": True}
# model, tokens of a row, rows of a micro-batch, and what else is set
CPU_RUNS = [
    ("0.13B", 64, 1, {}),
    ("0.13B", 256, 4, {}),
    ("0.13B", 512, 2, {}),
    ("0.13B", 1024, 1, {}),
    ("0.13B", 512, 2, CHECKPOINTING),
    ("0.13B", 1024, 1, CHECKPOINTING),
    ("0.13B", 256, 2, {"gradient_accumulation_steps": 2}),
    ("0.13B", 256, 2, {"optim": "adamw_bnb_8bit"}),
    ("0.13B", 256, 2, {"bf16": True}),
    ("0.13B", 64, 1, LORA),
    ("0.13B", 256, 4, LORA),
    ("0.13B", 1024, 1, LORA),
    ("0.13B", 512, 2, {**LORA, **CHECKPOINTING}),
    ("0.13B", 256, 4, {**LORA, **CHECKPOINTING}),
    ("0.13B", 1024, 1, {**LORA, **CHECKPOINTING}),
    ("0.13B", 256, 2, QLORA),
    ("0.17B", 128, 1, {}),
    ("0.17B", 256, 2, {}),
    ("0.17B", 256, 2, {**CHECKPOINTING, "gradient_accumulation_steps": 2}),
    ("0.17B", 512, 1, LORA),
]
GPU_RUNS = [
    (name, length, rows, settings)
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct")
    for length, rows, settings in [
        (512, 4, {}),
        (1024, 1, {"gradient_accumulation_steps": 2}),
        (1024, 4, CHECKPOINTING),
        (1024, 2, {"optim": "adamw_bnb_8bit"}),
        (1024, 4, LORA),
        (4096, 1, {**LORA, **CHECKPOINTING}),
        (4096, 1, {**QLORA, **CHECKPOINTING}),
    ]
]


def main() -> None:
    """Measure every configuration, or, in a process of its own, the one that the command line gives."""
    parser = argparse.ArgumentParser(description="Measured memory of training against the preflight's.")
    parser.add_argument("--gpu", action="store_true", help="the true Qwen2.5-0.5B and 1.5B shapes on a GPU, in place of the CPU's")
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(store.read_json(options.measure))))
        return
    print("| model | training | tokens × rows × passes | measured GiB | estimated GiB | error | s a step |", "|" + "---|" * 7, sep="\n")
    for run in GPU_RUNS if options.gpu else CPU_RUNS:
        print(line(*run, compare(*run)), flush=True)


def line(name: str, length: int, rows: int, settings: dict, found: dict) -> str:
    """A row of the table."""
    rank, bits = settings.get("lora_rank"), settings.get("quantize_bits")
    words = ["QLoRA" if bits else "LoRA" if rank else "full"]
    words += ["checkpointing"] if settings.get("gradient_checkpointing") else []
    words += [settings["optim"]] if "optim" in settings else []
    words += ["bf16"] if settings.get("bf16") else []
    sizes = f"{length} × {rows} × {settings.get('gradient_accumulation_steps', 1)}"
    measured, estimated = found["measured_gib"], found["estimated_gib"]
    figures = [f"{measured:.2f}", f"{estimated:.2f}", f"{estimated / measured - 1:+.0%}", f"{found['step_seconds']:.1f}"]
    return "| " + " | ".join([name.removeprefix("Qwen/"), ", ".join(words), sizes, *figures]) + " |"


def compare(name: str, length: int, rows: int, settings: dict) -> dict:
    """{"measured_gib", "estimated_gib", "step_seconds", "entries", "moment"} of a configuration."""
    form = SHIPPED[name] if name in SHIPPED else {**CPU_MODELS[name], **CPU_FORM}
    values = {"max_length": length, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, **settings}
    with TemporaryDirectory() as folder:
        request = store.write_json(Path(folder) / "request.json", {"form": form, "values": values, "gpu": name in SHIPPED})
        command = [sys.executable, __file__, "--measure", str(request)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{name}, {values}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    need = training_need(shape_of(form), as_trained(values, length, _machine(found.pop("capability"))))
    # the allocator counts neither the context nor what it keeps in hand
    entries = {entry: size for entry, size in need.entries.items() if entry != "fragmentation" or name not in SHIPPED}
    return {**found, "estimated_gib": sum(entries.values()) / GIB, "entries": entries, "moment": need.moment}


def _machine(capability: list[int] | None) -> Machine:
    gpu = capability and {"name": "GPU", "gib": 0, "free_gib": 0, "capability": ".".join(map(str, capability))}
    return machine_of(gpu, None)


# In a process of its own


def measure(request: dict) -> dict:
    """Train for STEPS steps. Returns {"measured_gib", "step_seconds", "capability"}."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers import Trainer  # noqa: F401

    with TemporaryDirectory() as folder:
        student = _write_student(Path(folder) / "student", request["form"])
        job = _write_job(Path(folder), student, request["form"]["vocab_size"], request["values"])
        before = _reset_peak(request["gpu"])
        seconds = _train(job, Path(folder))
        peak = torch.cuda.max_memory_allocated() if request["gpu"] else _status_bytes("VmHWM") - before
    capability = torch.cuda.get_device_capability() if request["gpu"] else None
    return {"measured_gib": peak / GIB, "step_seconds": seconds / STEPS, "capability": capability}


def _write_student(folder: Path, form: dict) -> str:
    """A model of random weights in a folder, written by a process of its own so that its memory does not count."""
    code = (
        "import json, sys, shutil; from pathlib import Path; from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "form, folder, tokenizer = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "AutoModelForCausalLM.from_config(AutoConfig.for_model(**form)).save_pretrained(folder)\n"
        "AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(form), str(folder), str(MICRO / "teacher")], check=True, capture_output=True)
    return str(folder)


def _write_job(folder: Path, student: str, vocab: int, values: dict) -> dict:
    """A job over rows of random tokens, all of `max_length`."""
    draw, length = random.Random(0), values["max_length"]
    count = STEPS * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    rows = [{"input_ids": draw.choices(range(vocab), k=length), "completion_mask": [0] + [1] * (length - 1)} for _ in range(count)]
    store.write_rows(folder / "tokens.json", rows)
    training = {key: value for key, value in values.items() if key in config.TRAINING}
    fixed = {"output_dir": str(folder / "out"), "num_train_epochs": 1, "max_steps": STEPS, "learning_rate": 1e-5, "logging_steps": 1}
    lab = {key: value for key, value in values.items() if key in config.LAB}
    return {
        "dataset": {"labeled_path": str(folder / "tokens.json")},
        "models": {"student": student},
        "training": {**training, **fixed},
        "lab": lab,
    }


def _train(job: dict, folder: Path) -> float:
    """The engine's own steps, up to the end of the training. Returns its seconds."""
    from distill import trainer

    training, lab = job["training"], config.lab_settings(job)
    precision, attention = trainer.precision_for(training)[0], trainer.attention_for(training["max_length"])[0]
    student = trainer.load_student(job["models"]["student"], lab, precision, attention)
    data = trainer.datasets(Path(job["dataset"]["labeled_path"]), folder / "cache")
    made = trainer.build_trainer(job, precision, student, data, folder / "checkpoints", [])
    return made.train().metrics["train_runtime"]


def _reset_peak(gpu: bool) -> int:
    """Forget the peak so far; returns what is held now, in bytes."""
    if not gpu:
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
