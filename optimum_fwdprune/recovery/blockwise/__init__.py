"""Distillation by blocks: one decoder layer after the other is trained towards the dense model's hidden states."""
