"""The README.md of an exported folder: what it is, and code that reads it."""

from __future__ import annotations

from train.settings.config import Config
from train.settings.memories import describe_memory

_BASE = """\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
tokens = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(tokens).logits
print(repr(tokenizer.decode(logits[0, -1].argmax())))
```
"""

_MEMORY = """\
```python
import torch

from data.tokenizer import load_tokenizer
from model.stream import Stream
from train.huggingface.loading import load_folder

tokenizer = load_tokenizer("tokenizer.json")
model, config = load_folder(".")
stream = Stream(model, config.data.segment_len)
text = "Once upon a time " * 1000  # any length: what is held does not grow with it
logits = stream.read(torch.from_numpy(tokenizer.encode(text).astype("int64"))[None])
print(repr(tokenizer.decode([int(logits[0, : tokenizer.vocab_size].argmax())])))
```
"""


def readme(config: Config, step: int, dtype: str, has_tokenizer: bool) -> str:
    """Return the text; its code runs in the folder itself."""
    memory = config.model.memory
    parts = [
        f"# {config.name}, step {step:,}",
        f"Exported by longhaul, weights in {dtype}. Trained on segments of"
        f" {config.data.segment_len:,} tokens.",
    ]
    if memory.name != "none":
        parts.append(
            f"The model has a memory: {describe_memory(memory)}. `transformers` reads the base"
            " weights, which see one text of a segment's length and no memory. The memory is in"
            " `memory.json` and, where it has parameters, `memory.safetensors`; longhaul reads"
            " both, and `longhaul import` makes the folder a checkpoint again."
        )
    if not has_tokenizer:
        return "\n\n".join([*parts, "It was exported without a tokenizer.\n"])
    parts += ["## With transformers\n\nIn this folder:", _BASE]
    if memory.name != "none":
        parts += ["## With longhaul, memory and all", _MEMORY]
    return "\n\n".join(parts)
