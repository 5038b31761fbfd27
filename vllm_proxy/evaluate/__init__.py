"""Scores of a configuration's systems, measured with lm-evaluation-harness.

`systems` lists what is compared, `tasks` loads the tasks, `lm` makes an engine a model of the
harness, `tuned` starts the directly tuned model, `run` runs every system, and `scores` prints the
scores side by side. Knows lm-eval; not terminals.
"""
