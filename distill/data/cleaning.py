"""Finds the rows of a training set to leave out: unreadable, unsuitable, contaminated, repeated."""

import collections
import dataclasses
from array import array
from collections.abc import Iterator

import numpy as np
from etils import epath

from distill.data import canonical, dedup, sources, values
from distill.data.messages import parse_messages, to_assistant_text
from distill.runtime import run_files
from distill.runtime.progress import show_progress
from models.errors import UserError

# So many n-grams in common are no phrase, however small their share of the problem, which may have
# the code of a figure that the row lacks.
MANY_SHARED = 24
SCRIPT_SHARE = 0.9  # even English texts have formulas with Greek letters

Finding = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which rows to leave out; the flags of `clean` say what each means."""

    columns: str = ""
    ngram: int = 8
    min_shared: int = 3
    min_share: float = 0.2
    min_jaccard: float = 0.8  # above 1: exact repeats only
    scripts: tuple[str, ...] = ()
    min_characters: int = 1
    max_characters: int = 1_000_000
    skip_bad_rows: bool = False


def clean_file(
    source: str,
    against: list[str],
    rules: Rules,
    out: epath.PathLike,
    report: epath.PathLike | None,
) -> None:
    """Writes the rows of `source` that stay to `out` as jsonl, and the findings to `report`."""
    rows = sources.open_rows(source)
    is_kept, counts = np.ones(rows.size, bool), collections.Counter()

    def apply_findings() -> Iterator[Finding]:
        faulty_rows = find_faulty_rows(rows, [sources.open_rows(name) for name in against], rules)
        for index, finding in faulty_rows:
            counts[finding["why"]] += is_kept[index]
            is_kept[index] = False
            yield {"row": rows.locate_row(index), **finding}

    if report:
        run_files.write_jsonl(report, apply_findings())
    else:
        collections.deque(apply_findings(), maxlen=0)
    run_files.write_jsonl(out, (rows.read_row(int(i)) for i in np.nonzero(is_kept)[0]))
    reasons = ", ".join(f"{count} {why}" for why, count in counts.most_common()) or "none left out"
    run_files.log_line(f"{rows.name}: {is_kept.sum()} of {rows.size} rows stay; {reasons}")


def find_faulty_rows(
    rows: sources.Rows, against: list[sources.Rows], rules: Rules
) -> Iterator[tuple[int, Finding]]:
    """Yields (index, finding) for each reason to leave a row out; a row may have several.

    Holds the number, the digest and the signature of a row (88 bytes), but not its text.

    Raises:
      UserError: naming a row that cannot be read, unless rules.skip_bad_rows.
    """
    ends = np.cumsum([problems.size for problems in against])
    eval_index = dedup.NgramIndex(_iter_prompts(against), rules.ngram)
    indices, digests, signatures = array("q"), bytearray(), bytearray()
    with show_progress(rows.size, 0, "clean", is_minor=True) as bar:
        for index in range(rows.size):
            bar.update(index + 1, f"kept {len(indices):,}")
            try:
                prompt, text = _read_texts(rows, index, rules.columns)
            except UserError as error:
                if not rules.skip_bad_rows:
                    raise
                yield index, {"why": "bad row", "error": str(error)}
                continue
            findings = _find_unsuitable(text, rules) or [
                *_find_contaminated(prompt, against, ends, eval_index, rules)
            ]
            yield from ((index, finding) for finding in findings)
            if findings:
                continue
            words = dedup.split_tokens(text)
            indices.append(index)
            digests += dedup.compute_digest(words)
            if rules.min_jaccard <= 1:
                signatures += dedup.compute_signature(words).tobytes()
    digests_N = np.frombuffer(digests, np.uint8).reshape(-1, dedup.DIGEST_BYTES)
    firsts = dedup.find_firsts(digests_N)
    del digests, digests_N  # a fifth of what is held
    yield from _find_repeats(rows, rules, np.frombuffer(indices, np.int64), firsts, signatures)


def _find_unsuitable(text: str, rules: Rules) -> list[Finding]:
    if not rules.min_characters <= len(text) <= rules.max_characters:
        return [{"why": "length", "characters": len(text)}]
    share = dedup.compute_script_share(text, rules.scripts) if rules.scripts else 1.0
    return [{"why": "script", "share": round(share, 3)}] if share < SCRIPT_SHARE else []


def _iter_prompts(against: list[sources.Rows]) -> Iterator[str]:
    for problems in against:
        for index in range(problems.size):
            yield _read_texts(problems, index, "")[0]


def _find_contaminated(
    prompt: str,
    against: list[sources.Rows],
    ends: np.ndarray,
    eval_index: dedup.NgramIndex,
    rules: Rules,
) -> Iterator[Finding]:
    for number, (shared, ngram, share) in sorted(eval_index.find_matches(prompt).items()):
        is_phrase = share < rules.min_share and shared < MANY_SHARED
        if shared >= min(rules.min_shared, eval_index.ngram_counts[number]) and not is_phrase:
            file = int(np.searchsorted(ends, number, "right"))
            name = against[file].locate_row(number - int(ends[file]) + against[file].size)
            finding = {"why": "contaminated", "of": name, "shared": shared, "ngram": ngram}
            yield {**finding, "share": round(share, 3)}


def _find_repeats(
    rows: sources.Rows,
    rules: Rules,
    indices: np.ndarray,
    firsts: np.ndarray,
    signatures: bytearray,
) -> Iterator[tuple[int, Finding]]:
    """Yields a finding for each row of `indices` that repeats an earlier one, exactly (then it is
    not its own in `firsts`) or nearly."""
    numbers = np.arange(len(indices))
    for number in np.nonzero(firsts != numbers)[0]:
        first = rows.locate_row(int(indices[firsts[number]]))
        yield int(indices[number]), {"why": "duplicate", "of": first}
    if not signatures:
        return
    numbers = numbers[firsts == numbers]
    signatures_N = np.frombuffer(signatures, np.uint32).reshape(-1, dedup.BANDS)
    is_repeat = np.zeros(len(numbers), bool)
    for a, b in dedup.find_candidates(band[numbers] for band in signatures_N.T):
        if is_repeat[a] or is_repeat[b]:
            continue
        earlier, later = (int(indices[numbers[i]]) for i in (a, b))
        texts = [_read_texts(rows, index, rules.columns)[1] for index in (earlier, later)]
        jaccard = dedup.compute_jaccard(*texts)
        if jaccard >= rules.min_jaccard:
            is_repeat[b] = True
            why, of = "near duplicate", rows.locate_row(earlier)
            yield later, {"why": why, "of": of, "jaccard": round(jaccard, 3)}


def _read_texts(rows: sources.Rows, index: int, column_spec: str) -> tuple[str, str]:
    where = rows.locate_row(index)
    row = rows.read_row(index)
    prompt_row = canonical.canonicalize_row(row, column_spec, where, False)
    try:
        row = canonical.canonicalize_row(row, column_spec, where, True)
    except UserError:  # a prompt is enough
        row = prompt_row
    return extract_texts(prompt_row, where)[0], extract_texts(row, where)[1]


def extract_texts(row: dict, where: str) -> tuple[str, str]:
    """Returns (prompt, prompt and response) of a canonical row.

    Raises:
      UserError: if it has no prompt in the form of text.
    """
    if "messages" in row:
        messages = parse_messages(row, where, prompt=None)
        prompt = "\n".join(m["content"] for m in messages if m["role"] == "user")
        text = "\n".join(
            to_assistant_text(m) if m["role"] == "assistant" else m["content"] for m in messages
        )
    else:
        field = next((f for f in ("question", "prompt", "text") if f in row), None)
        if field is None or not isinstance(row[field], str):
            raise UserError(f"{where}: no messages, question, prompt or text among {sorted(row)}")
        prompt = text = row[field]
        values.require_characters(text, f"{where}: {field}")
    response = row.get("response") or row.get("solution") or ""
    values.require_characters(response, f"{where}: response")
    return prompt, f"{text}\n{response}" if isinstance(response, str) else text
