"""Scripts that measure, print a table, and say on what machine."""
