"""Associative RMT against the delta rule written out row by row."""

import pytest
import torch
from torch import Tensor

from model.config import ArmtMemory
from model.decoder import Decoder
from model.interfaces import Segments
from model.memory.armt import ArmtMixer, ArmtState, features
from model.memory.frame import Frame, Rows
from tests.compare import relative
from tests.model.slow import assert_twin
from tests.model.slow_turns import SlowArmt
from tests.model.small import batch_of, build, config_of


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("slots", [1, 4])
def test_is_the_delta_rule_row_by_row(slots: int, window: int) -> None:
    """Logits and every gradient; documents begin in the middle."""
    batch = batch_of(2, 4, 5)
    batch.starts[1, 2] = True
    memory = ArmtMemory(slots=slots, key_dim=4, window=window)
    assert_twin(config_of(memory), SlowArmt, batch)


def test_features_are_positive_and_no_longer_than_1() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-6, 1.0, 1e6):
        x = features(size * torch.randn(100, 8, generator=generator, dtype=torch.float64))
        assert x.shape == (100, 48)
        assert (x >= 0).all()
        assert (x.norm(dim=-1) <= 1 + 1e-12).all()


def written(slots: int, matrix_size: float = 1.0) -> tuple[Tensor, Tensor, Decoder, Segments]:
    """Return a matrix of each stream, random rows to write, a model and its segments."""
    model, batch = build(config_of(ArmtMemory(slots=slots, key_dim=4))), batch_of(3, 1, 4)
    generator = torch.Generator().manual_seed(1)
    matrix = matrix_size * torch.randn(3, 24, 16, generator=generator, dtype=torch.float64)
    rows = torch.randn(3 * slots, 16, generator=generator, dtype=torch.float64)
    return matrix, rows, model, model.segments(batch.tokens, batch.starts, fresh=True)


def test_writing_zeros_lengthens_no_matrix() -> None:
    """Each row erases along its key by at most what is there: no singular value grows."""
    matrix, rows, model, segments = written(slots=8)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, ArmtMixer)
    with torch.no_grad():
        mixer.value.weight.zero_()
        for gain in (0.0, 1.0, 30.0):  # strengths of 1/2, of any size, of 0 and 1
            mixer.strength.weight.copy_(gain * torch.sign(mixer.strength.weight))
            after = mixer.write(Rows(Frame(back=8), rows), ArmtState(matrix), segments).matrix
            old, new = torch.linalg.svdvals(matrix), torch.linalg.svdvals(after)
            assert (new <= old * (1 + 1e-12)).all()
            assert (new.sum(-1) < old.sum(-1)).all()


def test_writing_one_row_again_and_again_settles() -> None:
    """The delta rule writes the difference: what is known is not added once more."""
    matrix, rows, model, segments = written(slots=64, matrix_size=0.0)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, ArmtMixer)
    same = Rows(Frame(back=64), rows[::64].repeat_interleave(64, 0))
    with torch.no_grad():
        once = mixer.write(same, ArmtState(matrix), segments)
        twice = mixer.write(same, once, segments)
    assert once.matrix.norm() > 0.1
    assert relative(twice.matrix, once.matrix) < 1e-3
