"""Where a step's batch comes from: written responses, or the student's own with what the teacher
makes of them."""

import time
from collections import Counter
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from distill import data, policy, rollout, teacher
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.prepare import Plan, Stage, rollout_options, sampling
from models.qwen3.model import Params

# collect: (what is trained, step, key of the step) -> (batch, what it measured)
Collect = Callable[[Params, int, jax.Array], tuple[Batch, dict[str, float]]]


def traces(plan: Plan, stage: Stage, seed: int, mesh: Mesh) -> Collect:
    """Off-policy: written responses from the stage's data."""
    s = stage.c

    def make(step: int) -> tuple[Batch, dict[str, float]]:
        if stage.packer:
            rows, T = stage.packer.rows(step - stage.first), s.pack_tokens
        else:
            examples = data.at(stage.source, step - stage.first, s.batch_size, seed)
            rows = [[example] for example in examples]
            T = s.max_prompt_tokens + s.max_response_tokens
        batch = data.layout(rows, T, s.max_response_tokens)
        return batch, data.measure(batch, rows, s.max_response_tokens, stage.source)

    made = data.ahead(make, stage.end)

    def collect(params: Params, step: int, key: jax.Array):
        batch, measured = made(step)
        return jax.device_put(batch, mesh_lib.rows(mesh)), measured

    return collect


def rollouts(plan: Plan, stage: Stage, seed: int, mesh: Mesh) -> Collect:
    """On-policy: the student writes, the teacher reads what it wrote."""
    s, student, taught = stage.c, plan.student, plan.teacher
    assert taught is not None
    drawn_from, options, parked = sampling(s), rollout_options(s), stage.parked
    sampled = policy.sampled(student)

    def collect(params: Params, step: int, key: jax.Array):
        rows = parked.rows if parked else []
        begun = parked.begun if parked else (step - stage.first) * s.batch_size
        rows = rows + _asked(stage, seed, begun, s.batch_size - len(rows))
        counts: Counter[str] = Counter()
        begin = time.perf_counter()
        done = list(
            rollout.run(
                student.model,
                sampled(params),
                rows,
                sampling=drawn_from,
                stop_ids=student.stop_ids,
                options=options,
                version=step,
                # The last step ends all rows.
                budget=s.rollout.budget if parked and step + 1 < stage.end else None,
                counts=counts,
            )
        )
        took = time.perf_counter() - begin
        ended = [row for row in done if row.reason]
        written = sum(len(row.tokens) for row in ended)
        measured = {
            "rollout/tokens_per_second": counts["tokens"] / took,
            "rollout/mean_length": written / max(1, len(ended)),
            "rollout/truncated": sum(r.reason == "length" for r in ended) / max(1, len(ended)),
            "rollout/utilisation": counts["tokens"] / counts["slot_steps"],
            "time/rollout": took,
            "data/skipped": len(stage.source.skipped),
        }
        if parked:
            parked.begun += len(rows) - len(parked.rows)
            parked.rows = [row for row in done if not row.reason]
            stale = sum(version < step for row in ended for version in row.versions)
            measured |= {"rollout/ended": len(ended), "rollout/stale": stale / max(1, written)}
        batch = rollout.to_batch(ended, s.batch_size, s.max_prompt_tokens, s.max_response_tokens)
        return teacher.score(taught, jax.device_put(batch, mesh_lib.rows(mesh))), measured

    return collect


def _asked(stage: Stage, seed: int, begun: int, count: int) -> list[rollout.Row]:
    """Rows `begun` and after of all that a stage samples, batch_size of them for each step."""
    s, rows = stage.c, []
    for step in range(begun // s.batch_size, -(-(begun + count) // s.batch_size)):
        examples = data.at(stage.source, step, s.batch_size // s.samples, seed)
        key = jax.random.fold_in(jax.random.key(seed), stage.first + step)
        rows += rollout.ask(examples, s.samples, key, s.max_response_tokens)
    return rows[begun % s.batch_size :][:count]


TABLE = {"sft": traces, "opd": rollouts}
