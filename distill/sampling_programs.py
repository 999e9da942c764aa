"""The programs of sampling, as distill/rollout calls them, lowered from shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import mesh as mesh_lib
from distill import policy, rollout, stages
from distill.calls import Call, Models, bytes_of, cast, like, operations
from distill.rollout import decode
from models.qwen3 import lora as lora_lib
from models.qwen3 import pages, quantised


def cache_room(s: ConfigDict, models: Models, mesh: Mesh, left: float) -> int:
    """Tokens that the sampler's cache could hold on all devices of the student's mesh, on each of
    which what the run keeps leaves so many bytes, beside the copy of the weights that decodes."""
    mesh = mesh_lib.decoding(mesh)
    decoder, read_from = _decoder(s, 1, models, mesh, None)
    left -= bytes_of(read_from)
    dtype = jnp.dtype(decoder.cache.dtype)
    token = pages.token_bytes(models.student.config, mesh.shape["tensor"], dtype)
    return max(0, int(left)) // token * mesh_lib.row_shards(mesh)


def _decoder(
    s: ConfigDict, sampled: int, models: Models, mesh: Mesh, room: int | None
) -> tuple[decode.Decoder, Any]:
    """What the sampler's programs are compiled for, and the shapes of the weights that decode."""
    student, options = models.student, stages.rollout_options(s, room)
    stacked = decode.prefers_stacked(mesh)
    lora = student.model.lora and lora_lib.unscaled(student.model.lora)
    qwen3 = student.model.clone(scan=stacked, remat=False, lora=lora)
    config, dtype = student.config, jnp.dtype(qwen3.dtype).name
    shape = rollout.cache_shape(options, config, mesh, dtype, sampled, options.longest)
    decoder = decode.Decoder(qwen3, stages.sampling(s), student.stop_ids, shape, options.segment, 0)
    rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
    with mesh_lib.use(mesh):
        read_from = _variables(models, mesh, rules, stacked, options.param_dtype)
    return decoder, read_from


def of_sampling(
    s: ConfigDict, sampled: int, models: Models, mesh: Mesh, room: int | None
) -> list[Call]:
    """What sampling runs, on the devices of `mesh`: all that distill/rollout calls.

    room: tokens that the cache could hold, where that is known.
    """
    student, options = models.student, stages.rollout_options(s, room)
    mesh = mesh_lib.decoding(mesh)
    decoder, read_from = _decoder(s, sampled, models, mesh, room)
    shape, config = decoder.cache, student.config
    rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
    as_read = (*_given(models), mesh, rules, decoder.qwen3.scan)
    replicated = mesh_lib.replicated(mesh)
    X, N = shape.shards, shape.columns

    def told(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    def state(rows: int) -> Any:
        sized = dataclasses.replace(shape, rows=rows, pages=rows // X)
        of = dataclasses.replace(decoder, cache=sized if rows != shape.rows else shape)
        return like(decode.init_state, of)

    def prefill(T: int) -> Callable[[], Any]:
        R = shape.rows // X
        given = (told(3, X, T), told(X * R, N), told(X * R), told(X, R + 1))
        return lambda: decode.prefill.lower(decoder, read_from, state(shape.rows), *given)

    def segment(rows: int) -> Callable[[], Any]:
        given = (told(2), told(len(decode.ABOUT), rows), told(rows, N), told(2, X, rows // X))
        return lambda: decode.decode.lower(decoder, read_from, state(rows), *given)

    def within(lower: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> Any:
            with mesh_lib.use(mesh):
                return lower()

        return inner

    P, R = s.max_prompt_tokens, s.max_response_tokens
    base = ("parameters", *(("base",) if student.model.lora else ()))
    copy = bytes_of(read_from)
    turns = R * -(-sampled // shape.rows)
    reads = pages.read_bytes(
        [P + R // 2] * (shape.rows // X),
        shape.page,
        N,
        pages.token_bytes(config, mesh.shape["tensor"], jnp.dtype(shape.dtype)),
        shape.kind,
    )
    calls = [
        Call(
            "weights",
            within(lambda: decode.for_decoding.lower(*as_read, options.param_dtype)),
            1,
            0.0,
            base,
        ),
        Call("cache", within(lambda: decode.init_state.lower(decoder)), 1, 0.0, (), copy),
    ]
    few, *many = rollout.line_sizes(options, shape)
    tokens = P * sampled // s.samples
    for T in (few, *many):
        read = -(-tokens // (T * X)) if (many or [few])[-1] == T else 0
        useful = operations(config, X * T, (P + 1) / 2, head=False)
        name = "prompts" if read else "few prompts"
        calls.append(Call(name, within(prefill(T)), read, useful, ()))
    useful = operations(config, shape.rows, P + R / 2, head=True)
    calls.append(Call("decode", within(segment(shape.rows)), turns, useful, (), reads=reads))
    less = rollout.fewer_rows(shape)
    if less:
        moved = lambda: decode.resize.lower(state(shape.rows), told(X, less // X))  # noqa: E731
        useful = operations(config, less, P + R / 2, head=True)
        calls.append(Call("fewer rows", within(moved), 0, 0.0, (), copy))
        calls.append(Call("decode fewer", within(segment(less)), 0, useful, ()))
    if decoder.sampling.presence_penalty:
        given = told(shape.rows), told(2, rollout.REMEMBER)
        noted = lambda: decode.remember.lower(state(shape.rows), *given)  # noqa: E731
        calls.append(Call("remember", within(noted), 0, 0.0, (), copy))
    return calls


def _given(models: Models) -> tuple[Any, Any, Any]:
    """What the weights that decode are made of: the model, parameters, a LoRA."""
    student = models.student
    if student.model.lora:
        return student.model, student.params, models.trained
    return student.model, models.trained, None


def _variables(models: Models, mesh: Mesh, rules: Any, stacked: bool, kind: str) -> Any:
    """Within `use`: shapes of the variables that decode, parameters in `kind` ("": as they are)."""
    qwen3, params, trained = _given(models)
    if not stacked:
        return like(decode.for_decoding, qwen3, params, trained, mesh, rules, stacked, kind)
    leaves = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
    held = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
    shapes = mesh_lib.parameters(qwen3.config, mesh, rules=rules)
    shaped = dataclasses.replace(models.student, params=shapes)
    kind = next(iter(held), kind or jnp.dtype(qwen3.dtype).name)
    variables = {"params": policy.loaded(shaped, kind)}
    if trained is not None:
        factors = mesh_lib.parameters(qwen3.config, mesh, qwen3.lora, rules)
        variables[lora_lib.LORA] = cast(factors, qwen3.dtype)
    return variables
