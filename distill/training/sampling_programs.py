"""The programs of sampling, as distill/rollout calls them, lowered from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.evaluation import protocols
from distill.policy import policy
from distill.rollout import decode
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import stages
from distill.training.calls import (
    ProgramCall,
    StageModels,
    cast_shapes,
    count_device_bytes,
    infer_output_shapes,
)
from models import families
from models.layers import lora as lora_lib
from models.layers import pages, quantised


@dataclasses.dataclass(frozen=True)
class SamplingSetup:
    """What samples: programs for `count` sequences of `prompt` and `response` tokens at most.

    decoder: what its programs are compiled for.
    """

    models: StageModels
    mesh: Mesh  # that decodes
    options: rollout.RolloutOptions
    decoder: decode.Decoder
    num_sequences: int
    max_prompt_tokens: int
    max_response_tokens: int
    samples_per_prompt: int = 1  # of each prompt

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that decode, on each device."""
        return count_device_bytes(self._stacked_shapes)

    def count_cache_reads(self, lengths: list[int]) -> int:
        """Bytes of the cache that a decoding step reads on a device for rows of these lengths, of
        which its compiled text says nothing."""
        shape = self.decoder.cache
        if shape.backend == "slabs":
            return 0
        return pages.count_read_bytes(
            lengths, shape.page_size, shape.max_pages_per_row, self.token_bytes, shape.backend
        )

    @property
    def variable_shapes(self) -> Any:
        """Shapes of the variables that decode."""
        if self.decoder.model.scan:
            return self._stacked_shapes
        with mesh_lib.use_mesh(self.mesh):
            return infer_output_shapes(decode.convert_weights, *self.decoding_args)

    @property
    def decoding_args(self) -> tuple[Any, ...]:
        """What decode.for_decoding is called with."""
        student, options = self.models.student, self.options
        params, trained = self.models.trained_params, None
        if student.model.lora:
            params, trained = student.params, params
        rules = mesh_lib.GATHERED_RULES if options.gather_weights else mesh_lib.SHARDING_RULES
        stacked = self.decoder.model.scan
        return student.model, params, trained, self.mesh, rules, stacked, options.param_dtype

    @property
    def _stacked_shapes(self) -> Any:
        model, params, trained, mesh, rules, _, param_dtype = self.decoding_args
        leaves = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
        quantised_dtypes = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
        shapes = mesh_lib.make_abstract_params(model.config, mesh, rules=rules)
        shaped = dataclasses.replace(self.models.student, params=shapes)
        param_dtype = next(iter(quantised_dtypes), param_dtype or jnp.dtype(model.dtype).name)
        variables = {"params": policy.make_abstract_params(shaped, param_dtype)}
        if trained is not None:
            factors = mesh_lib.make_abstract_params(model.config, mesh, model.lora, rules)
            variables[lora_lib.LORA] = cast_shapes(factors, model.dtype)
        return variables

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in the cache of a device."""
        dtype = jnp.dtype(self.decoder.cache.dtype)
        return families.count_cache_token_bytes(
            self.models.student.config, self.mesh.shape["tensor"], dtype
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache on each device."""
        return self.decoder.cache.pages * self.decoder.cache.page_size * self.token_bytes


def make_stage_sampler(
    c: ConfigDict, s: ConfigDict, sampled_rows: int, models: StageModels, cache_capacity: int | None
) -> SamplingSetup:
    """What samples a stage's rows; room: tokens that the cache could hold, where that is known."""
    P, R = s.max_prompt_tokens, s.max_response_tokens
    options, sampling_settings = (
        stages.make_rollout_options(s, cache_capacity),
        stages.make_sampling(s),
    )
    routing = c.student.replay_routing
    return _make_sampler(
        models, options, sampling_settings, (sampled_rows, P, R, s.samples), routing
    )


