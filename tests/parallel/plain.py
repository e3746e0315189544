"""Three optimizer steps in one plain process: what every layout must equal.

Imports neither megatron-core nor DeepSpeed; test_equivalence asserts it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    ComputeConfig,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
    compose,
)
from model.decoder import Decoder
from model.init import initialise
from model.layers import starts_at
from model.lora import B
from model.loss import IGNORE
from model.memory.base import detach

MEMORIES: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window": WindowMemory(2),
    "fam": FamMemory(slots=4, window=1),
    "fam-hidden": FamMemory(slots=4, window=1, first="hidden"),
    "infini": InfiniMemory(gate_init=0.5, window=1),
    "infini-delta": InfiniMemory("delta", gate_init=0.5),
    "abc": AbcMemory(slots=3),
    "cmab": CmabMemory(latents=3, window=1),
    "composed": compose(
        [WindowMemory(1), FamMemory(slots=4), InfiniMemory(gate_init=0.5), AbcMemory(slots=2)]
    ),
    "landmark": LandmarkMemory(block=2, window=1),
    "landmark-last": LandmarkMemory(block=2, window=1, layers="last"),
    "rmt": RmtMemory(slots=4, state="norm", offset=True),
    "rmt-causal": RmtMemory(slots=2, mask="causal", window=1),
    "armt": ArmtMemory(slots=4, key_dim=4),
    "hmt": HmtMemory(bank=3, sensory=1, search_dim=4),
    "hmt-stage-1": HmtMemory(bank=3, sensory=2, search_dim=4, search_from=10**9),
}
INIT_STD = {"rmt": 0.1, "rmt-causal": 0.1, "armt": 0.05, "hmt": 0.15, "hmt-stage-1": 0.1}
BATCH, SEGMENTS, SEGMENT_LEN, VOCAB = 4, 4, 16, 90
LEARNING_RATES = (4e-3, 2e-3, 3e-3)
CLIP = 0.3


@dataclass(frozen=True)
class Case:
    """One layout, and how one step is cut in time."""

    memory: str = "fam"
    tensor: str = "TP1"  # TP1, TP2, TP2+SP
    cp: int = 1
    exchange: str = "ring"
    layout: str = "zigzag"
    stage: int = 1
    dp: int = 1
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    windows: int = 1  # BPTT windows of a step
    micro_batches: int = 1
    bf16: bool = False
    tied: bool = False
    packed: bool = False
    bias: bool = False
    lora: LoraConfig | None = None

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return 1 if self.tensor == "TP1" else 2

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tp * self.cp * self.dp

    def __str__(self) -> str:
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != vars(Case())[name] and name != "compute"
        ]
        recompute = "" if self.compute == ComputeConfig() else self.compute.checkpointing
        return " ".join([*changed, recompute]).strip() or "plain"


class Step(NamedTuple):
    """What one optimizer step shows."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]  # whole parameters, before clipping


def config_of(case: Case) -> ModelConfig:
    """Return the model every layout runs: grouped heads, padded vocabulary, O(1) gradients.

    Where segments go through the stack in turn, rounding does too, 4 segments deep. So their
    weights are smaller: in one process float32 and float64 then differ by 3e-6 at most, as for the
    other memories; at 0.2 by 1e-5 (rmt, hmt) and 3e-4 (armt). test_context has them in float64.
    """
    memory = MEMORIES[case.memory]
    return ModelConfig(
        VOCAB, 2, 32, 4, 2, 48, 8,
        memory=memory, init_std=INIT_STD.get(case.memory, 0.2), tie_embeddings=case.tied,
        qkv_bias=case.bias,
        lora=case.lora,
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (tokens, starts, labels) of three steps of the same streams.

    A stream's document ends in the middle of every step, others go on from step to step; some
    labels are ignored, unequally over streams, segments and places.
    """
    generator, found = torch.Generator().manual_seed(1), []
    shape = (BATCH, SEGMENTS, SEGMENT_LEN)
    for step in range(3):
        tokens = torch.randint(0, VOCAB, shape, generator=generator)
        labels = torch.randint(0, VOCAB, shape, generator=generator)
        labels[0, 1, 5:] = IGNORE
        labels[3, :, :3] = IGNORE
        starts = torch.zeros(BATCH, SEGMENTS, dtype=torch.bool)
        starts[:, 0] = step == 0
        starts[1, 2] = True
        found.append((tokens, starts, labels))
    return found


def packed_batches() -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Return batches of packed segments, and their documents [B, N, S], the same in each step.

    Behind a segment of several documents one begins, in the next step where it is the last. Some
    documents lie on one rank, some on several, some wholly on ranks that hold no earlier one.
    """
    documents = torch.zeros(BATCH, SEGMENTS, SEGMENT_LEN, dtype=torch.int64)
    documents[0, 1, 5:] = 1
    documents[0, 1, 14:] = 2
    documents[1, 1, 2:] = 1
    documents[1, 3, 9:] = 1
    documents[3, 0] = torch.arange(SEGMENT_LEN)
    documents[3, 3, 1:] = 1
    several, found = documents[..., -1] > 0, []
    for tokens, starts, labels in batches():
        starts[:, 1:] |= several[:, :-1]
        starts[:, 0] |= several[:, -1]
        found.append((tokens, starts, labels))
    return found, documents


def batches_of(case: Case) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
    """Return the case's batches, and the documents where they are packed."""
    return packed_batches() if case.packed else (batches(), None)


def biases_start_at_one(model: nn.Module) -> None:
    """As norms do: of a bias that began at 0 all is way, and WEIGHTS counts the whole."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            starts_at(parameter, 1.0)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over two groups.

    Gradients have a root mean square of 4e-3 here and round at 1e-9. With torch's eps of 1e-8 those
    near 0 would move weights by the sign of their rounding, and later gradients differ by that.
    """
    parameters = trained(model).values()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-3)


def unmark_adapters(model: nn.Module) -> None:
    """Have `initialise` draw the adapters' second maps too: from 0 the first has no gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith(B):
            del parameter.initial_value


def train(case: Case) -> tuple[list[Step], dict[str, Tensor]]:
    """Return three steps and the weights after them."""
    config = config_of(case)
    model = Decoder(config)
    biases_start_at_one(model)
    unmark_adapters(model)
    initialise(model, config, seed=0)
    optimizer, state, steps = make_optimizer(model), None, []
    given, documents = batches_of(case)
    for (tokens, starts, labels), lr in zip(given, LEARNING_RATES, strict=True):
        scale = torch.tensor(1.0 / int((labels != IGNORE).sum()))
        optimizer.zero_grad()
        loss = 0.0
        for window in torch.arange(SEGMENTS).chunk(case.windows):
            output: Any = model(
                tokens[:, window],
                starts[:, window],
                state,
                labels=labels[:, window],
                scale=scale,
                step=0,
                documents=None if documents is None else documents[:, window],
            )
            output.loss.backward()
            loss += output.loss.item()
            state = detach(output.state)
        # What only makes the state has no gradient where no window reads what another left.
        for p in trained(model).values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = {name: p.grad.clone() for name, p in trained(model).items()}
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        steps.append(Step(loss, norm, gradients))
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}
