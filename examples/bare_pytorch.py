"""A training loop of one's own: python examples/bare_pytorch.py [STUDENT TEACHER]."""

import sys

import torch
from torch.utils.data import DataLoader

from ctkd.distill.models import load_model, load_tokenizer
from ctkd.distill.training import Distiller

names = sys.argv[1:] or ["smollm2-135m-instruct", "gemma-3-270m"]
device = "cuda" if torch.cuda.is_available() else "cpu"
student, teacher = (load_model(name, device=device) for name in names)
distiller = Distiller("multilevelot", *map(load_tokenizer, names), k=20).to(device)
rows = [
    {"prompt": "The capital of Norway is", "answer": " Oslo."},
    {"prompt": "Water boils at", "answer": " 100 °C."},
]
loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=distiller.collate)
optimizer = torch.optim.AdamW(student.train().parameters(), lr=5e-5)
for batch in loader:
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        teacher_output = teacher(**distiller.teacher_inputs(batch))
    output = distiller.loss(student(**distiller.student_inputs(batch)), teacher_output, batch)
    output.value.backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(part.item(), 4) for name, part in output.parts.items()})
