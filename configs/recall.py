"""A personal assistant: learn new documents, then recover the behaviour that this cost.

    python -m distill.generate --model=Qwen/Qwen3-8B --prompts=hf:allenai/tulu-3-sft-mixture \
        --thinking=off --out=chats.jsonl
    python -m distill.train --config=configs/recall.py --workdir=runs/recall
    python configs/reproduce.py post_recall

`knowledge` is mid-training: 70% your documents.jsonl, with a `text` in each row, and 30% the
model's own answers to chat prompts. In `recall` the student answers chat prompts, and its teacher
is the model that it was before. Both stages can be repeated for further documents. After each stage
the run evaluates knowledge, on your questions.jsonl (`question` and `answers`), and behaviour, on
IFEval, whose checkers `pip install -r requirements-eval.txt` installs. Without the questions or the
checkers, pass --config.eval.every=0. The last line prints commands that train and evaluate this
run, in runs/post_recall, beside mid-training alone and documents alone. Argument: tiny.

Hardware: v6e-16 (16 chips). Time and cost: not yet measured.
Expected, questions on the documents / IFEval ("On-Policy Distillation", Thinking Machines Lab,
October 2025, with the documents of a company, as quoted by other texts; we have not seen the page):
18 / 85 before, 36 / 79 after mid-training (43 / 45 on documents alone), 41 / 83 after recall. The
rates, steps and sizes here are ours; their results are not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("recall", arg)
    c = base.get_config()
    c.stages = ("knowledge", "recall")
    c.student.path, c.teacher.path = "Qwen/Qwen3-8B", "initial"
    c.mesh.tensor = 4  # or 256 rows decode beside the whole weights: too much for a chip

    c.knowledge = base.make_stage("sft")
    c.knowledge.steps = 500
    c.knowledge.pack_tokens = 8192
    c.knowledge.max_prompt_tokens, c.knowledge.max_response_tokens = 2048, 6144
    c.knowledge.data.mixture = (("documents.jsonl", 0.7), ("chats.jsonl", 0.3))
    c.knowledge.optim.learning_rate = 1e-5

    c.recall = base.make_stage("opd")
    c.recall.batch_size = 256
    c.recall.accumulate = 4
    c.recall.max_prompt_tokens, c.recall.max_response_tokens = 2048, 2048
    c.recall.data.source = "hf:allenai/tulu-3-sft-mixture"
    c.recall.data.thinking = 0.0
    c.recall.data.on_bad_row = "skip"

    c.eval.every = 10_000  # after each stage, and never within one
    c.eval.benchmark, c.eval.data = "qa", "questions.jsonl"
    c.eval.more = (("ifeval", "hf:"),)
    c.eval.protocol, c.eval.limit, c.eval.max_new_tokens = "qwen3-nonthinking", 0, 2048
    c.eval.best = ""
    return tiny.shrink_config(c) if a.tiny else c
