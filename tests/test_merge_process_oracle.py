"""Two programs whose arrays all merge, played at random for a third of KSMRS_ORACLE_SECONDS (60): no byte is ever wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("merge_process_oracle.py")
SECONDS = float(os.environ.get("KSMRS_ORACLE_SECONDS", "60")) / 3


@pytest.mark.oracle
@pytest.mark.timeout(SECONDS + 240)
def test_no_byte_of_an_array_is_ever_wrong() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(PROGRAM), str(SECONDS)]
    players = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]
    try:
        for player in players:
            output, errors = player.communicate(timeout=SECONDS + 200)
            assert player.returncode == 0, errors
            counts = json.loads(output)
            # Where nothing merges, or is freed, nothing is proven.
            assert counts["merges"] > 1000 * SECONDS and counts["breaks"] > 10 * SECONDS, counts
            assert min(counts[name] for name in ("fork", "free", "make_zeros", "resize", "pass_on", "pin")) > 0, counts
    finally:
        for player in players:
            if player.poll() is None:
                player.kill()
                player.communicate()
