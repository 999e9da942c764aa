"""Samples completions of rows and files of prompts from a model behind a server."""

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from etils import epath

from distill.data import sources
from distill.rollout.completions import SampleSpec, get_max_new_tokens
from distill.rollout.served_model import (
    Completion,
    Prompt,
    RequestSettings,
    ServedModel,
    find_row_error,
)
from distill.runtime import run_files
from distill.runtime.progress import show_progress
from models.errors import RowError, SourceFailure, UserError

_WAITING = 8  # responses that wait in memory for an earlier one, times those in flight

Group = list[Completion] | str  # the completions of a row, or why it has none


def make_request_settings(
    spec: SampleSpec, thinking: bool, logprobs: bool = False
) -> RequestSettings:
    """Returns the settings of all requests of a job.

    Log-probabilities are asked for only where all servers mean the same by them: those of the
    distribution that tokens are drawn from, and the model's own, are one if nothing is cut off.
    """
    s = spec.sampling
    is_own = not (s.top_k or s.min_p or s.presence_penalty) and s.top_p == 1
    is_own &= s.temperature in (0, 1)
    return RequestSettings(s, spec.seed, thinking, spec.stop_strings, logprobs and is_own)


def complete(
    model: ServedModel,
    requests: Iterable[tuple[int, Prompt | None, int]],
    spec: SampleSpec,
    settings: RequestSettings,
) -> Iterator[Group]:
    """Yields `spec.samples` completions for each request, in order; or why a row cannot have them.

    Many are in flight: later ones are asked for while an earlier one is waited for, up to a bound.

    Args:
      requests: of each row its number, its prompt (None: it has none, and gets nothing), and the
        limit of new tokens.
    """
    waiting: deque[list[Future[Completion]]] = deque()
    max_waiting = _WAITING * spec.batch_size

    def pop_groups(limit: int) -> Iterator[Group]:
        while waiting and (
            len(waiting) * spec.samples > limit or all(f.done() for f in waiting[0])
        ):
            yield _wait_for_group(waiting.popleft())

    for number, prompt, limit in requests:
        samples = range(spec.samples if prompt else 0)
        waiting.append(
            [model.submit(prompt, settings, limit, number, i) for i in samples] if prompt else []
        )
        yield from pop_groups(max_waiting)
    yield from pop_groups(-1)


def _wait_for_group(futures: list[Future[Completion]]) -> Group:
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if find_row_error(error) is None:
            raise error
    return str(find_row_error(errors[0])) if errors else [f.result() for f in futures]


def generate_rows(
    model: ServedModel,
    rows: sources.Rows,
    spec: SampleSpec,
    settings: RequestSettings,
    *,
    errors: dict[int, str],
    first: int = 0,
) -> Iterator[dict]:
    """Yields each row from number `first` on with its `prompt_tokens` and `samples`.

    Where the server gives no ids, `tokens` and `prompt_tokens` are null; then a row without
    thinking says so (`thinking`), since its prompt does not.

    Args:
      errors: row number → error. Rows that fail here are added. Such a row gets an `error` and no
        samples.
    """

    def make_requests() -> Iterator[tuple[int, Prompt | None, int]]:
        for number in range(first, len(rows)):
            where, row = rows.locate_row(number), rows.read_row(number)
            limit = get_max_new_tokens(row, where, spec.max_new_tokens)
            is_good = number not in errors
            prompt = model.make_prompt(row, where, settings.thinking, limit) if is_good else None
            yield number, prompt, limit

    groups = complete(model, make_requests(), spec, settings)
    with show_progress(len(rows), first, "generate", spec.batch_size) as bar:
        for number, group in enumerate(groups, start=first):
            row = rows.read_row(number)
            if isinstance(group, str):
                errors[number] = f"{rows.locate_row(number)}: {group}"
            if isinstance(group, str) or not group:
                yield {**row, "prompt_tokens": None, "samples": [], "error": errors[number]}
            else:
                is_text = any(c.tokens is None for c in group) and not {"tokens", "prompt"} & {*row}
                mode = {"thinking": False} if is_text and not settings.thinking else {}
                ids = group[0].prompt_tokens
                yield {
                    **row,
                    **mode,
                    "prompt_tokens": ids,
                    "samples": [_format_completion(c) for c in group],
                }
            bar.update(number + 1)


def _format_completion(c: Completion) -> dict:
    row = {"tokens": c.tokens, "text": c.text, "logprobs": c.logprobs}
    return {**row, "finish_reason": c.finish_reason}


def generate_file(
    model: ServedModel, rows: sources.Rows, spec: SampleSpec, thinking: bool, path: epath.Path
) -> dict[int, str]:
    """Completes the rows and writes them to `path`, as `completions.generate_file` does.

    Resumes an earlier call for `path`. Returns the errors of rows by number.

    Raises:
      SourceFailure: if the server cannot be reached any more; what is finished is kept.
      UserError: if an earlier call had other arguments, or no row can be completed.
    """
    settings = make_request_settings(spec, thinking, logprobs=True)
    model.check_settings(settings)
    prompts_hash, errors, forms = hashlib.sha256(), {}, {}
    for number, (where, row) in enumerate(rows):
        limit = get_max_new_tokens(row, where, spec.max_new_tokens)
        try:
            prompt = model.make_prompt(row, where, thinking, limit)
            forms.setdefault((prompt.path, prompt.ids is None), prompt)
        except RowError as error:
            errors[number] = str(error)
        prompts_hash.update(f"{', ' if number else '['}{run_files.to_json(row)}".encode())
    prompts_hash.update(b"]")  # of all rows as one JSON list
    if len(errors) == len(rows):
        raise UserError(errors[0])
    for prompt in forms.values():
        model.check_answers(prompt, settings)
    first = run_files.resume_jsonl(
        path,
        {
            **model.describe(),
            "prompts_sha256": prompts_hash.hexdigest(),
            "max_new_tokens": spec.max_new_tokens,
            **dataclasses.asdict(spec.sampling),
            "stop": spec.stop_strings,
            "samples": spec.samples,
            "seed": spec.seed,
            "thinking": "on" if thinking else "off",
        },
    )
    try:
        results = generate_rows(model, rows, spec, settings, errors=errors, first=first)
        run_files.extend_jsonl(path, results)
    except SourceFailure as error:
        raise SourceFailure(f"{error}; {run_files.describe_finished(path)}") from error
    if first:  # an earlier call met errors too
        errors |= _read_errors(path)
    return errors


def _read_errors(path: epath.Path) -> dict[int, str]:
    with path.open() as file:
        written = enumerate(map(json.loads, file))
        return {i: row["error"] for i, row in written if "error" in row and not row["samples"]}
