"""Tests checkpoints: round trips, damage, and processes that die."""

import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill.runtime import checkpoint, integrity, saved_step
from distill.runtime.checkpoint import Checkpoints
from models.errors import UserError
from tests.support.checkpoints import abstract, mesh, state
from tests.support.paths import ROOT
from tests.support.processes import find_free_port


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(directory, *steps, keep=5):
    with Checkpoints(directory, save_interval_steps=1, max_to_keep=keep) as saved:
        for step in steps:
            assert saved.save(step, state(step), {"stage": "opd", "number": step})


def biggest(directory):
    files = [f for f in directory.rglob("*") if f.is_file()]
    return max(files, key=lambda f: f.stat().st_size)


def flip(file, count=1):
    data = bytearray(file.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + count):
        data[i] ^= 0x10
    file.write_bytes(data)


def test_round_trip_onto_another_sharding(tmp_path):
    save(tmp_path, 3)
    other = mesh(2, 4)
    with Checkpoints(tmp_path) as saved:
        assert saved.read_latest() == (3, {"stage": "opd", "number": 3})
        result = saved.restore(abstract(state(), other))
    assert result is not None
    restored, meta = result
    assert meta == {"stage": "opd", "number": 3}
    same(restored, state(3))
    kernel = restored["params"]["layers"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(other, P("b", "a")), 2)


def test_bfloat16_and_partial_restores(tmp_path):
    tree = {"params": state(1, dtype=jnp.bfloat16)["params"], "step": jnp.int32(1)}
    with Checkpoints(tmp_path, save_interval_steps=1, max_to_keep=2) as saved:
        saved.save(1, tree, {})
    with Checkpoints(tmp_path) as saved:
        result = saved.restore({"params": abstract(tree["params"])}, step=1)
    assert result is not None
    same(result[0], {"params": tree["params"]})


def test_saved_state_may_be_donated(tmp_path):
    """The state may be donated after save returns, and so may a restored one."""
    tree = state(1)
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    with Checkpoints(tmp_path, save_interval_steps=1, max_to_keep=2) as saved:
        saved.save(1, tree, {})
        bump(tree)
    with Checkpoints(tmp_path) as saved:
        result = saved.restore(abstract(state(1)))
    assert result is not None
    same(result[0], state(1))
    bump(result[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(result[0]))


def steps_in(directory):
    return {int(p.name) for p in directory.iterdir() if p.name.isdigit()}


def test_save_interval_and_kept_steps(tmp_path):
    """The newest two steps and the multiples of three are kept."""
    with Checkpoints(tmp_path, 2, max_to_keep=2, keep_every_steps=3) as saved:
        assert [step for step in range(1, 8) if saved.should_save(step)] == [2, 4, 6]
        for step in (2, 3, 4, 6, 7, 8):
            assert saved.save(step, state(step), {})
        assert not saved.save(8, state(8), {})
        with pytest.raises(ValueError, match="already holds 8"):
            saved.save(6, state(6), {})
    assert steps_in(tmp_path) == {3, 6, 7, 8}


def test_saves_are_due_by_time(tmp_path, monkeypatch):
    """A save is due once the next step, as long as the last, would end too late."""
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def list_saved(seconds, steps):
        now[0], saved_steps, directory = 0.0, [], tmp_path / str(seconds)
        with Checkpoints(directory, 1000, 2, save_interval_minutes=10) as saved:
            for step in range(1, steps):
                now[0] += seconds
                if saved.should_save(step):
                    saved_steps.append(step)
                    saved.save(step, {"step": jnp.int32(step)}, {})
                    saved._writer.wait_until_finished()  # pyright: ignore[reportOptionalMemberAccess]
        return saved_steps

    assert list_saved(240, 8) == [2, 4, 6]  # after 8 minutes: with the next step it would be 12
    assert list_saved(200, 8) == [3, 6]
    assert list_saved(700, 4) == [1, 2, 3]


def test_no_save_is_due_while_the_last_is_written(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Checkpoints, "_is_complete", lambda *_: now[0] > 2000)
    with Checkpoints(tmp_path, 1000, 2, save_interval_minutes=10) as saved:
        saved.save(1, {"step": jnp.int32(1)}, {})
        due = []
        for step in range(2, 6):
            now[0] += 700
            due.append(saved.should_save(step))
    assert due == [False, False, True, True]


def test_old_steps_are_deleted_once_the_new_one_is_complete(tmp_path):
    with Checkpoints(tmp_path, 1, max_to_keep=1) as saved:
        saved.save(1, state(1), {})
        saved.save(2, state(2), {})
        while saved._is_writing:
            saved.check_last_save()
        saved._deleter.submit(lambda: None).result()
        assert steps_in(tmp_path) == {2}


def test_a_replacing_save_may_be_of_an_earlier_step(tmp_path):
    """As of a best checkpoint that a resumed run finds before that of the run it continues."""
    with Checkpoints(tmp_path, 1, max_to_keep=1) as saved:
        saved.save(60, state(60), {"value": 0.5}, replace=True)
        assert not saved.save(60, state(60), {"value": 0.5}, replace=True)
        assert saved.save(50, state(50), {"value": 0.6}, replace=True)
        saved._finish_save()
        assert saved.read_latest() == (50, {"value": 0.6})
        assert saved.save(60, state(60), {"value": 0.7}, replace=True)
    assert steps_in(tmp_path) == {60}


def test_restore_from_an_empty_directory_is_none(tmp_path):
    with Checkpoints(tmp_path / "absent") as saved:
        assert saved.read_latest() is None
        assert saved.restore(abstract(state())) is None
    assert not (tmp_path / "absent").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "paper.txt").write_text("mine")
    with Checkpoints(tmp_path / "notes", save_interval_steps=1, max_to_keep=1) as saved:
        assert saved.read_latest() is None
        for step in (1, 2):
            saved.save(step, state(step), {})
    assert (tmp_path / "notes" / "paper.txt").read_text() == "mine"


