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
from distill.data.collate import BatchLayout
from distill.data.examples import Example
from distill.objectives import advantages
from distill.rewards import graders, terms
from distill.runtime import distributed
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import microbatches
from distill.training.microbatches import Minibatches
from distill.training.prompts import StagePrompts
from distill.training.setup import RunSetup, StageSetup
from distill.training.stages import get_term_weights, make_rollout_options, make_sampling
from models.transformer import Params

Metrics = dict[str, float]
# (what is trained, step, its moving average) -> (what to train on, what was measured)
CollectFn = Callable[..., tuple[Minibatches, Metrics]]


THINKING_MODES = {"think": True, "no_think": False}  # whether a row is asked to think


def make_collect(
    run_setup: RunSetup,
    stage: StageSetup,
    seed: int,
    mesh: Mesh,
    loss_chunk_mib: float,
    grader: graders.Grader,
    cache_capacity: int | None = None,
) -> CollectFn:
    """The micro-batches of each step of a stage, on the host: all that its loss reads but for what
    other models make of them. room: tokens that the sampler's cache could hold, where known."""
    routing = run_setup.student.config.routing_shape if run_setup.replay_routing else None
    layout = microbatches.make_stage_layout(stage.c, stage.loss, stage.sampled_rows, routing)
    if not stage.sampled_rows:
        return _make_dataset_collect(
            stage, seed, mesh_lib.list_local_rows(mesh, stage.c.batch_size), layout
        )
    sample = _make_rollout_collect(run_setup, stage, seed, grader, cache_capacity)
    read_examples = (
        _make_example_reader(stage, seed) if stage.sampled_rows < stage.c.batch_size else None
    )
    teachers = (
        [run_setup.teachers[name] for name in stage.c.teachers] if stage.needs_teacher else []
    )

    def collect(params: Params, step: int, average: Params | None = None):
        sequences, totals, measured = sample(params, step)
        examples: list[Example] = [*microbatches.to_examples(sequences)]
        if read_examples:
            read_batch, read_metrics = read_examples(step)
            examples, measured = examples + read_batch, measured | read_metrics
        packed = microbatches.pack_examples(
            examples, stage.microbatch_rows, stage.c.minibatches, layout
        )
        start_time = time.perf_counter()
        if stage.loss.reward and stage.c.reward.teacher_logprob:
            judge_layout = dataclasses.replace(layout, has_advantages=False)
            minibatches = microbatches.make_microbatches(packed, examples, judge_layout, mesh)
            judge_scores = _score_with_judge(
                teachers, stage, minibatches, examples, mesh, loss_chunk_mib, average
            )
            totals = totals + stage.c.reward.teacher_logprob * judge_scores
            measured |= _measure_judge(stage, judge_scores, totals)
        if stage.loss.reward:
            with_advantages = zip(
                examples, _compute_advantages(stage, totals).tolist(), strict=True
            )
            examples = [dataclasses.replace(x, advantage=a) for x, a in with_advantages]
        minibatches = microbatches.make_microbatches(packed, examples, layout, mesh)
        if read_examples:
            measured |= _measure_read_examples(minibatches, examples, len(sequences), layout)
        measured["time/score"] = time.perf_counter() - start_time
        return minibatches, measured

    return collect


def _make_dataset_collect(
    stage: StageSetup, seed: int, own_rows: list[int], layout: BatchLayout
) -> CollectFn:
    """Written responses from the stage's data, of which this process reads the rows `own`; where
    rows are packed all are read, since what is in one follows from the lengths of the others."""
    s = stage.c

    def load_minibatches(step: int) -> tuple[Minibatches, dict[str, tuple[float, float]]]:
        if stage.packer:
            packed = stage.packer.get_step_rows(step - stage.first_step)
            rows = [packed[row] for row in own_rows]
        else:
            examples = dataset.get_step_examples(
                stage.source, step - stage.first_step, s.batch_size, seed, own_rows
            )
            rows = [[example] for example in examples]
        minibatches = microbatches.split_rows(
            rows, own_rows, (s.batch_size, s.minibatches, s.accumulate), layout
        )
        examples = [example for row in rows for example in row]
        return minibatches, collate.measure_examples(
            examples, len(rows) * layout.row_tokens, layout.max_response
        )

    load_prefetched = dataset.prefetch_next(load_minibatches, stage.end_step)

    def collect(params: Params, step: int, average: Params | None = None):
        minibatches, sums = load_prefetched(step)
        return minibatches, {
            **distributed.reduce_means(sums),
            **_count_skipped(stage),
            "time/score": 0.0,
        }

    return collect


