"""A run that is stopped and killed is one run, with one row a step, in W&B (offline), trackio and
MLflow (on the local disk), by their own clients where they are installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

NUM_STEPS = 12
WORDS = [
    "--config=configs/conditions.py:sft_then_opd,tiny",
    *("--config.traces.steps=6", "--config.opd.steps=6", "--config.checkpoint.every=3"),
    *("--config.log.transcripts_every=2", "--config.eval.every=4", "--config.eval.limit=4"),
    *("--config.eval.benchmark=arithmetic", "--config.eval.data="),
    *("--config.eval.max_new_tokens=8", "--config.opd.rollout.segment=4"),
]
# Rows at which the run is stopped, by what: a checkpoint has 0, 3, 6 and 9 of them.
STOPS = ((2, signal.SIGKILL), (5, signal.SIGKILL), (7, signal.SIGTERM), (11, signal.SIGKILL))

READERS = {
    "wandb": """
import collections, glob, struct, sys
from wandb.proto import wandb_internal_pb2

def read_history(path):
    data, at, record = open(path, "rb").read(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record = (b"" if kind in (1, 2) else record) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            if found.WhichOneof("record_type") == "history":
                values = {x.key or x.nested_key[0]: x.value_json for x in found.history.item}
                yield found.history.step.num, values

for path in sorted(glob.glob(f"{workdir}/wandb/offline-run-*/run-*.wandb")):
    run = path.rpartition("/run-")[2]
    for step, values in read_history(path):
        loss = json.loads(values["train/loss"])
        add(run, step, loss, "transcripts" in values, "evaluation" in values)
""",
    "trackio": """
import pathlib, sqlite3
(path,) = pathlib.Path(workdir).parent.glob("trackio/*.db")
for run, step, text in sqlite3.connect(path).execute("select run_id, step, metrics from metrics"):
    values = json.loads(text)
    add(run, step, values["train/loss"], "transcripts" in values, "evaluation" in values)
""",
    "mlflow": """
import mlflow
client = mlflow.MlflowClient()
experiments = [x.experiment_id for x in client.search_experiments()]
for run in client.search_runs(experiments):
    assert run.info.status == "FINISHED" and run.data.params["opd.steps"] == "6"
    id = run.info.run_id
    folders = [folder.path for folder in client.list_artifacts(id)]
    names = {x.path for folder in folders for x in client.list_artifacts(id, folder)}
    for point in client.get_metric_history(id, "train/loss"):
        tables = [f"{name}/{point.step:06d}.csv" in names for name in ("transcripts", "evaluation")]
        add(id, point.step, point.value, *tables)
    for name in run.data.metrics:
        steps = [point.step for point in client.get_metric_history(id, name)]
        assert len(steps) == len(set(steps)), name
""",
}
READ = """
import json, sys
workdir, rows = sys.argv[1], []
def add(*row):
    rows.append(row)
{reader}
print(json.dumps(sorted(rows, key=lambda row: row[1])))
"""


def is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def count_rows(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("name", READERS)
def test_a_stopped_run_is_one_run_with_one_row_a_step(tmp_path: Path, name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"not installed: pip install {name}")
    workdir = tmp_path / "run"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PYTHONPATH": str(ROOT),
    }
    train = [sys.executable, "-W", "ignore", "-m", "distill.train", f"--workdir={workdir}", *WORDS]
    train += [f"--config.log.to={name}"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(train, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    for rows, number in STOPS:
        run, deadline = start(), time.monotonic() + 300
        while run.poll() is None and count_rows(workdir) < rows and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(number)
        print(run.communicate()[1][-2000:], f"stopped by {number} after {count_rows(workdir)} rows")
    run = start()
    text = run.communicate()[1]
    assert run.returncode == 0, text[-2000:]
    assert f"{name}: warning" not in text, text[-2000:]
    read = [sys.executable, "-W", "ignore", "-c", READ.format(reader=READERS[name]), str(workdir)]
    done = subprocess.run(read, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    sent: list[Any] = json.loads(done.stdout)
    files = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({run_id for run_id, *_ in sent}) == 1
    assert [row[1] for row in sent] == list(range(NUM_STEPS)) == [row["step"] for row in files]
    assert [row[2] for row in sent] == pytest.approx([row["train/loss"] for row in files], rel=1e-6)
    assert [row[3] for row in sent] == [step % 2 == 0 for step in range(NUM_STEPS)]
    assert [row[4] for row in sent] == ["eval/accuracy" in row for row in files]
