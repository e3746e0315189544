"""Attempts at a run as processes that can be watched, signalled and killed.

`forked` ranks cost a second and may be tampered with; `launched` ones are started as a user does
it, by torchrun and the command line.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tests.ranks import warm
from tests.train.runs import ROOT, write
from train.settings.config import Config

TIMEOUT_S = 240
"""Of one attempt: far more than any takes."""


class Attempt:
    """Processes of one attempt, and what they print."""

    def __init__(self, ranks: list[int], output: Path, run_dir: Path) -> None:
        self.ranks, self.output, self.run_dir = ranks, output, run_dir

    def text(self) -> str:
        """Return what was printed until now."""
        return self.output.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds; fail if the ranks end before it does."""
        until = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < until, f"waited too long:\n{self.text()}"
            if not self.running():  # their end may be what made it hold, a moment ago
                assert condition(), f"ended too early:\n{self.text()}"
            time.sleep(0.005)

    def wait_for_rows(self, count: int) -> None:
        """Return once log.jsonl has so many rows."""
        self.wait_for(lambda: len(read_rows(self.run_dir)) >= count)

    def running(self) -> bool:
        """Return whether the attempt goes on."""
        raise NotImplementedError

    def kill(self) -> None:
        """End every process at once, as a failing node does."""
        raise NotImplementedError


class Forked(Attempt):
    """Ranks forked from the test."""

    def __init__(self, ranks: list[int], output: Path, run_dir: Path) -> None:
        super().__init__(ranks, output, run_dir)
        self.codes: dict[int, int] = {}

    def running(self) -> bool:
        self._reap(os.WNOHANG)
        return len(self.codes) < len(self.ranks)

    def kill(self) -> None:
        for pid in self.ranks:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self._reap(0)

    def ended(self) -> dict[int, int]:
        """Return the exit codes of those that have ended, by process id."""
        self._reap(os.WNOHANG)
        return self.codes

    def wait(self) -> list[int]:
        """Return every rank's exit code, minus the signal's number where one ended it."""
        until = time.monotonic() + TIMEOUT_S
        while self.running():
            assert time.monotonic() < until, f"waited too long:\n{self.text()}"
            time.sleep(0.005)
        return [self.codes[pid] for pid in self.ranks]

    def _reap(self, options: int) -> None:
        for pid in self.ranks:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, options)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)


@contextmanager
def forked(
    size: int, run_dir: Path, function: Callable[..., int | None], *args: Any
) -> Iterator[Forked]:
    """Start function(*args) on ranks 0, 1, ...; its result is the exit code, 1 an exception's.

    Whatever still runs at the end is killed.
    """
    _warm()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.touch()
        ranks = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, size, folder, function, args)
            ranks.append(pid)
        attempt = Forked(ranks, output, run_dir)
        try:
            yield attempt
        finally:
            attempt.kill()