def _measure_read_examples(
    minibatches: Minibatches, examples: list[Example], num_sampled: int, layout: BatchLayout
) -> Metrics:
    """Metrics of the examples that were read, which are packed with what was sampled."""
    num_places = layout.row_tokens * sum(len(micro.rows) for part in minibatches for micro in part)
    all_metrics, read_metrics = (
        collate.measure_examples(of, num_places, layout.max_response)
        for of in (examples, examples[num_sampled:])
    )
    return distributed.reduce_means(
        {**read_metrics, "data/efficiency": all_metrics["data/efficiency"]}
    )


def _count_skipped(stage: StageSetup) -> Metrics:
    return {"data/skipped": len(stage.source.skip_reasons)}


def _make_example_reader(
    stage: StageSetup, seed: int
) -> Callable[[int], tuple[list[Example], Metrics]]:
    """The written responses in a step of which the student writes the others; every process reads
    all of them, to know how they are packed."""
    s = stage.c
    read_rows = range(stage.sampled_rows, s.batch_size)

    def load_examples(step: int) -> list[Example]:
        return dataset.get_step_examples(
            stage.source, step - stage.first_step, s.batch_size, seed, read_rows
        )

    load_prefetched = dataset.prefetch_next(load_examples, stage.end_step)
    return lambda step: (load_prefetched(step), _count_skipped(stage))


def _make_rollout_collect(
    run_setup: RunSetup,
    stage: StageSetup,
    seed: int,
    grader: graders.Grader,
    cache_capacity: int | None,
) -> Callable[[Params, int], tuple[list[rollout.Sequence], Any, Metrics]]:
    """The student's own responses, and where they are rewarded their rewards [B], but for what a
    judge adds."""
    s, async_rollouts, start_rollout = (
        stage.c,
        stage.async_rollouts,
        _make_rollout_starter(run_setup, stage, cache_capacity),
    )
    prompts = StagePrompts(stage, seed)

    def collect_rollouts(params: Params, step: int) -> tuple[list[rollout.Sequence], Metrics]:
        """The step's rows; and begins those of the next, where that is done ahead."""
        if async_rollouts and async_rollouts.step == step:
            rollouts = async_rollouts.sequences, async_rollouts.metrics
        else:
            rollouts = start_rollout(params, step, step, prompts.get_sequences(step))()
        if async_rollouts and step + 1 < stage.end_step:
            async_rollouts.step = step
            async_rollouts.pending = start_rollout(
                params, step, step + 1, prompts.get_sequences(step + 1)
            )
        return rollouts

    def collect_with_rewards(
        params: Params, step: int
    ) -> tuple[list[rollout.Sequence], Any, Metrics]:
        start_time = time.perf_counter()
        kept: list[rollout.Sequence] = []
        values: list[float] = []
        dropped_rewards: list[float] = []  # rewards of rows in groups that teach nothing
        group_counts: Counter[str] = Counter()
        term_values: dict[str, list[float]] = {}
        thinking_flags: list[bool] = []
        measured: Metrics = {}
        rounds = s.reward.max_rounds if s.reward.zero_variance_groups == "replace" else 1
        for turn in range(rounds):
            # Further rounds ask prompts that no step of the stage does.
            index = step if turn == 0 else stage.end_step + step * rounds + turn
            examples = prompts.get_examples(index)
            if turn == 0:
                rows, measured = collect_rollouts(params, step)
            else:
                rows, measured = start_rollout(params, step, step, prompts.expand_prompts(index))()
            totals, new_term_values = _grade_rollouts(run_setup, stage, grader, rows, examples)
            thinking_flags += [row.thinking for row in rows]
            for name, column in new_term_values.items():
                term_values.setdefault(name, []).extend(column)
            for at in range(0, len(rows), s.samples):
                group, of = rows[at : at + s.samples], totals[at : at + s.samples]
                flat = len(set(of)) == 1 and not s.reward.teacher_logprob
                group_counts["groups"] += 1
                group_counts["constant"] += flat
                if flat and s.reward.zero_variance_groups != "keep":
                    dropped_rewards += of
                else:
                    kept, values = kept + group, values + of
            if len(kept) >= stage.sampled_rows:
                break
        kept = kept[: stage.sampled_rows]
        measured |= {
            "reward/mean": float(np.mean((values + dropped_rewards)[: stage.sampled_rows])),
            "reward/zero_variance_groups": group_counts["constant"] / group_counts["groups"],
            "reward/dropped_rows": stage.sampled_rows - len(kept),
            "time/rollout_and_grading": time.perf_counter() - start_time,
        }
        for name, column in term_values.items():
            measured |= {f"reward/{name}": float(np.mean(column))}
            measured |= {f"reward/{name}_std": float(np.std(column))}
            for mode, thinking in THINKING_MODES.items():
                of = [
                    x
                    for x, thought in zip(column, thinking_flags, strict=True)
                    if thought == thinking
                ]
                measured |= {f"reward/{name}/{mode}": float(np.mean(of))} if of else {}
        return kept, np.array(values[: stage.sampled_rows], np.float32), measured

    if stage.loss.reward:
        return collect_with_rewards

    def collect_without_rewards(
        params: Params, step: int
    ) -> tuple[list[rollout.Sequence], Any, Metrics]:
        rows, measured = collect_rollouts(params, step)
        return rows, None, measured

    return collect_without_rewards


