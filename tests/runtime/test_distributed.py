"""Tests how processes agree and how flags describe them, and paths in buckets."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import jax
import pytest
from absl import flags
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from jax.experimental.compilation_cache import compilation_cache

from configs import base, quickstart
from distill.policy import hub
from distill.runtime import cli, distributed, run_files, xla
from distill.runtime.checkpoint import Checkpoints
from distill.training import loop, resume
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.processes import run
from tests.support.runs import read_scalars


def options(*words: str) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.define_process_flags(values)
    values(["verb", *words])
    return values


@pytest.mark.parametrize(
    "words, message",
    [
        (["--num_processes=2", "--process_id=1"], "--coordinator_address: is needed"),
        (["--coordinator_address=here"], "HOST:PORT, or auto"),
        (["--coordinator_address=here:1", "--num_processes=2"], "both be given"),
        (
            ["--coordinator_address=here:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: must be below --num_processes=2",
        ),
    ],
)
def test_incomplete_process_flags_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message), distributed.join_processes(options(*words)):
        raise AssertionError("joined")


def test_a_single_process_calls_no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: 1 / 0)
    with distributed.join_processes(options()):
        assert distributed.broadcast_from_primary(lambda: [1.5, None, "x"]) == [1.5, None, "x"]
        assert distributed.max_over_processes(15) == 15
        assert distributed.reduce_means({"a": (3, 2), "b": (0, 0)}) == {"a": 1.5}


def test_one_process_on_a_multi_host_slice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match=r"4 hosts.*--coordinator_address=auto"):
        distributed.join_processes(options()).__enter__()


def test_two_processes_train(tmp_path: Path) -> None:
    """Trains one step with two processes of one device each; only one writes, and both succeed."""
    words = ["--config=configs/conditions.py:opd,tiny", f"--workdir={tmp_path / 'run'}"]
    words += ["--config.mesh.fsdp=-1", "--config.opd.steps=1"]
    run("train", 2, 1, tmp_path / "log", words)
    (row,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 0
    about = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert about["devices"]["processes"] == 2 and about["devices"]["count"] == 2


def pretend_installed(monkeypatch: pytest.MonkeyPatch, package: str, present: bool) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        return present or None if name == package else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryFileSystem:
    """Keeps gs:// in memory; as in a bucket, files cannot be appended to."""

    class Bucket(MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: dict[str, Any] = {}  # noqa: RUF012  its own
        pseudo_dirs = [""]  # noqa: RUF012

        def _open(self, path: str, mode: str = "rb", **named: Any) -> Any:
            assert "a" not in mode, f"{path} is appended to"
            return super()._open(path, mode, **named)

        def glob(self, path: str, **named: Any) -> list[str]:  # without a scheme, as gcsfs does it
            return [found.partition("gs:/")[2] for found in super().glob(path, **named)]

    bucket = Bucket()
    original = fsspec.filesystem

    def filesystem(name: str, **named: Any) -> Any:
        return bucket if name in ("gs", "gcs") else original(name, **named)

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    pretend_installed(monkeypatch, "gcsfs", True)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    yield bucket
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def test_run_files_are_written_to_a_bucket(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workdir, c = "gs://bucket/run", quickstart.get_config("tiny")
    for model in (c.student, c.teacher):
        model.path = str(ROOT / model.path)
    resume.init_workdir(run_files.epath.Path(workdir), c)
    for step in range(2):
        stage = SimpleNamespace(name="opd", c=c.opd, local_teachers=("teacher",), external=())
        found = resume.describe_inputs(c, [stage])
        resume.init_workdir(run_files.epath.Path(workdir), c, found, step)
    assert b"config.teacher.path" in memory.cat(f"{workdir}/inputs.json")
    with run_files.Writer(workdir, 0) as writer:
        for step in range(3):
            writer.write(step, "opd", {"x": step / 3})
        assert not memory.exists("gs://bucket/run/metrics.jsonl")  # not yet
        writer.flush()
        assert memory.cat("gs://bucket/run/metrics.jsonl").count(b"\n") == 3
        for step in range(1, 3):
            writer.write_rollouts(step, [{"text": "a"}])
    with run_files.Writer(workdir, 2) as writer:  # step 2 is repeated
        writer.write(2, "opd", {"x": None})
    lines = memory.cat("gs://bucket/run/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["x"] for line in lines] == [0, 1 / 3, None]
    assert memory.cat("gs://bucket/run/rollouts/000001.jsonl") == b'{"text": "a"}\n'
    assert not memory.exists("gs://bucket/run/rollouts/000002.jsonl")
    events = read_scalars(run_files.epath.Path(workdir) / "tensorboard")
    assert [event[:2] for event in events] == [(0, "x"), (1, "x")]
    assert hub.is_run(workdir)
    with Checkpoints(f"{workdir}/checkpoints") as saved:
        assert str(saved._directory) == f"{workdir}/checkpoints" and saved.read_latest() is None
    with pytest.raises(UserError, match="another config"):
        c.seed = 5
        resume.init_workdir(run_files.epath.Path(workdir), c, steps_done=1)
    assert not list(tmp_path.iterdir())  # no folder named gs:


@pytest.mark.parametrize("path", ["gs:/bucket/run", "s3://bucket/run"])
def test_malformed_bucket_paths_are_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"--workdir=.*neither a local path nor gs://BUCKET/PATH"):
        loop.run(quickstart.get_config("tiny"), path)


def test_bucket_paths_need_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "gcsfs", False)
    with pytest.raises(UserError, match="--workdir=gs://b/x: needs gcsfs"):
        loop.run(quickstart.get_config("tiny"), "gs://b/x")


def test_a_second_run_loads_programs_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xla, "MIN_COMPILE_SECONDS", 0.0)
    cache_dir = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    try:
        xla.init_compilation_cache(str(tmp_path / "cache"))
        lines = []
        for _ in range(2):
            jax.clear_caches()
            with xla.CompileMonitor() as programs:
                jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((8, 8))).block_until_ready()
                assert programs.report_compiles("step 0", 0.0) > 0
                assert programs.report_compiles("step 1", 0.0) == 0
            lines.append(capsys.readouterr().err.splitlines()[0])
        assert list((tmp_path / "cache").iterdir())
        assert "0 of them from the cache" in lines[0]
        count = lines[1].split("compiled ")[1].split()[0]
        assert f"{count} programs" in lines[1] and f"{count} of them from the cache" in lines[1]
    finally:
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()


