"""python -m distill.diagnose --config=configs/X.py [--prompts=N] [--out=FILE.json]

Before a run is paid for, on N prompts of the config's own data: does the student think in the
teacher's way, is the teacher better at all, do the two read and end a text alike, do responses fit,
is there anything to compare in a group. Each finding is a line with its figure and what follows
from it; the last line is the verdict. Nothing is trained. With --out all figures, as JSON.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from distill import (
    chat,
    cli,
    data,
    distributions,
    forward,
    head,
    losses,
    metrics,
    microbatches,
    policy,
    prepare,
    rewards,
    rollout,
    stages,
    update,
)
from distill import mesh as mesh_lib
from distill import teacher as teacher_lib
from distill.batch import Batch
from distill.policy import Policy
from distill.prepare import Stage
from models.errors import UserError
from models.qwen3 import model

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts to ask.", lower_bound=2, flag_values=OPTIONS)
SAMPLES = flags.DEFINE_integer(
    "samples", 4, "Responses to each.", lower_bound=2, flag_values=OPTIONS
)
STAGE = flags.DEFINE_string("stage", "", "Of the config; else the last.", flag_values=OPTIONS)
OUT = flags.DEFINE_string("out", "", "JSON to write.", flag_values=OPTIONS)

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
        stats = head.token_stats(
            forward.hidden(student.model, params, batch),
            model.head(params),
            losses.shift(batch.tokens_BT),
            batch.teacher_hidden_BTD,
            heads,
            logits_mib=logits_mib,
            split=mesh_lib.split_vocabulary,
            divergence=distributions.Divergence("forward"),
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


def respond(who: Policy, stage: Stage, seed: int, told: bool = False) -> list[rollout.Sequence]:
    """What a model writes to the first prompts of a stage, sampled as the stage samples; with
    `told` to those that a teacher reads."""
    examples = data.at(stage.source, 0, PROMPTS.value, seed)
    if told:
        examples = [dataclasses.replace(e, prompt=e.told or e.prompt) for e in examples]
    limit = stage.c.max_response_tokens
    rows = rollout.expand_prompts(examples, SAMPLES.value, jax.random.key(seed), limit)
    options = dataclasses.replace(
        stages.rollout_options(stage.c),
        slots=min(64, len(rows)),
        longest=max(row.longest for row in rows),
        cache_tokens=0,
    )
    done = rollout.sample(
        who.model,
        who.params,
        rows,
        sampling=stages.sampling(stage.c),
        stop_ids=who.stop_ids,
        options=options,
    )
    return list(done)


def written(
    rows: Sequence[rollout.Sequence], examples: Sequence[data.Example], who: Policy, grader: str
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
    with rewards.Grader() as pool:
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


def diagnose(c: ConfigDict, plan: prepare.Plan, stage: Stage, mesh: Mesh, grader: str) -> Figures:
    """All figures of a stage of a plan; reads weights."""
    m = c.student
    student = policy.load(
        policy.describe(m.path, m.dtype, False, mesh, kernel=c.attention, tokenizer_of=m.tokenizer),
        m.dtype,
    )
    examples = data.at(stage.source, 0, PROMPTS.value, c.seed)
    rows = respond(student, stage, c.seed)
    f: Figures = {"prompts": len(examples), "samples": SAMPLES.value, "stage": stage.name}
    f |= {"rewarded": stage.loss.reward > 0, "student": written(rows, examples, student, grader)}
    if not stage.taught:
        return f
    name = stage.c.teachers[0]  # of several the first: each is worth a look of its own
    teacher = plan.teachers[name]
    taught = policy.load(teacher.policy, teacher.c.param_dtype)
    teacher = dataclasses.replace(teacher, policy=taught)
    f["agreement"] = agreement(student, taught)
    f["distances"] = distances(student, teacher, rows, stage, stages.logits_mib(c, mesh))
    with policy.use(taught):
        answers = respond(taught, stage, c.seed, told=True)
    f["teacher"] = written(answers, examples, taught, grader)
    if "pass_rate" in f["teacher"]:
        f["gain"] = difference(f["teacher"]["pass_rates"], f["student"]["pass_rates"])
    return f


def main() -> None:
    c = CONFIG.value
    mesh, apart = mesh_lib.meshes(c)
    plan = prepare.prepare(c, mesh, apart)
    if c.student.random_init:
        raise UserError("config.student.random_init: random weights have no way of thinking yet")
    stages = {stage.name: stage for stage in plan.stages}
    name = STAGE.value or plan.stages[-1].name
    if name not in stages:
        raise UserError(f"--stage={name}: config.stages has {', '.join(stages)}")
    for of in stages[name].c.teachers[:1] if stages[name].taught else ():
        if plan.teachers[of].average:
            raise UserError(f"config.{of}.path=ema: before step 0 it is the student itself")
    out = cli.output(OUT.value) if OUT.value else None
    with policy.use(plan.student):
        figures = diagnose(c, plan, stages[name], mesh, stages[name].c.reward.grader)
    found = findings(figures)
    for bad, line in found:
        print(f"{'against' if bad else '-' if bad is None else 'for':8}{line}")
    print(verdict(found))
    if out:
        lines = [line for _, line in found]
        metrics.write_json(Path(out), {**figures, "findings": lines, "verdict": verdict(found)})


if __name__ == "__main__":
    cli.run(main, OPTIONS)
