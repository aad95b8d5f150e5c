"""Settings: what is refused, and in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from ldm.cli import COMMANDS, main
from ldm.config import Params
from ldm.errors import UserError
from ldm.options import parser
from ldm.params import load_params, with_changes
from ldm.presets import presets

ROOT = Path(__file__).resolve().parent.parent
SHOP = ["--set", "registry.model=shop", "--set", "registry.tracking_uri=sqlite:///nowhere.db"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", r"train\.stepz: unknown key"),
        ("trian.steps=3", r"trian: unknown key"),
        ("train.steps=many", r"train\.steps: .*integer.*'many'"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1"),
        ("train.accumulation=7", r"train: batch_size 64 is not a multiple of accumulation 7"),
        ("train.seed=18446744073709551616", r"train\.seed: .*less than"),
        ("first_stage.vae.seed=-1", r"first_stage\.vae\.seed: .*greater than or equal to 0"),
        ("first_stage.vae.widths=[]", r"first_stage\.vae\.widths: .*at least 1"),
        ("first_stage.vae.norm_groups=5", r"first_stage\.vae: width 16 .* of norm_groups 5"),
        ("first_stage.clip.max_tokens=2", r"first_stage\.clip\.max_tokens: .*equal to 3"),
        ("first_stage.clip.heads=3", r"first_stage\.clip: width 128 is not a multiple of heads 3"),
        ("first_stage.layout.heads=3", r"first_stage: width 128 .* multiple of layout\.heads 3"),
        ("train.unet={widths: []}", r"train\.unet\.widths: .*at least 1"),
        ("train.unet={widths: [96, 100]}", r"train\.unet: width 100 .* multiple of head_width 32"),
        (
            "train.unet={widths: [32], norm_groups: 5}",
            r"train\.unet: width 32 is not a multiple of norm_groups 5: change either",
        ),
        ("ingest.bucket_step=12", r"ingest\.bucket_step: .*multiple of 8"),
        ("ingest.bucket_step=24", r"ingest: image_size 64 is not a multiple of bucket_step 24"),
        ("evaluate.sampling.sampler=ddpm3", r"evaluate\.sampling\.sampler: .*dpm\+\+"),
        ("train", r"--set train: must be section\.key=value"),
        ("train.steps=[1", r"--set train\.steps=\[1: the value is not YAML"),
    ],
)
def test_wrong_settings_are_one_line_that_names_the_key(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_params(str(ROOT / "params.yaml"), [override])
    assert "\n" not in str(caught.value)


def test_overrides_apply() -> None:
    params = load_params("tiny", ["train.steps=7", "evaluate.sampling.guidance=2"])
    assert (params.train.steps, params.evaluate.sampling.guidance) == (7, 2.0)


def test_an_empty_section_has_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("train:\nevaluate:\n  sampling:\n")
    assert load_params(str(tmp_path / "empty.yaml"), []) == Params()
    overrides = ["train.steps=5", "evaluate.sampling.steps=6", "train.lora.rank=7"]
    params = load_params(str(tmp_path / "empty.yaml"), overrides)
    assert params.train.steps == 5 and params.evaluate.sampling.steps == 6
    assert params.train.lora is not None and params.train.lora.rank == 7
    with pytest.raises(UserError, match=r"--set train\.steps\.a=5: steps is not a section"):
        load_params(str(tmp_path / "empty.yaml"), ["train.steps=5", "train.steps.a=5"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", r"broken\.yaml: is not UTF-8 \(.*\); save it as UTF-8"),
        (b"a: [", r"broken\.yaml: is not YAML"),
        (b"[]", r"broken\.yaml: must be lines of `key: value`, is a list"),
    ],
)
def test_what_is_no_params_file_is_said_in_one_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_params(str(tmp_path / "broken.yaml"), [])
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_section_does_not_repeat_it() -> None:
    with pytest.raises(UserError) as caught:
        load_params("tiny", ["train.accumulation=7"])
    assert str(caught.value).endswith("multiple of accumulation 7: change either")
    wrong = {"sampler": "ddpm", "implementation": "diffusers"}
    with pytest.raises(UserError, match=r"^generate: sampler ddpm: .*implementation ldm$"):
        with_changes(Params().generate, wrong, "generate")


def test_an_unquoted_no_means_no() -> None:
    assert load_params("tiny", ["train.mixed_precision=no"]).train.mixed_precision == "no"


def test_every_preset_is_valid_and_differs_only_where_it_says() -> None:
    assert {"tiny", "tiny-scratch", "sd14"} <= presets().keys()
    assert load_params("tiny", []) == Params()
    for name, path in presets().items():
        load_params(name, [])
        for section, values in (yaml.safe_load(path.read_text()) or {}).items():
            default = getattr(Params(), section)
            for key, value in values.items():
                if not isinstance(value, dict):
                    assert getattr(default, key) != value, f"{name}: {section}.{key} is the default"


def test_params_yaml_states_the_defaults() -> None:
    assert load_params(str(ROOT / "params.yaml"), []) == Params()


def test_a_missing_file_names_the_presets() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such params file.*sd14"):
        load_params("nowhere.yaml", [])


ONE_OF_EACH = [
    (["ingest", "--data", "nowhere"], "nowhere"),
    (["encode", "--images", "nowhere"], "nowhere: no such directory; run `ldm ingest`"),
    (["train", "--set", "train.accelerate=none.yaml"], "none.yaml: no such accelerate"),
    (["evaluate", "--data", "nowhere"], "nowhere/prompts.jsonl: no such file; write one JSON"),
    (["register", "--images", "no://a/b", "--set", "registry.modl=a"], "registry.modl: unk"),
    (["generate", "--prompt", "a", *SHOP], "models:/shop@champion: nowhere.db does not exist"),
    (["generate", "--model", "tiny", "--prompt", ""], "prompt 1: has no prompt"),
    (["generate", "--model", "tiny", "--prompt", "a", "--height", "60"], "height 60"),
]
"""In a process of its own, where what a command imports and loads may say something too."""


@pytest.fixture(scope="module")
def ended() -> list[subprocess.CompletedProcess[str]]:
    """They take seconds to start, so two at a time."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ldm.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, (arguments for arguments, _ in ONE_OF_EACH)))


