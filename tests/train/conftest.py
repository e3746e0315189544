from pathlib import Path

import pytest

from tests.train.tiny import Shards, prepare_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Prepared once: nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    return prepare_shards(folder)
