"""What the report's page says: facts in, one HTML document out. The markup is ``report.html``.

Styles and charts are inline, pictures are data URIs; the page's own policy forbids the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ldm.config import Gate
from ldm.gate import MEAN, START, judge
from ldm.registry import CHAMPION
from ldm.report_chart import NARROW, WIDE, Curves, charts

if TYPE_CHECKING:
    from ldm.gate import Decision, Row
    from ldm.registry import Standing

Values = Mapping[str, float]

GROUPS = {
    "known": ("adherence", "Known", "what the starting model was made from"),
    "new": ("adherence_new", "New", "what only the new pairs show"),
    "heldout": ("adherence_heldout", "Held out", "combinations that no pair shows"),
}
"""Group of prompts to its metric, name and meaning."""
OTHERS = {
    "clip_score": ("CLIP score", "how well picture and prompt agree; higher is better"),
    "val_loss": ("Validation loss", "of the averaged weights; lower is better"),
}
SHARES = {metric: (name, meaning) for metric, name, meaning in GROUPS.values()}
NAMES = SHARES | OTHERS
CHANGES = re.compile(rf"({MEAN})?(adherence\w*(?:, adherence\w*)*) ([\d.]+) -> ([\d.]+)")


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI; ``crisp`` when its pixels are meant to be seen."""

    uri: str
    crisp: bool


@dataclass(frozen=True)
class Sample:
    """A prompt and its pictures; ``gloss`` is its English meaning if it is in another language."""

    prompt: str
    language: str
    gloss: str
    fault: str | None
    start_fault: str | None
    picture: Picture
    start_picture: Picture

    @property
    def kinds(self) -> str:
        """What the page's filter knows it by, ``gained`` and ``lost`` against the start."""
        now, before = self.fault is None, self.start_fault is None
        turned = "" if now == before else " gained" if now else " lost"
        return ("right" if now else "wrong") + turned


@dataclass(frozen=True)
class Group:
    """A kind of prompts, its share of right pictures before and after, and its samples."""

    name: str
    meaning: str
    before: float
    after: float
    samples: Sequence[Sample]

    @property
    def right(self) -> int:
        """How many pictures show what was asked."""
        return sum(sample.fault is None for sample in self.samples)

    @property
    def right_before(self) -> int:
        """The same of the starting model's."""
        return sum(sample.start_fault is None for sample in self.samples)


@dataclass(frozen=True)
class Line:
    """A metric of the comparison; ``passed`` is None where no rule was applied."""

    name: str
    meaning: str
    start: float | None
    champion: float | None
    now: float
    change: float | None
    rule: str = ""
    passed: bool | None = None
    is_share: bool = True
    lower_is_better: bool = False

    @property
    def mood(self) -> str:
        """``good`` for a change to the better, ``bad`` for one to the worse."""
        if not self.change:
            return ""
        return "good" if (self.change > 0) != self.lower_is_better else "bad"


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
class Verdict:
    """The headline: ``mood`` is ``good``, ``bad`` or ``open``, ``state`` a word or two."""

    mood: str
    state: str
    claim: str
    reason: str


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
        """How many samples are of that kind, or ``all``."""
        kinds = [sample.kinds.split() for group in self.groups for sample in group.samples]
        return len(kinds) if kind == "all" else sum(kind in some for some in kinds)


def render(page: Page) -> str:
    """The HTML document."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "figure": figure, "change": change}
    markup = (resources.files("ldm") / "report.html").read_text("utf-8")
    # Numbers and words of our own only: nothing in them needs escaping.
    wide, narrow = ([Markup(one) for one in charts(page.curves, width)] for width in (WIDE, NARROW))
    return environment.from_string(markup).render(page=page, wide=wide, narrow=narrow)


def percent(value: float, digits: int = 0) -> str:
    """0.125 as ``13%``: halves go up, as on paper."""
    scale = 10**digits
    return f"{math.floor(100 * scale * value + 0.5 + 1e-9) / scale:.{digits}f}%"


def figure(value: float | None, is_share: bool) -> str:
    """A metric's value, or a dash."""
    if value is None:
        return "–"
    return percent(value, 1) if is_share else f"{value:.4g}"


