"""What a memory's fields must satisfy together with others: of its data, layout and training.

Fields of a memory are named by its name, `model.memory.fam.slots`: so a rule holds for it in a list
of memories too, and is left out for all others.
"""

from train.settings.memories import Memory, find_memory, to_memory_config
from train.settings.remedies import Rule, nearest_divisors, nearest_multiples, not_multiple

_WITHOUT_SP = "set parallel.sequence_parallel=false"


def _composition(memory: Memory) -> str | None:
    try:
        to_memory_config(memory)
    except ValueError as error:
        return str(error).removeprefix("memory ")
    return None


# rows that sequence parallelism scatters beside those of tokens


def _fam_rows(slots: int, sequence_parallel: bool, tp: int) -> str | None:
    if not sequence_parallel:
        return None
    return not_multiple(slots, tp, "parallel.tp (sequence parallelism)", _WITHOUT_SP)


def _rmt_rows(slots: int, sequence_parallel: bool, tp: int) -> str | None:
    if not sequence_parallel or 2 * slots % tp == 0:
        return None
    return (
        f"{slots} rows before a segment and {slots} behind it do not split over parallel.tp ="
        f" {tp} (sequence parallelism); use {nearest_multiples(slots, max(1, tp // 2))}, or"
        f" {_WITHOUT_SP}"
    )


def _hmt_rows(micro_batch: int, sequence_parallel: bool, tp: int, sensory: int) -> str | None:
    if not sequence_parallel:
        return None
    # Of the numbers of rows, sensory, sensory + 2 and sensory + 3, at least one is odd.
    name = (
        "parallel.tp (sequence parallelism scatters hmt's rows, of each stream"
        f" {sensory + 3} and {sensory})"
    )
    return not_multiple(micro_batch, tp, name, _WITHOUT_SP)


# lengths


def _fam_slots(slots: int, segment_len: int) -> str | None:
    if slots <= segment_len:
        return None
    return (
        f"{slots} is more than data.segment_len = {segment_len} (slots take the last positions"
        f" of a segment); use at most {segment_len}"
    )


def _hmt_sensory(sensory: int, segment_len: int) -> str | None:
    if sensory <= segment_len:
        return None
    return (
        f"{sensory} is more than data.segment_len = {segment_len}, and only the segment before is"
        f" read again; use at most {segment_len}"
    )


def _hmt_bank(bank: int, sample_len: int, segment_len: int) -> str | None:
    segments = sample_len // segment_len
    if sample_len % segment_len or bank >= segments:
        return None
    return (
        f"{bank} memories are fewer than a sample has segments, sample_len / segment_len ="
        f" {sample_len} / {segment_len} = {segments}, so training would search what has left the"
        f" bank; use at least {segments}, or a shorter data.sample_len"
    )


def _hmt_half(segment_len: int, layout: str, bank: int) -> str | None:
    if segment_len % 2 == 0 or layout == "zigzag":  # zigzag wants even ones anyway
        return None
    return (
        f"{segment_len} is odd, and hmt summarises the first half of a segment; use"
        f" {nearest_multiples(segment_len, 2)}"
    )


def _landmark_block(block: int, segment_len: int, cp: int, layout: str) -> str | None:
    chunks = 1 if cp == 1 else cp if layout == "contiguous" else 2 * cp
    if segment_len % chunks or segment_len // chunks % block == 0:
        return None
    chunk = segment_len // chunks
    if chunks == 1:
        what, where = f"data.segment_len = {chunk}", "a segment is whole blocks"
    else:
        cut = "parallel.cp" if layout == "contiguous" else "(2 * parallel.cp)"
        what = f"data.segment_len / {cut} = {segment_len} / {chunks} = {chunk}"
        where = f"{layout}: a rank holds whole blocks"
    fitting = nearest_divisors(block, chunk, least=2)
    use = f"{fitting}, or " if fitting else ""
    lengths = nearest_multiples(segment_len, chunks * block)
    return f"{block} does not divide {what} ({where}); use {use}data.segment_len {lengths}"


# layouts and training


def _retrieve_over_cp(retrieve: int, cp: int) -> str | None:
    if not retrieve or cp == 1:
        return None
    return (
        f"{retrieve} blocks are read from whole segments, but parallel.cp = {cp} ranks hold a part"
        " of each; use parallel.cp=1, or retrieve 0 for training"
    )


def _heads_over_tp(granularity: str, retrieve: int, tp: int) -> str | None:
    if granularity != "heads" or not retrieve or tp == 1:
        return None
    return (
        f"heads chooses blocks over all heads, but parallel.tp = {tp} ranks hold a part of them;"
        " use token_and_head or tokens, or parallel.tp=1"
    )


def _last_layer(layers: str, window: int, retrieve: int) -> str | None:
    if layers == "all" or window or retrieve:
        return None
    return (
        "last lets the top layer look beyond its segment, and window = retrieve = 0 leave it"
        " nothing to read; set one of them, or use all"
    )


