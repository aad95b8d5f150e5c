"""The one door: ``ldm STAGE``.

Heavy imports sit inside the commands, so that ``ldm --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import __version__
from ldm.errors import UserError
from ldm.quiet import quieten

if TYPE_CHECKING:
    from ldm.config import Params
    from ldm.remote import Location

MODEL_HELP = "folder, checkpoint of a training, hub id or MLflow URI"
FAST = {"compute": "auto", "guided_from": 0.3, "guided_to": 0.9}
"""What ``ldm generate --fast`` changes; ``python -m bench generation`` measures it."""

Command = Callable[[argparse.Namespace], None]

DATA = Path("data")
IMAGES = Path("artifacts/images")
FIRST_STAGE = Path("artifacts/first-stage")
LATENTS = Path("artifacts/latents")
MODEL = Path("artifacts/model")
EVAL = Path("artifacts/eval")
REPORT = Path("artifacts/report")
RUNS = Path("runs")
REMOTE = frozenset({IMAGES, LATENTS})
"""What may be given as a URL instead."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run; a :class:`UserError` is one line on stderr and exit code 1."""
    quieten()
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        sys.exit(f"ldm {options.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ldm", description="From a list of (image URL, caption) pairs to a registered model."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")

    def command(name: str, run: Command, help: str, **paths: Path) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--params", default="params.yaml", help="params file or preset")
        sub.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override"
        )
        for path, default in paths.items():
            kind, what = (_location, "folder or URL, ") if default in REMOTE else (_folder, "")
            about = f"{what}default: {default}"
            sub.add_argument(f"--{path}", type=kind, default=default, help=about)
        return sub

    command("scenes", _scenes, "write the embedded data set's lists", out=DATA)
    ingest = command(
        "ingest", _ingest, "download, check and pack the pairs", data=DATA, out=IMAGES, runs=RUNS
    )
    ingest.add_argument(
        "--refetch", action="store_true", help="ask every URL again; pictures may not have changed"
    )
    command(
        "first-stage", _first_stage, "train VAE and CLIP from nothing",
        images=IMAGES, out=FIRST_STAGE, runs=RUNS,
    )  # fmt: skip
    command(
        "encode", _encode, "pictures and captions to latents",
        images=IMAGES, out=LATENTS, runs=RUNS,
    )  # fmt: skip
    training = command(
        "train", _train, "train the UNet on latents", latents=LATENTS, out=MODEL, runs=RUNS
    )
    training.add_argument("--resume", type=Path, metavar="RUN", help="go on from a folder of runs")
    training.add_argument(
        "--changed", action="store_true", help="with --resume: what differs from that run is meant"
    )
    command("evaluate", _evaluate, "draw the prompts and judge", model=MODEL, data=DATA, out=EVAL)
    command(
        "register", _register, "log the training to MLflow, name it challenger",
        model=MODEL, eval=EVAL, images=IMAGES, latents=LATENTS, runs=RUNS,
    )  # fmt: skip
    promote = command("promote", _promote, "make the challenger champion if the gate lets it")
    promote.add_argument("--version", dest="named", help="decide on this one, not the challenger")
    promote.add_argument("--rollback", action="store_true", help="put the former champion back")
    command(
        "report", _report, "one page about the last training",
        model=MODEL, eval=EVAL, images=IMAGES, latents=LATENTS, out=REPORT, runs=RUNS,
    )  # fmt: skip
    trace = command(
        "trace", _trace, "where a row's sample is, and which models were trained on it",
        data=DATA, images=IMAGES, latents=LATENTS, runs=RUNS,
    )  # fmt: skip
    trace.add_argument("named", metavar="URL|KEY", help="of the row; the key of its sample")
    _generate_options(command("generate", _generate, "draw pictures from prompts"))
    explain = command("explain", _explain, "draw diffusion itself: a picture to noise and back")
    explain.add_argument("picture", type=Path)
    explain.add_argument("--model", default="tiny", help=MODEL_HELP)
    explain.add_argument("--prompt", default="", help="what the way back leads to")
    explain.add_argument("--seed", type=int, default=0)
    explain.add_argument("--out", type=Path, default=Path("explained"))
    return parser


def _generate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="models:/ldm@champion", help=MODEL_HELP)
    sub.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    sub.add_argument(
        "--negative", action="append", default=[], help="one for all prompts, or one for each"
    )
    sub.add_argument("--prompts", type=Path, help="file of prompts: .txt, .csv, .jsonl or .parquet")
    sub.add_argument("--steps", type=int, help="denoising steps")
    sub.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    sub.add_argument("--sampler", help="dpm++, euler, lms, ddim, ddpm or pndm")
    sub.add_argument("--seed", type=int, help="of a prompt's first picture; default: 0")
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


def _params(options: argparse.Namespace) -> Params:
    from ldm.params import load_params

    params = load_params(options.params, options.set)
    # Whatever resolves `models:/...` further down, the trainer too, asks the same registry.
    os.environ.setdefault("MLFLOW_TRACKING_URI", params.registry.tracking_uri)
    return params


