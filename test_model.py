"""
The tests: parity with transformers' GptOssForCausalLM, and what the scripts promise. They need no network.

    pytest -q test_model.py
    LONG=1 pytest -q test_model.py -k long
"""

import base64
import contextlib
import copy
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # of models as small as these a second thread makes slower ones

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import prepare
from model import (FULL, GPT, MXFP4, SLIDING, GPTConfig, KVCache, LinearCrossEntropy, dequantize_mxfp4,
                   quantize_mxfp4, rope_tables)

ROOT = Path(__file__).parent
long = pytest.mark.skipif('LONG' not in os.environ, reason='takes minutes: LONG=1 pytest -q test_model.py -k long')
SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=16,
             rope_original_max_position_embeddings=64)


def make(seed=0, **changes):
    """A small model in which no parameter is zero, so that none can hide."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name), std=0.2)
    return model


def to_ours(name, tensor):
    """A parameter of transformers, or its gradient, in our name and layout; not by model.py's own conversion."""
    if '.experts.' not in name:
        return name, tensor
    if 'gate_up' in name:
        tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
    if name.endswith('_bias'):
        return name.replace('_proj_bias', '_bias'), tensor
    return name.replace('_proj', '_weight'), tensor.transpose(1, 2)


def reference(model, path):
    """transformers' model with the same weights, by way of save_pretrained."""
    transformers = pytest.importorskip('transformers')
    model.save_pretrained(path)
    return transformers.GptOssForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager')


# --- parity -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('length, changes', [
    (300, {}), (1, {}), (16, {}), (17, {}), (33, dict(head_dim=64)), (600, dict(num_hidden_layers=2)),
    (100, dict(num_key_value_heads=1)), (100, dict(num_key_value_heads=6)),
    (100, dict(num_local_experts=1, num_experts_per_tok=1)),
    (20, dict(num_local_experts=64, num_experts_per_tok=1)),
    (100, dict(num_local_experts=8, num_experts_per_tok=8)),
    (50, dict(sliding_window=1)), (100, dict(tie_word_embeddings=True)),
    (100, dict(layer_types=[FULL, FULL, SLIDING])), (100, dict(rope_factor=1.0)), (100, dict(rope_truncate=True)),
    (100, dict(hidden_size=40, intermediate_size=56)),
], ids=str)
def test_parity(length, changes, tmp_path):
    """Logits, loss and all gradients against transformers in fp32, past the window (16) and YaRN's original 64."""
    model = make(**changes)
    theirs = reference(model, tmp_path)
    tokens = torch.randint(97, (2, length + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, :length // 3] = -1
    logits, loss = model(idx, targets)
    expected = theirs(idx).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert (logits - expected).abs().max() <= 1e-4
    assert abs(loss - expected_loss) <= 1e-5
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    compared = set()
    for name, p in theirs.named_parameters():
        name, expected = to_ours(name, p.grad)
        error = torch.linalg.vector_norm(gradients[name] - expected)
        assert error <= 1e-4 * torch.linalg.vector_norm(expected) + 1e-7, name
        compared.add(name)
    assert compared == gradients.keys()
    # the loss without the logits is another path: same loss, same gradients
    model.zero_grad()
    nothing, loss = model(idx, targets, return_logits=False)
    assert nothing is None and abs(loss - expected_loss) <= 1e-5
    (3 * loss).backward()
    for name, p in model.named_parameters():
        error = torch.linalg.vector_norm(p.grad / 3 - gradients[name])
        assert error <= 1e-5 * torch.linalg.vector_norm(gradients[name]) + 1e-7, name


def test_one_kernel_for_all_experts(monkeypatch):
    """The path of CUDA, F.grouped_mm, gives what the loop over experts gives, and is one graph with all the rest."""
    made = make(hidden_size=64, intermediate_size=32, num_local_experts=6, num_hidden_layers=2)
    idx, targets = torch.randint(97, (2, 40)), torch.randint(97, (2, 40))
    made(idx, targets)[1].backward()
    expected = {name: p.grad.clone() for name, p in made.named_parameters()}
    monkeypatch.setattr(model, 'grouped_mm_fits', lambda x, w: True)
    made.zero_grad()
    made(idx, targets)[1].backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    compiled, gradients = torch.compile(made, backend='aot_eager', fullgraph=True), []
    for run, options in ((made, {}), (compiled, dict(return_logits=False))):
        made.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):  # the kernel compiles for bf16 alone
            run(idx, targets, **options)[1].backward()
        gradients.append([p.grad.clone() for p in made.parameters()])
    for eager, *others in zip(*gradients):
        for other in others:
            assert torch.linalg.vector_norm(other - eager) < 0.05 * torch.linalg.vector_norm(eager)


def test_published_rope():
    """gpt-oss-20b's frequencies: the ramp lies between pairs 8.093 and 17.398, the concentration is 1.3466."""
    config = GPTConfig()
    cos, sin = rope_tables(config, torch.tensor([0, 1]))
    assert cos[0, 0, 0].item() == pytest.approx(1.3466, abs=1e-4)
    frequency = torch.atan2(sin[1, 0, 32:], cos[1, 0, 32:])
    plain = 150000.0 ** (-torch.arange(32) / 32)
    slowed = (torch.arange(32) - 8.093) / (17.398 - 8.093)
    expected = plain * (1 - slowed.clamp(0, 1) * (1 - 1 / 32))
    torch.testing.assert_close(frequency, expected, rtol=1e-4, atol=0)


def test_loss_in_chunks():
    """A vocabulary so large that the rows go through in several chunks: as near to fp64 as F.cross_entropy is."""
    torch.manual_seed(0)
    x, w = torch.randn(300, 8, requires_grad=True), torch.randn(2 ** 18, 8, requires_grad=True)
    targets = torch.randint(-1, len(w), (300,))
    assert 2 ** 25 // len(w) < 300

    def gradients(loss, x, w):
        loss = loss(x, w)
        return loss, *torch.autograd.grad(loss, (x, w))

    plain = lambda x, w: F.cross_entropy(x @ w.T, targets, ignore_index=-1)
    exact = gradients(plain, x.double(), w.double())
    ours = gradients(lambda x, w: LinearCrossEntropy.apply(x, w, targets, (targets >= 0).sum(), True), x, w)
    for a, b, c in zip(ours, gradients(plain, x, w), exact):
        error, usual = (torch.linalg.vector_norm(value - c) / torch.linalg.vector_norm(c) for value in (a, b))
        assert error <= 2 * usual + 1e-6


@pytest.mark.parametrize('how', ['autocast', 'bf16 parameters'])
def test_bf16(how):
    """bf16 stays within 4 % of fp32 (relative norm) in the logits and 12 % in a matrix's gradient.

    transformers' own: 3.3 and 11 %. Every expert is chosen here, for where the router's choice is close, rounding
    decides it, and that is no error of ours.
    """
    model = make(num_hidden_layers=2, num_experts_per_tok=5)
    idx, targets = torch.randint(97, (2, 300)), torch.randint(97, (2, 300))
    expected, loss = model(idx, targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if how == 'autocast':
        with torch.autocast('cpu', torch.bfloat16):
            logits, loss = model(idx, targets)
    else:
        logits, loss = model.bfloat16()(idx, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()

    assert off(logits, expected) < 0.04
    worst = max((off(p.grad, gradients[name]), name) for name, p in model.named_parameters()
                if name.endswith('weight'))
    assert worst[0] < 0.12, worst
    model.zero_grad()  # the loss without logits, in bf16
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        model(idx, targets, return_logits=False)[1].backward()
    worst = max((off(p.grad, gradients[name]), name) for name, p in model.named_parameters()
                if name.endswith('weight'))
    assert worst[0] < 0.12, worst


def off(ours, theirs):
    """Relative distance of two tensors, in norm."""
    return (torch.linalg.vector_norm(ours.float() - theirs) / torch.linalg.vector_norm(theirs)).item()


@pytest.mark.parametrize('way', ['kernel', 'key'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('T, window', [(40, None), (40, 64), (40, 8), (37, 8), (9, 8), (1, 8)])
def test_attention(way, dtype, tolerance, T, window, monkeypatch):
    """Both ways to take in the sinks, values and gradients, against the explicit softmax with one more column."""
    torch.manual_seed(0)
    if way == 'key':
        monkeypatch.setattr(model.SinkAttention, 'apply', lambda *inputs: model.attention_by_key(*inputs, dropout=0.0))
    inputs = [torch.randn(shape) for shape in ((2, T, 6, 16), (2, T, 2, 16), (2, T, 2, 16), (6,), (2, T, 6, 16))]
    inputs = [x.to(dtype).float().requires_grad_() for x in inputs]
    q, k, v, sinks, weight = inputs
    ours = model.attention(*(x.to(dtype) for x in (q, k, v)), sinks, window)
    gradients = torch.autograd.grad((ours.float() * weight).sum(), (q, k, v, sinks))
    logits = torch.einsum('bthd,bshd->bhts', q, k.repeat_interleave(3, dim=2)) / 4
    distance = torch.arange(T)[:, None] - torch.arange(T)
    logits = logits.masked_fill((distance < 0) | (distance >= (window or T)), -math.inf)
    shares = torch.cat((logits, sinks[:, None, None].expand(2, 6, T, 1)), dim=-1).softmax(-1)[..., :-1]
    expected = torch.einsum('bhts,bshd->bthd', shares, v.repeat_interleave(3, dim=2))
    assert off(ours, expected) < tolerance
    for gradient, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), (q, k, v, sinks))):
        assert off(gradient, theirs) < tolerance or theirs.norm() < 1e-5


def test_swiglu():
    """Values and gradients of the clamped SwiGLU, on both sides of the limit, against the published formula."""
    torch.manual_seed(0)
    gate_up = torch.randn(50, 64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    clamped, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
    expected = clamped * torch.sigmoid(1.702 * clamped) * (up + 1)
    ours, weight = model.swiglu(gate_up, 0.5), torch.randn(50, 32)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad((y * weight).sum(), gate_up)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients)
    assert 0.2 < (gradients[0] == 0).float().mean() < 0.8


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
@pytest.mark.parametrize('counts', [(0, 1, 255, 256, 700), (3, 0, 4, 0, 1)])
def test_expert_by_expert(counts, dtype, tolerance):
    """Its hand-written backward against autograd through the plain loop in fp32: all gradients, idle experts' too."""
    torch.manual_seed(0)
    N, D, I, E = sum(counts), 24, 16, len(counts)
    token = torch.cat([torch.randperm(N)[:count] for count in counts])
    shapes = (N, D), (N,), (E, 2 * I, D), (E, 2 * I), (E, D, I), (E, D)
    x, share, w1, b1, w2, b2 = inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    y = torch.zeros(N, D)
    for e, (t, s) in enumerate(zip(token.split(counts), share.split(counts))):
        y = y.index_add(0, t, (model.swiglu(x[t] @ w1[e].T + b1[e], 30.0) @ w2[e].T + b2[e]) * s[:, None])
    weight = torch.randn(N, D)
    expected = torch.autograd.grad((y * weight).sum(), inputs)
    ours = model.ExpertByExpert.apply(x.to(dtype), share, token, list(counts), w1, b1, w2, b2, 30.0, True)
    assert ours.dtype == dtype and off(ours, y) < tolerance
    with torch.no_grad():
        again = model.ExpertByExpert.apply(x.to(dtype), share, token, list(counts), w1, b1, w2, b2, 30.0, False)
    assert torch.equal(again, ours)
    for gradient, theirs in zip(torch.autograd.grad((ours * weight).sum(), inputs), expected):
        assert off(gradient, theirs) < tolerance
        if len(gradient) == E:
            assert not any(gradient[e].any() for e in range(E) if counts[e] == 0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('batch', [1, 3, 9])
def test_compiled_decoding(batch, dtype):
    """The step that `generate(compile=True)` compiles is as near to fp32 as the eager one, in both kinds of layers."""
    # every expert is chosen, for where the router's choice is close, rounding decides it
    model, idx = make(num_experts_per_tok=5).eval().to(dtype), torch.randint(97, (batch, 24))
    exact = copy.deepcopy(model).float()
    torch._dynamo.reset()
    compiled = torch.compile(model.next_logits, backend='aot_eager', fullgraph=batch <= 8)
    models, steps = (model, model, exact), (compiled, model.next_logits, exact.next_logits)
    caches = [KVCache(model.config, batch, 40, m.lm_head.weight.dtype, 'cpu') for m in models]
    errors = []
    with torch.no_grad():
        for m, cache in zip(models, caches):
            m.next_logits(idx[:, :20], cache)
            cache.position += 20
        for t in range(20, 24):
            ours, eager, expected = (step(idx[:, t:t + 1], cache) for step, cache in zip(steps, caches))
            errors.append((off(ours, expected), off(eager, expected)))
            for cache in caches:
                cache.position += 1
    ours, eager = np.mean(errors, axis=0)
    assert ours < (1e-4 if dtype == torch.float32 else 1.5 * eager), errors


def test_compiled_training():
    """Compiled, the loop over experts stays outside of the graph; loss and gradients are the eager model's."""
    model, idx = make(), torch.randint(97, (2, 40))
    model.train()
    results = []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend='aot_eager')):
        model.zero_grad()
        loss = run(idx, idx, return_logits=False)[1]
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_nothing_is_quadratic():
    """Twice the context makes the largest tensor of a training step twice as large; it is never (T, T) or (T, V)."""
    largest = []
    for length in (1024, 2048):
        model, tokens = make(max_position_embeddings=4096), torch.randint(97, (1, length + 1))
        with Largest() as watch:
            model(tokens[:, :-1], tokens[:, 1:], return_logits=False)[1].backward()
        largest.append(watch.bytes)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 4 * 2048 ** 2
    model, tokens = make(vocab_size=50000), torch.randint(97, (2, 1025))
    with Largest() as watch:
        model(tokens[:, :-1], tokens[:, 1:], return_logits=False)[1].backward()
    assert watch.bytes < 4 * 2048 * 50000 / 2


# --- what attention and the cache may see -------------------------------------------------------------------------

@pytest.mark.parametrize('layer_type', [SLIDING, FULL])
@pytest.mark.parametrize('length', [16, 50, 64])
def test_what_a_layer_sees(layer_type, length):
    """Change one token: exactly the positions from it on change, in a sliding layer only those in the window."""
    model = make(num_hidden_layers=1, layer_types=[layer_type]).eval()
    idx = torch.randint(97, (1, length))
    before = model(idx, idx)[0]
    for changed in (0, 5, length - 1):
        other = idx.clone()
        other[0, changed] = (idx[0, changed] + 1) % 97
        moved = (model(other, idx)[0] - before).abs().amax(-1)[0] > 1e-5  # less is rounding
        reach = min(changed + 16, length) if layer_type == SLIDING else length
        assert moved.nonzero().flatten().tolist() == list(range(changed, reach))


@pytest.mark.parametrize('changes', [
    {}, dict(num_key_value_heads=1), dict(sliding_window=1), dict(qk_norm=True),
    dict(layer_types=[FULL, FULL, FULL]), dict(num_local_experts=1, num_experts_per_tok=1)], ids=str)
@pytest.mark.parametrize('prompt', [1, 15, 16, 40])
def test_cache(prompt, changes):
    """Decoding by the cache, past the window, gives the whole sequence's logits; sliding layers keep 16 keys."""
    model = make(**changes).eval()
    idx = torch.randint(97, (2, 70))
    with torch.inference_mode():
        cache = KVCache(model.config, 2, 70, torch.float32, 'cpu')
        states = []
        for part in (idx[:, :prompt], *idx[:, prompt:].split(1, dim=1)):
            states.append(model.hidden_states(part, cache)[0])
            cache.position += part.size(1)
        torch.testing.assert_close(torch.cat(states, 1), model.hidden_states(idx)[0], rtol=0, atol=1e-4)
    for layer, layer_type in zip(cache.layers, model.config.layer_types):
        assert layer[0].size(2) == (model.config.sliding_window if layer_type == SLIDING else 70)


def test_generate():
    model = make()
    idx = torch.randint(97, (3, 5))
    greedy = model.generate(idx, 30, temperature=0)
    assert model.training and greedy.shape == (3, 35) and torch.equal(greedy[:, :5], idx)
    model.eval()
    for t in range(5, 35):
        assert torch.equal(model(greedy[:, :t])[0][:, -1].argmax(-1), greedy[:, t])
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-6)):
        assert torch.equal(model.generate(idx, 30, **narrow), greedy)
    torch.manual_seed(1)
    first = model.generate(idx, 30, top_k=10 ** 6)  # more than there are keeps all
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 30), first)
    stop = greedy[0, 7].item()
    stopped = model.generate(idx[:1], 30, temperature=0, stop=[stop])
    assert stopped[0, -1] == stop and stop not in stopped[0, 5:-1]
    both = model.generate(idx, 30, temperature=0, stop=[stop])
    assert (both[0, stopped.size(1):] == stop).all()


