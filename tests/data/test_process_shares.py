"""Processes read disjoint shares of each step that make up all of it, whatever their number."""

from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from distill.data import collate, dataset, packing
from distill.runtime import mesh as mesh_lib
from distill.training import collect, microbatches, setup
from distill.training.teacher_outputs import OutputRequests

MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor


def groups(count: int) -> list[list[Any]]:
    """Splits the devices among so many processes, in order."""
    each = len(jax.devices()) // count
    return [jax.devices()[i : i + each] for i in range(0, len(jax.devices()), each)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_own_all_rows_between_them(sizes: tuple[int, int, int], processes: int) -> None:
    mesh = mesh_lib.make_mesh(*sizes)
    shares = [mesh_lib.list_local_rows(mesh, 16, devices) for devices in groups(processes)]
    assert sorted({row for share in shares for row in share}) == list(range(16))
    shards = mesh_lib.count_row_shards(mesh)
    for share in shares:
        # Devices along `tensor` have the same rows, and so may their processes.
        assert len(share) == 16 // min(processes, shards) and share == sorted(share)
    if processes <= shards:
        assert sum(map(len, shares)) == 16


@pytest.mark.parametrize("sizes", MESHES)
def test_an_array_is_assembled_from_local_rows(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_lib.make_mesh(*sizes)
    x_BT = np.arange(48, dtype=np.int32).reshape(16, 3)
    made, none = mesh_lib.from_local_rows((x_BT, None), mesh, 16)
    assert none is None and made.sharding.is_equivalent_to(mesh_lib.make_row_sharding(mesh), 2)
    np.testing.assert_array_equal(made, x_BT)


def stage(objective: str, **fields: Any) -> tuple[setup.StageSetup, packing.Packer | None]:
    """Makes a stage of 24 numbered rows, without loss and optimiser."""
    c = base.make_stage(objective)
    c.batch_size, c.max_prompt_tokens, c.max_response_tokens = 8, 3, 4
    sampled = fields.pop("sampled", 0)
    c.update(fields)
    source = dataset.Source(
        24, lambda i: dataset.Example([i + 1], [100] * (1 + i % 4), "", f"row {i}")
    )
    packer = packing.Packer(source, 0, 8, c.pack_tokens, 4) if c.pack_tokens else None
    nothing: Any = None
    loss = setup.losses.OBJECTIVES[objective]
    return setup.StageSetup("sft", c, 2, source, nothing, loss, sampled), packer


@pytest.mark.parametrize("fields", [{}, {"pack_tokens": 16}, {"minibatches": 2, "accumulate": 2}])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_the_batch_in_shares(processes: int, fields: dict) -> None:
    """The shares of all processes, put together, are the batch that one process reads."""
    mesh = mesh_lib.make_mesh(1, 8, 1)

    def read(own: list[int], step: int) -> list[list[int]]:
        """Reads the rows of all micro-batches, in the order of the batch."""
        form = collate.BatchLayout(fields.get("pack_tokens", 7), 4)
        traces = stage("sft", **fields)
        outputs = OutputRequests((), 4, False)
        work, *_ = collect.load_trace_minibatches(*traces, 7, own, form, outputs, step)
        found = {}
        for micro in (micro for part in work for micro in part):
            held = [row for (row,) in micro.rows if row in own]
            found |= dict(zip(held, np.asarray(micro.make_batch().tokens_BT).tolist(), strict=True))
        return [found[row] for row in sorted(found)]

    for step in (2, 4, 6):
        whole = read(list(range(8)), step)
        shares = [
            read(mesh_lib.list_local_rows(mesh, 8, devices), step) for devices in groups(processes)
        ]
        assert [row for share in shares for row in share] == whole
        assert len(whole) == 8
        if not fields:
            assert len({row[0] for row in whole}) == 8  # disjoint


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_lays_out_its_own_rows_of_one_packing(processes: int) -> None:
    """Each process knows where every sequence lies, and makes the arrays of its own rows."""
    mesh, form = mesh_lib.make_mesh(1, 8, 1), collate.BatchLayout(9, 4)
    examples = [dataset.Example([i + 1] * (1 + i % 4), [9], "", "") for i in range(40)]
    packed = microbatches.pack_examples(examples, 8, 2, form)
    whole = microbatches.make_microbatches(packed, examples, form, mesh)
    shares = []
    for devices in groups(processes):
        own = mesh_lib.list_local_rows(mesh, 8, devices)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mesh_lib, "list_local_rows", lambda mesh, count, own=own: own)
            work = microbatches.make_microbatches(packed, examples, form, mesh)
            shares.append([micro.make_batch().tokens_BT for part in work for micro in part])
    for each, micro in zip(zip(*shares, strict=True), [m for p in whole for m in p], strict=True):
        np.testing.assert_array_equal(np.concatenate(each), micro.make_batch().tokens_BT)
