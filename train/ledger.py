"""The data ledger of an attempt, begun by all ranks together."""

from __future__ import annotations

import torch.distributed as dist

from data.ledger import FOLDER, Header, Ledger, NoLedger, next_attempt
from parallel.mesh import Mesh
from train.settings.config import Config


def open_ledger(config: Config, mesh: Mesh, position: int, data: str) -> Ledger | NoLedger:
    """Return this rank's ledger of the attempt that begins at `position`.

    data: the corpus's fingerprint. Only ranks with tp_rank == cp_rank == 0 write: their peers
    get the same samples. OSError on all ranks where one cannot begin its file.
    """
    folder = config.run_dir / FOLDER
    number = [next_attempt(folder)]
    dist.broadcast_object_list(number)  # ranks may not see a shared folder alike at one moment
    ledger: Ledger | NoLedger = NoLedger()
    problem: str | None = None
    if mesh.tp_rank == 0 and mesh.cp_rank == 0:
        header = Header(
            attempt=number[0],
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            position=position,
            samples=config.train.batch_size // mesh.dp,
            batch_size=config.train.batch_size,
            order={
                "seed": config.seed,
                "segment_len": config.data.segment_len,
                "sample_len": config.data.sample_len,
                "packing": config.data.packing,
                "corpus": data,
            },
        )
        try:
            ledger = Ledger(folder, header)
        except OSError as error:
            problem = f"rank {mesh.rank}: {error}"
    problems: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(problems, problem)
    found = [text for text in problems if text is not None]
    if found:
        raise OSError(f"the data ledger cannot be begun: {'; '.join(found)}")
    return ledger
