"""``ldm export``: a checkpoint of a training as the folder that the training ends with."""

from __future__ import annotations

from pathlib import Path

from ldm import checkpoint
from ldm.artifacts import write_whole, writing
from ldm.errors import UserError
from ldm.lora import FOLDER
from ldm.pipeline import load_trained, save_pipeline
from ldm.progress import say
from ldm.run_log import LOG, Entry, as_lines, entries
from ldm.runs import RUN, expect_unpruned, identity_of


def export(named: Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint as a pipeline folder, as ``ldm train`` does.

    ``named``: the checkpoint, or the folder of its run for the one with the lowest validation loss.
    What comes out can be evaluated and registered. UserError where that is no checkpoint, or not
    whole.
    """
    run = named if (named / RUN).is_file() else named.parent
    expect_unpruned(run, "train again, or name another run")
    folder = _best(named) if run == named else named
    if not (folder.parent / RUN).is_file():
        raise UserError(
            f"{named}: is no checkpoint of `ldm train`; name a folder of runs/, or a step-NNNNNNNN "
            "in one"
        )
    identity = identity_of(folder.parent)
    encoders, unet, schedule, adapters = load_trained(folder, identity["code"][0])
    step, config = checkpoint.step_of(folder), identity["config"]
    counts = {"steps": step, "samples": step * config["batch_size"]}
    lines = [line for line in entries(folder.parent / LOG) if line["step"] <= step]
    inputs = {name: one for name, one in identity["inputs"].items() if name != "scaling"}
    with writing(out, "model", config=config, inputs=inputs, counts=counts) as fresh:
        if adapters:
            adapters.save(fresh / FOLDER)
            adapters.merge()
        save_pipeline(fresh, encoders, unet, schedule)
        write_whole(fresh / LOG, as_lines(lines))
    say(f"export: step {step}, {_figure(lines, step)} -> {out}")


def _best(run: Path) -> Path:
    found = checkpoint.best(run)
    if found is None:
        raise UserError(
            f"{run}: has no checkpoint with a validation loss yet; name one of its step-..."
        )
    return found


def _figure(lines: list[Entry], step: int) -> str:
    """The validation loss of the step, if that was validated."""
    losses = [line["val_loss"] for line in lines if "val_loss" in line and line["step"] == step]
    return f"val_loss {losses[-1]:.4f}" if losses else "not validated"
