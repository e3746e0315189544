"""Bugs of the field, planted: the check finds each, and names what is off and what breaks it."""

import pytest

from tests.train.mutations import MUTATIONS, Mutation, config_of, find
from train.checking.check import References, compare_layout
from train.checking.shrink import shrink

pytestmark = pytest.mark.gloo

QUICK = ("norms-not-summed", "detached")
"""Of the search; of these the one asks two ranks, the other a single process."""

ON_RANKS = [name for name, mutation in MUTATIONS.items() if "slope" not in mutation.kinds]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MUTATIONS]
)
def test_a_planted_bug_is_found_and_named(name: str) -> None:
    mutation = MUTATIONS[name]
    report = find(mutation)
    assert not report.passes
    differences = report.comparisons[-1].differences if report.comparisons else report.own
    assert_off(mutation, differences)
    assert report.switches is not None
    assert {switch.describe() for switch in report.switches} == mutation.switches


@pytest.mark.parametrize("name", ["labels-shifted", "dk-dv-swapped", "memory-not-summed"])
def test_a_planted_bug_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = MUTATIONS[name]
    mutation.plant(monkeypatch)
    subject = shrink(config_of(mutation.changes), 2)
    found = compare_layout(subject, References())
    assert not found.passes
    assert_off(mutation, found.differences)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"parallel.cp": 2, "data.sample_len": 256}, {"parallel.tp": 2}], ids=str
)
def test_without_a_bug_nothing_is_off(changes: dict[str, object]) -> None:
    found = compare_layout(shrink(config_of(changes), 2), References())
    assert found.passes, [d for d in found.differences if not d.passes]


def assert_off(mutation: Mutation, differences: list) -> None:
    off = [each for each in differences if not each.passes]
    assert mutation.kinds <= {each.kind for each in off}
    assert any(mutation.parameter in each.name for each in off)
