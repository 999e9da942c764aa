"""Rows and models that several studies use.

The student knows how to solve the problems of studies/graphs.py, and slips: it was trained on few
solutions, in many epochs. The teacher was trained on fresh solutions, none seen twice.
"""

from collections.abc import Mapping
from typing import Any

from studies.jobs import Job
from studies.study import Arm, Study, Training

ROWS = "rows/graphs"
TEACHER, STUDENT = "models/teacher", "models/student"
TRAIN, VALID, TEST, CURVE, LONGER = (  # a curve's problems are the first of the test
    f"{{{ROWS}}}/{name}.jsonl" for name in ("train", "valid", "test", "many", "longer")
)
PASS_ROWS = "rows/pass"  # problems that the student mostly fails, for many samples of each
NUM_PROMPTS = 100_000
NUM_TRACES = 16_000
TRACES = "rows/traces"
TOKENS, LONGER_TOKENS = 88, 132  # of the longest solution of five operations, of eight


def make_size(size: str, name: str = "", tasks: str = "") -> Job:
    """Returns the job of a model's config and tokenizer, by default one for the problems."""
    command = ("-m", "studies.models", f"--size={size}", "--out={out}")
    return Job(f"sizes/{name or size}", ((*command, f"--tasks={tasks}") if tasks else command,))


def make_pretraining(name: str, size: str, seed: int, changes: dict[str, Any]) -> Job:
    """Returns the job of a model that is trained on solutions from random weights."""
    flags = {
        "student.path": f"{{sizes/{size}}}",
        "student.random_init": "true",
        "seed": seed,
        "sft.data.source": TRAIN,
        "sft.optim.name": "muon",
        "sft.optim.learning_rate": 1e-2,
        "sft.optim.warmup_steps": 50,
        **changes,
    }
    train = (
        *("-m", "distill.train", "--config=configs/miniature.py:sft", "--workdir={out}"),
        *(f"--config.{key}={value}" for key, value in flags.items()),
    )
    export = ("-m", "distill.export", "--run={out}", "--out={out}/model")
    return Job(name, (train, export))


def make_rows(name: str, count: int, seed: int, operations: str) -> tuple[str, ...]:
    """Returns the command that writes a file of problems."""
    split = name if name in ("train", "valid") else "test"
    return (
        *("-m", "studies.tasks", "--task=graphs", f"--split={split}", f"--count={count}"),
        *(f"--seed={seed}", f"--operations={operations}", f"--out={{out}}/{name}.jsonl"),
    )


def make_samples(name: str, model: str, count: int, file: str) -> Job:
    """Returns the job of a model's responses to the first `count` prompts, at temperature 1."""
    command = (
        *("-m", "distill.generate", f"--model={{{model}}}/model", f"--prompts={TRAIN}"),
        *(f"--out={{out}}/{file}.jsonl", f"--limit={count}", "--temperature=1"),
        *(f"--max_new_tokens={TOKENS}", "--batch_size=256", "--seed=7"),
    )
    return Job(name, (command,))


JOBS = (
    Job(
        ROWS,
        (
            make_rows("train", NUM_PROMPTS, 0, "2,5"),
            make_rows("valid", 300, 0, "3,5"),
            make_rows("test", 500, 0, "3,5"),
            make_rows("many", 200, 0, "3,5"),
            make_rows("longer", 300, 1, "6,8"),
        ),
    ),
    Job(PASS_ROWS, (make_rows("pass", 120, 2, "6,6"),)),
    make_size("small"),
    make_size("medium"),
    make_pretraining(TEACHER, "medium", 0, {"sft.steps": 1000}),
    make_pretraining(STUDENT, "small", 1, {"sft.steps": 300, "sft.data.max_rows": 1000}),
    make_samples(TRACES, TEACHER, NUM_TRACES, "traces"),
)


def make_arm(name: str, about: str, objective: str, changes: dict[str, Any], **fields: Any) -> Arm:
    """Returns an arm with one training, from the student."""
    return Arm(name, about, (make_training(objective, changes, STUDENT),), **fields)


