"""Where a step's sequences come from: written responses, or the student's own with what a grader
and a judge make of them."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill import rollout
from distill.data import collate, curriculum, dataset
from distill.data.collate import Form
from distill.data.examples import Example
from distill.objectives import advantages
from distill.rewards import graders, terms
from distill.runtime import distributed
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import microbatches, stages
from distill.training.microbatches import Work
from distill.training.prompts import Prompts
from distill.training.setup import Plan, Stage
from distill.training.stages import rollout_options, sampling, terms_of
from models.qwen3.model import Params

Measured = dict[str, float]
# (what is trained, step, its moving average) -> (what to train on, what was measured)
Collect = Callable[..., tuple[Work, Measured]]


MODES = {"think": True, "no_think": False}  # whether a row is asked to think


def batches(
    plan: Plan,
    stage: Stage,
    seed: int,
    mesh: Mesh,
    logits_mib: float,
    grader: graders.Grader,
    room: int | None = None,
) -> Collect:
    """The micro-batches of each step of a stage, on the host: all that its loss reads but for what
    other models make of them. room: tokens that the sampler's cache could hold, where known."""
    form = _form(plan, stage)
    if not stage.sampled:
        return _read(stage, seed, mesh_lib.own_rows(mesh, stage.c.batch_size), form)
    sample = _sampled(plan, stage, seed, grader, room)
    read = _beside(stage, seed) if stage.sampled < stage.c.batch_size else None
    teachers = [plan.teachers[name] for name in stage.c.teachers] if stage.taught else []

    def collect(params: Params, step: int, average: Params | None = None):
        sequences, totals, measured = sample(params, step)
        examples: list[Example] = [*microbatches.written(sequences)]
        if read:
            found, told = read(step)
            examples, measured = examples + found, measured | told
        packed = microbatches.pack(examples, stage.rows, stage.c.minibatches, form)
        begin = time.perf_counter()
        if stage.loss.reward and stage.c.reward.judge:
            plain = dataclasses.replace(form, rewarded=False)
            work = microbatches.lay(packed, examples, plain, mesh)
            judged = _judged(teachers, stage, work, examples, mesh, logits_mib, average)
            totals = totals + stage.c.reward.judge * judged
            measured |= _of_judge(stage, judged, totals)
        if stage.loss.reward:
            each = zip(examples, _advantages(stage, totals).tolist(), strict=True)
            examples = [dataclasses.replace(x, advantage=a) for x, a in each]
        work = microbatches.lay(packed, examples, form, mesh)
        if read:
            measured |= _fill(work, examples, len(sequences), form)
        measured["time/score"] = time.perf_counter() - begin
        return work, measured

    return collect


def _form(plan: Plan, stage: Stage) -> Form:
    """What a stage's batches hold."""
    s, N = stage.c, len(stage.c.teachers)
    shares = np.array([stage.shares]) if stage.shares else np.eye(N)
    if stage.shares and s.data.mixture:  # whatever their source
        shares = np.tile(shares, (len(s.data.mixture), 1))
    return Form(
        stages.row_tokens(s),
        s.max_response_tokens,
        top_k=stage.loss.served_k if stage.loss.served == "top" else 0,
        room=stage.room,
        written=stage.sampled == s.batch_size,
        rewarded=stage.loss.reward > 0,
        routing=plan.student.config.routing if stage.sampled and plan.replays else None,
        shares=shares if stage.taught and N > 1 else None,
    )


def _read(stage: Stage, seed: int, own: list[int], form: Form) -> Collect:
    """Written responses from the stage's data, of which this process reads the rows `own`; where
    rows are packed all are read, since what is in one follows from the lengths of the others."""
    s = stage.c

    def make(step: int) -> tuple[Work, dict[str, tuple[float, float]]]:
        if stage.packer:
            packed = stage.packer.rows(step - stage.first)
            rows = [packed[row] for row in own]
        else:
            examples = dataset.at(stage.source, step - stage.first, s.batch_size, seed, own)
            rows = [[example] for example in examples]
        work = microbatches.split(rows, own, (s.batch_size, s.minibatches, s.accumulate), form)
        examples = [example for row in rows for example in row]
        return work, collate.measure(examples, len(rows) * form.tokens, form.max_response)

    made = dataset.ahead(make, stage.end)

    def collect(params: Params, step: int, average: Params | None = None):
        work, sums = made(step)
        return work, {**distributed.means(sums), **_skipped(stage), "time/score": 0.0}

    return collect


def _fill(work: Work, examples: list[Example], sampled: int, form: Form) -> Measured:
    """Metrics of the examples that were read, which are packed with what was sampled."""
    places = form.tokens * sum(len(micro.rows) for part in work for micro in part)
    whole, read = (
        collate.measure(of, places, form.max_response) for of in (examples, examples[sampled:])
    )
    return distributed.means({**read, "data/efficiency": whole["data/efficiency"]})


def _skipped(stage: Stage) -> Measured:
    return {"data/skipped": len(stage.source.skipped)}


def _beside(stage: Stage, seed: int) -> Callable[[int], tuple[list[Example], Measured]]:
    """The written responses in a step of which the student writes the others; every process reads
    all of them, to know how they are packed."""
    s = stage.c
    share = range(stage.sampled, s.batch_size)

    def make(step: int) -> list[Example]:
        return dataset.at(stage.source, step - stage.first, s.batch_size, seed, share)

    made = dataset.ahead(make, stage.end)
    return lambda step: (made(step), _skipped(stage))


