"""The average of weights, against the recursion that takes every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ldm.train.ema import EVERY, Ema

DECAY, STEPS = 0.99, 800


def averages(weight_at: Callable[[int], float], steps: int = STEPS) -> tuple[float, float]:
    """Ours and the recursion's after ``steps`` steps of a weight that starts as 0."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema, expected = Ema({"weight": parameter}, DECAY, steps), 0.0
    for step in range(1, steps + 1):
        with torch.no_grad():
            parameter.fill_(weight_at(step))
        ema.update(step)
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight_at(step)
    return float(ema.average["weight"][0]), expected


@pytest.mark.parametrize("steps", [1, 2 * EVERY - 1, STEPS])
def test_weights_that_stand_between_updates_are_averaged_as_if_at_every_step(steps: int) -> None:
    """To the last step, however many there are."""
    ours, expected = averages(lambda step: 1 + ((step - 1) // EVERY) ** 0.5, steps)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_weights_that_move_are_averaged_nearly_so() -> None:
    ours, expected = averages(float)
    assert STEPS - expected > 20 * EVERY
    assert abs(ours - expected) < EVERY / 2


def test_a_run_that_goes_on_past_its_last_step_counts_each_step_once() -> None:
    last, more = EVERY + 2, 2 * EVERY + 3
    _, expected = averages(lambda _: 1.0, more)
    parameter = torch.nn.Parameter(torch.zeros(3))
    first = Ema({"weight": parameter}, DECAY, last)
    with torch.no_grad():
        parameter.fill_(1.0)
    for step in range(1, last + 1):
        first.update(step)
    second = Ema({"weight": parameter}, DECAY, more)
    second.average, second.upto = first.average, first.upto
    for step in range(last + 1, more + 1):
        second.update(step)
    assert float(second.average["weight"][0]) == pytest.approx(expected, rel=1e-5)


def test_two_swaps_are_none_and_one_is_the_average() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema = Ema({"weight": parameter}, 0.5, STEPS)
    with torch.no_grad():
        parameter.fill_(2.0)
    ema.update(EVERY)
    average = 2 - 2 * (2 / 11) * (3 / 12) * (4 / 13) * (5 / 14)
    ema.swap()
    assert parameter.tolist() == pytest.approx([average] * 2, rel=1e-2)
    assert ema.average["weight"].tolist() == [2.0, 2.0]
    ema.swap()
    assert parameter.tolist() == [2.0, 2.0]
