"""A model's next-token distributions and the queries that a loss may make of them."""

from ctkd.logits.base import Logits
from ctkd.logits.dense import DenseLogits
from ctkd.logits.head import HeadLogits
from ctkd.logits.rows import AlignedValues, RowLogits, map_rows
from ctkd.logits.top_k import TopK, TopKLogits

__all__ = [
    "AlignedValues",
    "DenseLogits",
    "HeadLogits",
    "Logits",
    "RowLogits",
    "TopK",
    "TopKLogits",
    "map_rows",
]
