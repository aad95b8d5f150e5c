"""Pictures depend on their own request, and on nothing around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from ldm.config import Sampling
from ldm.config.section import Precision
from ldm.device import plain_attention
from ldm.images import psnr
from ldm.models import Source, tiny_folder
from ldm.sampling import Painter, Request
from ldm.schedulers import SAMPLERS, make_sampler
from ldm.schedulers.reference import SCHEDULERS


@pytest.fixture(scope="module")
def painter(pipeline: Path) -> Painter:
    return Painter.load(Source(str(pipeline)))


REQUESTS = [Request("a red circle", 1), Request("两个蓝色方形", 2), Request("a green star", 3)]
QUICK = Sampling(steps=4)


def pictures(painter: Painter, requests: list[Request], sampling: Sampling) -> np.ndarray:
    return np.stack(list(painter.draw(requests, sampling)))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("height", [None, 288], ids=["small", "large"])
def test_a_picture_is_the_same_whatever_is_drawn_beside_it(
    painter: Painter, compute: Precision, height: int | None
) -> None:
    """Bit for bit, whatever the batch size, the order and the other prompts."""
    sampling = Sampling(steps=2, compute=compute, batch_size=3)
    requests = [Request(f"{number} red circles", number) for number in range(3 if height else 11)]

    def drawn(requests: list[Request], batch_size: int = 3) -> list[bytes]:
        settings = sampling.model_copy(update={"batch_size": batch_size})
        return [one.tobytes() for one in painter.draw(requests, settings, height=height)]

    together = drawn(requests)
    assert drawn(requests, batch_size=16) == together
    assert drawn(requests[::-1])[::-1] == together
    assert drawn(requests[1:2]) == together[1:2]
    with plain_attention(torch.device("cpu")):
        pass
    assert drawn(requests) == together
    assert len(set(together)) == len(together)


def test_seed_prompt_negative_and_guidance_matter(painter: Painter) -> None:
    base = pictures(painter, [Request("a red circle", 1)], QUICK)
    for request in (
        Request("a red circle", 2),
        Request("a blue ring", 1),
        Request("a red circle", 1, "blue"),
    ):
        assert not np.array_equal(base, pictures(painter, [request], QUICK))
    unguided = QUICK.model_copy(update={"guidance": 1.0})
    assert not np.array_equal(base, pictures(painter, [Request("a red circle", 1)], unguided))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_gives_finite_latents(painter: Painter, sampler: str) -> None:
    sampling = Sampling(sampler=sampler, steps=5)  # type: ignore[arg-type]
    *_, latents = painter.trajectory(REQUESTS, sampling)
    assert latents.shape == (3, 4, 8, 8) and torch.isfinite(latents).all()


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_ours_and_diffusers_draw_the_same(painter: Painter, pipeline: Path, sampler: str) -> None:
    """Network and sampler of both, from the same prompts and seeds."""
    other = Painter.load(Source(str(pipeline)), network="diffusers")
    settings = {"sampler": sampler, "steps": 8}
    ours = pictures(painter, REQUESTS, Sampling.model_validate(settings))
    theirs = Sampling.model_validate({**settings, "implementation": "diffusers"})
    assert psnr(ours, pictures(other, REQUESTS, theirs)).min() > 45


def test_other_sizes(painter: Painter) -> None:
    (wide,) = painter.draw(REQUESTS[:1], QUICK, height=32, width=96)
    assert wide.shape == (32, 96, 3)


def test_it_draws_what_diffusers_draws(painter: Painter, pipeline: Path) -> None:
    """Same noise, prompt, guidance and steps through StableDiffusionPipeline."""
    reference = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = make_sampler("dpm++", painter.schedule, 4, "diffusers").scheduler
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    theirs = reference(
        prompt_embeds=painter.text_states(["a red circle"]),
        negative_prompt_embeds=painter.text_states([""]),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=QUICK.guidance,
        output_type="np",
    ).images
    ours = pictures(painter, REQUESTS[:1], QUICK)
    assert psnr(ours, np.rint(theirs * 255).astype(np.uint8)).min() > 40


def test_tiny_opens_with_diffusers_as_it_is() -> None:
    theirs = StableDiffusionPipeline.from_pretrained(tiny_folder())
    theirs.set_progress_bar_config(disable=True)
    (drawn,) = theirs("a red star", num_inference_steps=2).images
    assert drawn.size == (64, 64)


def test_a_folder_in_sd1_layout_draws_what_diffusers_draws_from_it(
    pipeline: Path, tmp_path: Path
) -> None:
    """Written by diffusers with SD 1's own scheduler; sampler settings come from the folder."""
    whole = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    whole.scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    whole.save_pretrained(tmp_path / "sd")
    painter = Painter.load(Source(str(tmp_path / "sd")))
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    theirs = reference(
        "a red circle",
        latents=noise,
        num_inference_steps=10,
        guidance_scale=QUICK.guidance,
        output_type="np",
    ).images
    ours = pictures(painter, REQUESTS[:1], Sampling(sampler="pndm", steps=10))
    assert psnr(ours, np.rint(theirs * 255).astype(np.uint8)).min() > 40


def test_guidance_within_an_interval_of_levels(painter: Painter) -> None:
    """An empty interval is no guidance; all of it is guidance throughout; a part is neither."""

    def drawn(**changes: object) -> np.ndarray:
        return pictures(painter, REQUESTS, Sampling.model_validate({"steps": 6, **changes}))

    whole, none = drawn(), drawn(guidance=1.0)
    assert np.array_equal(drawn(guided_from=0.0, guided_to=1.0), whole)
    assert np.array_equal(drawn(guided_from=0.9, guided_to=0.1), none)
    part = drawn(guided_from=0.4, guided_to=0.7)
    assert not np.array_equal(part, whole) and not np.array_equal(part, none)
