"""Teachers whose answers are kept on disk."""
