"""Recipes compiled for their slices fit, and use no more memory and no more communication than
tests/planning/goldens.json records.

    GOLDENS=renew python -m pytest -m "" tests/planning/test_goldens.py [-k NAME]

rewrites the selected cases of that file from the current programs. Review its diff, and commit it
with the change that caused it. The figures depend on the versions of jaxlib and libtpu, which the
file records: with other versions the cases are skipped.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from distill.planning import aot, fit, roofline
from distill.planning.roofline import GIB, ProgramCost
from distill.runtime import mesh as mesh_lib
from distill.training import calls

FILE = Path(__file__).parent / "goldens.json"
WORSE = 1.05

FLAGSHIP: dict[str, Any] = {
    "mesh.tensor": 8,
    "opd.batch_size": 64,
    "opd.accumulate": 1,
    "opd.max_prompt_tokens": 1024,
    "opd.max_response_tokens": 3072,
}
# All rows decode at once; an update's micro-batch is 64 of them.
LONG: dict[str, Any] = {
    "mesh.tensor": 8,
    "opd.batch_size": 256,
    "opd.accumulate": 4,
    "opd.max_prompt_tokens": 1024,
    "opd.max_response_tokens": 15_360,
}
ON_V5P = "8b from 32b, 18k, v5p-32"
# Name -> recipe, slice, changes to the recipe; compiles the `opd` stage unless the changes name
# others.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "colab, v5e-1": ("colab", "v5e:1x1", {}),
    "8b from 32b, 64 x 4k, v5e-64": (
        "strong_to_weak:student=8b,teacher=32b",
        "v5e:8x8",
        FLAGSHIP,
    ),
    "8b from 32b, 256 x 16k, v5e-64": (
        "strong_to_weak:student=8b,teacher=32b",
        "v5e:8x8",
        LONG,
    ),
    ON_V5P: ("strong_to_weak:student=8b,teacher=32b", "v5p:2x2x4", {"mesh.tensor": 4}),
    "8b from 32b, as it is, v5p-64": ("strong_to_weak:student=8b,teacher=32b", "v5p:4x4x2", {}),
    "8b from 32b, 18k, v6e-64": (
        "strong_to_weak:student=8b,teacher=32b",
        "v6e:8x8",
        {"mesh.tensor": 8},
    ),
    "8b from 235b-a22b, 18k, v5p-128": (
        "strong_to_weak:student=8b,teacher=235b-a22b",
        "v5p:4x4x4",
        {},
    ),
    "30b-a3b from 235b-a22b, 18k, v5p-128": (
        "strong_to_weak:student=30b-a3b,teacher=235b-a22b",
        "v5p:4x4x4",
        {},
    ),
    "opd_math, v5p-64": ("opd_math", "v5p:4x4x2", {}),
    "conditions, v6e-8": ("conditions:sft_then_opd", "v6e:2x4", {"stages": ("sft", "opd")}),
    "conditions by rewards, v6e-8": ("conditions:grpo_only", "v6e:2x4", {"stages": ("grpo",)}),
    "manual, v5e-4": ("manual:opd", "v5e:2x2", {"student.path": "Qwen/Qwen3-0.6B"}),
    "opd_math of a LoRA, v5p-64": ("opd_math:lora=32", "v5p:4x4x2", {}),
    "recall, v6e-16": (  # its training; evaluations sample fewer rows of the same length
        "recall",
        "v6e:4x4",
        {"stages": ("knowledge", "recall"), "eval.every": 0},
    ),
    "one_prompt, v5p-16": ("one_prompt", "v5p:2x2x2", {}),
}


pytestmark = pytest.mark.usefixtures("compiled_anew")


def make_config(recipe: str, changes: dict[str, Any]) -> ConfigDict:
    file, _, argument = recipe.partition(":")
    c = importlib.import_module(f"configs.{file}").get_config(argument)
    c.update_from_flattened_dict({"stages": ("opd",), **changes})
    return c


@functools.cache
def compile_case(name: str) -> list[ProgramCost]:
    recipe, topology, changes = CASES[name]
    try:
        aot.get_devices(topology)
    except fit.UserError as error:
        pytest.skip(str(error))
    stage_costs = fit.compile_run(make_config(recipe, changes), topology)
    several = len(stage_costs) > 1
    return [
        dataclasses.replace(row, name=f"{stage}: {row.name}") if several else row
        for stage, rows in stage_costs.items()
        for row in rows
    ]


def summarise_costs(rows: list[ProgramCost]) -> dict[str, Any]:
    """Returns program -> peak GiB with everything else in memory, and its collectives: kind ->
    number, and MB received per call."""
    return {
        row.name: {
            "peak_gib": round(row.total_bytes / GIB, 3),
            "collectives": {
                kind: [count, round(size / 1e6, 3)]
                for kind, (count, size) in sorted((row.collectives or {}).items())
            },
        }
        for row in rows
    }


def get_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jaxlib", "libtpu")}


def list_regressions(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists the figures that rose by more than 5%. A MB, and ten collectives, are noise."""
    regressions = []
    for program, old in golden.items():
        new = now[program]

        def compare(
            what: str, was: float, now: float, floor: float, program: str = program
        ) -> None:
            if now > max(was * WORSE, was + floor):
                regressions.append(f"{program}: {what} {was:g} -> {now:g}")

        compare("peak GiB", old["peak_gib"], new["peak_gib"], 0.01)
        for kind, (count, size) in new["collectives"].items():
            was_count, was_size = old["collectives"].get(kind, (0, 0))
            compare(f"{kind}, how many", was_count, count, 10)
            compare(f"{kind}, MB", was_size, size, 1)
    return regressions


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_recipe_fits_and_costs_no_more_than_its_golden(name: str) -> None:
    goldens = json.loads(FILE.read_text())
    if os.environ.get("GOLDENS") == "renew":
        now = summarise_costs(compile_case(name))
        cases = {**json.loads(FILE.read_text())["cases"], name: now}
        cases = {n: cases[n] for n in CASES if n in cases}
        goldens = {"versions": get_versions(), "cases": cases}
        FILE.write_text(json.dumps(goldens, indent=1) + "\n")
        return
    if goldens["versions"] != get_versions():
        pytest.skip(f"the goldens are of {goldens['versions']}")
    assert name in goldens["cases"], (
        f"{name}: no golden yet; the module's docstring says how to write it"
    )
    now = summarise_costs(compile_case(name))
    regressions = list_regressions(goldens["cases"][name], now)
    assert not regressions, "\n".join(regressions)


