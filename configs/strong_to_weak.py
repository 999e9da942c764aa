"""Strong-to-weak distillation as in the Qwen3 report: the teacher's answers, then its distribution.

    for mode in on off; do
        python -m distill.generate --model=Qwen/Qwen3-32B --prompts=hf:zwhe99/DeepMath-103K \
            --template="$BOXED" --thinking=$mode --max_new_tokens=16384 --out=$mode.jsonl
    done
    python -m distill.verify --data=on.jsonl --benchmark=math --out=traces_think.jsonl
    python -m distill.verify --data=off.jsonl --benchmark=math --out=traces_no_think.jsonl
    python -m distill.train --config=configs/strong_to_weak.py:student=8b,teacher=32b \
        --workdir=runs/strong_to_weak

($BOXED is base.BOXED_TEMPLATE.) First `sft` on traces of both modes; then `opd`, in which the
student answers in either mode and learns the teacher's distribution at every token, by the exact
reverse KL. Arguments: student=8b, 0.6b, 1.7b, 4b, 14b or 30b-a3b; teacher=32b or 235b-a22b; tiny.

Hardware: v5p-64 (32 chips). For 8b from 32b also v5p-32 with --config.mesh.tensor=4 (compiled: 79.7
of 95.7 GiB a chip, most of it the cache; by the roofline a step of `opd` takes 64 s at responses of
2,000 tokens in the mean, 105 s at 4,000), or v6e-64 with --config.mesh.tensor=8 (36 s and 50 s).
With the teacher of 235B parameters v5p-128 (64 chips).
Time and cost: not yet measured. The report has 1,800 GPU hours for the second stage at 8B.
Expected, at 8B in thinking mode (Qwen3 Technical Report, arXiv 2505.09388, table 21):

                       AIME'24   AIME'25   MATH500   GPQA-Diamond
    after sft          55.0      42.8      92.4      55.6
    after opd          74.4      65.5      97.0      63.3

The report's prompts are not public; with DeepMath's, these figures are not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny

NAMES = {"30b-a3b": "30B-A3B", "235b-a22b": "235B-A22B"}


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument(
        "strong_to_weak",
        arg,
        student=("8b", "0.6b", "1.7b", "4b", "14b", "30b-a3b"),
        teacher=("32b", "235b-a22b"),
    )
    c = base.get_config()
    c.stages = ("sft", "opd")
    c.student.path = f"Qwen/Qwen3-{NAMES.get(a.student, a.student.upper())}-Base"
    c.teacher.path = f"Qwen/Qwen3-{NAMES.get(a.teacher, a.teacher.upper())}"
    c.student.tokenizer = c.teacher.path
    if a.student == "30b-a3b":
        c.mesh.expert = 8
        c.student.router_aux_loss_coef = 0.001
    elif a.teacher == "235b-a22b":
        c.mesh.tensor = 4  # with fsdp alone, of v5p-128, its weights are added up whole

    c.sft.steps = 2000
    c.sft.batch_size = 128
    c.sft.accumulate = 2
    c.sft.pack_tokens = 20_480
    c.sft.max_prompt_tokens = 2048
    c.sft.max_response_tokens = 16_384
    c.sft.data.mixture = (("traces_think.jsonl", 1.0), ("traces_no_think.jsonl", 1.0))
    c.sft.optim.learning_rate = 5e-5

    c.opd.steps = 200
    c.opd.batch_size = 512
    c.opd.accumulate = 8
    c.opd.max_prompt_tokens = 2048
    c.opd.max_response_tokens = 16_384
    c.opd.data.source = "hf:zwhe99/DeepMath-103K"
    c.opd.data.on_bad_row = "skip"
    c.opd.data.template = base.BOXED_TEMPLATE
    c.opd.data.thinking = 0.5
    c.opd.optim.learning_rate = 1e-5
    return tiny.shrink_config(c) if a.tiny else c
