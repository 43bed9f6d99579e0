"""Attention by kernels, on TPUs and GPUs: flash attention that both modes of autodiff take."""
