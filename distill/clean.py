"""python -m distill.clean --data=SOURCE --out=FILE.jsonl [--against=EVAL,EVAL]: a cleaner set.

SOURCE is what a config's data.source may be: a file, hf:..., tfds:.... OUT gets the rows that stay,
as they were. Left out are, in this order: rows that cannot be read, that are too short or too long
or in other scripts, that share --shared or more n-grams of --ngram tokens with the prompt of a row
of --against, and that repeat an earlier row (exactly, up to case and spacing, or nearly: --near).
What a row is compared by: decontamination by its prompt, the rest by prompt and response together.
REPORT gets one line for each pair or row that was found, with what was found.

n-grams of 8 words and symbols, 3 of them shared, are strict: they find every pair of a published
audit of s1K against MATH-500, most of which share no more than a form of words. 13 is what finds
copies. LOG.md has figures.
"""

import collections

import numpy as np
from absl import flags

from distill.data import chat, columns, dedup, sources
from distill.runtime import cli, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
DATA = flags.DEFINE_string("data", None, "The set to clean.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
REPORT = flags.DEFINE_string("report", "", "jsonl of what was left out, and why.", OPTIONS)
AGAINST = flags.DEFINE_list("against", [], "Evaluation sets, by commas.", flag_values=OPTIONS)
COLUMNS = flags.DEFINE_string("columns", "", "As config.data.columns, of --data.", OPTIONS)
NGRAM = flags.DEFINE_integer("ngram", 8, "Tokens in a run.", lower_bound=1, flag_values=OPTIONS)
SHARED = flags.DEFINE_integer(
    "shared", 3, "Shared runs that make a row contaminated.", lower_bound=1, flag_values=OPTIONS
)
NEAR = flags.DEFINE_float(
    "near",
    0.8,
    "Jaccard of 5-grams from which on a row repeats another; above 1: only exact repeats.",
    lower_bound=0.0,
    flag_values=OPTIONS,
)
SCRIPTS = flags.DEFINE_list(
    "scripts",
    [],
    "Such as latin: nine tenths of the letters must be of these.",
    flag_values=OPTIONS,
)
MIN_CHARACTERS = flags.DEFINE_integer("min_characters", 1, "Of a row.", flag_values=OPTIONS)
MAX_CHARACTERS = flags.DEFINE_integer("max_characters", 1_000_000, "Of a row.", flag_values=OPTIONS)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "fail", ["fail", "skip"], "Rows that cannot be read.", flag_values=OPTIONS
)

SCRIPT_SHARE = 0.9  # formulas have Greek letters in the best of English texts

Finding = dict[str, object]


def extract_texts(row: dict, where: str) -> tuple[str, str]:
    """(prompt, prompt and response) of a row of ours.

    Raises:
      UserError: if it has neither in the form of text.
    """
    if "messages" in row:
        turns = chat.parse_messages(row, where, prompt=None)
        said = [
            chat.to_assistant_text(m) if m["role"] == "assistant" else m["content"] for m in turns
        ]
        asked = [m["content"] for m in turns if m["role"] == "user"]
        prompt, whole = "\n".join(asked), "\n".join(said)
    else:
        field = next((f for f in ("question", "prompt", "text") if f in row), None)
        if field is None or not isinstance(row[field], str):
            raise UserError(f"{where}: no messages, question, prompt or text among {sorted(row)}")
        prompt = whole = row[field]
    response = row.get("response") or row.get("solution") or ""
    return prompt, f"{whole}\n{response}" if isinstance(response, str) else whole


