"""Runs an optimiser update on any number of micro-batches.

There are two main programs, each compiled once: `accumulate` adds the gradient of a micro-batch to
the sum in place; `apply` divides the sum once and updates the state in place.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill.batch import Batch
from distill.objectives import divergences, fused_head, losses, token_weights
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files, xla
from distill.training import update_metrics
from models import transformer
from models.errors import UserError
from models.layers import moe
from models.transformer import Params, Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that training changes. The fields are the entries of a checkpoint, by name."""

    params: Params  # trained parameters: all, or the LoRA alone
    opt_state: optax.OptState
    step: jax.Array  # int32 scalar: steps done, over all stages
    average: Params | None = None  # moving average of `params`, if kept


def init_train_state(
    optimizer: optax.GradientTransformation,
    params: Params,
    step: int,
    ema_params: Params | None = None,
) -> TrainState:
    """Returns a state with a fresh optimiser, whose moments are sharded like the parameters."""
    opt_state = make_optimizer_init(optimizer, params)(params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    count = mesh_lib.to_global_array(np.int32(step), mesh_lib.make_replicated_sharding(mesh))
    return TrainState(params, opt_state, count, ema_params)


def make_optimizer_init(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """Returns the jitted function parameters -> optimiser state. `params` may be shapes."""
    return jax.jit(optimizer.init, out_shardings=_make_opt_state_shardings(optimizer, params))


def _make_opt_state_shardings(optimizer: optax.GradientTransformation, params: Params):
    """Returns the shardings of the optimiser's state.

    An array that mirrors a parameter (its path ends in the parameter's, and its shape is the same)
    is sharded like the parameter; others are replicated.
    """
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
    """Returns the shapes, dtypes and shardings of a TrainState, for restoring one."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(optimizer.init, params),
        _make_opt_state_shardings(optimizer, params),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.make_replicated_sharding(mesh))
    ema_params = params if has_ema else None
    return TrainState(params, opt_state, step, ema_params)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """Options of an update: hashable, so static under jit."""

    max_response_tokens: int
    loss_chunk_mib: float  # MiB of float32 logits of one model in a chunk
    # Weight of the routers' load-balancing loss (models.layers.moe) per token of the loss. It is a
    # product of two means, not a sum over tokens, so with accumulation it is that of a micro-batch
    # over all devices, not of the whole batch (arXiv 2501.11873 discusses the difference).
    router_aux_loss_coef: float = 0.0
    overlap_k: int = 0  # most likely tokens of teacher and student to compare
    ema_decay: float = 0.0  # of the state's moving average
    temperature: float = 1.0  # of all models


def _split_lora(params: Params, frozen: Params | None) -> tuple[Params, Params | None]:
    """Returns (parameters, LoRA beside them), given trained parameters and the base of a LoRA."""
    return (params, None) if frozen is None else (frozen, params)


def _shift_known(batch: Batch) -> losses.Stats:
    """Returns the batch's arguments for losses.compute_token_losses, shifted."""
    known = {
        "mask_BT": batch.mask_BT,
        "segments_BT": batch.segments_BT,
        "sampler_logp_BT": batch.sampler_logp_BT,
        "old_logp_BT": batch.old_logp_BT,
        "reference_logp_BT": batch.reference_logp_BT,
        "advantages_BT": batch.advantages_BT,
        "teacher_logp_BT": batch.teacher_logp_BT,
    }
    return {name: losses.shift(x) for name, x in known.items() if x is not None}


def compute_loss_sums(
    model: Transformer,
    loss: losses.Loss,
    options: UpdateOptions,
    params: Params,
    batch: Batch,
    frozen: Params | None = None,
) -> tuple[jax.Array, tuple[run_files.MetricSums, losses.Stats]]:
    """Returns the weighted sum of the loss, (sum, count) pairs of metrics, and [B, T] stats, with
    `overlap_k` also the most likely tokens of both models [B, T, K] (divergences.TOP_STATS).

    params: trained parameters; if `frozen` is given, the LoRA beside it.
    """
    params, lora = _split_lora(params, frozen)
    hidden_BTD, router_sums = forward.compute_hidden_and_router_stats(model, params, batch, lora)
    known = _shift_known(batch)
    mask_BT = known["mask_BT"]
    weight_BT, count = token_weights.compute_token_weights(
        loss, mask_BT, known["segments_BT"], options.max_response_tokens
    )

    def compute_token_losses(stats: losses.Stats, known: losses.Stats) -> losses.Stats:
        if loss.tis_clip and batch.old_logp_BT is None:
            # In the first update of a step the student is still unchanged.
            known = {**known, "old_logp_BT": jax.lax.stop_gradient(stats["logp"])}
        return losses.compute_token_losses(loss, stats, **known)

    inputs = fused_head.HeadInputs(
        hidden_BTD,
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        mask_BT,
        batch.teacher,
        jax.tree.map(losses.shift, batch.teacher_top_BTK),
        known,
        weight_BT,
    )
    stats_options = fused_head.StatsOptions(
        options.loss_chunk_mib,
        mesh_lib.split_vocabulary,
        loss.teacher_divergence,
        overlap_k=options.overlap_k,
        baseline=loss.baseline,
        temperature=options.temperature,
        shards=mesh_lib.count_shards(*mask_BT.shape),
    )
    if loss.is_per_token:
        stats = fused_head.compute_token_stats(inputs, stats_options, compute_token_losses)
        total = stats.pop("total")
    else:
        stats = fused_head.compute_token_stats(inputs, stats_options)
        stats |= compute_token_losses(stats, known)
        total = jnp.sum(stats["loss"] * weight_BT)
    tops = {name: stats.pop(name) for name in divergences.TOP_STATS if name in stats}
    mask_BT = mask_BT.astype(jnp.float32)
    tokens = jnp.sum(mask_BT)
    if loss.weighs_tokens:
        stats["token_weight"], count = token_weights.complete_token_weights(weight_BT, stats)
    if batch.sampler_logp_BT is not None:
        stats["sampler_delta"] = jnp.abs(stats["logp"] - known["sampler_logp_BT"])
    sums = {name: (jnp.sum(x * mask_BT), tokens) for name, x in stats.items()}
    sums |= {"loss": (total, count), **router_sums}
    if loss.weighs_tokens:
        sums["token_weight_squared"] = (jnp.sum(stats["token_weight"] ** 2), tokens)
    sums |= update_metrics.sum_subsets(
        stats, mask_BT, known["segments_BT"], batch, options.max_response_tokens
    )
    if options.router_aux_loss_coef:
        load_LE, p_LE = (x / seen for x, seen in (sums["load_LE"], sums["p_LE"]))
        balance = moe.summarise_load(load_LE, p_LE)["load_balancing_loss"]
        total += options.router_aux_loss_coef * count * balance
    stats = {name: x * mask_BT for name, x in stats.items()} | tops
    return total, (sums, {name: losses.unshift(x) for name, x in stats.items()})


@dataclasses.dataclass(frozen=True)
class UpdatePrograms:
    """Jitted programs of an update, made by `make_update`. `frozen` is the base of a LoRA.

    accumulate: (gradient so far or None, parameters, micro-batch, frozen) -> (gradient, metric
      sums, [B, T] stats). Donates the gradient so far.
    init_gradient: (parameters) -> zero gradient, for the first of several micro-batches.
    merge_metrics: (metric sums, metric sums) -> their sum.
    apply: (state, gradient, metric sums, steps that the update ends) -> (state, metrics). Donates
      the state, and leaves it as it was if the loss or the gradient is not finite.
    compute_logp: (parameters, micro-batch, frozen) -> [B, T] log-probabilities of trained tokens.
    """

    accumulate: Callable[..., Any]
    init_gradient: Callable[..., Any]
    merge_metrics: Callable[..., Any]
    apply: Callable[..., Any]
    compute_logp: Callable[..., Any]

    def run_update(
        self,
        state: TrainState,
        microbatches: Iterable[Batch],
        frozen: Params | None = None,
        *,
        prepare_batch: Callable[[Batch], Batch] = lambda batch: batch,
        keep_stats: Container[int] | None = None,
        single_microbatch: bool = False,
        steps: int = 1,
    ) -> tuple[TrainState, dict[str, jax.Array], dict[int, losses.Stats]]:
        """Runs one update; returns the new state, metrics, and stats by the micro-batch's number.

        Args:
          prepare_batch: runs on a micro-batch once the previous one is done, so that the teachers'
            hidden states exist for one at a time, while the host collates the next.
          keep_stats: numbers of the micro-batches whose stats are returned; None: all.
          single_microbatch: there is one micro-batch, so no zero gradient is allocated.
          steps: increment of the state's step counter.
        """
        gradient = None if single_microbatch else self.init_gradient(state.params)
        metric_sums, kept_stats = None, {}
        for number, batch in enumerate(microbatches):
            jax.block_until_ready(state.step if metric_sums is None else metric_sums)
            # The prepared batch has no name, so that the teachers' states are freed here.
            gradient, new_sums, stats = mesh_lib.wait_on_cpu(
                self.accumulate(gradient, state.params, prepare_batch(batch), frozen)
            )
            metric_sums = self.merge_metrics(metric_sums, new_sums) if number else new_sums
            if keep_stats is None or number in keep_stats:
                kept_stats[number] = stats
        state, metrics = mesh_lib.wait_on_cpu(self.apply(state, gradient, metric_sums, steps))
        return state, metrics, kept_stats


def make_update(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    loss: losses.Loss,
    options: UpdateOptions,
    state: TrainState,
) -> UpdatePrograms:
    """Returns the jitted programs of an update.

    The gradient is that of Σ weight·loss / Σ count over the whole batch (token_weights.
    compute_token_weights) for any number of micro-batches and devices: sums are accumulated in
    float32 and divided once.

    state: gives the shardings, which the new state keeps. It may be of shapes alone.
    """

    def accumulate(
        gradient: Params | None, params: Params, batch: Batch, frozen: Params | None = None
    ):
        value_and_grad = jax.value_and_grad(
            functools.partial(compute_loss_sums, model, loss, options), has_aux=True
        )
        (_, (sums, stats)), new_gradient = value_and_grad(params, batch, frozen)
        max_ratio = jnp.max(stats["ratio"]) if "ratio" in stats else None
        if gradient is not None:
            new_gradient = jax.tree.map(jnp.add, gradient, new_gradient)
        return new_gradient, (sums, max_ratio), stats

    def merge_metrics(left: Any, right: Any):
        max_ratio = None if left[1] is None else jnp.maximum(left[1], right[1])
        return jax.tree.map(jnp.add, left[0], right[0]), max_ratio

    def compute_logp(params: Params, batch: Batch, frozen: Params | None = None):
        params, lora = _split_lora(params, frozen)
        # Uses the update's forward pass, which replays recorded experts.
        hidden_BTD, _ = forward.compute_hidden_and_router_stats(model, params, batch, lora)
        return forward.compute_logp(
            hidden_BTD, params, batch, options.loss_chunk_mib, options.temperature
        )

    def init_gradient(params: Params):
        return jax.tree.map(jnp.zeros_like, params)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiler_options = xla.get_compiler_options(jax.tree.leaves(shardings)[0].mesh)
    return UpdatePrograms(
        jax.jit(
            accumulate,
            donate_argnums=0,
            out_shardings=(shardings.params, None, None),
            compiler_options=compiler_options,
        ),
        jax.jit(init_gradient, out_shardings=shardings.params),
        jax.jit(merge_metrics),
        jax.jit(
            functools.partial(_apply_update, optimizer, options.ema_decay),
            donate_argnums=0,
            out_shardings=(shardings, None),
        ),
        jax.jit(compute_logp, compiler_options=compiler_options),
    )


def _apply_update(
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    gradient: Params,
    metric_sums: tuple[run_files.MetricSums, jax.Array | None],
    steps: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies the summed gradient; returns the new state and the metrics.

    The old state stays, but for the step, if there are no trained tokens (no row ended within its
    budget, or all groups were dropped), or if the loss or the gradient is not finite. So nothing
    changes, not even by momentum; `skipped_updates` counts the latter. Old or new is chosen for
    each element, in place. optax.apply_if_finite would not see the loss, and its branch needs
    memory for a second state.
    """
    sums, max_ratio = metric_sums
    # If it is 0, so are all weights; above 0, it is at least 1 unless tokens have weights.
    count = jnp.maximum(sums["loss"][1], 1e-30 if "token_weight" in sums else 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    grad_norm = optax.tree.norm(gradient)
    has_tokens = sums["logp"][1] > 0
    is_finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(grad_norm)
    is_applied = has_tokens & is_finite
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_applied, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    metrics = run_files.compute_means(sums)
    if "load_LE" in metrics:  # these sums are over the whole batch
        metrics |= moe.summarise_load(metrics.pop("load_LE"), metrics.pop("p_LE"))
    if "token_weight" in metrics:
        square = metrics.pop("token_weight_squared")
        metrics["effective_tokens"] = metrics["token_weight"] ** 2 / square
    metrics["grad_norm"] = grad_norm
    metrics["trained_tokens"] = jnp.where(is_applied, sums["logp"][1], 0)
    metrics["skipped_updates"] = has_tokens & ~is_finite
    if max_ratio is not None:
        metrics["ratio_max"] = max_ratio
    average = state.average
    if average is not None:
        rate = jnp.where(is_applied, 1 - ema_decay, 0)
        average = jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
    return TrainState(params, opt_state, state.step + steps, average), metrics


def require_finite(state: TrainState) -> None:
    """Checks a state before it is saved. All processes must call this.

    Updates leave a finite state finite, unless a parameter overflows or an optimiser divides by 0.

    Raises:
      UserError: naming an array of the state that holds a number that is not finite.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    flags = jax.device_get(_are_finite(list(leaves.values())))
    bad = [path for path, is_finite in zip(leaves, flags, strict=True) if not is_finite]
    if bad:
        raise UserError(
            f"the state after step {int(state.step)} is not finite in {len(bad)} of {len(leaves)} "
            f"arrays ({bad[0]}), and is not saved; earlier checkpoints are as they were: lower "
            "optim.learning_rate or raise optim.eps"
        )


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(x)) for x in arrays]
