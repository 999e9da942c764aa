"""The programs that a run compiles are those that `plan` lists for the same config."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import base, quickstart
from distill.evaluation import evaluator
from distill.planning import fit, programs
from distill.rollout import options
from distill.runtime import mesh as mesh_lib
from distill.training import loop
from distill.training.calls import UNPLANNED_PROGRAMS, ProgramCall

COMPILED = "/jax/core/compile/backend_compile_duration"
# Functions with a program for each shape; `plan` lists each of these programs.
SAMPLING = {"convert_weights", "init_state", "prefill", "decode", "resize", "mark_seen_tokens"}
# Operations on keys, rates and rewards outside of listed programs; jax compiles them one by one.
SCALARS = {
    *("_threefry_seed", "_threefry_fold_in", "_where", "_power", "true_divide", "add", "subtract"),
    *("clip", "integer_pow", "multiply", "minimum", "cos", "convert_element_type", "stage"),
    *("_mean", "_std", "_reduce_all", "broadcast_in_dim", "dynamic_slice", "reshape", "equal"),
}


def config(**changes: Any) -> ConfigDict:
    """Makes a config of one small quick-start step; in `changes`, __ stands for a dot."""
    c = quickstart.get_config("tiny")
    c.mesh.fsdp = 1
    c.opd.steps, c.opd.batch_size, c.checkpoint.every = 1, 4, 100
    c.opd.max_response_tokens = 8
    named = {name.replace("__", "."): value for name, value in changes.items()}
    c.update_from_flattened_dict(named)
    return c


def with_two_teachers(c: ConfigDict) -> ConfigDict:
    """Adds a second teacher; each counts half for every token."""
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
    "a context, drafts": config(
        opd__context__text="assets/rows/manual.md",
        opd__context__max_tokens=48,
        opd__rollout__drafts="ngram",
        opd__rollout__draft_tokens=1,
    ),
    "two teachers, a penalty": with_two_teachers(config(opd__sampling__presence_penalty=0.5)),
}


def list_planned(c: ConfigDict) -> list[tuple[str, ProgramCall]]:
    """Lists the calls of a config's only stage, each after its jitted function's name in XLA."""
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    (name,) = c.stages
    with mesh_lib.use_mesh(mesh):
        calls = programs.list_stage_calls(fit.describe_stage(c, name, mesh, teacher_mesh))
    planned = []
    for call in calls:
        with mesh_lib.use_mesh(call.mesh or mesh):
            module = call.lower().compiler_ir().operation.attributes["sym_name"].value
        planned.append((str(module).removeprefix("jit_"), call))
    return planned


@contextlib.contextmanager
def record_compiles() -> Iterator[list[str]]:
    """Records the names of the functions compiled within the context, in order."""
    names: list[str] = []

    def record(event: str, duration_secs: float, **details: str | int) -> None:
        if event == COMPILED:
            names.append(str(details["fun_name"]).removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_compiles_the_programs_that_plan_lists(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = CONFIGS[name].copy_and_resolve_references()
    if name.startswith("in pages"):
        monkeypatch.setattr(options, "choose_cache_backend", lambda *_: "plain")
    planned = list_planned(c)
    assert all(programs.explain_program(call.name) for _, call in planned)
    jax.clear_caches()
    with record_compiles() as names:
        loop.run(c, tmp_path)
    compiled = collections.Counter(names)
    listed = collections.Counter(module for module, _ in planned)
    unknown = compiled.keys() - listed.keys() - UNPLANNED_PROGRAMS.keys() - SCALARS
    assert not unknown, "not planned"
    idle = {module for module, call in planned if call.calls_per_step > 0} - compiled.keys()
    assert not idle, "never ran"
    for module in SAMPLING & compiled.keys():
        assert compiled[module] <= listed[module], f"{module}: shapes that are not planned"


def test_evaluations_compile_no_sampling_program(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their programs are compiled before step 0. No other test samples this number of tokens, so no
    program is in the cache already."""
    num_compiled: list[int] = []
    evaluate = evaluator.evaluate_benchmark
    with record_compiles() as compiled:

        def evaluate_noted(*args: Any, **options: Any) -> Any:
            num_compiled.append(len(compiled))
            return evaluate(*args, **options)

        monkeypatch.setattr(evaluator, "evaluate_benchmark", evaluate_noted)
        changes = {"eval__every": 1, "eval__limit": 2, "eval__max_new_tokens": 21}
        loop.run(config(opd__steps=2, **changes), tmp_path)
    assert len(num_compiled) == 2 and SAMPLING & set(compiled[: num_compiled[0]])
    assert not SAMPLING & set(compiled[num_compiled[0] :])


def test_unplanned_programs_are_not_planned() -> None:
    modules = {module for module, _ in list_planned(CONFIGS["opd"])}
    assert not modules & (UNPLANNED_PROGRAMS.keys() | SCALARS)
