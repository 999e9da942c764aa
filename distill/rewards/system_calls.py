"""A filter of system calls for the sandbox, in the kernel's language (seccomp(2)).

It refuses what no solution needs and what would get round the other limits: new namespaces and
mounts (a folder without a limit), memory that belongs to no process, and looking into others.
"""

import errno
import os
import struct

# Of x86_64 and aarch64, from the kernel's tables.
_REFUSED = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
_CLONE, _CLONE3 = (56, 220), 435
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, and the kernel's name
_NEW_NAMESPACES = 0x7E020080  # flags of clone: all CLONE_NEW...
_X32 = 0x40000000  # bit of the calls of a second interface on x86_64, which would pass by number

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def make_filter() -> bytes | None:
    """Returns the filter for this machine; None if its system calls are not listed here."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return None
    column, name = machine
    refuse = [(_RETURN, 0, 0, _FAIL | errno.EPERM)]
    code = [(_LOAD, 0, 0, _MACHINE), (_IF_EQUAL, 1, 0, name), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _NUMBER), (_IF_AT_LEAST, 0, 1, _X32), *refuse]
    for numbers in _REFUSED.values():
        code += [(_IF_EQUAL, 0, 1, numbers[column]), *refuse]
    # libc takes clone where there is no clone3, whose flags a filter cannot read.
    code += [(_IF_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    code += [(_IF_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    code += [(_IF_ANY_BIT, 0, 1, _NEW_NAMESPACES), *refuse, (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in code)
