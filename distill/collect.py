"""Where a step's batch comes from: written responses, or the student's own with what teacher,
grader and reference make of them."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill import (
    advantages,
    curriculum,
    data,
    layout,
    pod,
    policy,
    rewards,
    rollout,
    teacher,
    terms,
)
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.prepare import Plan, Stage
from distill.stages import rollout_options, sampling, terms_of
from models.qwen3.model import Params

Measured = dict[str, float]
# (what is trained, step, key of the step, its moving average) -> (batch, what it measured)
Collect = Callable[..., tuple[Batch, Measured]]
# (what is trained, step) -> (batch on the host, what it measured)
Part = Callable[[Params, int], tuple[Batch, Measured]]


MODES = {"think": True, "no_think": False}  # whether a row is asked to think


def batches(
    plan: Plan, stage: Stage, seed: int, mesh: Mesh, logits_mib: float, grader: rewards.Grader
) -> Collect:
    """The batch of each step of a stage, on the mesh, with all that its loss reads."""
    s, parts = stage.c, []
    teachers = [plan.teachers[name] for name in s.teachers] if stage.taught else []
    mine = mesh_lib.own_rows(mesh, s.batch_size)  # of the batch, this process's
    if stage.sampled:
        own = [row for row in mine if row < stage.sampled]
        parts.append(_held(_sampled(plan, stage, seed, grader), own))
    if stage.sampled < s.batch_size:
        own = [row for row in mine if row >= stage.sampled]
        parts.append(_read(stage, seed, own))

    def collect(params: Params, step: int, key: jax.Array, average: Params | None = None):
        found = [part(params, step) for part in parts]
        measured = {name: x for _, part in found for name, x in part.items()}
        batch = _shared(stage, _joined([batch for batch, _ in found]))
        batch = mesh_lib.from_own_rows(batch, mesh, s.batch_size)
        begin = time.perf_counter()
        if stage.loss.reward and s.reward.judge:
            batch, judged = _judged(teachers, stage, batch, logits_mib, average)
            measured |= judged
        if teachers and stage.loss.teacher:
            batch = teacher.score(teachers, batch, average, s.accumulate)
        if stage.loss.reference:
            assert plan.reference is not None
            told = teacher.logp(plan.reference, batch, logits_mib)
            batch = dataclasses.replace(batch, reference_logp_BT=told)
        batch = dataclasses.replace(batch, told=None, told_at_BT=None)
        measured["time/score"] = time.perf_counter() - begin
        return batch, measured

    return collect


def _joined(parts: list[Batch]) -> Batch:
    """Rows of host batches one below the other; what not all of them know is left out, but for
    experts, which for the others are -1."""
    routed = next((part.experts_BTLA for part in parts if part.experts_BTLA is not None), None)
    if routed is not None:
        for i, part in enumerate(parts):
            if part.experts_BTLA is None:
                free: Any = np.full((*part.tokens_BT.shape, *routed.shape[2:]), -1, np.int16)
                parts[i] = dataclasses.replace(part, experts_BTLA=free)
    fields = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Batch)}
    known = {name: xs for name, xs in fields.items() if all(x is not None for x in xs)}
    joined: dict[str, Any] = {
        name: jax.tree.map(lambda *x: np.concatenate(x), *xs) for name, xs in known.items()
    }
    return Batch(**joined)


def _shared(stage: Stage, batch: Batch) -> Batch:
    """A host batch with what each of several teachers counts in its rows."""
    kind_B, N = np.asarray(batch.kind_B), len(stage.c.teachers)
    if not stage.taught or N == 1:
        return dataclasses.replace(batch, kind_B=None)
    share_NN = np.tile(stage.shares, (N, 1)) if stage.shares else np.eye(N)
    share_BN: Any = (share_NN[np.zeros_like(kind_B) if stage.shares else kind_B]).astype(np.float32)
    return dataclasses.replace(batch, teacher_share_BN=share_BN, kind_B=None)


def _held(part: Part, own: list[int]) -> Part:
    """Of the rows that every process samples, those that lie on its own devices."""

    def make(params: Params, step: int) -> tuple[Batch, Measured]:
        batch, measured = part(params, step)
        if len(own) < batch.tokens_BT.shape[0]:
            batch = jax.tree.map(lambda x: np.asarray(x)[own], batch)
        return batch, measured

    return make


def _read(stage: Stage, seed: int, own: list[int]) -> Part:
    """Written responses from the stage's data, in the rows `own` of the batch. Only these are read;
    where rows are packed all are, since what is in one follows from the lengths of the others."""
    s = stage.c
    top_k = stage.loss.served_k if stage.loss.served == "top" else 0

    def make(step: int) -> tuple[Batch, dict[str, tuple[float, float]]]:
        if stage.packer:
            packed, T = stage.packer.rows(step - stage.first), s.pack_tokens
            rows = [packed[row] for row in own]
        else:
            examples = data.at(stage.source, step - stage.first, s.batch_size, seed, own)
            rows = [[example] for example in examples]
            T = s.max_prompt_tokens + s.max_response_tokens
        batch = layout.batch(rows, T, s.max_response_tokens, top_k, stage.room)
        return batch, layout.measure(batch, rows, s.max_response_tokens)

    made = data.ahead(make, stage.end)

    def read(_: Params, step: int) -> tuple[Batch, Measured]:
        batch, sums = made(step)
        return batch, {**pod.means(sums), "data/skipped": len(stage.source.skipped)}

    return read


def _sampled(plan: Plan, stage: Stage, seed: int, grader: rewards.Grader) -> Part:
    """The student's own responses, with their advantages where they are rewarded."""
    s, ahead, begin = stage.c, stage.ahead, _writer(plan, stage)

    def own(params: Params, step: int) -> tuple[list[rollout.Sequence], Measured]:
        """The step's rows; and begins those of the next, where that is done ahead."""
        if ahead and ahead.step == step:
            found = ahead.rows, ahead.measured
        else:
            found = begin(params, step, step, _asked(stage, seed, step))()
        if ahead and step + 1 < stage.end:
            ahead.step = step
            ahead.begun = begin(params, step, step + 1, _asked(stage, seed, step + 1))
        return found

    def on_policy(params: Params, step: int) -> tuple[Batch, Measured]:
        if not stage.loss.reward:
            ended, measured = own(params, step)
            return _host_batch(plan, stage, ended), measured
        begun = time.perf_counter()
        kept: list[rollout.Sequence] = []
        values: list[float] = []
        left: tuple[list[rollout.Sequence], list[float]] = ([], [])
        seen: Counter[str] = Counter()
        told: dict[str, list[float]] = {}
        thought_in: list[bool] = []
        measured: Measured = {}
        rounds = s.reward.rounds if s.reward.constant_groups == "replace" else 1
        for turn in range(rounds):
            # Further rounds ask prompts that no step of the stage does.
            index = step if turn == 0 else stage.end + step * rounds + turn
            examples = _examples(stage, seed, index, step)
            if turn == 0:
                rows, measured = own(params, step)
            else:
                rows, measured = begin(params, step, step, _rows(stage, seed, index, examples))()
            totals, terms_told = _graded(plan, stage, grader, rows, examples)
            thought_in += [row.thinking for row in rows]
            for name, column in terms_told.items():
                told.setdefault(name, []).extend(column)
            for at in range(0, len(rows), s.samples):
                group, of = rows[at : at + s.samples], totals[at : at + s.samples]
                flat = len(set(of)) == 1 and not s.reward.judge
                seen["groups"] += 1
                seen["constant"] += flat
                into = left if flat and s.reward.constant_groups != "keep" else (kept, values)
                into[0].extend(group)
                into[1].extend(of)
            if len(kept) >= stage.sampled:
                break
        wanted = len(kept[: stage.sampled])
        rows = (kept + left[0])[: stage.sampled]  # what is dropped keeps the shape, untrained
        totals = (values + left[1])[: stage.sampled]
        batch = _host_batch(plan, stage, rows)
        batch.mask_BT[wanted:] = False  # pyright: ignore[reportIndexIssue]
        measured |= {
            "reward/mean": float(np.mean(totals)),
            "reward/constant_groups": seen["constant"] / seen["groups"],
            "reward/dropped_rows": stage.sampled - wanted,
            "time/rollout_and_grading": time.perf_counter() - begun,
        }
        for name, column in told.items():
            measured |= {f"reward/{name}": float(np.mean(column))}
            measured |= {f"reward/{name}_std": float(np.std(column))}
            for mode, thinking in MODES.items():
                of = [
                    x for x, thought in zip(column, thought_in, strict=True) if thought == thinking
                ]
                measured |= {f"reward/{name}/{mode}": float(np.mean(of))} if of else {}
        totals = np.array(totals, np.float32)
        found = dataclasses.replace(batch, advantages_B=_advantages(stage, totals))
        return found, measured

    return on_policy


