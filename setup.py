"""Packaging. `pip install -e .` is enough to sample on CPU; see the extras for accelerators."""

from setuptools import find_namespace_packages, setup

INSTALL_REQUIRES = [
    # model and training
    "jax>=0.10.2",
    "flax>=0.12",
    "optax>=0.2.8",
    "chex>=0.1.92",
    "einops>=0.8",
    "numpy>=2.0",
    "filelock>=3.12",  # with it JAX limits the size of its cache of compiled programs
    "ml_dtypes>=0.5",  # bfloat16 in NumPy
    # checkpoints: Orbax is the training format, safetensors what LTX-2 is published in
    "orbax-checkpoint>=0.12",
    "tensorstore>=0.1.80",  # the converters write Orbax's arrays slice by slice
    "safetensors>=0.5",
    "etils[epath]>=1.9",  # paths that may be in object storage
    # prompts: Gemma 3's vocabulary, in either of the forms it is published in
    "tokenizers>=0.21",
    "sentencepiece>=0.2",
    # command line and configs
    "absl-py>=2.1",
    "ml-collections>=1.0",
    "rich>=13.0",  # progress
    # clips
    "av>=17.1",  # H.264 and AAC in MP4
    "pillow>=11.0",  # pictures, with what PyAV does not read: EXIF orientation and ICC profiles
]

PLOTS = ["matplotlib>=3.9"]  # curves, and pictures of clips
# Training data and logs; tensorflow itself is not needed.
TRAIN = [
    *PLOTS,
    *("grain>=0.2.18", "array-record>=0.8", "tensorflow-datasets>=4.9.10", "tensorboardX>=2.6"),
]
# Live streams: HTTP and WebSockets, and figures for Prometheus.
SERVE = [
    "starlette>=0.40",
    "uvicorn>=0.30",
    "websockets>=14",
    "prometheus-client>=0.20",
]
# launch.serve --replicas; beside "serve", as Ray is as large as all the rest
REPLICAS = [*SERVE, "ray[serve]>=2.50"]
# examples/talker.py: chat and speech models over HTTP, whose answers are read as they come
TALKER = [*SERVE, "httpx>=0.27"]
# The world of balls in pocket/: filters and matching of its measures.
POCKET = [*PLOTS, "scipy>=1.13"]

# launch.evaluate: its tables, and CLIP and CLAP scores from weights that are there.
EVAL = ["scipy>=1.13", "torch>=2.6", "transformers>=5.0"]

EXTRAS_REQUIRE = {
    # accelerators: one of these
    "gpu": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "train": TRAIN,
    # the demo; training the pocket model takes "train" as well
    "pocket": POCKET,
    # live streams in a browser
    "serve": SERVE,
    "replicas": REPLICAS,
    "talker": TALKER,
    # tables of clips
    "eval": EVAL,
    # runs and checkpoints on gs://
    "storage": ["gcsfs", "google-cloud-storage"],
    # torch, diffusers and transformers are the references that the tests compare with
    "test": [
        *TRAIN,
        *POCKET,
        *TALKER,
        "playwright>=1.45",  # the page, in the Chromium of the system
        "hypothesis>=6.100",  # extremes of options and settings
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "pyyaml>=6.0",  # launch/kubernetes.yaml
        *EVAL,
        "torchmetrics>=1.4",  # distances between sets of features
        "diffusers>=0.42",
        "ruff>=0.12",
    ],
}

# configs/ holds plain config files without __init__.py, hence the namespace variant.
PACKAGES = find_namespace_packages(
    include=[
        *("omniforcing_jax", "omniforcing_jax.*", "configs", "configs.*"),
        *("launch", "checkpoint_converters", "benchmarks", "pocket", "pocket.*"),
    ]
)

setup(
    name="omniforcing_jax",
    version="0.1.0",
    description="Streaming joint audio-video generation: LTX-2 and OmniForcing in JAX",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "checkpoint_converters": ["metadata/*.json"],
        "omniforcing_jax": ["serving/page/*"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
