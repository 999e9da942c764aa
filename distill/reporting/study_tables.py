"""The tables of a study: claims, results with intervals, differences, tuning and runs."""

from collections.abc import Sequence

from distill.reporting import study_claims
from distill.reporting.study_claims import MINUS, Finding
from distill.reporting.study_read import Arm, Figure, Result, Study
from distill.reporting.tables import Table
from distill.runtime import console

_NOTHING = "\N{EN DASH}"  # in a cell without a value
INTERVALS = "Means over seeds, with 95% intervals of Student's t in brackets."
_OTHER_VERDICT = (
    "The sentence explains another verdict, {}, and must be written anew for the results that "
    "there are now."
)


def tabulate_claims(findings: Sequence[Finding]) -> Table:
    """Lists what is claimed, what was found, and what is said about it."""
    rows = []
    for number, finding in enumerate(findings, start=1):
        claim = finding.claim
        source = f" ({claim['source']})" if claim.get("source") else ""
        rows.append(
            [
                str(claim.get("name") or number),
                f"{claim.get('claimed', '')}{source}",
                ". ".join(filter(None, [finding.found, finding.detail])) or _NOTHING,
                finding.verdict,
                describe_reason(finding) or _NOTHING,
                str(claim.get("settle") or _NOTHING),
            ]
        )
    header = ["claim", "claimed", "found", "verdict", "why", "what more compute would settle"]
    return Table("Claims", header, rows)


def describe_reason(finding: Finding) -> str:
    """Returns the sentence that explains the verdict, with a warning if it explains another."""
    why, explained = finding.claim.get("why") or "", finding.claim.get("verdict_explained")
    if why and not finding.is_explained:
        return f"{_OTHER_VERDICT.format(repr(explained))} It says: {why}"
    return why


def tabulate_results(study: Study) -> Table:
    """Lists the mean of each figure over the seeds of each arm."""
    header = ["arm", "seeds", *(_name_figure(figure) for figure in study.figures), "what it is"]
    rows = []
    for arm in study.arms:
        results = list(study.get_results(arm.name).values())
        cells = [_average(results, figure) for figure in study.figures]
        rows.append([arm.name, _count_seeds(study, arm), *cells, arm.about])
    return Table("Results", header, rows, [INTERVALS])


def _name_figure(figure: Figure) -> str:
    return f"{figure.title}, %" if figure.is_share else figure.title


def _count_seeds(study: Study, arm: Arm) -> str:
    """Returns how many seeds an arm has, and names those that are missing."""
    found = study.get_results(arm.name)
    missing = [str(seed) for seed in arm.seeds if seed not in found]
    if not missing:
        return str(len(found))
    return f"{len(found)} of {len(arm.seeds)}, without {', '.join(missing)}"


def _average(results: Sequence[Result], figure: Figure) -> str:
    values = [result.final[figure.key] for result in results if figure.key in result.final]
    if not values:
        return _NOTHING
    estimate = study_claims.estimate_mean(values)
    text = study_claims.format_number(estimate.mean, figure)
    if estimate.low is not None:
        text = study_claims.format_estimate(estimate, figure)
    return text + (
        f" ({len(values)} of {len(results)} seeds)" if len(values) < len(results) else ""
    )


def tabulate_seeds(study: Study) -> Table:
    """Lists every figure of every finished run."""
    rows = []
    for result in study.results:
        values = [(result.final.get(figure.key), figure) for figure in study.figures]
        cells = [_NOTHING if x is None else study_claims.format_number(x, f) for x, f in values]
        rows.append([result.arm, str(result.seed), *cells])
    header = ["arm", "seed", *(_name_figure(figure) for figure in study.figures)]
    return Table("Results of each seed", header, rows)


def tabulate_differences(study: Study) -> Table:
    """Lists differences of the first figure, paired by seed, between the arms that the claims set
    against each other."""
    figure, rows = study.figures[0], []
    pairs: dict[tuple[str, str], None] = {}
    for claim in study.claims:
        weights = claim["weights"] if claim["kind"] == "contrast" else {}
        more = [arm for arm, weight in weights.items() if weight > 0]
        less = [arm for arm, weight in weights.items() if weight < 0]
        pairs |= {(a, b): None for a in more for b in less}
    for a, b in pairs:
        values, words = study_claims.contrast_seeds(study, {a: 1.0, b: -1.0}, figure.key)
        cells = [_NOTHING, _NOTHING]
        if values:
            estimate = study_claims.estimate_mean(list(values.values()))
            each = [f"{study_claims.format_number(x, figure, '+')}" for x in values.values()]
            cells = [study_claims.format_estimate(estimate, figure, "+"), ", ".join(each)]
        rows.append([f"{a} {MINUS} {b}", *cells, "; ".join(words)])
    unit = ", points" if figure.is_share else ""
    header = ["difference", f"{figure.title}{unit}", "of each seed", "missing"]
    notes = [
        "Differences at the same seed, so with the same problems and the same start.",
        "Claims may be about another figure.",
    ]
    return Table("Paired differences", header, rows, notes)


