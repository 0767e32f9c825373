"""Everything that differs between a GPU and a CPU: device, backend, layer specs, attention kernels, optimiser kernels.

The rest of the program calls `start_platform` once and never asks again what it runs on.
"""
