"""The registry on a real MLflow: what a version remembers, the gate, and the way back."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm.launch
import ldm.train.stage
from ldm import __version__
from ldm.artifacts import opening, writing
from ldm.config import Evaluate, EvaluationSampling, Gate, Params, Registry
from ldm.errors import UserError
from ldm.images import decode_image, encode_png
from ldm.models import locate
from ldm.registry.gate import judge, verdict
from ldm.registry.promotion import promote, rollback
from ldm.registry.register import register
from ldm.registry.standing import standing
from ldm.report.verdict import compared_with
from ldm.request import TrainRequest
from ldm.tracking import connection, registered, versions
from ldm.tracking.commit import code_commit
from tests.launched import SHORT, wait_for

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SAMPLING = EvaluationSampling(sampler="ddim", steps=2, guidance=2.0)
LOG = [
    {"step": 2, "loss": 0.9, "lr": 1e-3},
    {"step": 4, "loss": 0.7, "lr": 5e-4},
    {"step": 4, "val_loss": 0.8},
]
START = {"adherence": 0.8, "adherence_new": 0.1, "adherence_heldout": 0.3}
# The acceptance check, then pictures with other parameters, told as JSON.
FRESH_PROCESS = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model("models:/fresh@champion")
(picture,) = model.predict(["a red circle on a grey background"])
two = model.predict(["a", "a"], {"seed": 3, "steps": 1, "height": 32, "width": 96})
(last,) = model.predict(["a"], {"seed": 4, "steps": 1, "height": 32, "width": 96})
try:
    model.predict(["a"], {"steps": 0})
except ValueError as error:
    refused = str(error)
import ldm
print(json.dumps({
    "type": type(picture).__name__, "png": picture.hex(), "code": ldm.__file__,
    "two": [png.hex() for png in two], "last": last.hex(), "refused": refused,
}))
"""


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with MLflow's database and files; made once, which takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(connection.TRACKING_URI, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def model_of(folder: Path, pipeline: Path, mark: str = "", latents: str = "none") -> Path:
    """A model artifact; ``mark`` makes it another one."""
    inputs = {"latents": latents, "start": "weights"}
    config = {"steps": 4, "unet": {"widths": [16, 16]}, "mark": mark}
    with writing(folder / "model", "model", config=config, inputs=inputs) as fresh:
        shutil.copytree(pipeline, fresh, ignore=shutil.ignore_patterns("clip"), dirs_exist_ok=True)
        (fresh / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
        (fresh / "mark").write_text(mark)
    return folder / "model"


def evaluation_of(
    folder: Path,
    model: Path,
    prompts: str = "same",
    steps: int = 2,
    clip: str = "same",
    **metrics: float,
) -> Path:
    """An evaluation of ``model``; metrics not given are as good as the start."""
    digest = opening(model, "model", "train").digest
    inputs = {"model": digest, "prompts": prompts, "clip": clip}
    config = Evaluate(sampling=SAMPLING.model_copy(update={"steps": steps})).as_dict()
    with writing(folder / "eval", "eval", config=config, inputs=inputs) as fresh:
        values = {**START, "val_loss": 0.8, **metrics, "start": START}
        (fresh / "metrics.json").write_text(json.dumps(values))
        (fresh / "samples.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
        (fresh / "samples.jsonl").write_text('{"prompt": "a"}\n')
    return folder / "eval"


def version(config: Registry, folder: Path, pipeline: Path, mark: str, **metrics: Any) -> str:
    """Register a model with these metrics; its version."""
    model = model_of(folder / mark, pipeline, mark)
    return register(config, model, evaluation_of(folder / mark, model, **metrics)).version


def aliases(config: Registry) -> dict[str, str]:
    return versions.aliases(connection.connect(config.tracking_uri), config.model)


def test_a_version_remembers_what_made_it(
    pipeline: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"train.csv": "list of train", "validation.csv": "list of validation"}
    with writing(tmp_path / "images", "images", config={}, inputs=lists):
        pass
    images = opening(tmp_path / "images", "images", "ingest").digest
    with writing(tmp_path / "latents", "latents", config={}, inputs={"images": images, "vae": "v"}):
        pass
    latents = opening(tmp_path / "latents", "latents", "encode").digest
    model = model_of(tmp_path, pipeline, latents=latents)
    evaluation = evaluation_of(tmp_path, model, adherence_new=0.5)
    config = Registry(model="remembers")
    done = register(config, model, evaluation, tmp_path / "images", tmp_path / "latents")
    assert done.new
    assert capsys.readouterr().out.count("\n") == 1

    client = connection.connect(config.tracking_uri)
    assert aliases(config) == {"challenger": done.version}
    found = client.get_model_version(config.model, done.version)
    run = client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert "adherence_new 0.50 (start 0.10)" in found.description
    for tags in (found.tags, run.data.tags):
        assert tags["model_digest"] == opening(model, "model", "train").digest
        assert tags["eval_digest"] == opening(evaluation, "eval", "evaluate").digest
        assert (tags["latents_digest"], tags["images_digest"]) == (latents, images)
        assert tags["train.csv_digest"] == "list of train"
        assert tags["ldm_version"] == __version__
        assert "commit" not in tags
    assert run.data.params["unet.widths"] == "[16, 16]"
    assert run.data.params["evaluate.sampling.sampler"] == "ddim"
    metrics = run.data.metrics
    assert (metrics["adherence_new"], metrics["start.adherence_new"]) == (0.5, 0.1)
    curve = client.get_metric_history(done.run_id, "train_loss")
    assert [(point.step, point.value) for point in curve] == [(2, 0.9), (4, 0.7)]
    assert [point.step for point in client.get_metric_history(done.run_id, "val_loss")] == [4]
    assert {"lr", "val_loss"} <= metrics.keys()
    kept = {item.path for item in client.list_artifacts(done.run_id)}
    assert {"samples.png", "samples.jsonl", "metrics.json"} <= kept
    assert (store / "mlflow.db").is_file()
    assert (store / "mlruns").is_dir()
    assert not {connection.TRACKING_URI, connection.REGISTRY_URI} & os.environ.keys()

    again = register(config, model, evaluation)
    assert (again.version, again.run_id, again.new) == (done.version, done.run_id, False)
    assert len(client.search_model_versions(f"name = '{config.model}'")) == 1


def test_other_evaluations_and_latents_are_refused(pipeline: Path, tmp_path: Path) -> None:
    config = Registry(model="refused")
    model = model_of(tmp_path / "a", pipeline, "a")
    evaluation = evaluation_of(tmp_path, model)
    other = model_of(tmp_path / "b", pipeline, "b")
    with pytest.raises(UserError, match=r"judges another model .* run `ldm evaluate`"):
        register(config, other, evaluation)
    with writing(tmp_path / "latents", "latents", config={}, inputs={}) as fresh:
        (fresh / "one").touch()
    with pytest.raises(UserError, match=r"latents: is not what .* run `ldm train`"):
        register(config, model, evaluation, latents=tmp_path / "latents")
    with pytest.raises(UserError, match=r"refused: has no challenger; run `ldm register`"):
        promote(config)
    with pytest.raises(UserError, match="has no version '7'"):
        promote(config, "7")
    with pytest.raises(UserError, match="no former champion"):
        rollback(config)


def test_a_fresh_process_draws(pipeline: Path, store: Path, tmp_path: Path) -> None:
    config = Registry(model="fresh")
    version(config, tmp_path, pipeline, "a")
    assert promote(config).promoted
    folder = locate("models:/fresh@champion").location
    logged = Path(folder).parent.parent
    assert logged.is_relative_to(store / "mlruns")
    for path in filter(Path.is_file, logged.rglob("*")):
        assert path.suffix not in {".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib"}
        # A safetensors file starts with a length, which may look like anything.
        if path.suffix != ".safetensors":
            assert not path.read_bytes().startswith(b"\x80"), f"{path} looks like a pickle"
        assert not zipfile.is_zipfile(path), f"{path} looks like torch.save's"
    assert not (logged / "code" / "ldm" / "pretrained").exists()
    assert not list(logged.rglob("__pycache__"))

    uri = f"sqlite:///{store / 'mlflow.db'}"
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH_PROCESS],
        cwd=tmp_path,
        env={**keep, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(told["code"]).is_relative_to(logged)
    assert told["type"] == "bytes"
    assert told["png"].startswith(b"\x89PNG\r\n\x1a\n".hex())
    assert decode_image(bytes.fromhex(told["png"])).shape == (64, 64, 3)
    first, second = (decode_image(bytes.fromhex(png)) for png in told["two"])
    assert first.shape == (32, 96, 3)
    assert not np.array_equal(first, second)
    last = decode_image(bytes.fromhex(told["last"]))
    # A batch of two and one of one may round differently.
    assert np.abs(second.astype(int) - last).max() <= 1
    assert "steps" in told["refused"]


def test_mlflow_itself_looks_where_the_default_is(store: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(None)
    os.environ.pop(connection.TRACKING_URI, None)
    assert mlflow.get_tracking_uri() == f"sqlite:///{store / 'mlflow.db'}"


def test_a_training_starts_from_the_version_behind_an_alias(
    pipeline: Path, store: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As launched, but in this process."""
    shutil.copytree(pipeline, tmp_path / "other")
    path = tmp_path / "other" / WEIGHTS
    changed = load_file(path)
    changed["conv_in.bias"] += 1
    save_file(changed, path, {"format": "pt"})
    number = version(Registry(model="start"), tmp_path, tmp_path / "other", "a")
    settings = {**SHORT, "mixed_precision": "no", "steps": 1, "learning_rate": 1e-12}
    settings |= {"init": "models:/start@challenger"}
    params = Params.model_validate({"train": settings, "pretrained": {"pipeline": str(pipeline)}})

    def launched(_: str, __: str, request: TrainRequest) -> None:
        told = TrainRequest.model_validate_json(request.model_dump_json())
        assert told == request
        ldm.train.stage._asked(told)

    monkeypatch.setattr(ldm.launch, "_launch", launched)
    ldm.launch.launch_training(params, latents, tmp_path / "model", tmp_path / "runs")
    made = opening(tmp_path / "model", "model", "train")
    assert made.config["init"] == f"models:/start/{number}"
    for name, tensor in load_file(tmp_path / "model" / WEIGHTS).items():
        torch.testing.assert_close(tensor, changed[name], rtol=0, atol=1e-9)


def test_a_model_is_fetched_once_from_elsewhere(
    pipeline: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Registry(model="elsewhere")
    number = version(config, tmp_path, pipeline, "a")
    uri = f"models:/elsewhere/{number}"
    here = registered.fetch_model(uri)
    assert here == registered.fetch_model("models:/elsewhere@challenger")
    assert registered.pinned("models:/elsewhere@challenger") == uri
    monkeypatch.setattr(registered, "_is_here", lambda uri: False)
    fetched = registered.fetch_model(uri)
    assert fetched.parent == store / "cache" / "ldm" / "models"
    assert list(fetched.parent.iterdir()) == [fetched]
    assert opening(fetched, "model", "x").digest == opening(here, "model", "x").digest
    shutil.rmtree(fetched)
    (here / "mark").write_text("other")
    with pytest.raises(UserError, match="mark: is not what was written"):
        registered.fetch_model(uri)
    assert not list(fetched.parent.iterdir())
    shutil.rmtree(here)
    with pytest.raises(UserError, match="cannot be fetched"):
        registered.fetch_model(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/ldm", "write models:/NAME@ALIAS"),
        ("models:/nobody@champion", "has no such model; run `ldm register`"),
        ("models:/known@unknown", "has no such model; run `ldm register`"),
        ("models:/known/99", r"known/99: cannot be fetched \(.*99"),
    ],
)
def test_unknown_models_are_named(uri: str, message: str) -> None:
    client = connection.connect("sqlite:///mlflow.db")
    if not client.search_registered_models("name = 'known'"):
        client.create_registered_model("known")
    with pytest.raises(UserError, match=message) as raised:
        registered.fetch_model(uri)
    assert "\n" not in str(raised.value)


CONNECT = """
import sys
from ldm.tracking import connection
connection.connect(sys.argv[1]).create_experiment(sys.argv[2])
"""


@pytest.mark.kills
def test_a_database_is_made_whole_by_many_at_once_and_one_is_killed(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"

    def connecting(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CONNECT, f"sqlite:///{database}", name])

    killed = connecting("killed")
    fresh = tmp_path / "mlflow.db.new"
    # Its tables are being made.
    wait_for(lambda: fresh.is_file() and fresh.stat().st_size > 0, killed)
    killed.kill()
    assert killed.wait() == -9 and fresh.is_file() and not database.exists()
    assert [one.wait() for one in [connecting("a"), connecting("b"), connecting("c")]] == [0, 0, 0]
    assert not fresh.exists()
    with closing(sqlite3.connect(database)) as found:
        names = {name for (name,) in found.execute("select name from experiments")}
    assert names == {"Default", "a", "b", "c"}


def test_an_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in ("http://127.0.0.1:9", "nonsense://somewhere"):
        with pytest.raises(UserError, match=f"^{uri}: MLflow cannot be reached") as raised:
            connection.connect(uri)
        assert "\n" not in str(raised.value)
    monkeypatch.setenv(connection.TRACKING_URI, f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UserError, match=r"none.db does not exist; run `ldm register`"):
        registered.fetch_model("models:/ldm@champion")
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_no_database_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("something else")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"mlflow.db: is no SQLite database, or damaged\)"):
        connection.connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert time.monotonic() - begin < 20  # MLflow tries for 90 s.


GATE = Gate(wins_on=("new", "held"), holds=("old",), max_loss=0.03)
CHAMPION = {"new": 0.4, "held": 0.6, "old": 0.9}


@pytest.mark.parametrize(
    ("change", "challenger", "against", "promoted"),
    [
        ({}, {"new": 0.5, "held": 0.6, "old": 0.9}, "version 1", True),
        ({}, {"new": 0.9, "held": 0.2, "old": 0.9}, "version 1", True),  # the mean counts
        ({}, {"new": 0.4, "held": 0.6, "old": 0.9}, "version 1", False),  # a tie
        ({}, {"new": 0.6, "held": 0.4, "old": 1.0}, "version 1", False),  # a tie of the means
        ({}, {"new": 0.3, "held": 0.6, "old": 0.9}, "version 1", False),
        ({}, {"new": 0.5, "held": 0.6, "old": 0.87}, "version 1", True),  # 0.9 - 0.87 > 0.03
        ({}, {"new": 0.5, "held": 0.6, "old": 0.86}, "version 1", False),
        ({"max_loss": 0.0}, {"new": 0.5, "held": 0.6, "old": 0.9}, "version 1", True),
        ({"min_gain": 0.1}, {"new": 0.5, "held": 0.7, "old": 0.9}, "version 1", True),
        ({"min_gain": 0.1}, {"new": 0.5, "held": 0.6, "old": 0.9}, "version 1", False),
        ({"min_gain": -0.1}, {"new": 0.4, "held": 0.5, "old": 0.9}, "version 1", True),
        ({}, {"new": math.nan, "held": 0.6, "old": 0.9}, "version 1", False),
        ({}, {"new": 0.5, "held": 0.6, "old": math.nan}, "version 1", False),
        ({"wins_on": ()}, {"old": 0.9}, "version 1", True),
        ({"wins_on": ("new",)}, {"new": 0.41, "old": 0.9}, "version 1", True),
        ({}, {"new": 0.0, "held": 0.0, "old": 0.0}, "start", True),  # no champion
    ],
)
def test_the_gate(
    change: dict[str, Any], challenger: dict[str, float], against: str, promoted: bool
) -> None:
    gate = GATE.model_copy(update=change)
    rows = judge(gate, challenger, CHAMPION, against)
    outcome, reason = verdict(rows, against)
    assert outcome is promoted
    assert "\n" not in reason
    if against != "start":
        assert promoted is all(row.passed for row in rows if row.rule)
        assert reason


def test_the_gate_names_what_it_misses() -> None:
    with pytest.raises(UserError, match=r"the challenger has no metric 'held'"):
        judge(GATE, {"new": 1.0, "old": 1.0}, CHAMPION, "version 1")
    with pytest.raises(UserError, match=r"version 1 has no metric 'old'"):
        judge(GATE, CHAMPION, {"new": 1.0, "held": 1.0}, "version 1")
    rows = judge(GATE, CHAMPION, {"new": 0.1}, "start")
    assert [(row.reference, row.change) for row in rows[:2]] == [(0.1, 0.3), (None, None)]
    assert verdict(rows, "start") == (True, "there is no champion yet")


def test_promotion_and_the_way_back(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Registry(model="promotion")
    client = connection.connect(config.tracking_uri)

    first = version(config, tmp_path, pipeline, "first", adherence_new=0.4)
    decision = promote(config)
    assert (decision.promoted, decision.against) == (True, "start")
    assert {row.metric: row.reference for row in decision.rows}["adherence_new"] == 0.1
    assert aliases(config) == {"challenger": first, "champion": first}
    assert promote(config).reason == "champion already"

    worse = version(config, tmp_path, pipeline, "worse", adherence_new=0.9, adherence=0.7)
    decision = promote(config)
    assert not decision.promoted
    assert decision.against == f"version {first}"
    assert "adherence 0.800 -> 0.700 (may fall by 0.03 at most)" in decision.reason
    assert "judged" not in decision.reason
    assert aliases(config) == {"challenger": worse, "champion": first}
    told = client.get_model_version(config.model, worse)
    assert (told.tags["gate"], told.tags["gate_reason"]) == ("failed", decision.reason)
    path = client.download_artifacts(told.run_id, "gate.json", str(tmp_path))
    kept = json.loads(Path(path).read_text())
    assert (kept["promoted"], len(kept["rows"])) == (False, len(decision.rows))

    others: dict[str, Any] = {"prompts": "other", "steps": 3, "clip": "other"}
    better = version(config, tmp_path, pipeline, "better", adherence_new=0.9, **others)
    decision = promote(config)
    assert decision.promoted
    other = "judged on other prompts and by pictures drawn with other settings and by another CLIP"
    assert decision.reason.endswith(f" (version {first} was {other})")
    assert aliases(config) == {"challenger": better, "champion": better, "previous": first}

    assert rollback(config) == first
    assert aliases(config) == {"challenger": better, "champion": first}
    decision = promote(config)
    assert not decision.promoted
    assert "rolled back" in decision.reason
    assert promote(config, better).promoted
    assert aliases(config) == {"challenger": better, "champion": better, "previous": first}
    assert "rolled_back" not in client.get_model_version(config.model, better).tags

    best = version(config, tmp_path, pipeline, "best", adherence_new=1.0)
    assert promote(config).promoted
    assert aliases(config) == {"challenger": best, "champion": best, "previous": better}
    assert rollback(config) == better
    assert aliases(config) == {"challenger": best, "champion": better, "previous": first}
    lines = capsys.readouterr().out.splitlines()
    assert f"rollback: promotion version {first} is champion again, in place of {better}" in lines


def again(config: Registry, folder: Path, mark: str, **how: Any) -> str:
    """Judge the model of :func:`version` once more, and register that; its version."""
    judged = evaluation_of(folder / mark / "again", folder / mark / "model", **how)
    return register(config, folder / mark / "model", judged).version


def two_champions(config: Registry, folder: Path, pipeline: Path, second: str) -> str:
    """The version of a champion that the ``second`` one, which is better, has replaced."""
    first = version(config, folder, pipeline, "first")
    promote(config)
    version(config, folder, pipeline, second, adherence_new=0.9)
    promote(config)
    return first


def test_weights_that_were_rolled_back_do_not_return_under_another_number(
    pipeline: Path, tmp_path: Path
) -> None:
    config = Registry(model="back")
    first = two_champions(config, tmp_path, pipeline, "faulty")
    rollback(config)
    judged_again = again(config, tmp_path, "faulty", prompts="more", adherence_new=0.9)
    decision = promote(config)
    assert not decision.promoted and "rolled back" in decision.reason
    assert promote(config, judged_again).promoted
    assert aliases(config)["previous"] == first
    assert rollback(config) == first


def test_the_champion_judged_anew_stays_champion_and_the_way_back_leads_past_it(
    pipeline: Path, tmp_path: Path
) -> None:
    """Even by figures that the gate would refuse; but not drawn with other settings."""
    config = Registry(model="anew")
    first = two_champions(config, tmp_path, pipeline, "second")
    judged_again = again(config, tmp_path, "second", prompts="harder", adherence_new=0.2)
    decision = promote(config)
    assert decision.promoted and decision.reason.startswith("has the weights of version 2")
    assert aliases(config) == {
        "challenger": judged_again,
        "champion": judged_again,
        "previous": first,
    }
    again(config, tmp_path, "second", prompts="harder", steps=3, adherence_new=0.1)
    assert not promote(config).promoted
    # A figure that no version had before.
    gate = Gate(wins_on=("adherence_small",), holds=())
    with_small = config.model_copy(update={"gate": gate})
    again(config, tmp_path, "second", prompts="small", adherence_small=0.1)
    assert promote(with_small).promoted
    version(config, tmp_path, pipeline, "third", prompts="small", adherence_small=0.2)
    assert promote(with_small).promoted
    assert rollback(config) == str(int(judged_again) + 2)
    assert rollback(config) == first


def test_the_champion_judged_anew_has_no_way_back_to_a_version_that_is_gone(
    pipeline: Path, tmp_path: Path
) -> None:
    config = Registry(model="gone")
    first = two_champions(config, tmp_path, pipeline, "second")
    connection.connect(config.tracking_uri).delete_model_version(config.model, first)
    judged_again = again(config, tmp_path, "second", prompts="harder", adherence_new=0.2)
    assert promote(config).promoted
    assert aliases(config) == {"challenger": judged_again, "champion": judged_again}
    with pytest.raises(UserError, match="has no former champion"):
        rollback(config)


def test_versions_that_were_deleted_are_in_nobodys_way(pipeline: Path, tmp_path: Path) -> None:
    config = Registry(model="deleted")
    client = connection.connect(config.tracking_uri)
    numbers = []
    for share, mark in enumerate(("first", "second", "third"), start=2):
        numbers.append(version(config, tmp_path, pipeline, mark, adherence_new=share / 10))
        assert promote(config).promoted
    client.delete_model_version(config.model, numbers[0])
    third = opening(tmp_path / "third" / "model", "model", "train").digest
    seen = standing(config, third)
    assert seen and seen.reference and compared_with(seen) == f"version {numbers[1]}"
    # Its former champion is gone: there is no way back behind it.
    assert rollback(config) == numbers[1]
    assert aliases(config) == {"challenger": numbers[2], "champion": numbers[1]}
    client.delete_model_version(config.model, numbers[1])
    seen = standing(config, third)
    assert seen and seen.decision and seen.reference is None and compared_with(seen) == ""
    assert not promote(config).promoted, "it was rolled back"
    refused = version(config, tmp_path, pipeline, "refused", adherence_new=0.1, adherence=0.1)
    assert promote(config, numbers[2]).promoted
    assert not promote(config, refused).promoted
    client.delete_model_version(config.model, numbers[2])
    decision = promote(config)
    assert not decision.promoted and "the gate refused it" in decision.reason
    assert promote(config, refused).promoted


def test_the_commit_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_commit() is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    assert code_commit() is None
    for name in ("code.py", "dvc.lock", "data.dvc"):
        Path(name).write_text("a")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert code_commit() == head
    for name in ("dvc.lock", "data.dvc", "new.py"):
        Path(name).write_text("b")
    assert code_commit() == head
    Path("code.py").write_text("b")
    assert code_commit() == f"{head}-dirty"
