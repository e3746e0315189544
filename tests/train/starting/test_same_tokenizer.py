"""A model is used with the tokenizer that it was trained with: one of as many ids is refused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.index import Corpus
from data.tokenizer import ByteTokenizer, load_tokenizer
from tests.train.runs import longhaul, write
from tests.train.starting.test_inputs import assert_says, one_line
from tests.train.tiny import Shards, prepare_shards, tiny, write_permuted
from train.checkpoints.folder import choose_checkpoint
from train.checkpoints.manifest import read_manifest, values_hash
from train.settings.config import ConfigError, validate
from train.starting.start import open_run

OURS = ByteTokenizer().sha256


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_permuted(tmp_path_factory.mktemp("words"))
    found = load_tokenizer(path)
    assert (found.vocab_size, found.end_of_document) == (257, 256)
    assert found.encode("a").tolist() == [255 - ord("a")]
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, permuted: Path) -> Shards:
    """Return the same texts as `shards`, prepared with the other tokenizer."""
    return prepare_shards(tmp_path_factory.mktemp("foreign"), tokenizer=str(permuted))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of two steps, beside its own data, whose folder is `corpus`."""
    folder: Path = tmp_path_factory.mktemp("trained")
    raw = short(folder / "run", prepare_shards(folder / "corpus"))
    ended = longhaul("pretrain", write(folder, raw))
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("words and more words\n")
    return path


@pytest.fixture
def prepared_anew(run: Path, foreign: Shards) -> Any:
    """Let the run's data be of the other tokenizer for a while; return their folder."""
    shards = run.parent / "corpus/shards"
    shards.rename(shards.with_name("kept"))
    shutil.copytree(foreign.train.parent, shards)
    yield shards
    shutil.rmtree(shards)
    shards.with_name("kept").rename(shards)


def short(run_dir: Path, shards: Shards, **changes: object) -> dict[str, Any]:
    return tiny(run_dir, shards, train__steps=2, train__warmup_steps=1, **changes)


def generate(checkpoint: Path, prompt: Path, *options: object) -> Any:
    return longhaul("generate", checkpoint, "--prompt", prompt, "--max-tokens", 3, *options)


def assert_refused(ended: Any, parts: Sequence[object]) -> None:
    """One message, and nothing else."""
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    (line,) = ended.stderr.splitlines()
    for part in (*parts, "another tokenizer", OURS[:12], "its ids stand for other words"):
        assert str(part) in line


def forget_tokenizer(run: Path, copy: Path) -> Path:
    """Return a copy of a run whose checkpoints are as an older longhaul wrote them."""
    shutil.copytree(run, copy)
    for path in copy.glob("checkpoints/step-*/manifest.json"):
        values = json.loads(path.read_text())
        del values["sha256"], values["tokenizer_sha256"]
        path.write_text(json.dumps(values | {"sha256": values_hash(values)}))
    return copy


def test_a_checkpoint_says_its_tokenizer(run: Path) -> None:
    assert choose_checkpoint(run)[1].tokenizer_sha256 == OURS


def test_another_file_of_as_many_ids_is_refused(run: Path, permuted: Path, prompt: Path) -> None:
    ended = generate(run, prompt, "--tokenizer", permuted)
    assert_refused(ended, [f"{permuted} is another", "give the model's own with --tokenizer FILE"])


def test_data_prepared_anew_with_another_one_are_refused(
    run: Path, prepared_anew: Path, prompt: Path
) -> None:
    ended = generate(run, prompt)
    given = f"{prepared_anew / 'valid'} was prepared with another"
    assert_refused(ended, [given, "give the model's own with --tokenizer FILE"])


def test_the_right_one_passes_under_any_name(
    run: Path, prepared_anew: Path, tmp_path: Path, prompt: Path
) -> None:
    (tmp_path / "words.txt").write_text(ByteTokenizer().to_json())
    ended = generate(run, prompt, "--tokenizer", tmp_path / "words.txt")
    assert ended.returncode == 0, ended.stderr


def test_evaluating_on_data_of_another_one_is_refused(run: Path, foreign: Shards) -> None:
    ended = longhaul("evaluate", run, "--data", foreign.valid, "--tokens", 64)
    given = f"{foreign.valid} was prepared with another"
    assert_refused(ended, [given, "prepare it with the model's own, --tokenizer FILE"])


def test_exporting_another_one_is_refused(run: Path, permuted: Path, tmp_path: Path) -> None:
    ended = longhaul("export", run, tmp_path / "hf", "--tokenizer", permuted)
    assert_refused(ended, [f"{permuted} is another", "name the model's own by --tokenizer FILE"])
    assert not (tmp_path / "hf").exists()


def test_an_older_checkpoint_is_read_and_compared_by_size(
    run: Path, permuted: Path, tmp_path: Path, prompt: Path
) -> None:
    old = forget_tokenizer(run, tmp_path / "old")
    assert choose_checkpoint(old)[1].tokenizer_sha256 is None
    ended = generate(old, prompt, "--tokenizer", permuted)
    assert ended.returncode == 0, ended.stderr


def test_a_new_run_from_its_weights_on_data_of_another_one_is_refused(
    run: Path, foreign: Shards, tmp_path: Path
) -> None:
    line = one_line(short(tmp_path / "new", foreign, model__init_from=str(run)))
    assert_says(line, f"data.train: {foreign.train} was prepared with another tokenizer", run)


@pytest.mark.parametrize("memory", ["fam", "window"])
def test_a_fork_on_data_of_another_one_is_refused(memory: str, run: Path, foreign: Shards) -> None:
    """The same model takes weights and moments, another one the weights by name."""
    changes = {} if memory == "fam" else {"model__memory": {"name": memory}}
    with pytest.raises(ConfigError) as caught:
        open_run(validate(short(run, foreign, **changes)), fork="child")
    (line,) = caught.value.problems
    assert_says(line, f"data.train: {foreign.train} was prepared with another tokenizer", run)
    assert not run.with_name("child").exists()


def test_a_fork_says_the_tokenizer_of_its_own_data(run: Path, tmp_path: Path) -> None:
    """Also where its parent, an older longhaul's, does not."""
    old = forget_tokenizer(run, tmp_path / "old")
    other = prepare_shards(tmp_path / "other", seed=1)
    open_run(validate(short(old, other)), fork="child")
    begun = read_manifest(tmp_path / "child/checkpoints/step-00000000")
    assert begun.tokenizer_sha256 == Corpus.open(other.train).tokenizer_sha256 == OURS