def cut(step):
    file = biggest(step)
    file.write_bytes(file.read_bytes()[:-1000])


def lose(step):
    biggest(step).unlink()


def flip_data(step):
    flip(biggest(step / "params"))


def flip_about(step):
    file = step / "about" / "metadata"
    text = file.read_text()
    assert '"number":2' in text.replace(" ", "")
    file.write_text(text.replace("opd", "sft"))


def cut_about(step):
    file = step / "about" / "metadata"
    file.write_text(file.read_text()[:20])


def lose_item(step):
    shutil.rmtree(step / "opt_state")


def lose_list(step):
    (step / "files.json").unlink()


def half(step):
    """As a copy or a deletion that was interrupted leaves it."""
    for file in sorted(f for f in step.rglob("*") if f.is_file())[::2]:
        file.unlink()


DAMAGES = [cut, lose, flip_data, flip_about, cut_about, lose_item, lose_list, half]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back_to_an_earlier_one(tmp_path, capsys, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, save_interval_steps=1, max_to_keep=5) as saved:
        result = saved.restore(abstract(state()))
        assert result is not None
        assert result[1]["number"] == 1
        same(result[0], state(1))
        errors = capsys.readouterr().err
        assert f"{tmp_path / '2'}: damaged (" in errors
        assert f"{tmp_path / '1'}: the newest checkpoint that is intact" in errors
        assert (tmp_path / "2").is_dir()  # kept as evidence until the run reaches that step again
        assert saved.save(2, state(20), {"number": 20})
    with Checkpoints(tmp_path) as saved:
        result = saved.restore(abstract(state()))
    assert result is not None
    assert result[1]["number"] == 20
    same(result[0], state(20))
    assert capsys.readouterr().err.count(": damaged") == 1  # that of the replacement