def test_context():
    """With a context every layer is a ring of it, so that what lies further back does not count."""
    model = make(layer_types=[FULL] * 3).eval()
    idx = torch.randint(97, (1, 50))
    other = idx.clone()
    other[:, :10] = (idx[:, :10] + 1) % 97
    assert torch.equal(model.generate(idx, 20, temperature=0, context=30)[:, 30:],
                       model.generate(other, 20, temperature=0, context=30)[:, 30:])
    with torch.inference_mode():  # a layer that looks 30 back is a sliding one with that window
        sliding = make(layer_types=[SLIDING] * 3, sliding_window=30).eval()
        sliding.load_state_dict(model.state_dict())
        cache = KVCache(model.config, 1, 80, torch.float32, 'cpu', context=30)
        for token in idx.split(1, dim=1):
            logits = model.next_logits(token, cache)
            cache.position += 1
        torch.testing.assert_close(logits, sliding(idx)[0][:, -1], rtol=0, atol=1e-4)


def test_sampling_distribution():
    """What top_k, top_p and min_p leave, against the same counted out by hand."""
    from model import draw
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = probabilities.log().expand(20000, 5)

    def shares(*arguments):
        counts = torch.bincount(draw(logits, *arguments).flatten(), minlength=5)
        return [round(n / 20000, 2) for n in counts.tolist()]

    assert shares(1.0, None, None, None) == pytest.approx(probabilities.tolist(), abs=0.02)
    assert shares(1.0, 2, None, None) == pytest.approx([5 / 7, 2 / 7, 0, 0, 0], abs=0.02)
    assert shares(1.0, None, 0.6, None) == pytest.approx([5 / 7, 2 / 7, 0, 0, 0], abs=0.02)
    assert shares(1.0, None, None, 0.25) == pytest.approx([50 / 85, 20 / 85, 15 / 85, 0, 0], abs=0.02)
    squares = probabilities ** 2
    assert shares(0.5, None, None, None) == pytest.approx((squares / squares.sum()).tolist(), abs=0.02)


# --- training's own parts -----------------------------------------------------------------------------------------

def test_balance_loss():
    """1 when every expert is as likely; transformers' for one layer, over k; only in training mode."""
    modeling = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
    model = make(num_hidden_layers=1, router_aux_loss_coef=0.5)
    idx = torch.randint(97, (2, 40))
    logits = []
    model.model.layers[0].mlp.router.register_forward_hook(lambda module, x, y: logits.append(y))
    loss = model(idx, idx)[1]
    expected = modeling.load_balancing_loss_func((logits[0],), num_experts=5, top_k=2) / 2
    assert (loss - model.eval()(idx, idx)[1]).item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert model.model.layers[0].mlp.load.sum() == 2 * 40 * 2  # counted in training only
    even = make(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=4)
    for layer in even.model.layers:
        torch.nn.init.zeros_(layer.mlp.router.weight)
        torch.nn.init.zeros_(layer.mlp.router.bias)
    assert even.hidden_states(idx)[1].item() == pytest.approx(1)


def test_dropout():
    idx = torch.randint(97, (2, 40))
    for changes in (dict(dropout=0.3), dict(attention_dropout=0.3), dict(dropout=0.3, attention_dropout=0.0)):
        model = make(**changes)
        assert not torch.equal(model(idx)[0], model(idx)[0])
        model.eval()
        assert torch.equal(model(idx)[0], make().eval()(idx)[0])


def test_optimizers():
    """Every parameter has one optimizer: the hidden matrices Muon, and only matrices decay."""
    model = make(qk_norm=True)
    names = {id(p): name for name, p in model.named_parameters()}
    for muon_lr in (0, 0.02):
        adamw, *muon = model.configure_optimizers(1e-3, muon_lr, (0.9, 0.95), 0.1)
        decayed, rest = ([names[id(p)] for p in group['params']] for group in adamw.param_groups)
        hidden = [names[id(p)] for optimizer in muon for group in optimizer.param_groups for p in group['params']]
        assert sorted(decayed + rest + hidden) == sorted(names.values())
        assert [group['weight_decay'] for group in adamw.param_groups] == [0.1, 0]
        assert {name.split('.')[-2] for name in rest} >= {'q_proj', 'experts', 'router', 'input_layernorm', 'q_norm'}
        assert all(name.endswith('weight') and 'norm' not in name for name in decayed + hidden)
        if muon:
            assert {name.split('.')[-2] for name in decayed} == {'embed_tokens', 'lm_head'}
            assert len(hidden) == 7 * model.config.num_hidden_layers


def test_muon(monkeypatch):
    """torch.optim.Muon on each matrix by itself: q, k, v, o, router, and each expert's gate, up and down."""
    from torch.optim._muon import _zeropower_via_newtonschulz as iterate
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)  # torch's iterates in bf16, 3 to 8 % off
    monkeypatch.setattr(torch, 'bfloat16', torch.float32)
    monkeypatch.setattr(model, 'orthogonalize', lambda x, dtype: torch.stack(
        [iterate(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in x]))  # ours has a test of its own
    gpt, idx = make(num_hidden_layers=2, intermediate_size=40), torch.randint(97, (2, 40))
    muon = gpt.configure_optimizers(0.0, 0.05, (0.9, 0.95), 0.1)[1]
    pieces = {p: group['pieces'] for group in muon.param_groups for p in group['params']}
    matrices = {p: [torch.nn.Parameter(m.clone()) for m in p.detach().reshape(-1, p.size(-2) // n, p.size(-1))]
                for p, n in pieces.items()}
    assert sorted({len(parts) for parts in matrices.values()}) == [1, 5, 10]
    expected = torch.optim.Muon([m for parts in matrices.values() for m in parts], lr=0.05, momentum=0.9,
                                weight_decay=0.1)
    for _ in range(3):
        before = {p: p.detach().clone() for p in pieces}
        gpt.zero_grad()
        gpt(idx, idx)[1].backward()
        for p, parts in matrices.items():
            for m, grad in zip(parts, p.grad.reshape(-1, *parts[0].shape)):
                m.grad = grad.clone()
        muon.step()
        expected.step()
        for p, parts in matrices.items():
            theirs = torch.stack(list(parts)).detach().view_as(p)
            assert off(p.detach() - before[p], theirs - before[p]) < 1e-3
            with torch.no_grad():
                p.copy_(theirs)


def test_muon_holds_still():
    """An expert without a token has zero gradients and stays; so does all when the gradients are not finite."""
    model, idx = make(), torch.randint(97, (2, 40))
    for layer in model.model.layers:
        layer.mlp.router.bias.data = torch.tensor([100.0, 100, 0, 0, 0])  # the first two get everything
    adamw, muon = model.configure_optimizers(1e-3, 0.05, (0.9, 0.95), 0.0)
    experts = model.model.layers[0].mlp.experts.down_weight
    before = experts.detach().clone()
    model(idx, idx)[1].backward()
    assert not any(p.grad[2:].any() for p in model.model.layers[0].mlp.experts.parameters())
    muon.step()
    assert torch.equal(experts[2:], before[2:]) and not torch.equal(experts[:2], before[:2])
    adamw.step()
    kept = [(p, p.clone(), [value.clone() for value in optimizer.state[p].values()])
            for optimizer in (adamw, muon) for p in optimizer.state]
    assert len(kept) == len(list(model.parameters()))
    for p in model.parameters():
        p.grad.view(-1)[0] = math.nan
    for optimizer in (adamw, muon):
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
        optimizer.step()
        for p, before, state in kept:
            if p in optimizer.state:
                assert torch.equal(p, before) and all(map(torch.equal, optimizer.state[p].values(), state))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(3, 20, 50), (2, 50, 20), (4, 32, 32)])
def test_orthogonalize(shape, dtype):
    """The singular vectors stay, the singular values come near 1, those of rank 1 too; zero stays zero."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1e-4, 1, 1e4, 1])[:shape[0], None, None]
    x[1] = x[1, :, :1] @ x[1, :1]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ model.orthogonalize(x, dtype) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    there = (s > 0.1 * s[:, :1]).double()
    off_diagonal = (values - torch.diag_embed(diagonal)) * there[:, None] * there[..., None]
    assert off_diagonal.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    assert diagonal[there > 0].min() > 0.18 and diagonal.max() < 1.9
    assert not model.orthogonalize(torch.zeros(shape), dtype).any()


def test_active_parameters_and_flops():
    """gpt-oss-20b's published counts: 20.9 B parameters, 3.6 B active apart from the embedding."""
    values, _ = read_config('config/gpt_oss_20b.py')
    with torch.device('meta'):
        model = GPT(GPTConfig(**{key: values[key] for key in GPTConfig.__dataclass_fields__}))
    assert model.num_parameters() == pytest.approx(20.91e9, rel=1e-3)
    assert model.num_parameters(active=True) - 201088 * 2880 == pytest.approx(3.61e9, rel=1e-2)
    assert model.flops_per_token(1) == pytest.approx(6 * 3.61e9, rel=1e-2)


# --- checkpoints --------------------------------------------------------------------------------------------------

def mxfp4_blocks(*shape):
    """Random blocks (..., G, 16) and scales (..., G) for values of this shape, and these, decoded one by one."""
    *outer, last = shape
    blocks = torch.randint(256, (*outer, last // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 127, (*outer, last // 32), dtype=torch.uint8)
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = []
    for row, scale in zip(blocks.view(-1, 16).tolist(), scales.flatten().tolist()):
        for byte in row:
            for nibble in (byte & 15, byte >> 4):
                values.append((-1 if nibble & 8 else 1) * magnitudes[nibble & 7] * 2.0 ** (scale - 127))
    return blocks, scales, torch.tensor(values).view(shape)


def quantized(model):
    """Set the model's experts to values MXFP4 holds; return its blocks, scales (E, out, in), gates interleaved."""
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        for part in ('gate_up', 'down'):
            p = getattr(layer.mlp.experts, f'{part}_weight')
            blocks, scales, values = mxfp4_blocks(*p.shape)
            if part == 'gate_up':
                values = torch.cat((values[:, 0::2], values[:, 1::2]), dim=1)
            p.data.copy_(values)
            tensors[i, part] = blocks, scales
    return tensors


def interleaved(halves):
    gate, up = halves.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def assert_same(model, loaded):
    assert loaded.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(p.to(q.dtype), q), name
    idx = torch.randint(97, (1, 30))
    torch.testing.assert_close(model.to(loaded.lm_head.weight.dtype)(idx)[0], loaded(idx)[0])


SQUARE = dict(hidden_size=64, intermediate_size=64)  # no shape tells the layout


def test_hugging_face_layout(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = make(**SQUARE)
    theirs = reference(model, tmp_path / 'ours')
    theirs.bfloat16().save_pretrained(tmp_path / 'theirs')
    config = json.loads((tmp_path / 'theirs/config.json').read_text())
    assert 'rope_parameters' in config or 'rope_scaling' in config
    assert_same(model, GPT.from_pretrained(tmp_path / 'theirs'))
    assert_same(make(**SQUARE), GPT.from_pretrained(tmp_path / 'ours', dtype=torch.float32))
    # published files say 0.9, with the router's logits off: fine-tuning must not inherit that
    (tmp_path / 'theirs/config.json').write_text(json.dumps(config | dict(router_aux_loss_coef=0.9)))
    assert GPT.from_pretrained(tmp_path / 'theirs').config.router_aux_loss_coef == 0
    loaded = transformers.GptOssForCausalLM.from_pretrained(tmp_path / 'ours')
    assert loaded.config.rope_parameters['truncate'] is False
    for changes in (dict(tie_word_embeddings=True), dict(qk_norm=True, dropout=0.1, router_aux_loss_coef=0.01)):
        make(**changes).save_pretrained(tmp_path / 'option', portable=False)
        loaded = GPT.from_pretrained(tmp_path / 'option', torch.float32)
        assert loaded.config == make(**changes).config
        assert_same(make(**changes).eval(), loaded.eval())
        loaded(torch.zeros(1, 4, dtype=torch.int64))  # whatever is not in the file must exist too


def test_mxfp4_layouts(tmp_path):
    """Hugging Face's MXFP4 and OpenAI's original/, both written here from their published description."""
    model = make(**SQUARE)
    packed = quantized(model)
    make(**SQUARE).save_pretrained(tmp_path / 'hf')
    state = {name: p.data for name, p in model.named_parameters() if '.experts.' not in name}
    original = {}
    for name, tensor in state.items():
        for old, new in (('model.embed_tokens.weight', 'embedding.weight'), ('lm_head', 'unembedding'),
                         ('model.layers', 'block'), ('input_layernorm.weight', 'attn.norm.scale'),
                         ('post_attention_layernorm.weight', 'mlp.norm.scale'), ('model.norm.weight', 'norm.scale'),
                         ('self_attn.o_proj', 'attn.out'), ('self_attn', 'attn'), ('mlp.router', 'mlp.gate')):
            name = name.replace(old, new)
        original[name] = tensor
    for i, layer in enumerate(model.model.layers):
        for kind in ('weight', 'bias'):
            original[f'block.{i}.attn.qkv.{kind}'] = torch.cat(
                [original.pop(f'block.{i}.attn.{x}_proj.{kind}') for x in 'qkv'])
        for part, number in (('gate_up', 1), ('down', 2)):
            blocks, scales = packed[i, part]
            bias = getattr(layer.mlp.experts, f'{part}_bias').data
            bias = interleaved(bias) if part == 'gate_up' else bias
            prefix = f'model.layers.{i}.mlp.experts.{part}_proj'
            state |= {f'{prefix}_blocks': blocks, f'{prefix}_scales': scales, f'{prefix}_bias': bias.contiguous()}
            prefix = f'block.{i}.mlp.mlp{number}'
            original |= {f'{prefix}_weight.blocks': blocks, f'{prefix}_weight.scales': scales,
                         f'{prefix}_bias': bias.contiguous()}
    save_file(state, tmp_path / 'hf/model.safetensors')
    assert_same(model, GPT.from_pretrained(tmp_path / 'hf', torch.float32))
    folder = tmp_path / 'openai/original'
    folder.mkdir(parents=True)
    names = list(original)  # in several files, as published
    save_file({name: original[name] for name in names[::2]}, folder / 'model--00001-of-00002.safetensors')
    save_file({name: original[name] for name in names[1::2]}, folder / 'model--00002-of-00002.safetensors')
    (folder / 'config.json').write_text(json.dumps(dict(
        num_hidden_layers=3, num_experts=5, experts_per_token=2, vocab_size=97, hidden_size=64,
        intermediate_size=64, swiglu_limit=7.0, head_dim=10, num_attention_heads=6, num_key_value_heads=2,
        sliding_window=16, initial_context_length=64, rope_theta=150000, rope_scaling_factor=32.0, rope_ntk_alpha=1,
        rope_ntk_beta=32)))
    assert_same(model, GPT.from_pretrained(tmp_path / 'openai', torch.float32))


def test_mxfp4_values():
    blocks, scales, values = mxfp4_blocks(2, 3, 64)
    assert torch.equal(dequantize_mxfp4(blocks, scales).float(), values)
    assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(values)).float(), values)  # what it holds stays as it is


def test_mxfp4_rounds_to_nearest():
    """Every element goes to the nearest value at its group's scale, half-way to the even code; no scale is better."""
    torch.manual_seed(1)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat((torch.randn(200, 64) * 10.0 ** torch.randint(-20, 20, (200, 1)), torch.zeros(1, 64)))
    x[:100] = (x[:100] * 8 / x[:100].abs().amax(1, keepdim=True)).round() * 0.25  # half-way between values, often
    blocks, scales = quantize_mxfp4(x)
    rounded = dequantize_mxfp4(blocks, scales).float()
    groups, unit = x.double().view(-1, 32), 2.0 ** (scales.double().view(-1, 1) - 127)

    def nearest(unit):
        distance = ((groups.abs() / unit)[..., None] - magnitudes).abs()
        odd = torch.arange(8) % 2
        code = (distance + odd * 1e-9).argmin(-1)
        return magnitudes[code] * unit * groups.sign()

    assert torch.equal(rounded.view(-1, 32).double(), nearest(unit))
    errors = [(nearest(unit * 2.0 ** shift) - groups).square().sum(1) for shift in (-1, 0, 1)]
    assert (errors[1] <= errors[0] + 1e-30).all() and (errors[1] <= errors[2] + 1e-30).all()
    with pytest.raises(ValueError, match='not finite'):
        quantize_mxfp4(torch.full((1, 32), math.inf))


@pytest.mark.parametrize('changes', [
    dict(SQUARE), dict(hidden_size=96, intermediate_size=32, num_local_experts=3, tie_word_embeddings=True)])
def test_packed_experts(tmp_path, changes):
    """experts='mxfp4' computes what dequantising first does, to the bit, its gradients included, and saves the same."""
    transformers = pytest.importorskip('transformers')
    make(**changes).save_pretrained(tmp_path / 'packed', experts='mxfp4')
    idx = torch.randint(97, (2, 30))
    for dtype in (torch.float32, torch.bfloat16):
        full, packed = (GPT.from_pretrained(tmp_path / 'packed', dtype, experts=experts) for experts in (None, 'mxfp4'))
        assert isinstance(packed.model.layers[0].mlp.experts.down_weight, MXFP4)
        assert packed.num_parameters(active=True) == full.num_parameters(active=True)
        for model in (full.eval(), packed.eval()):
            model.logits = model(idx, idx)[0]
            model.logits.float().square().mean().backward()
        assert torch.equal(full.logits, packed.logits)
        assert torch.equal(full.generate(idx, 10, temperature=0), packed.generate(idx, 10, temperature=0))
        gradients = {name: p.grad for name, p in full.named_parameters()}
        assert all(torch.equal(p.grad, gradients[name]) for name, p in packed.named_parameters())
    stored = sum(buffer.nbytes for name, buffer in packed.named_buffers() if '.experts.' in name)
    assert stored == sum(p.numel() for name, p in full.named_parameters()
                         if name.endswith(('gate_up_weight', 'down_weight'))) * 17 // 32
    packed.save_pretrained(tmp_path / 'again', experts='mxfp4')
    packed.save_pretrained(tmp_path / 'whole', torch.float32)
    packing = dict(quantization_config=transformers.Mxfp4Config(dequantize=True))
    for folder, options in (('again', packing), ('whole', {})):
        assert_same(full.float(), GPT.from_pretrained(tmp_path / folder, torch.float32).eval())
        theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, **options)
        torch.testing.assert_close(theirs.eval()(idx).logits, full(idx, idx)[0], atol=1e-4, rtol=1e-4)
    # what is packed on the way in, from files that have more
    make(**changes).save_pretrained(tmp_path / 'fp32')
    repacked = GPT.from_pretrained(tmp_path / 'fp32', experts='mxfp4').eval()
    assert torch.equal(repacked(idx)[0], packed.eval()(idx)[0])


@pytest.mark.parametrize('batch', [1, 3])
def test_narrow_weights(batch, monkeypatch):
    """Computing in fp32 with weights kept in bf16 and MXFP4: C kernels do what widening the weights first does."""
    if model.kernels() is None:
        pytest.skip('there is no C compiler, or no AVX2')
    shape = dict(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=101)  # 6 heads of 16: o_proj has 96
    packed = make(**shape)
    packed.pack_experts()
    packed.to(torch.bfloat16)
    packed.compute_dtype, idx = torch.float32, torch.randint(101, (batch, 20))

    def decode():
        cache, logits = KVCache(packed.config, batch, 20, torch.float32, 'cpu'), []
        with torch.no_grad():
            for t in range(20):
                logits.append(packed.eval().next_logits(idx[:, t:t + 1], cache))
                cache.position += 1
        return torch.stack(logits)

    expected, calls, matvecs = decode(), [], model.matvecs
    monkeypatch.setattr(model, 'LARGE', 0)
    monkeypatch.setattr(model, 'matvecs', lambda pairs: (calls.append(len(pairs)), matvecs(pairs))[1])
    torch.testing.assert_close(decode(), expected, atol=1e-4, rtol=1e-4)
    assert set(calls) == ({1, 2} if batch == 1 else {2 * batch})  # one token: q, k, v, o, router, head; and experts
    monkeypatch.setattr(model, 'kernels', lambda: None)
    calls.clear()
    assert torch.equal(decode(), expected) and not calls
    w, x = torch.randn(37, 64).bfloat16(), torch.randn(64)  # rows that do not divide evenly
    monkeypatch.undo()
    torch.testing.assert_close(model.matvecs([(x, w)])[0], w.float() @ x, atol=1e-4, rtol=1e-4)
    blocks = torch.randint(256, (3, 37, 2, 16), dtype=torch.uint8)  # all codes and scales but 255, which is no number
    stack = MXFP4(blocks, torch.randint(255, (3, 37, 2), dtype=torch.uint8))
    assert torch.equal(stack.widened(1, torch.float32), stack[1].float())


def test_shards(tmp_path):
    """Files of at most the given size with an index; a smaller model later leaves no file of a larger one behind."""
    transformers = pytest.importorskip('transformers')
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, shard_size=30_000)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert len(files) > 3 and files[0].name == f'model-00001-of-{len(files):05}.safetensors'
    assert_same(model, GPT.from_pretrained(tmp_path, torch.float32))
    theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    idx = torch.randint(97, (1, 30))
    torch.testing.assert_close(theirs.eval()(idx).logits, model.eval()(idx, idx)[0], atol=1e-4, rtol=1e-4)
    files[1].rename(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match=files[1].name):
        GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert sorted(path.name for path in tmp_path.glob('model*')) == ['model.safetensors']
    assert {t.dtype for t in load_file(tmp_path / 'model.safetensors').values()} == {torch.bfloat16}


