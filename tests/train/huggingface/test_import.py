"""A published folder as a checkpoint: the same model, and data of the same tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from model.config import RopeScaling
from tests.compare import relative
from tests.train.huggingface.published import (
    LARGE,
    MODELS,
    VOCAB,
    edit,
    imported,
    make,
    ours,
    own_bytes,
    publish,
    theirs,
    tokens,
)
from tests.train.tiny import Shards
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.snapshot import read_model
from train.evaluation import evaluate
from train.generation import generate
from train.generation.writing import Wanted
from train.huggingface import folder as folders
from train.huggingface.importing import import_folder
from train.huggingface.loading import load_folder

ROUNDING = 1e-5
"""float32, three layers: 2e-7 measured."""


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS.keys())
def test_logits_are_those_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = publish(tmp_path / "hf", kind, changes)
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert relative(ours(imported(tmp_path / "run"), tokens()), theirs(model, tokens())) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_become_float32_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    model = publish(tmp_path / "hf", dtype=dtype)
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert relative(ours(imported(tmp_path / "run"), tokens()), theirs(model, tokens())) < ROUNDING


def test_a_folder_in_many_files_is_one_model(tmp_path: Path) -> None:
    model = publish(tmp_path / "hf", "qwen2", shard="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    import_folder(tmp_path / "hf", tmp_path / "run")
    assert relative(ours(imported(tmp_path / "run"), tokens()), theirs(model, tokens())) < ROUNDING


def test_the_older_words_for_the_rotation_are_read(tmp_path: Path) -> None:
    publish(tmp_path / "hf", changes={"rope_parameters": {"rope_theta": 500.0}})

    def older(values: dict[str, Any]) -> None:
        del values["rope_parameters"]
        values |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}

    edit(tmp_path / "hf/config.json", older)
    model = load_folder(tmp_path / "hf")[0].config
    assert (model.rope_base, model.rope_scaling) == (777.0, RopeScaling("linear", 2.0))


def test_rows_of_the_padding_are_zero(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    table = imported(tmp_path / "run").embedding.weight
    assert table.shape[0] == 320
    assert table[VOCAB:].abs().max() == 0 < table[:VOCAB].abs().max()


def test_a_run_folder_and_its_checkpoint_are_both_taken(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    path, manifest = choose_checkpoint(tmp_path / "run")
    assert path == tmp_path / "run/checkpoints/step-00000000"
    assert choose_checkpoint(path) == (path, manifest)
    assert (manifest.step, manifest.updates) == (0, 0)
    assert manifest.layout == {"tp": 1, "cp": 1, "dp": 1, "zero": 1}
    assert (tmp_path / "run/checkpoints/latest").read_text() == path.name


def test_only_masters_are_written(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    held = load_file(tmp_path / "run/checkpoints/step-00000000/rank-00000.safetensors")
    assert all(name.startswith("master/") and name.endswith("@0") for name in held)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}


def test_one_parameter_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 128 MB, whose largest parameter has 2 MB."""
    publish(tmp_path / "hf", changes=LARGE)
    held: list[int] = []
    get = folders.PublishedWeights.__getitem__

    def watched(self: folders.PublishedWeights, name: str) -> Tensor:
        tensor = get(self, name)
        held.append(own_bytes())
        return tensor

    monkeypatch.setattr(folders.PublishedWeights, "__getitem__", watched)
    done = import_folder(tmp_path / "hf", tmp_path / "run")
    assert done.parameters * 4 > 120e6
    assert max(held) - held[0] < 16e6


@pytest.mark.parametrize(
    ("asked", "changes", "length"),
    [
        (None, {}, 64),  # max_position_embeddings
        (None, {"max_position_embeddings": 10**6}, 4096),
        (None, {"sliding_window": 33}, 32),
        (16, {"sliding_window": 33}, 16),
    ],
)
def test_a_segment_is_as_long_as_the_model_knows(
    tmp_path: Path, asked: int | None, changes: dict[str, Any], length: int
) -> None:
    publish(tmp_path / "hf", "mistral", {"sliding_window": None} | changes)
    done = import_folder(tmp_path / "hf", tmp_path / "run", segment_len=asked)
    assert done.opened.config.data.segment_len == length


