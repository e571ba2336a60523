"""Models and tokenizers: by name, from GGUF files, and their logits and texts."""

from ctkd.distill.models.loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
