"""python -m tests.support.chaos --kills=50 [--processes=2]: kills a run again and again.

Trains a tiny run of sft, opd and grpo to its end, undisturbed; then the same run in another
directory, which is killed (SIGKILL) many times, at a random moment of what the plan names, and
started again each time. Both must end with the same files. With two processes, the plan draws which
one is killed; after up to two seconds the other is killed too, as a launcher does it.

Each start is a fork of this process, which has imported everything, so that a life takes seconds.
A run tells through a pipe what it begins and ends, and is killed from outside.
"""

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before jax is imported, and as in tests/conftest.py.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "1"
os.environ["NPROC"] = "32"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from absl import flags
from ml_collections import ConfigDict

from configs import base
from distill.runtime import cli, distributed, run_files, watchdog, xla
from distill.runtime.checkpoint import Checkpoints
from distill.training import collect, eval_hook, loop, saving, setup, trainer
from tests.support.processes import find_free_port
from tests.support.runs import read_run, tiny_model

# What a run does -> the function that does it.
PHASES: dict[str, tuple[Any, str]] = {
    "restore": (saving, "restore_or_init"),
    "load": (setup, "load_stage_models"),
    "rollout": (collect, "sample_sequences"),
    "graded rollout": (collect, "sample_graded_sequences"),
    "sampling ahead": (collect, "sample_ahead"),
    "step": (trainer.Trainer, "step"),
    "save": (Checkpoints, "save"),
    "evaluation": (eval_hook.ValidationHook, "run"),
    "logs": (run_files.Writer, "write"),
    "open logs": (run_files.Writer, "__init__"),
}
WRITING_SECONDS = 0.15
AIMS = ("start", "restore", "load", "rollout", "step", "save", "writing", "evaluation", "logs")


@dataclass
class Process:
    """A process of a run, and what it has said."""

    pid: int
    pipe: int
    open: list[str] = field(default_factory=list)  # phases, from the outermost
    step: int = -1
    text: bytes = b""
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    begun: dict[str, float] = field(default_factory=dict)
    code: int | None = None

    def read(self, seconds: float) -> list[str]:
        """Waits up to `seconds` for news, and returns the phases that have begun. Sets `code` once
        the process has ended."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return []
        data = os.read(self.pipe, 65536)
        if not data:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.pipe)
            return []
        *lines, self.text = (self.text + data).split(b"\n")
        entered = []
        for line in lines:
            what, _, name = line.decode().partition(" ")
            if what == "at":
                self.step = int(name)
            elif what == "+":
                self.open.append(name)
                self.begun[name] = time.monotonic()
                entered.append(name)
            else:
                self.open.remove(name)
                self.times[name].append(time.monotonic() - self.begun[name])
        return entered

    def describe(self) -> str:
        return " > ".join(self.open) or "between"


def make_config(models: list[str], cache: Path, stages: list[str], steps: int) -> ConfigDict:
    """Configures stages of `steps` steps each, with a checkpoint after every other one."""
    c = base.get_config()
    c.stages = tuple(stages)
    c.student.path, c.teacher.path = models
    c.student.dtype = c.teacher.dtype = c.teacher.param_dtype = "float32"
    c.student.remat, c.student.ema_decay = False, 0.9
    c.compilation_cache = str(cache)
    c.checkpoint.every, c.checkpoint.keep_every = 2, 10
    c.log.transcripts, c.log.transcripts_every = 4, 1
    c.eval.every, c.eval.limit, c.eval.max_new_tokens = 3, 4, 8
    c.eval.benchmark, c.eval.data, c.eval.best = "arithmetic", "", "-mean_length"
    c.grpo = base.make_stage("grpo")
    for stage in (c.sft, c.opd, c.grpo):
        stage.steps, stage.batch_size = steps, 8
        stage.max_prompt_tokens, stage.max_response_tokens = 60, 16
        stage.optim.learning_rate = 1e-3
    c.sft.pack_tokens, c.sft.accumulate = 100, 2
    c.opd.samples, c.opd.rollout.token_budget, c.opd.rollout.segment = 2, 60, 8
    c.grpo.samples, c.grpo.rollout.asynchronous = 4, True
    c.grpo.reward.format = c.grpo.reward.length = 1.0
    c.grpo.reward.length_margin = 8
    return c


def start(c: ConfigDict, workdir: Path, number: int = 0, count: int = 1, port: int = 0) -> Process:
    """Forks a process of a run; its output is appended to WORKDIR.log."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return Process(pid, reader, ["start"], begun={"start": time.monotonic()})
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tell_phases(lambda text: os.write(writer, f"{text}\n".encode()))
        distributed.HEARTBEAT_SECONDS = 10
        xla.MIN_COMPILE_SECONDS = 0.0  # each life reads all of its programs
        options = flags.FlagValues()
        cli.define_process_flags(options)
        words = [f"--coordinator_address=localhost:{port}", f"--process_id={number}"]
        options(["", *words, f"--num_processes={count}"] if count > 1 else [""])
        with distributed.join_processes(options):
            loop.run(c, workdir)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def tell_phases(tell: Callable[[str], object]) -> None:
    """Patches the functions of PHASES so that their begin and end are told."""

    def wrap(owner: Any, function: str, before: str, after: str) -> None:
        original = getattr(owner, function)

        def told(*args: Any, **named: Any) -> Any:
            if before:
                tell(before)
            try:
                return original(*args, **named)
            finally:
                if after:
                    tell(after)

        setattr(owner, function, told)

    for phase, (owner, function) in PHASES.items():
        wrap(owner, function, f"+ {phase}", f"- {phase}")
    original = watchdog.Watchdog.start_step

    def start_step(self: Any, step: int) -> None:
        tell(f"at {step}")
        original(self, step)

    watchdog.Watchdog.start_step = start_step
    wrap(saving, "restore_or_init", "- start", "")


