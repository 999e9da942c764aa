"""python -m benchmarks.objectives --out=runs/objectives: every objective, 50 steps from one start.

The embedded student learns from the embedded teacher, from the rewards of a grader, or from both,
in each of EXPERIMENTS: every objective, its estimators and some hybrids. Each is a run of `train`
from the same weights with the same number of rows per step, evaluated on held-out problems. The
losses of BAD_LOSSES are known not to work and are not in the library, so they are defined here.
OUT/NAME holds a run, OUT/table.md the table. A stopped command resumes where it stopped.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import quickstart
from distill.batch import Batch
from distill.evaluation import evaluator, problems
from distill.objectives import losses
from distill.policy import forward, policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import cli, run_files
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import collect, loop, setup
from distill.training.microbatches import Minibatches
from models import transformer
from models.errors import UserError
from models.transformer import Params

OPTIONS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "runs/objectives", "Directory of the runs.", flag_values=OPTIONS)
ONLY = flags.DEFINE_list("only", [], "Names of experiments; default: all.", flag_values=OPTIONS)
STEPS = flags.DEFINE_integer("steps", 50, "Steps of each run.", lower_bound=1, flag_values=OPTIONS)
BATCH = flags.DEFINE_integer("batch", 64, "Rows per step.", lower_bound=1, flag_values=OPTIONS)
PROBLEMS = flags.DEFINE_integer(
    "problems",
    500,
    "Held-out problems of the evaluation; 0: only time the steps.",
    lower_bound=0,
    flag_values=OPTIONS,
)

# Learning rates by family: policy gradients are much noisier than distributions, and Adam's steps
# are as large for noise.
RATES = {"traces": 3e-4, "distribution": 3e-4, "sampled": 1e-4, "hybrid": 1e-4, "reward": 2e-5}
SAMPLES = 8  # responses per prompt, for objectives that compare them
TOP_K = 4  # tokens of the `topk` estimator

# name -> (family, changes to on-policy distillation by dotted key of the stage)
EXPERIMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("traces", {"objective": "sft"}),
    "distill": ("traces", {"objective": "distill"}),
    "distill + sft": ("traces", {"objective": "distill", "loss.sft": 0.5}),
    "gkd: beta 0.5": ("distribution", {"objective": "gkd"}),
    "opd": ("distribution", {}),
    "opd: forward": ("distribution", {"loss.divergence": "forward"}),
    "opd: jsd 0.5": ("distribution", {"loss.divergence": "jsd"}),
    "opd: skewed 0.1": ("distribution", {"loss.skew": 0.1}),
    "opd: temperature 2": ("distribution", {"loss.temperature": 2.0}),
    "opd: discount 0.9": ("sampled", {"loss.discount": 0.9}),
    f"opd: teacher's top {TOP_K}": ("distribution", {"loss.estimator": "topk", "loss.k": TOP_K}),
    f"opd: student's top {TOP_K}": (
        "distribution",
        {"loss.estimator": "topk", "loss.k": TOP_K, "loss.topk_from": "student"},
    ),
    f"opd: union of top {TOP_K}": (
        "distribution",
        {"loss.estimator": "topk", "loss.k": TOP_K, "loss.topk_from": "union"},
    ),
    "opd_sampled": ("sampled", {"objective": "opd_sampled"}),
    "opd_sampled: baseline": ("sampled", {"objective": "opd_sampled", "loss.baseline": True}),
    "opd: k2": ("sampled", {"loss.estimator": "k2"}),
    "opd: k3 (forward)": ("sampled", {"loss.estimator": "k3", "loss.divergence": "forward"}),
    **{
        name: ("reward", {"objective": name, "samples": SAMPLES})
        for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
    },
    "grpo: 2 x 2 updates": (
        "reward",
        {"objective": "grpo", "samples": SAMPLES, "epochs": 2, "minibatches": 2},
    ),
    "grpo: judge alone": (
        "reward",
        {
            "objective": "grpo",
            "samples": SAMPLES,
            "reward.correct": 0.0,
            "reward.teacher_logprob": 1.0,
        },
    ),
    "hybrid": ("hybrid", {"objective": "hybrid", "samples": SAMPLES}),
    "hybrid: sampled": (
        "hybrid",
        {"objective": "hybrid", "samples": SAMPLES, "loss.estimator": "sampled"},
    ),
    "hybrid: reference 0.1": (
        "hybrid",
        {"objective": "hybrid", "samples": SAMPLES, "loss.reference": 0.1},
    ),
}


def compute_k1_loss(logp_BTV: jax.Array, logq_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns log p - log q of the drawn token, to be differentiated directly.

    Its expected gradient is E[∇ log p] = 0, so nothing is learned.
    """
    return _gather_tokens(logp_BTV, tokens_BT) - _gather_tokens(logq_BTV, tokens_BT)


