"""Hugging Face folders, of LLaVA's and BLIP-2's layouts. Read names.py first: every tensor has its row there.

names.py           our parameters <-> canonical names    config_read.py        config.json -> sizes of the model
spellings.py       canonical names <-> files' names      config_write.py       and back
modules.py         transformers' modules taken whole     tower_config.py       of vision towers
import_weights.py  folder -> a rank's model              export.py             parameters -> folder
weight_files.py    safetensors and .bin, slice by slice  safetensors_writer.py tensor by tensor
carried.py         tensors that only an export needs     assets/               tokenizer, processor
fresh_folder.py    a result is whole or absent           synced_file.py        a result is on the disk
json_files.py      JSON, and errors of one line          adapters/              LoRA and connectors over a base
tiled_models.py    LLaVA-NeXT's and LLaVA-OneVision's tiles
"""
