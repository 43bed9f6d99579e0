"""Small datasets of TFDS, under names that dmf has never heard of."""

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


class Squares(tfds.core.GeneratorBasedBuilder):
    """Colour images of three classes, under a name that dmf has never heard of."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            yield i, {"image": np.full((8, 8, 3), 6 * i, np.uint8), "label": i % 3}


class Sounds(Squares):
    """A dataset without images."""

    def _info(self):
        features = {"sound": tfds.features.Tensor(shape=(4,), dtype=np.float32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        yield 0, {"sound": np.zeros(4, np.float32)}


class Photos(Squares):
    """Squares stored as image files, as TFDS stores most of its datasets of images."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
        for i, image in enumerate(map(PIL.Image.fromarray, pixels)):
            yield i, {"image": image, "label": i % 3}
