"""Lists the verbs, or runs one: python -m distill VERB [--flag=value ...].

`python -m distill train ...` is `python -m distill.train ...`.
"""

import runpy
import sys

from models.errors import suggest

# In the order in which a user meets them.
VERBS = {
    "quickstart": "distils a tiny teacher into a tiny student, in minutes on a CPU",
    "plan": "memory and speed of a run on TPUs or GPUs that need not be there",
    "diagnose": "whether a run is worth starting, from samples of its own prompts",
    "train": "trains a student; with --check, only says what is wrong",
    "chat": "talks with a model or a run",
    "generate": "samples responses to prompts",
    "score": "log-probabilities of given tokens",
    "serve": "an OpenAI-compatible server, and a teacher for runs elsewhere",
    "evaluate": "measures a model on a benchmark",
    "compare": "compares evaluations, paired by problem",
    "report": "one page of curves, tables and transcripts of runs and evaluations",
    "harness": "runs tasks of lm-eval",
    "verify": "grades samples and keeps the correct ones, for training",
    "clean": "filters and decontaminates data",
    "export": "writes a run as a Hugging Face directory",
}


def main(arguments: list[str]) -> int:
    """Runs the verb that is named first, or lists all; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print("python -m distill VERB --flag=value ...; VERB --help explains one\n")
        print("\n".join(f"  {verb:{width}}  {about}" for verb, about in VERBS.items()))
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        hint = suggest(verb, VERBS) or f"; verbs are {', '.join(VERBS)}"
        print(f"error: {verb}: no such verb{hint}", file=sys.stderr)
        return 2
    sys.argv = [f"distill.{verb}", *arguments[1:]]
    runpy.run_module(f"distill.{verb}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
