"""Compares the sampler with the scorer in bfloat16: for a fully trained model, for a merged LoRA,
and for a LoRA whose factors are kept separate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import families, transformer
from models.families import make_model
from models.layers import lora, quantised
from models.layers.lora import LORA, TARGETS, LoRA
from models.layers.pages import init_pages
from models.qwen3.config import SIZES
from models.transformer import Transformer

BF16, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")
KIND = LoRA(32, 48.0, rslora=False, targets=TARGETS)
SMALL = dataclasses.replace(
    SIZES["0.6b"],
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)
LARGE = dataclasses.replace(SIZES["0.6b"], vocab_size=1024, num_hidden_layers=4)


def parameters(config) -> tuple[Any, Any]:
    """Makes a random base with confident predictions, and factors as after a few hundred steps."""
    base = families.init_params(config, jax.random.key(0))
    base["final_norm"]["scale"] *= 3
    rng = np.random.default_rng(1)

    def moved(path: tuple, x: jax.Array) -> jax.Array:
        drawn = 2e-3 * rng.standard_normal(x.shape, np.float32)
        return x if path[-1].key == "a" else jnp.asarray(drawn)

    factors = families.init_params(config, jax.random.key(1), KIND)
    return base, jax.tree_util.tree_map_with_path(moved, factors)


def log_probs(variables: Any, hidden_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    head_VD = transformer.get_output_head(variables["params"]).astype(BF16)
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD[:, :-1], head_VD, preferred_element_type=WIDE)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    return jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1)[..., 0]


def decoded(qwen3: Transformer, variables: Any, tokens_BT: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens, decoded one by one through a cache."""
    B, T = tokens_BT.shape

    def step(cache: Any, t: jax.Array) -> Any:
        ones_B1 = jnp.ones((B, 1), jnp.int32)
        token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BT, t, 1, 1)
        view = cache.bind_next_tokens(jnp.arange(B)[:, None], jnp.full(B, t + 1))
        applied: Any = qwen3.apply(variables, token_B1, t * ones_B1, ones_B1, view)
        hidden, view = applied
        return view.unbind_tokens(), hidden[:, 0]

    cache = init_pages(qwen3.config, 1, B, T, BF16, "plain")
    _, hidden_TBD = jax.lax.scan(step, cache, jnp.arange(T))
    return log_probs(variables, hidden_TBD.swapaxes(0, 1), tokens_BT)


def scored(qwen3: Transformer, variables: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.tile(jnp.arange(tokens_BT.shape[1]), (len(tokens_BT), 1))
    hidden_BTD, _ = qwen3.apply(variables, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return log_probs(variables, hidden_BTD, tokens_BT)


def deltas(config, param_dtype: str, rows: int, length: int) -> dict[str, float]:
    """Mean difference between sampler and scorer, by the way the model is trained and decoded."""
    base, trained = parameters(config)
    tokens_BT = jax.random.randint(jax.random.key(2), (rows, length), 0, config.vocab_size)
    adapted = make_model(config, dtype=BF16, lora=KIND)
    plain = adapted.clone(lora=None)
    whole = lora.merge_adapter(base, trained, KIND, WIDE)
    frozen = quantised.quantise_params(base, *quantised.split_dtypes(param_dtype, BF16))
    factors, unscaled = lora.fold_scale(trained, KIND, BF16)

    def delta(qwen3: Transformer, sampler: Any, scorer: Any, scorer_params: Any) -> float:
        ours = jax.jit(decoded, static_argnums=0)(qwen3, sampler, tokens_BT)
        theirs = jax.jit(scored, static_argnums=0)(scorer, scorer_params, tokens_BT)
        return float(jnp.mean(jnp.abs(ours - theirs)))

    beside = {"params": frozen, LORA: trained}
    merged = {"params": lora.merge_adapter(frozen, trained, KIND, BF16)}
    apart = {"params": frozen, LORA: factors}
    rounded = {"params": quantised.quantise_params(whole, None, BF16)}
    return {
        "whole": delta(plain, rounded, plain, {"params": whole}),
        "merged": delta(plain, merged, adapted, beside),
        "apart": delta(adapted.clone(lora=unscaled), apart, adapted, beside),
    }


def test_separate_factors_are_closer_than_merged_ones() -> None:
    difference = deltas(SMALL, "bfloat16", 16, 24)
    assert 0 < difference["apart"] < difference["merged"] / 4


@pytest.mark.long
@pytest.mark.parametrize("param_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_separate_factors_are_as_close_as_full_training(param_dtype) -> None:
    difference = deltas(LARGE, param_dtype, 8, 96)
    print(difference)
    assert (
        difference["apart"] < 1.2 * difference["whole"]
        and 1.05 * difference["apart"] < difference["merged"]
    )
    if param_dtype == "bfloat16":
        assert difference["apart"] < 1.1 * difference["whole"] < difference["merged"]


def test_folded_factors_equal_the_scorers() -> None:
    """They are scaled in float32 and rounded once, as in `fold_scale`, for any scale."""
    base, trained = parameters(SMALL)
    tokens_BT = jax.random.randint(jax.random.key(2), (4, 9), 0, 1024)
    factors, unscaled = lora.fold_scale(trained, KIND, BF16)
    adapted = make_model(SMALL, dtype=BF16, lora=KIND)
    actual = scored(adapted.clone(lora=unscaled), {"params": base, LORA: factors}, tokens_BT)
    expected = scored(adapted, {"params": base, LORA: trained}, tokens_BT)
    np.testing.assert_array_equal(actual, expected)
    layers = transformer.unstack_layers(base, 2), transformer.unstack_layers(factors, 2)
    by_layer = adapted.clone(lora=unscaled, scan=False)
    apart = decoded(by_layer, {"params": layers[0], LORA: layers[1]}, tokens_BT)
    np.testing.assert_allclose(apart, expected, atol=0.1)
    for kind in (None, "int8"):  # kernels that are already quantised stay as they are
        rounded = quantised.quantise_params(base, "int8", BF16)
        again = quantised.quantise_params(rounded, kind, BF16)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, rounded))
