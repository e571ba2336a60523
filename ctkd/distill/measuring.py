"""What a training run measures on held-out examples, and the history it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkd.distill.config import TrainConfig
from ctkd.distill.curves import plot_curves
from ctkd.distill.evaluation import answer, score_predictions
from ctkd.distill.metrics import write_predictions
from ctkd.distill.output_folder import OutputFolder
from ctkd.distill.progress import loss_line
from ctkd.distill.prompts import PromptForm
from ctkd.distill.tasks import Example
from ctkd.distill.trainer import CrossTokenizerTrainer

__all__ = ["CURVES", "Measure", "keep_history"]

CURVES = "curves.png"


def keep_history(folder: OutputFolder, trainer: CrossTokenizerTrainer) -> None:
    """Keep and draw what was logged, with the held-out losses at both ends of it."""
    ends = {"losses before": 0, "losses after": trainer.state.global_step}
    before, *after = [
        {"step": step, **{f"eval_{name}": value for name, value in folder.results[stage].items()}}
        for stage, step in ends.items()
        if stage in folder.results
    ]
    logged = [entry for entry in trainer.state.log_history if "eval_ce" not in entry]
    folder.keep("history", [before, *logged, *after])
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
                progress=f"{name}: answering",
            )
            file = f"predictions-{name.replace(' ', '-')}.jsonl"
            write_predictions(self.folder.path / file, predictions)
            self.folder.keep(name, score_predictions(predictions).summary())
        found = self.folder.results[name]
        self.say(
            f"{name}: F1 {found['f1']:.1f}, exact match {found['exact_match']:.1f}, "
            f"Rouge-LSum {found['rouge_lsum']:.1f}"
        )

    def losses(self, name: str, trainer: CrossTokenizerTrainer) -> None:
        if name not in self.folder.results:
            metrics = trainer.evaluate()
            losses = {
                entry.removeprefix("eval_"): value
                for entry, value in metrics.items()
                if entry == "eval_ce" or entry.startswith("eval_kd")
            }
            self.folder.keep(name, losses)
        self.say(f"{name}, held-out: {loss_line(self.folder.results[name])}")
