"""What an accelerate configuration asks for, and that the processes it starts know it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import psutil
import pytest
import torch
import yaml

import ldm.launch
from ldm.config import Encode, Params, Train
from ldm.device import CPU_ASKED
from ldm.errors import UserError
from ldm.launch import configuration_of, launch_encoding, launch_training
from ldm.request import REQUEST, TrainRequest
from tests.launched import ROOT, wait_for

OWN = ROOT / "infra/accelerate"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """So many, for torch; by default none."""
    monkeypatch.delenv(CPU_ASKED)
    monkeypatch.chdir(ROOT)
    count = getattr(request, "param", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    return count


def write(folder: Path, **settings: object) -> str:
    """A configuration that differs from ``ddp.yaml``."""
    path = folder / "own.yaml"
    common = yaml.safe_load((OWN / "ddp.yaml").read_text())
    path.write_text(yaml.safe_dump({**common, **settings}))
    return str(path)


@pytest.mark.parametrize(("gpus", "own"), [(0, "cpu"), (1, "gpu"), (2, "gpu")], indirect=["gpus"])
def test_by_default_a_training_takes_what_there_is(gpus: int, own: str) -> None:
    file, settings = configuration_of("train", Train().accelerate)
    assert file == f"infra/accelerate/{own}.yaml"
    assert settings.num_processes == 1 and settings.use_cpu is (own == "cpu")


@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_auto_is_the_cpu_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.setenv(CPU_ASKED, "true")
    assert configuration_of("train", "auto")[0] == "infra/accelerate/cpu.yaml"


@pytest.mark.parametrize(
    ("gpus", "settings", "there", "wanted"),
    [
        (0, {"num_processes": 1}, 0, 1),
        (1, {}, 1, 2),
        (2, {"num_processes": 6, "num_machines": 2}, 2, 3),
        (2, {"gpu_ids": "1"}, 1, 2),
    ],
    indirect=["gpus"],
)
def test_more_processes_than_gpus_are_refused(
    tmp_path: Path, gpus: int, settings: dict[str, Any], there: int, wanted: int
) -> None:
    words = rf"own\.yaml: this machine has {there} of the {wanted} GPUs .*leave encode\.accelerate"
    with pytest.raises(UserError, match=words):
        configuration_of("encode", write(tmp_path, **settings))


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        (2, {}),
        (2, {"num_processes": 4, "num_machines": 2}),
        (4, {"gpu_ids": "1,3"}),
        (0, {"use_cpu": True}),
    ],
    indirect=["gpus"],
)
def test_as_many_processes_as_there_are_gpus_may_be(
    tmp_path: Path, gpus: int, settings: dict[str, Any]
) -> None:
    assert configuration_of("train", write(tmp_path, **settings))[1].processes_here == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"num_processes: field required$"),
        ("num_processes:", r"num_processes: input should be a valid integer \(is None\)"),
        ("num_processes: '2'", r"num_processes: input should be a valid integer \(is '2'\)"),
        ("num_processes: 0", r"num_processes: input should be greater than or equal to 1 \(is 0\)"),
        ("{num_processes: 2, gpu_ids: 0}", r"gpu_ids: input should be a valid string \(is 0\)"),
        ("num_processes: [", "is not YAML"),
        ("- num_processes", "must be lines of `key: value`, is a list"),
    ],
)
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"own\.yaml: {words}") as caught:
        configuration_of("train", str(tmp_path / "own.yaml"))
    assert "\n" not in str(caught.value)


def test_a_configuration_that_is_not_there_says_which_setting_names_it() -> None:
    words = r"nowhere\.yaml: no such accelerate configuration; mend train\.accelerate"
    with pytest.raises(UserError, match=words):
        configuration_of("train", "nowhere.yaml")


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is left there for the processes."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("own_environment")
def test_what_accelerate_refuses_is_one_line(tmp_path: Path) -> None:
    own = write(tmp_path, use_cpu=True, num_procs=2)
    params = Params(encode=Encode(accelerate=own))
    with pytest.raises(UserError, match=r"own\.yaml: accelerate refuses it \(.*'num_procs'"):
        launch_encoding(params, tmp_path, tmp_path, tmp_path)


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize("name", ["cpu", "cpu-ddp", "cpu-fsdp"])
def test_processes_are_told_to_use_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """accelerate itself tells it to a lone one only."""
    found = []
    os.environ.pop(CPU_ASKED)

    def launched(*_: str) -> int:
        found.append(os.environ[CPU_ASKED])
        return 0

    monkeypatch.setattr(ldm.launch, "_launched", launched)
    params = Params(train=Train(track=False, accelerate=str(OWN / f"{name}.yaml")))
    launch_training(params, tmp_path, tmp_path, tmp_path)
    assert found == ["True"]


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("said", "name", "threads"),
    [
        ("3", "cpu", 3),
        ("3", "cpu-ddp", 3),
        (None, "cpu", 8),
        (None, "cpu-ddp", 4),
        ("4,2", "cpu", 8),
    ],
)
def test_threads_are_as_many_as_the_environment_says_or_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, name: str, threads: int
) -> None:
    """Of a busy machine a training wants fewer: one thread too many and all wait for it."""
    found: list[str] = []
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= {} if said is None else {"OMP_NUM_THREADS": said}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(ldm.launch, "_launched", lambda *arguments: found.extend(arguments))
    params = Params(train=Train(track=False, accelerate=str(OWN / f"{name}.yaml")))
    launch_training(params, tmp_path, tmp_path, tmp_path)
    assert found[found.index("--num_cpu_threads_per_process") + 1] == str(threads)


def test_a_stop_may_take_as_long_as_a_training_is_patient(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By itself torchrun kills after 30 s, in the middle of a large checkpoint."""
    variable, found = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", []
    monkeypatch.setenv(variable, "")  # To be put back.
    monkeypatch.delenv(variable)
    monkeypatch.setattr(ldm.launch, "_launched", lambda *_: found.append(os.environ[variable]))
    params = Params.model_validate({"train": {"patience_s": 77, "track": False}})
    launch_training(params, tmp_path, tmp_path / "model", tmp_path / "runs")
    assert found == ["77"]


@pytest.mark.usefixtures("own_environment")
def test_a_training_draws_its_sheets_as_evaluation_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def launched(*_: str) -> int:
        asked.append(TrainRequest.model_validate_json(os.environ[REQUEST]).sampling)
        return 0

    monkeypatch.setattr(ldm.launch, "_launched", launched)
    settings = {"train": {"track": False}, "evaluate": {"sampling": {"guidance": 7.5, "steps": 3}}}
    params = Params.model_validate(settings)
    launch_training(params, tmp_path, tmp_path / "model", tmp_path / "runs")
    assert asked == [params.evaluate.sampling]


def test_ctrl_c_while_a_process_imports_ends_it_without_a_traceback() -> None:
    command = [sys.executable, "-m", "ldm.train"]
    with Popen(command, cwd=ROOT, stdout=PIPE, stderr=STDOUT) as process:
        imports = psutil.Process(process.pid)
        wait_for(lambda: any("libtorch" in one.path for one in imports.memory_maps()), process)
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", None)
    assert process.returncode == -signal.SIGINT
