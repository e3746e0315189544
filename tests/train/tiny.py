"""Runs of seconds: a corpus whose documents are longer than a sample, and a model for it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.loader import load
from data.prepare import prepare
from data.streams import IGNORE, Batch
from data.tokenizer import ByteTokenizer, load_tokenizer
from parallel.mesh import Mesh, build_mesh
from train.build import Built, build, to_model_config
from train.reading.corpora import choose_course
from train.reading.landmarks import choose_reading, model_vocab_size
from train.settings.config import Config, validate
from train.starting.inputs import Inputs, open_inputs

SEGMENT = 16
SAMPLE = 4 * SEGMENT
LANES = 4
VOCAB = 257
"""Bytes and the end of a document."""

FAM = {"name": "fam", "slots": 4, "window": 1, "state": "norm"}


class Shards(NamedTuple):
    """The two folders of a prepared corpus."""

    train: Path
    valid: Path


def prepare_shards(
    folder: Path,
    *,
    seed: int = 0,
    documents: int = 12,
    words: tuple[int, int] = (SAMPLE, 8 * SAMPLE),
    tokenizer: str = "bytes",
) -> Shards:
    """Return shards of twelve documents of 5 to 40 samples, made as a user makes them."""
    chance = random.Random(seed)
    known = ["".join(chance.choices("abcdefgh", k=4)) for _ in range(20)]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(documents):
        text = " ".join(chance.choices(known, k=chance.randint(*words)))
        (texts / f"{number:03d}.txt").write_text(text)
    done = prepare(
        [texts],
        folder / "shards",
        tokenizer=load_tokenizer(tokenizer),
        valid_fraction=0.2,
        workers=1,
        progress=False,
    )
    assert done.valid is not None
    return Shards(folder / "shards/train", folder / "shards/valid")


def write_permuted(folder: Path) -> Path:
    """Return the file of a byte tokenizer whose ids of bytes are turned round."""
    values = json.loads(ByteTokenizer().to_json())
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = {text: 255 - number for text, number in vocab.items()}
    path = folder / "permuted.json"
    path.write_text(json.dumps(values))
    return path


def tiny(run_dir: Path, shards: Shards, **changes: object) -> dict[str, Any]:
    """Return a configuration with dotted keys (`train__steps=5`) changed."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(run_dir),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_size": 48,
            "init_std": 0.1,
            "memory": dict(FAM),
        },
        "data": {
            "train": str(shards.train),
            "valid": str(shards.valid),
            "segment_len": SEGMENT,
            "sample_len": SAMPLE,
            "workers": 0,
        },
        "parallel": {"timeout_s": 60},
        "train": {
            "steps": 12,
            "batch_size": LANES,
            "lr": 0.01,
            "warmup_steps": 2,
            "eval_tokens": 256,
        },
        "checkpoint": {"every": 6},
        "tracking": {"enabled": False},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return raw


def cutting_matrices(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a maker of ZeRO configurations that treat the tiny model's matrices as large.

    By default ZeRO 3 cuts none so small; norms and gains stay whole on every rank, as in a large
    model.
    """

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(*args, **kwargs)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
        return made

    return config


def build_tiny(config: Config) -> tuple[Built, Mesh, Inputs]:
    """Return what pretrain makes of a configuration on these ranks."""
    inputs = open_inputs(config)
    mesh = build_mesh(tp=config.parallel.tp, cp=config.parallel.cp)
    torch.manual_seed(config.seed)
    vocab_size = model_vocab_size(config, inputs.train.vocab_size)
    model_config = to_model_config(config, vocab_size)
    return build(config, model_config, mesh), mesh, inputs


def tiny_config(shards: Shards, **changes: object) -> Config:
    """Return a checked configuration whose run folder is not used."""
    return validate(tiny(Path("unused"), shards, **changes))


def read_steps(config: Config, inputs: Inputs, mesh: Mesh, steps: int) -> list[list[Batch]]:
    """Return the first steps' micro-batches of this rank."""
    needed = model_vocab_size(config, inputs.train.vocab_size)
    reading = choose_reading(config, config.model.vocab_size or needed)
    streams = choose_course(config, inputs.train).streams
    return [
        [reading.prepare(batch) for batch in step]
        for step in load(
            inputs.train,
            streams,
            position=0,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            micro_batch=config.train.micro_batch,
            workers=0,
            steps=steps,
        )
    ]


def without_targets(batch: Batch, lane: int, keep: int) -> Batch:
    """Return the batch with only `keep` targets in a lane, counted over all ranks' lanes."""
    labels = batch.labels.clone()
    row = (lane - batch.first_position) % LANES
    if row < len(labels):
        flat = labels[row].view(-1)
        flat[keep:] = IGNORE
    return batch._replace(labels=labels)


def masters(built: Built) -> dict[str, Tensor]:
    """Return copies of this rank's shares of weights and moments, by name and place."""
    return {
        f"{kind}/{fragment.name}@{fragment.start}": values.clone()
        for fragment in built.engine.fragments()
        for kind, values in fragment.values.items()
    }
