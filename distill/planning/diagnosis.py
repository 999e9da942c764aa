"""Whether a teacher can teach a student: what is measured, and what follows from it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import rollout
from distill.batch import Batch
from distill.data import chat, dataset
from distill.objectives import divergences, fused_head, losses
from distill.policy import forward, policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.teachers import local as teacher_lib
from distill.training import microbatches, update
from distill.training.setup import Stage
from models.qwen3 import model

TOP = 16  # tokens of the teacher's top that the student's is compared with
# Bounds of judgement, not of theory: with more of the student's mass outside the teacher's top (in
# runs that work 1 to 3% are, arXiv 2604.13016), more responses cut or more groups constant, or less
# of the teacher's probability on the student's stop tokens, a run is doubtful.
OUTSIDE, CUT, CONSTANT, STOPS = 0.1, 0.2, 0.8, 0.1
SAME_KL = 1e-4  # nats a token, below which two models are one
Figures = dict[str, Any]


def distances(
    student: Policy,
    teacher: teacher_lib.Teacher,
    rows: Sequence[rollout.Sequence],
    stage: Stage,
    logits_mib: float,
) -> Figures:
    """Means over the tokens of the student's responses: both KL, both entropies, overlap of the
    tops; and of its stop tokens what the teacher makes of them."""

    @jax.jit
    def measure(params: Any, heads: Any, batch: Batch):
        stats = fused_head.token_stats(
            forward.hidden(student.model, params, batch),
            model.head(params),
            losses.shift(batch.tokens_BT),
            batch.teacher_hidden_BTD,
            heads,
            logits_mib=logits_mib,
            split=mesh_lib.split_vocabulary,
            divergence=divergences.Divergence("forward"),
            overlap=min(TOP, student.config.vocab_size),
        )
        mask_BT = losses.shift(batch.mask_BT).astype(jnp.float32)
        sums = {name: (jnp.sum(x * mask_BT), jnp.sum(mask_BT)) for name, x in stats.items()}
        assert batch.finished_BT is not None
        return sums | update.stops(stats, mask_BT, losses.shift(batch.finished_BT))

    s, mesh = stage.c, policy.mesh_of(student)
    shards = math.lcm(*(mesh_lib.row_shards(policy.mesh_of(x)) for x in (student, teacher.policy)))
    heads = teacher_lib.heads([teacher])
    count = -(-min(32, len(rows)) // shards) * shards
    total: dict[str, np.ndarray] = {}
    for at in range(0, len(rows), count):
        tokens = s.max_prompt_tokens + s.max_response_tokens
        batch = microbatches.unpacked(rows[at : at + count], count, tokens, stage.room)
        batch = teacher_lib.score([teacher], jax.device_put(batch, mesh_lib.rows(mesh)))
        for name, pair in measure(student.params, heads, batch).items():
            total[name] = total.get(name, np.zeros(2)) + np.array(jax.device_get(pair))
    found = {name: float(x) / float(n) if n else None for name, (x, n) in total.items()}
    found["forward_kl"] = found.pop("divergence")
    return found


def written(
    rows: Sequence[rollout.Sequence], examples: Sequence[dataset.Example], who: Policy, grader: str
) -> Figures:
    """Lengths, truncation and, where all rows have an answer, right ones of each prompt."""
    G = len(rows) // len(examples)
    found: Figures = {
        "mean_length": float(np.mean([len(row.tokens) for row in rows])),
        "truncated": float(np.mean([row.reason == "length" for row in rows])),
    }
    if who.tokenizer is None or not all(example.answer for example in examples):
        return found
    tokenizer = who.tokenizer
    texts = [chat.decode(tokenizer, row.tokens) for row in rows]
    answers = [example.answer for example in examples for _ in range(G)]
    with graders.Grader() as pool:
        outcomes = pool.grade(grader, texts, answers)
    right = [o == "correct" and row.reason == "stop" for o, row in zip(outcomes, rows, strict=True)]
    right_PG = np.array(right, float).reshape(-1, G)
    of_prompt = right_PG.mean(axis=1)
    return found | {
        "pass_rate": float(of_prompt.mean()),
        "constant_groups": float(np.mean((of_prompt == 0) | (of_prompt == 1))),
        "pass_rates": of_prompt.tolist(),
    }


def difference(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of two pass rates, prompt by prompt, and its 95% interval."""
    gaps = np.array(better) - np.array(worse)
    half = 1.96 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    # With no spread at all the interval is what so few prompts allow: the rule of three.
    half = max(half, 3 / len(gaps)) if not gaps.std() else half
    mean = float(gaps.mean())
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def agreement(student: Policy, taught: Policy) -> Figures:
    """Whether the two end and lay out a text alike. That ids mean the same tokens, the config's
    checks have made sure of."""
    found: Figures = {
        "student_stop_ids": list(student.stop_ids),
        "teacher_stop_ids": list(taught.stop_ids),
        "further_stop_ids": policy.further_stops(student, taught),
        "templates_agree": None,
    }
    ours, theirs = student.tokenizer, taught.tokenizer
    if ours and theirs and ours.chat_template and theirs.chat_template:
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        found["templates_agree"] = all(
            chat.render(ours, turns, thinking=mode) == chat.render(theirs, turns, thinking=mode)
            for mode in (True, False)
        )
    return found


