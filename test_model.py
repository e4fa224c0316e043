"""
Test the model against transformers' GptOssForCausalLM, each layer against its formula, and what the scripts do.

    pytest -q test_model.py

No test needs a network. Tests that need gpt-oss's or GPT-2's tokenizer run where TIKTOKEN_CACHE_DIR holds its file.
"""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # a second thread slows down models as small as these

import ast
import base64
import contextlib
import copy
import gc
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from filelock import FileLock
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd

import config
import model
import prepare
import sample
from model import FULL, GPT, MXFP4, SLIDING, GPTConfig, KVCache, LinearCrossEntropy

torch.set_num_threads(1)  # the same bits in this process as in those that `start` makes
sys.modules['matplotlib'] = None  # plots are slow
ROOT = Path(__file__).parent
SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=16,
             rope_original_max_position_embeddings=64)
SQUARE = dict(hidden_size=64, intermediate_size=64)  # the experts' layout cannot be told from the shape


def make(seed=0, **changes):
    """A small model. No parameter is zero, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**SMALL, **changes}))
    for name, p in gpt.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name), std=0.2)
    return gpt


def reference(gpt, path):
    """transformers' model with the same weights, by way of save_pretrained."""
    transformers = pytest.importorskip('transformers')
    gpt.save_pretrained(path)
    return transformers.GptOssForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager')


def to_ours(name, tensor):
    """A parameter of transformers, or its gradient, in our name and layout. It does not use model.py's conversion."""
    if '.experts.' not in name:
        return name, tensor
    if 'gate_up' in name:
        tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
    if name.endswith('_bias'):
        return name.replace('_proj_bias', '_bias'), tensor
    return name.replace('_proj', '_weight'), tensor.transpose(1, 2)


def gradients(gpt):
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


def assert_gradients(ours, expected, tolerance):
    """Each gradient within a relative tolerance, in norm."""
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        error = torch.linalg.vector_norm(gradient - expected[name])
        assert error <= tolerance * torch.linalg.vector_norm(expected[name]) + 1e-7, name


def off(ours, theirs):
    """Relative distance of two tensors, in norm."""
    return (torch.linalg.vector_norm(ours.float() - theirs) / torch.linalg.vector_norm(theirs)).item()


# --- parity -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('length, changes', [
    (300, {}), (1, {}), (16, {}), (17, {}), (33, dict(head_dim=64)), (600, dict(num_hidden_layers=2)),
    (100, dict(num_key_value_heads=1)), (100, dict(num_key_value_heads=6)), (50, dict(sliding_window=1)),
    (100, dict(num_local_experts=1, num_experts_per_tok=1)), (20, dict(num_local_experts=64, num_experts_per_tok=1)),
    (100, dict(num_local_experts=8, num_experts_per_tok=8)), (100, dict(tie_word_embeddings=True)),
    (100, dict(layer_types=[FULL, FULL, SLIDING])), (100, dict(rope_factor=1.0)), (100, dict(rope_truncate=True)),
    (100, dict(hidden_size=40, intermediate_size=56))], ids=str)
def test_parity(length, changes, tmp_path):
    """Logits, loss and all gradients against transformers in fp32, past the window (16) and YaRN's original 64."""
    ours = make(**changes)
    theirs = reference(ours, tmp_path)
    tokens = torch.randint(97, (2, length + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, :length // 3] = -1
    logits, loss = ours(idx, targets)
    expected_logits = theirs(idx).logits
    expected_loss = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert (logits - expected_logits).abs().max() <= 1e-4
    assert abs(loss - expected_loss) <= 1e-5
    loss.backward()
    expected_loss.backward()
    expected = dict(to_ours(name, p.grad) for name, p in theirs.named_parameters())
    found = gradients(ours)
    assert found.keys() == dict(ours.named_parameters()).keys()
    assert_gradients(found, expected, 1e-4)
    # the loss without the logits is computed in another way
    ours.zero_grad()
    loss = ours(idx, targets, return_logits=False)[1]
    assert abs(loss - expected_loss) <= 1e-5
    (3 * loss).backward()
    assert_gradients({name: gradient / 3 for name, gradient in gradients(ours).items()}, found, 1e-5)
    for return_logits in (True, False):  # count replaces the number of targets; without a target the loss is 0
        part = ours(idx, targets, return_logits, torch.tensor(7))[1] * 7 / (targets >= 0).sum()
        assert abs(part - expected_loss) <= 1e-5 and ours(idx, targets * 0 - 1, return_logits)[1] == 0


# --- the layers -------------------------------------------------------------------------------------------------------

def flash_logits(q, k, scale, window_size_left, window_size_right):
    """FlashAttention's masked logits (B, H, T, T), fp32."""
    distance = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))
    hidden = (distance < -window_size_right) | ((distance > window_size_left) & (window_size_left >= 0))
    logits = torch.einsum('bthd,bshd->bhts', q.float(), k.float().repeat_interleave(q.size(2) // k.size(2), dim=2))
    return (logits * scale).masked_fill(hidden, -math.inf)


def flash_forward(q, k, v, *sizes, **options):
    """What aten._flash_attention_forward returns on CUDA."""
    logits = flash_logits(q, k, **options)
    y = torch.einsum('bhts,bshd->bthd', logits.softmax(-1), v.float().repeat_interleave(q.size(2) // v.size(2), dim=2))
    state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return y.to(q.dtype), logits.logsumexp(-1), *state, torch.zeros(0)


def flash_backward(dy, q, k, v, y, lse, *sizes, scale, **options):
    """What aten._flash_attention_backward computes on CUDA, from the outputs and denominators that it is given."""
    weights, groups = (flash_logits(q, k, scale, **options) - lse[..., None]).exp(), q.size(2) // k.size(2)
    wide_k, wide_v = (x.float().repeat_interleave(groups, dim=2) for x in (k, v))
    dweights = torch.einsum('bthd,bshd->bhts', dy.float(), wide_v) - (dy.float() * y.float()).sum(-1).mT[..., None]
    dlogits = weights * dweights * scale
    dk, dv = torch.einsum('bhts,bthd->bshd', dlogits, q.float()), torch.einsum('bhts,bthd->bshd', weights, dy.float())
    dk, dv = (x.unflatten(2, (-1, groups)).sum(3) for x in (dk, dv))
    return tuple(x.to(q.dtype) for x in (torch.einsum('bhts,bshd->bthd', dlogits, wide_k), dk, dv))


@pytest.fixture
def flash():
    """CPU stand-ins for FlashAttention on CUDA."""
    library = torch.library.Library('aten', 'IMPL')
    library.impl('_flash_attention_forward', flash_forward, 'CPU')
    library.impl('_flash_attention_backward', flash_backward, 'CPU')
    yield
    library._destroy()


@pytest.mark.parametrize('T, window', [(40, None), (40, 64), (40, 8), (37, 8), (9, 8), (1, 8)])
def test_flash_attention(T, window, flash, monkeypatch):
    """CUDA's way gives the same values and gradients, eager and compiled."""
    torch._dynamo.reset()
    check_attention(model.FlashAttention.apply, torch.float32, 1e-5, T, window)
    compiled = torch.compile(model.FlashAttention.apply, backend='aot_eager', fullgraph=True)
    check_attention(compiled, torch.bfloat16, 0.02, T, window)
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    monkeypatch.setattr(torch.backends.cuda, 'is_flash_attention_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(major=9))
    monkeypatch.setattr(F, 'scaled_dot_product_attention', None)
    check_attention(model.attention, torch.bfloat16, 0.02, T, window)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('T, window', [(40, None), (40, 64), (40, 8), (37, 8), (9, 8), (1, 8)])
def test_attention(dtype, tolerance, T, window):
    check_attention(model.attention, dtype, tolerance, T, window)


def check_attention(function, dtype, tolerance, T, window):
    """Values and gradients against the explicit softmax with one more column."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in ((2, T, 6, 16), (2, T, 2, 16), (2, T, 2, 16), (6,), (2, T, 6, 16))]
    q, k, v, sinks, weight = (x.to(dtype).float().requires_grad_() for x in inputs)
    ours = function(*(x.to(dtype) for x in (q, k, v)), sinks, window)
    found = torch.autograd.grad((ours.float() * weight).sum(), (q, k, v, sinks))
    logits = torch.einsum('bthd,bshd->bhts', q, k.repeat_interleave(3, dim=2)) / 4
    distance = torch.arange(T)[:, None] - torch.arange(T)
    logits = logits.masked_fill((distance < 0) | (distance >= (window or T)), -math.inf)
    weights = torch.cat((logits, sinks[:, None, None].expand(2, 6, T, 1)), dim=-1).softmax(-1)[..., :-1]
    expected = torch.einsum('bhts,bshd->bthd', weights, v.repeat_interleave(3, dim=2))
    assert off(ours, expected) < tolerance
    for gradient, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), (q, k, v, sinks))):
        assert off(gradient, theirs) < tolerance or theirs.norm() < 1e-5


def make_experts(rows, **changes):
    """Experts, and inputs and choices for rows tokens. Two of the five experts get none."""
    torch.manual_seed(0)
    experts = model.Experts(GPTConfig(**SMALL | changes))
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, router_weights = torch.randn(rows, experts.down_weight.size(1)), torch.rand(rows, 2)
    chosen = torch.stack([torch.tensor([0, 2, 3])[torch.randperm(3)[:2]] for _ in range(rows)])
    return experts, x.requires_grad_(), router_weights.requires_grad_(), chosen, torch.randn_like(x)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
@pytest.mark.parametrize('rows, is_cuda', [(1, False), (3, False), (300, False), (3, True), (300, True)])
def test_experts(rows, is_cuda, dtype, tolerance, monkeypatch):
    """Values, on both sides of the clamps, and gradients against a loop over tokens, in training and in evaluation."""
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(major=9))
    limit = 1.0 if dtype == torch.float32 else 7.0  # in 16 bits rounding decides what a clamp reaches
    changes = dict(hidden_size=24, intermediate_size=16, swiglu_limit=limit)
    experts, x, router_weights, chosen, weight = make_experts(rows, **changes)
    (w1, b1, w2, b2), outputs = experts.parameters(), []
    for n, j in itertools.product(range(rows), range(2)):
        e = chosen[n, j]
        gate, up = (w1[e] @ x[n] + b1[e]).chunk(2)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        outputs.append((w2[e] @ h + b2[e]) * router_weights[n, j])
    expected, inputs = torch.stack(outputs).view(rows, 2, 24).sum(1), [x, router_weights, w1, b1, w2, b2]
    monkeypatch.setattr(torch.Tensor, 'is_cuda', is_cuda)  # then rows are moved without atomics
    ours, counts = experts(x.to(dtype), chosen, router_weights.to(dtype))
    assert ours.dtype == dtype and off(ours, expected) < tolerance
    assert torch.equal(counts, chosen.flatten().bincount(minlength=5))
    assert off(experts.eval()(x.to(dtype), chosen, router_weights.to(dtype))[0], expected) < tolerance
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, other in zip(torch.autograd.grad((ours.float() * weight).sum(), inputs), theirs):
        assert off(gradient, other) < tolerance
        assert len(gradient) != 5 or not gradient[[1, 4]].any()


def test_balance_loss():
    """1 when every expert is as likely, and transformers' for one layer over k. The counters count in training only."""
    modeling = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
    gpt, idx, logits = make(num_hidden_layers=1, router_aux_loss_coef=0.5), torch.randint(97, (2, 40)), []
    router = gpt.model.layers[0].mlp.router
    router.register_forward_hook(lambda module, x, y: logits.append(y))
    loss = gpt(idx, idx)[1]
    expected = modeling.load_balancing_loss_func((logits[0],), num_experts=5, top_k=2) / 2
    assert (loss - gpt.eval()(idx, idx)[1]).item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert gpt.balance.item() == pytest.approx(expected.item(), rel=1e-4)
    assert gpt.expert_load.tolist() == [logits[0].topk(2).indices.flatten().bincount(minlength=5).tolist()]
    gpt.reset_counters()
    assert not gpt.expert_load.any() and not gpt.balance
    router.weight.data.zero_()
    router.bias.data.zero_()
    assert gpt.train().hidden_states(idx)[1].item() == pytest.approx(1)


def test_loss_in_chunks():
    """A vocabulary so large that the rows are divided into chunks: value and gradients are F.cross_entropy's."""
    torch.manual_seed(0)
    x, w = torch.randn(140, 8, requires_grad=True), torch.randn(2 ** 18, 8, requires_grad=True)
    targets = torch.randint(-1, len(w), (140,))
    assert 2 ** 25 // len(w) < 140
    losses = (LinearCrossEntropy.apply(x, w, targets, True),
              F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction='sum'))
    for ours, theirs in zip(*((loss, *torch.autograd.grad(loss, (x, w))) for loss in losses)):
        assert off(ours, theirs) < 1e-4


# --- each fast path equals the plain one ------------------------------------------------------------------------------

def test_bf16():
    """Autocast to bf16: within 4 % of fp32 in the logits and 12 % in a matrix's gradient; transformers': 3.3 and 11."""
    # every expert is chosen, because rounding decides where the router's choice is close
    gpt, results = make(num_hidden_layers=2, num_experts_per_tok=5), []
    idx, targets = torch.randint(97, (2, 300)), torch.randint(97, (2, 300))
    for enabled, return_logits in ((False, True), (True, True), (True, False)):
        gpt.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits, loss = gpt(idx, targets, return_logits)
        loss.backward()
        results.append((logits, gradients(gpt)))
        assert loss.dtype == torch.float32
    (exact, expected), (logits, _), _ = results
    assert logits.dtype == torch.bfloat16 and off(logits, exact) < 0.04
    for _, found in results[1:]:
        assert max(off(found[name], expected[name]) for name in found if name.endswith('weight')) < 0.12


def test_grouped_mm(monkeypatch):
    """F.grouped_mm gives what the loop over experts gives, and zero gradients where sm100 gives NaN for no rows."""
    experts, x, router_weights, chosen, weight = make_experts(60, **SQUARE)
    calls, results, grouped_mm = [], [], F.grouped_mm
    chosen[chosen == 0] = 1  # no rows for expert 0

    def stand_in(x, w, offs):
        calls.append(1)
        w.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.nan))  # as on sm100
        return grouped_mm(x, w, offs=offs)

    monkeypatch.setattr(F, 'grouped_mm', stand_in)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(major=10))
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.Tensor, 'is_cuda', is_cuda)
        y = experts(x.bfloat16(), chosen, router_weights.bfloat16())[0]
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, router_weights, *experts.parameters()])))
        assert len(calls) == 2 * is_cuda
    for plain, ours in zip(*results):
        assert off(ours, plain.float()) < 0.02


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_decoding(dtype):
    """The step that `generate(compile=True)` compiles is as near to fp32 as the eager one, in both kinds of layers."""
    # every expert is chosen, because rounding decides where the router's choice is close
    gpt, idx = make(num_experts_per_tok=5, num_hidden_layers=2).eval().to(dtype), torch.randint(97, (3, 24))
    exact, steps, errors = copy.deepcopy(gpt).float(), [], []
    torch._dynamo.reset()
    compiled = torch.compile(gpt.next_logits, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        for step, one in ((compiled, gpt), (gpt.next_logits, gpt), (exact.next_logits, exact)):
            steps.append((step, make_caches(one, 3, 40)))
            one.next_logits(idx[:, :20], steps[-1][1])
        for token in idx[:, 20:].split(1, dim=1):
            ours, eager, expected = (step(token, caches) for step, caches in steps)
            errors.append((off(ours, expected), off(eager, expected)))
    ours, eager = np.mean(errors, axis=0)
    assert ours < (1e-4 if dtype == torch.float32 else 1.5 * eager), errors


def test_graphs_of_decoding(monkeypatch):
    """Six prompt lengths compile two graphs at most. CUDA graphs need that all a graph changes has a fixed address."""
    gpt, graphs, compile = make(num_hidden_layers=2), [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        metadata = torch._guards.TracingContext.get().fw_metadata
        changed = {i for i, info in enumerate(metadata.input_info) if info.mutates_data}
        assert changed and changed <= {*metadata.static_input_indices}
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: compile(function, backend=backend))
    for length in (1, 9, 20, 200, 600, 1100):
        idx = torch.randint(97, (1, length))
        assert torch.equal(gpt.generate(idx, 4, temperature=0, compile=True), gpt.generate(idx, 4, temperature=0))
    assert len(graphs) <= 2


def make_caches(gpt, batch, length):
    dtype, layer_types = gpt.lm_head.weight.dtype, gpt.config.layer_types
    return [KVCache(gpt.config, layer_type, batch, length, dtype, 'cpu') for layer_type in layer_types]


@pytest.mark.parametrize('how', ['compiled', 'recomputed'])
def test_another_way_to_train(how):
    """Compiled, or with activation checkpointing, loss, gradients and counters are those of the plain model."""
    changes = dict(dropout=0.2 if how == 'recomputed' else 0.0, router_aux_loss_coef=0.1)
    gpt, idx, results = make(num_hidden_layers=2, **changes), torch.randint(97, (2, 40)), []
    torch._dynamo.reset()
    for run in (gpt, torch.compile(gpt, backend='aot_eager') if how == 'compiled' else gpt):
        gpt.recompute = how == 'recomputed' and bool(results)
        gpt.zero_grad()
        gpt.reset_counters()
        torch.manual_seed(1)
        loss = run(idx, idx, return_logits=False)[1]
        loss.backward()
        results.append([loss, gpt.balance.clone(), gpt.expert_load.clone(), *gradients(gpt).values()])
    assert how == 'compiled' or gpt(idx, idx)[1] != results[0][0]  # without the seed dropout is another
    for plain, other in zip(*results):
        torch.testing.assert_close(other, plain, rtol=1e-4 if how == 'compiled' else 1e-6, atol=1e-6)


def test_nothing_is_quadratic():
    """Twice the context doubles the largest tensor that is kept for backward. None is (T, T) or (T, V)."""
    largest = []
    for vocab_size, length in ((97, 1024), (97, 2048), (50000, 2048)):
        gpt, idx, sizes = make(vocab_size=vocab_size), torch.randint(97, (1, length)), []
        keep = lambda x: sizes.append(x.untyped_storage().nbytes()) or x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            gpt(idx, idx, return_logits=False)
        largest.append(max(sizes))
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 4 * 2048 ** 2 and largest[2] < 4 * 2048 * 50000 / 2


# --- cache and sampling -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(num_key_value_heads=1), dict(sliding_window=1)])
@pytest.mark.parametrize('prompt', [1, 15, 16, 40])
def test_cache(prompt, changes):
    """Decoding with the cache, past the window, gives the whole sequence's states. Sliding layers keep 16 keys."""
    gpt, idx = make(**changes).eval(), torch.randint(97, (2, 70))
    caches = make_caches(gpt, 2, 70)
    with torch.inference_mode():
        parts = idx[:, :prompt], *idx[:, prompt:].split(1, dim=1)
        states = [gpt.hidden_states(part, caches)[0] for part in parts]
        torch.testing.assert_close(torch.cat(states, 1), gpt.hidden_states(idx)[0], rtol=0, atol=1e-4)
    for cache, layer_type in zip(caches, gpt.config.layer_types):
        assert cache.k.size(2) == (gpt.config.sliding_window if layer_type == SLIDING else 70)
        assert cache.position == 70


def test_generate():
    gpt, idx = make(), torch.randint(97, (3, 5))
    greedy = gpt.generate(idx, 30, temperature=0)
    assert gpt.training and greedy.shape == (3, 35) and torch.equal(greedy[:, :5], idx)
    gpt.eval()
    for t in range(5, 35):
        assert torch.equal(gpt(greedy[:, :t])[0][:, -1].argmax(-1), greedy[:, t])
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-6)):
        assert torch.equal(gpt.generate(idx, 30, **narrow), greedy)
    torch.manual_seed(1)
    first = gpt.generate(idx, 30)
    assert first[:, 5:].max() >= 9 > gpt.generate(idx, 30, vocab_size=9)[:, 5:].max()
    gpt.train()
    next(gpt.stream(idx, 30))
    assert gpt.training  # a stream that is left early ends evaluation mode too


