"""The contenders of train_step, score and loss: `python -m benchmarks.trainers NAME`.

Answers jobs as benchmarks/workers.py does. A job says {"what", "student", "teacher", "rows",
"tokens", "dtype", "steps", "remat"?}, the models as fields of config.json, whose weights are
random; an answer {"seconds" of each of `steps` calls, "first_call_seconds", "peak_bytes"}, and of
"loss" the value and the norms of its gradients: of random numbers of the same scale they are about
the same, whoever computes them. Imports nothing of the project at the top: another venv runs this
file too.

what   "reverse_kl" and "sft": a training step, AdamW and a clipped gradient included;
       "hidden" and "logp": a forward pass, to final hidden states or to log-probabilities;
       "loss": the divergence of given hidden states alone, and its gradients.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import tunix_trainers, workers
from benchmarks.workers import B1, B2, CLIP, RATE, Answer, Job, jax_peak, resident, timed

NORMS = ("norm_by_hidden", "norm_by_head")

# --- this project: its update, its scorers and its streamed head, as `train` calls them -----------


def _network(job: Job, name: str, mesh: Any, trained: bool = False) -> Any:
    """A random Policy: what is trained in float32, what is read in the dtype asked."""
    import jax

    from distill.policy import policy
    from models.qwen3 import model
    from models.qwen3.config import Config

    config, remat = Config.from_hf(job[name]), trained and job.get("remat", False)
    found = policy.shaped(name, config, job["dtype"], remat, mesh)

    def draw(key: jax.Array) -> model.Params:
        to = "float32" if trained else job["dtype"]
        return jax.tree.map(lambda x: x.astype(to), model.init(config, key))

    shardings = jax.tree.map(lambda x: x.sharding, found.params)
    params = jax.jit(draw, out_shardings=shardings)(jax.random.key(0))
    return dataclasses.replace(found, params=params)


def _batch(job: Job, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from distill.batch import Batch
    from distill.runtime import mesh as mesh_lib

    rows = (job["rows"], job["tokens"])
    tokens_BT = jax.random.randint(jax.random.key(1), rows, 0, job["student"]["vocab_size"])
    positions_BT = jnp.broadcast_to(jnp.arange(rows[1]), rows)
    batch = Batch(tokens_BT, positions_BT, jnp.ones(rows, jnp.int32), positions_BT > 0)
    return jax.device_put(batch, mesh_lib.rows(mesh))


def our_step(job: Job) -> Answer:
    import jax

    from configs import base
    from distill.policy import policy
    from distill.runtime import mesh as mesh_lib
    from distill.teachers import local
    from distill.training import optim, setup, stages, update
    from models.qwen3 import model

    c = base.get_config()
    mesh = mesh_lib.make(**c.mesh)
    student, batch = _network(job, "student", mesh, trained=True), _batch(job, mesh)
    read = _network(job, "teacher", mesh) if job["what"] == "reverse_kl" else None
    s = c.opd
    s.objective = {"reverse_kl": "opd", "sft": "sft"}[job["what"]]
    s.batch_size, s.max_response_tokens = job["rows"], job["tokens"]
    s.optim.learning_rate, s.optim.b1, s.optim.b2, s.optim.clip_norm = RATE, B1, B2, CLIP
    loss, _ = stages.objective("opd", s)
    optimizer = optim.make(s.optim, s.steps)
    with policy.use(student):
        state = update.init(optimizer, student.params, 0)
        programs = setup.updater(c, s, loss, optimizer, student, mesh, state)

        def step() -> None:
            nonlocal state
            told, heads = batch, ()
            if read is not None:
                hidden_BTD = local.hidden(read.model, read.params, None, batch, None)
                told = dataclasses.replace(batch, teacher_hidden_BTD=(hidden_BTD,))
                heads = (model.head(read.params),)
            state, measured, _ = programs.once(state, [told], heads, single=True)
            jax.block_until_ready((state, measured))

        return timed(step, job, jax_peak)


def our_score(job: Job) -> Answer:
    import jax

    from configs import base
    from distill.policy import policy
    from distill.runtime import mesh as mesh_lib
    from distill.teachers import local
    from distill.training import stages

    c = base.get_config()
    mesh = mesh_lib.make(**c.mesh)
    read, batch = _network(job, "student", mesh), _batch(job, mesh)
    score: Any = {
        "hidden": lambda: local.hidden(read.model, read.params, None, batch, None),
        "logp": lambda: local.logp(read, batch, stages.logits_mib(c, mesh)),
    }[job["what"]]
    with policy.use(read):
        return timed(lambda: jax.block_until_ready(score()), job, jax_peak)


def our_loss(job: Job) -> Answer:
    import jax
    import jax.numpy as jnp

    from configs import base
    from distill.objectives import fused_head, losses
    from distill.runtime import mesh as mesh_lib
    from distill.runtime import xla
    from distill.training import stages

    c = base.get_config()
    mesh, dtype = mesh_lib.make(**c.mesh), jnp.dtype(job["dtype"])
    batch, keys = _batch(job, mesh), jax.random.split(jax.random.key(2), 4)
    V, rows = job["student"]["vocab_size"], mesh_lib.rows(mesh)
    D, E = (job[name]["hidden_size"] for name in ("student", "teacher"))
    hidden_BTD, hidden_BTE = (
        jax.device_put(jax.random.normal(key, (*batch.tokens_BT.shape, width), dtype), rows)
        for key, width in zip(keys[:2], (D, E), strict=True)
    )
    head_VD = jax.random.normal(keys[2], (V, D)) * D**-0.5  # trained, so float32
    head_VE = jax.random.normal(keys[3], (V, E), dtype) * E**-0.5

    # The teacher's are arguments too: closed over, they would be constants of the program.
    def total(hidden_BTD: jax.Array, head_VD: jax.Array, *teacher: jax.Array) -> jax.Array:
        mask_BT = losses.shift(batch.mask_BT)
        stats = fused_head.token_stats(
            *(hidden_BTD, head_VD, losses.shift(batch.tokens_BT), *teacher),
            logits_mib=stages.logits_mib(c, mesh),
            split=mesh_lib.split_vocabulary,
            divergence=losses.TABLE["opd"].compared,
            loss=lambda stats, _: {"loss": stats["divergence"]},
            weight_BT=mask_BT / jnp.sum(mask_BT),
        )
        return stats["total"]

    precision = "highest" if dtype == jnp.float32 else None
    with mesh_lib.use(mesh), jax.default_matmul_precision(precision):
        graded = jax.value_and_grad(total, (0, 1))
        graded = jax.jit(graded, compiler_options=xla.options(mesh))
        args = (hidden_BTD, head_VD, hidden_BTE, head_VE)
        answer = timed(lambda: jax.block_until_ready(graded(*args)), job, jax_peak)
        value, grads = graded(*args)
        norms = [float(jnp.linalg.norm(x.astype(jnp.float32).ravel())) for x in grads]
        return {**answer, "value": float(value), **dict(zip(NORMS, norms, strict=True))}


# --- Hugging Face's model with PyTorch's fused attention (SDPA), and TRL's divergence -------------


def _device() -> tuple[str, Callable[[], int]]:
    """Its name, and what tells the peak of its memory."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.max_memory_allocated
    return "cpu", resident


