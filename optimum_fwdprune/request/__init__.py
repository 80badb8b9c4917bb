"""The request: what a user asks for, as options with their defaults, their words and their checks."""
