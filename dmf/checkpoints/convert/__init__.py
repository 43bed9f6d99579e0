"""Conversion of the checkpoints of other projects to parameter trees, and back.

For those who publish parameters or start from published ones. Each network has a table of tensor
names in one file of `tables`. The readers of PyTorch files and pickles run nothing that a file
holds.
"""
