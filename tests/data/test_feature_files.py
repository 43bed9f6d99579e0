"""Nothing that a dataset names is run, and no name contacts the internet."""

import json
import shutil

import pytest
import tensorflow_datasets as tfds
import tiny

from dmf.data.datasets import open_dataset
from dmf.data.feature_files import check_features
from dmf.errors import InputError

LOADER = """
import pathlib

pathlib.Path("it_ran").touch()
"""
TEXT = "tensorflow_datasets.core.features.text_feature.Text"
FEATURES = {
    "a class": {"pythonClassName": "loader.Loader", "text": {}},
    "the other spelling": {"python_class_name": "loader.Loader", "text": {}},
    "the old form": {"type": "loader.Loader", "content": {}},
    "within text": {
        "pythonClassName": TEXT,
        "jsonFeature": {"json": json.dumps({"type": "loader.Loader", "content": {}})},
    },
}


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """The directory of a version of the digits, with a module in the working directory."""
    open_dataset("digits", directory=str(tiny.SCRATCH))
    (source,) = (tiny.SCRATCH / "digits").iterdir()
    version = tmp_path / "data" / "digits" / source.name
    shutil.copytree(source, version)
    (tmp_path / "loader.py").write_text(LOADER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return version


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("place", ["version", "parent"])
def test_a_class_beside_the_dataset_is_not_imported(digits, kind, place, tmp_path):
    path = digits / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["label"] = FEATURES[kind]
    path.write_text(json.dumps(features))
    directory = digits if place == "version" else digits.parent.parent
    with pytest.raises(InputError, match="features.json names the class .*(loader|jsonFeature)"):
        open_dataset("digits", directory=str(directory))
    assert not (tmp_path / "it_ran").exists()


def test_tfds_would_import_it(digits, tmp_path):
    """What the tests before guard against."""
    path = digits / "features.json"
    features = json.loads(path.read_text())
    features["featuresDict"]["features"]["label"] = FEATURES["a class"]
    path.write_text(json.dumps(features))
    with pytest.raises(ValueError, match="Unrecognized FeatureConnector"):
        tfds.builder_from_directory(digits)
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", "\x00"])
def test_features_that_are_no_json_are_one_line(digits, text):
    (digits / "features.json").write_text(text)
    with pytest.raises(InputError, match="features.json is no JSON; prepare the dataset again"):
        check_features(digits)


@pytest.mark.parametrize(
    "name", ["huggingface:mnist", "my.module:squares", "../squares", "", "a/b/c", "a:1:2"]
)
def test_a_name_with_a_namespace_is_refused_and_contacts_nobody(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "builder", None)
    with pytest.raises(InputError, match=f"^name={name}: give the name of a TFDS dataset"):
        open_dataset(name, directory=str(tmp_path))
