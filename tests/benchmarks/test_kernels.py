"""The comparison of kernels lists a row for each case, program and choice of kernels."""

import dataclasses

import pytest

from benchmarks import kernels
from distill.planning import aot

PROGRAM = aot.Program(
    **{f.name: 0 for f in dataclasses.fields(aot.Program)} | {"name": "", "compile_seconds": 1.0}  # pyright: ignore[reportArgumentType]
)


def test_each_case_is_compiled_with_chosen_kernels_and_with_xla(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lowered here; the models keep as many layers as asked."""
    lowered, describe = [], kernels.fit.describe_stage

    def describe_stage(*args):
        stage = describe(*args)
        lowered.append((stage.student.model.kernel, stage.student.config.num_hidden_layers))
        return stage

    def compile_program(name, lower, hbm_gib):
        return dataclasses.replace(PROGRAM, name=name, flops=2e12)

    monkeypatch.setattr(kernels.fit, "describe_stage", describe_stage)
    monkeypatch.setattr(kernels.aot, "compile_program", compile_program)
    kernels.OPTIONS(["", "--topology=v5e:1x1", "--layers=2", "--only=attention", "--only=packed"])
    kernels.main()
    assert lowered == [("splash", 2), ("xla", 2)] * 2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.count("|") > 2][2:]
    assert [row.split(" | ")[:3] for row in rows[:4]] == [
        [f"| attention, {name}", chosen, "2.0"]
        for chosen in ("chosen", "xla")
        for name in ("score", "update")
    ]
    assert len(rows) == 8


def test_experts_lose_their_kernels_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    product = kernels.grouped._make_gpu_product

    def compile_program(name, lower, hbm_gib):
        found.append(kernels.grouped._make_gpu_product is product)
        return dataclasses.replace(PROGRAM, name=name)

    monkeypatch.setattr(kernels.aot, "compile_program", compile_program)
    kernels.OPTIONS(["", "--topology=v5e:1x1", "--layers=1", "--only=experts"])
    kernels.compile_case("experts", "chosen")
    kernels.compile_case("experts", "xla")
    assert found == [True, True, False, False]