def test_context():
    """With a context a full layer keeps a ring of that many tokens: it is a sliding layer with that window."""
    gpt, sliding = make(layer_types=[FULL] * 3).eval(), make(layer_types=[SLIDING] * 3, sliding_window=30).eval()
    idx, caches = torch.randint(97, (1, 50)), make_caches(gpt, 1, 30)
    with torch.inference_mode():
        for token in idx.split(1, dim=1):
            logits = gpt.next_logits(token, caches)
        torch.testing.assert_close(logits, sliding(idx)[0][:, -1], rtol=0, atol=1e-4)
    other = torch.cat(((idx[:, :10] + 1) % 97, idx[:, 10:]), dim=1)
    assert torch.equal(*(gpt.generate(x, 20, temperature=0, context=30)[:, 50:] for x in (idx, other)))


def test_sampling_distribution():
    """What temperature, top_k, top_p and min_p leave, against the same counted by hand."""
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    for arguments, expected in (
            ((1.0, None, None, None), probabilities.tolist()), ((1.0, 2, None, None), [5 / 7, 2 / 7, 0, 0, 0]),
            ((1.0, None, 0.6, None), [5 / 7, 2 / 7, 0, 0, 0]), ((1.0, None, None, 0.35), [5 / 7, 2 / 7, 0, 0, 0]),
            ((0.5, None, None, None), (probabilities ** 2 / (probabilities ** 2).sum()).tolist())):
        drawn = model.draw(probabilities.log().expand(20000, 5), *arguments).flatten().bincount(minlength=5) / 20000
        assert drawn.tolist() == pytest.approx(expected, abs=0.02), arguments


# --- optimizers -------------------------------------------------------------------------------------------------------

def test_optimizers():
    """Every parameter has one optimizer: Muon the hidden matrices. Only matrices decay."""
    gpt = make()
    names = {id(p): name for name, p in gpt.named_parameters()}
    for muon_lr in (0, 0.02):
        adamw, *muon = gpt.configure_optimizers(1e-3, muon_lr, (0.9, 0.95), 0.1)
        decayed, rest = ([names[id(p)] for group in adamw.param_groups if bool(group['weight_decay']) == decays
                          for p in group['params']] for decays in (True, False))
        hidden = [names[id(p)] for optimizer in muon for group in optimizer.param_groups for p in group['params']]
        assert sorted(decayed + rest + hidden) == sorted(names.values())
        assert all(name.endswith('weight') and 'norm' not in name for name in decayed + hidden)
        assert len(hidden) == 7 * 3 * len(muon) and len(decayed + hidden) == 7 * 3 + 2