def make_eval_sampler(c: ConfigDict, models: StageModels) -> SamplingSetup:
    """What samples the responses of `config.eval`. Its questions are not known here: they count as
    as long as the stages allow prompts to be, without a limit as one batch. A LoRA is merged."""
    e, models = c.eval, _merge_lora(models)
    changes = {"samples": e.samples or None, "max_new_tokens": e.max_new_tokens or None}
    settings = protocols.resolve_settings(e.protocol, e.benchmark, changes)
    P, R = max(c[name].max_prompt_tokens for name in c.stages), settings["max_new_tokens"]
    count = (e.limit or e.batch_size) * settings["samples"]
    options = rollout.RolloutOptions(e.batch_size, max_length=rollout.bucket_length(P + R))
    sampling_settings = rollout.make_sample_spec(settings).sampling
    return _make_sampler(
        models, options, sampling_settings, (count, P, R, settings["samples"]), False
    )


def _make_sampler(
    models: StageModels,
    options: rollout.RolloutOptions,
    sampling_settings: Sampling,
    sizes: tuple[int, int, int, int],
    routing: bool,
) -> SamplingSetup:
    student = models.student
    mesh = mesh_lib.to_decode_mesh(policy.get_mesh(student))
    stacked = decode.prefers_stacked(mesh)
    lora = student.model.lora and lora_lib.with_unit_scale(student.model.lora)
    model = student.model.clone(scan=stacked, remat=False, lora=lora)
    config, dtype, (count, P, R, _) = student.config, jnp.dtype(model.dtype).name, sizes
    shape = rollout.make_cache_shape(
        options, config, mesh, dtype, count, options.max_length or P + R
    )
    steps = rollout.get_segment_steps(options, shape)
    decoder = decode.Decoder(
        model, sampling_settings, student.stop_ids, shape, steps, routing=routing
    )
    return SamplingSetup(models, mesh, options, decoder, *sizes)


def compute_cache_capacity(
    c: ConfigDict, s: ConfigDict, models: StageModels, free_bytes: float
) -> int:
    """Tokens that the cache could hold on all devices of the student's mesh, on each of which what
    else lies there leaves so many bytes, beside the copy of the weights that decodes."""
    sampler = make_stage_sampler(c, s, 1, models, None)
    free_bytes = max(0, int(free_bytes) - sampler.weight_bytes)
    return free_bytes // sampler.token_bytes * mesh_lib.count_row_shards(sampler.mesh)


