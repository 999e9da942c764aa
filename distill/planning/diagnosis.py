"""Measures a student and a teacher on a run's own prompts, and judges whether to start the run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.batch import Batch
from distill.data import chat, dataset
from distill.evaluation import tasks
from distill.objectives import divergences, fused_head, losses
from distill.policy import compatibility, forward, policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.teachers import local as teacher_lib
from distill.training import microbatches, setup, stages, update_metrics
from distill.training.setup import RunSetup, StageSetup
from models import transformer
from models.errors import UserError

TOP_K = 16  # most likely tokens, of which the teacher's are compared with the student's
BATCH_ROWS = 32  # scored together
MAX_SLOTS = 64  # sequences decoded together
# Thresholds beyond which a run is doubtful: rules of thumb, not theory.
# The student's mass outside the teacher's top K; 1 to 3% in runs that work (arXiv 2604.13016).
MAX_OUTSIDE_TOP = 0.1
MAX_TRUNCATED = 0.2  # share of responses cut at the limit
MAX_ZERO_VARIANCE = 0.8  # share of groups whose rewards are all equal
MIN_STOP_PROBABILITY = 0.1  # of the student's stop tokens, by the teacher
SAME_KL = 1e-4  # nats per token; two models with less are taken to be the same
Statistics = dict[str, Any]


def diagnose_run(c: ConfigDict, stage_name: str, num_prompts: int, num_samples: int) -> Statistics:
    """Measures a stage of a run on its first prompts; the last stage if `stage_name` is empty.

    Raises:
      UserError: if the config is invalid, the student has random weights, or the teacher is a
        moving average.
    """
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    run_setup = setup.setup_run(c, mesh, teacher_mesh)
    if c.student.random_init:
        raise UserError("config.student.random_init: there is nothing to judge in random weights")
    known = {stage.name: stage for stage in run_setup.stages}
    if (stage_name or run_setup.stages[-1].name) not in known:
        raise UserError(f"--stage={stage_name}: config.stages has {', '.join(known)}")
    stage = known[stage_name or run_setup.stages[-1].name]
    for teacher in stage.external[:1]:
        raise UserError(
            f"config.{teacher.name}.path={teacher.path}: the teacher's own responses are compared "
            "too, which needs a model that is run here"
        )
    for name in stage.local_teachers[:1]:
        if run_setup.teachers[name].is_ema:
            raise UserError(f"config.{name}.path=ema: before step 0 it is the student itself")
    with policy.use(run_setup.student):
        return _diagnose_stage(c, run_setup, stage, mesh, num_prompts, num_samples)


def _diagnose_stage(
    c: ConfigDict,
    run_setup: RunSetup,
    stage: StageSetup,
    mesh: Mesh,
    num_prompts: int,
    num_samples: int,
) -> Statistics:
    m = c.student
    student = policy.load(
        policy.make_abstract(
            m.path, m.dtype, False, mesh, kernel=c.attention, tokenizer_path=m.tokenizer
        ),
        m.dtype,
    )
    grader = stage.c.reward.grader
    examples = dataset.get_step_examples(stage.source, 0, num_prompts, c.seed)
    rows = sample_responses(student, stage, examples, num_samples, c.seed)
    statistics: Statistics = {
        "prompts": len(examples),
        "samples": num_samples,
        "stage": stage.name,
        "rewarded": stage.loss.reward > 0,
        "student": summarise_responses(rows, examples, student, grader),
    }
    if not stage.local_teachers:
        return statistics
    teacher = run_setup.teachers[stage.local_teachers[0]]  # only the first of several is diagnosed
    loaded = policy.load(teacher.policy, teacher.c.param_dtype)
    teacher = dataclasses.replace(teacher, policy=loaded)
    statistics["agreement"] = compare_formats(student, loaded)
    mib = stages.get_loss_chunk_mib(c, mesh)
    statistics["distances"] = compare_distributions(student, teacher, rows, stage, mib)
    as_teacher = [dataclasses.replace(e, prompt=e.teacher_prompt or e.prompt) for e in examples]
    with policy.use(loaded):
        answers = sample_responses(loaded, stage, as_teacher, num_samples, c.seed)
    statistics["teacher"] = summarise_responses(answers, examples, loaded, grader)
    if "pass_rate" in statistics["teacher"]:
        statistics["gain"] = compare_pass_rates(
            statistics["teacher"]["pass_rates"], statistics["student"]["pass_rates"]
        )
    return statistics


def sample_responses(
    subject: Policy,
    stage: StageSetup,
    examples: Sequence[dataset.Example],
    num_samples: int,
    seed: int,
) -> list[rollout.Sequence]:
    """Samples responses to the examples' prompts with the stage's sampling options."""
    limit = stage.c.max_response_tokens
    rows = rollout.expand_prompts(examples, num_samples, jax.random.key(seed), limit)
    options = dataclasses.replace(
        stages.make_rollout_options(stage.c),
        slots=min(MAX_SLOTS, len(rows)),
        max_length=max(row.max_length for row in rows),
        cache_tokens=0,
    )
    return list(
        rollout.sample(
            rollout.SamplingModel(subject.model, subject.params, subject.stop_ids),
            rows,
            sampling=stages.make_sampling(stage.c),
            options=options,
        )
    )


def compare_distributions(
    student: Policy,
    teacher: teacher_lib.Teacher,
    rows: Sequence[rollout.Sequence],
    stage: StageSetup,
    loss_chunk_mib: float,
) -> Statistics:
    """Returns means over the tokens of the student's responses: both KLs and both entropies (nats),
    the overlap of the most likely tokens, and the teacher's log-probability of the stop tokens."""

    @jax.jit
    def sum_statistics(params: Any, batch: Batch):
        inputs = fused_head.HeadInputs(
            forward.compute_hidden(student.model, params, batch),
            transformer.get_output_head(params),
            losses.shift(batch.tokens_BT),
            teacher=batch.teacher,
        )
        options = fused_head.StatsOptions(
            loss_chunk_mib,
            split=mesh_lib.split_vocabulary,
            divergence=divergences.Divergence("forward"),
            overlap_k=min(TOP_K, student.config.vocab_size),
        )
        stats = fused_head.compute_token_stats(inputs, options)
        mask_BT = losses.shift(batch.mask_BT).astype(jnp.float32)
        sums = {
            name: (jnp.sum(x * mask_BT), jnp.sum(mask_BT))
            for name, x in stats.items()
            if name not in divergences.TOP_STATS
        }
        assert batch.finished_BT is not None
        return sums | update_metrics.sum_stop_logps(stats, mask_BT, losses.shift(batch.finished_BT))

    s, mesh = stage.c, policy.get_mesh(student)
    shards = math.lcm(
        *(mesh_lib.count_row_shards(policy.get_mesh(x)) for x in (student, teacher.policy))
    )
    teachers = teacher_lib.place_heads([teacher])
    count = -(-min(BATCH_ROWS, len(rows)) // shards) * shards
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), count):
        tokens = s.max_prompt_tokens + s.max_response_tokens
        batch = microbatches.make_unpacked_batch(
            rows[start : start + count], count, tokens, stage.context_tokens
        )
        batch = teacher_lib.score(teachers, jax.device_put(batch, mesh_lib.make_row_sharding(mesh)))
        for name, pair in sum_statistics(student.params, batch).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.array(jax.device_get(pair))
    means = {name: float(x) / float(n) if n else None for name, (x, n) in sums.items()}
    means["forward_kl"] = means.pop("divergence")
    return means


