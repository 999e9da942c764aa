"""Sends what a run writes to one experiment tracker, from a process of its own.

`trackers.py` starts one for each tracker. It follows the files of the run, so that a client that is
slow, hangs or fails costs the training nothing. A tracker first says how far it has come, and is
sent what the files have after that: the rows that a kill or a lost network cost it, and all rows if
it is named in the middle of a run. No step arrives twice.

JAX is not imported here, since it would take the run's devices.
"""

import csv
import io
import itertools
import json
import math
import os
import re
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from etils import epath

PROJECT = "distill"  # unless a variable of the tracker names another
POLL_SECONDS, BUCKET_POLL_SECONDS = 1.0, 30.0
OPEN_SECONDS = 60.0  # that opening a tracker may take after the end of the run's process
# Of a table; the files of the run have the rest.
MAX_ROWS, MAX_CHARACTERS = 1000, 20_000

FAILED = "failed:"  # begins the line that says why this process ends

Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]


class Tracker(Protocol):
    """A run in a tracker, found by its id or created."""

    next_step: int  # rows of earlier steps are there already

    def log(self, row: Row, tables: Tables) -> None:
        """Sends a row of metrics.jsonl, and the tables of its step by name."""
        ...

    def finish(self, is_complete: bool) -> None:
        """Returns once all is sent; `is_complete` says whether the run has done all its steps."""
        ...


