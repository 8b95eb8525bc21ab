"""When the parts of a step's memory are there together; tests/bench/test_step.py has the proof at full size."""

from __future__ import annotations

from dataclasses import replace

from goku.step_memory import StepMemory

PARTS = StepMemory(
    lasting=100, gradients=20, copies=10, kept=50, recomputed=15, several_packs=False
)


def test_the_backward_begins_with_all_activations_and_ends_with_all_gradients() -> None:
    assert PARTS.peak == 100 + 50 + 15
    assert replace(PARTS, kept=8).peak == 100 + 20 + 15


def test_the_forward_ends_with_copies_of_the_weights() -> None:
    assert replace(PARTS, recomputed=0).peak == 100 + 50 + 10
    assert replace(PARTS, copies=16).peak == 100 + 50 + 16


def test_gradients_of_earlier_packs_stay() -> None:
    several = replace(PARTS, several_packs=True)
    assert several.peak == 100 + 20 + 50 + 15
    assert replace(several, copies=16).peak == 100 + 20 + 50 + 16
