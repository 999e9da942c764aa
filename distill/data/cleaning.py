"""Finds the rows of a training set to leave out: unreadable, unsuitable, contaminated, repeated."""

import collections
import dataclasses

import numpy as np
from etils import epath

from distill.data import chat, columns, dedup, sources, values
from distill.runtime import run_files
from models.errors import UserError

SCRIPT_SHARE = 0.9  # even English texts have formulas with Greek letters

Finding = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which rows to leave out; the flags of `clean` say what each means."""

    columns: str = ""
    ngram: int = 8
    min_shared: int = 3
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
    kept, findings = find_clean_rows(rows, [sources.open_rows(name) for name in against], rules)
    if report:
        run_files.write_jsonl(report, findings)
    run_files.write_jsonl(out, (rows.read_row(index) for index in kept))
    counts = collections.Counter({f["row"]: f["why"] for f in findings}.values())
    reasons = ", ".join(f"{count} {why}" for why, count in counts.most_common()) or "none left out"
    run_files.log_line(f"{rows.name}: {len(kept)} of {rows.size} rows stay; {reasons}")


def find_clean_rows(
    rows: sources.Rows, against: list[sources.Rows], rules: Rules
) -> tuple[list[int], list[Finding]]:
    """Returns the indices of the rows that stay, and a finding for each row or pair that does not.

    Raises:
      UserError: naming a row that cannot be read, unless rules.skip_bad_rows.
    """
    problem_names, prompts = [], []
    for problems in against:
        for index in range(problems.size):
            problem_names.append(problems.locate_row(index))
            prompts.append(_read_texts(problems, index, "")[0])
    eval_index = dedup.NgramIndex(prompts, rules.ngram)
    kept: list[int] = []
    findings: list[Finding] = []
    signatures, first_indices = [], {}
    with run_files.show_progress(rows.size, 0, "clean") as bar:
        for index in range(rows.size):
            bar.update(index + 1, {"kept": len(kept)})
            try:
                prompt, text = _read_texts(rows, index, rules.columns)
            except UserError as error:
                if not rules.skip_bad_rows:
                    raise
                faults: list[Finding] = [{"why": "bad row", "error": str(error)}]
            else:
                faults = _find_unsuitable(text, rules)
                faults = faults or _find_contaminated(prompt, problem_names, eval_index, rules)
                if not faults:
                    first = first_indices.setdefault(" ".join(dedup.split_tokens(text)), index)
                    if first != index:
                        faults = [{"why": "duplicate", "of": rows.locate_row(first)}]
            findings += [{"row": rows.locate_row(index), **fault} for fault in faults]
            if not faults:
                kept.append(index)
                if rules.min_jaccard <= 1:
                    signatures.append(dedup.compute_signature(text))
    if signatures:
        repeats = _find_near_duplicates(rows, rules, kept, np.array(signatures))
        findings += repeats.values()
        kept = [index for index in kept if index not in repeats]
    return kept, findings


def _find_unsuitable(text: str, rules: Rules) -> list[Finding]:
    if not rules.min_characters <= len(text) <= rules.max_characters:
        return [{"why": "length", "characters": len(text)}]
    share = dedup.compute_script_share(text, rules.scripts) if rules.scripts else 1.0
    return [{"why": "script", "share": round(share, 3)}] if share < SCRIPT_SHARE else []


def _find_contaminated(
    prompt: str, problem_names: list[str], eval_index: dedup.NgramIndex, rules: Rules
) -> list[Finding]:
    return [
        {"why": "contaminated", "of": problem_names[number], "shared": shared, "ngram": ngram}
        for number, (shared, ngram) in sorted(eval_index.find_matches(prompt).items())
        if shared >= min(rules.min_shared, eval_index.ngram_counts[number])
    ]


def _find_near_duplicates(
    rows: sources.Rows, rules: Rules, kept: list[int], signatures: np.ndarray
) -> dict[int, Finding]:
    """Returns a finding for the index of each kept row that nearly repeats an earlier one."""
    repeats: dict[int, Finding] = {}
    for a, b in dedup.find_candidates(signatures):
        earlier, later = kept[a], kept[b]
        if later in repeats or earlier in repeats:
            continue
        texts = [_read_texts(rows, index, rules.columns)[1] for index in (earlier, later)]
        jaccard = dedup.compute_jaccard(*texts)
        if jaccard >= rules.min_jaccard:
            repeats[later] = {
                "row": rows.locate_row(later),
                "why": "near duplicate",
                "of": rows.locate_row(earlier),
                "jaccard": round(jaccard, 3),
            }
    return repeats


def _read_texts(rows: sources.Rows, index: int, column_spec: str) -> tuple[str, str]:
    where = rows.locate_row(index)
    row = columns.canonicalize_row(rows.read_row(index), column_spec, where, False)
    return extract_texts(row, where)


def extract_texts(row: dict, where: str) -> tuple[str, str]:
    """Returns (prompt, prompt and response) of a canonical row.

    Raises:
      UserError: if it has no prompt in the form of text.
    """
    if "messages" in row:
        messages = chat.parse_messages(row, where, prompt=None)
        prompt = "\n".join(m["content"] for m in messages if m["role"] == "user")
        text = "\n".join(
            chat.to_assistant_text(m) if m["role"] == "assistant" else m["content"]
            for m in messages
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
