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
from distill.evaluation import tasks
from distill.policy import policy
from distill.rollout import decode
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import stages
from distill.training.calls import Call, Models, bytes_of, cast, like, operations
from models.qwen3 import lora as lora_lib
from models.qwen3 import pages, quantised


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What samples: programs for `count` sequences of `prompt` and `response` tokens at most.

    decoder: what its programs are compiled for.
    """

    models: Models
    mesh: Mesh  # that decodes
    options: rollout.Options
    decoder: decode.Decoder
    count: int
    prompt: int
    response: int
    samples: int = 1  # of each prompt

    @property
    def copy(self) -> int:
        """Bytes of the weights that decode, on each device."""
        return bytes_of(self._stacked)

    def reads(self, lengths: list[int]) -> int:
        """Bytes of the cache that a decoding step reads on a device for rows of these lengths, of
        which its compiled text says nothing."""
        shape = self.decoder.cache
        if shape.kind == "slabs":
            return 0
        return pages.read_bytes(lengths, shape.page, shape.columns, self.token, shape.kind)

    @property
    def read_from(self) -> Any:
        """Shapes of the variables that decode."""
        if self.decoder.qwen3.scan:
            return self._stacked
        with mesh_lib.use(self.mesh):
            return like(decode.for_decoding, *self.made_from)

    @property
    def made_from(self) -> tuple[Any, ...]:
        """What decode.for_decoding is called with."""
        student, options = self.models.student, self.options
        params, trained = self.models.trained, None
        if student.model.lora:
            params, trained = student.params, params
        rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
        stacked = self.decoder.qwen3.scan
        return student.model, params, trained, self.mesh, rules, stacked, options.param_dtype

    @property
    def _stacked(self) -> Any:
        qwen3, params, trained, mesh, rules, _, kind = self.made_from
        leaves = jax.tree.leaves(params, is_leaf=quantised.is_quantised)
        held = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
        shapes = mesh_lib.parameters(qwen3.config, mesh, rules=rules)
        shaped = dataclasses.replace(self.models.student, params=shapes)
        kind = next(iter(held), kind or jnp.dtype(qwen3.dtype).name)
        variables = {"params": policy.loaded(shaped, kind)}
        if trained is not None:
            factors = mesh_lib.parameters(qwen3.config, mesh, qwen3.lora, rules)
            variables[lora_lib.LORA] = cast(factors, qwen3.dtype)
        return variables

    @property
    def token(self) -> int:
        """Bytes that a token takes in the cache of a device."""
        dtype = jnp.dtype(self.decoder.cache.dtype)
        return pages.token_bytes(self.models.student.config, self.mesh.shape["tensor"], dtype)

    @property
    def cache(self) -> int:
        """Bytes of the cache on each device."""
        return self.decoder.cache.pages * self.decoder.cache.page * self.token


def of_stage(
    c: ConfigDict, s: ConfigDict, sampled: int, models: Models, room: int | None
) -> Sampler:
    """What samples a stage's rows; room: tokens that the cache could hold, where that is known."""
    P, R = s.max_prompt_tokens, s.max_response_tokens
    options, drawn = stages.rollout_options(s, room), stages.sampling(s)
    routing = c.student.replay_routing
    return _sampler(models, options, drawn, (sampled, P, R, s.samples), routing)


def of_evaluation(c: ConfigDict, models: Models) -> Sampler:
    """What samples the responses of `config.eval`. Its questions are not known here: they count as
    as long as the stages allow prompts to be, without a limit as one batch. A LoRA is merged."""
    e, models = c.eval, _merged(models)
    changes = {"samples": e.samples or None, "max_new_tokens": e.max_new_tokens or None}
    settings = tasks.settings(e.protocol, e.benchmark, changes)
    P, R = max(c[name].max_prompt_tokens for name in c.stages), settings["max_new_tokens"]
    count = (e.limit or e.batch_size) * settings["samples"]
    options = rollout.Options(e.batch_size, longest=rollout.bucket(P + R))
    drawn = tasks.sampling(settings)
    return _sampler(models, options, drawn, (count, P, R, settings["samples"]), False)


def _sampler(
    models: Models,
    options: rollout.Options,
    drawn: Sampling,
    asked: tuple[int, int, int, int],
    routing: bool,
) -> Sampler:
    student = models.student
    mesh = mesh_lib.decoding(policy.mesh_of(student))
    stacked = decode.prefers_stacked(mesh)
    lora = student.model.lora and lora_lib.unscaled(student.model.lora)
    qwen3 = student.model.clone(scan=stacked, remat=False, lora=lora)
    config, dtype, (count, P, R, _) = student.config, jnp.dtype(qwen3.dtype).name, asked
    shape = rollout.cache_shape(options, config, mesh, dtype, count, options.longest or P + R)
    steps = rollout.segment_steps(options, shape)
    decoder = decode.Decoder(qwen3, drawn, student.stop_ids, shape, steps, routing=routing)
    return Sampler(models, mesh, options, decoder, *asked)


