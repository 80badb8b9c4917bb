"""Scores and a request turned into a plan, where models are run for it."""
