"""The shape of a model, from its config.json alone: how many weights of which kind it has. No weights are read."""

from dataclasses import dataclass
from pathlib import Path

from . import models, store
from .config import is_hub_name
from .errors import ConfigError

NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# Of the default models, for a machine that cannot reach the hub; from the config.json of each.
_QWEN25 = {
    "Qwen/Qwen2.5-0.5B-Instruct": (24, 896, 4864, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (28, 1536, 8960, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-3B-Instruct": (36, 2048, 11_008, 16, 2, 151_936, True),
    "Qwen/Qwen2.5-7B-Instruct": (28, 3584, 18_944, 28, 4, 152_064, False),
}
_KEYS = (*NEEDED[:4], "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHIPPED = {name: dict(zip(_KEYS, facts, strict=True)) | {"model_type": "qwen2"} for name, facts in _QWEN25.items()}


@dataclass(frozen=True)
class Shape:
    """What decides a decoder's size.

    head_dim  of one attention head; queries are heads × head_dim wide, keys and values kv_heads × head_dim
    tied      whether the output head is the embedding matrix
    qkv_bias  whether queries, keys and values have biases (Qwen2)
    qk_norm   whether queries and keys are normalised (Qwen3)
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def queries(self) -> int:
        """Width of a token's queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer of a decoder layer: q, k, v, o, gate, up, down."""
        attention = [(self.hidden, self.queries), (self.hidden, self.keys), (self.hidden, self.keys), (self.queries, self.hidden)]
        return (*attention, (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden))

    @property
    def linear(self) -> int:
        """Weights of the decoder layers' linear layers: what LoRA freezes, and what is held in 4 or 8 bits."""
        return self.layers * sum(width * height for width, height in self.matrices)

    @property
    def embedding(self) -> int:
        """Weights of the embedding matrix."""
        return self.vocab * self.hidden

    @property
    def biases(self) -> int:
        """Biases of the linear layers."""
        return self.layers * (self.queries + 2 * self.keys) if self.qkv_bias else 0

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        norms = self.layers * (2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)) + self.hidden
        return self.linear + self.biases + norms + self.embedding * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Weights that a LoRA of this rank on every linear layer adds."""
        return self.layers * rank * sum(width + height for width, height in self.matrices)


def shape_of(settings: dict, name: str = "the model") -> Shape:
    """The shape that a config.json tells of.

    settings  its content
    name      what the message calls the model
    Raises ConfigError where it is no decoder of Qwen2's, Qwen3's or Llama's form, or a mixture of experts.
    """
    lacking = [key for key in NEEDED if not isinstance(settings.get(key), int)]
    if lacking or settings.get("num_experts") or settings.get("num_local_experts"):
        why = f"its config.json names no {', '.join(lacking)}" if lacking else "it is a mixture of experts"
        raise ConfigError(f"How much memory {name} takes cannot be told: {why}. Take a dense Qwen2, Qwen2.5 or Qwen3 model.")
    kind, heads, hidden = str(settings.get("model_type")), settings["num_attention_heads"], settings["hidden_size"]
    return Shape(
        layers=settings["num_hidden_layers"],
        hidden=hidden,
        intermediate=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or hidden // heads,
        vocab=settings["vocab_size"],
        tied=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=bool(settings.get("attention_bias", kind == "qwen2")),
        qk_norm=kind == "qwen3",
    )


def find_shape(name: str) -> tuple[Shape, str]:
    """The shape of a model by its name, and where it was read.

    name  a folder, or a name on the hub: then from the hub's cache, the hub, or, for the default models, what ships with the lab
    Raises ConfigError where no config.json is found, or it is of another form.
    """
    if not is_hub_name(name):
        return shape_of(store.read_json(store.resolve(name) / "config.json"), name), "the model's folder"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return shape_of(store.read_json(Path(cached)), name), "the hub's cache"
    try:
        return shape_of(_settings_on_hub(name), name), "the hub"
    except ConfigError:
        if name in SHIPPED:  # these are there, so it is the hub that is not
            return shape_of(SHIPPED[name], name), "shape shipped with the lab"
        raise


def _settings_on_hub(name: str) -> dict:
    """A model's config.json from the hub, {} where it has none. Raises ConfigError where the hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    if all(file.rfilename != "config.json" for file in models.hub_info("model", name).siblings or []):
        return {}
    try:
        file = hf_hub_download(name, "config.json")
    except Exception as error:  # of huggingface_hub, of its client, of the disk
        raise models.cannot_download(name, error) from error
    return store.read_json(Path(file))
