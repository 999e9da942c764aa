"""Resolves and checks the config of a stage."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.evaluation import tasks
from distill.objectives import losses
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import external, local, stored_files
from distill.teachers.external import ExternalTeacher
from distill.training import response_limits
from models import checks
from models.checks import Range
from models.errors import UserError
from models.layers.lora import LoRA

# Default share of a step's rows that the student samples; for other objectives all of them.
DEFAULT_ON_POLICY = {"sft": 0.0, "distill": 0.0, "gkd": 0.5}
# Tokens in a device's part of a micro-batch that keep the device busy.
MIN_TOKENS_PER_SHARD, MIN_TOKENS_PER_SHARD_CPU = 4096, 1024
CACHE_MEMORY_FRACTION = 0.8  # of the free memory, for the sampler's cache
# Treatments of groups whose rewards are all equal.
ZERO_VARIANCE_MODES = ("keep", "drop", "replace")


@contextlib.contextmanager
def name_stage(name: str) -> Iterator[None]:
    """Context in which an error about config.data, which does not know its stage, names it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("config.data.", f"config.{name}.data.")) from None


def resolve_objective(name: str, s: ConfigDict) -> tuple[losses.Loss, int]:
    """Returns the loss of a stage, and the number of rows of a batch that the student samples.

    Raises:
      UserError: naming the invalid field.
    """
    checks.check_fields(s, {"objective": (*losses.OBJECTIVES,)}, f"config.{name}.")
    changes = {field: value for field, value in s.loss.items() if value is not None}
    try:
        loss = dataclasses.replace(losses.OBJECTIVES[s.objective], **changes)
    except UserError as error:
        raise UserError(f"config.{name}.loss.{error}") from None
    if s.loss.beta is not None and loss.divergence != "jsd":  # also where it is the default
        raise UserError(f"config.{name}.loss.beta: read by divergence=jsd only")
    share = s.on_policy_share
    if share is None:
        share = DEFAULT_ON_POLICY.get(s.objective, 1.0)
    shares = {"on_policy_share": share}
    checks.check_fields(shares, {"on_policy_share": Range(0, 1)}, f"config.{name}.")
    sampled_rows = round(share * s.batch_size)
    if loss.reward and sampled_rows < s.batch_size:
        raise UserError(
            f"config.{name}.on_policy_share={share}: rewards are of sampled responses; set 1"
        )
    if loss.is_on_policy and 0 < sampled_rows < s.batch_size:
        raise UserError(
            f"config.{name}.on_policy_share={share}: this loss needs the sampler's "
            "log-probabilities of every token, which traces beside samples do not have; set 1, or "
            "0 for stored samples"
        )
    if loss.reward:
        _check_reward(name, s)
    response_limits.check_schedule(name, s, loss.reward > 0, sampled_rows)
    response_limits.check_drift(name, s, loss, sampled_rows)
    return loss, sampled_rows


def _check_reward(name: str, s: ConfigDict) -> None:
    r, prefix = s.reward, f"config.{name}.reward."
    if s.samples < 2:
        raise UserError(
            f"config.{name}.samples={s.samples}: an advantage compares responses to one prompt; "
            "set at least 2"
        )
    rules = {"grader": (*tasks.BENCHMARKS,), "zero_variance_groups": ZERO_VARIANCE_MODES}
    checks.check_fields(r, rules | {"max_rounds": Range(1)}, prefix)
    weights = (*get_term_weights(s).values(), r.teacher_logprob)
    if not all(map(math.isfinite, weights)):
        raise UserError(f"config.{name}.reward: weights {weights} are not all finite")
    if not any(weights):
        raise UserError(f"config.{name}.reward: all weights are 0")
    if r.length and not 0 < r.length_margin <= s.max_response_tokens:
        raise UserError(
            f"{prefix}length_margin={r.length_margin}: the length penalty covers this many tokens "
            f"before the limit, from 1 to max_response_tokens={s.max_response_tokens}"
        )
    if s.rollout.token_budget:
        raise UserError(
            f"config.{name}.rollout.token_budget: the responses to one prompt must end together; "
            "set 0"
        )


