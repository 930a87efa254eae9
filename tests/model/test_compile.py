"""torch.compile per block."""

import shutil

import pytest
import torch

from sonoforge_trainer.model import compile_blocks

pytestmark = pytest.mark.filterwarnings(
    # Raised by torch's own tracer when it looks at inputs that are not leaves.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def outcome(backbone, crops):
    """Features and gradients of one training pass with drop path."""
    backbone.zero_grad()
    outputs = backbone(crops, generator=torch.Generator().manual_seed(5))
    sum(o.cls.square().mean() + o.patches.square().mean() for o in outputs).backward()
    return [o.patches.detach() for o in outputs], [p.grad for p in backbone.parameters() if p.grad is not None]


@pytest.fixture
def crops(wave):
    return [
        wave({"shape": (3, 3, 16, 16), "scale": 2.0, "phase": 0.1}),
        wave({"shape": (4, 3, 8, 8), "scale": 2.0, "phase": 0.2}),
    ]


def test_a_block_is_one_graph_and_all_blocks_share_it(lively, crops):
    """Traced without generating code: no break inside a block, and one trace for the three of them."""
    traces = []

    def count(graph, _inputs):
        traces.append(graph)
        return graph.forward

    torch.compiler.reset()
    backbone = lively(image_size=16, drop_path=0.3).train()
    eager, _ = outcome(backbone, crops)
    for block in backbone.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=count)
    traced, _ = outcome(backbone, crops)
    assert len(traces) == 1
    torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler; g++ is not here")
def test_compiled_blocks_equal_eager_ones_forward_and_backward(lively, crops):
    torch.compiler.reset()
    backbone = lively(image_size=16, drop_path=0.3, registers=1, depth=2).train()
    names = list(backbone.state_dict())
    features, gradients = outcome(backbone, crops)
    compile_blocks(backbone)
    compiled_features, compiled_gradients = outcome(backbone, crops)
    torch.testing.assert_close(compiled_features, features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-5)
    assert list(backbone.state_dict()) == names
