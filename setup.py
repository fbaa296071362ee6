"""Packaging. Through the link nl_jax/kernels, kernels/ is nl_jax.kernels."""

import pathlib
import re

from setuptools import find_packages, setup

_HERE = pathlib.Path(__file__).parent
_VERSION = re.search(
  r'^__version__ = "(.+)"$',
  (_HERE / "nl_jax" / "__init__.py").read_text(encoding="utf-8"),
  re.MULTILINE,
)

_BASE = [
  "jax>=0.10.2,<0.13",  # 0.10.2: jax.shard_map, lax.pcast; 0.13 not seen.
  "optax>=0.2.8,<0.3",  # 0.2.8: contrib's MuonDimensionNumbers.
  "numpy>=2.0",
]
_TRAIN = [
  "flax>=0.12.8,<0.13",  # Linen only; 0.12.9 dropped Python 3.11.
  "orbax-checkpoint>=0.12.8,<0.13",  # The v0 CheckpointManager.
  "grain>=0.2.18,<0.3",  # Exact restore of the index shuffle.
  "ml_collections>=1.1.0",
  "absl-py>=2.1",
  "sentencepiece>=0.2.0",
  "tokenizers>=0.21",  # Hugging Face's tokenizer.json.
  "pyarrow>=18.0",  # Parquet.
  "array_record>=0.8",
  "safetensors>=0.4",  # A memory as a file; exported weights.
  "tensorboardX>=2.6",  # Writes events without TensorFlow.
  "rich>=13.0",
  "matplotlib>=3.9",  # The page of a run.
]
_DEV = [
  "pytest>=8.0,<9.2",
  "pytest-xdist>=3.6",
  "ruff>=0.9",
  "mypy>=2.4",
  "setuptools>=64",  # What a wheel would hold.
  "jaxtyping>=0.3",
  "scikit-learn>=1.6",  # The digits of examples/optimizers.py.
  "equinox>=0.13",  # Optimizers are tested in it.
  # Compiles for TPUs ahead of time; of the release that jax[tpu] names.
  "libtpu>=0.0.42; sys_platform == 'linux' and platform_machine == 'x86_64'",
]
_EVAL = ["seqio>=0.0.20,<0.1"]  # Brings TensorFlow.
# Its protobuf (<7) and pyarrow (<26) are older than those of requirements.txt.
_BEAM = ["apache-beam[gcp]>=2.70"]
_HF = ["datasets>=3.0"]  # Folders of Hugging Face `save_to_disk`.
_DOCS = [  # The site; a test builds it.
  "mkdocs>=1.6,<2",
  "mkdocs-material>=9.5,<10",
  "mkdocstrings[python]>=0.27",
]

setup(
  name="nl_jax",
  version=_VERSION[1],
  description="Nested Learning in JAX: levels, memories, deep optimizers",
  long_description=(_HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="nl_jax authors",
  license="Apache-2.0",
  project_urls={"Paper": "https://arxiv.org/abs/2512.24695"},
  keywords="jax nested-learning titans hope test-time-training optimizers",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  python_requires=">=3.11",
  packages=find_packages(include=["nl_jax", "nl_jax.*"]),
  # The published rows, and the embedded corpus with its licence.
  package_data={
    "nl_jax": ["py.typed"],
    "nl_jax.data": ["embedded/*"],
    "nl_jax.eval": ["*.csv"],
    "nl_jax.kernels.walk": ["tiles.json"],
    "nl_jax.tasks": ["*.csv"],
  },
  install_requires=_BASE,
  extras_require={
    "train": _TRAIN,
    "eval": [*_TRAIN, *_EVAL],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],
    "hf": [*_TRAIN, *_HF],
    "beam": [*_TRAIN, *_BEAM],
    "docs": _DOCS,
    "dev": [*_TRAIN, *_DEV, *_DOCS, *_HF],
  },
)
