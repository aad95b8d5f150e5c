"""Batches are a function of seed and position, whatever reads them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.cache import LatentCache
from ldm.encode.encoders import posterior_moments
from ldm.errors import UserError
from ldm.images import psnr, to_pixels
from ldm.models import Source, load_text_encoder, load_vae
from ldm.text import tokenize
from ldm.train.data import TrainingBatches, shifted, spread_share, validation_batches
from ldm.train.validation import by_band
from tests.conftest import scenes


def batches(cache: LatentCache, **changes: object) -> TrainingBatches:
    settings = {"seed": 3, "batch_size": 8, "timesteps": 1000, "caption_dropout": 0.3}
    return TrainingBatches(cache, **{**settings, **changes})  # type: ignore[arg-type]


def test_ranks_share_a_batch_without_overlap(latents: Path) -> None:
    cache = LatentCache(latents, "train")
    whole = batches(cache)[5]
    shares = [batches(cache, rank=rank, processes=4)[5] for rank in range(4)]
    for name in ("latents", "noise", "texts", "timesteps"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(s, name) for s in shares]))


def test_any_position_can_be_read_first(latents: Path) -> None:
    cache = LatentCache(latents, "train")
    straight = [batches(cache)[number] for number in range(20)]
    again = batches(LatentCache(latents, "train"))[19]
    assert torch.equal(straight[19].latents, again.latents)
    assert torch.equal(straight[19].noise, again.noise)
    assert not torch.equal(straight[18].noise, straight[19].noise)


def test_who_asks_for_a_steps_keys_leaves_the_thread_alone_that_makes_batches(
    latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = batches(LatentCache(latents, "train"))
    shown = [made.cache.key(made.order.sample(position)) for position in range(400, 408)]
    monkeypatch.setattr(made.order, "sample", None)
    assert made.keys(50) == shown


def test_an_error_ends_the_processes_that_make_batches() -> None:
    code = """
        from contextlib import closing
        from ldm.train.data import made_ahead

        class Numbers:
            def __getitem__(self, number):
                return number

        with closing(made_ahead(Numbers(), range(100), 2, pinned=False, patience_s=60)) as batches:
            assert next(batches) == 0
            raise RuntimeError("out of memory")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "out of memory" in done.stderr


def test_timesteps_are_even_over_any_stretch() -> None:
    drawn = np.array([spread_share(7, position) for position in range(512, 1024)])
    counts, _ = np.histogram(drawn, bins=8, range=(0, 1))
    assert counts.min() >= 60 and counts.max() <= 68
    assert drawn.min() >= 0 and drawn.max() < 1


@given(st.floats(0, 1, exclude_max=True), st.floats(0.1, 10))
def test_a_shift_keeps_order_and_range(share: float, shift: float) -> None:
    assert 0 <= shifted(share, shift) < 1
    assert shifted(shifted(share, shift), 1 / shift) == pytest.approx(share, abs=1e-9)
    assert shifted(share, shift) == pytest.approx(share, abs=1e-9) or (
        (shifted(share, shift) > share) == (shift > 1)
    )


def test_a_shift_shows_that_many_times_more_of_the_noisiest(latents: Path) -> None:
    cache = LatentCache(latents, "train")
    many = [batches(cache, timestep_shift=4.0)[number].timesteps for number in range(200)]
    noisiest = (torch.cat(many) >= 980).float().mean()
    assert 0.06 < noisiest < 0.09


def test_epochs_draw_different_posterior_samples(latents: Path) -> None:
    cache = LatentCache(latents, "train")
    made, samples = batches(cache), len(cache)
    epochs = [range(start, start + samples) for start in (0, samples)]
    shown = [[made.order.sample(position) for position in epoch] for epoch in epochs]
    first, second = (
        made.at(epoch).latents[np.argsort(order)]
        for epoch, order in zip(epochs, shown, strict=True)
    )
    assert sorted(shown[0]) == sorted(shown[1]) == list(range(samples))
    assert ((first - second).abs().amax(dim=(1, 2, 3)) > 0).all()


