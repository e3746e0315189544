"""Preflight: each check by injection, and nodes that compare themselves."""

import json
import threading
from pathlib import Path

import pytest

from train.cluster.failure import FOLDER
from train.cluster.meeting import judge, meet
from train.cluster.preflight import (
    Found,
    check_disk,
    check_node,
    check_torch,
    check_writing,
    judge_gpus,
)
from train.cluster.ring import rounds

WHOLE = {"problems": [], "port": 1}
GOOD = ["0", "0", "Not Active", "Not Active"]


def test_this_machine_is_fit(tmp_path: Path) -> None:
    found = check_node(tmp_path, ranks=1)
    assert [each.problem for each in found if each.problem] == []
    assert "matmul" in {each.name for each in found}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (["1", "3", "Not Active", "Not Active"], "GPU 1 had 3 uncorrected memory errors"),
        (["1", "[N/A]", "Active", "Not Active"], "GPU 1 is slowed down"),
        (["1", "0", "Not Active", "Active"], "GPU 1 is slowed down"),
    ],
)
def test_a_sick_gpu_is_named(row: list[str], said: str) -> None:
    assert said in (judge_gpus([GOOD, row], 2).problem or "")
    assert judge_gpus([GOOD, ["1", "[N/A]", *GOOD[2:]]], 2).problem is None


def test_a_missing_gpu_is_counted() -> None:
    assert judge_gpus([GOOD] * 7, 8).problem == "7 GPUs of 8"


def test_a_torch_without_the_jobs_gpus_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert check_torch(8).problem is None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr("torch.version.cuda", None)
    assert "is built without CUDA, and 8 ranks need one GPU each" in (check_torch(8).problem or "")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 7)
    assert "sees 7 GPUs, and 8 ranks need" in (check_torch(8).problem or "")
    assert check_torch(7).problem is None


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in (check_writing(tmp_path / "file" / "run").problem or "")


def test_the_disk_must_hold_two_more_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_disk(tmp_path).problem is None
    monkeypatch.setattr("train.cluster.preflight.FREE_BYTES", 1 << 60)
    assert "checkpoints need" in (check_disk(tmp_path).problem or "")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 64, 65])
def test_a_ring_is_measured_in_few_rounds_and_nobody_is_needed_twice(count: int) -> None:
    found = rounds(count)
    assert len(found) <= 3
    for pairs in found:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    links = {frozenset(pair) for pairs in found for pair in pairs}
    assert links == {frozenset((i, (i + 1) % count)) for i in range(count)}


def ring(rates: list[float | None]) -> dict[str, float | None]:
    count = len(rates)
    return {f"n{i} n{(i + 1) % count}": rate for i, rate in enumerate(rates)}


def test_a_node_slow_towards_both_neighbours_is_unfit() -> None:
    nodes = [f"n{i}" for i in range(6)]
    reports = dict.fromkeys(nodes, WHOLE)
    assert judge(nodes, reports, ring([10.0] * 6)) == {}
    slow = judge(nodes, reports, ring([10.0, 1.0, 1.0, 10.0, 10.0, 10.0]))
    assert list(slow) == ["n2"]
    dead = judge(nodes, reports, ring([10.0, None, None, 10.0, 10.0, 10.0]))
    assert dead == {"n2": "no neighbour could reach it"}


def test_a_silent_and_a_sick_node_are_named() -> None:
    reports = {"n0": WHOLE, "n1": {"problems": ["7 GPUs of 8"], "port": None}}
    assert judge(["n0", "n1", "n2"], reports, {}) == {"n1": "7 GPUs of 8", "n2": "said nothing"}


def gather(run_dir: Path, found: dict[str, list[Found]]) -> tuple[dict[str, bool], list[str]]:
    """Let nodes meet as threads; those without findings say nothing."""
    (run_dir / FOLDER).mkdir()
    said: list[str] = []
    fit: dict[str, bool] = {}
    addresses = dict.fromkeys([*found, "silent"], "127.0.0.1")

    def be(node: str) -> None:
        fit[node] = meet(run_dir, node, addresses, found[node], said.append, wait_s=2.0)

    threads = [threading.Thread(target=be, args=(node,)) for node in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return fit, said


def test_nodes_agree_on_who_is_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    sick = [Found("GPUs", "7", "7 GPUs of 8")]
    fit, said = gather(tmp_path, {"sick": sick, "a": [], "b": []})
    assert fit == {"sick": False, "a": True, "b": True}
    assert (tmp_path / FOLDER / "fit").read_text().split() == ["a", "b"]
    assert "preflight: sick is unfit: 7 GPUs of 8" in said
    assert "preflight: silent is unfit: said nothing" in said
    assert any("2 of 4 nodes fit; neighbours add up" in line for line in said)
    assert set(json.loads((tmp_path / FOLDER / "reports.json").read_text())) == {"sick", "a", "b"}
