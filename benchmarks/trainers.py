"""Contenders of train_step, score and loss: `python -m benchmarks.trainers NAME`.

Answers jobs as benchmarks/workers.py does. A job is {"what", "student", "teacher", "rows",
"tokens", "dtype", "steps", "remat"?}, with the models as fields of config.json; their weights are
random. An answer is {"seconds" of each of `steps` calls, "first_call_seconds", "peak_bytes"}. For
"loss" it also has the value and the norms of its gradients, which should roughly agree between
contenders, as their random inputs have the same scale. The top of this file imports nothing from
distill or models, because other venvs run it too.

what   "reverse_kl" and "sft": a training step with AdamW and gradient clipping;
       "hidden" and "logp": a forward pass to final hidden states or to log-probabilities;
       "loss": the divergence from given hidden states, and its gradients.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import tunix_trainers, workers
from benchmarks.workers import (
    B1,
    B2,
    CLIP,
    LEARNING_RATE,
    Answer,
    Job,
    get_jax_peak,
    get_resident_peak,
    time_calls,
)

NORMS = ("norm_by_hidden", "norm_by_head")

# --- this project: its update, its scorers and its streamed head, as `train` calls them -----------


def make_network(job: Job, name: str, mesh: Any, trained: bool = False) -> Any:
    """Makes a random Policy: in float32 if trained, else in the job's dtype.

    Norms' scales are 1, other parameters N(0, 1/D). They are drawn one by one, so that the peak of
    memory is the job's and not that of drawing.
    """
    import jax
    import jax.numpy as jnp

    from distill.policy import policy
    from models.qwen3.config import Config

    config, remat = Config.from_hf(job[name]), trained and job.get("remat", False)
    network = policy.make_abstract_from_config(name, config, job["dtype"], remat, mesh)
    dtype = "float32" if trained else job["dtype"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(network.params)

    def draw_param(path: Any, shape: Any, key: jax.Array) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(shape.shape, dtype)
        return jax.random.normal(key, shape.shape, dtype) * config.hidden_size**-0.5

    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [
        jax.jit(functools.partial(draw_param, path, shape), out_shardings=shape.sharding)(key)
        for (path, shape), key in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(network, params=jax.tree.unflatten(tree, params))


def _make_batch(job: Job, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from distill.batch import Batch
    from distill.runtime import mesh as mesh_lib

    rows = (job["rows"], job["tokens"])
    tokens_BT = jax.random.randint(jax.random.key(1), rows, 0, job["student"]["vocab_size"])
    positions_BT = jnp.broadcast_to(jnp.arange(rows[1]), rows)
    batch = Batch(tokens_BT, positions_BT, jnp.ones(rows, jnp.int32), positions_BT > 0)
    return jax.device_put(batch, mesh_lib.make_row_sharding(mesh))


def run_our_step(job: Job) -> Answer:
    import jax

    from configs import base
    from distill.batch import TeacherOutput
    from distill.policy import policy
    from distill.runtime import mesh as mesh_lib
    from distill.teachers import local
    from distill.training import optim, setup, stages, update
    from models import transformer

    c = base.get_config()
    mesh = mesh_lib.make_mesh(**c.mesh)
    student, batch = make_network(job, "student", mesh, trained=True), _make_batch(job, mesh)
    teacher = make_network(job, "teacher", mesh) if job["what"] == "reverse_kl" else None
    s = c.opd
    s.objective = {"reverse_kl": "opd", "sft": "sft"}[job["what"]]
    s.batch_size, s.max_response_tokens = job["rows"], job["tokens"]
    s.optim.learning_rate, s.optim.b1, s.optim.b2, s.optim.clip_norm = LEARNING_RATE, B1, B2, CLIP
    loss, _ = stages.resolve_objective("opd", s)
    optimizer = optim.make_optimizer(s.optim, s.steps)
    with policy.use(student):
        state = update.init_train_state(optimizer, student.params, 0)
        programs = setup.make_stage_update(c, s, loss, optimizer, student, mesh, state)

        def step() -> None:
            nonlocal state
            scored = batch
            if teacher is not None:
                hidden_BTE = local.compute_hidden(teacher.model, teacher.params, None, batch, None)
                head_VE = transformer.get_output_head(teacher.params)
                output = TeacherOutput(hidden_BTE=(hidden_BTE,), heads_VE=(head_VE,))
                scored = dataclasses.replace(batch, teacher=output)
            state, metrics, _ = programs.run_update(state, [scored], single_microbatch=True)
            jax.block_until_ready((state, metrics))

        return time_calls(step, job, get_jax_peak)


def run_our_score(job: Job) -> Answer:
    import jax

    from configs import base
    from distill.policy import policy
    from distill.runtime import mesh as mesh_lib
    from distill.teachers import local
    from distill.training import stages

    c = base.get_config()
    mesh = mesh_lib.make_mesh(**c.mesh)
    subject, batch = make_network(job, "student", mesh), _make_batch(job, mesh)
    score: Any = {
        "hidden": lambda: local.compute_hidden(subject.model, subject.params, None, batch, None),
        "logp": lambda: local.compute_logp(subject, batch, stages.get_loss_chunk_mib(c, mesh)),
    }[job["what"]]
    with policy.use(subject):
        return time_calls(lambda: jax.block_until_ready(score()), job, get_jax_peak)


def run_our_loss(job: Job) -> Answer:
    import jax
    import jax.numpy as jnp

    from configs import base
    from distill.batch import TeacherOutput
    from distill.objectives import fused_head, losses
    from distill.runtime import mesh as mesh_lib
    from distill.runtime import xla
    from distill.training import stages

    c = base.get_config()
    mesh, dtype = mesh_lib.make_mesh(**c.mesh), jnp.dtype(job["dtype"])
    batch, keys = _make_batch(job, mesh), jax.random.split(jax.random.key(2), 4)
    V, rows = job["student"]["vocab_size"], mesh_lib.make_row_sharding(mesh)
    D, E = (job[name]["hidden_size"] for name in ("student", "teacher"))
    hidden_BTD, hidden_BTE = (
        jax.device_put(jax.random.normal(key, (*batch.tokens_BT.shape, width), dtype), rows)
        for key, width in zip(keys[:2], (D, E), strict=True)
    )
    head_VD = jax.random.normal(keys[2], (V, D)) * D**-0.5  # trained, so float32
    head_VE = jax.random.normal(keys[3], (V, E), dtype) * E**-0.5

    # The teacher's arrays are arguments too, since a closure would make them program constants.
    def compute_loss(
        hidden_BTD: jax.Array, head_VD: jax.Array, hidden_BTE: jax.Array, head_VE: jax.Array
    ) -> jax.Array:
        mask_BT = losses.shift(batch.mask_BT)
        inputs = fused_head.HeadInputs(
            hidden_BTD,
            head_VD,
            losses.shift(batch.tokens_BT),
            teacher=TeacherOutput(hidden_BTE=(hidden_BTE,), heads_VE=(head_VE,)),
            weight_BT=mask_BT / jnp.sum(mask_BT),
        )
        options = fused_head.StatsOptions(
            stages.get_loss_chunk_mib(c, mesh),
            split=mesh_lib.split_vocabulary,
            divergence=losses.OBJECTIVES["opd"].teacher_divergence,
        )
        loss = fused_head.compute_token_stats(
            inputs, options, lambda stats, _: {"loss": stats["divergence"]}
        )
        return loss["total"]

    precision = "highest" if dtype == jnp.float32 else None
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(precision):
        loss_and_grads = jax.value_and_grad(compute_loss, (0, 1))
        loss_and_grads = jax.jit(loss_and_grads, compiler_options=xla.get_compiler_options(mesh))
        args = (hidden_BTD, head_VD, hidden_BTE, head_VE)
        answer = time_calls(lambda: jax.block_until_ready(loss_and_grads(*args)), job, get_jax_peak)
        value, grads = loss_and_grads(*args)
        norms = [float(jnp.linalg.norm(x.astype(jnp.float32).ravel())) for x in grads]
        return {**answer, "value": float(value), **dict(zip(NORMS, norms, strict=True))}


# --- Hugging Face's model with PyTorch's fused attention (SDPA), and TRL's divergence -------------


def _get_torch_device() -> tuple[str, Callable[[], int]]:
    """Returns the device's name and a function that returns its peak memory in bytes."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.max_memory_allocated
    return "cpu", get_resident_peak


