"""Training on states that have read hundreds of blocks, by two pools of states between steps.

A memory that feeds back on itself must hold a key while its state drifts, and must still be able
to write late; gradients through five blocks see neither. So the key-free pool holds states that
have read filler only (late writing), the keyed pool states that hold a key and were last read
right (late reading). States are taken with noise, which makes what holds a key an attractor, and
without gradient; some read up to `aging` blocks more first. Wrong rows leave the keyed pool:
training on what is lost for good teaches guessing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.memory.base import State, detach
from train.miniatures.blocks import Blocks
from train.miniatures.config import PoolStage
from train.miniatures.learner import Learner, grade
from train.miniatures.progress import Say
from train.miniatures.states import join, noisy, pick, put


class Pool:
    """Carried states with the number of blocks each has read, and the keys some hold."""

    def __init__(self, state: State, keys: Tensor, *, full: bool) -> None:
        self.state, self.keys = state, keys
        self.used = torch.full((len(keys),), full)
        self.age = torch.ones(len(keys), dtype=torch.int64)

    def take(self, blocks: Blocks, rows: int) -> Tensor:
        """Return the indices of at most `rows` used states, drawn without replacement."""
        used = self.used.nonzero().squeeze(1)
        order = torch.randperm(len(used), generator=blocks.generator)
        return used[order[:rows]]

    def replace(self, rows: Tensor, state: State, age: Tensor) -> None:
        """Put new states in the place of those at these indices."""
        self.state = put(self.state, rows, state)
        self.age[rows] = age
        self.used[rows] = True

    def add(self, state: State, keys: Tensor, age: Tensor) -> None:
        """Put states into free places, as many as there are."""
        free = (~self.used).nonzero().squeeze(1)[: len(keys)]
        count = len(free)
        self.keys[free] = keys[:count]
        self.replace(free, pick(state, torch.arange(count)), age[:count])


class Pools:
    """The two pools, and the step that trains on them."""

    def __init__(self, learner: Learner, stage: PoolStage) -> None:
        self.learner, self.stage, self.blocks = learner, stage, learner.blocks
        with torch.no_grad():
            _, state = learner.read(self.blocks.filler(stage.pool))
        state = detach(state)
        nothing = self.blocks.keys(stage.pool)
        self.free = Pool(state, nothing, full=True)
        self.keyed = Pool(state, nothing.clone(), full=False)

    def step(self) -> tuple[float, float]:
        """Make one step; return the exact match of fresh and of aged rows (nan: there is none)."""
        rows, blocks = self.learner.miniature.batch_size, self.blocks
        old = self.keyed.take(blocks, self.stage.aged_rows)
        new = self.free.take(blocks, rows - len(old))
        state = join(pick(self.free.state, new), pick(self.keyed.state, old))
        age = torch.cat((self.free.age[new], self.keyed.age[old]))
        keys = torch.cat((blocks.keys(len(new)), self.keyed.keys[old]))
        fresh = torch.arange(rows) < len(new)
        if float(blocks.uniform()) < self.stage.aging_share:
            state, age = self._grow_old(state, age, fresh)
            self.free.replace(new, pick(state, fresh), age[: len(new)])
        state = noisy(detach(state), self.stage.noise, blocks.normal)
        begins = fresh & (blocks.uniform(rows) < self.stage.initial_rows)
        state, read = self._read_with_gradient(state, keys, fresh, begins)
        # On a fork: the state after the question is dropped, so no answer refreshes a memory.
        logits, _ = self.learner.read(blocks.questions(keys), state)
        loss, digits = grade(blocks.answers(logits), keys)
        self.learner.learn(loss)
        right = digits.all(-1)
        self._keep(state, keys, torch.where(begins, 0, age) + read, right, old)
        return right[fresh].float().mean().item(), right[~fresh].float().mean().item()

    @torch.no_grad()
    def _grow_old(self, state: State, age: Tensor, fresh: Tensor) -> tuple[State, Tensor]:
        """Read filler without gradient; some key-free states begin anew first."""
        count = int(self.blocks.whole(1, self.stage.aging + 1))
        anew = fresh & (self.blocks.uniform(len(age)) < self.stage.reset)
        for n in range(count):
            starts = anew if n == 0 else None
            _, state = self.learner.read(self.blocks.filler(len(age)), state, starts=starts)
        return state, torch.where(anew, 0, age) + count

    def _read_with_gradient(
        self, state: State, keys: Tensor, fresh: Tensor, begins: Tensor
    ) -> tuple[State, int]:
        """Read some blocks, the key in the first one of fresh rows; return how many."""
        count = int(self.blocks.whole(1, self.stage.blocks + 1))
        tokens = self.blocks.filler(len(keys), count)
        first = tokens[:, 0].clone()
        self.blocks.put_keys(first, keys)
        tokens[fresh, 0] = first[fresh]
        if self.stage.update_noise == 0:
            return self.learner.read(tokens, state, starts=begins)[1], count
        for n in range(count):
            starts = begins if n == 0 else None
            _, state = self.learner.read(tokens[:, n : n + 1], state, starts=starts)
            state = noisy(state, self.stage.update_noise, self.blocks.normal)
        return state, count

    def _keep(self, state: State, keys: Tensor, age: Tensor, right: Tensor, old: Tensor) -> None:
        """Keep the states whose key was read right, as they were before the question.

        An aged one goes back to its place (a few retire, so that keys change), a fresh one to a
        free place.
        """
        state = detach(state)
        new = len(right) - len(old)
        aged = torch.arange(new, len(right))
        retire = self.blocks.uniform(len(old)) < self.stage.reset
        stays = right[aged] & ~retire
        self.keyed.used[old] = False
        self.keyed.replace(old[stays], pick(state, aged[stays]), age[aged[stays]])
        won = right[:new].nonzero().squeeze(1)
        self.keyed.add(pick(state, won), keys[won], age[won])


def run_pools(learner: Learner, stage: PoolStage, say: Say) -> None:
    """Train through one stage of pools."""
    pools = Pools(learner, stage)
    fresh, aged = 0.0, 0.0
    for step in range(stage.steps):
        now_fresh, now_aged = pools.step()
        fresh += 0.05 * (now_fresh - fresh)
        aged += 0.05 * (now_aged - aged) if now_aged == now_aged else 0.0
        if (step + 1) % 100 == 0:
            ages = pools.keyed.age[pools.keyed.used].float()
            oldest = ages.max().item() if len(ages) else 0
            say(
                f"fresh {fresh:.2f}, aged {aged:.2f} (survivors), keyed {len(ages)},"
                f" mean age {ages.mean().item():.0f}, oldest {oldest:.0f},"
                f" key-free {pools.free.age.float().mean().item():.0f}"
            )
        if stage.mastered(fresh):
            return
