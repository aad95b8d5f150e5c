"""The prompts of an evaluation: their file, and the groups that they come in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.scenes.lists import read_description
from ldm.scenes.reader import can_judge

GROUPS = {"known": "adherence", "new": "adherence_new", "heldout": "adherence_heldout"}
"""Group of prompts to metric: the share of its pictures that show exactly what was asked."""
KEYS = ("prompt", "group", "english", "scene")
HALVES = re.compile("[\ud800-\udfff]")
FORM = 'write one JSON object a line: {"prompt": "..."}'


@dataclass(frozen=True)
class Prompt:
    """A line of ``prompts.jsonl``; ``seed`` is the picture's own.

    ``scene`` is the description that the reader holds the picture against; prompts of the open
    world have none and are scored by CLIP alone. ``english`` is the gloss of a prompt in another
    script.
    """

    prompt: str
    seed: int
    group: str = "known"
    english: str = ""
    scene: dict[str, Any] | None = None

    @property
    def language(self) -> str:
        """``en`` or ``zh``, as far as the letters tell; else empty."""
        if self.prompt.isascii():
            return "en"
        return "zh" if any("一" <= letter <= "鿿" for letter in self.prompt) else ""


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """The evaluation prompts, one a line; the picture of line ``i`` (from 0) has seed ``seed + i``.

    Raises :class:`UserError` naming the line where one is no prompt.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {FORM}, or run `ldm scenes` for the demo's")
    lines, prompts = lines_of(path), []
    if lines == [""]:
        raise UserError(f"{path}: is empty; {FORM}")
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(Prompt(**_checked(line), seed=seed + number - 1))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    return prompts


def lines_of(path: Path) -> list[str]:
    r"""The lines of a file of JSON, where nothing but ``\n`` ends one; at least one."""
    try:
        return path.read_text("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it as that") from error


def _checked(line: str) -> dict[str, Any]:
    """What a line holds; ValueError says what is wrong with it, and the remedy."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"is no JSON object; {FORM}")
    if unknown := [key for key in told if key not in KEYS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(KEYS)}; take it out")
    if not _is_text(told.get("prompt")) or not told["prompt"].strip():
        raise ValueError(f"has no text as its prompt; {FORM}")
    if not _is_text(told.get("english", "")):
        raise ValueError("english is no text; take it out, or write the prompt in English there")
    if told.get("group", "known") not in [*GROUPS]:
        raise ValueError(f"group {told['group']!r} is none of {', '.join(GROUPS)}; take it out")
    if told.get("scene") is not None and not _is_scene(told["scene"]):
        raise ValueError("scene is none that can be judged; take it out, or run `ldm scenes`")
    return told


def _is_text(value: Any) -> bool:
    r"""Whether it is a string that can be written; JSON can name half a character (``\ud83d``)."""
    return isinstance(value, str) and not HALVES.search(value)


def _is_scene(value: Any) -> bool:
    try:
        return can_judge(read_description(value))
    except (AttributeError, KeyError, TypeError):
        return False
