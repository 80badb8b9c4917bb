"""What is known of a pruning: its request, plan, scores and figures, as objects and as files of a checkpoint."""
