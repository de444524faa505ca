"""Speed of teacher and students: `python benchmarks/bench_speed.py [--gpu]`. Prints the tables that stand in benchmarks/RESULTS.md.

With --gpu the teacher has Qwen2.5-7B's true shape, in 8 bits and in bf16, and the students Qwen2.5-0.5B's and 1.5B's, in bf16. Without
it they are scaled down for a CPU, where the figures say that the script works and nothing about the true shapes. Weights are random: speed
and memory do not depend on them. The tokenizer is the micro world's, whose ids are the first of the model's own vocabulary; no answer is
decoded. Run it alone on the machine.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import engine, store, timing  # noqa: E402
from distill.console import say  # noqa: E402
from distill.memory import GIB  # noqa: E402
from distill.microlab import MICRO  # noqa: E402
from distill.quality import FIRSTSIGHT  # noqa: E402
from distill.shapes import SHIPPED  # noqa: E402

SHARD_BYTES = 2 * GIB  # as much as is held while a model is written, and the largest tensor besides
DEVIATION = 0.02  # of the weights, Qwen2's initializer_range
QUESTION = "A shop sells pens at 3 for 2 euros. How much are 27 pens, and how much change is left of 50 euros? " * 4
# FirstSight, Qwen2-VL 8.3B → 2.2B: what this kind of lab is measured by
SHAPES = {f"{size}-shaped": SHIPPED[f"Qwen/Qwen2.5-{size}-Instruct"] for size in ("7B", "0.5B", "1.5B")}
SCALE = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}  # what a CPU's shapes are divided by, and the rest by
WIDTH_SCALE = 8
CPU_SETTINGS = {"runs": 4, "lengths": (32, 64), "batch_size": 4, "warm_up": 1}


def main() -> None:
    """Write the models, measure them, print the tables."""
    parser = argparse.ArgumentParser(description="Latency, tokens a second and memory of teacher and students of random weights.")
    parser.add_argument("--gpu", action="store_true", help="the true Qwen2.5 shapes on a GPU, in place of scaled-down ones on the CPU")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file too")
    options = parser.parse_args()
    if options.gpu and not engine.gpu_is_visible():
        sys.exit("--gpu: no GPU is visible. Without it, scaled-down shapes run on the CPU.")
    shapes = SHAPES if options.gpu else {f"{name}, scaled down": scaled_down(form) for name, form in SHAPES.items()}
    with TemporaryDirectory() as folder:
        paths = {name: write_model(Path(folder) / str(number), form) for number, (name, form) in enumerate(shapes.items())}
        speed = timing.measure(requests(paths), Path(folder) / "run", **({} if options.gpu else CPU_SETTINGS))
    say("\n".join([*figures(speed), "", *ratios(speed)]))
    if options.json:
        store.write_json(Path(options.json).resolve(), speed)


def requests(paths: dict[str, str]) -> list[dict]:
    """The first model as a teacher in 8 and in 16 bits, the others as students in 16."""
    (teacher, path), *students = paths.items()
    both = [{"name": f"{teacher}, {bits} bits", "path": path, "role": "teacher", "bits": bits} for bits in (8, 16)]
    both += [{"name": f"{name}, 16 bits", "path": path, "role": "student", "bits": 16} for name, path in students]
    return [{**each, "prompts": [{"instruction": QUESTION, "mode": "system1"}]} for each in both]


# Models


def scaled_down(form: dict) -> dict:
    """A shape that a CPU can be asked: a quarter of the layers, an eighth of the width and of the vocabulary."""
    sizes = {key: size // SCALE.get(key, WIDTH_SCALE) for key, size in form.items() if type(size) is int}
    return {**form, **sizes}


def write_model(folder: Path, form: dict) -> str:
    """A model of random bf16 weights in a folder, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    for file in (MICRO / "teacher").iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)
    config = AutoConfig.for_model(**form, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    torch.manual_seed(0)
    files = {}
    for number, names in enumerate(shards({name: 2 * tensor.numel() for name, tensor in tensors.items()})):
        file = f"model-{number:05}.safetensors"
        save_file({name: random_weight(name, tensors[name].shape) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    total = sum(2 * tensor.numel() for tensor in tensors.values())
    store.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return str(folder)


def shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names of tensors in files of at most SHARD_BYTES, unless one tensor is larger.

    sizes  name → bytes
    """
    names, held = [], 0
    for name, size in sizes.items():
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def random_weight(name: str, shape: tuple[int, ...]):
    """A tensor as an untrained Qwen2 has it: norms 1, biases 0, matrices normal; drawn on the GPU where there is one, which is faster."""
    import torch

    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=torch.bfloat16, device=place).normal_(0, DEVIATION).cpu()


# Tables


def figures(speed: dict) -> list[str]:
    """A row for each model."""
    ends = [f"{length} tokens, s (p50, p95)" for length in speed["lengths"]]
    batch, shortest = speed["batch_size"], speed["lengths"][0]
    columns = ["model", "device", "parameters", "weights GiB", "peak GiB", "load s", "first token ms (p50, p95)", *ends]
    columns += ["tokens/s", f"tokens/s, {batch} at once", f"answers/s of {shortest}, {batch} at once"]
    return table([columns, *([name, *_figures(each)] for name, each in speed["models"].items())])


def _figures(each: dict) -> list[str]:
    peak, paces = each["peak_bytes"], (each["tokens_per_second"], *each["batched"].values())
    return [
        each["device"],
        f"{each['parameters'] / 1e6:,.0f} M",
        f"{each['weight_bytes'] / GIB:.2f}",
        "" if peak is None else f"{peak / GIB:.2f}",
        f"{each['load_seconds']:.1f}",
        _both(each["first_token_seconds"], 1000, 0),
        *(_both(seconds, 1, 2) for seconds in each["seconds"].values()),
        *(_interval(pace) for pace in paces),
    ]


def ratios(speed: dict) -> list[str]:
    """A row for each student beside each teacher, and one for what they are held against."""
    columns = ["student", "teacher", "speed, one at a time", "memory saved", "parameters saved"]
    rows = [[each["student"], each["teacher"], f"{_interval(each['speed'])} ×", *_shares(each)] for each in speed["ratios"]]
    rows += [["FirstSight's 2.2B", "its 8.3B", f"{FIRSTSIGHT['speed']} ×", *_shares(FIRSTSIGHT)]]
    return table([columns, *rows])


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    return ["| " + " | ".join(cells) + " |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _shares(each: dict) -> list[str]:
    return [f"{each[key]:.1%}" for key in ("memory_saved", "parameters_saved")]


def _both(quantiles: dict, factor: float, digits: int) -> str:
    return ", ".join(f"{factor * quantiles[share]['value']:.{digits}f}" for share in ("p50", "p95"))


def _interval(value: dict) -> str:
    low, high = value["ci"]
    return f"{value['value']:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