def test_muon(monkeypatch):
    """torch.optim.Muon on each matrix by itself: q, k, v, o, router, and each expert's gate, up and down."""
    from torch.optim._muon import _zeropower_via_newtonschulz as iterate
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)  # torch iterates in bf16, 3 to 8 % off
    monkeypatch.setattr(torch, 'bfloat16', torch.float32)
    monkeypatch.setattr(model, 'orthogonalize', lambda x, dtype: torch.stack(
        [iterate(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in x]))  # ours has a test of its own
    gpt = make(num_hidden_layers=2)
    muon = gpt.configure_optimizers(0.0, 0.05, (0.9, 0.95), 0.1, muon_interval=2)[1]
    divided = lambda tensor, pieces: tensor.reshape(-1, tensor.size(-2) // pieces, tensor.size(-1)).unbind()
    stacks = [(p, group['pieces'], p.detach().clone()) for group in muon.param_groups for p in group['params']]
    matrices = [[torch.nn.Parameter(m.clone()) for m in divided(start, pieces)] for _, pieces, start in stacks]
    assert {len(parts) for parts in matrices} == {1, 5, 10}
    theirs = torch.optim.Muon(itertools.chain(*matrices), momentum=0.9, weight_decay=0.1)
    for step in range(4):
        theirs.param_groups[0]['lr'] = 0.1 * (step % 2)  # ours moves every second step, twice as far
        for (p, pieces, _), parts in zip(stacks, matrices):
            p.grad = torch.randn_like(p)
            for m, grad in zip(parts, divided(p.grad, pieces)):
                m.grad = grad.clone()
        muon.step()
        theirs.step()
    for (p, _, start), parts in zip(stacks, matrices):
        assert off(p.detach() - start, torch.stack(parts).detach().view_as(p) - start) < 1e-3


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('shape', [(3, 20, 50), (2, 50, 20), (4, 32, 32)])
def test_orthogonalize(shape, dtype, tolerance):
    """The singular vectors stay, the singular values come near 1, those of rank 1 too. Zero stays zero."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1e-4, 1, 1e4, 1])[:shape[0], None, None]
    x[1] = x[1, :, :1] @ x[1, :1]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ model.orthogonalize(x, dtype) @ vh.mT
    diagonal, there = values.diagonal(dim1=1, dim2=2), (s > 0.1 * s[:, :1]).double()
    off_diagonal = (values - torch.diag_embed(diagonal)) * there[:, None] * there[..., None]
    assert off_diagonal.abs().max() < tolerance and diagonal[there > 0].min() > 0.18 and diagonal.max() < 1.9
    assert not model.orthogonalize(torch.zeros(shape), dtype).any()


# --- checkpoints ------------------------------------------------------------------------------------------------------

def mxfp4_blocks(*shape):
    """Random blocks (..., G, 16) and scales (..., G) for values of this shape, and the values."""
    *outer, last = shape
    blocks = torch.randint(256, (*outer, last // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 127, (*outer, last // 32), dtype=torch.uint8)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).int()  # the low nibble comes first
    values = torch.where(nibbles >= 8, -1, 1) * magnitudes[nibbles % 8] * 2.0 ** (scales[..., None].float() - 127)
    return blocks, scales, values.view(shape)


def published_experts(gpt):
    """Give the experts values that MXFP4 holds -> {(layer, part): (blocks, scales, bias)}, with gates interleaved."""
    tensors = {}
    for i, layer in enumerate(gpt.model.layers):
        for part in ('gate_up', 'down'):
            p, bias = (getattr(layer.mlp.experts, f'{part}_{kind}') for kind in ('weight', 'bias'))
            blocks, scales, values = mxfp4_blocks(*p.shape)
            if part == 'gate_up':
                values = torch.cat((values[:, 0::2], values[:, 1::2]), dim=1)
                bias = torch.stack(bias.chunk(2, dim=1), dim=2).flatten(1)
            p.data.copy_(values)
            tensors[i, part] = blocks, scales, bias.detach().clone()
    return tensors


def write_hugging_face(gpt, folder):
    """MXFP4 in Hugging Face's layout, written from its description."""
    gpt.save_pretrained(folder)
    tensors = {name: p.data for name, p in gpt.named_parameters() if '.experts.' not in name}
    for (i, part), values in published_experts(gpt).items():
        prefix = f'model.layers.{i}.mlp.experts.{part}_proj'
        tensors |= {f'{prefix}_{kind}': value for kind, value in zip(('blocks', 'scales', 'bias'), values)}
    save_file(tensors, folder / 'model.safetensors')
    raw = json.loads((folder / 'config.json').read_text())  # gpt-oss's says 0.9 and that it is off
    raw.pop('training_router_aux_loss_coef')
    (folder / 'config.json').write_text(json.dumps(raw | dict(router_aux_loss_coef=0.9)))


def write_openai(gpt, folder):
    """OpenAI's original/, in two files, written from its description."""
    tensors, folder = {}, folder / 'original'
    for name, p in gpt.named_parameters():
        for old, new in (('model.embed_tokens.weight', 'embedding.weight'), ('lm_head', 'unembedding'),
                         ('model.layers', 'block'), ('input_layernorm.weight', 'attn.norm.scale'),
                         ('post_attention_layernorm.weight', 'mlp.norm.scale'), ('model.norm.weight', 'norm.scale'),
                         ('self_attn.o_proj', 'attn.out'), ('self_attn', 'attn'), ('mlp.router', 'mlp.gate')):
            name = name.replace(old, new)
        if '.experts.' not in name:
            tensors[name] = p.data
    for i, kind in itertools.product(range(len(gpt.model.layers)), ('weight', 'bias')):
        parts = [tensors.pop(f'block.{i}.attn.{x}_proj.{kind}') for x in 'qkv']
        tensors[f'block.{i}.attn.qkv.{kind}'] = torch.cat(parts)
    for (i, part), (blocks, scales, bias) in published_experts(gpt).items():
        prefix = f'block.{i}.mlp.mlp{1 if part == "gate_up" else 2}'
        tensors |= {f'{prefix}_weight.blocks': blocks, f'{prefix}_weight.scales': scales, f'{prefix}_bias': bias}
    folder.mkdir(parents=True)
    for number in (0, 1):
        half = {name: tensors[name] for name in list(tensors)[number::2]}
        save_file(half, folder / f'model--0000{number + 1}-of-00002.safetensors')
    (folder / 'config.json').write_text(json.dumps(dict(
        num_hidden_layers=3, num_experts=5, experts_per_token=2, vocab_size=97, hidden_size=64,
        intermediate_size=64, swiglu_limit=7.0, head_dim=10, num_attention_heads=6, num_key_value_heads=2,
        sliding_window=16, initial_context_length=64, rope_theta=150000, rope_scaling_factor=32.0, rope_ntk_alpha=1,
        rope_ntk_beta=32)))


def assert_same(gpt, loaded):
    assert loaded.config == gpt.config
    for (name, p), (other, q) in zip(gpt.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(p.to(q.dtype), q), name
    idx = torch.randint(gpt.config.vocab_size, (1, 30))
    ours = copy.deepcopy(gpt).to(loaded.lm_head.weight.dtype).eval()
    torch.testing.assert_close(ours(idx)[0], loaded.eval()(idx)[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('write', [write_hugging_face, write_openai])
def test_reading(write, dtype, tmp_path):
    gpt = make(**SQUARE)
    write(gpt, tmp_path)
    assert_same(gpt, GPT.from_pretrained(tmp_path, dtype))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('experts', [None, 'mxfp4'])
@pytest.mark.parametrize('changes', [
    SQUARE, dict(hidden_size=96, intermediate_size=32, tie_word_embeddings=True, router_aux_loss_coef=0.01)])
def test_writing(changes, experts, dtype, tmp_path):
    """transformers reads it, from several files or one, and we read what it writes. No file of another one is left."""
    transformers = pytest.importorskip('transformers')
    gpt, idx = make(**changes), torch.randint(97, (2, 30))
    if experts:
        published_experts(gpt)
    gpt.to(dtype)
    for shard_size in (100_000, 5e9):
        gpt.save_pretrained(tmp_path, dtype, experts, shard_size)
        assert (len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 1) == (shard_size < 1e9)
        assert_same(gpt, GPT.from_pretrained(tmp_path, torch.float32))
        options = dict(quantization_config=transformers.Mxfp4Config(dequantize=True)) if experts else {}
        theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
        ours = copy.deepcopy(gpt).float().eval()
        torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx, idx)[0], atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB')
    assert_same(gpt, GPT.from_pretrained(tmp_path / 'theirs', dtype))
    shutil.rmtree(tmp_path / 'theirs')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    stored = load_file(tmp_path / 'model.safetensors').values()
    assert {tensor.dtype for tensor in stored} == {dtype, *([torch.uint8] if experts else [])}


def test_mxfp4_rounds_to_nearest():
    """Every element goes to the nearest value at its group's scale, half-way to the even code."""
    torch.manual_seed(1)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat((torch.randn(200, 64) * 10.0 ** torch.randint(-20, 20, (200, 1)), torch.zeros(1, 64)))
    x[:100] = (x[:100] * 8 / x[:100].abs().amax(1, keepdim=True)).round() * 0.25  # half-way between values, often
    packed = MXFP4.pack(x[None])
    groups, unit = x.double().view(-1, 32), 2.0 ** (packed.scales.double().view(-1, 1) - 127)

    def nearest(unit):
        distance = ((groups.abs() / unit)[..., None] - magnitudes).abs() + torch.arange(8) % 2 * 1e-9
        return magnitudes[distance.argmin(-1)] * unit * groups.sign()

    assert torch.equal(packed[0].view(-1, 32).double(), nearest(unit))
    unit, groups = unit[200:400], groups[200:400]  # normally distributed
    errors = torch.stack([(nearest(unit * 2.0 ** shift) - groups).square().sum(1) for shift in (-1, 0, 1)])
    errors /= groups.square().sum(1)
    assert errors[1].mean() <= 1.01 * errors.amin(0).mean()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_experts(dtype, tmp_path):
    """experts='mxfp4' computes what unpacking first does, to the bit, and saves the same."""
    make(**SQUARE).save_pretrained(tmp_path / 'packed', experts='mxfp4', shard_size=50_000)
    make(**SQUARE).save_pretrained(tmp_path / 'fp32')
    idx, full = torch.randint(97, (2, 30)), GPT.from_pretrained(tmp_path / 'packed', dtype)
    for folder in ('packed', 'fp32'):
        gpt = GPT.from_pretrained(tmp_path / folder, dtype, experts='mxfp4')
        assert torch.equal(gpt(idx, idx)[0], full(idx, idx)[0])
        assert torch.equal(gpt.generate(idx, 10, temperature=0), full.generate(idx, 10, temperature=0))
        assert gpt.num_parameters(active=True) == full.num_parameters(active=True)
        stacks = [p for name, p in full.named_parameters() if name.endswith(('gate_up_weight', 'down_weight'))]
        stored = sum(tensor.nbytes for name, tensor in gpt.state_dict().items() if name.endswith(('blocks', 'scales')))
        assert stored == sum(p.numel() for p in stacks) * 17 // 32
    for experts in ('mxfp4', None):
        gpt.save_pretrained(tmp_path / 'again', dtype, experts=experts)
        assert_same(full, GPT.from_pretrained(tmp_path / 'again', dtype))


def test_saving_over(tmp_path):
    """A checkpoint that cannot be written whole leaves the one that was there, and no other file."""
    good, bad = make(hidden_size=64, intermediate_size=32), make(1, hidden_size=64, intermediate_size=32)
    good.save_pretrained(tmp_path)
    bad.model.layers[2].mlp.experts.down_weight.data[0, 0, 0] = math.nan
    for gpt, experts, words in ((bad, 'mxfp4', 'finite'), (bad, 'int4', 'int4'), (make(hidden_size=24), 'mxfp4', '24')):
        with pytest.raises(ValueError, match=words):
            gpt.save_pretrained(tmp_path, experts=experts, shard_size=1000)
    assert_same(good, GPT.from_pretrained(tmp_path, torch.float32))
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


def test_broken_checkpoints(tmp_path):
    """One error names the folder and all that does not fit, of a model and of adapters."""
    make().save_pretrained(tmp_path, shard_size=100_000)
    adapt(GPT.from_pretrained(tmp_path)).save_adapter(tmp_path / 'adapter')
    file = sorted(tmp_path.glob('*.safetensors'))[1]
    tensors, whole = load_file(file), file.read_bytes()

    def refused(words, folder=tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(folder)) + '(.|\n)*' + words):
            GPT.from_pretrained(folder)

    for json_file, changes in (
            (tmp_path / 'config.json', (None, dict(hidden_size=32), dict(head_dim='x'), dict(hidden_act='relu'))),
            (tmp_path / 'adapter/adapter_config.json', (
                None, dict(r=2), dict(lora_alpha=None), dict(overrides=dict(foo=1)),
                dict(base_model_name_or_path='none')))):
        raw = json_file.read_text()
        for change in changes:
            json_file.write_text(json.dumps(json.loads(raw) | change if change else []))
            refused('', json_file.parent)
        json_file.write_text(raw)
    adapters = load_file(tmp_path / 'adapter/adapter_model.safetensors')
    save_file({'base_model.model.lm_head.lora_A.weight': torch.ones(3, 48)} | adapters,
              tmp_path / 'adapter/adapter_model.safetensors')
    refused('lm_head.lora_A', tmp_path / 'adapter')
    save_file({name: adapters[name] for name in adapters if 'q_proj.lora_A' not in name},
              tmp_path / 'adapter/adapter_model.safetensors')
    refused('lacks lora_A or lora_B', tmp_path / 'adapter')
    with pytest.raises(ValueError, match='float16'):  # gpt-oss's width
        GPT.from_pretrained(tmp_path, torch.float16, hidden_size=2880)
    (tmp_path / 'adapter/adapter_config.json').rename(tmp_path / 'adapter/adapter.json')  # the format of the past
    refused('adapter.json', tmp_path / 'adapter')
    tensors.pop(next(iter(tensors)))
    save_file(tensors | {'model.norm.weight': torch.ones(7), 'model.extra.weight': torch.ones(2)}, file)
    for words in (' is missing', r'norm.weight.*\(7,\)', 'extra.weight'):
        refused(words)
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file.name)


def test_model_alone(tmp_path):
    """model.py trains alone in a folder, without safetensors. Saving then says what to install."""
    shutil.copy(ROOT / 'model.py', tmp_path)
    (tmp_path / 'safetensors.py').write_text('raise ImportError')
    (tmp_path / 'try.py').write_text('''
import torch
from model import GPT, GPTConfig
gpt, idx = GPT(GPTConfig(vocab_size=9, num_hidden_layers=2)), torch.zeros(2, 20, dtype=torch.int64)
optimizer, = gpt.configure_optimizers(1e-2, 0, (0.9, 0.95), 0.1)
for _ in range(5):
    gpt(idx, idx)[1].backward()
    optimizer.step()
assert gpt(idx, idx)[1] < 1
gpt.save_pretrained('saved')
''')
    done = subprocess.run([sys.executable, 'try.py'], cwd=tmp_path, capture_output=True, text=True)
    assert 'ImportError' in done.stderr.splitlines()[-1] and 'pip install safetensors' in done.stderr, done.stderr


def adapt(gpt):
    """Add adapters, none of which is zero."""
    gpt.add_lora(3, 6.0)
    torch.manual_seed(1)
    for name, p in gpt.named_parameters():
        if 'lora.' in name:
            torch.nn.init.normal_(p, std=0.1)
    return gpt


def in_peft(name, a, b):
    """A (r, in) and B (out, r) of an adapter, or stacks of them, in PEFT's layout."""
    if '.experts.' not in name:
        return a, b
    if 'gate_up' in name:  # a gate and an up in turn
        b = torch.stack(b.chunk(2, dim=1), dim=2).flatten(1, 2)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def test_lora():
    """W + alpha / rank * B A on each matrix of attention and of every expert, also its gradients, and no others."""
    gpt, plain, idx = adapt(make()), make(), torch.randint(97, (2, 40))
    weights, adapters, expected = dict(plain.named_parameters()), dict(gpt.named_parameters()), {}
    pairs = {name.removesuffix('.lora_A.weight') for name in adapters if 'lora_A' in name}
    assert len(pairs) == 6 * SMALL['num_hidden_layers']
    products = {}
    for key in pairs:
        name = key.replace('_lora', '_weight').replace('.lora', '.weight')
        *stack, rows, columns = weights[name].shape
        a, b = torch.randn(*stack, 3, columns) / 10, torch.randn(*stack, rows, 3) / 10
        for x, value in zip('AB', in_peft(key, a, b)):
            adapters[f'{key}.lora_{x}.weight'].data.copy_(value)
        weights[name].data += 2.0 * b @ a
        products[key] = name, a, b
    for one in (gpt, plain):
        one(idx, idx, return_logits=False)[1].backward()
    for key, (name, a, b) in products.items():
        gradient = 2.0 * weights[name].grad
        for x, value in zip('AB', in_peft(key, b.mT @ gradient, gradient @ a.mT)):
            expected[f'{key}.lora_{x}.weight'] = value
    assert_gradients(gradients(gpt), expected, 1e-4)
    optimizer, = gpt.configure_optimizers(1e-3, 0.01, (0.9, 0.95), 0.1)  # AdamW alone, and the adapters alone
    assert sum(len(group['params']) for group in optimizer.param_groups) == 2 * len(pairs)
    gpt.merge_lora()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p, weights[name])


@pytest.mark.parametrize('experts', [None, 'mxfp4'])
def test_adapter_files(experts, tmp_path):
    """Adapters of plain or packed experts are saved apart from their base, with what the base was loaded with."""
    idx, folder, base = torch.randint(97, (2, 30)), tmp_path / 'adapter', tmp_path / 'base'
    make(hidden_size=64, intermediate_size=32).save_pretrained(base, experts='mxfp4')
    plain, gpt, same = (GPT.from_pretrained(base, torch.float32, experts=packed, sliding_window=3)
                        for packed in (None, experts, experts))
    gpt.add_lora(3, 6.0)
    assert off(gpt(idx)[0], plain(idx)[0]) < 1e-5 and gpt.recompute == bool(experts)  # a new adapter changes nothing
    gpt, plain = adapt(same), adapt(plain)
    for one in (gpt, plain):
        one(idx, idx)[1].backward()
    assert_gradients(gradients(gpt), gradients(plain), 1e-6)
    assert gpt.expert_load.sum() == 3 * idx.numel() * 2
    gpt.save_adapter(folder)
    size = sum(p.nbytes for p in gpt.parameters() if p.requires_grad)
    assert sum(file.stat().st_size for file in folder.iterdir()) < size + 10000
    loaded = GPT.from_pretrained(folder, torch.float32, experts=experts)
    assert loaded.config.sliding_window == 3 and torch.equal(loaded(idx)[0], gpt(idx)[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / 'adapter_model.safetensors').items()}
    assert len(shapes) == 3 * 12
    for name, a, b in (('self_attn.q_proj', (3, 64), (60, 3)), ('mlp.experts.base_layer', (15, 64), (64, 15)),
                       ('mlp.experts', (15, 32), (64, 15))):
        for x, shape in zip('AB', (a, b)):
            assert shapes[f'base_model.model.model.layers.2.{name}.lora_{x}.weight'] == shape
    for wrong in (lambda: gpt.save_adapter(base), lambda: gpt.add_lora(3, 6.0), lambda: make().add_lora(65, 1.0),
                  lambda: adapt(make()).save_adapter(folder), lambda: gpt.save_pretrained(folder),
                  *([gpt.merge_lora] if experts else [])):
        with pytest.raises(ValueError):
            wrong()


def test_peft(tmp_path):
    """PEFT computes the same with our adapters, we with its. Options that we do not have are refused by name."""
    peft, idx = pytest.importorskip('peft'), torch.randint(97, (2, 30))
    theirs = reference(make(), tmp_path / 'base')
    gpt = adapt(GPT.from_pretrained(tmp_path / 'base', torch.float32))
    gpt.save_adapter(tmp_path / 'ours')
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'ours', is_trainable=True)
    torch.testing.assert_close(theirs.eval()(idx).logits, gpt.eval()(idx, idx)[0], atol=2e-5, rtol=0)
    theirs(idx, labels=idx).loss.backward()
    for name, p in theirs.named_parameters():
        p.data -= p.grad if p.grad is not None else 0
    assert off(theirs(idx).logits, gpt(idx, idx)[0]) > 0.1
    theirs.save_pretrained(tmp_path / 'theirs')
    loaded = GPT.from_pretrained(tmp_path / 'theirs', torch.float32).eval()
    torch.testing.assert_close(theirs(idx).logits, loaded(idx, idx)[0], atol=2e-5, rtol=0)
    file = tmp_path / 'theirs/adapter_config.json'
    raw = json.loads(file.read_text())
    for key, value in dict(use_rslora=True, use_dora=True, alpha_pattern=dict(q_proj=3), modules_to_save=['lm_head'],
                           bias='all', init_lora_weights='pissa', peft_type='IA3').items():
        file.write_text(json.dumps(raw | {key: value}))
        with pytest.raises(ValueError, match=key):
            GPT.from_pretrained(tmp_path / 'theirs')