def tabulate_tuning(study: Study) -> Table:
    """Lists the trials of tuning and marks the one whose changes the runs have."""
    key = str(study.tuning.get("figure") or study.figures[0].key)
    figure, rows, notes = study.find_figure(key), [], []
    for arm in study.list_tuned():
        trials = [trial for trial in study.trials if trial.arm == arm]
        used = _find_used(study, arm, trials)
        known = [trial for trial in trials if key in trial.final]
        best = max(known, key=lambda trial: trial.final[key], default=None)
        for trial in trials:
            changes = ", ".join(f"{name}={value}" for name, value in trial.changes.items())
            value = trial.final.get(key)
            mark = "used" if trial is used else ""
            shown = _NOTHING if value is None else study_claims.format_number(value, figure)
            rows.append([arm, str(trial.trial), changes or "no changes", shown, mark])
        if used and best and best.final[key] > used.final.get(key, float("-inf")):
            words = f"trial {used.trial}, though trial {best.trial} is better"
            notes.append(f"{arm}: the runs have the changes of {words}.")
        elif trials and study.get_results(arm) and not used:
            notes.append(f"{arm}: the runs have the changes of no trial.")
    budget, problems = (study.tuning.get(x) for x in ("budget", "problems"))
    words = [f"Budget: {budget}."] if budget else []
    words += [f"Measured on {problems}, which are not the test's."] if problems else []
    header = ["arm", "trial", "changes", _name_figure(figure), "choice"]
    return Table("Tuning", header, rows, [*words, *notes])


def _find_used(study: Study, arm: str, trials: Sequence[Result]) -> Result | None:
    """Returns the trial whose changes the arm's runs have, or those of other arms if the study has
    none of it; of several, the one with the most changes."""
    own = list(study.get_results(arm).values())[:1]
    others = [] if any(arm == x.name for x in study.arms) else study.results
    fitting = [
        trial
        for trial in trials
        for changes in [x.changes for x in own or others]
        if all(key in changes and changes[key] == x for key, x in trial.changes.items())
    ]
    return max(fitting, key=lambda trial: len(trial.changes), default=None)


def tabulate_runs(study: Study) -> Table:
    """Lists what made each result."""
    header = ["arm", "run", "revision", "time", "processor", "seconds", "CPU seconds"]
    rows = [
        [
            result.arm,
            f"seed {result.seed}" if result.trial is None else f"trial {result.trial}",
            (result.revision[:10] or "unknown") + (" (changed)" if result.dirty else ""),
            result.time,
            result.processor,
            *(_NOTHING if x is None else f"{x:,.0f}" for x in (result.seconds, result.cpu_seconds)),
        ]
        for result in [*study.results, *study.trials]
    ]
    return Table("Runs", header, rows)


def tabulate_facts(study: Study) -> Table:
    """Lists how a study is made, and what it took."""
    everything = [*study.results, *study.trials]
    machines = sorted({result.processor for result in everything if result.processor})
    rows = [
        ["command", study.command],
        ["seeds", ", ".join(map(str, study.seeds))],
        ["runs", f"{len(study.results)}, and {len(study.trials)} trials of tuning"],
        ["machines", "; ".join(machines)],
        ["time of all runs", _sum_time([result.seconds for result in everything])],
        ["processor time", _sum_time([result.cpu_seconds for result in everything])],
    ]
    return Table("Facts", ["fact", "value"], [row for row in rows if row[1]])


def _sum_time(seconds: Sequence[float | None]) -> str:
    known = [x for x in seconds if x is not None]
    if not known:
        return ""
    total = sum(known)
    text = f"{total / 3600:.1f} h" if total >= 3600 else console.format_duration(total)
    return text + (
        f", without {len(seconds) - len(known)} runs" if len(known) < len(seconds) else ""
    )
