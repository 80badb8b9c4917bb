"""Forward passes of a model: layer by layer, with masks, and for statistics and losses."""
