"""What is encoded again, and that nothing else decides the result."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.artifacts import digest_tree
from ldm.config import Encode
from ldm.encode import encoded
from ldm.encode.encoded import Encoded
from ldm.encode.encoders import PICTURE_CODE, Encoder, picture_encoder, text_encoder
from ldm.errors import UserError
from ldm.models import Source, load_text_encoder, load_vae
from ldm.text import tokenize
from tests.disk import room_for
from tests.encoding import (
    ROOT,
    SETTINGS,
    Project,
    Rows,
    encoded_in,
    in_shards,
    picture,
    write_images,
)
from tests.launched import wait_for
from tests.test_train import run_here

CPU = torch.device("cpu")
ROWS = 9
SIZES = [(64, 64), (64, 32), (32, 64)]


def rows() -> dict[str, tuple[bytes, str]]:
    return {f"{row:08d}": (picture(row), f"a caption, the {row // 2}.") for row in range(ROWS)}


def write_rows(folder: Path, train: Rows) -> None:
    write_images(folder, in_shards(train, 4))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Project:
    own = tmp_path_factory.mktemp("pipeline") / "own"
    shutil.copytree(pipeline, own)
    project = Project(tmp_path_factory.mktemp("first"), own)
    write_rows(project.images, rows())
    project.encode()
    return project


@pytest.fixture
def project(first: Project, tmp_path: Path) -> Project:
    """After a first run, in folders of its own."""
    shutil.copytree(first.pipeline, tmp_path / "pipeline")
    project = Project(tmp_path, tmp_path / "pipeline")
    write_rows(project.images, rows())
    shutil.copytree(first.runs, project.runs)
    return project


def test_a_training_before_in_the_same_process_changes_nothing(
    first: Project, project: Project, pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    shutil.rmtree(project.runs)
    run_here(pipeline, latents, tmp_path / "training", steps=1)
    project.encode()
    assert digest_tree(project.out) == digest_tree(first.out)


def other_caption(project: Project) -> None:
    changed = rows()
    changed["00000004"] = (picture(4), "other words")
    write_rows(project.images, changed)


def other_picture(project: Project) -> None:
    changed = rows()
    changed["00000004"] = (picture(50), changed["00000004"][1])
    write_rows(project.images, changed)


def added_rows(project: Project) -> None:
    added = {"00000000x": (picture(60), "new"), "00000020": (picture(61), "newer")}
    write_rows(project.images, dict(sorted((rows() | added).items())))


def removed_row(project: Project) -> None:
    fewer = rows()
    del fewer["00000000"]
    write_rows(project.images, fewer)


def twins(project: Project) -> None:
    write_rows(project.images, rows() | {"1": (picture(62), "a"), "2": (picture(62), "a")})


def change_weight(path: Path, name: str) -> None:
    weights = load_file(path)
    weights[name] = weights[name] + 0.5
    save_file(weights, path, metadata={"format": "pt"})


def other_vae(project: Project) -> None:
    path = project.pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    change_weight(path, "encoder.conv_in.bias")


def other_text_encoder(project: Project) -> None:
    path = project.pipeline / "text_encoder" / "model.safetensors"
    change_weight(path, next(name for name in load_file(path) if "final_layer_norm.bias" in name))


def change_config(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_scaling(project: Project) -> None:
    change_config(project.pipeline / "vae" / "config.json", scaling_factor=0.5)


def other_groups(project: Project) -> None:
    change_config(project.pipeline / "vae" / "config.json", norm_num_groups=2)


def other_heads(project: Project) -> None:
    change_config(project.pipeline / "text_encoder" / "config.json", num_attention_heads=1)


def other_place(project: Project) -> None:
    project.pipeline = project.pipeline.rename(project.pipeline.parent / "elsewhere")


def other_storage(project: Project) -> None:
    project.settings = {**SETTINGS, "storage": "float16"}


def other_text_shards(project: Project) -> None:
    project.settings = {**SETTINGS, "text_shards": 2}


def with_flips(project: Project) -> None:
    project.settings = {**SETTINGS, "flip": True}


PICTURES, CAPTIONS = ROWS + 1, (ROWS + 1) // 2 + 2


@pytest.mark.parametrize(
    ("change", "pictures", "captions"),
    [
        (lambda project: None, 0, 0),
        (other_caption, 0, 1),
        (other_picture, 1, 0),
        (added_rows, 2, 2),
        (removed_row, 0, 0),
        (twins, 1, 0),
        (other_vae, PICTURES, 0),
        (other_groups, PICTURES, 0),
        (other_text_encoder, 0, CAPTIONS),
        (other_heads, 0, CAPTIONS),
        (other_storage, PICTURES, CAPTIONS),
        (other_scaling, 0, 0),
        (other_place, 0, 0),
        (other_text_shards, 0, 0),
        (with_flips, ROWS, 0),
    ],
)
def test_what_a_change_concerns_is_encoded_again_and_nothing_else(
    project: Project,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Project], None],
    pictures: int,
    captions: int,
) -> None:
    change(project)
    project.encode()
    assert encoded_in(capsys.readouterr().out) == (pictures, captions)
    project.assert_as_if_clean()


def test_code_and_libraries_decide_too(
    project: Project,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mended = tmp_path / "mended"
    for name in PICTURE_CODE:
        (mended / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "ldm" / f"{name}.py", mended / f"{name}.py")
    with (mended / "images.py").open("a") as images:
        images.write("# mended")
    monkeypatch.setattr("ldm.code.ROOT", mended)
    project.encode()
    assert encoded_in(capsys.readouterr().out) == (PICTURES, 0)
    monkeypatch.setattr("ldm.code.version", lambda name: "0")
    project.encode()
    assert encoded_in(capsys.readouterr().out) == (PICTURES, CAPTIONS)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_result_depends_on_its_item_alone(pipeline: Path, compute: str, threads: int) -> None:
    """Odd batches on several threads: there, a bare encoder's last bits tell an item's place."""
    config, source = Encode(batch_size=7, compute=compute), Source(str(pipeline))
    tokenizer, clip = load_text_encoder(source)
    pictures = [picture(row) for row in range(20)]
    several = [picture(row, SIZES[row % 5 // 2]) for row in range(20)]
    captions = [ids.tobytes() for ids in tokenize(tokenizer, [str(n) for n in range(20)]).numpy()]
    torch.set_num_threads(threads)
    try:
        for some in (pictures, several):
            check_independence(picture_encoder(load_vae(source), "", config, CPU), some)
        check_independence(text_encoder(clip, "", config, CPU), captions)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(1)


def check_independence(encoder: Encoder, items: list[bytes]) -> None:
    together = list(encoder.results(items))
    turned = list(encoder.results(items[::-1]))[::-1]
    alone = [next(encoder.results([item])) for item in items[:3]]
    assert len(together) == len(turned) == len(items)
    assert all(np.array_equal(one, other) for one, other in zip(together, turned, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=False))
    assert not np.array_equal(together[0], together[1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def forge(path: Path) -> None:
    path.unlink()
    name = hashlib.sha256(b"no tensors").hexdigest()
    (path.parent / f"{name}.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize("damage", [flip, cut, empty, forge])
def test_what_is_damaged_is_encoded_again_with_a_notice(
    project: Project, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    pieces = sorted(project.runs.glob("encoded/*.safetensors"))
    assert len(pieces) == 2  # Of pictures, captions.
    for piece in pieces:
        damage(piece)
    project.encode()
    said = capsys.readouterr().out
    assert said.count("is damaged; what it held is encoded again") == (1 if damage is forge else 2)
    assert encoded_in(said) == (PICTURES, CAPTIONS)
    project.assert_as_if_clean()


def test_what_the_last_run_did_not_use_is_forgotten(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    other_vae(project)
    for _ in range(2):
        project.encode()
        assert project.stored() == 2
    assert encoded_in(capsys.readouterr().out) == (0, 0)


def test_a_piece_is_rewritten_without_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "PIECE", 4)
    values = {f"{number:064d}": np.full((2, 3), number, np.float32) for number in range(12)}
    known = Encoded(tmp_path)
    for key, value in values.items():
        known.add(key, value)
    used = [key for number, key in enumerate(values) if number % 4 == 0 or number < 3]
    known = Encoded(tmp_path)
    for key in used:
        known.read(key)
    known.forget_unused()
    again = Encoded(tmp_path)
    assert [key for key in values if key in again] == used
    assert all(np.array_equal(again.read(key), values[key]) for key in used)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("layout", ["C", "F"])
def test_arrays_come_back_whatever_their_layout_in_memory(tmp_path: Path, layout: str) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).copy(layout)  # type: ignore[arg-type]
    known = Encoded(tmp_path)
    known.add("aa", values)
    known.flush()
    assert np.array_equal(Encoded(tmp_path).read("aa"), values)


def test_what_is_not_finite_is_named(project: Project) -> None:
    path = project.pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.bias"][:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"train-00000 sample 00000000: .* not finite; set"):
        project.encode()
    assert not project.out.exists()


def test_a_full_disk_is_told_and_costs_nothing(project: Project) -> None:
    full = pytest.raises(UserError, match=r"latents: cannot be written \(.*\); make room on that")
    with full, room_for(2000):
        project.encode()
    assert not project.out.exists()
    project.encode()
    project.assert_as_if_clean()


@pytest.mark.slow
def test_refuses_a_second_and_killed_goes_on_to_the_same_bytes(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(tmp_path, pipeline)
    many = {f"{row:08d}": (picture(row), f"{row}") for row in range(4 * encoded.PIECE)}
    write_images(project.images, in_shards(many, 100))
    process = project.launch()
    wait_for(lambda: project.stored() >= 2, process)
    process.send_signal(signal.SIGSTOP)  # Or it might be through before it is looked for.
    with pytest.raises(UserError, match=r"latents: another process makes it; wait"):
        project.encode_into(project.out, tmp_path / "other-runs")
    with pytest.raises(UserError, match=r"runs: another `ldm encode` uses it; .*--runs"):
        project.encode_into(tmp_path / "other", project.runs)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not project.out.exists()
    done = project.stored() * encoded.PIECE
    project.encode()
    assert encoded_in(capsys.readouterr().out) == (len(many) - done, len(many) + 2)
    project.assert_as_if_clean()
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert left == ["clean", "images", "latents", "other-runs", "runs"]