def _make_torch_model(fields: dict, dtype: Any, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    with torch.device(device):  # a GPU draws the weights much faster
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(
            device
        )


def _make_ids(job: Job, device: str) -> Any:
    import torch

    torch.manual_seed(0)
    vocabulary = job["student"]["vocab_size"]
    return torch.randint(0, vocabulary, (job["rows"], job["tokens"]), device=device)


def _compute_jsd(student_logits: Any, teacher_logits: Any, ids: Any) -> Any:
    """Computes TRL's divergence of all logits; at beta 1 it is the reverse KL."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(
        student_logits[:, :-1], teacher_logits[:, :-1], labels=ids[:, 1:], beta=1
    )


def run_torch_step(job: Job, mixed: bool = False) -> Answer:
    """Times training steps with the loss of TRL's GKDTrainer, without its loop.

    In bfloat16, weights and moments are in bfloat16 too, with no float32 copy; with `mixed`
    (autocast) they are in float32, as in this project.
    """
    import torch

    device, peak = _get_torch_device()
    ids, dtype = _make_ids(job, device), getattr(torch, job["dtype"])
    student = _make_torch_model(job["student"], torch.float32 if mixed else dtype, device).train()
    if job.get("remat"):
        student.gradient_checkpointing_enable()
    teacher = (
        _make_torch_model(job["teacher"], dtype, device).eval()
        if job["what"] == "reverse_kl"
        else None
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), LEARNING_RATE, betas=(B1, B2), eps=1e-8, weight_decay=0.0, fused=True
    )

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            if teacher is None:
                loss = student(ids, labels=ids, use_cache=False).loss
            else:
                with torch.no_grad():
                    teacher_logits = teacher(ids, use_cache=False).logits
                loss = _compute_jsd(student(ids, use_cache=False).logits, teacher_logits, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    return time_calls(step, job, peak)


def run_torch_score(job: Job) -> Answer:
    import torch
    from torch.nn import functional

    device, peak = _get_torch_device()
    ids, network = (
        _make_ids(job, device),
        _make_torch_model(job["student"], getattr(torch, job["dtype"]), device),
    )
    network.eval()

    @torch.inference_mode()
    def score() -> None:
        if job["what"] == "hidden":
            scores = network.model(ids, use_cache=False).last_hidden_state
        else:
            logits = network(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            scores = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        scores.flatten()[-1].item()  # waits for the device

    return time_calls(score, job, peak)


def run_torch_loss(job: Job) -> Answer:
    import torch

    device, peak = _get_torch_device()
    ids, dtype, V = (
        _make_ids(job, device),
        getattr(torch, job["dtype"]),
        job["student"]["vocab_size"],
    )
    D, E = (job[name]["hidden_size"] for name in ("student", "teacher"))
    hidden_BTD, hidden_BTE = (
        torch.randn(*ids.shape, width, device=device, dtype=dtype) for width in (D, E)
    )
    head_VD = torch.randn(V, D, device=device).mul_(D**-0.5)  # trained, so float32
    head_VE = torch.randn(V, E, device=device, dtype=dtype).mul_(E**-0.5)
    trained = [hidden_BTD.requires_grad_(), head_VD.requires_grad_()]

    def compute_loss() -> tuple[Any, Any]:
        student_logits = hidden_BTD @ head_VD.to(dtype).T
        with torch.no_grad():
            teacher_logits = hidden_BTE @ head_VE.T
        value = _compute_jsd(student_logits, teacher_logits, ids)
        grads = torch.autograd.grad(value, trained)
        grads[0].flatten()[-1].item()
        return value, grads

    answer = time_calls(compute_loss, job, peak)
    value, grads = compute_loss()
    norms = [x.float().norm().item() for x in grads]
    return {**answer, "value": value.item(), **dict(zip(NORMS, norms, strict=True))}


_mixed_step = functools.partial(run_torch_step, mixed=True)

# contender → case → the function that runs it
WORKERS: dict[str, dict[str, Callable[[Job], Answer]]] = {
    "ours": dict.fromkeys(("reverse_kl", "sft"), run_our_step)
    | dict.fromkeys(("hidden", "logp"), run_our_score)
    | {"loss": run_our_loss},
    "transformers": {"sft": run_torch_step, "hidden": run_torch_score, "logp": run_torch_score},
    "transformers, autocast": {"sft": _mixed_step},
    "trl": {"reverse_kl": run_torch_step, "loss": run_torch_loss},
    "trl, autocast": {"reverse_kl": _mixed_step},
    "tunix": dict.fromkeys(("reverse_kl", "sft"), tunix_trainers.run_step)
    | {"logp": tunix_trainers.run_score},
}


def main() -> None:
    run_case = WORKERS[sys.argv[1]]
    workers.serve_jobs(lambda: lambda job: run_case[job["what"]](job))


if __name__ == "__main__":
    main()
