"""Locks: one process at a time writes a run's directory, or the file of a verb.

A lock is a small file that names its owner. On a local disk it is also locked by the kernel
(flock), which lets go when the owner ends in whatever way, so a lock that is left behind is taken
over at once. Buckets have no locks, and some network disks keep them to one host. So the owner also
renews the time in the file: an owner on another host counts as gone once it is silent.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from distill.runtime import distributed, run_files
from models.errors import UserError

BEAT_SECONDS = 20.0  # between two renewals
SILENT_SECONDS = 3 * BEAT_SECONDS  # without a renewal, watched by our own clock: the owner is gone
OLD_SECONDS = 3600.0  # a lock renewed so long ago, by its owner's clock, need not be watched
SETTLE_SECONDS = 1.0  # without flock, after which the last of two writers is seen by both


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that holds a lock."""

    host: str
    pid: int
    started: float  # by its clock, seconds since 1970
    birth: str = ""  # of the process, since numbers of processes come again; "": unknown
    renewed: float = 0.0

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on host {self.host} since {since}"

    def is_same(self, other: "Owner") -> bool:
        return dataclasses.replace(self, renewed=0.0) == dataclasses.replace(other, renewed=0.0)

    def is_running_here(self) -> bool:
        """Returns True if the process still runs, on the host that asks."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return read_birth(self.pid) == self.birth


def read_birth(pid: int) -> str:
    """Returns the time of a process's start, in ticks since the host's; "" if unknown."""
    try:  # the name of the program, in parentheses, may hold spaces
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class LockedError(UserError):
    """Another process holds a lock: `owner`, if its file names one."""

    def __init__(self, flag: str, owner: Owner | None) -> None:
        super().__init__(
            f"{flag}: is in use by {owner or 'another process'}: wait until that ends, or choose "
            "another"
        )
        self.owner = owner


class Lock:
    """The lock file `path`. `flag` is what messages name, such as --workdir=runs/x."""

    def __init__(self, path: epath.PathLike, flag: str) -> None:
        self._path, self._flag = epath.Path(path), flag
        pid = os.getpid()
        self._me = Owner(socket.gethostname(), pid, time.time(), read_birth(pid))
        self._file: int | None = None  # on a local disk
        self._made_folder = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock, after up to SILENT_SECONDS if it names an owner on another host.

        Raises:
          LockedError: if another process holds it, naming its host and number.
          UserError: if the file cannot be written.
        """
        try:
            self._made_folder = not self._path.parent.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            has_flock = not run_files.is_remote(self._path) and self._open_and_flock()
            owner = self.read_owner()
            if owner and not owner.is_same(self._me):
                self._require_gone(owner, has_flock)
            self._renew()
            if not has_flock:
                time.sleep(SETTLE_SECONDS)
                owner = self.read_owner()
                if owner and not owner.is_same(self._me):
                    self._refuse(owner)
        except OSError as error:
            self._close()
            folder = self._path.parent
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{self._flag}: is a file, not a folder") from error
            raise UserError(f"{self._flag}: {error.strerror or error}: {self._path}") from error
        except UserError:
            self._close()
            raise
        self._thread.start()

    def _open_and_flock(self) -> bool:
        """Returns True if the kernel locked the file, False if this disk has no locks."""
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse(self.read_owner())
            except OSError:
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    return True
            os.close(self._file)  # its owner deleted it, at its end, after we opened it

    def _require_gone(self, owner: Owner, has_flock: bool) -> None:
        """Returns once `owner`, which the file names, is known to be gone; else refuses."""
        if owner.host == self._me.host:
            if not has_flock and owner.is_running_here():
                self._refuse(owner)
        elif time.time() - owner.renewed < OLD_SECONDS:
            run_files.log_line(
                f"{self._flag}: was in use by {owner}; waiting up to {SILENT_SECONDS:.0f} s to see "
                "whether it still runs"
            )
            end = time.monotonic() + SILENT_SECONDS
            while time.monotonic() < end:
                time.sleep(min(1.0, BEAT_SECONDS / 4))
                now = self.read_owner()
                if now is None:  # it has ended meanwhile
                    return
                if now != owner:
                    self._refuse(now)
        run_files.log_line(f"{self._flag}: {owner} is gone; its lock is taken over")

    def _refuse(self, owner: Owner | None) -> None:
        raise LockedError(self._flag, owner)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of the file, on a local disk. A child process that inherits them holds the lock too, and
        goes on to hold it if its parent is killed."""
        return () if self._file is None else (self._file,)

    def read_owner(self) -> Owner | None:
        """Returns the owner that the file names; None if there is none."""
        try:
            return Owner(**json.loads(self._path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _renew(self) -> None:
        owner = dataclasses.replace(self._me, renewed=time.time())
        text = json.dumps(dataclasses.asdict(owner)) + "\n"
        if self._file is None:
            self._path.write_text(text)
            return
        data = text.encode()
        os.pwrite(self._file, data, 0)
        os.ftruncate(self._file, len(data))

    def _keep_renewing(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # A full disk or a lost connection must not end the run; others wait for a while.
            with contextlib.suppress(Exception):
                owner = self.read_owner()
                if owner and not owner.is_same(self._me):
                    # We were suspended so long that we were taken for gone. Write nothing more.
                    line = f"error: {self._flag}: was taken over by {owner} while we were silent\n"
                    os.write(2, line.encode())
                    os._exit(2)
                self._renew()

    def release(self) -> None:
        """Deletes the file. Where that fails, it is silent from now on, and will be taken over."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # buckets raise many types
            owner = self.read_owner()
            if owner and owner.is_same(self._me):
                self._path.unlink()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._made_folder and not run_files.is_remote(self._path):
            with contextlib.suppress(OSError):  # not empty, or gone
                os.rmdir(self._path.parent)


@contextlib.contextmanager
def hold_lock(path: epath.PathLike, flag: str) -> Iterator[None]:
    """Context in which this run, whose process 0 takes the lock for all, is the only one to write.

    Raises:
      UserError: as `Lock.acquire` does, in every process.
    """
    lock = Lock(path, flag)
    distributed.broadcast_from_primary(lock.acquire)
    try:
        yield
    finally:
        if run_files.is_primary():
            lock.release()
