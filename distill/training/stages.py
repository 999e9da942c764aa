"""What the config of one stage means, and what it may not say."""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.objectives import losses
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from models.errors import UserError
from models.layers.lora import LoRA

# Share of rows that the student writes, where an objective does not mean all of them.
DEFAULT_ON_POLICY = {"sft": 0.0, "distill": 0.0, "gkd": 0.5}
MIN_TOKENS_PER_SHARD, MIN_TOKENS_PER_SHARD_CPU = (
    4096,
    1024,
)  # tokens of a row shard with which a device has enough to do
CACHE_MEMORY_FRACTION = 0.8  # of the memory that is left, for the cache
ZERO_VARIANCE_MODES = (
    "keep",
    "drop",
    "replace",
)  # what becomes of groups whose rewards are all equal


def resolve_objective(name: str, s: ConfigDict) -> tuple[losses.Loss, int]:
    """What a stage minimises, and how many rows of its batch the student writes."""
    if s.objective not in losses.OBJECTIVES:
        known = ", ".join(losses.OBJECTIVES)
        raise UserError(f"config.{name}.objective: {s.objective!r} is none of {known}")
    changes = {field: value for field, value in s.loss.items() if value is not None}
    try:
        loss = dataclasses.replace(losses.OBJECTIVES[s.objective], **changes)
    except UserError as error:
        raise UserError(f"config.{name}.loss.{error}") from None
    share = (
        DEFAULT_ON_POLICY.get(s.objective, 1.0) if s.on_policy_share is None else s.on_policy_share
    )
    if not 0 <= share <= 1:
        raise UserError(f"config.{name}.on_policy_share={share}: must be from 0 to 1")
    sampled_rows = round(share * s.batch_size)
    if loss.is_on_policy and sampled_rows < s.batch_size:
        raise UserError(
            f"config.{name}.on_policy_share={share}: this loss needs the sampler's "
            "log-probabilities of "
            "every token, and read responses have none"
        )
    if loss.teacher_output == "token":
        raise UserError(f"config.{name}.loss.teacher_output=token: is of a teacher elsewhere")
    if loss.teacher_output == "top" and sampled_rows:
        raise UserError(
            f"config.{name}.loss.teacher_output=top: stored log-probabilities are of read "
            "responses, "
            f"but on_policy_share={share}"
        )
    if loss.reward:
        _check_reward(name, s, loss)
    return loss, sampled_rows


def _check_reward(name: str, s: ConfigDict, loss: losses.Loss) -> None:
    r = s.reward
    if s.samples < 2:
        raise UserError(
            f"config.{name}.samples={s.samples}: an advantage compares responses to one prompt, so "
            "it takes at least 2"
        )
    if r.grader not in graders.GRADERS:
        known = ", ".join(graders.GRADERS)
        raise UserError(f"config.{name}.reward.grader: {r.grader!r} is none of {known}")
    if r.zero_variance_groups not in ZERO_VARIANCE_MODES:
        raise UserError(
            f"config.{name}.reward.zero_variance_groups: {r.zero_variance_groups!r} is none of "
            f"{', '.join(ZERO_VARIANCE_MODES)}"
        )
    weights = (*get_term_weights(s).values(), r.teacher_logprob)
    if not all(map(math.isfinite, weights)):
        raise UserError(f"config.{name}.reward: weights {weights} are not all finite")
    if not any(weights):
        raise UserError(f"config.{name}.reward: all weights are 0")
    if r.length and not 0 < r.length_margin <= s.max_response_tokens:
        raise UserError(
            f"config.{name}.reward.length_margin={r.length_margin}: the length penalty falls "
            "over so many tokens "
            f"before the limit, from 1 to max_response_tokens={s.max_response_tokens}"
        )
    if r.max_rounds < 1:
        raise UserError(f"config.{name}.reward.max_rounds={r.max_rounds}: must be at least 1")
    if s.rollout.token_budget:
        raise UserError(
            f"config.{name}.rollout.token_budget: the responses to one prompt must end together"
        )


def get_term_weights(s: ConfigDict) -> dict[str, float]:
    """The weights of the reward's terms."""
    r = s.reward
    return {
        "correct": r.correct,
        "format": r.format,
        "length": r.length,
        "repetition": r.repetition,
    }


