"""Lightning: python examples/lightning_module.py [STUDENT TEACHER]."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader

from ctkd.distill.models import load_model, load_tokenizer
from ctkd.distill.training import Distiller


class Distillation(lightning.LightningModule):
    """A student, what compares it with its teacher, and an optimizer."""

    def training_step(self, batch):
        with torch.no_grad():
            teacher_output = teacher.to(self.device)(**distiller.teacher_inputs(batch))
        student_output = self.student(**distiller.student_inputs(batch))
        output = distiller.loss(student_output, teacher_output, batch)
        self.log_dict(dict(output.parts), batch_size=len(batch["labels"]))
        return output.value

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=5e-5)


names = sys.argv[1:] or ["smollm2-135m-instruct", "gemma-3-270m"]
student, teacher = map(load_model, names)
distiller = Distiller("multilevelot", *map(load_tokenizer, names), k=20)
rows = [{"prompt": "Water boils at", "answer": " 100 °C."}]
module = Distillation()
module.student, module.distiller = student.train(), distiller
trainer = lightning.Trainer(max_steps=2, default_root_dir="runs/lightning")
trainer.fit(module, DataLoader(rows, collate_fn=distiller.collate))
