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
from models import transformer
from models.layers import moe
from models.transformer import Params, Transformer

KL_OFFSETS = (0, 16, 64, 256, 1024, 4096, 16384)  # in a response, between which the KL is reported

PARTIAL_METRICS = (
    "/",
    "_from_",
    "stop_",
)  # in names of figures that some batches have no tokens for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of a run; the teacher is no part of it, nor is a frozen base."""

    params: Params  # what is trained: all parameters, or the collection LORA alone
    opt_state: optax.OptState
    step: jax.Array  # int32 scalar: steps done, over all stages
    ema_params: Params | None = None  # the moving average of `params`, where one is kept


def init_train_state(
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int,
    ema_params: Params | None = None,
) -> TrainState:
    """A fresh optimiser around `params`; its moments are sharded as the parameters are."""
    opt_state = make_optimizer_init(optimizer, params)(params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    count = mesh_lib.to_global_array(np.int32(step), mesh_lib.make_replicated_sharding(mesh))
    return TrainState(params, opt_state, count, ema_params)


def make_optimizer_init(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """What makes the optimiser's state of parameters like these, which may be shapes: jitted."""
    return jax.jit(optimizer.init, out_shardings=_make_opt_state_shardings(optimizer, params))


def _make_opt_state_shardings(optimizer: optax.GradientTransformation, params: Params):
    """Shardings of the optimiser's state: what mirrors a parameter (its path ends in the
    parameter's, and the shape is the same) lies as that does, the rest on every device."""
    owners = dict(jax.tree_util.tree_leaves_with_path(params))
    replicated = mesh_lib.make_replicated_sharding(jax.tree.leaves(params)[0].sharding.mesh)

    def find_sharding(path: tuple, x: jax.ShapeDtypeStruct):
        tails = (owners.get(path[i:]) for i in range(len(path)))
        owner = next((p for p in tails if p is not None and p.shape == x.shape), None)
        return replicated if owner is None else owner.sharding

    return jax.tree_util.tree_map_with_path(find_sharding, jax.eval_shape(optimizer.init, params))


def make_abstract_state(
    optimizer: optax.GradientTransformation, params: Params, has_ema: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState, for restoring one."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(optimizer.init, params),
        _make_opt_state_shardings(optimizer, params),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.make_replicated_sharding(mesh))
    ema_params = params if has_ema else None
    return TrainState(params, opt_state, step, ema_params)  # pyright: ignore[reportArgumentType]


def _shift_top(top_BTK: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array] | None:
    return None if top_BTK is None else (losses.shift(top_BTK[0]), losses.shift(top_BTK[1]))


def _shift_known(batch: Batch) -> losses.Stats:
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


def compute_loss_sums(
    model: Transformer,
    loss: losses.Loss,
    max_response_tokens: int,
    loss_chunk_mib: float,
    params: Params,
    batch: Batch,
    teacher_head_VE: fused_head.TeacherArrays,
    frozen: Params | None = None,
    balance: float = 0.0,
    overlap: int = 0,
    temperature: float = 1.0,
) -> tuple[jax.Array, tuple[run_files.MetricSums, losses.Stats]]:
    """The weighted sum of the loss, and (sum, count) pairs and [B, T] stats beside it.

    params: what is trained: with `frozen` parameters, the LoRA beside them.
    balance: weight of the routers' load-balancing loss (models.layers.moe.summary), which counts as
      often as `count` of the loss. It is a product of two means, not a sum over tokens: with
      accumulation it is that of each micro-batch, over all devices, and not of the whole batch,
      whose loads are known only when the last one is through (arXiv 2501.11873 on the difference).
    overlap: compare so many of the teacher's likeliest tokens with the student's.
    temperature: that all models are read at.
    """
    params, lora = (params, None) if frozen is None else (frozen, params)
    hidden_BTD, routing = forward.compute_hidden_and_router_stats(model, params, batch, lora)
    known = _shift_known(batch)
    mask_BT, segments_BT = known["mask_BT"], known["segments_BT"]
    weight_BT, count = losses.compute_token_weights(loss, mask_BT, segments_BT, max_response_tokens)

    def compute_token_losses(stats: losses.Stats, known: losses.Stats) -> losses.Stats:
        if loss.tis_clip and batch.old_logp_BT is None:  # the first update of a step: none since
            known = {**known, "old_logp_BT": jax.lax.stop_gradient(stats["logp"])}
        return losses.compute_token_losses(loss, stats, **known)

    stats = fused_head.compute_token_stats(
        hidden_BTD,
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        batch.teacher_hidden_BTD,
        teacher_head_VE,
        loss_chunk_mib=loss_chunk_mib,
        split=mesh_lib.split_vocabulary,
        divergence=loss.teacher_divergence,
        teacher_top_BTK=_shift_top(batch.teacher_top_BTK),
        teacher_weight_BTN=batch.teacher_weight_BTN,
        overlap=overlap,
        baseline=loss.baseline,
        temperature=temperature,
        loss=compute_token_losses if loss.is_per_token else None,
        known=known,
        weight_BT=weight_BT,
        mask_BT=mask_BT,
        shards=mesh_lib.count_shards(*mask_BT.shape),
    )
    if loss.is_per_token:
        total = stats.pop("total")
    else:
        stats |= compute_token_losses(stats, known)
        total = jnp.sum(stats["loss"] * weight_BT)
    mask_BT = mask_BT.astype(jnp.float32)
    tokens = jnp.sum(mask_BT)
    if batch.sampler_logp_BT is not None:
        stats["sampler_delta"] = jnp.abs(stats["logp"] - known["sampler_logp_BT"])
    sums = {name: (jnp.sum(x * mask_BT), tokens) for name, x in stats.items()}
    sums |= {"loss": (total, count), **routing}
    if "reverse_kl" in stats:
        offsets = tuple(place for place in KL_OFFSETS if place < max_response_tokens)
        kl_by_offset = advantages.sum_by_position(
            stats["reverse_kl"], mask_BT, segments_BT, offsets
        )
        sums |= {f"reverse_kl_from_{place}": x for place, x in kl_by_offset.items()}
    if batch.thinking_BT is not None:
        sums |= _sum_by_mode(stats, mask_BT, losses.shift(batch.thinking_BT))
    if batch.finished_BT is not None:
        sums |= sum_stop_logps(stats, mask_BT, losses.shift(batch.finished_BT))
    if balance:
        load_LE, p_LE = (of / seen for of, seen in (sums["load_LE"], sums["p_LE"]))
        total += balance * count * moe.summarise_load(load_LE, p_LE)["load_balancing_loss"]
    return total, (sums, {k: losses.unshift(x * mask_BT) for k, x in stats.items()})


def sum_stop_logps(
    stats: losses.Stats, mask_BT: jax.Array, finished_BT: jax.Array
) -> run_files.MetricSums:
    """How likely the stop tokens of responses that have one are to the student, and to the teacher:
    where the teacher would write on, lengths are about to grow. Aligned by losses.shift."""
    last_BT = mask_BT * (1 - losses.shift(mask_BT)) * finished_BT
    names = {"logp": "stop_logp", "teacher_logp": "teacher_stop_logp"}
    return {
        told: (jnp.sum(stats[name] * last_BT), jnp.sum(last_BT))
        for name, told in names.items()
        if name in stats
    }


def _sum_by_mode(
    stats: losses.Stats, mask_BT: jax.Array, thinking_BT: jax.Array
) -> run_files.MetricSums:
    """What foresees collapse, of the tokens of each mode apart."""
    modes = {"think": mask_BT * thinking_BT, "no_think": mask_BT * ~thinking_BT}
    return {
        f"{name}/{mode}": (jnp.sum(stats[name] * of_BT), jnp.sum(of_BT))
        for name in ("reverse_kl", "entropy", "logp")
        if name in stats
        for mode, of_BT in modes.items()
    }


@dataclasses.dataclass(frozen=True)
class UpdatePrograms:
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
    init_gradient: Callable[..., Any]
    merge_figures: Callable[..., Any]
    apply: Callable[..., Any]
    compute_logp: Callable[..., Any]

    def run_update(
        self,
        state: TrainState,
        microbatches: Iterable[Batch],
        heads: fused_head.TeacherArrays = None,
        frozen: Params | None = None,
        *,
        prepare_batch: Callable[[Batch], Batch] = lambda batch: batch,
        keep_stats: Container[int] | None = None,
        single_microbatch: bool = False,
        steps: int = 1,
    ) -> tuple[TrainState, dict[str, jax.Array], dict[int, losses.Stats]]:
        """One update, which counts as so many `steps`; and the stats of the micro-batches whose
        numbers are in `keep`, of all by default.

        Each micro-batch is made `ready` when the one before it is done with, and nothing of it is
        held on to: what `ready` adds, the teachers' hidden states, exists of one at a time. The
        host meanwhile makes the next. `single`: there is but one, and no gradient has to lie beside
        its own.
        """
        gradient, figures, kept_stats = (
            None if single_microbatch else self.init_gradient(state.params),
            None,
            {},
        )
        for number, batch in enumerate(microbatches):
            jax.block_until_ready(state.step if figures is None else figures)
            # Nothing else holds what is made ready: the teachers' states end with the call.
            gradient, new_figures, stats = mesh_lib.wait_on_cpu(
                self.accumulate(gradient, state.params, prepare_batch(batch), heads, frozen)
            )
            figures = new_figures if figures is None else self.merge_figures(figures, new_figures)
            if keep_stats is None or number in keep_stats:
                kept_stats[number] = stats
        state, metrics = mesh_lib.wait_on_cpu(self.apply(state, gradient, figures, steps))
        return state, metrics, kept_stats


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    loss: losses.Loss,
    max_response_tokens: int,
    loss_chunk_mib: float,
    state: TrainState,
    balance: float = 0.0,
    overlap: int = 0,
    ema: float = 0.0,
    temperature: float = 1.0,
) -> UpdatePrograms:
    """The jitted programs of an update.

    `state` gives shardings, which the new state keeps; it may be of shapes alone. The gradient is
    that of Σ weight·loss / Σ count over the whole batch (losses.weights, of which `limit` is one),
    in however many micro-batches and devices: sums are added up in float32 and divided once. Of
    `balance`, `overlap` and `temperature` see `loss_sums`. `ema` is the decay of the state's moving
    average.
    """
    compute_sums = functools.partial(
        compute_loss_sums, model, loss, max_response_tokens, loss_chunk_mib
    )
    compute_sums = functools.partial(
        compute_sums, balance=balance, overlap=overlap, temperature=temperature
    )

    def accumulate(
        gradient: Params | None,
        params: Params,
        batch: Batch,
        heads: fused_head.TeacherArrays,
        frozen: Params | None = None,
    ):
        value_and_grad = jax.value_and_grad(compute_sums, has_aux=True)
        (_, (sums, stats)), new_gradient = value_and_grad(params, batch, heads, frozen)
        max_ratio = jnp.max(stats["ratio"]) if "ratio" in stats else None
        gradient = (
            new_gradient if gradient is None else jax.tree.map(jnp.add, gradient, new_gradient)
        )
        return gradient, (sums, max_ratio), stats

    def merge_figures(left: Any, right: Any):
        max_ratio = None if left[1] is None else jnp.maximum(left[1], right[1])
        return jax.tree.map(jnp.add, left[0], right[0]), max_ratio

    def compute_logp(params: Params, batch: Batch, frozen: Params | None = None):
        params, lora = (params, None) if frozen is None else (frozen, params)
        stats = fused_head.compute_token_stats(
            forward.compute_hidden_and_router_stats(model, params, batch, lora)[0],
            transformer.get_output_head(params),
            losses.shift(batch.tokens_BT),
            loss_chunk_mib=loss_chunk_mib,
            split=mesh_lib.split_vocabulary,
            temperature=temperature,
            mask_BT=losses.shift(batch.mask_BT),
            shards=mesh_lib.count_shards(*batch.tokens_BT.shape),
        )
        return losses.unshift(stats["logp"])

    def init_gradient(params: Params):
        return jax.tree.map(jnp.zeros_like, params)

    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    options = xla.get_compiler_options(jax.tree.leaves(state_shardings)[0].mesh)
    param_shardings = state_shardings.params
    return UpdatePrograms(
        jax.jit(
            accumulate,
            donate_argnums=0,
            out_shardings=(param_shardings, None, None),
            compiler_options=options,
        ),
        jax.jit(init_gradient, out_shardings=param_shardings),
        jax.jit(merge_figures),
        jax.jit(
            functools.partial(_apply_update, optimizer, ema),
            donate_argnums=0,
            out_shardings=(state_shardings, None),
        ),
        jax.jit(compute_logp, compiler_options=options),
    )


def _apply_update(
    optimizer: optax.GradientTransformation,
    ema: float,
    state: TrainState,
    gradient: Params,
    figures: tuple[run_files.MetricSums, jax.Array | None],
    steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after an update, and its metrics."""
    sums, max_ratio = figures
    # All weights are 0 where the count is.
    count = jnp.maximum(sums["loss"][1], 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    trained = sums["logp"][1] > 0
    params, opt_state = _update_params(optimizer, gradient, state, trained)
    metrics = run_files.compute_means(sums)
    if "load_LE" in metrics:  # summed over all micro-batches: figures of the whole batch
        metrics |= moe.summarise_load(metrics.pop("load_LE"), metrics.pop("p_LE"))
    metrics["grad_norm"] = optax.tree.norm(gradient)
    metrics["trained_tokens"] = sums["logp"][1]
    if max_ratio is not None:
        metrics["ratio_max"] = max_ratio
    average = state.ema_params
    if average is not None:
        pace = jnp.where(trained, 1 - ema, 0)
        average = jax.tree.map(lambda a, p: a + pace * (p - a), average, params)
    return TrainState(params, opt_state, state.step + steps, average), metrics


def _update_params(
    optimizer: optax.GradientTransformation, grads: Params, state: TrainState, trained: jax.Array
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimiser's state after an update. Without a token to train on (a
    budget that ended no row, groups that were all dropped) nothing moves, by momentum neither."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    after = optax.apply_updates(state.params, updates), opt_state
    before = state.params, state.opt_state
    return jax.tree.map(lambda new, old: jnp.where(trained, new, old), after, before)


@jax.jit
def average_metrics(update_metrics: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of a step of several updates; what has no tokens in some of them is measured by
    the others."""
    listed = jax.tree.map(lambda *x: jnp.stack(x), *update_metrics)
    trained = listed["trained_tokens"] > 0
    trained |= ~jnp.any(trained)
    return {
        name: jnp.nanmean(x)
        if any(part in name for part in PARTIAL_METRICS)
        else jnp.mean(x, where=trained)
        for name, x in listed.items()
    }