def _hmt_layout(layout: str, cp: int, bank: int) -> str | None:
    if layout == "zigzag" or cp == 1:
        return None
    return (
        f"{layout} puts the first half of a segment, which hmt summarises, on half of the"
        f" parallel.cp = {cp} ranks; use zigzag"
    )


def _hmt_recomputation(
    checkpointing: str, ffn_chunk: int | None, zero: int, bank: int
) -> str | None:
    # DeepSpeed 0.19: "The size of tensor a (0) must match ..." in the backward pass
    if checkpointing != "block" or ffn_chunk is None or zero != 3:
        return None
    return (
        f"block with train.ffn_chunk = {ffn_chunk} recomputes inside a recomputation, for which"
        " parallel.zero = 3 has freed hmt's weights already; use selective, leave ffn_chunk out,"
        " or use parallel.zero=2"
    )


def _wavefront_memory(wavefront: bool, memory: Memory) -> str | None:
    if not wavefront or find_memory(memory, "armt") is not None:
        return None
    return (
        "true is for armt, whose layers hold all that is carried, and no other memory; leave it out"
    )


def _wavefront_weights(wavefront: bool, tp: int, zero: int) -> str | None:
    if not wavefront or (tp == 1 and zero < 3):
        return None
    what = f"parallel.tp = {tp}" if tp > 1 else f"parallel.zero = {zero}"
    return (
        f"true stacks the whole weights of all layers, which {what} cuts; use tp=1 and zero=1 or 2,"
        " or leave it out"
    )


def _wavefront_adapters(wavefront: bool, rank: int) -> str | None:
    if not wavefront:
        return None
    return "true stacks the layers' own maps, not model.lora's beside them; leave one of them out"


def _wavefront_chunks(wavefront: bool, ffn_chunk: int | None) -> str | None:
    if not wavefront or ffn_chunk is None:
        return None
    return (
        "true hands a block the rows of many layers at once, and train.ffn_chunk ="
        f" {ffn_chunk} would cut across them; use one of the two"
    )


_TP, _CP, _SP = "parallel.tp", "parallel.cp", "parallel.sequence_parallel"
_LAYOUT, _SEGMENT, _SAMPLE = "parallel.layout", "data.segment_len", "data.sample_len"
_MICRO, _CHECKPOINTING = "train.micro_batch", "train.checkpointing"
_WAVEFRONT = "train.wavefront"
_MEMORY = "model.memory"
_FAM, _RMT, _ARMT = (f"{_MEMORY}.{name}.slots" for name in ("fam", "rmt", "armt"))
_BANK, _SENSORY = f"{_MEMORY}.hmt.bank", f"{_MEMORY}.hmt.sensory"
_BLOCK, _RETRIEVE = f"{_MEMORY}.landmark.block", f"{_MEMORY}.landmark.retrieve"
_GRANULARITY, _LAYERS = (f"{_MEMORY}.landmark.{key}" for key in ("granularity", "layers"))

# a rule that reads hmt's bank for nothing else holds for hmt alone
MEMORY_RULES: tuple[Rule, ...] = (
    Rule(_MEMORY, (_MEMORY,), _composition),
    Rule(_FAM, (_FAM, _SEGMENT), _fam_slots),
    Rule(_FAM, (_FAM, _SP, _TP), _fam_rows),
    Rule(_RMT, (_RMT, _SP, _TP), _rmt_rows),
    Rule(_ARMT, (_ARMT, _SP, _TP), _fam_rows),
    Rule(_MICRO, (_MICRO, _SP, _TP, _SENSORY), _hmt_rows),
    Rule(_SENSORY, (_SENSORY, _SEGMENT), _hmt_sensory),
    Rule(_BANK, (_BANK, _SAMPLE, _SEGMENT), _hmt_bank),
    Rule(_SEGMENT, (_SEGMENT, _LAYOUT, _BANK), _hmt_half),
    Rule(_LAYOUT, (_LAYOUT, _CP, _BANK), _hmt_layout),
    Rule(
        _CHECKPOINTING,
        (_CHECKPOINTING, "train.ffn_chunk", "parallel.zero", _BANK),
        _hmt_recomputation,
    ),
    Rule(_WAVEFRONT, (_WAVEFRONT, _MEMORY), _wavefront_memory),
    Rule(_WAVEFRONT, (_WAVEFRONT, _TP, "parallel.zero"), _wavefront_weights),
    Rule(_WAVEFRONT, (_WAVEFRONT, "model.lora.rank"), _wavefront_adapters),
    Rule(_WAVEFRONT, (_WAVEFRONT, "train.ffn_chunk"), _wavefront_chunks),
    Rule(_BLOCK, (_BLOCK, _SEGMENT, _CP, _LAYOUT), _landmark_block),
    Rule(_RETRIEVE, (_RETRIEVE, _CP), _retrieve_over_cp),
    Rule(_GRANULARITY, (_GRANULARITY, _RETRIEVE, _TP), _heads_over_tp),
    Rule(_LAYERS, (_LAYERS, f"{_MEMORY}.landmark.window", _RETRIEVE), _last_layer),
)
