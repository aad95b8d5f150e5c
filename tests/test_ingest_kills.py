"""``ldm ingest`` killed anywhere, again and again, ends in the bytes of one that was not."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest

from ldm.artifacts import MANIFEST, digest_tree, opening
from tests.launched import wait_for
from tests.served import photograph, serving, stored, write_list

pytestmark = [pytest.mark.slow, pytest.mark.kills]

ROOT = Path(__file__).resolve().parent.parent
ROWS = 250
"""Three shards of img2dataset's."""
FILES = {f"{number}.png": stored(photograph(number, 16)) for number in range(ROWS)}
SETTINGS = {
    "image_size": 16, "min_side": 16, "threads": 4, "processes": 1, "retries": 0, "timeout_s": 5,
    "samples_per_shard": 16, "serve_scenes": "false",
}  # fmt: skip


def kill_ldm(process: Popen[bytes]) -> None:
    process.kill()


def kill_group(process: Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Project:
    """Where a run reads and writes, and how far it is."""

    def __init__(self, folder: Path, asked: list[str]) -> None:
        self.folder, self.asked = folder, asked
        self.data, self.out, self.runs = (folder / name for name in ("data", "images", "runs"))

    def list(self, server: str, rows: int) -> None:
        some = [(f"{server}/{number}.png", f"the {number}") for number in range(rows)]
        some += [(f"{server}/none-{number}.png", "not there") for number in range(9)]
        write_list(self.data / "train.csv", "url,caption", some[3:])
        write_list(self.data / "validation.csv", "url,caption", some[:3])

    def launch(self, *options: str, runs: str = "runs", out: str = "images") -> Popen[bytes]:
        command = [sys.executable, "-m", "ldm.cli", "ingest", "--params", str(ROOT / "params.yaml")]
        command += ["--data", str(self.data), "--out", str(self.folder / out)]
        command += ["--runs", str(self.folder / runs), *options]
        for key, value in SETTINGS.items():
            command += ["--set", f"ingest.{key}={value}"]
        return Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)

    def forget_asked(self) -> None:
        """When the server has also dealt with what a killed run had asked for."""
        while before := len(self.asked):
            time.sleep(0.3)
            if len(self.asked) == before:
                self.asked.clear()

    @property
    def store(self) -> Path:
        return self.runs / "fetched" / "fetched.db"

    def fresh(self) -> int:
        """Results of the run that goes on, as far as they are safe."""
        with closing(sqlite3.connect(self.store)) as database:
            count: int = database.execute("SELECT sum(fresh) FROM results").fetchone()[0]
            return count


def moments(project: Project, lot: random.Random) -> list[Callable[[], bool]]:
    """In the order of a run, each later than what those before it leave to do."""
    fresh = project.out.parent / ".images.writing"
    some = lot.randrange(ROWS // 2)
    return [
        lambda: True,
        lambda: len(project.asked) > some,
        lambda: project.fresh() > 0,
        lambda: any(fresh.glob("train-*.tar")),
        lambda: (fresh / "card.md").exists(),
        lambda: True,
    ]


def come_or_gone(moment: Callable[[], bool], process: Popen[bytes]) -> bool:
    """What a killed run downloaded may be all that there is: the next one then ends unseen."""
    return moment() or process.poll() is not None


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_ingest_goes_on(tmp_path: Path, seed: int) -> None:
    lot = random.Random(seed)
    asked: list[str] = []
    with serving(FILES, asked=asked, delay_s=0.01) as server:
        project = Project(tmp_path, asked)
        project.list(server, 30)
        assert project.launch().wait() == 0
        earlier = digest_tree(project.out)
        project.list(server, ROWS)
        assert project.launch(runs="clean", out="clean-images").wait() == 0
        last = digest_tree(tmp_path / "clean-images")
        assert last != earlier

        project.asked.clear()
        killed = 0
        for moment in moments(project, lot):
            process = project.launch()
            wait_for(partial(come_or_gone, moment, process), process)
            time.sleep(lot.uniform(0, 0.1))
            lot.choice((kill_ldm, kill_group))(process)
            code = process.wait()
            opening(project.out, "images", "ingest")
            if code == 0:
                assert digest_tree(project.out) == last
            else:
                assert code == -signal.SIGKILL
                assert digest_tree(project.out) in (earlier, last)
                killed += 1
        assert killed >= 3
        assert project.launch().wait() == 0
    assert digest_tree(project.out) == last
    manifest = (tmp_path / "clean-images" / MANIFEST).read_bytes()
    assert (project.out / MANIFEST).read_bytes() == manifest
    assert sorted(path.name for path in (project.runs / "fetched").iterdir()) == [
        "fetched.db",
        "lock",
    ]


def test_a_killed_refetch_goes_on(tmp_path: Path) -> None:
    asked: list[str] = []
    with serving(FILES, asked=asked, delay_s=0.01) as server:
        project = Project(tmp_path, asked)
        project.list(server, ROWS)
        assert project.launch().wait() == 0
        expected, size = digest_tree(project.out), project.store.stat().st_size
        process = project.launch("--refetch")
        wait_for(lambda: project.fresh() > 0, process)
        kill_group(process)
        process.wait()
        assert digest_tree(project.out) == expected
        project.forget_asked()
        assert project.launch("--refetch").wait() == 0
        assert 0 < len(asked) <= ROWS + 9 - 100
        assert digest_tree(project.out) == expected
        assert project.store.stat().st_size < size * 1.5
