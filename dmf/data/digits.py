"""The 1,797 handwritten digits that scikit-learn carries, as a TFDS dataset.

8 x 8 grey images with 17 levels, stored as 8 bits. (E. Alpaydin, C. Kaynak, "Optical Recognition
of Handwritten Digits", UCI Machine Learning Repository.)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits: image [8, 8, 1] uint8 and label 0 to 9, one split "train"."""

    VERSION = tfds.core.Version("1.1.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # As bytes, an image is decoded at once, not number by number.
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for i, (image, label) in enumerate(zip(levels, digits.target, strict=True)):
            yield i, {"image": image, "label": int(label)}
