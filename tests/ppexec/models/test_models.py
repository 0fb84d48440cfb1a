"""Models: found by name, alike in every process, each parameter drawn from its own stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppexec import Model
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model, resolve_factory
from ppexec.models.mlp import MLPBlock
from ppexec.models.seeds import parameter_seed
from tests.support.chains import Chain, chains
from tests.support.factories import spelled
from tests.support.remote import tiny

CPU = torch.device("cpu")


# Load


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt5", "unknown model 'gpt5': take gpt, mlp or your own as package.module:factory"),
        ("", "unknown model ''"),
        (":factory", "unknown model ':factory'"),
        ("module:", "unknown model 'module:'"),
        ("no_such_module:factory", "cannot import 'no_such_module'.*run where it can be found"),
        ("tests.support.factories:nothing", "has no function 'nothing'"),
        ("tests.support.factories:INTEGERS", "has no function 'INTEGERS'"),
    ],
)
def test_a_model_that_is_not_found_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_factory(name)


def test_a_model_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_and_nowhere_else.py").write_text("def make(config): return config\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert resolve_factory("here_and_nowhere_else:make")(3) == 3  # type: ignore[arg-type]


def test_what_a_model_prints_is_not_on_standard_output(tmp_path: Path) -> None:
    """Its module, factory, data, layers and loss may print; with --json standard output is one object all the same."""
    (tmp_path / "loud.py").write_text(
        "print('module')\n"
        "import torch, ppexec\n"
        "class Loud(torch.nn.Linear):\n"
        "    def forward(self, value):\n"
        "        print('layer')\n"
        "        return super().forward(value)\n"
        "def make(config):\n"
        "    print('factory')\n"
        "    def sample(index):\n"
        "        print('data')\n"
        "        return torch.ones(2, 4), torch.ones(2, 4)\n"
        "    def loss(output, target):\n"
        "        print('loss')\n"
        "        return (output - target).square().mean()\n"
        "    return ppexec.Model(layers=[Loud(4, 4) for _ in range(4)], sample=sample, loss=loss)\n"
    )
    words = ["verify", "--model", "loud:make", "--layers", "4", "--ranks", "2", "--microbatches", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ppexec.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gradients_bit_equal"] is True
    for word in ("module", "factory", "data", "layer", "loss"):
        assert word in done.stderr.split()


def test_a_factory_that_gives_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the factory must give a ppexec\.Model, got list"):
        load_model(tiny(model="tests.support.factories:not_a_model"))


def test_a_model_of_another_length_is_refused_with_both_numbers() -> None:
    model = Chain(shape=(1, 2), integers=False, layers='[["linear", 2, 2, "float32"]]').name
    with pytest.raises(ValueError, match="has 1 layers, the configuration says 4: pass --layers 1"):
        load_model(tiny(model=model))


@given(chains(), st.integers(0, 2**40))
def test_a_factory_that_draws_weights_draws_the_same_in_every_process(chain: Chain, seed: int) -> None:
    """Building a model leaves the process's own stream alone, and does not depend on it."""
    config = tiny(model=chain.name, layers=chain.length, ranks=1, seed=seed)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_model(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for one, other in zip(first.layers, load_model(config).layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Initialize


def drawn(layer: nn.Module, *, index: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    initialized = initialize_layer(layer, index=index, seed=seed, device=CPU)
    assert initialized is layer
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(st.integers(0, 2**40), st.integers(0, 999))
def test_parameters_depend_on_seed_layer_and_name_alone(seed: int, index: int) -> None:
    with torch.device("meta"):
        on_meta = MLPBlock(3, 5)
    torch.manual_seed(1)
    first = drawn(MLPBlock(3, 5), index=index, seed=seed)
    torch.manual_seed(2)
    assert equal(first, drawn(MLPBlock(3, 5), index=index, seed=seed))
    assert equal(first, drawn(on_meta, index=index, seed=seed))
    assert not equal(first, drawn(MLPBlock(3, 5), index=index + 1, seed=seed))
    assert not equal(first, drawn(MLPBlock(3, 5), index=index, seed=seed + 1))


def test_a_parameter_is_drawn_from_the_stream_of_its_name() -> None:
    """Another parameter before it, or another number of them, does not move it."""
    bias_free = drawn(nn.Linear(4, 4, bias=False))
    assert torch.equal(bias_free["weight"], drawn(nn.Linear(4, 4))["weight"])
    torch.manual_seed(parameter_seed(0, layer=0, name="weight"))
    assert torch.equal(bias_free["weight"], nn.Linear(4, 4, bias=False).weight)


def test_two_layers_of_a_block_differ() -> None:
    block = drawn(MLPBlock(4, 4))
    assert not torch.equal(block["fc1.weight"], block["fc2.weight"])


def test_drawing_leaves_the_process_stream_alone() -> None:
    block = MLPBlock(4, 4)
    state = torch.get_rng_state()
    drawn(block)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_keeps_what_no_module_of_it_draws() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([3.0]))
            self.linear = nn.Linear(2, 2)

    layer = Scaled()
    before = layer.linear.weight.detach().clone()
    after = drawn(layer)
    assert torch.equal(after["scale"], torch.tensor([3.0]))
    assert not torch.equal(after["linear.weight"], before)


def test_the_outermost_module_draws() -> None:
    class Quarters(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 0.25)
            nn.init.uniform_(self.bias)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Quarters(2, 2)

        def reset_parameters(self) -> None:
            nn.init.constant_(self.inner.weight, 0.5)

    assert torch.equal(drawn(Halves())["inner.weight"], torch.full((2, 2), 0.5))
    assert torch.equal(drawn(nn.Sequential(Quarters(2, 2)))["0.weight"], torch.full((2, 2), 0.25))


def test_what_is_on_the_meta_device_and_nobody_can_draw_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(2, device="meta"))

    with pytest.raises(ValueError, match=r"layer 7 \(Scaled\) has 'scale' on the meta device and no reset_parameters"):
        drawn(Scaled(), index=7)
    with torch.device("meta"):
        normed = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"layer 2 \(BatchNorm1d\) has 'running_mean' on the meta device"):
        drawn(normed, index=2)


