#!/usr/bin/env bash
# Makes the embedded pipeline ldm/pretrained/tiny anew, by the project's own stages: from a list of
# URL pairs of the known world to VAE, CLIP and UNet, and that trained on with a second list. Hours
# on two CPU cores, minutes on a GPU.
# Run again after an interruption it goes on: finished folders are kept, training resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=artifacts/tiny
params=tiny-scratch
stage() { [[ -f "$work/$1/manifest.json" ]] || "${@:2}" --params "$params" --out "$work/$1"; }

mkdir -p "$work/data" "$work/polish/data"
ldm scenes --params "$params" --out "$work/data"
stage images ldm ingest --data "$work/data"
stage first-stage ldm first-stage --images "$work/images" --runs "$work/runs"
stage latents ldm encode --images "$work/images" --runs "$work/runs"
stage model ldm train --latents "$work/latents" --runs "$work/runs"

params=tiny-polish
ldm scenes --params "$params" --out "$work/polish/data"
stage polish/images ldm ingest --data "$work/polish/data"
stage polish/latents ldm encode --images "$work/polish/images" --runs "$work/polish/runs"
stage polish/model ldm train --latents "$work/polish/latents" --runs "$work/polish/runs"
python -m ldm.pretrained "$work/first-stage" "$work/model" "$work/polish/model"
