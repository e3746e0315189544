"""`longhaul import`: a published folder as a checkpoint, written tensor by tensor.

FOLDER/checkpoints/step-00000000/   float32 weights, as of a run of one process at step 0
       tokenizer.json               for `longhaul prepare --tokenizer`; its companions beside it
       config.json                  as published
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from model.init import count_parameters
from train.checkpoints.folder import Manifest, begin, commit, share_name
from train.checkpoints.snapshot import PACKAGES
from train.checkpoints.tensor_file import Spec, write_tensors
from train.huggingface.folder import Opened, open_folder
from train.huggingface.tokenizer_files import copy_beside, imported_words
from train.settings.config import Config


class Imported(NamedTuple):
    """What was written."""

    output: Path
    opened: Opened
    parameters: int


def import_folder(
    source: Path, output: Path, *, segment_len: int | None = None, tokenizer: str | None = None
) -> Imported:
    """Write a model's folder as a checkpoint into output, which must not hold anything yet.

    segment_len: of the checkpoint's configuration, what `generate` and `evaluate` read at once.
    tokenizer: a file or folder, `none`, or None for the source's. One parameter is in memory at a
    time. Raises ValueError for what the user can mend; then nothing is left behind.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", output.resolve().name).lstrip("._-") or "imported"
    opened = open_folder(source, name=name, run_dir=output, segment_len=segment_len)
    words = imported_words(source, tokenizer, opened.model.vocab_size)
    with new_folder(output) as work:
        shapes = {name: part.shape for name, part in opened.weights.parameters.items()}
        get, vocab_size = opened.weights.__getitem__, opened.model.vocab_size
        sha256 = None if words is None else words.tokenizer.sha256
        write_checkpoint(work / "checkpoints", opened.config, vocab_size, shapes, get, sha256)
        if words is not None:
            copy_beside(words, source, work)
    return Imported(output, opened, count_parameters(opened.model))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder that becomes `output` when all is written, and vanishes where it is not.

    Raises ValueError where output holds something, or the disk refuses.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; name a new folder")
    work = output.with_name(f"{output.name}.unfinished")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        if output.exists():
            output.rmdir()
        work.rename(output)
    except OSError as error:
        raise ValueError(
            f"{output} could not be written ({error}); nothing was left there: free some space, or"
            " name another place"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    config: Config,
    vocab_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], torch.Tensor],
    tokenizer_sha256: str | None = None,
) -> None:
    """Write whole weights into folder as the checkpoint of one process at step 0, without moments.

    get: a parameter by its name, float32; asked for one at a time. tokenizer_sha256: of the model's
    own, None without one.
    """
    work = begin(folder, 0)
    path = work / share_name(0)
    specs = {f"master/{name}@0": _flat(shape) for name, shape in shapes.items()}

    def flat(key: str) -> torch.Tensor:
        return get(key.removeprefix("master/").removesuffix("@0")).flatten()

    sha256 = write_tensors(path, specs, flat)
    manifest = Manifest(
        step=0,
        position=0,
        updates=0.0,
        nonfinite=0,
        layout={"tp": 1, "cp": 1, "dp": 1, "zero": 1},
        config=config.model_dump(mode="json"),
        data="",  # of no corpus of ours
        vocab_size=vocab_size,
        parameters={
            name: {"shape": list(shape), "dim": None, "stride": 1} for name, shape in shapes.items()
        },
        versions={"python": platform.python_version()}
        | {package: metadata.version(package) for package in PACKAGES},
        files={path.name: {"sha256": sha256, "bytes": path.stat().st_size}},
        tokenizer_sha256=tokenizer_sha256,
    )
    commit(work, manifest)


def _flat(shape: tuple[int, ...]) -> Spec:
    return Spec(torch.float32, (torch.Size(shape).numel(),))
