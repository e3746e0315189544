from pathlib import Path
from typing import Any

import pytest

from parallel import zero
from tests.train.tiny import Shards, prepare_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Prepared once: nothing may write there."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    return prepare_shards(folder)


@pytest.fixture(autouse=True)
def matrices_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ZeRO 3 treat the tiny model's matrices as large: by default it cuts none so small.

    Forked ranks inherit this; norms and gains stay whole on every rank, as in a large model.
    """
    original = zero._config

    def config(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(*args, **kwargs)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
        return made

    monkeypatch.setattr(zero, "_config", config)
