"""Checks a run without starting it: what is wrong with it, its memory, and what it compiles.

Reads the configs of the models and every row of the data, but no weights, and writes nothing.
"""

import collections
import copy
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.data import dataset, files
from distill.planning import aot, gpus, programs
from distill.policy import hub, policy
from distill.runtime import console, paths, run_files, trackers
from distill.runtime import mesh as mesh_lib
from distill.runtime.gpu import GPU_PLUGINS
from distill.teachers import external, local
from distill.training import alerts, eval_hook, memory, preflight, resume, setup, stages
from distill.training.setup import RunSetup
from models.errors import UserError, UserErrors, name_key

ALL_ROWS = 2**62
T = TypeVar("T")


class Mistakes:
    """The mistakes found so far, each once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def collect(self, check: Callable[[], T]) -> T | None:
        """Returns what a check returns; None if it finds a mistake."""
        try:
            return check()
        except UserError as error:
            if str(error) not in self.found:
                self.found.append(str(error))
            return None


def check_run(c: ConfigDict, workdir: str = "", topology: str = "") -> None:
    """Prints what a run would read, need and compile, and what cannot be checked here.

    Args:
      workdir: of the run; if it holds one, the config must be one that can go on with it.
      topology: a slice or GPUs, as in `plan`, which need not be here; "": this machine's devices.

    Raises:
      UserErrors: with the mistakes that were found. One may hide others: of a stage whose data
        are missing no row is read.
    """
    mistakes, devices, memory_limit = Mistakes(), None, None
    mistakes.collect(lambda: trackers.check_trackers(c.log.to, must_be_installed=not topology))
    mistakes.collect(lambda: alerts.Alerts(c.alerts))
    if topology and (devices := mistakes.collect(lambda: find_devices(topology))):
        memory_limit = aot.get_chip(topology).hbm_gib * 2**30
    meshes = None
    if devices or not topology:
        meshes = mistakes.collect(lambda: mesh_lib.make_meshes(c, devices))
    # Stand-ins on the CPU have another attention, and so other memory.
    are_stand_ins = devices is not None and devices[0].platform == "cpu"
    with hub.without_weights():
        checked = _set_up(c, devices, meshes, workdir, mistakes)
        if checked is None:
            raise UserErrors(mistakes.found)
        run_setup, steps_done, validation = checked
        remaining = [stage for stage in run_setup.stages if stage.end_step > steps_done]
        for stage in remaining:
            data = stage.c.data
            names = [name for name, _ in data.mixture] or [data.source]
            read = f"{stage.source.size:,} rows" if stage.source.size else "rows"
            run_files.log_line(f"{stage.name} reads {read} of {', '.join(names)}")
            for line in preflight.list_stage_warnings(c, run_setup, stage, validation):
                run_files.log_line(line)
        if meshes and not are_stand_ins:
            _check_memory(c, run_setup, meshes[0], steps_done, memory_limit, mistakes)
    if mistakes.found:
        raise UserErrors(mistakes.found)
    if are_stand_ins:
        package = "jax-cuda12-plugin[with-cuda]" if _is_gpu(topology) else "libtpu"
        run_files.log_line(
            f"not checked: memory and programs, which for {topology} take its compiler: "
            f"pip install {package!r}"
        )
    run_files.log_line("nothing wrong was found; nothing was written")


def _is_gpu(topology: str) -> bool:
    return topology.partition(":")[0] in gpus.GPUS


def find_devices(topology: str) -> list[Any]:
    """Returns the devices of a slice or of GPUs that need not be here; without their compiler, CPU
    devices of the same number stand in.

    Call it before JAX is used: it then leaves accelerators of this machine alone.

    Raises:
      UserError: if there is no such slice.
    """
    aot.get_chip(topology)
    jax.config.update("jax_platforms", "cpu")
    plugins = GPU_PLUGINS if _is_gpu(topology) else ("libtpu",)
    if any(importlib.util.find_spec(name) for name in plugins):
        return aot.get_devices(topology)
    count = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


def _set_up(
    c: ConfigDict,
    devices: list[Any] | None,
    meshes: tuple[Mesh, Mesh] | None,
    workdir: str,
    mistakes: Mistakes,
) -> tuple[RunSetup, int, eval_hook.ValidationSetup | None] | None:
    """Sets the run up as `train` does, but for the files that it writes, and reads all rows.

    Args:
      meshes: None if the config's cannot be made.

    Returns the setup, the steps that the run in `workdir` has done, and the evaluation's setup if
    there is one; None if the run cannot be set up.
    """
    whole = copy.deepcopy(c)
    for name, message in setup.explain_unknown_entries(c).items():
        mistakes.found.append(message)
        with whole.unlocked():
            del whole[name]
    for name in _list_sections(c):
        if "data" in c[name] and not c[name].data.streaming:
            whole[name].data.check_rows = ALL_ROWS
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=devices or jax.devices())
    one_device = mesh, mesh
    path = epath.Path(workdir) if workdir and not paths.is_remote(workdir) else None
    if path and path.exists() and not path.is_dir():
        mistakes.found.append(f"--workdir={workdir}: is a file, not a folder")
    steps_done = (path and mistakes.collect(lambda: policy.find_newest_step(str(path)))) or 0

    def set_up(stages: tuple[str, ...], meshes: tuple[Mesh, Mesh], steps_done: int = 0) -> RunSetup:
        part = copy.deepcopy(whole)
        part.stages = stages
        return setup.setup_run(part, *meshes, steps_done)

    run_setup = mistakes.collect(lambda: set_up(c.stages, meshes or one_device, steps_done))
    if run_setup is None:  # stage by stage, and without the mesh, more may be found
        for name in c.stages:
            for choice in (meshes or one_device, one_device):
                mistakes.collect(functools.partial(set_up, (name,), choice))
        _collect_parts(c, mistakes)
        _collect_evaluation(c, mesh, mistakes)
        return None
    validation = mistakes.collect(
        lambda: eval_hook.setup_validation(c.eval, run_setup.student, c.seed)
    )
    if path and (path / "config.json").exists():
        remaining = [stage for stage in run_setup.stages if stage.end_step > steps_done]

        def compare() -> None:
            eval_rows = validation.rows if validation else None
            inputs = resume.describe_inputs(c, remaining, eval_rows)
            resume.init_workdir(path, c, inputs, steps_done, writes=False)

        mistakes.collect(compare)
    return run_setup, steps_done, validation


def _collect_parts(c: ConfigDict, mistakes: Mistakes) -> None:
    """Collects the mistakes in models, files and numbers that can be read one by one, which a setup
    that ended at the first of them did not reach."""

    def collect_input(key: str, path: str, find: Callable[[str], object]) -> None:
        def find_named() -> None:
            with name_key(key, path):
                find(path)

        if path not in ("", "arithmetic", local.INITIAL, local.EMA):
            mistakes.collect(find_named)

    models = {"student"}
    for name in _list_sections(c):
        s = c[name]
        if "objective" not in s:
            continue
        resolved = mistakes.collect(functools.partial(stages.resolve_objective, name, s))
        if resolved and stages.reads_teachers(c, s, resolved[0]):
            known = [teacher for teacher in s.teachers if teacher in c]
            models |= {*known} - {*external.list_external(c, known)}
        for check in (stages.check_counts, setup.make_stage_optimizer):
            mistakes.collect(functools.partial(check, name, s))
        key = f"config.{name}.data.{'mixture' if s.data.mixture else 'source'}"
        for source in mistakes.collect(functools.partial(_list_sources, name, s)) or ():
            if not source.startswith(("hf:", "tfds:")):
                collect_input(key, source, files.find_format)
    for name in sorted(models):
        collect_input(f"config.{name}.path", c[name].path, policy.resolve_model_dir)


def _collect_evaluation(c: ConfigDict, mesh: Mesh, mistakes: Mistakes) -> None:
    """Collects the mistakes in `config.eval`, which are no stage's, if the student can be read."""

    def check_evaluation() -> None:
        m = c.student
        with name_key("config.student.path", m.path):
            student = policy.make_abstract(m.path, m.dtype, False, mesh, tokenizer_path=m.tokenizer)
        eval_hook.setup_validation(c.eval, student, c.seed)

    if not any("config.student." in message for message in mistakes.found):
        mistakes.collect(check_evaluation)


