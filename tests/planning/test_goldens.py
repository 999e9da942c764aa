"""Recipes compiled for the slices that they are meant for: they fit, and neither memory nor what
travels between devices got worse than tests/planning/goldens.json says.

    GOLDENS=renew python -m pytest -m "" tests/planning/test_goldens.py [-k NAME]

writes that file anew, for the cases that are run, from what is compiled now; its diff is to be read
and committed with the change that caused it. The figures depend on the versions of jax and libtpu
that they were made with, which the file names: with others, the cases are skipped.
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
# Rows as many and as long as decoding holds at once; the update's micro-batches are 64 of them.
LONG: dict[str, Any] = {
    "mesh.tensor": 8,
    "opd.batch_size": 256,
    "opd.accumulate": 4,
    "opd.max_prompt_tokens": 1024,
    "opd.max_response_tokens": 15_360,
}
ON_V5P = "8b from 32b, 18k, v5p-32"
# Name -> recipe, slice, what differs from the recipe; compiled in its `opd` stage, if that does not
# name others.
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
    "recall, v6e-16": ("recall", "v6e:4x4", {"stages": ("knowledge", "recall")}),
    "one_prompt, v5p-16": ("one_prompt", "v5p:2x2x2", {}),
}


pytestmark = pytest.mark.usefixtures("compiled_anew")


def config(recipe: str, changes: dict[str, Any]) -> ConfigDict:
    file, _, argument = recipe.partition(":")
    c = importlib.import_module(f"configs.{file}").get_config(argument)
    c.update_from_flattened_dict({"stages": ("opd",), **changes})
    return c


@functools.cache
def compiled(name: str) -> list[ProgramCost]:
    recipe, topology, changes = CASES[name]
    try:
        aot.get_devices(topology)
    except fit.UserError as error:
        pytest.skip(str(error))
    found = fit.compile_run(config(recipe, changes), topology)
    several = len(found) > 1
    return [
        dataclasses.replace(row, name=f"{stage}: {row.name}") if several else row
        for stage, rows in found.items()
        for row in rows
    ]


def measured(rows: list[ProgramCost]) -> dict[str, Any]:
    """Program -> peak memory in GiB (with all that lies beside it), and what it receives: kind of
    collective -> how many and how many MB a call."""
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


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jaxlib", "libtpu")}


def worse(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What moved up by more than 5%, one sentence each. A MB, and ten collectives, are noise."""
    found = []
    for program, old in golden.items():
        new = now[program]

        def moved(what: str, was: float, now: float, floor: float, program: str = program) -> None:
            if now > max(was * WORSE, was + floor):
                found.append(f"{program}: {what} {was:g} -> {now:g}")

        moved("peak GiB", old["peak_gib"], new["peak_gib"], 0.01)
        for kind, (count, size) in new["collectives"].items():
            was_count, was_size = old["collectives"].get(kind, (0, 0))
            moved(f"{kind}, how many", was_count, count, 10)
            moved(f"{kind}, MB", was_size, size, 1)
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fits_and_is_no_worse(name: str) -> None:
    goldens = json.loads(FILE.read_text())
    if os.environ.get("GOLDENS") == "renew":
        now = measured(compiled(name))
        cases = {**json.loads(FILE.read_text())["cases"], name: now}
        told = {"versions": versions(), "cases": {n: cases[n] for n in CASES if n in cases}}
        FILE.write_text(json.dumps(told, indent=1) + "\n")
        return
    if goldens["versions"] != versions():
        pytest.skip(f"the goldens are of {goldens['versions']}")
    assert name in goldens["cases"], f"{name}: no golden yet; see above how to write it"
    found = worse(goldens["cases"][name], measured(compiled(name)))
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize(("program", "least"), [("accumulate", 0.5), ("score", 0.6)])
def test_bound_of_utilisation(program: str, least: float) -> None:
    """Useful operations over what the chip could do in the roofline's time."""
    row = next(row for row in compiled(ON_V5P) if row.name == program)
    assert row.mfu is not None and row.compiled is not None, "no text to read"
    assert row.mfu >= least and row.useful / row.compiled >= least, f"{row.mfu:.2f} by {row.bound}"


def test_a_spoilt_program_is_seen() -> None:
    """A step of training through layers, compiled as it should be and with the weights whole on
    every device."""
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices("v5e:2x2"))

    def loss(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].sum()

    def step(w_LDD: jax.Array, x_BD: jax.Array) -> jax.Array:
        return w_LDD - jax.grad(loss)(w_LDD, x_BD)

    def compile(axis: str | None) -> dict[str, Any]:
        split, rows = (
            NamedSharding(mesh, PartitionSpec(None, axis)),
            mesh_lib.make_row_sharding(mesh),
        )
        w = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32, sharding=split)
        x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=rows)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=split)
        call = calls.ProgramCall("update", lambda: jitted.lower(w, x), 1, 0.0, ())
        program = aot.compile_program(call.name, call.lower, 16)
        return measured([roofline.estimate_cost(call, program, 0, aot.CHIPS["v5e"], 4)])

    sound = compile("fsdp")
    assert worse(sound, sound) == []
    found = worse(sound, compile(None))
    assert found[0].startswith("update: peak GiB 0.0")
    assert any(line.startswith("update: all-reduce, MB") for line in found)


def test_what_is_worse_is_seen() -> None:
    """Each figure alone; what got better, or moved by rounding, is none."""
    old = {"update": {"peak_gib": 5.0, "collectives": {"all-gather": [100, 1000.0]}}}
    better = {"update": {"peak_gib": 4.0, "collectives": {}}}
    near = {"update": {"peak_gib": 5.2, "collectives": {"all-gather": [104, 1040.0]}}}
    assert worse(old, old) == worse(old, better) == worse(old, near) == []
    for peak, collectives, words in (
        (5.3, {}, "update: peak GiB 5 -> 5.3"),
        (5.0, {"all-gather": [120, 1000.0]}, "update: all-gather, how many 100 -> 120"),
        (5.0, {"all-gather": [100, 1100.0]}, "update: all-gather, MB 1000 -> 1100"),
        (5.0, {"all-reduce": [1, 50.0]}, "update: all-reduce, MB 0 -> 50"),
    ):
        assert worse(old, {"update": {"peak_gib": peak, "collectives": collectives}}) == [words]
