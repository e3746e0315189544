"""A checkpoint as a folder of transformers: the same logits, and the memory beside it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from data.tokenizer import ByteTokenizer, load_tokenizer
from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialise
from tests.compare import relative
from tests.ranks import run_ranks
from tests.train.huggingface.published import (
    LARGE,
    MODELS,
    edit,
    imported,
    load,
    ours,
    own_bytes,
    publish,
    theirs,
    tokens,
)
from tests.train.runs import ROOT
from tests.train.tiny import Shards, build_tiny, tiny, tiny_config
from train.build import to_model_config
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.merged import MergedWeights
from train.commands.export import parse_size
from train.huggingface.exporting import export
from train.huggingface.importing import import_folder, write_checkpoint
from train.huggingface.loading import load_folder
from train.loop import TrainState
from train.settings.config import Config, validate
from train.starting.resume import RunFolder

SLOW = pytest.mark.slow

ROUNDING = 1e-5
"""float32, two or three layers: 3e-7 measured."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model__tie_embeddings": True},
    "qwen2": {"model__qkv_bias": True},
    "qwen2-slides": {"model__qkv_bias": True, "model__sliding_window": 16},
    "mistral": {"model__sliding_window": 24},
    "uneven-heads": {"model__num_heads": 3, "model__num_kv_heads": 1, "model__head_dim": 14},
    "llama3": {
        "model__rope_scaling": {"type": "llama3", "factor": 8, "original_len": 16},
        "model__rope_base": 500.0,
    },
    "linear": {"model__rope_scaling": {"type": "linear", "factor": 4}},
}
MEMORIES: dict[str, Any] = {
    "window": {"name": "window", "segments": 1},
    "fam": {"name": "fam", "slots": 4, "window": 1},
    "infini": {"name": "infini", "rule": "delta"},
    "composed": ["infini", {"name": "abc", "slots": 3}, {"name": "cmab", "latents": 3}],
    "rmt": {"name": "rmt", "slots": 3, "offset": True},
    "armt": {"name": "armt", "slots": 3, "key_dim": 4},
    "hmt": {"name": "hmt", "bank": 4, "sensory": 2, "search_dim": 4},
    "window and hmt": [
        {"name": "window", "segments": 1},
        {"name": "hmt", "bank": 4, "sensory": 2, "search_dim": 4},
    ],
    "landmark": {"name": "landmark", "block": 4},
}


def model_of(config: Config) -> tuple[Decoder, ModelConfig]:
    """Return a random model whose norms, gains and biases differ from their start."""
    shape = to_model_config(config, 300)
    model = Decoder(shape)
    initialise(model, shape, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), shape


def saved(run: Path, shards: Shards, **changes: Any) -> Decoder:
    """Write a checkpoint of a random model of 300 ids; return the model."""
    settings = {"model__memory": {"name": "none"}, "model__init_std": 0.3} | changes
    config = validate(tiny(run, shards, **settings))
    model, shape = model_of(config)
    held = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in held.items()}
    folder = run / "checkpoints"
    write_checkpoint(folder, config, shape.vocab_size, shapes, lambda name: held[name].detach())
    return model


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_computes_our_logits(
    tmp_path: Path, shards: Shards, changes: dict[str, Any]
) -> None:
    model = saved(tmp_path / "run", shards, **changes)
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    found = load(tmp_path / "hf")
    assert found.dtype == torch.float32
    ids = tokens(16)
    assert relative(theirs(found, ids), ours(model, ids)) < ROUNDING


def test_bf16_is_rounded_once(tmp_path: Path, shards: Shards) -> None:
    model = saved(tmp_path / "run", shards)
    export(tmp_path / "run", tmp_path / "hf")
    found = load(tmp_path / "hf")
    assert found.dtype == torch.bfloat16
    weight = found.model.norm.weight
    assert torch.equal(weight, model.head.norm.weight.bfloat16())


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS.keys())
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    published = publish(tmp_path / "hf", kind, changes, dtype=torch.bfloat16)
    import_folder(tmp_path / "hf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back", dtype="bf16")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    window = getattr(published.config, "sliding_window", None)
    assert getattr(load(tmp_path / "back").config, "sliding_window", None) == window
    import_folder(tmp_path / "back", tmp_path / "again")
    assert relative(ours(imported(tmp_path / "again"), tokens()), theirs(published, tokens())) < (
        ROUNDING
    )


