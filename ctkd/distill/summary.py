"""The table that a training run ends with."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from ctkd.distill.config import TrainConfig
from ctkd.distill.output_folder import OutputFolder

__all__ = ["summarize"]

_METRICS = (("f1", "F1"), ("exact_match", "exact match"), ("rouge_lsum", "Rouge-LSum"))
_MAIN_METRIC = {"qa": "f1", "summarization": "rouge_lsum", "text": "rouge_lsum"}


def summarize(folder: OutputFolder) -> str:
    """Metrics and losses before and after, speed, and where the model lies."""
    results = folder.results
    config = TrainConfig.from_mapping(folder.record["settings"])
    lines = []
    # A run with measure="nothing" has none of these.
    if "student before" in results and "student after" in results:
        lines += [_metrics(results), ""]
    if "losses before" in results and "losses after" in results:
        lines += [_losses(results, config.loss), ""]
    if "teacher" in results and "student after" in results:
        before, after = results["student before"], results["student after"]
        lines += _teacher_note(results["teacher"], before, after, _MAIN_METRIC[config.task])
    if "seconds per step" in results:
        lines.append(f"{results['seconds per step']:.2f} s per step, {results['steps']} steps")
    lines.append(f"model, settings (ctkd.json) and curves (curves.png): {folder.path}")
    return "\n".join(lines)


def _metrics(results: dict[str, Any]) -> str:
    before = results["student before"]
    columns = {"before": before, "after": results["student after"]}
    if "teacher" in results:
        columns["teacher"] = results["teacher"]
    return tabulate(
        [[title, *(found[name] for found in columns.values())] for name, title in _METRICS],
        headers=[f"held-out, {before['n']} examples", *columns],
        floatfmt=".1f",
    )


def _losses(results: dict[str, Any], loss: str) -> str:
    before, after = results["losses before"], results["losses after"]
    shown = [name for name in after if not name.startswith("kd/")]
    parts = [name for name in after if name.startswith("kd/")]
    return tabulate(
        [
            [_loss_title(name, loss), before[name], after[name]]
            for name in (*shown, *(parts if len(parts) > 1 else ()))
        ],
        headers=["held-out loss", "before", "after"],
        floatfmt=".4f",
    )


def _loss_title(name: str, loss: str) -> str:
    if name == "ce":
        return "cross-entropy (nats per token)"
    if name == "kd":
        return loss
    return f"- {name.removeprefix('kd/')}"


def _teacher_note(
    teacher: dict[str, float], before: dict[str, float], after: dict[str, float], metric: str
) -> list[str]:
    title = dict(_METRICS)[metric]
    for student, when in ((before, "before"), (after, "after")):
        if teacher[metric] < student[metric]:
            return [
                f"note: the teacher's {title} ({teacher[metric]:.1f}) is below the student's "
                f"{when} training ({student[metric]:.1f}): on this task it has little to teach. "
                "Fine-tune it first (ctkd train --loss sft --student TEACHER), or take another."
            ]
    return []
