"""The last screen of a run and its picture."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from train.evaluation.positions import Condition, Evaluation, Part, PositionLosses, bucket_edges
from train.speed.metrics import FORMULA_NAME
from train.tracking.picture import plot, plot_evaluation, tidy
from train.tracking.summary import summarise


def row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens_per_s": 1000.0, "mfu": 0.2} | more


def losses(condition: Condition, longest: int = 4096) -> PositionLosses:
    edges = bucket_edges(256, longest)
    counts = tuple(100 * i for i in range(1, len(edges)))
    gained = 0.1 if condition == "on" else 0.0
    sums = tuple(
        (3 - gained * (edge >= 256)) * count for edge, count in zip(edges, counts, strict=False)
    )
    parts = tuple(
        Part(passage, bucket, (3 - gained) * count / 2, count // 2)
        for passage in range(2)
        for bucket, count in enumerate(counts)
        if edges[bucket] >= 256
    )
    return PositionLosses(condition, 256, edges, sums, counts, parts)


def evaluation() -> Evaluation:
    on = losses("on")
    return Evaluation(on, losses("off"), losses("shuffled"), losses("beyond"), paired=on)


def text(run_dir: Path, **more: Any) -> str:
    settings: dict[str, Any] = {
        "history": [
            row(10, 5.5),
            row(20, 3.0, tokens_per_s=2e6),
            row(30, 2.5, tokens_per_s=2e6),
        ],
        "formula": FORMULA_NAME,
        "peak_source": "measured matmul",
        "checkpoint": run_dir,
        "tracking": "sqlite:///mlflow.db",
        "continue_command": "longhaul pretrain configs/quickstart.yaml",
    }
    return summarise(run_dir, **(settings | more))


def test_the_text_says_what_was_reached_and_how_to_go_on(tmp_path: Path) -> None:
    lines = text(tmp_path, evaluation=evaluation()).splitlines()
    assert lines[0] == "loss by position in the document"
    assert lines[1].split("  ")[-7:-4] == ["memory on", "memory off", "shuffled"]
    pairs = (line.split("  ", 1) for line in lines[lines.index("") + 1 :])
    values = {name: value.strip() for name, value in pairs}
    assert values["training loss"] == "2.5000 at step 30 (step 10: 5.5000)"
    assert values["held-out, memory off"].startswith("3.0000, perplexity 20.09, ")
    assert values["shuffled - on"].startswith("+0.1000 (95 % interval +0.1000 to +0.1000) nats")
    assert values["memory used"].startswith("yes: ")
    assert values["throughput"] == "2.00M tokens/s"
    assert values["MFU"] == ("20% (causal mask-aware, no recomputation; peak: measured matmul)")
    assert values["checkpoint"] == str(tmp_path)
    assert values["continue"] == "longhaul pretrain configs/quickstart.yaml"
    assert "picture" not in values  # none was drawn


def test_columns_are_aligned(tmp_path: Path) -> None:
    lines = text(tmp_path).splitlines()
    starts = {len(line) - len(line[15:].lstrip()) for line in lines}
    assert len(starts) == 1


def test_a_run_without_evaluation_or_log_has_an_end_too(tmp_path: Path) -> None:
    lines = text(tmp_path, history=[], checkpoint=None).splitlines()
    assert [line.split()[0] for line in lines] == ["tracking", "continue"]


def test_the_log_of_a_run_that_went_back_is_read_as_the_run_that_counts() -> None:
    history = [row(10, 5.0), row(20, 4.0), row(30, 9.0), row(40, 9.9), row(30, 3.0)]
    assert [(r["step"], r["loss"]) for r in tidy(history)] == [(10, 5.0), (20, 4.0), (30, 3.0)]


def test_rows_without_a_finite_loss_are_passed_over() -> None:
    history = [row(10, 5.0), row(20, math.nan), row(30, None), {"step": 35}, row(40, 4.0)]
    assert [r["step"] for r in tidy(history)] == [10, 40]


@pytest.mark.parametrize("steps", [0, 3, 100])
def test_the_picture_of_any_run_is_drawn(tmp_path: Path, steps: int) -> None:
    history = [row(10 * i, 3 + 2 / i) for i in range(1, steps + 1)]
    path = plot(tmp_path, history=history, evaluation=evaluation(), title="small")
    assert path == tmp_path / "summary.png"
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert f"picture        {path}" in text(tmp_path)


def test_a_picture_needs_no_evaluation_and_an_evaluation_no_run(tmp_path: Path) -> None:
    assert plot(tmp_path, history=[row(10, 5.0)], title="small").exists()
    only_off = plot_evaluation(tmp_path / "a" / "off.png", Evaluation(off=losses("off")), title="x")
    assert only_off.exists()
    short = Evaluation(on=losses("on", longest=200))  # no document beyond its first segment
    assert plot_evaluation(tmp_path / "short.png", short, title="x").exists()
    assert plot_evaluation(tmp_path / "all.png", evaluation(), title="x").exists()


def test_a_long_run_is_drawn_soon(tmp_path: Path) -> None:
    history = [row(i, 3 + 2 / i) for i in range(1, 300_001)]
    begin = time.process_time()
    plot(tmp_path, history=history, title="long")
    assert time.process_time() - begin < 10


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, train.tracking.summary; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
