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
from distill.training.setup import StageSetup
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


def sample_responses(
    subject: Policy, stage: StageSetup, seed: int, as_teacher: bool = False
) -> list[rollout.Sequence]:
    """What a model writes to the first prompts of a stage, sampled as the stage samples; with
    `told` to those that a teacher reads."""
    examples = dataset.get_step_examples(stage.source, 0, PROMPTS.value, seed)
    if as_teacher:
        examples = [dataclasses.replace(e, prompt=e.teacher_prompt or e.prompt) for e in examples]
    limit = stage.c.max_response_tokens
    rows = rollout.expand_prompts(examples, SAMPLES.value, jax.random.key(seed), limit)
    options = dataclasses.replace(
        stages.make_rollout_options(stage.c),
        slots=min(64, len(rows)),
        max_length=max(row.max_length for row in rows),
        cache_tokens=0,
    )
    done = rollout.sample(
        rollout.SamplingModel(subject.model, subject.params, subject.stop_ids),
        rows,
        sampling=stages.make_sampling(stage.c),
        options=options,
    )
    return list(done)


def diagnose_stage(
    c: ConfigDict, run_setup: setup.RunSetup, stage: StageSetup, mesh: Mesh, grader: str
) -> diagnosis.Statistics:
    """All figures of a stage of a plan; reads weights."""
    m = c.student
    student = policy.load(
        policy.make_abstract(
            m.path, m.dtype, False, mesh, kernel=c.attention, tokenizer_path=m.tokenizer
        ),
        m.dtype,
    )
    examples = dataset.get_step_examples(stage.source, 0, PROMPTS.value, c.seed)
    rows = sample_responses(student, stage, c.seed)
    statistics: diagnosis.Statistics = {
        "prompts": len(examples),
        "samples": SAMPLES.value,
        "stage": stage.name,
    }
    statistics |= {
        "rewarded": stage.loss.reward > 0,
        "student": diagnosis.summarise_responses(rows, examples, student, grader),
    }
    if not stage.needs_teacher:
        return statistics
    name = stage.c.teachers[0]  # of several the first: each is worth a look of its own
    teacher = run_setup.teachers[name]
    loaded_teacher = policy.load(teacher.policy, teacher.c.param_dtype)
    teacher = dataclasses.replace(teacher, policy=loaded_teacher)
    statistics["agreement"] = diagnosis.compare_formats(student, loaded_teacher)
    statistics["distances"] = diagnosis.compare_distributions(
        student, teacher, rows, stage, stages.get_loss_chunk_mib(c, mesh)
    )
    with policy.use(loaded_teacher):
        answers = sample_responses(loaded_teacher, stage, c.seed, as_teacher=True)
    statistics["teacher"] = diagnosis.summarise_responses(answers, examples, loaded_teacher, grader)
    if "pass_rate" in statistics["teacher"]:
        statistics["gain"] = diagnosis.compare_pass_rates(
            statistics["teacher"]["pass_rates"], statistics["student"]["pass_rates"]
        )
    return statistics


def main() -> None:
    c = CONFIG.value
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    run_setup = setup.setup_run(c, mesh, teacher_mesh)
    if c.student.random_init:
        raise UserError("config.student.random_init: random weights have no way of thinking yet")
    stages = {stage.name: stage for stage in run_setup.stages}
    name = STAGE.value or run_setup.stages[-1].name
    if name not in stages:
        raise UserError(f"--stage={name}: config.stages has {', '.join(stages)}")
    for of in stages[name].c.teachers[:1] if stages[name].needs_teacher else ():
        if run_setup.teachers[of].is_ema:
            raise UserError(f"config.{of}.path=ema: before step 0 it is the student itself")
    out = cli.check_output(OUT.value) if OUT.value else None
    with policy.use(run_setup.student):
        statistics = diagnose_stage(c, run_setup, stages[name], mesh, stages[name].c.reward.grader)
    findings = diagnosis.make_findings(statistics)
    for bad, line in findings:
        print(f"{'against' if bad else '-' if bad is None else 'for':8}{line}")
    print(diagnosis.render_verdict(findings))
    if out:
        lines = [line for _, line in findings]
        run_files.write_json(
            Path(out),
            {**statistics, "findings": lines, "verdict": diagnosis.render_verdict(findings)},
        )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