def get_term_weights(s: ConfigDict) -> dict[str, float]:
    """Returns the weight of each rule-based term of the reward."""
    r = s.reward
    return {
        "correct": r.correct,
        "score": r.score,
        "format": r.format,
        "length": r.length,
        "repetition": r.repetition,
    }


def reads_teachers(c: ConfigDict, s: ConfigDict, loss: losses.Loss) -> bool:
    """Returns True if a stage reads teachers, run here or not. With teacher_output=top and none
    outside, the likeliest tokens are stored in the rows."""
    in_rows = loss.teacher_output == "top" and not external.list_external(c, s.teachers)
    judges = loss.reward > 0 and s.reward.teacher_logprob != 0
    return (loss.teacher > 0 and not in_rows) or judges


def check_teachers(
    c: ConfigDict, name: str, loss: losses.Loss, sampled_rows: int
) -> tuple[str, ...]:
    """Checks that the teachers of stage `name` can give what its loss reads; returns their names.

    Raises:
      UserError: naming the invalid key.
    """
    s, reads = c[name], reads_teachers(c, c[name], loss)
    local.check_teachers(c, name, s, reads)
    names = tuple(s.teachers) if reads else ()
    flag, output = f"config.{name}.loss.teacher_output={loss.teacher_output}", loss.teacher_output
    outside = external.list_external(c, names)
    if output == "top" and not outside and sampled_rows:
        raise UserError(
            f"{flag}: only traces have stored log-probabilities, but {sampled_rows} of "
            f"{s.batch_size} rows are sampled; set on_policy_share=0, or name a teacher on a server"
        )
    for teacher in outside:
        if sampled_rows and stored_files.is_stored(c[teacher].path):
            raise UserError(
                f"config.{teacher}.path={c[teacher].path}: holds scores of given responses, but "
                f"{sampled_rows} of {s.batch_size} rows are sampled; set "
                f"config.{name}.on_policy_share=0, or name a model or a server"
            )
    if outside and loss.reward and s.reward.teacher_logprob:
        raise UserError(
            f"config.{name}.reward.teacher_logprob: needs a teacher that is run here, and "
            f"config.{outside[0]}.path={c[outside[0]].path} is not"
        )
    if outside and s.drift.kl:
        raise UserError(
            f"config.{name}.drift.kl={s.drift.kl:g}: needs a teacher that is run here, and "
            f"config.{outside[0]}.path={c[outside[0]].path} is not; set 0"
        )
    if output == "hidden" or not (names or output == "token"):
        return names
    if local_names := [teacher for teacher in names if teacher not in outside]:
        raise UserError(
            f"{flag}: config.{local_names[0]} is run here, and gives hidden states; use hidden, or "
            "the address of a server as its path"
        )
    if s.teacher_weights:
        raise UserError(
            f"config.{name}.teacher_weights: mixes whole distributions, which teacher_output="
            f"{output} does not have; use hidden, or no weights and a teacher for each source"
        )
    if get_temperature(s, loss) != 1:
        raise UserError(
            f"config.{name}.sampling.temperature={s.sampling.temperature}: with teacher_output="
            f"{output} the teacher's log-probabilities are those at temperature 1; set 1"
        )
    return names


def check_async_rollouts(name: str, s: ConfigDict, loss: losses.Loss, sampled_rows: int) -> None:
    """Checks that a loss can train on samples from weights that are one update old.

    Raises:
      UserError: if it cannot.
    """
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


def check_counts(name: str, s: ConfigDict) -> None:
    """Checks the numbers of a stage that are valid or invalid on their own."""
    counts = ("steps", "batch_size", "samples", "accumulate", "minibatches", "epochs")
    limits = ("max_prompt_tokens", "max_response_tokens")
    checks.check_fields(s, dict.fromkeys((*counts, *limits), Range(1)), f"config.{name}.")
    rules = {"token_budget": Range(off="off")}
    checks.check_fields(s.rollout, rules, f"config.{name}.rollout.")


