"""The next token from logits: temperature, nucleus (Holtzman et al. 2020), greedy."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy: neither top_p nor seed count then."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature={self.temperature} is below 0; 0 is greedy, 1 as learned"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps every token")


class Sampler:
    """Chooses token after token; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, never: Items[int] = ()) -> None:
        self.sampling, self.never = sampling, list(never)
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """Return a token for logits [V]; tokens in `never` have no probability."""
        logits = logits.detach().float().cpu()
        if self.never:
            logits = logits.index_fill(0, torch.tensor(self.never), float("-inf"))
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        p = torch.softmax(logits / self.sampling.temperature, -1)
        if self.sampling.top_p < 1:
            p = nucleus(p, self.sampling.top_p)
        return int(torch.multinomial(p, 1, generator=self.generator))


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return p [V] on the fewest likely tokens that hold top_p of it together, 0 elsewhere."""
    ordered, order = p.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)  # the likeliest is always kept
    return torch.zeros_like(p).scatter(-1, order, kept) / kept.sum()