# A finding: whether it speaks against the run (None: neither way), and the line, which says what is
# found, a colon, the figures, and what follows from them.
Finding = tuple[bool | None, str]


def findings(f: Figures) -> list[Finding]:
    """What the figures say, each in a line with what follows from it."""
    found: list[Finding] = []
    if f.get("agreement"):
        found += _alike(f["agreement"])
    if f.get("distances"):
        found += _near(f["distances"])
    found += _better(f)
    for name in ("student", "teacher"):
        if name in f:
            cut, length = f[name]["truncated"], f[name]["mean_length"]
            told = f"{length:.0f} tokens a response, {100 * cut:.0f}% cut at the limit"
            if cut > CUT:
                then = "raise max_response_tokens, what is cut is never rewarded and has no end"
                found.append((True, f"the {name} has no room: {told}; {then}"))
            else:
                found.append((None, f"the {name} has room: {told}"))
    if "constant_groups" in f["student"]:
        share = f["student"]["constant_groups"]
        told = f"{100 * share:.0f}% of groups are all right or all wrong"
        if not f["rewarded"]:
            found.append((None, f"this objective has no reward: {told}"))
        elif share > CONSTANT:
            then = "take other prompts (data.curriculum=weighted)"
            found.append((True, f"most groups teach nothing: {told}; {then}"))
        else:
            found.append((False, f"groups have something to compare: {told}"))
    return found


def _alike(a: Figures) -> list[Finding]:
    lost = a["further_stop_ids"]
    if lost:
        stops = f"the teacher ends where the student writes on: at {lost}; give it these stop ids"
    else:
        stops = f"stop ids agree: {a['student_stop_ids']}"
    found: list[Finding] = [
        (None, "tokenizers agree: every id is the same token"),
        (bool(lost), stops),
    ]
    if a["templates_agree"] is not None:
        same = a["templates_agree"]
        differ = "chat templates differ: the teacher reads prompts in a form that is not its own"
        found.append((not same, "chat templates agree" if same else differ))
    return found


def _near(d: Figures) -> list[Finding]:
    kl, forward, outside = d["reverse_kl"], d["forward_kl"], d["outside_top"]
    told = f"reverse KL {kl:.3f}, forward {forward:.3f} nats a token"
    same = kl < SAME_KL
    nothing = f"the teacher is the student: {told}; nothing is to be learned from it"
    top = (
        f"{100 * d['top_overlap']:.0f}% of the teacher's top {TOP} are in the student's, "
        f"{100 * outside:.1f}% of the student's mass is outside"
    )
    far = outside > OUTSIDE
    other = "the student does not think in the teacher's way"
    then = "begin with the teacher's traces (sft, distill)"
    found: list[Finding] = [
        (same, nothing if same else f"the two differ: {told}"),
        (far, f"{other}: {top}; {then}" if far else f"it thinks in the teacher's way: {top}"),
        (
            None,
            f"entropy: {d['entropy']:.3f} of the student, {d['teacher_entropy']:.3f} of the "
            "teacher, nats a token",
        ),
    ]
    if d["teacher_stop_logp"] is not None:
        p = math.exp(d["teacher_stop_logp"])
        where = f"p = {p:.2g} of the stop token there"
        if p < STOPS:
            on = "the teacher would write on where the student stops"
            found.append((True, f"{on}: {where}; lengths will grow"))
        else:
            found.append((None, f"the teacher would stop where the student does: {where}"))
    return found


def _better(f: Figures) -> list[Finding]:
    if "pass_rate" not in f["student"]:
        return [(None, "the data has no answers: whether the teacher is better is not known")]
    ours = f["student"]["pass_rate"]
    if "teacher" not in f:
        return [(None, f"the student's pass rate is {100 * ours:.1f}%")]
    if not ours and not f["teacher"]["pass_rate"]:
        return [(True, "nothing is right: no response of either; is reward.grader theirs?")]
    mean, low, high = f["gain"]
    told = (
        f"pass rate {100 * ours:.1f}%, the teacher's {100 * f['teacher']['pass_rate']:.1f}%: "
        f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    )
    if low > 0:
        return [(False, f"the teacher is better: {told}")]
    if high < 0:
        return [(True, f"the teacher is worse: {told}; the student would unlearn")]
    then = "take more --prompts, or another teacher"
    return [(True, f"the teacher is not surely better: {told}; {then}")]


def verdict(found: Sequence[Finding]) -> str:
    """The last line."""
    against = [line.partition(":")[0] for bad, line in found if bad]
    if not against:
        return "verdict: go; nothing here speaks against the run"
    return f"verdict: not yet; {len(against)} against it: " + "; ".join(against)