def compute_top_loss(logp_BTV: jax.Array, logq_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns Σ p (log p - log q) over the teacher's top K only.

    Its minimum lies at p = q / e within them: below zero, with the other 1 - 1/e = 63% of the mass
    outside.
    """
    logq_BTK, ids_BTK = jax.lax.top_k(logq_BTV, TOP_K)
    logp_BTK = jnp.take_along_axis(logp_BTV, ids_BTK, axis=-1)
    return jnp.sum(jnp.exp(logp_BTK) * (logp_BTK - logq_BTK), axis=-1)


def _gather_tokens(logp_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_BTV, tokens_BT[..., None], axis=-1)[..., 0]


BAD_LOSSES = {
    "bad: k1 in the loss": ("sampled", compute_k1_loss),
    f"bad: top {TOP_K} without tail": ("distribution", compute_top_loss),
}


def make_config(family: str, changes: dict[str, Any]) -> ConfigDict:
    """Returns the config of an experiment."""
    c = quickstart.get_config()
    c.checkpoint.every, c.log.transcripts, c.student.remat = STEPS.value, 0, False
    c.log.overlap_top_k = (
        TOP_K if family == "distribution" else 0
    )  # it takes a quarter of a step's time
    s = c.opd
    s.steps, s.batch_size = STEPS.value, BATCH.value
    s.optim.learning_rate, s.optim.warmup_steps = RATES[family], max(1, STEPS.value // 10)
    s.optim.final_fraction = 0.1
    s.update_from_flattened_dict(changes)
    return c


def compute_bad_loss(token_loss: Any, run_setup: setup.RunSetup, params: Params, batch: Batch):
    """Returns one of BAD_LOSSES, averaged over trained tokens, and the student's mass outside the
    teacher's top K. Computes all logits at once, as the vocabulary is small."""
    hidden_BTD = forward.compute_hidden(run_setup.student.model, params, batch)
    assert batch.teacher is not None
    logp_BTV, logq_BTV = (
        jax.nn.log_softmax(hidden_BTX @ head_VX.T, axis=-1)
        for hidden_BTX, head_VX in (
            (hidden_BTD, transformer.get_output_head(params)),
            (batch.teacher.hidden_BTE[0], batch.teacher.heads_VE[0]),
        )
    )
    mask_BT = losses.shift(batch.mask_BT).astype(jnp.float32)
    ids_BTK = jax.lax.top_k(logq_BTV, TOP_K)[1]
    inside_BT = jnp.exp(jnp.take_along_axis(logp_BTV, ids_BTK, axis=-1)).sum(axis=-1)

    def masked_mean(x_BT: jax.Array) -> jax.Array:
        return jnp.sum(x_BT * mask_BT) / jnp.sum(mask_BT)

    loss_BT = token_loss(logp_BTV, logq_BTV, losses.shift(batch.tokens_BT))
    return masked_mean(loss_BT), 1 - masked_mean(inside_BT)


def _merge_work(work: Minibatches, mesh: Mesh) -> Batch:
    """Concatenates the micro-batches of a step to one batch."""
    micro_batches = [micro.make_batch() for part in work for micro in part]
    whole = jax.tree.map(lambda *x: np.concatenate(x), *micro_batches)
    return jax.device_put(whole, mesh_lib.make_row_sharding(mesh))


def train_bad_loss(name: str, out: Path, mesh: Mesh) -> Policy:
    """Trains with one of BAD_LOSSES on the rows of the other experiments; returns the student."""
    family, loss = BAD_LOSSES[name]
    c = make_config(family, {})
    run_setup = setup.setup_run(c, mesh)
    (stage,) = run_setup.stages
    run_setup, student = (
        setup.load_stage_models(c, run_setup, stage),
        policy.load(run_setup.student, "float32"),
    )
    teachers, params = local.place_heads([run_setup.teachers["teacher"]]), student.params
    state = stage.optimizer.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, batch: Batch):
        def compute_loss(params: Params):
            return compute_bad_loss(loss, run_setup, params, batch)

        (value, mass), grads = jax.value_and_grad(compute_loss, has_aux=True)(params)
        updates, state = stage.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, mass

    rows = []
    with graders.Grader() as grader:
        collector = collect.make_collector(c, run_setup, stage, mesh, grader)
        for number in range(stage.end_step):
            start = time.perf_counter()
            work, rollout_metrics = loop.collect_step(collector, params, number)
            batch = local.score(teachers, _merge_work(work, mesh))
            params, state, value, mass = step(params, state, batch)
            metrics = {"train/loss": float(value), "train/outside_top": float(mass)}
            metrics["time/step"] = time.perf_counter() - start
            rows.append({"step": number, **rollout_metrics, **metrics})
    run_files.write_jsonl(out / "metrics.jsonl", rows)
    return dataclasses.replace(student, path=name, params=params)


