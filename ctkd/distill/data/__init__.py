"""Rows of a data set, as token ids of both tokenizers."""
