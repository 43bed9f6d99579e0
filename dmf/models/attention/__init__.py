"""Attention, as plain JAX operations and as kernels for TPUs and NVIDIA GPUs.

`attention` holds the function that networks call and the choice of its implementation; the other
files hold the implementations. Flash attention of the libraries has no forward mode, which MeanFlow
needs: `forward_mode` adds it, with the kernel of `jvp_kernel`. For those who write kernels; a
network needs `attention.attention` alone. It imports `dmf.runtime.sharding` and `dmf.errors`.
"""
