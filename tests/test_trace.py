"""What a row touched, on a real MLflow, and what is left of it when it is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.artifacts import MANIFEST, opening, writing
from ldm.config import Encode, Params, Pretrained, Registry
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.images import encode_png
from ldm.ingest.report import write_skipped
from ldm.ingest.rows import Row, Skip, key_of
from ldm.latents import TEXT_MEMBERS, text_key
from ldm.params import load_params
from ldm.registry.promotion import promote
from ldm.registry.register import register
from ldm.scenes.lists import scene_of
from ldm.scenes.render import draw
from ldm.shards import ShardReader, writing_shard
from ldm.trace import trace
from ldm.tracking import connection
from ldm.tracking.registered import trained_on
from tests.served import write_list
from tests.test_registry import evaluation_of, model_of

ROOT = Path(__file__).resolve().parent.parent
URLS = [f"http://a.org/{number}.png" for number in range(4)]
GONE = URLS[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with MLflow's database and files."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(connection.TRACKING_URI, raising=False)
        patch.chdir(folder)
        yield folder


class Project:
    """Lists, pictures, latents and a registry, as the stages leave them."""

    def __init__(self, place: Path, pipeline: Path) -> None:
        self.pipeline = pipeline
        self.data, self.images, self.latents = (
            place / name for name in ("data", "images", "latents")
        )
        self.params = load_params(str(ROOT / "params.yaml"), ["registry.model=traced"])
        self.runs = place / "runs"

    def make(self, train: list[str]) -> None:
        lists = {"train": train, "validation": URLS[3:]}
        with writing(self.images, "images", config={"image_format": "png"}, inputs={}) as fresh:
            write_skipped(fresh / "skipped.csv", [])
            for split, urls in lists.items():
                write_list(self.data / f"{split}.csv", "url,caption", [(url, url) for url in urls])
                with writing_shard(fresh / f"{split}-00000.tar") as append:
                    for key, url in sorted((key_of(url), url) for url in urls):
                        content = encode_png(draw(scene_of("retrain", "train", URLS.index(url))[1]))
                        about = json.dumps({"caption": url}).encode()
                        append(key, {"png": content, "json": about})
        pretrained = Pretrained(pipeline=str(self.pipeline))
        encode(Encode(batch_size=4), pretrained, self.images, self.latents, self.runs)

    def register(self, folder: Path, mark: str, *, latents: Path | None) -> str:
        digest = opening(self.latents, "latents", "encode").digest
        model = model_of(folder / mark, self.pipeline, mark, latents=digest)
        paths = model, evaluation_of(folder / mark, model), self.images, latents
        return register(self.params.registry, *paths).version

    def trace(self, named: str) -> None:
        trace(self.params, named, self.data, self.images, self.latents)


@pytest.fixture(scope="module")
def project(place: Path, pipeline: Path) -> Project:
    """With two versions of the same latents, the second of which does not say so itself."""
    project = Project(place, pipeline)
    project.make(URLS[:3])
    project.register(place, "first", latents=project.latents)
    project.register(place, "second", latents=None)
    promote(project.params.registry, "1")
    return project


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_row_is_followed_to_the_models(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    key, text = key_of(GONE), text_key(GONE)
    (texts,) = (
        path
        for path in project.latents.glob("texts-*.tar")
        if text in ShardReader(path.parent, path.name, TEXT_MEMBERS)
    )
    capsys.readouterr()
    project.trace(GONE)
    expected = [
        f"{project.data / 'train.csv'} row 1: {GONE}",
        f"{project.images / 'train-00000.tar'}: picture {key}",
        f"{project.latents / 'train-00000.tar'}: latents {key}",
        f"{texts}: text {text}, which other samples may share",
        "traced version 1 @champion: was trained on it",
        "traced version 2 @challenger: was trained on it",
    ]
    assert said(capsys) == expected
    project.trace(key)
    assert said(capsys) == expected
    project.trace(URLS[3])
    assert said(capsys)[-1] == "traced version 2 @challenger: was validated on it"


def test_a_row_that_was_left_out_is_named_with_its_reason(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture may be in another row's sample, and the reason says in which."""
    row = Row("train", 7, "http://a.org/copy.png", "words")
    skipped = [
        Skip(row, "duplicate content", "same picture as row 1 of train"),
        Skip(Row("train", 8, "ftp://a", ""), "bad url"),
    ]
    write_skipped(tmp_path / "skipped.csv", skipped)
    capsys.readouterr()
    trace(project.params, row.url, project.data, tmp_path, project.latents)
    why = "duplicate content: same picture as row 1 of train"
    assert said(capsys)[0] == f"{tmp_path}/skipped.csv: row 7 of train is left out, {why}"


