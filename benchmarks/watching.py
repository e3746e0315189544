"""What watching costs training: each thing that the pulse, the waits and the watchdog do.

    python benchmarks/watching.py

Medians of rounds, in microseconds of the training thread; the watchdog's own thread apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from train.watch.peers import Peers
from train.watch.pulse import Pulse, follow_layers
from train.watch.stragglers import Stragglers
from train.watch.waiting import Waiting
from train.watch.watchdog import Limits, Watchdog

ROUNDS, CALLS = 9, 300
LAYERS, MICRO_BATCHES, COLLECTIVES = 32, 8, 2000
"""Of a step that stands for a large model's."""


class Nothing(nn.Module):
    """A block that computes nothing."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """Return x."""
        return (x.view_as(x),)


def microseconds(action: Callable[[], object]) -> float:
    """Return the median time of a call."""
    found = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(CALLS):
            action()
        found.append((time.thread_time() - began) / CALLS * 1e6)
    return statistics.median(found)


def pass_through(block: nn.Module, x: torch.Tensor) -> None:
    """Run a block forward and backward."""
    block(x)[0].sum().backward()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pulse, waiting, one = Pulse(), Waiting(), torch.ones(1)
    x = torch.ones(1, requires_grad=True)
    plain, followed = Nothing(), Nothing()
    follow_layers(nn.ModuleList([followed]), pulse)
    layer = microseconds(lambda: pass_through(followed, x)) - microseconds(
        lambda: pass_through(plain, x)
    )
    alone = microseconds(lambda: dist.all_reduce(one))
    with waiting.counting():
        wait = microseconds(lambda: dist.all_reduce(one)) - alone
    window = microseconds(lambda: pulse.window(0, 0, 3))
    stragglers = Stragglers(["n"], waiting, torch.device("cpu"))
    gather = microseconds(stragglers.compare)
    dog = Watchdog(
        pulse, Peers(0, 1), Limits(1e6, 1e6, 5.0), node="n", report=lambda text, step: None
    )
    tick = microseconds(lambda: dog._tell(dog._describe_self()))
    dog.stop()
    step = LAYERS * MICRO_BATCHES * layer + MICRO_BATCHES * window + COLLECTIVES * wait
    print("| what | us |\n| --- | --- |")
    for name, value in (
        ("a layer, forward and backward", layer),
        ("a window", window),
        ("a collective", wait),
        ("comparing the ranks, each log_every steps, but for the message", gather),
        ("the watchdog's thread, each 2 s", tick),
        (f"a step: {LAYERS} layers x {MICRO_BATCHES} windows, {COLLECTIVES} collectives", step),
    ):
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
