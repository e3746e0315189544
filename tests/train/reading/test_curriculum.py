"""The segment-count curriculum: which limit holds when, and where memories begin anew."""

import pytest
import torch

from tests.train.runs import small
from train.reading.curriculum import cut_documents, segment_limit
from train.settings.config import Config, validate

STAGES = [{"until": 3, "segments": 1}, {"until": 5, "segments": 4}]


def config(*, vary: bool = False, **changes: object) -> Config:
    return validate(small(train__curriculum=STAGES, train__curriculum_vary=vary, **changes))


def test_each_stage_ends_at_its_step_and_then_documents_are_whole() -> None:
    limits = [segment_limit(config(), step) for step in range(7)]
    assert limits == [1, 1, 1, 4, 4, None, None]


def test_without_a_curriculum_documents_are_whole() -> None:
    assert segment_limit(validate(small()), 0) is None


def test_a_varied_limit_takes_every_number_of_the_stage_and_no_other() -> None:
    stages = [{"until": 400, "segments": 4}]
    varied = validate(small(train__curriculum=stages, train__curriculum_vary=True))
    limits = [segment_limit(varied, step) for step in range(400)]
    counts = [limits.count(number) for number in (1, 2, 3, 4)]
    assert sum(counts) == 400
    assert min(counts) > 70  # 100 each, 8.7 their standard deviation


def test_a_varied_limit_is_a_function_of_seed_and_step() -> None:
    first = [segment_limit(config(vary=True), step) for step in (3, 4)] * 20
    torch.manual_seed(123)  # nobody's generator has a say
    assert [segment_limit(config(vary=True), step) for step in (3, 4)] * 20 == first
    many = [[segment_limit(config(vary=True, seed=s), 3) for s in range(20)]]
    assert len(set(many[0])) > 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, [0, 0, 0, 1, 0]),
        (1, [1, 1, 1, 1, 1]),
        (2, [1, 0, 1, 1, 1]),
        (3, [1, 0, 0, 1, 0]),
        (5, [1, 0, 0, 1, 0]),
    ],
)
def test_memories_begin_at_the_samples_start_and_after_every_limit(
    limit: int | None, expected: list[int]
) -> None:
    starts = torch.tensor([[0, 0, 0, 1, 0]]).bool()  # a document of its own in the fourth
    assert cut_documents(starts, limit).int().tolist() == [expected]
    assert starts.int().tolist() == [[0, 0, 0, 1, 0]]
