"""Refusals from a model's structure, before its weights are read, with the nearest alternative."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.cli.main import main
from mpq.core.cache import CACHE_FORMATS
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.exporters.targets import TARGETS
from mpq.feasible import Wanted, held_layers, without_kernels
from mpq.network.layers import find_layers
from mpq.network.storage import other_bytes
from mpq.sources import open_network
from mpq.sources.structure import structure_of

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
)  # fmt: skip
HEAVY = ("mpq.pipeline", "mpq.sensitivity.profile", "matplotlib", "datasets")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with a config and no weights at all."""
    folder = tmp_path_factory.mktemp("bare")
    CONFIG.save_pretrained(folder)
    return folder


def test_a_structure_has_the_layers_of_the_opened_model(tmp_path):
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "llama")
    for name in ("tiny-lm", "tiny-cnn", str(tmp_path / "llama")):
        structure, opened = structure_of(name), open_network(name).model
        layers = find_layers(structure)
        assert layers == find_layers(opened)
        assert other_bytes(structure, layers) == other_bytes(opened, layers)
        assert all(parameter.is_meta for parameter in structure.parameters())
    assert structure_of("some.module:factory") is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--bits", "1.5", "--for", "llama.cpp"], "1.5 bits is below the smallest allocation for llama.cpp, 4."),
        (["--bits", "3", "--for", "vllm:cpu", "--formats", "int3-g32"], "add int4-"),
        (["--size", "2kB"], "2,000 bytes is below the smallest allocation for mpq"),
        (["--bits", "3", "--exclude", "nothing*"], "nothing*"),
        (["--memory", "20kB", "--context", "128"], "a memory of 20,000 bytes is too small"),
        (["--memory", "40MB", "--context", "4096"], "at most 128 tokens"),
        (["--kv-bits", "4", "--for", "vllm:cpu"], "vllm:cpu files cannot store cache formats"),
    ],
)
def test_impossible_requests_are_refused_without_weights(bare, tmp_path, capsys, asked, message):
    assert main(["quantize", str(bare), "-o", str(tmp_path / "out"), *asked]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_budgets_exclude_each_other_and_models_need_their_target():
    with pytest.raises(MpqError, match="name one budget"):
        Wanted(bits=4, size="1MB")
    with pytest.raises(MpqError, match=r"gguf supports .*, not TinyCNN"):
        held_layers(structure_of("tiny-cnn"), TARGETS["gguf"], Wanted(bits=4))


def test_a_refusal_imports_no_more_than_the_structure_needs(bare, tmp_path):
    script = (
        "import sys; from mpq.cli.main import main\n"
        f"code = main(['quantize', {str(bare)!r}, '--bits', '1.5', '--for', 'llama.cpp', '-o', {str(tmp_path)!r}])\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"


def test_a_missing_device_is_reported(tmp_path, capsys):
    assert main(["quantize", "tiny-lm", "--bits", "4", "--device", "cuda:99", "-o", str(tmp_path / "out")]) == 2
    assert "no device 'cuda:99' here" in capsys.readouterr().err


def test_formats_without_a_kernel_are_reported():
    entries = (Layer("cache.0.keys", "keys", 2, 80), Layer("cache.0.values", "values", 2, 80))
    fast = ("int4-g128", "int8-channel+a:int8-token", "nf4-g64", "int2-g64/int4-g64@3.25")
    assert without_kernels(fast, CACHE_FORMATS, entries) == []
    (message,) = without_kernels((*fast, "int4-g128+a:int4-token"), (), entries)
    assert "int4-g128+a:int4-token" in message
    assert "int8-channel+a:int8-token," not in message
    (message,) = without_kernels(fast, ("int4-asym", "int4-t32-asym", "int4-g20"), entries)
    assert "int4-t32-asym, int4-g20 in heads of 80" in message
