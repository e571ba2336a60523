"""ctkd's own trainer, exact however steps are split: python examples/trainer.py [STUDENT TEACHER].

Everything of transformers' Trainer comes with it: devices, checkpoints, trackers, callbacks.
"""

import sys

from transformers import TrainingArguments

import ctkd
from ctkd.distill.models import load_model, load_tokenizer
from ctkd.distill.training import CrossTokenizerTrainer

student, teacher = sys.argv[1:] or ["smollm2-135m-instruct", "gemma-3-270m"]
rows = [
    {"prompt": "The capital of Norway is", "answer": " Oslo."},
    {"prompt": "Water boils at", "answer": " 100 °C."},
]
trainer = CrossTokenizerTrainer(
    load_model(student),
    TrainingArguments("runs/trainer", gradient_accumulation_steps=2, max_steps=2, logging_steps=1),
    loss=ctkd.get_loss("multilevelot", k=20),
    teacher=load_model(teacher),
    train_dataset=rows,
    processing_class=load_tokenizer(student),
    teacher_processing_class=load_tokenizer(teacher),
)
trainer.train()
