"""The papers' ablations on ImageNet, repeated on the digits."""
