"""A new run from another checkpoint's weights: at every layout, and every bad input."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compare import relative
from tests.ranks import run_ranks
from tests.train.attempts import (
    assert_same_bits,
    finish,
    forked,
    losses,
    pretrain,
    pretrain_forking,
    read_rows,
    tensors_of,
)
from tests.train.starting.test_inputs import assert_says, lines, one_line
from tests.train.starting.test_resume import kill_while_at
from tests.train.tiny import Shards, build_tiny, tiny
from train.build import to_model_config
from train.checkpoints.folder import choose_checkpoint, read_manifest
from train.checkpoints.merged import MergedWeights
from train.checkpoints.snapshot import read_model
from train.checkpoints.stored import Stored
from train.loop import TrainState
from train.pretrain import build_from
from train.settings.config import Config, validate
from train.starting.inputs import open_inputs
from train.starting.resume import RunFolder

pytestmark = pytest.mark.gloo

STEPS = 4
NONE = {"name": "none"}
LORA = {"rank": 4, "alpha": 8, "targets": "all"}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "dp2-zero3": (2, {"parallel__zero": 3}),
    "cp2-zero2": (2, {"parallel__cp": 2, "parallel__zero": 2}),
    "tp2-sp-cp2-zero1": (4, {"parallel__tp": 2, "parallel__cp": 2}),
    "tp2-dp2-zero3": (
        4,
        {"parallel__tp": 2, "parallel__zero": 3, "parallel__sequence_parallel": False},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: Shards) -> Path:
    """Return a run without memory, of two tensor-parallel ranks; nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("base")
    changes: dict[str, object] = {"model__memory": NONE, "parallel__tp": 2, "data__valid": None}
    finish(2, validate(tiny(folder / "run", shards, train__steps=STEPS, **changes)))
    return folder / "run"


def tuned(folder: Path, shards: Shards, base: Path, **changes: object) -> dict[str, Any]:
    """Return a run with fam that starts from the base's weights.

    eps: or gradients near 0 move weights by the sign of their rounding, which layouts differ by.
    """
    settings: dict[str, object] = {
        "train__steps": STEPS,
        "train__warmup_steps": 0,
        "train__eps": 1e-3,
        "data__valid": None,
        "seed": 1,
    }
    return tiny(folder, shards, **settings | {"model__init_from": str(base)} | changes)


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def alone(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    shards: Shards,
    base: Path,
) -> tuple[dict[str, Any] | None, Path, str]:
    """Return (model.lora, run folder, text) of a tuned run of one process."""
    folder: Path = tmp_path_factory.mktemp("alone")
    raw = tuned(folder, shards, base, model__lora=request.param)
    return request.param, folder, finish(1, validate(raw))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_and_goes_on_alike(
    name: str,
    tmp_path: Path,
    shards: Shards,
    base: Path,
    alone: tuple[dict[str, Any] | None, Path, str],
) -> None:
    size, changes = LAYOUTS[name]
    lora, expected, _ = alone
    config = validate(tuned(tmp_path / "run", shards, base, model__lora=lora, **changes))
    finish(size, config)
    rows = zip(losses(tmp_path / "run"), losses(expected), strict=True)
    for (step, loss, norm, _), (_, plain_loss, plain_norm, _) in rows:
        assert loss == pytest.approx(plain_loss, rel=1e-6), step
        assert norm == pytest.approx(plain_norm, rel=1e-5), step
    weights, plain_weights = (whole_weights(run) for run in (tmp_path / "run", expected))
    assert weights.keys() == plain_weights.keys()
    for weight_name, weight in weights.items():
        assert relative(weight, plain_weights[weight_name]) < 1e-5, weight_name


def whole_weights(run: Path) -> dict[str, Tensor]:
    path, manifest = choose_checkpoint(run)
    stored = Stored(path, manifest)
    return {name: stored.whole(name) for name in manifest.parameters}


def test_the_log_names_what_came_from_where(
    base: Path, alone: tuple[dict[str, Any] | None, Path, str]
) -> None:
    lora, _, text = alone
    assert f"weights from {base}/checkpoints/step-0000000{STEPS} (step {STEPS})" in text
    assert (
        "begun from the seed: memory.parts.fam.prompt, blocks.*.mixer.parts.fam.carry.gain" in text
    )
    assert ("of them trained" in text) == (lora is not None)


def started_and_seeded(config: Config) -> list[tuple[Any, Any]]:
    """Return this rank's fragments with the checkpoint's weights, and with none."""
    plain, mesh, inputs = build_tiny(config)
    assert inputs.start is not None
    model = to_model_config(config, inputs.train.vocab_size)
    started = build_from(inputs.start, config, model, mesh)
    return list(zip(started.engine.fragments(), plain.engine.fragments(), strict=True))


