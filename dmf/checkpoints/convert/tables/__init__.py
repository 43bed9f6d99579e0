"""The tensor names of published checkpoints: one file for each network, with a tuple `NAMINGS`.

For those who bring in the checkpoints of another project. Every file of this folder is read, so a
new network needs a file here and no other line. A file imports its network, `name_tables` and
`dmf.errors`.
"""
