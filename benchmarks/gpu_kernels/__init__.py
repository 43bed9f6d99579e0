"""The attention kernel for NVIDIA GPUs as its machine code shows it, without a GPU."""