@pytest.mark.parametrize("zero", [1, 3])
def test_masters_are_the_checkpoints_and_moments_begin_anew(
    zero: int, tmp_path: Path, shards: Shards, base: Path
) -> None:
    raw = tuned(tmp_path / "run", shards, base, parallel__zero=zero)
    saved = whole_weights(base)
    found = set()
    for fragments in run_ranks(2, started_and_seeded, validate(raw)):
        for mine, seeded in fragments:
            master = mine.values["master"]
            expected = seeded.values["master"]
            if mine.name in saved:
                here = slice(mine.start, mine.start + master.numel())
                expected = saved[mine.name].ravel()[here]
                found.add(mine.name)
            assert torch.equal(master, expected), mine.name
            assert not mine.values["exp_avg"].any()
            assert not mine.values["exp_avg_sq"].any()
    assert found == saved.keys()


def test_without_a_new_memory_the_first_loss_is_that_of_the_trained_model(
    tmp_path: Path, shards: Shards, base: Path
) -> None:
    raw = tuned(tmp_path / "run", shards, base, model__memory=NONE, train__steps=1)
    finish(1, validate(raw))
    first = losses(tmp_path / "run")[0][1]
    assert losses(base)[-1][1] < 0.95 * losses(base)[0][1]
    assert first < 0.95 * losses(base)[0][1]


# resuming


def test_a_run_with_a_checkpoint_of_its_own_does_not_read_it(
    tmp_path: Path, shards: Shards, base: Path
) -> None:
    raw = tuned(tmp_path / "run", shards, base, train__steps=2)
    finish(1, validate(raw))
    raw["train"]["steps"] = 3
    raw["model"]["init_from"] = str(tmp_path / "gone")  # history: it may even have been deleted
    text = finish(1, validate(raw))
    assert "resumed at step 2" in text
    assert f"model.init_from={tmp_path}/gone is not read: this run goes on from its own" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(2, {"parallel__zero": 3, "train__precision": "bf16"}, id="dp2-zero3-bf16"),
        pytest.param(2, {"parallel__tp": 2}, id="tp2-zero1"),
    ],
)
def test_a_killed_run_with_adapters_goes_on_bit_for_bit(
    size: int, changes: dict[str, object], tmp_path: Path, shards: Shards, base: Path
) -> None:
    settings: dict[str, object] = {"model__lora": LORA, "checkpoint__every": 2} | changes
    own = tmp_path / "base"
    shutil.copytree(base, own)
    broken, whole = (
        validate(tuned(tmp_path / name, shards, own, **settings)) for name in ("broken", "whole")
    )
    finish(size, whole)
    kill_while_at(broken, size, 3)
    shutil.rmtree(own)  # the checkpoint is complete by itself
    assert "resumed at step 2" in finish(size, broken)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param(
            ((2, {"parallel__tp": 2}), (2, {"parallel__zero": 3}), (1, {})),
            id="tp2 dp2-zero3 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ((2, {"parallel__zero": 3}), (2, {"parallel__cp": 2}), (2, {"parallel__tp": 2})),
            id="dp2-zero3 cp2 tp2",
        ),
    ],
)
def test_a_run_with_adapters_goes_on_at_any_layout(
    legs: tuple[tuple[int, dict[str, object]], ...], tmp_path: Path, shards: Shards, base: Path
) -> None:
    settings: dict[str, object] = {"model__lora": LORA, "train__schedule": "constant"}
    last = 2 * len(legs)
    finish(1, validate(tuned(tmp_path / "whole", shards, base, train__steps=last, **settings)))
    for number, (size, layout) in enumerate(legs, 1):
        steps = {"train__steps": 2 * number}
        finish(size, validate(tuned(tmp_path / "run", shards, base, **settings, **layout, **steps)))
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert [row[0] for row in found] == list(range(1, last + 1))
    assert [row[1] for row in found] == [pytest.approx(row[1], rel=1e-6) for row in expected]


# adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, shards: Shards, base: Path) -> Path:
    """Return a finished run of adapters, of two tensor-parallel ranks."""
    folder: Path = tmp_path_factory.mktemp("adapted")
    finish(2, validate(tuned(folder, shards, base, model__lora=LORA, parallel__tp=2)))
    return folder


