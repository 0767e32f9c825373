"""Every byte of a checkpoint is read by these files, and no code in it is run.

pickles.py  pickles and torch's archives, by a list of what they may name     index.py  which part is in which file
parts.py    a tensor's chunk or an object, its checksum compared
"""
