"""Gradients that scores are made of: from forward passes, and exact ones as the control."""
