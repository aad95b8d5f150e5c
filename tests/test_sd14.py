"""The preset ``sd14`` by the names of the hub, on a machine of 24 GB without GPU or network.

The cache of the hub is :mod:`tests.hub`'s: everything but the values of the weights is real. At
Stable Diffusion's own size (``make test-big``) this takes 45 GB of disk for a while.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from bench.peak import peak_and_words
from ldm.memory import available
from ldm.params import load_params
from tests.hub import SIZES, Size, in_repository, snapshot
from tests.served import photograph, serving, stored, write_list

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
ROOM_MIB = 21 * 1024
"""Of 24 GB, what the system and the launcher leave to the largest process of a stage."""
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
"""Of Stable Diffusion 1.4."""
CPU = str(ROOT / "infra/accelerate/cpu.yaml")
FORCED = {
    "ingest.allow_addresses": ["127.0.0.1/32"],
    "encode.batch_size": 1,
    "train.accelerate": CPU,
    "train.compile": False,
    "train.batch_size": 2,
    "train.accumulation": 2,
    "train.gradient_checkpointing": True,
    "train.workers": 0,
    "train.steps": 2,
    "evaluate.sampling.steps": 2,
}
"""What such a machine, the origin on loopback and a test's patience ask for; else the preset's."""


@dataclass(frozen=True)
class Chain:
    """A project whose stages are run by their commands."""

    folder: Path
    size: Size

    def call(self, command: list[str]) -> str:
        """What it says."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, text=True, stdout=PIPE, stderr=STDOUT
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def run(self, stage: str, *arguments: str) -> str:
        """What a stage says; its largest process has its room."""
        command = self.command(stage, *arguments)
        peak_mib, told = peak_and_words(command, str(self.folder))
        assert 0 < peak_mib < ROOM_MIB
        return told

    def command(self, stage: str, *arguments: str) -> list[str]:
        settings = {"ingest.image_size": self.size.side, **FORCED}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        command = [sys.executable, "-m", "ldm.cli", stage, "--params", "sd14", *arguments]
        for one in overrides:
            command += ["--set", one]
        return command

    def of_hub(self, part: str) -> Path:
        """The weights of a part in the cache of the hub."""
        named = load_params("sd14", []).pretrained
        return weights(snapshot(self.folder / "hub", named.pipeline, named.revision) / part)

    @property
    def model(self) -> Path:
        return self.folder / "artifacts/model"


def weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="module", params=["small", pytest.param("sd14", marks=pytest.mark.big)])
def chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chain]:
    """Up to the trained model."""
    if request.param == "sd14" and available() < ROOM_MIB * 2**20:
        pytest.fail(f"less than {ROOM_MIB // 1024} GiB of memory are free")
    made = Chain(tmp_path_factory.mktemp(request.param), SIZES[request.param])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_CACHE", str(made.folder / "hub"))
            patch.setenv("HF_HUB_OFFLINE", "1")
            if request.param == "sd14":
                patch.delenv("OMP_NUM_THREADS")  # Large tensors gain from every core.
            made.call([sys.executable, "-m", "tests.hub", "hub", request.param])
            pictures = {f"{n}.png": stored(photograph(n, 640)) for n in range(5)}
            with serving(pictures) as url:
                rows = [(f"{url}/{name}", f"A photograph of {name}") for name in pictures]
                write_list(made.folder / "data/train.csv", "url,caption", rows[:4])
                write_list(made.folder / "data/validation.csv", "url,caption", rows[4:])
                made.run("ingest")
            assert "Warning" not in made.run("encode")
            made.run("train")
            yield made
    finally:
        shutil.rmtree(made.folder)


def test_two_steps_change_the_unet_and_nothing_else(chain: Chain) -> None:
    log = [json.loads(line) for line in (chain.model / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 and 0 < log[-1]["val_loss"] < 10
    assert not any("skipped" in line for line in log)
    counts = dict.fromkeys(PARAMETERS, 0)
    for part in PARAMETERS:
        rename = in_repository if part == "vae" else str
        trained, first = (
            safe_open(file, "pt") for file in (weights(chain.model / part), chain.of_hub(part))
        )
        for name in trained.keys():  # noqa: SIM118
            after, before = trained.get_tensor(name), first.get_tensor(rename(name))
            counts[part] += after.numel()
            assert (after - before).abs().max() < 1e-5
            assert after.equal(before) == (part != "unet"), name
    if chain.size == SIZES["sd14"]:
        assert counts == PARAMETERS


def test_it_draws(chain: Chain) -> None:
    out = chain.folder / "pictures"
    asked = ("--model", str(chain.model), "--prompt", "A photograph of a cat", "--steps", "2")
    chain.run("generate", *asked, "--out", str(out))
    picture = np.asarray(Image.open(out / "00000.png"))
    assert picture.shape == (chain.size.side, chain.size.side, 3) and picture.std() > 1


def test_it_is_evaluated_with_clip(chain: Chain) -> None:
    prompt = json.dumps({"prompt": "A photograph of a dog"})
    (chain.folder / "data/prompts.jsonl").write_text(f"{prompt}\n")
    chain.run("evaluate")
    metrics = json.loads((chain.folder / "artifacts/eval/metrics.json").read_text())
    assert 0 <= metrics["clip_score"] <= 100 and 0 <= metrics["start"]["clip_score"] <= 100
