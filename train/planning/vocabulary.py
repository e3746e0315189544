"""The size of a model's vocabulary, where its configuration leaves that to the data."""

from __future__ import annotations

from data.shards import Manifest
from data.urls import shown_folder, url_of
from train.reading.landmarks import model_vocab_size
from train.settings.config import Config


def vocab_size_of(config: Config, given: int | None = None, *, option: str = "--vocab-size") -> int:
    """Return the vocabulary that is configured, else given, else that of the data in data.train.

    Only what lies here is read, no URL. Raises ValueError where nothing says it; option: what to
    give then.
    """
    if (known := config.model.vocab_size or given) is not None:
        return known
    found, problems = [], []
    for part in config.corpora:
        if url_of(part.path) is not None:
            problems.append(f"{shown_folder(part.path)} is a URL, which is not read for it")
            continue
        try:
            found.append(Manifest.read(part.path).vocab_size)
        except ValueError as error:
            problems.append(str(error))
    if not found:
        raise ValueError(
            f"model.vocab_size is left out, to be taken from the data; give {option}"
            f" ({'; '.join(problems)})"
        )
    return model_vocab_size(config, max(found))
