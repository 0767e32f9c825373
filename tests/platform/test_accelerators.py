"""What the program picks for each device, dtype and set of installed libraries."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hacl_megatron.platform.accelerators import (
    Accelerators,
    adam_library,
    attention_kernel,
    find_accelerators,
    find_library,
    has_torch_varlen,
    layer_library,
)
from hacl_megatron.platform.processes import select_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NONE = dict(transformer_engine=None, flash_attn=None, apex=None, torch_varlen=False)


def found(**installed) -> Accelerators:
    return Accelerators(**{**NONE, **installed})


EVERYTHING = found(transformer_engine="2.10.0", flash_attn="2.8.3", apex="0.1", torch_varlen=True)


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
    assert layer_library(CUDA, torch.bfloat16, EVERYTHING) == "transformer_engine"
    assert layer_library(CUDA, torch.bfloat16, found(apex="0.1", flash_attn="2.8.3")) == "local"
    assert layer_library(CPU, torch.bfloat16, EVERYTHING) == "local"
    assert layer_library(CUDA, torch.float32, EVERYTHING) == "local", "Transformer Engine's fp32 is TF32"
    assert adam_library(CUDA, EVERYTHING) == "transformer_engine"
    assert adam_library(CUDA, found(apex="0.1")) == "apex"
    assert adam_library(CUDA, found()) == "torch"
    assert adam_library(CPU, EVERYTHING) == "torch"


def in_new_process(*arguments: str, folder=None, environment=None) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


FIND = """
import sys
sys.path.insert(0, {folder!r})
from hacl_megatron.platform.accelerators import {names}
assert not set(sys.modules) & {{"apex", "flash_attn", "transformer_engine", "nvidia.dali"}}, "looked unasked"
"""


@pytest.mark.parametrize("fused", [False, True])
def test_only_an_apex_with_fused_optimisers_counts(tmp_path, fused):
    """The package index's `apex` is a web library that does not even import without its own dependencies."""
    package = tmp_path / "apex"
    (package / ("optimizers" if fused else "lib")).mkdir(parents=True)
    (package / "__init__.py").write_text("" if fused else "raise ImportError('pyramid is missing')\n")
    (package / "optimizers.py" if not fused else package / "optimizers" / "__init__.py").write_text("")
    (tmp_path / "amp_C.py").write_text("")
    metadata = tmp_path / "apex-0.9.10.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    found = "print(find_accelerators().apex, 'apex' in sys.modules)"
    result = in_new_process("-c", FIND.format(folder=str(tmp_path), names="find_accelerators") + found)
    assert result.stdout.split() == (["0.9.10", "True"] if fused else ["None", "False"]), result.stderr


@pytest.fixture
def broken_site(tmp_path) -> Path:
    """Packages as they were met: Transformer Engine without its torch extension, flash-attn built for another torch,
    Apex without its CUDA extensions. One has metadata."""
    site = tmp_path / "site"
    for file, text in {
        "transformer_engine/__init__.py": "__version__ = '2.20.2'\n",
        "transformer_engine/pytorch/__init__.py": "raise FileNotFoundError('Could not find shared object file')\n",
        "flash_attn/__init__.py": "raise ImportError('undefined symbol: _ZN3c10\\nand more')\n",
        "flash_attn-2.8.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n",
        "apex/__init__.py": "",
        "apex/optimizers/__init__.py": "class FusedAdam: pass\nclass FusedSGD: pass\n",
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    return site


REPORT_BROKEN = """
found = find_accelerators()
assert (found.transformer_engine, found.flash_attn, found.apex) == (None, None, None), found
device = torch.device("cuda", 0)
assert layer_library(device, torch.bfloat16) == "local" and adam_library(device) == "torch"
for line in broken_libraries("flash_attn", "transformer_engine", "apex"):
    print(line)
"""


def test_libraries_that_do_not_import_count_as_absent_and_are_named(broken_site):
    names = "adam_library, broken_libraries, find_accelerators, layer_library, torch"
    result = in_new_process("-c", FIND.format(folder=str(broken_site), names=names) + REPORT_BROKEN)
    assert result.returncode == 0, result.stderr
    flash_attn, engine, apex = result.stdout.splitlines()
    assert flash_attn.startswith("flash-attn 2.8.3, broken: ImportError: undefined symbol: _ZN3c10; pip uninstall")
    assert engine.startswith("Transformer Engine 2.20.2, broken: FileNotFoundError: Could not find shared object file;")
    assert apex.startswith("Apex unknown version, broken: ModuleNotFoundError: No module named 'amp_C'; pip uninstall")


def test_what_breaks_megatron_cores_import_is_one_line(broken_site, tmp_path):
    """Of the report, and of a run, whose megatron-core dies of `import transformer_engine.pytorch`."""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(broken_site), *sys.path])}
    config = tmp_path / "run.yaml"
    config.write_text("transformer: {recompute_granularity: full}\n")
    run = in_new_process("-m", "hacl_megatron.train", "--config", str(config), environment=path)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert "megatron-core cannot be imported (FileNotFoundError: Could not find shared object file)" in line
    assert "Transformer Engine 2.20.2, broken" in line and "pip uninstall transformer-engine" in line

    report = in_new_process("-m", "hacl_megatron.platform", environment=path)
    assert report.returncode == 0, report.stderr
    rows = {row.split("  ", 1)[0]: row.split("  ", 1)[1].strip() for row in report.stdout.splitlines()}
    assert "broken: FileNotFoundError" in rows["megatron-core"]
    assert rows["Transformer Engine"].startswith("2.20.2, broken: FileNotFoundError")
    assert rows["will use: layers (bf16)"] == "megatron-core local layers"


def test_find_accelerators_agrees_with_the_installed_metadata():
    for name, distributions in {
        "flash_attn": ["flash-attn"],
        "transformer_engine": ["transformer-engine"],
        "dali": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
    }.items():
        installed = {d.metadata["Name"].replace("_", "-"): d.version for d in importlib.metadata.distributions()}
        versions = [installed[distribution] for distribution in distributions if distribution in installed]
        assert find_library(name).version == (versions[0] if versions else None)
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert find_accelerators().torch_varlen == has_torch_varlen() == (release >= (2, 10))


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
    for package in ("megatron-core", "transformers", "hacl_megatron"):
        assert rows[package] == importlib.metadata.version(package)
    assert rows["torch"] == torch.__version__
    assert rows["DALI"] == str(find_library("dali")) and rows["flash-attn"] == str(find_library("flash_attn"))
    gpu = torch.cuda.is_available()
    assert rows["will use: backend"] == ("nccl" if gpu else "gloo")
    assert ("none" in rows["GPU"]) == (not gpu)
    if not gpu:
        assert rows["will use: attention (bf16)"] == "torch SDPA, one call per segment"
        assert rows["will use: layers (bf16)"] == rows["will use: layers (fp32)"] == "megatron-core local layers"
        assert rows["will use: Adam"] == "hacl_megatron (torch foreach)"
        assert rows["will use: image decode"] == ("DALI, CPU" if find_library("dali").usable else "Pillow")
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in result.stdout.splitlines()}) == 1, (
        "the findings stand in one column"
    )
