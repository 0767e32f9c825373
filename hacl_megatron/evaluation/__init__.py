"""How good a model is: by what it answers in words, and by how likely it finds what it reads. First read scores.py.

likelihood/     checkpoints at any layout: no text made   answers/        benchmarks that an exported model answers
agreement.py    is an export still the same model         journal.py      records as they come; a kill loses none
image_files.py  images of a batch, each decoded once      model_files.py  fingerprint, device and precision of a model
json_files.py   JSON lists and JSON lines, checked        scores.py       what a scorer returns; results file and table
"""
