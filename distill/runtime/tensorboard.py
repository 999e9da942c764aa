"""Writes scalars as TensorBoard events.

tensorboardX's own SummaryWriter writes in a thread: on a full disk that thread ends with a
traceback, and the run hangs once its queue is full. Here the caller writes, and gets the error.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

FLUSH_SECONDS = 10.0


class EventWriter:
    """An event file in `folder`. TensorBoard drops earlier events from `resume_step` on.

    Every method raises OSError if the disk is full, or cannot be written for another reason.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int) -> None:
        from tensorboardX import event_file_writer  # imports torch if installed
        from tensorboardX.proto import event_pb2

        Path(folder).mkdir(parents=True, exist_ok=True)
        self._make_event: Any = event_pb2.Event
        # Its own names differ by the second, and a file of the same name would be overwritten.
        self._file = event_file_writer.EventsWriter(f"{folder}/events", f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=start, step=resume_step)
        self._file.flush()
        self._flushed = time.monotonic()

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes the scalars of a step, to the disk every FLUSH_SECONDS."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._write(summary=scalar(name, value), step=step)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def _write(self, **fields: Any) -> None:
        self._file.write_event(self._make_event(wall_time=time.time(), **fields))

    def close(self) -> None:
        self._file.close()
