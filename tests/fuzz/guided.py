"""python -m tests.fuzz.guided PARSER [-runs=N]: fuzzing that follows the code's branches (atheris).

Draws the same inputs as test_fuzz.py, but keeps those that reach new lines and changes them
further. Options beginning with one dash are libFuzzer's. Needs atheris, which is built for Linux.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]
from hypothesis import HealthCheck, given, settings

with atheris.instrument_imports(include=["distill", "models"]):  # pyright: ignore
    from tests.support import parsers


def main() -> None:
    name = sys.argv[1]
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))

    @settings(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(parsers.PARSERS[name].inputs)
    def test(value: object) -> None:
        parsers.read_guarded(name, value, directory / "work")

    atheris.Setup([sys.argv[0], *sys.argv[2:]], test.hypothesis.fuzz_one_input)  # pyright: ignore
    atheris.Fuzz()


if __name__ == "__main__":
    main()
