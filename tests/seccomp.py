"""A seccomp filter that turns system calls down, as containers and older kernels do, for this process and all that it starts.

python tests/seccomp.py CALL[,CALL...] PROGRAM [ARGUMENT...]     runs a Python program behind it
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

NUMBERS = {
    "mincore": 27,
    "mbind": 237,
    "set_mempolicy": 238,
    "get_mempolicy": 239,
    "move_pages": 279,
    "perf_event_open": 298,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "userfaultfd": 323,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
}
"""Of x86-64."""
IOCTL, IOCTLS = 16, {"PAGEMAP_SCAN": 0xC060_6610}
NUMBER, SECOND_ARGUMENT = 0, 24
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
RET_ERRNO, RET_ALLOW = 0x0005_0000, 0x7FFF_0000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def deny(*calls: str) -> None:
    """From now on they say EPERM."""
    denied = (RETURN, 0, 0, RET_ERRNO | errno.EPERM)
    steps = [(LOAD, 0, 0, NUMBER)]
    for call in calls:
        if call in IOCTLS:
            steps += [(JUMP_IF_EQUAL, 0, 4, IOCTL), (LOAD, 0, 0, SECOND_ARGUMENT)]
            steps += [(JUMP_IF_EQUAL, 0, 1, IOCTLS[call]), denied, (LOAD, 0, 0, NUMBER)]
        else:
            steps += [(JUMP_IF_EQUAL, 0, 1, NUMBERS[call]), denied]
    steps.append((RETURN, 0, 0, RET_ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "no seccomp filter")


if __name__ == "__main__":
    deny(*sys.argv[1].split(","))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