def _sampled(
    plan: Plan, stage: Stage, seed: int, grader: graders.Grader, room: int | None
) -> Callable[[Params, int], tuple[list[rollout.Sequence], Any, Measured]]:
    """The student's own responses, and where they are rewarded their rewards [B], but for what a
    judge adds."""
    s, ahead, begin = stage.c, stage.ahead, _writer(plan, stage, room)
    prompts = Prompts(stage, seed)

    def own(params: Params, step: int) -> tuple[list[rollout.Sequence], Measured]:
        """The step's rows; and begins those of the next, where that is done ahead."""
        if ahead and ahead.step == step:
            found = ahead.rows, ahead.measured
        else:
            found = begin(params, step, step, prompts.of_step(step))()
        if ahead and step + 1 < stage.end:
            ahead.step = step
            ahead.begun = begin(params, step, step + 1, prompts.of_step(step + 1))
        return found

    def rewarded(params: Params, step: int) -> tuple[list[rollout.Sequence], Any, Measured]:
        begun = time.perf_counter()
        kept: list[rollout.Sequence] = []
        values: list[float] = []
        left: list[float] = []  # rewards of rows in groups that teach nothing
        seen: Counter[str] = Counter()
        told: dict[str, list[float]] = {}
        thought_in: list[bool] = []
        measured: Measured = {}
        rounds = s.reward.rounds if s.reward.constant_groups == "replace" else 1
        for turn in range(rounds):
            # Further rounds ask prompts that no step of the stage does.
            index = step if turn == 0 else stage.end + step * rounds + turn
            examples = prompts.examples(index)
            if turn == 0:
                rows, measured = own(params, step)
            else:
                rows, measured = begin(params, step, step, prompts.expand(index))()
            totals, terms_told = _graded(plan, stage, grader, rows, examples)
            thought_in += [row.thinking for row in rows]
            for name, column in terms_told.items():
                told.setdefault(name, []).extend(column)
            for at in range(0, len(rows), s.samples):
                group, of = rows[at : at + s.samples], totals[at : at + s.samples]
                flat = len(set(of)) == 1 and not s.reward.judge
                seen["groups"] += 1
                seen["constant"] += flat
                if flat and s.reward.constant_groups != "keep":
                    left += of
                else:
                    kept, values = kept + group, values + of
            if len(kept) >= stage.sampled:
                break
        kept = kept[: stage.sampled]
        measured |= {
            "reward/mean": float(np.mean((values + left)[: stage.sampled])),
            "reward/constant_groups": seen["constant"] / seen["groups"],
            "reward/dropped_rows": stage.sampled - len(kept),
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
        return kept, np.array(values[: stage.sampled], np.float32), measured

    if stage.loss.reward:
        return rewarded

    def plain(params: Params, step: int) -> tuple[list[rollout.Sequence], Any, Measured]:
        rows, measured = own(params, step)
        return rows, None, measured

    return plain


def _advantages(stage: Stage, totals_B: np.ndarray) -> np.ndarray:
    """[B] from rewards in groups."""
    totals_PG = jnp.asarray(totals_B, jnp.float32).reshape(-1, stage.c.samples)
    return np.asarray(advantages.group_advantages(totals_PG, stage.loss.group)[0]).reshape(-1)


def _judged(
    teachers: Sequence[local.Teacher],
    stage: Stage,
    work: Work,
    examples: Sequence[Example],
    mesh: Mesh,
    logits_mib: float,
    average: Params | None,
) -> np.ndarray:
    """[B] float32: the mean log-probability that the teachers give the tokens of each response."""
    found = np.zeros(len(examples), np.float32)
    for micro in (micro for part in work for micro in part):
        logp_BT = local.judge(teachers, micro.put(mesh), logits_mib, average)
        spans = microbatches.spans(micro.rows, examples, stage.c.max_response_tokens)
        for number, row, start, end in spans:
            found[number] = logp_BT[row, start:end].mean()
    return found


def _of_judge(stage: Stage, judged_B: np.ndarray, totals_B: np.ndarray) -> Measured:
    totals_PG = totals_B.reshape(-1, stage.c.samples)
    return {
        "reward/judge": float(judged_B.mean()),
        "reward/judge_std": float(judged_B.std()),
        "reward/constant_groups": float(np.mean(np.ptp(totals_PG, axis=1) == 0)),
        "reward/mean": float(totals_B.mean()),
    }


def _graded(
    plan: Plan,
    stage: Stage,
    grader: graders.Grader,
    rows: Sequence[rollout.Sequence],
    examples: Sequence[dataset.Example],
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
        outcomes = distributed.from_primary(lambda: grader.grade(s.reward.grader, texts, answers))
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
    plan: Plan, stage: Stage, room: int | None
) -> Callable[
    [Params, int, int, list[rollout.Sequence]],
    Callable[[], tuple[list[rollout.Sequence], Measured]],
]:
    """The function that begins sampling, and returns what samples and returns the rows that ended.

    It takes the parameters, their version, the step whose rows they are, and these. Once it has
    begun, the parameters may be donated.
    """
    s, student, parked = stage.c, plan.student, stage.parked
    drawn_from, options, lora = (
        sampling(s),
        rollout_options(s, room),
        student.model.lora is not None,
    )
    warm = False

    def begin(params: Params, version: int, step: int, rows: list[rollout.Sequence]):
        nonlocal warm
        counts: Counter[str] = Counter()
        warm, warm_up = True, not warm
        coming = rollout.sample(
            student.model,
            student.params if lora else params,
            rows,
            sampling=drawn_from,
            stop_ids=student.stop_ids,
            options=options,
            version=version,
            # The last step ends all rows.
            budget=s.rollout.budget if parked and step + 1 < stage.end else None,
            counts=counts,
            routing=plan.replays,
            warm_up=warm_up,
            trained=params if lora else None,
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
            **_skipped(stage),
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
