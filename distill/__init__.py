"""Strong-to-weak distillation of Qwen3: the Python API, with the functions of the verbs.

    import distill

    student, teacher = distill.load("Qwen/Qwen3-0.6B"), distill.load("Qwen/Qwen3-8B")
    out = distill.sample(student, ["2+2="], samples=4, max_new_tokens=64)
    distill.logprobs(teacher, out)
    distill.reverse_kl(student, teacher, out)
    distill.evaluate(student, "gsm8k", data="hf:openai/gsm8k:main:test")
    run = distill.train(config, "runs/x")
    distill.load("runs/x")

A model is a `Policy`: parameters on a mesh of all devices, with their tokenizer and stop tokens.
Each function imports its dependencies when it is called, so that `import distill`, which every verb
runs first, is fast.
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

# Otherwise transformers warns at import that torch is missing, which is normal here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

Prompt = str | list[dict[str, Any]] | list[int]  # text, chat messages, or token ids


@dataclasses.dataclass(frozen=True)
class Completion:
    """A sampled response.

    `logprobs` are the log-probabilities of its tokens under the distribution they were drawn from.
    `text` has no special tokens, and begins with the think tag that the prompt opened, if it did.
    `finish_reason` is "stop", "length", or "error" if the logits were NaN.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str | None  # None without a tokenizer
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, identified by its directory, which may be one that `train` left earlier."""

    workdir: "epath.PathLike"

    def metrics(self) -> "pd.DataFrame":
        """Reads metrics.jsonl as a table with one row per step and one column per metric."""
        import pandas as pd
        from etils import epath

        with (epath.Path(self.workdir) / "metrics.jsonl").open() as file:
            return pd.read_json(file, lines=True)


def load(path: str, dtype: str = "") -> "Policy":
    """Loads a model on all devices: a directory in Hugging Face format, a hub id, a PEFT adapter,
    or a run (its newest checkpoint).

    Args:
      dtype: of parameters and computation, float32 or bfloat16; "": bfloat16, on a CPU float32.

    Raises:
      UserError: naming the file or field that is missing or wrong.
    """
    import jax.numpy as jnp

    from distill.policy import policy
    from distill.runtime import paths

    model = policy.make_abstract_for_inference(paths.expand_input(path), dtype)
    with policy.use(model):
        return policy.load(model, jnp.dtype(model.model.dtype).name)


def sample(
    model: "Policy", prompts: Sequence[Prompt], *, thinking: bool = True, **options: Any
) -> list[Completion]:
    """Samples completions of each prompt; completions of the same prompt are adjacent.

    Args:
      thinking: the chat template's thinking switch; affects only prompts that are messages.
      options: fields of `SampleSpec` (samples, max_new_tokens, seed, batch_size, stop_strings) and
        of `Sampling` (temperature, top_k, top_p, min_p, presence_penalty). max_new_tokens is 1024,
        or what the model's positions leave after a prompt; a larger one is refused.

    Raises:
      UserError: naming the invalid prompt or option.
    """
    from distill import rollout
    from distill.policy import policy
    from distill.rollout import completions

    known = {
        f.name for cls in (rollout.SampleSpec, rollout.Sampling) for f in dataclasses.fields(cls)
    }
    _check_names(options, known - {"sampling", "top_logprobs"})
    spec = rollout.make_sample_spec(options)
    spec.sampling.check_vocab_size(model.config.vocab_size)
    rows = [(f"prompts[{i}]", _to_row(prompt)) for i, prompt in enumerate(prompts)]
    limit = spec.max_new_tokens
    is_default = "max_new_tokens" not in options
    ids = completions.encode_row_prompts(model, rows, thinking, 1 if is_default else limit)
    limits = [completions.fit_limit(model, prompt_ids, limit) for prompt_ids in ids]
    with policy.use(model):
        groups = list(completions.complete(model, ids, spec, limits=limits))
    results = []
    for prompt_ids, group in zip(ids, groups, strict=True):
        for sequence in group:
            fields = completions.format_completion(model.tokenizer, sequence, spec.stop_strings)
            names = ("tokens", "logprobs", "text", "finish_reason")
            results.append(Completion(prompt_ids, **{name: fields[name] for name in names}))
    return results


def logprobs(model: "Policy", completions: Sequence[Completion]) -> "list[np.ndarray]":
    """Returns the log-probabilities of each completion's response tokens, float32 [tokens].

    They are those of the model's own distribution (temperature 1).
    """
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
    """Returns the reverse KL at each response token of each completion, in nats, float32 [tokens].

    It is KL(student‖teacher) of the distributions that predict the token, exact, over the whole
    vocabulary.

    Raises:
      UserError: if the models have different vocabularies.
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
      out: directory for examples.jsonl and summary.json, resumed if it holds them; "" keeps none.
      limit: evaluate only this many problems, the first ones; 0: all.
      changes: settings that differ from the protocol's: samples, thinking, max_new_tokens,
        temperature, top_k, top_p, min_p, presence_penalty, seed, batch_size.

    Raises:
      UserError: naming the invalid argument or row.
    """
    from etils import epath

    from distill.evaluation import evaluator, problems, protocols
    from distill.policy import policy
    from distill.runtime import paths

    known = {*protocols.PROTOCOLS["greedy"], "min_p", "seed", "batch_size"}
    _check_names(changes, known)
    problems.require_task(benchmark)
    settings = protocols.resolve_settings(protocol, benchmark, changes)
    ks = tuple(sorted({1, settings["samples"]}))
    spec = protocols.make_eval_spec(protocol, benchmark, settings, ks=ks)
    rows = problems.load_problems(benchmark, paths.expand_input(data), limit)
    problems.check_gradable(benchmark, rows)
    if "max_new_tokens" not in changes:
        spec = evaluator.fit_limit(model, rows, spec)
    out = paths.expand_home(out)
    with tempfile.TemporaryDirectory() as scratch, policy.use(model):
        return evaluator.evaluate_benchmark(model, rows, spec, epath.Path(out or scratch))


def train(config: "ConfigDict", workdir: str, allow_changed_inputs: bool = False) -> Run:
    """Trains as `python -m distill.train` does; resumes if `workdir` holds a run of this config.

    Args:
      config: the result of `get_config` of a file in configs/, with any changes.
      allow_changed_inputs: resume with other data, models or adapters than the run began with.

    Raises:
      UserError: naming the invalid key, file or row.
    """
    from etils import epath

    from distill.runtime import paths
    from distill.training import loop

    config, workdir = config.copy_and_resolve_references(), paths.expand_home(workdir)
    paths.expand_config(config)
    loop.run(config, workdir, allow_changed_inputs)
    return Run(epath.Path(workdir))


def _check_names(arguments: dict[str, Any], known: set[str]) -> None:
    """Raises UserError for an unknown argument."""
    from models.errors import UserError

    if unknown := sorted(arguments.keys() - known):
        raise UserError(f"{unknown[0]}: no such option; known are {', '.join(sorted(known))}")


def _to_row(prompt: Prompt) -> dict[str, Any]:
    """Converts a prompt to a row of the file format that `generate` reads."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"messages" if prompt and isinstance(prompt[0], dict) else "tokens": prompt}


class _Package(types.ModuleType):
    """A package whose functions are not replaced by submodules of the same name.

    Importing a verb (`distill.train`, `distill.evaluate`) would otherwise set the attribute of that
    name to the module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in ("evaluate", "train")):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
