"""``ldm first-stage``: VAE, tokenizer and CLIP for a domain of one's own.

The output is a folder in Stable Diffusion layout without a UNet, which ``pretrained.pipeline`` may
name, and ``pretrained.clip`` the folder ``clip`` in it: encode with it, then train, with
``train.init: random`` where the text encoder is a new one. Killed and started again with the same
settings and images, it goes on from the newest whole checkpoint.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm import code
from ldm.aliases import fixed
from ldm.artifacts import digest_json, making, opening, write_json, write_whole
from ldm.config import FirstStage, Registry
from ldm.config.section import flat
from ldm.device import device_of, plain_attention, precision_of
from ldm.errors import UserError
from ldm.first_stage.clip import train_clip
from ldm.first_stage.layout import latents_of, train_layout
from ldm.first_stage.loop import SHEETS, Run
from ldm.first_stage.measured import CANDIDATES, measure
from ldm.first_stage.parts import Given, Parts, save, text_encoder_of
from ldm.first_stage.split import Split
from ldm.first_stage.tokenizer import train_tokenizer
from ldm.first_stage.vae import side_of, train_vae
from ldm.image_shards import SPLITS
from ldm.images import encode_png
from ldm.locks import held
from ldm.memory import keep_memory
from ldm.progress import say
from ldm.run_log import LOG
from ldm.runs import Identity, continued, describe, folder_of, identity_of
from ldm.tracking.live import Live
from ldm.tracking.liveness import LOCK

PARTS = ("vae", "clip", "layout")
HOW = ("checkpoint_every", "log_every", "validate_every", "sheet_every", "max_skipped")
"""Settings of a :class:`Run`, which do not change its result."""
NETWORK = {"widths", "layers_per_block", "latent_channels", "norm_groups", "mid_attention"}
NETWORK |= {"width", "layers", "heads", "patch_size", "max_tokens", "vocabulary"}
NETWORK |= {"trains", "adversarial_from", "discriminator_widths"}
"""Settings of parts that say what is trained."""
DECIDING = (
    "autoencoder",
    "clip_score",
    "device",
    "images",
    "learning_rate",
    "nn/attention",
    "text",
)
"""Modules that decide what is trained, besides those of this package."""


def first_stage(
    config: FirstStage,
    images: Path,
    out: Path,
    runs: Path,
    registry: Registry | None = None,
    *,
    resume: Path | None = None,
    changed: bool = False,
) -> None:
    """Train on the images artifact's training split, measure on its validation split.

    Writes ``vae``, ``text_encoder``, ``tokenizer``, ``clip`` (both towers), ``log.jsonl``,
    ``reconstructions.png`` (held-out pictures above what the VAE makes of them) and
    ``measured.json`` {vae_psnr_db, clip_retrieval, clip_order, text_order}, the last with a layout
    phase. With ``config.text_encoder`` there is no ``clip`` and no figure but the first.
    Checkpoints go to a folder of ``runs`` named by a digest of the settings, the images and the
    code that decides the result. With ``resume`` each part goes on from where that run's stands,
    one that has taken its steps stays as it is, and ``layout`` begins anew where ``vae`` or
    ``clip`` goes on; ``changed`` says that what differs is meant.
    With ``registry`` MLflow shows the training as it goes, and what was measured.

    Raises :class:`SystemExit` after SIGTERM or Ctrl-C, with all steps taken on disk, and UserError
    while another process writes the same.
    """
    pictures = opening(images, "images", "ingest")
    if "bucket_step" in pictures.config:
        raise UserError(
            f"{images}: has aspect buckets, first-stage learns from squares; run `ldm ingest` with "
            "ingest.bucket_step null and another --out and --runs: what was fetched for one is of "
            "no use to the other, and leaves --runs"
        )
    device = device_of()
    keep_memory(device)
    config = settled_first_stage(config, device)
    given = Given.by(config, device)
    inputs = {"images": pictures.digest, **given.digests()}
    settings = settings_of_result(config)
    deciding = code.digests(*DECIDING, "first_stage")
    identity: Identity = {"config": settings, "inputs": inputs, "code": deciding}
    if resume is not None:
        identity = continued(
            identity, resume, changed=changed, section="first_stage", parts=_parts(config)
        )
        _expect_same_networks(resume, identity)
    folder = folder_of(runs, identity, "first-stage-")
    training, held_out = (Split(pictures, split) for split in SPLITS)
    _expect_patches(config, side_of(training))
    with (
        held(folder / LOCK, f"{folder}: another process trains it; wait for it, or stop it"),
        making(out, "first-stage") as write,
        Live(registry, folder, settings, "first-stage") if registry else nullcontext() as live,
        plain_attention(device),
    ):
        describe(folder, identity)
        how = {name: getattr(config, name) for name in HOW}
        run = Run(folder, **how, earlier=resume, keys=training.keys, live=live)
        parts = _train(config, training, held_out, run, device, given)
        measured, sheet = measure(parts, held_out, run, device)
        counts = {"train": len(training)}
        with write(config=settings, inputs=inputs, counts=counts) as fresh:
            save(parts, given, fresh)
            write_json(fresh / "measured.json", measured)
            write_whole(fresh / f"{SHEETS}.png", encode_png(sheet))
            write_whole(fresh / LOG, _logs(run))
        if live:
            live.write({"part": "held_out", "step": 0, **measured})
            live.picture(out / f"{SHEETS}.png", SHEETS)
            live.finish(opening(out, "first-stage", "first-stage").digest)
    found = measured.get("clip_retrieval")
    clip = "" if found is None else f", CLIP finds {found:.0%} among {CANDIDATES}"
    say(f"first-stage: VAE {measured['vae_psnr_db']} dB{clip} -> {out}")


def settled_first_stage(config: FirstStage, device: torch.device) -> FirstStage:
    """The same settings with the precision that the device gives ``auto``.

    And with the versions behind aliases, so that the same command goes on with them.
    """
    computed = {
        part: one.model_copy(update={"compute": precision_of(one.compute, device)})
        for part, one in ((part, getattr(config, part)) for part in PARTS)
    }
    computed["vae"] = computed["vae"].model_copy(update={"init": fixed(config.vae.init)})
    text_encoder = config.text_encoder and fixed(config.text_encoder)
    return config.model_copy(update={**computed, "text_encoder": text_encoder})


def settings_of_result(config: FirstStage) -> dict[str, Any]:
    """The settings that decide the result; how often to save and what to show do not."""
    unused = ("clip", "layout") if config.text_encoder else ()
    left_out = {*HOW, "track", *unused}
    return {key: value for key, value in config.as_dict().items() if key not in left_out}


def _expect_patches(config: FirstStage, side: int) -> None:
    """UserError before the VAE is trained, rather than behind it."""
    if not config.text_encoder and config.clip.patch_size > side:
        raise UserError(
            f"first_stage.clip.patch_size {config.clip.patch_size}: is more than the {side} pixels "
            "of the pictures' sides; lower it"
        )


def _expect_same_networks(earlier: Path, identity: Identity) -> None:
    """What a run of other networks learned is of no use, and a new tokenizer's numbers mean others.

    UserError before the first part is trained, rather than behind it.
    """
    known = identity_of(earlier)
    old, new = (dict(flat(one["config"])) for one in (known, identity))
    for name in sorted(old.keys() & new.keys()):
        if name.rpartition(".")[2] in NETWORK and old.get(name) != new.get(name):
            raise UserError(
                f"{earlier}: trained another network (first_stage.{name} {old.get(name)}); set "
                "that back, or leave out --resume"
            )
    if known["inputs"]["images"] != identity["inputs"]["images"] and "clip.steps" in new:
        raise UserError(
            f"{earlier}: learned its words from other captions; leave out --resume, or name whose "
            "words to keep in first_stage.text_encoder"
        )


def _train(
    config: FirstStage,
    training: Split,
    held_out: Split,
    run: Run,
    device: torch.device,
    given: Given,
) -> Parts:
    """One part after another; those that were finished before come from their last checkpoint."""
    vae = train_vae(config.vae, training, held_out, device, run, start=given.vae, tower=given.tower)
    if given.text:
        return Parts(vae, *given.text)
    captions = training.captions
    tokenizer = train_tokenizer(config.clip, captions)
    clip = train_clip(
        config.clip, tokenizer, training.pictures, captions, side_of(training), device, run
    )
    text_encoder, reader = text_encoder_of(clip), None
    if config.layout.steps:
        latents = latents_of(vae, training.pictures, len(captions))
        run = _learning_from(config, run)
        reader = train_layout(
            config.layout, text_encoder, tokenizer, latents, captions, device, run
        )
    return Parts(vae, tokenizer, text_encoder, clip, reader)


def _parts(config: FirstStage) -> tuple[str, ...]:
    """Those that are trained."""
    return PARTS[:1] if config.text_encoder else PARTS if config.layout.steps else PARTS[:2]


def _learning_from(config: FirstStage, run: Run) -> Run:
    """The run of what learns from VAE and CLIP: where these go on, that begins anew."""
    if run.earlier is None:
        return run
    known, now = identity_of(run.earlier)["config"], settings_of_result(config)
    same = all(digest_json(known[part]) == digest_json(now[part]) for part in ("vae", "clip"))
    return run if same else replace(run, earlier=None)


def _logs(run: Run) -> bytes:
    """The lines of all parts that were trained, in turn."""
    logs = (run.folder / part / LOG for part in PARTS)
    return b"".join(log.read_bytes() for log in logs if log.is_file())
