"""transformers' own Trainer: python examples/transformers_trainer.py [STUDENT TEACHER]."""

import sys

import torch
from transformers import Trainer, TrainingArguments

from ctkd.distill.models import load_model, load_tokenizer
from ctkd.distill.training import Distiller


class Distillation(Trainer):
    """A trainer whose loss is the distiller's."""

    loss_is_scaled_for_ga = False  # it is a mean over one micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            teacher_output = teacher.to(model.device)(**distiller.teacher_inputs(inputs))
        output = model(**distiller.student_inputs(inputs))
        loss = distiller.loss(output, teacher_output, inputs).value
        return (loss, output) if return_outputs else loss


names = sys.argv[1:] or ["smollm2-135m-instruct", "gemma-3-270m"]
student, teacher = map(load_model, names)
distiller = Distiller("multilevelot", *map(load_tokenizer, names), k=20)
rows = [{"prompt": "Water boils at", "answer": " 100 °C."}]
arguments = TrainingArguments(
    "runs/transformers", remove_unused_columns=False, max_steps=2, logging_steps=1
)
trainer = Distillation(student, arguments, distiller.collate, train_dataset=rows)
trainer.train()
