"""Tiny runs on generated tasks, of which the studies are made; see docs/studies.md.

    python -m studies.run --study=a
    python -m distill.train --config=configs/miniature.py:opd --workdir=runs/x \
        --config.student.path=… --config.teacher.path=… --config.opd.data.source=rows.jsonl

Argument: the objective, sft, opd or grpo. A study sets paths, steps, rates and what it is about.
"""

from ml_collections import ConfigDict

from configs import arguments, base

OBJECTIVES = ("opd", "sft", "grpo")
PROMPT, RESPONSE = 56, 88  # tokens of the longest prompt and response of five operations


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe: float32, sizes for one CPU core."""
    a = arguments.parse_argument("miniature", arg, objective=OBJECTIVES)
    c = base.get_config()
    c.stages = (a.objective,)
    for model in (c.student, c.teacher):
        model.param_dtype = model.dtype = "float32"
    c.student.remat = False
    c.log.to, c.log.transcripts = (), 0
    c.checkpoint.every, c.checkpoint.every_minutes, c.checkpoint.keep = 10_000, 5.0, 1
    c.eval.limit, c.eval.best, c.eval.batch_size = 200, "", 200
    c.eval.protocol, c.eval.samples, c.eval.max_new_tokens = "sampled", 2, RESPONSE

    s = c[a.objective] if a.objective in c else base.make_stage(a.objective)
    c[a.objective] = s
    s.batch_size = 32
    s.max_prompt_tokens, s.max_response_tokens = PROMPT, RESPONSE
    s.optim.learning_rate, s.optim.final_fraction = 1e-3, 0.02
    if a.objective == "grpo":
        s.samples = 8
        s.optim.learning_rate = 1e-4
    if a.tiny:
        s.steps, s.batch_size, s.pack_tokens = 2, 8, 0
    return c
