from __future__ import annotations

import base64
import html
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import ldm.evaluate as evaluation_stage
import ldm.report.stage
from ldm.artifacts import opening, write_json, write_whole, writing
from ldm.config import Evaluate, Gate, Ingest, Registry, Train, VaeTraining
from ldm.encode.encoders import posterior_moments
from ldm.errors import UserError
from ldm.evaluate import Judged
from ldm.evaluation_prompts import GROUPS, Prompt
from ldm.first_stage.vae import build_vae, reconstruct
from ldm.images import decode_image, encode_png, psnr
from ldm.ingest.report import report as ingest_report
from ldm.ingest.report import write_skipped
from ldm.ingest.rows import Row, Skip
from ldm.latents import ABOUT, MOMENTS, text_key, to_npy
from ldm.registry.gate import Decision, judge
from ldm.registry.gate import verdict as gate_verdict
from ldm.registry.standing import Standing
from ldm.report.chart import WIDTHS, Curves, charts, smooth, ticks
from ldm.report.stage import read_curves, report
from ldm.report.verdict import SHARES, change, comparison, figure, percent
from ldm.scenes.lists import prompts as scene_prompts
from ldm.scenes.lists import read_description, scene_of
from ldm.scenes.reader import mismatch, read_scene
from ldm.scenes.render import draw
from ldm.scenes.world import lay_out
from ldm.shards import writing_shard

CPU = torch.device("cpu")
EVIL = """<script>alert("x")</script> & 'more'"""
EVIL_FAULT = "<b>2</b> objects & no <img src=x onerror=alert(1)>"
SIZES = {"train": 6, "validation": 12}
ARTIFACTS = ("images", "latents", "model", "eval")


# --- artifacts as the stages write them -----------------------------------------------------------


def write_images(out: Path, sizes: dict[str, int], skips: Sequence[Skip]) -> None:
    config = Ingest().as_dict()
    reasons = {split: Counter({"": count}) for split, count in sizes.items()}
    for skip in skips:
        reasons[skip.row.split][skip.reason] += 1
    inputs = {"train.csv": "a1" * 32, "validation.csv": "b2" * 32}
    with writing(out, "images", config=config, inputs=inputs, counts=dict(sizes)) as fresh:
        for split, count in sizes.items():
            with writing_shard(fresh / f"{split}-00000.tar") as append:
                for row in range(count):
                    picture = encode_png(draw(scene_of("retrain", split, row)[1]))
                    about = json.dumps({"caption": f"{split} {row} {EVIL}"}).encode()
                    append(f"{row:08d}", {"png": picture, "json": about})
        write_json(fresh / "report.json", ingest_report(reasons))
        write_skipped(fresh / "skipped.csv", skips)


def write_latents(out: Path, images: Path, vae: AutoencoderKL, sizes: dict[str, int]) -> None:
    config = {
        "compute": "float32",
        "storage": "float32",
        "scaling_factor": 0.5,
        "shift_factor": 0.0,
    }
    inputs = {"images": opening(images, "images", "ingest").digest, "vae": "c3" * 32}
    with writing(out, "latents", config=config, inputs=inputs, counts=dict(sizes)) as fresh:
        for split, count in sizes.items():
            pixels = np.stack([draw(scene_of("retrain", split, row)[1]) for row in range(count)])
            with writing_shard(fresh / f"{split}-00000.tar") as append:
                for row, moments in enumerate(posterior_moments(vae, pixels, CPU)):
                    about = json.dumps({"caption": "", "text": text_key("")}).encode()
                    append(f"{row:08d}", {MOMENTS: to_npy(moments), ABOUT: about})


def write_model(
    out: Path, latents: Path, vae: AutoencoderKL, log: Sequence[dict[str, Any]]
) -> None:
    inputs = {"latents": opening(latents, "latents", "encode").digest, "start": "d4" * 32}
    counts = {"steps": 1200, "samples": 76800}
    with writing(out, "model", config=Train().as_dict(), inputs=inputs, counts=counts) as fresh:
        vae.save_pretrained(fresh / "vae")
        lines = "".join(f"{json.dumps(line)}\n" for line in log)
        write_whole(fresh / "log.jsonl", lines.encode())