def _scenes(options: argparse.Namespace) -> None:
    from ldm.progress import say
    from ldm.scenes.lists import write_lists

    scenes = _params(options).scenes
    write_lists(options.out, scenes.world, scenes.rows, scenes.validation_rows, scenes.prompts)
    pairs = f"{scenes.rows} training and {scenes.validation_rows} validation pairs"
    say(f"scenes: {pairs} -> {options.out}")


def _ingest(options: argparse.Namespace) -> None:
    from ldm.ingest.stage import ingest
    from ldm.remote import publishing

    config = _params(options).ingest
    with publishing(options.out, "images", options.runs) as out:
        ingest(config, options.data, out, options.runs, refetch=options.refetch)


def _first_stage(options: argparse.Namespace) -> None:
    from ldm.first_stage.stage import first_stage
    from ldm.remote import reading

    params = _params(options)
    registry = params.registry if params.first_stage.track else None
    with reading(options.images, options.runs) as images:
        first_stage(params.first_stage, images, options.out, options.runs, registry)


def _encode(options: argparse.Namespace) -> None:
    from ldm.launch import launch_encoding, processes_of
    from ldm.remote import publishing, reading

    params = _params(options)
    configuration = params.encode.accelerate
    with (
        publishing(options.out, "latents", options.runs) as out,
        reading(options.images, options.runs) as images,
    ):
        if configuration and processes_of(configuration) > 1:
            launch_encoding(params, images, out, options.runs)
        else:
            from ldm.encode import encode

            encode(params.encode, params.pretrained, images, out, options.runs)


def _train(options: argparse.Namespace) -> None:
    from ldm.launch import launch_training
    from ldm.remote import reading

    if options.changed and options.resume is None:
        raise UserError("--changed: says what --resume RUN may do; give that too")
    params, how = _params(options), {"resume": options.resume, "changed": options.changed}
    with reading(options.latents, options.runs) as latents:
        launch_training(params, latents, options.out, options.runs, **how)


def _evaluate(options: argparse.Namespace) -> None:
    from ldm.evaluate import evaluate

    params = _params(options)
    prompts = options.data / "prompts.jsonl"
    evaluate(params.evaluate, params.pretrained, options.model, prompts, options.out)


def _register(options: argparse.Namespace) -> None:
    from ldm.registry import register
    from ldm.remote import reading

    with (
        reading(options.images, options.runs, files=False) as images,
        reading(options.latents, options.runs) as latents,  # They name the samples.
    ):
        register(_params(options).registry, options.model, options.eval, images, latents)


def _promote(options: argparse.Namespace) -> None:
    from ldm.registry import promote, rollback

    registry = _params(options).registry
    if options.rollback:
        rollback(registry)
    else:
        promote(registry, options.named)


def _report(options: argparse.Namespace) -> None:
    from ldm.remote import reading
    from ldm.report import report

    registry = _params(options).registry
    with (
        reading(options.images, options.runs) as images,
        reading(options.latents, options.runs) as latents,
    ):
        report(registry, images, latents, options.model, options.eval, options.out)


def _trace(options: argparse.Namespace) -> None:
    from ldm.remote import reading
    from ldm.trace import trace

    params = _params(options)
    with (
        reading(options.images, options.runs) as images,
        reading(options.latents, options.runs) as latents,
    ):
        trace(params, options.named, options.data, images, latents)


def _generate(options: argparse.Namespace) -> None:
    from ldm.generate import Job, generate
    from ldm.params import with_changes
    from ldm.prompts import Wish

    params = _params(options)
    if options.prompts and options.prompt:
        raise UserError("give --prompt or --prompts, not both")
    prompts, negatives = options.prompt, options.negative
    if len(negatives) > 1 and (options.prompts or len(negatives) != len(prompts)):
        raise UserError(
            f"{len(negatives)} --negative for {len(prompts)} --prompt; give one, or one for each"
        )
    given = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    if options.fast:
        given |= FAST
    changed = {key: value for key, value in given.items() if value is not None}
    sampling = with_changes(params.generate, changed, "generate")
    negative = negatives[0] if len(negatives) == 1 else ""
    seed = sampling.seed if options.seed is None else options.seed
    default = Wish("", negative, seed, options.height, options.width, sampling, {})
    rows = [{"prompt": prompt} for prompt in prompts]
    if len(negatives) > 1:
        rows = [{**row, "negative": one} for row, one in zip(rows, negatives, strict=True)]
    job = Job(default, options.num_images, options.rows_per_shard)
    generate(options.model, options.prompts or rows, job, options.out, params.pretrained.network)


def _explain(options: argparse.Namespace) -> None:
    from ldm.explain import explain

    network = _params(options).pretrained.network
    explain(options.model, options.picture, options.prompt, options.seed, options.out, network)


if __name__ == "__main__":
    main()
