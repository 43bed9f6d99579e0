"""The command line: a file for each verb, which parses flags and calls.

For everyone at a terminal. It may import every room; nothing imports it. `dmf.__main__` finds the
verb, `exit_codes` turns every expected failure into one line, `flags` and `config_flag` hold what
verbs share.
"""