def change(value: float | None, is_share: bool) -> str:
    """A difference with its sign: in percentage points, or in the metric's own unit."""
    if value is None:
        return "–"
    sign = "+" if value > 0 else "−" if value < 0 else "±"
    return sign + (f"{percent(abs(value), 1)[:-1]} pt" if is_share else f"{abs(value):.3g}")


def verdict(standing: Standing | None, groups: Sequence[Group]) -> Verdict:
    """The headline, from what the registry knows of the model."""
    against_start = ", ".join(
        f"{one.name.lower()} {percent(one.before)} → {percent(one.after)}" for one in groups
    )
    if standing is None:
        return Verdict("open", "not registered", "Against the model it started from", against_start)
    name, decision = f"{standing.model} version {standing.version}", standing.decision
    if decision is None:
        return Verdict("open", "registered", f"{name} waits for the gate", against_start)
    if not decision.promoted:
        return Verdict("bad", "not promoted", f"{name} is not promoted", _in_words(decision))
    claim = "is champion" if CHAMPION in standing.aliases else "was champion for a time"
    reason = "the first there is" if decision.against == START else _in_words(decision)
    return Verdict("good", "promoted", f"{name} {claim}", reason)


def _in_words(decision: Decision) -> str:
    """The registry's reason, shares in percent, without the rules that were kept."""
    reason = decision.reason
    for row in decision.rows:
        if row.passed:
            reason = reason.replace(f" ({row.rule})", "")
    return CHANGES.sub(_told, reason)


def _told(found: re.Match[str]) -> str:
    several, metrics, before, after = found.groups()
    told = " and ".join(NAMES[metric][0].lower() for metric in metrics.split(", "))
    average = " on average" if several else ""
    return f"{told}{average} {percent(float(before))} → {percent(float(after))}"


def registered(standing: Standing | None) -> dict[str, str]:
    """What the registry knows the model by, by label; empty if it does not."""
    if standing is None:
        return {}
    return {
        "registered as": f"{standing.model} version {standing.version}",
        "aliases": ", ".join(standing.aliases) or "none",
        "MLflow run": standing.run_id,
        "code commit": standing.commit or "unknown",
    }


def compared_with(standing: Standing | None) -> str:
    """The version that the gate compared with; empty where that was the starting model."""
    decision = standing.decision if standing else None
    return "" if decision is None or decision.against == START else decision.against


def comparison(metrics: Mapping[str, Any], standing: Standing | None, gate: Gate) -> list[Line]:
    """A line a metric, and one for each rule about several.

    The rules are the registry's decision; before it, the same rules against the starting model.
    """
    start: Values = metrics[START]
    decision = standing.decision if standing else None
    rows = decision.rows if decision else judge(gate, metrics, start, START)
    champion = standing.reference if standing and compared_with(standing) else None
    judged = {row.metric: row for row in rows}
    means = [metric for metric in judged if metric not in NAMES]
    wanted = [*SHARES, *means, *OTHERS]
    return [_line(metric, metrics, start, champion, judged.get(metric)) for metric in wanted]


def _line(
    metric: str, metrics: Values, start: Values, champion: Values | None, row: Row | None
) -> Line:
    """A metric's line, or that of a mean of several; ``row`` is the gate's."""
    parts = metric.removeprefix(MEAN).split(", ")

    def value(measured: Values) -> float | None:
        return fmean(measured[one] for one in parts) if set(parts) <= set(measured) else None

    now = value(metrics)
    assert now is not None
    before = value(start if champion is None else champion)
    told = [NAMES[one][0] if one in NAMES else one for one in parts]
    return Line(
        name=told[0] if len(told) == 1 else f"Mean of {' and '.join(told).lower()}",
        meaning=NAMES[metric][1] if metric in NAMES else "what the gate looks at",
        start=value(start),
        champion=None if champion is None else value(champion),
        now=now,
        change=None if before is None else now - before,
        rule=row.rule if row else "",
        passed=row.passed if row else None,
        is_share=set(parts) <= set(SHARES),
        lower_is_better=metric == "val_loss",
    )
