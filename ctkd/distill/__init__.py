"""What needs transformers: models, tasks, data, training and evaluation."""
