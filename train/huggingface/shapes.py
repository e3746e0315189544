"""What a config.json says of a model, in the keys of our `model` section, and the way back.

Llama, Qwen2 and Mistral are one model here: Qwen2 has biases of queries, keys and values, Mistral
may have a sliding window. What would compute something else is refused, all reasons at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.settings.model import ModelSection

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
"""Of each `model_type` the one architecture that is read and written."""

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}
"""Our key -> theirs, of what has no default."""

_WINDOW = 4096
"""Sliding window where a Mistral or Qwen2 config.json names none: transformers' default."""

Values = Mapping[str, Any]


def model_keys(values: Values, where: Path) -> dict[str, Any]:
    """Return the keys of a `model` section, without a memory, for a config.json.

    Raises ValueError, naming `where`, with every reason for which the model is not one of ours.
    """
    problems = [problem for check in _CHECKS if (problem := check(values)) is not None]
    if problems:
        raise ValueError("\n".join([f"{where} cannot be imported:", *(f"  {p}" for p in problems)]))
    heads = values["num_attention_heads"]
    return {
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        "num_kv_heads": _given(values, "num_key_value_heads", heads),
        "head_dim": _given(values, "head_dim", values["hidden_size"] // heads),
        "rope_base": _rope(values).get("rope_theta", 10_000.0),
        "rope_scaling": _scaling(values),
        "qkv_bias": values["model_type"] == "qwen2",
        "sliding_window": _sliding_window(values),
        "norm_eps": _given(values, "rms_norm_eps", 1e-6),
        "tie_embeddings": _given(values, "tie_word_embeddings", False),
        "init_std": _given(values, "initializer_range", 0.02) or 0.02,
    }


def _given(values: Values, key: str, otherwise: Any) -> Any:
    """Return a value; `otherwise` where it is left out or null."""
    value = values.get(key)
    return otherwise if value is None else value


def _family(values: Values) -> str | None:
    kind, known = values.get("model_type"), ", ".join(FAMILIES)
    if kind not in FAMILIES:
        return f"model_type is {kind!r}; longhaul imports {known}, and no mixtures of experts"
    named = _given(values, "architectures", [FAMILIES[kind]])
    if named != [FAMILIES[kind]]:
        return (
            f"architectures is {named}; only {FAMILIES[kind]}, which predicts the next token, is"
            " imported"
        )
    return None


def _sizes(values: Values) -> str | None:
    missing = [name for name in _SIZES.values() if not isinstance(values.get(name), int)]
    if not missing:
        return None
    return f"{', '.join(missing)} missing or no whole number; take the config.json of the weights"


def _quantised(values: Values) -> str | None:
    if not values.get("quantization_config"):
        return None
    return (
        "quantization_config: the weights are quantised, and training needs whole ones; import the"
        " model that they were made from"
    )


def _activation(values: Values) -> str | None:
    name = _given(values, "hidden_act", "silu")
    return None if name == "silu" else f"hidden_act is {name!r}; a block here has silu alone"


def _biases(values: Values) -> str | None:
    found = [key for key in ("attention_bias", "mlp_bias") if values.get(key)]
    if not found:
        return None
    return (
        f"{' and '.join(found)}: biases of the attention's output or of the feed-forward layer have"
        " no place here; only queries, keys and values may have them, as in Qwen2"
    )


def _rope_kind(values: Values) -> str | None:
    rope = _rope(values)
    kind = rope["rope_type"]
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "rope_parameters differ from layer to layer; one rotation for all layers is read"
    if kind not in ("default", "linear", "llama3"):
        return f"rope_type is {kind!r}; default, linear and llama3 are read"
    if _given(rope, "partial_rotary_factor", values.get("partial_rotary_factor") or 1) != 1:
        return "partial_rotary_factor: only a part of each head is rotated; here all of it is"
    needed = {"default": (), "linear": ("factor",)}.get(
        kind, ("factor", "low_freq_factor", "high_freq_factor")
    )
    if missing := [key for key in needed if key not in rope]:
        return f"rope_type is {kind}, and its {', '.join(missing)} missing"
    return None


def _some_layers_slide(values: Values) -> str | None:
    layers = _sliding_layers(values)
    if not any(layers) or all(layers):
        return None
    return (
        f"{sum(layers)} of {len(layers)} layers have a sliding window of"
        f" {_given(values, 'sliding_window', _WINDOW)} tokens; here all layers read alike: with"
        " segments no longer than that the window cuts nothing, and use_sliding_window may be set"
        " to false in config.json"
    )


_CHECKS = (
    _family, _sizes, _quantised, _activation, _biases, _rope_kind, _some_layers_slide
)  # fmt: skip


def _rope(values: Values) -> dict[str, Any]:
    """Return what is said of the rotation, in transformers' newer form (`rope_parameters`)."""
    older = dict(_given(values, "rope_scaling", {}))
    if "type" in older:  # its oldest name
        older.setdefault("rope_type", older.pop("type"))
    found = {**older, **_given(values, "rope_parameters", {})}
    if "rope_theta" not in found and values.get("rope_theta") is not None:
        found["rope_theta"] = values["rope_theta"]
    found.setdefault("rope_type", "default")
    return found


def _scaling(values: Values) -> dict[str, Any]:
    rope = _rope(values)
    if rope["rope_type"] == "default":
        return {"type": "none"}
    if rope["rope_type"] == "linear":
        return {"type": "linear", "factor": rope["factor"]}
    name = "original_max_position_embeddings"
    first = rope.get(name) or values.get(name) or values.get("max_position_embeddings")
    return {
        "type": "llama3",
        **{key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")},
        "original_len": first,
    }


def _sliding_layers(values: Values) -> list[bool]:
    """Return of each Qwen2 layer whether its attention slides."""
    count = values.get("num_hidden_layers")
    if values.get("model_type") != "qwen2" or not values.get("use_sliding_window"):
        return []
    if named := values.get("layer_types"):
        return [kind == "sliding_attention" for kind in named]
    first = _given(values, "max_window_layers", 28)
    return [layer >= first for layer in range(count if isinstance(count, int) else 0)]


def _sliding_window(values: Values) -> int | None:
    if values["model_type"] == "mistral" or any(_sliding_layers(values)):
        window: int | None = values.get("sliding_window", _WINDOW)
        return window
    return None


def config_values(section: ModelSection, vocab_size: int, max_len: int) -> dict[str, Any]:
    """Return the config.json of a model without its memory.

    max_len: tokens that it reads at once. The rotation is written in the older form too, for
    transformers before 5.
    """
    kind = _family_of(section)
    head_dim = section.head_dim or section.hidden_size // section.num_heads
    values = {
        "architectures": [FAMILIES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "num_hidden_layers": section.num_layers,
        "hidden_size": section.hidden_size,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": section.ffn_size,
        "hidden_act": "silu",
        "max_position_embeddings": max_len,
        "initializer_range": section.init_std,
        "rms_norm_eps": section.norm_eps,
        "tie_word_embeddings": section.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        **_rope_values(section),
    }
    if kind == "llama":
        return values | {"attention_bias": False, "mlp_bias": False}
    values["sliding_window"] = section.sliding_window
    if kind == "qwen2":
        values["use_sliding_window"] = section.sliding_window is not None
        values["max_window_layers"] = 0 if section.sliding_window else section.num_layers
    return values


def _family_of(section: ModelSection) -> str:
    """Return the model_type that computes the same; Llama's wants heads that divide the width."""
    if section.qkv_bias:
        return "qwen2"
    uneven = section.hidden_size % section.num_heads != 0
    return "mistral" if section.sliding_window is not None or uneven else "llama"


def _rope_values(section: ModelSection) -> dict[str, Any]:
    scaling, base = section.rope_scaling, section.rope_base
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling.type != "none":
        kind = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "llama3":
        kind |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_len,
        }
    return {
        "rope_theta": base,
        "rope_scaling": None if scaling.type == "none" else kind,
        "rope_parameters": {**kind, "rope_theta": base},
    }
