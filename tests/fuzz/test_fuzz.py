"""Every parser that meets outside data, given hostile input: it accepts it, or refuses it in one
line. No traceback, no hang, and no write outside its directory."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import parsers

COUNT = int(os.environ.get("FUZZ_INPUTS", "40"))  # of the cheapest parser


@pytest.fixture(scope="module", autouse=True)
def _leave_garbage() -> Iterator[None]:
    """What earlier tests left to the garbage collector stays until the end of this file: a
    finalizer that removes a temporary directory would count as the parser's writing."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_parsers(name: str, tmp_path: Path) -> None:
    parser = parsers.PARSERS[name]

    @seed(int(os.environ.get("FUZZ_SEED", "0")))
    @settings(
        max_examples=max(1, COUNT // parser.cost),
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failure is short enough, and making it shorter takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(parser.inputs)
    def test(value: object) -> None:
        parsers.read_guarded(name, value, tmp_path / "work")

    test()
