import errno
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import remote as remote_module
from data.cache import Cache
from data.index import Corpus
from data.loader import load
from data.remote import FetchError, Patience, Remote, joined
from data.shards import INDEX_SUFFIX, Manifest
from data.streams import Streams
from data.tokenizer import ByteTokenizer
from data.urls import shown_url, url_of
from tests.data.corpora import write_numbers
from tests.data.server import Server, serving

LENGTHS = [20, 30, 25, 40, 50, 10]  # three shards of two documents
SHARD = "shard-000001.tar"
LIMIT = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "origin", LENGTHS, shard_tokens=70)
    return tmp_path / "origin"


@pytest.fixture(autouse=True)
def no_proxy_and_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


def remote(tmp_path: Path, limit: int = LIMIT, attempts: int = 4, timeout_s: float = 5) -> Remote:
    return Remote(Cache(tmp_path / "cache", limit), Patience(attempts, timeout_s))


def open_corpus(server: Server, reading: Remote) -> Corpus:
    return Corpus.open(server.url, remote=reading)


def read_all(corpus: Corpus) -> list[int]:
    return [
        token
        for document, length in enumerate(LENGTHS)
        for token in corpus.read(document, 0, length).tolist()
    ]


def held(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())


def cached(tmp_path: Path, folder: Path, number: int = 1) -> Path:
    return tmp_path / "cache" / Manifest.read(folder).shards[number].sha256


# what comes


def test_a_corpus_behind_a_url_is_the_corpus(folder: Path, server: Server, tmp_path: Path) -> None:
    here, there = Corpus.open(folder), open_corpus(server, remote(tmp_path))
    assert read_all(there) == read_all(here)
    assert there.fingerprint == here.fingerprint
    assert there.folder == server.url


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        read_all(open_corpus(server, remote(tmp_path)))
    counts = server.counts()
    assert counts.pop("manifest.json") == 2  # it has no hash: it is what says the others'
    assert set(counts.values()) == {1}


def test_opening_fetches_indices_and_no_shard(server: Server, tmp_path: Path) -> None:
    open_corpus(server, remote(tmp_path))
    assert {name for name, _ in server.requests} == {
        "manifest.json",
        *(f"shard-{number:06d}.tar{INDEX_SUFFIX}" for number in range(3)),
    }


def test_the_tokenizer_comes_as_well(tmp_path: Path) -> None:
    from data.shards import write_corpus

    write_corpus(tmp_path / "bytes", [[1, 2, 3]], tokenizer=ByteTokenizer())  # type: ignore[list-item]
    with serving(tmp_path / "bytes") as server:
        assert open_corpus(server, remote(tmp_path)).tokenizer().name == "bytes"


def test_the_loader_reads_the_same_batches(folder: Path, server: Server, tmp_path: Path) -> None:
    def batches(corpus: Corpus, workers: int) -> list[list[int]]:
        streams = Streams(corpus.lengths, seed=1, lanes=2, segment_len=8, segments=2)
        steps = load(
            corpus,
            streams,
            position=0,
            dp_rank=0,
            dp_size=1,
            micro_batch=2,
            workers=workers,
            steps=4,
        )
        return [step[0].tokens.flatten().tolist() for step in steps]

    there = open_corpus(server, remote(tmp_path, limit=4096))  # no two shards fit
    assert batches(there, workers=2) == batches(Corpus.open(folder), workers=0)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_schemes_are_read_by_fsspec(scheme: str, folder: Path, tmp_path: Path) -> None:
    url = f"file://{folder}"
    if scheme == "memory":
        import fsspec

        url = "memory://corpus/train"
        fsspec.filesystem("memory").put(f"{folder}/", "/corpus/train/", recursive=True)
    assert read_all(Corpus.open(url, remote=remote(tmp_path))) == read_all(Corpus.open(folder))


# what goes wrong on the way