def _compute_advantages(stage: StageSetup, totals_B: np.ndarray) -> np.ndarray:
    """[B] from rewards in groups."""
    totals_PG = jnp.asarray(totals_B, jnp.float32).reshape(-1, stage.c.samples)
    return np.asarray(
        advantages.compute_group_advantages(totals_PG, stage.loss.advantage_norm)[0]
    ).reshape(-1)


def _score_with_judge(
    teachers: Sequence[local.Teacher],
    stage: StageSetup,
    minibatches: Minibatches,
    examples: Sequence[Example],
    mesh: Mesh,
    loss_chunk_mib: float,
    average: Params | None,
) -> np.ndarray:
    """[B] float32: the mean log-probability that the teachers give the tokens of each response."""
    scores_B = np.zeros(len(examples), np.float32)
    for micro in (micro for part in minibatches for micro in part):
        logp_BT = local.judge_responses(teachers, micro.to_device(mesh), loss_chunk_mib, average)
        spans = microbatches.find_response_spans(micro.rows, examples, stage.c.max_response_tokens)
        for number, row, start, end in spans:
            scores_B[number] = logp_BT[row, start:end].mean()
    return scores_B


def _measure_judge(stage: StageSetup, scores_B: np.ndarray, totals_B: np.ndarray) -> Metrics:
    totals_PG = totals_B.reshape(-1, stage.c.samples)
    return {
        "reward/teacher_logprob": float(scores_B.mean()),
        "reward/teacher_logprob_std": float(scores_B.std()),
        "reward/zero_variance_groups": float(np.mean(np.ptp(totals_PG, axis=1) == 0)),
        "reward/mean": float(totals_B.mean()),
    }


