"""Distillation: data, models, teachers, training and evaluation."""
