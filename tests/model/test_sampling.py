"""Tokens from logits."""

import pytest
import torch

from model.sampling import Sampler, Sampling, nucleus

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def drawn(sampling: Sampling, never: list[int] | None = None, times: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling, never or [])
    tokens = torch.tensor([sampler.choose(LOGITS) for _ in range(times)])
    return torch.bincount(tokens, minlength=4) / times


def test_temperature_0_is_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0)).choose(LOGITS) == 1
    assert Sampler(Sampling(temperature=0), never=[1]).choose(LOGITS) == 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_a_temperature(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1)
    # four standard deviations of a frequency
    assert ((drawn(Sampling(temperature)) - expected).abs() < 4 * (0.25 / 4000) ** 0.5).all()


def test_the_same_seed_gives_the_same_tokens_and_another_does_not() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert tokens(3) == tokens(3) != tokens(4)


def test_a_nucleus_is_the_fewest_tokens_that_hold_p() -> None:
    p = torch.tensor([0.1, 0.5, 0.3, 0.1])
    assert torch.equal(nucleus(p, 0.4), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(nucleus(p, 0.6), torch.tensor([0.0, 0.625, 0.375, 0.0]))
    assert torch.allclose(nucleus(p, 1.0), p)
    assert drawn(Sampling(top_p=0.5))[[0, 2, 3]].sum() == 0


def test_what_is_never_written_is_never_drawn() -> None:
    assert drawn(Sampling(), never=[1, 3])[[1, 3]].sum() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is below 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0 is not in"),
        ({"top_p": 1.5}, "top_p=1.5 is not in"),
    ],
)
def test_values_without_meaning_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
