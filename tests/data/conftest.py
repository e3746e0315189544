import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def fast_disks() -> Iterator[None]:
    """Leave out fsync: only a power cut could tell, and it is two thirds of the time here.

    That it is called, and when, is tested; processes started by a test do call it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
