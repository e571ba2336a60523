"""Cross-tokenizer knowledge distillation: losses between models that cut text differently.

>>> sorted(list_losses("uld*"))
['uld']
"""

from ctkd import losses
from ctkd.batch import Batch, Side
from ctkd.errors import CtkdError
from ctkd.logits import DenseLogits, HeadLogits, Logits, TopK, TopKLogits, map_rows
from ctkd.loss import Loss, LossOutput, Paper, Weights
from ctkd.registry import (
    LossFacts,
    describe,
    get_loss,
    get_loss_class,
    list_losses,
    register,
)

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CtkdError",
    "DenseLogits",
    "HeadLogits",
    "Logits",
    "Loss",
    "LossFacts",
    "LossOutput",
    "Paper",
    "Side",
    "TopK",
    "TopKLogits",
    "Weights",
    "describe",
    "get_loss",
    "get_loss_class",
    "list_losses",
    "losses",
    "map_rows",
    "register",
]