def write_eval(
    out: Path, model: Path, prompts: Sequence[Prompt], now: Judged, before: Judged
) -> dict[str, Any]:
    metrics = {
        **now.adherence(prompts),
        "clip_score": 27.125,
        "val_loss": 0.1375,
        "start": {**before.adherence(prompts), "clip_score": 24.5},
    }
    inputs = {
        "model": opening(model, "model", "train").digest,
        "prompts": "e5" * 32,
        "clip": "c1" * 32,
    }
    counts = {"prompts": len(prompts)}
    config = Evaluate().as_dict()
    with writing(out, "eval", config=config, inputs=inputs, counts=counts) as fresh:
        write_json(fresh / "metrics.json", metrics)
        evaluation_stage._write_samples(fresh, prompts, now, before)
    return metrics


def training_log(steps: int = 1200) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    log: list[dict[str, Any]] = []
    for step in range(20, steps + 1, 20):
        loss = 0.14 + 0.12 * np.exp(-step / 250) + 0.012 * rng.standard_normal()
        rate = 1e-3 * min(step / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        log.append({"step": step, "loss": round(float(loss), 6), "lr": float(rate)})
        if step % 300 == 0:
            log.append({"step": step, "val_loss": round(0.13 + 0.1 * np.exp(-step / 300), 6)})
    return log


def some_prompts(a_group: int) -> list[Prompt]:
    return [Prompt(**prompt, seed=at) for at, prompt in enumerate(scene_prompts(a_group))]


def drawn(prompts: Sequence[Prompt], right: dict[str, float], seed: int) -> Judged:
    """Pictures of the prompts, or of others', judged by the scene reader."""
    rng = random.Random(seed)
    pictures = []
    for prompt in prompts:
        shown = prompt if rng.random() < right[prompt.group] else rng.choice(prompts)
        pictures.append(draw(lay_out(read_description(shown.scene), rng)))
    faults = [
        mismatch(read_scene(picture), read_description(prompt.scene))
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    return Judged(np.stack(pictures), faults)


def some_skips() -> list[Skip]:
    reasons = {"http 404": 3, "not an image": 2, "empty caption": 1}
    return [
        Skip(Row("train", 100 + 10 * len(reason) + at, "http://127.0.0.1:8964/x.png", ""), reason)
        for reason, count in reasons.items()
        for at in range(count)
    ]


@dataclass(frozen=True)
class Fixture:
    root: Path
    prompts: list[Prompt]
    now: Judged
    before: Judged
    metrics: dict[str, Any]

    def report(self, out: Path, registry: Registry | None = None) -> str:
        paths = (self.root / name for name in ARTIFACTS)
        report(registry or Registry(tracking_uri=f"sqlite:///{out}.db"), *paths, out)
        return (out / "index.html").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    root = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    vae = build_vae(VaeTraining(widths=(8, 8), norm_groups=4), 64).eval()
    prompts = some_prompts(5)
    prompts[1] = Prompt(**{**asdict(prompts[1]), "prompt": EVIL, "english": "evil"})
    now = drawn(prompts, {"known": 0.9, "new": 0.7, "heldout": 0.5}, 1)
    before = drawn(prompts, {"known": 0.9, "new": 0.0, "heldout": 0.3}, 2)
    now.faults[1] = EVIL_FAULT
    write_images(root / "images", SIZES, some_skips())
    write_latents(root / "latents", root / "images", vae, SIZES)
    write_model(root / "model", root / "latents", vae, training_log())
    metrics = write_eval(root / "eval", root / "model", prompts, now, before)
    return Fixture(root, prompts, now, before, metrics)


@pytest.fixture(scope="module")
def page(made: Fixture, tmp_path_factory: pytest.TempPathFactory) -> str:
    return made.report(tmp_path_factory.mktemp("out") / "report")


class Tags(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def words(page: str) -> str:
    """The page's text with single spaces, also where only a tag parts it."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


# --- the page -------------------------------------------------------------------------------------


def test_the_page_loads_nothing(page: str) -> None:
    tags = Tags(page).tags
    assert {"script", "iframe", "object", "embed", "base"}.isdisjoint(tag for tag, _ in tags)
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "action", "xlink:href", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert re.findall(r"url\((?!#)|@import", page) == []
    (policy,) = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_local_references_have_their_target(page: str) -> None:
    tags = Tags(page).tags
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(names) == len(set(names))
    wanted = {a["href"] for _, a in tags if (a.get("href") or "").startswith("#")}
    wanted |= set(re.findall(r"url\((#[^)]*)\)", page))
    assert wanted <= {f"#{name}" for name in names}


def test_every_prompt_gloss_and_fault_is_there_and_inert(made: Fixture, page: str) -> None:
    assert "<script" not in page
    assert "<img src=x" not in page
    text = Tags(page).text
    for prompt, fault in zip(made.prompts, made.now.faults, strict=True):
        assert prompt.prompt in text
        assert fault is None or fault in text
        assert prompt.prompt.isascii() or prompt.english in text
    for fault in made.before.faults:
        assert fault is None or f'title="{html.escape(fault, quote=False)}"' in page


def test_every_picture_is_there_to_the_pixel(made: Fixture, page: str) -> None:
    images = [a for tag, a in Tags(page).tags if tag == "img" and "small" not in (a["class"] or "")]
    pixels = [decode_image(base64.b64decode((a["src"] or "").split(",")[1])) for a in images]
    pairs = list(zip(pixels[0::2], pixels[1::2], strict=True))
    for (now, before), mine, earlier in zip(
        pairs, made.now.pixels, made.before.pixels, strict=False
    ):
        assert np.array_equal(now, mine)
        assert np.array_equal(before, earlier)
    assert len(pairs) == len(made.prompts) + 8


def test_figures_are_those_of_metrics_json(made: Fixture, page: str) -> None:
    text = words(page)
    for metric, name in (
        ("adherence", "Known"),
        ("adherence_new", "New"),
        ("adherence_heldout", "Held out"),
    ):
        before, now = made.metrics["start"][metric], made.metrics[metric]
        change_told = change(now - before, True)
        assert f"{100 * now:.0f} % {change_told} from {100 * before:.0f}%" in text
        assert f"{before:.1%} {now:.1%} {change_told}" in text
        assert f"{name} " in text
    assert "24.5 27.12 +2.62" in text
    assert "0.1375" in text


def test_reconstructions_come_from_the_cached_mean(made: Fixture, page: str) -> None:
    vae = AutoencoderKL.from_pretrained(made.root / "model" / "vae")
    pixels = np.stack([draw(scene_of("retrain", "validation", row)[1]) for row in range(12)])
    quality = psnr(pixels, reconstruct(vae, pixels, CPU))
    text = Tags(page).text
    assert f"{quality.mean():.1f} dB over 12 pictures" in words(page)
    for one in quality[:8]:
        assert f"{one:.1f} dB" in text


def test_ingest_counts_and_the_skipped_rows(page: str, tmp_path: Path) -> None:
    parsed = Tags(page)
    text = words(page)
    assert "24 rows" in text
    assert "18 kept" in text
    assert "6 skipped" in text
    assert "http 404 3 not an image 2 empty caption 1" in text
    (link,) = [a for tag, a in parsed.tags if tag == "a" and a.get("download") == "skipped.csv"]
    content = base64.b64decode((link["href"] or "").split(",")[1]).decode()
    write_skipped(tmp_path / "skipped.csv", some_skips())
    assert content == (tmp_path / "skipped.csv").read_text()


def test_lineage_names_every_digest(made: Fixture, page: str) -> None:
    kinds = {"images": "images", "latents": "latents", "model": "model", "eval": "eval"}
    for name, kind in kinds.items():
        manifest = opening(made.root / name, kind, "x")
        assert f'<code title="{manifest.digest}">{manifest.digest[:12]}</code>' in page
        assert all(digest in page for digest in manifest.inputs.values())
    assert "learning_rate" in page


def test_without_a_registry_nothing_is_asked_and_no_database_made(
    made: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    page = made.report(tmp_path / "report", Registry())
    assert "not registered" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [".report.lock", "report"]


def test_same_artifacts_give_the_same_page(made: Fixture, page: str, tmp_path: Path) -> None:
    assert made.report(tmp_path / "report") == page
    digests = opening(tmp_path / "report", "report", "report").inputs
    assert digests == {name: opening(made.root / name, name, "x").digest for name in ARTIFACTS}


@pytest.mark.parametrize("missing", ARTIFACTS)
def test_a_missing_artifact_names_its_stage(made: Fixture, tmp_path: Path, missing: str) -> None:
    paths = [made.root / name if name != missing else tmp_path / name for name in ARTIFACTS]
    stage = {"images": "ingest", "latents": "encode", "model": "train", "eval": "evaluate"}[missing]
    with pytest.raises(UserError, match=f"{missing}: no such directory; run `ldm {stage}`"):
        report(Registry(), *paths, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_artifacts_of_different_runs_are_refused(made: Fixture, tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": 1, "validation": 1}, ())
    paths = [tmp_path / "images", *(made.root / name for name in ARTIFACTS[1:])]
    with pytest.raises(UserError, match="latents: was made from another images than"):
        report(Registry(), *paths, tmp_path / "report")


# --- what the registry says -----------------------------------------------------------------------


REFERENCE = {"adherence": 0.8, "adherence_new": 0.2, "adherence_heldout": 0.25, "clip_score": 26.0}


def standing(decision: Decision | None, *aliases: str) -> Standing:
    reference = REFERENCE if decision and decision.against != "start" else None
    return Standing("ldm", "3", "0f1e2d3c4b5a", aliases, "8cd4cc2a", decision, reference)


def decision(metrics: dict[str, Any], against: str = "version 2") -> Decision:
    rows = judge(Gate(), metrics, REFERENCE, against)
    return Decision("ldm", "3", against, rows, *gate_verdict(rows, against))


@pytest.fixture
def known(made: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's text, with a registry that says this of the model."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # what an earlier test connected to
    database = tmp_path / "mlflow.db"
    database.touch()

    def text(answer: Standing | None) -> str:
        asked = []

        def stub(config: Registry, digest: str) -> Standing | None:
            asked.append(digest)
            return answer

        monkeypatch.setattr(ldm.report.stage, "standing", stub)
        page = made.report(tmp_path / "report", Registry(tracking_uri=f"sqlite:///{database}"))
        assert asked == [opening(made.root / "model", "model", "train").digest]
        return words(page)

    return text


@pytest.mark.parametrize(
    ("alias", "claim"), [("champion", "is champion"), ("previous", "was champion for a time")]
)
def test_headline_of_a_promotion(made: Fixture, known: Any, alias: str, claim: str) -> None:
    text = known(standing(decision(made.metrics), alias))
    headline = f"promoted Training report ldm version 3 {claim}: new and held out on average 23% → "
    assert headline in text
    assert f"aliases {alias} MLflow run 0f1e2d3c4b5a code commit 8cd4cc2a" in text


def test_headline_of_a_refusal_is_the_failed_rule(made: Fixture, known: Any) -> None:
    text = known(standing(decision({**made.metrics, "adherence": 0.5}), "challenger"))
    assert (
        "not promoted Training report ldm version 3 is not promoted: "
        "known 80% → 50% (may fall by 3 pt at most)"
    ) in text


def test_headline_of_a_refusal_keeps_the_rule_that_another_metric_kept(
    made: Fixture, known: Any
) -> None:
    gate = Gate(holds=("adherence", "adherence_heldout"))
    rows = judge(gate, {**made.metrics, "adherence": 0.5}, REFERENCE, "version 2")
    refused = Decision("ldm", "3", "version 2", rows, *gate_verdict(rows, "version 2"))
    assert "known 80% → 50% (may fall by 3 pt at most)" in known(standing(refused, "challenger"))


def test_headline_and_rule_of_a_gate_on_clip_alone(made: Fixture, known: Any) -> None:
    gate = Gate(wins_on=("clip_score",), min_gain=0.5, holds=())
    rows = judge(gate, made.metrics, REFERENCE, "version 2")
    promoted = Decision("ldm", "3", "version 2", rows, *gate_verdict(rows, "version 2"))
    text = known(standing(promoted, "champion"))
    assert "ldm version 3 is champion: CLIP score 26 → 27.12 " in text
    assert "24.5 26 27.12 +1.12 must change by +0.5 at least" in text


def test_comparison_with_the_former_champion(made: Fixture, known: Any) -> None:
    text = known(standing(decision(made.metrics), "champion"))
    assert "Metrics against version 2" in text
    new, held_out = "adherence_new", "adherence_heldout"
    mean, start = (fmean((m[new], m[held_out])) for m in (made.metrics, made.metrics["start"]))
    row = f"{start:.1%} 22.5% {mean:.1%} {100 * (mean - 0.225):+.1f} pt must rise"
    assert f"Mean of new and held out what the gate looks at {row}" in text
    assert "24.5 26 27.12 +1.12 –" in text


def test_a_failed_rule_is_marked(made: Fixture) -> None:
    now = {**made.metrics, "adherence": 0.5}
    lines = {line.metric: line for line in comparison(now, standing(decision(now)), Gate())}
    assert lines["adherence"].passed is False
    assert lines["adherence"].mood == "bad"
    assert lines["adherence"].rule == "may fall by 3 pt at most"
    assert lines["adherence_new"].passed is None


def test_lower_validation_loss_is_better(made: Fixture) -> None:
    reference = {**REFERENCE, "val_loss": 0.2}
    lines = comparison(
        made.metrics, replace(standing(decision(made.metrics)), reference=reference), Gate()
    )
    (line,) = [line for line in lines if line.metric == "val_loss"]
    assert line.mood == "good"


def test_registered_but_not_judged(known: Any) -> None:
    text = known(standing(None, "challenger"))
    assert "ldm version 3 waits for the gate: against its start, known" in text
    assert "has not judged this version yet" in text


def test_first_version_is_compared_with_its_start(made: Fixture, known: Any) -> None:
    text = known(standing(decision(made.metrics, "start"), "champion"))
    assert "ldm version 3 is champion: the first there is; against its start, known" in text
    assert "The first version always passes." in text
    assert "Metrics against the starting model" in text


def test_registry_without_this_model(known: Any) -> None:
    assert "Not registered yet: against its start, known" in known(None)


# --- the open world: no scenes to hold pictures against -------------------------------------------


def test_prompts_without_scenes_are_shown_but_not_judged(made: Fixture, tmp_path: Path) -> None:
    prompts = [Prompt("a dog in the snow", 0), Prompt("雪地里的狗", 1)]
    nothing = Judged(made.now.pixels[:2], [None, None])
    write_eval(tmp_path / "eval", made.root / "model", prompts, nothing, nothing)
    paths = [made.root / name for name in ARTIFACTS[:3]]
    report(Registry(tracking_uri="sqlite:///none.db"), *paths, tmp_path / "eval", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    text = words(page)
    assert "Not registered yet: against its start, CLIP score 24.5 → 27.12" in text
    assert "a dog in the snow" in text
    assert "雪地里的狗" in text
    assert "none is judged" in text
    assert "as asked" not in page
    assert "Newly right" not in text


def test_every_group_of_prompts_has_its_words() -> None:
    assert SHARES.keys() == set(GROUPS.values())


# --- curves ---------------------------------------------------------------------------------------


def test_ticks_are_round_and_few() -> None:
    assert ticks(0, 1200, 9) == [0, 200, 400, 600, 800, 1000, 1200]
    assert ticks(0.12, 0.27, 6) == [0.15, 0.2, 0.25]
    assert ticks(0, 0.001, 3) == [0, 0.0005, 0.001]
    for most in (2, 3, 5, 9):
        for low, high in ((0.0, 1.0), (0.137, 0.1371), (3.0, 9e5), (5.0, 5.0)):
            assert len(ticks(low, high, most)) <= most + 1


def test_smoothing_keeps_a_line_and_the_mean_of_noise() -> None:
    assert smooth([1.0, 1.0, 1.0], 3) == [1.0, 1.0, 1.0]
    assert smooth([0.0, 3.0, 0.0], 3) == [1.5, 1.0, 1.5]
    assert smooth([], 3) == []


def test_curves_leave_out_what_is_no_number(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": NaN, "lr": 0.1}',
        '{"step": 2, "loss": 0.5, "lr": 0.1}',
        '{"step": 2, "val_loss": Infinity}',
        '{"step": 3, "val_loss": 0.4}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path / "log.jsonl") == Curves([2], [0.5], [0.1], [(3, 0.4)])


@pytest.mark.parametrize("width", WIDTHS.values())
@pytest.mark.parametrize("points", [0, 1, 2, 30, 5000])
def test_charts_of_any_length_stay_small_and_inside(points: int, width: int) -> None:
    steps = list(range(20, 20 * points + 1, 20))
    curves = Curves(steps, [0.3] * points, [1e-3] * points, [(20 * points + 1, 0.2)])
    loss, rate = charts(curves, width)
    assert bool(rate) == bool(points)
    for chart in (loss, rate):
        assert len(chart) < 60_000
        assert "nan" not in chart
        assert "inf" not in chart
        for x, y in re.findall(
            r"([\d.-]+),([\d.-]+)", "".join(re.findall(r'points="[^"]*"', chart))
        ):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= 300


# --- numbers --------------------------------------------------------------------------------------


def test_numbers_in_words() -> None:
    assert [percent(value) for value in (0, 0.125, 0.575, 1)] == ["0%", "13%", "58%", "100%"]
    assert percent(0.6625, 1) == "66.3%"
    assert figure(None, True) == figure(None, False) == change(None, True) == "–"
    assert [figure(0.6625, True), figure(27.125, False)] == ["66.3%", "27.12"]
    assert [change(0.6625, True), change(-0.0125, True), change(0.0, True)] == [
        "+66.3 pt",
        "−1.3 pt",
        "±0.0 pt",
    ]
    assert change(-2.0, False) == "−2"
