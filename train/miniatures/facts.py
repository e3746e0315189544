"""Selective recall: one fact in every block, and the last block asks about one of them.

For memories that search a bank (hmt). The question's name stands at the beginning of its block,
where the search can see it, and again at the end, before the value. What is counted is the answer,
and whether the search gave the gold block the most weight; beside it the answer of the same model
with a search that weighs all blocks alike.
"""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.tasks import KEY, multi_fact_recall
from model.decoder import Decoder
from model.memory.hmt import Hmt
from train.miniatures.config import NAMES, FactsStage, Miniature
from train.miniatures.learner import Learner
from train.miniatures.progress import Say

ADVANCE, RESTART, RATE = 0.8, 0.0, 0.1
"""The average of right answers at which one fact more comes, where it begins then, its pace."""
FULL = 0.5
"""Share of steps with as many facts as were reached; the others have fewer."""


class FactCell(NamedTuple):
    """What came of the prompts of one length."""

    tokens: int
    prompts: int
    exact: int  # right answers
    found: int  # prompts in which the gold block has the most weight
    weight: float  # of the gold block, mean
    uniform: int  # right answers where the search weighs all blocks alike


class FactsChecked(NamedTuple):
    """A whole check."""

    cells: list[FactCell]
    tokens: int
    seconds: float  # CPU time


class Recalled(NamedTuple):
    """What a model said to one batch of questions."""

    answers: Tensor  # [rows, V] logits
    values: Tensor  # [rows] the right ones
    weights: Tensor  # [rows, facts]: the search's
    gold: Tensor  # [rows]: the block asked for
    scores: Tensor  # [rows, rows, facts]: of every row's blocks
    same: Tensor  # [rows, rows, facts] bool: that block has a fact of the name asked for

    @property
    def right(self) -> Tensor:
        """Which answers are right, [rows] bool."""
        return self.answers.argmax(-1) == self.values

    @property
    def found(self) -> Tensor:
        """Where the gold block has the most weight, [rows] bool."""
        return self.weights.argmax(-1) == self.gold


def ask(model: Decoder, rng: np.random.Generator, rows: int, facts: int, length: int) -> Recalled:
    """Return what the model says to questions about one of `facts` blocks."""
    task = multi_fact_recall(rng, batch=rows, segments=facts + 1, segment_len=length, names=NAMES)
    tokens, memory = torch.from_numpy(task.tokens), model.memory
    assert isinstance(memory, Hmt)
    starts = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    past, question = tokens[:, :-1], tokens[:, -1:]
    if torch.is_grad_enabled():
        state = model(past, starts[:, :-1])[1]
    else:
        state = model.read(past, starts[:, :-1])
    segments = model.segments(question, starts[:, -1:], fresh=False)
    (prepared,) = memory.prepare(model, question, segments, None)
    assert prepared.summary is not None
    weights = memory.attention(prepared.summary, state.stack)[:, -facts:]
    scores = memory.scores(prepared.summary, state.stack.bank[:, -facts:].flatten(0, 1))
    logits, _ = model(question, starts[:, -1:], state)
    return Recalled(
        logits[:, 0, -2],
        tokens[:, -1, -1],
        weights,
        torch.from_numpy(task.gold),
        scores.unflatten(1, (rows, facts)),
        _names(past) == question[:, 0, 1].view(-1, 1, 1),
    )


def _names(blocks: Tensor) -> Tensor:
    """Return the name of each block's fact, blocks [rows, N, S]: [rows, N]."""
    place = (blocks == KEY).int().argmax(-1, keepdim=True) + 1
    return blocks.gather(-1, place).squeeze(-1)


def search_loss(recalled: Recalled) -> Tensor:
    """Return the cross entropy of the search, over the blocks of all rows of the batch.

    The other rows' blocks stand for the many of a document longer than a sample. Those that hold
    a fact of the name asked for, but not this document's, count for nothing.
    """
    rows, _, facts = recalled.scores.shape
    gold = torch.arange(rows) * facts + recalled.gold
    right = functional.one_hot(gold, rows * facts).bool()
    hidden = recalled.same.flatten(1) & ~right
    scores = recalled.scores.flatten(1).masked_fill(hidden, float("-inf"))
    return functional.cross_entropy(scores, gold)


def run_facts(learner: Learner, stage: FactsStage, say: Say) -> None:
    """Train through one stage: one fact, then two, up to the stage's number."""
    blocks, rows = learner.blocks, learner.miniature.batch_size
    rng = np.random.default_rng(int(blocks.whole(0, 2**31)))
    most, answered, found = stage.first, RESTART, 0.0
    length = stage.block_len or blocks.length
    for step in range(stage.steps):
        full = most == 1 or float(blocks.uniform()) < FULL
        facts = most if full else int(blocks.whole(1, most))
        recalled = ask(learner.model, rng, rows, facts, length)
        loss = functional.cross_entropy(recalled.answers, recalled.values)
        learner.learn(loss + stage.search_loss * search_loss(recalled))
        if full:
            answered += RATE * (recalled.right.float().mean().item() - answered)
            found += RATE * (recalled.found.float().mean().item() - found)
        if answered > ADVANCE and most < stage.blocks:
            most, answered = most + 1, RESTART
        if (step + 1) % 100 == 0:
            say(f"facts {most}, answered {answered:.2f}, found {found:.2f}")


def check_facts(model: Decoder, miniature: Miniature, say: Say) -> FactsChecked:
    """Return answers and finds by length, and the answers of a search without preference."""
    began, cells = time.process_time(), []
    alike = copy.deepcopy(model)
    assert isinstance(alike.memory, Hmt)
    torch.nn.init.zeros_(alike.memory.query.weight)  # all scores are 0
    for length in sorted(miniature.check.lengths):
        cells.append(_cell(model, alike, miniature, length))
        say(f"{cells[-1]}")
    tokens = sum(2 * cell.prompts * cell.tokens for cell in cells)
    return FactsChecked(cells, tokens, time.process_time() - began)


@torch.inference_mode()
def _cell(model: Decoder, alike: Decoder, miniature: Miniature, length: int) -> FactCell:
    """Return what both models say to the same questions at one length."""
    section, facts = miniature.check, length // miniature.segment_len - 1
    size, exact, found, uniform, weight = section.prompts_at_once, 0, 0, 0, 0.0
    for first in range(0, section.prompts, size or section.prompts):
        rows, drawn = min(size or section.prompts, section.prompts - first), (section.seed, first)
        own, even = (
            ask(each, np.random.default_rng(drawn), rows, facts, miniature.segment_len)
            for each in (model, alike)
        )
        exact += int(own.right.sum())
        found += int(own.found.sum())
        uniform += int(even.right.sum())
        weight += own.weights.gather(1, own.gold.unsqueeze(1)).sum().item()
    mean = round(weight / section.prompts, 4)
    return FactCell(length, section.prompts, exact, found, mean, uniform)
