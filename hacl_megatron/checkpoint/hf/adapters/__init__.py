"""Folders that hold a part of a model, to be read over a base: LoRA as `peft` and LLaVA write it, and connectors.

settings.py  adapter_config.json, of which whatever changes the model is obeyed or refused
low_rank.py  one matrix's A and B, laid into its slices as they are read
folder.py    the folder's tensors over the base's
"""