def test_what_stood_beside_an_imported_model_leaves_with_it(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    edit(tmp_path / "hf/config.json", lambda v: v.update(bos_token_id=7, eos_token_id=[8, 9]))
    edit(tmp_path / "hf/generation_config.json", lambda v: v.update(temperature=0.5))
    (tmp_path / "hf/tokenizer_config.json").write_text('{"chat_template": "x"}')
    import_folder(tmp_path / "hf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (7, [8, 9])
    assert values["max_position_embeddings"] == 64


def test_the_tokenizer_of_the_data_is_written(tmp_path: Path, shards: Shards) -> None:
    from transformers import AutoTokenizer

    saved(tmp_path / "run", shards)
    export(tmp_path / "run", tmp_path / "hf")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "a text, \u00e9\u4e2d"
    assert found(text).input_ids == ByteTokenizer().encode(text).tolist()
    assert found.eos_token_id == ByteTokenizer.end_of_document
    assert load(tmp_path / "hf").generation_config.eos_token_id == ByteTokenizer.end_of_document
    assert load_tokenizer(tmp_path / "hf/tokenizer.json").sha256 == ByteTokenizer().sha256


def test_without_data_a_tokenizer_must_be_named(tmp_path: Path, shards: Shards) -> None:
    gone = {"data__train": str(tmp_path / "gone"), "data__valid": None}
    saved(tmp_path / "run", shards, **gone)
    with pytest.raises(ValueError, match="gone, which cannot be read; .*--tokenizer none"):
        export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export(tmp_path / "run", tmp_path / "hf", tokenizer="none")
    assert not (tmp_path / "hf/tokenizer.json").exists()
    (tmp_path / "words.json").write_text(ByteTokenizer().to_json())
    export(tmp_path / "run", tmp_path / "other", tokenizer=str(tmp_path / "words.json"))
    assert (tmp_path / "other/tokenizer.json").exists()


def test_files_are_as_large_as_asked(tmp_path: Path, shards: Shards) -> None:
    model = saved(tmp_path / "run", shards)
    done = export(tmp_path / "run", tmp_path / "hf", dtype="fp32", max_shard_bytes=30_000)
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) == done.files > 3
    sizes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name).nbytes for name in file.keys()}
        assert sum(held.values()) <= 30_000 or len(held) == 1
        sizes |= held
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == done.total_bytes
    assert relative(theirs(load(tmp_path / "hf"), tokens(16)), ours(model, tokens(16))) < ROUNDING


def test_two_parameters_at_most_are_held(
    tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "published", changes=LARGE)
    import_folder(tmp_path / "published", tmp_path / "run")
    held: list[int] = []
    get = MergedWeights.__getitem__

    def watched(self: MergedWeights, name: str) -> torch.Tensor:
        tensor = get(self, name)
        held.append(own_bytes())
        return tensor

    monkeypatch.setattr(MergedWeights, "__getitem__", watched)
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    assert len(held) < 2 * (3 + 6 * 32)  # a parameter is not read once for each of its tensors
    assert max(held) - held[0] < 16e6  # of 128 MB; the largest parameter has 2 MB


