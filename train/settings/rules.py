"""What fields of the configuration must satisfy together, each rule with its remedy.

A rule names the fields that it reads, and is left out while one of them is itself broken, so
every problem that can be known is told at once. A message gives the value, the limit and the
nearest values that work.
"""

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path

from data.urls import shown_url, url_of
from model.config import VOCAB_MULTIPLE
from train.settings.data import CorpusShare
from train.settings.evaluation_rules import EVALUATION_RULES
from train.settings.fp8 import FP8_RULES
from train.settings.memories import IN_TURN, Memory, find_memory
from train.settings.memory_rules import MEMORY_RULES
from train.settings.pretrained_keys import PRETRAINED_RULES
from train.settings.profile import PROFILE_RULES
from train.settings.remedies import Rule, nearest, nearest_divisors, nearest_multiples, not_multiple
from train.settings.training import CurriculumStage


def broken_rules(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return (dotted path, message) of each rule that the values break, in the order of RULES.

    values: each valid field by its dotted path, and `world_size` (None where not known).
    """
    problems = []
    for rule in RULES:
        if all(path in values for path in rule.needs):
            message = rule.check(*(values[path] for path in rule.needs))
            if message is not None:
                problems.append((rule.path, message))
    return problems


# model


def _kv_heads(num_kv_heads: int, num_heads: int) -> str | None:
    if num_heads % num_kv_heads == 0:
        return None
    return (
        f"{num_kv_heads} does not divide num_heads = {num_heads} (each key head serves the same"
        f" number of query heads); use {nearest_divisors(num_kv_heads, num_heads)}"
    )


def _heads_over_tp(num_heads: int, tp: int) -> str | None:
    return not_multiple(num_heads, tp, "parallel.tp", "lower parallel.tp")


def _kv_heads_over_tp(num_kv_heads: int, tp: int) -> str | None:
    return not_multiple(num_kv_heads, tp, "parallel.tp", "lower parallel.tp")


def _ffn_over_tp(ffn_size: int, tp: int) -> str | None:
    return not_multiple(ffn_size, tp, "parallel.tp")


def _tp(tp: int) -> str | None:
    if VOCAB_MULTIPLE % tp == 0:
        return None
    return (
        f"{tp} does not divide {VOCAB_MULTIPLE}, which the vocabulary is padded to a multiple of;"
        f" use {nearest_divisors(tp, VOCAB_MULTIPLE)}"
    )


def _head_dim(head_dim: int | None, hidden_size: int, num_heads: int) -> str | None:
    if head_dim is not None:
        if head_dim % 2 == 0:
            return None
        return f"{head_dim} is odd, but rotary embedding turns pairs; use {head_dim + 1}"
    if hidden_size % (2 * num_heads) == 0:
        return None
    return (
        f"left out, so it is hidden_size / num_heads = {hidden_size} / {num_heads}, which is"
        " not an even whole number (rotary embedding turns pairs); use hidden_size"
        f" {nearest_multiples(hidden_size, 2 * num_heads)} or give head_dim"
    )


def _lora_rank(rank: int, hidden_size: int) -> str | None:
    if rank <= hidden_size:
        return None
    return (
        f"{rank} is more than model.hidden_size = {hidden_size}, and no weight has a rank above"
        f" that; use at most {hidden_size}, or leave model.lora out to train all weights"
    )


# lengths


def _segment_len(segment_len: int, cp: int, layout: str) -> str | None:
    if layout == "contiguous":
        return not_multiple(segment_len, cp, "parallel.cp")
    contiguous = "set parallel.layout=contiguous" if segment_len % cp == 0 else ""
    return not_multiple(
        segment_len, 2 * cp, "2 * parallel.cp (zigzag: two chunks a rank)", contiguous
    )


def _sample_len(sample_len: int, segment_len: int) -> str | None:
    return not_multiple(sample_len, segment_len, "data.segment_len")


def _bptt_len(bptt_len: int | None, sample_len: int, segment_len: int) -> str | None:
    if bptt_len is None or sample_len % segment_len:
        return None
    if bptt_len > sample_len:
        return (
            f"{bptt_len} is longer than data.sample_len = {sample_len}, and gradients never"
            f" reach into another sample; use {sample_len} or a longer sample"
        )
    if bptt_len % segment_len == 0 and sample_len % bptt_len == 0:
        return None
    segments = sample_len // segment_len
    lengths = [n * segment_len for n in range(1, segments + 1) if segments % n == 0]
    if bptt_len % segment_len:
        limit = f"is not a multiple of data.segment_len = {segment_len}"
    else:
        limit = f"does not divide data.sample_len = {sample_len}"
    return f"{bptt_len} {limit}; use {nearest(lengths, bptt_len)}"


def _packing(packing: bool, memory: Memory) -> str | None:
    if not packing:
        return None
    if any(find_memory(memory, in_turn) for in_turn in IN_TURN):
        why = "a document inside a segment would need memory rows of its own"
    elif find_memory(memory, "landmark"):
        why = "documents would have to begin and end with a block"
    else:
        return None
    return (
        f"true, but {memory.name} reads whole segments: {why}; set data.packing=false, or use none,"
        " window, fam, infini, abc or cmab"
    )


def _packed_shards(packing: bool, shuffle_shards: int | None) -> str | None:
    if not packing or shuffle_shards is None:
        return None
    return (
        f"true, but data.shuffle_shards = {shuffle_shards} reads the index shard by shard, and"
        " packs are made of a whole one; set data.packing=false, or leave shuffle_shards out"
    )


# corpora


def _corpora(train: Path | tuple[CorpusShare, ...]) -> str | None:
    if isinstance(train, Path):
        return None
    if not train:
        return "[] names no corpus; give a folder, or a list such as [{path: books, weight: 1}]"
    seen: dict[Path, int] = {}
    for number, part in enumerate(train):
        before = seen.setdefault(Path(os.path.normpath(part.path)), number)
        if before != number:
            return (
                f"{part.path} is both [{before}] and [{number}]; name it once, with weight"
                f" {train[before].weight + part.weight:g}"
            )
    return None


# ranks and rows


def _world_size(tp: int, cp: int, world_size: int | None) -> str | None:
    if world_size is None or world_size % (tp * cp) == 0:
        return None
    return (
        f"world size {world_size} is not tp * cp * dp with tp * cp = {tp} * {cp} = {tp * cp};"
        f" start {nearest_multiples(world_size, tp * cp)} ranks, or change tp or cp"
    )


def _batch_size(
    batch_size: int, micro_batch: int, tp: int, cp: int, world_size: int | None
) -> str | None:
    if world_size is None or world_size % (tp * cp):
        # dp is not known; whatever it is, the rows of a rank are whole micro-batches
        return not_multiple(batch_size, micro_batch, "train.micro_batch")
    dp = world_size // (tp * cp)
    return not_multiple(batch_size, dp * micro_batch, f"dp * micro_batch = {dp} * {micro_batch}")


def _sharded_rows(
    sequence_parallel: bool,
    tp: int,
    cp: int,
    micro_batch: int,
    bptt_len: int | None,
    sample_len: int,
    segment_len: int,
    memory: Memory,
) -> str | None:
    window, name = sample_len if bptt_len is None else bptt_len, "bptt_len"
    if any(find_memory(memory, in_turn) for in_turn in IN_TURN):
        window, name = segment_len, "segment_len"  # such memories take one segment a call
    if not sequence_parallel or window % segment_len or segment_len % cp:
        return None
    rows = micro_batch * window // cp
    if rows % tp == 0:
        return None
    return (
        f"a call's rows, micro_batch * {name} / cp ="
        f" {micro_batch} * {window} / {cp} = {rows}, do not split over parallel.tp = {tp}; use"
        f" data.segment_len {nearest_multiples(segment_len, cp * math.lcm(2, tp))} or set"
        " parallel.sequence_parallel=false"
    )


# schedule


def _curriculum(
    stages: tuple[CurriculumStage, ...], sample_len: int, segment_len: int
) -> str | None:
    for earlier, stage in itertools.pairwise(stages):
        if stage.until <= earlier.until:
            return (
                f"a stage until step {stage.until} comes after one until {earlier.until}; put"
                " stages in the order of their steps, each later than the one before"
            )
    if sample_len % segment_len:
        return None
    segments = sample_len // segment_len
    for stage in stages:
        if stage.segments > segments:
            return (
                f"the stage until step {stage.until} has {stage.segments} segments, but a sample"
                f" has sample_len / segment_len = {sample_len} / {segment_len} = {segments}; use"
                f" at most {segments}, or a longer data.sample_len"
            )
    return None


def _min_lr(min_lr: float, lr: float) -> str | None:
    if min_lr <= lr:
        return None
    return f"{min_lr:g} is above train.lr = {lr:g}, where the schedule starts; use at most {lr:g}"


def _warmup_steps(warmup_steps: int, steps: int) -> str | None:
    if warmup_steps < steps:
        return None
    return (
        f"{warmup_steps} leaves no step at full rate, train.steps = {steps};"
        f" use at most {steps - 1}"
    )


def _decay_steps(
    decay_steps: int | None, schedule: str, steps: int, warmup_steps: int
) -> str | None:
    left = steps - warmup_steps
    if schedule != "wsd" or left < 1:
        return None
    if decay_steps is None:
        return f"missing, and schedule=wsd needs it; {max(1, left // 10)} is a tenth of the run"
    if decay_steps <= left:
        return None
    return (
        f"{decay_steps} is more than steps - warmup_steps = {steps} - {warmup_steps} = {left};"
        f" use at most {left}"
    )


def _cache_dir(
    cache_dir: Path | None, train: Path | tuple[CorpusShare, ...], valid: Path | None
) -> str | None:
    folders = [train] if isinstance(train, Path) else [part.path for part in train]
    folders += [valid] if valid else []
    urls = [url for folder in folders if (url := url_of(folder))]
    if not urls or cache_dir is not None:
        return None
    return (
        f"missing, and {shown_url(urls[0])} is a URL; name a folder on a disk of the node, such as"
        " /tmp/longhaul-cache"
    )


def _keep_every(keep_every: int | None, every: int) -> str | None:
    if keep_every is None:
        return None
    return not_multiple(keep_every, every, "checkpoint.every")


_TP, _CP, _SP = "parallel.tp", "parallel.cp", "parallel.sequence_parallel"
_HEADS, _KV_HEADS = "model.num_heads", "model.num_kv_heads"
_SEGMENT, _SAMPLE, _BPTT = "data.segment_len", "data.sample_len", "train.bptt_len"
_BATCH, _MICRO = "train.batch_size", "train.micro_batch"
_RANK = "model.lora.rank"
_STEPS, _WARMUP = "train.steps", "train.warmup_steps"

RULES: tuple[Rule, ...] = (
    Rule(_TP, (_TP,), _tp),
    Rule(_KV_HEADS, (_KV_HEADS, _HEADS), _kv_heads),
    Rule(_HEADS, (_HEADS, _TP), _heads_over_tp),
    Rule(_KV_HEADS, (_KV_HEADS, _TP), _kv_heads_over_tp),
    Rule("model.ffn_size", ("model.ffn_size", _TP), _ffn_over_tp),
    Rule("model.head_dim", ("model.head_dim", "model.hidden_size", _HEADS), _head_dim),
    *PRETRAINED_RULES,
    Rule(_RANK, (_RANK, "model.hidden_size"), _lora_rank),
    *MEMORY_RULES,
    Rule(_SEGMENT, (_SEGMENT, _CP, "parallel.layout"), _segment_len),
    Rule(_SAMPLE, (_SAMPLE, _SEGMENT), _sample_len),
    Rule("data.packing", ("data.packing", "model.memory"), _packing),
    Rule("data.packing", ("data.packing", "data.shuffle_shards"), _packed_shards),
    Rule("data.train", ("data.train",), _corpora),
    Rule(_BPTT, (_BPTT, _SAMPLE, _SEGMENT), _bptt_len),
    Rule("parallel", (_TP, _CP, "world_size"), _world_size),
    Rule(_SP, (_SP, _TP, _CP, _MICRO, _BPTT, _SAMPLE, _SEGMENT, "model.memory"), _sharded_rows),
    Rule("train.curriculum", ("train.curriculum", _SAMPLE, _SEGMENT), _curriculum),
    Rule(_BATCH, (_BATCH, _MICRO, _TP, _CP, "world_size"), _batch_size),
    Rule("train.min_lr", ("train.min_lr", "train.lr"), _min_lr),
    Rule(_WARMUP, (_WARMUP, _STEPS), _warmup_steps),
    Rule(
        "train.decay_steps",
        ("train.decay_steps", "train.schedule", _STEPS, _WARMUP),
        _decay_steps,
    ),
    *FP8_RULES,
    *PROFILE_RULES,
    Rule("data.cache_dir", ("data.cache_dir", "data.train", "data.valid"), _cache_dir),
    *EVALUATION_RULES,
    Rule("checkpoint.keep_every", ("checkpoint.keep_every", "checkpoint.every"), _keep_every),
)
