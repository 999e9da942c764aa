"""What a run has compiled, compared with what `plan` lists for the same config."""

import collections
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, quickstart
from distill.evaluation import evaluator
from distill.planning import fit, programs
from distill.rollout import options
from distill.runtime import mesh as mesh_lib
from distill.training import loop, stages
from distill.training.calls import UNPLANNED_PROGRAMS, ProgramCall

COMPILED = "/jax/core/compile/backend_compile_duration"
# Programs of which each shape is a program of its own, and is listed as one.
SAMPLING = {"for_decoding", "init_state", "prefill", "decode", "resize", "remember"}
# What jax compiles for an operation that is not within a program: of keys, rates and rewards.
SCALARS = {
    *("_threefry_seed", "_threefry_fold_in", "_where", "_power", "true_divide", "add", "subtract"),
    *("clip", "integer_pow", "multiply", "minimum", "cos", "convert_element_type", "stage"),
    *("_mean", "_std", "_reduce_all", "broadcast_in_dim", "dynamic_slice", "reshape"),
}


def config(**changes: Any) -> ConfigDict:
    """A step of the quick start in small; `changes` with __ for a dot."""
    c = quickstart.get_config("tiny")
    c.mesh.fsdp = 1
    c.opd.steps, c.opd.batch_size, c.checkpoint.every = 1, 4, 100
    c.opd.max_response_tokens = 8
    named = {name.replace("__", "."): value for name, value in changes.items()}
    c.update_from_flattened_dict(named)
    return c


def several(c: ConfigDict) -> ConfigDict:
    """Two teachers, each half of every token's."""
    c.original = base.make_teacher()
    c.original.path = "assets/student"
    c.original.param_dtype = c.original.dtype = "float32"
    c.opd.teachers, c.opd.teacher_weights = ("teacher", "original"), (1.0, 1.0)
    return c


CONFIGS = {
    "opd": config(),
    "in pages, ahead": config(
        opd__rollout__page_size=16, opd__rollout__asynchronous=True, opd__steps=2
    ),
    "grpo": config(
        opd__objective="grpo",
        opd__samples=2,
        opd__minibatches=2,
        opd__loss__reference=0.1,
        opd__reward__correct=0.0,
        opd__reward__format=1.0,
        student__ema_decay=0.9,
    ),
    "a LoRA": config(student__lora__rank=2, eval__every=1, eval__limit=2, eval__max_new_tokens=4),
    "a context": config(opd__context__text="assets/rows/manual.md", opd__context__max_tokens=48),
    "two teachers, a penalty": several(config(opd__sampling__presence_penalty=0.5)),
}


def planned(c: ConfigDict) -> list[tuple[str, ProgramCall]]:
    """What the only stage of a config calls: names of jitted functions, as XLA has them."""
    mesh, apart = mesh_lib.make_meshes(c)
    (name,) = c.stages
    s = c[name]
    loss, sampled = stages.resolve_objective(name, s)
    teachers = tuple(s.teachers) if stages.needs_teacher(s, loss) else ()
    models = fit.describe_models(c, mesh, apart, teachers, loss.reference > 0)
    found = []
    with mesh_lib.use_mesh(mesh):
        calls = programs.list_stage_calls(c, s, loss, sampled, models, mesh)
    for call in calls:
        with mesh_lib.use_mesh(call.mesh or mesh):
            module = call.lower().compiler_ir().operation.attributes["sym_name"].value
        found.append((str(module).removeprefix("jit_"), call))
    return found


def ran(c: ConfigDict, workdir: Any) -> collections.Counter[str]:
    """The names of what a run compiles."""
    found: collections.Counter[str] = collections.Counter()

    def note(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            found[str(about["fun_name"]).removeprefix("jit(").removesuffix(")")] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        loop.run(c, workdir)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_what_runs_is_planned(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = CONFIGS[name].copy_and_resolve_references()
    if name.startswith("in pages"):
        monkeypatch.setattr(options, "choose_cache_backend", lambda *_: "plain")
    listed = planned(c)
    found = ran(c, tmp_path)
    named = collections.Counter(module for module, _ in listed)
    unknown = found.keys() - named.keys() - UNPLANNED_PROGRAMS.keys() - SCALARS
    assert not unknown, "not planned"
    idle = {module for module, call in listed if call.calls_per_step > 0} - found.keys()
    assert not idle, "never ran"
    for module in SAMPLING & found.keys():
        assert found[module] <= named[module], f"{module}: shapes that are not planned"


def test_evaluations_compile_no_sampling_program(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compiled before step 0. A number of tokens that no other test has, so that none is
    there already."""
    compiled: list[str] = []
    begun: list[int] = []

    def note(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            compiled.append(str(about["fun_name"]).removeprefix("jit(").removesuffix(")"))

    evaluated = evaluator.evaluate_benchmark

    def noted(*given: Any, **named: Any) -> Any:
        begun.append(len(compiled))
        return evaluated(*given, **named)

    monkeypatch.setattr(evaluator, "evaluate_benchmark", noted)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        changes = {"eval__every": 1, "eval__limit": 2, "eval__max_new_tokens": 21}
        loop.run(config(opd__steps=2, **changes), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(begun) == 2 and SAMPLING & set(compiled[: begun[0]])
    assert not SAMPLING & set(compiled[begun[0] :])


def test_what_is_left_out_is_not_planned_too() -> None:
    assert not {module for module, _ in planned(CONFIGS["opd"])} & (
        UNPLANNED_PROGRAMS.keys() | SCALARS
    )
