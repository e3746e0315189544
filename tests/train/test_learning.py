"""The committed tables of benchmarks/learning.py."""

from pathlib import Path

from benchmarks.learning import SETTINGS, read_runs, table

RESULTS = Path("docs/results/learning")


def test_the_committed_table_is_what_the_committed_results_say() -> None:
    """Remedy: python benchmarks/learning.py table --picture ... >docs/results/learning.md."""
    shown = Path("docs/results/learning.md").read_text(encoding="utf-8")
    assert shown == table(read_runs(RESULTS)) + "\n"


def test_every_result_is_of_a_setting() -> None:
    names = {path.stem.rpartition("-")[0] for path in RESULTS.glob("*.json")}
    assert names <= SETTINGS.keys()