@pytest.mark.parametrize("number", range(len(ONE_OF_EACH)), ids=[one[0][0] for one in ONE_OF_EACH])
def test_bad_input_is_one_line_and_a_failure(
    ended: list[subprocess.CompletedProcess[str]], number: int
) -> None:
    (arguments, words), done = ONE_OF_EACH[number], ended[number]
    assert done.returncode not in (0, 2)
    message = done.stderr.strip()
    assert message.startswith(f"ldm {arguments[0]}: ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "--images", "tests"], "tests: has no manifest.json"),
        (["generate", "--model", "tiny"], "no prompts: give --prompt"),
        (["generate", "--model", "tiny", "--prompt", "a", "--steps", "0"], "steps"),
        (["encode", "--params", "broken.yaml"], "broken.yaml: no such params file"),
    ],
)
def test_whatever_the_input_it_is_one_line(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "as it was before")  # A command sets its own.
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = ended.value.code  # A text is said on stderr, and the exit code is 1.
    assert isinstance(message, str) and "\n" not in message
    assert message.startswith(f"ldm {arguments[0]}: ") and words in message
    assert capfd.readouterr().err == ""


def test_help_names_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["encode", "--help"])
    told = "".join(capsys.readouterr().out.split())
    assert f"{','.join(presets())};default:params.yaml" in told


def test_every_stage_that_help_names_can_be_run() -> None:
    assert set(re.findall(r"^    ([a-z-]+)", parser().format_help(), re.M)) == COMMANDS.keys()
