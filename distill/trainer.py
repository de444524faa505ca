"""TRL's SFTTrainer, set up for a job: attention, precision, rows, LoRA, packing, length grouping, settings.

Every automatic choice returns (value, reason).
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import config, store
from .errors import ConfigError, DataError
from .models import BF16_CAPABILITY, gpu_capability, half_precision, load_quantized, load_to_train
from .resume import ResumableTrainer, kept_last
from .store import validation_path

POOL_BATCHES = 20
EAGER_TOKENS = 512


def attention_for(max_length: int) -> tuple[str, str]:
    """The implementation of attention to train with, and why."""
    return attention_on(gpu_capability(), max_length)


def attention_on(capability: tuple[int, int] | None, max_length: int) -> tuple[str, str]:
    """`attention_for` on a GPU of this compute capability; None is a CPU."""
    if capability:
        return "sdpa", "a GPU is visible"
    if max_length > EAGER_TOKENS:
        return "sdpa", f"rows may be longer than {EAGER_TOKENS} tokens, where plain attention takes too much memory"
    return "eager", f"on a CPU, up to {EAGER_TOKENS} tokens, its backward pass is the faster one"


def precision_for(training: dict) -> tuple[str, str]:
    """What to compute in, "fp32", "bf16" or "fp16", and why. Weights that are trained are fp32 in any case.

    training  a job's block: `bf16` or `fp16` true asks for it, false rules it out, neither leaves the choice to the device
    Raises ConfigError where the device cannot do what is asked for.
    """
    return precision_on(gpu_capability(), training)


def precision_on(capability: tuple[int, int] | None, training: dict) -> tuple[str, str]:
    """`precision_for` on a GPU of this compute capability; None is a CPU."""
    best, reason = _best_precision(capability)
    asked = next((name for name in ("bf16", "fp16") if training.get(name)), None)
    if asked == "fp16" and capability is None:
        # accelerate would take it, say nothing and compute in fp32
        raise ConfigError("training.fp16 = true: no GPU is visible, and fp16 is not trained on a CPU. Use bf16, or leave both out.")
    if asked == "bf16" and capability and capability < BF16_CAPABILITY:
        raise ConfigError(f"training.bf16 = true: {reason}. Use fp16, or leave both out.")
    if asked:
        return asked, "asked for"
    return ("fp32", f"{best} is switched off") if training.get(best) is False else (best, reason)


def _best_precision(capability: tuple[int, int] | None) -> tuple[str, str]:
    return half_precision(capability) if capability else ("fp32", "no GPU is visible")


def datasets(tokens: Path, cache: Path) -> tuple:
    """Training and validation rows as TRL takes them, memory-mapped: {"input_ids", "labels"}, -100 where nothing is supervised."""
    from datasets import Dataset, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()  # a bar's every state would be a line of the log
    shutil.rmtree(cache, ignore_errors=True)
    split = validation_path(tokens)
    places = [tokens, split if split.is_file() else None]
    made = lambda place: Dataset.from_generator(supervised_rows, gen_kwargs={"path": str(place)}, cache_dir=str(cache))  # noqa: E731
    try:
        return tuple(place and made(place) for place in places)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from error  # what `supervised_rows` said, without the wrapping


def supervised_rows(path: str) -> Iterator[dict]:
    """The rows of a token file: {"input_ids", "labels"}, -100 where nothing is supervised. Raises DataError where it is none."""
    for row in store.read_rows(path):
        ids, mask = row.get("input_ids"), row.get("completion_mask")
        if not ids or not mask or len(ids) != len(mask) or not any(mask):
            raise DataError(f"{store.shown(path)} is no token file of the lab: write the job with write_system1_config.")
        yield {"input_ids": ids, "labels": [token if supervised else -100 for token, supervised in zip(ids, mask, strict=True)]}


def load_student(student: str, lab: dict, precision: str, attention: str) -> tuple:
    """A job's student and its tokenizer as `build_trainer` takes them.

    lab  the job's, as `config.lab_settings` gives it
    """
    if lab["quantize_bits"]:
        return load_quantized(student, precision, attention)
    return load_to_train(student, attention)


def build_trainer(job: dict, precision: str, student: tuple, data: tuple, checkpoints: Path, callbacks: list, key: str = ""):
    """The trainer of a job.

    precision    as `precision_for` says
    student      (model, tokenizer), as `load_student` gives them
    data         (rows, validation rows or None), as `datasets` makes them
    checkpoints  the folder of the training checkpoints
    key          the job's `checkpoint.resume_key`, for those who mean to go on from a training checkpoint
    """
    from trl import SFTConfig

    (model, tokenizer), (rows, validation), training, lab = student, data, job["training"], config.lab_settings(job)
    if lab["lora_rank"] and not lab["quantize_bits"] and precision != "fp32":
        _halve(model, precision)
    if lab["packing"]:
        rows = packed(rows, training["max_length"])
    settings = sft_settings(training, str(checkpoints), validation is not None, precision=precision, packing=lab["packing"])
    trainer = _trainer_class(training.get("group_by_length", False))(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=_lora(lab),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # TRL makes QLoRA's bf16, whose gradients the scaler of fp16 cannot take
    trainer.resume_key, trainer.kept = key, kept_last(training)
    return trainer


def _halve(model, precision: str) -> None:
    """Hold the linear layers, which LoRA freezes, in half precision.

    Embeddings and norms stay in fp32, and with them the stream between the layers, whose largest values fp16 could not hold.
    """
    import torch

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def _lora(lab: dict):
    """A LoRA on every linear layer but the output head, which may be tied to the embeddings; None for full fine-tuning."""
    if not lab["lora_rank"]:
        return None
    from peft import LoraConfig

    shape = {"r": lab["lora_rank"], "lora_alpha": lab["lora_alpha"], "lora_dropout": lab["lora_dropout"]}
    return LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")


def packed(rows, max_length: int):
    """Rows laid end to end in packs of at most `max_length` tokens: {"input_ids", "labels", "seq_lengths"}, the last by row.

    Every row is in one pack, whole. TRL's collator makes `position_ids` of the lengths, which start at 0 with each row: without an
    attention mask and without a cache, as TRL asks the model, they keep rows from seeing one another.
    """
    from trl import pack_dataset

    packs = pack_dataset(rows, max_length, "bfd")
    if sum(map(sum, packs["seq_lengths"])) != sum(map(len, rows["input_ids"])):  # TRL cuts rows that are longer
        raise DataError(f"Some rows are longer than max_length = {max_length} tokens: write the job anew with write_system1_config.")
    print(f"packing: {len(rows):,} rows in {len(packs):,} packs of at most {max_length:,} tokens")
    return packs


def _trainer_class(group_by_length: bool) -> type:
    """TRL's SFTTrainer that can be resumed; with `group_by_length`, one that draws its batches from `length_groups`."""
    from torch.utils.data import Sampler
    from trl import SFTTrainer

    class LengthGroupSampler(Sampler):
        def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
            self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self):
            return iter(length_groups(self.lengths, self.batch_size, self.seed, self.epoch))

    class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
        pass

    class LengthGroupedSFTTrainer(ResumableSFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            rows = self.train_dataset if train_dataset is None else train_dataset
            # grouped by all rows of a step, so that 8 × 1 and 1 × 8 take the same ones
            step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return LengthGroupSampler([len(ids) for ids in rows["input_ids"]], step_rows, self.args.seed)

    return LengthGroupedSFTTrainer if group_by_length else ResumableSFTTrainer


def length_groups(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """An epoch's row numbers, such that each batch holds rows of nearly one length and the batches come in random order.

    Rows are drawn into pools of POOL_BATCHES batches, each pool sorted by length and cut into batches. transformers' own grouping leaves
    a pool's batches in order of length, so that every pool teaches its long rows first and its short ones last: that trains far worse
    where a row's length goes with its kind.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = sorted(order[start : start + batch_size * POOL_BATCHES], key=lambda number: -lengths[number])
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    rest = [batches.pop()] if len(lengths) % batch_size else []  # the one short batch must come last: the loader cuts by number
    draw.shuffle(batches)
    return [number for batch in [*batches, *rest] for number in batch]


def sft_settings(training: dict, checkpoints: str, validate: bool, *, precision: str = "fp32", packing: bool = False) -> dict:
    """A job's `training` block as keyword arguments of trl's SFTConfig.

    transformers 5.15 and later have no `warmup_ratio` (a `warmup_steps` below 1 is the same share there) and call
    `gradient_checkpointing` otherwise; `group_by_length` is the lab's own (`length_groups`).
    """
    import torch

    translated = ("output_dir", "warmup_ratio", "gradient_checkpointing", "group_by_length")
    settings = {key: value for key, value in training.items() if key not in translated}
    if training.get("warmup_ratio"):
        settings["warmup_steps"] = training["warmup_ratio"]
    pace = settings.setdefault("save_strategy", "steps" if "save_steps" in settings else "epoch")
    if validate:
        settings |= {"eval_strategy": pace, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        settings |= {"eval_steps": settings["save_steps"]} if pace == "steps" else {}
        settings.setdefault("per_device_eval_batch_size", config.split_of(training)[0])
    fixed = {
        "output_dir": checkpoints,
        "save_total_limit": None,  # the lab keeps and removes them itself, once a new one is whole
        "logging_nan_inf_filter": False,  # it would log an earlier loss in the place of one that is not finite
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "completion_only_loss": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_checkpointing": training.get("gradient_checkpointing", False),
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "packing": packing,
        "packing_strategy": "bfd",
        "eval_packing": False,
    }
    return {"disable_tqdm": True, "report_to": "none", **settings, **fixed}