def check_sampling(
    name: str, s: ConfigDict, loss: losses.Loss, sampled_rows: int, student: Policy, mesh: Mesh
) -> None:
    """Checks that the student can be sampled with the settings of a stage."""
    total = s.max_prompt_tokens + s.max_response_tokens
    try:
        options = make_rollout_options(s)
        decode_mesh, dtype = mesh_lib.to_decode_mesh(mesh), jnp.dtype(student.model.dtype).name
        rollout.make_cache_shape(
            options, student.config, decode_mesh, dtype, max(1, sampled_rows), total
        )
    except UserError as error:
        raise UserError(f"config.{name}.rollout.{error}") from None
    make_sampling(s).check_vocab_size(student.config.vocab_size)
    if loss.is_on_policy and not s.sampling.temperature:
        raise UserError(
            f"config.{name}.sampling.temperature=0: {s.objective} needs tokens that were drawn"
        )
    if sampled_rows and s.samples > 1 and not s.sampling.temperature:
        raise UserError(
            f"config.{name}.sampling.temperature=0: the {s.samples} samples of a prompt would all "
            "be the same; set 1, or samples=1"
        )


def check_positions(
    name: str,
    s: ConfigDict,
    student: Policy,
    teachers: Iterable[Policy | ExternalTeacher],
    context_tokens: int,
) -> None:
    """Checks that rows do not exceed the positions of the models that read them."""
    total = s.max_prompt_tokens + s.max_response_tokens
    for model, extra in [(student, 0), *((teacher, context_tokens) for teacher in teachers)]:
        is_outside = isinstance(model, ExternalTeacher)
        limit = model.info.context_length if is_outside else model.config.context_length
        extra_name = " + context.max_tokens" if extra else ""
        key = max(("max_response_tokens", "max_prompt_tokens"), key=lambda name: s[name])
        key, value = ("context.max_tokens", extra) if extra else (key, s[key])
        if limit and total + extra > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens{extra_name} = "
                f"{total + extra} exceeds the model's {limit} positions ({model.path}); "
                f"lower config.{name}.{key}={value}"
            )


def check_packing(name: str, s: ConfigDict, sampled_rows: int, context_tokens: int) -> None:
    """Checks that rows of `pack_tokens` can be packed."""
    total = s.max_prompt_tokens + s.max_response_tokens
    if s.pack_tokens and not sampled_rows and context_tokens:
        raise UserError(
            f"config.{name}.pack_tokens: a context makes the teachers' rows longer, so they are "
            "not packed; set 0"
        )
    if s.pack_tokens and not sampled_rows and s.data.curriculum:
        raise UserError(
            f"config.{name}.data.curriculum: packed rows belong to no step; set pack_tokens=0"
        )
    if s.pack_tokens < 0 or 0 < s.pack_tokens < total:
        raise UserError(
            f"config.{name}.pack_tokens={s.pack_tokens}: a row must hold max_prompt_tokens + "
            f"max_response_tokens = {total}"
        )


def check_splits(
    name: str, s: ConfigDict, sampled_rows: int, mesh: Mesh, teacher_mesh: Mesh
) -> None:
    """Checks that a batch divides into micro-batches, over devices and into groups."""
    check_row_split(name, s, mesh, teacher_mesh)
    mesh_lib.check_colocated(
        mesh, teacher_mesh, compute_microbatch_rows(s, sampled_rows, mesh, teacher_mesh)
    )
    check_token_split(name, s, mesh, teacher_mesh)
    if sampled_rows % s.samples:
        raise UserError(
            f"config.{name}.batch_size={s.batch_size}: its {sampled_rows} sampled rows do not "
            f"divide by samples ({s.samples})"
        )


