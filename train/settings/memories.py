"""The memories a configuration can name: one class each, told apart by `name`.

    memory: fam                                    its name
    memory: {name: fam, slots: 8}                  with keys
    memory: [window, {name: infini, rule: delta}]  several, side by side

A new memory is one class here, one name in the union `NamedMemory` and one line in MEMORY_CONFIGS.
"""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, RootModel

from model import config as model
from train.settings.units import Count, Index, Positive, Probability, Real, Section

_WINDOW = "Previous segments whose keys the tokens also attend, beside the memory."


class MemorySection(Section):
    """What the memories share."""

    @property
    def state_passing(self) -> float:
        """How often a step's new documents begin with an earlier one's state; see FamMemory."""
        return 0.0


class NoMemory(MemorySection):
    """No memory: a segment sees only itself. The baseline every memory must beat."""

    name: Literal["none"] = Field(description="Which memory: none.")


class WindowMemory(MemorySection):
    """The keys and values of the last segments are attended too (Transformer-XL's cache)."""

    name: Literal["window"] = Field(description="Which memory: window.")
    segments: Count = Field(
        default=1,
        description="Previous segments whose keys every token also attends. Cost grows"
        " with it; no layer sees further back than this.",
    )


class FamMemory(MemorySection):
    """TransformerFAM: each layer feeds its own slots back to itself, segment by segment."""

    name: Literal["fam"] = Field(description="Which memory: fam.")
    slots: Count = Field(
        default=64,
        description="Memory slots of each layer: what a segment leaves to all later ones. At"
        " most segment_len. More slots hold more and cost attention over slots per token.",
    )
    window: Index = Field(
        default=0,
        description="Previous segments (M) whose keys the tokens also attend, beside the slots."
        " The slots themselves are always computed from the current segment alone.",
    )
    state: Literal["paper", "norm", "latch"] = Field(
        default="norm",
        description="What a segment hands on. paper: the residual sum as published, which"
        " drifts over hundreds of segments; norm: the same, normalised; latch: gain * tanh("
        "beta * norm), bounded, and sharp enough to hold a value over very many segments.",
    )
    beta: Positive = Field(
        default=2.0,
        description="Used by state=latch only: its first sharpness. Higher holds longer and"
        " learns more slowly.",
    )
    query_position: Literal["current", "previous"] = Field(
        default="current",
        description="Rotary position of the slots' queries: the last positions of the current"
        " segment (so all its keys lie in the past), or those of the previous one.",
    )
    first: Literal["prompt", "hidden"] = Field(
        default="prompt",
        description="What a document's first segment reads of the slots. prompt: the learned first"
        " ones, as published; hidden: nothing, so that an imported model starts out there exactly"
        " as it was, and the memory is read from the second segment on.",
    )
    random_state_passing: Probability = Field(
        default=0.0,
        description="Probability, in training, that a step's new documents start from slots saved"
        " at the end of an earlier step in the place of the learned first ones. It teaches slots"
        " to be read after more segments than a sample has; the paper uses 0.8. 0 is off.",
    )

    @property
    def state_passing(self) -> float:
        """Return random_state_passing."""
        return self.random_state_passing


