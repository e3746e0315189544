"""Other stacks' models of one Llama shape, each with its loss, for benchmarks/step.py.

transformers' LlamaForCausalLM with sdpa. megatron-core's GPTModel with its local layers (what runs
without Transformer Engine) and sdpa in the place of their unfused attention; in bfloat16 its
weights are bfloat16 beside float32 masters, as Megatron has them. torchtitan's Llama3Model with
sdpa, as the backends that it takes for language do not train on a CPU:

    pip install --no-deps torchtitan==0.3.0 torchdata tyro spmd_types==0.2.3 torch_checkpointing \
        docstring_parser typeguard shtab
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from parallel.megatron_cpu import install_cpu_adapter

Loss = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    """A decoder; `tokens`: those of a sample."""

    tokens: int
    num_layers: int = 8
    hidden_size: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    ffn_size: int = 1408
    vocab_size: int = 32000


class Peer(NamedTuple):
    """A model and its mean loss over ids (1, tokens)."""

    model: torch.nn.Module
    loss: Loss
    layers: torch.nn.ModuleList


class Masters:
    """AdamW on float32 copies of a model's bfloat16 weights."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        self.weights = weights
        self.copies = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-3, fused=True)

    def step(self) -> None:
        """Clip, update the copies, and write them back."""
        for copy, weight in zip(self.copies, self.weights, strict=True):
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.copies, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)


class Sdpa(torch.nn.Module):
    """megatron-core's place for attention over (tokens, batch, heads, width)."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        """Return (tokens, batch, heads * width)."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def transformers_llama(shape: Shape, *, checkpointing: bool = False) -> Peer:
    """Return Hugging Face's model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.ffn_size,
            vocab_size=shape.vocab_size,
            max_position_embeddings=shape.tokens,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Peer(model, lambda ids: model(input_ids=ids, labels=ids).loss, model.model.layers)


def megatron_gpt(shape: Shape, dtype: torch.dtype) -> Peer:
    """Return megatron-core's model, in a process of its own: it must be told of the CPU."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    install_cpu_adapter()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        ffn_hidden_size=shape.ffn_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = Sdpa
    model = GPTModel(
        config,
        spec,
        shape.vocab_size,
        shape.tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(dtype)
    positions = torch.arange(shape.tokens)[None]

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, positions, None, labels=ids)
        return found.float().mean()

    return Peer(model, loss, model.decoder.layers)


def torchtitan_llama(shape: Shape) -> Peer:
    """Return torchtitan's model."""
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    width, vocabulary = shape.hidden_size, shape.vocab_size
    normal = {"weight": partial(torch.nn.init.normal_, std=0.02)}
    model: Any = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=vocabulary,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=width, param_init=normal
        ),
        norm=RMSNorm.Config(normalized_shape=width, param_init={"weight": torch.nn.init.ones_}),
        lm_head=Linear.Config(in_features=width, out_features=vocabulary, param_init=normal),
        layers=llama3._build_llama3_layers(
            n_layers=shape.num_layers,
            dim=width,
            n_heads=shape.num_heads,
            n_kv_heads=shape.num_kv_heads,
            hidden_dim=shape.ffn_size,
            rope=ComplexRoPE.Config(
                dim=width // shape.num_heads, max_seq_len=shape.tokens, theta=10000.0
            ),
            attn_backend="sdpa",
        ),
    ).build()
    model.init_states()
    positions = torch.arange(shape.tokens)[None]

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids, positions)
        return cross_entropy(logits.flatten(0, 1).float(), ids.flatten())

    return Peer(model, loss, model.layers.values())


def training_step(peer: Peer, shape: Shape, precision: str) -> Callable[[], float]:
    """Return a step on random ids: forward, backward, clipping, fused AdamW; its loss."""
    peer.model.train()
    weights = list(peer.model.parameters())
    half = weights[0].dtype is torch.bfloat16
    masters = Masters(weights) if half else None
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    autocast = precision == "bf16" and not half

    def step() -> float:
        ids = torch.randint(0, shape.vocab_size, (1, shape.tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = peer.loss(ids)
        loss.backward()
        if masters is not None:
            masters.step()
        else:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    return step
