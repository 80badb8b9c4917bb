"""Running a model: layer by layer, with masks, for statistics and losses."""
