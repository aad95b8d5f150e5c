"""Real img2dataset against the real origin and against servers that misbehave."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.artifacts import Manifest, digest_tree, opening
from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest import fetch
from ldm.ingest.reasons import RefusedError, as_message, read_message
from ldm.ingest.report import write_skipped
from ldm.ingest.rows import Row, Skip, ascii_url, check, key_of, read_list
from ldm.ingest.stage import ingest
from ldm.scenes import origin
from ldm.scenes.lists import ORIGIN, scene_of
from ldm.scenes.render import draw
from ldm.shards import ShardReader

CONFIG = Ingest(timeout_s=2, retries=0, threads=4, processes=1, samples_per_shard=10)
ROOT = Path(__file__).parents[1]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def scene(row: int) -> np.ndarray:
    return draw(scene_of("retrain", "train", row)[1])


HALVES = np.zeros((100, 200, 3), np.uint8)
HALVES[:, :100] = (255, 0, 0)
HALVES[:, 100:] = (0, 0, 255)
GREY_16 = np.repeat(np.arange(64, dtype=np.uint16)[:, None] * 1024, 64, axis=1)
CLEAR = np.zeros((64, 64, 4), np.uint8)

PAGES: dict[str, tuple[bytes, dict[str, str]]] = {
    "/wide.png": (png(HALVES), {}),
    "/grey16.png": (png(GREY_16), {}),
    "/clear.png": (png(CLEAR), {}),
    "/same.png": (png(scene(900)), {}),
    "/copy.png": (png(scene(900)), {}),
    "/图 1.png": (png(scene(901)), {}),
    "/robots.png": (png(scene(902)), {"X-Robots-Tag": "noai"}),
    "/cut-off.png": (png(scene(903)), {"Content-Length": "100000"}),
    "/empty.png": (b"", {}),
    "/bytes.png": (bytes(range(256)), {}),
}


class Rogue(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if path == "/nowhere":
            self.send_response(302)
            self.send_header("Location", "http://[")
            self.end_headers()
            return
        body, headers = PAGES[path]
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def rogue() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rogue)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def closed() -> Iterator[str]:
    """A port that is ours and refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])


def embedded(split: str, row: int, kind: str = "png") -> str:
    return f"{ORIGIN}/retrain/{split}/{row:06d}.{kind}"


@pytest.fixture(scope="module")
def cases(rogue: str, silent: str, closed: str) -> list[tuple[str, str, str | None]]:
    """URL, caption and the reason to be skipped for each row of the training list."""
    good = [(embedded("train", row), f'scene "{row}",\n红色圆形', None) for row in range(20)]
    bad = [
        (embedded("train", 20, "missing.jpg"), "missing", "http 404"),
        (embedded("train", 21, "html.jpg"), "a page", "not an image"),
        *((embedded("train", row, "truncated.jpg"), "half", "truncated") for row in range(22, 26)),
        (embedded("train", 3), "again", "duplicate"),
        (embedded("train", 26), "", "empty caption"),
        (embedded("train", 26), " \n", "empty caption"),
        (embedded("train", 26), "the first of its url with a caption", None),
        (embedded("train", 27), "NULL", None),
        ("file:///etc/passwd", "a file", "bad url"),
        ("", "nothing", "bad url"),
        (f"{closed}/a.png", "refused", "unreachable"),
        (f"{silent}/a.png", "slow", "timeout"),
        (f"{rogue}/same.png", "same", None),
        (f"{rogue}/copy.png", "same", "duplicate content"),
        (f"{rogue}/copy.png?2", "other words", "duplicate content"),
        (f"{rogue}/图 1.png", "address in Chinese", None),
        (f"{rogue}/wide.png", "wide", None),
        (f"{rogue}/grey16.png", "deep", None),
        (f"{rogue}/clear.png", "clear", None),
        (f"{rogue}/robots.png", "kept private", "not allowed by its site"),
        (f"{rogue}/cut-off.png", "cut off", "connection lost"),
        (f"{rogue}/empty.png", "empty", "not an image"),
        (f"{rogue}/bytes.png", "bytes", "not an image"),
        (f"{rogue}/away", "redirect to a file", "bad url"),
    ]
    return good + bad