@pytest.mark.long
@pytest.mark.parametrize(("program", "least"), [("accumulate", 0.5), ("score", 0.6)])
def test_upper_bound_of_utilisation_is_high(program: str, least: float) -> None:
    """Useful FLOPs over those that the chip could do in the roofline's time."""
    row = next(row for row in compile_case(ON_V5P) if row.name == program)
    assert row.mfu is not None and row.compiled is not None, "no text to read"
    assert row.mfu >= least and row.useful / row.compiled >= least, f"{row.mfu:.2f} by {row.bound}"


def test_replicated_weights_are_a_regression() -> None:
    """A training step through layers, with sharded weights and with whole ones on every device."""
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices("v5e:2x2"))

    def loss(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].sum()

    def step(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return w_LDD - jax.grad(loss)(w_LDD, x_BD)

    def compile_step(axis: str | None) -> dict[str, Any]:
        split, rows = (
            NamedSharding(mesh, PartitionSpec(None, axis)),
            mesh_lib.make_row_sharding(mesh),
        )
        w = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=split)
        x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=rows)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=split)
        call = calls.ProgramCall("update", lambda: jitted.lower(w, x), 1, 0.0, ())
        program = aot.compile_program(call.name, call.lower, 16)
        return summarise_costs([roofline.estimate_cost(call, program, 0, aot.CHIPS["v5e"], 4)])

    sharded = compile_step("fsdp")
    assert list_regressions(sharded, sharded) == []
    regressions = list_regressions(sharded, compile_step(None))
    assert regressions[0].startswith("update: peak GiB 0.0")
    assert any(line.startswith("update: all-reduce, MB") for line in regressions)


def test_regressions_are_listed_by_figure() -> None:
    """Improvements, and increases of less than 5%, are none."""
    old = {"update": {"peak_gib": 5.0, "collectives": {"all-gather": [100, 1000.0]}}}
    better = {"update": {"peak_gib": 4.0, "collectives": {}}}
    similar = {"update": {"peak_gib": 5.2, "collectives": {"all-gather": [104, 1040.0]}}}
    assert list_regressions(old, old) == list_regressions(old, better) == []
    assert list_regressions(old, similar) == []
    for peak, collectives, words in (
        (5.3, {}, "update: peak GiB 5 -> 5.3"),
        (5.0, {"all-gather": [120, 1000.0]}, "update: all-gather, how many 100 -> 120"),
        (5.0, {"all-gather": [100, 1100.0]}, "update: all-gather, MB 1000 -> 1100"),
        (5.0, {"all-reduce": [1, 50.0]}, "update: all-reduce, MB 0 -> 50"),
    ):
        new = {"update": {"peak_gib": peak, "collectives": collectives}}
        assert list_regressions(old, new) == [words]
