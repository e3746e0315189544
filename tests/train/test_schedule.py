"""The learning rate of a step."""

import pytest

from tests.train.runs import small
from train.schedule import learning_rate
from train.settings.config import TrainSection, validate


def section(**changes: object) -> TrainSection:
    base: dict[str, object] = {"steps": 20, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 4}
    return validate(small(**{f"train__{k}": v for k, v in (base | changes).items()})).train


def rates(**changes: object) -> list[float]:
    train = section(**changes)
    return [learning_rate(train, step) for step in range(train.steps)]


@pytest.mark.parametrize(
    "schedule", [{}, {"schedule": "wsd", "decay_steps": 5}, {"schedule": "constant"}]
)
def test_warm_up_is_linear_and_its_first_step_not_zero(schedule: dict[str, object]) -> None:
    assert rates(**schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_from_lr_to_min_lr_at_the_last_step() -> None:
    found = rates()[4:]
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)
    # an odd number of steps has one in the middle, half-way
    assert rates(steps=21)[4:][8] == pytest.approx(0.55)


def test_wsd_stays_and_then_falls_in_a_line_to_min_lr_at_the_last_step() -> None:
    found = rates(schedule="wsd", decay_steps=3)
    assert found[4:17] == [1.0] * 13
    assert found[17:] == pytest.approx([0.7, 0.4, 0.1])


def test_wsd_before_its_fall_does_not_depend_on_the_number_of_steps() -> None:
    short = rates(schedule="wsd", decay_steps=3)
    long = rates(schedule="wsd", decay_steps=3, steps=40)
    assert short[:17] == long[:17]


def test_constant_stays() -> None:
    assert rates(schedule="constant")[4:] == [1.0] * 16


@pytest.mark.parametrize("schedule", [{}, {"schedule": "wsd", "decay_steps": 1}])
def test_no_warm_up_begins_at_lr(schedule: dict[str, object]) -> None:
    assert rates(warmup_steps=0, **schedule)[0] == 1.0


def test_a_run_of_warm_up_and_one_step_has_no_division_by_zero() -> None:
    assert rates(steps=5) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [{}, {"schedule": "wsd", "decay_steps": 3}])
def test_beyond_the_last_step_it_stays_at_min_lr(schedule: dict[str, object]) -> None:
    assert learning_rate(section(**schedule), 25) == pytest.approx(0.1)
