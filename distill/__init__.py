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
Paths are str or Path. A mistake raises `UserError`, whose text is one line that names the argument,
file, row or config key at fault.

Each function imports its dependencies when it is called, so that `import distill`, which every verb
runs first, is fast.
"""

import dataclasses
import os
import reprlib
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from ml_collections import ConfigDict

    from distill.policy.policy import Policy

__all__ = [
    "Completion",
    "Policy",
    "Prompt",
    "Run",
    "UserError",
    "evaluate",
    "load",
    "logprobs",
    "reverse_kl",
    "sample",
    "train",
]

# Otherwise transformers warns at import that torch is missing, which is normal here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

Prompt = str | list[dict[str, Any]] | list[int]  # text, chat messages, or token ids
StrPath = str | os.PathLike[str]


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

    def __repr__(self) -> str:
        text = self.text if self.text is None or len(self.text) <= 60 else self.text[:60] + "…"
        return f"Completion({text!r}: {len(self.tokens)} tokens, {self.finish_reason})"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, identified by its directory, which may be one that `train` left earlier."""

    workdir: StrPath

    def metrics(self) -> "pd.DataFrame":
        """Reads metrics.jsonl as a table with one row per step and one column per metric.

        Raises:
          UserError: if `workdir` has none.
        """
        import pandas as pd
        from etils import epath

        from distill.runtime import arguments, paths

        path = epath.Path(paths.expand_home(arguments.read_path(self.workdir, "workdir")))
        path /= "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file: not a run, or one that has trained no step yet")
        with path.open() as file:
            return pd.read_json(file, lines=True)


def load(path: StrPath, dtype: str = "") -> "Policy":
    """Loads a model on all devices: a directory in Hugging Face format, a hub id, a PEFT adapter,
    or a run (its newest checkpoint).

    Args:
      dtype: of parameters and computation, float32 or bfloat16; "": bfloat16, on a CPU float32.

    Raises:
      UserError: naming the file or field that is missing or wrong.
    """

    from distill.policy import policy
    from distill.runtime import arguments, paths
    from models import checks

    checks.check_fields({"dtype": dtype}, {"dtype": ("", *policy.DTYPES)})
    source = paths.expand_input(arguments.read_path(path, "path"))
    model = policy.make_abstract_for_inference(source, dtype)
    with policy.use(model):
        return policy.load(model)


def sample(
    model: "Policy", prompts: Sequence[Prompt], *, thinking: bool = True, **options: Any
) -> list[Completion]:
    """Samples completions of each prompt; completions of the same prompt are adjacent.

    Args:
      thinking: the chat template's thinking switch, which texts and token ids do not go through.
      options: fields of `SampleSpec` (samples, max_new_tokens, seed, batch_size, stop_strings) and
        of `Sampling` (temperature, top_k, top_p, min_p, presence_penalty). max_new_tokens is 1024,
        or what the model's positions leave after a prompt; a larger one is refused.

    Raises:
      UserError: naming the invalid prompt or option.
    """
    from distill import rollout
    from distill.policy import policy
    from distill.rollout import completions
    from distill.runtime import arguments

    _require_policy(model, "model")
    arguments.require(thinking, bool, "thinking", "True or False")
    known = {
        f.name for cls in (rollout.SampleSpec, rollout.Sampling) for f in dataclasses.fields(cls)
    }
    options = arguments.read_options(options, (known | {"thinking"}) - {"sampling", "top_logprobs"})
    spec = rollout.make_sample_spec(options)
    spec.sampling.check_vocab_size(model.config.vocab_size)
    if spec.stop_strings and model.tokenizer is None:
        raise UserError(f"stop_strings: {model.path} has no tokenizer to find them with")
    prompts = arguments.read_items(prompts, "prompts", "texts, chats or lists of token ids")
    rows = [(f"prompts[{i}]", _to_row(prompt, i)) for i, prompt in enumerate(prompts)]
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

    Raises:
      UserError: naming a completion that is too long for the model, or has ids that it has not.
    """
    import numpy as np

    from distill.evaluation import scoring
    from distill.policy import policy

    _require_policy(model, "model")
    completions = _read_completions(completions, model)
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
      UserError: if the models have different vocabularies, or naming a completion that is too long.
    """
    from distill.evaluation import divergence
    from distill.policy import compatibility, policy

    _require_policy(student, "student")
    _require_policy(teacher, "teacher")
    compatibility.require_same_vocabulary(student, teacher)
    completions = _read_completions(completions, student, teacher)
    pairs = [(x.prompt_tokens, x.tokens) for x in completions]
    with policy.use(student):
        return divergence.compute_token_reverse_kl(student, teacher, pairs, batch_size=32)