# --- how the scripts are run ------------------------------------------------------------------------------------------

def run(script, *arguments, cwd=ROOT):
    """Run a script in this process -> (exit status, its output, its errors). run.names holds its globals."""
    out, err, status, run.names = io.StringIO(), io.StringIO(), 0, {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, 'argv', [script, *map(str, arguments)])
        patch.chdir(cwd)
        try:
            run.names = runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as error:
            status = error.code or 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if 'lock' in run.names:
        run.names['lock'].release()
    gc.collect()  # what a failed script leaves, such as its lock
    return status, out.getvalue(), err.getvalue()


def ran(script, *arguments, **options):
    """The output of a script, which must succeed."""
    status, out, err = run(script, *arguments, **options)
    assert status == 0, err
    return out


def refused(result, *words):
    """Exit status 2, and one line of the script that holds these words."""
    status, _, err = result
    assert status == 2 and 'Traceback' not in err, err
    line, = re.findall(r'(?:train|prepare|sample|bench)\.py: (.*)', err)
    assert all(word in line for word in words), err


def child(arguments, log, environment, trap):
    """What a process of `finished` does: set a trap, then run train.py with its output in a file."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if trap:
        set_trap(*trap)
    sys.argv = ['train.py', *map(str, arguments)]
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def set_trap(where, number, sent=signal.SIGTERM):
    """Send this process a signal at its number-th step, evaluation or renaming."""
    places = dict(step=(torch.optim.AdamW, 'step'), evaluation=(GPT, 'hidden_states'), rename=(os, 'rename'))
    owner, name = places[where]
    function, count = getattr(owner, name), itertools.count(1)

    def trapped(*arguments, **options):
        if (where != 'evaluation' or not arguments[0].training) and next(count) == number:
            os.kill(os.getpid(), sent)
        return function(*arguments, **options)

    setattr(owner, name, trapped)


def finished(log, *arguments, processes=0, trap=None, status=0):
    """The output of train.py in processes as torchrun starts them, or one without. The trap holds for the first."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_model', 'torch._dynamo', 'torch.distributed.checkpoint'])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(processes))
    logs, started = [Path(f'{log}{rank}') for rank in range(processes or 1)], []
    for rank, file in enumerate(logs):
        environment = shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if processes else {}
        started.append(context.Process(target=child, args=(arguments, file, environment, None if rank else trap)))
        started[-1].start()
    for process, file in zip(started, logs):
        process.join(120)
        assert process.exitcode == status and 'Traceback' not in file.read_text(), file.read_text()
    return logs[0].read_text()


# --- data -------------------------------------------------------------------------------------------------------------

needs_vocabulary = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='needs TIKTOKEN_CACHE_DIR')
O200K, GPT2 = (pytest.param(name, marks=needs_vocabulary) for name in ('o200k_harmony', 'gpt2'))
FOX = 'the quick brown fox jumps over the lazy dog\n' * 50


def make_data(folder, text=FOX, **options):
    """Prepare a text by character in folder/data and return that folder."""
    (folder / 'text.txt').write_text(text)
    options = dict(dataset=folder / 'text.txt', tokenizer='char', data_dir=folder / 'data') | options
    ran('prepare.py', *(f'--{key}={value}' for key, value in options.items()))
    return folder / 'data'


def read_data(folder):
    """(meta, encoder, {split: token ids}) of a data folder."""
    meta = json.loads((folder / 'meta.json').read_text())
    tokens = {split: np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist() for split in ('train', 'val')}
    return meta, prepare.load_tokenizer(folder), tokens


def test_stories(tmp_path):
    """The seed determines the stories. meta.json tells the loss of a model that knows how they are made."""
    first = list(prepare.builtin_stories(0.05, 1))
    assert first == list(prepare.builtin_stories(0.05, 1)) != list(prepare.builtin_stories(0.05, 2))
    ran('prepare.py', '--dataset=builtin', '--megabytes=0.05', '--seed=1', '--tokenizer=byte', f'--data_dir={tmp_path}')
    meta, encoder, tokens = read_data(tmp_path)
    assert encoder.decode(tokens['train'] + tokens['val']).split('<|endoftext|>') == [*(text for text, _ in first), '']
    nats = sum(nats for _, nats in first[meta['train_documents']:])
    assert meta['perfect_loss'] == pytest.approx(nats / len(tokens['val']))


@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe', GPT2, O200K])
def test_round_trip(tokenizer, tmp_path):
    """The bins hold the documents as they were, each ended by end of text, the last of them in val.bin."""
    import datasets
    suffix = dict(byte='csv', char='json', bpe='parquet').get(tokenizer, 'jsonl')
    rng, kinds = random.Random(0), [range(32, 127), range(160, 1000), [10, 0x2028, 0x1f600]]
    texts = [f"It's {i}: naïve “über” 日本 🎈 <|endoftext|> 12345\r\n\n  I'LL\t\tx=a[{i}]/2 " * (i % 3 + 1)
             + ''.join(chr(rng.choice(rng.choice(kinds))) for _ in range(30)) for i in range(40)]
    rows = datasets.Dataset.from_dict(dict(story=texts, number=list(range(40))))
    getattr(rows, f'to_{suffix.removesuffix("l")}')(str(tmp_path / f'x.{suffix}'))
    options = dict(dataset=tmp_path / f'*.{suffix}', text_column='story', vocab_size=400)
    meta, encoder, tokens = read_data(make_data(tmp_path, tokenizer=tokenizer, **options))
    assert meta['dtype'] == ('uint32' if tokenizer == 'o200k_harmony' else 'uint16') and encoder.name == tokenizer
    assert meta['vocab_size'] == encoder.max_token_value + 1
    for split, part in (('train', texts[:36]), ('val', texts[36:])):
        assert encoder.decode(tokens[split]) == ''.join(text + '<|endoftext|>' for text in part)
        assert tokens[split].count(encoder.eot_token) == meta[f'{split}_documents'] == len(part)
        assert meta[f'{split}_tokens'] == len(tokens[split])
        assert meta[f'{split}_bytes'] == sum(len(text.encode()) for text in part)
    assert tokenizer != 'bpe' or len(tokens['val']) < 0.9 * meta['val_bytes']  # it learned to merge
    theirs = exported_tokenizer(tmp_path / 'data', encoder)
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == encoder.encode_ordinary(text)
        assert theirs.decode(encoder.encode_ordinary(text)) == text
    assert theirs.encode('a<|endoftext|>') == encoder.encode('a<|endoftext|>', allowed_special='all')
    if tokenizer != 'o200k_harmony':  # a model of its size needs no file
        theirs.save_pretrained(tmp_path / 'theirs')
        again = sample.read_tokenizer(tmp_path / 'theirs/tokenizer.json')
        assert all(again.encode_ordinary(text) == encoder.encode_ordinary(text) for text in texts)
        assert again.eot_token == encoder.eot_token and again.n_vocab == encoder.n_vocab


def exported_tokenizer(folder, encoder):
    """transformers' tokenizer, from what sample.py exports of a model with this data."""
    transformers = pytest.importorskip('transformers')
    make(vocab_size=encoder.n_vocab, hidden_size=4, num_hidden_layers=1).save_pretrained(folder)
    ran('sample.py', f'--init_from={folder}', f'--export={folder}/exported', '--device=cpu')
    stops = transformers.GenerationConfig.from_pretrained(folder / 'exported').eos_token_id
    assert stops == sample.stop_tokens(encoder)
    return transformers.AutoTokenizer.from_pretrained(folder / 'exported')


