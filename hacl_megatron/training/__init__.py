"""Training: from a resolved configuration to a finished run.

build.py        makes every part of a run and trains it; read it first, then loop.py, then step.py
loop.py         load, step, log, evaluate, save; when to stop and when to give up
step.py         the mathematics of one optimiser step          contrast.py   its contrastive part, in three ways
packs.py        what runs ahead of the main pass, and why      flops.py      what a step needs
sample_cost.py  what a sample costs, to deal them out evenly
trainee.py      module, wrapped, with optimiser                schedule.py   optimiser, groups, rates, the clamp
state.py        what a checkpoint holds beside weights         optimizer_shards.py   the distributed optimiser's part
saving.py       when checkpoints are written                   validation.py losses on held-out batches
signals.py      wishes to stop                                 watchdog.py   ends a process that hangs
reporting/      what a user sees: metrics, status, traces
"""
