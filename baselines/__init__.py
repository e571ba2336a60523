"""Slow references that the losses of the package are measured against.

Two kinds of module live here, and none of them imports the package:

* Oracles, in float64: loops over sequences and tokens written from the equations of the papers,
  with POT for what is a transport problem and scipy for the assignment. They are differentiable,
  so they give gradients as well as values. Speed is no concern.
* As-published versions, in any floating-point type: plain batched torch that computes what the
  authors' released files compute, oddities included. They double as the speed baseline.

The oracles take lists of already sliced rows, one entry per sequence: ``student[b]`` of shape
(S_b, V) and ``teacher[b]`` of shape (T_b, W), raw logits that predict the answer tokens. The
as-published versions take padded batches and labels with -100, as their originals do.

This directory is not part of the wheel.
"""
