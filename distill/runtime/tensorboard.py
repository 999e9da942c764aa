"""Makes TensorBoard's events, as bytes to append to a file, and finds those before a step.

tensorboardX's own writers make one event of each scalar, and write in a thread: on a full disk that
thread ends with a traceback, and the run hangs once its queue is full. Here the caller writes.
"""

import struct
import time
from collections.abc import Mapping
from typing import IO, Any

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


def make_start(resume_step: int) -> bytes:
    """Makes the first events of a file, at which an open TensorBoard drops what it has read of
    `resume_step` and later."""
    session = {"status": 1}  # START
    return _to_record(file_version="brain.Event:2") + _to_record(
        session_log=session, step=resume_step
    )


def make_scalars(scalars: Mapping[str, float], step: int) -> bytes:
    """Makes one event with all scalars of a step."""
    from tensorboardX.summary import scalar  # imports torch if installed

    values = [value for name, x in scalars.items() for value in scalar(name, x).value]
    return _to_record(summary={"value": values}, step=step)


def measure_before(file: IO[bytes], step: int) -> tuple[int, bool]:
    """Measures the events of a file that come before `step`, and before anything unreadable.

    Returns:
      Their bytes, which the file begins with, and whether there are scalars among them.
    """
    size, has_scalars = 0, False
    while event := _read_event(file):
        has_summary = event.HasField("summary")
        if has_summary and event.step >= step:
            break
        size, has_scalars = file.tell(), has_scalars or has_summary
    return size, has_scalars


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