def test_saving_over(tmp_path):
    """A checkpoint that cannot be written whole leaves the one that was there."""
    good, bad = make(hidden_size=64, intermediate_size=32), make(1, hidden_size=64, intermediate_size=32)
    good.save_pretrained(tmp_path)
    bad.model.layers[2].mlp.experts.down_weight.data[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match='not finite'):
        bad.save_pretrained(tmp_path, experts='mxfp4', shard_size=1000)
    assert_same(good, GPT.from_pretrained(tmp_path, torch.float32))
    bad.save_pretrained(tmp_path, shard_size=100_000)
    good.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'generation_config.json',
                                                                'model.safetensors']


def test_what_the_format_cannot_express(tmp_path):
    with pytest.raises(ValueError, match='qk_norm'):
        make(qk_norm=True).save_pretrained(tmp_path / 'x')
    with pytest.raises(ValueError, match='24.*multiples of 32'):
        make(hidden_size=24).save_pretrained(tmp_path / 'x', experts='mxfp4')
    with pytest.raises(ValueError, match='int4'):
        make().save_pretrained(tmp_path / 'x', experts='int4')
    assert not (tmp_path / 'x').exists()


def test_broken_checkpoints(tmp_path):
    make().save_pretrained(tmp_path)
    weights, config = tmp_path / 'model.safetensors', json.loads((tmp_path / 'config.json').read_text())
    state = load_file(weights)

    def refused(match):
        with pytest.raises(ValueError, match=match):
            GPT.from_pretrained(tmp_path)

    (tmp_path / 'config.json').write_text(json.dumps(config | dict(hidden_size=32)))
    refused('does not fit the config')
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(rope_scaling=dict(rope_type='longrope'))))
    refused('longrope')
    (tmp_path / 'config.json').write_text('{')
    refused('not a JSON object')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    broken = {name: tensor for name, tensor in state.items() if '0.self_attn.sinks' not in name}
    broken |= {'model.norm.weight': torch.ones(7), 'model.extra.weight': torch.ones(2)}
    save_file(broken, weights)  # one error for all three
    refused(r'extra.weight is \(2,\), expected no such tensor')
    refused(r'norm.weight is \(7,\), expected \(')
    refused('0.self_attn.sinks is missing')
    weights.write_bytes(weights.read_bytes()[:1000])
    refused('not a whole safetensors file')
    for index in ('[]', '{}', '{"weight_map": 3}'):
        (tmp_path / 'model.safetensors.index.json').write_text(index)
        refused('index.json is (damaged|no index)')
    (tmp_path / 'model.safetensors.index.json').unlink()
    weights.unlink()
    refused('has no model')
    with pytest.raises(ValueError, match='no checkpoint'):
        GPT.from_pretrained(tmp_path / 'nowhere')


def adapted(**changes):
    """A model with adapters, none of which is zero."""
    model = make(**changes)
    model.add_lora(3, 6.0)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora.' in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def test_lora():
    """W + alpha / rank * B A on each matrix of attention and of every expert, its gradients too, and nothing else's."""
    model = adapted()
    adapters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if 'lora.' in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters.keys()
    assert len(adapters) == 2 * 6 * SMALL['num_hidden_layers']
    plain, weights, used = make(), {}, set()
    for name, p in plain.named_parameters():
        key = name.replace('_weight', '_lora') if '.experts.' in name else name.replace('.weight', '.lora')
        weights[name] = p.detach()
        if f'{key}.a' in adapters:
            weights[name] = p.detach() + 2.0 * adapters[f'{key}.b'] @ adapters[f'{key}.a']
            used |= {f'{key}.a', f'{key}.b'}
    assert used == adapters.keys()
    x = torch.randint(SMALL['vocab_size'], (2, 40))
    expected = torch.func.functional_call(plain.train(), weights, (x, x))[1]
    expected.backward()
    loss = model.train()(x, x, return_logits=False)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if name in adapters:
            assert off(p.grad, adapters[name].grad) < 1e-4, name
        else:
            assert p.grad is None, name
    optimizer, = model.configure_optimizers(1e-3, 0.01, (0.9, 0.95), 0.1)  # AdamW alone, and the adapters alone
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(adapters)

    before, tokens = model.eval()(x, x)[0], model.generate(x[:1], 5, temperature=0)
    with pytest.raises(ValueError, match='merge_lora'):
        model.save_pretrained('nowhere')
    model.merge_lora()
    assert model.num_parameters() == plain.num_parameters() == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(model(x, x)[0], before, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(x[:1], 5, temperature=0), tokens)


def test_adapters_alone(tmp_path):
    """Adapters are saved apart from their base, in fp32, and adapt experts that are kept in MXFP4 too."""
    shape = dict(hidden_size=64, intermediate_size=32)
    make(**shape).save_pretrained(tmp_path / 'base')
    x = torch.randint(SMALL['vocab_size'], (2, 30))
    for experts in (None, 'mxfp4'):
        model = GPT.from_pretrained(tmp_path / 'base', torch.float32, experts=experts)
        before = model(x)[0]
        model.add_lora(3, 6.0)
        torch.testing.assert_close(model(x)[0], before, atol=1e-5, rtol=0)  # nothing at first
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.3)
        model.save_adapter(tmp_path / 'adapter')
        assert sum(file.stat().st_size for file in (tmp_path / 'adapter').iterdir()) < 4 * sum(
            p.numel() for p in model.parameters() if p.requires_grad) + 10000
        again = GPT.from_pretrained(tmp_path / 'adapter', torch.float32, experts=experts)
        assert torch.equal(again(x)[0], model(x)[0]) and not torch.allclose(model(x)[0], before, atol=1e-2)
    # over packed experts, gradients are those over the same experts unpacked
    unpacked = GPT.from_pretrained(tmp_path / 'base', torch.float32)
    for places in zip(unpacked.model.layers, model.model.layers):
        for name in ('gate_up_weight', 'down_weight'):
            ours, packed = (getattr(layer.mlp.experts, name) for layer in places)
            ours.data = torch.stack([packed[e].float() for e in range(packed.size(0))])
    unpacked.add_lora(3, 6.0)
    unpacked.load_state_dict({name: p for name, p in model.named_parameters() if 'lora.' in name}, strict=False)
    for m in (model, unpacked):
        m.train()(x, x)[1].backward()
    grads = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, unpacked)]
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    with pytest.raises(ValueError, match='four bits'):
        model.merge_lora()
    with pytest.raises(ValueError, match='no adapters of a saved model'):
        adapted().save_adapter(tmp_path / 'other')
    file = tmp_path / 'adapter' / 'adapter.json'
    whole = file.read_text()
    file.write_text(whole.replace('"lora_rank": 3', '"lora_rank": 2'))
    with pytest.raises(ValueError, match='does not fit .*base.*q_proj.lora.a'):
        GPT.from_pretrained(tmp_path / 'adapter')
    for broken in (whole[:20], whole.replace('"overrides": {}', '"overrides": {"foo": 1}'),
                   whole.replace('"lora_rank": 3', '"lora_rank": Infinity'), '[]'):
        file.write_text(broken)
        with pytest.raises(ValueError, match='adapter.json is damaged'):
            GPT.from_pretrained(tmp_path / 'adapter')
    for base, message in (('adapter', 'holds adapters itself'), ('none', 'adapts .*none.*is no checkpoint')):
        file.write_text(json.dumps(json.loads(whole) | dict(base=str(tmp_path / base))))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path / 'adapter')
    with pytest.raises(ValueError, match='lora_rank is 65'):
        make(**shape).add_lora(65, 1.0)

    # what the base was loaded with holds for the adapters too; a whole model is not written over, nor its base lost
    model = GPT.from_pretrained(tmp_path / 'base', torch.float32, sliding_window=3)
    model.add_lora(3, 6.0)
    model.save_adapter(tmp_path / 'adapter')
    again = GPT.from_pretrained(tmp_path / 'adapter', torch.float32)
    assert again.config.sliding_window == 3 and torch.equal(again(x)[0], model(x)[0])
    with pytest.raises(ValueError, match='holds a whole model'):
        model.save_adapter(tmp_path / 'base')
    with pytest.raises(ValueError, match='has adapters'):
        model.add_lora(3, 6.0)
    model.merge_lora()
    model.save_pretrained(tmp_path / 'adapter')
    assert GPT.from_pretrained(tmp_path / 'adapter', torch.float32).lora is None


@pytest.mark.parametrize('changes, message', [
    (dict(num_key_value_heads=4), '6.*4'), (dict(num_experts_per_tok=6), '6.*5'),
    (dict(sliding_window=0), 'sliding_window is 0'), (dict(head_dim=9), 'head_dim is 9'),
    (dict(layer_types=[FULL]), '1 entries.*3'), (dict(layer_types=['x'] * 3), 'x'), (dict(dropout=1.0), '1.0'),
    (dict(rope_factor=0.5), '0.5')])
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize('arguments, message', [
    (dict(temperature=-1), 'temperature is -1'), (dict(top_k=0), 'top_k is 0'), (dict(top_p=0.0), 'top_p is 0'),
    (dict(min_p=2), 'min_p'), (dict(idx=torch.full((1, 5), 97)), 'from 97 to 97.*97'),
    (dict(max_new_tokens=100), '5 tokens.*100.*64'),
    (dict(idx=torch.zeros(1, 0, dtype=torch.int64)), 'empty')])
def test_impossible_requests(arguments, message):
    model = make(max_position_embeddings=64)
    with pytest.raises(ValueError, match=message):
        model.generate(**{**dict(idx=torch.zeros(1, 5, dtype=torch.int64), max_new_tokens=3), **arguments})
    with pytest.raises(ValueError, match='65 tokens'):
        model(torch.zeros(1, 65, dtype=torch.int64))


# --- the scripts --------------------------------------------------------------------------------------------------

