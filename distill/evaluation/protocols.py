"""Named protocols: the sampling settings of an evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.evaluation import tasks
from models.errors import UserError, suggest

if TYPE_CHECKING:  # it imports jax, and `evaluate --help` does without
    from distill import rollout

Settings = dict[str, Any]  # `thinking`, and fields of SampleSpec and Sampling

# The Qwen3 report (arXiv 2505.09388), section 4.6. Two are ours: "greedy", for quick checks, and
# "sampled", the model's own distribution, which on-policy training changes.
PROTOCOLS: dict[str, Settings] = {
    "greedy": {
        "thinking": True,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "max_new_tokens": 1024,
        "samples": 1,
    },
    "sampled": {
        "thinking": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "max_new_tokens": 1024,
        "samples": 1,
    },
    "qwen3-thinking": {
        "thinking": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "presence_penalty": 0.0,
        "max_new_tokens": 32_768,
        "samples": 1,
    },
    "qwen3-nonthinking": {
        "thinking": False,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "presence_penalty": 1.5,
        "max_new_tokens": 32_768,
        "samples": 1,
    },
}


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """Settings for evaluating a model on a benchmark."""

    benchmark: str
    sample: "rollout.SampleSpec"
    thinking: bool = True
    protocol: str = ""  # its name, as recorded
    template: str = ""  # template of the prompt; "": the benchmark's own
    ks: tuple[int, ...] = (1,)  # k of pass@k and maj@k
    choice_by: str = "response"  # how an option is chosen; others: see likelihood.CHOICE_BY


def resolve_settings(protocol: str, benchmark: str, changes: Settings) -> Settings:
    """Returns a protocol's settings on a benchmark, overridden by `changes` that are not None.

    Raises UserError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        known, hint = ", ".join(PROTOCOLS), suggest(protocol, PROTOCOLS)
        raise UserError(f"--protocol={protocol}: known are {known}{hint}")
    resolved = dict(PROTOCOLS[protocol])
    if protocol.startswith("qwen3"):
        resolved |= tasks.BENCHMARKS[benchmark].qwen3
    return resolved | {name: value for name, value in changes.items() if value is not None}


def make_eval_spec(protocol: str, benchmark: str, settings: Settings, **fields: Any) -> EvalSpec:
    """Builds a spec from resolved settings and further fields of EvalSpec.

    Raises UserError naming a setting that is out of range.
    """
    from distill import rollout

    sample = rollout.make_sample_spec(settings)
    return EvalSpec(benchmark, sample, settings["thinking"], protocol, **fields)


def list_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Says which settings of sampling differ between the summaries of two evaluations."""
    ours, theirs = (dict(summary.get("protocol") or {}) for summary in (a, b))
    return [
        f"{name} {ours[name]} and {theirs[name]}"
        for name in ("template", *PROTOCOLS["greedy"])
        if name in ours and name in theirs and ours[name] != theirs[name]
    ]
