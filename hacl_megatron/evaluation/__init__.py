"""How good a model is: by what it answers in words, and by how likely it finds what it reads. First read scores.py.

likelihood/     checkpoints at any layout: no text made   answers/        benchmarks that an exported model answers
watch/          every checkpoint of a run, as it comes
agreement.py        is an export still the same model     image_agreement.py  does it see the same pictures
image_files.py      images of a batch, each decoded once  journal.py          records as they come; a kill loses none
random_dialogues.py what `agreement.py` is asked about
json_files.py       JSON lists and JSON lines, checked    model_files.py      fingerprint, device, precision of a model
scores.py           what a scorer returns; results file and table
"""
