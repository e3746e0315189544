"""Miniatures: the recipes' mechanics, the streaming check, results that survive a kill."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from data.tasks import FILLER, KEY, QUERY, multi_fact_recall
from model.config import FamMemory
from model.decoder import Decoder
from model.memory.base import named_tensors
from train.miniatures import facts, report, trainer
from train.miniatures.blocks import Blocks
from train.miniatures.check import Reader, check
from train.miniatures.config import CheckSection, Miniature, load_miniature, model_config
from train.miniatures.curriculum import Difficulty, amplification, sample
from train.miniatures.learner import Learner, learning_rate, read, with_memory
from train.miniatures.pools import Pool, Pools
from train.miniatures.states import join, noisy, pick, put
from train.settings.problems import ConfigError

SMALL = """
name: small
model:
  num_layers: 1
  hidden_size: 16
  num_heads: 2
  num_kv_heads: 2
  ffn_size: 16
  memory: {name: fam, slots: 2, state: latch, beta: 2.0}
segment_len: 16
batch_size: 4
stages:
  - {recipe: curriculum, steps: 2, blocks: 2, memory: {state: norm}}
  - {recipe: pools, steps: 2, pool: 6, aged_rows: 2, aging: 2, memory: {beta: 6.0}}
check: {lengths: [48, 96], prompts: 3, memory: {beta: 8.0}}
paper: {title: t, result: 1.00 at 260k, differs: small}
"""


@pytest.fixture
def small(tmp_path: Path) -> Miniature:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return load_miniature(path)


def learner_at(miniature: Miniature, stage: int) -> Learner:
    learner = Learner(miniature, 0)
    learner.begin(miniature.stages[stage])
    return learner


# --- blocks


def test_a_key_block_holds_the_key_whole_and_a_question_ends_with_it() -> None:
    blocks = Blocks(16, 0)
    keys = blocks.keys(200)
    places = torch.arange(200) % 2
    tokens = sample(blocks, keys, places, 2)
    assert tokens.shape == (200, 3, 16)
    for row, key, place in zip(tokens, keys, places, strict=True):
        at = (row[place] == KEY).nonzero().item()
        assert row[place, at + 1 : at + 5].tolist() == key.tolist()
        assert row[-1, -5] == QUERY
        assert row[-1, -4:].tolist() == key.tolist()
        assert (row[1 - place] < FILLER).all()


def test_a_near_key_leaves_the_question_whole() -> None:
    blocks = Blocks(16, 0)
    tokens = sample(blocks, blocks.keys(200), torch.full((200,), 1), 1)
    assert tokens.shape == (200, 2, 16)
    assert (tokens[:, 1, -5] == QUERY).all()
    assert ((tokens[:, 1] == KEY).sum(1) == 1).all()
    assert (tokens[:, 0] < FILLER).all()


def test_a_landmark_ends_every_block_and_is_not_asked_for() -> None:
    blocks = Blocks(16, 0, landmark=32)
    keys = blocks.keys(200)
    tokens = sample(blocks, keys, torch.arange(200) % 3, 2)
    assert (tokens[..., -1] == 32).all()
    assert (tokens[:, -1, -5:-1] == keys).all()
    assert (tokens[:, -1, -6] == QUERY).all()
    logits = torch.arange(16).view(1, 1, 16, 1)
    assert blocks.answers(logits).flatten().tolist() == [10, 11, 12, 13]


# --- curriculum


def test_the_distance_rises_then_the_amplification(small: Miniature) -> None:
    stage = small.stages[0].model_copy(update={"amplify": 1.0})
    difficulty = Difficulty(stage, 1)
    seen = []
    for _ in range(200):
        difficulty.observe(1.0)
        seen.append((difficulty.distance, difficulty.amplify))
    assert list(dict.fromkeys(seen)) == [(1, 0.0), (2, 0.0), (2, 0.5), (2, 1.0)]
    assert difficulty.finished


def test_only_filler_is_amplified() -> None:
    blocks = Blocks(16, 0)
    places = torch.arange(300) % 4
    assert amplification(blocks, places, 4, 0.0) is None
    weights = amplification(blocks, places, 4, 6.0)
    assert weights is not None
    assert weights.shape == (300, 5)
    at_key = torch.arange(5) == places.unsqueeze(1)
    assert (weights[at_key] == 0).all()
    assert 0 <= weights[~at_key].min() < 0.2
    assert 5.8 < weights[~at_key].max() <= 6.0


def test_a_share_of_rows_is_not_amplified() -> None:
    blocks = Blocks(16, 0)
    weights = amplification(blocks, torch.zeros(40, dtype=torch.int64), 4, 6.0, plain=0.25)
    assert weights is not None
    assert (weights[:10] == 0).all()
    assert (weights[10:, 1:] > 0).all()


def test_the_rate_warms_up_and_falls_to_its_end(small: Miniature) -> None:
    stage = small.stages[0].model_copy(update={"steps": 150, "warmup_steps": 50, "min_lr": 1e-5})
    rates = [learning_rate(stage, step) for step in range(150)]
    assert rates[49] == max(rates) == stage.lr
    assert rates[-1] == pytest.approx(1e-5)


def test_gates_have_their_own_rate_and_no_decay(small: Miniature) -> None:
    learner = Learner(small, 0)
    gate = learner.model.blocks[0].qkv.linear.weight
    gate.lr_scale = 10.0
    learner.begin(small.stages[1])  # builds the model anew
    assert {group["lr_scale"] for group in learner.optimizer.param_groups} == {1.0}
    learner.model.blocks[0].qkv.linear.weight.lr_scale = 10.0
    from train.miniatures.learner import make_optimizer

    groups = make_optimizer(learner.model, small).param_groups
    (gates,) = [group for group in groups if group["lr_scale"] == 10.0]
    assert gates["weight_decay"] == 0
    names = {id(p): name for name, p in learner.model.named_parameters()}
    decaying = [names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]]
    assert "head.output.weight" in decaying
    assert not any("norm" in name or "embedding" in name for name in decaying)


# --- states and pools


def test_a_sharper_latch_keeps_the_weights(small: Miniature) -> None:
    learner = learner_at(small, 1)
    sharper = with_memory(learner.model, small, {"beta": 8.0})
    assert isinstance(sharper.config.memory, FamMemory)
    assert sharper.config.memory == replace(learner.model.config.memory, beta=8.0)
    for (name, a), b in zip(learner.model.named_parameters(), sharper.parameters(), strict=True):
        assert torch.equal(a, b), name


@torch.no_grad()
def test_rows_are_taken_put_and_joined(small: Miniature) -> None:
    learner = learner_at(small, 1)
    _, state = learner.read(learner.blocks.filler(4))
    _, other = learner.read(learner.blocks.filler(2))
    new = put(state, torch.tensor([3, 1]), other)
    both = join(pick(state, torch.tensor([0, 2])), other)
    for was, now, came, joined in zip(
        *(named_tensors(s, "").values() for s in (state, new, other, both)), strict=True
    ):
        assert torch.equal(now[[3, 1]], came)
        assert torch.equal(now[[0, 2]], was[[0, 2]])
        assert torch.equal(joined, torch.cat((was[[0, 2]], came)))


@torch.no_grad()
def test_noise_has_the_size_asked_for_and_spares_flags(small: Miniature) -> None:
    learner = learner_at(small, 1)
    _, state = learner.read(learner.blocks.filler(400))
    for was, now in zip(
        named_tensors(state, "").values(),
        named_tensors(noisy(state, 0.1, learner.blocks.normal), "").values(),
        strict=True,
    ):
        if not was.is_floating_point():
            assert torch.equal(was, now)
        elif was.numel():
            size = (now - was).square().mean() / was.square().mean()
            assert size.sqrt().item() == pytest.approx(0.1, rel=0.1)


def keep(pools: Pools, right: list[bool], old: list[int]) -> None:
    rows = len(right)
    with torch.no_grad():
        _, state = pools.learner.read(pools.blocks.filler(rows))
    pools._keep(
        state,
        torch.arange(rows).unsqueeze(1).expand(-1, 4) + FILLER,
        torch.full((rows,), 7),
        torch.tensor(right),
        torch.tensor(old, dtype=torch.int64),
    )


def test_only_rows_that_were_read_right_stay_in_the_pool(small: Miniature) -> None:
    stage = small.stages[1].model_copy(update={"reset": 0.0})
    pools = Pools(learner_at(small, 1), stage)
    assert not pools.keyed.used.any()
    keep(pools, [True, False, True, False], [])
    assert pools.keyed.keys[pools.keyed.used][:, 0].tolist() == [FILLER, FILLER + 2]
    # Rows 2 and 3 are the aged ones, from places 0 and 1: one is right, the other leaves.
    keep(pools, [False, False, True, False], [0, 1])
    assert pools.keyed.used.tolist() == [True, False, False, False, False, False]
    assert pools.keyed.age[0] == 7


def test_a_full_pool_keeps_what_it_has(small: Miniature) -> None:
    learner = learner_at(small, 1)
    with torch.no_grad():
        _, state = learner.read(learner.blocks.filler(3))
    pool = Pool(state, learner.blocks.keys(3), full=True)
    keys = pool.keys.clone()
    pool.add(state, learner.blocks.keys(3), torch.full((3,), 9))
    assert torch.equal(pool.keys, keys)
    assert pool.age.tolist() == [1, 1, 1]


def test_a_step_moves_the_weights_and_ages_the_pools(small: Miniature) -> None:
    stage = small.stages[1].model_copy(update={"aging_share": 1.0, "reset": 0.0})
    learner = learner_at(small, 1)
    pools = Pools(learner, stage)
    before = [p.detach().clone() for p in learner.model.parameters()]
    pools.step()
    assert (pools.free.age > 1).sum() == 4  # each of the four fresh rows' states went on
    assert any(
        not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
    assert not any(t.requires_grad for t in named_tensors(pools.free.state, "").values())


# --- the check


def test_the_check_reads_documents_of_the_lengths_asked_for(
    small: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that counts: its state is the number of blocks read, and where the key was."""
    asked: list[tuple[int, int]] = []

    def counting(model, tokens, state=None, *, starts=None, weights=None):  # type: ignore[no-untyped-def]
        read, key = (0, -1) if state is None else state
        for n in range(tokens.shape[1]):
            if (tokens[0, n] == KEY).any():
                key = read
            if tokens[0, n, -5] == QUERY:
                asked.append((read + 1, key))
            read += 1
        return torch.zeros(*tokens.shape, 32), (read, key)

    class Counting:
        def read(self, tokens, starts, state):  # type: ignore[no-untyped-def]
            return counting(self, tokens, state)[1]

    monkeypatch.setattr("train.miniatures.check.read", counting)
    monkeypatch.setattr("train.miniatures.check.retrieves", lambda model: False)
    monkeypatch.setattr("train.miniatures.check.num_bytes", lambda state: 3)
    section = CheckSection(lengths=(48, 96, 160), prompts=2, blocks_at_once=3)
    miniature = small.model_copy(update={"check": section})
    done = check(Counting(), miniature, lambda line: None)  # type: ignore[arg-type]
    assert sorted(asked) == sorted(
        (count, key) for count in (3, 6, 10) for key in (0, count // 2, count - 2)
    )
    assert {(cell.tokens, cell.place) for cell in done.cells} == {
        (length, place) for length in (48, 96, 160) for place in ("start", "middle", "end")
    }


@torch.no_grad()
def test_several_blocks_at_once_stream_the_same(small: Miniature) -> None:
    model = Learner(small, 0).model
    states, answers = [], []
    for at_once in (1, 4):
        reader = Reader(model, Blocks(16, 0), 3, at_once)
        tokens = torch.randint(0, FILLER, (3, 9, 16), generator=torch.Generator().manual_seed(0))
        state = None
        for part in tokens[:, :-1].split(at_once, 1):
            state = reader.remember(part, state)
        logits, state = reader.read(tokens[:, -1:], state)
        states.append(state)
        answers.append(logits[:, -1])
        assert reader.tokens == tokens.numel()
    torch.testing.assert_close(*answers)
    for a, b in zip(*(named_tensors(state, "").values() for state in states), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_question_does_not_refresh_the_state(small: Miniature) -> None:
    model = Learner(small, 0).model
    blocks = Blocks(16, 0)
    _, state = read(model, blocks.filler(2, 3))
    before = [tensor.clone() for tensor in named_tensors(state, "").values()]
    Reader(model, blocks, 2, 1).ask(state, blocks.keys(2), 0)
    assert all(
        torch.equal(a, b) for a, b in zip(before, named_tensors(state, "").values(), strict=True)
    )


# --- results


def test_a_finished_seed_is_not_run_again(
    small: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None)
    monkeypatch.setattr(trainer, "train", None)
    monkeypatch.setattr(trainer, "check", None)
    assert trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None) == first


def test_a_run_killed_in_its_check_keeps_its_training(
    small: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "check", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None)
    monkeypatch.setattr(trainer, "train", None)
    result = trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None)
    whole = trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None)
    assert result["cells"] == whole["cells"]


