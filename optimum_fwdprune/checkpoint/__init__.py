"""Pruned checkpoints: the weights, the record and the model card, written to a folder or to the Hub."""
