"""log π₀ of a likelihood objective: what the weights that a run starts from make of answers and twins.

scores.py    the file: log-likelihoods by sample, and what they are of
scoring.py   all twins through the model once, forward only, at any layout; goes on where it was killed
start.py     at a run's start: the file that is given, the one that the run keeps, or scores made now
"""
