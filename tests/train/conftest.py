from pathlib import Path

import pytest

from parallel import zero
from tests.train.tiny import Shards, cutting_matrices, prepare_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Prepared once: nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    return prepare_shards(folder)


@pytest.fixture(autouse=True)
def matrices_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit this."""
    monkeypatch.setattr(zero, "_config", cutting_matrices(zero._config))
