"""`longhaul pretrain` as every rank of a job, held in one phase until the job is warned.

`python held_ranks.py FILE PHASES KEY=VALUE...`: attempt n is held in the n-th of PHASES (with
commas), and tells so by a file named after it in the run folder; later attempts are not held.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["ATTEMPT"])
IMPORT_S = 4.0
"""Held while nobody listens, so that the first signals are lost."""


def main() -> None:
    file, phases, *overrides = sys.argv[1:]
    run_dir = Path(os.environ["RUN_DIR"])
    phase = dict(enumerate(phases.split(","), 1)).get(ATTEMPT)
    tell = run_dir / f"in-{phase}"
    if phase == "import":
        tell.touch()
        time.sleep(IMPORT_S)
    from train.settings.config import load
    from train.signals import StopRequest

    config = load(file, overrides, world_size=int(os.environ["WORLD_SIZE"]))
    stop = StopRequest()
    from train.quiet import quieten_libraries

    quieten_libraries()
    from train import pretrain

    # drawing takes longer than training here
    vars(pretrain)["plot"] = lambda folder, **_: folder / "summary.png"

    def hold() -> None:
        tell.touch()
        end = time.monotonic() + 120
        while signal.SIGUSR1 not in signal.sigpending() and time.monotonic() < end:
            time.sleep(0.05)

    if phase in HOLDS and RANK == 1:
        HOLDS[phase](hold)
    sys.exit(pretrain.run(config, fresh=False, stop=stop))


def before(owner: Any, name: str, hold: Callable[[], None], call: int = 1) -> None:
    """Hold when the function is called for the call-th time."""
    original, calls = getattr(owner, name), []

    def held(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            hold()
        return original(*args, **kwargs)

    setattr(owner, name, held)


def hold_build(hold: Callable[[], None]) -> None:
    from train import pretrain

    before(pretrain, "build_from", hold)


def hold_first_step(hold: Callable[[], None]) -> None:
    from train import loop

    before(loop, "learning_rate", hold)  # between backward and the optimizer


def hold_save(hold: Callable[[], None]) -> None:
    from train.checkpoints.saver import Saver

    before(Saver, "_write", hold)  # in the thread that writes


def hold_evaluation(hold: Callable[[], None]) -> None:
    from train.evaluation.measure import _Reader

    before(_Reader, "_segments", hold, call=2)


def hold_data(hold: Callable[[], None]) -> None:
    from data.loader import _Reader

    read, calls = _Reader.step, []

    def step(self: _Reader, number: int) -> Any:
        # an evaluation reads without workers, in the main thread
        if threading.current_thread() is not threading.main_thread():
            calls.append(number)
            if len(calls) == 2:
                (Path(os.environ["RUN_DIR"]) / "in-data").touch()
                threading.Event().wait()  # for ever: a read that hangs
        return read(self, number)

    _Reader.step = step  # type: ignore[method-assign]


HOLDS = {
    "build": hold_build,
    "step": hold_first_step,
    "save": hold_save,
    "evaluation": hold_evaluation,
    "data": hold_data,
}

if __name__ == "__main__":
    main()
