"""Qwen3's config: the fields of config.json that change the computation, and the released sizes.

Fields are named as in Hugging Face's config.json. The letters that stand for them in array names
are V vocab_size, D hidden_size, F intermediate_size, L num_hidden_layers, N num_attention_heads,
K num_key_value_heads, H head_dim, E num_experts, A num_experts_per_tok; F is moe_intermediate_size
in an expert.
"""

import dataclasses
import reprlib
import typing
from typing import Any

from models.config import RopeScaling, parse_rope_scaling, read_architecture
from models.errors import UserError

_DENSE_NAMES = ("Qwen3ForCausalLM", "qwen3")
_SPARSE_NAMES = ("Qwen3MoeForCausalLM", "qwen3_moe")
ARCHITECTURES = (*_DENSE_NAMES, *_SPARSE_NAMES)
_FIXED_FIELDS = {  # fields of which only one value is implemented
    "attention_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "quantization": None,  # MLX's name
    "quantization_config": None,
    "transformers_weights": None,  # the name of another file
}
_POSITIVE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "decoder_sparse_step"),
    "max_position_embeddings",
)
_MAX_VALUE, _MAX_LAYERS = 2**31 - 1, 10_000  # beyond, no model is described but a damaged file
_EXPERT_FIELDS = (  # fields missing from a dense model's config.json
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture of a Qwen3, dense or a mixture of experts (arXiv 2505.09388, tables 1 and 2)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_experts: int = 0  # 0: dense, and the expert fields below are unused
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False  # the weights of a token's experts sum to one
    decoder_sparse_step: int = 1  # layers n-1, 2n-1, ... have experts
    mlp_only_layers: tuple[int, ...] = ()  # indices of further layers without experts
    rope_scaling: RopeScaling | None = None

    @classmethod
    def from_hf(cls, fields: dict, source: str = "config.json") -> "Config":
        """Reads config.json's fields, in transformers 4's or 5's spelling of the rotary embedding.

        Raises:
          UserError: for a missing field, or a variant that is not implemented (biases, sliding
            windows, other rotary embeddings).
        """
        # If both are present, transformers reads rope_scaling, the only name until version 5.
        rope_field = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(fields.get(name) or {}, dict):
                raise UserError(f"{source}: {name} is no object")
        rope = fields.get(rope_field) or {}
        for name, supported in _FIXED_FIELDS.items():
            if (fields.get(name) or supported) != supported:
                value, remedy = fields[name], ""
                if name.startswith("quantization"):
                    method = value.get("quant_method") if isinstance(value, dict) else value
                    remedy = f" ({method}); name the original model, also as an adapter's base"
                raise UserError(f"{source}: {name}={reprlib.repr(value)} is not supported{remedy}")
        if "sliding_attention" in str(fields.get("layer_types")):
            raise UserError(f"{source}: layer_types has 'sliding_attention', not supported")
        theta = (fields.get("rope_parameters") or {}).get("rope_theta", fields.get("rope_theta"))
        values = {**fields, "rope_theta": rope.get("rope_theta", theta)}
        field_types = typing.get_type_hints(cls)
        field_types.pop("rope_scaling")
        if read_architecture(fields) in _DENSE_NAMES:
            field_types = {
                name: field_type
                for name, field_type in field_types.items()
                if name not in _EXPERT_FIELDS
            }
        else:  # transformers 5 renamed num_experts, and writes null for an empty list
            values.setdefault("num_experts", fields.get("num_local_experts"))
            values["mlp_only_layers"] = fields.get("mlp_only_layers") or ()
        missing = [name for name in field_types if values.get(name) is None]
        if missing:
            raise UserError(f"{source}: field {missing[0]!r} is missing")
        try:
            config = cls(**{name: _convert(values, name, t) for name, t in field_types.items()})
            scaling = parse_rope_scaling(
                rope, f"{source}: {rope_field}", config.max_position_embeddings
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source}: a field of the wrong type ({error})") from None
        config = dataclasses.replace(config, rope_scaling=scaling)
        _check_config(config, source)
        return config

    def to_hf(self) -> dict:
        """Returns config.json fields that transformers 4 and 5 and vLLM can read."""
        names = _SPARSE_NAMES if self.num_experts else _DENSE_NAMES
        fields = dataclasses.asdict(self)
        scaling = {k: v for k, v in (fields["rope_scaling"] or {}).items() if v is not None}
        return {
            "architectures": [names[0]],
            "model_type": names[1],
            **{k: v for k, v in fields.items() if self.num_experts or k not in _EXPERT_FIELDS},
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta, **scaling},
            "rope_scaling": scaling or None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": self.num_hidden_layers,
            "use_cache": True,
        }

    @property
    def context_length(self) -> int:
        """The number of positions that the model supports."""
        s = self.rope_scaling
        reach = int(s.factor * s.original_max_position_embeddings) if s else 0
        return max(self.max_position_embeddings, reach)

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """For each layer, True if its feed-forward is a mixture of experts."""
        return tuple(
            self.num_experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
            for layer in range(self.num_hidden_layers)
        )

    @property
    def routing_shape(self) -> tuple[int, int]:
        """The number of sparse layers, and of the experts per token in each."""
        return sum(self.sparse_layers), self.num_experts_per_tok

    @property
    def num_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        d, experts = self.hidden_size, self.num_experts
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        attention = d * self.head_dim * (2 * heads + 2 * kv) + 2 * self.head_dim
        dense = 3 * d * self.intermediate_size
        sparse = experts * 3 * d * self.moe_intermediate_size + d * experts
        layers = sum(attention + 2 * d + (sparse if s else dense) for s in self.sparse_layers)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + d


