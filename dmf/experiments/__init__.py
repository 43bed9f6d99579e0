"""Many runs: sweeps that start them, and reports that compare them.

For those who run and compare experiments. `sweeps` names the runs of a sweep, `local_launcher` and
`slurm_launcher` start them; `runs` reads the directories of runs, `tables`, `plots` and
`html_report` show them, and `evaluation_report` compares files of `dmf evaluate`. It imports
`dmf.training` (which files a run has), `dmf.evaluation` (the metrics) and what lies below them.
"""
