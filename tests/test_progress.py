"""What a stage prints, and that nobody has to read it."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE, Popen


def test_a_reader_who_leaves_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldm.cli", "prune", "--runs", str(tmp_path)]
    with Popen(command, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
