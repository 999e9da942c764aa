"""Strong-to-weak distillation of Qwen3 from Python: what the verbs do, as functions.

    import distill

    student, teacher = distill.load("Qwen/Qwen3-0.6B"), distill.load("Qwen/Qwen3-8B")
    out = distill.sample(student, ["2+2="], samples=4, max_new_tokens=64)
    distill.logprobs(teacher, out)
    distill.reverse_kl(student, teacher, out)
    distill.evaluate(student, "gsm8k", data="hf:openai/gsm8k:main:test")
    run = distill.train(config, "runs/x")
    distill.load("runs/x")

A model is a `Policy`: parameters on a mesh of all devices, with the tokenizer and stop tokens that
belong to them. A function imports what it needs when it is called, so that `import distill`, which
every verb begins with, takes no time.
"""

import dataclasses
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from etils import epath
    from ml_collections import ConfigDict

    from distill.policy.policy import Policy

# transformers otherwise announces at import that torch is absent, which is the normal case here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

Prompt = str | list[dict[str, Any]] | list[int]  # text, the messages of a chat, or token ids


@dataclasses.dataclass(frozen=True)
class Completion:
    """A sampled response. `logprobs` are of its tokens, under the distribution they were drawn
    from; `finish_reason` is "stop", "length", or "error" where logits were NaN."""

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str | None  # None without a tokenizer
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, by its directory."""

    workdir: "epath.Path"

    def metrics(self) -> "pd.DataFrame":
        """Reads metrics.jsonl: a row a step, a column a metric."""
        import pandas as pd

        with (self.workdir / "metrics.jsonl").open() as file:
            return pd.read_json(file, lines=True)


def load(path: str, dtype: str = "") -> "Policy":
    """Loads a model on all devices: a directory in Hugging Face format, a hub id, a PEFT adapter,
    or a run (its newest checkpoint).

    Args:
      dtype: float32 or bfloat16, of parameters and computation; "": bfloat16, on a CPU float32.

    Raises:
      UserError: naming the file or field that is missing or wrong.
    """
    import jax.numpy as jnp

    from distill.policy import policy

    model = policy.make_abstract_for_inference(path, dtype)
    with policy.use(model):
        return policy.load(model, jnp.dtype(model.model.dtype).name)


def sample(
    model: "Policy", prompts: Sequence[Prompt], *, thinking: bool = True, **options: Any
) -> list[Completion]:
    """Samples completions of each prompt; those of one prompt are neighbours.

    Args:
      thinking: the chat template's switch, for prompts that are messages.
      options: fields of `SampleSpec` (samples, max_new_tokens, seed, batch_size, stop_strings) and
        of `Sampling` (temperature, top_k, top_p, min_p, presence_penalty).

    Raises:
      UserError: naming the prompt or option at fault.
    """
    from distill import rollout
    from distill.policy import policy
    from distill.rollout import completions

    known = {
        f.name for kind in (rollout.SampleSpec, rollout.Sampling) for f in dataclasses.fields(kind)
    }
    _check_names(options, known - {"sampling", "top_logprobs"})
    spec = rollout.make_sample_spec(options)
    spec.sampling.check_vocab_size(model.config.vocab_size)
    rows = [(f"prompts[{i}]", _to_row(prompt)) for i, prompt in enumerate(prompts)]
    ids = completions.encode_row_prompts(model, rows, thinking, spec.max_new_tokens)
    with policy.use(model):
        groups = list(completions.complete(model, ids, spec))
    found = []
    for prompt_ids, group in zip(ids, groups, strict=True):
        for sequence in group:
            fields = completions.format_completion(model.tokenizer, sequence, spec.stop_strings)
            names = ("tokens", "logprobs", "text", "finish_reason")
            found.append(Completion(prompt_ids, **{name: fields[name] for name in names}))
    return found


def logprobs(model: "Policy", completions: Sequence[Completion]) -> "list[np.ndarray]":
    """Scores completions: of each [tokens] float32, the log-probability of each token of its
    response under the model's own distribution (temperature 1)."""
    import numpy as np

    from distill.evaluation import scoring
    from distill.policy import policy

    rows = [x.prompt_tokens + x.tokens for x in completions]
    with policy.use(model):
        scored = list(scoring.score_sequences(model, rows, batch_size=32)) if rows else []
    pairs = zip(completions, scored, strict=True)
    return [np.array(values[len(x.prompt_tokens) :], np.float32) for x, (values, _) in pairs]


def reverse_kl(
    student: "Policy", teacher: "Policy", completions: Sequence[Completion]
) -> "list[np.ndarray]":
    """Compares two models along completions: of each [tokens] float32, the exact reverse KL in nats
    between the distributions, over the whole vocabulary, that predict each token of its response.

    Raises:
      UserError: if the models do not share a vocabulary.
    """
    from distill.evaluation import divergence
    from distill.policy import compatibility, policy

    compatibility.require_same_vocabulary(student, teacher)
    pairs = [(x.prompt_tokens, x.tokens) for x in completions]
    with policy.use(student):
        return divergence.compute_token_reverse_kl(student, teacher, pairs, batch_size=32)


def evaluate(
    model: "Policy",
    benchmark: str,
    data: str = "",
    out: str = "",
    *,
    protocol: str = "greedy",
    limit: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluates a model as `python -m distill.evaluate` does, and returns its summary.

    Args:
      data: PATH.jsonl, hf:NAME:CONFIG:SPLIT or tfds:NAME; "": the benchmark's own.
      out: directory of examples.jsonl and summary.json, resumed if it holds them; "": none is kept.
      limit: first problems; 0: all.
      changes: settings that differ from the protocol's: samples, thinking, max_new_tokens,
        temperature, top_k, top_p, min_p, presence_penalty, seed, batch_size.

    Raises:
      UserError: naming the argument or row at fault.
    """
    from etils import epath

    from distill.evaluation import evaluator, protocols, tasks
    from distill.policy import policy

    known = {*protocols.PROTOCOLS["greedy"], "min_p", "seed", "batch_size"}
    _check_names(changes, known)
    tasks.require_benchmark(benchmark)
    settings = protocols.resolve_settings(protocol, benchmark, changes)
    ks = tuple(sorted({1, settings["samples"]}))
    spec = protocols.make_eval_spec(protocol, benchmark, settings, ks=ks)
    rows = tasks.load_problems(benchmark, data, limit)
    tasks.check_gradable(benchmark, rows)
    with tempfile.TemporaryDirectory() as scratch, policy.use(model):
        return evaluator.evaluate_benchmark(model, rows, spec, epath.Path(out or scratch))


def train(config: "ConfigDict", workdir: str) -> Run:
    """Trains as `python -m distill.train` does; resumes if `workdir` holds a run of this config.

    Args:
      config: what `get_config` of a file in configs/ returns, changed as you like.

    Raises:
      UserError: naming the key, file or row at fault.
    """
    from etils import epath

    from distill.training import loop

    loop.run(config, workdir)
    return Run(epath.Path(workdir))


def _check_names(given: dict[str, Any], known: set[str]) -> None:
    """Raises UserError for an argument that nothing reads."""
    from models.errors import UserError

    if unknown := sorted(given.keys() - known):
        raise UserError(f"{unknown[0]}: no such option; known are {', '.join(sorted(known))}")


def _to_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the row of a file that `generate` would read."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"messages" if prompt and isinstance(prompt[0], dict) else "tokens": prompt}


class _Package(types.ModuleType):
    """Importing a verb (`distill.train`, `distill.evaluate`) binds its module to the package under
    the verb's name. Here the functions keep their names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in ("evaluate", "train")):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
