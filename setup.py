"""Packages, dependencies (ranges) and extras. The exact set that was tested is in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("sdlm_megatron", "data_prep", "checkpoints_tools")
ROOT = Path(__file__).parent
EVAL = ["lm_eval>=0.4.13,<0.5", "accelerate>=0.26"]
PAPER = [*EVAL, "lm_eval[ifeval,math]"]


def read_version() -> str:
    """The version string in sdlm_megatron/__init__.py, read without importing the package."""
    text = (ROOT / "sdlm_megatron" / "__init__.py").read_text(encoding="utf-8")
    return next(line.split('"')[1] for line in text.splitlines() if line.startswith("__version__"))


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="sdlm-megatron",
    version=read_version(),
    description="Train Sequential Diffusion Language Models on Megatron-Core: conversations in, checkpoint out",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion language model", "Megatron-Core", "large language model", "training"],
    # Add the repository's own address here when it is published.
    project_urls={
        "Paper": "https://arxiv.org/abs/2509.24007",
        "Reference implementation": "https://github.com/OpenGVLab/SDLM",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=[f"{name}{suffix}" for name in PACKAGES for suffix in ("", ".*")]),
    package_data={
        "": ["py.typed", "*.yaml", "presets/*.yaml", "templates/*"],
        # ops/slurm is a symbolic link to slurm/ at the top of the repository; a wheel contains copies of its files.
        "sdlm_megatron.ops": ["slurm/*.sh", "slurm/clusters/*.yaml"],
    },
    entry_points={
        "console_scripts": ["sdlm = sdlm_megatron.cli:entry"],
        # lm-evaluation-harness after 0.4.13 finds models of other packages here
        "lm_eval.models": ["sdlm = sdlm_megatron.evaluation.lm_eval_model:SDLMForLMEval"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "tokenizers>=0.21",
        "fastokens>=0.3.5",
        "orjson>=3.10",
        "pyarrow>=18",
        "xxhash>=3.0",
        "rensa>=0.5,<0.6",  # of another version, MinHash signatures may differ
        "datasets>=3.0",
        "sentencepiece>=0.2.3",
        "protobuf>=7.36.1",  # of the module that sentencepiece generates for its models
        "safetensors>=0.4.5",
        "argcomplete>=3.1",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "rich>=13.0",
        "matplotlib>=3.8",
        "wandb>=0.31",
        "tensorboard>=2.16",
        "psutil>=5.9",
        "numpy>=1.26",
        "scipy>=1.12",
        "packaging>=23",
        "gguf>=0.10",
    ],
    extras_require={
        # compiled against the installed torch: pip install --no-build-isolation, after torch
        "gpu": ["transformer-engine[pytorch]==2.20.2", "nvidia-ml-py>=12"],
        "eval": EVAL,
        "paper": PAPER,
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "test": [
            "pytest>=8.0",
            "hypothesis>=6.100",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML>=6.0",
            "import-linter>=2.1",
            "peft>=0.18",  # adapters are compared with its own
            "triton>=3.2",  # its interpreter runs the attention kernels without a GPU
            *PAPER,
        ],
    },
)