def _convert(values: dict, name: str, field_type: type) -> Any:
    """Converts a field to its type. Raises ValueError if that changes it, as 96.5 to 96 does."""
    value = values[name]
    converted = field_type(value)
    if converted != (tuple(value) if isinstance(value, list) else value):
        raise ValueError(f"{name}={reprlib.repr(value)}")
    return converted


def _check_config(config: Config, source: str) -> None:
    """Raises UserError if the sizes do not describe a valid model."""
    for name in _POSITIVE_FIELDS:
        if getattr(config, name) < 1:
            raise UserError(f"{source}: {name}={getattr(config, name)} is below 1")
        if getattr(config, name) > _MAX_VALUE:
            value = reprlib.repr(getattr(config, name))
            raise UserError(f"{source}: {name}={value} is above {_MAX_VALUE:,}")
    if config.num_hidden_layers > _MAX_LAYERS:
        value = f"num_hidden_layers={config.num_hidden_layers}"
        raise UserError(f"{source}: {value} is above {_MAX_LAYERS:,}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{source}: num_attention_heads={config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UserError(f"{source}: head_dim={config.head_dim} is odd; rotary needs pairs")
    if config.num_experts and not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise UserError(
            f"{source}: num_experts_per_tok={config.num_experts_per_tok} is not between 1 "
            f"and num_experts={config.num_experts}"
        )


def _make_dense(d: int, f: int, layers: int, heads: int, tied: bool) -> Config:
    return Config(
        vocab_size=151_936,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
    )


def _make_sparse(d: int, f: int, layers: int, heads: int, expert_f: int) -> Config:
    return dataclasses.replace(
        _make_dense(d, f, layers, heads, tied=False),
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_f,
        norm_topk_prob=True,
    )


# The models of the Qwen3 report. Base models allow 32,768 positions and the 2507 releases have
# another rope_theta; runs read the config.json of the model directory instead.
SIZES = {
    "0.6b": _make_dense(1024, 3072, 28, 16, tied=True),
    "1.7b": _make_dense(2048, 6144, 28, 16, tied=True),
    "4b": _make_dense(2560, 9728, 36, 32, tied=True),
    "8b": _make_dense(4096, 12288, 36, 32, tied=False),
    "14b": _make_dense(5120, 17408, 40, 40, tied=False),
    "32b": _make_dense(5120, 25600, 64, 64, tied=False),
    "30b-a3b": _make_sparse(2048, 6144, 48, 32, 768),
    "235b-a22b": _make_sparse(4096, 12288, 94, 64, 1536),
}
