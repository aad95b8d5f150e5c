"""Artifacts in a bucket, on a real S3-speaking server: whole, verified, never half there."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import pytest
from s3fs import S3FileSystem

from ldm.artifacts import MANIFEST, digest_tree, opening, writing
from ldm.cache import LatentCache
from ldm.cli import main
from ldm.errors import UserError
from ldm.remote.artifacts import publishing, reading
from ldm.remote.bucket import PART, Bucket
from ldm.shards import ShardReader
from tests.disk import room_for
from tests.launched import ROOT, launch
from tests.s3 import Server, serving_s3
from tests.served import photograph, serving, stored, write_list

URL = "s3://bucket/images"
FILES = {f"train-{number:05d}.tar": f"shard {number}\n" * 1000 for number in range(6)}
CHANGED = {**FILES, "train-00002.tar": "changed"}


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with serving_s3() as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.reset()
    return one_server


def publish(runs: Path, files: dict[str, str] = FILES, url: str = URL) -> None:
    with publishing(url, "images", runs) as out:
        write(out, files)


def write(out: Path, files: dict[str, str]) -> None:
    with writing(out, "images", config={}, inputs={}) as fresh:
        for name, content in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_text(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fetched(runs: Path, url: str = URL) -> dict[str, str]:
    """What a reader sees: verified, and without the manifest."""
    with reading(url, runs) as folder:
        opening(folder, "images", "ingest")
        return {name: (folder / name).read_text() for name in digest_tree(folder)}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def names(server: Server, url: str = URL) -> set[str]:
    """Every file at the URL."""
    root = url.removeprefix("s3://")
    return {path.removeprefix(f"{root}/") for path in server.files().find(root)}


def expected(files: dict[str, str]) -> set[str]:
    return {MANIFEST, *(f"files/{digest(content)}" for content in files.values())}


def test_what_is_published_is_what_is_read(server: Server, tmp_path: Path) -> None:
    files = {**FILES, "card/大 1.png": "x", "empty": "", "again": FILES["train-00000.tar"]}
    publish(tmp_path / "writer", files)
    assert names(server) == expected(files)
    write(tmp_path / "local", files)
    with reading(URL, tmp_path / "reader") as folder:
        assert contents(folder) == contents(tmp_path / "local")
    assert fetched(tmp_path / "writer") == files


def test_folders_are_left_alone(tmp_path: Path) -> None:
    with publishing(tmp_path / "out", "images", tmp_path / "runs") as out:
        assert out == tmp_path / "out"
    with reading(tmp_path / "out", tmp_path / "runs") as folder:
        assert folder == tmp_path / "out"
    assert not list(tmp_path.iterdir())


def test_nothing_is_sent_or_fetched_twice(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "writer")
    assert len(server.asked("PUT")) == len(FILES) + 1
    assert f"published: 6 of 6 files sent, the rest was there -> {URL}" in capsys.readouterr().out
    assert fetched(tmp_path / "reader") == FILES
    server.requests.clear()
    publish(tmp_path / "another writer")
    assert fetched(tmp_path / "reader") == fetched(tmp_path / "writer") == FILES
    assert {path for _, path in server.requests} == {f"/bucket/images/{MANIFEST}"}
    assert not server.asked("PUT")


def test_only_what_changed_is_sent_fetched_and_deleted(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    fetched(tmp_path / "reader")
    server.requests.clear()
    publish(tmp_path / "another writer", CHANGED)
    new = digest("changed")
    assert server.asked("PUT") == [new, MANIFEST]
    server.requests.clear()
    assert fetched(tmp_path / "reader") == CHANGED
    assert server.asked("GET") == [MANIFEST, new]
    assert names(server) == expected(CHANGED)


def test_a_large_file_goes_in_parts(server: Server, tmp_path: Path) -> None:
    files = {"train-00000.tar": "0123456789abcdef" * (5 * PART // 32)}
    publish(tmp_path / "writer", files)
    assert len(server.asked("PUT")) == 3 + 1
    assert names(server) == expected(files)
    assert fetched(tmp_path / "reader") == files


def test_files_of_others_stay(server: Server, tmp_path: Path) -> None:
    others = {"files/notes.txt", "x", *(f"files/mine/{digest(text)}" for text in FILES.values())}
    server.files().pipe({f"bucket/images/{name}": b"mine" for name in others})
    publish(tmp_path)
    assert names(server) == expected(FILES) | others


PUBLISH = f"""
import json, sys
from pathlib import Path
from ldm.artifacts import writing
from ldm.remote.artifacts import publishing
with (
    publishing({URL!r}, "images", Path(sys.argv[1])) as out,
    writing(out, "images", config={{}}, inputs={{}}) as fresh,
):
    for name, content in json.load(sys.stdin).items():
        (fresh / name).write_text(content)
