"""The memories that the common suite runs: the one list."""

from itertools import product

from model.config import FamMemory, MemoryConfig, NoMemory, WindowMemory

MEMORIES: dict[str, MemoryConfig] = {
    "none": NoMemory(),
    "window-1": WindowMemory(1),
    "window-2": WindowMemory(2),
    **{
        f"fam-{state}-window-{window}-{query}": FamMemory(
            slots=3, window=window, state=state, query_position=query
        )
        for state, window, query in product(
            ("paper", "norm", "latch"), (0, 1, 2), ("current", "previous")
        )
    },
}

FAM = {name: memory for name, memory in MEMORIES.items() if isinstance(memory, FamMemory)}