def check_row_split(name: str, s: ConfigDict, mesh: Mesh, teacher_mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide into micro-batches, and these over devices."""
    for split_mesh, devices in (
        (mesh, "devices"),
        (teacher_mesh, "devices of config.teacher_mesh that split rows"),
    ):
        rows = s.accumulate * s.minibatches * mesh_lib.count_row_shards(split_mesh)
        if s.batch_size % rows:
            raise UserError(
                f"config.{name}.batch_size={s.batch_size} does not divide by accumulate times "
                f"minibatches times the {devices} ({rows})"
            )


def get_row_tokens(s: ConfigDict) -> int:
    """Returns the tokens of a row of a stage's batches."""
    return s.pack_tokens or s.max_prompt_tokens + s.max_response_tokens


def compute_microbatch_rows(s: ConfigDict, sampled_rows: int, *meshes: Mesh) -> int:
    """Computes the rows of a micro-batch, which divide over each of the meshes.

    Sampled rows are packed, so their micro-batches have only as many rows as keep the devices busy,
    which leaves little of the last one empty; never more than `accumulate` leaves, for which memory
    is planned.
    """
    max_rows = s.batch_size // (s.accumulate * s.minibatches)
    if not sampled_rows:
        return max_rows
    on_cpu = meshes[0].devices.flat[0].platform == "cpu"
    shards = math.lcm(*map(mesh_lib.count_row_shards, meshes))
    min_tokens = MIN_TOKENS_PER_SHARD_CPU if on_cpu else MIN_TOKENS_PER_SHARD
    min_rows = max(1, min_tokens // get_row_tokens(s)) * shards
    count = -(-max_rows // min_rows)  # micro-batches if each sequence has its own row
    return -(-max_rows // (count * shards)) * shards


def get_temperature(s: ConfigDict, loss: losses.Loss) -> float:
    """Returns the temperature of the distributions that a loss compares: the sampling temperature
    for losses of sampled tokens (as in TRL and verl), else 1."""
    return s.sampling.temperature if loss.is_on_policy else 1.0


def check_token_split(name: str, s: ConfigDict, mesh: Mesh, teacher_mesh: Mesh) -> None:
    """Raises UserError if the context axis splits tokens, but those of a row do not divide."""
    T = get_row_tokens(s)
    for split_mesh, flag in ((mesh, "mesh"), (teacher_mesh, "teacher_mesh")):
        context, tensor = split_mesh.shape["context"], split_mesh.shape["tensor"]
        if context > 1 and T % (context * tensor):
            raise UserError(
                f"config.{name}: rows of {T} tokens do not divide by context times tensor of "
                f"config.{flag} ({context * tensor})"
            )


def make_sampling(s: ConfigDict) -> rollout.Sampling:
    """Makes the sampling distribution of a stage."""
    return rollout.Sampling(**s.sampling)


def get_loss_chunk_mib(c: ConfigDict, mesh: Mesh) -> float:
    """Returns the MiB of float32 logits in a chunk of the loss, over all devices of a mesh."""
    return (c.loss_chunk_mib or (1024.0 if mesh_lib.is_on_gpu(mesh) else 128.0)) * mesh.size


def make_rollout_options(
    s: ConfigDict, cache_capacity: int | None = None
) -> rollout.RolloutOptions:
    """Makes the options for sampling a stage's rows.

    Args:
      cache_capacity: tokens that the cache can hold in the free memory; None: unknown.
    """
    r = s.rollout
    cache_tokens = int(r.cache_tokens)
    if r.cache_tokens < 1 and cache_capacity is not None:  # a share of the capacity
        cache_tokens = int((r.cache_tokens or CACHE_MEMORY_FRACTION) * cache_capacity)
    return rollout.RolloutOptions(
        slots=r.slots,
        max_length=s.max_prompt_tokens + s.max_response_tokens,
        segment=r.segment,
        prefill_chunk=r.prefill_chunk,
        cache_tokens=cache_tokens,
        page_size=r.page_size,
        cache_dtype=r.cache_dtype,
        param_dtype=r.param_dtype,
        gather_weights=r.gather_weights,
        drafts=r.drafts,
        draft_tokens=r.draft_tokens,
    )


def has_packed_rows(c: ConfigDict) -> bool:
    """Returns True if any stage packs several examples into a row: traces with `pack_tokens`, or
    samples."""
    return any(c[name].pack_tokens or resolve_objective(name, c[name])[1] for name in c.stages)


def make_lora(s: ConfigDict) -> LoRA | None:
    """Makes the LoRA of `config.student`; None if all parameters are trained."""
    if not s.lora.rank:
        return None
    if s.random_init:
        raise UserError("config.student.lora.rank: nothing keeps a random base; set 0")
    try:
        return LoRA(s.lora.rank, s.lora.alpha, s.lora.rslora, tuple(s.lora.targets))
    except UserError as error:
        raise UserError(f"config.student.{error}") from None
