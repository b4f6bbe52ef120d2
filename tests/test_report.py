"""The report of the benches: small sizes, ksmrs alone; the knobs of kernel KSM stay as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernel_ksm

REPORT = Path(__file__).resolve().parent.parent / "benches" / "report.py"


@pytest.mark.skipif(not REPORT.exists(), reason="the benches are not beside these tests")
def test_a_quick_report_has_figures_and_turns_no_knob(tmp_path: Path) -> None:
    before = kernel_ksm.knobs()
    words = ["--quick", "--without-kernel", "--only", "merge_2", "adopted_memory", "--to", str(tmp_path)]
    done = subprocess.run([sys.executable, REPORT, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert kernel_ksm.knobs() == before
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["results"]) == {"merge_2", "adopted_memory"} and report["failed"] == {}
    row, gross, net = report["rows"]
    assert row["private"] > 0 and row["shared"] > 0
    assert row["kernel_maximum"] is None and row["ratio_private"] is None
    for kind in ("private", "shared"):
        # What the broker takes, if nothing else, is less than 32 MiB and more than nothing.
        assert gross[kind] == 8 and -24 < net[kind] < 8
    text = (tmp_path / "report.md").read_text()
    assert "Kernel KSM was not measured" in text and "merge equal data: 2 x 8 MiB" in text


@pytest.mark.skipif(not REPORT.exists(), reason="the benches are not beside these tests")
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("unique", "scan 16 MiB of unique pages, clean, tracked"),
        ("growth", "merge equal data, 64 to 512 MiB: CPU grows with the power"),
        ("read_merged", "sum, 16 MiB of 4 KiB pages, 2 reading, after merging"),
        ("application", "application, merging without pause: random writes, p99"),
        ("idle", "2 x 8 MiB, merged and idle: the broker"),
        ("cpu_ceiling", "a client's scanner and remapper at client_max_cpu=20, busiest second"),
    ],
)
def test_each_race_has_its_rows(name: str, row: str, tmp_path: Path) -> None:
    if name == "read_merged" and shutil.which("rustc") is None:
        pytest.skip("no rustc in PATH, which builds the pointer chase")
    words = ["--quick", "--without-kernel", "--only", name, "--to", str(tmp_path)]
    done = subprocess.run([sys.executable, REPORT, *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = [found for found in json.loads((tmp_path / "report.json").read_text())["rows"] if found["work"] == row]
    assert rows and all(found["private"] > 0 and found["shared"] > 0 for found in rows)


@pytest.mark.skipif(not REPORT.exists(), reason="the benches are not beside these tests")
def test_a_program_whose_packages_are_missing_is_named_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; print('not installed: x', file=sys.stderr); sys.exit(77)")
    (tmp_path / "other.py").write_text("import sys; sys.exit('no')")
    text = f"""
import sys
sys.path.insert(0, {str(REPORT.parent)!r})
import report
report.SCENARIOS = {{name: report.Scenario({str(tmp_path)!r} + f"/{{name}}.py") for name in sys.argv.pop().split()}}
sys.exit(report.main())
"""
    for names, status in (("program", 0), ("program other", 1)):
        words = ["--without-kernel", "--to", str(tmp_path / "to"), names]
        done = subprocess.run(
            [sys.executable, "-c", text, *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status, done.stderr
        found = json.loads((tmp_path / "to" / "report.json").read_text())
        assert found["skipped"] == {"program": "not installed: x"} and set(found["failed"]) == {"other"} & {
            *names.split()
        }
        assert "- program: not installed: x" in (tmp_path / "to" / "report.md").read_text()
