"""python -m distill.clean --data=SOURCE --out=FILE.jsonl [--against=EVAL,EVAL]: a cleaner set.

SOURCE is anything that a config's data.source may be: a file, hf:..., tfds:.... OUT receives the
rows that stay, unchanged. Left out are, in this order: rows that cannot be read, that are too short
or too long or in other scripts, that share --shared or more n-grams of --ngram tokens with the
prompt of a row of --against, and that repeat an earlier row (exactly, up to case and spacing, or
nearly: --near). Decontamination compares prompts, the rest prompt and response together. REPORT
receives one line for each row or pair found, with what was found.

n-grams of 8 words and symbols, 3 of them shared, are strict: they find every pair of a published
audit of s1K against MATH-500, most of which share only their phrasing. 13 finds copies. LOG.md has
figures.
"""

from absl import flags

from distill.data import cleaning
from distill.runtime import cli

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


def main() -> None:
    rules = cleaning.Rules(
        columns=COLUMNS.value,
        ngram=NGRAM.value,
        min_shared=SHARED.value,
        min_jaccard=NEAR.value,
        scripts=tuple(SCRIPTS.value),
        min_characters=MIN_CHARACTERS.value,
        max_characters=MAX_CHARACTERS.value,
        skip_bad_rows=ON_BAD_ROW.value == "skip",
    )
    cleaning.clean_file(DATA.value, AGAINST.value, rules, OUT.value, REPORT.value)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
