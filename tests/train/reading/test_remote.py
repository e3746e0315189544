"""A run whose shards come from a web server, a poor one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data import remote
from tests.data.server import Server, serving
from tests.train.attempts import finish
from tests.train.runs import problems, small
from tests.train.tiny import Shards, tiny
from train.reading.verify import verify
from train.settings.config import dump, validate
from train.starting.inputs import open_inputs


@pytest.fixture(autouse=True)
def no_proxy_and_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server(shards: Shards) -> Iterator[Server]:
    with serving(shards.train) as running:
        yield running


def test_a_run_over_http_consumes_what_a_local_one_does(
    tmp_path: Path, shards: Shards, server: Server
) -> None:
    changes: dict[str, object] = {"train__steps": 4, "data__valid": None, "data__workers": 1}
    here = validate(tiny(tmp_path / "here", shards, **changes))
    changes |= {"data__train": server.url, "data__cache_dir": str(tmp_path / "cache")}
    there = validate(tiny(tmp_path / "there", shards, **changes))
    name = next(shards.train.glob("*.tar")).name
    server.fail(name, "503", "drop")
    finish(1, here)
    text = finish(2, there)
    assert f"{server.url}/{name}: attempt 1 of 10 failed (HTTP 503" in text
    found = verify([here.run_dir, there.run_dir])
    assert found.good, found.sentences
    assert server.counts()[name] == 3  # two that failed; both ranks read the one that came


def test_a_dead_address_is_a_problem_of_data_train(
    tmp_path: Path, shards: Shards, server: Server
) -> None:
    changes = {"data__train": server.url, "data__cache_dir": str(tmp_path / "cache")}
    config = validate(tiny(tmp_path / "run", shards, data__fetch_attempts=2, **changes))
    server.fail("manifest.json", "503", "503")
    with pytest.raises(
        ValueError,
        match=r"data.train: http://127.*manifest.json could not be read"
        r" in 2 attempts",
    ):
        open_inputs(config)


def test_a_url_needs_a_cache() -> None:
    expected = (
        "data.cache_dir: missing, and https://host/shards is a URL; name a folder on a disk of the"
        " node, such as /tmp/longhaul-cache",
    )
    assert problems(small(data__train="https://host/shards?key=1")) == expected
    mixture = [{"path": "books"}, {"path": "https://host/shards"}]
    assert problems(small(data__train=mixture)) == expected


def test_a_url_is_printed_as_it_was_given() -> None:
    raw = small(data__train="s3://bucket/shards", data__cache_dir="/tmp/c", data__cache_bytes="2T")
    config = validate(raw)
    assert "train: s3://bucket/shards\n" in dump(config)
    assert config.data.cache_bytes == 2 << 40


def test_a_size_that_is_none() -> None:
    (line,) = problems(small(data__cache_bytes="much"))
    assert line == (
        "data.cache_bytes: expected a number of bytes such as 1000000, 512M, 200G or 2T, got 'much'"
    )
