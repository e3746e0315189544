"""Documents to batches: prepare shards, open them, cut them into streams, load them.

`prepare` turns text into shards once; `Corpus` opens them; `Streams`, or `PackedStreams` for short
documents, says which tokens a sample holds; `load` reads them ahead of the training loop. Knows no
model and no rank but its data-parallel one.
"""

from data.index import Corpus
from data.loader import load
from data.packing import PackedStreams
from data.shards import Manifest, Shard, write_corpus
from data.streams import IGNORE, Batch, Segment, Streams

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "Manifest",
    "PackedStreams",
    "Segment",
    "Shard",
    "Streams",
    "load",
    "write_corpus",
]
