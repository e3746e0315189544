"""A key further back than any window reaches: the memory carries it, the window does not."""

from typing import Any

import pytest

from train.miniatures.check import check
from train.miniatures.config import Miniature
from train.miniatures.trainer import train


def recalled(memory: dict[str, Any], trained: int, steps: int) -> dict[int, float]:
    """Return the share of keys read right by how many segments before the question they lie.

    trained: the largest distance in training.
    """
    miniature = Miniature.model_validate(
        {
            "name": "passkey",
            "model": {
                "num_layers": 2,
                "hidden_size": 64,
                "num_heads": 4,
                "num_kv_heads": 4,
                "ffn_size": 128,
                "init_std": 0.07,
                "memory": memory,
            },
            "stages": [{"recipe": "curriculum", "steps": steps, "until": 0.95, "blocks": trained}],
            "check": {"lengths": [128, 256], "places": ["start"], "prompts": 128},
            "paper": {"title": "", "result": "", "differs": ""},
        }
    )
    model, _, _ = train(miniature, 0, lambda line: None)
    cells = check(model, miniature, lambda line: None).cells
    return {cell.tokens // miniature.segment_len - 1: cell.exact / cell.prompts for cell in cells}


@pytest.mark.slow
def test_fam_recalls_a_key_beyond_the_window() -> None:
    memory = {"name": "fam", "slots": 8, "window": 0, "state": "norm"}
    assert recalled(memory, trained=3, steps=2500)[3] >= 0.8


@pytest.mark.slow
def test_a_window_recalls_within_its_reach_and_guesses_beyond() -> None:
    """A window of 1 through 2 layers reaches 2 segments back; four digits by chance: 1e-4."""
    by_distance = recalled({"name": "window", "segments": 1}, trained=2, steps=1200)
    assert by_distance[1] >= 0.8
    assert by_distance[3] <= 0.05