def test_a_seed_gives_the_same_weights_every_time(small: Miniature) -> None:
    a, b = (trainer.train(small, 3, lambda line: None)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_results_of_another_configuration_are_refused(small: Miniature, tmp_path: Path) -> None:
    trainer.run_seed(small, 0, tmp_path, tmp_path, lambda line: None)
    other = small.model_copy(update={"batch_size": 5})
    with pytest.raises(ValueError, match="another configuration .*batch_size"):
        trainer.run_seed(other, 0, tmp_path, tmp_path, lambda line: None)


def test_the_table_says_what_was_run_and_what_was_not(small: Miniature, tmp_path: Path) -> None:
    assert "not run" in report.table(tmp_path, [small])
    for seed in (0, 1):
        trainer.run_seed(small, seed, tmp_path / f"seed-{seed}", tmp_path, lambda line: None)
    text = report.table(tmp_path, [small])
    assert "at 96 | 2 |" in text
    assert text.count("| 96 |") == 3
    report.plot(tmp_path, [small], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


RESULTS = Path("docs/results/miniatures")


def our_own() -> list[Miniature]:
    return [load_miniature(path) for path in sorted(Path("configs/miniatures").glob("*.yaml"))]


def test_the_committed_tables_are_what_the_committed_results_say() -> None:
    """Remedy: longhaul miniature configs/miniatures/*.yaml --table >docs/results/miniatures.md."""
    shown = Path("docs/results/miniatures.md").read_text(encoding="utf-8")
    assert shown == report.table(RESULTS, our_own())


def test_the_committed_results_are_of_the_committed_configurations() -> None:
    for miniature in our_own():
        config = miniature.model_dump(mode="json", exclude={"seeds", "paper"})
        for result in report.load_results(RESULTS, miniature.name):
            assert not list(trainer._differences(result["config"], config)), miniature.name


# --- configuration


def test_every_miniature_of_ours_loads() -> None:
    paths = sorted(Path("configs/miniatures").glob("*.yaml"))
    assert paths
    for path in paths:
        miniature = load_miniature(path)
        assert 320 in miniature.check.lengths
        assert miniature.check.prompts >= 32
        assert len(miniature.seeds) >= 3
        assert model_config(miniature).memory.name == miniature.model.memory.name


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMALL)
    raw["stages"][1]["memory"] = {"sharpness": 3}
    raw["check"]["lengths"] = [50]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as problem:
        load_miniature(path)
    assert "stages.1.memory.sharpness" in str(problem.value)
    assert "50 is not 3 or more blocks of segment_len=16; use 48" in str(problem.value)


def test_the_command_trains_and_prints_a_table(tmp_path: Path) -> None:
    from train.cli import app

    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    folders = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    run = CliRunner().invoke(app, ["miniature", str(path), "--seed", "0", *folders])
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "results/small/seed-0.json").read_text())
    assert result["seed"] == 0
    assert (tmp_path / "out/small/seed-0/weights.safetensors").exists()
    shown = CliRunner().invoke(app, ["miniature", str(path), "--table", *folders])
    assert "## small" in shown.output


