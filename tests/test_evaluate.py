"""What a model is held against: what its training started from, on prompts that can be judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ldm.config import Encode, Evaluate, EvaluationSampling, Pretrained, Registry, Train
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.evaluate import evaluate
from ldm.evaluation_prompts import lines_of, read_prompts
from ldm.grid import BAD as BAD_FRAME
from ldm.grid import CELL, GAP, GOOD, TEXT
from ldm.images import decode_image
from ldm.models import Source
from ldm.params import load_params
from ldm.pipeline import load_unet
from ldm.registry.promotion import promote
from ldm.registry.register import register
from ldm.report.stage import report
from ldm.sampling import Painter, Request
from ldm.scenes.lists import prompts
from ldm.tracking.connection import TRACKING_URI
from ldm.train.stage import train
from tests.test_report import write_images

SAMPLING = EvaluationSampling(steps=2, seed=5)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts(1)))
    return path


def trained(pipeline: Path, latents: Path, folder: Path, **settings: object) -> Path:
    short = {"steps": 2, "batch_size": 4, "mixed_precision": "no"}
    config = Train.model_validate({**short, **settings})
    train(config, Pretrained(pipeline=str(pipeline)), latents, folder / "model", folder / "runs")
    return folder / "model"


def evaluated(pipeline: Path, model: Path, prompts_file: Path) -> Path:
    config = Evaluate(sampling=SAMPLING)
    pretrained = Pretrained(pipeline=str(pipeline), clip=str(pipeline / "clip"))
    evaluate(config, pretrained, model, prompts_file, model.parent / "eval")
    return model.parent / "eval"


@pytest.mark.parametrize("settings", [{}, {"text_learning_rate": 1e-2}])
def test_the_start_is_the_one_of_the_training(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path, settings: dict[str, float]
) -> None:
    """Started from a model of one's own, not from the pretrained one."""
    first = trained(pipeline, latents, tmp_path / "first", learning_rate=1e-2)
    second = trained(pipeline, latents, tmp_path / "second", init=str(first), **settings)
    folder = evaluated(pipeline, second, prompts_file)
    asked = [json.loads(line)["prompt"] for line in prompts_file.read_text().splitlines()]
    requests = [Request(prompt, 5 + number) for number, prompt in enumerate(asked)]
    for model, name in ((first, "start"), (second, "model")):
        drawn = Painter.load(Source(str(model))).draw(requests, SAMPLING)
        for number, picture in enumerate(drawn):
            stored = decode_image((folder / name / f"{number:03d}.png").read_bytes())
            assert np.array_equal(picture, stored)


def test_a_start_from_random_weights_is_drawn_too(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path
) -> None:
    shape = {"widths": [16, 16], "head_width": 8, "norm_groups": 4}
    model = trained(pipeline, latents, tmp_path, init="random", unet=shape, seed=3)
    metrics = json.loads((evaluated(pipeline, model, prompts_file) / "metrics.json").read_text())
    assert metrics["start"].keys() == metrics.keys() - {"start", "val_loss"}


