"""The config interface that layers and trainers use, whatever the model's family."""

import dataclasses
import math
from typing import Any, ClassVar, Protocol

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Extends rotary embeddings beyond the positions of pretraining (models.layers.rope).

    All but the first three fields are YaRN's; None means that the value follows from `factor`.
    """

    rope_type: str  # "yarn" or "linear"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # round the ends of the ramp to whole dimensions


class Config(Protocol):
    """The architecture of a decoder-only transformer; hashable, compared by value.

    Fields are named as in Hugging Face's config.json. A dense model has num_experts = 0.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # implementations are frozen dataclasses

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def context_length(self) -> int:
        """The number of positions that the model supports."""
        ...

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, True if its feed-forward is a mixture of experts."""
        ...

    @property
    def routing_shape(self) -> tuple[int, int]:
        """The number of sparse layers, and of the experts per token in each."""
        ...

    @property
    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json."""
        ...


def read_architecture(fields: dict[str, Any]) -> str:
    """Returns the first of config.json's `architectures`, or its `model_type`."""
    architectures = fields.get("architectures") or fields.get("model_type", "unknown")
    return (*architectures, "")[0] if isinstance(architectures, list) else architectures


def parse_rope_scaling(rope: dict[str, Any], field: str, max_positions: int) -> RopeScaling | None:
    """Parses config.json's rotary object; returns None if it does not scale.

    Args:
      rope: the object.
      field: the object's name in messages.
      max_positions: config.json's max_position_embeddings.

    Raises:
      UserError: for an unsupported type of scaling, or an invalid value.
    """
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type not in ("yarn", "linear"):
        raise UserError(f"{field}: type {rope_type!r} is none of 'default', 'linear', 'yarn'")
    original = rope.get("original_max_position_embeddings") or max_positions
    values = {
        "factor": rope.get("factor") or max_positions / original,
        "original_max_position_embeddings": original,
    }
    if rope_type == "yarn":
        optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        values |= {name: rope[name] for name in optional if rope.get(name)}
        values["truncate"] = rope.get("truncate", True)
    for name, value in values.items():
        if isinstance(value, bool) != (name == "truncate") or not isinstance(value, int | float):
            raise UserError(f"{field}: {name}={value!r} is of the wrong type")
        if not -math.inf < value < math.inf:
            raise UserError(f"{field}: {name}={value} is not finite")
        if value < 1 and name in ("factor", "original_max_position_embeddings"):
            raise UserError(f"{field}: {name}={value} is below 1")
    scaling = RopeScaling(rope_type, **values)
    if not 0 < scaling.beta_slow < scaling.beta_fast:
        raise UserError(
            f"{field}: beta_slow={scaling.beta_slow} is not between 0 and "
            f"beta_fast={scaling.beta_fast}"
        )
    return scaling