def summarise_responses(
    rows: Sequence[rollout.Sequence],
    examples: Sequence[dataset.Example],
    subject: Policy,
    grader: str,
) -> Statistics:
    """Returns mean length, the share cut and, if all rows have answers, pass rates by prompt."""
    G = len(rows) // len(examples)
    statistics: Statistics = {
        "mean_length": float(np.mean([len(row.tokens) for row in rows])),
        "truncated": float(np.mean([row.finish_reason == "length" for row in rows])),
    }
    if subject.tokenizer is None or not all(example.answer for example in examples):
        return statistics
    tokenizer = subject.tokenizer
    texts = [chat.decode_response(tokenizer, row.prompt, row.tokens) for row in rows]
    answers = [example.answer for example in examples for _ in range(G)]
    with graders.Grader() as pool:
        outcomes = pool.grade(tasks.BENCHMARKS[grader].grading, texts, answers)
    right = [
        o == "correct" and row.finish_reason == "stop"
        for o, row in zip(outcomes, rows, strict=True)
    ]
    right_PG = np.array(right, float).reshape(-1, G)
    pass_rates = right_PG.mean(axis=1)
    return statistics | {
        "pass_rate": float(pass_rates.mean()),
        "zero_variance_groups": float(np.mean((pass_rates == 0) | (pass_rates == 1))),
        "pass_rates": pass_rates.tolist(),
    }


