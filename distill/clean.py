"""python -m distill.clean --data=SOURCE --out=FILE.jsonl [--against=EVAL,EVAL]: cleans data.

SOURCE is anything that a config's data.source may be: a file, hf:..., tfds:.... OUT receives the
remaining rows, unchanged. Rows are removed if they, in this order: cannot be read; are too short,
too long or in other scripts; share --shared or more n-grams of --ngram tokens with the prompt of a
row of --against, and with them --min_share of all that this prompt has (or 24); repeat an earlier
row (exactly, up to case and spacing, or nearly: see --near).
Decontamination compares prompts only; the other filters read prompt and response together. REPORT
receives one line per removed row or matching pair, with the reason.

A token is a word, a number or a symbol; in scripts without spaces between words (Chinese, Japanese,
Thai, Lao, Khmer, ...) it is a character. A problem of m < --ngram tokens must be in the prompt as a
whole, and the prompt have at most 3^(m - 1) tokens: "2+2?" (4) is found in "What is 2+2?", not
somewhere in a page. Memory holds about 90 bytes of a row, not its text.

A few n-grams in common are often a phrase ("$ , where $ m $ and $ n $ are relatively prime"), so
--min_share asks for a fifth of the problem. With --min_share=0 a phrase suffices, which drops
twelve times as many rows of s1K against MATH-500, and finds no more of 500 rewritten problems
(LOG.md).
"""

import contextlib

from absl import flags

from distill.runtime import cli, console, paths

OPTIONS = flags.FlagValues()
DATA = flags.DEFINE_string("data", None, "Data set to clean.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
REPORT = flags.DEFINE_string("report", "", "jsonl of removed rows and reasons.", OPTIONS)
AGAINST = flags.DEFINE_list("against", [], "Evaluation sets, comma-separated.", flag_values=OPTIONS)
COLUMNS = flags.DEFINE_string("columns", "", "Like config.data.columns, for --data.", OPTIONS)
NGRAM = flags.DEFINE_integer("ngram", 8, "Tokens of an n-gram.", lower_bound=1, flag_values=OPTIONS)
SHARED = flags.DEFINE_integer(
    "shared", 3, "Shared n-grams that make a row contaminated.", lower_bound=1, flag_values=OPTIONS
)
MIN_SHARE = flags.DEFINE_float(
    "min_share",
    0.2,
    "Share of a problem's n-grams that makes a row contaminated; 0: --shared of them suffice.",
    0.0,
    1.0,
    flag_values=OPTIONS,
)
NEAR = flags.DEFINE_float(
    "near",
    0.8,
    "Least Jaccard similarity of 5-grams of near-duplicates; above 1: only exact duplicates.",
    lower_bound=0.0,
    flag_values=OPTIONS,
)
SCRIPTS = flags.DEFINE_list(
    "scripts",
    [],
    "Scripts, such as latin, that must make up nine tenths of a row's letters.",
    flag_values=OPTIONS,
)
MIN_CHARACTERS = flags.DEFINE_integer(
    "min_characters", 1, "Minimum length of a row.", flag_values=OPTIONS
)
MAX_CHARACTERS = flags.DEFINE_integer(
    "max_characters", 1_000_000, "Maximum length of a row.", flag_values=OPTIONS
)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "fail", ["fail", "skip"], "On rows that cannot be read.", flag_values=OPTIONS
)


def main() -> None:
    from distill.data import cleaning
    from distill.runtime import outputs

    rules = cleaning.Rules(
        columns=COLUMNS.value,
        ngram=NGRAM.value,
        min_shared=SHARED.value,
        min_share=MIN_SHARE.value,
        min_jaccard=NEAR.value,
        scripts=tuple(SCRIPTS.value),
        min_characters=MIN_CHARACTERS.value,
        max_characters=MAX_CHARACTERS.value,
        skip_bad_rows=ON_BAD_ROW.value == "skip",
    )
    inputs = (DATA.value, *AGAINST.value)
    out, report = paths.check_output(OUT.value, *inputs), None
    if REPORT.value:
        report = paths.check_output(REPORT.value, *inputs, OUT.value, flag="--report")
    with contextlib.ExitStack() as owned:
        owned.enter_context(outputs.own_output(out, "clean", OPTIONS))
        if report:
            owned.enter_context(outputs.own_output(report, "clean", OPTIONS, "--report"))
        cleaning.clean_file(DATA.value, AGAINST.value, rules, out, report)
    made = [f"wrote {OUT.value}"]
    made += (
        [f"wrote {REPORT.value}: a line for each row left out, with the reason"] if report else []
    )
    console.print_end(made, [console.format_sft_command(OUT.value)])


if __name__ == "__main__":
    cli.run(main, OPTIONS)