def _advantages(stage: Stage, totals_B: Any) -> Any:
    """[B] from rewards in groups; rewards themselves where a judge's part is still to come."""
    if stage.c.reward.judge:
        return totals_B
    found_PG, _ = advantages.group_advantages(
        jnp.asarray(totals_B).reshape(-1, stage.c.samples), stage.loss.group
    )
    return np.asarray(found_PG).reshape(-1)


def _judged(
    teachers: Sequence[teacher.Teacher],
    stage: Stage,
    batch: Batch,
    logits_mib: float,
    average: Params | None,
) -> tuple[Batch, Measured]:
    """The teachers' mean log-probability of each response joins its reward."""
    assert teachers and batch.advantages_B is not None
    judged_B = teacher.judge(teachers, batch, logits_mib, average)
    totals_PG = (batch.advantages_B + stage.c.reward.judge * judged_B).reshape(-1, stage.c.samples)
    found_PG, constant_P = advantages.group_advantages(totals_PG, stage.loss.group)
    measured = {
        "reward/judge": float(jnp.mean(judged_B)),
        "reward/judge_std": float(jnp.std(judged_B)),
        "reward/constant_groups": float(jnp.mean(constant_P)),
        "reward/mean": float(jnp.mean(totals_PG)),
    }
    return dataclasses.replace(batch, advantages_B=found_PG.reshape(-1)), measured


