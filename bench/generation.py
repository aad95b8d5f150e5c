"""Pictures a second over ``StableDiffusionPipeline``, ``--fast``, and the memory of a long job."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from bench.compare import compare
from bench.peak import peak
from ldm.config import Sampling
from ldm.config.drawing import FAST
from ldm.device import device_of
from ldm.evaluation_prompts import read_prompts
from ldm.models import Source, tiny_folder
from ldm.options import DATA
from ldm.sampling import Painter, Request
from ldm.scenes.lists import read_description
from ldm.scenes.reader import shows

PICTURES, ROUNDS = 40, 5
EVALUATION = DATA / "prompts.jsonl"
PROMPTS = [f"a {colour} star on a grey background" for colour in ("red", "blue", "green", "cyan")]


def main() -> None:
    """Print all tables."""
    speed()
    adherence()
    memory()


def speed() -> None:
    """The same model, sampler, steps, batch, guidance and dtype; then ours with ``--fast``."""
    device = device_of()
    theirs = StableDiffusionPipeline.from_pretrained(tiny_folder(), safety_checker=None)
    theirs = theirs.to(device)
    theirs.set_progress_bar_config(disable=True)
    painter = Painter.load(Source(str(tiny_folder())))
    # Its first levels are noise alone; both leave them out.
    config = {**theirs.scheduler.config, "lambda_min_clipped": -5.1}
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(config)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(PICTURES)]
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    sampling = Sampling(batch_size=PICTURES)

    def reference() -> None:
        generators = [torch.Generator().manual_seed(number) for number in range(PICTURES)]
        theirs(
            prompts,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=generators,
        )

    def drawn(sampling: Sampling) -> Callable[[], object]:
        return lambda: list(painter.draw(requests, sampling))

    title = f"generation, tiny, batch {PICTURES}, dpm++ 20 steps, float32: pictures a second"
    compare(title, ("diffusers", reference), ("ours", drawn(sampling)), PICTURES, ROUNDS)
    title = f"the same, ours with --fast ({FAST})"
    compare(title, ("diffusers", reference), ("ours", drawn(fast(sampling))), PICTURES, ROUNDS)


def fast(sampling: Sampling) -> Sampling:
    """The same settings with what ``ldm generate --fast`` changes."""
    return sampling.model_copy(update=FAST)


def adherence() -> None:
    """The share of pictures exactly as asked, exact and fast: every evaluation prompt, ``tiny``."""
    if not EVALUATION.is_file():
        print(f"\nno {EVALUATION}: run `ldm scenes` for the adherence of --fast")
        return
    prompts = [prompt for prompt in read_prompts(EVALUATION, seed=0) if prompt.scene]
    painter = Painter.load(Source(str(tiny_folder())))
    requests = [Request(prompt.prompt, prompt.seed) for prompt in prompts]
    wanted = [read_description(prompt.scene) for prompt in prompts if prompt.scene]
    print(f"\nadherence of tiny, {len(wanted)} prompts")
    for name, sampling in (("exact", Sampling()), ("fast", fast(Sampling()))):
        drawn = zip(painter.draw(requests, sampling), wanted, strict=True)
        right = sum(shows(pixels, description) for pixels, description in drawn)
        print(f"{name:>24} {right / len(wanted):7.4f}")


def memory() -> None:
    """Peak resident memory of ``ldm generate`` on 100 and on 10,000 prompts, one step each."""
    peaks = []
    for count in (100, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.txt"
            prompts.write_text("".join(f"a red star {number}\n" for number in range(count)))
            command = [sys.executable, "-m", "ldm.cli", "generate", "--model", "tiny", "--steps"]
            command += ["1", "--guidance", "1", "--prompts", str(prompts), "--rows-per-shard"]
            command += ["1000", "--out", str(Path(folder) / "out")]
            peaks.append(peak(command))
            print(f"peak memory of {count:6} prompts: {peaks[-1]:8.1f} MiB")
    print(f"ratio {peaks[1] / peaks[0]:.3f}")
