#!/usr/bin/env bash
# Makes the embedded pipeline ldm/pretrained/tiny anew, by the project's own stages: from a list of
# URL pairs of the known world to VAE, CLIP and UNet. Hours on two CPU cores, minutes on a GPU.
# Run again after an interruption it goes on: finished folders are kept, training resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=artifacts/tiny
stage() { [[ -f "$work/$1/manifest.json" ]] || "${@:2}" --params tiny-scratch --out "$work/$1"; }

mkdir -p "$work/data"
ldm scenes --params tiny-scratch --out "$work/data"
stage images ldm ingest --data "$work/data"
stage first-stage ldm first-stage --images "$work/images" --runs "$work/runs"
stage latents ldm encode --images "$work/images" --runs "$work/runs"
stage model ldm train --latents "$work/latents" --runs "$work/runs"
python -m ldm.pretrained "$work/model" "$work/first-stage"
