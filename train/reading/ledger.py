"""The data ledger of an attempt, begun by all ranks together."""

from __future__ import annotations

from data.ledger import FOLDER, Header, Ledger, NoLedger, next_attempt
from parallel.mesh import Mesh
from train.agree import SomeRankFailed, of_first, together
from train.settings.config import Config


def open_ledger(config: Config, mesh: Mesh, position: int, data: str) -> Ledger | NoLedger:
    """Return this rank's ledger of the attempt that begins at `position`.

    data: the corpus's fingerprint. Only ranks with tp_rank == cp_rank == 0 write: their peers
    get the same samples. OSError on all ranks where one cannot begin its file.
    """
    folder = config.run_dir / FOLDER
    # Ranks may not see a shared folder alike at one moment.
    attempt = of_first(lambda: next_attempt(folder))

    def begin() -> Ledger | NoLedger:
        if mesh.tp_rank or mesh.cp_rank:
            return NoLedger()
        header = Header(
            attempt=attempt,
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
        return Ledger(folder, header)

    try:
        return together(begin)
    except SomeRankFailed as failed:
        raise OSError(f"the data ledger cannot be begun: {failed}") from failed