# --- retrieval


@torch.no_grad()
def test_the_hit_rate_tells_which_reads_choose_the_key_s_block(tmp_path: Path) -> None:
    """All three blocks are chosen where three are retrieved; no block of number 7 is there."""
    path = tmp_path / "landmark.yaml"
    memory = "{name: landmark, block: 16, retrieve: 3, layers: last}"
    raw = yaml.safe_load(SMALL)
    raw["model"] |= {"memory": yaml.safe_load(memory), "num_layers": 2}
    raw["stages"] = raw["stages"][:1]
    raw["stages"][0]["memory"] = {}
    raw["check"] = {"lengths": [64], "prompts": 3}
    path.write_text(yaml.safe_dump(raw))
    miniature = load_miniature(path)
    model = Learner(miniature, 0).model
    reader = Reader(model, Blocks(16, 0, landmark=32), 3, 2)
    keys = reader.blocks.keys(3)
    state = reader.filler(reader.key(None, keys), 2)
    for number, expected in ((0, True), (2, True), (7, False)):
        answer = reader.ask(state, keys, number)
        assert answer.found is not None
        assert answer.found.shape == (3, 2, 4)
        assert (answer.found == expected).all()
    cells = check(model, miniature, lambda line: None).cells
    assert [cell.found for cell in cells] == [12, 12, 12]  # of 3 prompts' 4 tokens


