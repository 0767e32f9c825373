"""Checkpoints of a run: a SAVE folder, whose layout is in folder.py. Read that first, then save.py.

save.py         the saver of a run, in the background of all ranks      local_parts.py  which parts a rank writes
publish.py      where files become a checkpoint, and it the latest      part_files.py   .distcp files and their index
load.py         a checkpoint into a state dict of megatron-core         frozen.py       weights written once a run
choose.py       which checkpoint is loaded, if the newest is damaged    integrity.py    sizes, checksums, damage
retain.py       which old checkpoints are deleted                       whole.py        a copy without frozen/ beside it
extra_states.py what layers of another kind saved beside their tensors
stored/         every byte of a checkpoint is read by these: no code in it is run, a changed bit is found
"""
