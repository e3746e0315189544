"""Mixtures and windows of shards in a run: refused where they cannot be, exact where they can."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch.distributed as dist

from data.shards import write_corpus
from data.tokenizer import load_tokenizer
from tests.data.corpora import write_numbers
from tests.ranks import run_ranks
from tests.train.attempts import finish, losses
from tests.train.runs import problems, small
from tests.train.starting.test_inputs import assert_says, lines, one_line
from tests.train.starting.test_resume import HALF, STEPS, assert_same_bits, kill_while_at
from tests.train.tiny import LANES, Shards, prepare_shards, tiny
from train.reading.corpora import choose_course, metric_names, start_course
from train.reading.verify import verify
from train.settings.config import Config, ConfigError, validate
from train.starting.inputs import open_inputs


class Two(NamedTuple):
    """Two corpora of several shards, of bytes."""

    books: Path
    code: Path


def write_bytes(folder: Path, documents: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = [random.integers(97, 105, random.integers(50, 300)) for _ in range(documents)]
    write_corpus(folder, texts, tokenizer=load_tokenizer("bytes"), shard_tokens=1000)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder: Path = tmp_path_factory.mktemp("two")
    write_bytes(folder / "books", 60, seed=0)
    write_bytes(folder / "code", 20, seed=1)
    return Two(folder / "books", folder / "code")


def mixed(two: Two, **of_code: object) -> list[dict[str, object]]:
    return [
        {"path": str(two.books), "weight": 3},
        {"path": str(two.code), "weight": 1, **of_code},
    ]


def run_of(run_dir: Path, shards: Shards, train: object, **changes: object) -> dict[str, Any]:
    return tiny(run_dir, shards, data__train=train, **changes)


def config_of(shards: Shards, train: object, **changes: object) -> Config:
    return validate(run_of(Path("unused"), shards, train, **changes))


# the configuration alone


@pytest.mark.parametrize(
    ("train", "line"),
    [
        ([], "data.train: [] names no corpus; give a folder, or a list such as"),
        ([{"path": "a", "weight": 0}], "data.train[0].weight: 0 is too small; it must be above 0"),
        (
            [{"path": "a"}, {"path": "b", "weight": -1}],
            "data.train[1].weight: -1 is too small; it must be above 0",
        ),
        (
            [{"path": "a", "weight": 2}, {"path": "b"}, {"path": "./a", "weight": 0.5}],
            "data.train: a is both [0] and [2]; name it once, with weight 2.5",
        ),
        (
            [{"path": "a", "max_epochs": 0}],
            "data.train[0].max_epochs: 0 is too small; the least is 1",
        ),
        ([{"weight": 1}], "data.train[0].path: missing; folder or URL of prepared training shards"),
        ([{"path": "a", "weigth": 1}], "data.train[0].weigth: unknown key; did you mean 'weight'?"),
        (["a"], "data.train[0]: expected keys below it, got 'a'"),
    ],
)
def test_an_impossible_mixture_is_one_line(train: object, line: str) -> None:
    (found,) = problems(small(data__train=train))
    assert found.startswith(line)


def test_windows_hold_at_least_a_shard() -> None:
    line = "data.shuffle_shards: 0 is too small; the least is 1"
    assert problems(small(data__shuffle_shards=0)) == (line,)


# with the corpora


def test_a_mixtures_corpora_share_a_tokenizer(tmp_path: Path, two: Two, shards: Shards) -> None:
    write_numbers(tmp_path / "numbers", [40, 40], vocab_size=100)
    train = [{"path": str(two.books)}, {"path": str(tmp_path / "numbers")}]
    line = one_line(run_of(tmp_path / "run", shards, train))
    assert_says(line, "data.train: ", tmp_path / "numbers", "numbers-100", two.books, "share one")


def test_every_corpus_that_is_missing_is_named(tmp_path: Path, two: Two, shards: Shards) -> None:
    train = [{"path": "nowhere"}, {"path": str(two.books)}, {"path": "lost"}]
    first, second = lines(run_of(tmp_path / "run", shards, train))
    assert_says(first, "data.train[0].path: ", "nowhere", "longhaul prepare")
    assert_says(second, "data.train[2].path: ", "lost", "longhaul prepare")


def test_a_mixtures_valid_may_not_have_another_tokenizer(
    tmp_path: Path, two: Two, shards: Shards
) -> None:
    write_numbers(tmp_path / "numbers", [40, 40], vocab_size=100)
    valid = str(tmp_path / "numbers")
    line = one_line(run_of(tmp_path / "run", shards, mixed(two), data__valid=valid))
    assert_says(line, "data.valid: ", valid, f"{two.books} + {two.code}", "another tokenizer")


def steps_for(two: Two, shards: Shards, reads: int) -> int:
    """Return the steps in which no document of `code` is read more often."""
    config = config_of(shards, mixed(two))
    course = choose_course(config, open_inputs(config).train)
    (share,) = (share for share in course.shares if share.name == str(two.code))
    return share.most_epochs(reads) * course.streams.steps_per_epoch


def test_a_corpus_is_not_read_more_often_than_it_may(
    tmp_path: Path, two: Two, shards: Shards
) -> None:
    most = steps_for(two, shards, reads=2)
    raw = run_of(tmp_path, shards, mixed(two, max_epochs=2), train__steps=most + 1)
    assert_says(
        one_line(raw),
        "data.train[1].max_epochs: 2, but documents of",
        two.code,
        "up to 3 times in train.steps",
        f"use at most {most:,} steps, or raise max_epochs to 3",
    )
    open_inputs(validate({**raw, "train": {**raw["train"], "steps": most}}))


def test_one_corpus_may_have_a_limit_too(tmp_path: Path, two: Two, shards: Shards) -> None:
    train = [{"path": str(two.code), "max_epochs": 1}]
    line = one_line(run_of(tmp_path, shards, train, train__steps=100000))
    assert_says(line, "data.train[0].max_epochs: 1, but", "lower its weight, use at most")


def test_how_often_corpora_were_read_is_a_function_of_the_step(two: Two, shards: Shards) -> None:
    config = config_of(shards, mixed(two))
    course = choose_course(config, open_inputs(config).train)
    steps = 3 * course.streams.steps_per_epoch
    found = course.metrics(steps)
    assert found["data/tokens/books"] / found["data/tokens/code"] == pytest.approx(3, rel=0.02)
    read: dict[int, int] = {0: 0, 1: 0}
    for position in range(steps * LANES):
        for segment in course.streams.sample(position):
            if segment is not None:
                part, _ = course.streams.order.locate(segment.document)
                read[part] += segment.stop - segment.start
    names = [Path(share.name).name for share in course.shares]
    for part, name in enumerate(names):
        # the last segment of a document is shorter, and which ones were read is chance
        assert read[part] == pytest.approx(found[f"data/tokens/{name}"], rel=0.02)


def test_a_corpus_alone_has_no_such_metrics(two: Two, shards: Shards) -> None:
    config = config_of(shards, str(two.books))
    assert choose_course(config, open_inputs(config).train).metrics(5) == {}


def test_a_mixture_whose_epochs_are_mostly_padding_is_warned_of(two: Two, shards: Shards) -> None:
    train = [{"path": str(two.books)}, {"path": str(two.code), "weight": 30}]
    config = config_of(shards, train, train__batch_size=32)
    course = choose_course(config, open_inputs(config).train)
    *parts, warning = course.describe(1000)
    assert any(str(two.code) in line and "96.80% of the tokens" in line for line in parts)
    assert_says(warning, "WARNING: ", "padding", two.code, "lower that one's weight")


def test_metrics_are_named_by_the_ends_of_paths() -> None:
    assert metric_names(["/d/books", "/d/code"]) == ["books", "code"]
    assert metric_names(["/d/books/train", "/d/code/train"]) == ["books_train", "code_train"]
    assert metric_names(["train"]) == ["train"]


# in windows of shards: rank 0 counts, all are told


def course_digest(config: Config) -> None:
    """Meet the other ranks and compare what is read."""
    training = open_inputs(config).train
    streams = start_course(config, training).streams
    samples = [streams.sample(position) for position in range(50)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, samples)
    assert all(other == samples for other in everyone)


def test_all_ranks_read_in_the_order_that_rank_0_counted(
    tmp_path: Path, two: Two, shards: Shards
) -> None:
    config = validate(run_of(tmp_path / "run", shards, mixed(two), data__shuffle_shards=2))
    run_ranks(2, course_digest, config)
    counts = sorted((tmp_path / "run/data").glob("segments-*-16.json"))
    assert len(counts) == 2
    made = [path.stat().st_mtime_ns for path in counts]
    run_ranks(2, course_digest, config)
    assert [path.stat().st_mtime_ns for path in counts] == made  # read, not made again


def must_fail(config: Config, parts: list[str]) -> None:
    training = open_inputs(config).train
    with pytest.raises(ConfigError) as caught:
        start_course(config, training)
    (line,) = caught.value.problems
    assert_says(line, *parts)


def lose_index(folder: Path) -> str:
    lost = sorted(folder.glob("*.idx.npy"))[1]
    lost.unlink()
    return f"{lost.name} is missing"


def lose_shard(folder: Path) -> str:
    lost = sorted(folder.glob("*.tar"))[1]
    lost.unlink()
    return f"{lost.name} is missing"


@pytest.mark.parametrize("damage", [lose_index, lose_shard])
def test_damage_that_rank_0_finds_is_an_error_on_all(
    damage: Callable[[Path], str], tmp_path: Path, two: Two, shards: Shards
) -> None:
    shutil.copytree(two.books, tmp_path / "books")
    said = damage(tmp_path / "books")
    raw = run_of(tmp_path / "run", shards, str(tmp_path / "books"), data__shuffle_shards=2)
    run_ranks(2, must_fail, validate(raw), ["data.train: ", said])


def test_limits_hold_in_windows_too(tmp_path: Path, two: Two, shards: Shards) -> None:
    raw = run_of(
        tmp_path / "run",
        shards,
        mixed(two, max_epochs=1),
        data__shuffle_shards=2,
        train__steps=100000,
    )
    run_ranks(1, must_fail, validate(raw), ["data.train[1].max_epochs: 1, but", "use at most"])


# training


def test_a_killed_run_of_a_mixture_in_windows_goes_on_bit_for_bit(
    tmp_path: Path, two: Two, shards: Shards
) -> None:
    changes = {
        "data__shuffle_shards": 2,
        "data__workers": 2,
        "train__steps": STEPS,
        "checkpoint__every": HALF,
    }
    broken, whole = (
        validate(run_of(tmp_path / name, shards, mixed(two), **changes))
        for name in ("broken", "whole")
    )
    kill_while_at(broken, 1, HALF + 2)
    assert f"resumed at step {HALF}" in finish(1, broken)
    finish(1, whole)
    assert_same_bits(broken.run_dir, whole.run_dir, STEPS)
    assert '"mixture"' in (whole.run_dir / "data_manifest.json").read_text()
    for change in (
        {"data__train": [mixed(two)[0], {**mixed(two)[1], "weight": 2}]},
        {"data__train": str(two.books)},
        {"data__shuffle_shards": 3},
        {"data__shuffle_shards": None},
    ):
        raw = tiny(broken.run_dir, shards, **{"data__train": mixed(two), **changes, **change})
        assert_says(one_line(raw), broken.run_dir, "--fork NAME")


@pytest.mark.slow
def test_4_2_3_and_6_ranks_read_a_mixture_as_one_does(
    tmp_path: Path, two: Two, shards: Shards
) -> None:
    def until(steps: int, name: str) -> Config:
        changes = {
            "data__shuffle_shards": 2,
            "data__workers": 2,
            "train__batch_size": 12,
            "train__steps": steps,
            "train__schedule": "constant",
        }
        return validate(run_of(tmp_path / name, shards, mixed(two), **changes))

    finish(1, until(16, "one"))
    for size, steps in ((4, 4), (2, 8), (3, 12), (6, 16)):
        finish(size, until(steps, "many"))
    found = verify([tmp_path / "many", tmp_path / "one"])
    assert found.good, found.sentences
    assert "the same 192 samples in the same order" in "\n".join(found.sentences)
    ours, theirs = (np.array(losses(tmp_path / name)) for name in ("many", "one"))
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-6)


def test_a_run_says_how_often_it_reads_its_corpus_and_what_is_padding(
    tmp_path: Path, shards: Shards
) -> None:
    short = prepare_shards(tmp_path, documents=40, words=(4, 10))  # 20 to 50 bytes
    config = config_of(shards, str(short.train), data__segment_len=128, data__sample_len=128)
    course = choose_course(config, open_inputs(config).train)
    times, *_, warning = course.describe(10 * course.streams.steps_per_epoch)
    share = course.shares[0]
    assert_says(times, str(short.train), f"{share.tokens:,} tokens", "read it 10 times")
    read = [course.streams.sample(p) for p in range(course.streams.steps_per_epoch * LANES)]
    segments = [segment for sample in read for segment in sample if segment is not None]
    padding = 1 - sum(part.stop - part.start for part in segments) / (128 * len(segments))
    assert padding > 0.5
    assert_says(warning, f"WARNING: {padding:.0%} of the positions are padding", "data.packing")
    packed = config_of(shards, str(short.train), data__packing=True, data__segment_len=128,
                       data__sample_len=128)  # fmt: skip
    told = choose_course(packed, open_inputs(packed).train).describe(10)
    assert not [line for line in told if "data.packing" in line]