def evaluate(
    model: "Policy",
    benchmark: str,
    data: StrPath = "",
    out: StrPath = "",
    *,
    protocol: str = "greedy",
    limit: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluates a model as `python -m distill.evaluate` does, and returns its summary.

    Args:
      benchmark: a name that `python -m distill.evaluate --help` lists.
      data: PATH.jsonl, hf:NAME:CONFIG:SPLIT or tfds:NAME; "hf:": the benchmark's own set; "": the
        problems that arithmetic generates, while other benchmarks need data.
      out: directory for examples.jsonl and summary.json, resumed if it holds them; "" keeps none.
      limit: evaluate only this many problems, the first ones; 0: all.
      protocol: greedy, sampled, qwen3-thinking or qwen3-nonthinking.
      changes: settings that differ from the protocol's: samples, thinking, max_new_tokens,
        temperature, top_k, top_p, min_p, presence_penalty, seed, batch_size.

    Raises:
      UserError: naming the invalid argument or row.
    """
    from etils import epath

    from distill.evaluation import evaluator, problems, protocols, records, tasks
    from distill.policy import policy
    from distill.runtime import arguments, paths
    from models import checks

    _require_policy(model, "model")
    choices = {"benchmark": tuple(tasks.BENCHMARKS), "protocol": tuple(protocols.PROTOCOLS)}
    rules = choices | {"limit": checks.Range(off="all", whole=True)}
    checks.check_fields({"benchmark": benchmark, "protocol": protocol, "limit": limit}, rules)
    known = {*protocols.PROTOCOLS["greedy"], "min_p", "seed", "batch_size"}
    changes = arguments.read_options(changes, known)
    data = "" if data == "" else paths.expand_input(arguments.read_path(data, "data"))
    out = "" if out == "" else paths.expand_home(arguments.read_path(out, "out"))
    settings = protocols.resolve_settings(protocol, benchmark, changes)
    arguments.require(settings["thinking"], bool, "thinking", "True or False")
    spec = protocols.make_eval_spec(protocol, benchmark, settings)
    spec = dataclasses.replace(spec, ks=tuple(sorted({1, spec.sample.samples})))
    with arguments.without_flags(), tempfile.TemporaryDirectory() as scratch:
        problems.require_task(benchmark)
        if out:
            examples = f"{out}/{records.EXAMPLES_FILE}"
            paths.check_output(examples, data, flag="out", creates_folder=False)
        rows = problems.load_problems(benchmark, data, limit)
        problems.check_gradable(benchmark, rows)
        if changes.get("max_new_tokens") is None:
            spec = evaluator.fit_limit(model, rows, spec)
        with policy.use(model):
            return evaluator.evaluate_benchmark(model, rows, spec, epath.Path(out or scratch))


def train(config: "ConfigDict", workdir: StrPath, allow_changed_inputs: bool = False) -> Run:
    """Trains as `python -m distill.train` does; resumes if `workdir` holds a run of this config.

    Args:
      config: the result of `get_config` of a file in configs/, with any changes.
      allow_changed_inputs: resume with other data, models or adapters than the run began with.

    Raises:
      UserError: naming the invalid key, file or row.
    """
    from etils import epath
    from ml_collections import ConfigDict

    from distill.runtime import arguments, paths
    from distill.training import loop

    what = "the ConfigDict that get_config of a file in configs/ returns"
    arguments.require(config, ConfigDict, "config", what)
    arguments.require(allow_changed_inputs, bool, "allow_changed_inputs", "True or False")
    directory = paths.expand_home(arguments.read_path(workdir, "workdir"))
    config = config.copy_and_resolve_references()
    paths.expand_config(config)
    with arguments.without_flags():
        loop.run(config, directory, allow_changed_inputs)
    return Run(epath.Path(directory))


def _require_policy(model: Any, name: str) -> None:
    """Raises UserError if an argument is no model, but the path of one, say."""
    from distill.policy.policy import Policy
    from distill.runtime import arguments

    arguments.require(model, Policy, name, "a Policy, which distill.load(PATH) returns")


def _read_completions(completions: Any, *models: "Policy") -> list[Completion]:
    """Returns a list of completions. Raises UserError naming one that the models cannot read."""
    from distill.evaluation import scoring
    from distill.runtime import arguments

    what = "Completion, as sample returns"
    completions = arguments.read_items(completions, "completions", what)
    for number, completion in enumerate(completions):
        where = f"completions[{number}]"
        arguments.require(completion, Completion, where, f"a {what}")
        for model in models:
            row = {"tokens": completion.prompt_tokens + completion.tokens}
            scoring.read_token_ids(model, [(where, row)])
    return completions


def _to_row(prompt: Any, number: int) -> dict[str, Any]:
    """Converts a prompt to a row of the file format that `generate` reads."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, list | tuple):
        raise UserError(
            f"prompts[{number}]={reprlib.repr(prompt)}: is no text, list of messages or list of "
            "token ids; a single prompt goes into a list, too: [prompt]"
        )
    is_chat = len(prompt) > 0 and isinstance(prompt[0], dict)
    return {"messages" if is_chat else "tokens": list(prompt)}


class _Package(types.ModuleType):
    """A package whose functions are not replaced by submodules of the same name.

    Importing a verb (`distill.train`, `distill.evaluate`) would otherwise set the attribute of that
    name to the module. `Policy` is imported when it is first read, since its module imports jax.
    """

    def __getattr__(self, name: str) -> Any:
        if name != "Policy":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from distill.policy.policy import Policy

        return Policy

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in ("evaluate", "train")):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
