"""Trainable networks: Linen inside, `init` and `apply` outside."""
