"""Readings explain the verdicts that the results have, with numbers that the results have."""

import re
import statistics

import pytest

from distill.reporting import study_claims
from distill.reporting.study_read import Study
from studies import summary
from studies.definitions import STUDIES
from studies.definitions.readings import READINGS
from tests.support.paths import ROOT

RESULTS = {study.name: study for study in summary.read_studies(ROOT / "results")}


def list_shares(study: Study) -> list[float]:
    """Returns the mean of each figure of each arm that is a share, in percent."""
    values = []
    for arm in study.arms:
        finals = [result.final for result in study.get_results(arm.name).values()]
        for figure in study.figures:
            found = [final[figure.key] for final in finals if figure.key in final]
            if figure.is_share and found:
                values.append(100 * statistics.mean(found))
    return values


def test_each_reading_is_of_a_claim() -> None:
    claims = {(name, x["name"]) for name, study in STUDIES.items() for x in study.claims}
    assert READINGS.keys() <= claims


@pytest.mark.parametrize("name", RESULTS)
def test_each_claim_that_has_a_result_is_explained(name: str) -> None:
    for finding in study_claims.judge(RESULTS[name]):
        if finding.estimate is None:
            continue
        claim = finding.claim["name"]
        reading = READINGS[name, claim]
        assert reading.why and reading.settle, claim
        assert finding.verdict.startswith(reading.verdict), claim


@pytest.mark.parametrize("name", RESULTS)
def test_percentages_of_a_reading_are_on_the_page(name: str) -> None:
    shares = list_shares(RESULTS[name])
    for (study, claim), reading in READINGS.items():
        if study == name:
            for text in re.findall(r"(\d+(?:\.\d+)?)%", reading.why):
                nearest = min(shares, key=lambda x: abs(x - float(text)))
                assert abs(nearest - float(text)) <= 0.51, f"{claim}: {text}% is no arm's"
