"""The names of the package, each imported when it is first asked for."""

from .trainer import CrossTokenizerTrainer as CrossTokenizerTrainer