def make_training(objective: str, changes: dict[str, Any], base: str = "") -> Training:
    """Returns a training on the problems, with `changes` to the stage by key, and to the config by
    a key that begins with a dot."""
    source = f"{{{TRACES}}}/traces.jsonl" if objective == "sft" else TRAIN
    own: dict[str, Any] = {"data.source": source} | changes
    keys = {
        key.removeprefix(".") if key.startswith(".") else f"{objective}.{key}": value
        for key, value in own.items()
    }
    teacher = {"teacher.path": f"{{{TEACHER}}}/model"} if objective == "opd" else {}
    curve = {"eval.data": CURVE, "eval.every": changes["steps"] // 10}
    return Training(objective, {**teacher, **curve, **keys}, base)


GREEDY = f"greedy:arithmetic:{TEST}:0:{TOKENS}"
SAMPLED = f"sampled:arithmetic:{TEST}:2:{TOKENS}:judged"
PASS, FEWER_PASS = (
    f"many:arithmetic:{{{PASS_ROWS}}}/pass.jsonl:{k}:{LONGER_TOKENS}" for k in (64, 16)
)
CURVE_POINT = f"curve:arithmetic:{CURVE}:2:{TOKENS}"
TUNE = f"sampled:arithmetic:{VALID}:4:{TOKENS}"  # 1,200 responses to 300 validation problems
TUNE_BY = "sampled"

START = Arm("start", "the student before training", model=STUDENT, measures=(CURVE_POINT,))
JUDGE = Arm("teacher", "the teacher", model=TEACHER)

ACCURACY = (
    {"key": "greedy", "title": "greedy", "format": "percent"},
    {"key": "sampled", "title": "sampled, T = 1", "format": "percent"},
    {"key": "sampled/contents@1", "title": "all three boxes, T = 1", "format": "percent"},
    {"key": "sampled/reverse_kl", "title": "reverse KL", "format": "number"},
)


def make_curves(*axes: str) -> tuple[dict[str, Any], ...]:
    """Returns curves of accuracy at temperature 1 over costs."""
    titles = {
        "step": "steps",
        "trained_tokens": "trained tokens",
        "sampled_tokens": "sampled tokens",
        "flops": "FLOPs of student, teacher and sampling",
        "seconds": "seconds",
    }
    return tuple(
        {
            "x": x,
            "y": "sampled",
            "title": f"Accuracy, T = 1, by {titles[x]}",
            "log_x": x != "step",
        }
        for x in axes
    )


def make_contrast(
    name: str,
    claimed: str,
    source: str,
    weights: Mapping[str, float],
    expected: str = "above",
    figure: str = "sampled",
    margin: float = 0.01,
) -> dict[str, Any]:
    """Returns a claim about a weighted sum of arms' figures: above or below 0, or "none"."""
    return {
        "name": name,
        "claimed": claimed,
        "source": source,
        "kind": "contrast",
        "figure": figure,
        "weights": dict(weights),
        "expected": expected,
        "margin": margin,
        "unit": "points",
    }


def make_reach(
    name: str, claimed: str, source: str, fast: str, slow: str, axis: str, factors: tuple[int, int]
) -> dict[str, Any]:
    """Returns a claim that an arm reaches another one's best accuracy at temperature 1 in so many
    times less of an axis: between the two `factors`."""
    return {
        "name": name,
        "claimed": claimed,
        "source": source,
        "kind": "reach",
        "figure": "sampled",
        "axis": axis,
        "fast": fast,
        "slow": slow,
        "claimed_range": list(factors),
    }


def make_slope(
    name: str,
    claimed: str,
    source: str,
    amounts: Mapping[str, int],
    reach_of: str,
    factors: tuple[int, int],
) -> dict[str, Any]:
    """Returns a claim that an arm costs so many times fewer FLOPs than as much data as would give
    its accuracy, by a line through the accuracies of arms by their `amounts`."""
    return {
        "name": name,
        "claimed": claimed,
        "source": source,
        "kind": "slope",
        "figure": "sampled",
        "amounts": dict(amounts),
        "reach_of": reach_of,
        "cost": "flops",
        "claimed_range": list(factors),
    }


def make_study(**fields: Any) -> Study:
    """Returns a study of the student and the teacher on the problems; `fields` are those of Study,
    of which many have a default here."""
    defaults: dict[str, Any] = {
        "jobs": JOBS,
        "measures": (GREEDY, SAMPLED),
        "figures": ACCURACY,
        "judge": TEACHER,
        "start": "start",
        "tune_by": TUNE_BY,
        "tune_measures": (TUNE,),
    }
    return Study(**{**defaults, **fields})
