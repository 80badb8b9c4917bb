"""The request: the options of a pruning, with their defaults, help texts, allowed values and checks."""