def list_sampling_calls(
    sampler: SamplingSetup, every_steps: float = 1.0, name: str = "", other_bytes: int = 0
) -> list[ProgramCall]:
    """All that distill/rollout calls: of the stage, or of something else that has a `name` and is
    done `every` so many steps with so many bytes `beside` it."""
    student, options, mesh = sampler.models.student, sampler.options, sampler.mesh
    decoder, read_from, samples = (
        sampler.decoder,
        sampler.variable_shapes,
        sampler.samples_per_prompt,
    )
    shape, config = decoder.cache, student.config
    replicated = mesh_lib.make_replicated_sharding(mesh)
    X, N = shape.shards, shape.max_pages_per_row
    P, R, count = sampler.max_prompt_tokens, sampler.max_response_tokens, sampler.num_sequences

    def make_int32_shape(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    @functools.cache
    def make_state_shape(rows: int) -> Any:
        sized = dataclasses.replace(shape, rows=rows, pages=rows // X)
        sized_decoder = dataclasses.replace(decoder, cache=sized if rows != shape.rows else shape)
        return infer_output_shapes(decode.init_state, sized_decoder)

    def lower_prefill(T: int) -> Callable[[], Any]:
        R = shape.rows // X
        args = (
            make_int32_shape(3, X, T),
            make_int32_shape(X * R, N),
            make_int32_shape(X * R),
            make_int32_shape(X, R + 1),
        )
        return lambda: decode.prefill.lower(decoder, read_from, make_state_shape(shape.rows), *args)

    def lower_segment(rows: int) -> Callable[[], Any]:
        args = (
            make_int32_shape(2),
            make_int32_shape(len(decode.ROW_FIELDS), rows),
            make_int32_shape(rows, N),
            make_int32_shape(2, X, rows // X),
        )
        return lambda: decode.decode.lower(decoder, read_from, make_state_shape(rows), *args)

    def make_call(
        program: str,
        lower: Callable[[], Any],
        calls_per_step: float,
        flops: float = 0.0,
        resident_arguments: tuple[str, ...] = (),
        more_bytes: int = 0,
        kernel_bytes_read: int = 0,
    ) -> ProgramCall:
        def lower_on_mesh() -> Any:
            with mesh_lib.use_mesh(mesh):
                return lower()

        kind = "fixed" if name else program
        called = f"{name} {program}" if name else program
        calls_per_step = calls_per_step / every_steps
        several = decoder.segment if program.startswith("decode") else 1
        given = (
            called,
            lower_on_mesh,
            calls_per_step,
            flops,
            resident_arguments,
            other_bytes + more_bytes,
        )
        return ProgramCall(
            *given, kernel_bytes_read=kernel_bytes_read, call_scaling=kind, turns_per_call=several
        )

    calls, copy = [], sampler.weight_bytes
    turns = R * -(-count // shape.rows)
    reads = sampler.count_cache_reads([P + R // 2] * (shape.rows // X))
    base = ("base",) if student.model.lora else ()
    lower_weights = functools.partial(decode.convert_weights.lower, *sampler.decoding_args)
    calls = [
        make_call("weights", lower_weights, 1, resident_arguments=("parameters", *base)),
        make_call("cache", lambda: decode.init_state.lower(decoder), 1, more_bytes=copy),
    ]
    sizes = rollout.get_line_sizes(options, shape)
    for T in sizes:
        many = sizes[-1] == T
        read = -(-P * count // samples // (T * X)) if many else 0
        useful = families.count_forward_flops(config, X * T, (P + 1) / 2, with_head=False)
        calls.append(
            make_call("prompts" if many else "few prompts", lower_prefill(T), read, useful)
        )
    useful = families.count_forward_flops(config, shape.rows, P + R / 2, with_head=True)
    calls.append(
        make_call("decode", lower_segment(shape.rows), turns, useful, kernel_bytes_read=reads)
    )
    fewer_rows = rollout.get_shrunk_rows(shape)
    if fewer_rows:
        lower_resize = lambda: decode.resize.lower(  # noqa: E731
            make_state_shape(shape.rows), make_int32_shape(X, fewer_rows // X)
        )
        useful = families.count_forward_flops(config, fewer_rows, P + R / 2, with_head=True)
        calls.append(make_call("fewer rows", lower_resize, 0, more_bytes=copy))
        calls.append(make_call("decode fewer", lower_segment(fewer_rows), 0, useful))
    if decoder.sampling.presence_penalty:
        given = make_int32_shape(shape.rows), make_int32_shape(2, rollout.SEEN_TOKENS_PER_CALL)
        lower_remember = lambda: decode.mark_seen_tokens.lower(make_state_shape(shape.rows), *given)  # noqa: E731
        calls.append(make_call("remember", lower_remember, 0, more_bytes=copy))
    return calls


def list_eval_calls(c: ConfigDict, s: ConfigDict, models: StageModels) -> list[ProgramCall]:
    """What an evaluation calls on the way, and after a stage's last step. A LoRA stays merged
    beside it."""
    sampler, student, every = (
        make_eval_sampler(c, models),
        models.student,
        min(c.eval.every, s.steps),
    )
    if not student.model.lora:
        return list_sampling_calls(sampler, every, "eval")
    merged = count_device_bytes(sampler.models.trained_params)
    calls = list_sampling_calls(sampler, every, "eval", merged)
    merge = functools.partial(
        policy.make_lora_merge_fn(student).lower, student.params, models.trained_params
    )
    first = dataclasses.replace(
        calls[0], other_bytes=calls[0].other_bytes - merged, resident_arguments=()
    )  # its argument
    called = ProgramCall(
        "eval merge", merge, 1 / every, 0.0, ("parameters", "base"), call_scaling="fixed"
    )
    return [called, first, *calls[1:]]


def _merge_lora(models: StageModels) -> StageModels:
    """With a student that is its LoRA merged with its base."""
    student = models.student
    if not student.model.lora:
        return models
    plain = mesh_lib.make_abstract_params(student.config, policy.get_mesh(student))
    student = dataclasses.replace(student, model=student.model.clone(lora=None))
    return dataclasses.replace(
        models, student=student, trained_params=cast_shapes(plain, student.model.dtype)
    )
