"""Flax NNX modules: UNet, relational network, text encoder, and the model that holds all three."""
