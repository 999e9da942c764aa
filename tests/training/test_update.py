"""Tests one optimiser step: equivalent settings, shardings, donation, and a teacher equal to the
student."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill.batch import Batch
from distill.objectives import losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.training import update, update_metrics
from models import families, transformer
from models.errors import UserError
from tests.support.updates import CONFIG, TEACHER, one_update, placed, scored_by

B, T = 8, 24


hidden_of = jax.jit(forward.compute_hidden, static_argnums=0)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b2=0.95))


def make_programs(qwen3, loss, state, mib):
    return update.make_update(qwen3, optimizer(), loss, update.UpdateOptions(T, mib), state)


def batch(seed=0):
    """Makes rows with very unequal numbers of trained tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.array([24, 3, 9, 24, 5, 14, 2, 20])
    segments = (np.arange(T)[None] < lengths[:, None]).astype(np.int32)
    mask = (segments > 0) & (np.arange(T)[None] >= 1)
    tokens = rng.integers(0, 96, (B, T)).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    arrays: Any = (tokens, positions, segments, mask)
    return Batch(*arrays)


def curve(objective="opd", sizes=(1, 1, 1), accumulate=1, remat=False, scan=True, steps=3):
    """Returns losses and gradient norms of a few steps, the final state, and the step's
    compilation."""
    mesh = mesh_lib.make_mesh(*sizes)
    with mesh_lib.use_mesh(mesh):
        student = placed(CONFIG, 0, mesh)
        teacher = placed(TEACHER, 1, mesh)
        state = update.init_train_state(optimizer(), student, 0)
        qwen3 = families.make_model(CONFIG, remat=remat, scan=scan)
        loss, mib = losses.OBJECTIVES[objective], 4e-3 * mesh.size
        programs = make_programs(qwen3, loss, state, mib)
        lowered, numbers = None, []
        for i in range(steps):
            data = jax.device_put(batch(i), mesh_lib.make_row_sharding(mesh))
            if objective == "opd":
                hidden = hidden_of(families.make_model(TEACHER), teacher, data)
                data = scored_by(data, hidden, transformer.get_output_head(teacher))
            if i == 0:
                sums = jax.eval_shape(programs.accumulate, None, state.params, data)[1]
                lowered = (
                    programs.accumulate.lower(state.params, state.params, data),
                    programs.apply.lower(state, state.params, sums, 1),
                )
            state, measured, stats = one_update(programs, state, data, accumulate=accumulate)
            numbers.append([float(measured["loss"]), float(measured["grad_norm"])])
    return np.array(numbers), state, lowered, stats