def test_a_dropped_connection_goes_on_where_it_ended(
    folder: Path, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = remote(tmp_path)
    corpus = open_corpus(server, reading)
    server.fail(SHARD, "drop")
    with caplog.at_level(logging.WARNING):
        assert read_all(corpus) == read_all(Corpus.open(folder))
    size = (folder / SHARD).stat().st_size
    assert [asked for name, asked in server.requests if name == SHARD] == [
        None,
        f"bytes={size // 2}-",
    ]
    traffic = reading.cache.traffic()
    indices = sum(path.stat().st_size for path in folder.glob("*.npy"))
    shards = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert traffic["retries"] == 1 and traffic["bytes"] == shards + indices
    (said,) = [record.message for record in caplog.records]
    assert f"{server.url}/{SHARD}: attempt 1 of 4 failed (the connection ended after" in said


def test_without_ranges_a_dropped_fetch_begins_anew(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    corpus = open_corpus(server, remote(tmp_path))
    server.ranges = False
    server.fail(SHARD, "drop", "drop")
    assert read_all(corpus) == read_all(Corpus.open(folder))


@pytest.mark.parametrize("trouble", ["503", "429", "500", "wrong", "stall"])
def test_what_passes_is_tried_again(
    trouble: str, folder: Path, server: Server, tmp_path: Path
) -> None:
    reading = remote(tmp_path, timeout_s=1.0, attempts=9)
    corpus = open_corpus(server, reading)
    server.fail(SHARD, trouble)
    assert read_all(corpus) == read_all(Corpus.open(folder))
    assert reading.cache.traffic()["retries"] >= 1


def test_a_manifest_that_comes_late_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.fail("manifest.json", "503", "drop")
    reading = remote(tmp_path)
    with pytest.raises(ValueError, match="is not a manifest"):
        open_corpus(server, reading)


def test_a_dead_server_is_an_error_with_url_attempts_and_remedy(
    folder: Path, tmp_path: Path
) -> None:
    with serving(folder) as server:
        corpus = open_corpus(server, remote(tmp_path, attempts=3))
    with pytest.raises(
        FetchError,
        match=f"{server.url}/shard-000000.tar could not be read in 3"
        ".*refused.*raise data.fetch_attempts",
    ):
        corpus.read(0, 0, 3)


def test_an_outage_is_never_taken_for_damage(server: Server, tmp_path: Path) -> None:
    corpus = Corpus.open(server.url, on_damage="skip", remote=remote(tmp_path, attempts=2))
    server.fail(SHARD, "503", "503")
    with pytest.raises(FetchError):
        corpus.intact(2)
    assert corpus.damage == ()
    assert corpus.intact(2)  # when it is over


def test_a_refusal_is_an_error_at_once_and_no_damage(server: Server, tmp_path: Path) -> None:
    corpus = Corpus.open(server.url, on_damage="skip", remote=remote(tmp_path))
    server.fail(SHARD, "403")
    with pytest.raises(FetchError, match=f"{SHARD} may not be read here: HTTP 403"):
        corpus.intact(2)
    assert corpus.damage == () and server.counts()[SHARD] == 1


def test_a_full_disk_is_an_error_and_no_damage(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open(server.url, on_damage="skip", remote=remote(tmp_path))

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(FetchError, match="the disk of data.cache_dir = .* is full; lower"):
            corpus.intact(2)
    assert corpus.intact(2)


def test_a_missing_shard_is_damage_at_once(folder: Path, server: Server, tmp_path: Path) -> None:
    corpus = Corpus.open(server.url, on_damage="skip", remote=remote(tmp_path))
    (folder / SHARD).unlink()
    assert [corpus.intact(document) for document in range(4)] == [True, True, False, False]
    assert (
        f"{server.url}/{SHARD}: document 0 (25 tokens) cannot be read: HTTP 404"
        in (corpus.damage[0])
    )


def test_a_missing_index_stops_the_run(folder: Path, server: Server, tmp_path: Path) -> None:
    (folder / (SHARD + INDEX_SUFFIX)).unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar.idx.npy is missing \(HTTP 404"):
        open_corpus(server, remote(tmp_path))


def test_wrong_bytes_again_and_again_are_damage(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus(server, remote(tmp_path, attempts=9))
    server.fail(SHARD, *["wrong"] * 9)
    with pytest.raises(ValueError, match="cannot be read: what came has sha256 .*the manifest"):
        corpus.read(2, 0, 3)


def test_a_wrong_address_names_the_manifest(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere/../gone/manifest.json cannot be read .HTTP 404"):
        (server.folder / "manifest.json").unlink()
        Corpus.open(f"{server.url}/nowhere/../gone", remote=remote(tmp_path))


def test_a_scheme_that_nothing_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing here reads gopher://"):
        Corpus.open("gopher://a/b", remote=remote(tmp_path))


def test_s3_without_s3fs_says_what_to_install(tmp_path: Path) -> None:
    if __import__("importlib.util").util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(ValueError, match="s3://bucket/a: .*s3fs.*on every node"):
        Corpus.open("s3://bucket/a", remote=remote(tmp_path))


def test_a_url_without_a_cache(server: Server) -> None:
    with pytest.raises(ValueError, match="set data.cache_dir"):
        Corpus.open(server.url)


# the cache


def test_a_damaged_copy_is_found_and_fetched_anew(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    read_all(open_corpus(server, remote(tmp_path)))
    copy = cached(tmp_path, folder)
    content = bytearray(copy.read_bytes())
    content[512 + 6] ^= 4  # in the first document
    copy.write_bytes(content)
    corpus = open_corpus(server, remote(tmp_path))
    assert read_all(corpus) == read_all(Corpus.open(folder))
    assert corpus.damage == () and server.counts()[SHARD] == 2


def test_a_cut_copy_is_found_and_fetched_anew(folder: Path, server: Server, tmp_path: Path) -> None:
    corpus = open_corpus(server, remote(tmp_path))
    read_all(corpus)
    os.truncate(cached(tmp_path, folder), 100)
    assert read_all(corpus) == read_all(Corpus.open(folder))
    assert server.counts()[SHARD] == 2


def test_a_damaged_index_is_found_and_fetched_anew(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    open_corpus(server, remote(tmp_path))
    copy = tmp_path / "cache" / Manifest.read(folder).shards[1].index_sha256
    copy.write_bytes(bytes(100))
    assert read_all(open_corpus(server, remote(tmp_path))) == read_all(Corpus.open(folder))


def test_the_limit_is_kept_and_the_longest_unused_goes(
    folder: Path, server: Server, tmp_path: Path
) -> None:
    sizes = [shard.bytes for shard in Manifest.read(folder).shards]
    indices = sum(path.stat().st_size for path in folder.glob("*.npy"))
    limit = sizes[0] + sizes[1] + indices + 100
    reading = remote(tmp_path, limit=limit)
    corpus = open_corpus(server, reading)
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, (2e9, 2e9))  # the indices are not what this is about
    for document, age in ((0, 20), (2, 10), (4, 0)):
        corpus.read(document, 0, 3)
        assert held(tmp_path) <= limit
        number = document // 2
        if cached(tmp_path, folder, number).exists():
            os.utime(cached(tmp_path, folder, number), (1e9 - age, 1e9 - age))
    exists = [cached(tmp_path, folder, number).exists() for number in range(3)]
    assert exists == [False, True, True]
    assert reading.cache.traffic()["evicted"] == 1


def test_many_threads_keep_the_limit(folder: Path, server: Server, tmp_path: Path) -> None:
    limit = 2 * max(shard.bytes for shard in Manifest.read(folder).shards) + 100
    corpus = open_corpus(server, remote(tmp_path, limit=limit))
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            try:
                most = max(most, held(tmp_path))
            except FileNotFoundError:
                pass  # evicted while we looked

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: corpus.read(i % 6, 0, 5).tolist(), range(24)))
    over.set()
    watcher.join()
    assert found == [Corpus.open(folder).read(i % 6, 0, 5).tolist() for i in range(24)]
    assert 0 < most <= limit


def test_a_limit_below_a_shard_is_refused(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus(server, remote(tmp_path, limit=1000))
    with pytest.raises(ValueError, match="data.cache_bytes=1000 is less than a file of .* use at"):
        corpus.read(0, 0, 3)


def test_other_files_in_the_folder_are_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("x" * 5000)
    read_all(open_corpus(server, remote(tmp_path, limit=4096)))
    assert (tmp_path / "cache/thesis.tex").exists()


def test_threads_fetch_a_shard_once(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus(server, remote(tmp_path))
    server.pause_s = 0.1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: corpus.read(2, 0, 3), range(4)))
    assert server.counts()[SHARD] == 1


def _read_in_a_process(url: str, tmp_path: Path, timeout_s: float = 5) -> None:
    corpus = Corpus.open(url, remote=remote(tmp_path, timeout_s=timeout_s))
    os._exit(0 if len(corpus.read(2, 0, 25)) == 25 else 1)


def test_processes_fetch_a_shard_once(server: Server, tmp_path: Path) -> None:
    server.pause_s = 0.2
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_read_in_a_process, args=(server.url, tmp_path)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    counts = server.counts()
    assert counts.pop("manifest.json") == 3 and set(counts.values()) == {1}


def test_a_killed_fetch_is_gone_on_with(folder: Path, server: Server, tmp_path: Path) -> None:
    server.fail(SHARD, "stall")
    process = multiprocessing.get_context("fork").Process(
        target=_read_in_a_process, args=(server.url, tmp_path, 30)
    )
    process.start()
    until = time.monotonic() + 120
    half = (folder / SHARD).stat().st_size // 2
    while not any(path.stat().st_size == half for path in (tmp_path / "cache").glob("*.part")):
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.join()
    assert read_all(open_corpus(server, remote(tmp_path))) == read_all(Corpus.open(folder))
    assert [asked for name, asked in server.requests if name == SHARD] == [None, f"bytes={half}-"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="data.cache_dir=.*cannot be written"):
        Cache(tmp_path / "file" / "cache", LIMIT)


# names


def test_a_url_is_known_even_as_a_path() -> None:
    assert url_of(Path("https://host/a/b")) == "https://host/a/b"
    assert url_of("s3://bucket/a") == "s3://bucket/a"
    assert url_of(Path("file:///a/b")) == "file:///a/b"
    assert [url_of(name) for name in ("/a/b", "a:b", "C:/a", Path("x/y"))] == [None] * 4


def test_secrets_stay_out_of_messages() -> None:
    url = "https://me:word@host/a?token=secret"
    assert shown_url(url) == "https://host/a"
    assert joined(url, "x.tar") == "https://me:word@host/a/x.tar?token=secret"
