"""Runs a command in namespaces of its own, with a file system that holds only what it names.

Started by `sandbox` as a script where bubblewrap is missing: python sandbox_namespaces.py USER
FOLDER_BYTES FILTER_FD PATH... -- COMMAND... It needs Linux 5.12. Its parts are those of
user_namespaces(7), pid_namespaces(7) and mount_setattr(2). Imports the standard library only.
"""

import contextlib
import ctypes
import os
import signal
import sys

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
OLD = "/.old"  # where the host's files are while ours are laid out
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def call(function, *arguments):
    """Calls a function of libc, and ends with a line on standard error if it fails."""
    if _libc[function](*arguments) == -1:
        number = ctypes.get_errno()
        sys.exit(f"{function} {arguments[:3]}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=None):
    call("mount", source.encode(), target.encode(), kind, flags, options)


def set_readonly(path, flags):
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, 32)


def bind(source, path, readonly=True):
    """Shows a file or folder of the host, `source` without symbolic links, at `path`."""
    if os.path.isdir(OLD + source):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT))
    mount(OLD + source, path, None, MS_BIND | MS_REC)
    if readonly:
        set_readonly(path, AT_RECURSIVE)


def lay_out_files(paths, folder_bytes):
    """Replaces the root by an empty one with `paths`, read-only, and a folder /tmp in memory."""
    sources = [(os.path.realpath(path), path) for path in paths]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp" + OLD)
    call("syscall", SYS_PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp" + OLD.encode())
    os.chdir("/")
    for path in DEVICES:
        bind(path, path, readonly=False)
    os.mkdir("/tmp")  # before the files that are shown: a virtual environment may lie there
    options = f"size={folder_bytes},nr_inodes=4096,mode=755".encode()
    mount("tmpfs", "/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, options)
    for source, path in sources:
        bind(source, path)
    call("umount2", OLD.encode(), MNT_DETACH)
    os.rmdir(OLD)
    set_readonly("/", 0)
    os.chdir("/tmp")


def fork_and_wait():
    """Forks. The parent waits, ends as the child did, and takes it along if it is killed."""
    lives, held = os.pipe()
    child = os.fork()
    if not child:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.close(held)
        os.set_blocking(lives, False)
        with contextlib.suppress(BlockingIOError):
            if not os.read(lives, 1):  # it died before the call
                os._exit(1)
        os.close(lives)
        return
    os.close(lives)
    while True:  # the first process of its namespace also inherits orphans
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def make_filter(descriptor):
    """Reads a filter of system calls as prctl(2) takes it."""
    with open(descriptor, "rb") as file:
        code = file.read()
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    return Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p)), buffer


def main():
    split = sys.argv.index("--")
    user, folder_bytes, filter_fd, *paths = sys.argv[1:split]
    command = sys.argv[split + 1 :]
    program = make_filter(int(filter_fd)) if int(filter_fd) >= 0 else None
    spaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if int(user) < 0:
        ids = os.geteuid(), os.getegid()
        call("unshare", spaces | CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"65534 {ids[0]} 1"),
            ("gid_map", f"65534 {ids[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    else:
        call("unshare", spaces)
    # Of the worker; a change of namespace would clear it.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    lay_out_files(paths, folder_bytes)
    fork_and_wait()
    fork_and_wait()
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if program:
        call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(program[0]), 0, 0)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