def _be_rank(
    rank: int, size: int, folder: str, function: Callable[..., int | None], args: Any
) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        gc.freeze()  # as in train.checking.ranks
        for descriptor in (1, 2):
            os.dup2(os.open(f"{folder}/output", os.O_WRONLY | os.O_APPEND), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        # tqdm's own is shared by everything forked: who is killed with it in hand stops the others
        tqdm.set_lock(threading.RLock())
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        code = function(*args) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _warm() -> None:
    """Import what every rank needs once, before the fork; one thread, so that a fork is safe."""
    torch.set_num_threads(1)
    import parallel.megatron  # noqa: F401
    import train.pretrain  # noqa: F401
    from parallel.zero import load_deepspeed

    load_deepspeed("cpu")
    warm()


def pretrain(config: Config, fork: str | None = None) -> int:
    """Do on one rank what `longhaul pretrain` does, command line and picture left out."""
    from train import pretrain
    from train.quiet import quieten_libraries
    from train.signals import StopRequest

    # drawing takes longer than training here
    vars(pretrain)["plot"] = lambda folder, **_: folder / "summary.png"
    stop = StopRequest()
    quieten_libraries()
    return pretrain.run(config, fresh=False, stop=stop, fork=fork)


def pretrain_forking(config: Config, name: str) -> int:
    """Do on one rank what `longhaul pretrain --fork NAME` does."""
    return pretrain(config, fork=name)


def pretrain_holding(config: Config, step: int) -> int:
    """Train, but stand still once this step's row is written, until there is a file `go`."""
    from train.reporting import Reporter

    record = Reporter.step

    def hold(self: Any, state: Any, result: Any, seconds: float) -> None:
        record(self, state, result, seconds)
        while state.step == step and not (config.run_dir / "go").exists():
            time.sleep(0.01)

    Reporter.step = hold  # type: ignore[method-assign]
    return pretrain(config)


def finish(size: int, config: Config) -> str:
    """Train to the end on forked ranks; return what they printed."""
    with forked(size, config.run_dir, pretrain, config) as attempt:
        codes = attempt.wait()
        assert codes == [0] * size, attempt.text()
        return attempt.text()


class Launched(Attempt):
    """A launcher and the ranks it started."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path, run_dir: Path) -> None:
        super().__init__([], output, run_dir)
        self.process = process

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        # torchrun gives each rank a session of its own, so no one group holds them all
        for process in self.processes():
            process.kill()
        self.process.wait()

    def wait(self) -> int:
        """Return the launcher's exit code."""
        return self.process.wait(TIMEOUT_S)

    def signal_ranks(self, number: signal.Signals) -> None:
        """Send the signal to every rank, not to the launcher."""
        for process in self.processes()[:-1]:
            process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """Return the ranks, what they started, and the launcher as the last."""
        if not self.running():
            return []
        launcher = psutil.Process(self.process.pid)
        return [*launcher.children(recursive=True), launcher]


@contextmanager
def launched(size: int, folder: Path, raw: dict[str, Any], *words: str) -> Iterator[Launched]:
    """Start `torchrun --nproc-per-node size longhaul pretrain FILE *words`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", "from train.cli import main; main()", "pretrain"]
    command += [str(write(folder, raw)), *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    output = folder / "output"
    with output.open("ab") as file:
        process = subprocess.Popen(
            [*torchrun, "--nproc-per-node", str(size), *command],
            stdout=file,
            stderr=file,
            cwd=folder,
            env={**inherited, **settings},
            start_new_session=True,
        )
    attempt = Launched(process, output, Path(raw["run_dir"]))
    try:
        yield attempt
    finally:
        attempt.kill()


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return log.jsonl's whole rows."""
    try:
        lines = (run_dir / "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    """Return (step, loss, gradient norm, learning rate) of every row, a skipped step's nan as 0."""
    names = ("step", "loss", "grad_norm", "lr")
    rows = ([row[name] for name in names] for row in read_rows(run_dir))
    return [tuple(0.0 if value != value else value for value in row) for row in rows]


def checkpoint_names(run_dir: Path) -> list[str]:
    """Return what the checkpoints folder holds; a kill may have met the pointer's renaming."""
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    return sorted({"latest" if name.startswith("latest.") else name for name in names})


def tensors_of(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """Return every rank file's tensors of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def manifest_of(run_dir: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's manifest."""
    text = (run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text()
    values: dict[str, Any] = json.loads(text)
    return values


def assert_same_bits(actual: Path, expected: Path, step: int) -> None:
    """Assert that two runs are the same until a step: log, position and every tensor."""
    assert losses(actual) == losses(expected)
    assert [step for step, *_ in losses(actual)] == list(range(1, step + 1))
    one, other = manifest_of(actual, step), manifest_of(expected, step)
    for name in ("step", "position", "updates", "nonfinite", "data", "layout", "parameters"):
        assert one[name] == other[name], name
    mine, theirs = tensors_of(actual, step), tensors_of(expected, step)
    assert mine.keys() == theirs.keys()
    for file, tensors in theirs.items():
        assert mine[file].keys() == tensors.keys()
        different = [
            name for name, tensor in tensors.items() if not same_bits(mine[file][name], tensor)
        ]
        assert not different, (file, different)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether type, shape and every bit are the same: -0 is not 0, nan is nan."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
