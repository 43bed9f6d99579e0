"""Labels that are stored beside images as whole numbers, and the names of their classes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from dmf.errors import InputError

# Given as the column or the field of labels, it leaves them out.
NO_LABELS = "none"
MAX_CLASSES = 2**31


def checked_labels(
    labels: Sequence[int], names: Sequence[str], class_count: int
) -> Int64[np.ndarray, "n"]:
    """Labels as an array.

    >>> checked_labels([1, 0], ["a.jpg", "b.jpg"], 2).tolist()
    [1, 0]

    Args:
      labels: n whole numbers.
      names: name of each image, for messages.
      class_count: number of classes, which labels must be below; 0 if it is not known.

    Raises:
      InputError: a label is below 0, or not below the number of classes; the field is empty.
    """
    limit = class_count or MAX_CLASSES
    for name, label in zip(names, labels, strict=True):
        if not 0 <= label < limit:
            raise InputError("", remedy=f"{name} has the label {label}: labels are whole numbers "
                             f"from 0 to {limit - 1}; correct it, or --num-classes")
    return np.asarray(labels, np.int64)


def numbered_classes(labels: Int64[np.ndarray, "n"], class_count: int) -> tuple[str, ...]:
    """The names of classes that have none: their numbers.

    >>> numbered_classes(np.array([0, 2, 1]), 0)
    ('0', '1', '2')

    Args:
      labels: [n] labels.
      class_count: number of classes; 0 for the largest label + 1, if no smaller label is absent.

    Raises:
      InputError: a smaller label is absent; the field is empty.
    """
    present = np.unique(labels)
    absent = np.flatnonzero(present != np.arange(len(present)))
    if not class_count and len(absent):
        raise InputError("", remedy=f"no image has the label {absent[0]}, but one has "
                         f"{present[-1]}: number the classes without gaps, or give "
                         "--num-classes")
    return tuple(str(number) for number in range(class_count or present[-1] + 1))


def check_no_classes(class_count: int) -> None:
    """Checks that no number of classes is given for images without labels.

    Raises:
      InputError: it is; the field is "num-classes".
    """
    if class_count:
        raise InputError("num-classes", class_count, "the images have no labels; leave it out")
