"""A check of the `features.json` of a TFDS dataset, before TFDS reads it.

The file names the Python class of each feature, and TFDS imports the module of the class, whatever
it is. Only the classes of TFDS itself are features here, so that no file of a dataset is run.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from dmf.errors import InputError

FEATURES_FILE = "features.json"
# A dataset, its versions, and the versions of its configs.
_PLACES = ("", "*/", "*/*/")
_KNOWN = re.compile(r"tensorflow_datasets\.core\.features\.[a-z_]+\.[A-Za-z]+")
# The keys of a class name, in the present form (both spellings of a proto) and the one before.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# A feature of the present form whose content is text in the form before.
_TEXT_KEYS = ("jsonFeature", "json_feature")


def check_features(directory: epath.PathLike) -> None:
    """Checks every `features.json` in a directory, and one and two levels below.

    Args:
      directory: a dataset, or the directory of its configs and versions; it need not exist.

    Raises:
      InputError: a file is no JSON, or names a class that is no feature of TFDS.
    """
    root = epath.Path(directory)
    for path in [path for place in _PLACES for path in root.glob(f"{place}{FEATURES_FILE}")]:
        try:
            found = json.loads(path.read_text())
        except (ValueError, RecursionError):
            raise InputError("directory", directory, f"{path} is no JSON; prepare the dataset "
                             "again") from None
        for name in _class_names(found):
            if not _KNOWN.fullmatch(name):
                raise InputError("directory", directory, f"{path} names the class {name}, which is "
                                 "no feature of TFDS; TFDS would run the module that holds it")


def _class_names(found: Any) -> Iterator[str]:
    """The class names in a decoded file, wherever they are."""
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from (value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str))
            yield from (f"in {key}" for key in _TEXT_KEYS if key in value)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