def test_a_flipped_byte_of_any_file_is_found(tmp_path, monkeypatch):
    """The one in the middle of each, with digests of files and by the arrays' checksums alone."""
    one = mesh(1, 1, devices=1)
    tree = {"params": state(1, one)["params"], "step": jnp.int32(1)}
    expected = abstract(tree, one)
    for digest_bytes in (integrity.DIGEST_BYTES, 0):
        monkeypatch.setattr(integrity, "DIGEST_BYTES", digest_bytes)
        with Checkpoints(tmp_path / str(digest_bytes), save_interval_steps=1) as saved:
            saved.save(1, tree, {"number": 1})
        path, unnoticed = tmp_path / str(digest_bytes) / "1", []
        files = [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            before = file.read_bytes()
            flip(file)
            try:
                same(saved_step.load(epath.Path(path), expected), (tree, {"number": 1}))
                unnoticed.append(file.relative_to(path).as_posix())
            except integrity.DamagedError:
                pass
            file.write_bytes(before)
        assert not unnoticed if digest_bytes else len(unnoticed) < len(files) * 2 / 3


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, monkeypatch):
    """Its arrays have checksums, and no list of files was written; a lost list is damage."""
    make_items = saved_step.make_items

    def make_earlier_items(state, meta):
        items = make_items(state, meta)
        about = {name: items["about"].item[name] for name in ("meta", "leaves")}
        about["crc32"] = integrity.compute_crc32(about)
        others = {name: item for name, item in items.items() if name != "about"}
        return ocp.args.Composite(**others, about=ocp.args.JsonSave(about))

    monkeypatch.setattr(saved_step, "make_items", make_earlier_items)
    save(tmp_path, 1)
    (tmp_path / "1" / integrity.LIST_NAME).unlink()
    with Checkpoints(tmp_path) as saved:
        assert saved.read_latest() == (1, {"stage": "opd", "number": 1})
        restored = saved.restore(abstract(state()))
    assert restored is not None
    same(restored[0], state(1))


def test_left_over_temporaries_are_removed(tmp_path, capsys):
    """Those of a killed process, of any step and with any suffix; not by a reader."""
    save(tmp_path, 1)
    left = [tmp_path / f"{name}.orbax-checkpoint-tmp" for name in ("1", "2")]
    left.append(tmp_path / "7.orbax-checkpoint-tmp-1700000000")
    for folder in left:
        shutil.copytree(tmp_path / "1", folder)
    with Checkpoints(tmp_path) as saved:
        assert saved.read_latest() == (1, {"stage": "opd", "number": 1})
    assert all(folder.is_dir() for folder in left)
    with Checkpoints(tmp_path, save_interval_steps=1) as saved:
        assert saved.save(2, state(2), {})
    assert steps_in(tmp_path) == {1, 2} and not list(tmp_path.glob("*tmp*"))
    assert capsys.readouterr().err.count("an unfinished checkpoint, removed") == 3


def test_the_abstract_state_may_depend_on_the_checkpoint(tmp_path):
    """The newest is of a stage with another optimiser, and damaged."""
    first = {"params": state(1)["params"], "opt_state": {"momentum": jnp.ones(3)}}
    with Checkpoints(tmp_path, save_interval_steps=1) as saved:
        saved.save(1, first, {"index": 0})
        saved.save(2, state(2), {"index": 1})
    make = {0: abstract(first), 1: abstract(state(2))}
    with Checkpoints(tmp_path) as saved:
        newest = saved.restore(lambda meta: make[meta["index"]])
        cut(tmp_path / "2")
        older = saved.restore(lambda meta: make[meta["index"]])
    assert newest is not None and older is not None
    same(newest[0], state(2))
    same(older[0], first)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 1)])
def test_eight_devices_to_other_meshes(tmp_path, sizes):
    saved_state = state(3, mesh(8, 1))
    with Checkpoints(tmp_path, save_interval_steps=1) as saved:
        saved.save(3, saved_state, {})
    other = mesh(*sizes, devices=sizes[0] * sizes[1])
    with Checkpoints(tmp_path) as saved:
        result = saved.restore(abstract(state(), other))
    assert result is not None
    same(result[0], saved_state)
    kernel = result[0]["params"]["layers"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(other, P("b", "a")), 2)


def test_a_run_with_only_damaged_checkpoints_does_not_restart(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        cut(tmp_path / step)
    with Checkpoints(tmp_path) as saved, pytest.raises(UserError, match="/2: damaged"):
        saved.restore(abstract(state()))


def test_restoring_another_state_is_refused(tmp_path):
    """A changed config is a user error, not damage: no earlier checkpoint is tried."""
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as saved:
        half = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
            abstract(state())["params"],
        )
        with pytest.raises(
            UserError, match=r"params/layers/kernel is float32\[64, 96\] there, but bfloat16"
        ):
            saved.restore({"params": half})
        less = abstract(state())
        del less["params"]["norm"]
        with pytest.raises(UserError, match=r"params/norm is float32\[7\] there, but absent"):
            saved.restore(less)
        with pytest.raises(UserError, match="no checkpoint of step 9"):
            saved.restore(abstract(state()), step=9)


KILLED = """
import os, signal, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from distill.runtime.checkpoint import Checkpoints
from tests.support.checkpoints import state
saved = Checkpoints({directory!r}, save_interval_steps=1, max_to_keep=5)
saved.save(1, state(1), {{}})
saved._writer.wait_until_finished()
threading.Timer({delay}, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
saved.save(2, state(2), {{}})
time.sleep(60)
"""


