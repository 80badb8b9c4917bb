"""A plan carried out: the smaller model, checked, in memory or on disk."""