def test_a_checkpoint_of_adapters_holds_the_frozen_weights_unchanged_without_moments(
    base: Path, adapted: Path
) -> None:
    before, after = whole_weights(base), whole_weights(adapted)
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    names = [name for tensors in tensors_of(adapted, STEPS).values() for name in tensors]
    moments = {n.partition("/")[2].rpartition("@")[0] for n in names if n.startswith("exp_avg")}
    assert moments == after.keys() - before.keys()


def test_the_merged_model_computes_what_the_adapted_one_does(adapted: Path) -> None:
    model, config = read_model(adapted)
    path, manifest = choose_checkpoint(adapted)
    merged = MergedWeights(path, manifest)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    one = type(model)(to_model_config(plain, manifest.vocab_size))
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(merged[name])
    assert set(merged.names) == {name for name, _ in one.named_parameters()}
    tokens = torch.randint(0, 257, (1, 4, 16), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, 4, dtype=torch.bool)
    with torch.no_grad():
        (logits, _), (expected, _) = one(tokens, starts), model(tokens, starts)
        (bare, _) = read_bare(one, path)(tokens, starts)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (bare - expected).abs().max() > 1e-3 * expected.abs().max()  # adapters do something


def read_bare(model: Any, path: Path) -> Any:
    stored = Stored(path, read_manifest(path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.whole(name))
    return model


def test_a_run_that_starts_from_adapters_has_them_merged(
    tmp_path: Path, shards: Shards, adapted: Path
) -> None:
    raw = tuned(tmp_path / "run", shards, adapted, model__lora={"rank": 2}, train__steps=1)
    text = finish(1, validate(raw))
    assert "its adapters merged into them" in text
    path, manifest = choose_checkpoint(adapted)
    merged, found = MergedWeights(path, manifest), whole_weights(tmp_path / "run")
    for name in ("blocks.0.qkv.linear.weight", "blocks.1.ffn.gate_up.weight", "embedding.weight"):
        assert torch.equal(found[name], merged[name])


def test_a_fork_of_adapters_goes_on_as_they_would(
    tmp_path: Path, shards: Shards, base: Path
) -> None:
    settings: dict[str, object] = {"model__lora": LORA, "train__schedule": "constant"}
    for name, steps in (("run", 2), ("whole", STEPS)):
        finish(1, validate(tuned(tmp_path / name, shards, base, train__steps=steps, **settings)))
    text = fork_one(validate(tuned(tmp_path / "run", shards, base, **settings)), "branch")
    assert "begins with everything of" in text
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "kept"),
    [({"seed": 5}, "weights and moments"), ({"model__lora": {"rank": 2}}, "weights")],
    ids=["seed", "rank"],
)
def test_a_fork_of_adapters_that_is_another_run_takes_their_weights(
    change: dict[str, object], kept: str, tmp_path: Path, shards: Shards, base: Path, adapted: Path
) -> None:
    shutil.copytree(adapted, tmp_path / "run")
    raw = tuned(
        tmp_path / "run", shards, base, **{"model__lora": LORA, "train__lr": 1e-30, **change}
    )
    text = fork_one(validate(raw), "child")
    assert f"begins with {kept} of" in text
    assert ("its adapters merged into them" in text) == (kept == "weights")
    assert [row["step"] for row in read_rows(tmp_path / "child")] == [1, 2, 3, 4]
    path, manifest = choose_checkpoint(adapted)
    expected = MergedWeights(path, manifest)
    path, manifest = choose_checkpoint(tmp_path / "child")  # which learns nothing
    found = MergedWeights(path, manifest)
    for name in ("blocks.0.qkv.linear.weight", "blocks.1.ffn.gate_up.weight", "embedding.weight"):
        assert torch.equal(found[name], expected[name])


def fork_one(config: Config, name: str) -> str:
    """Fork on one rank and train to the end; return what was said."""
    with forked(1, config.run_dir.with_name(name), pretrain_forking, config, name) as attempt:
        assert attempt.wait() == [0], attempt.text()
        return attempt.text()


# bad input


def tuned_line(tmp_path: Path, shards: Shards, base: Path, **changes: object) -> str:
    return one_line(tuned(tmp_path / "run", shards, base, **changes))


def test_adapters_without_weights(tmp_path: Path, shards: Shards, adapted: Path) -> None:
    raw = tiny(tmp_path / "run", shards, model__lora={"rank": 4})
    assert_says(one_line(raw), "model.lora: rank 4, but no model.init_from: ", "random numbers")
    saved = tuned(adapted, shards, tmp_path, model__lora=LORA, parallel__tp=2)
    del saved["model"]["init_from"]  # a run that has its weights needs none
    assert open_inputs(validate(saved)).start is None


