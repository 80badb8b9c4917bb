"""Carrying out a plan: the smaller model, in memory or on disk, and its verification."""
