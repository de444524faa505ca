"""Bytes that training a student and asking a model take, by arithmetic on the model's shape. No weights are read.

What is counted follows the engine: `trainer.build_trainer`, TRL's fused output head (trl/kernels/chunked_logprob.py) and transformers'
decoder layers; EasyDistill's older TRL has no such head, and label smoothing goes without it (`Training.full_logits`). On a CPU
`benchmarks/bench_preflight.py` holds the built-in engine's against measurement; on a GPU it has not been measured.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from .rotation import KEPT_CHECKPOINTS
from .shapes import Shape

GIB = 2**30
FP32, HALF, BOOL = 4, 2, 1  # bytes of a value
HEAD_ROWS, HEAD_COLUMNS = 4096, 32_768  # a tile of logits in TRL's output head: tokens × vocabulary
# in the backward pass of a tile without Triton: five fp32 intermediates, two more for the target's term, and its mask
TILE_BYTES = 7 * FP32 + BOOL
NF4_BYTES = 0.5 + FP32 / 64  # half a byte, and an fp32 scale for each block of 64 weights
# fp32 copies of all logits at the end of a forward pass without that head: the model's own, the log-probabilities, and
LOGIT_COPIES = {
    "EasyDistill": 3,  # a copy on which TRL 0.17 counts right tokens (SFTTrainer.compute_loss)
    "label smoothing": 4,  # those without the last token, and the log-probabilities negated (transformers' LabelSmoother)
}
GRADIENT_COPIES = 3  # then in the backward pass of both: the log-probabilities and two gradients
BLOCK_OF_8_BIT = 256  # values of 8-bit Adam that share an fp32 scale
# where what is kept on a disk lies: the run's own folder, out_dir, or the hub's cache
STORED = {
    "training checkpoints": "runs",
    "last model": "runs",
    "data": "runs",
    "published checkpoints": "out_dir",
    "downloads": "HF_HOME",
}
DATA_BYTES = GIB // 4  # rows, tokens and logs: assumed
LIBRARY_BYTES = 2 * GIB  # torch with CUDA in this machine's own memory, besides weights: assumed, not measured
GAP_TOKENS = 256  # measured: of so many tokens of a row each checkpointed layer leaves gaps of its own on a CPU
# CUDA's context and the workspaces of cuBLAS: assumed, not measured
CONTEXT_BYTES = GIB // 2
# the caching allocator rounds to blocks and splits them: assumed, not measured
GPU_FRAGMENTATION = 0.1
CPU_OVERHEAD_BYTES = GIB // 10  # measured: what the smallest configuration takes beyond its tensors


@dataclass(frozen=True)
class Training:
    """How a student is trained, as far as its memory goes.

    micro_batch     rows of a forward pass
    accumulation    forward passes of an optimizer step
    length_tokens   of the longest row
    lora_rank       0 trains every weight
    quantize_bits   4 holds frozen linear layers in NF4, 0 does not
    precision       "fp32", or "bf16" or "fp16" by autocast
    fused_attention whether attention never holds its scores, tokens × tokens a head
    packing         whether the rows of a batch are laid end to end in one
    full_logits     what has the logits of a whole batch held at once, a key of LOGIT_COPIES; empty where they are held in tiles
    eval_batch      rows of a validation's forward pass; 0 is as many as in training, which take less
    kept_last       how many of the last checkpoints are kept on the disk, besides the best
    """

    micro_batch: int
    accumulation: int
    length_tokens: int
    lora_rank: int = 0
    lora_dropout: float = 0.0
    quantize_bits: int = 0
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    precision: str = "fp32"
    fused_attention: bool = True
    packing: bool = False
    gpu: bool = False
    full_logits: str = ""
    eval_batch: int = 0
    kept_last: int = KEPT_CHECKPOINTS

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass, padding included."""
        return self.micro_batch * self.length_tokens

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.precision != "fp32"


@dataclass(frozen=True)
class Need:
    """Memory at the moment when most is held.

    entries  what for → bytes
    moment   which moment that is
    """

    entries: dict[str, int]
    moment: str

    @property
    def bytes(self) -> int:
        return sum(self.entries.values())

    @property
    def gib(self) -> float:
        return self.bytes / GIB

    def listed(self) -> str:
        """The entries in words, the largest first."""
        parts = sorted(self.entries.items(), key=lambda entry: -entry[1])
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)