def clean_rows(
    rows: sources.Rows,
    against: list[sources.Rows],
    *,
    column_spec: str,
    ngram: int,
    min_shared: int,
    min_jaccard: float,
    scripts: tuple[str, ...],
    character_range: tuple[int, int],
    skip_bad_rows: bool,
) -> tuple[list[int], list[Finding]]:
    """(numbers of the rows that stay, what was found); the options are those of the verb."""
    problems = [
        (other.locate_row(i), _read_texts(other, i, ""))
        for other in against
        for i in range(other.size)
    ]
    eval_index = dedup.NgramIndex((prompt for _, (prompt, _) in problems), ngram)
    kept, findings, first = [], [], {}
    signatures = []
    with run_files.show_progress(rows.size, 0, "clean") as bar:
        for index in range(rows.size):
            bar.update(index + 1, {"kept": len(kept)})
            where = rows.locate_row(index)
            try:
                prompt, whole = _read_texts(rows, index, column_spec)
            except UserError as error:
                if not skip_bad_rows:
                    raise
                findings.append({"row": where, "why": "bad row", "error": str(error)})
                continue
            low, high = character_range
            if not low <= len(whole) <= high:
                findings.append({"row": where, "why": "length", "characters": len(whole)})
                continue
            share = dedup.compute_script_share(whole, scripts) if scripts else 1.0
            if share < SCRIPT_SHARE:
                findings.append({"row": where, "why": "script", "share": round(share, 3)})
                continue
            hits = [
                {"row": where, "why": "contaminated", "of": problems[n][0], "shared": k, "ngram": g}
                for n, (k, g) in sorted(eval_index.find_matches(prompt).items())
                if k >= min(min_shared, eval_index.ngram_counts[n])
            ]
            if hits:
                findings += hits
                continue
            same = first.setdefault(" ".join(dedup.split_tokens(whole)), index)
            if same != index:
                findings.append({"row": where, "why": "duplicate", "of": rows.locate_row(same)})
                continue
            kept.append(index)
            if min_jaccard <= 1:
                signatures.append(dedup.compute_signature(whole))
    if min_jaccard <= 1 and kept:
        repeats = _find_near_duplicates(rows, column_spec, kept, np.array(signatures), min_jaccard)
        findings += repeats.values()
        kept = [index for index in kept if index not in repeats]
    return kept, findings


def _read_texts(rows: sources.Rows, index: int, column_spec: str) -> tuple[str, str]:
    where = rows.locate_row(index)
    return extract_texts(
        columns.canonicalize_row(rows.read_row(index), column_spec, where, False), where
    )


def _find_near_duplicates(
    rows: sources.Rows,
    column_spec: str,
    kept: list[int],
    signatures: np.ndarray,
    min_jaccard: float,
) -> dict[int, Finding]:
    """Number of each row that is nearly an earlier one, and the finding."""
    duplicates: dict[int, Finding] = {}
    for a, b in dedup.find_candidates(signatures):
        earlier, later = kept[a], kept[b]
        if later in duplicates or earlier in duplicates:
            continue
        alike = dedup.compute_jaccard(
            *(_read_texts(rows, i, column_spec)[1] for i in (earlier, later))
        )
        if alike >= min_jaccard:
            duplicates[later] = {
                "row": rows.locate_row(later),
                "why": "near duplicate",
                "of": rows.locate_row(earlier),
                "jaccard": round(alike, 3),
            }
    return duplicates


def main() -> None:
    out = cli.check_output(OUT.value)
    rows = sources.open_rows(DATA.value)
    kept, findings = clean_rows(
        rows,
        [sources.open_rows(name) for name in AGAINST.value],
        column_spec=COLUMNS.value,
        ngram=NGRAM.value,
        min_shared=SHARED.value,
        min_jaccard=NEAR.value,
        scripts=tuple(SCRIPTS.value),
        character_range=(MIN_CHARACTERS.value, MAX_CHARACTERS.value),
        skip_bad_rows=ON_BAD_ROW.value == "skip",
    )
    if REPORT.value:
        run_files.write_jsonl(REPORT.value, findings)
    run_files.write_jsonl(out, (rows.read_row(index) for index in kept))
    counts = collections.Counter({f["row"]: f["why"] for f in findings}.values())
    reasons = ", ".join(f"{count} {why}" for why, count in counts.most_common()) or "none left out"
    run_files.log_line(f"{rows.name}: {len(kept)} of {rows.size} rows stay; {reasons}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
