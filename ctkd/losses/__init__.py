"""One file per method; importing this package registers them all."""

from ctkd.losses.multilevelot import MultiLevelOT
from ctkd.losses.multilevelot_released import MultiLevelOTReleased
from ctkd.losses.multilevelot_sequence import MultiLevelOTSequence
from ctkd.losses.multilevelot_token import MultiLevelOTToken
from ctkd.losses.uld import ULD

__all__ = [
    "ULD",
    "MultiLevelOT",
    "MultiLevelOTReleased",
    "MultiLevelOTSequence",
    "MultiLevelOTToken",
]
