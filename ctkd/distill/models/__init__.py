"""Models and tokenizers: by name, from GGUF files, and their logits and texts."""

from ctkd.distill.models.loading import load_model, load_tokenizer
from ctkd.distill.models.model_logits import ModelLogits

__all__ = ["ModelLogits", "load_model", "load_tokenizer"]
