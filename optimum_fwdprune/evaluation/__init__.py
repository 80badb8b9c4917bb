"""How good and how fast a model is, dense or pruned."""

from .latency import Speed, measure_speed
from .perplexity import perplexity, window_losses


__all__ = ["Speed", "measure_speed", "perplexity", "window_losses"]
