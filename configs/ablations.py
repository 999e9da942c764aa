"""Prints the commands of a study, one a line: python configs/ablations.py STUDY [tiny]

    python configs/ablations.py divergence | while read -r run; do $run; done
    python configs/ablations.py rank tiny | head -1

Each run has its own directory, runs/STUDY/NAME. Without arguments it lists the studies.
"""

import sys

SIZES = ("0.6b", "1.7b", "4b", "8b", "14b", "30b-a3b")
CONDITIONS = (
    *("baseline", "sft_traces", "re_distill", "grpo_only", "sft_then_grpo"),
    *("opd", "sft_then_opd"),
)
Runs = dict[str, tuple[str, str]]  # name -> (recipe and argument, flags)


def _make_opd_runs(**changes: str) -> Runs:
    """Returns runs of conditions.py:opd, each with its flags."""
    return {name: ("conditions:opd", flags) for name, flags in changes.items()}


STUDIES: dict[str, tuple[str, Runs]] = {
    "conditions": (
        "ways to teach reasoning to a model of 1.7B",
        {name: (f"conditions:{name}", "") for name in CONDITIONS},
    ),
    "students": (
        "students of all sizes, one teacher",
        {size: (f"strong_to_weak:student={size}", "") for size in SIZES},
    ),
    "teachers": (
        "two teachers, one student",
        {size: (f"strong_to_weak:teacher={size}", "") for size in ("32b", "235b-a22b")},
    ),
    "rank": (
        "LoRA against full training, before and after on-policy distillation",
        {f"lora_{size}": (f"opd_math:lora={size}", "") for size in ("32", "128", "full")},
    ),
    "divergence": (
        "the divergence minimised on the student's own answers",
        _make_opd_runs(
            reverse="",
            forward="--config.opd.loss.divergence=forward",
            jsd="--config.opd.loss.divergence=jsd --config.opd.loss.beta=0.5",
        ),
    ),
    "estimator": (
        "the KL: exact, of the k likeliest tokens, of the sampled token",
        _make_opd_runs(
            exact="",
            top64="--config.opd.loss.estimator=topk --config.opd.loss.k=64",
            top16="--config.opd.loss.estimator=topk --config.opd.loss.k=16",
            sampled="--config.opd.objective=opd_sampled",
        ),
    ),
    "samples": (
        "answers to each prompt, at the same batch size",
        _make_opd_runs(**{f"x{n}": f"--config.opd.samples={n}" for n in (1, 2, 4, 8)}),
    ),
    "rate": (
        "the learning rate",
        _make_opd_runs(
            **{f"lr{x}": f"--config.opd.optim.learning_rate={x}" for x in ("3e-5", "1e-4", "3e-4")}
        ),
    ),
}


def list_commands(study: str, tiny: bool) -> list[str]:
    """Returns the commands of a study; raises ValueError for an unknown one, naming those known."""
    if study not in STUDIES:
        raise ValueError(f"configs/ablations.py takes {'|'.join(STUDIES)}, not {study!r}")
    lines = []
    for name, (recipe, flags) in STUDIES[study][1].items():
        file, _, argument = recipe.partition(":")
        argument = ",".join(word for word in (argument, "tiny" if tiny else "") if word)
        config = f"configs/{file}.py:{argument}"
        command_words = (
            "python -m distill.train",
            f"--config={config}",
            f"--workdir=runs/{study}/{name}",
        )
        lines.append(" ".join((*command_words, flags)).strip())
    return lines


def main() -> None:
    words = sys.argv[1:]
    if not words:
        print("\n".join(f"{name:12}{about}" for name, (about, _) in STUDIES.items()))
        return
    try:
        if len(words) > 2 or words[1:] not in ([], ["tiny"]):
            raise ValueError(
                f"configs/ablations.py takes a study and optionally tiny, not {words!r}"
            )
        print("\n".join(list_commands(words[0], tiny=words[1:] == ["tiny"])))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