def run(script, *arguments, cwd=None, plots=False):
    """Run a script in this process -> (exit status, its output, its errors). Plots take long, so ask for them."""
    out, err, status, matplotlib = io.StringIO(), io.StringIO(), 0, sys.modules.get('matplotlib')
    if not plots:
        sys.modules['matplotlib'] = None
    before = sys.argv, os.getcwd(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    gc.freeze()  # what is there is not to be looked through
    try:
        sys.argv = [script, *map(str, arguments)]
        os.chdir(cwd or before[1])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run.names = runpy.run_path(str(ROOT / script), run_name='__main__')  # for who wants to look inside
    except SystemExit as error:
        status = error.code or 0
    finally:
        gc.collect()  # with what a failed script leaves, its lock on out_dir
        if not plots:
            del sys.modules['matplotlib']
            if matplotlib:
                sys.modules['matplotlib'] = matplotlib
        sys.argv = before[0]
        os.chdir(before[1])
        for number, handler in before[2].items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def refused(result, *words):
    """Exit status 2, and one line that holds these words."""
    status, out, err = result
    last = err.strip().splitlines()[-1]
    assert status == 2 and 'Traceback' not in err, err
    for word in words:
        assert word in last, err


def read_config(*arguments, script='train.py'):
    import config
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        return config.read(ROOT / script, model=script == 'train.py')
    finally:
        sys.argv = before


def vocabulary(name):
    """A tiktoken encoding, or a skip where its vocabulary file is not here."""
    if 'TIKTOKEN_CACHE_DIR' not in os.environ:
        pytest.skip(f'needs the vocabulary file of {name}: set TIKTOKEN_CACHE_DIR to a folder that has it')
    return tiktoken.get_encoding(name)


def make_data(folder, text='the quick brown fox jumps over the lazy dog\n' * 50, **options):
    """Prepare a text by character in folder/data and return that folder."""
    (folder / 'text.txt').write_text(text)
    options = dict(dataset=folder / 'text.txt', tokenizer='char', data_dir=folder / 'data') | options
    status, _, err = run('prepare.py', *(f'--{key}={value}' for key, value in options.items()))
    assert status == 0, err
    return folder / 'data'


def tokens_of(folder, split):
    meta = json.loads((folder / 'meta.json').read_text())
    return np.fromfile(folder / f'{split}.bin', meta['dtype']).tolist()


TINY = ['--hidden_size=32', '--intermediate_size=32', '--num_hidden_layers=2', '--block_size=16', '--batch_size=4',
        '--sample_tokens=8', '--eval_iters=2', '--start=the', '--device=cpu', '--dtype=float32']


def test_stories():
    """Deterministic by seed; who and what it is about comes back; the text gives all choices away: exact entropy."""
    first = list(prepare.builtin_stories(0.05, 1))
    assert first == list(prepare.builtin_stories(0.05, 1)) != list(prepare.builtin_stories(0.05, 2))
    assert all(text.startswith('Once upon a time') for text, _ in first)

    def told(choices, seen, rng):
        def pick(options):
            i = choices[len(seen)] % len(options) if len(seen) < len(choices) else rng.randrange(len(options))
            assert len(set(map(str, options))) == len(options)
            seen.append((i, len(options)))
            return options[i]

        return prepare.tell(pick)

    rng = random.Random(0)
    for _ in range(10):
        seen = []
        text = told([], seen, rng)
        child, friend, animal, thing = re.match(
            r'Once upon a time there was a \w+ \w+ named (\w+)\. \w+ had a friend, (\w+) the (\w+), and a (\w+)\.',
            text).groups()
        assert all(word in text.split('\n\n')[2] for word in (child, f'{friend} the {animal}', thing))
        for i, (choice, number) in enumerate(seen):  # another choice there, and all else the same, is another text
            for other in set(range(number)) - {choice}:
                assert told([c for c, _ in seen[:i]] + [other] + [c for c, _ in seen[i + 1:]], [], rng) != text


@pytest.mark.parametrize('tokenizer, dtype', [
    ('byte', 'uint16'), ('char', 'uint16'), ('bpe', 'uint16'), ('gpt2', 'uint16'), ('o200k_harmony', 'uint32')])
def test_round_trip(tokenizer, dtype, tmp_path):
    """Documents come back from the bins as they were, each ended by end of text, the last of them in val.bin."""
    if tokenizer in ('gpt2', 'o200k_harmony'):
        vocabulary(tokenizer)
    texts = [f'Story {i}: naïve café — “über” 日本 🎈 <|endoftext|> 12345\n\n  end{i} ' * (i % 3 + 1)
             for i in range(40)]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(dict(text=text, other=1)) + '\n' for text in texts))
    folder = make_data(tmp_path, dataset=tmp_path / '*.jsonl', tokenizer=tokenizer, vocab_size=400)
    meta = json.loads((folder / 'meta.json').read_text())
    encoder = prepare.load_tokenizer(folder)
    assert meta['dtype'] == dtype and encoder.name == tokenizer
    assert meta['vocab_size'] == encoder.max_token_value + 1
    found = []
    for split, number in (('train', 36), ('val', 4)):
        tokens = tokens_of(folder, split)
        assert tokens[-1] == encoder.eot_token and tokens.count(encoder.eot_token) == number
        assert meta[f'{split}_tokens'] == len(tokens) and meta[f'{split}_documents'] == number
        part = texts[:36] if split == 'train' else texts[36:]
        assert meta[f'{split}_bytes'] == sum(len(text.encode()) for text in part)
        found.append(encoder.decode(tokens))
    assert found == [''.join(text + '<|endoftext|>' for text in part) for part in (texts[:36], texts[36:])]
    if tokenizer == 'bpe':
        assert len(tokens_of(folder, 'val')) < 0.7 * meta['val_bytes']  # it did learn to merge


def test_text_files(tmp_path):
    """Few documents: the text is cut, at nine tenths. Lines of <|endoftext|> divide. Long texts go in pieces."""
    text = ''.join(random.Random(0).choices('abcdef gh\n', k=1234))
    folder = make_data(tmp_path, text)
    encoder = prepare.load_tokenizer(folder)
    assert encoder.decode(tokens_of(folder, 'train')) == text[:int(1234 * 0.9)]
    assert encoder.decode(tokens_of(folder, 'val')) == text[int(1234 * 0.9):] + '<|endoftext|>'
    documents = [f'line {i}\n\nmore' for i in range(30)]
    folder = make_data(tmp_path, '\n<|endoftext|>\n'.join(documents), tokenizer='byte')
    text = prepare.load_tokenizer(folder).decode(tokens_of(folder, 'train'))
    assert text.split('<|endoftext|>') == documents[:27] + ['']
    folder = make_data(tmp_path, '\n<|endoftext|>\n'.join(documents), tokenizer='byte', max_docs=20)
    assert json.loads((folder / 'meta.json').read_text())['train_documents'] == 18


def test_pieces_change_nothing(tmp_path, monkeypatch):
    """A document that goes through in pieces gives the tokens that it gives as a whole."""
    encoder = vocabulary('o200k_harmony')
    text = ''.join(story for story, _ in prepare.builtin_stories(0.3, 0)) + "it's  a test... 12345 words\n\n\tdone"
    (tmp_path / 'text.txt').write_text(text)
    import datasets
    rows = datasets.load_dataset('text', data_files=[str(tmp_path / 'text.txt')], split='train', streaming=True,
                                 keep_linebreaks=True)
    monkeypatch.setattr(prepare, 'PIECE', 1000)
    pieces = list(prepare.text_file(rows))
    assert len(pieces) > 100 and ''.join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces].index(True) == len(pieces) - 1
    for name in ('o200k_harmony', 'gpt2'):
        encoder = vocabulary(name)
        assert [t for piece, _ in pieces for t in encoder.encode_ordinary(piece)] == encoder.encode_ordinary(text)


CHATS = [
    [dict(role='system', content='Be brief.'), dict(role='user', content='Hi <|end|> there'),
     dict(role='assistant', thinking='A greeting.', content='Hello!'), dict(role='user', content='Bye'),
     dict(role='assistant', channel='analysis', content='They go.'), dict(role='assistant', content='Farewell!')],
    [dict(role='user', content='1 + 1?'), dict(role='assistant', content='2')]] * 6


def write_chats(path, chats=CHATS):
    path.write_text(''.join(json.dumps(dict(messages=chat)) + '\n' for chat in chats))
    return path


@pytest.mark.parametrize('tokenizer', ['o200k_harmony', 'bpe', 'byte', 'char'])
def test_chat_masks(tokenizer, tmp_path):
    """Every turn of the assistant is an example: what it saw then, and its own tokens, which alone are trained on."""
    if tokenizer == 'o200k_harmony':
        vocabulary(tokenizer)
    file = write_chats(tmp_path / 'chats.jsonl')
    status, _, err = run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path}', f'--tokenizer={tokenizer}',
                         '--vocab_size=300')
    assert status == 0, err
    meta, encoder = json.loads((tmp_path / 'meta.json').read_text()), prepare.load_tokenizer(tmp_path)
    tokens = np.concatenate([tokens_of(tmp_path, split) for split in ('train', 'val')])
    mask = np.concatenate([np.fromfile(tmp_path / f'{split}_mask.bin', np.uint8) for split in ('train', 'val')])
    assert len(mask) == len(tokens) and meta['train_targets'] + meta['val_targets'] == mask.sum()
    start = '<|start|>system<|message|>' + prepare.SYSTEM.format('medium') + '<|end|>'
    first = (start + '<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>'
             'Hi <|end|> there<|end|><|start|>assistant')
    expected = [
        (first, '<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Hello!'
                '<|return|>'),
        (first + '<|channel|>final<|message|>Hello!<|end|><|start|>user<|message|>Bye<|end|><|start|>assistant',
         '<|channel|>analysis<|message|>They go.<|end|><|start|>assistant<|channel|>final<|message|>Farewell!'
         '<|return|>'),
        (start + '<|start|>user<|message|>1 + 1?<|end|><|start|>assistant', '<|channel|>final<|message|>2<|return|>')]
    ends = np.flatnonzero(tokens == encoder.eot_token)
    assert len(ends) == 18 and not mask[ends].any()
    pieces = np.split(np.arange(len(tokens)), ends + 1)[:-1]
    for piece, (prompt, answer) in zip(pieces, expected * 6):
        document, trained = tokens[piece[:-1]], mask[piece[:-1]]
        assert encoder.decode(document.tolist()) == prompt + answer
        assert encoder.decode(document[trained == 1].tolist()) == answer and (np.diff(trained.astype(int)) >= 0).all()
    # what a user wrote is text, though it looks like a special token
    assert (tokens == encoder.encode_single_token('<|end|>')).sum() == 6 * (4 + 6 + 2)
    assert meta['train_bytes'] + meta['val_bytes'] == 6 * sum(len(answer) for _, answer in expected)


def test_bad_chats(tmp_path):
    user, answer = dict(role='user', content='hi'), dict(role='assistant', content='yes')
    for chat, words in (
            ([user], ['row 0', 'no final answer']), ([user, dict(role='robot', content='x')], ['message 2', 'role']),
            ([dict(role='user', content=None), answer], ['message 1', 'content']), ([user, 'yes'], ['message 2']),
            ([user, answer | dict(tool_calls=[dict(name='f')])], ['message 2', 'calls a tool']),
            ([user, answer | dict(channel='loud')], ['message 2', "'loud'"])):
        file = write_chats(tmp_path / 'chats.jsonl', [chat] * 3)
        refused(run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path}/data', '--tokenizer=byte'), *words)
    file = write_chats(tmp_path / 'chats.jsonl')
    vocabulary('gpt2')
    refused(run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path}/data', '--tokenizer=gpt2'), 'gpt2',
            '<|start|>')


def test_harmony(tmp_path, monkeypatch):
    """Our rendering against openai-harmony's, token for token."""
    harmony = pytest.importorskip('openai_harmony')
    encoder = vocabulary('o200k_harmony')
    table = (base64.b64encode(token) + b' %d' % rank for token, rank in encoder._mergeable_ranks.items())
    (tmp_path / 'o200k_base.tiktoken').write_bytes(b'\n'.join(table) + b'\n')
    monkeypatch.setenv('TIKTOKEN_ENCODINGS_BASE', str(tmp_path))
    theirs, message = harmony.load_harmony_encoding('HarmonyGptOss'), harmony.Message.from_role_and_content
    for chat, effort in ((CHATS[0], 'high'), (CHATS[0][:4], 'low'), (CHATS[1], 'medium'), (CHATS[0][1:2], 'medium')):
        system = harmony.SystemContent.new().with_reasoning_effort(harmony.ReasoningEffort(effort.title()))
        messages = [message(harmony.Role.SYSTEM, system)]
        for role, channel, text in prepare.Chat(chat).parts:
            if role == 'developer':
                text = harmony.DeveloperContent.new().with_instructions(text.removeprefix('# Instructions\n\n'))
            messages.append(message(harmony.Role(role), text))
            if channel:
                messages[-1] = messages[-1].with_channel(channel)
        ours = [part for part in messages if part.channel != 'analysis']
        expected = theirs.render_conversation_for_completion(harmony.Conversation.from_messages(ours),
                                                             harmony.Role.ASSISTANT)
        assert prepare.Chat(chat).prompt(encoder, effort) == expected
        if effort == 'medium' and chat[-1]['role'] == 'assistant':
            (tokens, _), = prepare.Chat(chat).examples(encoder)
            assert tokens == theirs.render_conversation_for_training(harmony.Conversation.from_messages(messages))
    assert set(prepare.stop_tokens(encoder)) == {200002, 199999, 200012}
    assert {200002, 200012} == {*theirs.stop_tokens_for_assistant_actions()}


@pytest.mark.parametrize('name', ['o200k_harmony', 'gpt2', 'bpe', 'byte', 'char'])
def test_tokenizer_json(name, tmp_path):
    """transformers, from the files we write, numbers texts as tiktoken does, and chats as we do."""
    transformers = pytest.importorskip('transformers')
    texts = ["It's 12345678 o'clock\n\n  indented\t\tx = a[1]/2 \r\n\r\n ", 'naïve 日本語 😀 e\u0301 \u00a0\u2003x  ',
             'WORDS inCamelCase, don\'t I\'LL\n', ' ']
    rng = random.Random(0)
    texts += [''.join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 1000), 10, 32, 0x2028, 0x1f600]))
                      for _ in range(50)) for _ in range(50)]
    if name in prepare.PATTERNS:
        file = write_chats(tmp_path / 'chats.jsonl', CHATS + [[dict(role='user', content=text), dict(
            role='assistant', content='-')] for text in texts])
        assert run('prepare.py', f'--dataset={file}', f'--data_dir={tmp_path}', f'--tokenizer={name}',
                   '--vocab_size=350')[0] == 0
        encoder = prepare.load_tokenizer(tmp_path)
    else:
        encoder = vocabulary(name)
    prepare.write_tokenizer(encoder, tmp_path)
    make(vocab_size=encoder.n_vocab).save_pretrained(tmp_path)  # overwrites nothing of it but generation_config.json
    prepare.write_tokenizer(encoder, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == encoder.encode_ordinary(text), text
        assert tokenizer.decode(encoder.encode_ordinary(text)) == text
    assert tokenizer.encode('a<|endoftext|>') == encoder.encode('a<|endoftext|>', allowed_special='all')
    assert len(tokenizer) == encoder.n_vocab
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == prepare.stop_tokens(encoder)
    if '<|start|>' in encoder.special_tokens_set:
        chat = [CHATS[0][0], CHATS[1][0], *CHATS[1][1:], *CHATS[0][3:]]
        theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, reasoning_effort='high')
        theirs = theirs if isinstance(theirs, list) else theirs['input_ids']
        assert theirs == prepare.Chat(chat).prompt(encoder, 'high')


@pytest.mark.parametrize('suffix', ['csv', 'json', 'parquet'])
def test_local_formats(suffix, tmp_path):
    import datasets
    rows = datasets.Dataset.from_dict(dict(story=[f'document {i}' for i in range(20)], number=list(range(20))))
    getattr(rows, f'to_{suffix}')(str(tmp_path / f'x.{suffix}'))
    folder = make_data(tmp_path, dataset=tmp_path / f'x.{suffix}', text_column='story')
    text = prepare.load_tokenizer(folder).decode(tokens_of(folder, 'train'))
    assert text == ''.join(f'document {i}<|endoftext|>' for i in range(18))
    refused(run('prepare.py', f'--dataset={tmp_path}/x.{suffix}', '--tokenizer=char', f'--data_dir={tmp_path}/no'),
            'story', 'number', "'text'")


