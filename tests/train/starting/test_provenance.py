"""The four packages are ours: foreign, overwritten and missing ones are found and named."""

import base64
import hashlib
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest

from train.starting.provenance import PACKAGES, check_provenance


def _install(site: Path, packages: tuple[str, ...], distribution: str) -> None:
    """Put packages into a folder as a wheel's installation does, with a RECORD."""
    record = []
    for package in packages:
        (site / package).mkdir(parents=True, exist_ok=True)
        for file in ("__init__.py", "loader.py"):
            content = f"# {file} of {package} by {distribution}\n".encode()
            (site / package / file).write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{package}/{file},sha256={digest.decode()},{len(content)}\n")
    folder = site / f"{distribution}.dist-info"
    folder.mkdir(parents=True)
    (folder / "RECORD").write_text("".join(record) + f"{distribution}.dist-info/RECORD,,\n")


def _checkout(root: Path) -> None:
    """Put the packages into a folder without a RECORD, as a repository is."""
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()


def _check(*folders: Path) -> None:
    def find(name: str) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(folder) for folder in folders])

    check_provenance(find)


def test_this_checkout_is_whole() -> None:
    check_provenance()


def test_an_installed_wheel_is_whole(tmp_path: Path) -> None:
    _install(tmp_path, PACKAGES, "longhaul-0.1.0")
    _check(tmp_path)


def test_a_checkout_may_change(tmp_path: Path) -> None:
    repository, site = tmp_path / "repository", tmp_path / "site"
    _checkout(repository)
    _install(site, (), "longhaul-0.1.0")  # an editable install: a RECORD without our files
    (repository / "data" / "new.py").write_text("x = 1")
    _check(site, repository)


def test_a_foreign_package_before_ours_is_named_with_its_owner(tmp_path: Path) -> None:
    repository, site = tmp_path / "repository", tmp_path / "site"
    _checkout(repository)
    _install(site, ("data",), "foreign-2.0")
    with pytest.raises(ValueError, match=r"but data from .*site/data \(installed by foreign-2.0\)"):
        _check(site, repository)


def test_every_owner_of_a_foreign_package_is_named(tmp_path: Path) -> None:
    repository, site = tmp_path / "repository", tmp_path / "site"
    _checkout(repository)
    _install(site, ("model",), "foreign-2.0")
    _install(site, ("parallel",), "other-1.0")
    with pytest.raises(ValueError, match=r"installed by foreign-2.0, other-1.0"):
        _check(site, repository)


def test_an_overwritten_file_is_named_with_who_wrote_it(tmp_path: Path) -> None:
    _install(tmp_path, PACKAGES, "longhaul-0.1.0")
    _install(tmp_path, ("data",), "foreign-2.0")
    with pytest.raises(ValueError, match=r"data/__init__.py is not the file .*; foreign-2.0 inst"):
        _check(tmp_path)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    _install(tmp_path, PACKAGES, "longhaul-0.1.0")
    (tmp_path / "model" / "loader.py").write_text("changed")
    with pytest.raises(ValueError, match=r"model/loader.py is not the file that longhaul install"):
        _check(tmp_path)


def test_a_removed_file_is_named(tmp_path: Path) -> None:
    _install(tmp_path, PACKAGES, "longhaul-0.1.0")
    (tmp_path / "model" / "loader.py").unlink()
    with pytest.raises(ValueError, match=r"model/loader.py of longhaul is missing"):
        _check(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    _install(tmp_path, ("train", "model", "data"), "longhaul-0.1.0")
    with pytest.raises(ValueError, match="no package parallel can be imported"):
        _check(tmp_path)


def test_a_folder_that_only_has_the_name_is_no_package(tmp_path: Path) -> None:
    _install(tmp_path, ("train", "model", "parallel"), "longhaul-0.1.0")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="no package data can be imported"):
        _check(tmp_path)