# with a memory


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_a_memory_comes_back_with_its_model(tmp_path: Path, shards: Shards, memory: Any) -> None:
    model = saved(tmp_path / "run", shards, model__memory=memory, model__qkv_bias=True)
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    found, config = load_folder(tmp_path / "hf")
    assert found.config.memory == model.config.memory
    assert config.data.segment_len == 16
    weights = dict(found.named_parameters())
    for name, parameter in model.named_parameters():
        if name in ("embedding.weight", "head.output.weight"):  # padding means nothing
            parameter, weights[name] = parameter[:300], weights[name][:300]
        assert torch.equal(weights[name], parameter), name
    import_folder(tmp_path / "hf", tmp_path / "again")
    ids = tokens(48).view(2, 3, 16)
    starts = torch.tensor([[True, False, False]] * 2)
    with torch.no_grad():
        logits, again = (m(ids, starts)[0] for m in (model, imported(tmp_path / "again")))
    assert torch.equal(logits, again)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_the_base_beside_a_memory_is_the_model_without_it(
    tmp_path: Path, shards: Shards, memory: Any
) -> None:
    model = saved(tmp_path / "run", shards, model__memory=memory)
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    bare = Decoder(ModelConfig(**vars(model.config) | {"memory": to_model_config(
        tiny_config(shards, model__memory="none"), 300).memory}))  # fmt: skip
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            whole = weights[name]
            if whole.shape != parameter.shape:  # abc's rows, behind each key head's
                heads = whole.unflatten(0, (2, -1))
                whole = heads[:, : parameter.shape[0] // 2].flatten(0, 1)
            parameter.copy_(whole)
    assert relative(theirs(load(tmp_path / "hf"), tokens(16)), ours(bare.eval(), tokens(16))) < (
        ROUNDING
    )


def test_a_memory_file_holds_the_memorys_parameters_alone(tmp_path: Path, shards: Shards) -> None:
    saved(tmp_path / "run", shards, model__memory=MEMORIES["fam"])
    done = export(tmp_path / "run", tmp_path / "hf")
    held = load_file(tmp_path / "hf/memory.safetensors")
    assert {name: list(tensor.shape) for name, tensor in held.items()} == {
        "memory.parts.fam.prompt": [4, 32],
        "blocks.0.mixer.parts.fam.carry.gain": [32],
        "blocks.1.mixer.parts.fam.carry.gain": [32],
    }
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert done.memory == 4 * 32 + 2 * 32
    values = json.loads((tmp_path / "hf/memory.json").read_text())
    assert values["memory"]["slots"] == 4 and values["segment_len"] == 16


def test_without_a_memory_nothing_is_beside_the_model(tmp_path: Path, shards: Shards) -> None:
    saved(tmp_path / "run", shards)
    export(tmp_path / "run", tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("memory*"))


@pytest.mark.parametrize(
    "memory", [pytest.param("none", marks=SLOW), "fam", pytest.param("landmark", marks=SLOW)]
)
def test_the_code_in_the_readme_runs(tmp_path: Path, shards: Shards, memory: str) -> None:
    saved(tmp_path / "run", shards, model__memory=MEMORIES.get(memory, memory))
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "hf/README.md").read_text(), re.S)
    assert len(code) == (1 if memory == "none" else 2)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path / "hf",
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(code)


# of a run


def save_a_run(config: Config) -> None:
    built, mesh, inputs = build_tiny(config)
    folder = RunFolder(config, built, mesh, inputs.train)
    folder.save_now(TrainState(step=3, updates=3))


@pytest.mark.gloo
def test_a_checkpoint_of_several_ranks_is_exported_whole(tmp_path: Path, shards: Shards) -> None:
    changes: dict[str, Any] = {
        "model__memory": {"name": "none"},
        "model__qkv_bias": True,
        "parallel__tp": 2,
        "parallel__zero": 3,
        "model__init_std": 0.3,
    }
    config = validate(tiny(tmp_path / "run", shards, **changes))
    run_ranks(4, save_a_run, config)
    export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    assert choose_checkpoint(tmp_path / "run")[1].layout["tp"] == 2
    ids = tokens(16) % 257
    assert relative(theirs(load(tmp_path / "hf"), ids), ours(imported(tmp_path / "run"), ids)) < (
        ROUNDING
    )


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, shards: Shards) -> None:
    saved(tmp_path / "run", shards)
    path = next((tmp_path / "run").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="the file was damaged"):
        export(tmp_path / "run", tmp_path / "hf")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("7b", 7)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5 XB"])
def test_a_size_without_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--max-shard: expected a size such as 5GB"):
        parse_size(text)


def test_no_process_group_is_needed() -> None:
    assert not dist.is_initialized()