def test_bad_sources(tmp_path, monkeypatch):
    def prepared(name, *arguments):
        return run('prepare.py', f'--dataset={tmp_path / name}', '--tokenizer=byte', f'--data_dir={tmp_path}/data',
                   *arguments)

    refused(prepared('none.txt'), 'none.txt: no such file')
    refused(prepared('*.jsonl'), 'no such file')
    (tmp_path / 'empty.txt').touch()
    refused(prepared('empty.txt'), 'empty.txt is empty')
    (tmp_path / 'binary.txt').write_bytes(bytes(range(256)))
    refused(prepared('binary.txt'), 'binary.txt cannot be read', 'UnicodeDecodeError')
    (tmp_path / 'x.docx').write_text('x')
    refused(prepared('x.docx'), 'x.docx', '.jsonl')
    (tmp_path / 'half.jsonl').write_text('{"text": "a"}\n' * 3 + '{"title": "b", "body": "c"}\n')
    refused(prepared('half.jsonl'), 'half.jsonl', 'row 3', "'text'", 'title, body')
    (tmp_path / 'broken.jsonl').write_text('{"text": "a"}\n{"text": ')
    refused(prepared('broken.jsonl'), 'broken.jsonl cannot be read')
    (tmp_path / 'blank.jsonl').write_text('{"text": ""}\n')
    refused(run('prepare.py', f'--dataset={tmp_path}/blank.jsonl', '--tokenizer=char', f'--data_dir={tmp_path}/data'),
            'blank.jsonl holds no text')
    (tmp_path / 'one.txt').write_text('a')
    refused(prepared('one.txt', '--val_fraction=1.5'), '--val_fraction=1.5')
    refused(prepared('one.txt', '--tokenizer=gtp2'), 'gtp2', 'gpt2')
    refused(prepared('one.txt', '--tokenizer=bpe', '--vocab_size=100'), '100', '257')
    assert not list((tmp_path / 'data').glob('*'))  # nothing half done is left
    import datasets

    def offline(*_, **__):
        raise ConnectionError('no route to the hub')

    monkeypatch.setattr(datasets, 'load_dataset', offline)
    refused(run('prepare.py', '--tokenizer=byte', f'--data_dir={tmp_path}/data'), 'roneneldan/TinyStories',
            'builtin', '.txt')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    refused(run('prepare.py', '--dataset=builtin', f'--data_dir={tmp_path}/data'), 'o200k_harmony',
            'byte, char or bpe')


def test_settings(tmp_path):
    values, given = read_config('config/tinystories.py', '--batch_size=32', '--start=a=b', '--max_iters=1e3')
    assert (values['batch_size'], values['block_size'], values['start'], values['max_iters']) == (
        32, 512, 'a=b', 1000)
    assert given >= {'batch_size', 'block_size', 'hidden_size'} and 'grad_clip' not in given
    mine = tmp_path / 'mine.py'
    mine.write_text('import math\nbatch_size = 3\n'
                    'block_size = 2 * batch_size + len([i for i in range(batch_size)])\nnum_samples = 2\n')
    values, _ = read_config(mine, '--learning_rate=1', '--layer_types=full_attention,full_attention')
    assert values['block_size'] == 9
    for script in ('train.py', 'prepare.py', 'sample.py', 'bench.py'):
        status, out, _ = run(script, '--help')
        assert status == 0 and ('--batch_size' in out) == (script in ('train.py', 'bench.py'))
        assert all(len(line.split()) > 2 for line in out.splitlines() if line.startswith('  --'))
    assert '--sliding_window=128' in run('train.py', '--help')[1]


@pytest.mark.parametrize('argument, words', [
    ('--learning_rat=1', ["'learning_rat'", 'learning_rate']), ('--batch_size=abc', ["'abc'", 'whole number']),
    ('--batch_size=1.5', ["'1.5'", 'whole number']), ('--learning_rate=nan', ['number']),
    ('--wandb_log=2', ['True or False']), ('--out_dir', ['--out_dir=']),
    ('config/tinystorys.py', ['no such file', 'config/tinystories.py']),
    ('typo.py', ['typo.py', "'learning_rat'", 'learning_rate']),
    ('type.py', ['type.py', 'batch_size', 'whole number']),
    ('crash.py', ['crash.py', 'line 2', 'ZeroDivisionError']),
    ('syntax.py', ['syntax.py', 'line 1', 'SyntaxError'])])
def test_bad_settings(argument, words, tmp_path):
    for name, text in (('typo', 'learning_rat = 1e-3'), ('type', "batch_size = 'x'"),
                       ('crash', 'x = 1\n_y = x / 0'), ('syntax', 'x = = 1')):
        (tmp_path / f'{name}.py').write_text(text)
    refused(run('train.py', argument, cwd=tmp_path), *words)


def test_bad_data(tmp_path):
    data, out = make_data(tmp_path), tmp_path / 'out'

    def train(*arguments):
        return run('train.py', f'--data_dir={data}', f'--out_dir={out}', *TINY, '--max_iters=1', *arguments)

    refused(train('--block_size=500'), 'val.bin', '221', '501')
    refused(train('--max_position_embeddings=8'), '16', '8')
    refused(train('--num_key_value_heads=3'), '4', '3')
    refused(train('--num_experts_per_tok=9'), '9', '8')
    refused(train('--sliding_window=0'), 'sliding_window is 0')
    refused(train('--vocab_size=5'), 'train.bin', 'vocab_size 5')
    refused(train('--batch_size=0'), 'batch_size is 0')
    refused(train('--device=tpu9'), 'tpu9')
    refused(train('--dtype=int4'), 'int4', 'bfloat16')
    refused(train('--init_from=nowhere'), 'nowhere')
    refused(train('--init_from=resume'), 'no run to resume')
    whole = (data / 'train.bin').read_bytes()
    (data / 'train.bin').write_bytes(whole[:1001])
    refused(train(), 'train.bin', '1001', str(len(whole)))
    (data / 'train.bin').write_bytes(whole[:-2] + b'\xff\xff')
    refused(train(), 'train.bin', '65535')
    (data / 'train.bin').unlink()
    refused(train(), 'train.bin', 'no file')
    meta = json.loads((data / 'meta.json').read_text())
    for wrong in ({}, meta | dict(vocab_size='x'), meta | dict(val_bytes=0), meta | dict(dtype='float16')):
        (data / 'meta.json').write_text(json.dumps(wrong))
        refused(train(), 'meta.json', 'prepare.py')
    (data / 'meta.json').unlink()
    refused(train(), 'meta.json is missing')
    assert not out.exists()


def test_train_and_sample(tmp_path):
    """A run gets far below the 2.9 nats of the letters' frequencies, writes what it says, and samples the text."""
    data, out = make_data(tmp_path), tmp_path / 'out'
    train = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *TINY, '--max_iters=120', '--eval_interval=60',
             '--warmup_iters=10']
    status, printed, err = run(*train)
    assert status == 0, err
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    losses = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row}
    assert list(losses) == [0, 60, 120] and losses[0] > 3 and losses[120] < 0.5
    last = next(row for row in rows if row['step'] == 120 and 'val_loss' in row)
    assert last['val_bpb'] == pytest.approx(last['val_loss'] / math.log(2) * 221 / 220)
    assert len(last['expert_load_max']) == 2 and all(1 / 8 <= share <= 1 for share in last['expert_load_max'])
    assert last['dead_experts'] == [0, 0] and all(0 < share <= 1 / 8 for share in last['expert_load_min'])
    assert all(0.5 < entropy <= 1 for entropy in last['router_entropy'])
    assert 'the quick' in printed or 'the lazy' in printed
    row = next(row for row in rows if row['step'] == 60 and 'train_loss' in row)
    assert row['tokens'] == 60 * 64 and row['lr'] > 0 and row['tokens_per_second'] > 0
    refused(run(*train), 'holds a run', 'resume', 'overwrite')
    refused(run(*train, '--init_from=resume'), '120 steps', 'max_iters')
    sample = ['sample.py', f'--out_dir={out}', '--max_new_tokens=30', '--device=cpu', '--dtype=float32']
    status, text, err = run(*sample, '--start=the quick', '--temperature=0', '--num_samples=2')
    assert status == 0 and text.count('the quick brown fox jumps') == 2 and 'tokens/s' in err
    (tmp_path / 'prompt.txt').write_text('the lazy')
    text = run(*sample, f'--start=FILE:{tmp_path}/prompt.txt', '--temperature=0', f'--init_from={out}/last')[1]
    assert text.startswith('the lazy dog')
    one, same, other = (run(*sample, f'--seed={seed}', '--temperature=2.0')[1] for seed in (1, 1, 2))
    assert one == same != other
    refused(run(*sample, '--start=QUICK'), "'C', 'I'")
    refused(run(*sample, '--start=FILE:none.txt'), 'none.txt')
    refused(run(*sample, '--temperature=-1'), 'temperature is -1')
    refused(run(*sample, '--top_k=-1'), 'top_k is -1')
    refused(run(*sample, '--max_new_tokens=200000'), '200000', '131072')
    refused(run('sample.py', f'--out_dir={tmp_path}/none'), 'none holds no checkpoint')
    # the checkpoint is one that others load, and one to start from
    transformers = pytest.importorskip('transformers')
    theirs = transformers.GptOssForCausalLM.from_pretrained(out / 'best', dtype=torch.float32,
                                                            attn_implementation='eager')
    idx = torch.randint(20, (1, 40))
    ours = GPT.from_pretrained(out / 'best', torch.float32)
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
    status, _, err = run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/more', f'--init_from={out}/best',
                         *TINY[2:], '--max_iters=1', '--dropout=0.1', '--sample_tokens=0')
    assert status == 0, err
    first = json.loads((tmp_path / 'more/metrics.jsonl').read_text().splitlines()[0])
    assert first['val_loss'] == pytest.approx(min(losses.values()), abs=1e-4)
    refused(run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/more2', f'--init_from={out}/best',
                '--block_size=16', '--hidden_size=64'), 'does not fit')


def test_batches_and_schedule(tmp_path):
    """An epoch draws every block once, accumulation is a larger batch, the learning rate follows its schedule."""
    data = make_data(tmp_path)
    common = [f'--data_dir={data}', *TINY, '--sample_tokens=0', '--max_iters=1', '--warmup_iters=0']
    assert run('train.py', *common, f'--out_dir={tmp_path}/a', '--batch_size=8')[0] == 0
    names = run.names
    epochs = [sorted(names['block_starts'](epoch)) for epoch in range(6)]
    for starts in epochs:
        assert len(starts) == names['blocks'] and set(np.diff(starts)) == {16} and 0 <= starts[0]
        assert starts[-1] + 16 < len(names['tokens']['train'])
    assert len({starts[0] for starts in epochs}) > 1  # blocks are cut elsewhere every time
    assert list(names['block_starts'](0)) not in (epochs[0], list(names['block_starts'](1)))
    # without the balancing loss, which depends on what is in a batch
    common += ['--router_aux_loss_coef=0']
    assert run('train.py', *common, f'--out_dir={tmp_path}/a', '--batch_size=8', '--overwrite', plots=True)[0] == 0
    options = '--batch_size=2', '--gradient_accumulation_steps=4'
    assert run('train.py', *common, f'--out_dir={tmp_path}/b', *options)[0] == 0
    ours, theirs = (load_file(tmp_path / x / 'last/model.safetensors') for x in 'ab')
    moved = load_file(tmp_path / 'a/last/optimizer.safetensors')
    other = load_file(tmp_path / 'b/last/optimizer.safetensors')
    for name in moved:
        if name.endswith(('exp_avg', 'momentum')):
            assert off(moved[name], other[name]) < 1e-4
    assert ours.keys() == theirs.keys() and (tmp_path / 'a/loss.png').stat().st_size > 1000
    late = 0.5 * (1 + math.cos(0.75 * math.pi))
    for kind, expected in (('linear', [0.1, 1, 1, 0.5]), ('cosine', [0.1, 1, 0.5, late]),
                               ('constant', [0.1, 1, 1, 1])):
        schedule = names['schedule']
        schedule.__globals__.update(lr_schedule=kind, cooldown=0.5, warmup_iters=9, max_iters=109, learning_rate=1.0)
        assert [schedule(step) for step in (0, 9, 59, 84)] == pytest.approx(expected)


def test_validation_rows(tmp_path):
    """Rows tell every validation token once; a document that fits into a row is seen from its beginning."""
    rng = random.Random(1)
    lengths = [rng.randint(3, 14) for _ in range(60)] + [50] + [5] * 40
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(dict(text='abc'[i % 3] * n)) + '\n'
                                              for i, n in enumerate(lengths)))
    for options in (dict(dataset=tmp_path / 'a.jsonl', val_fraction=0.9), dict(text='one document ' * 99)):
        data = make_data(tmp_path, **options)
        assert run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/{len(options)}', *TINY, '--sample_tokens=0',
                   '--max_iters=1', '--eval_iters=0')[0] == 0
        names = run.names
        tokens, end, told, losses = names['tokens']['val'], names['end_of_text'], [], []
        names['model'].eval()
        for start in names['rows']['val']:
            row = tokens[start:start + 17].astype(np.int64)
            last = max([i for i in range(1, 17) if row[i] == end], default=16)
            told += range(start + 1, start + last + 1)
            with torch.no_grad():
                logits = names['model'](torch.from_numpy(row[None, :16]), torch.from_numpy(row[None, 1:]))[0][0]
            losses.append(F.cross_entropy(logits, torch.from_numpy(row[1:]), reduction='none')[:last])
            if start and tokens[start] != end:  # in the middle of a document: it did not fit
                before = max(i for i in range(start) if tokens[i] == end or i == 0)
                assert start - before >= 16
        assert told == list(range(1, len(told) + 1)) and len(told) > max(80, len(tokens) - 18)
        assert names['evaluate']() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_mixed_precision_and_overwriting(tmp_path):
    """float16 scales its loss and trains; a run is replaced when asked; a copy of a run resumes in its own folder."""
    data = make_data(tmp_path)
    common = [f'--data_dir={data}', *TINY[:-1], '--sample_tokens=0', '--eval_interval=50', '--warmup_iters=5']
    out = f'--out_dir={tmp_path}/run'
    assert run('train.py', *common, out, '--dtype=float16', '--max_iters=50')[0] == 0
    rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['val_loss'] < 2.5 < rows[0]['val_loss']
    assert json.loads((tmp_path / 'run/last/state.json').read_text())['scaler']['scale'] > 1
    assert run('train.py', *common, out, '--dtype=float32', '--max_iters=3', '--overwrite')[0] == 0
    assert json.loads((tmp_path / 'run/last/state.json').read_text())['step'] == 3
    (tmp_path / 'run').rename(tmp_path / 'moved')
    resume = 'train.py', f'--out_dir={tmp_path}/moved', '--init_from=resume'
    status, _, err = run(*resume, '--max_iters=5', '--dtype=float16')
    assert status == 0 and not (tmp_path / 'run').exists(), err
    table = tmp_path / 'moved/best/tokenizer.tiktoken'
    for damage in ('', '!!!! 0', 'YQ== 0\nYg== 5'):
        table.write_text(damage)
        refused(run('sample.py', f'--init_from={table.parent}', '--start=a'), 'tokenizer.tiktoken is damaged')
    for name, file in (('last', 'optimizer.safetensors'), ('last.old', 'state.json')):
        (tmp_path / 'moved' / name / file).write_bytes(b'{')
    refused(run(*resume, '--max_iters=9'), 'last.old is damaged', 'state.json')
    make_data(tmp_path, text='THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG ' * 40)
    refused(run('train.py', *common, out, f'--init_from={tmp_path}/moved/last'), 'another tokenizer')


