"""Conversions between Hugging Face folders and checkpoints of a run; memory does not grow with the model.

hf_to_megatron.py  Hugging Face -> checkpoint     writer.py        plan of chunks, and the threads that write them
megatron_to_hf.py  checkpoint -> Hugging Face     reader.py        one parameter of a checkpoint at a time
lora_export.py     LoRA merged, or for peft       metadata.py      `.metadata`, read without running its code
describe.py        what a folder holds, and how   stored_names.py  our names -> keys of a checkpoint
                   two of them differ             freed_memory.py, prefetch.py   for speed
"""