def test_export(tmp_path):
    """An export has a head, the keys that other programs read, and a line for what they cannot do."""
    transformers, data = pytest.importorskip('transformers'), make_data(tmp_path)
    meta, encoder, tokens = read_data(data)
    changes = dict(tie_word_embeddings=True, layer_types=[FULL, SLIDING, FULL], swiglu_limit=6.0)
    gpt = make(vocab_size=meta['vocab_size'], router_aux_loss_coef=0.1, **changes)
    gpt.save_pretrained(data)
    out = tmp_path / 'exported'
    said = ran('sample.py', f'--init_from={data}', f'--export={out}', '--device=cpu', '--dtype=float32')
    assert all(word in said for word in ('layer_types', 'swiglu_limit', 'the tokenizer char'))
    raw, end = json.loads((out / 'config.json').read_text()), encoder.eot_token
    assert raw | dict(tie_word_embeddings=False, output_router_logits=False, eos_token_id=end, pad_token_id=end,
                      experts_per_token=2, initial_context_length=64, transformers_version='4.55.0') == raw
    assert torch.equal(load_file(out / 'model.safetensors')['lm_head.weight'], gpt.lm_head.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert set(transformers.AutoTokenizer.from_pretrained(out)('the')) == {'input_ids', 'attention_mask'}
    idx = torch.tensor([tokens['val'][:20]])
    torch.testing.assert_close(theirs(idx).logits, gpt.eval()(idx, idx)[0], atol=1e-4, rtol=1e-4)
    assert GPT.from_pretrained(out).config.router_aux_loss_coef == 0.1
    theirs.save_pretrained(tmp_path / 'theirs')  # without a tokenizer
    options = f'--init_from={tmp_path}/theirs', '--device=cpu', '--max_new_tokens=5', '--start=the', '--seed=1'
    refused(run('sample.py', *options), 'theirs/tokenizer.json', '--tokenizer_from')
    said = ran('sample.py', *options, f'--tokenizer_from={data}')
    shutil.copy(out / 'tokenizer.json', tmp_path / 'theirs')
    assert said == ran('sample.py', *options)
    other = json.loads((out / 'tokenizer.json').read_text()) | dict(normalizer=dict(type='Lowercase'))
    (tmp_path / 'theirs/tokenizer.json').write_text(json.dumps(other))
    refused(run('sample.py', *options), 'theirs/tokenizer.json', '--tokenizer_from')


def test_text_files(tmp_path):
    """Few documents: the text is cut at nine tenths. Lines of <|endoftext|> divide it. max_docs limits documents."""
    text = ''.join(random.Random(0).choices('abcdef gh\n', k=1234))
    _, encoder, tokens = read_data(make_data(tmp_path, text))
    assert encoder.decode(tokens['train']) == text[:int(1234 * 0.9)]
    assert encoder.decode(tokens['val']) == text[int(1234 * 0.9):] + '<|endoftext|>'
    documents = [f'line {i}\n\nmore' for i in range(30)]
    data = make_data(tmp_path, '\n<|endoftext|>\n'.join(documents), tokenizer='byte', max_docs=20)
    _, encoder, tokens = read_data(data)
    assert encoder.decode(tokens['train']).split('<|endoftext|>') == documents[:18] + ['']


@needs_vocabulary
def test_pieces_change_nothing(monkeypatch):
    """A document that is tokenised in pieces gives the tokens that it gives as a whole."""
    text = ''.join(story for story, _ in prepare.builtin_stories(0.3, 0)) + "it's  a test... 12345 words\n\n\tdone"
    lines = text.splitlines(keepends=True)
    monkeypatch.setattr(prepare, 'PIECE', 1000)
    pieces, ends = zip(*prepare.text_file(''.join(lines[i:i + 50]) for i in range(0, len(lines), 50)))
    assert len(pieces) > 100 and ''.join(pieces) == text and ends.index(True) == len(pieces) - 1
    for encoder in map(tiktoken.get_encoding, ('o200k_harmony', 'gpt2')):
        assert sum(map(encoder.encode_ordinary, pieces), []) == encoder.encode_ordinary(text)


CHATS = [
    [dict(role='system', content='Be brief.'), dict(role='user', content='Hi <| end |> there'),
     dict(role='assistant', thinking='A greeting.', content='Hello!'), dict(role='user', content='Bye'),
     dict(role='assistant', channel='analysis', content='They go.'), dict(role='assistant', content='Farewell!')],
    [dict(role='user', content='1 + 1?'), dict(role='assistant', content='2')]] * 6


def make_chats(folder, chats=CHATS, **options):
    """Prepare conversations in folder/data and return that folder."""
    (folder / 'chats.jsonl').write_text(''.join(json.dumps(dict(messages=chat)) + '\n' for chat in chats))
    return make_data(folder, dataset=folder / 'chats.jsonl', **options)


@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe', O200K])
def test_chat_masks(tokenizer, tmp_path):
    """Every turn of the assistant is an example: its prompt at that time, and its own tokens, the only targets."""
    folder = make_chats(tmp_path, tokenizer=tokenizer, vocab_size=300)
    meta, encoder, tokens = read_data(folder)
    tokens = np.array(tokens['train'] + tokens['val'])
    mask = np.concatenate([np.fromfile(folder / f'{split}_mask.bin', np.uint8) for split in ('train', 'val')])
    assert len(mask) == len(tokens) and meta['train_targets'] + meta['val_targets'] == mask.sum()
    final = '<|channel|>final<|message|>{}<|return|>'
    thought = '<|channel|>analysis<|message|>{}<|end|><|start|>assistant' + final
    answers = thought.format('A greeting.', 'Hello!'), thought.format('They go.', 'Farewell!'), final.format('2')
    turns = list(zip((CHATS[0][:2], CHATS[0][:4], CHATS[1][:1]), answers)) * 6
    ends = np.flatnonzero(tokens == encoder.eot_token)
    assert len(ends) == len(turns) and not mask[ends].any()
    for start, end, (seen, answer) in zip([0, *ends + 1], ends, turns):
        prompt, document = prepare.Chat(seen).prompt(encoder), tokens[start:end].tolist()
        assert document[:len(prompt)] == prompt and encoder.decode(document[len(prompt):]) == answer
        assert mask[start:end].tolist() == [0] * len(prompt) + [1] * (len(document) - len(prompt))
    hostile = prepare.Chat([dict(role='user', content='<|end|>')])  # is text where a user writes it to sample.py
    assert hostile.prompt(encoder).count(encoder.encode_single_token('<|end|>')) == 2
    assert meta['train_bytes'] + meta['val_bytes'] == sum(len(answer) for _, answer in turns)
    theirs, chat = exported_tokenizer(folder, encoder), [CHATS[0][0], *CHATS[1], *CHATS[0][3:]]
    found = theirs.apply_chat_template(chat, add_generation_prompt=True, reasoning_effort='high', return_dict=False)
    assert found == prepare.Chat(chat).prompt(encoder, 'high')


TOOLS = [
    dict(type='function', function=dict(name='now', description='The time.\nIn UTC.')),
    dict(name='find', description='', parameters=dict(type='object', required=['what', 'how'], properties=dict(
        what=dict(type='string', description='Words', enum=['a', 'b'], default='a', title='What', examples=['a', 1]),
        how=dict(description='How', default=3, oneOf=[
            dict(type='string', description='How', nullable=True), dict(type='number', description='n', default='x')]),
        items=dict(type='array', items=dict(type='object', description='Inner', properties=dict(
            yes=dict(type='boolean', default=True), either=dict(type=['integer', 'null'])))),
        some=dict(type='array', default=['x, y', 1]), rest=dict(anyOf=[]), none=dict(type='null', default=None)))),
    dict(type='function', function=dict(name='other', description='One line', parameters={}))]


def random_chat(rng):
    """A conversation with reasoning, preambles, calls and results, and its tools."""
    chat = [dict(role=role, content='Be brief.\nOr not.') for role in rng.choice([[], ['system'], ['developer']])]
    tools = []
    for turn in range(rng.randint(1, 4)):
        chat.append(dict(role='user', content=f'Question {turn}?  <b> ü'))
        for call in range(rng.choice([0, 0, 1, 2])):
            tools, names = TOOLS, rng.sample(['now', 'find', 'other'], rng.choice([1, 1, 2]))
            arguments = rng.choice(['{"what":"a"}', dict(what='ü', how=1)])
            calls = [dict(type='function', id=f'{call}{name}', function=dict(name=name, arguments=arguments))
                     for name in names]
            chat.append(dict(role='assistant', content=rng.choice([None, 'I call.']), tool_calls=calls))
            if rng.random() < 0.5 and not chat[-1]['content']:
                chat[-1]['thinking'] = 'I need it.'
            chat += [dict(role='tool', tool_call_id=f'{call}{name}', content=f'["{name}"]') for name in reversed(names)]
        if rng.random() < 0.3:
            chat.append(dict(role='assistant', channel='commentary', content='Wait.'))
        chat.append(dict(role='assistant', content=f'Answer {turn}.') | rng.choice([{}, dict(reasoning_content='Hm.')]))
    return chat, tools


def harmony_parts(harmony, chat, tools, effort, training):
    """What openai-harmony makes of a conversation, without the analysis before the last earlier final answer."""
    message, role, parts, names = harmony.Message.from_role_and_content, harmony.Role, [], {}
    system = harmony.SystemContent.new().with_reasoning_effort(harmony.ReasoningEffort(effort.title()))
    developer = harmony.DeveloperContent.new()
    if chat[0]['role'] in ('system', 'developer'):
        developer, chat = developer.with_instructions(chat[0]['content']), chat[1:]
    if tools:
        developer = developer.with_function_tools([harmony.ToolDescription.new(
            tool['name'], tool['description'], parameters=tool.get('parameters'))
            for tool in (tool.get('function', tool) for tool in tools)])
    parts += [message(role.DEVELOPER, developer)] if developer.instructions or tools else []
    for m in chat:
        if m['role'] == 'tool':
            author = harmony.Author.new(role.TOOL, f'functions.{names[m["tool_call_id"]]}')
            result = harmony.Message.from_author_and_content(author, m['content'])
            parts.append(result.with_channel('commentary').with_recipient('assistant'))
            continue
        calls = m.get('tool_calls', [])
        if thought := m.get('thinking') or m.get('reasoning_content') or (m['content'] if calls else None):
            parts.append(message(role.ASSISTANT, thought).with_channel('analysis'))
        for call in calls:
            function = call['function']
            names[call['id']], arguments = function['name'], function['arguments']
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            part = message(role.ASSISTANT, arguments).with_channel('commentary').with_content_type('json')
            parts.append(part.with_recipient(f'functions.{function["name"]}'))
        if not calls:
            parts.append(message(role(m['role']), m['content']))
        if m['role'] == 'assistant' and not calls:
            parts[-1] = parts[-1].with_channel(m.get('channel', 'final'))
    last = max((i for i, part in enumerate(parts[:-1] if training else parts) if part.channel == 'final'), default=-1)
    parts = [part for i, part in enumerate(parts) if part.channel != 'analysis' or i > last]
    return harmony.Conversation.from_messages([message(role.SYSTEM, system), *parts])


@needs_vocabulary
def test_harmony(tmp_path, monkeypatch):
    """20 conversations, rendered by us and by the template of an export, against openai-harmony, token for token. Its
    default drops reasoning before the first final answer only; gpt-oss's template and ours, before each earlier one."""
    harmony, encoder = pytest.importorskip('openai_harmony'), tiktoken.get_encoding('o200k_harmony')
    table = (base64.b64encode(token) + b' %d' % rank for token, rank in encoder._mergeable_ranks.items())
    (tmp_path / 'o200k_base.tiktoken').write_bytes(b'\n'.join(table) + b'\n')
    monkeypatch.setenv('TIKTOKEN_ENCODINGS_BASE', str(tmp_path))
    theirs, exported = harmony.load_harmony_encoding('HarmonyGptOss'), exported_tokenizer(tmp_path, encoder)
    everything = harmony.RenderConversationConfig(auto_drop_analysis=False)
    for number in range(20):
        chat, tools = random_chat(random.Random(number))
        effort, ours = ('low', 'medium', 'high')[number % 3], prepare.Chat(chat, tools)
        seen = harmony_parts(harmony, chat, tools, effort, training=False)
        prompt = theirs.render_conversation_for_completion(seen, harmony.Role.ASSISTANT, everything)
        assert ours.prompt(encoder, effort) == prompt
        tokens, mask = prepare.encode_turn(encoder, ours.turns[-1])
        whole = harmony_parts(harmony, chat, tools, 'medium', training=True)
        assert tokens == theirs.render_conversation_for_training(whole, everything)
        options = dict(tools=tools or None, return_dict=True, return_assistant_tokens_mask=True)
        chat = [{'thinking' if key == 'reasoning_content' else key: m[key] for key in m} for m in chat]
        found = exported.apply_chat_template(chat, **options)
        assert (found['input_ids'], found['assistant_masks']) == (tokens, mask)
        found = exported.apply_chat_template(chat, tools=tools, add_generation_prompt=True, reasoning_effort=effort)
        assert found['input_ids'] == prompt
    assert set(sample.stop_tokens(encoder)) == {199999, *theirs.stop_tokens_for_assistant_actions()}


def prepared(file, content, *flags, tokenizer='byte'):
    """The documents that prepare.py makes of a file with this content (text, rows or None: the file is there)."""
    if isinstance(content, list):
        content = ''.join(json.dumps(row) + '\n' for row in content)
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran('prepare.py', f'--dataset={file}', f'--tokenizer={tokenizer}', f'--data_dir={file.parent}/data', *flags)
    _, encoder, tokens = read_data(file.parent / 'data')
    return encoder.decode(tokens['train'] + tokens['val']).split('<|endoftext|>')[:-1]


def test_rows_as_they_stand(tmp_path):
    """Only the column in use is read, and as text: other columns may change their type, and cells are not numbers."""
    texts = ['007', '1e5', 'True', 'NA', 'null', '2020-01-01', 'a, "b"\nc', 'x' * 200_000, '\u2028', *'abcd']
    rows = [dict(text=text, meta=None if i < 9 else {'a': i}, id=i if i < 9 else f'a{i}') for i, text in
            enumerate(texts)] + [dict(text='late', thinking='x')]
    assert prepared(tmp_path / 'a.jsonl', rows) == prepared(tmp_path / 'b.json', rows) == [*texts, 'late']
    assert prepared(tmp_path / 'c.json', json.dumps(rows, indent=1)) == [*texts, 'late']
    cells = ('"' + text.replace('"', '""') + '"' if text.startswith('a,') else text for text in texts)
    assert prepared(tmp_path / 'd.csv', '\ufefftext,n\n' + ''.join(f'{cell},1\n' for cell in cells)) == texts


def message(**fields):
    """Three rows of a chat whose answer has these fields."""
    return [dict(messages=[dict(role='user', content='q'), dict(role='assistant', content='a') | fields])] * 3


@pytest.mark.parametrize('name, content, words', [
    ('a.jsonl', '{"text": "a"}\n\n{"text": "b",\n{"text": "c"}\n', 'line 3'), ('a.jsonl', '{"text": 7}', 'line 1'),
    ('a.json', '[\n{"text": "a"},\n{"text": }]', 'line 3'), ('a.jsonl', b'{"text": "a"}\n{"text": "\xe9"}', 'line 2'),
    ('a.jsonl', '{"text": "a"}\n{"text": "\\ud800"}\n', 'line 2'), ('a.jsonl', '{"text": "a"}\n5\n', 'line 2'),
    ('a.csv', 'n,text\n1,a\n2,b,c\n', 'line 3'), ('a.csv', 'n,text\n1,a\n2\n', 'line 3'),
    ('a.csv', 'text\n"a\n', 'line 2'), ('a.csv', 'text,text\na,b\n', 'twice'),
    ('a.jsonl', '{"messages": [], "system": "s"}', 'line 1: the column system'),
    ('a.jsonl', '{"text": "a"}\n' * 9 + json.dumps(message()[0]), 'texts and chats'),
    ('a.jsonl', json.dumps(message()[0] | dict(tools=[dict(name='f', description=5)])), 'line 1: .* wrong type'),
    ('a.txt', 'hello'.encode('utf-16'), 'iconv -f utf-16 -t utf-8'),
    ('a.txt', 'Привет мир'.encode('utf-16-le'), 'iconv -f utf-16 -t utf-8'),
    ('a.csv', 'text\nhello\n'.encode('utf-16-be'), 'iconv -f utf-16 -t utf-8')])
def test_bad_rows(name, content, words, tmp_path):
    with pytest.raises(AssertionError, match=rf'a\.\w+ .*{words}'):
        prepared(tmp_path / name, content)


def test_message_fields(tmp_path):
    """Synonyms are obeyed, empty fields pass, an answer of weight 0 is context, and anything else is refused."""
    expected = prepared(tmp_path / 'a.jsonl', message(thinking='T'))
    assert expected[0].endswith('<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>a'
                                '<|return|>')
    empty = dict(tool_calls=[], name=None, audio='', more={})
    for fields in (dict(reasoning_content='T'), dict(reasoning='T', thinking='T', train=True, **empty)):
        assert prepared(tmp_path / 'a.jsonl', message(**fields)) == expected
    for fields, words in ((dict(thinkng='T'), 'thinkng'), (dict(reasoning='T', thinking='U'), 'differs'),
                          (dict(tool_calls=[1]), 'tool_calls'), (dict(weight=0.5), 'weight'),
                          (dict(role='user', thinking='T'), 'thinking'), (dict(content='<|channel|>x'), 'channel'),
                          (dict(thinking='<|end|>'), 'end'), (dict(role='tool'), 'answers no call'),
                          (dict(role='critic'), 'role'), (dict(channel='secret'), 'channel'), (dict(content=7), 'text'),
                          (dict(tool_calls=[dict(name='now')]), 'no arguments'), (dict(content=None), 'text'),
                          (dict(name='A'), 'only a tool'), (dict(content=None, tool_calls=[]), 'text'),
                          (dict(tool_calls=[dict(name='now', arguments='{}')], thinking='T'), 'only text beside')):
        with pytest.raises(AssertionError, match=f'line 1.*{words}'):
            prepared(tmp_path / 'a.jsonl', message(**fields))
    for bad in (dict(weight=0), dict(train=False)):
        chat = [dict(messages=[*message(**bad)[0]['messages'], *message(content='b')[0]['messages']])] * 3
        first, *_ = prepared(tmp_path / 'a.jsonl', chat)
        assert len(_) == 2 and '<|message|>a<|end|>' in first and first.endswith('<|message|>b<|return|>')
    share = [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    same = [dict(role=role, content=text) for role, text in (('system', 's'), ('user', 'q'), ('assistant', 'a'))]
    assert prepared(tmp_path / 'a.jsonl', [dict(conversations=share)] * 3) == prepared(
        tmp_path / 'b.jsonl', [dict(messages=same)] * 3)
    alpaca = prepared(tmp_path / 'a.json', [dict(instruction='I', input='', output='O')] * 2
                      + [dict(instruction='I', input='N', output='O')])
    assert '<|message|>I<|end|>' in alpaca[0] and '<|message|>I\n\nN<|end|>' in alpaca[2]


def test_columns_of_tools(tmp_path):
    """Tools are objects or JSON. Parquet gives objects the keys of all others, which must not become arguments."""
    import pyarrow
    from pyarrow import parquet
    rows = [dict(messages=message()[0]['messages'], tools=[dict(type='function', function=dict(
        name='f', description='', parameters=dict(type='object', properties={key: dict(type='string')})))])
            for key in ('one', 'two', 'three')]
    expected = prepared(tmp_path / 'a.jsonl', rows)
    assert 'type f = (_: {\ntwo?: string,\n}) => any;' in expected[1]
    assert prepared(tmp_path / 'b.jsonl', [row | dict(tools=json.dumps(row['tools'])) for row in rows]) == expected
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'c.parquet')
    assert prepared(tmp_path / 'c.parquet', None) == expected


def test_names_that_look_like_patterns(tmp_path):
    """A path that exists is that file. All matches of a glob are read."""
    for name in ('report 1.txt', 'report [1].txt', 'star.txt', 'star*.txt', 'a::b.txt'):
        assert prepared(tmp_path / name, f'this is {name}') == [f'this is {name}']
    assert len(prepared(tmp_path / '*.txt', None)) == 5
    prepared(tmp_path / 'd 1/x.txt', 'the other folder')
    assert prepared(tmp_path / 'd [1]/x.txt', 'this folder') == ['this folder']
    assert prepared(tmp_path / 'd [1]/*.txt', None) == ['this folder']
    for pattern in ('d 1/*.txt', 'd [1]/*.txt', 'd 1/**/?.txt'):
        status, said, err = run('prepare.py', f'--dataset={pattern}', '--tokenizer=byte', cwd=tmp_path)
        assert status == 0 and 'data/d 1:' in said if pattern == 'd 1/*.txt' else 'holds data of d 1/*.txt' in err


@needs_vocabulary
@pytest.mark.parametrize('run', ' \t\n\u3000x')
def test_long_runs(run, tmp_path):
    """Runs beyond the limit of tiktoken's regular expressions are encoded, in data and in a prompt."""
    text = 'a b' + run * 1_000_001 + 'c d'
    assert prepared(tmp_path / 'a.jsonl', [dict(text=text)] * 2, tokenizer='gpt2') == [text] * 2
    encoder = tiktoken.get_encoding('gpt2')
    assert encoder.decode(prepare.encode_prompt(encoder, text + '<|endoftext|>')) == text + '<|endoftext|>'


@needs_vocabulary
def test_long_runs_exactly(monkeypatch):
    """The way taken for long runs gives the tokens of tiktoken."""
    monkeypatch.setattr(prepare, 'RUN', 4)
    rng = random.Random(0)
    parts = ['a', 'B', 'é', '日', '12', ' ', '  ', '\n', '\n\n', '\t', '!', '/', "'s", '_', '\u3000', '<|endoftext|>']
    for encoder in map(tiktoken.get_encoding, ('gpt2', 'o200k_harmony')):
        for _ in range(100):
            text = rng.choice(' \t\n\u3000') * 20
            text = ''.join(rng.choices(parts, k=40)) + text + ''.join(rng.choices(parts, k=40))
            assert prepare.encode_text(encoder, text) == encoder.encode_ordinary(text)
            assert prepare.encode_prompt(encoder, text) == encoder.encode(text, allowed_special='all')


def test_bpe_on_long_runs(monkeypatch):
    """A run without a boundary is learnt in parts. Ordinary text has the merges that it has without cuts."""
    tokenizers, seen = pytest.importorskip('tokenizers'), []
    monkeypatch.setattr(prepare, 'tokenizer', 'bpe')
    texts = [story for story, _ in prepare.builtin_stories(0.5, 1)]
    ranks = prepare.train_tokenizer(texts)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'UNBROKEN', re.compile('(?!)'))
        assert prepare.train_tokenizer(texts) == ranks
    fake = SimpleNamespace(train_from_iterator=lambda texts, trainer: seen.extend(texts),
                           to_str=lambda: '{"model": {"merges": []}}')
    monkeypatch.setattr(tokenizers, 'Tokenizer', lambda model: fake)
    prepare.train_tokenizer(texts := ['ACGT' * 50_000, '0123' * 3000, '.;' * 3000, '\n' * 3000, 'some words ' * 3000])
    assert ''.join(seen) == ''.join(texts) and max(len(run) for text in seen for run in text.split(' ')) <= 1024


