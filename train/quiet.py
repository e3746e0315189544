"""Keeps the libraries' start-up notes out of a run's log. Imported before they are."""

from __future__ import annotations

import logging
import os
import warnings


def quieten_libraries() -> None:
    """Silence what is expected and harmless; everything else still shows.

    megatron-core says on every rank which optional extensions are missing, and torch that
    all_gather_into_tensor has a new name (which 2.11, on GPU machines, does not have yet).
    """
    for module in (r"megatron\.", r"deepspeed\.", r"torch\.jit"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("DeepSpeed", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
