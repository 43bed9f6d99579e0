"""Files of parameters: checkpoints of runs, exports, and checkpoints of other projects.

For those who bring checkpoints in and take them out. It imports `dmf.sampling` (for exports that
sample), `dmf.data`, `dmf.models`, `dmf.objectives` and what lies below them.
"""