def test_spelled_special_tokens(tmp_path):
    """In a text, special tokens are letters, which a line counts, unless special_tokens=True."""
    file, flags = tmp_path / 'a.jsonl', ['--tokenizer=byte', f'--data_dir={tmp_path}/data']
    file.write_text('{"text": "<|start|>user<|message|>hi <|endoftext|> there"}\n' * 12)
    assert '36 spellings' in ran('prepare.py', f'--dataset={file}', *flags)
    assert len(read_data(tmp_path / 'data')[2]['train']) > 200
    assert 'spellings' not in ran('prepare.py', f'--dataset={file}', *flags, '--special_tokens=True')
    meta, encoder, tokens = read_data(tmp_path / 'data')
    assert (tokens['train'] + tokens['val']).count(encoder.encode_single_token('<|start|>')) == 12


# --- training ---------------------------------------------------------------------------------------------------------

TINY = ['--hidden_size=32', '--intermediate_size=32', '--num_hidden_layers=2', '--block_size=16', '--batch_size=4',
        '--sample_tokens=0', '--eval_iters=2', '--device=cpu', '--dtype=float32']
SHORT = [*TINY, '--max_iters=24', '--eval_interval=6', '--log_interval=4', '--dropout=0.1', '--warmup_iters=3']


def metrics(out):
    """The rows of metrics.jsonl without what the clock says."""
    rows = map(json.loads, (out / 'metrics.jsonl').read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in ('tokens_per_second', 'mfu')} for row in rows]


def state_of(folder):
    return json.loads((folder / 'state.json').read_text())


def assert_same_run(out, other):
    """The same numbers, and the same weights and moments at the end, to the last bit."""
    assert metrics(out) == metrics(other)
    for file in ('last/model.safetensors', 'last/optimizer.safetensors'):
        ours, theirs = load_file(out / file), load_file(other / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope='session')
def fox(tmp_path_factory):
    """A folder with text.txt, data, out (a run that learned the text), its output in log0, and short (one of SHORT)."""
    folder = tmp_path_factory.mktemp('fox')
    data = make_data(folder)
    finished(folder / 'log', f'--data_dir={data}', f'--out_dir={folder}/out', *TINY, '--max_iters=120',
             '--eval_interval=60', '--warmup_iters=10', '--start=the', '--sample_tokens=20')
    finished(folder / 'log-short', f'--data_dir={data}', f'--out_dir={folder}/short', *SHORT)
    return folder


def test_train(fox):
    """A run gets far below the 2.9 nats of the letters' frequencies, and reports it."""
    rows = metrics(fox / 'out')
    losses = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row}
    assert list(losses) == [0, 60, 120] and losses[0] > 3 and losses[120] < 0.5
    last = rows[-1]
    assert re.search('the (quick|lazy)', (fox / 'log0').read_text())
    assert last['val_bpb'] == pytest.approx(last['val_loss'] / math.log(2) * 221 / 220)
    assert len(last['expert_load_max']) == 2 and all(1 / 8 <= fraction <= 1 for fraction in last['expert_load_max'])
    assert last['dead_experts'] == [0, 0] and all(0 < fraction <= 1 / 8 for fraction in last['expert_load_min'])
    row = next(row for row in rows if row['step'] == 60 and 'train_loss' in row)
    assert row['tokens'] == 60 * 64 and row['lr'] > 0 and 0.9 < row['balance_loss'] < 8


def test_sample_and_fine_tune(fox, tmp_path):
    sample = ['sample.py', f'--out_dir={fox}/out', '--max_new_tokens=30', '--device=cpu', '--dtype=float32']
    status, text, err = run(*sample, '--start=the quick', '--temperature=0', '--num_samples=2')
    assert status == 0 and text.count('the quick brown fox jumps') == 2 and 'tokens/s' in err
    (tmp_path / 'prompt.txt').write_text('the lazy')
    text = ran(*sample, f'--start=FILE:{tmp_path}/prompt.txt', '--temperature=0', f'--init_from={fox}/out/last')
    assert text.startswith('the lazy dog')
    one, same, other = (ran(*sample, f'--seed={seed}', '--temperature=2.0') for seed in (1, 1, 2))
    assert one == same != other
    flags = f'--data_dir={fox}/data', f'--init_from={fox}/out/best', f'--out_dir={tmp_path}/out'
    ran('train.py', *flags, *TINY[3:], '--max_iters=1')
    assert run.names['model'].config.router_aux_loss_coef == 0.05  # of the model that is fine-tuned
    assert metrics(tmp_path / 'out')[0]['val_loss'] == pytest.approx(state_of(fox / 'out/best')['best_loss'], abs=1e-4)


