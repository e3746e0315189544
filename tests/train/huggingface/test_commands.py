"""The two commands: what they take, and what they say."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.train.huggingface.published import LLAMA3, load, publish, tokens
from tests.train.runs import small
from train.cli import app
from train.settings.config import validate


def longhaul(*arguments: object) -> str:
    """Return what a command prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_in_and_out_again(tmp_path: Path) -> None:
    model = publish(tmp_path / "hf", changes={"rope_parameters": LLAMA3})
    said = longhaul("import", tmp_path / "hf", "--output", tmp_path / "run", "--segment-len", "32")
    assert f"{tmp_path}/run: 42,464 parameters, segments of 32 tokens" in said
    said = longhaul("export", tmp_path / "run", tmp_path / "out", "--max-shard", "50KB")
    assert "84,928 bytes of weights in 2 files" in said
    assert load(tmp_path / "out").config.rope_parameters == LLAMA3
    assert model(tokens()).logits.shape == load(tmp_path / "out")(tokens()).logits.shape


def test_import_prints_the_section_of_a_run_that_continues(tmp_path: Path) -> None:
    publish(tmp_path / "hf", "mistral", {"sliding_window": 32})
    said = longhaul("import", tmp_path / "hf", "--output", tmp_path / "run")
    assert "sliding window: 32 tokens; segments, with the window of a memory, must not be" in said
    section = yaml.safe_load(said.partition("\n\n")[2])["model"]
    config = validate(small(model=section, data__segment_len=32))
    assert (config.model.sliding_window, config.model.vocab_size) == (32, 300)
    assert config.model.init_from == tmp_path / "run"


def test_what_cannot_be_is_said_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--segment-len: expected a number of tokens"):
        longhaul("import", tmp_path, "--output", tmp_path / "run", "--segment-len", "much")
    with pytest.raises(ValueError, match="holds no good checkpoint"):
        longhaul("export", tmp_path, tmp_path / "out")
