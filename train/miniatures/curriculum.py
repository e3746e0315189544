"""The curriculum: a key one block back, then two, up to four; then filler that counts for more.

What makes it learnable is the order (from scratch at four blocks, nothing is learned) and, at the
very start, keys in the question's own block, which teach the copying that far ones need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.miniatures.blocks import Blocks
from train.miniatures.config import CurriculumStage
from train.miniatures.learner import Learner, grade
from train.miniatures.progress import Say

ADVANCE = 0.8
"""Exact match, as a moving average, at which the next difficulty comes."""
RESTART = 0.5
"""Where the average begins at a new difficulty."""
RATE = 0.1
NEAR, FULL = 0.3, 0.5
"""Shares of keys: in the question's block at first; at least, at the largest distance so far."""
RAISE = 0.5
"""What the amplification rises by."""


@dataclass
class Difficulty:
    """How far the curriculum has come."""

    stage: CurriculumStage
    distance: int
    amplify: float = 0.0
    recalled: float = 0.0

    def observe(self, exact: float) -> None:
        """Take one step's exact match at the present difficulty; raise it when it is learned."""
        self.recalled += RATE * (exact - self.recalled)
        if self.recalled <= ADVANCE or self.finished:
            return
        if self.distance < self.stage.blocks:
            self.distance += 1
        else:
            self.amplify = min(self.stage.amplify, self.amplify + RAISE)
        self.recalled = RESTART

    @property
    def finished(self) -> bool:
        """Whether nothing harder comes."""
        return self.distance == self.stage.blocks and self.amplify == self.stage.amplify

    def draw(self, blocks: Blocks, rows: int) -> Tensor:
        """Return the blocks [rows] of the keys; block `distance` is the question's own."""
        inside = blocks.whole(0, self.distance, rows)
        places = torch.where(blocks.uniform(rows) < FULL, 0, inside)
        if self.distance == 1 and self.recalled < 0.5:
            places[blocks.uniform(rows) < NEAR] = 1
        return places


def run_curriculum(learner: Learner, stage: CurriculumStage, say: Say) -> None:
    """Train through one curriculum stage."""
    difficulty = Difficulty(stage, stage.first)
    blocks, rows = learner.blocks, learner.miniature.batch_size
    for step in range(stage.steps):
        keys, places = blocks.keys(rows), difficulty.draw(blocks, rows)
        tokens = sample(blocks, keys, places, difficulty.distance)
        weights = amplification(
            blocks, places, difficulty.distance, difficulty.amplify, stage.plain
        )
        logits, _ = learner.read(tokens, weights=weights)
        loss, right = grade(blocks.answers(logits), keys)
        learner.learn(loss)
        difficulty.observe(right[places == 0].all(-1).float().mean().item())
        if (step + 1) % 100 == 0:
            say(
                f"distance {difficulty.distance}, amplification {difficulty.amplify:.1f},"
                f" recalled {difficulty.recalled:.2f}"
            )
        if difficulty.finished and stage.mastered(difficulty.recalled):
            return


def sample(blocks: Blocks, keys: Tensor, places: Tensor, distance: int) -> Tensor:
    """Return documents [rows, distance + 1, length], the question last.

    places [rows]: the key's block; `distance` is the question's own, where it lies before it.
    """
    tokens = torch.cat((blocks.filler(len(keys), distance), blocks.questions(keys)), 1)
    near = (places == distance).nonzero().squeeze(1)
    far = (places < distance).nonzero().squeeze(1)
    for rows, room in ((far, blocks.regular), (near, blocks.regular - keys.shape[1] - 1)):
        chosen = tokens[rows, places[rows]]
        blocks.put_keys(chosen, keys[rows], room=room)
        tokens[rows, places[rows]] = chosen
    return tokens


def amplification(
    blocks: Blocks, places: Tensor, distance: int, most: float, plain: float = 0.0
) -> Tensor | None:
    """Return the log weights [rows, distance + 1] of a sample's writes; None where all are 0.

    A filler block stands for c like it, log c uniform in [0, most]: exact for a memory that adds up
    what stationary filler writes. The key's block (places [rows]) stands for itself. plain: the
    share of rows in which every block does.
    """
    if most == 0:
        return None
    weights = most * blocks.uniform(len(places), distance + 1)
    weights[: round(plain * len(places))] = 0.0  # keys and places are drawn alike for all rows
    return weights.scatter(1, places.unsqueeze(1), 0.0)
