"""Evaluation beside a run: every checkpoint that it leaves is exported and scored. First read run.py.

run.py          waits for checkpoints, and knows when it is over   one_checkpoint.py   from a checkpoint to its scores
curves.py       scores as curves of TensorBoard                    best.py             the best export, kept

OUT/scores.jsonl                       one line a checkpoint that is done; the lock, too
OUT/iter_0000100-0123456789abcdef/     its results and answers, one file a task
"""
