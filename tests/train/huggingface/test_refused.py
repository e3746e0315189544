"""Folders that would become another model, or none: one clear line each, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.huggingface.published import edit, publish
from train.huggingface.importing import import_folder

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": (
        "llama",
        {"model_type": "gpt2"},
        "model_type is 'gpt2'; longhaul imports llama, mistral, qwen2",
    ),
    "experts": ("llama", {"model_type": "mixtral"}, "and no mixtures of experts"),
    "a classifier": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        "only LlamaForCausalLM, which predicts the next token, is imported",
    ),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        "the weights are quantised, .* import the model that they were made from",
    ),
    "an output's bias": ("llama", {"attention_bias": True}, "attention_bias: biases of"),
    "biases of the mlp": ("llama", {"mlp_bias": True}, "mlp_bias: biases of"),
    "an unknown rotation": (
        "llama",
        {"rope_parameters": YARN},
        "rope_type is 'yarn'; default, linear and llama3 are read",
    ),
    "an older word for it": (
        "llama",
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'; default",
    ),
    "half of a rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "rope_type is llama3, and its low_freq_factor, high_freq_factor missing",
    ),
    "a part of each head": (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor: only a part of each head is rotated",
    ),
    "some layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": None,
         "max_window_layers": 2},
        "1 of 3 layers have a sliding window of 32 tokens; .*use_sliding_window may be set",
    ),
    "no sizes": (
        "llama",
        {"hidden_size": None, "num_hidden_layers": "3"},
        "num_hidden_layers, hidden_size missing or no whole number",
    ),
    "an odd head": ("llama", {"head_dim": 7}, "model.head_dim: 7 is odd"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_what_computes_something_else_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    publish(tmp_path / "hf", kind)
    edit(tmp_path / "hf/config.json", lambda values: values.update(changes))
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert str(tmp_path / "hf/config.json") in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    changes = {"hidden_act": "gelu", "mlp_bias": True}
    edit(tmp_path / "hf/config.json", lambda values: values.update(changes))
    with pytest.raises(ValueError, match=r"(?s)hidden_act.*\n.*mlp_bias"):
        import_folder(tmp_path / "hf", tmp_path / "run")


def test_a_sliding_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    publish(tmp_path / "hf", "qwen2", {"use_sliding_window": False})
    edit(tmp_path / "hf/config.json", lambda values: values.update(sliding_window=8))
    done = import_folder(tmp_path / "hf", tmp_path / "run")
    assert done.opened.config.model.sliding_window is None


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "one missing": (
        lambda held: held.pop("model.layers.1.self_attn.k_proj.weight"),
        r"model.layers.1.self_attn.k_proj.weight \[16, 32\] missing; download it again",
    ),
    "no output layer": (lambda held: held.pop("lm_head.weight"), r"lm_head.weight \[300, 32\] mis"),
    "one too many": (
        lambda held: held.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        "model.layers.0.self_attn.q_norm.weight has no place in this model",
    ),
    "more layers": (
        lambda held: held.update({"model.layers.3.input_layernorm.weight": torch.ones(32)}),
        "model.layers.3.input_layernorm.weight has no place",
    ),
    "another shape": (
        lambda held: held.update({"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight is \[31\], and config.json makes it \[32\]",
    ),
    "another vocabulary": (
        lambda held: held.update({"model.embed_tokens.weight": torch.ones(320, 32)}),
        r"model.embed_tokens.weight is \[320, 32\], and config.json makes it \[300, 32\]",
    ),
    "whole numbers": (
        lambda held: held.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight is I8: the weights are quantised",
    ),
    "eight bits": (
        lambda held: held.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
        "model.norm.weight is F8_E4M3: the weights are quantised",
    ),
    "not a number": (
        lambda held: held["model.norm.weight"].fill_(float("nan")),
        "model.norm.weight holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_must_be_those_of_the_model(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    publish(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_biases_that_config_json_does_not_speak_of_are_not_left_out(tmp_path: Path) -> None:
    """Qwen2's tensors under Llama's name: a quiet loss of every bias."""
    publish(tmp_path / "hf", "qwen2")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    edit(tmp_path / "hf/config.json", lambda values: values.update(llama))
    with pytest.raises(
        ValueError, match=r"(?s)layers.0.self_attn.k_proj.bias has no place.*and 1 more"
    ):
        import_folder(tmp_path / "hf", tmp_path / "run")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def native(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, r"pytorch_model.bin\), which can run code .*save_pretrained"),
    "another layout": (native, r"neither .* \(there is consolidated.safetensors, in another lay"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "a cut file": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "a cut config": (lambda f: (f / "config.json").write_text('{"a'), "config.json cannot be read"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "a cut tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not a tokenizer of the `tokenizers` library",
    ),
}


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES.keys())
def test_files_must_be_there_and_whole(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    publish(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def elsewhere(folder: Path, name: str, file: str) -> None:
    edit(folder / "model.safetensors.index.json", lambda v: v["weight_map"].update({name: file}))


INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (
        lambda f: next(f.glob("model-00002-*")).unlink(),
        "model-00002-of-.* cannot be read",
    ),
    "another tensor's file": (
        lambda f: elsewhere(f, "lm_head.weight", sorted(f.glob("model-*"))[1].name),
        "says that model-00002-of-.* holds lm_head.weight, and it does not",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json cannot be read",
    ),
}


@pytest.mark.parametrize(("change", "message"), INDEX.values(), ids=INDEX.keys())
def test_the_index_must_be_that_of_the_files(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    publish(tmp_path / "hf", shard="20KB")
    change(tmp_path / "hf")
    with pytest.raises(ValueError, match=message):
        import_folder(tmp_path / "hf", tmp_path / "run")


def test_the_name_of_a_model_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; download the model first, as `hf download"):
        import_folder(Path("meta-llama/Llama-3.2-1B"), tmp_path / "run")


def test_a_memory_of_a_newer_longhaul_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    values = {"format": 2, "memory": {"name": "fam"}, "segment_len": 64}
    (tmp_path / "hf/memory.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="memory.json is of format 2, and this longhaul reads 1"):
        import_folder(tmp_path / "hf", tmp_path / "run")
