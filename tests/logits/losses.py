"""Losses in the forms in which they ask their logits something else."""

import ctkd
from ctkd.testing import make_pair
from tests.logits.cases import V, W

LOSSES = {
    "alm": {},
    "alm_debiased": {"debias": True},
    "bpm": {},
    "gold": {},
    "gold_observed": {"merging": "observed"},
    "mined": {},
    "mined_dense": {"form": "dense"},
    "multilevelot": {"k": 3},
    "multilevelot_token": {"k": 3},
    "multilevelot_sequence": {"k": 3},
    "multilevelot_released": {},
    "shared_kl": {"rest": "class"},
    "uld": {},
    "uld_top": {"top_k": 3, "pairing": "chunk"},
}


def loss_of(case: str, sizes: tuple[int, int] = (V, W)) -> ctkd.Loss:
    """A loss of vocabularies of these sizes."""
    name = case if case.startswith("multilevelot") or case == "shared_kl" else case.split("_")[0]
    return ctkd.get_loss(name, pair=make_pair(*sizes), **LOSSES[case])
