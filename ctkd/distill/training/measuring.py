"""Measurements of a training run on held-out examples, its history, and its summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.distill.config import TrainConfig
from ctkd.distill.data.collator import StoredTeacher
from ctkd.distill.data.encoding import EncodedSide
from ctkd.distill.data.prompts import PromptForm
from ctkd.distill.data.tasks import Example, get_task
from ctkd.distill.evaluation.bits import text_bits
from ctkd.distill.evaluation.evaluate import answer, score_predictions
from ctkd.distill.evaluation.metrics import (
    BITS_PER_BYTE,
    GIVEN_BITS,
    METRICS,
    Metric,
    Prediction,
    write_predictions,
)
from ctkd.distill.models.model_logits import ModelLogits
from ctkd.distill.processes import is_first
from ctkd.distill.teachers.texts import TeacherTexts
from ctkd.distill.training.curves import plot_curves
from ctkd.distill.training.output_folder import RECORD, OutputFolder
from ctkd.distill.training.progress import loss_line
from ctkd.distill.training.trainer import CrossTokenizerTrainer
from ctkd.errors import OutputError

__all__ = ["CURVES", "Measure", "keep_history", "losses_table", "metrics_table", "summarize"]

CURVES = "curves.png"


def keep_history(folder: OutputFolder, trainer: CrossTokenizerTrainer) -> None:
    """Keep and draw what was logged, with the held-out losses at both ends of it."""
    ends = {
        "losses before": {"step": 0, "seconds": 0.0},
        "losses after": {"step": trainer.state.global_step, "seconds": trainer.clock.total},
    }
    measured: list[dict[str, Any]] = [
        {**when, **{f"eval_{name}": value for name, value in folder.results[stage].items()}}
        for stage, when in ends.items()
        if stage in folder.results
    ]
    ended = {entry["step"] for entry in measured}
    logged = [
        entry
        for entry in trainer.state.log_history
        if "eval_ce" not in entry or entry["step"] not in ended
    ]
    first = [entry for entry in measured if entry["step"] == 0]
    last = [entry for entry in measured if entry["step"] > 0]
    folder.keep("history", [*first, *logged, *last])
    if is_first():
        plot_curves(folder.results["history"], folder.path / CURVES)


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """Measures on held-out examples, each once, also when a run is resumed."""

    config: TrainConfig
    folder: OutputFolder
    held_out: Sequence[Example]
    say: Callable[[str], None]

    def metrics(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        form: PromptForm,
    ) -> None:
        if name not in self.folder.results:
            predictions = answer(
                model,
                tokenizer,
                self.held_out,
                max_new_tokens=self.config.max_new_tokens,
                form=form,
                one_line=get_task(self.config.task).one_line,
                progress=f"{name}: answering",
            )
            self._keep(name, predictions)
        self._say(name)

    def written(
        self,
        name: str,
        texts: TeacherTexts,
        tokenizer: PreTrainedTokenizerBase,
        form: PromptForm,
    ) -> None:
        """Score what a model wrote earlier, if it wrote to every held-out prompt."""
        if texts.max_new_tokens != self.config.max_new_tokens:
            self.say(
                f"{name}: its stored answers have up to {texts.max_new_tokens} tokens, not "
                f"{self.config.max_new_tokens}, not scored"
            )
            return
        prompts = form.ids(tokenizer, self.held_out, side=name)
        answers = [texts.text(prompt) for prompt in prompts]
        if None in answers:
            self.say(
                f"{name}: {answers.count(None)} held-out prompts have no stored answer, not scored"
            )
            return
        predictions = [
            Prediction(
                prediction=text or "", id=one.id, references=one.references, prompt=one.prompt
            )
            for text, one in zip(answers, self.held_out, strict=True)
        ]
        if name not in self.folder.results:
            self._keep(name, predictions)
        self._say(name)

    def bits(
        self,
        name: str,
        asked: ModelLogits | StoredTeacher,
        sides: Sequence[EncodedSide],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Measure the bits of the held-out texts, or of the answers that the data give.

        They are in a model's ids. What it answered was measured before.
        """
        results = self.folder.results.get(name, {})
        metric = GIVEN_BITS if get_task(self.config.task).answered else BITS_PER_BYTE
        if metric not in results:
            bits = text_bits(asked, tokenizer, self.held_out, sides, progress=f"{name}: reading")
            bits.write(self.folder.path / f"bits-{name.replace(' ', '-')}.jsonl")
            summary = bits.summary()
            results = {**summary, **results, metric: summary[BITS_PER_BYTE]}
            if metric == GIVEN_BITS:
                del results[BITS_PER_BYTE], results["bytes"]
            self.folder.keep(name, results)
        self.say(f"{name}: {results[metric]:.4f} {METRICS[metric].title}")

    def _keep(self, name: str, predictions: Sequence[Prediction]) -> None:
        file = f"predictions-{name.replace(' ', '-')}.jsonl"
        write_predictions(self.folder.path / file, predictions)
        self.folder.keep(name, score_predictions(predictions).summary())

    def _say(self, name: str) -> None:
        scores = self.folder.results[name]
        self.say(
            f"{name}: F1 {scores['f1']:.1f}, exact match {scores['exact_match']:.1f}, "
            f"Rouge-LSum {scores['rouge_lsum']:.1f}"
        )

    def losses(self, name: str, trainer: CrossTokenizerTrainer) -> None:
        if name not in self.folder.results:
            self.say(f"measuring {name} on the held-out examples")
            metrics = trainer.evaluate()
            losses = {
                entry.removeprefix("eval_"): value
                for entry, value in metrics.items()
                if entry == "eval_ce" or entry.startswith("eval_kd")
            }
            self.folder.keep(name, losses)
        self.say(f"{name}, held-out: {loss_line(self.folder.results[name])}")


