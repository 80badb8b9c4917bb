"""What the kept weights take over from the removed ones."""