def test_a_folder_that_is_not_there(tmp_path: Path, shards: Shards) -> None:
    line = tuned_line(tmp_path, shards, tmp_path / "nowhere")
    assert_says(line, "model.init_from: ", f"no folder {tmp_path}/nowhere", "run folder")


def test_a_folder_without_a_checkpoint(tmp_path: Path, shards: Shards) -> None:
    assert_says(tuned_line(tmp_path, shards, tmp_path), "no checkpoint", "runs/NAME/checkpoints/")
    (tmp_path / "config.json").touch()
    assert_says(tuned_line(tmp_path, shards, tmp_path), "Hugging Face", "longhaul import")


def test_other_shapes_are_told_by_their_keys(tmp_path: Path, shards: Shards, base: Path) -> None:
    changes = {"model__ffn_size": 64, "model__num_heads": 2, "model__head_dim": 16}
    found = lines(tuned(tmp_path / "run", shards, base, **changes))
    assert [line.split(":")[0] for line in found] == [
        "model.num_heads",
        "model.ffn_size",
        "model.head_dim",
    ]
    assert_says(found[1], "64, but ", base, "has 48; set it to 48")


def test_a_memory_that_changes_the_models_own_weights(
    tmp_path: Path, shards: Shards, base: Path
) -> None:
    line = tuned_line(tmp_path, shards, base, model__memory={"name": "abc", "slots": 3})
    assert_says(line, "blocks.0.qkv.linear.weight is [64, 32] there and [70, 32] here")
    assert_says(line, "(and 1 more)", "memory is none", "abc", "such as fam")


def test_a_memory_of_other_sizes(tmp_path: Path, shards: Shards, adapted: Path) -> None:
    memory = {"name": "fam", "slots": 8, "window": 1}
    line = tuned_line(tmp_path, shards, adapted, model__memory=memory)
    assert_says(line, "memory.parts.fam.prompt is [4, 32] there and [8, 32] here")


def test_another_vocabulary(tmp_path: Path, shards: Shards, base: Path) -> None:
    line = tuned_line(tmp_path, shards, base, model__vocab_size=300)
    assert_says(line, "model.vocab_size: 300, but ", "has 257; prepare the data with the tokenizer")


def test_a_memory_that_is_not_taken_along_is_named(
    tmp_path: Path, shards: Shards, adapted: Path
) -> None:
    raw = tuned(tmp_path / "run", shards, adapted, model__memory=NONE, train__steps=1)
    assert "not used: blocks.*.mixer.parts.fam.carry.gain, memory.p" in finish(1, validate(raw))


def test_another_rotary_base_is_told(tmp_path: Path, shards: Shards, base: Path) -> None:
    raw = tuned(tmp_path / "run", shards, base, model__rope_base=40_000, train__steps=1)
    assert "; model.rope_base was 10000.0 there, is 40000.0 here" in finish(1, validate(raw))


def test_a_landmark_is_one_token_more(tmp_path: Path, shards: Shards, base: Path) -> None:
    memory = {"name": "landmark", "block": 8}
    inputs = open_inputs(validate(tuned(tmp_path / "run", shards, base, model__memory=memory)))
    assert inputs.start is not None


def test_a_flipped_bit_ends_every_rank_before_the_first_step(
    tmp_path: Path, shards: Shards, base: Path
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    path = own / f"checkpoints/step-{STEPS:08d}/rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    config = validate(tuned(tmp_path / "run", shards, own))
    with forked(2, config.run_dir, pretrain, config) as attempt:
        assert attempt.wait() == [1, 1]
        text = attempt.text()
    assert text.count(f"model.init_from: {path}: its sha256 is not the manifest's") == 2
    assert "name another checkpoint" in text
    assert read_rows(tmp_path / "run") == []


def test_a_damaged_manifest(tmp_path: Path, shards: Shards, base: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    (own / f"checkpoints/step-{STEPS:08d}/manifest.json").write_text("{")
    assert_says(tuned_line(tmp_path, shards, own), "model.init_from: ", "no readable manifest")


def save_here(raw: dict[str, Any]) -> None:
    built, mesh, inputs = build_tiny(validate(raw))
    RunFolder(validate(raw), built, mesh, inputs.train).save_now(TrainState(step=3))


def test_the_folder_that_fresh_sets_aside(tmp_path: Path, shards: Shards) -> None:
    run_ranks(1, save_here, tiny(tmp_path / "run", shards))
    raw = tuned(tmp_path / "run", shards, tmp_path / "run")
    (line,) = lines(raw, fresh=True)
    assert_says(line, "model.init_from: ", "--fresh sets aside", "another name or run_dir")
