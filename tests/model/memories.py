"""The memories that the common suite runs: the one list."""

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
    compose,
)

FAM: dict[str, FamMemory] = {
    f"fam-{state}-window-{window}-{query}": FamMemory(
        slots=3, window=window, state=state, query_position=query
    )
    for state, window, query in [
        ("paper", 0, "current"),
        ("paper", 2, "previous"),
        ("norm", 0, "previous"),
        ("norm", 1, "current"),
        ("latch", 1, "previous"),
        ("latch", 2, "current"),
    ]
}
"""Each state and each window with both query positions, each state with two windows: the code of
one asks nothing of the others."""

FAM["fam-norm-window-1-hidden"] = FamMemory(slots=3, window=1, first="hidden")

IN_A_LAYER: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window-1": WindowMemory(1),
    "window-2": WindowMemory(2),
    **FAM,
    "infini-linear": InfiniMemory(),
    "infini-linear-window-1": InfiniMemory(window=1),
    "infini-delta": InfiniMemory("delta", gate_init=0.5),
    "infini-delta-window-2": InfiniMemory("delta", window=2),
    "abc": AbcMemory(slots=3),
    "abc-window-1": AbcMemory(slots=3, window=1),
    "cmab": CmabMemory(latents=3),
    "cmab-window-2": CmabMemory(latents=3, window=2),
    "window-fam-infini": compose([WindowMemory(1), FamMemory(slots=3), InfiniMemory()]),
    "infini-abc-cmab": compose([InfiniMemory("delta"), AbcMemory(slots=2), CmabMemory(latents=2)]),
    "landmark": LandmarkMemory(block=2),
    "landmark-window-2": LandmarkMemory(block=2, window=2),
    "landmark-retrieve": LandmarkMemory(block=2, retrieve=2),
    "landmark-window-1-retrieve-heads": LandmarkMemory(2, 1, 1, "heads"),
    "landmark-window-1-retrieve-last": LandmarkMemory(2, 1, 2, layers="last"),
}
"""All segments of a forward pass go through a layer at once."""

IN_TURN: dict[str, MemoryConfig] = {
    "rmt-paper": RmtMemory(slots=3),
    "rmt-causal-norm-window-1": RmtMemory(slots=3, mask="causal", state="norm", window=1),
    "rmt-latch-offset": RmtMemory(slots=2, state="latch", offset=True),
    "armt": ArmtMemory(slots=3, key_dim=4),
    "armt-window-1": ArmtMemory(slots=2, key_dim=4, window=1),
    "hmt": HmtMemory(bank=5, sensory=2, search_dim=4),
    "hmt-window-1": HmtMemory(bank=2, sensory=1, search_dim=4, window=1),
    "hmt-stage-1": HmtMemory(bank=3, sensory=0, search_dim=4, search_from=10**9),
}
"""Segments go through the stack one after the other."""

MEMORIES: dict[str, MemoryConfig] = IN_A_LAYER | IN_TURN
