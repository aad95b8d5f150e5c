"""What the report's page says: facts in, one HTML document out. The markup is ``page.html``.

Styles and charts are inline, pictures are data URIs; the page's own policy forbids the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ldm.report.chart import WIDTHS, Curves, charts
from ldm.report.verdict import Line, Verdict, change, figure, percent


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI; ``crisp`` when its pixels are meant to be seen."""

    uri: str
    crisp: bool


@dataclass(frozen=True)
class Sample:
    """A prompt and its pictures.

    ``gloss`` is the English meaning of a prompt in another language. Faults say something only of
    a ``judged`` sample; none is right.
    """

    prompt: str
    language: str
    gloss: str
    judged: bool
    fault: str | None
    start_fault: str | None
    picture: Picture
    start_picture: Picture

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the page's filter knows it by, ``gained`` and ``lost`` against the start."""
        if not self.judged:
            return ()
        now, before = self.fault is None, self.start_fault is None
        turned = () if now == before else ("gained",) if now else ("lost",)
        return ("judged", "right" if now else "wrong", *turned)


@dataclass(frozen=True)
class Group:
    """A kind of prompts, its share of right pictures before and after, and its samples."""

    name: str
    meaning: str
    before: float | None
    after: float | None
    samples: Sequence[Sample]

    def count(self, kind: str) -> int:
        """How many samples are of that kind: ``judged``, or one of :attr:`Sample.kinds`."""
        return sum(kind in sample.kinds for sample in self.samples)

    @property
    def right_before(self) -> int:
        """How many of the starting model's pictures show what was asked."""
        return self.count("right") - self.count("gained") + self.count("lost")


@dataclass(frozen=True)
class Reconstruction:
    """A validation picture, what the autoencoder makes of its latents, and the PSNR in dB."""

    caption: str
    original: Picture
    decoded: Picture
    psnr: float


@dataclass(frozen=True)
class Link:
    """A station of the lineage: its digests, those of frozen parts it was made with, settings."""

    kind: str
    counts: Sequence[str]
    digests: Mapping[str, str]
    parts: Mapping[str, str]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """Everything on the page.

    ``champion`` names the version that the gate compared with, empty if that was the starting
    model. ``skipped_csv`` is a data URI, empty if the table is too long for that.
    """

    verdict: Verdict
    registered: Mapping[str, str]
    groups: Sequence[Group]
    champion: str
    lines: Sequence[Line]
    curves: Curves
    training: Sequence[str]
    ingest: Mapping[str, Any]
    skipped_csv: str
    reconstructions: Sequence[Reconstruction]
    mean_psnr: float
    measured: int
    chain: Sequence[Link]
    made_by: str

    def count(self, kind: str) -> int:
        """How many samples of all groups are of that kind."""
        return sum(group.count(kind) for group in self.groups)


def render(page: Page) -> str:
    """The HTML document."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "figure": figure, "change": change}
    markup = (resources.files("ldm.report") / "page.html").read_text("utf-8")
    # Numbers and words of our own only: nothing in them needs escaping.
    drawn = {
        name: [Markup(one) for one in charts(page.curves, width)] for name, width in WIDTHS.items()
    }
    return environment.from_string(markup).render(page=page, charts=drawn)