@dataclass
class Aim:
    """When to kill: in `phase` of the first step from `step` on, at `share` of its usual time.

    "writing" is the save in the background."""

    phase: str
    step: int
    share: float
    victim: int = 0


def live(
    c: ConfigDict, workdir: Path, count: int, aim: Aim | None, usual: dict[str, list[float]]
) -> tuple[list[Process], str]:
    """Runs until the run ends or is killed as `aim` says; returns its processes, and what the
    killed one was doing ("" if none was killed)."""
    port = find_free_port()
    processes = [start(c, workdir, i, count, port) for i in range(count)]
    try:
        return processes, watch(processes, workdir, aim, usual)
    finally:
        kill(processes)


def kill(processes: list[Process]) -> None:
    """Kills those that have not ended."""
    for process in processes:
        if process.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def watch(
    processes: list[Process], workdir: Path, aim: Aim | None, usual: dict[str, list[float]]
) -> str:
    """Waits until all have ended, and kills as `aim` says; returns what the victim was doing."""
    kill_time, hit, count = None, "", len(processes)
    victim = processes[aim.victim if aim else 0]
    begin = time.monotonic()
    while any(p.code is None for p in processes):
        now = time.monotonic()
        assert now - begin < 1200, Path(f"{workdir}.log").read_text()[-3000:]
        if kill_time and now >= kill_time and victim.code is None:
            os.kill(victim.pid, signal.SIGKILL)
            while victim.code is None:
                victim.read(1)
            hit = f"step {victim.step}: {victim.describe()}"
            time.sleep(random.random() * 2 * (count > 1))
            kill(processes)
        for process in processes:
            if process.code is not None:
                continue
            entered = process.read(0.002 if count > 1 or kill_time else 0.02)
            if process is not victim or aim is None or kill_time:
                continue
            if (delay := find_delay(aim, victim, entered, usual)) is not None:
                kill_time = time.monotonic() + delay
    return hit


