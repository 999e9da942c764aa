"""Makes TensorBoard's events, as bytes to append to a file, and finds those before a step.

tensorboardX's own writers make one event of each scalar, and write in a thread: on a full disk that
thread ends with a traceback, and the run hangs once its queue is full. Here the caller writes.
"""

import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from etils import epath

from distill.runtime import paths, tracker_process

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


def make_file(folder: epath.Path, resume_step: int) -> epath.Path:
    """Cuts off `resume_step` and later from the files of earlier processes, and returns the path of
    a new one. Each process has its own, since TensorBoard reads on from where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.*"):
        with old.open("rb") as file:
            size, has_summaries = measure_before(file, resume_step)
        if not has_summaries:
            old.unlink()
        elif size < old.stat().length:
            paths.truncate_file(old, size)
    now = time.time_ns()
    return folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"


def make_start(resume_step: int, config: dict[str, Any]) -> bytes:
    """Makes the first events of a file, at which an open TensorBoard drops what it has read of
    `resume_step` and later: with the config as text, if it is not empty."""
    session = {"status": 1}  # START
    start = _to_record(file_version="brain.Event:2")
    start += _to_record(session_log=session, step=resume_step)
    if not config:
        return start
    settings = tracker_process.flatten_config(config).items()
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings]
    return start + _make_text("config", _to_code("\n".join(lines)), resume_step)


def make_scalars(scalars: Mapping[str, float], step: int) -> bytes:
    """Makes one event with all scalars of a step."""
    from tensorboardX.summary import scalar  # imports torch if installed

    values = [value for name, x in scalars.items() for value in scalar(name, x).value]
    return _to_record(summary={"value": values}, step=step)


def make_transcripts(rows: Sequence[Mapping[str, Any]], step: int) -> bytes:
    """Makes one event with the transcripts of a step (rows of rollouts/), as text."""
    parts = []
    for number, row in enumerate(map(tracker_process.shorten_row, rows), start=1):
        texts = {name: row.pop(name, None) for name in ("prompt", "response")}
        facts = ", ".join(f"{name} {_format(value)}" for name, value in row.items())
        parts.append(f"**{number}.** {facts}")
        for name, text in texts.items():
            parts += [f"*{name}*", _to_code(text)] if text else []
    return _make_text("transcripts", "\n\n".join(parts), step)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _to_code(text: str) -> str:
    """Indents a text, which Markdown then shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _make_text(tag: str, text: str, step: int) -> bytes:
    from tensorboardX import summary

    return _to_record(summary=summary.text(tag, text), step=step)


def measure_before(file: IO[bytes], step: int) -> tuple[int, bool]:
    """Measures the events of a file that come before `step`, and before anything unreadable.

    Returns:
      Their bytes, which the file begins with, and whether there are summaries among them.
    """
    size, has_summaries = 0, False
    while event := _read_event(file):
        has_summary = event.HasField("summary")
        if has_summary and event.step >= step:
            break
        size, has_summaries = file.tell(), has_summaries or has_summary
    return size, has_summaries


def _read_event(file: IO[bytes]) -> Any:
    """Reads the next event; None at the end of the file, or where it is half-written."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto import event_pb2

    make_event: Any = event_pb2.Event
    header = file.read(_LENGTH.size)
    if len(header) < _LENGTH.size or file.read(_CHECKSUM.size) != _sum(header):
        return None
    (length,) = _LENGTH.unpack(header)
    data = file.read(length)
    if len(data) < length or len(file.read(_CHECKSUM.size)) < _CHECKSUM.size:
        return None
    try:
        return make_event.FromString(data)
    except DecodeError:
        return None


def _to_record(**fields: Any) -> bytes:
    from tensorboardX.proto import event_pb2

    make_event: Any = event_pb2.Event
    data = make_event(wall_time=time.time(), **fields).SerializeToString()
    header = _LENGTH.pack(len(data))
    return header + _sum(header) + data + _sum(data)


def _sum(data: bytes) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    return _CHECKSUM.pack(masked_crc32c(data))
