"""Run the fault drill: python -m tests.drill --kills 60 --output docs/reliability.md."""

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from parallel import zero
from tests.drill.drill import LAYOUTS, run_drill
from tests.drill.report import report, write
from tests.train.tiny import cutting_matrices, prepare_shards


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and faults")
    parser.add_argument("--output", type=Path, help="a page to write the table into")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    zero._config = cutting_matrices(zero._config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = prepare_shards(folder / "corpus")
        drill = run_drill(
            folder,
            shards,
            kills=options.kills,
            seed=options.seed,
            layouts=LAYOUTS,
            say=lambda line: print(line, flush=True),
        )
    text = report(drill, seed=options.seed, layouts=LAYOUTS)
    print(f"\n{text}")
    if options.output is not None:
        write(options.output, text)
    sys.exit("\n".join(drill.failures) or 0)


if __name__ == "__main__":
    main()