def test_segments_longer_than_the_sliding_window_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "hf", "mistral", {"sliding_window": 32})
    with pytest.raises(ValueError, match="with 32 keys a token, but a token reads its segment, 64"):
        import_folder(tmp_path / "hf", tmp_path / "run", segment_len=64)


def test_buffers_of_older_folders_are_passed_over(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    held = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(held, path, {"format": "pt"})
    load_folder(tmp_path / "hf")


def test_a_tied_output_that_is_stored_too_must_be_the_embedding(tmp_path: Path) -> None:
    publish(tmp_path / "hf", changes={"tie_word_embeddings": True})
    path = tmp_path / "hf/model.safetensors"
    held = load_file(path)
    same = held["model.embed_tokens.weight"].clone()
    save_file(held | {"lm_head.weight": same}, path, {"format": "pt"})
    load_folder(tmp_path / "hf")
    save_file(held | {"lm_head.weight": same + 1}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        load_folder(tmp_path / "hf")


# tokenizer


def test_the_tokenizer_comes_along_with_what_belongs_to_it(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "hf/LICENSE").write_text("terms")
    import_folder(tmp_path / "hf", tmp_path / "run")
    found = load_tokenizer(tmp_path / "run/tokenizer.json")
    assert found.sha256 == load_tokenizer(tmp_path / "hf/tokenizer.json").sha256
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_without_a_tokenizer_the_remedy_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json.*--tokenizer none"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    import_folder(tmp_path / "hf", tmp_path / "run", tokenizer="none")
    assert not (tmp_path / "run/tokenizer.json").exists()


def test_a_tokenizer_of_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "hf", changes={"vocab_size": 200})
    with pytest.raises(ValueError, match="the tokenizer has 257 ids .* and the model has 200"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_generate_finds_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "prompt").write_text("a text")
    assert generate.run(tmp_path / "run", str(tmp_path / "prompt"), Wanted(3)) == 0
    assert "read 6 tokens" in capsys.readouterr().err


def test_evaluate_reads_data_of_the_same_tokenizer(tmp_path: Path, shards: Shards) -> None:
    publish(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", segment_len=16)
    assert evaluate.run(tmp_path / "run", data=shards.valid, tokens=64) == 0


def test_evaluate_refuses_data_of_another_tokenizer(tmp_path: Path, shards: Shards) -> None:
    publish(tmp_path / "hf")
    other = train_tokenizer(["some words and some more words"] * 9, vocab_size=270)
    (tmp_path / "hf/tokenizer.json").write_text(other.to_json())
    assert END_OF_DOCUMENT in other.to_json()
    import_folder(tmp_path / "hf", tmp_path / "run", segment_len=16)
    with pytest.raises(
        ValueError, match=f"another tokenizer .* --tokenizer {tmp_path / 'run/tokenizer.json'}$"
    ):
        evaluate.run(tmp_path / "run", data=shards.valid, tokens=64)


# what is left when it fails


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").write_text("mine")
    with pytest.raises(ValueError, match="run exists and is not empty; name a new folder"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert (tmp_path / "run/notes").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "hf")

    def full(self: folders.PublishedWeights, name: str) -> Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.PublishedWeights, "__getitem__", full)
    with pytest.raises(ValueError, match="run could not be written .*No space left"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


def test_the_configuration_describes_the_model(tmp_path: Path) -> None:
    publish(tmp_path / "hf", "qwen2", {"tie_word_embeddings": True})
    import_folder(tmp_path / "hf", tmp_path / "my model!")
    _, config = read_model(tmp_path / "my model!")
    assert config.name == "my-model-"
    model = config.model
    assert (model.vocab_size, model.num_layers, model.hidden_size) == (VOCAB, 3, 32)
    assert (model.qkv_bias, model.tie_embeddings, model.norm_eps) == (True, True, 1e-3)
    assert model.memory.name == "none"


def test_a_model_made_twice_is_the_same() -> None:
    """Else comparisons above would compare different models."""
    first, second = (make("llama", {}).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert json.loads(make("llama", {}).config.to_json_string())["initializer_range"] == 0.3
