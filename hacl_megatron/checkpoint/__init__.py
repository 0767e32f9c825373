"""Weights and runs on disk: Hugging Face's files, this trainer's checkpoints, and the ways between the two.

hf/       Hugging Face folders in and out, tensor by tensor; the one table of names (`hf.names`)
run/      SAVE folders of a run: written while it trains, loaded at any layout; begin with run/folder.py
convert/  checkpoints of a run from Hugging Face and back, without a GPU or a process group

Each may import those above it here, never one below.
"""
