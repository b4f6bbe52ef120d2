"""Behind seccomp filters, as containers have, and as on older kernels: what is turned down is done without, or named."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from children import TESTS, run

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows x86-64")

NUMA = "mbind,set_mempolicy,get_mempolicy,move_pages"
AS_IN_CONTAINERS = f"userfaultfd,kcmp,process_vm_writev,perf_event_open,pidfd_getfd,pidfd_open,{NUMA}"
AS_BEFORE_LINUX_6_7 = "PAGEMAP_SCAN,userfaultfd"


@pytest.mark.parametrize("denied", [AS_IN_CONTAINERS, AS_BEFORE_LINUX_6_7, "mincore,userfaultfd"])
def test_the_oracle_finds_nothing_behind_a_filter(denied: str) -> None:
    command = [sys.executable, str(TESTS / "seccomp.py"), denied, str(TESTS / "oracle.py"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


def test_a_call_that_adopting_needs_is_named() -> None:
    run(
        """
        import mmap, posix_ipc
        from seccomp import deny
        name = f"/ksmrs-test-seccomp-{os.getpid()}"
        made = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=1 << 20)
        try:
            mapping = mmap.mmap(made.fd, 1 << 20)
            made.close_fd()
            deny("process_vm_readv")
            try:
                ksmrs.madvise(mapping, ksmrs.MADV_MERGEABLE)
            except ksmrs.SystemCallError as refused:
                assert "process_vm_readv" in str(refused), refused
            else:
                raise AssertionError("it was taken")
        finally:
            made.unlink()
        """
    )