# --- facts


def facts_file(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "facts.yaml"
    raw = yaml.safe_load(SMALL)
    raw["name"] = "facts"
    raw["model"]["memory"] = {"name": "hmt", "bank": 8, "sensory": 2, "search_dim": 4}
    raw["stages"] = [{"recipe": "facts", "steps": 3, "blocks": 2}]
    raw["check"] = {"lengths": [48, 96], "prompts": 5, "prompts_at_once": 3}
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def test_facts_are_trained_checked_and_shown(tmp_path: Path) -> None:
    miniature = load_miniature(facts_file(tmp_path))
    result = trainer.run_seed(miniature, 0, tmp_path, tmp_path, lambda line: None)
    assert [cell["tokens"] for cell in result["cells"]] == [48, 96]
    assert all(cell["prompts"] == 5 for cell in result["cells"])
    text = report.table(tmp_path, [miniature])
    assert "| 96 | 5 |" in text
    assert "by uniform search, at 96 | 1 |" in text


def test_a_stage_of_facts_has_blocks_of_its_own_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"recipe": "facts", "steps": 1, **more} for more in ({"block_len": 12}, {})]
    miniature = load_miniature(facts_file(tmp_path, stages=stages))
    ask, lengths = facts.ask, []

    def seen(model: Decoder, rng: np.random.Generator, *shape: int) -> facts.Recalled:
        lengths.append(shape[-1])
        return ask(model, rng, *shape)

    monkeypatch.setattr(facts, "ask", seen)
    trainer.train(miniature, 0, lambda line: None)
    assert lengths == [12, 16]


