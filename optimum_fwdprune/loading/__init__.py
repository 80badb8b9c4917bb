"""Loading and saving models: their origin, the placement of their weights, and how they are written."""
