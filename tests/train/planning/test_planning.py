"""The estimates against what they estimate: a dry run, a real engine, the files they read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model.config import LandmarkMemory
from train.build import build, to_model_config
from train.cli import app
from train.planning import load_cluster, plan
from train.planning.activations import activations
from train.planning.choose import choose
from train.planning.dryrun import _as_rank, dry_run
from train.planning.rewrite import rewrite
from train.planning.shapes import shapes_of
from train.planning.timing import CHAIN, OPERATIONS, SCAN
from train.planning.tracing import Trace
from train.planning.weights import count_weights
from train.planning.zero_rule import WIDE, zero_bytes
from train.settings.config import Config, apply_overrides, load, parse_overrides, validate
from train.settings.memories import IN_TURN

WORLD, VOCAB = 8, 4096
TOO_LARGE = ["train.checkpointing=none", "data.sample_len=256k", "train.bptt_len=256k"]
"""For the 8B shape on 80 GB, where block checkpointing would still fit."""

HEAD_IS_WORST = (
    "model.num_layers=1 model.vocab_size=65536 model.hidden_size=2048 data.sample_len=2k"
    " train.bptt_len=2k"
)

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "ffn_size": 1408,
    },
    "data": {"train": "shards", "segment_len": 2048, "sample_len": 8192},
    "train": {
        "steps": 10,
        "batch_size": 8,
        "lr": 1e-3,
        "precision": "bf16",
        "loss_chunk": 256,
    },
}


def small(*changes: str, world: int = WORLD) -> Config:
    return validate(apply_overrides(SMALL, parse_overrides(changes)), world_size=world)


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "train.checkpointing=selective",
        "train.precision=fp32 train.checkpointing=block",
        "parallel.tp=2",
        "parallel.tp=2 parallel.sequence_parallel=false train.checkpointing=block",
        "parallel.cp=4 train.checkpointing=block parallel.tp=2",
        "parallel.cp=4 parallel.attention=all_gather",
        "parallel.cp=2 train.ffn_chunk=512 train.checkpointing=block",
        "parallel.tp=2 train.ffn_chunk=512 train.checkpointing=block",
        "model.memory=window train.micro_batch=2 train.batch_size=16",
        "model.memory=fam parallel.tp=2 parallel.cp=2 train.checkpointing=block",
        "model.memory=infini parallel.cp=2",
        "model.memory=abc train.checkpointing=selective",
        "train.checkpointing=selective train.ffn_chunk=512 model.num_layers=8",
        HEAD_IS_WORST,
        f"{HEAD_IS_WORST} train.loss_chunk=2k",
        f"{HEAD_IS_WORST} parallel.tp=2",
        "model.memory=cmab train.checkpointing=block",
        "model.memory=rmt train.checkpointing=block",
        "model.memory=armt",
        "model.memory=hmt train.bptt_len=4096",
        "model.memory=landmark",
        "train.fp8=true",
        "train.fp8=true train.checkpointing=selective parallel.tp=2",
        "train.fp8=true train.checkpointing=block",
        "train.fp8=true train.checkpointing=block train.ffn_chunk=512 parallel.cp=2",
    ],
)
def test_activations_are_within_a_tenth_of_a_dry_run(changes: str) -> None:
    config = small(*changes.split())
    vocab = config.model.vocab_size or VOCAB
    counted = dry_run(config, WORLD, vocab, [0])[0].peak.total
    model = to_model_config(config, vocab)
    assert activations(config, model, shapes_of(config, WORLD)).total == pytest.approx(
        counted, rel=0.1
    )


@pytest.mark.parametrize(
    ("precision", "block", "fused"),
    [("bf16", 128, True), ("fp32", 64, True), ("fp32", 128, False), ("bf16", 256, False)],
)
def test_a_gpu_holds_no_scores_of_landmarks_that_its_kernel_takes(
    precision: str, block: int, fused: bool
) -> None:
    config = small("model.memory=landmark", f"train.precision={precision}")
    memory = LandmarkMemory(block)
    model = replace(to_model_config(config, VOCAB), memory=memory)
    shapes = shapes_of(config, WORLD)
    host, gpu = (activations(config, model, shapes, device).total for device in ("cpu", "cuda"))
    assert (gpu < host) is fused


def test_a_plan_says_what_it_does_not_count() -> None:
    """Keys and values of 4 heads of 64 in bfloat16: 1,024 bytes a token and layer."""
    for layers, size in (("all", "2,048 bytes"), ("last", "1,024 bytes")):
        memory = f"model.memory={{name: landmark, retrieve: 2, layers: {layers}}}"
        made = plan(small(memory), load_cluster("h100"), 1, 8)
        (said,) = made.not_counted
        assert size in said
        assert said in made.describe()[-1]
        with pytest.raises(ValueError, match="retrieve=2: which blocks .*retrieve=0 counts all"):
            dry_run(small(memory), WORLD, VOCAB, [0])
    assert not plan(small("model.memory=landmark"), load_cluster("h100"), 1, 8).not_counted


def operations(memory: str, segments: int, layers: int) -> int:
    config = small(
        f"model.memory={memory}",
        "data.segment_len=64",
        f"data.sample_len={64 * segments}",
        f"model.num_layers={layers}",
    )
    return dry_run(config, 1, VOCAB, [0])[0].operations


def test_a_layer_has_as_many_operations_as_planned() -> None:
    assert operations("none", 2, 2) - operations("none", 2, 1) == pytest.approx(OPERATIONS, rel=0.1)


@pytest.mark.parametrize("memory", CHAIN | SCAN)
def test_a_memory_adds_as_many_operations_as_planned(memory: str) -> None:
    """In a layer more, for a segment more, or a doubling of all with what was carried.

    Of memories that go in turn without the layer's own.
    """
    few, more = (2, 3) if memory in CHAIN else (3, 7)
    each = [operations(memory, more, layers) - operations(memory, few, layers) for layers in (2, 1)]
    own = OPERATIONS if memory in IN_TURN else 0
    assert each[0] - each[1] - own == pytest.approx((CHAIN | SCAN)[memory], rel=0.15)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_diagonals_hold_a_copy_of_the_blocks(checkpointing: str) -> None:
    """And its gradient; a call works on a segment of every layer."""
    config = small(
        "model.memory=armt",
        "train.wavefront=true",
        "data.segment_len=256",
        "data.sample_len=1024",
        "model.num_layers=3",
        f"train.checkpointing={checkpointing}",
    )
    model, shapes = to_model_config(config, VOCAB), shapes_of(config, WORLD)
    counted = dry_run(config, WORLD, VOCAB, [0])[0].peak.total
    planned = activations(config, model, shapes)
    assert planned.total == pytest.approx(counted, rel=0.1)
    assert planned.stacked >= shapes.element * count_weights(model).blocks
    assert planned.total - planned.stacked < 0.9 * counted


@pytest.mark.parametrize("memory", ["none", "fam", "cmab", "armt", "hmt"])
def test_a_dry_run_and_the_count_agree_on_weights(memory: str) -> None:
    changes = ("parallel.tp=2", "data.sample_len=2048", "train.micro_batch=2")
    config = small(f"model.memory={memory}", *changes)
    run = dry_run(config, WORLD, VOCAB, [1])[0]
    assert run.parameters == count_weights(to_model_config(config, VOCAB)).held(2)


def test_a_ring_sends_keys_forward_and_gradients_in_float32() -> None:
    config = small("parallel.cp=4", "data.sample_len=2048", "model.num_layers=1")
    run = dry_run(config, WORLD, VOCAB, [3])[0]
    keys = 2 * 2048 // 4 * 4 * 64  # k and v of a rank's slice
    sent = {m.num_bytes: n for m, n in run.messages.items() if m.operation == "send"}
    assert sent == {2 * keys: 3 + 3, 4 * keys: 3}  # a rank's own gradients stay


def test_a_world_of_512_takes_one_process() -> None:
    config = small(
        "parallel.tp=4", "parallel.cp=8", "train.batch_size=16", "data.sample_len=4096", world=512
    )
    runs = dry_run(config, 512, VOCAB)
    assert [run.place for run in runs] == [(0, 0, 0), (3, 7, 0)]
    assert runs[0].parameters == runs[1].parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_holds_what_its_rule_says(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    # the ranks that this asks do not exist
    monkeypatch.setattr(coordinator, "assert_ints_same_as_other_ranks", lambda *args: None)
    config = small(
        f"parallel.zero={stage}",
        f"train.precision={precision}",
        "data.segment_len=32",
        "data.sample_len=32",
    )
    for name, value in (("RANK", 3), ("LOCAL_RANK", 0), ("WORLD_SIZE", WORLD)):
        monkeypatch.setenv(name, str(value))
    with _as_rank(3, WORLD), Trace({}) as trace:
        from parallel.mesh import build_mesh

        mesh = build_mesh(tp=1, cp=1)
        model = to_model_config(config, VOCAB)
        built = build(config, model, mesh)
        tokens = torch.zeros(1, 1, 32, dtype=torch.int64)
        for _ in range(2):
            starts = torch.ones(1, 1, dtype=torch.bool)
            output = built.engine(tokens, starts, labels=tokens, scale=torch.ones(()))
            loss = output.loss
            del output
            built.engine.backward(loss, last=True)
            del loss
            built.engine.step(1e-3)
        held = trace.now().total
        count = count_weights(model)
        rule = zero_bytes(
            stage=stage,
            held=count.total,
            trained=count.total,
            ranks=WORLD,
            element=2 if precision == "bf16" else 4,
            cuda=False,
        )
    expected = rule.parameters + rule.master + rule.moments
    if stage == 3:  # keeps its gradient partition and its whole bucket between steps
        expected += WIDE * (count.total // WORLD + 500_000_000)
    assert held == pytest.approx(expected, rel=0.03)


def test_a_plan_says_which_part_to_shrink() -> None:
    config = load("configs/pretrain_8b.yaml", TOO_LARGE, world_size=64)
    made = plan(config, load_cluster("h100"), 8, 8)
    assert not made.memory.fits
    assert "largest part is layers" in made.memory.verdict()
    assert "train.checkpointing=block" in made.memory.verdict()


def test_more_of_everything_takes_longer() -> None:
    cluster = load_cluster("h100")

    def step_s(*changes: str) -> float:
        config = load("configs/pretrain_8b.yaml", changes, world_size=64)
        return plan(config, cluster, 8, 8).time.total

    plain = step_s()
    assert step_s("train.batch_size=64") > 1.9 * plain
    assert step_s("parallel.layout=contiguous") > plain
    assert step_s("parallel.attention=all_gather") > plain
    assert step_s("train.checkpointing=block") > plain
    assert step_s("model.memory.name=none") < plain


def test_mfu_times_the_peak_is_the_formulas_work() -> None:
    from train.speed.metrics import training_flops_per_token

    config = load("configs/pretrain_8b.yaml", [], world_size=64)
    made = plan(config, load_cluster("h100"), 8, 8)
    flops = training_flops_per_token(to_model_config(config, 0), config.data.segment_len)
    work = flops * made.tokens_per_step
    assert made.mfu * 989.5e12 * 64 * made.time.total == pytest.approx(work)


def test_choices_fit_keep_the_rules_and_are_ranked() -> None:
    config = small()
    found = choose(config, load_cluster("h100"), 1, WORLD)
    days = [choice.plan.days for choice in found.ranked]
    assert days == sorted(days)
    assert len(days) == found.valid  # so small a model fits everywhere
    for choice in (found.ranked[0], found.ranked[-1]):
        small(*choice.words().split())
        assert choice.plan.memory.fits


def test_where_nothing_fits_the_smallest_is_told() -> None:
    cluster = load_cluster("h100")
    tiny = cluster.device.model_copy(update={"memory_bytes": 3 << 30})
    found = choose(small(), cluster.model_copy(update={"device": tiny}), 1, WORLD)
    assert not found.ranked
    assert "does not fit" in "\n".join(found.describe(3))


def test_written_values_leave_comments_and_order() -> None:
    text = "name: x\nparallel: # how\n  cp: 2 # two\n  tp: 1\ntrain:\n  steps: 3\n"
    written = rewrite(text, {"parallel.cp": 4, "train.micro_batch": 2, "parallel.zero": 3})
    assert written == (
        "name: x\nparallel: # how\n  zero: 3\n  cp: 4 # two\n  tp: 1\n"
        "train:\n  micro_batch: 2\n  steps: 3\n"
    )


def test_a_file_that_cannot_be_rewritten_is_refused() -> None:
    with pytest.raises(ValueError, match="one key a line"):
        rewrite("parallel: {cp: 2}\n", {"parallel.cp": 4})


def test_an_unknown_cluster_names_those_known() -> None:
    with pytest.raises(ValueError, match="a100, h100, h200; did you mean 'h100'"):
        load_cluster("h1000")


def test_the_command_prints_json_and_exits_1_where_it_does_not_fit(tmp_path: Path) -> None:
    arguments = ["plan", "configs/pretrain_8b.yaml", "--nodes", "8", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["fits"] and told["layout"]["world"] == 64
    assert sum(told["time"].values()) == pytest.approx(told["step_s"])
    again = CliRunner().invoke(app, [*arguments, *TOO_LARGE])
    assert again.exit_code == 1