class InfiniMemory(MemorySection):
    """Infini-attention: a matrix a head takes up keys and values, read beside attention."""

    name: Literal["infini"] = Field(description="Which memory: infini.")
    rule: Literal["linear", "delta"] = Field(
        default="linear",
        description="How a segment is written. linear adds its keys and values up; delta first"
        " takes away what the memory says to these keys, so it does not store things twice, at a"
        " little more compute.",
    )
    gate_init: Real = Field(
        default=0.0,
        description="Where each head's gate begins: sigmoid of it is the memory's share, the rest"
        " is attention's. 0 is half and half; 1 makes the memory learn sooner.",
    )
    gate_lr: Positive = Field(
        default=10.0,
        description="The gates' learning rate as a multiple of train.lr (they have no weight"
        " decay). With 1 they hardly leave gate_init, and the memory stays unused.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class AbcMemory(MemorySection):
    """Bounded-memory control: slots that are running means of keys and values, read as keys."""

    name: Literal["abc"] = Field(description="Which memory: abc.")
    slots: Count = Field(
        default=64,
        description="Running means of each key head; a linear map of the token says how much of"
        " it goes into which. Cost: attention over slots per token.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class CmabMemory(MemorySection):
    """Constant memory: learned latents attend all past keys, tokens attend what they found."""

    name: Literal["cmab"] = Field(description="Which memory: cmab.")
    latents: Count = Field(
        default=64,
        description="Learned queries of each key head that read the whole past. Cost: attention"
        " over latents per token.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class RmtMemory(MemorySection):
    """Recurrent Memory Transformer: rows go from the top of a segment to the bottom of the next."""

    name: Literal["rmt"] = Field(description="Which memory: rmt.")
    slots: Count = Field(
        default=16,
        description="Memory rows, before each segment to be read and behind it to be written."
        " Segments go through the stack one after the other, whatever their number.",
    )
    mask: Literal["paper", "causal"] = Field(
        default="paper",
        description="Which memory rows read one another. paper: all; causal: the earlier ones.",
    )
    state: Literal["paper", "norm", "latch"] = Field(
        default="paper",
        description="What a segment hands on. paper: the rows after the final norm; norm: the"
        " same, normalised with a learned gain; latch: gain * tanh(beta * norm), which can hold a"
        " value over very many segments.",
    )
    beta: Positive = Field(
        default=2.0,
        description="Used by state=latch only: its sharpness. Higher holds longer and learns more"
        " slowly.",
    )
    offset: bool = Field(
        default=False,
        description="Add learned rows to those behind the segment, so that they differ from those"
        " before it in more than position.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class ArmtMemory(MemorySection):
    """Associative RMT: memory rows write a matrix in every layer, by the delta rule."""

    name: Literal["armt"] = Field(description="Which memory: armt.")
    slots: Count = Field(
        default=16,
        description="Rows behind each segment that read it, and write each layer's matrix.",
    )
    key_dim: Count = Field(
        default=64,
        description="Width of a key of the matrix, which has 6 * key_dim rows of hidden_size."
        " More keeps more things apart.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class HmtMemory(MemorySection):
    """Hierarchical Memory Transformer: a bank of one memory a segment, searched by summary."""

    name: Literal["hmt"] = Field(description="Which memory: hmt.")
    bank: Count = Field(
        default=300,
        description="Memories kept, one a segment; the oldest leaves a full bank. At least the"
        " segments of a sample.",
    )
    sensory: Index = Field(
        default=32,
        description="Last tokens of the segment before that are read again in front of the next."
        " At most segment_len.",
    )
    search_dim: Count = Field(
        default=64, description="Width of the queries and keys that search the bank."
    )
    search_from: Index = Field(
        default=0,
        description="Optimizer step at which the search begins (the paper's second stage). Before"
        " it a segment takes the memory of the one before, which is cheaper and learns first.",
    )
    window: Index = Field(default=0, description=_WINDOW)


class LandmarkMemory(MemorySection):
    """Landmark attention: a token closes each block and stands for it; blocks are retrieved."""

    name: Literal["landmark"] = Field(description="Which memory: landmark.")
    block: Annotated[Count, Field(ge=2)] = Field(
        default=64,
        description="Tokens of a block, the landmark that closes it counted: data.segment_len and"
        " all lengths count landmarks too. It divides a rank's slice of a segment.",
    )
    window: Index = Field(
        default=0,
        description="Previous segments that are attended in full, each block through its landmark.",
    )
    retrieve: Index = Field(
        default=0,
        description="Blocks from before the window that each query reads; they are kept in host"
        " memory, so memory grows with the document. 0: none are kept.",
    )
    granularity: Literal["token_and_head", "heads", "tokens"] = Field(
        default="token_and_head",
        description="Which choose alike. token_and_head: none, each token and head has blocks of"
        " its own; heads: all heads of a token; tokens: all tokens of a call, so that a token's"
        " choice depends on later ones: for reading prompts fast, not for training.",
    )
    layers: Literal["all", "last"] = Field(
        default="all",
        description="Which look beyond their segment, by window and retrieval. last: the top one"
        " alone, so that only its blocks are kept, and reading a prompt searches nothing; what it"
        " finds is of blocks that have seen their own segment only.",
    )


Named = (
    NoMemory
    | WindowMemory
    | FamMemory
    | InfiniMemory
    | AbcMemory
    | CmabMemory
    | RmtMemory
    | ArmtMemory
    | HmtMemory
    | LandmarkMemory
)

MEMORY_CONFIGS: dict[str, type[model.MemoryConfig]] = {
    "none": model.NoMemory,
    "window": model.WindowMemory,
    "fam": model.FamMemory,
    "infini": model.InfiniMemory,
    "abc": model.AbcMemory,
    "cmab": model.CmabMemory,
    "rmt": model.RmtMemory,
    "armt": model.ArmtMemory,
    "hmt": model.HmtMemory,
    "landmark": model.LandmarkMemory,
}
"""The model package's own class of each."""

IN_TURN = ("rmt", "armt", "hmt")
"""Those that take one segment a call, however many a forward pass has (model.memory.in_turn)."""


def spelled_out(value: object) -> object:
    """Return the keys that a bare name stands for; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


_Keys = Annotated[Named, Field(discriminator="name")]
_Name = Annotated[str, Field(json_schema_extra={"enum": list(MEMORY_CONFIGS)})]
NamedMemory = Annotated[_Keys, BeforeValidator(spelled_out, json_schema_input_type=_Keys | _Name)]


class MemoryList(RootModel[tuple[NamedMemory, ...]]):
    """Several memories side by side; which ones join is model.config.compose's to say."""

    model_config = ConfigDict(frozen=True)

    @property
    def name(self) -> str:
        """Their names, as in `window + infini`."""
        return " + ".join(part.name for part in self.root)

    @property
    def state_passing(self) -> float:
        """The highest of the parts."""
        return max((part.state_passing for part in self.root), default=0.0)


Memory = NamedMemory | MemoryList


def to_memory_config(memory: Named | MemoryList) -> model.MemoryConfig:
    """Return the model package's description of a memory.

    Raises ValueError, with the reason, for memories that do not join.
    """
    if isinstance(memory, MemoryList):
        return model.compose([to_memory_config(part) for part in memory.root])
    kind = MEMORY_CONFIGS[memory.name]
    taken = {field.name for field in fields(kind)}
    return kind(**memory.model_dump(include=taken))


def describe_memory(memory: Named | MemoryList) -> str:
    """Return names and keys, as in `window (segments 1) + none`."""
    if isinstance(memory, MemoryList):
        return " + ".join(describe_memory(part) for part in memory.root)
    keys = memory.model_dump(exclude={"name"})
    inside = ", ".join(f"{key} {value}" for key, value in keys.items())
    return f"{memory.name} ({inside})" if keys else memory.name


def window_of(memory: Named | MemoryList) -> int:
    """Return how many previous segments' keys the tokens also attend."""
    if isinstance(memory, MemoryList):
        return max((window_of(part) for part in memory.root), default=0)
    segments: int = getattr(memory, "segments", getattr(memory, "window", 0))
    return segments


def find_memory(memory: Named | MemoryList, name: str) -> Named | None:
    """Return the memory of that name, by itself or in a list; None where there is none."""
    parts = memory.root if isinstance(memory, MemoryList) else (memory,)
    return next((part for part in parts if part.name == name), None)
