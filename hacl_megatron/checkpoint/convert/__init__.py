"""Conversions between Hugging Face folders and checkpoints of a run; memory does not grow with the model.

hf_to_megatron.py  Hugging Face -> checkpoint     writer.py        plan of chunks, and the threads that write them
megatron_to_hf.py  checkpoint -> Hugging Face     reader.py        one parameter of a checkpoint at a time
lora_export.py     LoRA merged, or for peft       stored_names.py  our names -> keys of a checkpoint
describe.py        what a folder holds, and how   freed_memory.py, prefetch.py   for speed
                   two of them differ             model_card.py    README.md of an export
"""