def test_batches_and_schedule(fox, tmp_path, monkeypatch):
    """An epoch draws every block once. Accumulation is a larger batch. The learning rate follows its schedule."""
    # without the load-balancing loss, which depends on what is in a batch
    common = [f'--data_dir={fox}/data', *TINY, '--max_iters=1', '--warmup_iters=0', '--router_aux_loss_coef=0']
    monkeypatch.delitem(sys.modules, 'matplotlib')
    ran('train.py', *common, f'--out_dir={tmp_path}/a', '--batch_size=8')
    assert (tmp_path / 'a/loss.png').stat().st_size > 1000
    names = run.names
    drawn = [names['epoch_rows'](epoch)[:, 0].tolist() for epoch in range(6)]
    epochs = [sorted(starts) for starts in drawn]
    for starts in epochs:
        assert len(starts) == names['rows_per_epoch'] and set(np.diff(starts)) == {16}
        assert 0 <= starts[0] and starts[-1] + 16 < names['sizes']['train']
    assert len({starts[0] for starts in epochs}) > 1  # each epoch cuts blocks at another offset
    assert drawn[0] not in (epochs[0], drawn[1])
    ran('train.py', *common, f'--out_dir={tmp_path}/b', '--batch_size=2', '--gradient_accumulation_steps=4')
    moved, other = (load_file(tmp_path / x / 'last/optimizer.safetensors') for x in 'ab')
    compared = [name for name in moved if name.endswith(('exp_avg', 'momentum'))]
    assert len(compared) == len(load_file(tmp_path / 'a/last/model.safetensors'))
    assert all(off(moved[name], other[name]) < 1e-4 for name in compared)
    late = 0.5 * (1 + math.cos(0.75 * math.pi))
    for kind, expected in (('linear', [0.1, 1, 1, 0.5]), ('cosine', [0.1, 1, 0.5, late]), ('constant', [0.1, 1, 1, 1])):
        schedule = names['schedule']
        schedule.__globals__.update(lr_schedule=kind, cooldown=0.5, warmup_iters=9, max_iters=109, learning_rate=1.0)
        assert [schedule(step) for step in (0, 9, 59, 84)] == pytest.approx(expected)


def test_validation_rows(tmp_path):
    """Rows predict every validation token once. A document that fits into a row is seen from its beginning."""
    rng = random.Random(1)
    lengths = [rng.randint(3, 14) for _ in range(60)] + [50] + [5] * 40
    rows = ''.join(json.dumps(dict(text='abc'[i % 3] * n)) + '\n' for i, n in enumerate(lengths))
    (tmp_path / 'a.jsonl').write_text(rows)
    data = make_data(tmp_path, dataset=tmp_path / 'a.jsonl', val_fraction=0.9)
    ran('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1', '--eval_iters=0')
    gpt, (meta, _, tokens), predicted, losses = run.names['model'].eval(), read_data(data), [], []
    tokens, end = np.array(tokens['val']), meta['eot_token']
    for start, stop in run.names['val_rows']:
        row = torch.from_numpy(tokens[start:start + 17])
        last = max([i for i in range(1, 17) if row[i] == end], default=16)
        assert stop == start + last
        predicted += range(start + 1, stop + 1)
        logits = gpt(row[None, :16], row[None, 1:])[0][0]
        losses.append(F.cross_entropy(logits, row[1:], reduction='none')[:last])
        if start and tokens[start] != end:  # in the middle of a document: it is longer than a row
            assert start - max(i for i in range(start) if tokens[i] == end or i == 0) >= 16
    assert predicted == list(range(1, len(predicted) + 1)) and len(predicted) > len(tokens) - 18
    assert run.names['evaluate']() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_reports(fox, tmp_path):
    """train_loss is the cross-entropy alone. --recompute changes nothing. Tokens are counted on. float16 learns."""
    common, rows = [f'--data_dir={fox}/data', *TINY, '--max_iters=2', '--log_interval=1', '--init_from=resume'], []
    for number, flags in enumerate((['--router_aux_loss_coef=0'], ['--router_aux_loss_coef=9'],
                                    ['--router_aux_loss_coef=9', '--recompute=True', '--dropout=0'])):
        ran('train.py', *common, *flags, f'--out_dir={tmp_path}/{number}')  # resume starts a run where there is none
        rows.append(metrics(tmp_path / str(number)))
    for key in ('train_loss', 'balance_loss'):
        assert rows[1][1][key] == pytest.approx(rows[0][1][key], abs=1e-5)
    assert rows[1][2]['balance_loss'] != rows[0][2]['balance_loss']
    for row, recomputed in zip(rows[1], rows[2], strict=True):
        assert all(row[key] == pytest.approx(recomputed[key], rel=1e-5) for key in row)
    ran('train.py', *common, f'--out_dir={tmp_path}/0', '--max_iters=4', '--block_size=8', '--batch_size=2')
    counts = {row['step']: row['tokens'] for row in metrics(tmp_path / '0')}
    assert counts == {0: 0, 1: 64, 2: 128, 3: 144, 4: 160}
    ran('train.py', *common[:-1], '--dtype=float16', '--max_iters=40', f'--out_dir={tmp_path}/0', '--overwrite')
    assert metrics(tmp_path / '0')[-1]['val_loss'] < 2.7 and state_of(tmp_path / '0/last')['scaler']['scale'] > 1


def test_not_finite(fox, tmp_path):
    """A step whose loss is not finite leaves the weights alone. Ten in a row end the run with a checkpoint."""
    gpt = make(vocab_size=29)
    gpt.model.norm.weight.data[:] = gpt.lm_head.weight.data[:] = 3e38  # finite, but the loss is not
    gpt.save_pretrained(tmp_path / 'bad')
    refused(run('train.py', f'--data_dir={fox}/data', f'--out_dir={tmp_path}/out', f'--init_from={tmp_path}/bad',
                *TINY[3:], '--max_iters=100'), 'not finite', '10 steps')
    before, after = (load_file(tmp_path / name / 'model.safetensors') for name in ('bad', 'out/last'))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert state_of(tmp_path / 'out/last')['skipped'] == 10


# --- resuming ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('where, number, sent', [
    ('step', 9, signal.SIGTERM), ('evaluation', 3, signal.SIGTERM), ('rename', 4, signal.SIGKILL),
    ('rename', 14, signal.SIGKILL)])  # before last.new becomes last, before the last best.new becomes best
def test_stopped(where, number, sent, fox, tmp_path):
    """A run stopped by a signal, then resumed, gives the numbers and bits of a run that was not."""
    out, log, killed = tmp_path / 'out', tmp_path / 'log', sent == signal.SIGKILL
    flags = f'--data_dir={fox}/data', f'--out_dir={out}', *SHORT
    printed = finished(log, *flags, trap=(where, number, sent), status=-9 if killed else 0)
    assert (out / 'last').exists() == (number != 4) and (out / 'best').exists() == (number != 14)
    assert killed or 'SIGTERM' in printed and state_of(out / 'last')['step'] in (9, 10, 13)
    finished(log, f'--out_dir={out}', '--init_from=resume')  # the run remembers its other settings
    assert_same_run(out, fox / 'short')