def test_what_nobody_knows_is_said_with_all_that_was_searched(project: Project) -> None:
    searched = [project.data / "train.csv", project.data / "validation.csv"]
    searched += [project.images / "skipped.csv", project.images / "*.tar"]
    searched += [project.latents / "*.tar", "model traced in mlflow.db"]
    for named in ("http://a.org/none.png", "0" * 32):
        with pytest.raises(UserError) as caught:
            project.trace(named)
        assert str(caught.value) == f"{named}: no trace of it in {', '.join(map(str, searched))}"
    with pytest.raises(UserError, match="'train-00000': is no URL; write http"):
        project.trace("train-00000")


def test_what_is_not_there_is_not_said_to_have_no_trace(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that was mistyped is no clean bill, nor is a model."""
    mistyped = {**project.params.model_dump(), "registry": Registry(model="tracd")}
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        trace(Params.model_validate(mistyped), GONE, tmp_path, tmp_path, tmp_path / "none")
    assert str(caught.value) == f"{GONE}: nothing was looked into"
    files = ("train.csv", "validation.csv", "skipped.csv", "*.tar", "none/*.tar")
    lacking = [*(tmp_path / name for name in files), "model tracd in mlflow.db"]
    assert said(capsys) == [f"{one}: is not there, not looked into" for one in lacking]


def test_old_versions_are_found_when_the_row_is_gone(
    project: Project, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.make([URLS[0], URLS[2]])
    assert project.register(place, "third", latents=project.latents) == "3"
    capsys.readouterr()
    project.trace(GONE)
    assert said(capsys) == [
        "traced version 1 @champion: was trained on it",
        "traced version 2: was trained on it",
    ]
    project.trace(URLS[0])
    assert said(capsys)[-1] == "traced version 3 @challenger: was trained on it"


def test_versions_that_do_not_say_are_named(
    project: Project, place: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Registry(model="silent")
    model = model_of(place / "silent", pipeline, latents="other")
    register(config, model, evaluation_of(place / "silent", model))
    silent = Params.model_validate({**project.params.model_dump(), "registry": config})
    with pytest.raises(UserError, match=r"latents/\*\.tar; not known of silent version 1 @chall"):
        trace(silent, "0" * 32, project.data, project.images, project.latents)
    capsys.readouterr()
    trace(silent, URLS[3], project.data, project.images, project.latents)
    assert said(capsys)[-1] == "not known of silent version 1 @challenger"


def test_a_version_does_not_say_what_it_cannot_know(
    project: Project, place: Path, pipeline: Path
) -> None:
    """Latents without their shards, as where a bucket's manifest was fetched alone."""
    config = Registry(model="blind")
    manifest = (project.latents / MANIFEST).read_text()
    (alone := place / "alone").mkdir()
    (alone / MANIFEST).write_text(manifest)
    digest = opening(project.latents, "latents", "encode").digest
    model = model_of(place / "blind", pipeline, latents=digest)
    register(config, model, evaluation_of(place / "blind", model), latents=alone)
    assert trained_on(config, key_of(URLS[0])) == {"blind version 1 @challenger": None}


def test_a_damaged_shard_is_named(project: Project, tmp_path: Path) -> None:
    (tmp_path / "train-00000.tar").write_bytes(b"nonsense" * 100)
    with pytest.raises(UserError, match=r"train-00000\.tar: damaged tar"):
        trace(project.params, GONE, tmp_path, tmp_path, tmp_path)


def test_the_command(tmp_path: Path) -> None:
    write_list(tmp_path / "data" / "train.csv", "url,caption", [("http://a/图", "words")])
    command = [sys.executable, "-m", "ldm.cli", "trace", "--params", str(ROOT / "params.yaml")]
    environment = {"PYTHONPATH": str(ROOT)}
    known, other = (
        subprocess.run(
            [*command, named], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for named in ("http://a/%E5%9B%BE", "http://a/b")
    )
    lacking = ["data/validation.csv", "artifacts/images/skipped.csv", "artifacts/images/*.tar"]
    lacking += ["artifacts/latents/*.tar", "mlflow.db"]
    absent = "".join(f"{one}: is not there, not looked into\n" for one in lacking)
    assert (known.returncode, known.stdout) == (0, f"data/train.csv row 0: http://a/图\n{absent}")
    complaint = "ldm trace: http://a/b: no trace of it in data/train.csv\n"
    assert (other.returncode, other.stdout, other.stderr) == (1, absent, complaint)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
