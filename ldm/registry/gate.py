"""The gate between challenger and champion: rules on metrics, and what they decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ldm.config import Gate
from ldm.errors import UserError

GATE = "gate.json"
"""A decision, in the run of the version that it is about."""
START = "start"
MEAN = "mean of "
# Changes are rounded, or 0.8 - 0.7 would be no rise by 0.1.
DECIMALS = 9
SMALLEST = 10.0**-DECIMALS


@dataclass(frozen=True)
class Row:
    """A line of a decision, to be read only without a rule; what was not measured is none."""

    metric: str
    reference: float | None
    challenger: float
    change: float | None
    rule: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Decision:
    """What the gate said of a version; ``against`` is ``version N`` or ``start``."""

    model: str
    version: str
    against: str
    rows: tuple[Row, ...]
    promoted: bool
    reason: str


def judge(
    gate: Gate, challenger: Mapping[str, float], reference: Mapping[str, float], against: str
) -> tuple[Row, ...]:
    """Apply the gate's rules to two sets of metrics.

    The mean of ``wins_on`` must rise by ``min_gain`` at least; where that is 0 it must rise at all,
    so a tie keeps the champion. None of ``holds`` may fall by more than ``max_loss``. What is not a
    number passes no rule.
    """
    several = gate.wins_on if len(gate.wins_on) > 1 else ()
    rows = [_row((name,), challenger, reference, against) for name in several]
    if gate.wins_on:
        rule = f"must change by {gate.min_gain:+g} at least" if gate.min_gain else "must rise"
        won = _row(gate.wins_on, challenger, reference, against, rule, gate.min_gain or SMALLEST)
        rows.append(won)
    rule = f"may fall by {gate.max_loss:g} at most"
    for name in gate.holds:
        rows.append(_row((name,), challenger, reference, against, rule, -gate.max_loss))
    return tuple(rows)


def _row(
    names: Sequence[str],
    challenger: Mapping[str, float],
    reference: Mapping[str, float],
    against: str,
    rule: str = "",
    least: float = 0.0,
) -> Row:
    mine, other = _mean(names, challenger, "the challenger"), _mean(names, reference, against)
    assert mine is not None
    change = None if other is None else round(mine - other, DECIMALS)
    passed = change >= least if rule and change is not None else None
    label = names[0] if len(names) == 1 else MEAN + ", ".join(names)
    return Row(label, other, mine, change, rule, passed)


def _mean(names: Sequence[str], metrics: Mapping[str, float], whose: str) -> float | None:
    missing = [name for name in names if name not in metrics]
    if missing and whose != START:
        raise UserError(
            f"registry.gate: {whose} has no metric {missing[0]!r}; take it out of the gate, or "
            "evaluate and register again"
        )
    return None if missing else fmean(metrics[name] for name in names)


def verdict(rows: Sequence[Row], against: str) -> tuple[bool, str]:
    """Whether the rows let a version pass, and why in one line; the first version always does."""
    if against == START:
        return True, "there is no champion yet"
    failed = [row for row in rows if row.passed is False]
    told = [
        f"{row.metric} {row.reference:.3f} -> {row.challenger:.3f} ({row.rule})"
        for row in failed or rows
        if row.rule
    ]
    return not failed, "; ".join(told) or "the gate has no rules"


def starting(metrics: Mapping[str, float]) -> dict[str, float]:
    """The starting model's metrics, under their plain names."""
    marked = {name for name in metrics if name.startswith(f"{START}.")}
    return {name.removeprefix(f"{START}."): metrics[name] for name in marked}
