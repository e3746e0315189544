"""Tasks whose answer lies far back: does the model use what it carries?

On tokens of a small vocabulary of their own, for models trained on nothing else (train.miniatures):
`multi_fact_recall`. On text, for any model with a tokenizer: `make_prompts`.
"""

from data.streams import IGNORE
from data.tasks.filler import Filler, Unfit, corpus_texts
from data.tasks.prompt import Prompt
from data.tasks.pubmedqa import PubMedQA, read_pubmedqa
from data.tasks.recall import multi_fact_recall
from data.tasks.symbols import (
    DIGITS,
    FILLER,
    KEY,
    KEY_DIGITS,
    PASSKEY_VOCAB,
    QUERY,
    TokenTask,
    fill,
    vocab_size,
)
from data.tasks.text import (
    EXACT_TASKS,
    FACTS,
    PUBMEDQA,
    TEXT_TASKS,
    Grid,
    check_task,
    make_prompts,
    task_names,
)

__all__ = [
    "DIGITS",
    "EXACT_TASKS",
    "FACTS",
    "FILLER",
    "IGNORE",
    "KEY",
    "KEY_DIGITS",
    "PASSKEY_VOCAB",
    "PUBMEDQA",
    "QUERY",
    "TEXT_TASKS",
    "Filler",
    "Grid",
    "Prompt",
    "PubMedQA",
    "TokenTask",
    "Unfit",
    "check_task",
    "corpus_texts",
    "fill",
    "make_prompts",
    "multi_fact_recall",
    "read_pubmedqa",
    "task_names",
    "vocab_size",
]
