"""Many runs: sweeps that start them, and reports that compare them.

For those who run and compare experiments. `sweeps` names the runs of a sweep, `local_launcher` and
`slurm_launcher` start them; `runs` reads the directories of runs, `tables` and `html_report` show
them; `evaluation_report` and `guidance_search` compare files of `dmf evaluate` and draw them with
`plots`. It imports
`dmf.training` (which files a run has), `dmf.evaluation` (the metrics) and what lies below them.
"""