def compare_pass_rates(
    better: Sequence[float], worse: Sequence[float]
) -> tuple[float, float, float]:
    """Returns the mean difference of per-prompt pass rates, and the ends of its 95% interval."""
    gaps = np.array(better) - np.array(worse)
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    # Without any spread, use the rule of three for this number of prompts.
    half = max(half, 3 / len(gaps)) if not gaps.std() else half
    mean = float(gaps.mean())
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def compare_formats(student: Policy, teacher: Policy) -> Statistics:
    """Compares stop ids and chat templates. Setup has checked that the vocabularies agree."""
    statistics: Statistics = {
        "student_stop_ids": list(student.stop_ids),
        "teacher_stop_ids": list(teacher.stop_ids),
        "further_stop_ids": compatibility.find_extra_stop_ids(student, teacher),
        "templates_agree": None,
    }
    ours, theirs = student.tokenizer, teacher.tokenizer
    if ours and theirs and ours.chat_template and theirs.chat_template:
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        statistics["templates_agree"] = all(
            chat.render_messages(ours, turns, thinking=mode)
            == chat.render_messages(theirs, turns, thinking=mode)
            for mode in (True, False)
        )
    return statistics


# (True if it speaks against the run, False if for it, None if neither; the finding, a colon, and
# the evidence with advice)
Finding = tuple[bool | None, str]


def make_findings(statistics: Statistics) -> list[Finding]:
    """Derives findings from the statistics of `diagnose_run`."""
    findings: list[Finding] = []
    if statistics.get("agreement"):
        findings += _assess_formats(statistics["agreement"])
    if statistics.get("distances"):
        findings += _assess_distributions(statistics["distances"])
    findings += _assess_pass_rates(statistics)
    for name in ("student", "teacher"):
        if name in statistics:
            cut, length = statistics[name]["truncated"], statistics[name]["mean_length"]
            evidence = f"{length:.0f} tokens a response, {100 * cut:.0f}% cut at the limit"
            if cut > MAX_TRUNCATED:
                advice = "raise max_response_tokens: a cut response earns nothing and has no end"
                findings.append((True, f"the {name} has no room: {evidence}; {advice}"))
            else:
                findings.append((None, f"the {name} has room: {evidence}"))
    if "zero_variance_groups" in statistics["student"]:
        share = statistics["student"]["zero_variance_groups"]
        evidence = f"{100 * share:.0f}% of groups are all right or all wrong"
        if not statistics["rewarded"]:
            findings.append((None, f"this objective has no reward: {evidence}"))
        elif share > MAX_ZERO_VARIANCE:
            advice = "take other prompts (data.curriculum=weighted)"
            findings.append((True, f"most groups teach nothing: {evidence}; {advice}"))
        else:
            findings.append((False, f"groups have something to compare: {evidence}"))
    return findings


