"""The filmstrips: their ends are the picture, noise, and what the model draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import Sampling
from ldm.errors import UserError
from ldm.explain import STEPS, explain, forward, reverse
from ldm.images import psnr
from ldm.models import Source, tiny_folder
from ldm.sampling import Painter, Request
from tests.conftest import scenes


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter.load(Source(str(tiny_folder())))


def test_the_way_out_begins_at_the_picture_and_loses_it(painter: Painter) -> None:
    (pixels,) = scenes("validation", 1)
    frames = forward(painter, pixels, seed=0)
    assert len(frames) == STEPS + 1
    distances = [float(psnr(pixels[None], frame[None])[0]) for frame in frames]
    assert distances[0] > 28
    assert distances[0] > distances[5] > distances[14] > distances[STEPS] - 1


def test_the_way_back_ends_where_generation_does(painter: Painter) -> None:
    frames = reverse(painter, "a red circle", seed=3)
    sampling = Sampling(sampler="ddim", steps=STEPS)
    (drawn,) = painter.draw([Request("a red circle", 3)], sampling)
    assert len(frames) == STEPS + 1 and np.array_equal(frames[-1], drawn)


@pytest.fixture
def warned_again() -> Iterator[None]:
    """torch says what it said in a test before."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("warned_again")
@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_files(tmp_path: Path) -> None:
    wide = np.repeat(scenes("validation", 1)[0], 2, axis=1)
    Image.fromarray(wide).save(tmp_path / "picture.png")
    explain("tiny", tmp_path / "picture.png", "a red circle", 0, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"forward.png", "reverse.png", "diffusion.gif"}
    with Image.open(tmp_path / "out" / "diffusion.gif") as animation:
        assert getattr(animation, "n_frames", 1) > STEPS
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: is no picture"):
        explain("tiny", tmp_path / "text.png", "", 0, tmp_path / "none")
    assert not (tmp_path / "none").exists()
