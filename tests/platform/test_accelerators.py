"""What the program picks for each device, dtype and set of installed libraries."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from hacl_megatron.platform.accelerators import (
    Accelerators,
    adam_library,
    attention_kernel,
    find_accelerators,
    layer_library,
)
from hacl_megatron.platform.processes import select_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NONE = dict(transformer_engine=None, flash_attn=None, apex=None, dali=None, torch_varlen=False)


def found(**installed) -> Accelerators:
    return Accelerators(**{**NONE, **installed})


EVERYTHING = found(transformer_engine="2.10.0", flash_attn="2.8.3", apex="0.1", dali="1.52.0", torch_varlen=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_takes_the_best_varlen_kernel(dtype):
    assert attention_kernel(CUDA, dtype, EVERYTHING) == "flash_attn"
    assert attention_kernel(CUDA, dtype, found(torch_varlen=True)) == "torch_varlen"
    assert attention_kernel(CUDA, dtype, found(transformer_engine="2.10.0", apex="0.1")) == "sdpa"


def test_varlen_kernels_are_never_asked_for_what_they_cannot_do():
    assert attention_kernel(CUDA, torch.float32, EVERYTHING) == "sdpa"
    assert attention_kernel(CPU, torch.bfloat16, EVERYTHING) == "sdpa"
    assert attention_kernel(CPU, torch.float32, EVERYTHING) == "sdpa"


def test_layers_and_adam_follow_megatron_cores_order():
    assert layer_library(CUDA, EVERYTHING) == "transformer_engine"
    assert layer_library(CUDA, found(apex="0.1", flash_attn="2.8.3")) == "local"
    assert layer_library(CPU, EVERYTHING) == "local"
    assert adam_library(CUDA, EVERYTHING) == "transformer_engine"
    assert adam_library(CUDA, found(apex="0.1")) == "apex"
    assert adam_library(CUDA, found()) == "torch"
    assert adam_library(CPU, EVERYTHING) == "torch"


def in_new_process(*arguments: str, folder=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=folder)


FIND = """
import sys
sys.path.insert(0, {folder!r})
from hacl_megatron.platform.accelerators import find_accelerators
print(find_accelerators().apex)
print("apex" in sys.modules)
"""


@pytest.mark.parametrize("fused", [False, True])
def test_only_an_apex_with_fused_optimisers_counts(tmp_path, fused):
    """The package index's `apex` is a web library that does not even import without its own dependencies."""
    package = tmp_path / "apex"
    (package / ("optimizers" if fused else "lib")).mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('pyramid is missing')\n")
    metadata = tmp_path / "apex-0.9.10.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    result = in_new_process("-c", FIND.format(folder=str(tmp_path)))
    assert result.stdout.split() == ["0.9.10" if fused else "None", "False"], result.stderr


def test_find_accelerators_reads_the_installed_metadata():
    seen = find_accelerators()
    for name, distributions in {
        "flash_attn": ["flash-attn"],
        "transformer_engine": ["transformer-engine", "transformer_engine"],
        "dali": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
    }.items():
        versions = [d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in distributions]
        assert getattr(seen, name) == (versions[0] if versions else None)
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert seen.torch_varlen == (release >= (2, 10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_one_line_that_says_what_to_do():
    with pytest.raises(ValueError) as error:
        select_device("cuda")
    assert "no CUDA device" in str(error.value) and "--device cpu" in str(error.value)
    assert "\n" not in str(error.value)
    assert select_device("auto") == select_device("cpu") == CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_auto_takes_the_gpu_of_this_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert select_device("auto") == select_device("cuda") == CUDA
    assert select_device("cpu") == CPU


def test_the_report_names_what_is_here_and_what_will_be_used(tmp_path):
    result = in_new_process("-m", "hacl_megatron.platform", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    rows = {label: finding.strip() for label, finding in rows.items()}
    assert rows["Python"] == sys.version.split()[0]
    for package in ("torch", "megatron-core", "transformers", "hacl_megatron"):
        assert rows[package] == importlib.metadata.version(package)
    seen = find_accelerators()
    assert rows["DALI"] == (seen.dali or "not found")
    assert rows["flash-attn"] == (seen.flash_attn or "not found")
    gpu = torch.cuda.is_available()
    assert rows["will use: backend"] == ("nccl" if gpu else "gloo")
    assert ("none" in rows["GPU"]) == (not gpu)
    if not gpu:
        assert rows["will use: attention (bf16)"] == "torch SDPA, one call per segment"
        assert rows["will use: layers"] == "megatron-core local layers"
        assert rows["will use: Adam"] == "hacl_megatron (torch foreach)"
        assert rows["will use: image decode"] == ("DALI, CPU" if seen.dali else "Pillow")
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in result.stdout.splitlines()}) == 1, (
        "the findings stand in one column"
    )