def summarize(folder: OutputFolder) -> str:
    """Metrics and losses before and after, speed, and where the model lies.

    Raises:
        OutputError: If ``ctkd.json`` was changed by others.
    """
    try:
        return _summary(folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(
            f"{folder.path / RECORD} holds results that ctkd did not write; restore it, or start "
            "anew with --overwrite"
        ) from error


def _summary(folder: OutputFolder) -> str:
    results = folder.results
    config = TrainConfig.from_mapping(folder.record["settings"])
    lines = []
    # A run with measure="nothing" has none of these.
    if "student before" in results and "student after" in results:
        lines += [metrics_table(results), ""]
    if "losses before" in results and "losses after" in results:
        lines += [losses_table(results, config.loss), ""]
    if "student before" in results and "student after" in results:
        name = get_task(config.task).metrics[0]
        scores: dict[str, float] = {
            stage: results[stage][name]
            for stage in ("student before", "student after", "control", "teacher")
            if name in results.get(stage, ())
        }
        lines += _gap(scores, METRICS[name], config)
    if "seconds per step" in results:
        lines.append(f"{results['seconds per step']:.2f} s per step, {results['steps']} steps")
    lines.append(f"model, settings (ctkd.json) and curves (curves.png): {folder.path}")
    return "\n".join(lines)


def metrics_table(results: dict[str, Any], form: str = "simple") -> str:
    """Metrics of the student before and after, of the control and of the teacher.

    Args:
        results: Of a run that measured all.
        form: As tabulate names it.
    """
    before = results["student before"]
    columns = {"before": before, "after": results["student after"]}
    for name in ("control", "teacher"):
        if name in results:
            columns[name] = results[name]
    return tabulate(
        [
            [
                metric.title,
                *(
                    f"{scores[name]:.{metric.digits}f}" if name in scores else ""
                    for scores in columns.values()
                ),
            ]
            for name, metric in METRICS.items()
            if name in before
        ],
        headers=[f"held-out, {before['n']} examples", *columns],
        disable_numparse=True,
        colalign=["left", *("right" for _ in columns)],
        tablefmt=form,
    )


def losses_table(results: dict[str, Any], loss: str, form: str = "simple") -> str:
    """Held-out cross-entropy and loss before and after, as `metrics_table` does it."""
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
        tablefmt=form,
    )


def _loss_title(name: str, loss: str) -> str:
    if name == "ce":
        return "cross-entropy (nats per token)"
    if name == "kd":
        return loss
    return f"- {name.removeprefix('kd/')}"


def _gap(scores: dict[str, float], metric: Metric, config: TrainConfig) -> list[str]:
    """Say what share of the way from the student to the teacher was gone, and through what."""
    before, after = scores["student before"], scores["student after"]
    control, title = scores.get("control"), metric.title
    lines = []
    if control is not None:
        change = after - control + 0.0
        lines.append(f"{config.loss} changed {title} by {change:+.4g} (after, less control)")
    elif config.distils:
        lines.append(f"--control tells what {config.loss} contributed")
    if "teacher" not in scores:
        return lines
    teacher = scores["teacher"]
    gap = metric.gain(before, teacher)
    if gap <= 0:
        return [
            *lines,
            f"note: the teacher's {title} ({teacher:.4g}) is no better than the student's before "
            f"training ({before:.4g}): on this task it has little to teach. Fine-tune it first "
            "(ctkd train --loss sft --student TEACHER), or take another.",
        ]
    share = metric.gain(before, after) / gap
    closed = f"{_share(share)} of the gap in {title} to the teacher was closed"
    if control is not None:
        without = metric.gain(before, control) / gap
        points = round(100 * metric.gain(control, after) / gap, 1) + 0.0
        closed += f", {_share(without)} without {config.loss}: it contributed {points:+.1f} points"
    if metric.gain(teacher, after) > 0:
        closed += (
            f"; note: the student's {title} ({after:.4g}) has passed the teacher's "
            f"({teacher:.4g}), what lies beyond it comes from the data"
        )
    return [closed, *([] if control is not None else lines)]


def _share(value: float) -> str:
    # Rounded first: a share of -0.0 is none.
    return f"{round(value, 3) + 0.0:.1%}"
