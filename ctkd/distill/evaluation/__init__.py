"""Answers to held-out prompts, their scores, and the examination of two tokenizers."""
