"""Checks that our four packages are ours, before anything of them is used.

Their names (train, parallel, model, data) are generic. Another distribution with a top-level
`data` wins over ours in silence, or overwrites its files, and pip says nothing; `pip check`
neither. So the first thing that the command line does is to look where they come from.
"""

import base64
import csv
import hashlib
import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

PACKAGES = ("train", "parallel", "model", "data")
_REMEDY = "give longhaul an environment of its own, or install it again (--force-reinstall)"


def check_provenance(
    find: Callable[[str], ModuleSpec | None] = importlib.util.find_spec,
) -> None:
    """Return if the four packages come from one folder and hold the files that we installed.

    Nothing is imported. Files are compared with the wheel's RECORD; a source checkout
    (an editable install) has none and is meant to change.

    Args:
        find: the finder of a package by name, for tests.

    Raises:
        ValueError: naming the package that is not ours, and where it comes from.
    """
    folders = {name: _folder(find(name)) for name in PACKAGES}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        raise ValueError(
            f"longhaul is not whole: no package {', '.join(missing)} can be imported;"
            " reinstall it, or run from the repository's root"
        )
    roots = {name: folder.parent for name, folder in folders.items() if folder is not None}
    root = roots["train"]
    strangers = [name for name in PACKAGES if roots[name] != root]
    if strangers:
        found = ", ".join(f"{name} from {folders[name]}" for name in strangers)
        owners = {o for name in strangers for o in _owners(roots[name], f"{name}/__init__.py")}
        blame = f" (installed by {', '.join(sorted(owners))})" if owners else ""
        raise ValueError(
            "longhaul's packages must come from one place: train comes from"
            f" {folders['train']}, but {found}{blame}; {_REMEDY}"
        )
    _check_record(root)


def _folder(spec: ModuleSpec | None) -> Path | None:
    """Return the folder of a package, None for none and for a bare folder of that name."""
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    return Path(spec.origin).resolve().parent


def _check_record(root: Path) -> None:
    """Raise ValueError where a file of the four packages is not the one that we installed."""
    records = sorted(root.glob("longhaul-*.dist-info/RECORD"))
    expected = {name: digest for record in records for name, digest in _recorded(record)}
    if "train/__init__.py" not in expected:
        return  # a checkout; its dist-info, if any, lists a .pth file
    for name, digest in expected.items():
        file = root / name
        if not file.exists():
            raise ValueError(f"{file} of longhaul is missing; {_REMEDY}")
        algorithm, _, encoded = digest.partition("=")
        actual = hashlib.new(algorithm, file.read_bytes()).digest()
        if base64.urlsafe_b64encode(actual).rstrip(b"=").decode() != encoded:
            owners = _owners(root, name)
            blame = f"; {', '.join(owners)} installed a file of that name" if owners else ""
            raise ValueError(f"{file} is not the file that longhaul installed{blame}; {_REMEDY}")


def _recorded(record: Path) -> list[tuple[str, str]]:
    """Return (path, algorithm=digest) of each hashed file of our packages in a RECORD."""
    with record.open(newline="", encoding="utf-8") as lines:
        return [
            (row[0], row[1])
            for row in csv.reader(lines)
            if len(row) > 1 and row[1] and row[0].partition("/")[0] in PACKAGES
        ]


def _owners(root: Path, name: str) -> list[str]:
    """Return the other distributions in a folder that installed a file of this name."""
    return sorted(
        record.parent.name.removesuffix(".dist-info")
        for record in root.glob("*.dist-info/RECORD")
        if not record.parent.name.startswith("longhaul-")
        and any(line.startswith(name + ",") for line in record.read_text("utf-8").splitlines())
    )


def is_ours(error: ValueError) -> bool:
    """Return whether our code raised it, and so worded it for the user.

    One out of a library keeps its traceback: it is a bug, and its text explains nothing.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in = Path(frame.tb_frame.f_code.co_filename) if frame is not None else Path()
    root = Path(__file__).parents[2]
    return any(raised_in.is_relative_to(root / package) for package in PACKAGES)