def test_the_search_s_loss_is_over_all_rows_but_hides_the_same_name() -> None:
    scores = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[0.0, 1.0], [2.0, 3.0]]]).log()
    same = torch.zeros(2, 2, 2, dtype=torch.bool)
    same[0, 0, 1] = same[0, 1, 0] = same[1, 1, 1] = True  # row 0's name is in row 1's block 0 too
    told = facts.Recalled(
        torch.zeros(2, 4), torch.zeros(2), torch.ones(2, 2), torch.tensor([1, 1]), scores, same
    )
    expected = -(math.log(1 / (0 + 1 + 3)) + math.log(3 / (0 + 1 + 2 + 3))) / 2
    assert facts.search_loss(told).item() == pytest.approx(expected)


def test_a_block_s_name_is_the_token_behind_its_key() -> None:
    task = multi_fact_recall(np.random.default_rng(0), batch=5, segments=4, segment_len=16)
    names = facts._names(torch.from_numpy(task.tokens[:, :-1]))
    rows = torch.arange(5)
    asked = torch.from_numpy(task.tokens[:, -1, 1])
    assert torch.equal(names[rows, torch.from_numpy(task.gold)], asked)


def test_facts_want_a_bank_that_holds_them_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="160 has 9 facts.* bank of 8; use at most 144"):
        load_miniature(facts_file(tmp_path, check={"lengths": [160]}))


def test_facts_want_a_memory_that_searches(tmp_path: Path) -> None:
    model = yaml.safe_load(SMALL)["model"]
    with pytest.raises(ConfigError, match="facts searches a bank, fam has none; use hmt"):
        load_miniature(facts_file(tmp_path, model=model))
