"""Writes the files of a study without training, for its page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARMS = ("start", "opd", "grpo", "sft 100", "sft 400")
CONTRAST = {
    **{"name": "quality", "kind": "contrast", "figure": "greedy", "claimed": "OPD is better"},
    **{"weights": {"opd": 1, "grpo": -1}, "expected": "above", "unit": "points"},
}
REACH = {
    **{"name": "steps", "kind": "reach", "figure": "greedy", "axis": "step", "fast": "opd"},
    **{"slow": "grpo", "claimed_range": [7, 10], "claimed": "7 to 10 times fewer steps"},
}
SLOPE = {
    **{"name": "samples", "kind": "slope", "figure": "greedy", "reach_of": "opd", "cost": "flops"},
    **{"amounts": {"sft 100": 100, "sft 400": 400}, "claimed_range": [9, 30]},
}


def make_definition(**changes: Any) -> dict[str, Any]:
    """Returns a study of five arms, the first of them without training."""
    arms: list[dict[str, Any]] = [{"name": name, "about": f"about {name}"} for name in ARMS]
    arms[0]["seeds"] = [0]
    arms[1]["tuned"] = True
    definition = {
        "study": "z",
        "title": "A small study",
        "question": "Does it work?",
        "command": "python -m studies.run --study=z",
        "seeds": [0, 1, 2],
        "arms": arms,
        "figures": [
            {"key": "greedy", "title": "greedy accuracy", "format": "percent"},
            {"key": "kl", "title": "reverse KL", "format": "number"},
        ],
        "curves": [
            {"x": "step", "y": "greedy", "title": "Accuracy by step"},
            {"x": "flops", "y": "greedy", "title": "Accuracy by FLOPs", "log_x": True},
        ],
        "tuning": {"problems": "200 problems", "figure": "greedy", "budget": "2 trials"},
        "claims": [CONTRAST, REACH, SLOPE],
    }
    return definition | changes


def make_result(
    arm: str, seed: int, values: Sequence[float], *, flops: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """Returns the result of a run.

    Args:
      values: of `greedy` at the steps 0, 10, 20, …; the last is the final one.
      flops: of a step.
    """
    points = [
        {"step": 10 * i, "flops": 10.0 * i * flops, "greedy": y} for i, y in enumerate(values)
    ]
    return {
        **{"study": "z", "arm": arm, "phase": "final", "seed": seed, "trial": None},
        **{"changes": {}, "revision": "a" * 40, "dirty": False, "time": "2026-11-30T14:00:00"},
        **{"machine": {"processor": "a processor", "cores": 2}, "command": f"run {arm} {seed}"},
        **{"config": {"seed": seed, "opd": {"steps": 20}}, "seconds": 3600.0},
        **{"cpu_seconds": 1800.0, "points": points},
        "final": {"greedy": values[-1] if values else None, "kl": 0.5},
        **changes,
    }


def make_results() -> list[dict[str, Any]]:
    """Returns all results of the study above: two trials, and three seeds of each arm."""
    results = [make_result("start", 0, [0.25])]
    for seed, shift in enumerate((0.0, 0.01, 0.02)):
        results += [
            make_result("opd", seed, [0.25, 0.8 + shift, 0.85], changes={"rate": 0.1}),
            make_result("grpo", seed, [0.25, 0.3, 0.35 + shift], flops=3.0 + shift),
            make_result("sft 100", seed, [0.25, 0.45 + shift]),
            make_result("sft 400", seed, [0.25, 0.55, 0.65 + shift], flops=2.0),
        ]
    for trial, value in enumerate((0.6, 0.7)):
        change = {"phase": "tuning", "trial": trial, "changes": {"rate": trial / 10}}
        results.append(make_result("opd", 1000, [value], **change))
    return results


def write_study(
    folder: Path,
    definition: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Writes a study; returns its directory."""
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(definition or make_definition()))
    for x in make_results() if results is None else results:
        kind = f"seed{x['seed']}" if x["phase"] == "final" else f"trial{x['trial']}"
        name = f"{x['arm'].replace(' ', '_')}.{kind}.json"
        (folder / "runs" / name).write_text(json.dumps(x))
    return folder
