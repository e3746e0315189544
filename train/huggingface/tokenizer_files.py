"""The files beside a model's weights: its tokenizer, and what belongs to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer, load_tokenizer
from data.urls import shown_folder
from data.wide import WideCorpus
from train.checkpoints.manifest import Manifest
from train.reading.remote import open_remote
from train.settings.config import Config

TOKENIZER = "tokenizer.json"
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_OF_MODEL = ("config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
NONE = "none"
"""What an option says to go without a tokenizer."""


class Words(NamedTuple):
    """A tokenizer, and the folder whose other files belong to it."""

    tokenizer: Tokenizer
    folder: Path | None


def open_words(path: Path) -> Words:
    """Return the tokenizer in a file, or in a folder as `tokenizer.json`."""
    folder = path if path.is_dir() else path.parent
    file = path / TOKENIZER if path.is_dir() else path
    return Words(load_tokenizer(str(file)), folder if file.name == TOKENIZER else None)


def imported_words(source: Path, option: str | None, vocab_size: int) -> Words | None:
    """Return the tokenizer to import with a model: the source's, another, or none.

    Raises ValueError where there is no tokenizer, or it has more ids than the model.
    """
    if option == NONE:
        return None
    if option is None and not (source / TOKENIZER).exists():
        raise ValueError(
            f"{source} has no {TOKENIZER}, and data must be prepared with the model's own"
            " tokenizer; write it with AutoTokenizer.from_pretrained(FOLDER).save_pretrained"
            "(ANOTHER) of transformers and name it by --tokenizer ANOTHER, or go without by"
            f" --tokenizer {NONE}"
        )
    words = open_words(source if option is None else Path(option))
    require_ids(words.tokenizer, vocab_size)
    return words


def require_ids(words: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError where a tokenizer has ids that the model has no rows for."""
    if words.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {words.vocab_size} ids (its end of a document among them), and the"
            f" model has {vocab_size}: it belongs to another model; name the right one by"
            " --tokenizer FILE"
        )


def copy_beside(words: Words, source: Path, output: Path) -> None:
    """Write the tokenizer into output, and copy what belongs to it and to the model."""
    (output / TOKENIZER).write_text(words.tokenizer.to_json())
    _copy(_COMPANIONS, words.folder, output)
    _copy(_OF_MODEL, source, output)


def imported_home(checkpoint: Path) -> Path | None:
    """Return the imported folder that a checkpoint, or its run folder, is of; else None."""
    folder = checkpoint.parent.parent if checkpoint.name.startswith("step-") else checkpoint
    return folder if (folder / TOKENIZER).is_file() else None


def require_same_tokenizer(
    checkpoint: Path, manifest: Manifest, sha256: str, given: str, remedy: str
) -> None:
    """Raise ValueError where a tokenizer is not the one that a checkpoint's model was trained with.

    Ids would fit, and stand for other words. A checkpoint of an older longhaul does not say its
    own: then an imported model's file does, and without one nothing is compared. sha256: of the
    tokenizer's text. given, remedy: the message's beginning, and its end before --tokenizer.
    """
    if manifest.tokenizer_sha256 == sha256:
        return
    home = imported_home(checkpoint)
    kept = None if home is None else open_words(home).tokenizer.sha256
    trained = manifest.tokenizer_sha256 or kept
    if trained is None or trained == sha256:
        return
    file = home / TOKENIZER if home is not None and kept == trained else "FILE"
    raise ValueError(
        f"{given} another tokenizer (sha256 {sha256[:12]}) than {checkpoint} was trained with"
        f" (sha256 {trained[:12]}): its ids stand for other words; {remedy} --tokenizer {file}"
    )


def require_trained_on(checkpoint: Path, manifest: Manifest, sha256: str, corpus: str) -> None:
    """Raise ValueError where a corpus was prepared with another tokenizer than a checkpoint's.

    sha256: of the corpus's tokenizer; corpus: its name.
    """
    given, remedy = f"{corpus} was prepared with", "prepare it with the model's own,"
    require_same_tokenizer(checkpoint, manifest, sha256, given, remedy)


def exported_words(checkpoint: Path, config: Config, option: str | None) -> Words | None:
    """Return the tokenizer to export with a checkpoint.

    One that is named, that of the imported model, or that of the run's data; of a run that began
    from an imported model with its tokenizer, that one, for the files beside it. Raises ValueError
    where none is found.
    """
    if option == NONE:
        return None
    if option is not None:
        return open_words(Path(option))
    if (home := imported_home(checkpoint)) is not None:
        return open_words(home)
    words = _of_data(config)
    start = config.model.init_from
    home = None if start is None else imported_home(start)
    if home is not None:
        first = open_words(home)
        if words is None or words.sha256 == first.tokenizer.sha256:
            return first
    if words is None:
        raise ValueError(
            f"the run's tokenizer lies in its data, {shown_folder(config.corpora[0].path)}, which"
            " cannot be read; name the same one by --tokenizer FILE, or go without by --tokenizer"
            f" {NONE}"
        )
    return Words(words, None)


def _of_data(config: Config) -> Tokenizer | None:
    for folder in (config.corpora[0].path, config.data.valid):
        try:
            if folder is not None:  # wide: its index is not needed
                return WideCorpus.open(folder, remote=open_remote(config)).tokenizer()
        except (OSError, ValueError):
            continue
    return None


def write_words(words: Words, output: Path, max_len: int) -> None:
    """Write the files that `AutoTokenizer` reads."""
    text = words.tokenizer.to_json()
    (output / TOKENIZER).write_text(text)
    _copy(_COMPANIONS, words.folder, output)
    if not (output / "tokenizer_config.json").exists():
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _text_of(text, words.tokenizer.end_of_document),
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_len,
        }
        write_json(output / "tokenizer_config.json", values)


def special_ids(words: Words | None) -> dict[str, Any]:
    """Return the ids of special tokens for config.json: the imported model's, or the data's end."""
    if words is None:
        return {}
    published = _published(words)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: published[name] for name in names if name in published}
    return {"eos_token_id": words.tokenizer.end_of_document, **found}


def longest(words: Words | None, seen: int) -> int:
    """Return the tokens that a model reads at once: what it has seen, or the imported one's."""
    published = {} if words is None else _published(words)
    known = published.get("max_position_embeddings")
    return max(seen, known) if isinstance(known, int) else seen


def _published(words: Words) -> dict[str, Any]:
    """Return the config.json beside a tokenizer."""
    if words.folder is None or not (words.folder / "config.json").is_file():
        return {}
    values: dict[str, Any] = json.loads((words.folder / "config.json").read_text())
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as people read them."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def _copy(names: tuple[str, ...], source: Path | None, output: Path) -> None:
    for name in names:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def _text_of(tokenizer_json: str, token: int) -> str | None:
    added = json.loads(tokenizer_json).get("added_tokens", [])
    return next((item["content"] for item in added if item["id"] == token), None)
