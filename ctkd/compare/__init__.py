"""Several losses on equal terms: planned, run, analyzed and reported."""
