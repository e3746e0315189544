"""`longhaul evaluate`: what a checkpoint's memory is worth, in numbers, words and a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.index import Corpus
from data.shards import TOKENIZER
from data.urls import shown_folder
from data.wording import counted
from model.decoder import Output
from model.memory.base import State
from train.evaluation.measure import ALL, choose_lanes, measure
from train.evaluation.positions import Condition, Evaluation, table
from train.evaluation.rates import aligned, cell_tables
from train.evaluation.report import REPORT, Answers, Report, write_report
from train.evaluation.tasks import DEPTHS, default_lengths, say_answers
from train.evaluation.tracked import log_evaluation
from train.evaluation.verdict import judge
from train.reading.landmarks import choose_reading, model_vocab_size
from train.reading.remote import open_remote
from train.settings.memories import describe_memory
from train.starting.inputs import chooses_by_later_tokens
from train.tracking.progress import short

if TYPE_CHECKING:
    from model.decoder import Decoder
    from train.settings.config import Config


class Tasks(NamedTuple):
    """Which questions to ask beside the loss, and how many."""

    names: Sequence[str] = ()
    lengths: Sequence[int] = ()  # tokens
    depths: Sequence[float] = DEPTHS
    prompts: int = 32
    seed: int = 0
    pubmedqa: Path | None = None  # the folder of its files


NO_TASKS = Tasks()


def run(
    checkpoint: Path,
    data: Path | None = None,
    memory: bool = True,
    tokens: int | None = None,
    output: Path | None = None,
    tasks: Tasks = NO_TASKS,
    track: bool = False,
    changes: Sequence[str] = (),
) -> int:
    """Evaluate a checkpoint on this one process, print a table and return 0.

    checkpoint: one checkpoint's folder, or a run's for its newest good one. data: prepared
    shards (None: the run's data.valid). memory: with it, without and shuffled, for the
    differences; False: only without. tokens: about as many (None: all). output: where to write
    an HTML page, with JSON and a picture beside it. track: log to the run's MLflow run, too.
    changes: of the memory, see snapshot.read_model.

    Raises ValueError for everything that the user can mend.
    """
    from train.checkpoints.folder import choose_checkpoint
    from train.checkpoints.snapshot import load_model
    from train.huggingface.tokenizer_files import require_trained_on

    folder, manifest = choose_checkpoint(checkpoint)
    model, config = load_model(folder, manifest, changes)
    if chooses_by_later_tokens(config):
        raise ValueError(
            "granularity=tokens lets a token's choice of blocks depend on later ones, so its loss"
            " means nothing; evaluate with token_and_head or heads"
        )
    if data is None and manifest.imported:
        raise ValueError(_no_data_of(checkpoint, folder.parent.parent / TOKENIZER))
    corpus = _open_corpus(model, config, data)
    require_trained_on(folder, manifest, corpus.tokenizer_sha256, shown_folder(corpus.folder))
    # first: what does not fit is known at once
    answers = _ask(model, config, corpus, tasks, manifest.step)
    conditions = _conditions(config, memory)
    evaluation = _measure(model, config, corpus, tokens, conditions, manifest.step)
    print(f"{folder} on {corpus.folder}\n\n{table(evaluation)}\n")
    say_verdict(evaluation, print, _warn)
    has_memory = config.model.memory.name != "none"
    if memory and not has_memory:
        print("this model has no memory: every segment is read by itself")
    facts = [("checkpoint", str(folder)), ("step", f"{manifest.step:,}")]
    facts += describe(config, _parameters(model), corpus, evaluation, str(_device(model)))
    if evaluation.on is not None:
        print(costs(evaluation))
    _say_tasks(answers, judged=has_memory)
    for damage in corpus.damage:
        print(f"left out: {damage}")
    report = Report(
        title=f"{config.name}, step {manifest.step:,}",
        facts=facts,
        evaluation=evaluation,
        tasks=answers,
        notes=[f"left out: {damage}" for damage in corpus.damage],
    )
    if output is not None:
        about = {
            "checkpoint": str(folder),
            "data": str(corpus.folder),
            "fingerprint": corpus.fingerprint,
        }
        written = write_files(output, report, about)
        print(f"written: {', '.join(map(str, written))}")
    if track:
        files = written if output is not None else []
        log_evaluation(folder, manifest, config, evaluation, answers, files)
    return 0


def say_verdict(evaluation: Evaluation, say: Any, warn: Any) -> None:
    """Say the verdict and its differences, and warn where the memory is not shown to be used."""
    verdict = judge(evaluation)
    if verdict is None:
        return
    for name, text in verdict.lines():
        say(f"{name}: {text}")
    if verdict.used == "yes":
        say(str(verdict))
    else:
        warn(f"WARNING: {verdict}")


def costs(evaluation: Evaluation) -> str:
    """Return in a line what the memory takes, and how fast it was read with."""
    return (
        f"state: {evaluation.state_bytes:,} bytes a stream,"
        f" read at {short(evaluation.tokens_per_s)} tokens/s"
    )


def describe(
    config: Config, parameters: str, corpus: Corpus, evaluation: Evaluation, where: str
) -> list[tuple[str, str]]:
    """Return what was evaluated and what it cost, by name, for a report."""
    columns = evaluation.columns
    return [
        ("memory", describe_memory(config.model.memory)),
        ("parameters", parameters),
        ("state", f"{evaluation.state_bytes:,} bytes a stream, the most that one rank carried"),
        ("read with the memory on", f"{short(evaluation.tokens_per_s)} tokens/s, {where}"),
        ("segment", f"{config.data.segment_len:,} tokens"),
        ("data", f"{corpus.folder}: {counted(len(corpus.lengths), 'document')}"),
        ("data fingerprint", corpus.fingerprint),
        ("tokens predicted", f"{columns[0].tokens:,} under each condition"),
        *_coverage(evaluation),
    ]


def write_files(output: Path, report: Report, about: dict[str, Any]) -> list[Path]:
    """Write the page, the numbers as JSON and the picture, with one stem; return their paths.

    output: a file, or a folder (existing, or a name without a suffix) for report.html in it. Each
    is written beside and renamed: whoever looks, or stops this, finds the old one or the new one.
    """
    from train.tracking.picture import plot_evaluation

    if output.is_dir() or not output.suffix:
        output = output / REPORT
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [output.with_suffix(end) for end in (".html", ".json", ".png")]
    beside = [path.with_name(f".new-{path.name}") for path in files]
    page, numbers, picture = beside
    plot_evaluation(picture, report.evaluation, title=report.title)
    verdict = judge(report.evaluation)
    values = {
        **about,
        **report.evaluation.to_json(),
        "verdict": verdict.to_json() if verdict else None,
        "tasks": [task.result.to_json() for task in report.tasks],
    }
    numbers.write_text(json.dumps(values, indent=1) + "\n")
    write_report(page, report._replace(picture=picture.read_bytes()))
    for new, path in zip(beside, files, strict=True):
        new.replace(path)
    return files


def _coverage(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what share of the tokens with a past could be shuffled."""
    if evaluation.unshuffled is not None:
        return [("shuffled", evaluation.unshuffled)]
    if evaluation.on is None or evaluation.shuffled is None:
        return []
    wanted, had = (
        sum(tokens for _, tokens in losses.passages)
        for losses in (evaluation.on, evaluation.shuffled)
    )
    share = f"{had / wanted:.1%}" if wanted else "none"
    return [("shuffled", f"{share} of the tokens beyond a first segment")]


def _conditions(config: Config, memory: bool) -> Sequence[Condition]:
    if not memory:
        return ("off",)
    return ("on",) if config.model.memory.name == "none" else ALL


def _no_data_of(checkpoint: Path, tokenizer: Path) -> str:
    """Return what is said where an imported checkpoint is to be evaluated on nothing."""
    words = f" with `longhaul prepare ... --tokenizer {tokenizer}`" if tokenizer.exists() else ""
    return (
        f"{checkpoint} was imported, so it has no validation data of its own; name prepared shards"
        f" with --data FOLDER, made{words or ' with its tokenizer'}"
    )


def _open_corpus(model: Decoder, config: Config, data: Path | None) -> Corpus:
    folder = data or config.data.valid
    if folder is None:
        raise ValueError("the run has no data.valid; name prepared shards with --data FOLDER")
    corpus = Corpus.open(folder, config.data.on_damage, open_remote(config))
    if model_vocab_size(config, corpus.manifest.vocab_size) > model.config.vocab_size:
        raise ValueError(
            f"{shown_folder(folder)} has tokens up to {corpus.manifest.vocab_size - 1}, the model's"
            f" vocab_size is {model.config.vocab_size}; prepare it with the run's tokenizer"
        )
    return corpus


def _measure(
    model: Decoder,
    config: Config,
    corpus: Corpus,
    tokens: int | None,
    conditions: Sequence[Condition],
    step: int,
) -> Evaluation:
    def forward(
        tokens: Tensor, starts: Tensor, state: State, labels: Tensor, scale: Tensor
    ) -> Output:
        # step: a memory that trains in stages is read as it was then
        result: Output = model(tokens, starts, state, labels=labels, scale=scale, step=step)
        return result

    reading = choose_reading(config, model.config.vocab_size)
    return measure(
        forward,
        corpus,
        segment_len=reading.segment_len,
        prepare=reading.prepare,
        segments=config.num_segments,
        lanes=choose_lanes(len(corpus.lengths), config.train.batch_size),
        tokens=tokens,
        conditions=conditions,
        micro_batch=config.train.micro_batch,
        device=_device(model),
        workers=config.data.workers,
        progress=True,
    )


def _ask(
    model: Decoder, config: Config, corpus: Corpus, tasks: Tasks, step: int
) -> Sequence[Answers]:
    """Return the answers to the tasks' questions, hidden in the corpus's text."""
    if not tasks.names:
        return ()
    from tqdm import tqdm

    from data.tasks import corpus_texts, task_names
    from train.evaluation.answers import DecoderReader
    from train.evaluation.questions import count_prompts, run_tasks
    from train.evaluation.questions import describe as in_words

    names = task_names(tasks.names)
    reading = choose_reading(config, model.config.vocab_size)
    segment_len = reading.segment_len
    lengths = tasks.lengths or default_lengths(segment_len)
    total = count_prompts(names, lengths, tasks.depths, tasks.prompts)
    with tqdm(total=total, desc="questions", leave=False, disable=None) as bar:
        results = run_tasks(
            model,
            config,
            corpus.tokenizer(),
            names=names,
            lengths=lengths,
            depths=tasks.depths,
            prompts=tasks.prompts,
            seed=tasks.seed,
            filler=corpus_texts(corpus, 2 * (max(lengths) + segment_len)),
            pubmedqa=tasks.pubmedqa,
            segment_len=segment_len,
            prepare_batch=reading.prepare_tokens,
            reader=DecoderReader(model, step),  # a memory that trains in stages: as it was then
            done=bar.update,
        )
    return [Answers(result, in_words(result)) for result in results]


def _say_tasks(answers: Sequence[Answers], *, judged: bool) -> None:
    for found in answers:
        print()
        say_answers(found, print, _warn, judged=judged)
        for cells in cell_tables(found.result.cells)[-1:]:
            print(aligned([cells.heads, *cells.rows]))


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _parameters(model: Decoder) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def _device(model: Decoder) -> torch.device:
    return next(model.parameters()).device
