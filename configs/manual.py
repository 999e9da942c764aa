"""Learn a document by heart: the teacher reads it, the student sees only the questions.

    python -m distill.train --config=configs/manual.py:sft --workdir=runs/manual_sft
    python -m distill.export --run=runs/manual_sft --out=runs/manual_sft/model --merge_lora
    python -m distill.train --config=configs/manual.py:opd --workdir=runs/manual
    grep -o '"rollout/[a-z_]*": [0-9.]*' runs/manual/metrics.jsonl

You provide manual.md, the document, and manual_questions.jsonl: `question` and, for the first
stage, `response` (think block and answer, from a large model that saw the document). In `sft`,
Qwen3-0.6B learns these with a LoRA of rank 32. In `opd`, it answers without the document, and
Qwen3-4B, which reads the document in its system turn, scores every token; LoRA of rank 16.

While the KL falls, a student of this size begins to loop. Three settings act against that: answers
are cut (opd.max_response_tokens), a closed think block followed by an answer is rewarded
(opd.reward.format), and repeated words are penalised (opd.reward.repetition). The metrics
rollout/mean_length, rollout/truncated and rollout/repetition show it first. Arguments: stage=sft or
opd; tiny.

Hardware: v5e-4 (4 chips). Time and cost: not yet measured; the source trained on one L4, the first
stage in 210 seconds.
Expected (kakopappa/qwen-sft-on-policy-distillation-experiment, README, a manual of 10,000 tokens
and about 200 questions): reverse KL on held-out questions 1.61 after `sft`, 0.35 after `opd`, with
endless think blocks where nothing acts against them. There, responses were cut at </think>, with a
penalty of 0.5 for those that did not reach it. Ours: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("manual", arg, stage=("sft", "opd"))
    c = base.get_config()
    c.stages = (a.stage,)
    c.student.path = "Qwen/Qwen3-0.6B" if a.stage == "sft" else "runs/manual_sft/model"
    c.student.lora.rank = 32 if a.stage == "sft" else 16

    c.sft.steps = 60
    c.sft.batch_size = 16
    c.sft.data.source = "manual_questions.jsonl"
    c.sft.optim.learning_rate = 1e-4

    if a.stage == "opd":
        c.teacher.path = "Qwen/Qwen3-4B"
    c.opd.objective = "hybrid"
    c.opd.steps = 200
    c.opd.batch_size = 32
    c.opd.samples = 4
    c.opd.accumulate = 2
    c.opd.max_response_tokens = 512
    c.opd.data.source = "manual_questions.jsonl"
    c.opd.context.text = "manual.md"
    c.opd.context.max_tokens = 16_384
    c.opd.reward.correct = 0.0
    c.opd.reward.format = 0.5
    c.opd.reward.repetition = 0.5
    c.opd.optim.learning_rate = 1e-4
    return tiny.shrink_config(c) if a.tiny else c
