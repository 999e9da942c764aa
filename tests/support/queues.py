"""Queues of jobs that note their beginnings and ends, and a runner of one in its own process."""

from collections.abc import Sequence
from pathlib import Path

from distill.runtime import cli
from studies.jobs import Job, Queue

# Beside its directory it notes, in one file for all jobs, `begin NAME PID`, and `end NAME PID` when
# it succeeds. It waits for the file `wait`, if that is not "-".
_CODE = """
import os, pathlib, sys, time
out, wait, status = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def note(word):
    with open(out.parent / "events.txt", "a") as file:
        print(word, out.name, os.getpid(), file=file)
note("begin")
end = time.monotonic() + 300
while wait != "-" and not os.path.exists(out.parent / wait):
    assert time.monotonic() < end
    time.sleep(0.02)
if not status:
    note("end")
sys.exit(status)
"""


def make_job(name: str, *needs: str, wait: str = "-", status: int = 0) -> Job:
    """Returns a job that waits for the file ROOT/`wait`, and ends with an exit code."""
    places = [f"{{{need}}}" for need in needs]
    return Job(name, (("-c", _CODE, "{out}", wait, str(status), *places),))


def make_queue(root: Path, jobs: Sequence[Job]) -> Queue:
    root.mkdir(exist_ok=True)
    queue = Queue(root)
    for job in jobs:
        queue.add(job)
    return queue


def make_chain(root: Path) -> Queue:
    """Returns a queue of three jobs in a row, the second of which waits for the file ROOT/go."""
    jobs = make_job("first"), make_job("middle", "first", wait="go"), make_job("last", "middle")
    return make_queue(root, jobs)


def read_events(root: Path) -> list[tuple[str, str]]:
    """Returns (begin or end, job) in order."""
    path = root / "events.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], line.split()[1]) for line in lines]


if __name__ == "__main__":
    words: list[str] = []
    cli.run(lambda: print(make_chain(Path(words[0])).run(["last"], 1)), arguments=words)
