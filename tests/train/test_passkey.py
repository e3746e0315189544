"""A key further back than any window reaches: the memory carries it, the window does not."""

import pytest

from model.config import FamMemory, WindowMemory
from train.evaluation.passkey import recall, train_passkey

DISTANCE = 3  # segments; a window of 1 through 2 layers reaches 2 back


@pytest.mark.slow
def test_fam_recalls_a_key_beyond_the_window() -> None:
    model = train_passkey(FamMemory(8, 0, "norm"), seed=0, distance=DISTANCE, max_steps=2500)
    assert recall(model, distance=DISTANCE, seed=1) >= 0.8


@pytest.mark.slow
def test_a_window_recalls_within_its_reach_and_guesses_beyond() -> None:
    model = train_passkey(WindowMemory(1), seed=0, distance=2, max_steps=1200)
    assert recall(model, distance=1, seed=1) >= 0.8
    # Four digits by chance: 1e-4.
    assert recall(model, distance=DISTANCE, seed=1) <= 0.05
