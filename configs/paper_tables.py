"""Tables of papers: their figures, how they were made, and the runs that make them here.

    python configs/reproduce.py

prints their names; `reproduce.py` has the rest.
"""

import dataclasses
from collections.abc import Mapping

THINKING, NON_THINKING = "qwen3-thinking", "qwen3-nonthinking"
HOURS = "hours"  # the figure that is the time of a run

STRONG = "--config=configs/strong_to_weak.py:student=8b,teacher=32b"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A column of a table: a figure of the evaluation on a benchmark, as it was published."""

    title: str
    benchmark: str  # "": it is not of an evaluation
    protocol: str = "greedy"
    samples: int = 1
    problems: int = 0  # of the whole benchmark; 0: of your own data
    k: int = 1  # above 1: pass@k
    flags: str = ""  # of `evaluate`, beside those of the protocol
    tiny_rows: str = ""  # stand for the data in the tiny commands; "": it is left out there

    @property
    def name(self) -> str:
        """The key of the figure in a row's published values."""
        return f"{self.benchmark}@{self.k}" if self.k > 1 else self.benchmark or HOURS


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: a model, how it is trained, and what was published of it."""

    title: str
    published: Mapping[str, float]  # name of a figure -> percent, or hours
    commands: tuple[str, ...] = ()  # that train; {dir} is the table's folder
    model: str = "{dir}/{row}"
    tiny_model: str = ""  # of a row that trains nothing


@dataclasses.dataclass(frozen=True)
class Table:
    """A published table."""

    about: str
    source: str
    figures: tuple[Figure, ...]
    rows: Mapping[str, Row]
    prepare: tuple[str, ...] = ()  # commands before all others; not in the tiny form


def _make_aime(year: str, protocol: str = THINKING, with_pass: bool = True) -> tuple[Figure, ...]:
    """Returns the mean of 64 samples on AIME, and pass@64."""
    flags = "--k=1,64" if with_pass else ""
    shared = Figure(
        f"AIME'{year}", f"aime{year}", protocol, 64, 30, 1, flags, "assets/rows/gsm8k.jsonl"
    )
    more = dataclasses.replace(shared, title=f"AIME'{year} pass@64", k=64)
    return (shared, more) if with_pass else (shared,)


_CHOICE, _MATH = "assets/rows/choice.jsonl", "assets/rows/gsm8k.jsonl"
_BOXED = (
    "--template=$'{question}\\n\\nPlease reason step by step, and put your final answer within "
    "\\\\boxed{}.'"
)
_TRACES = tuple(
    line
    for mode, name in (("on", "think"), ("off", "no_think"))
    for line in (
        f"python -m distill.generate --model=Qwen/Qwen3-32B --prompts=hf:zwhe99/DeepMath-103K "
        f"{_BOXED} --thinking={mode} --max_new_tokens=16384 --out={mode}.jsonl",
        f"python -m distill.verify --data={mode}.jsonl --benchmark=math --out=traces_{name}.jsonl",
    )
)
_START = "--config.student.path={dir}/off_policy/model --config.stages=\"('opd',)\""
QWEN3_21 = Table(
    "Qwen3's strong-to-weak distillation at 8B: off-policy, then RL or on-policy distillation",
    "Qwen3 Technical Report, arXiv 2505.09388, table 21; settings of its section 4.6. Its prompts "
    "and those of its RL are not public: here both train on DeepMath's.",
    (
        *_make_aime("24"),
        *_make_aime("25"),
        Figure("MATH500", "math500", THINKING, 1, 500, tiny_rows=_MATH),
        Figure("LiveCodeBench v5", "livecodebench", THINKING, 1, flags="--window=2024-10:2025-02"),
        Figure("MMLU-Redux", "mmlu_redux", THINKING, 1, tiny_rows=_CHOICE),
        Figure("GPQA-Diamond", "gpqa", THINKING, 10, 198, tiny_rows=_CHOICE),
        Figure("accelerator hours", ""),
    ),
    {
        "off_policy": Row(
            "off-policy distillation",
            {"aime24": 55.0, "aime24@64": 90.0, "aime25": 42.8, "aime25@64": 83.3}
            | {"math500": 92.4, "livecodebench": 42.0, "mmlu_redux": 86.4, "gpqa": 55.6},
            (
                f"python -m distill.train {STRONG} --workdir={{dir}}/off_policy "
                "--config.stages=\"('sft',)\"",
                "python -m distill.export --run={dir}/off_policy --out={dir}/off_policy/model",
            ),
        ),
        "rl": Row(
            "+ reinforcement learning",
            {"aime24": 67.6, "aime24@64": 90.0, "aime25": 55.5, "aime25@64": 83.3}
            | {"math500": 94.8, "livecodebench": 52.9, "mmlu_redux": 86.9, "gpqa": 61.3}
            | {HOURS: 17_920},
            (
                f"python -m distill.train {STRONG} --workdir={{dir}}/rl {_START} "
                "--config.opd.objective=grpo --config.opd.samples=8 "
                "--config.opd.reward.grader=math --config.opd.optim.learning_rate=1e-6",
            ),
        ),
        "on_policy": Row(
            "+ on-policy distillation",
            {"aime24": 74.4, "aime24@64": 93.3, "aime25": 65.5, "aime25@64": 86.7}
            | {"math500": 97.0, "livecodebench": 60.3, "mmlu_redux": 88.3, "gpqa": 63.3}
            | {HOURS: 1800},
            (f"python -m distill.train {STRONG} --workdir={{dir}}/on_policy {_START}",),
        ),
    },
    _TRACES,
)

_POST = (
    '"On-Policy Distillation", Thinking Machines Lab, October 2025, as quoted by other texts; we '
    "have not seen the page, and do not know how it samples: here by Qwen3's protocols."
)
POST_MATH = Table(
    "the on-policy-distillation post: mathematics, full training and LoRA",
    f"{_POST} Of LoRA it says 13 and 6 points below full training.",
    _make_aime("24", with_pass=False),
    {
        f"{stage}_{size}": Row(
            f"{title}, {'full training' if size == 'full' else 'LoRA of rank 32'}",
            {"aime24": value},
            (  # those of on-policy distillation begin with SFT too
                f"python -m distill.train --config=configs/opd_math.py:lora={size} "
                f'--workdir={{dir}}/{stage}_{size} --config.stages="{stages}"',
            ),
        )
        for size, values in (("full", (60.0, 70.0)), ("32", (47.0, 64.0)))
        for stage, title, stages, value in (
            ("sft", "SFT on 400,000 traces", "('sft',)", values[0]),
            ("opd", "SFT, then on-policy distillation", "('sft', 'opd')", values[1]),
        )
    },
)
_KNOWLEDGE = "python -m distill.train --config=configs/recall.py --workdir={dir}/"
_CHATS = "--prompts=hf:allenai/tulu-3-sft-mixture --thinking=off --out=chats.jsonl"
POST_RECALL = Table(
    "the post: new knowledge, and the behaviour that it costs, recovered",
    f"{_POST} Its documents and questions are a company's; yours are documents.jsonl and "
    "questions.jsonl, so that only the changes between rows compare.",
    (
        Figure(
            "questions on documents", "qa", NON_THINKING,
            flags="--data=questions.jsonl", tiny_rows="assets/rows/questions.jsonl",
        ),
        Figure("IFEval", "ifeval", NON_THINKING, 1, 541, tiny_rows="assets/rows/ifeval.jsonl"),
    ),
    {
        "before": Row(
            "Qwen3-8B", {"qa": 18.0, "ifeval": 85.0}, (), "Qwen/Qwen3-8B", "assets/student"
        ),
        "knowledge": Row(
            "trained on 70% documents", {"qa": 36.0, "ifeval": 79.0},
            (f"{_KNOWLEDGE}knowledge --config.stages=\"('knowledge',)\"",),
        ),
        "documents": Row(
            "trained on documents alone", {"qa": 43.0, "ifeval": 45.0},
            (
                f"{_KNOWLEDGE}documents --config.stages=\"('knowledge',)\" "
                "--config.knowledge.data.mixture=\"(('{documents}', 1.0),)\"",
            ),
        ),
        "recall": Row(
            "70% documents, then on-policy distillation", {"qa": 41.0, "ifeval": 83.0},
            (f"{_KNOWLEDGE}recall",),
        ),
    },
    (f"python -m distill.generate --model=Qwen/Qwen3-8B {_CHATS}",),
)  # fmt: skip
POST_PROMPT = Table(
    "the post: on-policy distillation on a single prompt",
    f"{_POST} It says that the student nearly reaches its teacher, and no number that we know.",
    _make_aime("24", with_pass=False),
    {
        "teacher": Row("teacher, Qwen3-8B", {}, (), "Qwen/Qwen3-8B", "assets/teacher"),
        "one_prompt": Row(
            "256 answers a step to one prompt, 20 steps", {},
            ("python -m distill.train --config=configs/one_prompt.py --workdir={dir}/one_prompt",),
        ),
    },
)  # fmt: skip

_GSM8K = {"baseline": 69.2, "sft_traces": 73.8, "re_distill": 78.5, "grpo_only": 75.7}
_GSM8K |= {"sft_then_grpo": 69.7}
CONDITIONS = Table(
    "five ways for 1.7B to learn GSM8K with one LoRA, and two of ours",
    "MaxiRuess/reasoning-distillation-grpo, results of its configs/config.yaml: greedy.",
    (Figure("GSM8K", "gsm8k", "greedy", 1, 1319, flags="--max_new_tokens=4096", tiny_rows=_MATH),),
    {
        "untrained": Row("untrained", {"gsm8k": 72.2}, (), "Qwen/Qwen3-1.7B", "assets/student"),
        **{
            name: Row(
                name,
                {"gsm8k": _GSM8K[name]} if name in _GSM8K else {},
                (f"python -m distill.train --config=configs/conditions.py:{name} "
                 f"--workdir={{dir}}/{name}",),
            )
            for name in (*_GSM8K, "opd", "sft_then_opd")
        },
    },
)  # fmt: skip

TABLES = {
    "qwen3_21": QWEN3_21,
    "post_math": POST_MATH,
    "post_recall": POST_RECALL,
    "post_prompt": POST_PROMPT,
    "conditions": CONDITIONS,
}
