"""The options of a request that a sweep can have several values of."""

# The budgets, and whether a larger value removes more.
BUDGETS = {
    "sparsity": True,
    "target_parameters": False,
    "target_bytes": False,
    "target_memory": False,
    "target_speedup": True,
}

# The other options, in the order of the loops.
OTHERS = ("seed", "method", "reconstruction")
