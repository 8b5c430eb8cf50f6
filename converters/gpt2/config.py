"""The configuration of a GPT-2 model: what `config.json` says, checked. Importing this needs no jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters import class_names
from converters.errors import ConversionError

# transformers takes these names too, for what GPT-2's own configuration calls otherwise.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's `config.json` that the computation depends on, and in `other` the rest.

    `labels` are the names of the classes, which only the classifiers look at.

    Raises:
        ConversionError: names every field that the module does not compute.

    Example:
        >>> GPT2Config.from_dict({"n_embd": 64, "n_head": 4}).inner
        256
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        from converters.activations import ACTIVATIONS

        problems = []
        if self.activation_function not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            problems.append(f"activation_function is {self.activation_function!r}, known are {known}")
        if self.n_head < 1 or self.n_embd % self.n_head:
            problems.append(f"the heads do not divide the width: n_embd {self.n_embd}, n_head {self.n_head}")
        if self.other.get("add_cross_attention"):
            problems.append("add_cross_attention is true: cross-attention is not supported")
        if problems:
            raise ConversionError("this GPT-2 configuration is not supported:", problems)

    @property
    def inner(self) -> int:
        """The width of the hidden layer of each block's MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.n_layer

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Reads the contents of a `config.json`."""
        rest = {_ALIASES.get(name, name): value for name, value in config.items()}
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "other"}
        fields = {name: rest.pop(name) for name in known & rest.keys()}
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        return cls(**fields, labels=class_names.taken(rest), other=rest)

    def to_dict(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers reads."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        names, other = fields.pop("labels"), fields.pop("other")
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        if names != GPT2Config.labels:
            fields |= class_names.told(names)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **other, **fields}


def configure(raw: Mapping[str, Any], shapes: Mapping[str, Any], architecture: str) -> GPT2Config:
    """A configuration from a `config.json`, which has to be there: no tensor's shape tells the number of heads.

    Raises:
        ConversionError: there is none, or it is of another kind of model.
    """
    if not raw:
        raise ConversionError(
            f"{architecture}: the tensors do not tell the number of heads; put config.json beside them"
        )
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ConversionError(f"{architecture}: model_type is {raw['model_type']!r}, must be 'gpt2'")
    return GPT2Config.from_dict(raw)
