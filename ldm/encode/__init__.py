"""Pictures to posterior moments and captions to hidden states, once."""
