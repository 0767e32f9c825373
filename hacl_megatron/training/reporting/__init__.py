"""What a user sees of a run.

metrics.py       terminal, TensorBoard, metrics.jsonl, Weights & Biases     scalars.py    numbers under their tags
step_time.py     which rank the others wait for                             profiling.py  torch.profiler traces
bad_samples.py   bad_samples.jsonl                                          status.py     run_status.json
doubts.py        flags that are seldom meant
run_files.py     all of these read back by tools/show_run.py                run_view.py   in words and small curves
"""
