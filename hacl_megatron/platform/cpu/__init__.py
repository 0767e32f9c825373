"""What stands in for CUDA on a CPU: host meanings of the names that megatron-core uses, and kernels."""
