"""Evaluations of a checkpoint that generate nothing (tools/evaluate.py --load). First read task.py, then run.py.

task.py        items in, records out, scores of them      item_packs.py           items -> packs, results -> items
run.py         a request, from checkpoint to results      task_run.py             a task over all replicas, resumable
task_table.py  all tasks by name                          validation_tasks.py     tasks while a model trains
preference.py, retrieval.py, yesno.py (POPE): the tasks   representations.py      HACL's Figure 1 in numbers
beliefs.py     of each sample, for a page to show         representation_plots.py ... and drawn
"""