def find_delay(
    aim: Aim, victim: Process, entered: list[str], usual: dict[str, list[float]]
) -> float | None:
    """Returns the seconds from now until the kill, once the victim has entered what `aim` names."""
    phase = "save" if aim.phase == "writing" else aim.phase
    times = sorted(usual.get(phase, [0.1]))
    middle = times[len(times) // 2]
    if phase == "start":
        return aim.share * middle
    is_there = phase in entered or (phase == "rollout" and "graded rollout" in entered)
    if not is_there or (victim.step < aim.step and phase not in ("restore", "load")):
        return None
    # Written in the background once the state is copied.
    return middle + aim.share * WRITING_SECONDS if aim.phase == "writing" else aim.share * middle


def find_leaks(processes: list[Process]) -> list[str]:
    """Lists processes of the groups of those that have ended, after a moment for them to notice."""
    groups = {p.pid for p in processes}
    for _ in range(100):
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) in groups and fields[0] != "Z":
                    left.append((path.parent / "cmdline").read_text().replace("\0", " "))
        if not left:
            return []
        time.sleep(0.1)
    return left


def in_child(function: Callable[[], Any]) -> Any:
    """Returns the JSON of what `function` returns in a fork: this process never uses JAX."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
        return json.loads(text)
    code = 1
    try:
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(function()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def harass(
    folder: Path, stages: list[str], steps: int, kills: int, count: int, seed: int
) -> list[str]:
    """Does what the file says; returns the differences between the two runs."""
    draw = random.Random(seed)
    student, teacher = folder / "student", folder / "teacher"
    models = in_child(lambda: [tiny_model(student, 0), tiny_model(teacher, 1, hidden_size=48)])
    c = make_config(models, folder / "cache", stages, steps)
    whole, broken = folder / "whole", folder / "broken"
    usual: dict[str, list[float]] = {}
    # The second time all programs are compiled: these are the usual times.
    for _ in range(2 if kills > 10 else 1):
        shutil.rmtree(whole, ignore_errors=True)
        processes, _ = live(c, whole, count, None, {})
        codes = [p.code for p in processes]
        assert not any(codes), Path(f"{whole}.log").read_text()[-3000:]
        usual = dict(processes[0].times)
    print(f"{'':4}{'aimed at':30}{'killed in':44}{'unfinished':>11}{'saved':>6}{'seconds':>9}")
    differences = []
    for number in range(kills):
        step = number * (len(stages) * steps - 2) // kills
        aims = [a for a in AIMS if a != "rollout" or stages[step // steps] != "sft"]
        aim = Aim(draw.choice(aims), step, draw.random(), draw.randrange(count))
        begin = time.monotonic()
        processes, hit = live(c, broken, count, aim, usual)
        codes = [p.code for p in processes]
        folders = list((broken / "checkpoints").glob("*"))
        unfinished = sum(not path.name.isdigit() for path in folders)
        saved = max([int(path.name) for path in folders if path.name.isdigit()], default=0)
        name = f"{aim.phase}, {aim.step}" + f", process {aim.victim}" * (count > 1)
        print(
            f"{number + 1:<4}{name:30}{hit or f'ended: {codes}':44}{unfinished:11}{saved:6}"
            f"{time.monotonic() - begin:9.1f}",
            flush=True,
        )
        if codes[aim.victim] not in (0, -signal.SIGKILL):
            differences.append(f"life {number + 1} ended with {codes}")
            break
        differences += [f"life {number + 1} left {left}" for left in find_leaks(processes)]
    processes, _ = live(c, broken, count, None, {})
    if any(p.code for p in processes):
        differences.append(f"the last life ended with {[p.code for p in processes]}")
    expected, actual = (in_child(lambda path=path: read_run(path)) for path in (whole, broken))
    for key in sorted(expected.keys() | actual.keys()):
        same = expected.get(key) == actual.get(key)
        if not same:
            differences.append(f"{key}: {expected.get(key)!r:.1000} now {actual.get(key)!r:.1000}")
    print(
        f"{len(expected)} things compared, {len(actual['metrics'])} rows of metrics; "
        f"{'; '.join(differences) or 'no difference'}"
    )
    if differences:
        print(Path(f"{broken}.log").read_text()[-6000:])
    return differences


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default="sft,opd,grpo")
    for name, default in (("steps", 10), ("kills", 50), ("processes", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stages = a.stages.split(",")
        differences = harass(Path(folder), stages, a.steps, a.kills, a.processes, a.seed)
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
