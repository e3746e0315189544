"""What `longhaul check` compares, what it calls rounding, and how it tells the rest."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from tests.train.mutations import config_of
from train.build import to_model_config
from train.checking import plain
from train.checking.check import Comparison, Report
from train.checking.compare import FLOORS, Difference, compare
from train.checking.plain import Step, Trained, begin
from train.checking.report import as_json, as_text, first_off, parameter_off
from train.checking.shrink import Subject, shrink
from train.checking.switches import Switch
from train.commands.check import check as command


def trained(subject: Subject, dtype: torch.dtype) -> Trained:
    return plain.train(subject.config, model_of(subject), dtype)


def model_of(subject: Subject) -> Any:
    return to_model_config(subject.config, 0)


SUBJECT = shrink(config_of({"data.sample_len": 256, "model.memory": {"name": "fam"}}), 1)


@functools.cache
def exact() -> Trained:
    return trained(SUBJECT, torch.float64)


@functools.cache
def rounded() -> Trained:
    return trained(SUBJECT, torch.float32)


def spoilt(name: str, change: Any) -> Trained:
    """Return what one process rounds, with one gradient of the second step changed."""
    steps = list(rounded().steps)
    gradients = dict(steps[1].gradients)
    gradients[name] = change(gradients[name].clone())
    steps[1] = Step(steps[1].loss, steps[1].grad_norm, gradients)
    return Trained(steps, rounded().weights)


def off(found: Trained) -> list[str]:
    some = compare(found, exact(), rounded(), model_of(SUBJECT))
    return [each.describe() for each in some if not each.passes]


def test_rounding_passes() -> None:
    assert off(rounded()) == []


def test_every_parameter_is_compared_and_queries_keys_and_values_apart() -> None:
    some = compare(rounded(), exact(), rounded(), model_of(SUBJECT))
    names = {each.name for each in some if each.kind == "gradient"}
    parts = {f"blocks.0.qkv.linear.weight ({part})" for part in "qkv"}
    assert parts <= names
    assert {name.split(" ")[0] for name in names} == set(exact().weights)
    assert {each.kind for each in some} == set(FLOORS)


def test_a_wrong_key_gradient_is_named_with_its_layer_and_step() -> None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x[8:16] *= 1.001  # of the first head's group [q, k, v]
        return x

    assert off(spoilt("blocks.1.qkv.linear.weight", spoil)) == [
        "gradient of blocks.1.qkv.linear.weight (k) (layer 1), step 2"
    ]


def test_not_a_number_is_out_of_tolerance() -> None:
    found = off(spoilt("head.norm.weight", lambda x: x * float("nan")))
    assert found == ["gradient of head.norm.weight, step 2"]


def test_one_of_several_replicas_is_enough() -> None:
    def replicas(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x * 1.01])

    assert off(spoilt("head.norm.weight", replicas)) == ["gradient of head.norm.weight, step 2"]


def test_tolerances_are_those_of_float32_where_one_process_rounds_no_more() -> None:
    some = compare(exact(), exact(), exact(), model_of(SUBJECT))
    assert {each.tolerance for each in some} == set(FLOORS.values())


def test_the_references_optimizer_is_adamw() -> None:
    config, model_config = SUBJECT.config, model_of(SUBJECT)
    model = begin(config, model_config, torch.float64)
    parameters = dict(model.named_parameters())
    decayed = [p for p in parameters.values() if p.dim() > 1]
    rest = [p for p in parameters.values() if p.dim() <= 1]
    own = config.train
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": own.weight_decay}, {"params": rest}],
        lr=1.0, betas=(own.beta1, own.beta2), eps=own.eps, weight_decay=0.0,
    )  # fmt: skip
    for number, step in enumerate(exact().steps):
        for name, p in parameters.items():
            p.grad = step.gradients[name].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), own.clip)
        for group in optimizer.param_groups:
            group["lr"] = plain.learning_rate(own, number)
        optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), exact().weights[name], rtol=1e-12, atol=1e-12)


def test_a_report_names_what_is_off_and_what_breaks_it() -> None:
    found = compare(
        spoilt("head.norm.weight", lambda x: 2 * x), exact(), rounded(), model_of(SUBJECT)
    )
    comparison = Comparison(SUBJECT, found)
    report = Report(
        SUBJECT.config, [], [comparison], [Switch("parallel.cp", 2, 1), Switch("dp", 2, 1)], 1.0
    )
    text = as_text(report)
    assert "NOT EQUAL" in text
    assert "what is off first: gradient of head.norm.weight, step 2: relative error 1.0" in text
    assert "what breaks it: parallel.cp=2 with dp=2 (without any one of them it is equal)" in text
    assert as_json(report)["switches"] == ["parallel.cp=2", "dp=2"]


def test_what_is_told_first_is_what_the_rest_may_follow_from() -> None:
    differences = [
        Difference("weight", "a", 2, 9.0, 1e-6),
        Difference("gradient norm", "", 0, 5.0, 1e-6),
        Difference("gradient", "b", 1, 8.0, 1e-5),
        Difference("gradient", "c", 0, 1e-3, 1e-5),
        Difference("gradient", "d", 0, 1e-2, 1e-5),
        Difference("loss", "", 0, 1e-7, 1e-6),
    ]
    report = Report(SUBJECT.config, [], [Comparison(SUBJECT, differences)], [], 1.0)
    first = first_off(report)
    assert first is not None and first.name == "d" and first == parameter_off(report)
    wrong_loss = [*differences, Difference("loss", "", 0, 1e-2, 1e-6)]
    first = first_off(report._replace(comparisons=[Comparison(SUBJECT, wrong_loss)]))
    assert first is not None and first.kind == "loss"


@pytest.mark.parametrize(("switches", "code"), [(None, 0), ([Switch("dp", 2, 1)], 1)])
def test_the_exit_code_says_whether_it_is_equal(
    switches: list[Switch] | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # the command sets them
    error = 0.0 if switches is None else float("nan")
    comparison = Comparison(SUBJECT, [Difference("loss", "", 0, error, 1e-6)])
    report = Report(SUBJECT.config, [], [comparison], switches, 1.0)
    monkeypatch.setattr("train.checking.check.check", lambda *args: report)
    with pytest.raises(typer.Exit) as end:
        command(Path(__file__).parents[3] / "configs/quickstart.yaml", as_json=True)
    assert end.value.exit_code == code
    (told,) = as_json(report)["comparisons"][0]["differences"]
    assert told["error"] == (0.0 if switches is None else None)