def _grade_rollouts(
    run_setup: RunSetup,
    stage: StageSetup,
    grader: graders.Grader,
    rows: Sequence[rollout.Sequence],
    examples: Sequence[dataset.Example],
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each row without a judge's part, and of each term its values."""
    s, tokenizer = stage.c, run_setup.student.tokenizer
    assert tokenizer is not None
    texts = [str(tokenizer.decode(row.tokens, skip_special_tokens=True)) for row in rows]
    row_examples = [examples[number // s.samples] for number in range(len(rows))]
    outcomes = ["no_answer"] * len(rows)
    if s.reward.correct or s.reward.format:
        answers = [example.answer for example in row_examples]
        # By one process for all: where a grader gives up depends on how busy its host is.
        outcomes = distributed.broadcast_from_primary(
            lambda: grader.grade(s.reward.grader, texts, answers)
        )
    responses = [
        terms.Response(
            text=text,
            tokens=row.tokens,
            finished=row.finish_reason == "stop",
            outcome=outcome,
            thinking=row.thinking,
            limit=s.max_response_tokens,
            margin=s.reward.length_margin,
        )
        for text, row, outcome in zip(texts, rows, outcomes, strict=True)
    ]
    return terms.compute_rewards(responses, get_term_weights(s))


def _make_rollout_starter(
    run_setup: RunSetup, stage: StageSetup, cache_capacity: int | None
) -> Callable[
    [Params, int, int, list[rollout.Sequence]],
    Callable[[], tuple[list[rollout.Sequence], Metrics]],
]:
    """The function that begins sampling, and returns what samples and returns the rows that ended.

    It takes the parameters, their version, the step whose rows they are, and these. Once it has
    begun, the parameters may be donated.
    """
    s, student, partial_rollouts = stage.c, run_setup.student, stage.partial_rollouts
    sampling_settings, lora = make_sampling(s), student.model.lora is not None
    options = make_rollout_options(s, cache_capacity)
    options = dataclasses.replace(options, routing=run_setup.replay_routing)
    warm = False

    def start_rollout(params: Params, version: int, step: int, rows: list[rollout.Sequence]):
        nonlocal warm
        counts: Counter[str] = Counter()
        warm, warm_up = True, not warm
        sequences = rollout.sample(
            rollout.SamplingModel(
                student.model,
                student.params if lora else params,
                student.stop_ids,
                lora_params=params if lora else None,
            ),
            rows,
            sampling=sampling_settings,
            options=dataclasses.replace(options, warm_up=warm_up),
            version=version,
            # The last step ends all rows.
            token_budget=s.rollout.token_budget
            if partial_rollouts and step + 1 < stage.end_step
            else None,
            counts=counts,
        )
        return lambda: finish_rollout(sequences, step, len(rows), counts)

    def finish_rollout(
        sequences: Iterator[rollout.Sequence], step: int, num_requested: int, counts: Counter[str]
    ):
        started = time.perf_counter()
        done = list(sequences)
        took = time.perf_counter() - started
        ended = [row for row in done if row.finish_reason]
        written = sum(len(row.tokens) for row in ended)
        measured = {
            "rollout/tokens_per_second": counts["tokens"] / took,
            "rollout/mean_length": written / max(1, len(ended)),
            "rollout/truncated": sum(r.finish_reason == "length" for r in ended)
            / max(1, len(ended)),
            "rollout/repetition": -float(
                np.mean([terms.compute_repetition(r.tokens) for r in ended] or [0])
            ),
            "rollout/utilisation": counts["tokens"] / counts["slot_steps"],
            "time/rollout": took,
            **_count_skipped(stage),
            **curriculum.mean_difficulty([row.difficulty for row in ended]),
            **_measure_by_mode(ended),
        }
        if partial_rollouts:
            partial_rollouts.num_started += num_requested - len(partial_rollouts.sequences)
            partial_rollouts.sequences = [row for row in done if not row.finish_reason]
            measured["rollout/ended"] = len(ended)
        if partial_rollouts or stage.async_rollouts:
            stale = sum(version < step for row in ended for version in row.versions)
            measured["rollout/stale"] = stale / max(1, written)
        return ended, measured

    return start_rollout


def _measure_by_mode(rows: Sequence[rollout.Sequence]) -> Metrics:
    """Lengths and truncation of the modes apart; each that there is."""
    metrics: Metrics = {}
    for mode, thinking in THINKING_MODES.items():
        of = [row for row in rows if row.thinking == thinking]
        if of:
            cut = sum(row.finish_reason == "length" for row in of)
            metrics[f"rollout/rows/{mode}"] = len(of)
            metrics[f"rollout/mean_length/{mode}"] = sum(len(row.tokens) for row in of) / len(of)
            metrics[f"rollout/truncated/{mode}"] = cut / len(of)
    return metrics
