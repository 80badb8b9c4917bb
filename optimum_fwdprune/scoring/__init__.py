"""Scores of units: the methods, one file each, and the estimators that they share."""