def _assess_formats(statistics: Statistics) -> list[Finding]:
    missing_stop_ids = statistics["further_stop_ids"]
    if missing_stop_ids:
        stops = (
            f"the teacher ends where the student writes on: at {missing_stop_ids}; "
            "give it these stop ids"
        )
    else:
        stops = f"stop ids agree: {statistics['student_stop_ids']}"
    findings: list[Finding] = [
        (None, "tokenizers agree: every id is the same token"),
        (bool(missing_stop_ids), stops),
    ]
    if statistics["templates_agree"] is not None:
        same = statistics["templates_agree"]
        differ = "chat templates differ: the teacher reads prompts in a form that is not its own"
        findings.append((not same, "chat templates agree" if same else differ))
    return findings


def _assess_distributions(statistics: Statistics) -> list[Finding]:
    kl, forward, outside = (
        statistics["reverse_kl"],
        statistics["forward_kl"],
        statistics["outside_top"],
    )
    evidence = f"reverse KL {kl:.3f}, forward {forward:.3f} nats a token"
    same = kl < SAME_KL
    nothing = f"the teacher is the student: {evidence}; nothing is to be learned from it"
    top = (
        f"{100 * statistics['top_overlap']:.0f}% of the teacher's top {TOP_K} are in the "
        "student's, "
        f"{100 * outside:.1f}% of the student's mass is outside"
    )
    far = outside > MAX_OUTSIDE_TOP
    other = "the student does not think in the teacher's way"
    advice = "begin with the teacher's traces (sft, distill)"
    findings: list[Finding] = [
        (same, nothing if same else f"the two differ: {evidence}"),
        (far, f"{other}: {top}; {advice}" if far else f"it thinks in the teacher's way: {top}"),
        (
            None,
            f"entropy: {statistics['entropy']:.3f} of the student, "
            f"{statistics['teacher_entropy']:.3f} of the "
            "teacher, nats a token",
        ),
    ]
    if statistics["teacher_stop_logp"] is not None:
        p = math.exp(statistics["teacher_stop_logp"])
        where = f"p = {p:.2g} of the stop token there"
        if p < MIN_STOP_PROBABILITY:
            on = "the teacher would write on where the student stops"
            findings.append((True, f"{on}: {where}; lengths will grow"))
        else:
            findings.append((None, f"the teacher would stop where the student does: {where}"))
    return findings


def _assess_pass_rates(statistics: Statistics) -> list[Finding]:
    if "pass_rate" not in statistics["student"]:
        return [(None, "the data has no answers: whether the teacher is better is not known")]
    ours = statistics["student"]["pass_rate"]
    if "teacher" not in statistics:
        return [(None, f"the student's pass rate is {100 * ours:.1f}%")]
    if not ours and not statistics["teacher"]["pass_rate"]:
        return [(True, "nothing is right: no response of either; is reward.grader theirs?")]
    mean, low, high = statistics["gain"]
    evidence = (
        f"pass rate {100 * ours:.1f}%, the teacher's "
        f"{100 * statistics['teacher']['pass_rate']:.1f}%: "
        f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    )
    if low > 0:
        return [(False, f"the teacher is better: {evidence}")]
    if high < 0:
        return [(True, f"the teacher is worse: {evidence}; the student would unlearn")]
    advice = "take more --prompts, or another teacher"
    return [(True, f"the teacher is not surely better: {evidence}; {advice}")]


def render_verdict(findings: Sequence[Finding]) -> str:
    """Returns the verdict as one line: go, or the findings against the run."""
    against = [line.partition(":")[0] for bad, line in findings if bad]
    if not against:
        return "verdict: go; nothing here speaks against the run"
    return f"verdict: not yet; {len(against)} against it: " + "; ".join(against)
