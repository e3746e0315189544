"""Small random models as transformers writes them, and ours beside them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from data.tokenizer import ByteTokenizer
from model.decoder import Decoder
from train.checkpoints.snapshot import read_model

VOCAB = 300
"""No multiple of 64, and more than the 257 ids of bytes."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-all-slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
    ),
    "mistral": ("mistral", {"sliding_window": 32}),
    "mistral-v0.2": ("mistral", {"sliding_window": None, "head_dim": 10}),
}


LARGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 32,
    "head_dim": 64,
}


def make(kind: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """Return a random model of transformers; norms and biases differ from their start."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def publish(
    folder: Path,
    kind: str = "llama",
    changes: dict[str, Any] | None = None,
    *,
    shard: str = "5GB",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Write a folder with a byte tokenizer; return its model, float32, numbers as stored."""
    model = make(kind, changes or {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    # A copy is stored: a model that was narrow keeps narrow frequencies, which are no parameters.
    narrow = copy.deepcopy(model).to(dtype)
    narrow.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    return model


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def tokens(length: int = 32) -> Tensor:
    """Return two texts [2, length]."""
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(5))


def theirs(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of transformers [2, T, V]."""
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def ours(model: Decoder, ids: Tensor) -> Tensor:
    """Return our logits of one segment [2, T, V]."""
    with torch.no_grad():
        logits, _ = model(ids[:, None], torch.ones(len(ids), 1, dtype=torch.bool))
    return logits[:, 0]


def imported(folder: Path) -> Decoder:
    """Return the model of an imported folder, as every command reads it."""
    return read_model(folder)[0]


def load(folder: Path) -> Any:
    """Return what transformers makes of a folder, its weights' type kept."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def own_bytes() -> int:
    """Return this process's memory without pages of files, which the system drops when it must."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)