def test_chat(tmp_path):
    """Trained on chats, a model answers and stops; adapters alone do it too; and what is exported answers the same."""
    transformers = pytest.importorskip('transformers')
    answers = {'red': 'stop', 'green': 'go', 'yellow': 'wait'}
    chats = [[dict(role='user', content=color), dict(role='assistant', thinking='Hm.', content=answers[color])]
             for color in list(answers) * 8]
    file = write_chats(tmp_path / 'chats.jsonl', chats)
    status, _, err = run('prepare.py', f'--dataset={file}', '--tokenizer=bpe', '--vocab_size=300', '--data_dir=data',
                         cwd=tmp_path)
    assert status == 0, err
    tokens = tokens_of(tmp_path / 'data', 'val')
    shape = [f'--block_size={max(96, 2 * tokens.index(299))}', '--batch_size=4', '--hidden_size=64', '--head_dim=16',
             '--intermediate_size=32', '--num_hidden_layers=2', '--device=cpu', '--dtype=float32', '--data_dir=data',
             '--sample_tokens=30', '--start=red', '--warmup_iters=5', '--eval_iters=0']
    status, out, err = run('train.py', *shape, '--max_iters=150', '--eval_interval=75', '--out_dir=out', cwd=tmp_path)
    assert status == 0 and 'stop<|return|>' in out, out
    loss = float(re.findall(r'best val loss ([0-9.]+)', out)[0])

    # the loss is that of the assistant's tokens alone, each chat seen from its beginning
    encoder = prepare.load_tokenizer(tmp_path / 'data')
    model = GPT.from_pretrained(tmp_path / 'out/best', torch.float32).eval()
    total, count = 0.0, 0
    for chat in chats[-2:]:
        (tokens, mask), = prepare.Chat(chat).examples(encoder)
        tokens, mask = torch.tensor([tokens]), torch.tensor([mask])
        targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -1)
        total, count = total + model(tokens[:, :-1], targets)[1].item() * mask.sum().item(), count + mask.sum().item()
    assert count > 10 and loss < 0.2 and abs(total / count - loss) < 0.02

    def chat_with(*arguments, words='red\n\ngreen\nyellow\n'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'stdin', io.StringIO(words))
            status, out, err = run('sample.py', '--chat', '--temperature=0', '--dtype=float32', '--device=cpu',
                                   '--max_new_tokens=40', *arguments, cwd=tmp_path)
        assert status == 0, err
        return out

    assert chat_with('--out_dir=out', words='red\n').startswith('[analysis]\nHm.\n[final]\nstop\n')
    assert '[final]' in chat_with('--out_dir=out')

    status, out, err = run('sample.py', '--out_dir=out', '--export=exported', '--dtype=float32', cwd=tmp_path)
    assert status == 0, err
    for folder in ('exported', 'data'):  # where anything is, nothing is written
        refused(run('sample.py', '--out_dir=out', f'--export={folder}', cwd=tmp_path), f'{folder} is there already')
    refused(run('sample.py', '--out_dir=out', '--export=chats.jsonl', cwd=tmp_path), 'chats.jsonl')
    theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path / 'exported', dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    prompt = tokenizer.apply_chat_template([dict(role='user', content='green')], add_generation_prompt=True,
                                           return_tensors='pt', return_dict=True)
    answer = tokenizer.decode(theirs.generate(**prompt, max_new_tokens=40, do_sample=False)[0])
    assert answer.endswith('<|channel|>final<|message|>go<|return|>')
    assert 'stop' in chat_with('--init_from=exported', words='red\n')

    # the answers in turn, learned by adapters alone
    other = [[chat[0], following[1]] for chat, following in zip(chats, chats[1:] + chats[:1])]
    write_chats(file, other)
    status, _, err = run('prepare.py', f'--dataset={file}', '--tokenizer=out/best', '--data_dir=data', cwd=tmp_path)
    assert status == 0, err
    status, out, err = run('train.py', *shape[:2], *shape[6:], '--max_iters=50', '--eval_interval=25',
                           '--init_from=out/best', '--lora_rank=4', '--out_dir=adapted', cwd=tmp_path)
    assert status == 0 and 'go<|return|>' in out, out
    adapter = tmp_path / 'adapted/best'
    assert not list(adapter.glob('model*')) and (adapter / 'adapter.safetensors').stat().st_size < 120_000
    assert 'go\n' in chat_with('--out_dir=adapted', words='red\n')
    status, out, err = run('train.py', '--out_dir=adapted', '--init_from=resume', '--max_iters=51', cwd=tmp_path)
    assert status == 0, err
    status, _, err = run('sample.py', '--out_dir=adapted', '--export=both', '--experts=mxfp4', cwd=tmp_path)
    assert status == 0, err
    assert GPT.from_pretrained(tmp_path / 'both', torch.float32, experts='mxfp4')
    refused(run('train.py', *shape, '--lora_rank=4', '--out_dir=new', cwd=tmp_path), 'lora_rank', '--init_from')
    refused(run('train.py', *shape[:2], '--data_dir=data', '--lora_rank=4', '--init_from=out/best', '--out_dir=out',
                '--overwrite', cwd=tmp_path), 'out/best, which this run would overwrite')
    refused(run('train.py', *shape, '--init_from=out/best', '--experts=mxfp4', '--out_dir=new', cwd=tmp_path),
            'experts')
    refused(run('train.py', '--block_size=20', *shape[1:], '--out_dir=new', '--batch_size=1', '--eval_iters=1',
                cwd=tmp_path), 'block_size (20)')
    mask = tmp_path / 'data/val_mask.bin'
    for broken, words in ((b'abc', '3 bytes'), (bytes(mask.stat().st_size), '0 of them 1')):
        mask.write_bytes(broken)
        refused(run('train.py', *shape, '--init_from=out/best', '--out_dir=new', cwd=tmp_path), 'val_mask.bin', words)


def test_nothing_to_learn():
    """A batch without a target has the loss 0 and no gradient, not NaN."""
    model = make()
    x = torch.randint(SMALL['vocab_size'], (2, 10))
    loss = model(x, torch.full_like(x, -1), return_logits=False)[1]
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


# --- nothing lost -------------------------------------------------------------------------------------------------

def child(script, arguments, log, environment, trap):
    """What a process of `start` does: set a trap, then run the script with its output in a file."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.setpgrp()  # so that what a test does to this process group happens to no other
    os.environ.update(environment, OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    sys.modules['matplotlib'] = None  # plots take longer than these runs
    set_trap(*trap)
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name='__main__')


def set_trap(where=None, number=1, sent=signal.SIGTERM):
    """Have this process get a signal the number-th time that it is there: in a step, an evaluation, a save, or where
    what is on the disk changes ('file'). Or let no file grow beyond so many bytes ('full')."""
    import safetensors.torch
    if where == 'full':
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    count = itertools.count(1)
    places = dict(step=[(torch.optim.AdamW, 'step')], evaluation=[(GPT, 'hidden_states')],
                  save=[(safetensors.torch, 'save_file')], file=[
                      (os, 'fsync'), (os, 'rename'), (os, 'replace'), (os, 'unlink'), (os, 'rmdir'), (os, 'mkdir'),
                      (safetensors.torch, 'save_file')])
    for owner, name in places.get(where, []):
        def trapped(*arguments, function=getattr(owner, name), **options):
            if where != 'evaluation' or not arguments[0].training:
                if next(count) == number:
                    os.kill(os.getpid(), sent)
            return function(*arguments, **options)

        setattr(owner, name, trapped)


def start(log, script, *arguments, trap=(), **environment):
    """Run a script in a process of its own, its output in a file; faster than a new Python by the imports' seconds."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_model', 'torch._dynamo', 'torch.distributed.checkpoint'])
    process = context.Process(target=child, args=(script, arguments, log, environment, trap))
    process.start()
    return process


def ended(process, log):
    """(exit status, output) of a process that `start` gave."""
    process.join(120)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


