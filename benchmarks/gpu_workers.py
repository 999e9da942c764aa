"""What `benchmarks.gpu` runs on the device in processes of their own: `python -m
benchmarks.gpu_workers`.

Answers jobs as benchmarks/workers.py does:

what   "device": names the device;
       "decode": segments of decoding, with a cache that holds `filled` random tokens of each row;
       "step": whole steps of on-policy distillation, as `train` runs them, of random models;
       "numerics": rounding errors (benchmarks/numerics.py).
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import numerics, trainers, workers
from benchmarks.workers import Answer, Job
from configs import base
from distill import rollout
from distill.data import dataset
from distill.data.examples import Example
from distill.policy import policy
from distill.rewards import graders
from distill.rollout import decode, options, sampler
from distill.runtime import failures
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import collect, loop, memory, setup, stages, trainer, update
from distill.training.setup import RunSetup, StageSetup
from models import families

POOL_SHARE = 0.95  # of the memory that JAX may take, for weights and cache


def make_device_mesh() -> Any:
    return mesh_lib.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def describe_device(job: Job) -> Answer:
    del job  # says no more than what it is for
    # A traceback if a plugin finds no device, which the answer explains in a line.
    logging.getLogger("jax._src.xla_bridge").disabled = True
    try:
        device = jax.devices()[0]
    except Exception as error:  # JAX raises many types, with tracebacks
        return {"absent": failures.explain_failure(error, ()) or repr(error)}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory_bytes": memory.get_memory_limit(),
    }


def measure_decode(job: Job) -> Answer:
    """Times segments of decoding, as the sampler starts them, of rows that are all alive.

    A batch whose cache does not fit is halved until it does; "rows" of the answer says so.
    """
    mesh = make_device_mesh()
    network = trainers.make_network(job, "student", mesh)
    rows, filled = job["rows"], job["filled"]
    page = options.DEFAULT_PAGE_SIZE
    columns = -(-(filled + job["segment"]) // page)
    row_bytes = (
        columns
        * page
        * families.count_cache_token_bytes(network.config, 1, jnp.dtype(job["dtype"]))
    )
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(network.params))
    limit = memory.get_memory_limit()
    while limit and rows > 1 and rows * row_bytes + weight_bytes > POOL_SHARE * limit:
        rows //= 2
    settings = rollout.RolloutOptions(
        rows,
        max_length=columns * page,
        segment=job["segment"],
        cache_tokens=max(rows, options.get_min_rows(mesh)) * columns * page,
    )
    shape = rollout.make_cache_shape(
        settings, network.config, mesh, job["dtype"], rows, columns * page
    )
    described = dataclasses.replace(
        network, params=mesh_lib.make_abstract_params(network.config, mesh)
    )
    with policy.use(described):
        model = rollout.SamplingModel(network.model, network.params, ())
        decoder, params = sampler.prepare_decoder(model, rollout.Sampling(), settings, shape)
        del model, network  # the weights as they decode are a copy
        state = decode.init_state(decoder)
        state = dataclasses.replace(state, cache=jax.tree.map(_fill_array, state.cache))
        inputs = _make_decode_inputs(decoder, rows, filled)

        def run_segment() -> None:
            nonlocal state
            state, output = decode.decode(decoder, params, state, *inputs)
            state = jax.block_until_ready(state)
            count_B = np.asarray(output.count_reason_2B)[0]
            assert (np.sort(count_B)[-rows:] == decoder.segment).all(), count_B

        answer = workers.time_calls(run_segment, job, workers.get_jax_peak)
    return {**answer, "rows": rows, "steps": decoder.segment}


@functools.partial(jax.jit, donate_argnums=0)
def _fill_array(x: jax.Array) -> jax.Array:
    """Adds numbers in [-1, 1] to an empty array: kernels may be faster on zeros. It is done in
    place only because the sum reads what was there."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    places = (
        jax.lax.broadcasted_iota(jnp.float32, x.shape, axis) * (axis + 1.7)
        for axis in range(x.ndim)
    )
    return x + jnp.sin(sum(places, jnp.zeros(()))).astype(x.dtype)


