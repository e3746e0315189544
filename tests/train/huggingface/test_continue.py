"""In, on with a memory, and out again: an imported model as the start of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.tokenizer import train_tokenizer
from model.decoder import Decoder
from parallel.mesh import build_mesh
from tests.compare import relative
from tests.ranks import run_ranks
from tests.train.attempts import finish, losses
from tests.train.huggingface.published import load, ours, publish, theirs, tokens
from tests.train.tiny import Shards, tiny
from train.build import to_model_config
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.merged import MergedWeights
from train.huggingface.exporting import export
from train.huggingface.importing import import_folder
from train.huggingface.loading import load_folder
from train.pretrain import build_from
from train.settings.config import Config, ConfigError, validate
from train.starting.inputs import open_inputs

pytestmark = pytest.mark.gloo

ROUNDING = 1e-5
FAM = {"name": "fam", "slots": 4, "first": "hidden"}


def continued(folder: Path, shards: Shards, **changes: Any) -> dict[str, Any]:
    """Return a run of four steps that starts from folder/imported, with fam."""
    model = import_folder(folder / "hf", folder / "imported").opened.config.model
    section = model.model_dump(mode="json", exclude_defaults=True)
    section |= {"init_from": str(folder / "imported"), "memory": FAM}
    settings = {"train__steps": 4, "checkpoint__every": 4, "train__lr": 1e-3}
    return tiny(folder / "run", shards, **{"model": section, **settings, **changes})


def first_logits(config: Config, ids: Tensor) -> Tensor:
    """Return the model's logits of one segment, before any step."""
    inputs = open_inputs(config)
    built = build_from(inputs.start, config, to_model_config(config, 0), build_mesh(tp=1, cp=1))
    return ours(built.model, ids)


MEMORIES: dict[str, Any] = {
    "fam": FAM,
    "window": "window",
    "cmab": {"name": "cmab", "latents": 3},
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_a_memory_that_hides_its_start_leaves_the_first_segment_to_the_model(
    tmp_path: Path, shards: Shards, memory: Any
) -> None:
    """The paper's claim, F x D parameters beside a model that is otherwise as it was."""
    published = publish(tmp_path / "hf", "qwen2")
    raw = continued(tmp_path, shards, model__memory=memory)
    (found,) = run_ranks(1, first_logits, validate(raw), tokens(16))
    assert relative(found, theirs(published, tokens(16))) < ROUNDING


def test_fams_prompt_is_read_unless_it_is_hidden(tmp_path: Path, shards: Shards) -> None:
    """As published: a random prompt disturbs a trained model until it is learned."""
    published = publish(tmp_path / "hf")
    raw = continued(tmp_path, shards, model__memory={**FAM, "first": "prompt"})
    (found,) = run_ranks(1, first_logits, validate(raw), tokens(16))
    assert relative(found, theirs(published, tokens(16))) > 1e-2


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_continued_model_trains_and_leaves_again(
    tmp_path: Path, shards: Shards, lora: dict[str, Any] | None
) -> None:
    published = publish(tmp_path / "hf", "qwen2", {"tie_word_embeddings": True})
    (tmp_path / "hf/tokenizer_config.json").write_text('{"chat_template": "x"}')
    config = validate(continued(tmp_path, shards, model__lora=lora))
    finish(1, config)
    assert len(losses(tmp_path / "run")) == 4
    export(tmp_path / "run", tmp_path / "out", dtype="fp32")

    weights = MergedWeights(*choose_checkpoint(tmp_path / "run"))
    bare = Decoder(to_model_config(validate(continued_bare(config)), 0))
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            parameter.copy_(weights[name])
    found = theirs(load(tmp_path / "out"), tokens(16))
    assert relative(found, ours(bare.eval(), tokens(16))) < ROUNDING
    assert relative(found, theirs(published, tokens(16))) > 1e-3  # it has learned
    whole, _ = load_folder(tmp_path / "out")
    assert torch.equal(whole.memory.parts["fam"].prompt, weights["memory.parts.fam.prompt"])
    copied = (tmp_path / "out/tokenizer_config.json").read_text()
    assert copied == '{"chat_template": "x"}'  # the imported model's: the data has its tokenizer


def test_biases_and_all_arrive_on_two_tensor_parallel_ranks(tmp_path: Path, shards: Shards) -> None:
    publish(tmp_path / "hf", "qwen2")
    settings = {"train__steps": 2, "train__warmup_steps": 0}
    raw = continued(tmp_path, shards, **settings)
    finish(1, validate(raw))
    split = raw | {"run_dir": str(tmp_path / "split"), "parallel": {"tp": 2, "zero": 3}}
    finish(2, validate(split))
    for whole, cut in zip(losses(tmp_path / "run"), losses(tmp_path / "split"), strict=True):
        assert cut[1] == pytest.approx(whole[1], rel=1e-5)


def continued_bare(config: Config) -> dict[str, Any]:
    raw = config.model_dump(mode="json")
    raw["model"] |= {"memory": {"name": "none"}, "lora": None, "init_from": None}
    return raw


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, shards: Shards) -> None:
    """Ids fit, and stand for other words."""
    publish(tmp_path / "hf")
    other = train_tokenizer(["some words and some more words"] * 9, vocab_size=270)
    (tmp_path / "hf/tokenizer.json").write_text(other.to_json())
    config = validate(continued(tmp_path, shards))
    with pytest.raises(ConfigError) as caught:
        open_inputs(config)
    home = tmp_path / "imported/tokenizer.json"
    (line,) = caught.value.problems
    assert line.startswith(f"data.train: {shards.train} was prepared with another tokenizer ")
    assert line.endswith(f"; prepare it with the model's own, --tokenizer {home}")


def test_segments_longer_than_the_models_window_are_refused(tmp_path: Path, shards: Shards) -> None:
    publish(tmp_path / "hf", "mistral", {"sliding_window": 24})
    with pytest.raises(ConfigError, match="with 24 keys a token, but .* 1 before it, 32 tokens"):
        validate(continued(tmp_path, shards, model__memory={**FAM, "window": 1}))
