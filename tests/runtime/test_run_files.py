"""Tests the metrics and files of a run."""

import json
import math
import shlex
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from distill.runtime import environment, run_files
from tests.support.runs import read_scalars, read_texts


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_micro_batches_are_averaged_by_count():
    a = {"loss": (jnp.float32(6), jnp.float32(2))}
    b = {"loss": (jnp.float32(1), jnp.float32(8))}
    mean = run_files.compute_means(jax.jit(lambda *sums: jax.tree.map(jnp.add, *sums))(a, b))
    assert float(mean["loss"]) == pytest.approx(0.7)


def test_a_count_of_zero_is_nan_and_null_in_json():
    mean = run_files.compute_means({"x": (jnp.float32(0), jnp.int32(0))})
    assert math.isnan(mean["x"])
    assert run_files.to_json(mean) == '{"x": null}'


def test_json_has_null_for_non_finite_numbers():
    row = {"a": np.float32(np.inf), "b": [float("nan"), 1], "c": jnp.bfloat16(1.5), "d": (1, None)}
    assert json.loads(run_files.to_json(row)) == {
        "a": None,
        "b": [None, 1],
        "c": 1.5,
        "d": [1, None],
    }


def test_writer_writes_metrics_rollouts_and_tensorboard(tmp_path):
    with run_files.Writer(tmp_path / "run", 0) as writer:
        writer.write(0, "sft", {"train/loss": jnp.float32(1.5), "train/kl": float("nan")})
        # Flushed, so a reader sees the row during the run.
        assert rows(tmp_path / "run" / "metrics.jsonl") == [
            {"step": 0, "stage": "sft", "train/loss": 1.5, "train/kl": None}
        ]
        assert read_scalars(tmp_path / "run" / "tensorboard") == [(0, "train/loss", 1.5)]
        writer.write_rollouts(0, [{"text": "a\u2028b", "logp": np.array([0.5, -np.inf])}])
    assert rows(tmp_path / "run" / "rollouts" / "000000.jsonl") == [
        {"text": "a\u2028b", "logp": [0.5, None]}
    ]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_resuming_drops_rows_of_later_steps(tmp_path):
    with run_files.Writer(tmp_path, 0) as writer:
        for step in range(5):
            writer.write(step, "opd", {"x": step})
            writer.write_rollouts(step, [{"step": step}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sta')  # killed while writing
    with run_files.Writer(tmp_path, 3) as writer:
        writer.write(3, "opd", {"x": 30})
    assert [(r["step"], r["x"]) for r in rows(tmp_path / "metrics.jsonl")] == [
        *((0, 0), (1, 1), (2, 2), (3, 30))
    ]
    assert len(list((tmp_path / "rollouts").iterdir())) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_has_each_step_once(tmp_path):
    """After any number of kills, in the middle of an event too, and with files of tensorboardX's
    own writer, which has an event for each scalar."""
    folder = tmp_path / "tensorboard"
    old = SummaryWriter(str(folder))
    for step in range(3):
        old.add_scalar("x", step, step)
        old.add_scalar("y", step, step)
    old.close()
    for resume_step, last in ((2, 5), (4, 5), (4, 4), (5, 8)):
        with run_files.Writer(tmp_path, resume_step) as writer:
            for step in range(resume_step, last + 1):
                writer.write(step, "opd", {"x": 10 * resume_step + step, "y": None if step else 1})
        newest = max(folder.iterdir())
        with newest.open("ab") as file:
            file.write(newest.read_bytes()[-30:])
    with run_files.Writer(tmp_path, 7):
        pass
    assert read_scalars(folder) == [
        *((step, name, step) for step in range(2) for name in "xy"),
        *((step, "x", 20 + step) for step in (2, 3)),
        (4, "x", 44),
        *((step, "x", 50 + step) for step in (5, 6)),
    ]
    sizes = [file.stat().st_size for file in sorted(folder.iterdir())]
    with run_files.Writer(tmp_path, 7):
        pass
    assert [file.stat().st_size for file in sorted(folder.iterdir())] == sizes


def test_an_event_file_has_checksums(tmp_path):
    """TensorBoard reads no further than a wrong one."""
    with run_files.Writer(tmp_path, 3) as writer:
        writer.write(3, "opd", {"x": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, data = data[12 : 12 + length], data[:12] + data[12 + length :]
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", data[12:16]) == (masked_crc32c(body),)
        records.append(event_pb2.Event.FromString(body))
        data = data[16:]
    assert records[0].file_version == "brain.Event:2"
    assert records[1].session_log.status == event_pb2.SessionLog.START and records[1].step == 3
    assert records[2].summary.value[0].simple_value == 1.0


def test_tensorboard_shows_the_config_and_transcripts(tmp_path):
    """As text that Markdown leaves as it is; once a step, as the scalars."""
    stage = {"objective": "opd", "steps": 2}
    run_files.write_json(tmp_path / "config.json", {"stages": ["opd"], "opd": stage})
    row = {"prompt": "a\n<b>*", "response": "half\ud800", "tokens": [1, 2], "kl": [0.5, np.nan]}
    for resume_step in (0, 1):  # killed after step 1, which is repeated
        with run_files.Writer(tmp_path, resume_step) as writer:
            for step in range(resume_step, 2):
                writer.write_rollouts(step, [row])
                writer.write(step, "opd", {"x": step})
    texts = read_texts(tmp_path / "tensorboard")
    config = '    stages = ["opd"]\n    opd.objective = "opd"\n    opd.steps = 2'
    transcript = "**1.** tokens 2, kl 0.5\n\n*prompt*\n\n    a\n    <b>*\n\n*response*\n\n    half?"
    names = ("config/text_summary", "transcripts/text_summary")
    assert texts == [
        *((0, names[0], config), (0, names[1], transcript)),
        *((1, names[0], config), (1, names[1], transcript)),
    ]
    assert read_scalars(tmp_path / "tensorboard") == [(0, "x", 0), (1, "x", 1)]


def test_without_a_board_tensorboard_is_left_alone(tmp_path):
    with run_files.Writer(tmp_path, 0, has_board=False) as writer:
        writer.write(0, "opd", {"x": 1})
        writer.write_rollouts(0, [{"text": "a"}])
    assert not (tmp_path / "tensorboard").exists()


def test_write_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "summary.json"
    run_files.write_json(path, {"a": 1.0})
    with pytest.raises(TypeError):
        run_files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.0}


def test_a_line_moves_no_cursor_but_may_have_its_own_colours(capsys):
    green, reset = "\033[32m", "\033[0m"
    run_files.log_line(f"{green}a\033[2Jb{reset}", (green, reset))
    run_files.log_line(f"{green}a")
    assert capsys.readouterr().err == f"{green}a\\x1b[2Jb{reset}\n\\x1b[32ma\n"


def test_environment_records_packages_devices_and_command():
    e = json.loads(run_files.to_json(environment.describe_environment()))
    assert e["packages"]["jax"] == jax.__version__
    assert e["devices"] == {"backend": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert e["git"] is None or len(e["git"]["revision"]) == 40
    assert e["command"] == shlex.join(sys.orig_argv)
