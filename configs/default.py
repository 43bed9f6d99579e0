"""A small flow model of the digits: every field with its default.

    dmf train --config=configs/default.py --workdir=DIR --config.run.steps=1000

`dmf config --config=configs/default.py` prints the fields and their meaning.
"""

from dmf.default_config import component, get_config

__all__ = ["component", "get_config"]
