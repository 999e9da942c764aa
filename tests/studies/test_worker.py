"""What a --measure says."""

import pytest

from models.errors import UserError
from studies.worker import Measurement, parse_measurement

TEXT = "x:ifeval:rows.jsonl:4:40"


@pytest.mark.parametrize(
    ("options", "is_judged", "is_thinking"),
    [
        ("", False, True),
        (":judged", True, True),
        (":no_think", False, False),
        (":judged:no_think", True, False),
    ],
)
def test_a_measurement_is_parsed(options: str, is_judged: bool, is_thinking: bool) -> None:
    wanted = Measurement("x", "ifeval", "rows.jsonl", 4, 40, is_judged, is_thinking)
    assert parse_measurement(TEXT + options) == wanted


@pytest.mark.parametrize(
    "text", ["x:ifeval:rows.jsonl:4", f"{TEXT}:judge", f"{TEXT}:no_think:judged", "x:y:z:a:40"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--measure={text}: is no NAME:"):
        parse_measurement(text)
