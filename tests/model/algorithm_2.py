"""TransformerFAM by the paper's Algorithm 2: segment by segment, layer by layer, full masks.

The slow twin of the decoder, for one document on one device. It shares nothing with model/ but
the weights: own norm, rotation, masks and attention over the concatenated rows [FAM; segment].
Without slots it is block sliding window attention, and without a window a plain Llama.
"""

import torch
from torch import Tensor

from model.config import FamMemory, ModelConfig
from tests.model.dense import attend
from tests.model.slow import Slow


class Algorithm2(Slow):
    """The model of `config` with weights by the decoder's parameter names."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        self.fam = config.memory if isinstance(config.memory, FamMemory) else None
        self.num_slots = self.fam.slots if self.fam else 0

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [N, S] of one document -> [N, S, V]."""
        count, length = tokens.shape
        fam = self.initial_fam()
        past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.config.num_layers)]
        rows = []
        for tau in range(count):
            x = self.embed(tokens[tau])
            for layer in range(self.config.num_layers):
                x, fam[layer] = self.block(layer, x, fam[layer], past[layer], tau, length)
            rows.append(self.head(x))
        return torch.stack(rows)

    def block(
        self,
        layer: int,
        x: Tensor,
        fam: Tensor,
        past: list[tuple[Tensor, Tensor]],
        tau: int,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """One layer at block tau: O (S rows) and F_tau (F rows). Appends this block's K, V."""
        num_slots, begin = self.num_slots, tau * length
        places = torch.arange(begin, begin + length)
        fam_keys_at = torch.arange(begin - num_slots, begin)
        fam_asks_at = fam_keys_at
        if self.fam and self.fam.query_position == "current":
            fam_asks_at = fam_keys_at + length
        q, k, v, _ = self.project(layer, torch.cat((fam, x)))
        q = self.rotate(q, torch.cat((fam_asks_at, places)))
        k = self.rotate(k, torch.cat((fam_keys_at, places)))

        memory = past[-self.config.window :] if self.config.window else []
        seen = sum(len(keys) for keys, _ in memory)
        keys = torch.cat((k[:num_slots], *(keys for keys, _ in memory), k[num_slots:]))
        values = torch.cat((v[:num_slots], *(values for _, values in memory), v[num_slots:]))
        mask = torch.ones(num_slots + length, num_slots + seen + length, dtype=torch.bool)
        mask[:num_slots, num_slots : num_slots + seen] = False
        mask[num_slots:, num_slots + seen :].tril_()
        if self.fam and self.fam.first == "hidden" and tau == 0:
            mask[num_slots:, :num_slots] = False
        past.append((k[num_slots:], v[num_slots:]))

        residual = torch.cat((torch.zeros_like(fam) if tau == 0 else fam, x))
        rows = self.finish(layer, residual, attend(q, keys, values, mask)[0])
        return rows[num_slots:], self.carry(layer, rows[:num_slots])

    def initial_fam(self) -> list[Tensor]:
        """F_0 of each layer: the prompt rows alone through the layers, reading one another."""
        if not self.fam:
            empty = self.weights["embedding.weight"].new_empty(0, self.config.hidden_size)
            return [empty] * self.config.num_layers
        rows, found = self.weights["memory.parts.fam.prompt"], []
        places = torch.arange(self.num_slots)
        mask = torch.ones(self.num_slots, self.num_slots, dtype=torch.bool)
        for layer in range(self.config.num_layers):
            found.append(rows)
            q, k, v, _ = self.project(layer, rows)
            out, _ = attend(self.rotate(q, places), self.rotate(k, places), v, mask)
            rows = self.finish(layer, rows, out)
        return found

    def carry(self, layer: int, rows: Tensor) -> Tensor:
        """What is fed back of F_tau."""
        if not self.fam:
            return rows
        gain = f"blocks.{layer}.mixer.parts.fam.carry.gain"
        return self.carried(rows, self.fam.state, self.fam.beta, gain)