def _model(fields: dict, dtype: Any, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return made.to(device)


def _ids(job: Job, device: str) -> Any:
    import torch

    torch.manual_seed(0)
    vocabulary = job["student"]["vocab_size"]
    return torch.randint(0, vocabulary, (job["rows"], job["tokens"]), device=device)


def _jsd(of: Any, by: Any, ids: Any) -> Any:
    """TRL's divergence of all logits; at beta 1 it is the reverse KL."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(of[:, :-1], by[:, :-1], labels=ids[:, 1:], beta=1)


def torch_step(job: Job, mixed: bool = False) -> Answer:
    """As TRL's GKDTrainer computes its loss, without its loop. In bfloat16 the weights and moments
    are so too, with no float32 copy; `mixed` (autocast) they are float32, as in this project."""
    import torch

    device, peak = _device()
    ids, dtype = _ids(job, device), getattr(torch, job["dtype"])
    student = _model(job["student"], torch.float32 if mixed else dtype, device).train()
    if job.get("remat"):
        student.gradient_checkpointing_enable()
    read = _model(job["teacher"], dtype, device).eval() if job["what"] == "reverse_kl" else None
    optimizer = torch.optim.AdamW(
        student.parameters(), RATE, betas=(B1, B2), eps=1e-8, weight_decay=0.0, fused=True
    )

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            if read is None:
                loss = student(ids, labels=ids, use_cache=False).loss
            else:
                with torch.no_grad():
                    by = read(ids, use_cache=False).logits
                loss = _jsd(student(ids, use_cache=False).logits, by, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    return timed(step, job, peak)


def torch_score(job: Job) -> Answer:
    import torch
    from torch.nn import functional

    device, peak = _device()
    ids, read = _ids(job, device), _model(job["student"], getattr(torch, job["dtype"]), device)
    read.eval()

    @torch.inference_mode()
    def score() -> None:
        if job["what"] == "hidden":
            found = read.model(ids, use_cache=False).last_hidden_state
        else:
            logits = read(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            found = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        found.flatten()[-1].item()

    return timed(score, job, peak)


def torch_loss(job: Job) -> Answer:
    import torch

    device, peak = _device()
    ids, dtype, V = _ids(job, device), getattr(torch, job["dtype"]), job["student"]["vocab_size"]
    D, E = (job[name]["hidden_size"] for name in ("student", "teacher"))
    hidden_BTD, hidden_BTE = (
        torch.randn(*ids.shape, width, device=device, dtype=dtype) for width in (D, E)
    )
    head_VD = torch.randn(V, D, device=device).mul_(D**-0.5)  # trained, so float32
    head_VE = torch.randn(V, E, device=device, dtype=dtype).mul_(E**-0.5)
    trained = [hidden_BTD.requires_grad_(), head_VD.requires_grad_()]

    def loss() -> tuple[Any, Any]:
        of = hidden_BTD @ head_VD.to(dtype).T
        with torch.no_grad():
            by = hidden_BTE @ head_VE.T
        value = _jsd(of, by, ids)
        found = torch.autograd.grad(value, trained)
        found[0].flatten()[-1].item()
        return value, found

    answer = timed(loss, job, peak)
    value, found = loss()
    norms = [x.float().norm().item() for x in found]
    return {**answer, "value": value.item(), **dict(zip(NORMS, norms, strict=True))}


_mixed_step = functools.partial(torch_step, mixed=True)

# contender → what it can do
WORKERS: dict[str, dict[str, Callable[[Job], Answer]]] = {
    "ours": dict.fromkeys(("reverse_kl", "sft"), our_step)
    | dict.fromkeys(("hidden", "logp"), our_score)
    | {"loss": our_loss},
    "transformers": {"sft": torch_step, "hidden": torch_score, "logp": torch_score},
    "transformers, autocast": {"sft": _mixed_step},
    "trl": {"reverse_kl": torch_step, "loss": torch_loss},
    "trl, autocast": {"reverse_kl": _mixed_step},
    "tunix": dict.fromkeys(("reverse_kl", "sft"), tunix_trainers.step)
    | {"logp": tunix_trainers.score},
}


def main() -> None:
    of = WORKERS[sys.argv[1]]
    workers.serve(lambda: lambda job: of[job["what"]](job))


if __name__ == "__main__":
    main()
