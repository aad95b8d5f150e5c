"""The one door: ``ldm STAGE``.

Heavy imports sit inside the commands, so that ``ldm --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, full_disk_told
from ldm.importing import quick_imports
from ldm.options import MODEL, parser
from ldm.quiet import quieten

if TYPE_CHECKING:
    from ldm.config import Params


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run; a :class:`UserError` is one line on stderr and exit code 1."""
    quieten()
    options = parser().parse_args(arguments)
    try:
        with full_disk_told(Path.cwd()):
            COMMANDS[options.command](options)
    except UserError as error:
        sys.exit(f"ldm {options.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _params(options: argparse.Namespace) -> Params:
    from ldm.params import load_params

    params = load_params(options.params, options.set)
    # Whatever resolves `models:/...` further down, the trainer too, asks the same registry.
    os.environ.setdefault("MLFLOW_TRACKING_URI", params.registry.tracking_uri)
    return params


def _resuming(options: argparse.Namespace) -> dict[str, Any]:
    """Which run a training goes on from, and how."""
    if options.changed and options.resume is None:
        raise UserError("--changed: says what --resume RUN may do; give that too")
    return {"resume": options.resume, "changed": options.changed}


def _scenes(options: argparse.Namespace) -> None:
    from ldm.progress import say
    from ldm.scenes.lists import write_lists

    scenes = _params(options).scenes
    write_lists(options.out, scenes.world, scenes.rows, scenes.validation_rows, scenes.prompts)
    pairs = f"{scenes.rows} training and {scenes.validation_rows} validation pairs"
    say(f"scenes: {pairs} -> {options.out}")


def _ingest(options: argparse.Namespace) -> None:
    from ldm.ingest.stage import ingest
    from ldm.remote.artifacts import publishing

    config = _params(options).ingest
    with publishing(options.out, "images", options.runs) as out:
        ingest(config, options.data, out, options.runs, refetch=options.refetch)


def _first_stage(options: argparse.Namespace) -> None:
    from ldm.first_stage.stage import first_stage
    from ldm.remote.artifacts import reading

    params, how = _params(options), _resuming(options)
    registry = params.registry if params.first_stage.track else None
    with reading(options.images, options.runs) as images:
        first_stage(params.first_stage, images, options.out, options.runs, registry, **how)


def _encode(options: argparse.Namespace) -> None:
    from ldm.launch import launch_encoding
    from ldm.remote.artifacts import publishing, reading

    params = _params(options)
    with (
        publishing(options.out, "latents", options.runs) as out,
        reading(options.images, options.runs) as images,
    ):
        if params.encode.accelerate:
            launch_encoding(params, images, out, options.runs)
        else:
            from ldm.encode.stage import encode

            encode(params.encode, params.pretrained, images, out, options.runs)


def _train(options: argparse.Namespace) -> None:
    with quick_imports():
        from ldm.artifacts import expect_replaceable
        from ldm.launch import launch_training
        from ldm.remote.artifacts import reading
        from ldm.train.stale import expect_current

    params, how = _params(options), _resuming(options)
    expect_replaceable(options.out, "model")
    pictures = options.images
    if pictures is None and isinstance(options.latents, Path):
        pictures = options.latents.with_name("images")
    with (
        reading(options.latents, options.runs) as latents,
        reading(pictures, options.runs, files=False) if pictures else nullcontext() as images,
    ):
        expect_current(latents, images, params.encode)
        launch_training(params, latents, options.out, options.runs, **how)


def _export(options: argparse.Namespace) -> None:
    from ldm.export import export

    _params(options)  # A start that is a registered model is looked for where they say.
    export(options.checkpoint, options.out)


def _prune(options: argparse.Namespace) -> None:
    from ldm.prune import prune

    if options.model != MODEL and not options.model.is_dir():
        raise UserError(f"{options.model}: no such model; name the one whose training is to stay")
    prune(options.runs, options.keep, options.model, dry_run=options.dry_run)


def _evaluate(options: argparse.Namespace) -> None:
    from ldm.evaluate import evaluate

    params = _params(options)
    prompts = options.data / "prompts.jsonl"
    evaluate(params.evaluate, params.pretrained, options.model, prompts, options.out)


def _register(options: argparse.Namespace) -> None:
    from ldm.registry.register import register
    from ldm.remote.artifacts import reading

    registry = _params(options).registry
    with (
        reading(options.images, options.runs, files=False) as images,
        reading(options.latents, options.runs) as latents,  # They name the samples.
    ):
        register(registry, options.model, options.eval, images, latents)


def _promote(options: argparse.Namespace) -> None:
    from ldm.registry.promotion import promote, rollback

    registry = _params(options).registry
    if options.rollback:
        rollback(registry)
    else:
        promote(registry, options.named)


def _report(options: argparse.Namespace) -> None:
    from ldm.remote.artifacts import reading
    from ldm.report.stage import report

    registry = _params(options).registry
    with (
        reading(options.images, options.runs) as images,
        reading(options.latents, options.runs) as latents,
    ):
        report(registry, images, latents, options.model, options.eval, options.out)


def _trace(options: argparse.Namespace) -> None:
    from ldm.remote.artifacts import reading
    from ldm.trace import trace

    params = _params(options)
    with (
        reading(options.images, options.runs) as images,
        reading(options.latents, options.runs) as latents,
    ):
        trace(params, options.named, options.data, images, latents)


def _generate(options: argparse.Namespace) -> None:
    with quick_imports():
        from ldm.config.drawing import FAST
        from ldm.generate.prompts import Wish
        from ldm.generate.stage import Job, generate
        from ldm.params import with_changes

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
    model = options.model or f"models:/{params.registry.model}@champion"
    generate(model, options.prompts or rows, job, options.out, params.pretrained.network)


def _explain(options: argparse.Namespace) -> None:
    from ldm.explain import explain

    network = _params(options).pretrained.network
    explain(options.model, options.picture, options.prompt, options.seed, options.out, network)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "scenes": _scenes,
    "ingest": _ingest,
    "first-stage": _first_stage,
    "encode": _encode,
    "train": _train,
    "export": _export,
    "prune": _prune,
    "evaluate": _evaluate,
    "register": _register,
    "promote": _promote,
    "report": _report,
    "trace": _trace,
    "generate": _generate,
    "explain": _explain,
}


if __name__ == "__main__":
    main()
