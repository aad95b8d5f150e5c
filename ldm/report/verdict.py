"""What the report says of a model's figures: against its start, the former champion, the gate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ldm.config import Gate
from ldm.evaluation_prompts import GROUPS
from ldm.registry.gate import MEAN, START, judge
from ldm.tracking.versions import CHAMPION

if TYPE_CHECKING:
    from ldm.registry.gate import Decision, Row
    from ldm.registry.standing import Standing

Values = Mapping[str, float]

SHARES = {
    GROUPS["known"]: ("known", "what the starting model was made from"),
    GROUPS["new"]: ("new", "what only the new pairs show"),
    GROUPS["heldout"]: ("held out", "combinations that no pair shows"),
}
"""Metric of a group of prompts to the group's name, as in a sentence, and meaning."""
OTHERS = {
    "clip_score": ("CLIP score", "how well picture and prompt agree; higher is better"),
    "val_loss": ("validation loss", "of the averaged weights; lower is better"),
}
NAMES = SHARES | OTHERS
_NAMED = f"(?:{'|'.join(sorted(NAMES, key=len, reverse=True))})"
CHANGES = re.compile(rf"({MEAN})?({_NAMED}(?:, {_NAMED})*) (\d+\.\d+) -> (\d+\.\d+)")
NUMBER = re.compile(r"[+-]?\d\S*")


@dataclass(frozen=True)
class Line:
    """A metric of the comparison; ``passed`` is None where no rule was applied."""

    metric: str
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
class Verdict:
    """The headline: ``mood`` is ``good``, ``bad`` or ``open``, ``state`` a word or two."""

    mood: str
    state: str
    claim: str
    reason: str


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


def heading(name: str) -> str:
    """A name at the head of something."""
    return name[0].upper() + name[1:]


def verdict(standing: Standing | None, lines: Sequence[Line]) -> Verdict:
    """The headline, from what the registry knows of the model."""
    if standing is None:
        return Verdict("open", "not registered", "Not registered yet", _against_start(lines))
    name, decision = f"{standing.model} version {standing.version}", standing.decision
    if decision is None:
        return Verdict("open", "registered", f"{name} waits for the gate", _against_start(lines))
    if not decision.promoted:
        return Verdict("bad", "not promoted", f"{name} is not promoted", _in_words(decision))
    claim = "is champion" if CHAMPION in standing.aliases else "was champion for a time"
    reason = _in_words(decision)
    if decision.against == START:
        reason = f"the first there is; {_against_start(lines)}"
    return Verdict("good", "promoted", f"{name} {claim}", reason)


def _against_start(lines: Sequence[Line]) -> str:
    """The shares before and after, or the CLIP score where no picture could be judged."""
    shares = [line for line in lines if line.metric in SHARES]
    told = [
        _from_to([line.metric], line.start, line.now)
        for line in shares or lines
        if line.start is not None
    ]
    return f"against its start, {', '.join(told)}"


def _in_words(decision: Decision) -> str:
    """The registry's reason, shares in percent, without the rules if all were kept."""
    reason = decision.reason
    for row in decision.rows:
        told = "" if decision.promoted else f" ({_rule(row)})"
        reason = reason.replace(f" ({row.rule})", told)
    return CHANGES.sub(_told, reason)


def _told(found: re.Match[str]) -> str:
    _, metrics, before, after = found.groups()
    return _from_to(metrics.split(", "), float(before), float(after))


def _from_to(metrics: Sequence[str], before: float, after: float) -> str:
    """A change of a metric, or of the mean of several, in a sentence."""
    names = " and ".join(NAMES[metric][0] for metric in metrics)
    average = " on average" if len(metrics) > 1 else ""
    first, last = (
        percent(value) if _are_shares(metrics) else figure(value, False)
        for value in (before, after)
    )
    return f"{names}{average} {first} → {last}"


def _rule(row: Row) -> str:
    """A row's rule; in percentage points where it is about shares."""
    if not _are_shares(_parts(row.metric)):
        return row.rule
    return NUMBER.sub(lambda found: f"{100 * float(found[0]):g} pt", row.rule)


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
    """The version that the gate compared with; empty where that was the start, or is gone."""
    decision = standing.decision if standing and standing.reference is not None else None
    return "" if decision is None else decision.against


def comparison(metrics: Mapping[str, Any], standing: Standing | None, gate: Gate) -> list[Line]:
    """A line a metric, and one for each rule about several.

    The rules are the registry's decision; before it, the same rules against the starting model.
    """
    start: Values = metrics[START]
    decision = standing.decision if standing else None
    rows: Sequence[Row] = decision.rows if decision else ()
    if not decision and {*gate.wins_on, *gate.holds} <= set(metrics):
        rows = judge(gate, metrics, start, START)
    champion = standing.reference if standing else None
    judged = {row.metric: row for row in rows}
    means = [metric for metric in judged if metric not in NAMES]
    wanted = [
        metric for metric in (*SHARES, *means, *OTHERS) if _value(metric, metrics) is not None
    ]
    return [_line(metric, metrics, start, champion, judged.get(metric)) for metric in wanted]


def _line(
    metric: str, metrics: Values, start: Values, champion: Values | None, row: Row | None
) -> Line:
    """A metric's line, or that of a mean of several; ``row`` is the gate's."""
    parts, now = _parts(metric), _value(metric, metrics)
    assert now is not None
    before = _value(metric, start if champion is None else champion)
    told = " and ".join(NAMES[one][0] if one in NAMES else one for one in parts)
    return Line(
        metric=metric,
        name=heading(told if len(parts) == 1 else f"mean of {told}"),
        meaning=NAMES[metric][1] if metric in NAMES else "what the gate looks at",
        start=_value(metric, start),
        champion=None if champion is None else _value(metric, champion),
        now=now,
        change=None if before is None else now - before,
        rule=_rule(row) if row else "",
        passed=row.passed if row else None,
        is_share=_are_shares(parts),
        lower_is_better=metric == "val_loss",
    )


def _parts(metric: str) -> list[str]:
    """The metrics that a row of the gate's is the mean of."""
    return metric.removeprefix(MEAN).split(", ")


def _are_shares(metrics: Sequence[str]) -> bool:
    return set(metrics) <= set(SHARES)


def _value(metric: str, measured: Values) -> float | None:
    parts = _parts(metric)
    return fmean(measured[one] for one in parts) if set(parts) <= set(measured) else None
