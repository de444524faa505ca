"""How long a stage takes, by assumed rates: an estimate, to tell minutes from hours. Nothing here has been measured on a GPU."""

import math
from dataclasses import dataclass

from .memory import Asking, Training, held_bytes
from .shapes import Shape

UTILISATION = 0.2  # of the peak, in training: assumed
READ_SHARE = 0.4  # of the memory's bandwidth, in answering: assumed
# a host starts the kernels one by one, so that small models wait for it: seconds a decoder layer, assumed
TRAINING_LAYER_SECONDS = 2e-3
ANSWERING_LAYER_SECONDS = {32: 1e-3, 16: 1e-3, 8: 2e-3, 4: 1.5e-3}
START_SECONDS = 90  # imports, loading, saving and checking: assumed


@dataclass(frozen=True)
class Gpu:
    """A GPU as its vendor describes it.

    free_gib              what a run can use of its memory
    teraflops             dense half-precision peak
    gigabytes_per_second  bandwidth of its memory
    """

    name: str
    free_gib: float
    capability: tuple[int, int]
    teraflops: float
    gigabytes_per_second: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 14.6, (7, 5), 65, 320),
        Gpu("L4", 22.0, (8, 9), 121, 300),
        Gpu("A100-40", 39.4, (8, 0), 312, 1555),
        Gpu("A100-80", 79.2, (8, 0), 312, 2039),
        Gpu("H100", 79.2, (9, 0), 989, 3350),
        Gpu("H200", 139.8, (9, 0), 989, 4800),
    )
}
CPU_CORE_TERAFLOPS, CPU_GIGABYTES_PER_SECOND = 0.06, 20  # of a core in fp32, and of the machine's memory: assumed


@dataclass(frozen=True)
class Rate:
    """What is assumed of a device: arithmetic in training, bytes read in answering, both a second; and how that is said."""

    flops: float
    bytes: float
    words: str
    gpu: bool


def gpu_rate(gpu: Gpu) -> Rate:
    """The rate assumed of a GPU."""
    words = f"{UTILISATION:.0%} of {gpu.teraflops:g} TFLOPS, {READ_SHARE:.0%} of {gpu.gigabytes_per_second:,} GB/s"
    return Rate(UTILISATION * gpu.teraflops * 1e12, READ_SHARE * gpu.gigabytes_per_second * 1e9, words, gpu=True)


def cpu_rate(cores: int) -> Rate:
    """The rate assumed of a CPU."""
    words = f"{CPU_CORE_TERAFLOPS * 1000:g} GFLOPS a core on {cores} cores, {CPU_GIGABYTES_PER_SECOND} GB/s"
    return Rate(CPU_CORE_TERAFLOPS * 1e12 * cores, CPU_GIGABYTES_PER_SECOND * 1e9, words, gpu=False)


def known_gpu(name: str, gib: float) -> Gpu | None:
    """The entry of GPUS for a GPU by the name that its driver gives, e.g. "NVIDIA A100-SXM4-40GB"; None where there is none.

    gib  all of its memory, free or not
    """
    words = name.replace("-", " ").split()
    near = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    return min(near, key=lambda gpu: abs(gpu.free_gib - gib), default=None)


def training_flops(shape: Shape, how: Training, mean_tokens: float) -> float:
    """Arithmetic of training on one token: two a weight forward, as much for the gradient of what goes in, as much for that of the weight.

    LoRA makes no gradients of the frozen weights; checkpointing goes forward twice. Attention looks back over half a row.
    """
    attention = 2 * shape.layers * shape.queries * mean_tokens
    forward = 2 * (shape.linear + shape.embedding) + attention
    return forward * ((2 if how.lora_rank else 3) + (1 if how.checkpointing else 0))


def training_minutes(shape: Shape, how: Training, rows: float, mean_tokens: float, rate: Rate) -> float:
    """Minutes of a training: its arithmetic, or where that is longer the host's time; and its start and end.

    rows  that are trained on, counted in every epoch
    """
    arithmetic = training_flops(shape, how, mean_tokens) * rows * mean_tokens / rate.flops
    passes = math.ceil(rows / how.micro_batch)
    host = passes * shape.layers * TRAINING_LAYER_SECONDS * (1.5 if how.checkpointing else 1) if rate.gpu else 0
    return (max(arithmetic, host) + START_SECONDS) / 60


def asking_minutes(shape: Shape, how: Asking, questions: int, answer_tokens: int, rate: Rate) -> float:
    """Minutes of answering: all weights are read once for each token of a batch."""
    host = shape.layers * ANSWERING_LAYER_SECONDS[how.bits] if rate.gpu else 0
    batches = math.ceil(questions / how.questions)
    return (batches * answer_tokens * max(held_bytes(shape, how.bits) / rate.bytes, host) + START_SECONDS) / 60