def training_need(shape: Shape, how: Training) -> Need:
    """The memory of a training step at its fullest moment.

    With accumulation, gradients of the earlier passes stay throughout. TRL's head and the embedding each make a gradient of the whole
    matrix, which are one where they are tied. On a CPU the C library keeps the room of small tensors, where large ones never go: there
    gradients and activations count at their own fullest moments.
    """
    static = {"weights": weight_bytes(shape, how), "optimizer": optimizer_bytes(shape, how)}
    moments = _moments(shape, how)
    if not how.gpu:
        small = {name: max(entries.get(name, 0) for entries in moments.values()) for name in ("gradients", "activations")}
        moments = {moment: entries | small for moment, entries in moments.items()}
    moments |= _validation_moments(shape, how) if how.eval_batch else {}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    entries = {**static, **moments[moment]}
    entries["fragmentation"] = fragmentation_bytes(how.gpu, entries) + (0 if how.gpu else gap_bytes(shape, how))
    return Need({name: int(size) for name, size in entries.items()}, moment)


def _moments(shape: Shape, how: Training) -> dict[str, dict[str, float]]:
    """What a step holds at the moments that may be its fullest, besides weights and optimizer."""
    matrix = 0 if how.lora_rank else FP32 * shape.embedding
    gradients = FP32 * trained(shape, how) - matrix
    carried, again = (gradients, matrix) if how.accumulation > 1 else (0, 0)
    kept, layer, work = kept_bytes(shape, how), layer_bytes(shape, how), work_bytes(shape, how)
    cast = cast_bytes(shape, how)
    recomputed, copies = (layer + cast / shape.layers, 0) if how.checkpointing else (0, cast)
    forward = {"gradients": carried, "activations": kept + cast, "embedding gradients": again}
    backward = {"gradients": carried, "activations": kept + copies, "embedding gradients": again + matrix}
    return {
        "the end of the forward pass": {**forward, "logits": tile_bytes(shape, how, False)},
        "the output head's gradient": {**backward, "logits": tile_bytes(shape, how, True)},
        "the last layer's gradient": {**backward, "activations": kept + copies + recomputed + work},
        "the first layer's gradient": {"gradients": gradients, "activations": layer + work, "embedding gradients": again + matrix},
        "the embedding's gradient": {"gradients": gradients, "embedding gradients": again + 2 * matrix},
        "the optimizer's step": {"gradients": gradients, "embedding gradients": matrix, "temporaries": optimizer_work_bytes(shape, how)},
    }


def _validation_moments(shape: Shape, how: Training) -> dict[str, dict[str, float]]:
    """What a validation holds besides weights and optimizer: one layer at a time, then logits, all without gradients."""
    batch = replace(how, micro_batch=how.eval_batch, packing=False)
    values, hidden = HALF if how.half else FP32, FP32 * shape.hidden * batch.tokens
    layer = 2 * hidden + 4 * values * shape.intermediate * batch.tokens + 2 * score_bytes(shape, batch)
    cast = cast_bytes(shape, batch)
    return {
        "a validation's layer": {"activations": layer + cast},
        "a validation's output head": {"activations": hidden + cast, "logits": tile_bytes(shape, batch, False)},
    }


def publishing_need(shape: Shape, how: Training) -> Need:
    """The memory of publishing on a CPU: beside the trained student its checkpoint is loaded in fp32, to be merged or compared."""
    return Need({"weights": int(weight_bytes(shape, how)), "checkpoint": FP32 * shape.parameters}, "publishing the checkpoint")


def loading_need(shape: Shape) -> Need:
    """This machine's own memory beside a GPU's: a student is read there in fp32 before it moves, and again where an adapter is merged."""
    return Need({"weights": FP32 * shape.parameters, "libraries": LIBRARY_BYTES}, "loading the student")


def disk_need(shape: Shape, how: Training, download_bytes: float = 0, places: Collection[str] = frozenset(STORED.values())) -> Need:
    """The disk that a training takes: what it can be continued from, then the last model and the published one, new and old.

    download_bytes  of models that the hub's cache does not hold yet
    places          those whose need is wanted, of "runs", "out_dir" and "HF_HOME"
    """
    whole = FP32 * shape.parameters
    each = FP32 * trained(shape, how) + optimizer_bytes(shape, how)
    kept = how.kept_last + 2  # the best, and one that is being written
    moments = {
        "training": {"training checkpoints": kept * each, "published checkpoints": 2 * whole},
        "publishing the checkpoint": {"last model": whole, "published checkpoints": 3 * whole},
    }
    needs = []
    for moment, entries in moments.items():
        entries |= {"downloads": download_bytes, "data": DATA_BYTES}
        needs.append(Need({name: int(size) for name, size in entries.items() if STORED[name] in places}, moment))
    return max(needs, key=lambda need: need.bytes)