class Wandb:
    """A run of W&B. Offline, each process leaves a directory, and `wandb sync` joins them."""

    def __init__(self, run_id: str, workdir: epath.Path, config: Row) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = os.environ.get("WANDB_DIR", None if "://" in str(workdir) else str(workdir))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id,
            name=os.environ.get("WANDB_NAME", workdir.name),
            resume="allow",
            dir=folder,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._run.config.update(config, allow_val_change=True)
        self._make_table: Any = wandb.Table
        if self._run.offline:
            here = Path(self._run.settings.sync_dir).parent
            logs = here.glob(f"offline-run-*-{run_id}/*.wandb")
            self.next_step = 1 + max(map(read_last_step, logs), default=-1)
            say(f"offline; to send the run: wandb sync {here}/offline-run-*-{run_id}")
        else:
            self.next_step = self._run.step
            say(str(self._run.url))

    def log(self, row: Row, tables: Tables) -> None:
        values: Row = {name: value for name, value in row.items() if name != "step"}
        for name, rows in tables.items():
            columns, data = to_columns(rows)
            values[name] = self._make_table(columns=columns, data=data, allow_mixed_types=True)
        self._run.log(values, step=row["step"], commit=True)

    def finish(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


def read_last_step(path: Path) -> int:
    """Returns the last step in the log of an offline run of W&B; -1 if it has none.

    Of a killed process it has less than was logged. The format is LevelDB's: blocks of 32 KiB hold
    pieces of records, each after a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4
    last); the first 7 bytes are W&B's own.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    make_record: Any = wandb_internal_pb2.Record
    data, at, record, step = path.read_bytes(), 7, b"", -1
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            try:
                found = make_record.FromString(record)
            except DecodeError:
                break
            if found.WhichOneof("record_type") == "history":
                step = max(step, found.history.step.num)
    return step


class Trackio:
    """A run of trackio, which knows runs by their names."""

    def __init__(self, run_id: str, workdir: epath.Path, config: Row) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # When it drops rows it only warns. To end there keeps later rows back, so none is missing.
        warnings.showwarning = _end_at_warnings_of_trackio
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{workdir.name}-{run_id}"
        self._run = trackio.init(project, name, config=config, resume="allow", embed=False)
        self._make_table: Any = trackio.Table
        self.next_step = self._run._next_step
        say(f"run {name}; to see it: trackio show --project {project}")

    def log(self, row: Row, tables: Tables) -> None:
        values: Row = {name: value for name, value in row.items() if name != "step"}
        values |= {name: self._make_table(data=rows) for name, rows in tables.items()}
        self._run.log(values, step=row["step"])

    def finish(self, is_complete: bool) -> None:
        self._run.finish()


def _end_at_warnings_of_trackio(
    message: Warning | str, category: type[Warning], filename: str, *_: object
) -> None:
    if f"{os.sep}trackio{os.sep}" in filename:
        fail(str(message))


class Mlflow:
    """A run of MLflow, found by a tag, since the server makes the ids of its runs."""

    def __init__(self, run_id: str, workdir: epath.Path, config: Row) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow import entities  # pyright: ignore[reportMissingImports]

        # By itself it tries for four minutes, and nothing is said meanwhile.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

        self._client, self._entities = mlflow.MlflowClient(), entities
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`distill.run` = '{run_id}'")
        tags = {"distill.run": run_id}
        run = runs[0] if runs else self._client.create_run(experiment, None, tags, workdir.name)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._log_config(config, run.data.params, run.data.tags)
        # By metric, since of the last row a part may be missing.
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self.next_step = max(self._last_steps.values(), default=0)
        say(f"run {self._id} at {mlflow.get_tracking_uri()}")

    def _log_config(self, config: Row, params: dict[str, str], tags: dict[str, str]) -> None:
        """Logs the config as parameters. These may not change: changes become tags."""
        values = {clean_name(key): str(value)[:6000] for key, value in config.items()}
        new = [self._entities.Param(k, v) for k, v in values.items() if k not in params]
        for first in range(0, len(new), 100):
            self._client.log_batch(self._id, params=new[first : first + 100])
        shown = params | tags
        for key, value in values.items():
            if shown.get(key, value) != value:
                self._client.set_tag(self._id, key, value)

    def log(self, row: Row, tables: Tables) -> None:
        step, now = row["step"], int(time.time() * 1000)
        for name, rows in tables.items():
            text = io.StringIO()
            columns, data = to_columns(rows)
            csv.writer(text).writerows([columns, *data])
            self._client.log_text(self._id, text.getvalue(), f"{name}/{step:06d}.csv")
        metrics = [
            self._entities.Metric(clean_name(name), value, now, step)
            for name, value in row.items()
            if name not in ("step", "stage") and step > self._last_steps.get(clean_name(name), -1)
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, is_complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "KILLED")


def clean_name(name: str) -> str:
    """Replaces the characters that MLflow allows in no name."""
    return re.sub(r"[^\w\-. :/]", "_", name)


TRACKERS: dict[str, Callable[[str, epath.Path, Row], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def to_columns(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Returns the names of all columns, and the rows as lists with None where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def flatten_config(config: Row) -> Row:
    """Returns the settings of config.json by dotted keys, without stages that do not run."""
    flat: Row = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{key}.{name}" if key else name, inner)
        else:
            flat[key] = value

    is_unused = {
        name: isinstance(value, dict) and "objective" in value and name not in config["stages"]
        for name, value in config.items()
    }
    add("", {name: value for name, value in config.items() if not is_unused[name]})
    return flat


def read_table(path: epath.Path) -> list[Row]:
    """Reads the first rows of a jsonl file as `shorten_row` makes them."""
    with path.open("rb") as lines:
        return [shorten_row(json.loads(line)) for line in itertools.islice(lines, MAX_ROWS)]


def shorten_row(row: Mapping[str, Any]) -> Row:
    """Makes a row of a table for people: the length of a list of tokens, the mean of other lists,
    the beginning of a long text."""
    return {name: _to_cell(name, value) for name, value in row.items()}


def _to_cell(name: str, value: Any) -> Any:
    if isinstance(value, list):
        numbers = [x for x in value if isinstance(x, int | float) and math.isfinite(x)]
        if name.endswith("tokens"):
            return len(value)
        return sum(numbers) / len(numbers) if numbers else None
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, str):
        value = value.encode(errors="replace").decode()  # a surrogate is no UTF-8
        if len(value) > MAX_CHARACTERS:
            return f"{value[:MAX_CHARACTERS]}… ({len(value)} characters)"
    return value


def read_tables(workdir: epath.Path, step: int) -> dict[str, list[Row]]:
    """Reads the transcripts of a step, and the examples of the evaluation after it, if any."""
    evaluation = workdir / "eval" / f"{step + 1:06d}"
    paths = {"transcripts": workdir / "rollouts" / f"{step:06d}.jsonl"}
    if (evaluation / "summary.json").exists():
        paths["evaluation"] = evaluation / "examples.jsonl"
    return {name: read_table(path) for name, path in paths.items() if path.exists()}


def follow_rows(path: epath.Path, finish: threading.Event, poll_seconds: float) -> Iterator[Row]:
    """Yields the rows of metrics.jsonl as they are written, until `finish` is set and none is
    left."""
    position = 0
    while True:
        is_last = finish.is_set()
        if path.exists():  # in a bucket it appears late
            with path.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    yield json.loads(line)
        if is_last:
            return
        finish.wait(poll_seconds)


def send_run(
    tracker: Tracker, workdir: epath.Path, finish: threading.Event, poll_seconds: float
) -> int:
    """Sends what the tracker lacks, and then what is written, until `finish` is set.

    Returns:
      The last step of the run's rows, -1 if it has none.
    """
    step = -1
    for row in follow_rows(workdir / "metrics.jsonl", finish, poll_seconds):
        step = row["step"]
        if step >= tracker.next_step:
            values = {name: value for name, value in row.items() if value is not None}
            # The files of a step are written before its row.
            tracker.log(values, read_tables(workdir, step))
    return step


_messages = sys.stdout  # main keeps it from the clients, which print there too


def say(line: str) -> None:
    """Says a line on the run's terminal."""
    print(" ".join(line.split()), file=_messages, flush=True)


def fail(reason: str) -> NoReturn:
    """Says the reason, and ends this process."""
    say(f"{FAILED} {reason}"[:300])
    os._exit(1)  # without what clients do at exit, which may hang


def _end_early(parent: int, leave: threading.Event, is_open: threading.Event) -> None:
    """Ends this process once it is to leave, or the process of the run is gone: the next one sends
    the rest. Not while the tracker is opened: MLflow would leave a database half-made, for good."""
    while os.getppid() == parent and not leave.wait(0.3):
        pass
    is_open.wait(OPEN_SECONDS)
    os._exit(1)


def main(
    name: str, workdir: str, run_id: str, resume_step: str, parent: str, must_finish: str
) -> None:
    """Sends a run to the tracker `name`: until SIGTERM, and then what is left, if no second SIGTERM
    comes.

    Args:
      parent: the id of the run's process.
      must_finish: "True": all is written, as after a SIGTERM.
    """
    global _messages
    finish, leave, is_open = threading.Event(), threading.Event(), threading.Event()

    def heed(*_: object) -> None:
        (leave if finish.is_set() else finish).set()

    signal.signal(signal.SIGTERM, heed)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if must_finish == "True":
        finish.set()
    _messages = os.fdopen(os.dup(1), "w", errors="backslashreplace")
    os.dup2(2, 1)
    threading.Thread(target=_end_early, args=(int(parent), leave, is_open), daemon=True).start()
    folder = epath.Path(workdir)
    try:
        config = json.loads((folder / "config.json").read_text())
        tracker = TRACKERS[name](run_id, folder, flatten_config(config))
        is_open.set()
        if leave.is_set() or os.getppid() != int(parent):
            os._exit(1)
        if tracker.next_step > int(resume_step):
            say(f"has the steps before {tracker.next_step} already; those repeated are not sent")
        seconds = BUCKET_POLL_SECONDS if "://" in workdir else POLL_SECONDS
        last_step = send_run(tracker, folder, finish, seconds)
        tracker.finish(last_step + 1 == sum(config[stage]["steps"] for stage in config["stages"]))
    except Exception as error:
        fail(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
