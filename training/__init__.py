"""How the embedded model family is made: data, models' training, distillation, evaluation."""