def trained(shape: Shape, how: Training) -> int:
    """How many weights are trained."""
    return shape.lora(how.lora_rank) if how.lora_rank else shape.parameters


def weight_bytes(shape: Shape, how: Training) -> float:
    """Weights: fp32 where they are trained; what LoRA freezes in 16 bits where those are computed in, or in NF4."""
    if not how.lora_rank:
        return FP32 * shape.parameters
    rest = shape.parameters - shape.linear
    adapter = FP32 * shape.lora(how.lora_rank)
    if how.quantize_bits:
        return adapter + NF4_BYTES * shape.linear + FP32 * rest
    held = HALF if how.half else FP32
    return adapter + held * (shape.linear + shape.biases) + FP32 * (rest - shape.biases)


def optimizer_bytes(shape: Shape, how: Training) -> float:
    """The optimizer's state: AdamW's two moments in fp32, or in 8 bits but for the embedding's; next to nothing for the others."""
    values = trained(shape, how)
    if how.optimizer == "adamw_bnb_8bit":
        exact = 0 if how.lora_rank else shape.embedding  # transformers has bitsandbytes keep the embedding's in fp32
        return 2 * (FP32 * exact + (values - exact) * (1 + FP32 / BLOCK_OF_8_BIT))
    return 2 * FP32 * values if how.optimizer.startswith("adamw") else 0


def optimizer_work_bytes(shape: Shape, how: Training) -> float:
    """What the optimizer's step holds besides: all tensors at once on a GPU where it is not fused, one at a time on a CPU."""
    largest = max(width * height for width, height in shape.matrices)
    largest = how.lora_rank * shape.intermediate if how.lora_rank else max(largest, shape.embedding)
    if how.optimizer == "adamw_torch":
        return FP32 * (trained(shape, how) if how.gpu else 2 * largest)
    if how.optimizer == "adamw_bnb_8bit":
        return 0 if how.gpu else 5 * FP32 * largest  # bitsandbytes' CPU step: both moments, the update and its root in fp32
    return 3 * FP32 * largest if how.optimizer == "adafactor" else 0


def cast_bytes(shape: Shape, how: Training) -> float:
    """16-bit copies that autocast makes of fp32 weights in a forward pass, and that the backward pass uses."""
    return HALF * (trained(shape, how) if how.lora_rank else shape.linear) if how.half else 0


def kept_bytes(shape: Shape, how: Training) -> float:
    """What the forward pass keeps for the backward pass: all of each layer, or with checkpointing its input alone."""
    each = FP32 * shape.hidden * how.tokens if how.checkpointing else layer_bytes(shape, how)
    final_norm = 3 * FP32 * shape.hidden * how.tokens
    mask = (FP32 + BOOL) * how.tokens**2 if how.packing else 0
    return shape.layers * each + final_norm + mask


def layer_bytes(shape: Shape, how: Training) -> float:
    """What a decoder layer keeps for its backward pass.

    Norms keep their input, and what they scale where their own weights are trained. Linear layers keep their input where their weight is
    trained, or its LoRA; under autocast each keeps a 16-bit copy of its own. Attention keeps queries, keys, values, its output and,
    unless fused, its scores. The feed-forward part keeps gate, its activation, up and their product.
    """
    hidden, wide, queries = shape.hidden, shape.intermediate, shape.queries
    values = HALF if how.half else FP32
    norms = 2 * (1 if how.lora_rank else 2) * FP32 * hidden
    inputs = (5 * HALF if how.half else 2 * FP32) * hidden
    attention = 4 * values * queries  # keys and values too: they are repeated for each head
    forward = 4 * values * wide
    if how.lora_rank and how.half:
        attention += HALF * queries  # the input of o_proj's LoRA
        forward += 3 * (FP32 - HALF) * wide if how.quantize_bits else 0  # NF4 layers answer in their input's fp32
    lora = len(shape.matrices) * how.lora_rank * values
    dropped = 2 * values * sum(width for width, _ in shape.matrices) if how.lora_rank and how.lora_dropout else 0
    return (norms + inputs + attention + forward + lora + dropped) * how.tokens + score_bytes(shape, how)