# The built-in MLP


def test_an_mlp_block_is_fc1_gelu_fc2_and_keeps_the_shape() -> None:
    block = MLPBlock(3, 7)
    inputs = torch.randn(2, 5, 3)
    expected = block.fc2(nn.functional.gelu(block.fc1(inputs)))
    assert torch.equal(block(inputs), expected)
    assert expected.shape == inputs.shape
    assert [tuple(p.shape) for p in block.parameters()] == [(7, 3), (7,), (3, 7), (3,)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_mlp_has_the_configured_sizes_and_takes_no_memory_until_cut(dtype: str) -> None:
    config = tiny(layers=6, hidden=4, intermediate=9, seq=3, micro_batch_size=2, dtype=dtype)
    model = load_model(config)
    assert isinstance(model, Model)
    assert [type(layer) for layer in model.layers] == [MLPBlock] * 6
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())
    assert all(parameter.dtype == config.torch_dtype for layer in model.layers for parameter in layer.parameters())
    inputs, targets = model.sample(0)
    assert inputs.shape == targets.shape == (2, 3, 4)
    assert inputs.dtype == targets.dtype == config.torch_dtype


def test_a_sample_of_the_mlp_is_the_same_in_microbatches_of_any_size() -> None:
    """Sample 5 is sample 5, alone or in a microbatch of three."""
    one = load_model(tiny(micro_batch_size=1)).sample
    three = load_model(tiny(micro_batch_size=3)).sample
    singles = [one(index) for index in range(3, 6)]
    inputs, targets = three(1)
    assert torch.equal(inputs, torch.cat([inputs for inputs, _ in singles]))
    assert torch.equal(targets, torch.cat([targets for _, targets in singles]))
    assert not torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs, targets)
    assert not torch.equal(inputs, load_model(tiny(micro_batch_size=3, seed=1)).sample(1)[0])


def test_a_random_chain_has_a_name_that_workers_can_build() -> None:
    chain = Chain(shape=(1, 2), integers=True, layers='[["embedding", 3, "float32"], ["tanh", "float32"]]')
    assert chain.name == spelled("chain", **chain.arguments)
    model = load_model(tiny(model=chain.name, layers=2))
    assert [type(layer) for layer in model.layers] == [nn.Embedding, nn.Tanh]
