"""The command line: a file for each verb, which parses flags and calls.

For everyone at a terminal; and for Python, where `dmf` exports the functions that verbs call and
`load`. It may import every room; nothing else imports it. `dmf.__main__` finds the
verb, `exit_codes` turns every expected failure into one line, `flags` and `config_flag` hold what
verbs share.
"""

# What each verb does, in the order of `dmf --help`.
VERBS = {
    "prepare": "make a dataset of latents or crops from images",
    "config": "print a config with the meaning of every field",
    "components": "list the components that a config may choose, with their fields",
    "compile": "compile the training step ahead of time: memory, communication, FLOPs",
    "train": "train a flow model, MeanFlow or a flow map",
    "sweep": "train many runs: here, under SLURM, or as printed commands",
    "sample": "generate images from a run or an export",
    "evaluate": "measure how far samples are from the data",
    "convert": "convert a checkpoint of another project",
    "export": "export parameters: Orbax, safetensors or StableHLO",
    "report": "write a report of runs, or a table of evaluations",
    "completion": "print a script that completes commands in bash or zsh",
}
