"""Documents to batches: prepare shards, open them, cut them into streams, load them.

`prepare.prepare` turns text into shards once; `index.Corpus` opens them; `streams.Streams`, or
`packing.PackedStreams` for short documents, says which tokens a sample holds; `loader.load` reads
them ahead of the training loop. Knows no model and no rank but its data-parallel one. (Nothing is
imported here: the command line looks at a path or two without waiting for numpy.)
"""
