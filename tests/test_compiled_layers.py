"""The UNet's layers where they are compiled: the same results, in the order of channels last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ldm.nn.attention import FeedForward, GatedLinear, SpatialTransformer
from ldm.nn.convolution import Conv2d
from ldm.nn.layers import Upsample
from ldm.nn.norm import GroupNorm

FEATURES = (3, 16, 6, 4)
MAPS: dict[str, Callable[[], tuple[nn.Module, tuple[object, ...]]]] = {
    "norm": lambda: (GroupNorm(4, 16, eps=1e-3), ()),
    "convolution": lambda: (Conv2d(16, 8, 3, padding=1), ()),
    "twice the size": lambda: (Upsample(16), (torch.Size((12, 8)),)),
    "another size": lambda: (Upsample(16), (torch.Size((11, 8)),)),
    "transformer": lambda: (
        SpatialTransformer(16, 8, heads=2, depth=1, groups=4, linear=False),
        (torch.randn(3, 5, 8),),
    ),
    "transformer, linear": lambda: (
        SpatialTransformer(16, 8, heads=2, depth=1, groups=4, linear=True),
        (torch.randn(3, 5, 8),),
    ),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def randomized(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def both_ways(
    run: Callable[..., torch.Tensor], layer: nn.Module, features: torch.Tensor, *others: object
) -> dict[str, torch.Tensor]:
    """Output and gradients."""
    layer.zero_grad()
    inputs = features.detach().clone().requires_grad_()
    output = run(inputs, *others)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * upstream).sum().backward()
    gradients = {name: one.grad for name, one in layer.named_parameters() if one.requires_grad}
    return {"output": output.detach(), "features": inputs.grad, **gradients}


def compiled(layer: nn.Module) -> Callable[..., torch.Tensor]:
    return torch.compile(layer, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("name", MAPS)
def test_it_computes_the_same_and_keeps_the_order(name: str) -> None:
    layer, others = MAPS[name]()
    randomized(layer)
    features = (10 + torch.randn(FEATURES)).contiguous(memory_format=torch.channels_last)
    plain = both_ways(layer, layer, features, *others)
    fast = both_ways(compiled(layer), layer, features, *others)
    assert fast.keys() == plain.keys()
    for part in plain:
        torch.testing.assert_close(fast[part], plain[part], rtol=1e-3, atol=1e-3)
    assert fast.pop("output").is_contiguous(memory_format=torch.channels_last)
    assert fast.pop("features").is_contiguous(memory_format=torch.channels_last)
    assert all(gradient.is_contiguous() for gradient in fast.values())


def graphs_of(
    layer: nn.Module, features: torch.Tensor, *others: object
) -> tuple[torch.fx.Graph, torch.fx.Graph]:
    """What a compiler is given, forward and backward."""
    graphs = []

    def keep(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    both_ways(torch.compile(layer, backend=backend, dynamic=False), layer, features, *others)
    there, back = graphs
    return there, back


def calls(graph: torch.fx.Graph, name: str) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if name in str(node.target)]


@pytest.mark.parametrize(
    ("name", "left_out"), [("norm", "group_norm"), ("twice the size", "index")]
)
def test_what_a_gpu_is_slow_at_is_left_out(name: str, left_out: str) -> None:
    layer, others = MAPS[name]()
    features = torch.randn(FEATURES).contiguous(memory_format=torch.channels_last)
    assert not any(calls(graph, left_out) for graph in graphs_of(layer, features, *others))


def test_gradients_of_a_gate_are_not_joined() -> None:
    _, back = graphs_of(GatedLinear(8, 16), torch.randn(2, 5, 8))
    assert not [node for node in calls(back, "cat") if node.meta["val"].shape[:-1] == (2, 5)]


def test_weights_are_turned_around_once() -> None:
    """Where the order of a convolution's operands differs, it copies them at each call."""
    layer = Conv2d(16, 8, 3, padding=1)
    there, back = graphs_of(layer, torch.randn(FEATURES).to(memory_format=torch.channels_last))
    (forward,), (backward,) = calls(there, "convolution"), calls(back, "convolution_backward")
    for operand in (*forward.args[:2], *backward.args[:3]):
        assert operand.meta["val"].is_contiguous(memory_format=torch.channels_last)
    given = {one.meta["val"].shape: one.meta["val"] for one in back.output_node().args[0]}
    assert given[layer.weight.shape].is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "mean", "spread", "allowed"),
    [
        (torch.float32, 1000, 1, 2e-3),
        (torch.bfloat16, 100, 100, 1e-2),
        (torch.float16, 100, 1000, 2e-3),
    ],
)
def test_a_norm_is_exact(dtype: torch.dtype, mean: float, spread: float, allowed: float) -> None:
    """Of features in any precision, far from zero or far apart, whose squares float16 lacks."""
    layer = randomized(GroupNorm(4, 16))
    features = (mean + spread * torch.randn(FEATURES)).to(dtype)
    fast = both_ways(compiled(layer), layer, features)
    exact = both_ways(layer.double(), layer, features.double())
    assert fast["features"].dtype == dtype and fast["output"].dtype == torch.float32
    for part, value in exact.items():
        error = (fast[part].double() - value).norm() / value.norm()
        assert float(error) < allowed, part


def test_both_halves_are_gated() -> None:
    layer, tokens = randomized(FeedForward(8)), torch.randn(2, 5, 8)
    plain = both_ways(layer, layer, tokens)
    for part, value in both_ways(compiled(layer), layer, tokens).items():
        torch.testing.assert_close(value, plain[part])


def test_an_adapter_of_the_gate_is_not_left_out() -> None:
    layer, tokens = GatedLinear(8, 16), torch.randn(2, 5, 8)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), layer)
    randomized(layer)
    plain = both_ways(layer, layer, tokens)
    for part, value in both_ways(compiled(layer), layer, tokens).items():
        torch.testing.assert_close(value, plain[part])
