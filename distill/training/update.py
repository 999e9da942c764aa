"""An update by micro-batches: the gradient and all figures are added up, and divided once.

Two programs, of which the first runs once for each micro-batch: `accumulate` adds what one gives to
a gradient that it takes the place of, `apply` divides it, moves the parameters and takes the place
of the state. So any number of micro-batches makes a step, of programs that are compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill.batch import Batch
from distill.objectives import advantages, fused_head, losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files, xla
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


def init(
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int,
    average: Params | None = None,
) -> TrainState:
    """A fresh optimiser around `params`; its moments are sharded as the parameters are."""
    opt_state = starter(optimizer, params)(params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    count = mesh_lib.put(np.int32(step), mesh_lib.replicated(mesh))
    return TrainState(params, opt_state, count, average)


def starter(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """What makes the optimiser's state of parameters like these, which may be shapes: jitted."""
    return jax.jit(optimizer.init, out_shardings=_like(optimizer, params))


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


def _known(batch: Batch) -> losses.Stats:
    """What losses.token_losses is to know of tokens, shifted."""
    known = {
        "mask_BT": batch.mask_BT,
        "segments_BT": batch.segments_BT,
        "sampler_logp_BT": batch.sampler_logp_BT,
        "old_logp_BT": batch.old_logp_BT,
        "reference_logp_BT": batch.reference_logp_BT,
        "advantages_BT": batch.advantages_BT,
    }
    return {name: losses.shift(x) for name, x in known.items() if x is not None}