"""
FETCH = f"""
import sys
from pathlib import Path
from ldm.remote.artifacts import reading
with reading({URL!r}, Path(sys.argv[1])):
    pass
"""


def run_until(server: Server, stop: Callable[[str, str], bool], script: str, runs: Path) -> None:
    """Run a script as a process of its own that is killed at the first request to ``stop`` at."""
    process = Popen([sys.executable, "-c", script, str(runs)], cwd=ROOT, stdin=PIPE, stderr=DEVNULL)

    def kill(method: str, path: str) -> str | None:
        if stop(method, path):
            process.kill()
            process.wait()
            return "503 Slow Down"
        return None

    server.disturb = kill
    with suppress(BrokenPipeError):
        process.communicate(json.dumps(CHANGED).encode(), timeout=120)
    assert process.returncode == -signal.SIGKILL
    server.disturb = lambda method, path: None


MOMENTS = ["sending", "sent", "published"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_publishing_killed_at_any_request(server: Server, tmp_path: Path, moment: str) -> None:
    """The artifact is the one before or the new one, and the same command ends in the new one."""
    publish(tmp_path / "earlier", {**FILES, "train-00009.tar": "goes"})
    before = names(server)
    server.requests.clear()

    def stop(method: str, path: str) -> bool:
        if moment == "published":
            return method == "POST"
        return method == "PUT" and path.endswith(MANIFEST) == (moment == "sent")

    run_until(server, stop, PUBLISH, tmp_path)
    whole = CHANGED if moment == "published" else {**FILES, "train-00009.tar": "goes"}
    assert names(server) >= before
    assert fetched(tmp_path / "reader") == whole
    publish(tmp_path, CHANGED)
    assert names(server) == expected(CHANGED)
    assert fetched(tmp_path / "reader") == CHANGED


def test_fetching_killed_goes_on(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    count = random.Random(7).randint(5, 6)  # Four are on their way at a time.
    run_until(server, lambda *_: len(server.asked("GET")) == count + 2, FETCH, tmp_path / "reader")
    server.requests.clear()
    assert fetched(tmp_path / "reader") == FILES
    assert 1 <= len(server.asked("GET")) < 1 + len(FILES)
    with reading(URL, tmp_path / "reader") as folder:
        assert set(contents(folder)) == {*FILES, MANIFEST}


def test_altered_file_is_named(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    name = digest(FILES["train-00003.tar"])
    content = FILES["train-00003.tar"].replace("3", "4", 1)
    server.files().pipe_file(f"bucket/images/files/{name}", content.encode())
    told = f"{URL}/files/{name}: is not what was published as train-00003.tar; delete it there"
    with pytest.raises(UserError, match=told):
        fetched(tmp_path / "reader")
    server.files().rm_file(f"bucket/images/files/{name}")
    with pytest.raises(UserError, match=f"{URL}/files/{name}: .*publish the artifact again"):
        fetched(tmp_path / "reader")
    publish(tmp_path / "writer")
    assert fetched(tmp_path / "reader") == FILES


def test_file_cut_short_is_sent_again(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    name = digest(FILES["train-00001.tar"])
    server.files().pipe_file(f"bucket/images/files/{name}", b"shard")
    with pytest.raises(UserError, match=f"{name}: is not what was published as train-00001"):
        fetched(tmp_path / "reader")
    server.requests.clear()
    publish(tmp_path / "writer")
    assert server.asked("PUT") == [name]
    assert fetched(tmp_path / "reader") == FILES


def test_full_disk_is_told(server: Server, tmp_path: Path) -> None:
    publish(tmp_path)
    name = f"files/{digest(FILES['train-00000.tar'])}"
    with pytest.raises(UserError, match=f"{URL}/{name}: .*No space left on device; make room"):
        Bucket(URL).fetch(name, Path("/dev/full"))
    too_large = pytest.raises(UserError, match=f"{URL}/{name}: .*File too large; make room")
    with too_large, room_for(len(FILES["train-00000.tar"]) - 1):
        Bucket(URL).fetch(name, tmp_path / "fetched")


def test_damaged_copy_is_mended(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    with reading(URL, tmp_path / "reader") as folder:
        pass
    (folder / "train-00000.tar").write_text("?")
    (folder / "train-00001.tar").unlink()
    (folder / MANIFEST).write_text("{")
    (folder / "added").touch()
    server.requests.clear()
    assert fetched(tmp_path / "reader") == FILES
    assert len(server.asked("GET")) == 3
    (folder / "train-00000.tar").write_text("?")
    publish(tmp_path / "writer", CHANGED)
    assert fetched(tmp_path / "reader") == CHANGED


def test_unreadable_copy_is_no_hindrance(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    with reading(URL, tmp_path / "reader") as folder:
        pass
    (folder / MANIFEST).write_text("{")
    publish(tmp_path / "writer", CHANGED)
    assert fetched(tmp_path / "reader") == CHANGED


def test_published_anew_while_it_is_fetched(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    goes = digest(FILES["train-00002.tar"])
    meanwhile = iter([CHANGED])

    def disturb(method: str, path: str) -> None:
        if method == "GET" and path.endswith(goes):
            for files in meanwhile:
                publish(tmp_path / "another writer", files)

    server.disturb = disturb
    assert fetched(tmp_path / "reader") == CHANGED


def test_two_who_fetch_share_the_copy(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    server.requests.clear()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(fetched, [tmp_path / "reader"] * 2)) == [FILES] * 2
    assert len(server.asked("GET")) == 2 + len(FILES)


def test_copy_stays_while_it_is_read(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    runs = tmp_path / "reader"
    with reading(URL, runs) as old:
        publish(tmp_path / "writer", CHANGED)
        with reading(URL, runs) as new:
            assert new != old
            assert (old / "train-00002.tar").read_text() == FILES["train-00002.tar"]
            same = [(folder / "train-00001.tar").stat().st_ino for folder in (old, new)]
            assert len(set(same)) == 1
        with reading(URL, runs):
            assert old.is_dir()
    with reading(URL, runs):
        assert new.is_dir() and not old.exists()
        assert [path.stem for path in new.parent.glob("*.lock")] == [new.name]
    assert len(list((tmp_path / "writer").rglob(MANIFEST))) == 1


def test_publishing_the_same_leaves_its_readers_alone(server: Server, tmp_path: Path) -> None:
    publish(tmp_path)
    with reading(URL, tmp_path) as copy, reading(URL, tmp_path) as same:
        shard = (copy / "train-00000.tar").stat().st_ino
        publish(tmp_path)
        assert same == copy and (copy / "train-00000.tar").stat().st_ino == shard


def test_two_who_publish(server: Server, tmp_path: Path) -> None:
    """On one machine the second waits to be told; from two, who is last is told."""
    with publishing(URL, "images", tmp_path / "one") as out:
        write(out, FILES)
        with pytest.raises(UserError, match=f"{URL}: another process makes it; wait for it"):
            publish(tmp_path / "one")

    def overtaken() -> None:
        with publishing(URL, "images", tmp_path / "one") as out:
            write(out, FILES)
            publish(tmp_path / "other", CHANGED)

    with pytest.raises(UserError, match=f"{URL}: another process published there; run it again"):
        overtaken()
    assert fetched(tmp_path / "reader") == CHANGED
    publish(tmp_path / "one")
    assert fetched(tmp_path / "reader") == FILES


def test_nothing_is_published_after_an_error(server: Server, tmp_path: Path) -> None:
    with suppress(SystemExit), publishing(URL, "images", tmp_path) as out:
        write(out, FILES)
        sys.exit(1)
    assert not names(server)


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    refusals = ["503 Slow Down"] * 2 + ["500 Internal Server Error"] * 2
    random.Random(3).shuffle(refusals)
    refused = iter(refusals)
    server.disturb = lambda method, path: next(refused, None) if "files/" in path else None
    publish(tmp_path / "writer")
    assert next(refused, None) is None
    assert fetched(tmp_path / "reader") == FILES


def test_a_server_that_loses_a_file_is_found_out(server: Server, tmp_path: Path) -> None:
    lost = digest(FILES["train-00004.tar"])
    server.disturb = lambda method, path: (
        "200 OK" if (method, path[-64:]) == ("PUT", lost) else None
    )
    with pytest.raises(UserError, match=f"{URL}: .*run it again"):
        publish(tmp_path)
    assert MANIFEST not in names(server)


def test_a_server_that_stays_busy_is_given_up(server: Server, tmp_path: Path) -> None:
    server.disturb = lambda method, path: "503 Slow Down" if method == "PUT" else None
    with pytest.raises(UserError, match=f"{URL}/files/.*; see to the endpoint .* and run it again"):
        publish(tmp_path)
    assert len(server.asked("PUT")) < 100
    server.disturb = lambda method, path: None
    publish(tmp_path)
    assert fetched(tmp_path) == FILES


def test_one_artifact_does_not_take_the_place_of_another(server: Server, tmp_path: Path) -> None:
    publish(tmp_path)
    with (
        pytest.raises(UserError, match=f"{URL}: holds 'images', not 'latents'; give another URL"),
        publishing(URL, "latents", tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "manifest",
    [
        "", "[]", "{}", '{"kind": "images"}',
        *(
            json.dumps({"kind": "images", "config": {}, "inputs": {}, "counts": {}, "files": files})
            for files in (
                {"../outside": "0" * 64}, {"/outside": "0" * 64}, {"a/../../b": "0" * 64},
                {MANIFEST: "0" * 64}, {"": "0" * 64}, {"a": "../../other"}, {"a": None}, [],
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(server: Server, tmp_path: Path, manifest: str) -> None:
    server.files().pipe_file(f"bucket/images/{MANIFEST}", manifest.encode())
    told = f"{URL}/manifest.json: is no artifact's manifest .*; mend the URL"
    with pytest.raises(UserError, match=told), reading(URL, tmp_path / "runs"):
        pass
    with pytest.raises(UserError, match=told), publishing(URL, "images", tmp_path / "runs"):
        pass
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"lock", "publishing"}


def told(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as error:
        main(command)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert capsys.readouterr() == ("", "")
    return error.value.code


@pytest.fixture(params=["read", "write"])
def ask(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """What ``ldm encode`` says of a URL that it is to read from, or to write to."""
    command = ["encode", "--params", str(ROOT / "params.yaml"), "--runs", str(tmp_path / "runs")]
    paths = {"--images": str(tmp_path / "none"), "--out": str(tmp_path / "latents")}
    option = "--images" if request.param == "read" else "--out"

    def says(url: str) -> str:
        S3FileSystem.clear_instance_cache()
        return told(capsys, *command, *chain(*{**paths, option: url}.items()))

    return says


def test_faults_are_told_before_the_work(
    server: Server, ask: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "no such file or bucket; make the bucket, or mend the URL"
    assert ask("s3://nobucket/x") == f"ldm encode: s3://nobucket/x/files: {nowhere}"
    assert ask("foo://x/y").endswith("Protocol not known: foo; write s3://BUCKET/FOLDER")
    assert "gcsfs" in ask("gs://bucket/x")
    server.check_credentials(check=True)
    no_access = "; give credentials that may (AWS_ACCESS_KEY_ID and the like, or ~/.aws)"
    assert ask(URL).startswith(f"ldm encode: {URL}/") and ask(URL).endswith(no_access)
    server.check_credentials(check=False)
    with monkeypatch.context() as changed:
        changed.delenv("AWS_ACCESS_KEY_ID")
        assert ask(URL).endswith(no_access)
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        down = "see to the endpoint (AWS_ENDPOINT_URL_S3) and run it again, it goes on"
        assert "127.0.0.1:9" in ask(URL) and ask(URL).endswith(down)
    S3FileSystem.clear_instance_cache()


def test_nothing_to_read(server: Server, tmp_path: Path) -> None:
    told = f"{URL}: holds no manifest.json; publish it, or mend the URL"
    with pytest.raises(UserError, match=told):
        fetched(tmp_path)


def test_only_images_and_latents_have_urls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--out", "s3://bucket/model"])
    assert "s3://bucket/model is no folder; only images and latents" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--latents", "s3://"])
    assert "s3:// names no bucket; write s3://BUCKET/FOLDER" in capsys.readouterr().err


def test_a_manifest_can_be_fetched_alone(server: Server, tmp_path: Path) -> None:
    publish(tmp_path / "writer")
    server.requests.clear()
    with reading(URL, tmp_path / "reader", files=False) as folder:
        assert set(contents(folder)) == {MANIFEST}
    assert server.asked("GET") == [MANIFEST]
    assert fetched(tmp_path / "reader") == FILES
    with reading(URL, tmp_path / "reader", files=False) as folder:
        assert set(contents(folder)) == {MANIFEST, *FILES}


def test_ingest_publishes(server: Server, tmp_path: Path) -> None:
    pictures = {f"{seed}.png": stored(photograph(seed)) for seed in range(3)}
    with serving(pictures) as origin:
        rows = [(f"{origin}/{name}", f"picture {name}") for name in pictures]
        write_list(tmp_path / "data/train.csv", "url,caption", rows[:2])
        write_list(tmp_path / "data/validation.csv", "url,caption", rows[2:])
        command = ["ingest", "--params", str(ROOT / "params.yaml"), "--out", URL]
        command += ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
        main([*command, "--set", "ingest.processes=1"])
    with reading(URL, tmp_path / "reader") as folder:
        assert opening(folder, "images", "ingest").counts == {"train": 2, "validation": 1}
        reader = ShardReader(folder, "train", frozenset({"png", "json"}))
        captions = [json.loads(reader.read(key, "json"))["caption"] for key in reader]
        assert sorted(captions) == ["picture 0.png", "picture 1.png"]


def test_encoding_from_bucket_to_bucket(
    server: Server, images: Path, latents: Path, pipeline: Path, tmp_path: Path
) -> None:
    """The cache from a bucket is, byte for byte, that of the same pictures in folders."""
    with publishing(URL, "images", tmp_path / "ingest") as out:
        shutil.copytree(images, out)
    url = "s3://bucket/latents"
    command = ["encode", "--images", URL, "--out", url, "--runs", str(tmp_path / "runs")]
    command += ["--params", str(ROOT / "params.yaml"), "--set", f"pretrained.pipeline={pipeline}"]
    main([*command, "--set", "encode.batch_size=16"])
    with reading(url, tmp_path / "train") as folder:
        assert contents(folder) == contents(latents)
        there, here = LatentCache(folder, "train"), LatentCache(latents, "train")
        assert there.manifest == here.manifest
        assert (there.moments(range(len(here))) == here.moments(range(len(here)))).all()
    server.requests.clear()
    main([*command, "--set", "encode.batch_size=16"])
    assert not server.asked("PUT")


@pytest.mark.slow
def test_training_from_a_bucket(
    server: Server, latents: Path, pipeline: Path, tmp_path: Path
) -> None:
    with publishing("s3://bucket/latents", "latents", tmp_path / "writer") as out:
        shutil.copytree(latents, out)
    locations = {"there": "s3://bucket/latents", "here": str(latents)}
    started = [
        launch(pipeline, location, tmp_path / name, steps=12, checkpoint_every=12)
        for name, location in locations.items()
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    there, here = (contents(tmp_path / name / "model") for name in locations)
    assert there == here