@pytest.fixture(scope="module")
def lists(
    cases: list[tuple[str, str, str | None]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_list(folder / "train.csv", [case[:2] for case in cases])
    write_list(
        folder / "validation.csv",
        [(embedded("validation", row), f"validation {row}") for row in range(4)]
        + [(embedded("validation", 4, "missing.jpg"), "missing")],
    )
    return folder


@pytest.fixture(scope="module")
def images(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    out = folder / "artifacts" / "images"
    ingest(CONFIG, lists, out, folder / "runs")
    return out


@pytest.fixture(scope="module")
def manifest(images: Path) -> Manifest:
    return opening(images, "images", "ingest")


def reader(images: Path, split: str = "train") -> ShardReader:
    return ShardReader(images, split, frozenset({"png", "json"}))


def pixels(images: Path, url: str) -> np.ndarray:
    content = reader(images).read(key_of(url), "png")
    return np.asarray(Image.open(io.BytesIO(content)))


def url_of(cases: list[tuple[str, str, str | None]], caption: str) -> str:
    return next(case[0] for case in cases if case[1] == caption)


def test_each_row_is_kept_or_skipped_for_its_own_reason(
    cases: list[tuple[str, str, str | None]], images: Path, manifest: Manifest
) -> None:
    with (images / "skipped.csv").open(newline="") as file:
        skipped = [line for line in csv.DictReader(file) if line["split"] == "train"]
    expected = {row: reason for row, (_, _, reason) in enumerate(cases) if reason}
    assert {int(line["row"]): line["reason"] for line in skipped} == expected
    assert [int(line["row"]) for line in skipped] == sorted(expected)
    kept = [key_of(url) for url, _, reason in cases if reason is None]
    assert sorted(reader(images).keys) == sorted(kept)
    assert manifest.counts == {"train": len(kept), "validation": 4}


def test_report_counts_what_was_skipped(
    cases: list[tuple[str, str, str | None]], images: Path
) -> None:
    report = json.loads((images / "report.json").read_text())
    assert report["rows"] == len(cases) + 5
    assert report["kept"] + sum(report["skipped"].values()) == report["rows"]
    assert report["lists"]["validation"] == {"rows": 5, "kept": 4, "skipped": {"http 404": 1}}
    assert report["lists"]["train"]["skipped"]["truncated"] == 4
    assert report["skipped"]["http 404"] == 2
    assert next(iter(report["skipped"])) == "truncated"


def test_pixels_and_words_are_those_of_the_list(
    cases: list[tuple[str, str, str | None]], images: Path
) -> None:
    for row in range(20):
        assert np.array_equal(pixels(images, cases[row][0]), scene(row))
    samples = reader(images)
    words = {url: caption.replace("\n", " ") for url, caption, reason in cases if not reason}
    for key in samples:
        found = json.loads(samples.read(key, "json"))
        content = samples.read(key, "png")
        assert list(found) == ["caption", "url", "sha256", "width", "height"]
        assert key_of(found["url"]) == key
        assert found["caption"] == words[found["url"]]
        assert found["sha256"] == hashlib.sha256(content).hexdigest()
        assert (found["width"], found["height"]) == (64, 64)
        assert Image.open(io.BytesIO(content)).mode == "RGB"
    assert "红色圆形".encode() in samples.read(key_of(cases[0][0]), "json")


def test_pictures_of_other_forms_become_square_8_bit_rgb(
    cases: list[tuple[str, str, str | None]], images: Path
) -> None:
    wide = pixels(images, url_of(cases, "wide"))
    assert wide[:, :30].tolist() == np.full((64, 30, 3), (255, 0, 0)).tolist()
    assert wide[:, 34:].tolist() == np.full((64, 30, 3), (0, 0, 255)).tolist()
    deep = pixels(images, url_of(cases, "deep"))
    assert deep[:, 0, 0].tolist() == list(range(0, 256, 4))
    assert (pixels(images, url_of(cases, "clear")) == 255).all()
    assert np.array_equal(pixels(images, url_of(cases, "address in Chinese")), scene(901))


def test_manifest_names_lists_and_settings_that_decide_the_bytes(
    lists: Path, manifest: Manifest
) -> None:
    how = {"timeout_s", "retries", "processes", "threads", "serve_scenes", "min_yield", "quality"}
    how |= {"distributor"}
    assert manifest.config.keys() == CONFIG.as_dict().keys() - how - {"blocked", "bucket_step"}
    assert manifest.config["image_size"] == 64
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in lists.iterdir()}
    assert manifest.inputs == digests
    assert "train-00002.tar" in manifest.files


def test_nothing_but_the_output_the_log_and_the_store_is_left(images: Path) -> None:
    left = [path.name for path in images.parent.iterdir()]
    assert sorted(left) == [".images.lock", ".images.log", "images"]
    store = images.parent.parent / "runs" / "fetched"
    assert sorted(path.name for path in store.iterdir()) == ["fetched.db", "lock"]
    assert "Downloading starting now" in (images.parent / ".images.log").read_text()


def test_again_with_more_processes_gives_the_same_bytes(
    lists: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SHARD_ROWS", (7, 7))
    config = CONFIG.model_copy(update={"processes": 2, "threads": 9})
    ingest(config, lists, tmp_path / "images", tmp_path / "runs")
    assert digest_tree(tmp_path / "images") == digest_tree(images)
    again = (tmp_path / "images" / "manifest.json").read_bytes()
    assert again == (images / "manifest.json").read_bytes()


def test_without_ray_nothing_begins(
    lists: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """img2dataset would fetch nothing and end with 0."""
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    shutil.copytree(images, tmp_path / "images")
    before = digest_tree(tmp_path)
    config = CONFIG.model_copy(update={"distributor": "ray"})
    with pytest.raises(UserError, match=r"^ingest\.distributor ray: Ray is not installed; .*pip"):
        ingest(config, lists, tmp_path / "images", tmp_path / "runs")
    assert digest_tree(tmp_path) == before and opening(tmp_path / "images", "images", "ingest")


@pytest.mark.slow
def test_on_ray_the_same_is_fetched_and_refused(
    lists: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every word of the reasons, which are the guard's; where Ray is installed."""
    pytest.importorskip("ray")
    monkeypatch.setattr(fetch, "SHARD_ROWS", (20, 20))
    config = CONFIG.model_copy(update={"distributor": "ray", "processes": 2})
    ingest(config, lists, tmp_path / "images", tmp_path / "runs")
    assert digest_tree(tmp_path / "images") == digest_tree(images)
    again = (tmp_path / "images" / "manifest.json").read_bytes()
    assert again == (images / "manifest.json").read_bytes()
    assert "to Ray cluster" in (tmp_path / ".images.log").read_text()


def test_dead_list_fails_and_leaves_the_earlier_output(
    images: Path, closed: str, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "artifacts" / "images"
    write_list(data / "train.csv", [(f"{closed}/{row}.png", "words") for row in range(5)])
    write_list(data / "validation.csv", [(f"{closed}/9.png", "words"), ("ftp://a/b", "words")])
    shutil.copytree(images, out)
    with pytest.raises(UserError) as caught:
        ingest(CONFIG, data, out, tmp_path / "runs")
    message = str(caught.value)
    assert message.startswith(f"{data / 'train.csv'}: 0 of 5 rows kept")
    assert "mostly unreachable (5 rows, such as row 0" in message
    assert "check the network" in message
    assert "\n" not in message
    left = [path.name for path in out.parent.iterdir()]
    assert sorted(left) == [".images.lock", ".images.log", "images"]
    opening(out, "images", "ingest")
    assert digest_tree(out) == digest_tree(images)


FAULTY = """
from ldm.ingest.guard import Guard

download = Guard.download

def faulty(self, url):
    if url.endswith("/odd.png"):
        raise KeyError("of all things")
    return download(self, url)

Guard.download = faulty
"""


def test_what_fails_in_a_way_of_its_own_costs_its_row_alone(
    rogue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a thread of img2dataset's would keep it waiting, good rows and all."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULTY)  # img2dataset's processes read it.
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(fetch, "PATIENCE_S", 60)
    data, out = tmp_path / "data", tmp_path / "images"
    rows = [(f"{rogue}/{name}", "words") for name in ("nowhere", "odd.png", "same.png")]
    write_list(data / "train.csv", rows)
    write_list(data / "validation.csv", [(f"{rogue}/wide.png", "words")])
    ingest(CONFIG.model_copy(update={"min_yield": 0.1}), data, out, tmp_path / "runs")
    assert opening(out, "images", "ingest").counts == {"train": 1, "validation": 1}
    with (out / "skipped.csv").open(newline="") as file:
        found = [(line["reason"], line["detail"]) for line in csv.DictReader(file)]
    bad = ("bad url", "leads to 'http://['")
    assert found == [bad, ("download failed", "KeyError('of all things')")]


def test_list_without_one_usable_row_fails_before_any_download(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_list(tmp_path / "data" / f"{split}.csv", [(embedded("train", 0), "")] * 3)
    config = CONFIG.model_copy(update={"min_yield": 0.0})
    with pytest.raises(UserError, match=r"0 of 3 rows kept.*mostly empty caption \(3 rows"):
        ingest(config, tmp_path / "data", tmp_path / "out", tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"train\.csv: no such list; run `ldm scenes`"),
        (b"link,caption\na,b\n", "has no column 'url'; its first line must name .*names link"),
        (b"url,text\na,b\n", "has no column 'caption'"),
        (b"", "has no column 'url'.*names nothing"),
        (b"url,caption\n", "has no rows"),
        (b"url,caption\na,\xff\n", "is not UTF-8"),
        (b'url,caption\na,"b"c\n', r"train\.csv: line 2: is not CSV \(.*\); mend that row"),
        (b'url,caption\na,b\nc,"d\n\ne\n', r"train\.csv: lines 3 to 5: is not CSV"),
    ],
)
def test_unusable_list_is_named_with_the_remedy(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ingest(CONFIG, tmp_path, tmp_path / "out", tmp_path / "runs")
    assert not (tmp_path / "out").exists()


def test_list_may_have_a_mark_more_columns_and_short_rows(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("\ufeffn,url,caption\n1,http://a/b,words\n2\n".encode())
    rows = list(read_list(tmp_path / "list.csv", "train", 100))
    assert rows == [Row("train", 0, "http://a/b", "words"), Row("train", 1, "", "")]


def test_a_picture_in_the_list_itself_is_a_bad_url(tmp_path: Path) -> None:
    """Of more characters than csv takes by default."""
    urls = ["http://a/b", "data:image/png;base64," + "A" * 2**18, "http://a/c"]
    write_list(tmp_path / "list.csv", [(url, "words") for url in urls])
    rows = list(read_list(tmp_path / "list.csv", "train", 100))
    assert [row.url for row in rows] == urls
    assert csv.field_size_limit() == 2**17, "others read CSV too"
    with pytest.raises(RefusedError) as caught:
        check(rows[1], CONFIG)
    assert (caught.value.reason, caught.value.detail[:8]) == ("bad url", "must be ")
    write_skipped(tmp_path / "skipped.csv", [Skip(rows[1], "bad url")])
    with (tmp_path / "skipped.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["url"] == urls[1][:8000]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a.org/b%20c.png?d=1&e=%2F", "http://a.org/b%20c.png?d=1&e=%2F"),
        ("https://bücher.de:81/图 1.png#x", "https://xn--bcher-kva.de:81/%E5%9B%BE%201.png"),
        ("http://straße.de/a", "http://xn--strae-oqa.de/a"),
        ("http://１２７.0.0.1/a", "http://127.0.0.1/a"),
        ("http://[::1]:8/a", "http://[::1]:8/a"),
        ("http://☃.de/a", None),
        ("http://图..de/a", None),
        ("http://a/\udc80", None),
        ("ftp://a/b", None),
        ("file:///etc/passwd", None),
        ("data:image/png;base64,AA==", None),
        ("pipe:cat /etc/passwd", None),
        ("http://", None),
        ("http://[bad", None),
        ("http://a:port/b", None),
        ("http://user:word@a/b", None),
        ("no url", None),
    ],
)
def test_ascii_url(url: str, expected: str | None) -> None:
    assert ascii_url(url) == expected


def test_reasons_pass_through_messages() -> None:
    refusal = RefusedError("http 404", "Not Found | gone")
    assert read_message(as_message(refusal)) == ("http 404", "Not Found | gone")
    assert read_message("something new") == ("download failed", "something new")


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def job(folder: Path, patience_s: float = 60) -> fetch.Job:
    return fetch.Job(250, 100, folder, folder / "log", patience_s)


def test_download_that_stands_still_is_given_up(tmp_path: Path) -> None:
    with child("import time; time.sleep(60)") as sleeper:
        with pytest.raises(UserError, match=r"no progress for 0 s; read .*log"):
            list(fetch.watch(sleeper, job(tmp_path, patience_s=0.3)))
        sleeper.kill()


@pytest.mark.parametrize(("code", "shards"), [("raise SystemExit(3)", 3), ("", 2), ("", 0)])
def test_download_that_fails_or_leaves_a_shard_out_is_an_error(
    tmp_path: Path, code: str, shards: int
) -> None:
    """img2dataset itself ends with 0 whatever happened."""
    for shard in range(shards):
        (tmp_path / f"{shard:05d}_stats.json").touch()
    with child(code) as ended, pytest.raises(UserError, match=r"of 3 shards missing; .*log says"):
        list(fetch.watch(ended, job(tmp_path)))


def test_finished_shards_are_told_with_their_rows(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard:05d}_stats.json").touch()
    with child("") as ended:
        shards = list(fetch.watch(ended, job(tmp_path)))
    assert shards == ["00000", "00001", "00002"]
    assert [job(tmp_path).rows_in(shard) for shard in shards] == [100, 100, 50]


def gone(pid: int, within_s: float = 20) -> bool:
    """Whether a process that is no child of ours ends."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


KILLED = """
import os, sys, time
from pathlib import Path
from ldm.scenes import origin
origin.PORT = int(sys.argv[1])
with origin.serving_scenes():
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    print(children.read_text(), flush=True)
    time.sleep(60)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_origin_ends_with_its_killed_parent() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(port)], stdout=subprocess.PIPE, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/origin").read()
        assert answer == origin.TOKEN
        os.kill(parent.pid, signal.SIGKILL)
    assert gone(pid)


def test_origin_serves_what_the_lists_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PORT", free_port())
    base = f"http://127.0.0.1:{origin.PORT}/retrain/validation/000007"
    with origin.serving_scenes():
        expected = draw(scene_of("retrain", "validation", 7)[1])
        with urllib.request.urlopen(f"{base}.png") as answer:
            assert np.array_equal(np.asarray(Image.open(answer)), expected)
        with urllib.request.urlopen(f"{base}.html.jpg") as answer:
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html")
        with urllib.request.urlopen(f"{base}.truncated.jpg") as answer:
            half = answer.read()
            assert int(answer.headers["Content-Length"]) == len(half)
        assert half.startswith(b"\xff\xd8")
        for wrong in (f"{base}.missing.jpg", f"{base}.gif", base.replace("retrain", "none")):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(wrong)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{base}.png")


def test_two_origins_share_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PORT", free_port())
    url = f"http://127.0.0.1:{origin.PORT}/origin"
    with origin.serving_scenes():
        with origin.serving_scenes():
            pass
        assert urllib.request.urlopen(url).read() == origin.TOKEN


class Other(BaseHTTPRequestHandler):
    answer = origin.TOKEN

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(("answer", "ours"), [(origin.TOKEN, True), (b"something else", False)])
def test_taken_port_is_used_only_if_an_origin_of_ours_answers(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, ours: bool
) -> None:
    monkeypatch.setattr(Other, "answer", answer)
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        monkeypatch.setattr(origin, "PORT", server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if ours:
            with origin.serving_scenes():
                pass
        else:
            with (
                pytest.raises(UserError, match=f"{server.server_port}: another program has"),
                origin.serving_scenes(),
            ):
                pass
        server.shutdown()


def test_stage_is_light_to_import() -> None:
    code = "import sys, ldm.ingest.stage; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"torch", "img2dataset", "pyarrow", "pandas", "cv2"} & set(done.stdout.split())
    assert "ldm.ingest.stage" in done.stdout
