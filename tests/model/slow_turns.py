"""Slow twins of memories that hand rows on through the stack: [before | tokens | back]."""

import torch
from torch import Tensor

from model.config import ArmtMemory, HmtMemory, ModelConfig, RmtMemory
from tests.model.slow import Read, Slow, causal


class Around:
    """The rows around a segment, where they stand, and which row reads which."""

    def __init__(self, before: Tensor, x: Tensor, back: Tensor, begin: int) -> None:
        self.rows = torch.cat((before, x, back))
        self.begin, self.end = begin, begin + len(x)
        self.places = torch.arange(begin - len(before), self.end + len(back))
        self.tokens = slice(len(before), len(before) + len(x))
        self.back = slice(self.tokens.stop, None)
        self.mask = causal(len(self.rows))


class InTurn(Slow):
    """Segment after segment through the whole stack."""

    def logits(self, tokens: Tensor) -> Tensor:
        past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.config.num_layers)]
        found = []
        for n, segment in enumerate(tokens):
            around = self.around(segment, n * len(segment))
            rows = self.through(around, past)
            found.append(self.head(rows[around.tokens]))
            self.left(self.norm(rows[around.back], "head.norm.weight"), segment)
        return torch.stack(found)

    def through(self, around: Around, past: list[list[tuple[Tensor, Tensor]]] | None) -> Tensor:
        """Return the rows after the last block; past None: the rows alone, remembered nowhere."""
        rows = around.rows
        for layer in range(self.config.num_layers):
            rows = self.block(layer, rows, around, [] if past is None else past[layer])
        return rows

    def block(
        self, layer: int, rows: Tensor, around: Around, past: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        raw = self.project(layer, rows)
        q, k = self.rotate(raw.q, around.places), self.rotate(raw.k, around.places)
        reads = [Read(k, raw.v, around.mask)]
        for read in self.window(past, len(rows)):
            mask = torch.zeros_like(read.mask)
            mask[around.tokens] = True  # only tokens read the window
            reads.append(read._replace(mask=mask))
        past.append((k[around.tokens], raw.v[around.tokens]))
        return self.finish(layer, rows, self.attend(q, reads))

    def around(self, segment: Tensor, begin: int) -> Around:
        """Return what goes up the stack for a segment whose first token stands at `begin`."""
        raise NotImplementedError

    def left(self, back: Tensor, segment: Tensor) -> None:
        """Take the rows behind, after the last block and the final norm."""
        raise NotImplementedError


class SlowRmt(InTurn):
    """[read | tokens | write]: the same vectors before and behind."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        assert isinstance(config.memory, RmtMemory)
        self.kind, self.memory = config.memory, weights["memory.initial_memory"]

    def around(self, segment: Tensor, begin: int) -> Around:
        offset = self.weights["memory.offset"] if self.kind.offset else 0
        around = Around(self.memory, self.embed(segment), self.memory + offset, begin)
        if self.kind.mask == "paper":
            read = slice(self.kind.slots)
            around.mask[read, read] = True
            around.mask[around.back, :] = True
        return around

    def left(self, back: Tensor, segment: Tensor) -> None:
        self.memory = self.carried(back, self.kind.state, self.kind.beta, "memory.carry.gain")


class SlowArmt(InTurn):
    """A matrix in each layer: every row reads it before; the rows behind write it after."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        assert isinstance(config.memory, ArmtMemory)
        shape = (6 * config.memory.key_dim, config.hidden_size)
        self.matrices = [weights["memory.rows"].new_zeros(shape) for _ in range(config.num_layers)]

    def around(self, segment: Tensor, begin: int) -> Around:
        rows = self.weights["memory.rows"]
        around = Around(rows[:0], self.embed(segment), rows, begin)
        around.mask[around.back, :] = True
        return around

    def block(
        self, layer: int, rows: Tensor, around: Around, past: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        matrix = self.matrices[layer]
        rows = torch.stack([x + self.features(layer, "query", x) @ matrix for x in rows])
        rows = super().block(layer, rows, around, past)
        for x in rows[around.back]:
            key = self.features(layer, "key", x)
            strength = torch.sigmoid(self.map(layer, "strength", x))
            news = self.map(layer, "value", x) - key @ matrix
            matrix = matrix + torch.outer(key, strength * news)
        self.matrices[layer] = matrix
        return rows

    def left(self, back: Tensor, segment: Tensor) -> None:
        pass

    def map(self, layer: int, name: str, x: Tensor) -> Tensor:
        return self.weights[f"blocks.{layer}.mixer.{name}.weight"] @ self.plain_norm(x)

    def features(self, layer: int, name: str, x: Tensor) -> Tensor:
        """DPFP-3: products of neighbours in relu([x, -x]), one to three places apart."""
        x = self.map(layer, name, x)
        both = torch.cat((x, -x)).clamp(min=0)
        size = len(both)
        products = [both[i] * both[(i - j) % size] for j in (1, 2, 3) for i in range(size)]
        found = torch.stack(products)
        return found / (found.square().sum() + 1e-2).sqrt()


class SlowHmt(InTurn):
    """[P | last memory | sensory | tokens | P], P found in the bank by a summary.

    searching=False is the first stage of training: [last memory | sensory | tokens | last memory].
    """

    searching = True

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        assert isinstance(config.memory, HmtMemory)
        self.kind = config.memory
        self.bank: list[Tensor] = []
        self.before: Tensor | None = None  # the segment before

    def around(self, segment: Tensor, begin: int) -> Around:
        first = self.weights["memory.first"][0]
        last = self.bank[-1] if self.bank else first
        count = self.kind.sensory
        sensory = segment[:0]
        if self.before is not None and count:
            sensory = self.before[-count:]
        tops = [last]
        if self.searching:
            tops = [self.search(segment) if self.bank else first, last]
        x = self.embed(segment)
        around = Around(
            torch.cat((torch.stack(tops), self.embed(sensory))), x, tops[0].unsqueeze(0), begin
        )
        # Rows keep their places where there is nothing sensory yet.
        heads = torch.arange(begin - count - len(tops), begin - count)
        around.places = torch.cat((heads, around.places[len(tops) :]))
        if self.searching:
            middle = around.tokens.start + len(segment) // 2
            around.mask[1:middle, 0] = False  # P has seen the first half
        return around

    def search(self, segment: Tensor) -> Tensor:
        """Return P: the bank by the softmax of summary and keys."""
        bank = torch.stack(self.bank)
        query = self.weights["memory.query.weight"] @ self.summary(segment)
        keys = bank @ self.weights["memory.key.weight"].T
        return (keys @ query / self.kind.search_dim**0.5).softmax(0) @ bank

    def summary(self, segment: Tensor) -> Tensor:
        """Return the last row of [T | first half | T] after the stack and the final norm."""
        prompt, half = self.weights["memory.prompt"], segment[: len(segment) // 2]
        around = Around(prompt, self.embed(half), prompt, 0)
        return self.norm(self.through(around, None)[-1], "head.norm.weight")

    def left(self, back: Tensor, segment: Tensor) -> None:
        self.bank = [*self.bank, back[0]][-self.kind.bank :]
        self.before = segment


class SlowHmtFirstStage(SlowHmt):
    searching = False
