"""What may be said to ``ldm``: stages, their options and defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.presets import presets

if TYPE_CHECKING:
    from ldm.remote.artifacts import Location

PARAMS = "params.yaml"
MODEL_HELP = "folder, checkpoint of a training, hub id or MLflow URI"

DATA = Path("data")
IMAGES = Path("artifacts/images")
FIRST_STAGE = Path("artifacts/first-stage")
LATENTS = Path("artifacts/latents")
MODEL = Path("artifacts/model")
EXPORTED = Path("exported")
EVAL = Path("artifacts/eval")
REPORT = Path("artifacts/report")
EXPLAINED = Path("explained")
RUNS = Path("runs")
KEEP = 3
"""Trainings that keep their checkpoints."""
REMOTE = frozenset({IMAGES, LATENTS})
"""What may be given as a URL instead."""


def parser() -> argparse.ArgumentParser:
    """Of all stages; ``command`` is the stage's name, ``params`` and ``set`` its settings."""
    parser = argparse.ArgumentParser(
        prog="ldm", description="From a list of (image URL, caption) pairs to a registered model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")

    settings = f"params file, or a preset: {', '.join(presets())}; default: {PARAMS}"

    def command(name: str, help: str, **paths: Path) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--params", default=PARAMS, help=settings)
        sub.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
            help="a setting instead of that file's; may be given more than once",
        )  # fmt: skip
        for path, default in paths.items():
            kind, what = (_location, "folder or URL, ") if default in REMOTE else (_folder, "")
            about = f"{what}default: {default}"
            sub.add_argument(f"--{path}", type=kind, default=default, help=about)
        return sub

    command("scenes", "write the embedded data set's lists", out=DATA)
    ingest = command(
        "ingest", "download, check and pack the pairs", data=DATA, out=IMAGES, runs=RUNS
    )
    ingest.add_argument(
        "--refetch", action="store_true", help="ask every URL again; pictures may not have changed"
    )
    first_stage = command(
        "first-stage", "train a VAE, and CLIP, for a domain of one's own",
        images=IMAGES, out=FIRST_STAGE, runs=RUNS,
    )  # fmt: skip
    _resuming_options(first_stage)
    command(
        "encode", "pictures and captions to latents",
        images=IMAGES, out=LATENTS, runs=RUNS,
    )  # fmt: skip
    training = command("train", "train the UNet on latents", latents=LATENTS, out=MODEL, runs=RUNS)
    training.add_argument(
        "--images", type=_location,
        help="what the latents must be of, if it is there; default: `images` beside the latents",
    )  # fmt: skip
    _resuming_options(training)
    export = command("export", "a training's checkpoint as a model, as `train` makes", out=EXPORTED)
    export.add_argument(
        "checkpoint", type=Path, metavar="RUN[/step-NNNNNNNN]",
        help="checkpoint, or the run whose best by validation loss is taken",
    )  # fmt: skip
    prune = command(
        "prune", "remove the checkpoints of trainings that have ended", runs=RUNS, model=MODEL
    )
    prune.add_argument(
        "--keep", type=int, default=KEEP, metavar="N",
        help="how many keep them, of trainings and of first stages: the newest, and what made the "
        f"model; default: {KEEP}; 0: none",
    )  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="remove nothing, name what would go")
    command("evaluate", "draw the prompts and judge", model=MODEL, data=DATA, out=EVAL)
    command(
        "register", "log the training to MLflow, name it challenger",
        model=MODEL, eval=EVAL, images=IMAGES, latents=LATENTS, runs=RUNS,
    )  # fmt: skip
    promote = command("promote", "make the challenger champion if the gate lets it")
    promote.add_argument("--version", dest="named", help="decide on this one, not the challenger")
    promote.add_argument("--rollback", action="store_true", help="put the former champion back")
    command(
        "report", "one page about the last training",
        model=MODEL, eval=EVAL, images=IMAGES, latents=LATENTS, out=REPORT, runs=RUNS,
    )  # fmt: skip
    trace = command(
        "trace", "where a row's sample is, and which models were trained on it",
        data=DATA, images=IMAGES, latents=LATENTS, runs=RUNS,
    )  # fmt: skip
    trace.add_argument("named", metavar="URL|KEY", help="of the row; the key of its sample")
    _generate_options(command("generate", "draw pictures from prompts"))
    explain = command("explain", "draw diffusion itself: a picture to noise and back")
    explain.add_argument("picture", type=Path, help="file; its middle is taken")
    explain.add_argument("--model", default="tiny", help=f"{MODEL_HELP}; default: tiny")
    explain.add_argument("--prompt", default="", help="what the way back leads to")
    explain.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    explain.add_argument("--out", type=Path, default=EXPLAINED, help=f"default: {EXPLAINED}")
    return parser


def _resuming_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--resume", type=Path, metavar="RUN", help="go on from a folder of runs")
    sub.add_argument(
        "--changed", action="store_true", help="with --resume: what differs from that run is meant"
    )


def _generate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", help=f"{MODEL_HELP}; default: the champion of registry.model")
    sub.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    sub.add_argument(
        "--negative", action="append", default=[], help="one for all prompts, or one for each"
    )
    sub.add_argument("--prompts", type=Path, help="file of prompts: .txt, .csv, .jsonl or .parquet")
    sub.add_argument("--steps", type=int, help="denoising steps")
    sub.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    sub.add_argument("--sampler", help="dpm++, dpm++sde, euler, lms, ddim, ddpm or pndm")
    sub.add_argument("--seed", type=int, help="of a prompt's first picture; default: generate.seed")
    sub.add_argument("--num-images", type=int, default=1, help="pictures a prompt")
    sub.add_argument("--height", type=int)
    sub.add_argument("--width", type=int)
    sub.add_argument(
        "--fast", action="store_true", help="guidance where it counts, bfloat16 if fast"
    )
    sub.add_argument("--rows-per-shard", type=int, help="pack the pictures into tars")
    sub.add_argument("--out", type=Path, help="default: a folder of the job's own in generated/")


def _location(text: str) -> Location:
    if "://" not in text:
        return Path(text)
    url = text.rstrip("/")
    if "://" not in url:
        raise argparse.ArgumentTypeError(f"{text} names no bucket; write s3://BUCKET/FOLDER")
    return url


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder; only images and latents have URLs")
    return Path(text)
