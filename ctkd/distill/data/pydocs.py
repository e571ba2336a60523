"""Text that every Python brings along: chapters of its language reference, as `help` shows them.

They serve demonstrations that train a small model from nothing, where a few short passages would be
learned by heart. The wording changes a little from one version of Python to the next.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ctkd.errors import DataError

__all__ = ["PYDOCS", "read_pydocs"]

PYDOCS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train": (
            "assignment",
            "attribute-access",
            "calls",
            "comparisons",
            "customization",
            "import",
            "objects",
            "raise",
            "sequence-types",
            "try",
        ),
        "test": ("exceptions", "execmodel", "identifiers", "slicings"),
    }
)
"""The chapters by split, called as in ``help()``; no paragraph of one split is in the other."""


def read_pydocs(split: str) -> list[dict[str, str]]:
    """The chapters of a split, each a row with its ``topic`` and its ``text``.

    Raises:
        DataError: If this Python came without its reference.
    """
    try:
        from pydoc_data.topics import topics

        return [{"topic": name, "text": topics[name]} for name in PYDOCS[split]]
    except (ImportError, KeyError) as error:
        raise DataError(
            f"pydocs is the reference that Python brings along, which is not whole here ({error}); "
            "install the whole standard library, or name other data with --data"
        ) from error