def evaluate_policy(subject: Policy, teacher: Policy, out: Path) -> dict[str, Any]:
    """Returns held-out accuracy, greedy and sampled at temperature 1, and the samples' reverse KL,
    mean length and share cut."""
    rows = problems.load_problems("arithmetic", "", PROBLEMS.value)
    greedy, sampled = evaluator.evaluate_greedy_and_sampled(
        subject,
        teacher,
        rows,
        epath.Path(out) / "eval",
        make_config("sampled", {}).opd.max_response_tokens,
    )
    figures = ("accuracy", "interval", "reverse_kl", "mean_length", "truncation_rate")
    return {**{name: sampled[name] for name in figures}, "greedy": greedy["accuracy"]}


def run_experiment(name: str, out: Path, mesh: Mesh, teacher: Policy) -> dict[str, Any]:
    """Trains and evaluates an experiment, or reads its earlier result."""
    if (out / "result.json").is_file():
        return json.loads((out / "result.json").read_text())
    run_files.log_line(name)
    if name in BAD_LOSSES:
        subject = train_bad_loss(name, out, mesh)
    elif name in EXPERIMENTS:
        family, changes = EXPERIMENTS[name]
        loop.run(make_config(family, changes), out)
        subject = policy.load(policy.make_abstract(str(out), "float32", False, mesh), "float32")
    else:
        path = getattr(make_config("sampled", {}), name).path
        subject = policy.load(policy.make_abstract(path, "float32", False, mesh), "float32")
    result = evaluate_policy(subject, teacher, out) if PROBLEMS.value else {}
    if (out / "metrics.jsonl").is_file():
        rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
        tail = rows[-5:]
        for figure in ("train/outside_top", "train/loss"):
            values = [row[figure] for row in tail if row.get(figure) is not None]
            result[figure.removeprefix("train/")] = statistics.mean(values) if values else None
        result["seconds"] = statistics.median(row["time/step"] for row in rows)
    run_files.write_json(out / "result.json", result)
    return result


def render_table(results: dict[str, dict[str, Any]]) -> str:
    """Renders the results as Markdown; seconds are medians over steps."""
    lines = [
        "| objective | rate | greedy | sampled, T = 1 | reverse KL | length | cut | outside "
        f"top {TOP_K} | s a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        family = {**EXPERIMENTS, **BAD_LOSSES}.get(name, ("",))[0]
        cells = [name, f"{RATES[family]:g}" if family else "", *[""] * 7]
        if "accuracy" in r:
            low, high = (100 * x for x in r["interval"])
            cells[2] = f"{100 * r['greedy']:.1f}%"
            cells[3] = f"{100 * r['accuracy']:.1f}% [{low:.1f}, {high:.1f}]"
            cells[4], cells[5] = f"{r['reverse_kl']:.3f}", f"{r['mean_length']:.1f}"
            cells[6] = f"{100 * r['truncation_rate']:.1f}%"
        if r.get("outside_top") is not None:
            cells[7] = f"{100 * r['outside_top']:.1f}%"
        if "seconds" in r:
            cells[8] = f"{r['seconds']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    names = ["student", *EXPERIMENTS, *BAD_LOSSES, "teacher"]
    for name in ONLY.value:
        if name not in names:
            raise UserError(f"--only={name}: known are {'; '.join(names)}")
    out = Path(OUT.value)
    mesh = mesh_lib.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
    results = {}
    with mesh_lib.use_mesh(mesh):
        path = make_config("sampled", {}).teacher.path
        teacher = policy.load(policy.make_abstract(path, "float32", False, mesh), "float32")
        for name in ONLY.value or names:
            folder = out / "".join(x if x.isalnum() else "_" for x in name)
            results[name] = run_experiment(name, folder, mesh, teacher)
            run_files.write_text(out / "table.md", render_table(results) + "\n")
    print(render_table(results))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