def needs_teacher(s: ConfigDict, loss: losses.Loss) -> bool:
    """Whether a stage needs the teacher's model."""
    needs_hidden = loss.teacher > 0 and loss.teacher_output != "top"
    return bool(needs_hidden or (loss.reward and s.reward.teacher_logprob))


def check_async_rollouts(name: str, s: ConfigDict, loss: losses.Loss, sampled_rows: int) -> None:
    """Rows sampled ahead come from weights one update old: the loss must know what to do then."""
    flag = f"config.{name}.rollout.asynchronous"
    if not sampled_rows:
        raise UserError(f"{flag}: {s.objective} samples nothing")
    if loss.is_on_policy and loss.ratio == "none":
        raise UserError(f"{flag}: loss.ratio=none takes every sample for fresh; use token")
    if loss.teacher and loss.estimator == "sampled" and loss.k1_from == "sampler":
        raise UserError(f"{flag}: loss.k1_from=sampler lags behind on such samples; use student")
    if loss.is_on_policy and s.minibatches * s.epochs > 1 and not loss.tis_clip:
        raise UserError(
            f"{flag}: with several updates a step the ratio begins at the first of them; "
            "loss.tis_clip weighs what came before"
        )


def check_stage(
    name: str,
    s: ConfigDict,
    loss: losses.Loss,
    sampled_rows: int,
    student: Policy,
    teachers: list[Policy],
    context_tokens: int,
    mesh: Mesh,
    teacher_mesh: Mesh,
) -> None:
    counts = ("steps", "batch_size", "samples", "accumulate", "minibatches", "epochs")
    for field in (*counts, "max_prompt_tokens", "max_response_tokens"):
        if s[field] < 1:
            raise UserError(f"config.{name}.{field}={s[field]}: must be at least 1")
    if s.rollout.token_budget < 0:
        raise UserError(
            f"config.{name}.rollout.token_budget={s.rollout.token_budget}: must be 0 (off) or more"
        )
    total = s.max_prompt_tokens + s.max_response_tokens
    try:
        options = make_rollout_options(s)
        decoding, dtype = mesh_lib.to_decode_mesh(mesh), jnp.dtype(student.model.dtype).name
        rollout.make_cache_shape(
            options, student.config, decoding, dtype, max(1, sampled_rows), total
        )
    except UserError as error:
        raise UserError(f"config.{name}.rollout.{error}") from None
    make_sampling(s).check_vocab_size(
        student.config.vocab_size
    )  # the former refuses what is no distribution
    if loss.is_on_policy and not s.sampling.temperature:
        raise UserError(
            f"config.{name}.sampling.temperature=0: {s.objective} needs tokens that were drawn"
        )
    for reader, more in [(student, 0), *((reader, context_tokens) for reader in teachers)]:
        limit, what = reader.config.context_length, " + context.max_tokens" if more else ""
        if total + more > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens{what} = {total + more} "
                f"exceeds the model's {limit} positions ({reader.path})"
            )
    if s.pack_tokens and not sampled_rows and context_tokens:
        raise UserError(
            f"config.{name}.pack_tokens: a context makes the teachers' rows longer, so they are "
            "not packed; set 0"
        )
    if s.pack_tokens and not sampled_rows and s.data.curriculum:
        raise UserError(f"config.{name}.data.curriculum: packed rows are of no one step")
    if s.pack_tokens < 0 or 0 < s.pack_tokens < total:
        raise UserError(
            f"config.{name}.pack_tokens={s.pack_tokens}: a row must hold max_prompt_tokens + "
            f"max_response_tokens = {total}"
        )
    check_row_split(name, s, mesh, teacher_mesh)
    mesh_lib.check_colocated(
        mesh, teacher_mesh, compute_microbatch_rows(s, sampled_rows, mesh, teacher_mesh)
    )
    check_token_split(name, s, mesh, teacher_mesh)
    if sampled_rows % s.samples:
        raise UserError(
            f"config.{name}.batch_size={s.batch_size}: the {sampled_rows} rows that are "
            "sampled do not "
            f"divide by samples ({s.samples})"
        )