def test_a_kill_while_saving_leaves_a_valid_checkpoint(tmp_path):
    code = KILLED.format(directory=str(tmp_path), delay=0.01)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    with Checkpoints(tmp_path, save_interval_steps=1, max_to_keep=5) as saved:
        result = saved.restore(abstract(state()))
        assert result is not None
        step = int(result[0]["step"])
        assert step in (1, 2)  # 2 if saving was quicker than the kill
        same(result[0], state(step))
        assert not list(tmp_path.glob("*tmp*"))
        saved.save(3, state(3), {})


FULL = """
import resource, signal, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from distill.runtime.checkpoint import Checkpoints
from models.errors import UserError
from tests.support.checkpoints import state
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name, polls in (("seen", 1000), ("left", 0)):
    try:
        with Checkpoints({directory!r} + "/" + name, save_interval_steps=100) as saved:
            if name == "seen":
                saved.save(1, state(1), {{}})
                saved._writer.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
            saved.save(2, state(2), {{}})
            for _ in range(polls):
                saved.should_save(3)  # as after each step of training
                time.sleep(0.01)
            print("left", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def test_a_full_disk_is_reported_at_once_and_in_one_line(tmp_path):
    """Writing fails in a thread, after `save` has returned; once there is room it succeeds."""
    code = FULL.format(directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "TPU" not in line], done.stderr
    rooms = r"\(0\.1 MiB of arrays to write, [\d,.]+ MiB free there\)"
    first, left, second = done.stdout.splitlines()
    for line, name, step in ((first, "seen", 1), (second, "left", 0)):
        assert re.fullmatch(
            rf"{tmp_path}/{name}/2: the checkpoint could not be written: File too large {rooms}\. "
            rf"Once that is solved, the same command goes on from step {step}",
            line,
        )
    assert left == "left"
    with Checkpoints(tmp_path / "seen", save_interval_steps=1) as saved:
        result = saved.restore(abstract(state()))
        assert result is not None
        same(result[0], state(1))
        saved.save(2, state(2), {})
    assert steps_in(tmp_path / "seen") == {1, 2}


TWO = """
import glob, os, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{port}", 2, {process}, initialization_timeout=60)
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from distill.runtime import integrity
from distill.runtime.checkpoint import Checkpoints
from tests.support.checkpoints import abstract, mesh

def state(n):
    full = np.random.default_rng(n).normal(size=(64, 96)).astype(np.float32)
    where = NamedSharding(mesh(4, 2), P("a", "b"))
    return {{"params": jax.make_array_from_callback(full.shape, where, lambda at: full[at])}}

with Checkpoints({directory!r}, save_interval_steps=1, max_to_keep=5) as saved:
    for n in (1, 2):
        saved.save(n, state(n), {{"n": n}})
if {process} == 1:  # cut what only the other process will read
    files = glob.glob({directory!r} + "/2/params/ocdbt.process_0/d/*")
    os.truncate(max(files, key=os.path.getsize), 5000)
multihost_utils.sync_global_devices("cut")
with Checkpoints({directory!r}) as saved:  # process 0 sees that the file is too short
    assert saved.restore(abstract(state(0), spec=("a", "b")))[1] == {{"n": 1}}
integrity.check_files = lambda *_: None
with Checkpoints({directory!r}, save_interval_steps=1, max_to_keep=5) as saved:
    found, meta = saved.restore(abstract(state(0), spec=("a", "b")))
    assert meta == {{"n": 1}}, meta
    want = state(1)["params"].addressable_shards
    for a, b in zip(found["params"].addressable_shards, want, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
    assert saved.save(2, state(7), {{"n": 7}})
"""


def test_two_processes_agree_on_damaged_checkpoints(tmp_path):
    port = find_free_port()
    codes = [TWO.format(port=port, process=i, directory=str(tmp_path)) for i in range(2)]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", c], cwd=ROOT, stderr=pipe, text=True) for c in codes
    ]
    try:
        outputs = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    assert re.search(r"/2: damaged \(params/\S+ has 5000 bytes, \d+ were written\)", outputs[0])
    assert "/2: damaged (params: " in outputs[0]
    assert "damaged" not in outputs[1]  # process 0 reports
