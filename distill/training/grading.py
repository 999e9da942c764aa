"""Computes rewards of sampled sequences by rules and by teachers, and their group advantages.

A group is the samples of one prompt. A reward is a number for a whole response; advantages are
computed once, from the final rewards.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill import rollout
from distill.data import chat
from distill.data.collate import BatchLayout, SampledExample
from distill.data.examples import Example
from distill.evaluation import tasks
from distill.objectives import advantages
from distill.rewards import graders, terms
from distill.runtime import distributed, run_files
from distill.teachers import local
from distill.training import microbatches, stages
from distill.training.microbatches import PackedRows
from models.transformer import Params

Metrics = dict[str, float]

GAVE_UP = ("timeout", "error")  # outcomes that say nothing about a response
THINKING_MODES = {"think": True, "no_think": False}  # metric suffix -> thinking flag of a row


def grade_sequences(
    s: ConfigDict,
    tokenizer: PreTrainedTokenizerBase,
    grader: graders.Grader,
    sequences: Sequence[rollout.Sequence],
    examples: Sequence[Example],
) -> tuple[list[float], dict[str, list[float]]]:
    """Grades `s.samples` sequences of each example by rules.

    Returns:
      The rewards without the teachers' part, and the values of each term; one per sequence.
    """
    texts = [chat.decode_response(tokenizer, x.prompt, x.tokens) for x in sequences]
    grades: list[graders.Grade] = [{"outcome": "no_answer"}] * len(sequences)
    if s.reward.correct or s.reward.score or s.reward.format:
        answers = [examples[i // s.samples].answer for i in range(len(sequences))]
        # One process grades for all, since timeouts depend on how busy a host is.
        rule = tasks.BENCHMARKS[s.reward.grader].grading
        grades = distributed.broadcast_from_primary(
            lambda: grader.collect_grades(rule, texts, answers)
        )
        _warn_of_ungraded(grades, sequences)
    responses = [
        terms.Response(
            text=text,
            tokens=x.tokens,
            finished=x.finish_reason == "stop",
            outcome=str(grade["outcome"]),
            thinking=x.thinking,
            limit=s.max_response_tokens,
            margin=s.reward.length_margin,
            score=graders.get_score(grade),
        )
        for text, x, grade in zip(texts, sequences, grades, strict=True)
    ]
    return terms.compute_rewards(responses, stages.get_term_weights(s))


def _warn_of_ungraded(
    grades: Sequence[graders.Grade], sequences: Sequence[rollout.Sequence]
) -> None:
    """Says on the terminal how many responses earn nothing because their grader gave up."""
    reasons = {i: str(x["outcome"]) for i, x in enumerate(grades) if x["outcome"] in GAVE_UP}
    if reasons:
        first = next(iter(reasons))
        run_files.log_line(
            f"warning: the grader gave up on {len(reasons)} of {len(grades)} responses, which earn "
            f"nothing, the first by {reasons[first]}: {sequences[first].where or f'row {first}'}"
        )


def drop_failed_groups(
    sequences: list[rollout.Sequence], rewards: list[float] | None, samples: int
) -> tuple[list[rollout.Sequence], list[float] | None]:
    """Leaves out sequences that ended in NaN logits, and names them on the terminal.

    Of sequences with rewards, in groups of `samples`, it leaves out the whole group, which an
    advantage compares.
    """
    failed = [i for i, x in enumerate(sequences) if x.finish_reason == "error"]
    if not failed:
        return sequences, rewards
    x = sequences[failed[0]]
    run_files.log_line(
        f"warning: {len(failed)} of {len(sequences)} responses ended in NaN logits and are left "
        f"out, the first after {len(x.tokens)} tokens: {x.where or f'row {failed[0]}'}"
    )
    size = samples if rewards is not None else 1
    dropped = {i // size for i in failed}
    kept = [i for i in range(len(sequences)) if i // size not in dropped]
    return [sequences[i] for i in kept], rewards and [rewards[i] for i in kept]


@dataclasses.dataclass
class GradedGroups:
    """The graded groups of a step, from one or several rounds of sampling.

    `sequences` and `rewards` are those of groups that are trained on. `term_values` and
    `thinking_flags` cover every graded sequence, kept or dropped.
    """

    sequences: list[rollout.Sequence] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    dropped_rewards: list[float] = dataclasses.field(default_factory=list)
    num_groups: int = 0
    num_zero_variance: int = 0
    term_values: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    thinking_flags: list[bool] = dataclasses.field(default_factory=list)

    def add_round(
        self,
        s: ConfigDict,
        sequences: Sequence[rollout.Sequence],
        rewards: list[float],
        term_values: dict[str, list[float]],
    ) -> None:
        """Adds graded sequences, and drops groups without variance unless the config keeps them.

        If teachers add to the rewards, no group is dropped here.
        """
        self.thinking_flags += [x.thinking for x in sequences]
        for name, values in term_values.items():
            self.term_values.setdefault(name, []).extend(values)
        for start in range(0, len(sequences), s.samples):
            group_rewards = rewards[start : start + s.samples]
            is_constant = len(set(group_rewards)) == 1 and not s.reward.teacher_logprob
            self.num_groups += 1
            self.num_zero_variance += is_constant
            if is_constant and s.reward.zero_variance_groups != "keep":
                self.dropped_rewards += group_rewards
            else:
                self.sequences += sequences[start : start + s.samples]
                self.rewards += group_rewards

    def measure_groups(self, sampled_rows: int) -> Metrics:
        """Returns metrics of the first `sampled_rows` sequences, with dropped ones last."""
        return {
            "reward/mean": float(np.mean((self.rewards + self.dropped_rewards)[:sampled_rows])),
            "reward/zero_variance_groups": self.num_zero_variance / self.num_groups,
            "reward/dropped_rows": max(0, sampled_rows - len(self.sequences)),
        }

    def measure_terms(self) -> Metrics:
        """Returns the mean and standard deviation of each term, and its mean by thinking mode."""
        metrics: Metrics = {}
        for name, values in self.term_values.items():
            metrics[f"reward/{name}"] = float(np.mean(values))
            metrics[f"reward/{name}_std"] = float(np.std(values))
            for mode, thinking in THINKING_MODES.items():
                pairs = zip(values, self.thinking_flags, strict=True)
                mode_values = [x for x, flag in pairs if flag == thinking]
                if mode_values:
                    metrics[f"reward/{name}/{mode}"] = float(np.mean(mode_values))
        return metrics


def score_with_teachers(
    teachers: Sequence[local.Teacher],
    packed: list[list[PackedRows]],
    examples: Sequence[Example],
    layout: BatchLayout,
    mesh: Mesh,
    loss_chunk_mib: float,
    ema_params: Params | None,
) -> np.ndarray:
    """Returns the mean log-probability of each response under the teachers, float32 [B]."""
    layout = dataclasses.replace(layout, has_advantages=False)
    minibatches = microbatches.make_microbatches(packed, examples, layout, mesh)
    scores_B = np.zeros(len(examples), np.float32)
    for micro in (micro for minibatch in minibatches for micro in minibatch):
        batch = micro.to_device(mesh)
        logp_BT = local.judge_responses(teachers, batch, loss_chunk_mib, ema_params)
        spans = microbatches.find_response_spans(micro.rows, examples, layout.max_response)
        for number, row, start, end in spans:
            scores_B[number] = logp_BT[row, start:end].mean()
    return scores_B


def add_teacher_rewards(
    s: ConfigDict, examples: Sequence[SampledExample], scores_B: np.ndarray
) -> tuple[list[SampledExample], Metrics]:
    """Adds the teachers' scores to the rewards, with weight `reward.teacher_logprob`."""
    rewards_B = np.array([x.reward for x in examples], np.float32)
    rewards_B = rewards_B + s.reward.teacher_logprob * scores_B
    rewards_PG = rewards_B.reshape(-1, s.samples)
    metrics = {
        "reward/teacher_logprob": float(scores_B.mean()),
        "reward/teacher_logprob_std": float(scores_B.std()),
        "reward/zero_variance_groups": float(np.mean(np.ptp(rewards_PG, axis=1) == 0)),
        "reward/mean": float(rewards_B.mean()),
    }
    pairs = zip(examples, rewards_B.tolist(), strict=True)
    return [dataclasses.replace(x, reward=reward) for x, reward in pairs], metrics


def add_advantages(
    examples: Sequence[SampledExample], samples: int, advantage_norm: str
) -> list[SampledExample]:
    """Sets the advantages of whole groups of `samples` examples from their rewards."""
    rewards_B = jnp.array([x.reward for x in examples], jnp.float32)
    rewards_PG = rewards_B.reshape(-1, samples)
    advantages_PG, _ = advantages.compute_group_advantages(rewards_PG, advantage_norm)
    pairs = zip(examples, np.asarray(advantages_PG).reshape(-1).tolist(), strict=True)
    return [dataclasses.replace(x, advantage=a) for x, a in pairs]
