"""Benchmarks that a model answers in words (tools/evaluate.py --task). First read run.py, then benchmarks.py.

run.py          one benchmark, from files to results      answerer.py     an exported model answers, in batches
benchmarks.py   what each asks, takes and is scored by    pope.py         yes or no: is there such an object
chair.py        objects in captions, not in the image     amber.py        AMBER: descriptions, and yes or no
                                                          amber_nouns.py  the nouns of its descriptions
"""
