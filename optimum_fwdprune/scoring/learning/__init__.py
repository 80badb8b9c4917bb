"""Learning which units to keep: distributions over masks, and the gradients of an expected loss."""
