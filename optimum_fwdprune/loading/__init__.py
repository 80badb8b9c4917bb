"""Models from a folder or the Hub, and back into one: their origin, where their weights lie, how they are written."""
