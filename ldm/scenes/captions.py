"""Descriptions in words: several wordings, English and Chinese."""

from __future__ import annotations

import random

from ldm.scenes.outlines import OUTLINES
from ldm.scenes.world import Description, Kind

COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
PLURALS = {"cross": "crosses"}

CHINESE = {
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字",
    "ring": "圆环",
    "heart": "心形",
    "crescent": "月牙",
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
    "grey": "灰色",
    "black": "黑色",
    "brown": "棕色",
    "small": "小",
    "large": "大",
    "left of": "左边",
    "right of": "右边",
    "above": "上方",
    "below": "下方",
    "two": "两",
    "three": "三",
    **OUTLINES,
}
RELATION_WORDINGS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ENGLISH_FRAMES = (
    "{what} on a {background} background",
    "{what}, {background} background",
    "a picture of {what} on a {background} background",
    "a {background} background with {what}",
)
CHINESE_FRAMES = (
    "{background}背景上的{what}",
    "{background}背景，{what}",
    "{what}，{background}背景",
    "一张{background}背景的图片，{what}",
)


def caption(description: Description, rng: random.Random, chinese: bool | None = None) -> str:
    """Word a description; one in three is Chinese unless ``chinese`` says which."""
    if chinese is None:
        chinese = rng.random() < 1 / 3
    if chinese:
        frame = rng.choice(CHINESE_FRAMES)
        return frame.format(what=_chinese(description), background=CHINESE[description.background])
    frame = rng.choice(ENGLISH_FRAMES)
    return frame.format(what=_english(description, rng), background=description.background)


def plain_caption(description: Description) -> str:
    """The one English wording used where a description needs a name."""
    what = _english(description, random.Random(0))
    return ENGLISH_FRAMES[0].format(what=what, background=description.background)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _english(description: Description, rng: random.Random) -> str:
    first = f"{description.first.colour} {description.first.shape}"
    if description.second is not None:
        second = f"{description.second.colour} {description.second.shape}"
        relation = rng.choice(RELATION_WORDINGS[description.relation or ""])
        return f"{_article(first)} {relation} {_article(second)}"
    if description.count > 1:
        shape = description.first.shape
        plural = PLURALS.get(shape, f"{shape}s")
        return f"{COUNT_WORDS[description.count]} {description.first.colour} {plural}"
    return _article(f"{description.size} {first}" if description.size else first)


def _chinese(description: Description) -> str:
    def name(kind: Kind, size: str | None = None) -> str:
        return CHINESE[kind.colour] + (CHINESE[size] if size else "") + CHINESE[kind.shape]

    if description.second is not None:
        place = CHINESE[description.relation or ""]
        return f"一个{name(description.first)}在一个{name(description.second)}的{place}"
    if description.count > 1:
        return f"{CHINESE[COUNT_WORDS[description.count]]}个{name(description.first)}"
    return f"一个{name(description.first, description.size)}"
