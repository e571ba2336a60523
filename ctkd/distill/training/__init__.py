"""Training runs, on top of `transformers.Trainer`."""

from ctkd.distill.training.trainer import CrossTokenizerTrainer

__all__ = ["CrossTokenizerTrainer"]
