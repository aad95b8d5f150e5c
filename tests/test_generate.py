"""Batch jobs: what a row asks for, what is skipped, and what a kill leaves."""

from __future__ import annotations

import csv
import datetime
import fcntl
import json
import signal
import subprocess
import sys
import tarfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.config import Sampling
from ldm.errors import UserError
from ldm.generate import stage as job_module
from ldm.generate.prompts import Wish
from ldm.generate.stage import Job, Prompts, generate

QUICK = Sampling(steps=2, batch_size=4)
ROOT = Path(__file__).resolve().parent.parent


def wish(**changes: Any) -> Wish:
    given = {"negative": "", "seed": 0, "height": None, "width": None, "sampling": QUICK}
    return Wish(**{"prompt": "", "extra": {}, **given, **changes})


def run(pipeline: Path, prompts: Prompts, out: Path, **job: Any) -> list[dict[str, Any]]:
    generate(str(pipeline), prompts, Job(job.pop("default", wish()), **job), out)
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(row["prompt"] + "\n" for row in rows))
    return path


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


ROWS = [
    {"prompt": "a red circle", "negative": "blue", "seed": 3, "steps": 3, "width": 32, "id": "x"},
    {"prompt": "两个蓝色方形", "negative": "", "seed": 4, "steps": 2, "width": 64, "id": "y"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_mean_the_same_in_every_kind_of_file(
    pipeline: Path, tmp_path: Path, suffix: str
) -> None:
    lines = run(pipeline, write(tmp_path / f"prompts{suffix}", ROWS), tmp_path / "out")
    expected = run(pipeline, ROWS, tmp_path / "listed")
    assert pictures(tmp_path / "out") == pictures(tmp_path / "listed")
    assert lines == expected
    assert [line["extra"] for line in lines] == [{"id": "x"}, {"id": "y"}]
    first = {"seed": 3, "steps": 3, "width": 32, "negative": "blue", "row": 1}
    assert first.items() <= lines[0].items()


def test_text_files_have_a_prompt_a_line(pipeline: Path, tmp_path: Path) -> None:
    lines = run(pipeline, write(tmp_path / "prompts.txt", ROWS), tmp_path / "out")
    assert [line["prompt"] for line in lines] == ["a red circle", "两个蓝色方形"]


def test_a_picture_depends_on_its_prompt_and_number_alone(pipeline: Path, tmp_path: Path) -> None:
    default = wish(sampling=Sampling(steps=2, batch_size=3))
    rows = [{"prompt": text} for text in ("a red circle", "a blue ring", "a star")]
    run(pipeline, rows, tmp_path / "a", default=default, images_per_prompt=2)
    run(pipeline, rows[::-1], tmp_path / "b", images_per_prompt=2)
    run(pipeline, rows[1:2], tmp_path / "c", images_per_prompt=1)
    a, b, c = (list(pictures(tmp_path / name).values()) for name in "abc")
    assert a == b[4:] + b[2:4] + b[:2]
    assert c == a[2:3]
    assert len(set(a)) == 6


BAD_ROWS = {
    "not json": "cannot be read",
    "[1]": "cannot be read",
    '{"prompt": "  "}': "has no prompt",
    '{"prompt": 7}': "has no prompt",
    '{"prompt": "a", "seed": "soon"}': "seed 'soon' is no whole number",
    '{"prompt": "a", "seed": 1.5}': "seed '1.5' is no whole number",
    '{"prompt": "a", "seed": Infinity}': "seed 'inf' is no whole number",
    '{"prompt": "a", "seed": ' + "9" * 400 + "}": "is no whole number",
    '{"prompt": "a", "seed": -1}': "seed '-1' is no whole number",
    '{"prompt": "a", "steps": 0}': "steps",
    '{"prompt": "a", "steps": 5000}': "steps 5000: too many for a schedule of 1000",
    '{"prompt": "a", "guidance": Infinity}': "guidance",
    '{"prompt": "a", "height": 30}': "height 30",
    '{"prompt": "a", "width": 8000000}': "width 8000000",
    '{"prompt": "a", "sampler": "magic"}': "sampler",
    '{"prompt": "half an emoji \\ud83d"}': "is no Unicode text",
}


def test_bad_rows_of_a_file_are_listed_and_the_rest_is_drawn(
    pipeline: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    good = json.dumps({"prompt": "a red circle", "seed": 2**62, "skipped": "no", "file": "x"})
    path.write_text("\ufeff" + "\n".join([good, *BAD_ROWS, good]) + "\n\n")
    lines = run(pipeline, path, tmp_path / "out")
    last = len(BAD_ROWS) + 1
    assert [line["row"] for line in lines] == [1, last + 1]
    assert [line["file"] for line in lines] == ["00000.png", f"{last:05d}.png"]
    assert lines[0]["extra"] == {"skipped": "no", "file": "x"}
    skipped = [json.loads(one) for one in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [one["row"] for one in skipped] == list(range(2, last + 1))
    for one, reason in zip(skipped, BAD_ROWS.values(), strict=True):
        assert reason in one["skipped"]


def test_columns_of_any_kind_are_carried(pipeline: Path, tmp_path: Path) -> None:
    day = datetime.date(2026, 11, 23)
    row = {"prompt": "a", "day": day, "price": Decimal("1.5"), "raw": b"x", "seed": 3.0}
    (line,) = run(pipeline, write(tmp_path / "prompts.parquet", [row]), tmp_path / "out")
    assert line["extra"]["day"] == "2026-11-23" and line["seed"] == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), "is it UTF-8, and whole"),
        ("wide.csv", "prompt\na".encode("utf-16"), "is it UTF-8, and whole"),
        ("open.csv", b'prompt\n"' + b"a" * 200_000, "is it UTF-8, and whole"),
        ("twice.csv", b"prompt,prompt\na,b\n", "has the column 'prompt' twice"),
        ("torn.parquet", b"PAR1 and no more", "is it UTF-8, and whole"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    pipeline: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{told}"):
        run(pipeline, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prompts", "job", "told"),
    [
        ([], {}, "no prompts"),
        ([{"prompt": " "}], {}, "has no prompt"),
        ([{"prompt": "a"}], {"default": wish(height=60)}, "height 60: must be a positive multiple"),
        ([{"prompt": "a"}], {"default": wish(width=0)}, "width 0: must be a positive multiple"),
        ([{"prompt": "a"}], {"images_per_prompt": 0}, "must be at least 1"),
        ([{"prompt": "a"}], {"rows_per_shard": 0}, "must be at least 1"),
        (Path("nowhere.txt"), {}, "no such file"),
        (Path("prompts.xls"), {}, "unknown kind of prompts file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(
    pipeline: Path, tmp_path: Path, prompts: Prompts, job: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        run(pipeline, prompts, tmp_path / "out", **job)
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_good_row_fails(pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match="none of its 1 rows can be drawn"):
        run(pipeline, path, tmp_path / "out")


def test_long_prompts_are_told(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = run(pipeline, [{"prompt": "red " * 50 + "blue"}], tmp_path / "out")
    assert "row 1: past the limit of the tokenizer, cut: 'red" in capsys.readouterr().out
    assert line["cut"].endswith("blue")


def test_other_jobs_pictures_are_left_alone(pipeline: Path, tmp_path: Path) -> None:
    run(pipeline, ROWS, tmp_path / "out")
    before = pictures(tmp_path / "out")
    other = wish(sampling=Sampling(steps=2, guidance=5, batch_size=4))
    with pytest.raises(UserError, match=r"another job \(other guidance\)"):
        run(pipeline, ROWS, tmp_path / "out", default=other)
    with pytest.raises(UserError, match=r"another job \(other seed\)"):
        run(pipeline, ROWS, tmp_path / "out", default=wish(seed=1))
    with (tmp_path / "out/.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process draws into it"):
            run(pipeline, ROWS, tmp_path / "out")
    run(pipeline, ROWS, tmp_path / "out")
    assert pictures(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run(pipeline, ROWS, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_of_two_that_find_a_folder_empty_one_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes when the first has looked, and has not yet written whose folder it is."""
    write_json = job_module.write_json

    def second_comes(path: Path, identity: dict[str, Any]) -> None:
        monkeypatch.setattr(job_module, "write_json", write_json)
        with (
            pytest.raises(UserError, match="another process draws into it"),
            job_module._claimed(tmp_path, {"seed": 2}),
        ):
            pass
        write_json(path, identity)

    monkeypatch.setattr(job_module, "write_json", second_comes)
    with job_module._claimed(tmp_path, {"seed": 1}):
        assert json.loads((tmp_path / "job.json").read_text()) == {"seed": 1}


def test_each_job_has_a_folder_of_its_own(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for prompt in ("a", "b", "a"):
        generate(str(pipeline), [{"prompt": prompt}], Job(wish()), None)
    assert len(list((tmp_path / "generated").iterdir())) == 2


def test_shards_hold_the_same_pictures(pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a star {n}"}) + "\n{}\n" for n in range(4)))
    run(pipeline, path, tmp_path / "loose")
    lines = run(pipeline, path, tmp_path / "packed", rows_per_shard=3)
    packed, order = {}, []
    for shard in sorted((tmp_path / "packed").glob("images-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                if member.name.endswith(".png"):
                    packed[member.name] = content.read()
                else:
                    order.append(json.loads(content.read()))
    loose = pictures(tmp_path / "loose")
    assert packed == loose
    assert order == lines


class Killed(BaseException):
    """Passes every handler, as a kill does."""


@pytest.mark.parametrize("rows_per_shard", [None, 2])
def test_killed_at_any_write_it_ends_in_the_same_bytes(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_shard: int | None
) -> None:
    """Before each rename in turn, files and tables alike, and started again."""
    monkeypatch.setattr(job_module, "LOOSE_PART", 2)
    rows = [{"prompt": f"a star {number}"} for number in range(3)]
    rename, left = Path.replace, -1

    def counted(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    run(pipeline, rows, tmp_path / "straight", rows_per_shard=rows_per_shard)
    renames = -1 - left
    assert renames > 8
    for kill in range(renames):
        left, folder = kill, tmp_path / f"killed {kill}"
        with pytest.raises(Killed):
            run(pipeline, rows, folder, rows_per_shard=rows_per_shard)
        left = -1
        run(pipeline, rows, folder, rows_per_shard=rows_per_shard)
        assert contents(folder) == contents(tmp_path / "straight")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a star {number}\n" for number in range(500)))
    command = [sys.executable, "-m", "ldm.cli", "generate", "--model", str(pipeline)]
    command += ["--params", str(ROOT / "params.yaml"), "--prompts", str(prompts), "--steps", "2"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(out)], cwd=ROOT)

    process = start(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/tables/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/images.jsonl").exists()
    started = [start(tmp_path / name) for name in ("killed", "straight")]
    assert [process.wait() for process in started] == [0, 0]
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "straight")
    tables = [(tmp_path / name / "images.jsonl").read_bytes() for name in ("killed", "straight")]
    assert tables[0] == tables[1]
