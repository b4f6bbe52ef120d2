"""Python's faulthandler and ours, in every order, and real crashes, which must stay crashes."""

from __future__ import annotations

import signal

import pytest

from children import Child, run

PROGRAM = """
import faulthandler
{before}
regions, contents = equal_regions(64, shared=True)
arrays = [region.array(np.uint8, contents.size) for region in regions]
wait_merged(128, *regions)
for turn, step in enumerate({steps}):
    exec(step)
    for array in arrays:
        array[turn * 4096] ^= 0xFF
        array[turn * 4096] ^= 0xFF
    assert all((array == contents).all() for array in arrays), step
    wait_merged(128, *regions)
print("enabled" if faulthandler.is_enabled() else "disabled", flush=True)
{after}
"""

ON = "faulthandler.enable()"
OFF = "faulthandler.disable()"


@pytest.mark.parametrize("before", ["pass", ON, f"{ON}; {OFF}"])
@pytest.mark.parametrize("steps", [[], [ON], [OFF], [ON, OFF], [OFF, ON], [ON, ON], [ON, OFF, ON, OFF]])
def test_writes_go_through_in_every_order(before: str, steps: list[str]) -> None:
    last = [*before.split("; "), *steps][-1]
    with Child(PROGRAM.format(before=before, steps=steps, after="")) as child:
        output = child.end()
        assert output.strip() == ("enabled" if last == ON else "disabled")
        assert "Fatal Python error" not in child.errors


def test_with_the_interpreters_own_switch() -> None:
    with Child(PROGRAM.format(before="pass", steps=[], after=""), PYTHONFAULTHANDLER="1") as child:
        assert child.end().strip() == "enabled"
        assert child.errors == ""


@pytest.mark.parametrize("steps", [[], [ON], [ON, OFF], [OFF, ON]])
def test_a_real_crash_is_a_crash(steps: list[str]) -> None:
    with Child(PROGRAM.format(before="pass", steps=steps, after="import ctypes; ctypes.string_at(8)")) as child:
        child.end(returncode=-signal.SIGSEGV, seconds=60)
        assert ("Fatal Python error: Segmentation fault" in child.errors) is (steps[-1:] == [ON])


def test_a_self_sent_sigsegv_still_kills() -> None:
    run(
        PROGRAM.format(before="pass", steps=[], after="os.kill(os.getpid(), signal.SIGSEGV); time.sleep(60)"),
        returncode=-signal.SIGSEGV,
        seconds=60,
    )


def test_writes_while_the_interpreter_ends() -> None:
    after = """
import atexit
class Late:
    def __del__(self):
        # Plain stores: NumPy imports things for more than that, and importing is over by now.
        view[0] = view[4096] = 5
        assert view[0] == view[4096] == 5
view = memoryview(regions[0])
late = Late()
atexit.register(lambda: arrays[1].__setitem__(slice(0, 4096), 6))
"""
    with Child(PROGRAM.format(before=ON, steps=[], after=after)) as child:
        child.end()
        assert child.errors == ""
