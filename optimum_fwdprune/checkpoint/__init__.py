"""A pruned checkpoint as a whole: its files with the model card, in a folder and on the Hub."""
