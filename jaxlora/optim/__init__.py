"""F3: optax optimizers and learning-rate schedules under the names configurations use."""
