"""A corpus in an S3 bucket, of a server on this machine, read as any URL is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from data import remote as remote_module
from data.cache import Cache
from data.index import Corpus
from data.remote import Patience, Remote
from data.shards import Manifest
from tests.data.corpora import write_numbers

LENGTHS = [20, 30, 25, 40, 50, 10]  # three shards of two documents
URL = "s3://corpora/books/train"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_numbers(tmp_path / "origin", LENGTHS, shard_tokens=70)
    return tmp_path / "origin"


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the corpus into a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE_S", 0.001)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora")
    for path in folder.iterdir():
        client.upload_file(str(path), "corpora", f"books/train/{path.name}")
    S3FileSystem.clear_instance_cache()  # of an earlier test's server
    yield
    server.stop()


def remote(tmp_path: Path) -> Remote:
    return Remote(Cache(tmp_path / "cache", 1 << 20), Patience(attempts=3, timeout_s=5))


def read_all(corpus: Corpus) -> list[int]:
    return [
        token
        for document, length in enumerate(LENGTHS)
        for token in corpus.read(document, 0, length).tolist()
    ]


@pytest.mark.usefixtures("bucket")
def test_a_corpus_in_a_bucket_is_the_corpus(folder: Path, tmp_path: Path) -> None:
    here, there = Corpus.open(folder), Corpus.open(URL, remote=remote(tmp_path))
    with ThreadPoolExecutor(4) as pool:  # as the loader reads
        read = list(pool.map(read_all, [there] * 8))
    assert read == [read_all(here)] * 8
    assert there.fingerprint == here.fingerprint


@pytest.mark.usefixtures("bucket")
def test_an_object_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    there = Corpus.open(URL, remote=remote(tmp_path))
    boto3.client("s3").delete_object(
        Bucket="corpora", Key=f"books/train/{Manifest.read(folder).shards[1].name}"
    )
    with pytest.raises(ValueError, match="shard-000001.tar"):
        read_all(there)


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://nowhere/books/manifest.json cannot be read"):
        Corpus.open("s3://nowhere/books", remote=remote(tmp_path))
