"""Packaging of bit_tf and hub_export."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "bit_tf" / "__init__.py").read_text("utf-8"),
    re.MULTILINE,
).group(1)

EXTRAS = {
    "beam": ["apache-beam>=2.70", "pyarrow>=15"],
    "huggingface": ["huggingface_hub>=0.30"],
    "index": ["lancedb>=0.40", "pyarrow>=15"],
    "parquet": ["pyarrow>=15"],
    "plot": ["matplotlib>=3.8"],
    # Older versions of Starlette answer some Range headers in quadratic time.
    "serve": ["starlette>=0.49.1", "uvicorn>=0.34"],
    # Older ones' weights-only loader could be made to run code.
    "torch": ["torch>=2.6"],
}
EXTRAS["test"] = [
    *EXTRAS["beam"],
    *EXTRAS["huggingface"],
    *EXTRAS["index"],
    *EXTRAS["parquet"],
    *EXTRAS["plot"],
    *EXTRAS["serve"],
    "ipykernel>=6.29",
    "jax>=0.5",
    "mypy>=1.11",
    "nbclient>=0.10",
    "playwright>=1.50",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "scikit-learn>=1.4",
]
# The independent oracle. See constraints.txt for torch's CPU build.
EXTRAS["oracle"] = [*EXTRAS["torch"], "safetensors>=0.5", "transformers>=5"]
# What python -m benchmarks compares with.
EXTRAS["bench"] = [
    *EXTRAS["oracle"],
    *EXTRAS["plot"],
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "openvino>=2025.0",
]

setuptools.setup(
    name="bit-tf",
    version=VERSION,
    description="Big Transfer (BiT) for TensorFlow: use, train and publish",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=setuptools.find_packages(include=["bit_tf*", "hub_export*"]),
    package_data={
        "bit_tf": ["data/*", "py.typed"],
        "hub_export": ["data/*", "data/pages/*", "py.typed"],
    },
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "filelock>=3.13",
        "h5py>=3.11",
        # tensorflow_datasets 4.9 imports it, and does not ask for it.
        "importlib-resources>=6",
        "jinja2>=3.1.6",
        "keras>=3.8",
        "numpy>=1.26",
        "pillow>=10.3",
        "platformdirs>=4.2",
        "requests>=2.32",
        # tensorflow_hub imports pkg_resources, which setuptools 82 removed.
        "setuptools<82",
        "tensorflow>=2.18",
        "tensorflow-datasets>=4.9.7",
        "tensorflow-hub>=0.16.1",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "bit-tf = bit_tf.commands:main",
            "hub-export = hub_export.commands:main",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