def score_bytes(shape: Shape, how: Training) -> int:
    """One layer's attention scores where attention is not fused: in fp32, and in 16 bits besides where that is computed in."""
    if how.fused_attention:
        return 0
    rows, length = (1, how.tokens) if how.packing else (how.micro_batch, how.length_tokens)
    return (FP32 + (HALF if how.half else 0)) * shape.heads * rows * length**2


def work_bytes(shape: Shape, how: Training) -> float:
    """Gradients inside a layer's backward pass: of the feed-forward part's four values, three more by way of a LoRA, and of the scores.

    Of feed-forward part and scores a GPU holds one at a time; a CPU's heap keeps the room of both, and the scores' from the forward pass.
    """
    values = HALF if how.half else FP32
    wide = (7 if how.lora_rank else 4) * values * shape.intermediate
    forward, scores = (wide + 2 * FP32 * shape.hidden) * how.tokens, score_bytes(shape, how)
    dequantized = values * shape.hidden * shape.intermediate if how.quantize_bits else 0
    return (max(forward, 2 * scores) if how.gpu else forward + 3 * scores) + dequantized


def tile_bytes(shape: Shape, how: Training, backward: bool) -> float:
    """TRL's output head: a tile of logits and what is computed from it; a GPU's kernel works in place. Without tiles, all logits."""
    if how.full_logits:
        return (GRADIENT_COPIES if backward else LOGIT_COPIES[how.full_logits]) * FP32 * how.tokens * shape.vocab
    values, rows, columns = HALF if how.half else FP32, min(how.tokens, HEAD_ROWS), min(shape.vocab, HEAD_COLUMNS)
    tile = values * rows * columns
    if how.gpu:
        return values * rows * HEAD_COLUMNS + HALF * columns * shape.hidden + (2 if backward else 1) * FP32 * how.tokens * shape.hidden
    if backward:
        return tile + TILE_BYTES * rows * columns + FP32 * how.tokens * shape.hidden
    return tile + 4 * FP32 * rows * columns


def gap_bytes(shape: Shape, how: Training) -> float:
    """Gaps that glibc's heap keeps on a CPU: a tensor's own is too small for the next of its size, whose alignment needs a little more.

    LoRA leaves three of each wide output behind, what the layer gave, what its LoRA gave and that scaled; narrower ones fit into the gaps.
    With checkpointing the layers' gaps are one another's, those of the forward pass and of the recomputation, beyond GAP_TOKENS of a row.
    """
    wide = 2 * 3 * (HALF if how.half else FP32) * shape.intermediate * how.micro_batch
    own = shape.layers * (min(how.length_tokens, GAP_TOKENS) if how.checkpointing else how.length_tokens)
    return wide * max(own, 2 * how.length_tokens) if how.lora_rank else 0


def fragmentation_bytes(gpu: bool, entries: dict[str, float]) -> float:
    """On a GPU the context, and what the allocator holds beyond what it gave out; on a CPU what threads and libraries take."""
    moving = sum(size for name, size in entries.items() if name not in ("weights", "optimizer"))
    return CONTEXT_BYTES + GPU_FRAGMENTATION * moving if gpu else CPU_OVERHEAD_BYTES


# Asking


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    bits          of a weight: 4, 8, 16 or 32
    batch_tokens  questions and answers of a batch together, in tokens
    questions     of a batch
    """

    bits: int
    batch_tokens: int
    questions: int
    gpu: bool = False


def asking_need(shape: Shape, how: Asking) -> Need:
    """The memory of answering a batch of questions: weights, cached keys and values, the last token's logits, the questions' own pass."""
    values, asked = FP32 if how.bits == 32 else HALF, how.batch_tokens // 2
    entries = {
        "weights": held_bytes(shape, how.bits),
        "cache": 2 * values * shape.layers * shape.keys * how.batch_tokens,
        "logits": 3 * FP32 * shape.vocab * how.questions,
        "activations": values * (4 * shape.hidden + 4 * shape.intermediate) * asked,
    }
    entries["fragmentation"] = fragmentation_bytes(how.gpu, entries)
    return Need({name: int(size) for name, size in entries.items()}, "a batch of answers")


def held_bytes(shape: Shape, bits: int) -> float:
    """Weights of a model that answers; of one in 8 or 4 bits only the linear layers are quantized, all else stays in 16."""
    rest = (FP32 if bits == 32 else HALF) * (shape.parameters - shape.linear)
    return {32: FP32, 16: HALF, 8: 1, 4: NF4_BYTES}[bits] * shape.linear + rest
