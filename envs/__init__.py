"""Pure-functional cooperative games; knows nothing of `knife_jax`."""