def test_a_start_that_has_changed_is_refused(
    pipeline: Path, latents: Path, tmp_path: Path, prompts_file: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(pipeline, own)
    model = trained(own, latents, tmp_path)
    path = own / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    assert load_unet(Source(str(own)))
    with pytest.raises(UserError, match=r"train\.init 'pretrained' is now; run `ldm train` again"):
        evaluated(own, model, prompts_file)
    assert not (tmp_path / "eval").exists()


# --- prompts

(SCENE,) = [prompt["scene"] for prompt in prompts(1) if prompt["group"] == "known"]
FORM = 'write one JSON object a line: {"prompt": "..."}'
BAD = {
    "": f"is no JSON object; {FORM}",
    "a cat": f"is no JSON object; {FORM}",
    '"a cat"': f"is no JSON object; {FORM}",
    '{"prompt": 5}': f"has no text as its prompt; {FORM}",
    '{"prompt": " "}': f"has no text as its prompt; {FORM}",
    '{"prompt": "a \\ud83d"}': f"has no text as its prompt; {FORM}",
    '{"group": "new"}': f"has no text as its prompt; {FORM}",
    '{"prompt": "a", "seed": 1}': "'seed' is none of prompt, group, english, scene; take it out",
    '{"prompt": "a", "group": "cats"}': "group 'cats' is none of known, new, heldout; take it out",
    '{"prompt": "a", "group": []}': "group [] is none of known, new, heldout; take it out",
    '{"prompt": "a", "english": 5}': "english is no text; take it out, or write",
}
NO_SCENES: list[object] = [
    5,
    {},
    {"colour": "red"},
    {**SCENE, "background": "mauve"},
    {**SCENE, "first": {"shape": "cat", "colour": "red"}},
    {**SCENE, "first": {"shape": ["ring"], "colour": "red"}},
    {**SCENE, "count": "2"},
    {**SCENE, "size": "huge"},
    {**SCENE, "relation": "above"},
    {**SCENE, "relation": "beside", "second": SCENE["first"]},
    {**SCENE, "relation": "above", "second": SCENE["first"], "count": 2},
]
BAD |= {
    json.dumps({"prompt": "a", "scene": scene}): "scene is none that can be judged; take it out"
    for scene in NO_SCENES
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_prompt_is_told_before_the_model_is_opened(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a cat"}}\n{line}\n{{"prompt": "a dog"}}\n')
    with pytest.raises(UserError) as caught:
        evaluate(Evaluate(), Pretrained(), tmp_path / "none", path, tmp_path / "eval")
    assert str(caught.value).startswith(f"{path}:2: {BAD[line]}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", f"is empty; {FORM}"),
        (b" \n\n", f"is empty; {FORM}"),
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(path, 0)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_nothing_but_a_newline_ends_a_line(tmp_path: Path) -> None:
    told = ["a\u2028b", "c\u0085d", "e"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in told]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\n\n")
    found = read_prompts(path, 3)
    assert [prompt.prompt for prompt in found] == told
    assert [prompt.seed for prompt in found] == [3, 4, 5]


def test_scenes_for_a_model_of_another_size_are_told_before_it_draws(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    prompts_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = shutil.copytree(pipeline, tmp_path / "own")
    settings = json.loads((own / "unet" / "config.json").read_text())
    (own / "unet" / "config.json").write_text(json.dumps({**settings, "sample_size": 4}))
    model = trained(own, latents, tmp_path)
    plain = json.dumps({"prompt": "a cat"})
    prompts_file.write_text(f"{plain}\n{prompts_file.read_text()}")
    words = "prompts.jsonl:2: has a scene, which is read from 64 pixels, and the model draws 32;"
    with pytest.raises(UserError, match=words):
        evaluated(own, model, prompts_file)
    assert "evaluate model" not in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()
    prompts_file.write_text(plain)
    evaluated(own, model, prompts_file)


# --- prompts of one's own, which are no scenes


def test_prompts_of_ones_own_go_all_the_way(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn, registered, promoted by the preset's gate and reported."""
    monkeypatch.delenv(TRACKING_URI, raising=False)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", {"train": 8, "validation": 4}, ())
    source = Pretrained(pipeline=str(pipeline))
    encode(Encode(batch_size=4), source, tmp_path / "images", tmp_path / "latents", tmp_path)
    model = trained(pipeline, tmp_path / "latents", tmp_path)
    told = ["a cat", "a dog\u2028in the snow", "\u96ea\u5730\u91cc\u7684\u72d7", *"abcdefghij"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in told))
    folder = evaluated(pipeline, model, path)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics.keys(), metrics["start"].keys()) == (
        {"clip_score", "val_loss", "start"},
        {"clip_score"},
    )
    assert len(lines_of(folder / "samples.jsonl")) == len(told)
    sheet = decode_image((folder / "samples.png").read_bytes())
    assert sheet.shape == (2 * (CELL + TEXT + GAP) + GAP, 8 * (CELL + GAP) + GAP, 3)
    for colour in (GOOD, BAD_FRAME):
        assert not (sheet == colour).all(axis=2).any()  # None was judged.

    registry = load_params("sd14", []).registry
    register(registry, model, folder)
    with pytest.raises(UserError, match="has no metric 'adherence_new'"):
        promote(Registry())
    assert promote(registry).promoted
    report(registry, tmp_path / "images", tmp_path / "latents", model, folder, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "what the starting model was made from" not in page  # Nothing is known of its group.
    now, before = (f"{figures['clip_score']:.4g}" for figures in (metrics, metrics["start"]))
    assert f"the first there is; against its start, CLIP score {before}" in page
    assert f"<b>{now}</b>" in page
    for text in told:
        assert f">{text}</span>" in page