def loss_sums(
    qwen3: Qwen3,
    loss: losses.Loss,
    limit: int,
    logits_mib: float,
    params: Params,
    batch: Batch,
    teacher_head_VE: fused_head.Teachers,
    frozen: Params | None = None,
    balance: float = 0.0,
    overlap: int = 0,
    temperature: float = 1.0,
) -> tuple[jax.Array, tuple[run_files.Sums, losses.Stats]]:
    """The weighted sum of the loss, and (sum, count) pairs and [B, T] stats beside it.

    params: what is trained: with `frozen` parameters, the LoRA beside them.
    balance: weight of the routers' load-balancing loss (models.qwen3.moe.summary), which counts as
      often as `count` of the loss. It is a product of two means, not a sum over tokens: with
      accumulation it is that of each micro-batch, over all devices, and not of the whole batch,
      whose loads are known only when the last one is through (arXiv 2501.11873 on the difference).
    overlap: compare so many of the teacher's likeliest tokens with the student's.
    temperature: that all models are read at.
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

    stats = fused_head.token_stats(
        hidden_BTD,
        model.head(params),
        losses.shift(batch.tokens_BT),
        batch.teacher_hidden_BTD,
        teacher_head_VE,
        logits_mib=logits_mib,
        split=mesh_lib.split_vocabulary,
        divergence=loss.compared,
        teacher_top_BTK=_shifted(batch.teacher_top_BTK),
        teacher_share_BTN=batch.teacher_share_BTN,
        overlap=overlap,
        baseline=loss.baseline,
        temperature=temperature,
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
    if batch.finished_BT is not None:
        sums |= stops(stats, mask_BT, losses.shift(batch.finished_BT))
    if balance:
        load_LE, p_LE = (of / seen for of, seen in (sums["load_LE"], sums["p_LE"]))
        total += balance * count * moe.summary(load_LE, p_LE)["load_balancing_loss"]
    return total, (sums, {k: losses.unshift(x * mask_BT) for k, x in stats.items()})


def stops(stats: losses.Stats, mask_BT: jax.Array, finished_BT: jax.Array) -> run_files.Sums:
    """How likely the stop tokens of responses that have one are to the student, and to the teacher:
    where the teacher would write on, lengths are about to grow. Aligned by losses.shift."""
    last_BT = mask_BT * (1 - losses.shift(mask_BT)) * finished_BT
    names = {"logp": "stop_logp", "teacher_logp": "teacher_stop_logp"}
    return {
        told: (jnp.sum(stats[name] * last_BT), jnp.sum(last_BT))
        for name, told in names.items()
        if name in stats
    }


def _by_mode(stats: losses.Stats, mask_BT: jax.Array, thinking_BT: jax.Array) -> run_files.Sums:
    """What foresees collapse, of the tokens of each mode apart."""
    modes = {"think": mask_BT * thinking_BT, "no_think": mask_BT * ~thinking_BT}
    return {
        f"{name}/{mode}": (jnp.sum(stats[name] * of_BT), jnp.sum(of_BT))
        for name in ("reverse_kl", "entropy", "logp")
        if name in stats
        for mode, of_BT in modes.items()
    }


@dataclasses.dataclass(frozen=True)
class Update:
    """The programs of an update; `make` makes them, and the arguments are told there.

    accumulate: (gradient so far or None, parameters, micro-batch, teachers' heads, frozen
      parameters) -> (gradient, figures, [B, T] stats). The gradient so far is donated.
    zeros: (parameters) -> a gradient of zeros, for a first micro-batch that others follow.
    merge: (figures, figures) -> those of both.
    apply: (state, gradient, figures, steps that it ends) -> (state, metrics). The state is
      donated.
    logp: (parameters, micro-batch, frozen parameters) -> [B, T], of tokens under the parameters.
    """

    accumulate: Callable[..., Any]
    zeros: Callable[..., Any]
    merge: Callable[..., Any]
    apply: Callable[..., Any]
    logp: Callable[..., Any]

    def once(
        self,
        state: TrainState,
        microbatches: Iterable[Batch],
        heads: fused_head.Teachers = None,
        frozen: Params | None = None,
        *,
        ready: Callable[[Batch], Batch] = lambda batch: batch,
        keep: Container[int] | None = None,
        single: bool = False,
        steps: int = 1,
    ) -> tuple[TrainState, dict[str, jax.Array], dict[int, losses.Stats]]:
        """One update, which counts as so many `steps`; and the stats of the micro-batches whose
        numbers are in `keep`, of all by default.

        Each micro-batch is made `ready` when the one before it is done with, and nothing of it is
        held on to: what `ready` adds, the teachers' hidden states, exists of one at a time. The
        host meanwhile makes the next. `single`: there is but one, and no gradient has to lie beside
        its own.
        """
        gradient, figures, found = None if single else self.zeros(state.params), None, {}
        for number, batch in enumerate(microbatches):
            jax.block_until_ready(state.step if figures is None else figures)
            # Nothing else holds what is made ready: the teachers' states end with the call.
            gradient, more, stats = mesh_lib.settled(
                self.accumulate(gradient, state.params, ready(batch), heads, frozen)
            )
            figures = more if figures is None else self.merge(figures, more)
            if keep is None or number in keep:
                found[number] = stats
        state, measured = mesh_lib.settled(self.apply(state, gradient, figures, steps))
        return state, measured, found


def make(
    qwen3: Qwen3,
    optimizer: optax.GradientTransformation,
    loss: losses.Loss,
    limit: int,
    logits_mib: float,
    state: TrainState,
    balance: float = 0.0,
    overlap: int = 0,
    ema: float = 0.0,
    temperature: float = 1.0,
) -> Update:
    """The jitted programs of an update.

    `state` gives shardings, which the new state keeps; it may be of shapes alone. The gradient is
    that of Σ weight·loss / Σ count over the whole batch (losses.weights, of which `limit` is one),
    in however many micro-batches and devices: sums are added up in float32 and divided once. Of
    `balance`, `overlap` and `temperature` see `loss_sums`. `ema` is the decay of the state's moving
    average.
    """
    sums_of = functools.partial(loss_sums, qwen3, loss, limit, logits_mib)
    sums_of = functools.partial(sums_of, balance=balance, overlap=overlap, temperature=temperature)

    def accumulate(
        gradient: Params | None,
        params: Params,
        batch: Batch,
        heads: fused_head.Teachers,
        frozen: Params | None = None,
    ):
        graded = jax.value_and_grad(sums_of, has_aux=True)
        (_, (sums, stats)), more = graded(params, batch, heads, frozen)
        most = jnp.max(stats["ratio"]) if "ratio" in stats else None
        gradient = more if gradient is None else jax.tree.map(jnp.add, gradient, more)
        return gradient, (sums, most), stats

    def merge(one: Any, other: Any):
        most = None if one[1] is None else jnp.maximum(one[1], other[1])
        return jax.tree.map(jnp.add, one[0], other[0]), most

    def logp(params: Params, batch: Batch, frozen: Params | None = None):
        params, lora = (params, None) if frozen is None else (frozen, params)
        stats = fused_head.token_stats(
            forward.routed(qwen3, params, batch, lora)[0],
            model.head(params),
            losses.shift(batch.tokens_BT),
            logits_mib=logits_mib,
            split=mesh_lib.split_vocabulary,
            temperature=temperature,
            mask_BT=losses.shift(batch.mask_BT),
            shards=mesh_lib.shards(*batch.tokens_BT.shape),
        )
        return losses.unshift(stats["logp"])

    def zeros(params: Params):
        return jax.tree.map(jnp.zeros_like, params)

    lie = jax.tree.map(lambda x: x.sharding, state)
    options = xla.options(jax.tree.leaves(lie)[0].mesh)
    by = lie.params
    return Update(
        jax.jit(
            accumulate,
            donate_argnums=0,
            out_shardings=(by, None, None),
            compiler_options=options,
        ),
        jax.jit(zeros, out_shardings=by),
        jax.jit(merge),
        jax.jit(
            functools.partial(_applied, optimizer, ema), donate_argnums=0, out_shardings=(lie, None)
        ),
        jax.jit(logp, compiler_options=options),
    )


def _applied(
    optimizer: optax.GradientTransformation,
    ema: float,
    state: TrainState,
    gradient: Params,
    figures: tuple[run_files.Sums, jax.Array | None],
    steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after an update, and its metrics."""
    sums, most = figures
    # All weights are 0 where the count is.
    count = jnp.maximum(sums["loss"][1], 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    trained = sums["logp"][1] > 0
    params, opt_state = _moved(optimizer, gradient, state, trained)
    measured = run_files.finalize(sums)
    if "load_LE" in measured:  # summed over all micro-batches: figures of the whole batch
        measured |= moe.summary(measured.pop("load_LE"), measured.pop("p_LE"))
    measured["grad_norm"] = optax.tree.norm(gradient)
    measured["trained_tokens"] = sums["logp"][1]
    if most is not None:
        measured["ratio_max"] = most
    average = state.average
    if average is not None:
        pace = jnp.where(trained, 1 - ema, 0)
        average = jax.tree.map(lambda a, p: a + pace * (p - a), average, params)
    return TrainState(params, opt_state, state.step + steps, average), measured


def _moved(
    optimizer: optax.GradientTransformation, grads: Params, state: TrainState, trained: jax.Array
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimiser's state after an update. Without a token to train on (a
    budget that ended no row, groups that were all dropped) nothing moves, by momentum neither."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, updates), opt_state
    before = state.params, state.opt_state
    return jax.tree.map(lambda new, old: jnp.where(trained, new, old), after, before)


@jax.jit
def mean(measured: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of a step of several updates; what has no tokens in some of them is measured by
    the others."""
    listed = jax.tree.map(lambda *x: jnp.stack(x), *measured)
    trained = listed["trained_tokens"] > 0
    trained |= ~jnp.any(trained)
    return {
        name: jnp.nanmean(x)
        if any(part in name for part in PARTIAL)
        else jnp.mean(x, where=trained)
        for name, x in listed.items()
    }