@pytest.mark.parametrize('file', ['model.safetensors', 'state.json', 'config.json', 'optimizer.safetensors'])
def test_damaged_checkpoint(file, fox, tmp_path):
    """The older checkpoint replaces a damaged one."""
    shutil.copytree(fox / 'short', tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / 'last' / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert state_of(tmp_path / 'last.old')['step'] == 18
    assert 'last is damaged' in ran('train.py', f'--out_dir={tmp_path}', '--init_from=resume')
    assert_same_run(tmp_path, fox / 'short')


def assert_close_runs(out, other):
    """The same losses and parameters to 1e-5."""
    for a, b in zip(metrics(out), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {'lr', 'expert_load_min'}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (key, a, b)
    ours, theirs = (GPT.from_pretrained(folder / 'last', torch.float32) for folder in (out, other))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert (p - q).abs().max() < 1e-5, name


def test_windows(fox, tmp_path, monkeypatch):
    """Windows flushes only files that are open for writing, and no folders, which it cannot open."""
    flushed = []
    monkeypatch.delattr(os, 'O_DIRECTORY')
    monkeypatch.setattr(os, 'fsync', lambda file: flushed.append(os.write(file, b'')))  # fails for other files
    ran('train.py', f'--data_dir={fox}/data', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=2')
    assert len(flushed) > 5


@pytest.mark.parametrize('flags', [[], ['--fsdp=True']], ids=['DDP', 'FSDP2'])
def test_processes(flags, fox, tmp_path):
    """Processes give the numbers of one, which resumes what they began. Their checkpoint holds the whole model."""
    one, many, log = tmp_path / 'one', tmp_path / 'many', tmp_path / 'log'
    common = [f'--data_dir={fox}/data', *TINY, '--max_iters=12', '--eval_interval=4', '--log_interval=1',
              '--warmup_iters=3', '--num_local_experts=3', '--tie_word_embeddings=True',  # 3: not divisible by 2
              '--gradient_accumulation_steps=3']
    finished(log, *common, f'--out_dir={one}')
    finished(log, *common, *flags, f'--out_dir={many}', processes=2)
    assert_close_runs(many, one)
    finished(log, *common, *flags, f'--out_dir={many}', '--overwrite', processes=2, trap=('step', 7))
    assert state_of(many / 'last')['step'] < 12
    shutil.copytree(many, tmp_path / 'damaged')
    finished(log, f'--out_dir={many}', '--init_from=resume')
    assert_close_runs(many, one)
    for part in sorted((tmp_path / 'damaged/last').glob('shard-*'))[:1]:  # FSDP2: a file for each process
        part.unlink()
        refused(run('train.py', f'--out_dir={tmp_path}/damaged', '--init_from=resume'), 'does not fit')


@pytest.fixture(scope='session')
def chats(tmp_path_factory):
    """A folder with data, of questions and their answers, and out, a run that learned them."""
    folder, answers = tmp_path_factory.mktemp('chats'), dict(red='stop', green='go', yellow='wait')
    messages = [[dict(role='user', content=color), dict(role='assistant', thinking='Hm.', content=answers[color])]
                for color in list(answers) * 8]
    data = make_chats(folder, messages, tokenizer='bpe', vocab_size=300)
    longest = int(np.diff(np.flatnonzero(np.array(read_data(data)[2]['train']) == 299)).max())
    finished(folder / 'log', f'--data_dir={data}', f'--out_dir={folder}/out', *TINY, '--hidden_size=64',
             f'--block_size={2 * longest}', '--max_iters=150', '--warmup_iters=5', '--eval_iters=0')
    return folder


def chat_with(words, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdin', io.StringIO(words))
        return ran('sample.py', '--chat', '--temperature=0', '--dtype=float32', '--device=cpu', '--max_new_tokens=40',
                   *arguments)


def test_chat(chats):
    """The model answers and stops. The loss is that of the assistant's tokens alone, each chat from its beginning."""
    answer = chat_with('red\n\ngreen\n', f'--out_dir={chats}/out')
    assert answer.startswith('[analysis]\nHm.\n[final]\nstop\n') and answer.count('[final]') == 2
    (meta, encoder, tokens), total = read_data(chats / 'data'), 0.0
    gpt = GPT.from_pretrained(chats / 'out/best', torch.float32).eval()
    mask = np.fromfile(chats / 'data/val_mask.bin', np.uint8)
    ends = np.flatnonzero(np.array(tokens['val']) == encoder.eot_token)
    for start, end in zip([0, *ends + 1], ends):
        idx = torch.tensor([tokens['val'][start:end]])
        targets = idx.masked_fill(torch.from_numpy(mask[None, start:end] == 0), -1)
        total += gpt(idx[:, :-1], targets[:, 1:])[1].item() * mask[start:end].sum()
    loss = state_of(chats / 'out/best')['best_loss']
    assert loss < 0.2 and loss == pytest.approx(total / mask.sum(), abs=0.02)


def test_long_chats(tmp_path):
    """A row begins with a chat and has a target. What does not fit is told, with the block size that takes all."""
    messages = [[dict(role='user', content='word ' * (300 if i % 4 else 1)), dict(role='assistant', content='ok')]
                for i in range(40)]
    data, flags = make_chats(tmp_path, messages, tokenizer='byte'), [*TINY, '--max_iters=2', '--log_interval=1']
    tokens = {split: np.array(values) for split, values in read_data(data)[2].items()}
    longest = 0
    for split, values in tokens.items():
        ends = np.append(-1, np.flatnonzero(values == read_data(data)[0]['eot_token']))
        longest = max(longest, np.diff(ends).max() - 1)
    for block_size in (512, longest):
        out = tmp_path / str(block_size)
        said = ran('train.py', f'--data_dir={data}', f'--out_dir={out}', *flags, f'--block_size={block_size}')
        assert (f'--block_size={longest} takes all' in said) == (block_size == 512)
        assert all(row['train_loss'] > 0 for row in metrics(out) if 'train_loss' in row)
        for split, rows in (('train', run.names['chat_rows']), ('val', run.names['val_rows'])):
            mask = np.fromfile(data / f'{split}_mask.bin', np.uint8)
            assert all(start == 0 or tokens[split][start - 1] == tokens[split][-1] for start, _ in rows)
            targets = [mask[start + 1:stop + 1].sum() for start, stop in rows]
            assert min(targets) > 0 and (sum(targets) == mask.sum()) == (block_size == longest)
    refused(run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/0', *flags, '--block_size=99'), f'={longest}')


def test_other_data(fox, tmp_path):
    """A run does not continue on data that has changed, unless --data_dir names it."""
    data = shutil.copytree(fox / 'data', tmp_path / 'copy')
    ran('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/out', *TINY, '--max_iters=1')
    one, two = (read_data(make_data(tmp_path, text * 99))[0] for text in ('a fog and a dog. ', 'a dog and a fog. '))
    assert {key for key in one if one[key] != two[key]} == {'train_crc32', 'val_crc32'}
    (data / 'meta.json').write_text(json.dumps(read_data(data)[0] | dict(train_crc32=7)))
    resumed = f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=2'
    refused(run('train.py', *resumed), 'data', 'changed', '--data_dir')
    ran('train.py', *resumed, f'--data_dir={data}')


def test_chat_beyond_the_context(chats):
    """The oldest turns are left out whole. The system message stays."""
    prompts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('prepare.Chat.prompt', lambda it, *_: prompts.append(it.messages) or [0] * 9 * len(it.messages))
        chat_with('red\ngreen\nyellow\n', f'--out_dir={chats}/out', '--system=Be brief.', '--context=20')
    assert all(messages[0] == dict(role='system', content='Be brief.') for messages in prompts)
    assert [message['content'] for message in prompts[-1] if message['role'] == 'user'] == ['yellow']
    assert chat_with('green ' * 60, f'--out_dir={chats}/out', '--context=20') == ''


def test_chat_with_tools(monkeypatch, tmp_path, capsys):
    """A call of a function ends the answer, and the next line of input is its result."""
    (tmp_path / 'tools.json').write_text(json.dumps(TOOLS))
    ranks, prompts = {bytes([i]): i for i in range(256)}, []
    encoder = prepare.encoding('byte', ranks, (prepare.END, *prepare.HARMONY))
    written = iter((' to=functions.find<|channel|>commentary json<|message|>{"what":"a"}<|call|>',
                    '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>'))

    def answer(prompt):
        prompts.append(encoder.decode(prompt))
        return iter(prepare.encode_prompt(encoder, next(written))[:-1])

    monkeypatch.setattr(sample, 'tools', str(tmp_path / 'tools.json'))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Find a.\nIt is here.\n'))
    sample.converse(answer, encoder, 10_000)
    assert capsys.readouterr().out == '[commentary to find]\n{"what":"a"}\n[analysis]\nHm.\n[final]\na\n'
    assert 'type find = ' in prompts[0] and prompts[1] == prompts[0] + (
        ' to=functions.find<|channel|>commentary json<|message|>{"what":"a"}<|call|>'
        '<|start|>functions.find to=assistant<|channel|>commentary<|message|>It is here.<|end|><|start|>assistant')


def test_adapted_chat(chats, tmp_path):
    """Adapters alone learn other answers. They are resumed, and exported with their base."""
    messages = [[dict(role='user', content='red'), dict(role='assistant', content='go')]] * 16
    data = make_chats(tmp_path, messages, tokenizer=chats / 'out/best')
    flags = f'--data_dir={data}', f'--init_from={chats}/out/best', f'--out_dir={tmp_path}/out', *TINY[4:]
    ran('train.py', *flags, '--lora_rank=4', '--block_size=200', '--max_iters=40', '--warmup_iters=5')
    assert not list((tmp_path / 'out/best').glob('model*'))
    assert (tmp_path / 'out/best/adapter_model.safetensors').stat().st_size < 120_000
    assert 'go' in chat_with('red\n', f'--out_dir={tmp_path}/out')
    ran('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=41')
    assert run.names['model'].config.router_aux_loss_coef == 0  # frozen routers cannot be balanced; the base has 0.05
    ran('sample.py', f'--out_dir={tmp_path}/out', f'--export={tmp_path}/both', '--experts=mxfp4')
    assert GPT.from_pretrained(tmp_path / 'both', experts='mxfp4').lora is None


# --- command lines ----------------------------------------------------------------------------------------------------

def test_oldest_python():
    """The sources use nothing that is newer than Python 3.10."""
    newer = re.compile(r'tomllib|ExceptionGroup|add_note|TaskGroup|contextlib\.chdir|itertools\.batched|StrEnum|\bUTC\b'
                       r'|file_digest|catch_warnings\([a-z]*=|(?<!ast)\.walk\(|sumprod|typing\.Self|sys\.exception\b')
    for file in [*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('.ci/*.py')]:
        source = file.read_text(encoding='utf-8')
        ast.parse(source, feature_version=(3, 10))
        assert file.name == 'test_model.py' or not newer.search(source), newer.search(source)


def test_settings(monkeypatch):
    def read(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
        return config.read(ROOT / 'train.py', model=True)

    values, given = read('config/tinystories.py', '--batch_size=32', '--start=a=b', '--max_iters=1e3')
    assert values | dict(batch_size=32, block_size=512, start='a=b', max_iters=1000) == values
    assert given >= {'batch_size', 'block_size', 'hidden_size'} and 'grad_clip' not in given
    values, _ = read('config/gpt_oss_20b.py')
    with torch.device('meta'):  # published: 20.9 B parameters, 3.6 B active apart from the embedding
        gpt = GPT(GPTConfig(**{key: values[key] for key in GPTConfig.__dataclass_fields__}))
    assert gpt.num_parameters() == pytest.approx(20.91e9, rel=1e-3)
    assert gpt.num_parameters(active=True) - 201088 * 2880 == pytest.approx(3.61e9, rel=1e-2)
    assert gpt.flops_per_token(1) == pytest.approx(6 * 3.61e9, rel=1e-2)
    for script in ('train.py', 'prepare.py', 'sample.py', 'bench.py'):
        text = ran(script, '--help')
        for key, (kind, default, _, heading) in config.declared(script).items():
            line = next(line for line in text.splitlines() if line.startswith(f'  --{key}={default!r}'))
            assert kind in line and len(line.split()) > 2 and f'\n{heading}\n' in text
    command = f'PYTHONUNBUFFERED=1 {sys.executable} {ROOT}/train.py --help | head -3'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert not done.stderr and len(done.stdout.splitlines()) == 3


def test_bench(tmp_path):
    tiny = [*TINY[:5], '--rounds=1', '--steps=1', '--new_tokens=4', '--device=cpu', f'--json_file={tmp_path}/b.json']
    ran('bench.py', *tiny, '--vocab_size=300')
    rows = json.loads((tmp_path / 'b.json').read_text())['rows']
    assert [row['row'] for row in rows] == ['train', 'prefill', 'decode'] and rows[0]['MFU'] > 0
    assert all(row['tokens/s'] > 0 and row['peak GB'] > 0.05 for row in rows)
    assert '512 | 128 | True' in ran('bench.py', *tiny, '--scale')


# --- bad input: exit status 2 and one line with the decisive words ----------------------------------------------------

BAD_INPUT = [
    ('train.py', '--learning_rat=1', 'learning_rat', 'learning_rate'),
    ('train.py', '--batch_size=abc', 'batch_size', 'abc'), ('train.py', '--learning_rate=nan', 'learning_rate', 'nan'),
    ('train.py', '--out_dir', '--out_dir='), ('train.py', 'config/tinystorys.py', 'config/tinystories.py'),
    ('train.py', 'typo.py', 'typo.py', 'learning_rat'), ('train.py', 'type.py', 'type.py', 'batch_size'),
    ('train.py', 'crash.py', 'crash.py', 'line 2'), ('train.py', 'syntax.py', 'syntax.py', 'line 1'),
    ('train.py', '--block_size=500', '221', '501'), ('train.py', '--num_key_value_heads=3', '4', '3'),
    ('train.py', '--sliding_window=0', 'sliding_window', '0'), ('train.py', '--head_dim=9', 'head_dim', '9'),
    ('train.py', '--layer_types=x,x', 'layer_types'), ('train.py', '--vocab_size=5', 'data/', '5'),
    ('train.py', '--batch_size=0', 'batch_size', '0'), ('train.py', '--device=tpu9', 'tpu9'),
    ('train.py', '--dtype=int4', 'int4'), ('train.py', '--fsdp', 'torchrun'),
    ('train.py', '--init_from=nowhere', 'nowhere'), ('train.py', '--lora_rank=4', 'lora_rank', 'init_from'),
    ('train.py', '--init_from=short/best --experts=mxfp4', 'experts'),
    ('train.py', '--init_from=short/best --hidden_size=64', 'short/best', 'embed_tokens'),
    ('train.py', '--init_from=short/best --data_dir=upper', 'short/best', 'tokenizer'),
    ('train.py', '--out_dir=short', 'short', 'overwrite'), ('train.py', '--out_dir=locked', 'locked', 'another run'),
    ('train.py', '--out_dir=short --overwrite --init_from=short/best', 'short/best', 'overwrite'),
    ('train.py', '--out_dir=text.txt/out', 'text.txt/out'), ('train.py', '--data_dir=none', 'none/meta.json'),
    ('train.py', '--data_dir=cut', 'cut/train.bin', '1001'),
    ('train.py', '--data_dir=strange', 'strange/train.bin', '65535'),
    ('train.py', '--data_dir=empty', 'empty/meta.json'), ('train.py', '--data_dir=float', 'float/meta.json'),
    ('prepare.py', '--dataset=none.txt', 'none.txt'), ('prepare.py', '--dataset=no*.jsonl', 'no*.jsonl'),
    ('prepare.py', '--dataset=nothing.txt', 'nothing.txt'),
    ('prepare.py', '--dataset=binary.txt', 'binary.txt', 'Unicode'),
    ('prepare.py', '--dataset=x.docx', 'x.docx', '.jsonl'), ('prepare.py', '--dataset=broken.jsonl', 'broken.jsonl'),
    ('prepare.py', '--dataset=half.jsonl', 'half.jsonl', 'line 4', 'body'), ('prepare.py', '--val_fraction=1.5', '1.5'),
    ('prepare.py', '--tokenizer=gtp2', 'gtp2', 'gpt2'),
    ('prepare.py', '--tokenizer=bpe --vocab_size=100', '100', '257'),
    ('prepare.py', '--dataset=unanswered.jsonl', 'line 1', 'no answer'),
    ('prepare.py', '--dataset=robot.jsonl', 'message 2', 'robot'), ('prepare.py', '--dataset=loud.jsonl', 'loud'),
    ('sample.py', '--start=QUICK', "'C', 'I'"), ('sample.py', '--start=FILE:none.txt', 'none.txt'),
    ('sample.py', '--temperature=-1', 'temperature', '-1'), ('sample.py', '--top_k=-1', 'top_k', '-1'),
    ('sample.py', '--top_p=0', 'top_p', '0'), ('sample.py', '--min_p=2', 'min_p', '2'),
    ('sample.py', '--max_new_tokens=200000', 'prompt'), ('sample.py', '--out_dir=none', 'none'),
    ('sample.py', '--export=short', 'short'), ('sample.py', '--chat', '<|start|>'),
    ('sample.py', '--init_from=untold', 'untold', 'tokenizer'), ('bench.py', '--parts=train,walk', 'walk'),
    ('bench.py', '--learn --data_dir=data --block_size=16 --works=toast', 'toast'),
    ('bench.py', '--rounds=0', 'rounds', '0'), ('bench.py', '--scale --gpu=toaster', 'toaster', 'H100')]


@pytest.fixture(scope='session')
def playground(fox, tmp_path_factory):
    """A folder with text.txt, data, short (a run), and the broken files that BAD_INPUT names."""
    folder = tmp_path_factory.mktemp('playground')
    shutil.copytree(fox, folder, dirs_exist_ok=True)
    make_data(folder, FOX.upper()).rename(folder / 'upper')
    shutil.copytree(fox / 'data', folder / 'data')
    whole, meta = (folder / 'data/train.bin').read_bytes(), json.loads((folder / 'data/meta.json').read_text())
    for name, file, content in (
            ('cut', 'train.bin', whole[:1001]), ('strange', 'train.bin', b'\xff' * len(whole)),
            ('empty', 'meta.json', b'{}'), ('float', 'meta.json', json.dumps(meta | dict(dtype='float64')).encode())):
        shutil.copytree(folder / 'data', folder / name)
        (folder / name / file).write_bytes(content)
    shutil.copytree(folder / 'short/best', folder / 'untold')
    (folder / 'untold/tokenizer.tiktoken').write_text('YQ== 0\nYg== 5')
    for name, content in (
            ('typo.py', 'learning_rat = 1e-3'), ('type.py', "batch_size = 'x'"), ('crash.py', 'x = 1\n_y = x / 0'),
            ('syntax.py', 'x = = 1'), ('nothing.txt', ''), ('x.docx', 'x'), ('broken.jsonl', '{"text": "a"}\n{"te'),
            ('half.jsonl', '{"text": "a"}\n' * 3 + '{"title": "b", "body": "c"}\n')):
        (folder / name).write_text(content)
    (folder / 'binary.txt').write_bytes(bytes(range(256)))
    user, answer = dict(role='user', content='hi'), dict(role='assistant', content='yes')
    robot, loud = dict(role='robot', content='x'), answer | dict(channel='loud')
    for name, chat in (('unanswered', [user]), ('robot', [user, robot]), ('loud', [user, loud])):
        (folder / f'{name}.jsonl').write_text(json.dumps(dict(messages=chat)) + '\n')
    (folder / 'locked').mkdir()
    with FileLock(folder / 'locked/.lock'):
        yield folder


@pytest.mark.parametrize('script, flags, words', [(script, flags, words) for script, flags, *words in BAD_INPUT],
                         ids=[' '.join(row[:2]) for row in BAD_INPUT])
def test_bad_input(script, flags, words, playground):
    usual = {'train.py': ['--data_dir=data', '--out_dir=new', *TINY, '--max_iters=1'], 'bench.py': ['--device=cpu'],
             'prepare.py': ['--dataset=text.txt', '--tokenizer=byte', '--data_dir=prepared'],
             'sample.py': ['--out_dir=short', '--max_new_tokens=3', '--device=cpu']}
    refused(run(script, *usual[script], *flags.split(), cwd=playground), *words)
    assert not (playground / 'prepared').exists() or not os.listdir(playground / 'prepared')
