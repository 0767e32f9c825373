"""The losses, as functions of tensors: no model, no data, no flags.

contrastive.py   L_v and L_t, with the equations; read it first     row_blocks.py   their softmax in bounded memory
negatives.py     pairs of all data-parallel ranks, gathered         queue.py        pairs of earlier steps
generation.py    the language-model loss over a split vocabulary
"""