def start_processes(number, log, *arguments, trap=(), trapped=0):
    """train.py in as many processes as torchrun would start, their output in log0, log1 ..."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(number))
    return [start(Path(f'{log}{rank}'), 'train.py', *arguments, trap=trap if rank == trapped else (), RANK=str(rank),
                  LOCAL_RANK=str(rank), **shared) for rank in range(number)]


def metrics(out):
    """The rows of metrics.jsonl without what the clock says."""
    rows = map(json.loads, (out / 'metrics.jsonl').read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in ('tokens_per_second', 'mfu')} for row in rows]


def assert_same_run(out, other):
    """The same numbers and the same state at the end, to the last bit."""
    assert metrics(out) == metrics(other)
    for file in ('model.safetensors', 'optimizer.safetensors'):
        ours, theirs = load_file(out / 'last' / file), load_file(other / 'last' / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


SHORT = [*TINY, '--max_iters=24', '--eval_interval=6', '--log_interval=4', '--dropout=0.1', '--sample_tokens=0',
         '--warmup_iters=3']


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """(data, out_dir of a run of SHORT)."""
    folder = tmp_path_factory.mktemp('undisturbed')
    data = make_data(folder)
    status, log = ended(start(folder / 'log', 'train.py', f'--data_dir={data}', f'--out_dir={folder}/out', *SHORT),
                        folder / 'log')
    assert status == 0, log
    return data, folder / 'out'


@pytest.mark.parametrize('where, number, stopped_at', [
    ('step', 9, 9), ('evaluation', 1, None), ('evaluation', 2, 6), ('evaluation', 5, 24), ('save', 1, 6),
    ('save', 3, 7)])
def test_sigterm(where, number, stopped_at, undisturbed, tmp_path):
    """SIGTERM, wherever it comes, ends a run with one checkpoint; resumed it goes on as if nothing had been."""
    data, out, log = undisturbed[0], tmp_path / 'out', tmp_path / 'log'
    status, printed = ended(start(log, 'train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT,
                                  trap=(where, number)), log)
    assert status == 0 and 'SIGTERM: stopped' in printed and 'Traceback' not in printed, printed
    if stopped_at is None:
        assert 'nothing yet' in printed and not (out / 'last').exists()
        return
    assert json.loads((out / 'last/state.json').read_text())['step'] == stopped_at
    before = (stopped_at - 1) // 6 * 6  # the state was written then, and once again when it stopped
    assert (out / 'last.old').exists() == (before > 0)
    assert not before or json.loads((out / 'last.old/state.json').read_text())['step'] == before
    command = printed.strip().splitlines()[-1].split()[2:]
    status, printed = ended(start(log, 'train.py', *command), log)  # no other setting: the run remembers its own
    assert status == 0, printed
    assert_same_run(out, undisturbed[1])
    refused(run('train.py', *command), '24 steps', 'max_iters')


def test_resume_with_other_intervals(undisturbed, tmp_path):
    """Evaluating and logging more often, in either part of a run, changes nothing of what is learned."""
    out, log = tmp_path / 'out', tmp_path / 'log'
    first = start(log, 'train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={out}', *SHORT, '--eval_interval=5',
                  '--log_interval=3', trap=('step', 13))
    assert ended(first, log)[0] == 0
    refused(run('train.py', f'--out_dir={out}', '--init_from=resume', '--max_iters=9'), '13 steps', 'max_iters')
    status, printed = ended(start(log, 'train.py', f'--out_dir={out}', '--init_from=resume', '--eval_interval=4'), log)
    assert status == 0, printed
    ours, theirs = metrics(out), metrics(undisturbed[1])
    assert [row['step'] for row in ours if 'val_loss' in row] == [0, 5, 10, 16, 20, 24]
    assert [row['step'] for row in ours if 'train_loss' in row] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert ours[-1]['val_loss'] == theirs[-1]['val_loss']
    # killed before the next checkpoint, so that the evaluation of the last one is made again though it is not due
    ended(start(log, 'train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={tmp_path}/killed', *SHORT,
                trap=('step', 8, signal.SIGKILL)), log)
    status, printed = ended(start(log, 'train.py', f'--out_dir={tmp_path}/killed', '--init_from=resume',
                                  '--eval_interval=8'), log)
    assert status == 0 and 'step 6: val loss' in printed, printed
    assert [row['step'] for row in metrics(tmp_path / 'killed') if 'val_loss' in row] == [0, 6, 8, 16, 24]
    for file in ('model.safetensors', 'optimizer.safetensors'):
        a, b = load_file(out / 'last' / file), load_file(undisturbed[1] / 'last' / file)
        assert all(torch.equal(a[name], b[name]) for name in a)


def kill_and_resume(rng, undisturbed, folder, by_time=False):
    """Kill a run at some moment, resume it, and compare."""
    out, log = folder / 'out', folder / 'log'
    arguments = ['train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={out}', *SHORT]
    if by_time:
        process = start(log, *arguments)
        while not (out / 'metrics.jsonl').exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
    else:
        process = start(log, *arguments, trap=('file', rng.randint(3, 170), signal.SIGKILL))
    ended(process, log)
    begun = any((out / name).exists() for name in ('last', 'last.old'))
    status, printed = ended(start(log, *arguments, '--init_from=resume' if begun else '--overwrite'), log)
    if status == 2 and '24 steps of max_iters' in printed:  # it was all done when it was killed
        status = 0
    assert status == 0, printed
    assert_same_run(out, undisturbed[1])
    return begun


def test_killed(undisturbed, tmp_path):
    rng, begun = random.Random(time.time()), 0
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        begun += kill_and_resume(rng, undisturbed, tmp_path / str(number))


@long
def test_long_killed(undisturbed, tmp_path):
    """Fifty runs killed, half at a random time and half at a random change of the files, and resumed."""
    rng, begun = random.Random(6), 0
    for number in range(50):
        (tmp_path / str(number)).mkdir()
        begun += kill_and_resume(rng, undisturbed, tmp_path / str(number), by_time=number % 2 == 0)
    assert begun > 25


def test_damaged_checkpoint(undisturbed, tmp_path):
    """A checkpoint in which anything is not as it was written is reported and set aside, and the older one used."""
    out, log = tmp_path / 'out', tmp_path / 'log'
    ended(start(log, 'train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={out}', *SHORT, trap=('step', 15)), log)
    assert [json.loads((out / name / 'state.json').read_text())['step'] for name in ('last', 'last.old')] == [15, 12]
    resume = f'--out_dir={out}', '--init_from=resume'
    for file in ('model.safetensors', 'SHA256SUMS', 'state.json'):
        shutil.copytree(out, tmp_path / file)
        content = bytearray((out / 'last' / file).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / file / 'last' / file).write_bytes(content)
        (tmp_path / file / 'last.old' / file).unlink()
        refused(run('train.py', f'--out_dir={tmp_path / file}', '--init_from=resume'), 'last.old is damaged', file)
    (out / 'last/optimizer.safetensors').write_bytes((out / 'last/optimizer.safetensors').read_bytes()[:-1])
    status, printed = ended(start(log, 'train.py', *resume), log)
    assert status == 0 and 'last is damaged' in printed and 'optimizer.safetensors' in printed, printed
    assert (out / 'last.damaged/state.json').exists()
    assert_same_run(out, undisturbed[1])


def test_full_disk_and_locked_folder(undisturbed, tmp_path):
    """What cannot be written is one clear line, and what was written before is whole; two runs do not mix."""
    out, log = tmp_path / 'out', tmp_path / 'log'
    arguments = [f'--data_dir={undisturbed[0]}', f'--out_dir={out}', *SHORT]
    ended(start(log, 'train.py', *arguments, trap=('step', 9)), log)
    for size in (1000, 20000):  # of the first file that is too large
        resumed = start(log, 'train.py', f'--out_dir={out}', '--init_from=resume', trap=('full', size))
        status, printed = ended(resumed, log)
        assert status == 2 and 'Traceback' not in printed and f'cannot write to {out}' in printed, printed
        assert json.loads((out / 'last/state.json').read_text())['step'] == 9 and not (out / 'last.new').exists()
    with FileLock(out / '.lock'):
        for more in ('--init_from=resume', '--overwrite'):
            status, printed = ended(start(log, 'train.py', *arguments, more), log)
            assert status == 2 and f'another run is writing to {out}' in printed, printed
    ended(start(log, 'train.py', *arguments, '--init_from=resume'), log)
    assert_same_run(out, undisturbed[1])
    (tmp_path / 'file').write_text('')
    refused(run('train.py', arguments[0], f'--out_dir={tmp_path}/file/out', *SHORT), 'cannot write to')
    status, printed = ended(start(log, 'prepare.py', '--dataset=builtin', '--tokenizer=byte', '--megabytes=0.1',
                                  f'--data_dir={tmp_path}/data', trap=('full', 50000)), log)
    assert status == 2 and 'Traceback' not in printed and os.listdir(tmp_path / 'data') == [], printed


@long
def test_long_full_disk(undisturbed, tmp_path):
    """A disk that fills up, or can only be read, and then has room again: one clear line each time, nothing lost."""
    disk, log = tmp_path / 'disk', tmp_path / 'log'
    disk.mkdir()
    mount = lambda *options: subprocess.run(['mount', *options, disk], capture_output=True, text=True)
    if mount('-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs').returncode:
        pytest.skip('needs the right to mount a tmpfs')
    try:
        arguments = [f'--data_dir={undisturbed[0]}', f'--out_dir={disk}/out', *SHORT]
        status, printed = ended(start(log, 'train.py', *arguments), log)
        assert status == 2 and 'Traceback' not in printed and 'cannot write to' in printed, printed
        assert (disk / 'out/last').exists() and not (disk / 'out/last.new').exists()
        mount('-o', 'remount,ro')
        for more in ('--init_from=resume', '--overwrite'):
            status, printed = ended(start(log, 'train.py', *arguments, more), log)
            assert status == 2 and 'Traceback' not in printed and 'cannot write to' in printed, printed
        for script, where in (('prepare.py', '--data_dir'), ('sample.py', '--export')):
            more = dict(prepare=['--dataset=builtin', '--tokenizer=byte', '--megabytes=4'],
                        sample=[f'--out_dir={undisturbed[1]}'])[script[:-3]]
            for remounted in ('ro', 'rw,size=100k'):
                mount('-o', f'remount,{remounted}')
                status, printed = ended(start(log, script, *more, f'{where}={disk}/new'), log)
                assert status == 2 and 'Traceback' not in printed, printed
        mount('-o', 'remount,rw,size=50m')
        status, printed = ended(start(log, 'train.py', *arguments, '--init_from=resume'), log)
        assert status == 0, printed
        assert_same_run(disk / 'out', undisturbed[1])
    finally:
        subprocess.run(['umount', disk])


def test_vanished_data(tmp_path):
    """Data that is cut short or gone while a run goes on ends it with a line, its checkpoint whole."""
    data = make_data(tmp_path)
    for change in (Path.unlink, lambda path: os.truncate(path, 100)):
        out, log = tmp_path / 'out', tmp_path / 'log'
        process = start(log, 'train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT, '--max_iters=100000',
                        '--overwrite')
        while not (out / 'last').exists():
            assert process.is_alive(), log.read_text()
            time.sleep(0.01)
        change(data / 'train.bin')
        status, printed = ended(process, log)
        assert status == 2 and 'Traceback' not in printed and 'train.bin: found' in printed, printed
        assert json.loads((out / 'last/state.json').read_text())['step'] >= 6
        make_data(tmp_path)


# --- many processes -----------------------------------------------------------------------------------------------

# torchrun has a --start of its own
PARITY = [*(flag for flag in TINY if 'start' not in flag), '--max_iters=12', '--eval_interval=4', '--log_interval=1',
          '--sample_tokens=0', '--warmup_iters=3']


def finished(processes, log):
    """The output of processes that start_processes gave, once all have ended well."""
    results = [ended(process, Path(f'{log}{rank}')) for rank, process in enumerate(processes)]
    assert all(status == 0 for status, _ in results), results
    return results


def assert_close_runs(out, other):
    """The same losses to 1e-5, and parameters likewise."""
    ours, theirs = metrics(out), metrics(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys() and (a['step'], a['tokens']) == (b['step'], b['tokens'])
        for key in a.keys() & {'train_loss', 'val_loss', 'grad_norm'}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a, b)
        for key in a.keys() & {'expert_load_max', 'dead_experts', 'router_entropy'}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (a, b)
    ours, theirs = (GPT.from_pretrained(folder / 'last', torch.float32) for folder in (out, other))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert (p - q).abs().max() < 1e-5, name


@pytest.mark.parametrize('number, changes', [
    (2, []), (2, ['--fsdp=True', '--num_local_experts=3', '--tie_word_embeddings=True']),
    *(pytest.param(number, ['--max_iters=50', *changes], marks=long, id=f'long-{number}-{" ".join(changes)}')
      for number, changes in (
          (2, []), (2, ['--fsdp=True']), (2, ['--gradient_accumulation_steps=3', '--batch_size=2']),
          (4, ['--gradient_accumulation_steps=2', '--fsdp=True']), (2, ['--fsdp=True', '--compile=True']),
          (2, ['--compile=True']),
          (2, ['--fsdp=True', '--muon_lr=0', '--learning_rate=1e-3'])))])
def test_processes(number, changes, tmp_path):
    """One process or several, DDP or FSDP2: the same numbers, and their checkpoints serve each other."""
    data, log = make_data(tmp_path), tmp_path / 'log'
    common = [f'--data_dir={data}', *PARITY, *(change for change in changes if 'fsdp' not in change)]
    fsdp = ['--fsdp=True'] if '--fsdp=True' in changes else []
    one, many, mixed = (tmp_path / name for name in ('one', 'many', 'mixed'))
    assert ended(start(log, 'train.py', *common, f'--out_dir={one}'), log)[0] == 0
    finished(start_processes(number, log, *common, *fsdp, f'--out_dir={many}'), log)
    assert_close_runs(many, one)
    # begun by several, gone on with by one; and the other way round
    for begun_by in (number, 1):
        before = start_processes(number, log, *common, *fsdp, f'--out_dir={mixed}', '--overwrite', trap=('step', 7),
                                 trapped=number - 1) if begun_by > 1 else [
            start(tmp_path / 'log0', 'train.py', *common, f'--out_dir={mixed}', '--overwrite', trap=('step', 7))]
        results = finished(before, log)
        assert 'stopped after step 7' in results[0][1], results
        resume = f'--out_dir={mixed}', '--init_from=resume'
        finished([start(tmp_path / 'log0', 'train.py', *resume)] if begun_by > 1 else
                 start_processes(number, log, *resume, *fsdp), log)
        assert_close_runs(mixed, one)
    if fsdp:  # to the single-file layout, and into transformers
        transformers = pytest.importorskip('transformers')
        assert any((many / 'last').glob('shard-*')) and not any((many / 'last').glob('model*'))
        assert run('sample.py', f'--init_from={many}/last', f'--export={tmp_path}/whole', '--dtype=float32')[0] == 0
        theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path / 'whole', attn_implementation='eager')
        idx = torch.randint(20, (1, 40))
        ours = GPT.from_pretrained(many / 'last', torch.float32)
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)


@long
def test_long_adapters_of_two_processes(undisturbed, tmp_path):
    """Adapters under FSDP2, of a base that is in none of their checkpoints: stopped, gone on with, and as of one."""
    log, flags = tmp_path / 'log', [f'--data_dir={undisturbed[0]}', f'--init_from={undisturbed[1]}/best', *PARITY[3:],
                                    '--lora_rank=2', '--num_hidden_layers=2', '--dropout=0']
    one, many = tmp_path / 'one', tmp_path / 'many'
    assert ended(start(log, 'train.py', *flags, f'--out_dir={one}'), log)[0] == 0
    finished(start_processes(2, log, *flags, '--fsdp=True', f'--out_dir={many}', trap=('evaluation', 2)), log)
    assert json.loads((many / 'last/state.json').read_text())['step'] == 4
    finished(start_processes(2, log, f'--out_dir={many}', '--init_from=resume', '--fsdp=True'), log)
    assert_close_runs(many, one)


def reseal(folder):
    """Write SHA256SUMS anew, as a stranger may."""
    lines = [f'{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n' for name in os.listdir(folder)
             if name != 'SHA256SUMS']
    (folder / 'SHA256SUMS').write_text(''.join(sorted(lines)))


def test_hostile_run(undisturbed, tmp_path):
    """What no run could have written is refused; what others leave in its folder is no damage, nor is it followed."""
    out, victim = tmp_path / 'out', tmp_path / 'victim'
    resume = ['train.py', f'--out_dir={out}', '--init_from=resume', '--max_iters=25']

    def anew():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(undisturbed[1], out)
        shutil.rmtree(out / 'last.old')

    for change in (dict(best_loss=math.nan), dict(losses=[[1.0]]), dict(losses='x'), dict(bad_steps=[0]), dict(owed=1),
                   dict(sequences=-1), dict(step=10 ** 40), dict(scaler=dict(scale='x')), dict(load=[['x']]),
                   dict(settings=dict(batch_size=2.5)), dict(settings=dict(seed='x')), dict(settings=[])):
        anew()
        state = json.loads((out / 'last/state.json').read_text())
        if isinstance(settings := change.get('settings'), dict):
            change = dict(settings=state['settings'] | settings)
        (out / 'last/state.json').write_text(json.dumps(state | change))
        reseal(out / 'last')
        refused(run(*resume), 'last is damaged')
    anew()
    moments = load_file(out / 'last/optimizer.safetensors')
    save_file({name: tensor * math.nan for name, tensor in moments.items()}, out / 'last/optimizer.safetensors')
    reseal(out / 'last')
    refused(run(*resume), 'finite')
    anew()
    os.mkfifo(out / 'last/pipe')
    refused(run(*resume), 'pipe')
    anew()
    refused(run('train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={out}/best/new', *SHORT), 'is a checkpoint')
    refused(run('train.py', f'--data_dir={undisturbed[0]}', f'--out_dir={out}', f'--init_from={out}/best', *SHORT,
                '--overwrite'), 'would overwrite')
    refused(run(*resume, '--batch_size=100000000'), 'GB')
    refused(run('sample.py', f'--out_dir={out}', f'--export={out}/last/new'), 'would damage')
    victim.write_text('precious')
    (out / 'metrics.jsonl.new').symlink_to(victim), (out / 'loss.new').symlink_to(victim)
    (out / '.launch').unlink(), (out / '.launch').symlink_to(victim), (out / '.launch.new').symlink_to(victim)
    (out / 'last/.DS_Store').write_text('')
    assert run(*resume, plots=True)[0] == 0 and victim.read_text() == 'precious'
    assert (out / 'last/model.safetensors').stat().st_mode == (out / 'last/config.json').stat().st_mode


def test_longer(undisturbed, tmp_path):
    """A finished run that is made longer keeps what it logged."""
    shutil.copytree(undisturbed[1], tmp_path / 'out')
    assert run('train.py', f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=25')[0] == 0
    rows = metrics(tmp_path / 'out')
    assert rows[:-2] == metrics(undisturbed[1]) and [row['step'] for row in rows[-2:]] == [25, 25]


@long
@pytest.mark.parametrize('nodes, fsdp', [(1, []), (1, ['--fsdp=True']), (2, [])])
def test_long_torchrun(nodes, fsdp, tmp_path):
    """A process that dies takes the others with it within a minute; with --max-restarts they all go on, from the last
    checkpoint, to the numbers of a run that nothing happened to. Two nodes are two torchruns here."""
    data, one, many = make_data(tmp_path), tmp_path / 'one', tmp_path / 'many'
    common = [f'--data_dir={data}', *PARITY, '--max_iters=50']
    assert ended(start(tmp_path / 'log', 'train.py', *common, f'--out_dir={one}'), tmp_path / 'log')[0] == 0
    (tmp_path / 'sitecustomize.py').write_text(f"""
import os, signal, threading, time
from pathlib import Path
def die():
    while not Path({str(many)!r}, 'last').exists():
        time.sleep(0.01)
    time.sleep(0.2)
    Path({str(tmp_path)!r}, 'died').touch()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get('RANK') == '1' and not Path({str(tmp_path)!r}, 'died').exists():
    threading.Thread(target=die, daemon=True).start()