def _list_sections(c: ConfigDict) -> list[str]:
    """Returns the names in `config.stages` that are sections of the config; others are refused
    elsewhere."""
    names = [name for name in c.stages if isinstance(name, str)]
    return [name for name in names if isinstance(c.get(name), ConfigDict)]


def _list_sources(name: str, s: ConfigDict) -> list[str]:
    """Returns the sources of stage `name`. Raises UserError for a malformed mixture."""
    with stages.name_stage(name):
        return dataset.list_source_names(s.data)


def _check_memory(
    c: ConfigDict,
    run_setup: RunSetup,
    mesh: Mesh,
    steps_done: int,
    memory_limit: float | None,
    mistakes: Mistakes,
) -> None:
    """Prints the memory of the largest stage, and the programs of every stage."""
    checks = preflight.check_memory(c, run_setup, mesh, steps_done, memory_limit)
    for line in mistakes.collect(lambda: [*checks]) or ():
        run_files.log_line(line)
    if memory_limit is None:
        memory_limit = memory.get_memory_limit()
    student = run_setup.student
    trained = mesh_lib.make_abstract_params(student.config, mesh, student.model.lora)
    for stage in run_setup.stages:
        if stage.end_step <= steps_done:
            continue
        described = memory.describe_stage(c, run_setup, stage, trained)
        with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
            calls = programs.list_stage_calls(described, memory_limit)
        counts = collections.Counter(call.name for call in calls)
        run_files.log_line(f"{stage.name} compiles {len(calls)} programs:")
        rows = [
            (f"  {name} x {n}" if n > 1 else f"  {name}", programs.explain_program(name))
            for name, n in counts.items()
        ]
        for line in console.render_table(rows).splitlines():
            run_files.log_line(line)
