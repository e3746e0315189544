"""What the settings of evaluation inside training must satisfy together."""

from __future__ import annotations

from train.settings.remedies import Rule, did_you_mean


def _eval_every(eval_every: int | None, valid: object) -> str | None:
    if eval_every is None or valid is not None:
        return None
    return f"{eval_every} needs data.valid, which is not set; give a prepared folder, or use null"


def _eval_tasks(eval_tasks: tuple[str, ...], valid: object) -> str | None:
    if not eval_tasks:
        return None
    from data.tasks import FACTS, PUBMEDQA, TEXT_TASKS

    known = [name for name in (*TEXT_TASKS[:2], FACTS, *TEXT_TASKS[2:]) if name != PUBMEDQA]
    if PUBMEDQA in eval_tasks:
        return (
            "pubmedqa needs the folder of its files, and is asked of a checkpoint only: leave it"
            " out, and run `longhaul evaluate RUN --tasks pubmedqa --pubmedqa FOLDER`"
        )
    for name in eval_tasks:
        if name not in known:
            return f"{name!r} is not one of {', '.join(known)}{did_you_mean(name, known)}"
    if valid is None:
        return (
            f"{', '.join(eval_tasks)}: questions are hidden in the text of data.valid, which is not"
            " set; give a prepared folder, or use []"
        )
    return None


EVALUATION_RULES: tuple[Rule, ...] = (
    Rule("train.eval_every", ("train.eval_every", "data.valid"), _eval_every),
    Rule("train.eval_tasks", ("train.eval_tasks", "data.valid"), _eval_tasks),
)
