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


def texts(row: dict, where: str) -> tuple[str, str]:
    """(prompt, prompt and response) of a row of ours.

    Raises:
      UserError: if it has neither in the form of text.
    """
    if "messages" in row:
        turns = chat.parse_messages(row, where, prompt=None)
        said = [chat.spoken(m) if m["role"] == "assistant" else m["content"] for m in turns]
        asked = [m["content"] for m in turns if m["role"] == "user"]
        prompt, whole = "\n".join(asked), "\n".join(said)
    else:
        field = next((f for f in ("question", "prompt", "text") if f in row), None)
        if field is None or not isinstance(row[field], str):
            raise UserError(f"{where}: no messages, question, prompt or text among {sorted(row)}")
        prompt = whole = row[field]
    response = row.get("response") or row.get("solution") or ""
    return prompt, f"{whole}\n{response}" if isinstance(response, str) else whole


def clean(
    rows: sources.Rows,
    against: list[sources.Rows],
    *,
    names: str,
    ngram: int,
    shared: int,
    near: float,
    scripts: tuple[str, ...],
    characters: tuple[int, int],
    skip: bool,
) -> tuple[list[int], list[Finding]]:
    """(numbers of the rows that stay, what was found); the options are those of the verb."""
    problems = [
        (other.where(i), _read(other, i, "")) for other in against for i in range(other.size)
    ]
    evaluation = dedup.Evaluation((prompt for _, (prompt, _) in problems), ngram)
    kept, findings, first = [], [], {}
    signatures = []
    with run_files.progress(rows.size, 0, "clean") as bar:
        for index in range(rows.size):
            bar.update(index + 1, {"kept": len(kept)})
            where = rows.where(index)
            try:
                prompt, whole = _read(rows, index, names)
            except UserError as error:
                if not skip:
                    raise
                findings.append({"row": where, "why": "bad row", "error": str(error)})
                continue
            low, high = characters
            if not low <= len(whole) <= high:
                findings.append({"row": where, "why": "length", "characters": len(whole)})
                continue
            share = dedup.script_share(whole, scripts) if scripts else 1.0
            if share < SCRIPT_SHARE:
                findings.append({"row": where, "why": "script", "share": round(share, 3)})
                continue
            hits = [
                {"row": where, "why": "contaminated", "of": problems[n][0], "shared": k, "ngram": g}
                for n, (k, g) in sorted(evaluation.matches(prompt).items())
                if k >= min(shared, evaluation.sizes[n])
            ]
            if hits:
                findings += hits
                continue
            same = first.setdefault(" ".join(dedup.tokens(whole)), index)
            if same != index:
                findings.append({"row": where, "why": "duplicate", "of": rows.where(same)})
                continue
            kept.append(index)
            if near <= 1:
                signatures.append(dedup.signature(whole))
    if near <= 1 and kept:
        repeats = _repeats(rows, names, kept, np.array(signatures), near)
        findings += repeats.values()
        kept = [index for index in kept if index not in repeats]
    return kept, findings


def _read(rows: sources.Rows, index: int, names: str) -> tuple[str, str]:
    where = rows.where(index)
    return texts(columns.canonical(rows.row(index), names, where, False), where)


def _repeats(
    rows: sources.Rows, names: str, kept: list[int], signatures: np.ndarray, near: float
) -> dict[int, Finding]:
    """Number of each row that is nearly an earlier one, and the finding."""
    found: dict[int, Finding] = {}
    for a, b in dedup.candidates(signatures):
        earlier, later = kept[a], kept[b]
        if later in found or earlier in found:
            continue
        alike = dedup.jaccard(*(_read(rows, i, names)[1] for i in (earlier, later)))
        if alike >= near:
            found[later] = {
                "row": rows.where(later),
                "why": "near duplicate",
                "of": rows.where(earlier),
                "jaccard": round(alike, 3),
            }
    return found


def main() -> None:
    out = cli.output(OUT.value)
    rows = sources.open_rows(DATA.value)
    kept, findings = clean(
        rows,
        [sources.open_rows(name) for name in AGAINST.value],
        names=COLUMNS.value,
        ngram=NGRAM.value,
        shared=SHARED.value,
        near=NEAR.value,
        scripts=tuple(SCRIPTS.value),
        characters=(MIN_CHARACTERS.value, MAX_CHARACTERS.value),
        skip=ON_BAD_ROW.value == "skip",
    )
    if REPORT.value:
        run_files.write_jsonl(REPORT.value, findings)
    run_files.write_jsonl(out, (rows.row(index) for index in kept))
    counts = collections.Counter({f["row"]: f["why"] for f in findings}.values())
    reasons = ", ".join(f"{count} {why}" for why, count in counts.most_common()) or "none left out"
    run_files.say(f"{rows.name}: {len(kept)} of {rows.size} rows stay; {reasons}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
