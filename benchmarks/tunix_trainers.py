"""google-tunix as a contender of benchmarks/trainers.py; it runs in a venv of its own."""

from typing import Any

from benchmarks import workers
from benchmarks.workers import B1, B2, CLIP, LEARNING_RATE, Answer, Job, get_jax_peak, time_calls


def _make_network(job: Job, name: str, trained: bool = False) -> Any:
    """Makes its Qwen3 with random weights: in float32 if trained, else in the compute dtype."""
    import jax.numpy as jnp
    from tunix.models.qwen3 import model as tunix_model  # pyright: ignore[reportMissingImports]

    dtype = jnp.dtype(job["dtype"])
    changes = {"param_dtype": jnp.dtype("float32") if trained else dtype}
    if trained and job.get("remat"):
        changes["remat_config"] = tunix_model.RematConfig.DECODER
    config = workers.make_tunix_config(job[name], dtype, **changes)
    return tunix_model.Qwen3(config, rngs=tunix_model.nnx.Rngs(0))


def _make_inputs(input_tokens: Any, input_mask: Any) -> dict[str, Any]:
    import jax.numpy as jnp

    B, T = input_tokens.shape
    return {
        "input_tokens": input_tokens,
        "positions": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "cache": None,
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)),
    }


def _make_mesh() -> Any:
    import jax

    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def run_step(job: Job) -> Answer:
    """Times steps of its DistillationTrainer or PeftTrainer, with weights and moments in float32.

    LogitStrategy at alpha 1 and temperature 1 is the forward KL; it has no reverse KL.
    """
    import jax
    import numpy as np
    import optax
    from tunix.distillation import (  # pyright: ignore[reportMissingImports]
        distillation_trainer,
        strategies,
    )
    from tunix.sft import peft_trainer  # pyright: ignore[reportMissingImports]

    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, B1, B2, weight_decay=0.0)
    )
    rows = (job["rows"], job["tokens"])
    tokens_BT = np.random.default_rng(0).integers(0, job["student"]["vocab_size"], rows)
    fields = {"input_tokens": tokens_BT.astype(np.int32), "input_mask": np.ones(rows, bool)}
    with _make_mesh():
        student = _make_network(job, "student", trained=True)
        if job["what"] == "reverse_kl":
            V = job["student"]["vocab_size"]

            def forward(network: Any, input_tokens: Any, input_mask: Any) -> Any:
                return network(**_make_inputs(input_tokens, input_mask))[0]

            def make_labels(input_tokens: Any, input_mask: Any) -> Any:
                return jax.nn.one_hot(input_tokens, V)

            strategy = strategies.LogitStrategy(forward, forward, make_labels, 1.0, 1.0)
            config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
            trainer: Any = distillation_trainer.DistillationTrainer(
                student, _make_network(job, "teacher"), strategy, optimizer, config
            )
            batch = distillation_trainer.TrainingInput(**fields)
        else:
            config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
            trainer = peft_trainer.PeftTrainer(student, optimizer, config)

            def make_model_inputs(x: Any) -> dict[str, Any]:
                model_inputs = _make_inputs(x.input_tokens, x.input_mask)
                model_inputs.pop("cache")
                return {**model_inputs, "input_mask": x.input_mask}

            trainer = trainer.with_gen_model_input_fn(make_model_inputs)
            batch = peft_trainer.TrainingInput(**fields)
        trainer.is_managed_externally = (
            True  # otherwise it skips as many batches as it has trained on
        )

        def train_once() -> None:
            trainer.train([batch])
            jax.block_until_ready(peft_trainer.nnx.state(trainer.model))

        return time_calls(train_once, job, get_jax_peak, warm=2)  # its second step compiles again


def run_score(job: Job) -> Answer:
    import jax
    import jax.numpy as jnp
    from tunix.models.qwen3 import model as tunix_model  # pyright: ignore[reportMissingImports]

    tokens_BT = jax.random.randint(
        jax.random.key(1), (job["rows"], job["tokens"]), 0, job["student"]["vocab_size"]
    )
    with _make_mesh():
        network = _make_network(job, "student")

        @tunix_model.nnx.jit
        def compute_logp(network: Any, tokens_BT: jax.Array) -> jax.Array:
            logits_BTV = network(**_make_inputs(tokens_BT, None))[0][:, :-1]
            logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
            return jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)

        return time_calls(
            lambda: jax.block_until_ready(compute_logp(network, tokens_BT)), job, get_jax_peak
        )