def test_caption_dropout_shows_the_empty_caption(latents: Path, pipeline: Path) -> None:
    cache = LatentCache(latents, "train")
    tokenizer, text_encoder = load_text_encoder(Source(str(pipeline)))
    with torch.no_grad():
        empty = text_encoder(tokenize(tokenizer, [""])).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(cache.texts([0], [True])[0]), empty)
    states = torch.cat([batches(cache)[number].texts for number in range(30)])
    dropped = (states - empty).abs().amax(dim=(1, 2)) < 1e-6
    assert 0.2 < dropped.float().mean() < 0.4
    kept = batches(cache, caption_dropout=0.0)[0].texts
    assert ((kept - empty).abs().amax(dim=(1, 2)) > 1e-6).all()


def test_cached_latents_are_those_of_the_encoder_scaled_once(latents: Path, pipeline: Path) -> None:
    vae = load_vae(Source(str(pipeline)))
    cache = LatentCache(latents, "validation")
    pixels = scenes("validation", len(cache))
    online = posterior_moments(vae, pixels, torch.device("cpu"))
    np.testing.assert_allclose(cache.moments(range(len(cache))), online, atol=1e-4)
    mean = torch.from_numpy(online[:4, :4])
    drawn = cache.latents(range(4), np.zeros(mean.shape, np.float32))
    np.testing.assert_allclose(drawn / vae.config.scaling_factor, mean.numpy(), atol=1e-4)
    with torch.no_grad():
        from_cache = to_pixels(
            vae.decode(torch.from_numpy(drawn) / vae.config.scaling_factor).sample
        )
        direct = to_pixels(vae.decode(mean).sample)
    assert psnr(from_cache, direct).min() > 45


def test_validation_repeats_itself(latents: Path) -> None:
    cache = LatentCache(latents, "validation")
    first, second = (
        list(validation_batches(cache, seed=0, batch_size=24, timesteps=1000)) for _ in range(2)
    )
    assert sum(len(batch.timesteps) for batch, _ in first) == 4 * len(cache)
    assert all(len(batch.timesteps) == count for batch, count in first)
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timesteps, other.timesteps)


@pytest.mark.parametrize("timesteps", [1000, 37, 38, 39])
def test_validation_shows_each_sample_in_each_band_of_the_timesteps(
    latents: Path, timesteps: int
) -> None:
    """Else the losses of the bands would be of different pictures."""
    shown = validated_at(LatentCache(latents, "validation"), timesteps)
    bands = [by_band(torch.ones(shown.shape[1]), own, timesteps) for own in shown]
    assert [[bool(found) for found in band] for band in bands] == torch.eye(4).bool().tolist()


def test_validation_is_spread_evenly_within_each_quarter_of_the_timesteps(latents: Path) -> None:
    shown = validated_at(LatentCache(latents, "validation"), 1000)
    assert torch.equal(shown // 250, torch.arange(4)[:, None].expand_as(shown))
    within = (shown % 250).mul(8).floor_divide(250)
    for own in within:
        assert (own.bincount(minlength=8) - shown.shape[1] / 8).abs().max() <= 1.5


def validated_at(cache: LatentCache, timesteps: int) -> torch.Tensor:
    """At which timesteps, by draw and sample."""
    batches = validation_batches(cache, seed=0, batch_size=4 * len(cache), timesteps=timesteps)
    return torch.cat([batch.timesteps for batch, _ in batches]).view(4, len(cache))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_ranks_share_validation_batches(latents: Path, processes: int) -> None:
    """And have as many of the same size, so that they can wait for each other."""
    cache = LatentCache(latents, "validation")
    settings = {"seed": 0, "batch_size": 27, "timesteps": 1000}
    whole = list(validation_batches(cache, **settings))  # type: ignore[arg-type]
    assert [count for _, count in whole] == [27, 27, 10]
    ranks = [
        list(validation_batches(cache, **settings, rank=rank, processes=processes))  # type: ignore[arg-type]
        for rank in range(processes)
    ]
    for (batch, count), *shares in zip(whole, *ranks, strict=True):
        assert {(len(own.timesteps), of) for own, of in shares} == {(-(-count // processes), count)}
        for name in ("latents", "noise", "texts", "timesteps"):
            together = torch.cat([getattr(own, name) for own, _ in shares])
            assert torch.equal(together[:count], getattr(batch, name))


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    with pytest.raises(UserError, match=r"latents: has no manifest.json.*ldm encode"):
        LatentCache(tmp_path / "latents", "train")
