"""Teachers, a judge and a reference on devices of their own: the same run."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, quickstart
from distill.planning import aot, fit
from distill.policy import policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import collect, loop, memory, setup
from models.errors import UserError
from tests.support.paths import ROOT


def config(devices: int, **sizes: int) -> ConfigDict:
    """Everything that is only read, at once: two teachers who are told more than the student, who
    judge as well, and a reference."""
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
    c.origin = base.make_teacher()
    c.origin.path, c.origin.dtype, c.origin.param_dtype = "initial", "float32", "float32"
    c.mesh.fsdp, c.teacher_mesh.devices = 4, devices
    c.teacher_mesh.update(sizes)
    c.log.transcripts, c.checkpoint.every = 0, 100
    s = c.opd
    s.objective, s.steps, s.batch_size, s.samples, s.max_response_tokens = "hybrid", 2, 8, 2, 12
    s.loss.reference, s.reward.teacher_logprob, s.teachers = 0.1, 0.1, ("teacher", "origin")
    s.teacher_weights = (3.0, 1.0)
    s.context.text, s.context.max_tokens = str(ROOT / "assets/rows/manual.md"), 300
    return c


@pytest.mark.long
def test_a_run_with_teachers_apart_is_the_same_run(tmp_path, monkeypatch):
    seen, place_heads = [], local.place_heads

    def noted(teachers):
        here = set(jax.sharding.get_mesh().devices.flat)
        for of in teachers:
            lie = {d for x in jax.tree.leaves(of.policy.params) for d in x.sharding.device_set}
            seen.append(lie.isdisjoint(here))
        placed = place_heads(teachers)
        assert all(x.head_VE.sharding.device_set == here for x in placed)
        return placed

    monkeypatch.setattr(local, "place_heads", noted)
    told = []
    for name, c in (("together", config(0)), ("apart", config(4, fsdp=2, tensor=2))):
        loop.run(c, tmp_path / name)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        told.append([json.loads(row) for row in rows])
    assert seen == [False, False, True, True]
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys() and one["train/reverse_kl"] > 0.01
        for name, value in one.items():
            if isinstance(value, float) and not name.startswith(("time/", "rollout/tokens_per")):
                assert other[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_what_they_write_comes_back():
    """The first batch of read responses, and the head, as they are where all share all."""
    found = []
    for c in (config(0), config(4, fsdp=2, tensor=2)):
        c.opd.objective, c.opd.loss.reference, c.opd.samples = "distill", None, 1
        mesh, apart = mesh_lib.make_meshes(c)
        plan = setup.setup_run(c, mesh, apart)
        with policy.use(plan.student), graders.Grader() as grader:
            plan = setup.load_stage_models(c, plan, plan.stages[0])
            teachers = tuple(plan.teachers.values())
            assert policy.get_mesh(teachers[0].policy) == apart
            collector = collect.make_collector(c, plan, plan.stages[0], mesh, grader)
            ((micro, *_), *_), _ = loop.collect_step(collector, {}, 0)
            scored = local.score(local.place_heads(teachers), micro.to_device(mesh))
            arrays = jax.tree.leaves(scored.teacher)
        assert all(x.sharding.device_set == set(mesh.devices.flat) for x in arrays)
        found.append([np.asarray(x) for x in arrays])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("devices", "sizes", "words"),
    [
        (8, {}, "of the 8 devices of a process at least one must be the student's"),
        (-1, {}, "config.teacher_mesh.devices=-1"),
        (5, {}, r"config.mesh: needs 4 devices, there are 3"),
        (4, {"fsdp": 8}, r"config.teacher_mesh: needs 8 devices, there are 4"),
        (4, {"tensor": 4}, "teacher.*num_.*heads=.* does not divide by mesh axis tensor=4"),
        (3, {"data": 3, "fsdp": 1}, "does not divide by .* of config.teacher_mesh that split"),
    ],
)
def test_what_cannot_lie_apart_is_refused(devices, sizes, words):
    with pytest.raises(UserError, match=words):
        c = config(devices, **sizes)
        mesh, apart = mesh_lib.make_meshes(c)
        setup.setup_run(c, mesh, apart)


def test_each_process_has_both():
    """Of a slice of two hosts, whose rows must be the same on both meshes."""
    devices = aot.get_devices("v5e:2x4")
    c = config(2, fsdp=-1)
    mesh, apart = mesh_lib.make_meshes(c, devices)
    of = [sorted(d.process_index for d in x.devices.flat) for x in (mesh, apart)]
    assert of == [[0, 0, 1, 1]] * 2
    assert not set(mesh.devices.flat) & set(apart.devices.flat)
    mesh_lib.check_colocated(mesh, apart, 8)
    c.teacher_mesh.fsdp, c.teacher_mesh.tensor = 1, 4
    with pytest.raises(UserError, match="a process would have other rows"):
        mesh_lib.check_colocated(*mesh_lib.make_meshes(c, devices), 8)
    across = mesh_lib.make_mesh(1, 1, 8, devices=devices)
    mesh_lib.check_colocated(across, across, 8)  # one mesh, of which tensor may go over the hosts


def test_memory_is_counted_where_it_lies():
    c = config(2, fsdp=2)
    c.mesh.fsdp, c.opd.teachers, c.opd.teacher_weights = 2, ("teacher",), ()
    mesh, apart = mesh_lib.make_meshes(c, aot.get_devices("v5e:2x2"))
    stage = fit.describe_stage(c, "opd", mesh, apart)
    there = memory.count_resident_bytes(stage, apart)
    assert there.keys() == {"teacher", "reference"}
    here = memory.count_resident_bytes(stage)
    assert here.keys() == {"parameters", "optimiser", "head of teacher"}
    teacher = stage.teachers["teacher"].config
    assert here["head of teacher"] == teacher.vocab_size * teacher.hidden_size * 4 / 2


@pytest.mark.long
def test_it_is_planned_where_it_runs():
    c = config(2, fsdp=2)
    c.mesh.fsdp, c.opd.teachers, c.opd.teacher_weights = 2, ("teacher",), ()
    found = {row.name: row for row in fit.compile_run(c, "v5e:2x2")["opd"]}
    stage = fit.describe_stage(c, "opd", *mesh_lib.make_meshes(c, aot.get_devices("v5e:2x2")))
    kept = memory.count_resident_bytes(stage, policy.get_mesh(stage.teachers["teacher"]))
    assert found["score"].beside == kept["reference"]
    assert found["reference"].beside == kept["teacher"]
    here = memory.count_resident_bytes(stage)
    assert found["accumulate"].beside == here["optimiser"]