def _make_decode_inputs(decoder: decode.Decoder, rows: int, filled: int) -> tuple[jax.Array, ...]:
    """Returns decode.decode's inputs from the host: `rows` rows, with pages of their own, that have
    `filled` tokens in the cache, and no limit."""
    shape = decoder.cache
    fields = {"token": 1, "length": filled, "drawn": 0, "limit": 2**30, "key0": 1, "live": 1}
    row_fields_7B = np.zeros((len(decode.ROW_FIELDS), shape.rows), np.int32)
    for name, value in fields.items():
        row_fields_7B[decode.ROW_FIELDS.index(name), :rows] = value
    row_fields_7B[decode.ROW_FIELDS.index("key1")] = np.arange(shape.rows)
    N = shape.max_pages_per_row
    table_BN = np.arange(shape.rows * N, dtype=np.int32).reshape(-1, N) % shape.pages
    copies_2XC = np.full((2, shape.shards, shape.rows // shape.shards), -1, np.int32)
    steps_bound_2 = np.array([decoder.segment, shape.rows], np.int32)
    return tuple(map(jnp.asarray, (steps_bound_2, row_fields_7B, table_BN, copies_2XC)))


def _make_config(job: Job) -> ConfigDict:
    c = base.get_config()
    c.mesh.fsdp = 1
    c.student.dtype = c.teacher.dtype = c.teacher.param_dtype = job["dtype"]
    s = c.opd
    s.batch_size, s.steps = job["rows"], 1 + job["steps"]
    s.max_prompt_tokens, s.max_response_tokens = job["prompt_tokens"], job["new_tokens"]
    return c


def _set_up_run(c: ConfigDict, job: Job, mesh: Any) -> tuple[RunSetup, Any]:
    """Returns what `train` sets up for its only stage, with random models and random prompts, and
    the student's parameters."""
    s, rng = c.opd, np.random.default_rng(0)
    student = trainers.make_network({**job, "remat": c.student.remat}, "student", mesh, True)
    teacher = local.Teacher(c.teacher, trainers.make_network(job, "teacher", mesh))
    V, T = student.config.vocab_size, s.max_prompt_tokens
    prompts_BT = rng.integers(0, V, (s.batch_size * s.steps, T)).tolist()
    source = dataset.Source(len(prompts_BT), lambda i: Example(prompts_BT[i], [], "", f"row {i}"))
    loss, sampled_rows = stages.resolve_objective("opd", s)
    stage = StageSetup(
        *("opd", s, 0, source, setup.make_stage_optimizer("opd", s), loss, sampled_rows),
        microbatch_rows=stages.compute_microbatch_rows(s, sampled_rows, mesh),
        teacher_names=("teacher",),
    )
    params = student.params
    shapes = mesh_lib.make_abstract_params(student.config, mesh)
    student = dataclasses.replace(student, params=shapes)  # the update takes the parameters away
    return RunSetup(student, {"teacher": teacher}, None, (stage,)), params


def measure_step(job: Job) -> Answer:
    """Times whole steps of on-policy distillation: sampling, scoring and the update.

    Random models do not stop, so every response has the maximum length. Scoring runs beside the
    host and is part of the update's time; it is timed again alone, to be told from the update.
    """
    c, mesh = _make_config(job), make_device_mesh()
    run_setup, params = _set_up_run(c, job, mesh)
    (stage,) = run_setup.stages
    parts: list[dict[str, float]] = []
    with policy.use(run_setup.student), graders.Grader() as grader:
        state = update.init_train_state(stage.optimizer, params, 0)
        del params
        described = memory.describe_stage(c, run_setup, stage, state.params)
        capacity = memory.compute_cache_capacity(described, memory.get_memory_limit())
        collector = collect.make_collector(c, run_setup, stage, mesh, grader, capacity)
        stage_trainer = trainer.make_trainer(c, run_setup, stage, mesh, state)
        tokens = 0
        for step in range(stage.end_step):
            start = time.perf_counter()
            minibatches, metrics = loop.collect_step(collector, state.params, step)
            collected = time.perf_counter()
            state, figures, *_ = stage_trainer.step(state, minibatches)
            jax.block_until_ready((state, figures))
            end = time.perf_counter()
            micro_batches = [micro for part in minibatches for micro in part]
            score = _time_scoring(stage_trainer, micro_batches, mesh)
            tokens = sum(int(micro.make_batch().mask_BT.sum()) for micro in micro_batches)
            parts.append(
                {
                    "sampling": metrics["time/rollout"],
                    "scoring": score,
                    "update": end - collected - score,
                    "rest": collected - start - metrics["time/rollout"],
                    "step": end - start,
                }
            )
    medians = {name: float(np.median([part[name] for part in parts[1:]])) for name in (*parts[0],)}
    return {
        "seconds": [part["step"] for part in parts[1:]],
        "first_call_seconds": parts[0]["step"],
        "peak_bytes": workers.get_jax_peak(),
        "parts": {name: seconds for name, seconds in medians.items() if name != "step"},
        "micro_batches": len(micro_batches),
        "trained_tokens": tokens,
    }


def _time_scoring(stage_trainer: trainer.Trainer, micro_batches: list[Any], mesh: Any) -> float:
    """Returns the seconds in which the teachers score the micro-batches of a step."""
    seconds = 0.0
    for micro in micro_batches:
        batch = jax.block_until_ready(micro.to_device(mesh))
        start = time.perf_counter()
        jax.block_until_ready(local.score(stage_trainer.teachers, batch))
        seconds += time.perf_counter() - start
    return seconds


JOBS: dict[str, Callable[[Job], Answer]] = {
    "device": describe_device,
    "decode": measure_decode,
    "step": measure_step,
    "numerics": lambda job: numerics.compare_precisions(job["model"]),
}


if __name__ == "__main__":
    workers.serve_jobs(lambda: lambda job: JOBS[job["what"]](job))
