"""One file per method; importing this package registers them all."""

from ctkd.losses.alm import ALM
from ctkd.losses.bpm import BPM
from ctkd.losses.gold import GOLD
from ctkd.losses.mined import MinED
from ctkd.losses.multilevelot import MultiLevelOT, MultiLevelOTSequence, MultiLevelOTToken
from ctkd.losses.multilevelot_released import MultiLevelOTReleased
from ctkd.losses.shared_kl import SharedKL
from ctkd.losses.uld import ULD

__all__ = [
    "ALM",
    "BPM",
    "GOLD",
    "ULD",
    "MinED",
    "MultiLevelOT",
    "MultiLevelOTReleased",
    "MultiLevelOTSequence",
    "MultiLevelOTToken",
    "SharedKL",
]
