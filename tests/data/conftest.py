"""Fixtures of the tests of datasets."""

import pytest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory that holds both datasets as ArrayRecord."""
    from tfds_datasets import Sounds, Squares

    directory = tmp_path_factory.mktemp("datasets")
    for builder in (Squares, Sounds):
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)
