"""What training and evaluation both need, put together from data, model and checkpoint.

run.py          `Run`: configuration, layout, groups, device       processes.py   megatron-core's process groups
start_from.py   which checkpoint, whose sizes, whose tokenizer     module.py      this rank's model, filled
exchange.py     micro-batches from the rank that read them         forward.py     packs through the pipeline
parameters.py   every parameter of a rank, without building it     same_run.py    what all ranks must have the same
"""