@pytest.fixture(scope="module")
def golden():
    return curve()


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 8},
        {"accumulate": 2},
        {"remat": True},
        {"sizes": (1, 8, 1)},
        {"sizes": (8, 1, 1)},
        {"sizes": (1, 2, 4)},
        {"sizes": (2, 2, 2), "accumulate": 2, "remat": True},
        {"sizes": (1, 2, 1, 1, 4)},
    ],
    ids=str,
)
def test_equivalent_settings_give_the_same_curve(golden, change):
    numbers, state, _, stats = curve(**change)
    np.testing.assert_allclose(numbers, golden[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numbers[0], golden[0][0], rtol=1e-5, atol=1e-6)
    for name, x in golden[3].items():
        np.testing.assert_allclose(stats[name], x, rtol=2e-3, atol=2e-3)
    assert int(state.step) == 3


def test_loss_is_divided_by_the_global_token_count(golden):
    """The loss is Σ over tokens / all tokens, not a mean of means over rows."""
    numbers, _, _, _ = curve("sft", steps=1)
    data = batch(0)
    params = placed(CONFIG, 0, mesh_lib.make_mesh(1, 1, 1))
    logits = hidden_of(families.make_model(CONFIG), params, data) @ params["embed"].T
    logp = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    rows, columns = np.nonzero(data.mask_BT[:, 1:])
    targets = data.tokens_BT[:, 1:][rows, columns]
    np.testing.assert_allclose(numbers[0, 0], -logp[rows, columns, targets].mean(), rtol=1e-5)


def test_distilling_a_model_from_itself_has_zero_gradient():
    """The loss and the gradient norm are zero up to rounding."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    with mesh_lib.use_mesh(mesh):
        params = placed(CONFIG, 0, mesh)
        data = batch()
        hidden = hidden_of(families.make_model(CONFIG), params, data)
        data = scored_by(data, hidden, jnp.array(transformer.get_output_head(params)))
        state = update.init_train_state(optimizer(), params, 0)
        programs = make_programs(families.make_model(CONFIG), losses.OBJECTIVES["opd"], state, 4e-3)
        _, measured, _ = one_update(programs, state, data)
    assert abs(float(measured["loss"])) < 1e-6
    assert float(measured["grad_norm"]) < 1e-5


def test_blank_rows_do_not_change_the_loss():
    mesh = mesh_lib.make_mesh(1, 1, 1)
    params = placed(CONFIG, 0, mesh)

    def loss(data):
        options = update.UpdateOptions(T, 1.0)
        total, (sums, _) = update.compute_loss_sums(
            families.make_model(CONFIG), losses.OBJECTIVES["sft"], options, params, data
        )
        return float(total), float(sums["loss"][1])

    whole = batch()
    blank = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), whole)
    np.testing.assert_allclose(loss(blank), loss(whole), rtol=1e-6)


EXPECTED = {
    "embed": (mesh_lib.VOCABULARY_AXES, None),
    "final_norm.scale": (None,),
    "layers.attention.q.kernel": (None, ("fsdp", "context"), "tensor"),
    "layers.attention.k.kernel": (None, ("fsdp", "context"), "tensor"),
    "layers.attention.v.kernel": (None, ("fsdp", "context"), "tensor"),
    "layers.attention.o.kernel": (None, "tensor", ("fsdp", "context")),
    "layers.attention.q_norm.scale": (None, None),
    "layers.attention.k_norm.scale": (None, None),
    "layers.attention_norm.scale": (None, None),
    "layers.mlp_norm.scale": (None, None),
    "layers.mlp.gate.kernel": (None, ("fsdp", "context"), "tensor"),
    "layers.mlp.up.kernel": (None, ("fsdp", "context"), "tensor"),
    "layers.mlp.down.kernel": (None, "tensor", ("fsdp", "context")),
}


def specs(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.sharding.spec)
        for path, leaf in paths
    }


@pytest.fixture(scope="module")
def sharded():
    return curve(sizes=(1, 2, 4), steps=1)


def padded(spec, rank):
    return spec + (None,) * (rank - len(spec))


def test_parameters_and_moments_keep_their_shardings(sharded):
    """After a step, each parameter and both of its moments are sharded as the table says."""
    state = sharded[1]
    ranks = {k: len(v) for k, v in EXPECTED.items()}
    actual = specs(state.params)
    assert {k: padded(v, ranks[k]) for k, v in actual.items()} == EXPECTED
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for moment in (adam.mu, adam.nu):
        assert {k: padded(v, ranks[k]) for k, v in specs(moment).items()} == EXPECTED


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_activations_have_their_shardings():
    """On 2 x 4: hidden states by rows over fsdp and tokens over tensor, heads over tensor, logits
    over the vocabulary."""
    mesh = mesh_lib.make_mesh(1, 2, 4)
    with mesh_lib.use_mesh(mesh):
        params = placed(CONFIG, 0, mesh)
        data = jax.device_put(batch(), mesh_lib.make_row_sharding(mesh))
        hidden = jax.jit(functools.partial(forward.compute_hidden, families.make_model(CONFIG)))(
            params, data
        )
        assert padded(tuple(hidden.sharding.spec), 3) in (
            (("data", "fsdp", "expert"), "tensor", None),
            ("fsdp", "tensor", None),
        )
        logits = jax.jit(lambda h, w: mesh_lib.split_vocabulary(jnp.einsum("BTD,VD->BTV", h, w)))(
            hidden, transformer.get_output_head(params)
        )
        assert tuple(logits.sharding.spec)[2] == ("fsdp", "tensor")  # expert is 1
        text = (
            jax.jit(functools.partial(forward.compute_hidden, families.make_model(CONFIG)))
            .lower(params, data)
            .compile()
            .as_text()
        )
    assert text is not None
    # queries and MLP activations of one device: B/2 rows, N/4 heads, F/4
    assert f"f32[{B // 2},{T},{48 // 4}]" in text
    assert f"f32[{B // 2},{T},{4 * 16 // 4}]" in text


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_batch_without_trained_tokens_changes_nothing(minibatches):
    """This holds despite momentum and decay; an empty update leaves the statistics of the others
    unchanged."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    with mesh_lib.use_mesh(mesh):
        state = update.init_train_state(optimizer(), placed(CONFIG, 0, mesh), 0)
        programs = make_programs(families.make_model(CONFIG), losses.OBJECTIVES["sft"], state, 1.0)

        def step(state, batch):
            """Rows interleave between the minibatches."""
            metrics = []
            for j in range(minibatches):
                part = jax.tree.map(lambda x, j=j: np.asarray(x)[j::minibatches], batch)
                last = j + 1 == minibatches
                put = [jax.device_put(part, mesh_lib.make_row_sharding(mesh))]
                state, measured, _ = programs.run_update(
                    state, put, single_microbatch=True, steps=int(last)
                )
                metrics.append(measured)
            return state, update_metrics.average_metrics(metrics)

        whole = batch()
        state, _ = step(state, whole)
        before = jax.tree.map(lambda x: np.array(x), state)  # copies, because the state is donated
        nothing: Any = np.zeros_like(whole.mask_BT)
        state, measured = step(state, dataclasses.replace(whole, mask_BT=nothing))
        assert int(state.step) == 2 and measured["trained_tokens"] == 0
        assert np.isnan(measured["loss"]) and measured["grad_norm"] == 0
        assert jax.tree.all(jax.tree.map(np.array_equal, before.params, state.params))
        assert jax.tree.all(jax.tree.map(np.array_equal, before.opt_state, state.opt_state))
        half: Any = np.where(np.arange(B)[:, None] % 2, whole.mask_BT, False)  # rows interleave
        state, measured = step(state, dataclasses.replace(whole, mask_BT=half))
        assert np.isfinite(measured["loss"]) and measured["trained_tokens"] == half[:, 1:].sum()
        counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32}
        assert counts == {minibatches + 1}  # updates with trained tokens


def test_the_state_is_donated(golden):
    """Every array of the new state reuses the buffer of an old one, and so does the gradient."""
    state, (accumulate, apply) = golden[1], golden[2]
    for lowered, tree in ((accumulate, state.params), (apply, state)):
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= size


def test_indivisible_heads_are_refused():
    with pytest.raises(UserError, match="num_attention_heads=4 does not divide by mesh axis tens"):
        mesh_lib.check_divisible(CONFIG, mesh_lib.make_mesh(1, 1, 8), "config.json")
