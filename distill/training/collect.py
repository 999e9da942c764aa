"""Collects the data of a step: reads traces, or samples the student and grades the sequences.

`loop.collect_step` calls these functions in turn. With `rollout.asynchronous`, sampling for step
i + 1 takes the weights from before update i (`start_rollout`), and runs while the device computes
that update (`sample_ahead`).
"""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.data import collate, dataset, packing
from distill.data.collate import BatchLayout
from distill.data.examples import Example
from distill.rewards import graders
from distill.runtime import distributed
from distill.runtime import mesh as mesh_lib
from distill.teachers.local import Teacher
from distill.training import drift, grading, microbatches, rollout_metrics, stages, teacher_outputs
from distill.training.grading import GradedGroups, Metrics
from distill.training.microbatches import Minibatches, PackedRows
from distill.training.prompts import StagePrompts
from distill.training.setup import RunSetup, StageSetup
from distill.training.teacher_outputs import OutputRequests
from models.transformer import Params

Sums = dict[str, tuple[float, float]]  # metrics as (sum, count), to be added over processes


@dataclasses.dataclass
class StageProgress:
    """The state of a stage beside the train state. Checkpoints hold it."""

    packer: packing.Packer | None  # if traces are packed
    buffer: rollout.RolloutBuffer

    def get_state(self, step: int) -> dict[str, Any]:
        """Returns the JSON that `restore` needs to continue at `step`, counted from the stage's
        first step."""
        packer_state = self.packer.get_state(step) if self.packer else None
        return {"packer": packer_state, "buffer": self.buffer.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        if self.packer:
            self.packer.restore(state["packer"])
        self.buffer.restore(state["buffer"])


@dataclasses.dataclass
class StartedRollout:
    """Sampling with its own copy of the weights. Tokens are drawn while `sequences` is iterated."""

    step: int  # the step that trains on the sequences
    num_requested: int
    sequences: Iterator[rollout.Sequence]
    counts: Counter[str]  # filled while sampling
    checks: drift.DriftChecks | None  # of the sequences while they are sampled


@dataclasses.dataclass(eq=False)
class Collector:
    """The settings, inputs and progress of collecting the data of a stage."""

    run_setup: RunSetup
    stage: StageSetup
    mesh: Mesh
    grader: graders.Grader
    layout: BatchLayout
    rollout_options: rollout.RolloutOptions
    loss_chunk_mib: float
    progress: StageProgress
    prompts: StagePrompts
    # By step, with the next one prefetched: minibatches of traces, and traces beside samples.
    load_minibatches: Callable[[int], tuple[Minibatches, Sums, list[Example]]]
    load_traces: Callable[[int], list[Example]]
    check_stop: Callable[[], None]
    outputs: OutputRequests  # of teachers that are not run here
    started: StartedRollout | None = None  # for the next step
    is_warm: bool = False  # True once the sampler's programs are compiled

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers that are run here."""
        return [self.run_setup.teachers[name] for name in self.stage.local_teachers]


def make_collector(
    c: ConfigDict,
    run_setup: RunSetup,
    stage: StageSetup,
    mesh: Mesh,
    grader: graders.Grader,
    cache_capacity: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Collector:
    """Makes the collector of a stage at its start.

    Args:
      check_stop: called between segments of decoding; what it raises leaves off the step.
      cache_capacity: tokens that the sampler's cache can hold; None: unknown.
    """
    s = stage.c
    packer = None
    if s.pack_tokens and not stage.sampled_rows:
        packer = packing.Packer(
            stage.source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens
        )
    routing = run_setup.student.config.routing_shape if run_setup.replay_routing else None
    layout = microbatches.make_stage_layout(
        s, stage.loss, stage.sampled_rows, routing, stage.external
    )
    own_rows = mesh_lib.list_local_rows(mesh, s.batch_size)
    outputs = OutputRequests(stage.external, s.max_response_tokens, not stage.loss.reward)
    load_minibatches = functools.partial(
        load_trace_minibatches, stage, packer, c.seed, own_rows, layout, outputs
    )
    load_traces = functools.partial(_load_traces, stage, c.seed, outputs)
    options = stages.make_rollout_options(s, cache_capacity)
    return Collector(
        run_setup=run_setup,
        stage=stage,
        mesh=mesh,
        grader=grader,
        layout=layout,
        rollout_options=dataclasses.replace(options, routing=run_setup.replay_routing),
        loss_chunk_mib=stages.get_loss_chunk_mib(c, mesh),
        progress=StageProgress(packer, rollout.RolloutBuffer()),
        prompts=StagePrompts(stage, c.seed),
        load_minibatches=dataset.prefetch_next(load_minibatches, stage.end_step),
        load_traces=dataset.prefetch_next(load_traces, stage.end_step),
        check_stop=check_stop,
        outputs=outputs,
    )


def load_trace_minibatches(
    stage: StageSetup,
    packer: packing.Packer | None,
    seed: int,
    own_rows: list[int],
    layout: BatchLayout,
    outputs: OutputRequests,
    step: int,
) -> tuple[Minibatches, Sums, list[Example]]:
    """Reads the rows `own_rows`, those of this process, of a step of traces, and asks for their
    teachers' outputs.

    With a packer every process reads all rows, since the content of one depends on the lengths of
    the others.
    """
    s = stage.c
    if packer:
        packed = packer.get_step_rows(step - stage.first_step)
        rows = [packed[row] for row in own_rows]
    else:
        examples = dataset.get_step_examples(
            stage.source, step - stage.first_step, s.batch_size, seed, own_rows
        )
        rows = [[example] for example in examples]
    rows = [outputs.ask(row) for row in rows]
    sizes = (s.batch_size, s.minibatches, s.accumulate)
    has_outputs = bool(outputs.teachers)
    minibatches = microbatches.split_rows(rows, own_rows, sizes, layout, has_outputs)
    examples = [example for row in rows for example in row]
    sums = collate.measure_examples(examples, len(rows) * layout.row_tokens, layout.max_response)
    return minibatches, sums, examples


def read_minibatches(collector: Collector, step: int) -> tuple[Minibatches, Metrics]:
    """Returns the minibatches of a step of traces."""
    minibatches, sums, examples = collector.load_minibatches(step)
    metrics = distributed.reduce_means(sums) | count_skipped(collector.stage)
    start_time = time.perf_counter()
    teacher_outputs.wait_for_outputs(examples, collector.check_stop)
    return minibatches, {**metrics, "time/score": time.perf_counter() - start_time}


def _load_traces(stage: StageSetup, seed: int, outputs: OutputRequests, step: int) -> list[Example]:
    s = stage.c
    rows = range(stage.sampled_rows, s.batch_size)
    examples = dataset.get_step_examples(
        stage.source, step - stage.first_step, s.batch_size, seed, rows
    )
    return outputs.ask(examples) if jax.process_count() == 1 else examples


def read_traces(collector: Collector, step: int) -> list[Example]:
    """Returns the traces of a step whose other rows are sampled. Every process reads all traces,
    since packing depends on all lengths."""
    stage = collector.stage
    return collector.load_traces(step) if stage.sampled_rows < stage.c.batch_size else []


def measure_traces(
    stage: StageSetup,
    packed: list[list[PackedRows]],
    samples: Sequence[Example],
    traces: Sequence[Example],
    layout: BatchLayout,
) -> Metrics:
    """Measures traces that are packed together with samples."""
    num_rows = sum(len(rows) for minibatch in packed for rows in minibatch)
    all_sums, sums = (
        collate.measure_examples(examples, layout.row_tokens * num_rows, layout.max_response)
        for examples in ([*samples, *traces], traces)
    )
    sums["data/efficiency"] = all_sums["data/efficiency"]
    return {**count_skipped(stage), **distributed.reduce_means(sums)}


def count_skipped(stage: StageSetup) -> Metrics:
    return {"data/skipped": len(stage.source.skip_reasons)}


def sample_sequences(
    collector: Collector, params: Params, step: int, average: Params | None = None
) -> tuple[list[rollout.Sequence], Metrics]:
    """Returns the finished sequences of a step, in order.

    With asynchronous sampling they may be ready already, and sampling for the next step starts with
    `params`, before they are updated. `average`: their moving average, if one is kept.
    """
    stage, prompts = collector.stage, collector.prompts
    buffer = collector.progress.buffer
    if buffer.ready_step == step:
        sequences, metrics = buffer.ready, dict(buffer.ready_metrics)
    else:
        requests = prompts.get_requests(step, buffer)
        sequences, metrics = finish_rollout(
            collector, start_rollout(collector, params, step, step, requests, average)
        )
    if stage.asynchronous and step + 1 < stage.end_step:
        requests = prompts.get_requests(step + 1, buffer)
        collector.started = start_rollout(collector, params, step, step + 1, requests)
    return sequences, metrics


def sample_ahead(collector: Collector, wait_for: Any) -> None:
    """Runs the sampling that `sample_sequences` started for the next step.

    On CPUs it first waits for `wait_for`, arrays of the update; on other devices the update runs
    meanwhile.
    """
    started, collector.started = collector.started, None
    buffer = collector.progress.buffer
    if started is None:
        buffer.ready_step, buffer.ready, buffer.ready_metrics = -1, [], {}
        return
    mesh_lib.wait_on_cpu(wait_for)
    buffer.ready_step = started.step
    buffer.ready, buffer.ready_metrics = finish_rollout(collector, started)


def start_rollout(
    collector: Collector,
    params: Params,
    version: int,
    step: int,
    requests: list[rollout.Sequence],
    average: Params | None = None,
) -> StartedRollout:
    """Starts sampling the sequences `requests` for `step`.

    `params` are the weights after `version` steps; they may be donated once this returns, unless
    the stage checks for drift.
    """
    stage, student = collector.stage, collector.run_setup.student
    has_lora = student.model.lora is not None
    is_last = step + 1 == stage.end_step  # all its sequences must end
    counts: Counter[str] = Counter()
    warm_up, collector.is_warm = not collector.is_warm, True

    def check_segment() -> None:
        collector.outputs.ask_ended(requests)
        # What is sampled ahead is not left off: the update takes away the weights it is drawn with.
        if version == step:
            collector.check_stop()

    model = rollout.SamplingModel(
        student.model,
        student.params if has_lora else params,
        student.stop_ids,
        lora_params=params if has_lora else None,
    )
    sample = functools.partial(
        rollout.sample,
        model,
        sampling=stages.make_sampling(stage.c),
        options=dataclasses.replace(collector.rollout_options, warm_up=warm_up),
        version=version,
        token_budget=stage.token_budget if stage.token_budget and not is_last else None,
        counts=counts,
        check_stop=check_segment,
    )
    checks = None
    if stage.c.drift.kl:
        reader = collector.run_setup, stage, collector.mesh, collector.layout
        checks = drift.DriftChecks(*reader, collector.loss_chunk_mib, params, average)
    sequences = checks.sample(sample, requests) if checks else sample(requests)
    return StartedRollout(step, len(requests), sequences, counts, checks)


def finish_rollout(
    collector: Collector, started: StartedRollout
) -> tuple[list[rollout.Sequence], Metrics]:
    """Samples, returns the sequences that ended, and keeps the others for the next step."""
    stage, counts, buffer = collector.stage, started.counts, collector.progress.buffer
    start_time = time.perf_counter()
    sampled = list(started.sequences)
    checks = started.checks
    seconds = time.perf_counter() - start_time - (checks.seconds if checks else 0)
    ended = [x for x in sampled if x.finish_reason]
    metrics = rollout_metrics.measure_rollout(
        stage.c,
        started.step - stage.first_step,
        ended,
        counts,
        seconds,
        bool(collector.rollout_options.drafts),
    )
    metrics |= count_skipped(stage) | (checks.get_metrics(ended) if checks else {})
    if stage.token_budget:
        buffer.num_started += started.num_requested - len(buffer.partial)
        buffer.partial = [x for x in sampled if not x.finish_reason]
        metrics["rollout/ended"] = len(ended)
    if stage.token_budget or stage.asynchronous:
        num_stale = sum(version < started.step for x in ended for version in x.versions)
        metrics["rollout/stale"] = num_stale / max(1, sum(len(x.tokens) for x in ended))
    return ended, metrics


def sample_graded_sequences(
    collector: Collector, params: Params, step: int
) -> tuple[list[rollout.Sequence], list[float], Metrics]:
    """Samples and grades the groups of a step. With `zero_variance_groups` set to "replace",
    samples further prompts in place of groups without variance, in at most `max_rounds` rounds.

    Returns:
      The sequences of the groups to train on, in order; their rule-based rewards; and metrics.
    """
    stage, s, prompts = collector.stage, collector.stage.c, collector.prompts
    tokenizer = collector.run_setup.student.tokenizer
    assert tokenizer is not None
    start_time = time.perf_counter()
    groups, metrics = GradedGroups(), {}
    rounds = s.reward.max_rounds if s.reward.zero_variance_groups == "replace" else 1
    for turn in range(rounds):
        if turn == 0:
            examples = prompts.get_examples(step)
            sequences, metrics = sample_sequences(collector, params, step)
        else:
            number = stage.end_step + step * rounds + turn  # of prompts that belong to no step
            examples = prompts.get_examples(number)
            requests = prompts.expand_prompts(number, step)
            sequences, metrics = finish_rollout(
                collector, start_rollout(collector, params, step, step, requests)
            )
        rewards, term_values = grading.grade_sequences(
            s, tokenizer, collector.grader, sequences, examples
        )
        groups.add_round(s, sequences, rewards, term_values)
        if len(groups.sequences) >= stage.sampled_rows:
            break
    metrics = {
        **metrics,
        **groups.measure_groups(stage.sampled_rows),
        "time/rollout_and_grading": time.perf_counter() - start_time,
        **groups.measure_terms(),
    }
    kept = slice(stage.sampled_rows)
    return groups.sequences[kept], groups.rewards[kept], metrics
