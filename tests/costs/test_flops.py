"""FLOPs compared with closed forms."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import cases
from adafreeze.costs import CountFlops


def test_a_linear_layer_costs_two_flops_per_weight_and_row():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with CountFlops() as count:
        y = layer(x)
        assert count.total == 2 * 16 * 8 * 4
        y.sum().backward()
    assert count.total == 3 * 2 * 16 * 8 * 4  # forward, gradient of the input, gradient of the weight


def test_inference_mode_counts_too():
    with torch.inference_mode(), CountFlops() as count:
        nn.Linear(8, 4)(torch.randn(16, 8))
    assert count.total == 2 * 16 * 8 * 4


def count_attention(backend, batch=2, heads=3, queries=16, keys=16, width=8, **settings):
    q = torch.randn(batch, heads, queries, width, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, width, requires_grad=True) for _ in range(2))
    with sdpa_kernel(backend), CountFlops() as count:
        out = nn.functional.scaled_dot_product_attention(q, k, v, **settings)
        forward = count.total
        out.sum().backward()
    return forward, count.total - forward


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (16, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_the_cpu_counts_as_its_products(queries, keys, masked):
    product = 2 * 2 * 3 * queries * keys * 8  # two FLOPs · batch · heads · queries · keys · width
    settings = {"attn_mask": torch.zeros(queries, keys)} if masked else {}
    math = count_attention(SDPBackend.MATH, queries=queries, keys=keys, **settings)
    fused = count_attention(SDPBackend.FLASH_ATTENTION, queries=queries, keys=keys, **settings)
    # Forward: QKᵀ and PV, on either path. Backward: the gradients of Q, K, P and V; the fused kernel, which saved no
    # P, computes QKᵀ once more. Otherwise the two paths count the same.
    assert math == (2 * product, 4 * product)
    assert fused == (2 * product, 4 * product + product)


def test_grouped_query_attention_counts_every_query_head():
    q = torch.randn(2, 4, 16, 8)
    k, v = torch.randn(2, 2, 2, 16, 8)
    with CountFlops() as count:
        nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert count.total == 2 * (2 * 2 * 4 * 16 * 16 * 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_the_forward_pass_twice(reentrant):
    layer = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 8, bias=False))
    x = torch.randn(16, 8, requires_grad=True)
    product = 2 * 16 * 8 * 4
    with CountFlops() as count:
        out = checkpoint(layer, x, use_reentrant=reentrant)
        assert count.total == 2 * product
        out.sum().backward()
    recomputed = count.total - 2 * product - 4 * product  # a backward pass has two products per layer
    # Non-reentrant stops at the last saved tensor, which the second layer's output is not.
    assert recomputed == (2 * product if reentrant else product)


@pytest.mark.parametrize(("bias", "weight", "products"), [(True, True, 3), (False, False, 2)])
def test_frozen_parameters_cost_no_gradient(bias, weight, products):
    layer = nn.Linear(8, 4, bias=bias).requires_grad_(weight)
    with CountFlops() as count:
        layer(torch.randn(16, 8, requires_grad=True)).sum().backward()
    assert count.total == products * 2 * 16 * 8 * 4


def test_batched_and_nested_products():
    a, b = torch.randn(5, 6, 7), torch.randn(5, 7, 8)
    with CountFlops() as outer:
        torch.bmm(a, b)
        with CountFlops() as inner:
            torch.einsum("bij,bjk->bik", a, b)
    assert (outer.total, inner.total) == (2 * 2 * 5 * 6 * 7 * 8, 2 * 5 * 6 * 7 * 8)


def test_convolution_and_embedding():
    with CountFlops() as count:
        nn.Embedding(10, 8)(torch.arange(5))  # a look-up has no products
        assert count.total == 0
        nn.Conv2d(3, 4, kernel_size=2, stride=2)(torch.randn(1, 3, 8, 8))
    assert count.total == 2 * (4 * 4 * 4) * (3 * 2 * 2)  # outputs · inputs of each


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bert_costs_its_closed_form(attention):
    # per block: 4 projections h², 2 of the feed-forward part h·f, 2 attention products of length²·h
    model = cases.base_model("bert", blocks=3, dropout=0.0).eval()
    model.set_attn_implementation(attention)
    rows, length, h, f = 4, 12, 32, 64
    block = 2 * rows * length * (4 * h * h + 2 * h * f) + 2 * 2 * rows * length * length * h
    head = 2 * rows * (h * h + 2 * h)  # pooler and classifier, on the first token
    with torch.no_grad(), CountFlops() as count:
        model(**cases.batch("bert", rows, length))
    assert count.total == 3 * block + head
