"""Lists the programs of sampling as distill/rollout calls them, lowered from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill import rollout
from distill.evaluation import protocols
from distill.policy import policy
from distill.rollout import decode, decode_weights
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import stages
from distill.training.calls import (
    AbstractStage,
    ProgramCall,
    cast_shapes,
    count_device_bytes,
    infer_output_shapes,
)
from models import families
from models.layers import lora as lora_lib
from models.layers import pages, quantised


@dataclasses.dataclass(frozen=True)
class SamplingSizes:
    """Number and maximum lengths of the sampled sequences."""

    num_sequences: int
    prompt_tokens: int
    response_tokens: int
    samples_per_prompt: int = 1


@dataclasses.dataclass(frozen=True)
class AbstractSampler:
    """Everything that determines the programs of sampling, with the student's weights as shapes."""

    stage: AbstractStage
    mesh: Mesh  # used for decoding
    options: rollout.RolloutOptions
    decoder: decode.Decoder
    sizes: SamplingSizes

    @property
    def conversion_args(self) -> tuple[Any, ...]:
        """Arguments of decode_weights.convert_weights."""
        student, options = self.stage.student, self.options
        params, trained = self.stage.trained_params, None
        if student.model.lora:
            params, trained = student.params, params
        rules = mesh_lib.GATHERED_RULES if options.gather_weights else mesh_lib.SHARDING_RULES
        stacked = self.decoder.model.scan
        return student.model, params, trained, self.mesh, rules, stacked, options.param_dtype

    @property
    def variable_shapes(self) -> Any:
        """Shapes of the variables used for decoding."""
        if self.decoder.model.scan:
            return self._stacked_shapes
        with mesh_lib.use_mesh(self.mesh):
            return infer_output_shapes(decode_weights.convert_weights, *self.conversion_args)

    @property
    def _stacked_shapes(self) -> Any:
        model, params, trained, mesh, rules, _, param_dtype = self.conversion_args
        leaves = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
        quantised_dtypes = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
        shapes = mesh_lib.make_abstract_params(model.config, mesh, rules=rules)
        student = dataclasses.replace(self.stage.student, params=shapes)
        param_dtype = next(iter(quantised_dtypes), param_dtype or jnp.dtype(model.dtype).name)
        variables = {"params": policy.make_abstract_params(student, param_dtype)}
        if trained is not None:
            factors = mesh_lib.make_abstract_params(model.config, mesh, model.lora, rules)
            variables[lora_lib.LORA] = cast_shapes(factors, model.dtype)
        return variables

    @property
    def weight_bytes(self) -> int:
        """Bytes on each device of the weights used for decoding."""
        return count_device_bytes(self._stacked_shapes)

    @property
    def token_bytes(self) -> int:
        """Bytes on each device of one token in the cache."""
        dtype, config = jnp.dtype(self.decoder.cache.dtype), self.stage.student.config
        return families.count_cache_token_bytes(config, self.mesh.shape["tensor"], dtype)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on each device."""
        return self.decoder.cache.pages * self.decoder.cache.page_size * self.token_bytes

    def count_cache_reads(self, lengths: list[int]) -> int:
        """Counts the cache bytes that a decoding step reads on a device for rows of these lengths;
        0 for slabs, whose reads the compiled text shows."""
        shape = self.decoder.cache
        if shape.backend == "slabs":
            return 0
        return pages.count_read_bytes(
            lengths, shape.page_size, shape.max_pages_per_row, self.token_bytes, shape.backend
        )


def make_stage_sampler(stage: AbstractStage, cache_capacity: int | None = None) -> AbstractSampler:
    """Makes the sampler of a stage. cache_capacity: tokens that the cache could hold, if known."""
    s = stage.s
    return _make_sampler(
        stage,
        stages.make_rollout_options(s, cache_capacity),
        stages.make_sampling(s),
        SamplingSizes(stage.sampled_rows, s.max_prompt_tokens, s.max_response_tokens, s.samples),
        stage.c.student.replay_routing,
    )


def make_eval_sampler(stage: AbstractStage) -> AbstractSampler:
    """Makes the sampler of `config.eval`, with any LoRA merged.

    The questions are not known: each counts as the longest prompt of any stage, and without a limit
    they count as one batch.
    """
    c, e = stage.c, stage.c.eval
    changes = {"samples": e.samples or None, "max_new_tokens": e.max_new_tokens or None}
    settings = protocols.resolve_settings(e.protocol, e.benchmark, changes)
    P, R = max(c[name].max_prompt_tokens for name in c.stages), settings["max_new_tokens"]
    samples = settings["samples"]
    return _make_sampler(
        _merge_lora(stage),
        rollout.RolloutOptions(e.batch_size, max_length=rollout.bucket_length(P + R)),
        rollout.make_sample_spec(settings).sampling,
        SamplingSizes((e.limit or e.batch_size) * samples, P, R, samples),
        False,
    )


def _merge_lora(stage: AbstractStage) -> AbstractStage:
    student = stage.student
    if not student.model.lora:
        return stage
    merged = mesh_lib.make_abstract_params(student.config, stage.mesh)
    plain = dataclasses.replace(student, model=student.model.clone(lora=None))
    return dataclasses.replace(
        stage, student=plain, trained_params=cast_shapes(merged, student.model.dtype)
    )


def _make_sampler(
    stage: AbstractStage,
    options: rollout.RolloutOptions,
    sampling: Sampling,
    sizes: SamplingSizes,
    routing: bool,
) -> AbstractSampler:
    student, mesh = stage.student, mesh_lib.to_decode_mesh(stage.mesh)
    lora = student.model.lora and lora_lib.with_unit_scale(student.model.lora)
    model = student.model.clone(scan=decode_weights.prefers_stacked(mesh), remat=False, lora=lora)
    shape = rollout.make_cache_shape(
        options,
        student.config,
        mesh,
        jnp.dtype(model.dtype).name,
        sizes.num_sequences,
        options.max_length or sizes.prompt_tokens + sizes.response_tokens,
    )
    tokens = rollout.get_segment_tokens(options, shape)
    decoder = decode.Decoder(model, sampling, student.stop_ids, shape, tokens, routing=routing)
    return AbstractSampler(stage, mesh, options, decoder, sizes)


def list_sampling_calls(sampler: AbstractSampler) -> list[ProgramCall]:
    """Lists the programs of a step's sampling, in order."""
    decoder, shape, sizes = sampler.decoder, sampler.decoder.cache, sampler.sizes
    P, R, X = sizes.prompt_tokens, sizes.response_tokens, shape.shards
    config, copy = sampler.stage.student.config, sampler.weight_bytes
    variables = sampler.variable_shapes
    make_state = functools.cache(functools.partial(_make_state_shapes, decoder))
    make_ints = functools.partial(_make_int_shape, sampler.mesh)
    resident = ("parameters", "base") if sampler.stage.student.model.lora else ("parameters",)

    def make_call(
        name: str, lower: Callable[[], Any], calls_per_step: float, **costs: Any
    ) -> ProgramCall:
        turns = decoder.segment if name.startswith("decode") else 1
        on_mesh = functools.partial(_lower_on_mesh, sampler.mesh, lower)
        scaling = {"call_scaling": name, "turns_per_call": turns}
        return ProgramCall(name, on_mesh, float(calls_per_step), **scaling, **costs)

    def lower_with_state(
        program: Any, rows: int, *args: Any, before: tuple[Any, ...] = ()
    ) -> Callable[[], Any]:
        return lambda: program.lower(*before, make_state(rows), *args)

    def make_prefill(name: str, T: int, calls_per_step: float) -> ProgramCall:
        rows = shape.rows // X
        index = (
            make_ints(3, X, T),
            make_ints(X * rows, shape.max_pages_per_row),
            make_ints(X * rows),
            make_ints(X, rows + 1),
        )
        lower = lower_with_state(decode.prefill, shape.rows, *index, before=(decoder, variables))
        flops = families.count_forward_flops(config, X * T, (P + 1) / 2, with_head=False)
        return make_call(name, lower, calls_per_step, flops=flops)

    def make_decode(name: str, rows: int, calls_per_step: float, **costs: Any) -> ProgramCall:
        args = (
            make_ints(2),
            make_ints(len(decode.ROW_FIELDS), rows),
            make_ints(rows, shape.max_pages_per_row),
            make_ints(2, X, rows // X),
        )
        lower = lower_with_state(decode.decode, rows, *args, before=(decoder, variables))
        flops = families.count_forward_flops(config, rows, P + R / 2, with_head=True)
        return make_call(name, lower, calls_per_step, flops=flops, **costs)

    convert = functools.partial(decode_weights.convert_weights.lower, *sampler.conversion_args)
    init = functools.partial(decode.init_state.lower, decoder)
    calls = [
        make_call("weights", convert, 1, resident_arguments=resident),
        make_call("cache", init, 1, other_bytes=copy),
    ]
    *few, many = rollout.get_line_sizes(sampler.options, shape)
    prompt_tokens = P * sizes.num_sequences // sizes.samples_per_prompt
    calls += [make_prefill("few prompts", T, 0) for T in few]
    calls.append(make_prefill("prompts", many, -(-prompt_tokens // (many * X))))
    reads = sampler.count_cache_reads([P + R // 2] * (shape.rows // X))
    turns = R * -(-sizes.num_sequences // shape.rows)
    calls.append(make_decode("decode", shape.rows, turns, kernel_bytes_read=reads))
    if fewer := rollout.get_shrunk_rows(shape):
        lower = lower_with_state(decode.resize, shape.rows, make_ints(X, fewer // X))
        calls.append(make_call("fewer rows", lower, 0, other_bytes=copy))
        calls.append(make_decode("decode fewer", fewer, 0))
    if decoder.sampling.presence_penalty:
        seen = make_ints(shape.rows), make_ints(2, rollout.SEEN_TOKENS_PER_CALL)
        lower = lower_with_state(decode.mark_seen_tokens, shape.rows, *seen)
        calls.append(make_call("remember", lower, 0, other_bytes=copy))
    return calls


def _lower_on_mesh(mesh: Mesh, lower: Callable[[], Any]) -> Any:
    with mesh_lib.use_mesh(mesh):
        return lower()


def _make_state_shapes(decoder: decode.Decoder, rows: int) -> Any:
    """Returns the shapes of the decoding state for all rows of the cache, or fewer if in slabs."""
    shape = decoder.cache
    if rows != shape.rows:
        shape = dataclasses.replace(shape, rows=rows, pages=rows // shape.shards)
    return infer_output_shapes(decode.init_state, dataclasses.replace(decoder, cache=shape))


def _make_int_shape(mesh: Mesh, *shape: int) -> Any:
    sharding = mesh_lib.make_replicated_sharding(mesh)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def list_eval_calls(stage: AbstractStage) -> list[ProgramCall]:
    """Lists the programs of an evaluation between steps and after the last one."""
    every = min(stage.c.eval.every, stage.s.steps)
    sampler, student = make_eval_sampler(stage), stage.student
    merged_bytes = (
        count_device_bytes(sampler.stage.trained_params) if student.model.lora else 0
    )  # the merged copy, beside the LoRA and its base
    calls = [
        dataclasses.replace(
            call,
            name=f"eval {call.name}",
            calls_per_step=call.calls_per_step / every,
            other_bytes=call.other_bytes + merged_bytes,
            call_scaling="fixed",
        )
        for call in list_sampling_calls(sampler)
    ]
    if not student.model.lora:
        return calls
    merge = functools.partial(
        policy.make_lora_merge_fn(student).lower, student.params, stage.trained_params
    )
    weights = dataclasses.replace(  # reads the merged copy, not the LoRA and its base
        calls[0], other_bytes=calls[0].other_bytes - merged_bytes, resident_arguments=()
    )
    resident = ("parameters", "base")
    return [
        ProgramCall("eval merge", merge, 1 / every, resident_arguments=resident),
        weights,
        *calls[1:],
    ]
