"""What a model reads: tokens, mask, statistics, and the cache of them."""
