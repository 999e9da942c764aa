"""Adapts a policy to lm-eval's model interface.

Needs lm-eval: `pip install -r requirements-eval.txt`.
"""

import dataclasses
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval import tasks, utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

from distill import rollout
from distill.data import chat
from distill.data.template import describe_template
from distill.evaluation import scoring
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime.progress import show_progress
from models.errors import UserError

_SAMPLING_OPTIONS = {"temperature", "top_k", "top_p"}
_HANDLED_OPTIONS = {"until", "max_gen_toks", "do_sample"}


class PolicyLM(TemplateLM):
    """A loaded policy behind lm-eval's model interface. Call methods within `policy.use(subject)`.

    Log-likelihoods, in nats, come from `scoring.score_sequences`; generations from the sampler, cut
    at the first stop string.
    """

    def __init__(self, subject: Policy, batch_size: int, thinking: bool, seed: int = 0) -> None:
        super().__init__()
        if subject.tokenizer is None or subject.tokenizer.eos_token_id is None:
            raise UserError(f"{subject.path}: no tokenizer with an eos_token")
        self._subject = subject
        self._thinking = thinking
        self._spec = rollout.SampleSpec(seed=seed, batch_size=batch_size)
        self.tokenizer: Any = subject.tokenizer
        self.max_length = subject.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders the prompt as text; add_generation_prompt=False leaves its last turn open.

        Raises UserError if it is not to think, but the template opens a think block in all prompts.
        """
        if not self._thinking and describe_template(self.tokenizer).always_thinks:
            raise UserError(
                f"{self._subject.path}: the chat template opens a think block in every prompt, so "
                "its only mode is thinking"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self._thinking,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text without special tokens: Qwen's tokenizers add none."""
        return chat.encode(self.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns (sum of log-probabilities, all tokens are the most likely) of each continuation.

        Sequences longer than the model's context are cut at their beginning.
        """
        rows = [
            ((before + after)[-(self.max_length + 1) :], after) for _, before, after in requests
        ]
        # Longest first, since the rows of a batch are padded to the longest.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        scored = scoring.score_sequences(
            self._subject, [rows[i][0] for i in order], batch_size=self._spec.batch_size, top_k=1
        )
        with show_progress(len(rows), 0, "loglikelihood") as bar:
            for number, (i, (logprobs, top)) in enumerate(zip(order, scored, strict=True)):
                ids, after = rows[i]
                start = max(1, len(ids) - len(after))
                positions = range(start, len(ids))
                results[i] = (
                    sum(logprobs[t] or 0.0 for t in positions),
                    all(top[t] is not None and top[t][0][0] == ids[t] for t in positions),  # type: ignore[index]
                )
                bar.update(number + 1)
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Computes log-likelihoods of whole texts, in windows that overlap as far as they fit."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(window)) for window in rolling]
            owner += [number] * (len(windows) - len(owner))
        totals = [0.0] * len(requests)
        if windows:
            for number, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
                totals[number] += logp
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Generates continuations, each up to its first stop string.

        Raises UserError for a sampling option that the sampler does not support.
        """
        texts = [""] * len(requests)
        for gen_kwargs in {repr(request.args[1]): request.args[1] for request in requests}.values():
            members = [i for i, request in enumerate(requests) if request.args[1] == gen_kwargs]
            options = normalize_gen_kwargs(gen_kwargs)
            unknown = (
                {k for k, v in options.items() if v is not None}
                - _SAMPLING_OPTIONS
                - _HANDLED_OPTIONS
            )
            if unknown:
                raise UserError(f"generation_kwargs: no {', '.join(sorted(unknown))} here")
            max_new_tokens = options["max_gen_toks"]
            max_prompt_tokens = self.max_length - max_new_tokens
            if max_prompt_tokens < 1:
                raise UserError(
                    f"generation_kwargs: max_gen_toks={max_new_tokens}, but the model has "
                    f"{self.max_length} positions"
                )
            spec = dataclasses.replace(
                self._spec,
                max_new_tokens=max_new_tokens,
                sampling=rollout.Sampling(
                    **{k: options[k] for k in _SAMPLING_OPTIONS & options.keys()}
                ),
            )
            contexts = [self.tok_encode(requests[i].args[0])[-max_prompt_tokens:] for i in members]
            completions = rollout.complete(
                self._subject,
                [ids or [self.prefix_token_id] for ids in contexts],
                spec,
            )
            with show_progress(len(members), 0, "generate_until") as bar:
                for number, (i, (completion,)) in enumerate(zip(members, completions, strict=True)):
                    text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
                    for stop in filter(None, options.get("until") or ()):
                        text = text.split(stop)[0]
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(number + 1)
        return texts


def run_tasks(
    subject: Policy,
    task_names: list[str],
    *,
    batch_size: int,
    chat_mode: str = "off",
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs lm-eval's tasks and returns its results, including the samples.

    Raises UserError for a task that lm-eval does not know.
    """
    manager = tasks.TaskManager(include_path=include_path)
    unknown = sorted(set(task_names) - set(manager.all_tasks))
    if unknown:
        raise UserError(f"--tasks: lm-eval knows no {unknown[0]!r}")
    with policy.use(subject):
        results = lm_eval.simple_evaluate(
            model=PolicyLM(subject, batch_size, chat_mode == "thinking"),
            tasks=task_names,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_mode != "off",
            task_manager=manager,
        )
    assert results is not None
    return dict(results)
