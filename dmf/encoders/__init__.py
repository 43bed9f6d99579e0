"""Frozen networks: the autoencoder of latents, and what features are measured with."""
