"""One page about a training."""
