"""Tests that teachers, a judge and a reference on their own devices give the same run."""

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
    """Configures all frozen models at once: two teachers with extra context, who also judge, and a
    reference."""
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
def test_a_teacher_mesh_does_not_change_the_run(tmp_path, monkeypatch):
    disjoint, place_heads = [], local.place_heads

    def place_heads_and_record(teachers):
        student_devices = set(jax.sharding.get_mesh().devices.flat)
        for teacher in teachers:
            teacher_devices = {
                d for x in jax.tree.leaves(teacher.policy.params) for d in x.sharding.device_set
            }
            disjoint.append(teacher_devices.isdisjoint(student_devices))
        placed = place_heads(teachers)
        assert all(x.head_VE.sharding.device_set == student_devices for x in placed)
        return placed

    monkeypatch.setattr(local, "place_heads", place_heads_and_record)
    metrics = []
    for name, c in (("together", config(0)), ("apart", config(4, fsdp=2, tensor=2))):
        loop.run(c, tmp_path / name)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(row) for row in rows])
    assert disjoint == [False, False, True, True]
    for together, apart in zip(*metrics, strict=True):
        assert together.keys() == apart.keys() and together["train/reverse_kl"] > 0.01
        for name, value in together.items():
            if isinstance(value, float) and not name.startswith(("time/", "rollout/tokens_per")):
                assert apart[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_teacher_output_returns_to_the_student_mesh():
    """Compares the first batch of scored responses, and the head, with those of a shared mesh."""
    outputs = []
    for c in (config(0), config(4, fsdp=2, tensor=2)):
        c.opd.objective, c.opd.loss.reference, c.opd.samples = "distill", None, 1
        mesh, teacher_mesh = mesh_lib.make_meshes(c)
        plan = setup.setup_run(c, mesh, teacher_mesh)
        with policy.use(plan.student), graders.Grader() as grader:
            plan = setup.load_stage_models(c, plan, plan.stages[0])
            teachers = tuple(plan.teachers.values())
            assert policy.get_mesh(teachers[0].policy) == teacher_mesh
            collector = collect.make_collector(c, plan, plan.stages[0], mesh, grader)
            ((micro, *_), *_), _ = loop.collect_step(collector, {}, 0)
            scored = local.score(local.place_heads(teachers), micro.to_device(mesh))
            arrays = jax.tree.leaves(scored.teacher)
        assert all(x.sharding.device_set == set(mesh.devices.flat) for x in arrays)
        outputs.append([np.asarray(x) for x in arrays])
    for together, separate in zip(*outputs, strict=True):
        np.testing.assert_allclose(together, separate, rtol=2e-5, atol=2e-5)


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
def test_impossible_teacher_meshes_are_refused(devices, sizes, words):
    with pytest.raises(UserError, match=words):
        c = config(devices, **sizes)
        mesh, teacher_mesh = mesh_lib.make_meshes(c)
        setup.setup_run(c, mesh, teacher_mesh)


def test_each_process_has_devices_of_both_meshes():
    """Uses a slice of two hosts, whose rows must be the same on both meshes."""
    devices = aot.get_devices("v5e:2x4")
    c = config(2, fsdp=-1)
    mesh, teacher_mesh = mesh_lib.make_meshes(c, devices)
    process_ids = [sorted(d.process_index for d in x.devices.flat) for x in (mesh, teacher_mesh)]
    assert process_ids == [[0, 0, 1, 1]] * 2
    assert not set(mesh.devices.flat) & set(teacher_mesh.devices.flat)
    mesh_lib.check_colocated(mesh, teacher_mesh, 8)
    c.teacher_mesh.fsdp, c.teacher_mesh.tensor = 1, 4
    with pytest.raises(UserError, match="a process would have other rows"):
        mesh_lib.check_colocated(*mesh_lib.make_meshes(c, devices), 8)
    one_mesh = mesh_lib.make_mesh(1, 1, 8, devices=devices)
    mesh_lib.check_colocated(one_mesh, one_mesh, 8)  # in one mesh, tensor may span hosts


def test_memory_is_counted_on_its_own_mesh():
    c = config(2, fsdp=2)
    c.mesh.fsdp, c.opd.teachers, c.opd.teacher_weights = 2, ("teacher",), ()
    mesh, teacher_mesh = mesh_lib.make_meshes(c, aot.get_devices("v5e:2x2"))
    stage = fit.describe_stage(c, "opd", mesh, teacher_mesh)
    on_teacher_mesh = memory.count_resident_bytes(stage, teacher_mesh)
    assert on_teacher_mesh.keys() == {"teacher", "reference"}
    on_student_mesh = memory.count_resident_bytes(stage)
    assert on_student_mesh.keys() == {"parameters", "optimiser", "head of teacher"}
    teacher = stage.teachers["teacher"].config
    assert on_student_mesh["head of teacher"] == teacher.vocab_size * teacher.hidden_size * 4 / 2


@pytest.mark.long
def test_programs_are_planned_on_the_mesh_that_runs_them():
    c = config(2, fsdp=2)
    c.mesh.fsdp, c.opd.teachers, c.opd.teacher_weights = 2, ("teacher",), ()
    programs = {row.name: row for row in fit.compile_run(c, "v5e:2x2")["opd"]}
    stage = fit.describe_stage(c, "opd", *mesh_lib.make_meshes(c, aot.get_devices("v5e:2x2")))
    on_teacher_mesh = memory.count_resident_bytes(stage, policy.get_mesh(stage.teachers["teacher"]))
    assert programs["score"].beside == on_teacher_mesh["reference"]
    assert programs["reference"].beside == on_teacher_mesh["teacher"]
    on_student_mesh = memory.count_resident_bytes(stage)
    assert programs["accumulate"].beside == on_student_mesh["optimiser"]
