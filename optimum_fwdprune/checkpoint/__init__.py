"""What a pruned checkpoint is on disk and on the Hub: its record, its base, its upload."""