def cache_room(c: ConfigDict, s: ConfigDict, models: Models, left: float) -> int:
    """Tokens that the cache could hold on all devices of the student's mesh, on each of which what
    else lies there leaves so many bytes, beside the copy of the weights that decodes."""
    sampler = of_stage(c, s, 1, models, None)
    left = max(0, int(left) - sampler.copy)
    return left // sampler.token * mesh_lib.row_shards(sampler.mesh)


def programs(sampler: Sampler, every: float = 1.0, name: str = "", beside: int = 0) -> list[Call]:
    """All that distill/rollout calls: of the stage, or of something else that has a `name` and is
    done `every` so many steps with so many bytes `beside` it."""
    student, options, mesh = sampler.models.student, sampler.options, sampler.mesh
    decoder, read_from, samples = sampler.decoder, sampler.read_from, sampler.samples
    shape, config = decoder.cache, student.config
    replicated = mesh_lib.replicated(mesh)
    X, N = shape.shards, shape.columns
    P, R, count = sampler.prompt, sampler.response, sampler.count

    def told(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    @functools.cache
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

    def call(
        what: str,
        lower: Callable[[], Any],
        turns: float,
        useful: float = 0.0,
        holds: tuple[str, ...] = (),
        more: int = 0,
        reads: int = 0,
    ) -> Call:
        def within() -> Any:
            with mesh_lib.use(mesh):
                return lower()

        kind = "fixed" if name else what
        called = f"{name} {what}" if name else what
        turns = turns / every
        several = decoder.segment if what.startswith("decode") else 1
        given = (called, within, turns, useful, holds, beside + more)
        return Call(*given, reads=reads, kind=kind, segment=several)

    calls, copy = [], sampler.copy
    turns = R * -(-count // shape.rows)
    reads = sampler.reads([P + R // 2] * (shape.rows // X))
    base = ("base",) if student.model.lora else ()
    copied = functools.partial(decode.for_decoding.lower, *sampler.made_from)
    calls = [
        call("weights", copied, 1, holds=("parameters", *base)),
        call("cache", lambda: decode.init_state.lower(decoder), 1, more=copy),
    ]
    sizes = rollout.line_sizes(options, shape)
    for T in sizes:
        many = sizes[-1] == T
        read = -(-P * count // samples // (T * X)) if many else 0
        useful = operations(config, X * T, (P + 1) / 2, head=False)
        calls.append(call("prompts" if many else "few prompts", prefill(T), read, useful))
    useful = operations(config, shape.rows, P + R / 2, head=True)
    calls.append(call("decode", segment(shape.rows), turns, useful, reads=reads))
    less = rollout.fewer_rows(shape)
    if less:
        moved = lambda: decode.resize.lower(state(shape.rows), told(X, less // X))  # noqa: E731
        useful = operations(config, less, P + R / 2, head=True)
        calls.append(call("fewer rows", moved, 0, more=copy))
        calls.append(call("decode fewer", segment(less), 0, useful))
    if decoder.sampling.presence_penalty:
        given = told(shape.rows), told(2, rollout.REMEMBER)
        noted = lambda: decode.remember.lower(state(shape.rows), *given)  # noqa: E731
        calls.append(call("remember", noted, 0, more=copy))
    return calls


def evaluation(c: ConfigDict, s: ConfigDict, models: Models) -> list[Call]:
    """What an evaluation calls on the way, and after a stage's last step. A LoRA stays merged
    beside it."""
    sampler, student, every = of_evaluation(c, models), models.student, min(c.eval.every, s.steps)
    if not student.model.lora:
        return programs(sampler, every, "eval")
    merged = bytes_of(sampler.models.trained)
    found = programs(sampler, every, "eval", merged)
    merge = functools.partial(policy.merging(student).lower, student.params, models.trained)
    first = dataclasses.replace(found[0], beside=found[0].beside - merged, holds=())  # its argument
    called = Call("eval merge", merge, 1 / every, 0.0, ("parameters", "base"), kind="fixed")
    return [called, first, *found[1:]]


def _merged(models: Models) -> Models:
    """With a student that is its LoRA merged with its base."""
    student = models.student
    if not student.model.lora:
        return models
    plain = mesh_lib.parameters(student.config, policy.mesh_of(student))
    student = dataclasses.replace(student, model=student.model.clone(lora=None))
    return dataclasses.replace(models, student=student, trained=cast(plain, student.model.dtype))
