"""One step of the optimiser: accumulate sums over micro-batches, divide once, update, donate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill import advantages, compiled, forward, head, losses, metrics
from distill import mesh as mesh_lib
from distill.batch import Batch, parts, whole
from models.qwen3 import model, moe
from models.qwen3.model import Params, Qwen3

PLACES = (0, 16, 64, 256, 1024, 4096, 16384)  # in a response, between which the KL is reported

PARTIAL = ("/", "_from_", "stop_")  # in names of figures that some batches have no tokens for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of a run; the teacher is no part of it, nor is a frozen base."""

    params: Params  # what is trained: all parameters, or the collection LORA alone
    opt_state: optax.OptState
    step: jax.Array  # int32 scalar: steps done, over all stages
    average: Params | None = None  # the moving average of `params`, where one is kept


# (state, batch, teacher's head or None[, frozen parameters]) -> (state, metrics, per-token stats)
Step = Callable[..., tuple[TrainState, dict[str, jax.Array], losses.Stats]]


def init(
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int,
    average: Params | None = None,
) -> TrainState:
    """A fresh optimiser around `params`; its moments are sharded as the parameters are."""
    opt_state = jax.jit(optimizer.init, out_shardings=_like(optimizer, params))(params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    count = mesh_lib.put(np.int32(step), mesh_lib.replicated(mesh))
    return TrainState(params, opt_state, count, average)


def _like(optimizer: optax.GradientTransformation, params: Params):
    """Shardings of the optimiser's state: what mirrors a parameter (its path ends in the
    parameter's, and the shape is the same) lies as that does, the rest on every device."""
    owners = dict(jax.tree_util.tree_leaves_with_path(params))
    replicated = mesh_lib.replicated(jax.tree.leaves(params)[0].sharding.mesh)

    def place(path: tuple, x: jax.ShapeDtypeStruct):
        tails = (owners.get(path[i:]) for i in range(len(path)))
        owner = next((p for p in tails if p is not None and p.shape == x.shape), None)
        return replicated if owner is None else owner.sharding

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def abstract(
    optimizer: optax.GradientTransformation, params: Params, average: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState, for restoring one."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(optimizer.init, params),
        _like(optimizer, params),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
    kept = params if average else None
    return TrainState(params, opt_state, step, kept)  # pyright: ignore[reportArgumentType]


def _shifted(top_BTK: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array] | None:
    return None if top_BTK is None else (losses.shift(top_BTK[0]), losses.shift(top_BTK[1]))


def _of_tokens(share_BN: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    return (
        None
        if share_BN is None
        else jnp.broadcast_to(share_BN[:, None], (*shape, share_BN.shape[1]))
    )


def _known(batch: Batch) -> losses.Stats:
    """What losses.token_losses is to know of tokens, shifted."""
    known = {
        "mask_BT": batch.mask_BT,
        "segments_BT": batch.segments_BT,
        "sampler_logp_BT": batch.sampler_logp_BT,
        "old_logp_BT": batch.old_logp_BT,
        "reference_logp_BT": batch.reference_logp_BT,
    }
    known = {name: losses.shift(x) for name, x in known.items() if x is not None}
    if batch.advantages_B is not None:
        shape = batch.tokens_BT.shape
        known["advantages_BT"] = jnp.broadcast_to(batch.advantages_B[:, None], shape)
    return known


def loss_sums(
    qwen3: Qwen3,
    loss: losses.Loss,
    limit: int,
    logits_mib: float,
    params: Params,
    batch: Batch,
    teacher_head_VE: head.Teachers,
    frozen: Params | None = None,
    balance: float = 0.0,
    overlap: int = 0,
) -> tuple[jax.Array, tuple[metrics.Sums, losses.Stats]]:
    """The weighted sum of the loss, and (sum, count) pairs and [B, T] stats beside it.

    params: what is trained: with `frozen` parameters, the LoRA beside them.
    balance: weight of the routers' load-balancing loss (models.qwen3.moe.summary), which counts as
      often as `count` of the loss. It is a product of two means, not a sum over tokens: with
      accumulation it is that of each micro-batch, over all devices, and not of the whole batch,
      whose loads are known only when the last one is through (arXiv 2501.11873 on the difference).
    overlap: compare so many of the teacher's likeliest tokens with the student's.
    """
    params, lora = (params, None) if frozen is None else (frozen, params)
    hidden_BTD, routing = forward.routed(qwen3, params, batch, lora)
    known = _known(batch)
    mask_BT, segments_BT = known["mask_BT"], known["segments_BT"]
    weight_BT, count = losses.weights(loss, mask_BT, segments_BT, limit)

    def of_tokens(stats: losses.Stats, known: losses.Stats) -> losses.Stats:
        if loss.truncate and batch.old_logp_BT is None:  # the first update of a step: none since
            known = {**known, "old_logp_BT": jax.lax.stop_gradient(stats["logp"])}
        return losses.token_losses(loss, stats, **known)

    stats = head.token_stats(
        hidden_BTD,
        model.head(params),
        losses.shift(batch.tokens_BT),
        batch.teacher_hidden_BTD,
        teacher_head_VE,
        logits_mib=logits_mib,
        split=mesh_lib.split_vocabulary,
        divergence=loss.compared,
        teacher_top_BTK=_shifted(batch.teacher_top_BTK),
        teacher_share_BTN=_of_tokens(batch.teacher_share_BN, mask_BT.shape),
        overlap=overlap,
        baseline=loss.baseline,
        loss=of_tokens if loss.by_token else None,
        known=known,
        weight_BT=weight_BT,
        mask_BT=mask_BT,
        shards=mesh_lib.shards(*mask_BT.shape),
    )
    if loss.by_token:
        total = stats.pop("total")
    else:
        stats |= of_tokens(stats, known)
        total = jnp.sum(stats["loss"] * weight_BT)
    mask_BT = mask_BT.astype(jnp.float32)
    tokens = jnp.sum(mask_BT)
    if batch.sampler_logp_BT is not None:
        stats["sampler_delta"] = jnp.abs(stats["logp"] - known["sampler_logp_BT"])
    sums = {name: (jnp.sum(x * mask_BT), tokens) for name, x in stats.items()}
    sums |= {"loss": (total, count), **routing}
    if "reverse_kl" in stats:
        places = tuple(place for place in PLACES if place < limit)
        by_place = advantages.by_offset(stats["reverse_kl"], mask_BT, segments_BT, places)
        sums |= {f"reverse_kl_from_{place}": x for place, x in by_place.items()}
    if batch.thinking_BT is not None:
        sums |= _by_mode(stats, mask_BT, losses.shift(batch.thinking_BT))
    if batch.finished_B is not None:
        sums |= stops(stats, mask_BT, batch.finished_B)
    if balance:
        load_LE, p_LE = (of / seen for of, seen in (sums["load_LE"], sums["p_LE"]))
        total += balance * count * moe.summary(load_LE, p_LE)["load_balancing_loss"]
    return total, (sums, {k: losses.unshift(x * mask_BT) for k, x in stats.items()})


def stops(stats: losses.Stats, mask_BT: jax.Array, finished_B: jax.Array) -> metrics.Sums:
    """How likely the stop tokens of responses that have one are to the student, and to the teacher:
    where the teacher would write on, lengths are about to grow. Aligned by losses.shift."""
    last_BT = mask_BT * (1 - losses.shift(mask_BT)) * finished_B[:, None]
    names = {"logp": "stop_logp", "teacher_logp": "teacher_stop_logp"}
    return {
        told: (jnp.sum(stats[name] * last_BT), jnp.sum(last_BT))
        for name, told in names.items()
        if name in stats
    }


def _by_mode(stats: losses.Stats, mask_BT: jax.Array, thinking_BT: jax.Array) -> metrics.Sums:
    """What foresees collapse, of the tokens of each mode apart."""
    modes = {"think": mask_BT * thinking_BT, "no_think": mask_BT * ~thinking_BT}
    return {
        f"{name}/{mode}": (jnp.sum(stats[name] * of_BT), jnp.sum(of_BT))
        for name in ("reverse_kl", "entropy", "logp")
        if name in stats
        for mode, of_BT in modes.items()
    }


def make(
    qwen3: Qwen3,
    optimizer: optax.GradientTransformation,
    loss: losses.Loss,
    limit: int,
    accumulate: int,
    logits_mib: float,
    state: TrainState,
    balance: float = 0.0,
    overlap: int = 0,
    minibatches: int = 1,
    epochs: int = 1,
    ema: float = 0.0,
) -> Step:
    """The jitted step: see Step.

    `state` gives shardings, which the new state keeps. The state is donated, and nothing else. The
    gradient is that of Σ weight·loss / Σ count over the whole batch (losses.weights, of which
    `limit` is one), in however many micro-batches and devices: sums are accumulated in float32 and
    divided once. Of `balance` and `overlap` see `loss_sums`.

    A step's rows may give several updates: `minibatches` of them, `epochs` times over. The
    student's own log-probabilities from before the first then stand in the batch as `old_logp_BT`,
    and the metrics are means over updates.

    `ema` is the decay of the state's moving average, at every update. A teacher that is the average
    itself has None for a head, which then is the average's of before the step.
    """
    sums_of = functools.partial(
        loss_sums, qwen3, loss, limit, logits_mib, balance=balance, overlap=overlap
    )
    graded = jax.value_and_grad(sums_of, has_aux=True)

    def once(
        state: TrainState,
        batch: Batch,
        teacher_head_VE: head.Teachers,
        frozen: Params | None = None,
    ):
        grad = functools.partial(graded, frozen=frozen)
        if accumulate == 1:
            (_, (sums, stats)), grads = grad(state.params, batch, teacher_head_VE)
        else:

            def body(carry, micro):
                (_, (sums, stats)), grads = grad(state.params, micro, teacher_head_VE)
                return jax.tree.map(jnp.add, carry, (sums, grads)), stats

            micros = parts(batch, accumulate)
            shapes = jax.eval_shape(
                lambda b: grad(state.params, b, teacher_head_VE),
                jax.tree.map(lambda x: x[0], micros),
            )
            (_, (sums_like, _)), grads_like = shapes
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (sums_like, grads_like))
            (sums, grads), stats = jax.lax.scan(body, zeros, micros)
            stats = whole(stats)
        count = jnp.maximum(sums["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        trained = sums["logp"][1] > 0
        params, opt_state = _moved(optimizer, grads, state, trained)
        measured = metrics.finalize(sums)
        if "load_LE" in measured:  # summed over all micro-batches: figures of the whole batch
            measured |= moe.summary(measured.pop("load_LE"), measured.pop("p_LE"))
        measured["grad_norm"] = optax.tree.norm(grads)
        measured["trained_tokens"] = sums["logp"][1]
        if "ratio" in stats:
            measured["ratio_max"] = jnp.max(stats["ratio"])
        average = state.average
        if average is not None:
            pace = jnp.where(trained, 1 - ema, 0)
            average = jax.tree.map(lambda a, p: a + pace * (p - a), average, params)
        return TrainState(params, opt_state, state.step + 1, average), measured, stats

    step = once
    if minibatches * epochs > 1:
        step = functools.partial(_several, once, sums_of, minibatches, epochs)
    return _jitted(step, state)


def _moved(
    optimizer: optax.GradientTransformation, grads: Params, state: TrainState, trained: jax.Array
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimiser's state after an update. Without a token to train on (a
    budget that ended no row, groups that were all dropped) nothing moves, by momentum neither."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, updates), opt_state
    before = state.params, state.opt_state
    return jax.tree.map(lambda new, old: jnp.where(trained, new, old), after, before)


def _jitted(step: Step, state: TrainState) -> Step:
    """`step`, with the head of the state's moving average where a teacher's is None: that cannot be
    an argument, for the state is donated. `state` says how the new one lies."""

    def headed(state: TrainState, batch: Batch, heads: Any, frozen: Params | None = None):
        if isinstance(heads, tuple):
            heads = tuple(model.head(state.average) if x is None else x for x in heads)
        return step(state, batch, heads, frozen)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        headed,
        donate_argnums=0,
        out_shardings=(shardings, None, None),
        compiler_options=compiled.options(jax.tree.leaves(shardings)[0].mesh),
    )


def _several(
    once: Step,
    sums_of: Callable,
    minibatches: int,
    epochs: int,
    state: TrainState,
    batch: Batch,
    teacher_head_VE: head.Teachers,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array], losses.Stats]:
    """A step of several updates by `once`; the stats are those of the last epoch."""
    _, (_, before) = sums_of(state.params, batch, teacher_head_VE, frozen)
    batch = dataclasses.replace(batch, old_logp_BT=jax.lax.stop_gradient(before["logp"]))
    several = parts(batch, minibatches)

    def one(state: TrainState, part: Batch):
        state, measured, stats = once(state, part, teacher_head_VE, frozen)
        return state, (measured, stats)

    def epoch(state: TrainState, _: None):
        return jax.lax.scan(one, state, several)

    after, (measured, stats) = jax.lax.scan(epoch, state, None, length=epochs)
    # What has no tokens in some of the updates is measured by the others.
    trained = measured["trained_tokens"] > 0
    trained |= ~jnp.any(trained)
    measured = {
        name: jnp.nanmean(x)
        if any(part in name for part in PARTIAL)
        else jnp.mean(x, where=trained)
        for name, x in measured.items()
    }
    stats = whole(jax.tree.map(lambda x: x[-1], stats))
    return dataclasses.replace(after, step=state.step + 1), measured, stats
