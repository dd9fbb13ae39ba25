"""Packaging of vlm_jax. `make sweep` and `make test` install it; see the Makefile."""

import setuptools

CORE = [
    "absl-py>=2.1",
    "av>=14.0",
    "etils[epath,epy]>=1.12",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "huggingface_hub>=1.0",
    # Python 3.11 gets jax 0.10.2; Python 3.12 gets jax 0.12 or later. Both are tested. With 0.10.0 the platform of a
    # mesh is not known while a program is traced (tests/layers/test_platform.py).
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1.6",
    "matplotlib>=3.10",
    "ml_collections>=1.1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11.0",
    "plotly>=6.0",
    "rapidfuzz>=3.13",
    "rich>=13.9",
    "safetensors>=0.5",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "sentencepiece>=0.2",
    "tensorboard>=2.20",
    "tensorstore>=0.1.74",
    "tiktoken>=0.9",
    "tokenizers>=0.21",
]

# What lmms-eval 0.7 imports; the Makefile installs itself, without what else it asks for.
LMMS_EVAL = ["accelerate>=1.0", "datasets>=4.0", "evaluate>=0.4", "filelock<4", "loguru>=0.7", "pytablewriter>=1.2"]
LMMS_EVAL += ["pytz", "sacrebleu>=2.4", "tenacity>=9.0"]

SERVE = ["starlette>=1.0", "uvicorn>=0.40"]

RAY = ["ray[tune]>=2.50"]

# Not in the extra test, since it asks for an earlier Pillow; see GRADIO in the Makefile.
DEMO = ["fastapi>=0.115.2", "gradio>=6.31", "uvicorn>=0.40"]

EXTRAS = {
    "test": [
        *RAY,
        *SERVE,
        "beartype>=0.22",
        "jax[tpu]>=0.10.2",  # tests/planner compiles for real slices
        "ipykernel>=6.29",
        "nbclient>=0.10.2",
        "nbformat>=5.10",
        "brotli>=1.1",  # unpacks the browser of tests/processes/browser.py
        "openai>=3.0",
        "playwright>=1.50",
        "pytest>=8.4",
        "pytest-xdist>=3.6",
        "setuptools>=77",  # builds templates/plugin_package
    ],
    # Live reference models. The Makefile installs a fixed torch, and torchvision, first; see TORCH there.
    "parity": [
        "peft>=0.19",
        "pyarrow>=17.0",
        "torch>=2.6",
        "transformers>=5.24",
        *LMMS_EVAL,
    ],
    "docs": ["mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
    "dev": ["import-linter>=2.5", "pre-commit>=4.0", "pyright[nodejs]>=1.1.400", "ruff>=0.14"],
    "gpu": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2", "gcsfs>=2024.10"],  # workdirs on gs://
    # The compiler of TPUs, libtpu, in the version of the installed jax; it runs on any CPU.
    "plan": ["jax[tpu]>=0.10.2"],
    "serve": [*SERVE],
    "demo": [*DEMO],
    "ray": [*RAY],
    "parquet": ["pyarrow>=17.0"],
    "video": ["av>=14.0"],
    "wandb": ["wandb>=0.19"],
    "eval": ["filelock<4", "lmms-eval>=0.7.3,<0.8"],  # harnesses/lmms_eval.py; which imports filelock._api
}

setuptools.setup(
    name="vlm_jax",
    version="0.1.0",
    description="Vision-language models in JAX, with the number of visual tokens as one integer.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={
        "vlm_jax.demo": ["page.css"],
        "vlm_jax.pretrained": ["released/*/*.json"],
        "vlm_jax.sweep": ["report.html", "report.css", "report.js"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"lmms_eval.models": ["vlm_jax = vlm_jax.harnesses.manifest:MANIFEST"]},
)