""")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1',
                                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')  # as the README says
    with socket.socket() as free:
        free.bind(('', 0))
        port = free.getsockname()[1]
    meet = [f'--nnodes={nodes}', '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}']
    for restarts in (0, 1):
        command = ['torchrun', *meet, f'--rdzv_id=run{restarts}', f'--nproc_per_node={2 // nodes}',
                   f'--max-restarts={restarts}', ROOT / 'train.py', *common, *fsdp, f'--out_dir={many}', '--overwrite']
        began = time.time()
        agents = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=environment) for _ in range(nodes)]
        errors = [agent.communicate(timeout=300)[1] for agent in agents]
        assert '-9' in ''.join(errors), errors
        if not restarts:
            assert all(agent.returncode for agent in agents) and time.time() - began < 60, errors
            shutil.rmtree(many)
            (tmp_path / 'died').unlink()
    assert not any(agent.returncode for agent in agents), errors
    assert_close_runs(many, one)
    if (nodes, fsdp) == (1, []):  # the next launch of that name is another run, refused as often as it starts anew
        state = (many / 'last/state.json').read_text()
        again = subprocess.run([*map(str, command[:-1]), '--learning_rate=0.5', '--max_iters=60'], env=environment,
                               capture_output=True, text=True, timeout=300)
        assert again.returncode and again.stderr.count('holds a run') == 4, again.stderr
        assert (many / 'last/state.json').read_text() == state


# --- what strangers and typing errors bring -----------------------------------------------------------------------

class Enough(BaseException):
    pass


def fuzz(work, seed, number, folder, log):
    """Call work(rng, folder) so often, in this process with little memory and little time for each; what it raises goes
    to the log, with how to have it again."""
    import bench
    bench.peak_flops = lambda *_: None  # it takes longer than all the rest
    torch.set_num_threads(1)
    sys.modules['matplotlib'] = None
    if sys.platform == 'linux':
        used = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + 2 ** 31, used + 2 ** 31))

    def enough(*_):
        raise Enough

    signal.signal(signal.SIGALRM, enough)
    with open(log, 'w', buffering=1) as file:  # a line at a time
        for i in range(number):
            try:
                signal.alarm(20)
                work(random.Random(f'{seed} {i}'), folder)
                file.write('done\n')
            except BaseException as error:
                where = '; '.join(line.strip() for line in traceback.format_exc(chain=False).splitlines()[-5:])
                file.write(f'{seed} {i}: {error!r:.2000}; {where} ... {error.__cause__!r:.300}\n')
            finally:
                signal.alarm(0)


def assert_harmless(work, number, folder, seed=0):
    """That fuzz finds nothing, in a process of its own."""
    context = multiprocessing.get_context('forkserver')
    process = context.Process(target=fuzz, args=(work, seed, number, folder, folder / 'fuzz.log'))
    process.start()
    process.join()
    lines = (folder / 'fuzz.log').read_text().splitlines()
    bad = [line for line in lines if line != 'done']
    assert process.exitcode == 0 and not bad, '\n'.join([f'exit {process.exitcode} after {len(lines)}', *bad[:60]])
    assert len(lines) == number


def mutated(rng, content):
    """Bytes with something cut off, taken out, put in, or changed."""
    content = bytearray(content)
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    how = rng.randrange(5)
    if how == 0:
        return bytes(content[:at])
    if how == 1:
        del content[at:at + rng.choice([1, 2, 8, end - at])]
    elif how == 2:
        content[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    else:
        for _ in range(1 if how == 3 else 20):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def mutated_json(rng, value):
    """An object with one value of it, at any depth, replaced, taken out or put in twice."""
    wild = [None, True, -1, 0, 1, 3, 10 ** 9, 2 ** 63, 10 ** 40, 1e308, math.inf, math.nan, 0.5, '', 'x', 'F64', 'I64',
            [], {}, [[]], [1, 2], {'a': 1}, '../../etc/passwd', 'x' * 10000, list(range(1000))]
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(wild)
    value = copy.copy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.1:
        del value[key]
    elif how < 0.15 and isinstance(value, dict):
        value[str(rng.choice(wild))] = value[key]
    else:
        value[key] = mutated_json(rng, value[key])
    return value


def mutate_json_file(rng, path):
    if rng.random() < 0.3:
        path.write_bytes(mutated(rng, path.read_bytes()))
    elif rng.random() < 0.05:
        path.write_text('[' * 100000)
    else:
        path.write_text(json.dumps(mutated_json(rng, json.loads(path.read_text()))))


def mutate_safetensors(rng, path):
    """Change the header, its length, or where the file ends."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], 'little')
    how = rng.random()
    if how < 0.2:
        path.write_bytes(content[:rng.randrange(len(content))])
    elif how < 0.3:
        other = rng.choice([0, 1, size - 1, size + 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
        path.write_bytes(other.to_bytes(8, 'little') + content[8:])
    elif how < 0.5:
        path.write_bytes(content[:8] + mutated(rng, content[8:8 + size]) + content[8 + size:])
    else:
        header = json.dumps(mutated_json(rng, json.loads(content[8:8 + size]))).encode()
        path.write_bytes(len(header).to_bytes(8, 'little') + header + content[8 + size:])


def load_mutated(rng, folder):
    """A checkpoint with one file changed is refused with its name, or loads."""
    for source in folder.glob('checkpoint*'):
        there = folder / 'tried'
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(source, there)
        file = there / rng.choice([name for name in os.listdir(source) if name.endswith(('.json', '.safetensors'))])
        mutate_json_file(rng, file) if file.suffix == '.json' else mutate_safetensors(rng, file)
        try:
            GPT.from_pretrained(there, torch.float32)
        except ValueError as error:
            assert str(there) in str(error), error


def train_mutated(rng, folder):
    """Data, or a run to resume, with one file changed: one clear line, or a run."""
    there = folder / 'tried'
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(folder / 'run', there)
    options = [f'--out_dir={there}/out', f'--data_dir={there}/data', '--eval_iters=2', '--sample_tokens=0',
               '--batch_size=4', '--gradient_accumulation_steps=1']
    if rng.random() < 0.5:
        file = there / 'data' / rng.choice(['train.bin', 'val.bin', 'meta.json', 'meta.json', 'tokenizer.tiktoken'])
        options += ['--overwrite', *SHORT[:9], '--sample_tokens=3', '--eval_interval=2', '--max_iters=3']
    else:
        file = there / 'out/last' / rng.choice(['state.json', 'state.json', 'config.json', 'meta.json', 'SHA256SUMS',
                                                'optimizer.safetensors', 'model.safetensors'])
        options += ['--init_from=resume', '--max_iters=26']
    if file.suffix == '.json':
        mutate_json_file(rng, file)
    elif file.suffix == '.safetensors':
        mutate_safetensors(rng, file)
    else:
        file.write_bytes(mutated(rng, file.read_bytes()))
    sums = there / 'out/last/SHA256SUMS'
    if file != sums and rng.random() < 0.7:  # by someone who writes the sums anew
        reseal(sums.parent)
    result = run('train.py', *options)
    if result[0]:
        refused(result)
        assert str(there) in result[2] or 'vocab_size' in result[2], result
    else:
        assert 'Traceback' not in result[2]


def random_command(rng, folder):
    """A script with random settings, by flags or a config file: one clear line, or a run."""
    import config
    script = rng.choice(['train.py'] * 5 + ['prepare.py'] * 2 + ['sample.py'] * 3 + ['bench.py'])
    known = config.declared(ROOT / script)
    if script == 'train.py':
        known = known | config.declared(ROOT / 'model.py', 'GPTConfig')
    wild = dict(int=['0', '1', '2', '3', '5', '64', '-1', '1e3', '1.5', '10' * 20, 'x', '', 'None', 'nan', '2**9'],
                float=['0', '1', '0.5', '-1', '1e-3', 'inf', 'nan', '1e400', 'x', '', 'None', '1e30', '3'],
                bool=['True', 'False', '1', 'x', '', 'None'],
                str=['', 'x', 'resume', '/', 'None', 'a=b', '\x00', 'ä' * 300, '..'])
    base = {'train.py': ['--data_dir=run/data', *TINY, '--max_iters=2', '--out_dir=random', '--overwrite'],
            'prepare.py': ['--dataset=text.txt', '--tokenizer=char', '--data_dir=prepared'],
            'sample.py': ['--out_dir=run/out', '--max_new_tokens=3', '--device=cpu', '--start=the'],
            'bench.py': ['--rounds=1', '--steps=1', '--new_tokens=2', *TINY[:5], '--device=cpu', '--parts=decode',
                         '--vocab_size=20', '--works=x']}[script]
    given = []
    for key in rng.sample(sorted(known), rng.choice([1, 1, 2, 3])):
        kind = known[key][0].partition(' ')[0]
        values = wild.get(kind, ['x', 'sliding_attention,full_attention', ''])
        given.append((key, rng.choice([*values, repr(known[key][1])])))
    given = [(key, value) for key, value in given if key not in ('device', 'learn', 'compare', 'profile', 'checkpoint')
             and (key, value) != ('compile', 'True')]  # which takes longer than a try may
    flags = [f'--{key}={value}' for key, value in given]
    if rng.random() < 0.1:
        flags += [rng.choice(['--', '-x', '--=', '=', '--overwrite', '--max_iters', 'config/none.py', '--LR=1', '.'])]
    if rng.random() < 0.3:
        lines = [f'{key} = {value if rng.random() < 0.5 else repr(value)}' for key, value in given]
        lines.append(rng.choice(['', 'x = 1', '(', 'import nothing', '1 / 0']))
        (folder / 'fuzzed.py').write_text('\n'.join(lines))
        flags = ['fuzzed.py']
    try:
        result = run(script, *base, *flags, cwd=folder)
    except Enough:
        return
    except BaseException as error:
        raise AssertionError(f'{script} {flags} {given}') from error
    assert 'Traceback' not in result[2], (script, flags, result)
    assert result[0] in (0, 2), (script, flags, result)
    if result[0]:
        refused(result)


@pytest.fixture(scope='session')
def samples(undisturbed, tmp_path_factory):
    """A folder with checkpoints of all kinds, a run, its data, and a text."""
    folder = tmp_path_factory.mktemp('samples')
    shutil.copytree(undisturbed[0], folder / 'run/data')
    shutil.copytree(undisturbed[1], folder / 'run/out')
    model = make(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    model.save_pretrained(folder / 'checkpoint')
    model.save_pretrained(folder / 'checkpoint-packed', torch.bfloat16, 'mxfp4', shard_size=2e4)
    adapted = GPT.from_pretrained(folder / 'checkpoint', torch.float32)
    adapted.add_lora(2, 4)
    adapted.save_adapter(folder / 'checkpoint-adapter')
    (folder / 'text.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 50)
    return folder


def test_cut_short(samples, tmp_path):
    """Every file of a checkpoint, of data and of a run, cut in its beginning, its header, its body and before its last
    byte, is refused by name, its sums made anew or not."""
    def cuts(path):
        """Cut it, ever longer, then leave it as it was."""
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], 'little') if path.suffix == '.safetensors' else 8
        for size in sorted({0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2,
                            len(content) - 1}):
            if content[:size].strip() != content.strip():
                path.write_bytes(content[:size])
                yield size
        path.write_bytes(content)

    shutil.copytree(samples, tmp_path / 'here')
    for folder in (tmp_path / 'here').glob('checkpoint*'):
        for path in folder.glob('*'):
            if path.suffix in ('.json', '.safetensors') and path.name != 'generation_config.json':
                for size in cuts(path):
                    with pytest.raises(ValueError, match=re.escape(str(folder))):
                        GPT.from_pretrained(folder, torch.float32)
    data, out = tmp_path / 'here/run/data', tmp_path / 'here/run/out'
    for path in (data / 'tokenizer.tiktoken', data / 'meta.json'):
        for size in cuts(path):
            with pytest.raises(ValueError, match=re.escape(str(data))):
                prepare.load_tokenizer(data)
    for path in (*data.glob('*.bin'), data / 'meta.json'):
        for size in itertools.islice(cuts(path), 0, None, 4):
            refused(run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/new', *SHORT), str(path))
    shutil.rmtree(out / 'last.old')
    for path in (out / 'last').iterdir():
        for size in itertools.islice(cuts(path), 0, None, 5):
            refused(run('train.py', f'--out_dir={out}', '--init_from=resume', '--max_iters=25'), 'last is damaged')
            if path.name in ('state.json', 'optimizer.safetensors', 'model.safetensors', 'config.json', 'meta.json'):
                reseal(out / 'last')
                refused(run('train.py', f'--out_dir={out}', '--init_from=resume', '--max_iters=25'), str(out / 'last'))
        reseal(out / 'last')
    assert run('train.py', f'--out_dir={out}', '--init_from=resume', '--max_iters=25')[0] == 0


@pytest.mark.parametrize('work, number', [
    (load_mutated, 30), (train_mutated, 12), (random_command, 20),
    *(pytest.param(work, 1000, marks=long, id=f'long-{work.__name__}')
      for work in (load_mutated, train_mutated, random_command))])
def test_hostile_input(work, number, samples, tmp_path):
    shutil.copytree(samples, tmp_path / 'here')
    assert_harmless(work, number, tmp_path / 'here', seed=number)


def test_rows_in_several_files(tmp_path):
    """Rows of tensors in several files, as FSDP2's processes write them, are put together, or refused by name."""
    original = make()
    original.save_config(tmp_path)

    def write(number, firsts=lambda first: first, text=json.dumps):
        tensors, where = {}, {}
        for name, p in original.named_parameters():
            half = (len(p) + 1) // 2
            first, end = ((0, half), (half, len(p)))[number]
            tensors[name] = p.data[first:end].clone()
            where[name] = dict(saved_offsets=[firsts(first)] + [0] * (p.dim() - 1))
        save_file(tensors, tmp_path / f'shard-0000{number}.safetensors', dict(DCP_SHARDING_INFO=text(where)))

    write(1), write(0)
    loaded = GPT.from_pretrained(tmp_path, torch.float32)
    for p, q in zip(original.parameters(), loaded.parameters()):
        assert torch.equal(p, q)
    for break_it in (lambda: write(1, lambda first: first + 1), lambda: write(1, lambda first: 0),
                     lambda: write(1, lambda first: -first), lambda: write(1, lambda first: 'x'),
                     lambda: write(1, text=lambda where: '['), lambda: write(1, text=lambda where: '[]'),
                     lambda: write(1, text=lambda where: '{}'),
                     lambda: shutil.copy(tmp_path / 'shard-00000.safetensors', tmp_path / 'shard-00002.safetensors'),
                     lambda: (tmp_path / 'shard-00001.safetensors').unlink(),
                     lambda: (tmp_path / 'shard-00000.safetensors').unlink()):
        write(0), write(1)
        break_it()
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            GPT.from_pretrained(tmp_path, torch.float32)
        (tmp_path / 'shard-00002.safetensors').unlink(missing_ok=True)


def test_not_finite(tmp_path):
    """A step of non-finite loss leaves the weights alone; ten in a row stop the run, its checkpoint still good."""
    data, out = make_data(tmp_path), tmp_path / 'out'
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': 29}))
    with torch.no_grad():
        model.model.norm.weight[:] = 3e38  # finite, but the loss will not be
        model.lm_head.weight[:] = 3e38
    model.save_pretrained(tmp_path / 'bad')
    result = run('train.py', f'--data_dir={data}', f'--out_dir={out}', f'--init_from={tmp_path}/bad', *TINY[3:],
                 '--max_iters=100')
    refused(result, 'not finite', '10 steps in a row', 'last')
    before = GPT.from_pretrained(tmp_path / 'bad', torch.float32)
    after = GPT.from_pretrained(out / 'last', torch.float32)
    for p, q in zip(before.parameters(), after.parameters()):
        assert torch.equal(p, q)
    assert [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()][-1]['skipped'] == 10
    refused(run('train.py', f'--out_dir={out}', '--init_from=resume'), 'not finite', '20 steps in a row')


def test_learn(tmp_path):
    """--learn trains: far below the first loss; the rows differ where they should; bad flags are refused."""
    data = make_data(tmp_path)
    learn = ['bench.py', '--learn', f'--data_dir={data}', *TINY[:5], '--device=cpu', '--warmup_iters=5', '--seeds=1,2',
             f'--json_file={tmp_path}/learn.json', f'--plot_file={tmp_path}/learn.png']
    status, out, err = run(*learn, '--max_iters=60', '--works=no sinks', '--grad_clip=0', plots=True)
    assert status == 0 and '| no sinks |' in out, err
    row, = json.loads((tmp_path / 'learn.json').read_text())['rows']
    assert row['val_loss'] < 2 and 0 < row['spread'] < 1 and 1 <= row['busiest'] < 8
    assert row['disk'] * 1e6 > 4 * row['active'] and (tmp_path / 'learn.png').stat().st_size > 1000
    for flag, word in (('--works=x', 'dense GPT-2'), ('--seeds=a', '--seeds'), ('--max_iters=0', 'max_iters'),
                       ('--block_size=9999', '9999'), ('--num_experts_per_tok=9', 'num_experts_per_tok'),
                       ('--dtype=float16', 'float16'), (f'--data_dir={tmp_path}', 'meta.json')):
        refused(run(*learn, flag), word)
    meta, val = (data / name for name in ('meta.json', 'val.bin'))
    whole = meta.read_text()
    for broken in ('', '[]', '{}', whole.replace('uint16', 'uint7'), whole.replace('val_tokens', 'tokens')):
        meta.write_text(broken)
        refused(run(*learn), 'meta.json')
    meta.write_text(whole)
    val.write_bytes(b'')
    refused(run(*learn), 'val.bin')


def test_seeds_differ_in_weights():
    import bench
    job = dict(model='ours', shape=SMALL)
    first, again, other = (bench.build(job | dict(seed=seed)).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_bench(tmp_path):
    """The figures are there, and those that can be known are right."""
    status, out, err = run('bench.py', '--rounds=1', '--steps=1', '--new_tokens=4', *TINY[:5], '--vocab_size=300',
                           '--device=cpu', f'--json_file={tmp_path}/b.json')
    assert status == 0, err
    rows = {row['part']: row for row in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert rows.keys() == {'train', 'prefill', 'decode'} and '| train |' in out
    assert all(row['tokens_per_second'] > 0 and 0.05 < row['memory'] < 5 for row in rows.values())
    assert 0 < rows['train']['mfu'] < 1
    refused(run('bench.py', '--parts=train,walk'), 'walk')
    big = [f'--checkpoint={tmp_path}/big', '--vocab_size=300', *TINY[:3], '--prompt_tokens=8', '--new_tokens=4',
           '--rounds=1', '--device=cpu', f'--json_file={tmp_path}/b.json']
    status, out, err = run('bench.py', *big)
    assert status == 0, err
    row, = json.loads((tmp_path / 'b.json').read_text())['rows']
    assert row['disk'] * 1e6 == (tmp_path / 'big/model.safetensors').stat().st_size and row['prefill_s'] > 0
    packed = GPT.from_pretrained(tmp_path / 'big', experts='mxfp4')
    assert packed.model.layers[1].mlp.experts.down_weight.blocks.float().mean() == pytest.approx(127.5, abs=2)
    refused(run('bench.py', *big, '--hidden_size=64'), 'big', 'hidden_size = 32')


def test_scale():
    """On paper: parameters counted without building them, whole for DDP and divided for FSDP2, by experts at most."""
    import bench
    shape = dict(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_local_experts=8)
    gpt = GPT(GPTConfig(**shape))
    stacks = sum(p.numel() for name, p in gpt.named_parameters() if '.experts.' in name)
    assert bench.count_parameters(gpt.config)[:2] == (gpt.num_parameters(), stacks // 4)
    status, out, err = run('bench.py', '--scale', *(f'--{key}={value}' for key, value in shape.items()), '--muon_lr=0')
    assert status == 0 and '| 512 | FSDP2 |' in out, err
    plain, shared, spread = (bench.training_memory(gpt.config, 2, 128, 4, False, False, gpus, gpus > 8)
                             for gpus in (1, 8, 64))
    assert plain['parameters'] == plain['gradients'] == plain['optimizer'] / 2 == 4 * gpt.num_parameters()
    assert shared == plain and plain['communication'] == 0 < spread['communication']
    assert spread['parameters'] == pytest.approx(4 * ((gpt.num_parameters() - stacks) / 64 + stacks / 8))
    muon = bench.training_memory(gpt.config, 2, 128, 4, True, False)
    matrices = sum(p.numel() for group in gpt.configure_optimizers(1.0, 1.0, (0.9, 0.9), 0.0)[1].param_groups
                   for p in group['params'])
    assert muon['optimizer'] == pytest.approx(8 * gpt.num_parameters() - 4 * matrices, rel=1e-3)
    refused(run('bench.py', '--scale', '--gpu=toaster'), 'toaster', 'H100')
    refused(run('bench.py', '--scale', '--network=0'), 'network')
