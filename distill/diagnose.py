"""python -m distill.diagnose --config=configs/X.py [--prompts=N] [--out=FILE.json]

Before a run is paid for, on N prompts of the config's own data: does the student think in the
teacher's way, is the teacher better at all, do the two read and end a text alike, do responses fit,
is there anything to compare in a group. Each finding is a line with its figure and what follows
from it; the last line is the verdict. Nothing is trained. With --out all figures, as JSON.
"""

import dataclasses
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from distill import rollout
from distill.data import dataset
from distill.planning import diagnosis
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import cli, run_files
from distill.runtime import mesh as mesh_lib
from distill.training import setup, stages
from distill.training.setup import Stage
from models.errors import UserError

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts to ask.", lower_bound=2, flag_values=OPTIONS)
SAMPLES = flags.DEFINE_integer(
    "samples", 4, "Responses to each.", lower_bound=2, flag_values=OPTIONS
)
STAGE = flags.DEFINE_string("stage", "", "Of the config; else the last.", flag_values=OPTIONS)
OUT = flags.DEFINE_string("out", "", "JSON to write.", flag_values=OPTIONS)


def respond(who: Policy, stage: Stage, seed: int, told: bool = False) -> list[rollout.Sequence]:
    """What a model writes to the first prompts of a stage, sampled as the stage samples; with
    `told` to those that a teacher reads."""
    examples = dataset.at(stage.source, 0, PROMPTS.value, seed)
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


def diagnose(
    c: ConfigDict, plan: setup.Plan, stage: Stage, mesh: Mesh, grader: str
) -> diagnosis.Figures:
    """All figures of a stage of a plan; reads weights."""
    m = c.student
    student = policy.load(
        policy.describe(m.path, m.dtype, False, mesh, kernel=c.attention, tokenizer_of=m.tokenizer),
        m.dtype,
    )
    examples = dataset.at(stage.source, 0, PROMPTS.value, c.seed)
    rows = respond(student, stage, c.seed)
    f: diagnosis.Figures = {"prompts": len(examples), "samples": SAMPLES.value, "stage": stage.name}
    f |= {
        "rewarded": stage.loss.reward > 0,
        "student": diagnosis.written(rows, examples, student, grader),
    }
    if not stage.taught:
        return f
    name = stage.c.teachers[0]  # of several the first: each is worth a look of its own
    teacher = plan.teachers[name]
    taught = policy.load(teacher.policy, teacher.c.param_dtype)
    teacher = dataclasses.replace(teacher, policy=taught)
    f["agreement"] = diagnosis.agreement(student, taught)
    f["distances"] = diagnosis.distances(student, teacher, rows, stage, stages.logits_mib(c, mesh))
    with policy.use(taught):
        answers = respond(taught, stage, c.seed, told=True)
    f["teacher"] = diagnosis.written(answers, examples, taught, grader)
    if "pass_rate" in f["teacher"]:
        f["gain"] = diagnosis.difference(f["teacher"]["pass_rates"], f["student"]["pass_rates"])
    return f


def main() -> None:
    c = CONFIG.value
    mesh, apart = mesh_lib.meshes(c)
    plan = setup.prepare(c, mesh, apart)
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
    found = diagnosis.findings(figures)
    for bad, line in found:
        print(f"{'against' if bad else '-' if bad is None else 'for':8}{line}")
    print(diagnosis.verdict(found))
    if out:
        lines = [line for _, line in found]
        run_files.write_json(
            Path(out), {**figures, "findings": lines, "verdict": diagnosis.verdict(found)}
        )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
