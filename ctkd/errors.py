"""Every exception ctkd raises on purpose.

CtkdError
├── UnknownLossError    (also LookupError)  no loss has that name
├── DuplicateLossError  (also ValueError)   two losses claim one name
├── PluginError         (also ImportError)  a loss of others cannot be loaded or used
├── SettingError        (also ValueError)   a setting is unknown or out of range
├── BatchError          (also ValueError)   a batch lacks or contradicts something
├── DataError           (also ValueError)   a data file or one of its rows cannot be used
├── ModelError          (also ValueError)   a model cannot be found, fetched or loaded
├── TrainingError       (also ArithmeticError) a logit, a loss or a weight is not finite
└── OutputError         (also OSError)      an output folder cannot be used
"""

__all__ = [
    "BatchError",
    "CtkdError",
    "DataError",
    "DuplicateLossError",
    "ModelError",
    "OutputError",
    "PluginError",
    "SettingError",
    "TrainingError",
    "UnknownLossError",
]


class CtkdError(Exception):
    """Base class, so that callers can catch all of ctkd's errors at once."""


class UnknownLossError(CtkdError, LookupError):
    """No loss is registered under that name."""


class DuplicateLossError(CtkdError, ValueError):
    """A second loss claims a name that is taken."""


class PluginError(CtkdError, ImportError):
    """A loss from elsewhere cannot be loaded, or breaks the rules that every loss keeps."""


class SettingError(CtkdError, ValueError):
    """A setting is unknown, or its value lies outside the valid range."""


class BatchError(CtkdError, ValueError):
    """A batch lacks a field, or its shapes, dtypes or devices disagree."""


class DataError(CtkdError, ValueError):
    """A data file cannot be read, or a row lacks what the task needs."""


class ModelError(CtkdError, ValueError):
    """A model cannot be found, fetched, loaded or used."""


class TrainingError(CtkdError, ArithmeticError):
    """Training cannot go on: a logit, a loss or a weight is nan or infinite."""


class OutputError(CtkdError, OSError):
    """An output folder exists already, or cannot be written."""
