"""The names of the package, each imported when it is first asked for."""

from . import batch as batch
from . import chunks as chunks
from . import divergences as divergences
from . import errors as errors
from . import logits as logits
from . import loss as loss
from . import losses as losses
from . import ops as ops
from . import ot as ot
from . import registry as registry
from . import testing as testing
from . import tokenization as tokenization
from .batch import Batch as Batch
from .batch import Side as Side
from .errors import CtkdError as CtkdError
from .logits import DenseLogits as DenseLogits
from .logits import HeadLogits as HeadLogits
from .logits import Logits as Logits
from .logits import TopK as TopK
from .logits import TopKLogits as TopKLogits
from .logits import map_rows as map_rows
from .loss import Loss as Loss
from .loss import LossOutput as LossOutput
from .loss import Paper as Paper
from .loss import Weights as Weights
from .registry import LossFacts as LossFacts
from .registry import describe as describe
from .registry import get_loss as get_loss
from .registry import get_loss_class as get_loss_class
from .registry import list_losses as list_losses
from .registry import register as register

__version__: str
