"""The record of a pruning: its request, plan, scores and figures, as an object and as files of a checkpoint."""
