"""Seven ways to teach reasoning to a model of 1.7B, with one LoRA and one test, GSM8K.

    python -m distill.train --config=configs/conditions.py:opd --workdir=runs/opd
    python -m distill.evaluate --model=runs/opd --benchmark=gsm8k --data=hf: --out=runs/opd/eval

    baseline        SFT on 50,000 answers of Orca-Math, without reasoning
    sft_traces      SFT on the 1,000 traces of s1K-1.1
    re_distill      SFT on 1,000 verified traces of OpenR1-Math
    grpo_only       GRPO on GSM8K; reward: half for the answer, half for the format
    sft_then_grpo   sft_traces, then GRPO with a reward for the answer only
    opd             on-policy distillation from Qwen3-8B on GSM8K's questions
    sft_then_opd    sft_traces, then opd

Arguments: one of these names; tiny. The LoRA (rank 64, alpha 64, rsLoRA, bfloat16), steps and rates
are those of MaxiRuess/reasoning-distillation-grpo (configs/config.yaml), which has the first five
conditions. Differences: no dropout; GRPO samples at temperature 1, not 0.7; traces are not packed.
`opd` and `sft_then_opd` are ours. That config names Qwen/Qwen3-1.7B, as we do; for the base model:
    --config.student.path=Qwen/Qwen3-1.7B-Base --config.student.tokenizer=Qwen/Qwen3-1.7B

Hardware: v6e-8 (8 chips). Time and cost: not yet measured; the source reports about 2 dollars on an
L40S for an SFT run and 40 dollars on an H100 for a GRPO run.
Expected, GSM8K test, greedy, 1,319 problems (that repository's results): untrained 72.2, baseline
69.2, sft_then_grpo 69.7, sft_traces 73.8, grpo_only 75.7, re_distill 78.5; its README has others,
on about 100 problems each. opd, sft_then_opd: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny

# Name -> the kind of each stage, in order.
CONDITIONS = {
    "baseline": ("answers",),
    "sft_traces": ("traces",),
    "re_distill": ("verified",),
    "grpo_only": ("grpo",),
    "sft_then_grpo": ("traces", "grpo"),
    "opd": ("opd",),
    "sft_then_opd": ("traces", "opd"),
}


def make_sft_stage(source: str, num_rows: int, steps: int, max_response_tokens: int) -> ConfigDict:
    """Returns an SFT stage on `num_rows` rows, 16 a step."""
    s = base.make_stage("sft")
    s.steps = steps
    s.batch_size = 16
    s.max_prompt_tokens, s.max_response_tokens = 1024, max_response_tokens
    s.data.source, s.data.max_rows = source, num_rows
    s.data.on_bad_row = "skip"
    s.optim.learning_rate = 2e-4
    return s


def make_on_policy_stage(objective: str, steps: int, learning_rate: float) -> ConfigDict:
    """Returns a stage with eight answers to each of GSM8K's questions."""
    s = base.make_stage(objective)
    s.steps = steps
    s.samples = 8
    s.max_response_tokens = 4096
    s.data.source = "hf:openai/gsm8k:main"
    s.data.template = base.BOXED_TEMPLATE
    s.optim.learning_rate = learning_rate
    return s


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("conditions", arg, condition=tuple(CONDITIONS))
    c = base.get_config()
    c.stages = CONDITIONS[a.condition]
    c.student.path = "Qwen/Qwen3-1.7B"
    c.student.lora.rank, c.student.lora.alpha, c.student.lora.rslora = 64, 64.0, True

    orca, openr1 = "hf:microsoft/orca-math-word-problems-200k", "hf:open-r1/OpenR1-Math-220k"
    c.answers = make_sft_stage(orca, 50_000, 630, 3072)  # packed: 238 rows of 275 tokens a step
    c.answers.data.columns = "orca_math"
    c.answers.data.thinking = 0.0
    c.answers.pack_tokens = 4096
    c.traces = make_sft_stage("hf:simplescaling/s1K-1.1", 1000, 188, 15_360)
    c.verified = make_sft_stage(openr1, 1000, 188, 15_360)

    c.grpo = make_on_policy_stage("grpo", 500, 1e-6)
    c.grpo.batch_size = 8
    c.grpo.reward.grader = "gsm8k"
    if a.condition == "grpo_only":
        c.grpo.reward.correct = c.grpo.reward.format = 0.5
    c.opd = make_on_policy_stage("opd", 150, 1e-4)
    if "opd" in c.stages:
        c.teacher.path = "Qwen/Qwen3-8B"
    return tiny.shrink_config(c) if a.tiny else c
