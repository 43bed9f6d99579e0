"""Between published checkpoints and our parameter trees: one table of names a network."""
