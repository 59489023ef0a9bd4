"""Training of the embedded model family: data, training, distillation, evaluation."""
