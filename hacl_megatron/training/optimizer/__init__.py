"""The optimiser's surroundings: its rates over a run, its state in a checkpoint, the norm of what it is given.

schedule    length of a run, learning rates and lambda by samples, groups of parameters
shards      the distributed optimiser's state, saved and loaded at any layout
grad_norm   the global gradient norm without a wait for the device
image_gradients   sums over tensor-parallel ranks that share images out
"""
