"""A stand-in for the trainer that only counts: it saves, stops and resumes as the trainer does.

Every rank of a job runs `python counting_ranks.py FOLDER STEPS`. It makes the scripts' side of
the bargain (USR1 forwarded, back to the queue until DONE) testable in seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

from train.signals import StopRequest


def main() -> None:
    stop = StopRequest()  # before the slow import, or the signal is lost
    import torch
    import torch.distributed as dist

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    counter = folder / "step"
    step = int(counter.read_text()) if counter.exists() else 0
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} begins at step {step}")
    while step < steps:
        time.sleep(0.05)
        stopping = stop.agreed(torch.device("cpu"))
        step += 1
        if dist.get_rank() == 0:
            counter.write_text(str(step))
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "time": time.time()}) + "\n")
        if stopping:
            print(f"rank {dist.get_rank()} stops at step {step}")
            (Path(os.environ["ATTEMPT_FOLDER"]) / "stopped").touch()
            break
    dist.barrier()  # every rank has read the counter before anyone writes DONE or leaves
    if dist.get_rank() == 0 and step == steps:
        (folder / "DONE").touch()
    dist.destroy_process_group()


main()
