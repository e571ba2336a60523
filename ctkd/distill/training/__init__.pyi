"""The names of the package, each imported when it is first asked for."""

from .distiller import Distiller as Distiller
from .distiller import DistillerOutput as DistillerOutput
from .trainer import CrossTokenizerTrainer as CrossTokenizerTrainer