def check_row_split(name: str, s: ConfigDict, mesh: Mesh, teacher_mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide into micro-batches, and these over devices."""
    for at, whose in (
        (mesh, "devices"),
        (teacher_mesh, "devices of config.teacher_mesh that split rows"),
    ):
        rows = s.accumulate * s.minibatches * mesh_lib.count_row_shards(at)
        if s.batch_size % rows:
            raise UserError(
                f"config.{name}.batch_size={s.batch_size} does not divide by accumulate times "
                f"minibatches times the {whose} ({rows})"
            )


def get_row_tokens(s: ConfigDict) -> int:
    """Tokens of a row of a stage's batches."""
    return s.pack_tokens or s.max_prompt_tokens + s.max_response_tokens


def compute_microbatch_rows(s: ConfigDict, sampled_rows: int, *meshes: Mesh) -> int:
    """Rows of a micro-batch, on meshes that each split them.

    Sampled rows are packed into as few as keep the devices busy, so that little of the last
    micro-batch is empty; never into more than `accumulate` leaves, which memory is planned by.
    """
    max_rows = s.batch_size // (s.accumulate * s.minibatches)
    if not sampled_rows:
        return max_rows
    on_cpu = meshes[0].devices.flat[0].platform == "cpu"
    shards = math.lcm(*map(mesh_lib.count_row_shards, meshes))
    min_rows = (
        max(1, (MIN_TOKENS_PER_SHARD_CPU if on_cpu else MIN_TOKENS_PER_SHARD) // get_row_tokens(s))
        * shards
    )
    count = -(-max_rows // min_rows)  # of rows that no two sequences share; equally many in each
    return -(-max_rows // (count * shards)) * shards


def get_temperature(s: ConfigDict, loss: losses.Loss) -> float:
    """The temperature that models are read at: a loss of drawn tokens compares distributions as
    they were drawn from (as TRL and verl do)."""
    return s.sampling.temperature if loss.is_on_policy else 1.0


def check_token_split(name: str, s: ConfigDict, mesh: Mesh, teacher_mesh: Mesh) -> None:
    """Raises UserError if context splits tokens, and a row has a number that does not divide."""
    T = get_row_tokens(s)
    for at, flag in ((mesh, "mesh"), (teacher_mesh, "teacher_mesh")):
        context, tensor = at.shape["context"], at.shape["tensor"]
        if context > 1 and T % (context * tensor):
            raise UserError(
                f"config.{name}: rows of {T} tokens do not divide by context times tensor of "
                f"config.{flag} ({context * tensor})"
            )


def make_sampling(s: ConfigDict) -> rollout.Sampling:
    """What a stage draws its tokens from."""
    return rollout.Sampling(**s.sampling)


def compute_logits_mib(c: ConfigDict, mesh: Mesh) -> float:
    """MiB of float32 logits that a chunk of the loss holds on all devices of a mesh together."""
    return (c.loss_chunk_mib or (1024.0 if mesh_lib.is_on_gpu(mesh) else 128.0)) * mesh.size


def make_rollout_options(
    s: ConfigDict, cache_capacity: int | None = None
) -> rollout.RolloutOptions:
    """How the device samples a stage's rows.

    room: tokens that the cache could hold beside all else, where that is known.
    """
    r = s.rollout
    tokens = int(r.cache_tokens)
    if r.cache_tokens < 1 and cache_capacity is not None:  # a share of it
        tokens = int((r.cache_tokens or CACHE_MEMORY_FRACTION) * cache_capacity)
    return rollout.RolloutOptions(
        slots=r.slots,
        max_length=s.max_prompt_tokens + s.max_response_tokens,
        segment=r.segment,
        prefill_chunk=r.prefill_chunk,
        cache_tokens=tokens,
        page_size=r.page_size,
        cache_dtype=r.cache_dtype,
        param_dtype=r.param_dtype,
        gather_weights=r.gather_weights,
    )


def has_packed_rows(c: ConfigDict) -> bool:
    """Whether any stage has rows of several examples: packed traces, or samples."""
    return any(c[name].pack_tokens or resolve_objective(name, c[name])[1] for name in c.stages)


def make_lora(s: ConfigDict) -> LoRA | None:
    if not s.lora.rank:
        return None
    if s.random_init:
        raise UserError("config.student.lora.rank: nothing keeps a random base; train all of it")
    try:
        return LoRA(s.lora.rank, s.lora.alpha, s.lora.rslora, tuple(s.lora.targets))
    except UserError as error:
        raise UserError(f"config.student.{error}") from None
