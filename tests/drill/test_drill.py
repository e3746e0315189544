"""The fault drill in a short form, and its table."""

from pathlib import Path

import pytest

from tests.drill.drill import LAYOUTS, Drill, Trial, run_drill
from tests.drill.report import BEGIN, END, report, write
from tests.train.faults import FAULTS
from tests.train.tiny import prepare_shards


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("seed", [11])
def test_nothing_is_lost_by_kills_and_faults(seed: int, tmp_path: Path) -> None:
    shards = prepare_shards(tmp_path / "corpus")
    drill = run_drill(tmp_path, shards, kills=24, seed=seed, layouts=LAYOUTS)
    assert drill.failures == []
    assert len(drill.trials) == 24
    assert all(trial.found for trial in drill.trials)
    assert drill.ledgers == drill.rounds >= 2
    assert drill.same_bits >= 1


DONE = Drill(
    trials=[
        Trial("step", "one rank", redone=2, peers_ended=True, found=True),
        Trial(
            "save",
            "all ranks",
            unfinished=True,
            redone=4,
            fault=FAULTS[0],
            lost=2,
            loaded=True,
            samples=4,
        ),
        Trial("start", "all ranks", moved=True, found=True),
    ],
    rounds=2,
    same_bits=1,
    worst=2e-8,
    seconds=9.0,
)


def test_the_table_counts_every_trial_once() -> None:
    text = report(DONE, seed=3, layouts=LAYOUTS[:2])
    assert "| kill -9 of one rank | 1 | 1 | 0 | 0 | 2.0, 2 |" in text
    assert "| kill -9 of all ranks | 1 | 1 | 0 | 0 | 0.0, 0 |" in text
    assert "| kill -9, then one bit flipped | 1 | 0 | 1 | 4 | 4.0, 4 |" in text
    assert "| **all** | 3 | 2 | 1 | 4 | 2.0, 4 |" in text
    assert "1 left a save unfinished" in text


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the drill"):
        write(page, "new")