def _graded(
    plan: Plan,
    stage: Stage,
    grader: rewards.Grader,
    rows: Sequence[rollout.Sequence],
    examples: Sequence[data.Example],
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each row without a judge's part, and of each term its values."""
    s, tokenizer = stage.c, plan.student.tokenizer
    assert tokenizer is not None
    texts = [str(tokenizer.decode(row.tokens, skip_special_tokens=True)) for row in rows]
    asked = [examples[number // s.samples] for number in range(len(rows))]
    outcomes = ["no_answer"] * len(rows)
    if s.reward.correct or s.reward.format:
        answers = [example.answer for example in asked]
        # By one process for all: where a grader gives up depends on how busy its host is.
        outcomes = pod.from_primary(lambda: grader.grade(s.reward.grader, texts, answers))
    responses = [
        terms.Response(
            text=text,
            tokens=row.tokens,
            finished=row.reason == "stop",
            outcome=outcome,
            thinking=row.thinking,
            limit=s.max_response_tokens,
            margin=s.reward.margin,
        )
        for text, row, outcome in zip(texts, rows, outcomes, strict=True)
    ]
    return terms.rewards(responses, terms_of(s))


def _writer(
    plan: Plan, stage: Stage
) -> Callable[
    [Params, int, int, list[rollout.Sequence]],
    Callable[[], tuple[list[rollout.Sequence], Measured]],
]:
    """The function that begins sampling, and returns what samples and returns the rows that ended.

    It takes the parameters, their version, the step whose rows they are, and these. Once it has
    begun, the parameters may be donated.
    """
    s, student, parked = stage.c, plan.student, stage.parked
    drawn_from, options, sampled = sampling(s), rollout_options(s), policy.sampled(student)

    def begin(params: Params, version: int, step: int, rows: list[rollout.Sequence]):
        counts: Counter[str] = Counter()
        coming = rollout.sample(
            student.model,
            sampled(params),
            rows,
            sampling=drawn_from,
            stop_ids=student.stop_ids,
            options=options,
            version=version,
            # The last step ends all rows.
            budget=s.rollout.budget if parked and step + 1 < stage.end else None,
            counts=counts,
            routing=plan.replays,
        )
        return lambda: finish(coming, step, len(rows), counts)

    def finish(coming: Iterator[rollout.Sequence], step: int, asked: int, counts: Counter[str]):
        started = time.perf_counter()
        done = list(coming)
        took = time.perf_counter() - started
        ended = [row for row in done if row.reason]
        written = sum(len(row.tokens) for row in ended)
        measured = {
            "rollout/tokens_per_second": counts["tokens"] / took,
            "rollout/mean_length": written / max(1, len(ended)),
            "rollout/truncated": sum(r.reason == "length" for r in ended) / max(1, len(ended)),
            "rollout/repetition": -float(np.mean([terms.repeated(r.tokens) for r in ended] or [0])),
            "rollout/utilisation": counts["tokens"] / counts["slot_steps"],
            "time/rollout": took,
            "data/skipped": len(stage.source.skipped),
            **curriculum.mean([row.difficulty for row in ended]),
            **_by_mode(ended),
        }
        if parked:
            parked.begun += asked - len(parked.rows)
            parked.rows = [row for row in done if not row.reason]
            measured["rollout/ended"] = len(ended)
        if parked or stage.ahead:
            stale = sum(version < step for row in ended for version in row.versions)
            measured["rollout/stale"] = stale / max(1, written)
        return ended, measured

    return begin


def _by_mode(rows: Sequence[rollout.Sequence]) -> Measured:
    """Lengths and truncation of the modes apart; each that there is."""
    found: Measured = {}
    for mode, thinking in MODES.items():
        of = [row for row in rows if row.thinking == thinking]
        if of:
            cut = sum(row.reason == "length" for row in of)
            found[f"rollout/rows/{mode}"] = len(of)
            found[f"rollout/mean_length/{mode}"] = sum(len(row.tokens) for row in of) / len(of)
            found[f"rollout/truncated/{mode}"] = cut / len(of)
    return found


def _host_batch(plan: Plan, stage: Stage, rows: Sequence[rollout.Sequence]) -> Batch:
    s, routing = stage.c, plan.student.config.routing if plan.replays else None
    limits = s.max_prompt_tokens, s.max_response_tokens
    return rollout.to_batch(rows, stage.sampled, *limits, stage.room, routing)


def _examples(stage: Stage, seed: int, step: int, now: int) -> list[data.Example]:
    """The prompts of a step: the first of what the step reads, of the difficulty of step `now`."""
    s = stage.c
    count = stage.sampled // s.samples
    whole = s.batch_size if stage.sampled < s.batch_size else count
    found = data.at(stage.source, step - stage.first, whole, seed, now=now - stage.first)
    return found[:count]


def _rows(
    stage: Stage, seed: int, step: int, examples: Sequence[data.Example]
) -> list[rollout.Sequence]:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return rollout.expand_prompts(examples, stage.c.samples, key, stage.c.max_response_tokens)


def _asked(stage: Stage, seed: int, step: int) -> list[rollout.Sequence]:
    """The rows of a step: those that were parked, and then as many new ones as there is room."""
    size, parked = stage.sampled, stage.parked
    if not parked:
        return _rows(stage, seed, step, _examples(stage, seed, step, step))
    begun, count = parked.begun, size - len(parked.rows)
    rows: list[rollout.Sequence] = []
    for index in range(begun // size, -(-(begun + count) // size)):
        at = stage.first + index
        rows += _rows(stage, seed, at, _examples(stage, seed, at, at))
    return parked.rows + rows[begun % size :][:count]
