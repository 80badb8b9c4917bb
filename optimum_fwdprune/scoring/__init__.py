"""Scores of units: one file per method, and the estimators that methods share."""
