"""Every process reads its share: disjoint, together all of it, in an order that no number of
processes changes."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from distill import collect, data, layout, packing, prepare
from distill import mesh as mesh_lib

ROOT = Path(__file__).parents[1]
MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor


def groups(count: int) -> list[list[Any]]:
    """The devices of each of so many processes, as they would number theirs."""
    each = len(jax.devices()) // count
    return [jax.devices()[i : i + each] for i in range(0, len(jax.devices()), each)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_own_rows(sizes: tuple[int, int, int], processes: int) -> None:
    mesh = mesh_lib.make(*sizes)
    shares = [mesh_lib.own_rows(mesh, 16, devices) for devices in groups(processes)]
    assert sorted({row for share in shares for row in share}) == list(range(16))
    shards = mesh_lib.row_shards(mesh)
    for share in shares:
        # Devices along `tensor` have the same rows, and so may their processes.
        assert len(share) == 16 // min(processes, shards) and share == sorted(share)
    if processes <= shards:
        assert sum(map(len, shares)) == 16


@pytest.mark.parametrize("sizes", MESHES)
def test_an_array_is_made_of_own_rows(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_lib.make(*sizes)
    x_BT = np.arange(48, dtype=np.int32).reshape(16, 3)
    made, none = mesh_lib.from_own_rows((x_BT, None), mesh, 16)
    assert none is None and made.sharding.is_equivalent_to(mesh_lib.rows(mesh), 2)
    np.testing.assert_array_equal(made, x_BT)


def stage(objective: str, **fields: Any) -> prepare.Stage:
    """A stage of 24 rows by number, the loss and optimiser left out."""
    c = base.stage(objective)
    c.batch_size, c.max_prompt_tokens, c.max_response_tokens = 8, 3, 4
    sampled = fields.pop("sampled", 0)
    c.update(fields)
    source = data.Source(24, lambda i: data.Example([i + 1], [100] * (1 + i % 4), "", f"row {i}"))
    packer = packing.Packer(source, 0, 8, c.pack_tokens, 4) if c.pack_tokens else None
    nothing: Any = None
    return prepare.Stage(
        "sft", c, 2, source, nothing, prepare.losses.TABLE[objective], sampled, packer
    )


@pytest.mark.parametrize("fields", [{}, {"pack_tokens": 16}, {"sampled": 4}])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_the_batch_in_shares(processes: int, fields: dict) -> None:
    """What processes read of a step, put together, is the batch that one process reads."""
    mesh, sampled = mesh_lib.make(1, 8, 1), fields.get("sampled", 0)

    def read(own: list[int], step: int) -> list[list[int]]:
        of = stage("gkd" if sampled else "sft", **fields)
        rows = [row for row in own if row >= sampled]
        batch, _ = collect._read(of, 7, rows)({}, step)
        return np.asarray(batch.tokens_BT).tolist()

    for step in (2, 4, 6):
        whole = read(list(range(8)), step)
        shares = [read(mesh_lib.own_rows(mesh, 8, devices), step) for devices in groups(processes)]
        assert [row for share in shares for row in share] == whole
        assert len(whole) == 8 - sampled
        if not fields:
            assert len({row[0] for row in whole}) == 8  # disjoint


def test_what_all_sample_each_keeps_its_own_of() -> None:
    whole = layout.traces([data.Example([i], [9], "", "") for i in range(6)], 2, 2)
    part = collect._held(lambda params, step: (whole, {"step": step}), [3, 4])
    batch, measured = part({}, 5)
    assert np.asarray(batch.tokens_BT)[:, 0].tolist() == [3, 4] and measured == {"step": 5}
    assert collect._held(lambda params, step: (whole, {}), list(range(6)))({}, 0)[0] is whole
