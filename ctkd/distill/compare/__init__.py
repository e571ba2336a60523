"""Several losses on one task, on equal terms."""
