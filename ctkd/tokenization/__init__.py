"""Two tokenizers: the bytes of their tokens, aligned texts, and maps between vocabularies."""

import lazy_loader

# Its names stand in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
