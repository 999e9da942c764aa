"""Qwen3 as a Family: weight names, operation counts and the sizes that a mesh must divide."""

from models.family import Family, TensorNames
from models.layers import pages
from models.qwen3.config import ARCHITECTURES, SIZES, Config
from models.qwen3.model import Block

TENSOR_NAMES: TensorNames = {
    ("embed",): ("model.embed_tokens.weight", False),
    ("head",): ("lm_head.weight", False),
    ("final_norm", "scale"): ("model.norm.weight", False),
    ("layers", "attention_norm", "scale"): ("model.layers.{}.input_layernorm.weight", False),
    ("layers", "attention", "q", "kernel"): ("model.layers.{}.self_attn.q_proj.weight", True),
    ("layers", "attention", "k", "kernel"): ("model.layers.{}.self_attn.k_proj.weight", True),
    ("layers", "attention", "v", "kernel"): ("model.layers.{}.self_attn.v_proj.weight", True),
    ("layers", "attention", "o", "kernel"): ("model.layers.{}.self_attn.o_proj.weight", True),
    ("layers", "attention", "q_norm", "scale"): ("model.layers.{}.self_attn.q_norm.weight", False),
    ("layers", "attention", "k_norm", "scale"): ("model.layers.{}.self_attn.k_norm.weight", False),
    ("layers", "mlp_norm", "scale"): ("model.layers.{}.post_attention_layernorm.weight", False),
    ("layers", "mlp", "gate", "kernel"): ("model.layers.{}.mlp.gate_proj.weight", True),
    ("layers", "mlp", "up", "kernel"): ("model.layers.{}.mlp.up_proj.weight", True),
    ("layers", "mlp", "down", "kernel"): ("model.layers.{}.mlp.down_proj.weight", True),
    ("layers", "moe", "router"): ("model.layers.{}.mlp.gate.weight", True),
    ("layers", "moe", "gate"): ("model.layers.{}.mlp.experts.{}.gate_proj.weight", True),
    ("layers", "moe", "up"): ("model.layers.{}.mlp.experts.{}.up_proj.weight", True),
    ("layers", "moe", "down"): ("model.layers.{}.mlp.experts.{}.down_proj.weight", True),
}


def count_forward_flops(
    config: Config, tokens: float, context_length: float, with_head: bool
) -> float:
    """Counts the operations of a forward pass over `tokens`, each attending to `context_length`
    others: 2 per weight and token, and 4·N·H per pair of tokens and layer."""
    D, H = config.hidden_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    per_layer = 2 * D * H * (2 * N + 2 * K) + 4 * N * H * context_length
    total = per_layer * config.num_hidden_layers
    for sparse in config.sparse_layers:
        width = config.intermediate_size
        if sparse:
            width = config.moe_intermediate_size * config.num_experts_per_tok
            total += 2 * D * config.num_experts
        total += 6 * D * width
    return tokens * (total + (2 * D * config.vocab_size if with_head else 0))


def get_sharded_sizes(config: Config) -> dict[str, dict[str, int]]:
    """Returns logical axis -> the config's fields that it splits, with their sizes."""
    sizes = {
        "heads": {
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
        },
        "mlp": {},
        "act_heads": {"num_attention_heads": config.num_attention_heads},
        "embed": {"hidden_size": config.hidden_size},
        "expert": {},
        "vocab": {"vocab_size": config.vocab_size},
    }
    if not all(config.sparse_layers):
        sizes["mlp"]["intermediate_size"] = config.intermediate_size
    if any(config.sparse_layers):
        sizes["mlp"]["moe_intermediate_size"] = config.moe_intermediate_size
        sizes["expert"]["num_experts"] = config.num_experts
    return sizes


FAMILY = Family(
    architectures=ARCHITECTURES,
    config_type=Config,
    block=Block,
    tensor_names=TENSOR_NAMES,
    count_forward_flops=count_forward_flops,
    count_cache_token_bytes=pages.count_token_bytes,
    get_sharded_sizes=get_sharded_sizes,
    released={f"Qwen/Qwen3-{name.upper()}": config for name, config in SIZES.items()},
)
