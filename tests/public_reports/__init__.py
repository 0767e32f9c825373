"""What other people's public bug reports do to this package, a file for each kind of fault, named by what it shows.

More such cases stand where their fixtures are: `data/test_encoding.py` (LLaVA#1166, FastChat#1290: a tokenizer with
`▁USER`), `data/prepare/test_findings.py` (LLaMA-Factory#5329, xtuner#771: images that are never shown).
"""
