"""Which memories compose, to what, and why others do not."""

import pytest

from model.config import (
    AbcMemory,
    ArmtMemory,
    CmabMemory,
    ComposedMemory,
    FamMemory,
    HmtMemory,
    InfiniMemory,
    LandmarkMemory,
    MemoryConfig,
    ModelConfig,
    NoMemory,
    RmtMemory,
    WindowMemory,
    compose,
)
from tests.model.small import batch_of, build, config_of

WITH_A_WINDOW: list[MemoryConfig] = [
    FamMemory(slots=3),
    InfiniMemory("delta"),
    AbcMemory(slots=3),
    CmabMemory(latents=3),
    RmtMemory(slots=3),
    ArmtMemory(slots=3),
    HmtMemory(bank=3),
    LandmarkMemory(block=2),
]


def named(memory: MemoryConfig) -> str:
    return memory.name


@pytest.mark.parametrize(
    "memory", [NoMemory(), WindowMemory(3), *WITH_A_WINDOW], ids=lambda m: named(m)
)
def test_one_memory_is_itself(memory: MemoryConfig) -> None:
    assert compose([memory]) == memory


@pytest.mark.parametrize("memory", WITH_A_WINDOW, ids=lambda m: named(m))
@pytest.mark.parametrize("window_first", [False, True])
def test_a_window_joins_any_memory(memory: MemoryConfig, window_first: bool) -> None:
    both = [WindowMemory(2), memory] if window_first else [memory, WindowMemory(2)]
    found = compose(both)
    assert type(found) is type(memory)
    assert config_of(found).window == 2
    assert compose([memory]) == memory  # nothing was changed in place
    assert found == type(memory)(**{**vars(memory), "window": 2})


def test_memories_in_a_layer_join_one_another() -> None:
    parts = (InfiniMemory("delta"), AbcMemory(slots=2), FamMemory(slots=3))
    assert compose(parts) == ComposedMemory(parts)
    assert config_of(compose(parts)).window == 0


def test_their_windows_are_one() -> None:
    expected = ComposedMemory((InfiniMemory(), FamMemory(slots=3)), window=2)
    assert compose([InfiniMemory(), WindowMemory(2), FamMemory(slots=3)]) == expected
    assert compose([InfiniMemory(window=2), FamMemory(slots=3)]) == expected
    assert config_of(expected).window == 2


def test_what_is_composed_has_every_part_in_every_layer() -> None:
    memories = [WindowMemory(1), CmabMemory(2), InfiniMemory(), FamMemory(3), AbcMemory(2)]
    model = build(config_of(compose(memories)))
    for block in model.blocks:
        assert set(block.mixer.parts) == {"cmab", "infini", "fam", "abc"}
    batch = batch_of(1, 2, 4)
    _, state = model(batch.tokens, batch.starts)
    assert state.layers[0].window.k.shape[1] == 1
    assert set(state.layers[0].parts) == {"cmab", "infini", "fam", "abc"}


REFUSED: list[tuple[list[MemoryConfig], str]] = [
    ([], r"memory \[\]: nothing is named; use none"),
    (
        [WindowMemory(1), NoMemory()],
        r"memory \['window', 'none'\]: none joins no other memory; leave it out",
    ),
    ([NoMemory(), InfiniMemory()], "none joins no other memory; leave it out"),
    ([InfiniMemory(), InfiniMemory("delta")], "a memory is named twice; name each once"),
    ([WindowMemory(1), WindowMemory(1)], "a memory is named twice; name each once"),
    (
        [WindowMemory(1), FamMemory(window=2)],
        r"more than one sets a window; set it once, by window\.segments",
    ),
    ([InfiniMemory(window=1), FamMemory(window=1)], "more than one sets a window"),
    (
        [RmtMemory(), InfiniMemory()],
        "rmt carries rows from the top of the stack to its bottom, past every layer's memory;"
        " name rmt alone, or with window",
    ),
    (
        [AbcMemory(), ArmtMemory()],
        "armt adds its memory before a layer's attention, where other memories have no part;"
        " name armt alone, or with window",
    ),
    ([FamMemory(), HmtMemory()], "hmt carries rows .* name hmt alone, or with window"),
    ([RmtMemory(), HmtMemory()], "name rmt alone, or with window"),
    (
        [LandmarkMemory(), InfiniMemory()],
        "landmark gates every past key itself, and other memories' keys have no landmark;"
        " name landmark alone, or with window",
    ),
    (
        [ComposedMemory((InfiniMemory(), AbcMemory())), FamMemory()],
        "it is made of several already; name composed alone, or with window",
    ),
]


@pytest.mark.parametrize(
    ("memories", "why"), REFUSED, ids=["-".join(map(named, memories)) for memories, _ in REFUSED]
)
def test_what_has_no_meaning_is_refused_with_the_reason(
    memories: list[MemoryConfig], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        compose(memories)


def test_a_model_has_the_window_of_its_memory() -> None:
    shape = {"vocab_size": 50, "num_layers": 1, "hidden_size": 8, "num_heads": 2}
    shape |= {"num_kv_heads": 1, "ffn_size": 8, "head_dim": 4}
    assert ModelConfig(**shape).window == 0
    assert ModelConfig(**shape, memory=WindowMemory(3)).window == 3
    assert ModelConfig(**shape, memory=RmtMemory(window=2)).window == 2