@pytest.fixture
def no_cache() -> Iterator[None]:
    """A process without JAX_COMPILATION_CACHE_DIR."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()


def get_cache() -> str | None:
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009


def test_compiled_programs_are_kept_for_the_user_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache: None
) -> None:
    assert base.get_config().compilation_cache == xla.AUTO
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(xla, "MIN_COMPILE_SECONDS", 0.0)
    xla.init_compilation_cache("")
    assert get_cache() is None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        xla.init_compilation_cache()
        assert get_cache() is None and not list(tmp_path.iterdir())
    xla.init_compilation_cache()
    folder = xla.get_user_cache()
    assert get_cache() == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent == tmp_path / "qwen3-distill" / "compiled"
    for _ in range(2):
        jax.clear_caches()
        with xla.CompileMonitor() as monitor:
            jax.jit(lambda x: (x @ x.T).sum() - 1)(jax.numpy.ones((8, 8))).block_until_ready()
    assert monitor.cache_hits and list(folder.iterdir())
    jax.config.update("jax_compilation_cache_dir", "/mine")  # as JAX_COMPILATION_CACHE_DIR does
    xla.init_compilation_cache()
    assert get_cache() == "/mine"


def test_programs_are_kept_apart_by_processor(tmp_path: Path) -> None:
    """Hosts of one name may have other processors, and jax's keys do not tell these apart."""
    about = tmp_path / "cpuinfo"
    described = set()
    for known in ("avx2 avx512f", "avx2"):
        core = f"model name\t: A\ncpu MHz\t: {{}}\nflags\t\t: {known}"
        for clock in (1000, 2000):
            about.write_text(core.format(clock) + "\n\n" + core.format(3000))
            described.add(xla.describe_processor(about))
    assert len(described) == 2
    assert xla.describe_processor(tmp_path / "none")
    assert xla.get_user_cache() == xla.get_user_cache()


def test_a_cache_that_was_left_half_written_or_damaged_is_used_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache: None
) -> None:
    """jax alone would fail at each program, for ever, once an entry lacks its time; a damaged
    program is compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(xla, "MIN_COMPILE_SECONDS", 0.0)
    folder = xla.get_user_cache()

    def run(number: float) -> float:  # as a new process does
        jax.clear_caches()
        jax.config.update("jax_compilation_cache_dir", None)
        xla.init_compilation_cache()
        return float(jax.jit(lambda x: (x @ x.T).sum() + number)(jax.numpy.ones((8, 8))))

    assert run(1.5) == 513.5
    for path in folder.glob("*-atime"):
        path.unlink()
    for path in folder.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    (folder / "jit_x-0-atime").write_bytes(b"12345678")
    assert run(1.5) == 513.5 and run(2.5) == 514.5  # no warning, which would fail the test
    names = [path.name for path in folder.glob("*-*")]
    assert len(names) == 2 * len({name.rpartition("-")[0] for name in names}) > 0
    for path in folder.glob("*-cache"):
        content = path.read_bytes()
        path.write_bytes(content[:200] + bytes([content[200] ^ 255]) + content[201:])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert run(2.5) == 514.5


def test_a_cache_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cache: None, capsys
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = xla.get_user_cache()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    xla.init_compilation_cache()
    assert get_cache() is None
    captured = capsys.readouterr()
    assert f"{folder}: other users may write there" in captured.out + captured.err


def test_programs_that_are_compiled_at_once_take_their_time_once(capsys, monkeypatch) -> None:
    """Seconds of compiling are never more than those that passed."""
    clock = [100.0]
    monkeypatch.setattr(xla.time, "perf_counter", lambda: clock[0])
    monitor = xla.CompileMonitor()
    ends = {"decode": (105, 5.0), "prefill": (106, 4.0), "apply": (110, 2.0)}
    for name, (end, seconds) in ends.items():
        clock[0] = float(end)
        monitor._record_compile(xla._COMPILE_EVENT, seconds, fun_name=f"jit({name})")
    assert monitor.report_compiles("step 0", 0.0) == 8.0
    said = "step 0: compiled 3 programs in 8.0 s, 0 of them from the cache: "
    assert capsys.readouterr().err == f"{said}decode 5.0, prefill 4.0, apply 2.0, some at once\n"
    clock[0] = 112.0  # begun before the last report
    monitor._record_compile(xla._COMPILE_EVENT, 3.0, fun_name="later")
    assert monitor.report_compiles("step 1", 0.0) == 2.0


@pytest.mark.parametrize("name", ["/proc/no/cache", "s3://bucket/cache", "file/cache"])
def test_a_cache_that_cannot_be_used_is_done_without(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_cache: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    xla.init_compilation_cache(name)
    line = capsys.readouterr().err
    assert line.startswith(f"warning: compiled programs are not kept for the next start: {name}: ")
    assert line.count("\n") == 1 and get_cache() is None
