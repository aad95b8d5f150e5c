"""Several processes share an encoding: each shard is done once, and the bytes are one process's."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from subprocess import Popen

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

from ldm.artifacts import digest_tree, opening
from ldm.encode import encoded
from ldm.encode.encoded import Encoded
from ldm.encode.latent_shards import Captions
from ldm.encode.sharing import Sharing
from ldm.latents import text_key
from tests.encoding import ROOT, Project, Rows, encoded_in, in_shards, picture, write_images
from tests.launched import wait_for

TWO, THREE = 2, 3


def numbered(count: int) -> dict[str, tuple[bytes, str]]:
    return {f"{row:08d}": (picture(row), f"caption {row // 2}") for row in range(count)}


# Which shards another picture or caption changes.


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("ten"), pipeline)
    write_images(project.images, in_shards(numbered(10), 4))
    project.encode()
    return project


def other_caption(shards: dict[str, Rows]) -> None:
    own = shards["train-00001.tar"]
    shards["train-00001.tar"] = {**own, "00000005": (picture(5), "other words")}


def other_picture(shards: dict[str, Rows]) -> None:
    own = shards["train-00001.tar"]
    shards["train-00001.tar"] = {**own, "00000005": (picture(50), own["00000005"][1])}


def one_more(shards: dict[str, Rows]) -> None:
    shards["train-00001.tar"] = {**shards["train-00001.tar"], "1": (picture(51), "other words")}


def one_less(shards: dict[str, Rows]) -> None:
    shards["train-00001.tar"] = dict(list(shards["train-00001.tar"].items())[1:])


def one_caption_less(shards: dict[str, Rows]) -> None:
    shards["train-00001.tar"] = dict(list(shards["train-00001.tar"].items())[2:])


def another_shard(shards: dict[str, Rows]) -> None:
    shards["train-00007.tar"] = {"x": (picture(52), "caption 0")}


def a_shard_less(shards: dict[str, Rows]) -> None:
    del shards["train-00002.tar"]


def shard_of(caption: str) -> str:
    """Which of three shards a caption is in."""
    return f"texts-{int(text_key(caption), 16) * 3 >> 128:05d}.tar"


NEW, GONE = shard_of("other words"), shard_of("caption 2")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (other_caption, {"train-00001.tar", NEW}),
        (other_picture, {"train-00001.tar"}),
        (one_more, {"train-00001.tar", NEW}),
        (one_less, {"train-00001.tar"}),
        (one_caption_less, {"train-00001.tar", GONE}),
        (another_shard, {"train-00007.tar"}),
        (a_shard_less, {"train-00002.tar", shard_of("caption 4")}),
    ],
)
def test_only_the_shards_concerned_change(
    ten: Project, tmp_path: Path, change: Callable[[dict[str, Rows]], None], changed: set[str]
) -> None:
    shards = in_shards(numbered(10), 4)
    change(shards)
    project = Project(tmp_path, ten.pipeline)
    write_images(project.images, shards)
    project.encode()
    before, after = digest_tree(ten.out), digest_tree(project.out)
    assert {name for name, _ in before.items() ^ after.items()} == changed


def test_a_shard_of_latents_has_the_samples_of_its_shard_of_pictures(ten: Project) -> None:
    for path in ten.images.glob("*.tar"):
        with tarfile.open(path) as pictures, tarfile.open(ten.out / path.name) as latents:
            own, others = (
                [name.partition(".")[0] for name in tar.getnames()] for tar in (pictures, latents)
            )
            assert own == others and len(own) == 2 * len(set(own))


captions_found = st.lists(st.tuples(st.text(), st.integers(0, 2)))


@given(captions_found, st.integers(1, 9))
@settings(max_examples=50)
def test_captions_come_once_by_their_keys_whoever_found_them(
    found: list[tuple[str, int]], shards: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        processes = [Captions(Path(folder), shards, rank) for rank in range(3)]
        for caption, rank in found:
            processes[rank].add([caption])
        all_shards = [processes[0].of(shard) for shard in range(shards)]
    together = [caption for own in all_shards for caption in own]
    assert together == sorted({caption for caption, _ in found}, key=text_key)


# What processes say to each other, through the launcher's kind of store.


def several(processes: int) -> list[Sharing]:
    host, short = "127.0.0.1", timedelta(seconds=60)
    main = TCPStore(host, 0, None, is_master=True, timeout=short)
    others = [TCPStore(host, main.port, None, timeout=short) for _ in range(processes - 1)]
    return [Sharing(store, rank, processes, rank) for rank, store in enumerate([main, *others])]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_unit_goes_to_one_process(processes: int) -> None:
    units = [f"unit {number}" for number in range(100)]

    def work(sharing: Sharing) -> tuple[list[str], list[str], int]:
        own = list(sharing.each("first", units))
        sharing.add("done", len(own))
        sharing.meet("the middle")
        return own, list(sharing.each("second", units)), sharing.count("done")

    crew = several(processes)
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(work, crew))
    for phase in range(2):
        assert sorted(unit for result in done for unit in result[phase]) == sorted(units)
    # Nobody is past the middle before all were there.
    assert [count for _, _, count in done] == [100] * processes


def test_a_slow_process_does_not_hold_up_the_units(tmp_path: Path) -> None:
    slow, quick = several(TWO)
    first = slow.each("units", range(10))
    assert next(first) == 0
    assert list(quick.each("units", range(10))) == list(range(1, 10))
    assert list(first) == []


def test_what_is_told_is_heard() -> None:
    main, other = several(TWO)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(other.hear, "job")
        main.tell("job", "工作")
        assert heard.result(60) == "工作"


def test_pieces_of_several_processes_are_one_store(tmp_path: Path) -> None:
    twin, first, second = (f"{number:064x}" for number in range(3))
    one, other = Encoded(tmp_path, 0), Encoded(tmp_path, 1)
    for known, own in ((one, first), (other, second)):
        known.add(twin, np.zeros(3, np.float32))
        known.flush()
        known.add(own, np.ones(3, np.float32))
        known.leave_used()
    one.forget_unused()
    again = Encoded(tmp_path)
    assert [key in again for key in (twin, first, second)] == [True, True, True]
    assert np.array_equal(again.read(second), np.ones(3, np.float32))
    again.forget_unused()
    again = Encoded(tmp_path)
    assert [key in again for key in (twin, first, second)] == [False, False, True]


# Processes.


def configuration(folder: Path, processes: int) -> Path:
    path = folder / f"{processes}.yaml"
    settings = yaml.safe_load((ROOT / "infra/accelerate/cpu-ddp.yaml").read_text())
    path.write_text(yaml.safe_dump({**settings, "num_processes": processes}))
    return path


def finish(process: Popen[str]) -> tuple[int, str, str]:
    """Exit code as a shell sees it, and what was said and complained of."""
    said, complained = process.communicate(timeout=500)
    code = process.returncode
    return (code if code >= 0 else 128 - code), said, complained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flip"), [(TWO, True), pytest.param(THREE, False, marks=pytest.mark.kills)]
)
def test_any_number_of_processes_write_the_same_bytes(
    pipeline: Path, tmp_path: Path, processes: int, flip: bool
) -> None:
    project = Project(tmp_path, pipeline)
    project.settings["flip"] = flip
    rows = numbered(30) | {"twin": (picture(0), "caption 0")}
    write_images(project.images, in_shards(rows, 4))
    settings = {"accelerate": configuration(tmp_path, processes)}
    code, said, complained = finish(project.launch(**settings))
    assert code == 0, complained
    # Twins that two processes have at a time are encoded twice; captions never are.
    pictures = 61 if flip else 31
    assert encoded_in(said) in {(pictures + twice, 17) for twice in range(3 if flip else 2)}
    project.assert_as_if_clean()
    code, said, _ = finish(project.launch(**settings))
    assert (code, encoded_in(said)) == (0, (0, 0))
    project.assert_as_if_clean()


@pytest.mark.slow
def test_a_process_that_is_launched_alone_does_all(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several threads, to the bytes of one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    project = Project(tmp_path, pipeline)
    write_images(project.images, in_shards(numbered(4), 2))
    code, said, complained = finish(project.launch(accelerate="infra/accelerate/cpu.yaml"))
    assert code == 0, complained
    assert encoded_in(said) == (5, 4)
    project.assert_as_if_clean()


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all(pipeline: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, tmp_path / "pipeline")
    shutil.copytree(pipeline, project.pipeline)
    write_images(project.images, in_shards(numbered(8), 2))
    path = project.pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.bias"][:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    code, said, complained = finish(project.launch(accelerate=configuration(tmp_path, TWO)))
    assert (code, said) == (1, "")
    assert re.search(
        r"^ldm encode: train-0000\d sample 0000000\d: .* not finite; set enc.*$", complained, re.M
    )
    assert "Traceback" not in complained and "torch/distributed" not in complained
    assert not project.out.exists()


def workers_of(process: Popen[str]) -> list[psutil.Process]:
    workers = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            workers += [child] if "ldm.encode" in child.cmdline() else []
    return workers


def a_worker(process: Popen[str], rng: random.Random) -> None:
    rng.choice(workers_of(process)).kill()


def the_launcher(process: Popen[str], _: random.Random) -> None:
    process.kill()


def the_group(process: Popen[str], _: random.Random) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def by_asking(process: Popen[str], _: random.Random) -> None:
    process.terminate()


def by_ctrl_c(process: Popen[str], _: random.Random) -> None:
    os.killpg(process.pid, signal.SIGINT)


WAYS = {a_worker: 137, the_launcher: 137, the_group: 137, by_asking: 143, by_ctrl_c: 130}


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.parametrize(("seed", "kills"), [(0, 3), pytest.param(1, 12, marks=pytest.mark.kills)])
def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(
    pipeline: Path, tmp_path: Path, seed: int, kills: int
) -> None:
    rng = random.Random(seed)
    project = Project(tmp_path, pipeline)
    pictures = (kills + 8) * encoded.PIECE
    write_images(project.images, in_shards(numbered(pictures), 100))
    settings = {"accelerate": configuration(tmp_path, TWO)}
    ways = list(islice(cycle(WAYS), kills))
    rng.shuffle(ways)
    for number, way in enumerate(ways):
        process = project.launch(**settings)
        wait_for(partial(has_begun, project, process, number), process)
        time.sleep(rng.uniform(0, 0.2))
        way(process, rng)
        code, _, complained = finish(process)
        assert code == WAYS[way]
        assert way is not a_worker or "ldm encode: a process was killed; the same" in complained
        # Ctrl-C may come while Python starts, which says so.
        assert way is by_ctrl_c or "Traceback" not in complained
        if project.out.exists():  # Published before it was killed, and so whole.
            opening(project.out, "latents", "encode")
            shutil.rmtree(project.out)
    code, said, complained = finish(project.launch(**settings))
    assert code == 0, complained
    assert encoded_in(said)[0] < pictures
    project.assert_as_if_clean()


def has_begun(project: Project, process: Popen[str], pieces: int) -> bool:
    """Whether all its workers run, so many pieces are stored, and it has written a shard."""
    written = list[Path]()
    with suppress(FileNotFoundError):  # What a kill left is removed meanwhile.
        written += project.out.parent.glob(".latents.writing/train-*.tar")
    started = len(workers_of(process)) == TWO
    return started and project.stored() >= pieces and (bool(written) or pieces == 0)
