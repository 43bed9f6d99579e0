"""What a run stands on: processes, devices, shardings and files.

For everyone who starts, resumes or distributes work; nothing here knows networks, data or training.
It imports `dmf.registry`, `dmf.errors` and `dmf.types` alone, and every room above may import it.
"""
