#!/usr/bin/env bash
# Makes the embedded pipeline ldm/pretrained/tiny anew, by the project's own stages: from a list of
# URL pairs of the known world to VAE, CLIP and UNet. Hours on two CPU cores, minutes on a GPU.
# Run again after an interruption it goes on: finished folders are kept, training resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=artifacts/tiny
stage() { [[ -f "$work/$1/manifest.json" ]] || "${@:2}"; }

mkdir -p "$work"
ldm scenes --params tiny-scratch --out "$work/data"
stage images ldm ingest --params tiny-scratch --data "$work/data" --out "$work/images"
stage first-stage ldm first-stage --params tiny-scratch --images "$work/images" --out "$work/first-stage"
stage latents ldm encode --params tiny-scratch --images "$work/images" --out "$work/latents"
stage model ldm train --params tiny-scratch --latents "$work/latents" --out "$work/model" --runs "$work/runs"
python -m ldm.pretrained "$work/model" "$work/first-stage"
