"""Cross-tokenizer knowledge distillation: losses between models that cut text differently.

>>> import ctkd
>>> ctkd.list_losses("uld*")
['uld']
"""

import lazy_loader

# Its names stand in __init__.pyi. The command line shows its help without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
