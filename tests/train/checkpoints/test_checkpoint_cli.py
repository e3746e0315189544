"""`longhaul checkpoint`: what people see, and what they cannot delete by mistake."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.train.runs import imported, longhaul_here
from tests.train.stored import damage, store_run
from train.checkpoints.listing import describe_age, describe_bytes
from train.checkpoints.names import list_checkpoints


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


# ls


def listed(run: Path) -> list[str]:
    done = longhaul_here("checkpoint", "ls", run)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def row(lines: list[str], step: str) -> str:
    (found,) = [line for line in lines if line.split()[0] == step]
    return found


def test_ls_says_what_each_is_why_it_stays_and_where_a_resume_goes_on(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 20, 30, 40, checkpoint__every=10, checkpoint__keep_every=20)
    os.utime(paths[0] / "manifest.json", (time.time() - 7300,) * 2)
    lines = listed(tmp_path)
    assert lines[0].split("  ")[0] == "step"
    assert re.search(r"20 +2 h +\S+ kB +TP 2 x CP 1 x DP 1, ZeRO 3 +40,960 +unverified", lines[1])
    assert row(lines, "20").endswith("every 20")
    assert row(lines, "30").endswith("newest 2")
    assert row(lines, "40").endswith("newest 2, every 20  <- a resume goes on here")
    assert len(lines) == 4


def test_ls_knows_damage_that_shows_without_hashing(tmp_path: Path) -> None:
    *_, newest = store_run(tmp_path, 10, 20, 30)
    (newest / "rank-00001.safetensors").unlink()
    lines = listed(tmp_path)
    assert "  bad" in row(lines, "30")
    assert row(lines, "10").endswith("newest 2")  # the damaged one counts for nothing
    assert row(lines, "20").endswith("<- a resume goes on here")
    assert lines[-2] == f"bad: {newest}/rank-00001.safetensors: missing"
    assert lines[-1] == "a resume loses the 10 steps since step 20"


def test_ls_shows_what_a_verification_found(tmp_path: Path) -> None:
    store_run(tmp_path, 10, 20)
    assert longhaul_here("checkpoint", "verify", tmp_path).returncode == 0
    lines = listed(tmp_path)
    assert re.search(r"good, hashed \d+ s ago", row(lines, "20"))
    damage(tmp_path / "checkpoints/step-00000020")
    assert "unverified" in row(listed(tmp_path), "20")


def test_ls_names_leftovers(tmp_path: Path) -> None:
    store_run(tmp_path, 10)
    for suffix in ("tmp", "bad"):
        (tmp_path / f"checkpoints/step-00000020.{suffix}").mkdir()
    lines = listed(tmp_path)
    assert "unfinished" in row(lines, "20.tmp")
    assert "set aside" in row(lines, "20.bad")
    assert row(lines, "10").endswith("<- a resume goes on here")


def test_ls_says_when_nothing_is_left_to_resume_from(tmp_path: Path) -> None:
    (path,) = store_run(tmp_path, 10)
    (path / "manifest.json").write_text("{")
    assert "no checkpoint is good: a resume refuses" in listed(tmp_path)[-1]


def test_ls_for_programs(tmp_path: Path) -> None:
    store_run(tmp_path, 10, 20)
    rows = json.loads(longhaul_here("checkpoint", "ls", tmp_path, "--json").stdout)
    assert [(row["step"], row["resumed"]) for row in rows] == [(10, False), (20, True)]
    assert rows[0]["tokens"] == 80 * 256
    assert rows[0]["kept_because"] == "newest 2"


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_a_folder_without_checkpoints_is_one_line(command: str, tmp_path: Path) -> None:
    done = longhaul_here("checkpoint", command, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tmp_path} holds no checkpoints")


def test_no_command_imports_torch(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20, 30)
    words = [["ls", tmp_path], ["verify", tmp_path], ["show", paths[0]], ["rm", paths[0], "--yes"]]
    found = imported({"torch", "numpy"}, [["checkpoint", *w] for w in words])
    assert found == dict.fromkeys(found, [])
    assert not paths[0].exists()  # they ran


# verify


def test_verify_reports_the_rate_and_ends_well(tmp_path: Path) -> None:
    store_run(tmp_path, 10, 20)
    done = longhaul_here("checkpoint", "verify", tmp_path, "--threads", 3)
    assert done.returncode == 0
    *first, last = done.stdout.splitlines()
    assert [line.partition(": ")[2] for line in first] == ["good, 1.6 kB"] * 2
    assert re.fullmatch(
        r"2 checkpoints, 0 bad; 3\.\d kB hashed in \S+ s, \S+ MB/s with 3 threads", last
    )


def test_verify_names_each_fault_and_ends_with_code_1(tmp_path: Path) -> None:
    first, second, third, fourth = store_run(tmp_path, 10, 20, 30, 40)
    flipped = damage(first)
    os.truncate(first / "rank-00000.safetensors", 5)
    (second / "rank-00000.safetensors").unlink()
    (third / "manifest.json").write_text("{")
    done = longhaul_here("checkpoint", "verify", tmp_path)
    assert done.returncode == 1
    assert f"{first}: BAD, 2 faults\n" in done.stdout
    assert f"  {first}/rank-00000.safetensors: 5 bytes, " in done.stdout
    assert f"  {flipped}: its sha256 is not the manifest's" in done.stdout
    assert f"  {second}/rank-00000.safetensors: missing" in done.stdout
    assert f"  {third}: no readable manifest.json" in done.stdout
    assert f"{fourth}: good" in done.stdout
    assert "4 checkpoints, 3 bad" in done.stdout


def test_verify_takes_one_checkpoint(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20)
    damage(paths[0])
    assert longhaul_here("checkpoint", "verify", paths[1]).returncode == 0
    assert longhaul_here("checkpoint", "verify", paths[0]).returncode == 1


# show


def test_show_says_what_it_holds(tmp_path: Path) -> None:
    (path,) = store_run(tmp_path, 1000, train__lr=0.25)
    done = longhaul_here("checkpoint", "show", path)
    assert done.returncode == 0, done.stderr
    facts = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in
             done.stdout.split("configuration")[0].splitlines()[1:]}  # fmt: skip
    assert facts["step"] == "1,000, 1 of them skipped"
    assert facts["tokens"] == "2,048,000 (8,000 samples of 256)"
    assert facts["parameters"] == f"{2 * 130 * 64 + 64:,} in 2 tensors"
    assert facts["layout"] == "TP 2 x CP 1 x DP 1, ZeRO 3"
    assert facts["versions"] == "torch 2.13.0, longhaul 0.1.0"
    shown = done.stdout.split("configuration")[1]
    assert "lr: 0.25" in shown and "segment_len: 64" in shown
    assert "beta2" not in shown  # the default


def test_show_for_programs(tmp_path: Path) -> None:
    (path,) = store_run(tmp_path, 10)
    facts = json.loads(longhaul_here("checkpoint", "show", path, "--json").stdout)
    assert facts["manifest"]["step"] == 10
    assert facts["num_parameters"] == 2 * 130 * 64 + 64


def test_show_of_a_newer_format_is_one_line(tmp_path: Path) -> None:
    (path,) = store_run(tmp_path, 10)
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    done = longhaul_here("checkpoint", "show", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{path}: format 99, ")


# rm


def test_rm_deletes_and_lets_the_pointer_follow(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20, 30, 40)
    done = longhaul_here("checkpoint", "rm", paths[0], paths[3], "--yes")
    assert done.returncode == 0, done.stderr
    assert "deleted 2" in done.stdout
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000030"


def test_rm_asks(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20, 30)
    done = longhaul_here("checkpoint", "rm", paths[0])  # nobody answers
    assert done.returncode == 1
    assert done.stdout.startswith(f"{paths[0]}\nDelete 1, ")
    assert len(names(tmp_path)) == 3


def test_rm_leaves_two_good_ones(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20, 30)
    flipped = damage(paths[2])
    done = longhaul_here("checkpoint", "rm", paths[0], "--yes")
    assert done.returncode == 2
    assert "would keep 1 good checkpoints, and 2 must remain" in done.stderr
    assert str(flipped) in done.stderr and "--force" in done.stderr
    assert len(names(tmp_path)) == 3
    assert (
        longhaul_here("checkpoint", "rm", paths[2], "--yes").returncode == 0
    )  # the damaged one may go
    assert longhaul_here("checkpoint", "rm", paths[0], "--yes", "--force").returncode == 0
    assert names(tmp_path) == ["step-00000020"]


def test_rm_deletes_leftovers(tmp_path: Path) -> None:
    store_run(tmp_path, 10)
    aside = tmp_path / "checkpoints/step-00000020.bad"
    aside.mkdir()
    assert longhaul_here("checkpoint", "rm", aside, "--yes").returncode == 0
    assert names(tmp_path) == ["step-00000010"]


def test_rm_does_not_take_a_save_that_may_be_at_work(tmp_path: Path) -> None:
    work = tmp_path / "checkpoints/step-00000020.tmp"
    work.mkdir(parents=True)
    done = longhaul_here("checkpoint", "rm", work, "--yes")
    assert (done.returncode, work.exists()) == (2, True)
    assert "a save may be at work on it" in done.stderr
    os.utime(work, (time.time() - 3600,) * 2)
    assert longhaul_here("checkpoint", "rm", work, "--yes").returncode == 0


def test_rm_takes_checkpoints_only(tmp_path: Path) -> None:
    paths = store_run(tmp_path, 10, 20, 30)
    done = longhaul_here("checkpoint", "rm", paths[0], tmp_path, "--yes")
    assert done.returncode == 2
    assert f"{tmp_path} is not a checkpoint's folder" in done.stderr
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert describe_age(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1234, "1.2 kB"), (96e9, "96.0 GB"), (2e12, "2.0 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert describe_bytes(count) == text
