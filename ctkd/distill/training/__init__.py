"""Training runs, on top of `transformers.Trainer`."""

import lazy_loader

# Its names stand in __init__.pyi. `transformers.Trainer` takes seconds to load.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
