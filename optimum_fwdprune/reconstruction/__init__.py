"""Reconstruction: changes of the kept weights that compensate for the removed ones."""
