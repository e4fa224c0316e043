"""
Test the model against transformers' GptOssForCausalLM, fast ways against definitions, and the scripts.

    pytest -q test_model.py
    pytest -q test_model.py -k on_gpu    # what a GPU computes; without one, these tests are skipped

No test needs a network. gpt-oss's and GPT-2's tokenizers are tested where TIKTOKEN_CACHE_DIR holds them.
"""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # a second thread slows down models as small as these
if 'TIKTOKEN_CACHE_DIR' in os.environ:  # each test runs in a folder of its own
    os.environ['TIKTOKEN_CACHE_DIR'] = os.path.abspath(os.environ['TIKTOKEN_CACHE_DIR'])

import ast
import base64
import contextlib
import copy
import gc
import http.server
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
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from functorch.compile import make_boxed_func
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import config
import model
import prepare
import sample
from model import FULL, GPT, MXFP4, SLIDING, GPTConfig

torch.set_num_threads(1)  # the same bits in this process as in those that tests start
sys.modules['matplotlib'] = None  # plots are slow
ROOT = Path(__file__).parent
SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=16,
    rope_original_max_position_embeddings=64)
SQUARE = dict(hidden_size=64, intermediate_size=64)  # down_proj has the same shape when it is transposed
FP32 = pytest.param(torch.float32, 1e-5, id='fp32')
BF16 = pytest.param(torch.bfloat16, 0.02, id='bf16')
FP16 = pytest.param(torch.float16, 0.02, id='fp16')


def make(seed=0, module=model, **changes):
    """A small model. No parameter is zero, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    gpt = module.GPT(module.GPTConfig(**SMALL | changes))
    for name, p in gpt.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name), std=0.2)
    return gpt


def adapt(gpt, rank=3):
    """Add adapters, none of which is zero."""
    gpt.add_lora(rank, 2.0 * rank)
    torch.manual_seed(1)
    for name, p in gpt.named_parameters():
        if 'lora.' in name:
            torch.nn.init.normal_(p, std=0.1)
    return gpt


def reference(gpt, path):
    """transformers' model with the same weights, by way of save_pretrained."""
    transformers = pytest.importorskip('transformers')
    gpt.save_pretrained(path)
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation='eager')
    for layer in theirs.model.layers:
        layer.mlp.experts.limit = gpt.config.swiglu_limit  # 5.17 ignores that of the config
    return theirs


def off(ours, theirs):  # relative distance
    return ((ours.float() - theirs).norm() / theirs.norm()).item()


def gradients(gpt):
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


def assert_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        bound = tolerance * expected[name].norm() + 1e-7
        assert (gradient - expected[name]).norm() <= bound, name


@pytest.fixture
def gpu():
    """The device of a test that needs a GPU, and is skipped where there is none. This is not asked while the
    file loads, because the processes that forkserver forks later could not use the GPU."""
    if not torch.cuda.is_available():
        pytest.skip('there is no GPU for CUDA')
    torch._dynamo.reset()
    torch.set_float32_matmul_precision('highest')  # which dtype=tf32 changes
    return 'cuda'


@pytest.fixture(params=['cpu', 'on_gpu'])
def device(request):
    """The device of a test that runs on a CPU, and on a GPU where there is one."""
    return request.getfixturevalue('gpu') if request.param == 'on_gpu' else 'cpu'


# --- part one, and the whole file -------------------------------------------------------------------------

@pytest.fixture(scope='module')
def part_one():
    """The text of part one, by itself, as a module."""
    text = (ROOT / 'model.py').read_text(encoding='utf-8').split('\n# Part two')[0]
    assert text.count('\n') <= 520
    module = ModuleType('part_one')
    exec(text, vars(module))
    module.FAST = False
    return module


@pytest.mark.parametrize('T, changes', [
    (300, {}), (1, {}), (16, {}), (17, {}), (33, dict(head_dim=64)), (600, dict(num_hidden_layers=2)),
    (100, dict(num_key_value_heads=1)), (100, dict(num_key_value_heads=6)), (50, dict(sliding_window=1)),
    (100, dict(num_local_experts=1, num_experts_per_tok=1)), (40, dict(swiglu_limit=1.0)),
    (20, dict(num_local_experts=64, num_experts_per_tok=1)), (100, dict(tie_word_embeddings=True)),
    (100, dict(num_local_experts=8, num_experts_per_tok=8)), (100, dict(layer_types=[FULL, FULL, SLIDING])),
    (100, dict(rope_factor=1.0)), (100, dict(rope_truncate=True)),
    (100, dict(hidden_size=40, intermediate_size=56))], ids=str)
def test_parity(T, changes, device, part_one, tmp_path, monkeypatch):
    """Logits, loss and all gradients in fp32, past the window (16) and YaRN's original context (64): those of
    transformers, and of part one by itself, are those of the whole file with and without its fast ways."""
    tolerance = 2e-5 if device == 'cpu' else 1e-4  # CUDA's pow, in RoPE, is less exact
    theirs = reference(make(**changes), tmp_path).to(device)
    idx, targets = torch.randint(97, (2, 2, T)).to(device)
    targets[1, :T // 3] = -1
    expected_logits = theirs(idx).logits
    expected_loss = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected_loss.backward()
    results = []
    for module, fast in ((model, True), (model, False), (part_one, False)):
        monkeypatch.setattr(model, 'FAST', fast)
        gpt = make(module=module, **changes).to(device)
        logits, loss = gpt(idx, targets)
        loss.backward()
        results.append((logits, gradients(gpt), gpt.generate(idx, 8, temperature=0)))
        assert (logits - expected_logits).abs().max() <= tolerance
        assert abs(loss - expected_loss) <= 1e-5
        assert_gradients(gradients(gpt), gradients(theirs), tolerance)
        check_loss_alone(gpt, idx, targets, expected_loss, gradients(gpt))
    for logits, found, text in results[1:]:
        assert off(logits, results[0][0]) < 1e-5
        assert torch.equal(text, results[0][2])
        assert_gradients(found, results[0][1], tolerance)


def check_loss_alone(gpt, idx, targets, expected_loss, expected):
    """Without logits, the loss and its gradients are the same. count replaces the number of targets."""
    gpt.zero_grad()
    loss = gpt(idx, targets, return_logits=False)[1]
    assert abs(loss - expected_loss) <= 1e-5
    (3 * loss).backward()
    found = {name: gradient / 3 for name, gradient in gradients(gpt).items()}
    assert_gradients(found, expected, 1e-5)
    for return_logits in (True, False):
        loss = gpt(idx, targets, return_logits, torch.tensor(7))[1]
        assert abs(loss * 7 / (targets >= 0).sum() - expected_loss) <= 1e-5
        assert gpt(idx, targets * 0 - 1, return_logits)[1] == 0  # no target


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shard_size', ['100KB', '1GB'])
def test_published(dtype, shard_size, part_one, tmp_path):
    """What transformers saves is a state_dict of ours, also of part one by itself, and trains on."""
    theirs = reference(make(), tmp_path / 'config')
    del theirs.config.training_router_aux_loss_coef
    theirs.config.router_aux_loss_coef = 0.9  # gpt-oss's, which is not in use
    theirs = type(theirs)(theirs.config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    weights = {}
    for file in tmp_path.glob('*.safetensors'):
        weights |= load_file(file)
    assert (tmp_path / 'model.safetensors').exists() == (shard_size == '1GB')
    assert model.read_shape(tmp_path) == (GPTConfig(**SMALL), {})
    idx = torch.randint(97, (2, 100))
    expected = theirs.float().eval()(idx).logits
    for module in (model, part_one):
        gpt = make(module=module)
        gpt.load_state_dict(weights)
        logits, start = gpt(idx, idx)
        assert (logits - expected).abs().max() <= 1e-4
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.01)
        for _ in range(5):
            gpt(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert gpt(idx, idx)[1] < 0.9 * start


# --- attention --------------------------------------------------------------------------------------------

def check_attention(function, T, window, dtype, tolerance, KV=2, hd=16, device='cpu'):
    """Values and gradients of fast_attention in this dtype against part one's definition in fp32."""
    torch.manual_seed(0)
    shapes = (2, T, 6, hd), (2, T, KV, hd), (2, T, KV, hd), (6,)
    inputs = [torch.randn(shape).to(device, dtype).float().requires_grad_() for shape in shapes]
    weight = torch.randn(2, T, 6, hd).to(device)
    y = function(*(x.to(dtype) for x in inputs), window, 0.0)
    found = torch.autograd.grad((y.float() * weight).sum(), inputs)
    expected_y = model.attention(*inputs, model.visible_keys(T, T, window, device))
    expected = torch.autograd.grad((expected_y * weight).sum(), inputs)
    assert y.dtype == dtype and off(y, expected_y) < tolerance
    for gradient, theirs in zip(found, expected):
        assert off(gradient, theirs) < tolerance or theirs.norm() < 1e-5


@pytest.mark.parametrize('dtype, tolerance', [FP32, BF16])
@pytest.mark.parametrize('T, window', [  # blocks have 512 queries, or a window's but at least 128
    (1, None), (1, 1), (1, 8), (9, 8), (37, 8), (40, None), (40, 8), (40, 64), (127, 16), (128, 16), (129, 1),
    (129, 16), (256, 200), (385, 128), (450, 150), (511, None), (512, None), (513, None), (1025, None)])
@pytest.mark.parametrize('way', ['cpu', 'blocks', 'cuda', 'cuda kernel'])
def test_fast_attention(way, T, window, dtype, tolerance, request, monkeypatch):
    """CPUs' kernel, blocks without one, what CUDA takes (in fp32 blocks), and its kernel in fp32 too."""
    calls = request.getfixturevalue('cuda') if 'cuda' in way else []
    if way != 'cuda':
        monkeypatch.setattr(model, 'can_flash', lambda q: way != 'blocks')
    check_attention(model.fast_attention, T, window, dtype, tolerance)
    once = way == 'cuda kernel' or way == 'cuda' and dtype == torch.bfloat16
    assert len(calls) == once  # all queries at once


def make_mask(q, left, right):
    """FlashAttention's: queries see `left` keys before their own, all if it is -1, and `right` after it."""
    distance = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))
    hidden = (distance < -right) | ((distance > left) & (left >= 0))
    return torch.where(hidden, -math.inf, 0.0).to(q.dtype)


@pytest.fixture
def cuda(monkeypatch):
    """Each tensor says that it is on a GPU of sm100. CPUs compute what its kernels do. Yields their calls."""
    calls = []
    grouped_mm = F.grouped_mm

    def forward(q, k, v, *_, scale, window_size_left, window_size_right):
        calls.append('flash')
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False,
            attn_mask=make_mask(q, window_size_left, window_size_right), scale=scale)
        state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return y.transpose(1, 2).contiguous(), lse.contiguous(), *state, torch.zeros(0)

    def backward(dy, q, k, v, y, lse, *_, scale, window_size_left, window_size_right):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (dy, q, k, v, y)), lse, 0.0, False,
            attn_mask=make_mask(q, window_size_left, window_size_right), scale=scale)
        return tuple(x.transpose(1, 2).contiguous() for x in gradients)

    def multiply(x, w, offs):
        calls.append('grouped')
        if w.requires_grad:  # the gradient of experts without rows is garbage on sm100
            empty = offs.diff(prepend=offs[:1] * 0) == 0
            w.register_hook(lambda gradient: gradient.masked_fill(empty[:, None, None], 9e9))
        return grouped_mm(x, w, offs=offs)

    patch = monkeypatch.setattr
    yes = torch._dynamo.variables.ConstantVariable.create(True)
    patch(torch._dynamo.variables.TensorVariable, 'method_attr_is_cuda', lambda *_: yes)  # in the compiler
    patch(torch.Tensor, 'is_cuda', property(lambda x: True))
    patch(torch.backends.cuda, 'is_flash_attention_available', lambda: True)
    patch(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(major=10))
    patch_graphs(patch)
    patch(F, 'grouped_mm', multiply)
    library = torch.library.Library('aten', 'IMPL')
    library.impl('_flash_attention_forward', forward, 'CPU')
    library.impl('_flash_attention_backward', backward, 'CPU')
    yield calls
    library._destroy()


@pytest.mark.parametrize('way, T, window', [('cuda', 40, None), ('cuda', 37, 8), ('blocks', 150, 8)])
def test_compiled_attention(way, T, window, request, monkeypatch):
    if way == 'cuda':
        request.getfixturevalue('cuda')
    monkeypatch.setattr(model, 'can_flash', lambda q: way == 'cuda')
    torch._dynamo.reset()
    compiled = torch.compile(model.fast_attention, backend='aot_eager', fullgraph=True)
    check_attention(compiled, T, window, torch.bfloat16, 0.02)


@pytest.mark.parametrize('T, window', [(100, None), (100, 16), (600, None), (300, 16)])
def test_attention_dropout(T, window):
    """One block (T = 100) has the definition's draws, several its mean and spread. Backward repeats them."""
    torch.manual_seed(0)
    q = torch.randn(1, T, 2, 8)
    k, v = torch.randn(2, 1, T, 1, 8).requires_grad_().unbind()
    sinks = torch.randn(2)
    visible = model.visible_keys(T, T, window)
    exact = model.attention(q, k, v, sinks, visible)
    draws = []
    for function, keys in ((model.attention, visible), (model.fast_attention, window)):
        torch.manual_seed(1)
        y = torch.stack([function(q, k, v, sinks, keys, 0.3) for _ in range(20)])
        total = (y * torch.randn_like(y)).sum()
        dv, = torch.autograd.grad(total, v, retain_graph=True)
        assert (dv * v).sum().item() == pytest.approx(total.item(), rel=1e-3)  # because y is linear in v
        assert off(y.mean(0), exact) < 0.2
        draws.append(y)
    assert torch.equal(*draws) == (T == 100)
    assert off((draws[0] - exact).norm(), (draws[1] - exact).norm()) < 0.03


# --- experts and loss -------------------------------------------------------------------------------------

def make_experts(rows, kind='plain', limit=7.0, device='cpu'):
    """Experts, and their inputs and choices for rows tokens. Two of the five experts get none."""
    gpt = make(num_hidden_layers=1, hidden_size=64, intermediate_size=32, swiglu_limit=limit)
    if kind == 'adapted':
        adapt(gpt, 8)
    experts = gpt.model.layers[0].mlp.experts
    if kind == 'packed':
        for name in model.STACKS:
            stack = MXFP4.pack(getattr(experts, name))
            delattr(experts, name)
            setattr(experts, name, stack)
    x = torch.randn(rows, 64).to(device).requires_grad_()
    router_weights = torch.rand(rows, 2).to(device).requires_grad_()
    chosen = [torch.tensor([0, 2, 3])[torch.randperm(3)[:2]] for _ in range(rows)]
    return experts.to(device), x, torch.stack(chosen).to(device), router_weights


def check_experts(kind, way, rows, dtype, tolerance, device='cpu'):
    """Values and gradients of experts in this dtype against the definition in fp32. A way is forced, or the
    one that the device takes."""
    limit = 1.0 if dtype == torch.float32 else 7.0  # in 16 bits rounding decides what a clamp reaches
    experts, x, chosen, router_weights = make_experts(rows, kind, limit, device)
    wanted = [x, router_weights, *(p for p in experts.parameters() if p.requires_grad)]
    weight = torch.randn_like(x)
    with mock.patch.object(model, 'FAST', False):
        expected_y = experts(x, chosen, router_weights)
    expected = torch.autograd.grad((expected_y * weight).sum(), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, 'FAST', way != 'defined')
        if way in ('gathered', 'grouped', 'looped'):
            patch.setattr(model, 'can_gather', lambda experts, x: way == 'gathered')
            patch.setattr(model, 'can_group', lambda experts, rows: way == 'grouped')
        inputs = x.to(dtype), chosen, router_weights.to(dtype)
        y = experts(*inputs)
        with torch.no_grad():
            evaluated = experts.eval()(*inputs)
    assert y.dtype == dtype and off(y, expected_y) < tolerance
    assert off(evaluated, expected_y) < tolerance
    for gradient, theirs in zip(torch.autograd.grad((y.float() * weight).sum(), wanted), expected):
        assert off(gradient, theirs) < tolerance
        assert len(gradient) != 5 or not gradient[[1, 4]].any()  # no rows, no gradient


@pytest.mark.parametrize('dtype, tolerance', [FP32, BF16, FP16])
@pytest.mark.parametrize('rows', [1, 3, 300])
@pytest.mark.parametrize('kind, way', [
    ('plain', 'defined'), ('plain', 'gathered'), ('plain', 'grouped'), ('plain', 'looped'), ('plain', 'cpu'),
    ('plain', 'cuda'), ('packed', 'gathered'), ('packed', 'looped'), ('packed', 'cpu'), ('packed', 'cuda'),
    *(('adapted', way) for way in ('gathered', 'grouped', 'looped', 'cpu', 'cuda'))])
def test_experts(kind, way, rows, dtype, tolerance, request):
    """Each way that can be forced, and those that CPUs and CUDA take."""
    calls = request.getfixturevalue('cuda') if way == 'cuda' else []
    check_experts(kind, way, rows, dtype, tolerance)
    if kind == 'plain' and way == 'cuda' and dtype == torch.bfloat16:
        assert calls == ['grouped'] * (4 if rows == 300 else 2)  # evaluation gathers few rows


def test_balance_loss():
    """1 when every expert is as likely, and transformers' for one layer over k. Evaluation counts nothing."""
    modeling = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
    gpt = make(num_hidden_layers=1, router_aux_loss_coef=0.5)
    idx = torch.randint(97, (2, 40))
    router = gpt.model.layers[0].mlp.router
    logits = []
    router.register_forward_hook(lambda module, x, y: logits.append(y))
    loss = gpt(idx, idx)[1]
    expected = modeling.load_balancing_loss_func((logits[0],), num_experts=5, top_k=2).item() / 2
    assert (loss - gpt.eval()(idx, idx)[1]).item() == pytest.approx(0.5 * expected, rel=1e-4)
    assert gpt.balance.item() == pytest.approx(expected, rel=1e-4)
    assert gpt.expert_load.tolist() == [logits[0].topk(2).indices.flatten().bincount(minlength=5).tolist()]
    gpt.reset_counters()
    assert not gpt.expert_load.any() and not gpt.balance
    torch.nn.init.zeros_(router.weight)
    torch.nn.init.zeros_(router.bias)
    gpt.train()(idx, idx)
    assert gpt.balance.item() == pytest.approx(1)


@pytest.mark.parametrize('dtype, tolerance', [pytest.param(torch.float32, 1e-4, id='fp32'), BF16, FP16])
def test_loss_in_chunks(dtype, tolerance, device):
    """A vocabulary so large that the rows are divided into chunks: F.cross_entropy's value and gradients."""
    torch.manual_seed(0)
    chunk = 64 if device == 'cpu' else 512
    x = torch.randn(chunk + 12, 8).to(device, dtype).requires_grad_()
    w = torch.randn(2 ** 18, 8).to(device).requires_grad_()
    targets = torch.randint(-1, len(w), (len(x),)).to(device)
    loss = model.LinearCrossEntropy.apply(x, w, targets, True)
    expected_loss = F.cross_entropy(x.float() @ w.T, targets, ignore_index=-1, reduction='sum')
    found = torch.autograd.grad(loss, (x, w))
    expected = torch.autograd.grad(expected_loss, (x, w))
    assert off(loss, expected_loss) < tolerance
    assert off(found[0], expected[0].float()) < tolerance
    assert off(found[1], expected[1]) < tolerance


def test_loss_in_float16(device):
    """Gradients that are sums over many rows, and a large factor of the loss, do not exceed float16."""
    x = torch.full((2 ** 16, 4), 8.0, device=device)
    w = torch.randn(3, 4, device=device)
    targets = torch.arange(len(x), device=device) % 2
    gradients = []
    for dtype in (torch.float16, torch.float32):
        inputs = x.to(dtype).requires_grad_(), w.clone().requires_grad_()
        loss = model.LinearCrossEntropy.apply(*inputs, targets, True)
        gradients.append(torch.autograd.grad(loss / len(x) * 2 ** 17, inputs))
    assert off(gradients[0][0], gradients[1][0]) < 0.01
    assert off(gradients[0][1], gradients[1][1]) < 0.01


# --- the whole model in other ways ------------------------------------------------------------------------

def check_autocast(dtype, bounds, device='cpu', compiled=False, recompute=False, **changes):
    """Logits and the gradients of matrices are within these bounds of fp32, with and without logits."""
    # every expert is chosen, because rounding decides where the router's choice is close
    gpt = make(num_hidden_layers=2, num_experts_per_tok=5, **changes).to(device)
    idx, targets = torch.randint(97, (2, 2, 300)).to(device)
    exact, exact_loss = gpt(idx, targets)
    exact_loss.backward()
    expected = gradients(gpt)
    gpt.recompute = recompute
    run = torch.compile(gpt, dynamic=False, fullgraph=True) if compiled else gpt
    for return_logits in (True, False):
        gpt.zero_grad()
        with torch.autocast(device, dtype):
            logits, loss = run(idx, targets, return_logits)
        (1024 * loss).backward()  # because float16 has no small numbers
        assert loss.dtype == torch.float32
        assert abs(loss - exact_loss) < torch.finfo(dtype).eps
        assert not return_logits or logits.dtype == dtype and off(logits, exact) < bounds[0]
        for name, gradient in gradients(gpt).items():
            error = off(gradient / 1024, expected[name])
            assert name.endswith(('bias', 'sinks')) or error < bounds[1], name


def test_bf16():
    """Autocast to bf16: within 4 % of fp32 in logits, 12 % in a matrix's gradient; transformers': 3.3, 11."""
    check_autocast(torch.bfloat16, (0.04, 0.12))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_decoding(dtype):
    """The step that `generate(compile=True)` compiles is as near to fp32 as the eager one."""
    # every expert is chosen, because rounding decides where the router's choice is close
    gpt = make(num_experts_per_tok=5, num_hidden_layers=2).eval().to(dtype)
    exact = copy.deepcopy(gpt).float()
    idx = torch.randint(97, (3, 24))
    torch._dynamo.reset()
    compiled = torch.compile(gpt.next_logits, backend='aot_eager', fullgraph=True)
    results = []
    for one, step in ((gpt, compiled), (gpt, gpt.next_logits), (exact, exact.next_logits)):
        caches = one.make_caches(idx, 40)
        with torch.no_grad():
            one.next_logits(idx[:, :20], caches)
            results.append(torch.stack([step(token, caches) for token in idx[:, 20:].split(1, dim=1)]))
    error, eager_error = (off(logits, results[2]) for logits in results[:2])
    assert error < (1e-4 if dtype == torch.float32 else 1.5 * eager_error)


def patch_graphs(patch):
    patch(torch.cuda, 'device_of', lambda x: contextlib.nullcontext())
    patch(torch.cuda, 'CUDAGraph', Recorded)
    patch(torch.cuda, 'graph', lambda graph, stream: graph)
    patch(torch.cuda, 'Stream', lambda device: None)


class Recorded(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: repeats the operators of a step on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.changed = []  # tensors and their values before, because capturing computes nothing

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        assert call != torch.ops.aten._local_scalar_dense.default  # for which the host would wait
        changes = call._schema.is_mutable
        if changes:
            self.changed.append((args[0], args[0].clone()))
        outputs = call(*args, **kwargs or {})
        if changes or not any(one.alias_info for one in call._schema.returns):  # no view
            self.calls.append((call, args, kwargs or {}, outputs))
        return outputs

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.changed):
            tensor.copy_(value)

    def replay(self):
        for call, args, kwargs, outputs in self.calls:
            for tensor, value in zip(tree_leaves(outputs), tree_leaves(call(*args, **kwargs))):
                tensor.copy_(value)


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('kind', ['cpu', 'plain', 'packed', 'adapted'])
def test_graphs_of_decoding(kind, compile, monkeypatch, request):
    """A step of one token, compiled, captured as on a GPU, or both, draws what the plain steps do. Prompts of
    all lengths need one graph: of a CPU's whole step, or of a GPU's layers, sliding and full alike."""
    make(num_hidden_layers=2, **SQUARE).save_pretrained('model', experts='mxfp4')
    gpt = GPT.from_pretrained('model', torch.float32, experts='mxfp4' if kind == 'packed' else None)
    gpt = adapt(gpt) if kind == 'adapted' else gpt
    prompts = [torch.randint(97, (3, length)) for length in (1, 9, 20, 200, 600, 1100)]
    expected = [gpt.generate(idx, 4, temperature=0) for idx in prompts]
    if kind != 'cpu':
        request.getfixturevalue('cuda')
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    for idx, text in zip(prompts, expected):
        assert torch.equal(gpt.generate(idx, 4, temperature=0, compile=compile), text)
    assert len(graphs) == compile


@pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'recomputed'])
def test_another_way_to_train(compiled):
    """Compiled, or with activation checkpointing: loss, gradients and counters of the plain model."""
    gpt = make(num_hidden_layers=2, dropout=0.0 if compiled else 0.2, router_aux_loss_coef=0.1)
    idx = torch.randint(97, (2, 40))
    torch._dynamo.reset()
    results = []
    for run in (gpt, torch.compile(gpt, backend='aot_eager') if compiled else gpt):
        gpt.zero_grad()
        gpt.reset_counters()
        torch.manual_seed(1)
        loss = run(idx, idx, return_logits=False)[1]
        loss.backward()
        results.append(dict(loss=loss, balance=gpt.balance, load=gpt.expert_load) | gradients(gpt))
        gpt.recompute = not compiled
    torch.testing.assert_close(*results, rtol=1e-4 if compiled else 1e-6, atol=1e-6)
    assert compiled or gpt(idx, idx)[1] != loss  # without the seed dropout is another


@pytest.mark.parametrize('flash', [True, False], ids=['flash', 'blocks'])
def test_nothing_is_quadratic(flash, monkeypatch):
    """Twice the context doubles the largest tensor that is kept for backward. None is (T, T) or (T, V)."""
    monkeypatch.setattr(model, 'can_flash', lambda q: flash)

    def keep(x):
        sizes.append(x.untyped_storage().nbytes())

    largest = []
    for vocab_size, T in ((97, 1024), (97, 2048), (50000, 2048)):
        sizes = []
        gpt = make(vocab_size=vocab_size)
        idx = torch.randint(97, (1, T))
        with torch.autograd.graph.saved_tensors_hooks(keep, print):
            gpt(idx, idx, return_logits=False)
        largest.append(max(sizes))
    assert largest[1] < min(2.1 * largest[0], 4 * 2048 ** 2)
    assert largest[2] < 4 * 2048 * 50000 / 2


# --- cache and sampling -----------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(num_key_value_heads=1), dict(sliding_window=1)], ids=str)
@pytest.mark.parametrize('prompt', [1, 15, 16, 40])
def test_cache(prompt, changes, device):
    """Decoding past the window gives the whole sequence's states. Sliding layers keep their window's keys."""
    gpt = make(**changes).eval().to(device)
    idx = torch.randint(97, (2, 70)).to(device)
    caches = gpt.make_caches(idx, 70)
    parts = idx[:, :prompt], *idx[:, prompt:].split(1, dim=1)
    with torch.inference_mode():
        states = [gpt.hidden_states(part, caches)[0] for part in parts]
        expected = gpt.hidden_states(idx)[0]
    torch.testing.assert_close(torch.cat(states, dim=1), expected, rtol=0, atol=1e-4)
    for cache, layer_type in zip(caches, gpt.config.layer_types):
        assert cache.k.size(2) == (gpt.config.sliding_window if layer_type == SLIDING else 70)
        assert cache.position == 70


@pytest.mark.parametrize('fast', [True, False])
def test_prompt_that_goes_on(fast, monkeypatch):
    """Tokens that follow those in the caches see what they would see in one prompt."""
    monkeypatch.setattr(model, 'FAST', fast)
    gpt = make().eval()
    idx = torch.randint(97, (2, 60))
    expected = gpt(idx, idx)[0]
    caches = gpt.make_caches(idx, 60)
    for start, stop in ((0, 5), (5, 12), (12, 37), (37, 38), (38, 60)):
        for cache in caches:
            cache.position.fill_(start)
        torch.testing.assert_close(gpt.next_logits(idx[:, start:stop], caches), expected[:, stop - 1])


def test_generate():
    gpt = make()
    idx = torch.randint(97, (3, 5))
    greedy = gpt.generate(idx, 30, temperature=0)
    assert gpt.training and greedy.shape == (3, 35)
    assert torch.equal(greedy[:, :5], idx)
    gpt.eval()
    for t in range(5, 35):
        assert torch.equal(gpt(greedy[:, :t])[0][:, -1].argmax(-1), greedy[:, t])
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-6)):
        assert torch.equal(gpt.generate(idx, 30, **narrow), greedy)
    torch.manual_seed(1)
    assert gpt.generate(idx, 30)[:, 5:].max() >= 9 > gpt.generate(idx, 30, vocab_size=9)[:, 5:].max()
    drawn = gpt.generate(idx, 30, vocab_size=9, banned={1, 2, 4})[:, 5:]
    assert set(drawn.unique().tolist()) == {0, 3, 5, 6, 7, 8}
    gpt.train()
    next(gpt.stream(idx, 30))
    assert gpt.training  # a stream that is left early ends evaluation mode too


def test_context():
    """With a context, full attention is sliding attention with that window. The prompt keeps its end."""
    gpt = make(layer_types=[FULL] * 3)
    sliding = make(layer_types=[SLIDING] * 3, sliding_window=30)
    idx = torch.randint(97, (4, 50))
    text = gpt.generate(idx, 40, temperature=0, context=30)
    expected = sliding.generate(idx[:, 20:], 40, temperature=0)
    assert torch.equal(text[:, 20:], expected)


@pytest.mark.parametrize('temperature, top_k, top_p, min_p, expected', [
    (1.0, None, None, None, [0.5, 0.2, 0.15, 0.1, 0.05]),
    (1.0, 2, None, None, [5 / 7, 2 / 7, 0, 0, 0]),
    (1.0, None, 0.6, None, [5 / 7, 2 / 7, 0, 0, 0]),
    (1.0, None, None, 0.35, [5 / 7, 2 / 7, 0, 0, 0]),
    (0.5, None, None, None, [0.7692, 0.1231, 0.0692, 0.0308, 0.0077])])  # squares
def test_sampling_distribution(temperature, top_k, top_p, min_p, expected):
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().expand(20000, 5)
    drawn = model.draw(logits, temperature, top_k, top_p, min_p)
    assert (drawn.flatten().bincount(minlength=5) / 20000).tolist() == pytest.approx(expected, abs=0.02)


# --- optimizers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('muon_lr', [0, 0.02])
def test_optimizers(muon_lr):
    """Every parameter has one optimizer: Muon the matrices of the layers. Only matrices decay."""
    gpt = make()
    names = {p: name for name, p in gpt.named_parameters()}
    optimizers = gpt.configure_optimizers(1e-3, muon_lr, (0.9, 0.95), 0.1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [group['weight_decay'] for group in groups[:2]] == [0.1, 0]
    decayed, rest, *hidden = [[names[p] for p in group['params']] for group in groups]
    hidden = list(itertools.chain(*hidden))
    assert sorted(decayed + rest + hidden) == sorted(names.values())
    assert len(hidden) == (7 * 3 if muon_lr else 0)
    assert len(decayed + hidden) == 7 * 3 + 2
    for name in decayed + hidden:
        assert 'norm' not in name and not name.endswith(('bias', 'sinks'))


def divide(tensor, pieces):
    """Views of the matrices (out, in) in a Linear's or experts' tensor."""
    if tensor.dim() == 2:
        return [tensor]
    return [matrix[:, i::pieces].mT for matrix in tensor for i in range(pieces)]


def test_muon(monkeypatch):
    """torch.optim.Muon on each matrix by itself: q, k, v, o, router, and each expert's gate, up and down."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    def orthogonalize(x, pieces):  # ours has a test of its own
        y = torch.empty_like(x)
        for i, piece in itertools.product(range(len(x)), range(pieces)):
            part = i, slice(None), slice(piece, None, pieces)
            y[part] = _zeropower_via_newtonschulz(x[part], (3.4445, -4.7750, 2.0315), 5, 1e-7)
        return y

    monkeypatch.setattr(model, 'orthogonalize', orthogonalize)
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)  # torch iterates in bf16, 3 to 8 % off
    monkeypatch.setattr(torch, 'bfloat16', torch.float32)
    muon = make(num_hidden_layers=2).configure_optimizers(0.0, 0.05, (0.9, 0.95), 0.1)[1]
    stacks = []
    for group in muon.param_groups:
        for p in group['params']:
            twin = p.detach().clone()
            matrices = [torch.nn.Parameter(matrix) for matrix in divide(twin, group['pieces'])]
            stacks.append((p, group['pieces'], p.detach().clone(), twin, matrices))
    assert {len(matrices) for *_, matrices in stacks} == {1, 5, 10}
    all_matrices = [matrix for *_, matrices in stacks for matrix in matrices]
    theirs = torch.optim.Muon(all_matrices, lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        for p, pieces, *_, matrices in stacks:
            p.grad = torch.randn_like(p)
            for matrix, gradient in zip(matrices, divide(p.grad, pieces)):
                matrix.grad = gradient
        muon.step()
        theirs.step()
    for p, _, start, twin, _ in stacks:
        assert off(p.detach() - start, twin - start) < 1e-3


def take_muon_steps(layers, mesh=None):
    """Parameters after three steps with given gradients, and the size of each orthogonalization."""
    gpt = make(num_hidden_layers=layers)
    muon = gpt.configure_optimizers(0.0, 0.05, (0.9, 0.95), 0.1, mesh)[1]
    with mock.patch.object(model, 'orthogonalize', wraps=model.orthogonalize) as orthogonalize:
        for _ in range(3):
            for p in gpt.parameters():
                p.grad = torch.randn(p.shape)
            muon.step()
    return gpt.state_dict(), [len(call.args[0]) for call in orthogonalize.call_args_list]


def divide_muon(rank, world, folder):
    """What a process of test_muon_divided does."""
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=world)
    mesh = dist.device_mesh.init_device_mesh('cpu', (world,))
    torch.save(take_muon_steps(5 - world, mesh), folder / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('world', [2, 3])
def test_muon_divided(world, tmp_path):
    """Processes divide Muon's matrices, also where their number is no multiple, and move as one does."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'torch._dynamo', 'torch.distributed.checkpoint'])
    processes = [context.Process(target=divide_muon, args=(rank, world, tmp_path)) for rank in range(world)]
    for process in processes:
        process.start()
    expected, whole = take_muon_steps(5 - world)
    assert any(size % world for size in whole)
    divided = []
    for rank, process in enumerate(processes):
        process.join(120)
        assert process.exitcode == 0
        weights, sizes = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
        divided.append(sizes)
    for size, parts in zip(whole, zip(*divided)):
        assert sum(parts) == size and max(parts) == math.ceil(size / world)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('shape', [(3, 20, 50), (2, 50, 20), (4, 32, 32)])
def test_orthogonalize(shape, dtype, tolerance):
    """The singular vectors stay, the singular values come near 1, those of rank 1 too. Zero stays zero."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1e-4, 1, 1e4, 1])[:shape[0], None, None]
    x[1] = x[1, :, :1] @ x[1, :1]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    y = model.orthogonalize(x.to(dtype))
    values = u.mT @ y.float() @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    there = (s > 0.1 * s[:, :1]).float()
    off_diagonal = (values - torch.diag_embed(diagonal)) * there[:, None] * there[..., None]
    assert off_diagonal.abs().max() < tolerance
    assert diagonal[there > 0].min() > 0.18 and diagonal.max() < 1.9
    mixed = torch.stack((x, torch.zeros(shape)), dim=-1).flatten(2)  # x and zero as pieces that take turns
    mixed = model.orthogonalize(mixed.to(dtype), 2)
    assert torch.equal(mixed[..., 0::2], y) and not mixed[..., 1::2].any()


# --- checkpoints ------------------------------------------------------------------------------------------

def fill_with_mxfp4(gpt):
    """Give the experts random values that MXFP4 holds."""
    for name, p in gpt.named_parameters():
        if name.endswith(model.STACKS):
            magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[torch.randint(8, p.shape)]
            scale = 2.0 ** torch.randint(-7, 0, (len(p), p.size(1) // 32, 1, p.size(2)))
            p.data = p.data.sign() * magnitudes * scale.expand(-1, -1, 32, -1).reshape(p.shape)


def assert_same(gpt, loaded):
    assert loaded.config == gpt.config
    for (name, p), (other, q) in zip(gpt.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(p.to(q.dtype), q), name
    idx = torch.randint(gpt.config.vocab_size, (1, 30))
    ours = copy.deepcopy(gpt).to(loaded.lm_head.weight.dtype).eval()
    torch.testing.assert_close(ours(idx)[0], loaded.eval()(idx)[0])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('experts', [None, 'mxfp4'])
@pytest.mark.parametrize('changes', [
    SQUARE, dict(hidden_size=96, intermediate_size=32, tie_word_embeddings=True, router_aux_loss_coef=0.01)])
def test_writing(changes, experts, dtype, tmp_path):
    """transformers reads what we write, in several files or one, and we read what it writes."""
    transformers = pytest.importorskip('transformers')
    gpt = make(**changes)
    idx = torch.randint(97, (2, 30))
    options = dict(dtype=torch.float32)
    if experts:
        options |= dict(quantization_config=transformers.Mxfp4Config(dequantize=True))
        fill_with_mxfp4(gpt)
    gpt.to(dtype)
    expected = copy.deepcopy(gpt).float()(idx, idx)[0]
    for shard_size in (100_000, 5e9):
        gpt.save_pretrained(tmp_path, dtype, experts, shard_size)
        assert (len(list(tmp_path.glob('model-*-of-*.safetensors'))) > 1) == (shard_size < 1e9)
        assert_same(gpt, GPT.from_pretrained(tmp_path, torch.float32))
        theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path, **options).eval()
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    stored = load_file(tmp_path / 'model.safetensors').values()
    assert {tensor.dtype for tensor in stored} == ({dtype, torch.uint8} if experts else {dtype})
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB')
    assert_same(gpt, GPT.from_pretrained(tmp_path / 'theirs', dtype))


def test_mxfp4_rounds_to_nearest(device):
    """Every element goes to the nearest value at its group's scale, half-way to the even code."""
    torch.manual_seed(1)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.randn(200, 64) * 10.0 ** torch.randint(-20, 20, (200, 1))
    x[:100] = (x[:100] * 8 / x[:100].abs().amax(1, keepdim=True)).round() * 0.25  # half-way, often
    x = torch.cat((x, torch.zeros(1, 64)))
    packed = MXFP4.pack(x.mT[None].to(device)).to('cpu')
    groups = x.double().view(-1, 32)
    unit = 2.0 ** (packed.scales.double().view(-1, 1) - 127)

    def round_to(unit):
        distance = ((groups.abs() / unit)[..., None] - magnitudes).abs() + torch.arange(8) % 2 * 1e-9
        return magnitudes[distance.argmin(-1)] * unit * groups.sign()

    assert torch.equal(packed[0].mT.reshape(-1, 32).double(), round_to(unit))
    errors = torch.stack([(round_to(unit * factor) - groups).square().sum(1) for factor in (0.5, 1, 2)])
    errors = (errors / groups.square().sum(1))[:, 200:400]  # of normally distributed values
    assert errors[1].mean() <= 1.01 * errors.amin(0).mean()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_packed_experts(dtype, tmp_path):
    """experts='mxfp4' computes what unpacking first does, to the bit, and saves the same."""
    make(**SQUARE).save_pretrained(tmp_path)
    idx = torch.randint(97, (2, 30))
    for experts in ('mxfp4', None):  # the folder holds fp32, then MXFP4
        gpt = GPT.from_pretrained(tmp_path, dtype, experts='mxfp4')
        gpt.save_pretrained(tmp_path, dtype, experts, shard_size=50_000)
        full = GPT.from_pretrained(tmp_path, dtype)
        assert torch.equal(gpt(idx, idx)[0], full(idx, idx)[0])
        assert torch.equal(gpt.generate(idx, 9, temperature=0), full.generate(idx, 9, temperature=0))
        assert gpt.num_parameters(active=True) == full.num_parameters(active=True)
        stored = [x.nbytes for name, x in gpt.state_dict().items() if name.endswith(('blocks', 'scales'))]
        assert sum(stored) == 3 * 5 * 3 * 64 * 64 * 17 // 32


def test_saving_weights(tmp_path):
    """A state_dict is saved in place of the model's own tensors, of a model and of adapters."""
    other = make(1)
    make().save_pretrained(tmp_path, weights=other.state_dict(), shard_size=100_000)
    gpt = GPT.from_pretrained(tmp_path, torch.float32)
    assert_same(other, gpt)
    other = adapt(copy.deepcopy(gpt))
    gpt.add_lora(3, 6.0)
    gpt.save_adapter(tmp_path / 'adapter', weights=other.state_dict())
    assert_same(other, GPT.from_pretrained(tmp_path / 'adapter', torch.float32))


def test_saving_over(tmp_path):
    """A checkpoint that cannot be written whole leaves the one that was there, and no other file."""
    good = make(hidden_size=64, intermediate_size=32)
    good.save_pretrained(tmp_path)
    bad = make(1, hidden_size=64, intermediate_size=32)
    bad.model.layers[2].mlp.experts.down_proj.data[0, 0, 0] = math.nan
    narrow = make(hidden_size=24)
    for gpt, experts, words in ((bad, 'mxfp4', 'finite'), (bad, 'int4', 'int4'), (narrow, 'mxfp4', '24')):
        with pytest.raises(ValueError, match=words):
            gpt.save_pretrained(tmp_path, experts=experts, shard_size=1000)
    assert_same(good, GPT.from_pretrained(tmp_path, torch.float32))
    assert sorted(file.name for file in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


@pytest.mark.parametrize('renamed', [0, 1])
def test_killed_while_saving(renamed, tmp_path, monkeypatch):
    """A save over an older checkpoint that ends between renamings leaves both whole. Other files stay."""
    folder = tmp_path / 'a'
    make().save_pretrained(folder, shard_size=1000)
    os.chmod(folder, 0o700)
    write(folder / 'adapter_mine/notes.txt', 'mine')
    with monkeypatch.context() as patch:
        limited = mock.Mock(wraps=model.rename, side_effect=[mock.DEFAULT] * renamed + [KeyboardInterrupt])
        patch.setattr(model, 'rename', limited)
        with pytest.raises(KeyboardInterrupt):
            make(1).save_pretrained(folder)
    new, = tmp_path.glob('a-*/new')
    assert new.stat().st_mode & 0o777 == 0o700
    assert_same(make(1), GPT.from_pretrained(new, torch.float32))
    assert_same(make(), GPT.from_pretrained(new.parent / 'old' if renamed else folder, torch.float32))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(new, folder)
    write(folder / 'adapter_mine/notes.txt', 'mine')
    monkeypatch.chdir(folder)  # the folder is in use, so that it cannot be renamed
    make(2).save_pretrained('.')
    assert_same(make(2), GPT.from_pretrained('.', torch.float32))
    monkeypatch.chdir(tmp_path)
    make(3).save_pretrained(folder, shard_size=1000)
    assert_same(make(3), GPT.from_pretrained(folder, torch.float32))
    assert (folder / 'adapter_mine/notes.txt').read_text() == 'mine'
    assert not (folder / 'model.safetensors').exists()
    with pytest.raises(ValueError, match='notes.txt is a file'):
        make().save_pretrained(folder / 'adapter_mine/notes.txt')


def test_replaced_while_it_is_read(tmp_path, monkeypatch):
    """from_pretrained reads a folder again that is replaced meanwhile, or gone for a moment."""
    make().save_pretrained(tmp_path / 'a', shard_size=1000)
    for seed, gone in ((1, False), (2, True)):
        load_weights = model.load_weights

        def replace(*arguments):
            monkeypatch.setattr(model, 'load_weights', load_weights)
            make(seed).save_pretrained(tmp_path / 'a', shard_size=1000)
            if gone:
                raise ValueError('files are missing')
            load_weights(*arguments)

        monkeypatch.setattr(model, 'load_weights', replace)
        assert_same(make(seed), GPT.from_pretrained(tmp_path / 'a', torch.float32))


def test_busy_folders(tmp_path, monkeypatch):
    """A folder that a reader holds open, as Windows lets it, is renamed a little later."""
    monkeypatch.setattr(model.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(os, 'rename', mock.Mock(wraps=os.rename, side_effect=[PermissionError, mock.DEFAULT]))
    make().save_pretrained(tmp_path / 'a')
    assert_same(make(), GPT.from_pretrained(tmp_path / 'a', torch.float32))


def assert_refused(folder, *words):
    """Loading it raises ValueError with one line, which names the folder and says these words."""
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    message = str(error.value)
    assert all(word in message for word in (str(folder), *words)) and '\n' not in message, message


def test_broken_files(tmp_path):
    """One line says what is wrong with a config, all tensors that do not fit, or that a file is cut short."""
    make().save_pretrained(tmp_path)
    json_file = tmp_path / 'config.json'
    raw = model.read_json(json_file)
    for change, word in ((dict(hidden_size=32), 'embed_tokens'), (dict(head_dim='x'), 'head_dim'),
                         (dict(hidden_act='relu'), 'hidden_act')):
        model.write_json(json_file, raw | change)
        assert_refused(tmp_path, word)
    for name in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                 'num_key_value_heads', 'head_dim', 'num_local_experts', 'num_experts_per_tok'):
        model.write_json(json_file, {key: value for key, value in raw.items() if key != name})
        assert_refused(tmp_path, f'no {name}')
    model.write_json(json_file, [])
    assert_refused(tmp_path, 'config.json')
    original = tmp_path / 'model' / 'original'  # OpenAI's own layout
    original.mkdir(parents=True)
    model.write_json(original / 'config.json', dict(num_hidden_layers=3, num_experts=5))
    assert_refused(original.parent, "OpenAI's original/", 'hub')
    assert_refused(original, "OpenAI's original/", 'hub')
    model.write_json(json_file, raw)
    with pytest.raises(ValueError, match='float16'):  # gpt-oss's width
        GPT.from_pretrained(tmp_path, torch.float16, hidden_size=2880)
    file = tmp_path / 'model.safetensors'
    whole = file.read_bytes()
    tensors = load_file(file)
    del tensors['lm_head.weight']
    save_file(tensors | {'model.norm.weight': torch.ones(7), 'model.extra': torch.ones(2)}, file)
    assert_refused(tmp_path, 'lm_head.weight is missing', 'norm.weight is (7,)', 'model.extra is (2,)')
    for size in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert_refused(tmp_path, file.name)


def test_index(tmp_path):
    """Only files that the index names are read. It may name only files beside it, which have what it says."""
    folder = tmp_path / 'model'
    gpt = make()
    gpt.save_pretrained(folder, shard_size=100_000)
    make(1, num_hidden_layers=2).save_pretrained(tmp_path, shard_size=100_000)  # an older save
    for file in tmp_path.glob('*.safetensors'):
        shutil.copy(file, folder)
    assert len(list(folder.glob('*.safetensors'))) == 4 + 3
    assert_same(gpt, GPT.from_pretrained(folder, torch.float32))
    make(1).save_pretrained(tmp_path / 'single')
    single = shutil.copy(tmp_path / 'single/model.safetensors', folder)
    assert_refused(folder, 'two models')
    Path(single).unlink()
    shutil.copy(folder / 'model.safetensors.index.json', tmp_path / 'single')  # without its shards
    assert_same(make(1), GPT.from_pretrained(tmp_path / 'single', torch.float32))
    names = dict.fromkeys(load_file(tmp_path / 'single/model.safetensors'), 'model.safetensors')
    model.write_json(tmp_path / 'single/model.safetensors.index.json', dict(weight_map=names))
    assert_same(make(1), GPT.from_pretrained(tmp_path / 'single', torch.float32))
    index = folder / 'model.safetensors.index.json'
    weight_map = model.read_json(index)['weight_map']
    for file in ('missing', '../model.safetensors', str(tmp_path / 'model.safetensors'), '.', 3, None):
        model.write_json(index, dict(weight_map=weight_map | dict(extra=file)))
        assert_refused(folder, str(index), repr(file))
    for raw in ({}, dict(weight_map=None), dict(weight_map=['extra'])):
        model.write_json(index, raw)
        assert_refused(folder, str(index), 'weight_map')
    other = weight_map['model.layers.1.self_attn.sinks']
    for name in ('extra', 'lm_head.weight'):  # which this file does not hold
        model.write_json(index, dict(weight_map=weight_map | {name: other}))
        assert_refused(folder, f'has no {name}')


def test_model_alone(tmp_path):
    """model.py works alone in a folder, without safetensors. Saving says what to install."""
    shutil.copy(ROOT / 'model.py', tmp_path)
    (tmp_path / 'safetensors.py').write_text('raise ImportError')
    script = 'import model; model.GPT(model.GPTConfig(vocab_size=9)).save_pretrained("saved")'
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ImportError') and 'pip install safetensors' in last, done.stderr


# --- adapters ---------------------------------------------------------------------------------------------

def test_lora(device):
    """W + alpha / rank * B A on each matrix of attention and experts. merge_lora leaves a plain model."""
    gpt = adapt(make().to(device))
    plain = make().to(device)
    idx = torch.randint(97, (2, 40)).to(device)
    named = [(name, p) for name, p in gpt.named_parameters() if 'lora' in name]
    adapters = {name: p.detach().clone().requires_grad_() for name, p in named}
    merged = {}
    for name, p in plain.named_parameters():
        lora = name.replace('.weight', '.lora').replace('experts', 'experts.lora')
        if f'{lora}.lora_A.weight' in adapters:
            a, b = adapters[f'{lora}.lora_A.weight'], adapters[f'{lora}.lora_B.weight']
            if 'experts' in name:  # A has the experts one after another, in B they take turns
                product = torch.einsum('eri,ore->eio', a.view(5, 3, -1), b.view(-1, 3, 5))
            else:
                product = b @ a
            merged[name] = p.detach() + 2 * product
    assert len(merged) == 6 * 3 and len(adapters) == 2 * 6 * 3
    loss = gpt(idx, idx, return_logits=False)[1]
    loss.backward()
    expected_loss = torch.func.functional_call(plain, merged, (idx, idx))[1]
    expected = torch.autograd.grad(expected_loss, list(adapters.values()))
    assert abs(loss - expected_loss) < 1e-5
    assert_gradients(gradients(gpt), dict(zip(adapters, expected)), 1e-4)
    optimizer, = gpt.configure_optimizers(1e-3, 0.01, (0.9, 0.95), 0.1)  # AdamW, of the adapters alone
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(adapters)
    gpt.merge_lora()
    assert list(map(type, gpt.modules())) == list(map(type, plain.modules()))
    assert gpt.lora is None
    assert all(p.requires_grad for p in gpt.parameters())
    torch.testing.assert_close(gpt.state_dict(), plain.state_dict() | merged)


@pytest.mark.parametrize('experts', [None, 'mxfp4'])
def test_adapter_files(experts, tmp_path):
    """Adapters are saved apart from their base, with the overrides that it was loaded with."""
    idx = torch.randint(97, (2, 30))
    base = tmp_path / 'base'
    folder = tmp_path / 'adapter'
    make(hidden_size=64, intermediate_size=32).save_pretrained(base, experts='mxfp4')
    plain = GPT.from_pretrained(base, torch.float32, sliding_window=3)
    gpt = GPT.from_pretrained(base, torch.float32, experts=experts, sliding_window=3)
    new = copy.deepcopy(gpt)
    new.add_lora(3, 6.0)
    assert off(new(idx)[0], plain(idx)[0]) < 1e-5
    assert new.recompute == bool(experts)
    for one in (gpt, plain):
        adapt(one)(idx, idx)[1].backward()
    assert_gradients(gradients(gpt), gradients(plain), 1e-6)
    assert gpt.expert_load.sum() == 3 * idx.numel() * 2
    gpt.save_adapter(folder)
    size = sum(p.nbytes for p in gpt.parameters() if p.requires_grad)
    assert sum(file.stat().st_size for file in folder.iterdir()) < size + 10000
    loaded = GPT.from_pretrained(folder, torch.float32, experts=experts)
    assert torch.equal(loaded(idx)[0], gpt(idx)[0])
    assert loaded.config.sliding_window == 3
    assert model.read_shape(folder) == (loaded.config, dict(lora_rank=3, lora_alpha=6.0))
    for words, wrong in (
            ('whole model', lambda: gpt.save_adapter(base)), ('already', lambda: gpt.add_lora(3, 6.0)),
            ('49', lambda: make().add_lora(49, 1.0)), ('merge', lambda: gpt.save_pretrained(folder)),
            ('a saved model', lambda: adapt(make()).save_adapter(folder)), ('MXFP4', gpt.merge_lora)):
        if experts or words != 'MXFP4':
            with pytest.raises(ValueError, match=words):
                wrong()


def test_broken_adapters(tmp_path):
    make().save_pretrained(tmp_path / 'base')
    folder = tmp_path / 'adapter'
    adapt(GPT.from_pretrained(tmp_path / 'base')).save_adapter(folder)
    json_file = folder / 'adapter_config.json'
    raw = model.read_json(json_file)
    changes = dict(r=2, lora_alpha=None, overrides=dict(foo=1), base_model_name_or_path='none')
    for key, value in changes.items():
        model.write_json(json_file, raw | {key: value})
        assert_refused(folder)
    model.write_json(json_file, raw | dict(base_model_name_or_path=str(folder)))
    for load in (GPT.from_pretrained, model.read_shape):  # which it names as its own base
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert len(str(caught.value)) < 1000
    model.write_json(json_file, raw)
    file = folder / 'adapter_model.safetensors'
    adapters = load_file(file)
    save_file(adapters | {'base_model.model.lm_head.lora_A.weight': torch.ones(3, 48)}, file)
    assert_refused(folder, 'lm_head.lora_A')
    del adapters['base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight']
    save_file(adapters, file)
    assert_refused(folder, 'lacks lora_A or lora_B')


def test_peft(tmp_path):
    """PEFT computes the same with our adapters, we with its. Options that we lack are refused by name."""
    peft = pytest.importorskip('peft')
    idx = torch.randint(97, (2, 30))
    theirs = reference(make(), tmp_path / 'base')
    gpt = adapt(GPT.from_pretrained(tmp_path / 'base', torch.float32)).eval()
    gpt.save_adapter(tmp_path / 'ours')
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'ours', is_trainable=True).eval()
    torch.testing.assert_close(theirs(idx).logits, gpt(idx, idx)[0], atol=2e-5, rtol=0)
    theirs(idx, labels=idx).loss.backward()
    for p in theirs.parameters():
        if p.grad is not None:
            p.data -= p.grad
    assert off(theirs(idx).logits, gpt(idx, idx)[0]) > 0.1
    folder = tmp_path / 'theirs'
    theirs.save_pretrained(folder)
    loaded = GPT.from_pretrained(folder, torch.float32).eval()
    torch.testing.assert_close(theirs(idx).logits, loaded(idx, idx)[0], atol=2e-5, rtol=0)
    raw = model.read_json(folder / 'adapter_config.json')
    options = dict(use_rslora=True, use_dora=True, alpha_pattern=dict(q_proj=3), bias='all',
                   modules_to_save=['lm_head'], init_lora_weights='pissa', peft_type='IA3')
    for option in options:
        model.write_json(folder / 'adapter_config.json', raw | {option: options[option]})
        assert_refused(folder, option)


# --- how the scripts are run ------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The current folder of each test."""
    monkeypatch.chdir(tmp_path)


def run(script, *flags, status=0, **settings):
    """Run a script in this process, which must end with this status -> its output, errors and globals."""
    flags = [*map(str, flags), *(f'--{key}={value}' for key, value in settings.items())]
    out = io.StringIO()
    err = io.StringIO()
    names = {}
    ended = 0
    gc.freeze()  # the objects of this process, so that gc.collect looks only at those of the script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [script, *flags])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                names = runpy.run_path(str(ROOT / script), run_name='__main__')
            except SystemExit as error:
                ended = error.code or 0
    gc.collect()  # what a failed script leaves, such as its lock
    gc.unfreeze()
    assert ended == status, err.getvalue()
    return SimpleNamespace(out=out.getvalue(), err=err.getvalue(), names=names)


def refuse(words, script, *flags, **settings):
    """Run a script on bad input. It must end with exit status 2 and one line that holds these words."""
    err = run(script, *flags, status=2, **settings).err
    assert 'Traceback' not in err, err
    line, = re.findall(r'(?:train|prepare|sample|bench)\.py: (.*)', err)
    assert len(line) < 1000
    assert all(word in line for word in words), line


def run_child(flags, folder, rank, environment, trap):
    """The main function of the processes of `launch`."""
    os.chdir(folder)
    with open(f'log{rank}', 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR='127.0.0.1')
    if trap:
        set_trap(*trap)
    sys.argv = ['train.py', *flags]
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def set_trap(where, number):
    """Stop this process at its number-th step or evaluation, or kill it before its number-th renaming."""
    places = dict(step=(torch.optim.AdamW, 'step'), evaluation=(GPT, 'eval'), rename=(os, 'rename'))
    owner, name = places[where]
    function = getattr(owner, name)
    count = itertools.count(1)

    def trapped(*arguments, **options):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL if where == 'rename' else signal.SIGTERM)
        return function(*arguments, **options)

    setattr(owner, name, trapped)


def launch(*flags, status=0, **options):
    """Run train.py in processes, which must end with this status. Returns rank 0's output."""
    return finish(begin(*flags, **options), status)


def finish(started, status=0, seconds=120):
    """Wait for processes that `begin` started, which must end with this status. Returns rank 0's output."""
    for process, log in started:
        process.join(seconds)
        said = log.read_text()
        assert process.exitcode == status and 'Traceback' not in said, said
    return started[0][1].read_text()


def begin(*flags, processes=0, folders=('.', '.'), trap=None, method='forkserver', **settings):
    """Start processes as torchrun does, each in its folder, or one. Returns each with its log."""
    context = multiprocessing.get_context(method)
    flags = [*map(str, flags), *(f'--{key}={value}' for key, value in settings.items())]
    context.set_forkserver_preload(['test_model', 'torch._dynamo', 'torch.distributed.checkpoint'])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes or 1):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_PORT=port)
        folder = Path(folders[rank]).resolve()
        arguments = flags, folder, rank, environment if processes else {}, None if rank else trap
        process = context.Process(target=run_child, args=arguments)
        process.start()
        started.append((process, folder / f'log{rank}'))
    return started


# --- data -------------------------------------------------------------------------------------------------

needs_vocabulary = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR')
O200K, GPT2 = [pytest.param(name, marks=needs_vocabulary) for name in ('o200k_harmony', 'gpt2')]
END = '<|endoftext|>'
FOX = 'the quick brown fox jumps over the lazy dog\n' * 50


def write(file, content):
    """Write a text, bytes, rows of JSON or chats to a file, and return its path."""
    if isinstance(content, list):
        rows = [dict(messages=row) if isinstance(row, list) else row for row in content]
        content = ''.join(json.dumps(row) + '\n' for row in rows)
    file = Path(file)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def make_data(file, **settings):
    """Prepare a file in the folder data beside it, by default by character. Returns that folder."""
    data = Path(file).parent / 'data'
    run('prepare.py', '--tokenizer=char', dataset=file, data_dir=data, **settings)
    return data


def read_data(folder='data'):
    """(meta, encoder, {split: token ids}) of a data folder."""
    meta = json.loads(Path(folder, 'meta.json').read_text())
    tokens = {split: np.fromfile(f'{folder}/{split}.bin', meta['dtype']) for split in ('train', 'val')}
    return meta, prepare.load_tokenizer(folder), tokens


def read_back(file, tokenizer='byte', **settings):
    """The documents of a file, prepared and decoded."""
    _, encoder, tokens = read_data(make_data(file, tokenizer=tokenizer, **settings))
    return encoder.decode([*tokens['train'], *tokens['val']]).split(END)[:-1]


def arrange(documents):
    """Documents in the order of the bins: those that are drawn for val come last."""
    splits = prepare.draw_splits(len(documents))
    return sorted(documents, key=lambda _: next(splits) == 'val')


def test_stories():
    """The seed determines the stories. meta.json has the loss of a model that knows how they are made."""
    stories = list(prepare.builtin_stories(0.05, 1))
    assert stories == list(prepare.builtin_stories(0.05, 1)) != list(prepare.builtin_stories(0.05, 2))
    assert read_back('builtin', megabytes=0.05, seed=1) == [text for text, _ in stories]
    meta, _, tokens = read_data()
    nats = sum(nats for _, nats in stories[meta['train_documents']:])
    assert meta['perfect_loss'] == pytest.approx(nats / len(tokens['val']))


@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe', GPT2, O200K])
def test_round_trip(tokenizer):
    """The bins hold the documents as they were, each ended by end of text, some of them in val.bin."""
    import datasets
    texts = []
    for i in range(40):
        text = f"It's {i}: naïve “über” 日本 🎈 {END} 12345\r\n\n  I'LL\t\tx=a[{i}]/2\u2028 "
        texts.append(text * (i % 3 + 1) + ''.join(map(chr, range(160 + 20 * i, 180 + 20 * i))))
    rows = datasets.Dataset.from_dict(dict(story=texts, number=list(range(40))))
    suffix = dict(byte='csv', char='json', bpe='parquet').get(tokenizer, 'jsonl')
    getattr(rows, f'to_{suffix.removesuffix("l")}')(f'x.{suffix}')
    make_data(f'*.{suffix}', tokenizer=tokenizer, text_column='story', vocab_size=400)
    meta, encoder, tokens = read_data()
    assert meta['dtype'] == ('uint32' if tokenizer == 'o200k_harmony' else 'uint16')
    assert meta['vocab_size'] == encoder.max_token_value + 1
    assert encoder.name == tokenizer
    drawn = arrange(texts)
    for split, part in (('train', drawn[:36]), ('val', drawn[36:])):
        assert encoder.decode(tokens[split]) == ''.join(text + END for text in part)
        assert list(tokens[split]).count(encoder.eot_token) == meta[f'{split}_documents'] == len(part)
        assert meta[f'{split}_tokens'] == len(tokens[split])
        assert meta[f'{split}_bytes'] == sum(len(text.encode()) for text in part)
    if tokenizer == 'bpe':  # it learned to merge
        assert len(tokens['val']) < 0.9 * meta['val_bytes']
    theirs = export_tokenizer(encoder)
    for text in texts:
        ids = encoder.encode_ordinary(text)
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert theirs.decode(ids) == text
    assert theirs.encode('a' + END) == encoder.encode('a' + END, allowed_special='all')
    if tokenizer != 'o200k_harmony':  # a model of its size needs no file
        theirs.save_pretrained('theirs')
        again = sample.read_tokenizer(Path('theirs/tokenizer.json'))
        assert all(again.encode_ordinary(text) == encoder.encode_ordinary(text) for text in texts)
        assert again.eot_token == encoder.eot_token
        assert again.n_vocab == encoder.n_vocab


@pytest.mark.parametrize('name, splitter', [
    ('bpe', 'gpt-2'), pytest.param('gpt2', 'gpt-2', marks=needs_vocabulary),
    pytest.param('o200k_harmony', 'gpt-4o', marks=needs_vocabulary)])
def test_gap(name, splitter):
    """p50k_base has its end of text among the ranks. tokenizer.json and GGUF number tokens as tiktoken."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b'th': 256, b'the': 258, b'ab': 260}
    pattern = prepare.PATTERNS.get(name) or prepare.load_tokenizer(name)._pat_str
    encoder = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: 257})
    text = 'the crab' + END
    theirs = sample.convert_tokenizer(encoder)
    assert theirs.encode(text).ids == encoder.encode(text, allowed_special='all')
    pytest.importorskip('gguf')
    found = sample.gguf_metadata(make(vocab_size=262, num_hidden_layers=1), encoder)
    texts = ('\xff', 'th', END, 'the', '<|unused_259|>', 'ab', '<|unused_261|>')
    assert found['token_list'][32:34] + found['token_list'][255:] == ('\u0120', '!', *texts)
    assert found['token_types'][255:] == (1, 1, 3, 1, 3, 1, 5)  # NORMAL, CONTROL, UNUSED
    assert found['token_merges'] == ['t h', 'th e', 'a b']
    assert found['tokenizer_pre'] == splitter
    assert found['bos_token_id'] == found['eos_token_id'] == 257
    assert 'chat_template' not in found


def export_tokenizer(encoder):
    """transformers' tokenizer, from what sample.py exports of a model in data."""
    transformers = pytest.importorskip('transformers')
    make(vocab_size=encoder.n_vocab, hidden_size=4, num_hidden_layers=1).save_pretrained('data')
    run('sample.py', init_from='data', export='exported', device='cpu')
    generation = transformers.GenerationConfig.from_pretrained('exported')
    assert generation.eos_token_id == sample.stop_tokens(encoder)
    return transformers.AutoTokenizer.from_pretrained('exported')


def replace_as_windows(path, target):
    assert not os.path.isdir(target)
    os.replace(path, target)


def test_export():
    """An export has a head, the keys that other programs read, and a line for what they cannot do."""
    transformers = pytest.importorskip('transformers')
    meta, encoder, tokens = read_data(make_data(write('text.txt', FOX)))
    gpt = make(vocab_size=meta['vocab_size'], router_aux_loss_coef=0.1, tie_word_embeddings=True,
               layer_types=[FULL, SLIDING, FULL], swiglu_limit=6.0)
    gpt.save_pretrained('data')
    Path('out').mkdir()  # may be there if it is empty
    with mock.patch.object(Path, 'replace', replace_as_windows):
        said = run('sample.py', init_from='data', export='out', device='cpu', dtype='float32').out
    words = 'layer_types and swiglu_limit', 'transformers 4.55', 'the tokenizer char'
    assert all(word in said for word in words)
    raw = json.loads(Path('out/config.json').read_text())
    assert raw['eos_token_id'] == raw['pad_token_id'] == encoder.eot_token
    assert raw | dict(tie_word_embeddings=False, output_router_logits=False, experts_per_token=2,
                      initial_context_length=64, transformers_version='4.56.0') == raw
    assert torch.equal(load_file('out/model.safetensors')['lm_head.weight'], gpt.lm_head.weight)
    assert GPT.from_pretrained('out').config.router_aux_loss_coef == 0.1
    theirs = transformers.AutoModelForCausalLM.from_pretrained('out')
    assert {*transformers.AutoTokenizer.from_pretrained('out')('the')} == {'input_ids', 'attention_mask'}
    idx = torch.from_numpy(tokens['val'][None, :20].astype(int))
    torch.testing.assert_close(theirs(idx).logits, gpt.eval()(idx, idx)[0], atol=1e-4, rtol=1e-4)

    make(max_position_embeddings=2048).save_pretrained('usual')  # 32 times as long as the original context
    said = run('sample.py', init_from='usual', tokenizer_from='data', export='again', device='cpu').out
    assert 'wrong outputs' not in said
    assert sorted(os.listdir('again')) == sorted(os.listdir('out'))

    theirs.save_pretrained('theirs')  # without a tokenizer
    file = Path('theirs/tokenizer.json')
    flags = ['--init_from=theirs', '--device=cpu', '--max_new_tokens=5', '--start=the', '--seed=1']
    refuse([str(file), '--tokenizer_from'], 'sample.py', *flags)
    said = run('sample.py', *flags, tokenizer_from='data').out
    shutil.copy('out/tokenizer.json', file)
    assert said == run('sample.py', *flags).out
    write(file, json.dumps(json.loads(file.read_text()) | dict(normalizer=dict(type='Lowercase'))))
    refuse([str(file), '--tokenizer_from'], 'sample.py', *flags)


def ggml_tensors(gpt):
    """The tensors of a model, by llama.cpp's names and in its layout."""
    found = {'token_embd.weight': gpt.lm_head.weight, 'output.weight': gpt.lm_head.weight,
             'output_norm.weight': gpt.model.norm.weight}
    for i, layer in enumerate(gpt.model.layers):
        attn, moe, experts = layer.self_attn, layer.mlp, layer.mlp.experts
        modules = dict(attn_norm=layer.input_layernorm, post_attention_norm=layer.post_attention_layernorm,
                       attn_q=attn.q_proj, attn_k=attn.k_proj, attn_v=attn.v_proj, attn_output=attn.o_proj,
                       ffn_gate_inp=moe.router)
        tensors = {f'{name}.{leaf}': p for name, module in modules.items()
                   for leaf, p in module.named_parameters()}
        tensors |= {
            'attn_sinks.weight': attn.sinks, 'ffn_down_exps.bias': experts.down_proj_bias,
            'ffn_gate_exps.bias': experts.gate_up_proj_bias[:, 0::2],
            'ffn_up_exps.bias': experts.gate_up_proj_bias[:, 1::2],
            'ffn_gate_exps.weight': experts.gate_up_proj[..., 0::2].mT,
            'ffn_up_exps.weight': experts.gate_up_proj[..., 1::2].mT,
            'ffn_down_exps.weight': experts.down_proj.mT}
        found |= {f'blk.{i}.{name}': tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.parametrize('dtype, experts', [('float32', ''), ('bfloat16', ''), ('float16', 'mxfp4')])
def test_gguf(dtype, experts):
    """A file for llama.cpp has its names, types and layouts, and the merged adapters."""
    gguf = pytest.importorskip('gguf')
    data = make_data(write('text.txt', FOX), tokenizer='bpe', vocab_size=290)
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96)
    make(**sizes, tie_word_embeddings=True).save_pretrained('base')
    adapt(GPT.from_pretrained('base', torch.float32)).save_adapter('adapters')
    gpt = GPT.from_pretrained('adapters', getattr(torch, dtype))
    gpt.merge_lora()
    expected = ggml_tensors(gpt)
    run('sample.py', init_from='adapters', tokenizer_from=data, dtype=dtype, experts=experts, device='cpu',
        export='new/story.gguf')
    assert os.listdir('new') == ['story.gguf']
    reader = gguf.GGUFReader('new/story.gguf')
    assert expected.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        right = expected[tensor.name]
        kind = dict(float32='F32', bfloat16='BF16', float16='F16')[dtype]
        if right.dim() == 1 or 'bias' in tensor.name or 'gate_inp' in tensor.name:
            kind = 'F32'
        elif experts and 'exps' in tensor.name:
            kind = 'MXFP4'
            right = MXFP4.pack(right.mT).unpack().mT
        assert tensor.tensor_type.name == kind
        assert tensor.shape.tolist()[::-1] == list(right.shape)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.tensor(values), right.float())
    kinds = dict(float32=0, bfloat16=32, float16=38)
    assert reader.fields['general.file_type'].contents() == kinds[dtype]


def test_gguf_metadata():
    """The package gguf reads shape, tokenizer and chat template. What cannot be written costs one line."""
    gguf = pytest.importorskip('gguf')
    make_data(write('chats.jsonl', [[user('red'), assistant('go')]] * 20), tokenizer='bpe', vocab_size=290)
    encoder = prepare.load_tokenizer('data')
    make(vocab_size=300, rope_beta_slow=2.0, swiglu_limit=6.0).save_pretrained('model')
    flags = ['--init_from=model', '--tokenizer_from=data', '--device=cpu', '--export=new/story.gguf']
    with mock.patch('gguf.GGUFWriter.write_tensor_data', side_effect=OSError('the disk is full')):
        refuse(['the disk is full'], 'sample.py', *flags)
    assert os.listdir('new') == []
    said = run('sample.py', *flags).out
    assert 'swiglu_limit' in said
    assert 'rope_beta_slow' in said
    assert 'transformers' not in said
    fields = gguf.GGUFReader('new/story.gguf').fields
    found = {name.split('.', 1)[1]: field.contents() for name, field in fields.items() if '.' in name}
    eps = found.pop('attention.layer_norm_rms_epsilon')
    assert eps == pytest.approx(1e-5)
    assert found['architecture'] == 'gpt-oss'
    assert found['name'] == 'story'
    right = {
        'block_count': 3, 'embedding_length': 48, 'feed_forward_length': 40, 'expert_feed_forward_length': 40,
        'attention.head_count': 6, 'attention.head_count_kv': 2, 'attention.key_length': 10,
        'attention.value_length': 10, 'attention.sliding_window': 16, 'expert_count': 5,
        'expert_used_count': 2, 'context_length': 131072, 'rope.freq_base': 150000.0,
        'rope.scaling.type': 'yarn', 'rope.scaling.factor': 32.0, 'rope.scaling.yarn_beta_fast': 32.0,
        'rope.scaling.yarn_beta_slow': 2.0, 'rope.scaling.original_context_length': 64, 'ggml.model': 'gpt2',
        'ggml.pre': 'gpt-2', 'ggml.bos_token_id': encoder.eot_token, 'ggml.add_bos_token': False,
        'ggml.padding_token_id': encoder.eot_token,
        'ggml.eos_token_id': encoder.encode_single_token('<|return|>'),
        'chat_template': (ROOT / 'config/chat_template.jinja').read_text(encoding='utf-8')}
    assert {name: found.get(name) for name in right} == right
    refuse(['story.gguf', 'exists'], 'sample.py', *flags)
    Path('folder.gguf').mkdir()
    refuse(['folder.gguf', 'exists'], 'sample.py', *flags, export='folder.gguf')
    with mock.patch.dict(sys.modules, {'gguf': None, 'gguf.quants': None}):
        refuse(['gguf', 'pip install'], 'sample.py', *flags, export='other.gguf')




def test_text_files():
    """A text is cut at nine tenths. Lines of <|endoftext|> divide it into documents. max_docs limits them."""
    text = ''.join(random.Random(0).choices('abcdef gh\n', k=1234))
    _, encoder, tokens = read_data(make_data(write('a.txt', text)))
    assert encoder.decode(tokens['train']) == text[:int(1234 * 0.9)]
    assert encoder.decode(tokens['val']) == text[int(1234 * 0.9):] + END
    documents = [f'line {i}\n\nmore' for i in range(30)]
    found = read_back(write('a.txt', f'\n{END}\n'.join(documents)), max_docs=20)
    assert found == arrange(documents[:20])
    assert read_data()[0]['train_documents'] == 18


@pytest.mark.parametrize('fraction, documents, held_out', [
    (0.1, 1000, 100), (0.3, 1000, 300), (0.75, 1000, 750), (0.01, 20, 1), (0.01, 250, 3), (0.001, 1000, 1)])
def test_draw(fraction, documents, held_out):
    """Validation is drawn by the seed from all of an ordered corpus, one of each 1 / val_fraction."""
    def read(**settings):
        make_data('a.jsonl', tokenizer='byte', val_fraction=fraction, **settings)
        _, encoder, tokens = read_data()
        return [list(map(int, encoder.decode(tokens[split]).split(END)[:-1])) for split in tokens]

    write('a.jsonl', [dict(text=str(i)) for i in range(documents)])
    train, val = read()
    assert sorted(train + val) == [*range(documents)]
    assert train == sorted(train) and val == sorted(val)
    assert held_out - 1 <= len(val) <= held_out and val
    assert max(np.diff(val), default=0) < 2 / fraction
    assert read(num_proc=3) == [train, val] != read(seed=6)


@pytest.mark.parametrize('threads', [1, 3])
def test_reading_ahead(threads, monkeypatch):
    """Texts are read while others are tokenised, a few batches ahead, and come in order."""
    monkeypatch.setattr(prepare, 'PIECE', 4)
    monkeypatch.setattr(prepare, 'num_proc', threads)
    started = []

    def read():
        for i in range(1000, 1100):
            started.append(i)
            yield 'train', f'{i}', True

    encoder = prepare.encoding('byte', {bytes([i]): i for i in range(256)})
    encoded = prepare.encode_pieces(read(), encoder, 'uint16')
    first = next(encoded)
    assert 2 * threads < len(started) < 2 * threads + 5
    texts = [encoder.decode(tokens) for _, _, tokens, *_ in [first, *encoded]]
    assert texts == [f'{i}{END}' for i in range(1000, 1100)]


def test_draw_of_chats():
    """Of few chats one is drawn. Files are drawn from as one corpus, up to max_docs documents of it."""
    chats = [[user('q'), assistant(str(i))] for i in range(4)]
    read_splits(write('a.jsonl', chats))
    assert read_data()[0]['val_documents'] == 1
    for i in range(4):
        write(f'b{i}.jsonl', [dict(text=f'{i}{j:02}') for j in range(25)])
    _, train, val = read_splits('b*.jsonl')
    assert len(val) == 10 and {text[0] for text in val} == {*'0123'}
    _, *texts = read_splits('b*.jsonl', max_docs=30)
    assert max(sum(texts, [])) == '104' and texts[1] == val[:3]


@needs_vocabulary
def test_cuts_change_nothing(monkeypatch):
    """A long document, which is tokenised in pieces, and one with long runs have the tokens of the whole."""
    monkeypatch.setattr(prepare, 'PIECE', 1000)
    monkeypatch.setattr(prepare, 'RUN', 4)
    text = ''.join(story for story, _ in prepare.builtin_stories(0.3, 0)) + "it's  a test... 12345\n\n\tdone"
    pieces, ends = zip(*prepare.text_file(text.splitlines(keepends=True)))
    assert len(pieces) > 100 and ''.join(pieces) == text
    assert ends.index(True) == len(pieces) - 1
    rng = random.Random(0)
    parts = ['a', 'B', 'é', '日', '12', ' ', '  ', '\n', '\n\n', '\t', '!', '/', "'s", '_', '\u3000', END]
    for encoder in map(tiktoken.get_encoding, ('gpt2', 'o200k_harmony')):
        assert sum(map(encoder.encode_ordinary, pieces), []) == encoder.encode_ordinary(text)
        for _ in range(100):
            long = rng.choice(' \t\n\u3000') * 20
            short = ''.join([*rng.choices(parts, k=40), long, *rng.choices(parts, k=40)])
            assert prepare.encode_text(encoder, short) == encoder.encode_ordinary(short)
            assert prepare.encode_prompt(encoder, short) == encoder.encode(short, allowed_special='all')


@needs_vocabulary
@pytest.mark.parametrize('character', ' \t\n\u3000x')
def test_long_runs(character):
    """Runs beyond the limit of tiktoken's regular expressions are encoded, in data and in a prompt."""
    text = 'a b' + character * 1_000_001 + 'c d'
    assert read_back(write('a.jsonl', [dict(text=text)] * 2), tokenizer='gpt2') == [text] * 2
    encoder = tiktoken.get_encoding('gpt2')
    assert encoder.decode(prepare.encode_prompt(encoder, text + END)) == text + END


def test_bpe_on_long_runs(monkeypatch):
    """A run without a boundary is learnt in parts. Ordinary text has no such run."""
    assert not any(prepare.UNBROKEN.search(story) for story, _ in prepare.builtin_stories(0.5, 1))
    tokenizers = pytest.importorskip('tokenizers')
    monkeypatch.setattr(prepare, 'tokenizer', 'bpe')
    parts = []
    fake = SimpleNamespace(train_from_iterator=lambda texts, trainer: parts.extend(texts),
                           to_str=lambda: '{"model": {"merges": []}}')
    monkeypatch.setattr(tokenizers, 'Tokenizer', lambda model: fake)
    texts = ['ACGT' * 50_000, '0123' * 3000, '.;' * 3000, '\n' * 3000, 'some words ' * 3000]
    prepare.train_tokenizer(texts)
    assert ''.join(parts) == ''.join(texts)
    assert max(map(len, ' '.join(parts).split(' '))) <= 1024


def test_spelled_special_tokens():
    """In a text, special tokens are letters, which a line counts, unless special_tokens=True."""
    write('a.jsonl', [dict(text=f'<|start|>user<|message|>hi {END} there')] * 12)
    flags = ['prepare.py', '--tokenizer=byte', '--dataset=a.jsonl', '--data_dir=data']
    assert '36 spellings' in run(*flags).out
    assert len(read_data()[2]['train']) > 200
    assert 'spellings' not in run(*flags, special_tokens=True).out
    _, encoder, tokens = read_data()
    assert [*tokens['train'], *tokens['val']].count(encoder.encode_single_token('<|start|>')) == 12


def test_rows_as_they_stand():
    """Only the column in use is read, and as text. Other columns may change their type."""
    texts = ['007', '1e5', 'True', 'NA', 'null', '2020-01-01', 'a, "b"\nc', 'x' * 200_000, '\u2028', *'abcd']
    rows = [dict(text=text, meta=None, id=i) for i, text in enumerate(texts[:9])]
    rows += [dict(text=text, meta=dict(a=1), id=f'a{text}') for text in texts[9:]]
    rows += [dict(text='late', thinking='x')]
    for name, content in (('a.jsonl', rows), ('b.json', rows), ('c.json', json.dumps(rows, indent=1))):
        assert read_back(write(name, content)) == arrange([*texts, 'late'])
    cells = [text.replace('a, "b"\nc', '"a, ""b""\nc"') + ',1\n' for text in texts]
    assert read_back(write('d.csv', '\ufefftext,n\n' + ''.join(cells))) == arrange(texts)


def test_names_that_look_like_patterns():
    """A path that exists is that file, a glob all its matches. Data of another dataset are not replaced."""
    for name in ('report 1.txt', 'report [1].txt', 'star.txt', 'star*.txt', 'a::b.txt'):
        assert read_back(write(name, f'this is {name}')) == [f'this is {name}']
    assert len(read_back('*.txt')) == 5
    write('d 1/x.txt', 'the other folder')
    assert read_back(write('d [1]/x.txt', 'this folder')) == ['this folder']
    assert read_back('d [1]/*.txt') == ['this folder']
    assert 'data/d 1:' in run('prepare.py', dataset='d 1/*.txt', tokenizer='byte').out
    for pattern in ('d [1]/*.txt', 'd 1/**/?.txt'):
        refuse(['holds data of d 1/*.txt'], 'prepare.py', dataset=pattern, tokenizer='byte')


def test_default_folder(tmp_path):
    """The default data_dir is in data/, whatever the dataset's name is. A URL's suffix is its path's."""
    write('a.txt', 'hello')
    write('b.txt?x=1', 'hello')  # what this URL names
    Path('below').mkdir()
    os.chdir('below')
    url = f'{tmp_path.as_uri()}/b.txt?x=1'
    for name, folder in (('../*.txt', 'text'), ('.././[a].txt', 'a'), (url, 'b')):
        assert f'data/{folder}: ' in run('prepare.py', dataset=name, tokenizer='byte').out
    for name in ('.', '..', '../', '/', url.replace('b.txt', 'b')):
        refuse([name], 'prepare.py', dataset=name, tokenizer='byte')
    assert sorted(os.listdir('data')) == ['a', 'b', 'text']
    assert os.listdir() == ['data']


def read_splits(name, tokenizer='byte', **settings):
    """What prepare.py prints of a dataset, and the texts of train and val."""
    shutil.rmtree('data', ignore_errors=True)
    out = run('prepare.py', dataset=name, data_dir='data', tokenizer=tokenizer, **settings).out
    _, encoder, tokens = read_data()
    return out, *([*filter(None, encoder.decode(tokens[split]).split(END))] for split in tokens)


def test_splits():
    """Files named as a split are it. Those of test are left out. Validation can be a dataset of its own."""
    for name in ('train-0', 'train-1', 'validation-0', 'test-0'):
        write(f'hub/{name}.jsonl', [dict(text=name)] * 2)
    train = ['train-0'] * 2 + ['train-1'] * 2
    out, *texts = read_splits('hub/*.jsonl')
    assert texts == [train, ['validation-0'] * 2]
    assert 'test is left out (hub/test-0.jsonl)' in out
    out, *texts = read_splits('h*/*.jsonl', val_dataset='hub/train-1.jsonl')
    assert texts == [train[:2], train[2:]]
    assert 'validation-0.jsonl' in out and 'test-0.jsonl' in out
    _, *texts = read_splits('hub/test-*.jsonl')  # as the user names it
    assert ''.join(sum(texts, [])) == 'test-0' * 2
    refuse(['no split named train, but test;'], 'prepare.py', dataset='hub/*s*.jsonl')
    refuse(['only files of val_dataset'], 'prepare.py', dataset='hub/t*0.jsonl', val_dataset='hub/t*.jsonl')
    own = ['a', 'dev diary', 'testament', 'training_notes', 'valley']
    for name in own:
        write(f'own/{name}.txt', f'{name}.')
    _, *texts = read_splits('own/*.txt')
    assert ''.join(sum(texts, [])) == ''.join(f'{name}.' for name in own)
    for name in ('train', 'test', 'dev'):
        Path('tree', name).mkdir(parents=True)
        write(f'tree/{name}/1.txt', name)
    assert read_splits('tree/**/*.txt')[1:] == (['train'], ['dev'])
    assert read_splits('builtin', megabytes=0.01, val_dataset='own/a.txt')[2] == ['a.']
    assert 'perfect_loss' not in read_data()[0]


def test_saved_datasets():
    """Folders of datasets' save_to_disk are read, with their splits. For one of files a line says how."""
    import datasets
    names = 'train', 'test', 'validation'
    rows = {name: datasets.Dataset.from_dict(dict(text=[name] * 4)) for name in names}
    datasets.DatasetDict(rows).save_to_disk('all')
    rows['test'].save_to_disk('one')
    out, *texts = read_splits('all/')
    assert texts == [['train'] * 4, ['validation'] * 4]
    assert 'test is left out' in out
    _, *texts = read_splits('one', max_docs=3)
    assert ''.join(sum(texts, [])) == 'test' * 3
    assert read_splits('all', val_dataset='all/test')[2] == ['test'] * 4
    refuse(['only files of val_dataset'], 'prepare.py', dataset='one', val_dataset='one/')
    datasets.DatasetDict(test=rows['test']).save_to_disk('none')
    refuse(['no split named train, but test'], 'prepare.py', dataset='none')
    write('folder/a.txt', 'a')
    refuse(['folder/*.txt'], 'prepare.py', dataset='folder/')


def test_bad_rows():
    """skip_bad_rows counts the rows that are refused otherwise, names three, and keeps the others."""
    good = [user('q'), assistant('a')]
    bad = [[], good[:1], [user('<|end|>'), good[1]], [user('\ud800'), good[1]], [dict(user('q'), name='x')]]
    file = write('a.jsonl', [good, *bad, good, good])
    file.write_bytes(file.read_bytes() + b'{"messages": \n5\n')
    refuse(['line 2', 'no answer'], 'prepare.py', dataset=file, tokenizer='byte')
    for tokenizer in ('byte', 'bpe'):
        out, *texts = read_splits(file, tokenizer, vocab_size=300, skip_bad_rows=True)
        assert [len(text) for text in texts] == [2, 1]
        assert texts[0][0] == texts[0][1] == texts[1][0]
        assert 'rows left out: 7 (a.jsonl, line 2' in out
        assert 'line 4' in out and 'line 5' not in out
    write('b.csv', 'n,text\n1,a\n2,b,c\n3,d\n')
    assert read_splits('b.csv', skip_bad_rows=True)[1:] == (['a'], ['d'])
    whole = dict(c=[dict(n=1)] * 3, d=b'{"text": "a"}\n{"text": "\xe9"}\n', e='[{"text": "a"}, {"text": }]')
    for name, content in whole.items():
        write(f'{name}/good.jsonl', [dict(text='a')] * 3)
        write(f'{name}/other.jsonl', content)
        flags = dict(dataset=f'{name}/*.jsonl', data_dir='new', skip_bad_rows=True)
        refuse([f'{name}/other.jsonl'], 'prepare.py', '--tokenizer=byte', **flags)
        assert not list(Path().glob('new/*'))


def pack(data, suffix):
    """The bytes as a packed file holds them."""
    import pyarrow
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, prepare.PACKED[suffix]) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize('suffix', prepare.PACKED)
def test_packed_files(suffix):
    """Packed files are read as what they hold, of one part or of more. One that was cut is refused."""
    rows = [dict(text=f'{i} {i ** 3}') for i in range(2000)]
    csv = 'text\n' + ''.join(row['text'] + '\n' for row in rows)
    for name, content in {'a.md': csv, 'b.csv': csv, 'c.jsonl': rows, 'd.JSON': json.dumps(rows)}.items():
        plain = write(name, content).read_bytes()
        expected = read_back(name)
        parts = pack(plain[:5000], suffix), pack(plain[5000:], suffix)
        assert read_back(write(name + suffix, b''.join(parts))) == expected
        file = write(f'cut {name}{suffix}', b''.join(parts)[:-50])
        refuse([f'cut {name}'], 'prepare.py', dataset=file, tokenizer='byte')
    file = write(f'e.md{suffix}', pack(b'eeee', suffix))
    assert 'data/e:' in run('prepare.py', dataset=file, tokenizer='byte').out
    refuse(['no such file'], 'prepare.py', dataset=f'none.txt{suffix}')
    refuse(['.jsonl', suffix], 'prepare.py', dataset=write(f'f{suffix}', b''))


def test_nulls():
    """Rows whose text is null are left out and counted, in each kind of file. Missing cells are no nulls."""
    import datasets
    rows = [dict(text=text, n=1) for text in ('a', None, 'b', '', None, 'c', None, 'd', None)]
    datasets.Dataset.from_list(rows).to_parquet('b.parquet')
    datasets.Dataset.from_list(rows).save_to_disk('saved')
    for name in (write('a.jsonl', rows), 'b.parquet', 'saved'):
        out, *texts = read_splits(name)
        assert ''.join(sum(texts, [])) == 'abcd'
        assert f'rows left out: 4 ({name}' in out
        assert out.count(': text is null') == 3
    asked = [dict(prompt='q', completion=answer) for answer in ('a', None, 'b')]
    out, *texts = read_splits(write('c.jsonl', asked))
    assert len(sum(texts, [])) == 2
    assert 'left out: 1 (c.jsonl, line 2: completion is null)' in out
    chats = [[user('q'), assistant(answer)] for answer in ('a', 'b', None)]
    out = run('prepare.py', dataset=write('e.jsonl', [*chats, None]), tokenizer='byte', data_dir='e').out
    assert '2 (e.jsonl, line 3: the content of message 2 is null; e.jsonl, line 4: it is null)' in out
    datasets.Dataset.from_list([dict(messages=chat) for chat in chats]).to_parquet('e.parquet')
    out = run('prepare.py', dataset='e.parquet', tokenizer='byte', data_dir='f').out
    assert '1 (e.parquet, row 3: the content of message 2 is null)' in out
    file = write('d.jsonl', [dict(text=None)] * 3)
    refuse(['no text', 'line 1: text is null'], 'prepare.py', '--tokenizer=byte', dataset=file)


def test_urls(monkeypatch):
    """A URL is fetched once, though the data are read more than once. Its copy does not stay."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    write('a.jsonl.gz', pack(b''.join(b'{"text": "%d"}\n' % i for i in range(20)), '.gz'))
    Path('temporary').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', 'temporary')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/a.jsonl.gz?download=true'
        assert sorted(map(int, read_back(url, tokenizer='bpe', vocab_size=257))) == [*range(20)]
        assert len(requests) == 1
        assert not os.listdir('temporary')
        url = url.replace('a.jsonl', 'none.jsonl')
        refuse([url, 'FileNotFound'], 'prepare.py', '--tokenizer=byte', dataset=url)
        server.shutdown()


# --- chats ------------------------------------------------------------------------------------------------

def user(text):
    return dict(role='user', content=text)


def assistant(text, **fields):
    return dict(role='assistant', content=text) | fields


@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe', O200K])
def test_chat_masks(tokenizer):
    """Each turn of the assistant is an example: its prompt at that time, and its own tokens as targets."""
    long = [dict(role='system', content='Be brief.'), user('Hi <| end |> there'),
            assistant('Hello!', thinking='A greeting.'), user('Bye'),
            assistant('They go.', channel='analysis'), assistant('Farewell!')]
    short = [user('1 + 1?'), assistant('2')]
    final = '<|channel|>final<|message|>{}<|return|>'
    thought = '<|channel|>analysis<|message|>{}<|end|><|start|>assistant' + final
    turns = [(long[:2], thought.format('A greeting.', 'Hello!')),
             (long[:4], thought.format('They go.', 'Farewell!')), (short[:1], final.format('2'))]
    turns = sum(arrange([turns[:2], turns[2:]] * 6), [])
    make_data(write('chats.jsonl', [long, short] * 6), tokenizer=tokenizer, vocab_size=300)
    meta, encoder, tokens = read_data()
    mask = np.concatenate([np.fromfile(f'data/{split}_mask.bin', np.uint8) for split in tokens])
    tokens = np.append(tokens['train'], tokens['val'])
    assert len(mask) == len(tokens)
    assert meta['train_targets'] + meta['val_targets'] == mask.sum()
    assert meta['train_bytes'] + meta['val_bytes'] == sum(len(answer) for _, answer in turns)
    ends = np.flatnonzero(tokens == encoder.eot_token)
    assert len(ends) == len(turns) and not mask[ends].any()
    for start, end, (seen, answer) in zip([0, *ends + 1], ends, turns):
        prompt = prepare.Chat(seen).prompt(encoder)
        document = tokens[start:end].tolist()
        assert document[:len(prompt)] == prompt
        assert encoder.decode(document[len(prompt):]) == answer
        assert mask[start:end].tolist() == [0] * len(prompt) + [1] * (len(document) - len(prompt))
    hostile = prepare.Chat([user('<|end|>')])  # is text where a user writes it to sample.py
    assert hostile.prompt(encoder).count(encoder.encode_single_token('<|end|>')) == 2
    chat = [long[0], *short, *long[3:]]
    template = export_tokenizer(encoder).apply_chat_template
    found = template(chat, add_generation_prompt=True, reasoning_effort='high', return_dict=False)
    assert found == prepare.Chat(chat).prompt(encoder, 'high')


PROPERTIES = dict(
    what=dict(type='string', description='Words', enum=['a', 'b'], default='a', title='W', examples=['a', 1]),
    how=dict(description='How', default=3, oneOf=[dict(type='string', description='How', nullable=True),
                                                  dict(type='number', description='n', default='x')]),
    items=dict(type='array', items=dict(type='object', description='Inner', properties=dict(
        yes=dict(type='boolean', default=True), either=dict(type=['integer', 'null'])))),
    some=dict(type='array', default=['x, y', 1]), rest=dict(anyOf=[]), none=dict(type='null', default=None))
FIND = dict(type='object', required=['what', 'how'], properties=PROPERTIES)
TOOLS = [
    dict(type='function', function=dict(name='now', description='The time.\nIn UTC.')),
    dict(name='find', description='', parameters=FIND),
    dict(type='function', function=dict(name='other', description='One line', parameters={}))]


def call_tools(*names, **fields):
    """A message that calls these functions, and their results in the other order."""
    calls = []
    results = []
    for name, arguments in zip(names, ('{"what":"a"}', dict(what='ü', how=1))):
        calls.append(dict(type='function', id=name, function=dict(name=name, arguments=arguments)))
        results.insert(0, dict(role='tool', tool_call_id=name, content=f'["{name}"]'))
    return [assistant(None, tool_calls=calls) | fields, *results]


TURNS = [
    [user('1?  <b> ü'), assistant('One.')],
    [user('2?'), *call_tools('browser.search', 'python', thinking='So.'), assistant('Two.', thinking='Hm.')],
    [user('3?'), *call_tools('now', thinking='I need it.'), *call_tools('find', 'other', content='I call.'),
     assistant('Three.')],
    [user('4?'), *call_tools('other', 'now'), assistant('Wait.', channel='commentary'),
     assistant('Four.', thinking='Hm.')]]


ADDRESSES = {name: dict(recipient='functions.' + name, channel='commentary', content_type='json')
             for name in ('now', 'find', 'other')}
ADDRESSES |= {name: dict(recipient=name, channel='analysis', content_type='code')
              for name in ('browser.search', 'python')}


def to_harmony(messages):
    """Our messages as openai-harmony's, where a thought and a call are messages of their own."""
    found = []
    for message in messages:
        text = message['content']
        calls = message.get('tool_calls', [])
        thought = message.get('thinking') or calls and text
        if thought:
            found.append(assistant(thought, channel='analysis'))
        for call in calls:
            arguments = call['function']['arguments']
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            found.append(assistant(arguments, **ADDRESSES[call['id']]))
        if message['role'] == 'tool':  # `call_tools` makes its name the id
            new = dict(ADDRESSES[message['tool_call_id']], role='tool', content=text, recipient='assistant')
            new['name'] = ADDRESSES[message['tool_call_id']]['recipient']
            found.append({key: value for key, value in new.items() if key != 'content_type'})
        elif message['role'] == 'user':
            found.append(message)
        elif not calls:
            found.append(assistant(text, channel=message.get('channel', 'final')))
    return found


def make_conversation(first, chat, tools, system, training):
    """openai-harmony's conversation, without the analysis before the last earlier final answer."""
    import openai_harmony as harmony
    new = harmony.Message.from_role_and_content
    content = harmony.SystemContent(model_identity=system['model_identity'])
    content.with_reasoning_effort(harmony.ReasoningEffort(system['reasoning_effort'].title()))
    for name in system['builtin_tools']:
        getattr(content, f'with_{name}_tool')()
    start = [new(harmony.Role.SYSTEM, content)]
    developer = harmony.DeveloperContent(instructions=first[0]['content'] if first else None)
    if tools:
        tools = [dict(parameters=None) | tool.get('function', tool) for tool in tools]
        developer = developer.with_function_tools([harmony.ToolDescription(**tool) for tool in tools])
    if first or tools:
        start.append(new(harmony.Role.DEVELOPER, developer))
    messages = list(map(harmony.Message.from_dict, to_harmony(chat)))
    earlier = messages[:-1] if training else messages
    last = max((i for i, message in enumerate(earlier) if message.channel == 'final'), default=-1)
    seen = [message for i, message in enumerate(messages) if message.channel != 'analysis' or i > last]
    return harmony.Conversation.from_messages(start + seen)


@needs_vocabulary
def test_harmony(monkeypatch):
    """What we and an exported template render has openai-harmony's tokens. Its default drops reasoning before
    the first final answer; gpt-oss's template and ours, before each."""
    harmony = pytest.importorskip('openai_harmony')
    encoder = tiktoken.get_encoding('o200k_harmony')
    table = [base64.b64encode(token) + b' %d\n' % rank for token, rank in encoder._mergeable_ranks.items()]
    write('o200k_base.tiktoken', b''.join(table))
    monkeypatch.setenv('TIKTOKEN_ENCODINGS_BASE', os.getcwd())
    theirs = harmony.load_harmony_encoding('HarmonyGptOss')
    everything = harmony.RenderConversationConfig(auto_drop_analysis=False)
    template = export_tokenizer(encoder).apply_chat_template
    for number, turns in enumerate(itertools.permutations(TURNS)):
        role = ('system', 'developer', None)[number % 3]
        first = [dict(role=role, content='Be brief.\nOr not.')] if role else []
        chat = sum(turns[:number % 4 + 1], [])
        calls = {call['id'] for message in chat for call in message.get('tool_calls', [])}
        tools = TOOLS if calls & {'now', 'find', 'other'} else []
        builtin_tools = ['python', 'browser'] if 'python' in calls else ['browser'] * (number % 2)
        system = dict(model_identity=f'You are {number}.', builtin_tools=builtin_tools,
                      reasoning_effort=('low', 'medium', 'high')[number // 3 % 3])
        ours = prepare.Chat(first + chat, tools, **system)
        seen = make_conversation(first, chat, tools, system, training=False)
        prompt = theirs.render_conversation_for_completion(seen, harmony.Role.ASSISTANT, everything)
        assert ours.prompt(encoder, system['reasoning_effort']) == prompt
        options = dict(system, add_generation_prompt=True, return_dict=False)
        assert template(first + chat, tools=tools, **options) == prompt
        reasons = [any(turn is not TURNS[0] for turn in turns[:k]) for k in range(1, number % 4 + 1)]
        assert len(ours.turns) == 1 + sum(reasons)
        whole = make_conversation(first, chat, tools, system, training=True)
        tokens, mask = prepare.encode_turn(encoder, ours.turns[-1])
        assert tokens == theirs.render_conversation_for_training(whole, everything)
        options = dict(system, return_dict=True, return_assistant_tokens_mask=True)
        found = template(first + chat, tools=tools or None, **options)
        assert found['input_ids'] == tokens and found['assistant_masks'] == mask
    assert set(sample.stop_tokens(encoder)) == {199999, *theirs.stop_tokens_for_assistant_actions()}


def test_chats_in_one_row():
    """A text teaches all answers up to its last, where no reasoning of theirs is left out. Of the ends of
    answers, <|return|> is learnt. Exported templates have the same tokens and masks."""
    make_data(write('a.jsonl', [[user('q'), assistant('a')]] * 2), tokenizer='byte')
    encoder = read_data()[1]
    template = export_tokenizer(encoder).apply_chat_template
    plain, other = [user('q'), assistant('a')], [user('r'), assistant('b')]
    thought = [user('s'), assistant('c', thinking='T')]
    unlearnt = [user('q'), assistant('a', weight=0)]
    call = call_tools('now')
    builtin = call_tools('python')
    said = assistant('w', channel='commentary')
    think, a, b, c, w = [f'<|channel|>{channel}<|message|>{text}' for channel, text in (
        ('analysis', 'T'), ('final', 'a'), ('final', 'b'), ('final', 'c'), ('commentary', 'w'))]
    both = f'{think}<|end|><|start|>assistant{c}<|return|>'
    now = ' to=functions.now<|channel|>commentary json<|message|>{"what":"a"}<|call|>'
    python = now.replace('functions.now', 'python').replace('commentary json', 'analysis code')
    end = '<|return|>'
    for messages, expected in [
            (plain * 15 + other, [[a] * 15 + [b + end]]), (plain + other + thought, [[a, b, both]]),
            (plain + thought + other, [[a, both], [b + end]]), (thought + plain, [[both], [a + end]]),
            (thought + unlearnt, [[both]]), (unlearnt + other, [[b + end]]),
            (plain + [assistant('b')], [[a, b + end]]),
            (plain + [user('r'), said, assistant('b')], [[a, f'{w}<|end|>', f'<|start|>assistant{b}{end}']]),
            (plain + [user('r'), *call, *other[1:], *plain], [[a, now, b, a + end]]),
            (plain + [user('r'), *builtin, *other[1:], *plain], [[a, python, b + end], [a + end]]),
            (plain + [user('r'), *call], [[a + end], [a, now]]),
            (call + unlearnt[1:] + thought, [[now, both]]),
            (builtin + unlearnt[1:] + plain, [[python], [a + end]]), (plain + [user('r')], [[a + end]])]:
        texts = prepare.Chat(messages, builtin_tools=['python']).turns
        assert [text.split(prepare.LEARNT)[1::2] for text in texts] == expected
        options = dict(return_dict=True, return_assistant_tokens_mask=True, builtin_tools=['python'])
        while messages[-1]['role'] != 'assistant' or messages[-1].get('weight') == 0:
            messages = messages[:-1]
        found = template(messages, **options)
        assert (found['input_ids'], found['assistant_masks']) == prepare.encode_turn(encoder, texts[-1])
    row = read_back(write('a.jsonl', [plain * 16] * 2))[0]
    assert row.count('<|message|>a<|') == 16 and row.count('<|return|>') == 1


def test_forms_of_chats():
    """Synonyms, empty fields, ShareGPT's and Alpaca's forms are read. Weight 0 makes an answer context."""
    def read(*messages):
        document, _, _ = read_back(write('a.jsonl', [[user('q'), *messages]] * 3))
        return document

    expected = read(assistant('a', thinking='T'))
    assert expected.endswith('<|start|>assistant<|channel|>analysis<|message|>T<|end|>'
                             '<|start|>assistant<|channel|>final<|message|>a<|return|>')
    assert read(assistant('a', reasoning_content='T')) == expected
    empty = dict(tool_calls=[], name=None, audio='', more={})
    assert read(assistant('a', reasoning='T', thinking='T', train=True, **empty)) == expected
    for fields in (dict(weight=0), dict(train=False)):
        document = read(assistant('a', **fields), user('r'), assistant('b'))
        assert '<|message|>a<|end|>' in document
        assert document.endswith('<|message|>b<|return|>')
    share = [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    same = [dict(role='system', content='s'), user('q'), assistant('a')]
    found = read_back(write('b.jsonl', [dict(conversations=share)] * 3))
    assert found == read_back(write('a.jsonl', [same] * 3))
    alpaca = [dict(instruction='I', input=more, output='O') for more in ('', '', 'N')]
    first, _, last = read_back(write('a.json', alpaca))
    assert '<|message|>I<|end|>' in first and '<|message|>I\n\nN<|end|>' in last


def test_columns_beside_chats():
    """Effort, identity and built-in tools stand in columns or in chat_template_kwargs, as objects or JSON."""
    chat = dict(messages=[user('q'), assistant('a')])
    system = dict(reasoning_effort='low', model_identity='You are X.', builtin_tools=['python'])
    forms = [system, dict(chat_template_kwargs=system), dict(chat_template_kwargs=json.dumps(system)),
             system | dict(builtin_tools='["python"]', chat_template_kwargs=dict(reasoning_effort='low'))]
    document, *others = read_back(write('a.jsonl', [chat | form for form in forms]))
    assert others == [document] * 3
    assert document.startswith('<|start|>system<|message|>You are X.\nKnowledge cutoff: 2024-06\n\n'
                               'Reasoning: low\n\n# Tools\n\n## python\n\nUse this tool')
    import datasets
    rows = [chat | system | dict(chat_template_kwargs=None), chat | dict(chat_template_kwargs=system)]
    datasets.Dataset.from_list(rows).to_parquet('b.parquet')
    assert read_back('b.parquet') == [document] * 2
    for kept in ('In\nFrench.', ' In \r\nFrench.\n'):
        same = dict(messages=[dict(role='system', content=' In\nFrench. '), *chat['messages']], system=kept)
        assert read_back(write('c.jsonl', [same | dict(source='x', reasoning_effort=None)] * 2))


def test_questions_and_answers():
    """Columns of a question and its answer are a chat. Only the answer is learnt, a text or messages."""
    prompt = [user('q'), assistant('no', thinking='Hm.'), user('r')]
    expected = read_back(write('a.jsonl', [[user('q'), assistant('a')]] * 2))
    for question, answer in itertools.product(('instruction', 'prompt', 'question'), ('response', 'answer')):
        assert read_back(write('b.jsonl', [{question: 'q', answer: 'a', 'category': 'c'}] * 2)) == expected
    assert read_back(write('c.csv', 'prompt,completion\nq,a\nq,a\n')) == expected
    dolly = dict(instruction='q', context='c', response='a', category='x')
    assert '<|message|>q\n\nc<|end|>' in read_back(write('d.jsonl', [dolly] * 2))[0]
    rows = [dict(prompt=prompt, completion=[assistant('a', thinking='T')])] * 2
    document, _ = read_back(write('e.jsonl', rows))
    assert 'no<|end|>' in document and 'Hm.' not in document
    _, encoder, tokens = read_data()
    learnt = tokens['val'][np.fromfile('data/val_mask.bin', bool)]
    assert encoder.decode(learnt) == ('<|channel|>analysis<|message|>T<|end|><|start|>assistant'
                                      '<|channel|>final<|message|>a<|return|>')
    assert read_back('b.jsonl', text_column='answer') == ['a', 'a']


def test_columns_of_tools():
    """Tools are objects or JSON. Parquet gives objects the keys of all others, which are no arguments."""
    import pyarrow
    from pyarrow import parquet
    rows = []
    for key in ('one', 'two', 'three'):
        parameters = dict(type='object', properties={key: dict(type='string')})
        tool = dict(type='function', function=dict(name='f', description='', parameters=parameters))
        rows.append(dict(messages=[user('q'), assistant('a')], tools=[tool]))
    expected = read_back(write('a.jsonl', rows))
    assert 'type f = (_: {\ntwo?: string,\n}) => any;' in expected[1]
    as_json = [row | dict(tools=json.dumps(row['tools'])) for row in rows]
    assert read_back(write('b.jsonl', as_json)) == expected
    parquet.write_table(pyarrow.Table.from_pylist(rows), 'c.parquet')
    assert read_back('c.parquet') == expected


@pytest.mark.parametrize('suffix, content, word', [
    ('jsonl', '{"text": "a"}\n\n{"text": "b",\n{"text": "c"}\n', 'line 3'), ('csv', 'text\n"a\n', 'line 2'),
    ('json', '[\n{"text": "a"},\n{"text": }]', 'line 3'), ('jsonl', '{"text": "a"}\n5\n', 'line 2'),
    ('jsonl', b'{"text": "a"}\n{"text": "\xe9"}', 'line 2'), ('jsonl', '{"text": 7}', 'line 1'),
    ('jsonl', '{"text": "a"}\n{"text": "\\ud800"}\n', 'line 2'), ('csv', 'n,text\n1,a\n2,b,c\n', 'line 3'),
    ('csv', 'n,text\n1,a\n2\n', 'line 3'), ('csv', 'text,text\na,b\n', 'twice'), ('txt', '', 'a.txt'),
    ('txt', 'a', 'too little'),
    ('jsonl', [dict(text='a'), dict(n=1, body='c')], 'line 2: no column'), ('docx', 'x', '.jsonl'),
    ('parquet.gz', b'PAR1', 'unpack'),
    ('jsonl', '{"messages": [], "system": "s"}', 'line 1: the column system'),
    *(('jsonl', [dict(messages=[user('q'), assistant('a')]) | fields], word) for fields, word in [
        (dict(developer='s'), 'column developer'), (dict(documents=[1]), 'column documents'),
        (dict(reasoning_effort='High'), 'low, medium or high'), (dict(model_identity=5), 'model_identity'),
        (dict(builtin_tools=['search']), 'search'), (dict(builtin_tools='python'), 'builtin_tools'),
        (dict(chat_template_kwargs=dict(enable_thinking=False)), 'enable_thinking'),
        (dict(chat_template_kwargs=dict(reasoning_effort='low'), reasoning_effort='high'), 'differs'),
        (dict(chat_template_kwargs='{'), 'no JSON'), (dict(model_identity='<|end|>'), '<|end|>')]),
    ('jsonl', [dict(prompt=[user('q')], completion='a', context='c')], 'column context'),
    ('jsonl', [dict(question='q', answer='a', response='b')], 'answer, or question and response'),
    ('jsonl', [dict(question='q', answer=5)], 'answer must not hold int'),
    ('jsonl', [dict(prompt='q', completion=[user('r')])], 'no answer'),
    ('jsonl', [dict(question='q', answer='a', choices=['a', 'b'])], 'column choices'),
    ('jsonl', [dict(text='a')] * 9 + [[user('q'), assistant('a')]], 'texts and chats'),
    ('jsonl', [dict(messages=[user('q'), assistant('a')], tools=[dict(name='f', description=5)])], 'wrong'),
    ('txt', bytes(range(256)), 'Unicode'), ('txt', 'hello'.encode('utf-16'), 'iconv -f utf-16 -t utf-8'),
    ('txt', 'Привет мир'.encode('utf-16-le'), 'iconv -f utf-16 -t utf-8')])
def test_bad_file(suffix, content, word):
    file = write(f'a.{suffix}', content)
    refuse([f'a.{suffix}', word], 'prepare.py', dataset=file, data_dir='data', tokenizer='byte')
    assert not list(Path().glob('data/*'))


@pytest.mark.parametrize('fields, word', [
    (dict(thinkng='T'), 'thinkng'), (dict(reasoning='T', thinking='U'), 'differs'), (dict(content=7), 'text'),
    (dict(role='user', thinking='T'), 'thinking'), (dict(role='user'), 'no answer'),
    (dict(role='tool'), 'answers no call'), (dict(role='critic'), 'critic'), (dict(name='A'), 'only a tool'),
    (dict(content='<|call|>'), 'call'), (dict(thinking='<|end|>'), 'end'), (dict(channel='y'), 'channel'),
    (dict(content=None, tool_calls=[]), 'text'), (dict(tool_calls=[dict(name='now')]), 'no arguments'),
    (dict(tool_calls=[dict(name='now', arguments='{}')], thinking='T'), 'only text beside'),
    (dict(weight=0.5), 'weight'), (dict(tool_calls=[1]), 'tool_calls')])
def test_bad_message(fields, word):
    file = write('a.jsonl', [[user('q'), assistant('a') | fields]])
    refuse(['a.jsonl', 'line 1', word], 'prepare.py', dataset=file, data_dir='data', tokenizer='byte')


# --- training ---------------------------------------------------------------------------------------------

SHAPE = '--hidden_size=32 --intermediate_size=32 --num_hidden_layers=2'.split()
TUNE = '--block_size=16 --batch_size=4 --eval_iters=2 --sample_tokens=0 --device=cpu --dtype=float32'.split()
SHORT = '--max_iters=24 --eval_interval=6 --log_interval=4 --dropout=0.1 --warmup_iters=3'.split()


def read_metrics(out='out'):
    """The rows of metrics.jsonl without what the clock says."""
    return [json.loads(line) | dict(tokens_per_second=0) for line in open(f'{out}/metrics.jsonl')]


def read_state(folder='out/last'):
    return json.loads(Path(folder, 'state.json').read_text())


def assert_same_run(other):
    """The same numbers, and the same weights and moments at the end, to the last bit."""
    assert read_metrics() == read_metrics(other)
    for name in ('last/model.safetensors', 'last/optimizer.safetensors', 'best/model.safetensors'):
        torch.testing.assert_close(load_file(f'out/{name}'), load_file(f'{other}/{name}'), rtol=0, atol=0)


def assert_close_runs(out, other):
    """The same losses and parameters to 1e-5."""
    for a, b in zip(read_metrics(out), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {'lr', 'expert_load_min'}:
            assert a[key] == pytest.approx(b[key], abs=1e-5), (key, a, b)
    ours, theirs = [GPT.from_pretrained(f'{folder}/last', torch.float32) for folder in (out, other)]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-5)


@pytest.fixture(scope='session')
def fox(tmp_path_factory):
    """A folder with text.txt, data, out (a run that learned it, with its output in log0), and SHORT's run."""
    os.chdir(tmp_path_factory.mktemp('fox'))
    data = make_data(write('text.txt', FOX)).resolve()
    launch(*SHAPE, *TUNE, *SHORT, data_dir=data, out_dir='short')
    launch(*SHAPE, *TUNE, data_dir=data, max_iters=120, eval_interval=60, eval_iters=0, warmup_iters=10,
           sample_tokens=20, start='the')
    return Path.cwd()


@pytest.fixture
def flags(fox):
    """The flags of a test's runs, which write to out. Those that start from scratch need SHAPE too."""
    return [*TUNE, f'--data_dir={fox}/data']


def test_train(fox):
    """A run gets far below the 2.9 nats of the letters' frequencies, and reports it."""
    rows = read_metrics(fox / 'out')
    losses = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row}
    assert list(losses) == [0, 60, 120] and losses[0] > 3 and losses[120] < 0.5
    assert re.search('the (quick|lazy)', (fox / 'log0').read_text())
    last = rows[-1]
    assert last['val_bpb'] == pytest.approx(last['val_loss'] / math.log(2) * 221 / 220)
    assert len(last['expert_load_max']) == 2 and last['dead_experts'] == [0, 0]
    assert all(1 / 8 <= fraction <= 1 for fraction in last['expert_load_max'])
    assert all(0 < fraction <= 1 / 8 for fraction in last['expert_load_min'])
    row = next(row for row in rows if row['step'] == 60 and 'train_loss' in row)
    assert row['tokens'] == 60 * 64 and row['lr'] > 0
    assert 0.9 < row['balance_loss'] < 8


def test_sample(fox):
    """Greedy samples are what was learned, others follow from the seed, and a prompt can be in a file."""
    flags = [f'--out_dir={fox}/out', '--max_new_tokens=30', '--device=cpu', '--dtype=float32']
    result = run('sample.py', *flags, start='the quick', temperature=0, num_samples=2)
    assert result.out.count('the quick brown fox jumps') == 2
    assert 'tokens/s' in result.err
    write('prompt.txt', 'the lazy')
    result = run('sample.py', *flags, start='FILE:prompt.txt', temperature=0, init_from=fox / 'out/last')
    assert result.out.startswith('the lazy dog')
    one, same, other = [run('sample.py', *flags, seed=seed, temperature=2.0).out for seed in (1, 1, 2)]
    assert one == same != other


def test_batches_of_samples(fox, monkeypatch):
    """Texts are drawn together, and each ends on its own: at a stop token, or before a stop string."""
    flags = [f'--out_dir={fox}/out', '--device=cpu', '--dtype=float32', '--start=the quick']
    flags.append('--max_new_tokens=90')
    names = run('sample.py', *flags).names
    encoder = names['load_encoder'](fox / 'out/best', 0)
    rows = [[] for _ in range(9)]
    drawn = names['draw_rows'](GPT.from_pretrained(fox / 'out/best'), encoder, 0, [1, 2], rows)
    names['draw_rows'].__globals__.update(temperature=4.0)
    first = list(drawn)
    ends = {len(row) for row in rows}
    assert len(ends) > 2
    assert first == [token for token in rows[0] if token != encoder.eot_token]
    for row in rows:
        assert encoder.eot_token not in row[:-1]
        assert len(row) == 90 or row[-1] == encoder.eot_token
    said = run('sample.py', *flags, temperature=0, stop='ox,dog', num_samples=17)
    assert said.out.splitlines() == ['the quick brown f'] * 17
    assert said.err.count('tokens/s') == math.ceil(17 / sample.BATCH)
    for out in ('out', 'short'):  # the second is trained with dropout
        said = run('sample.py', *flags, out_dir=fox / out, temperature=0, logprobs=True).out
        rows = re.findall(r"^('.+?') +(\S+)   ('.+?') (\S+)  .*$", said, re.MULTILINE)
        assert len(rows) > 40
        assert all(row[:2] == row[2:] for row in rows)


def test_few_tokens(capsys):
    """The table of probabilities holds tokens that have a text, though there are less than five."""
    encoder = tiktoken.Encoding('gap', pat_str='.', mergeable_ranks={b'a': 0, b'b': 1},
                                special_tokens={prepare.END: 5})
    sample.print_probabilities(make(vocab_size=6), encoder, 0, [0], [1])
    likeliest = re.findall(r"'[ab]' (\S+)|'<.endoftext.>' (\S+)", capsys.readouterr().out.split('   ', 1)[1])
    assert sum(float(''.join(one)) for one in likeliest) == pytest.approx(1, abs=0.002)


def test_evaluate(flags, fox):
    """A run begins at the loss of its model. --eval_only prints it, of a busy run too, and writes nothing."""
    out = fox / 'out'
    loss = read_state(out / 'best')['best_loss']
    gpt = run('train.py', *flags, init_from=out / 'best', max_iters=1, eval_iters=0).names['model']
    assert gpt.config.router_aux_loss_coef == 0.05
    assert read_metrics()[0]['val_loss'] == pytest.approx(loss, abs=1e-4)
    before = {file: file.stat().st_mtime_ns for file in fox.rglob('*')}
    with FileLock(out / '.lock'):
        said = run('train.py', '--eval_only', out_dir=out, init_from='resume').out
    last = read_metrics(out)[-1]
    assert f'val loss {last["val_loss"]:.4f}, {last["val_bpb"]:.4f} bits per byte' in said
    said = run('train.py', *flags, '--eval_only', init_from=out / 'best', out_dir='new').out
    assert f'val loss {loss:.4f}' in said and not Path('new').exists()
    assert before == {file: file.stat().st_mtime_ns for file in fox.rglob('*')}


def test_epochs_and_schedule(flags):
    """An epoch draws every block once, in an order and at an offset of its own. Rates follow the schedule."""
    names = run('train.py', *SHAPE, *flags, max_iters=1).names
    drawn = [names['shuffle_epoch'](epoch)[:, 0].tolist() for epoch in range(6)]
    epochs = [sorted(starts) for starts in drawn]
    for starts in epochs:
        assert len(starts) == names['rows_per_epoch']
        assert set(np.diff(starts)) == {16}
        assert 0 <= starts[0] and starts[-1] + 16 < names['sizes']['train']
    assert len({starts[0] for starts in epochs}) > 1
    assert drawn[0] not in (epochs[0], drawn[1])
    settings = dict(cooldown=0.5, warmup_iters=9, max_iters=109, learning_rate=1.0)
    late = 0.5 * (1 + math.cos(0.75 * math.pi))
    expected = dict(linear=[0.1, 1, 1, 0.5], cosine=[0.1, 1, 0.5, late], constant=[0.1, 1, 1, 1])
    for kind, rates in expected.items():
        names['schedule'].__globals__.update(settings, lr_schedule=kind)
        assert [names['schedule'](step) for step in (0, 9, 59, 84)] == pytest.approx(rates)


def test_accumulation(flags, monkeypatch):
    """Accumulation gives the gradients of a larger batch. A run draws loss.png where matplotlib is there."""
    monkeypatch.delitem(sys.modules, 'matplotlib')
    # the load-balancing loss depends on what is in a batch
    flags = [*SHAPE, *flags, '--max_iters=1', '--warmup_iters=0', '--router_aux_loss_coef=0']
    run('train.py', *flags, out_dir='a', batch_size=8)
    run('train.py', *flags, out_dir='b', batch_size=2, gradient_accumulation_steps=4)
    moments, other = [load_file(f'{out}/last/optimizer.safetensors') for out in 'ab']
    compared = [name for name in moments if name.endswith(('exp_avg', 'momentum'))]
    assert len(compared) == len(load_file('a/last/model.safetensors'))
    assert all(off(moments[name], other[name]) < 1e-4 for name in compared)
    assert Path('a/loss.png').stat().st_size > 1000


def test_validation_rows(flags):
    """Rows predict every validation token once. A document that fits into a row is seen from its start."""
    rng = random.Random(1)
    lengths = [rng.randint(3, 14) for _ in range(60)] + [50] + [5] * 40
    documents = [dict(text='abc'[i % 3] * length) for i, length in enumerate(lengths)]
    make_data(write('a.jsonl', documents), val_fraction=0.9)
    names = run('train.py', *SHAPE, *flags, data_dir='data', max_iters=1, eval_iters=0).names
    meta, _, tokens = read_data()
    tokens = torch.from_numpy(tokens['val'].astype(int))
    is_end = tokens == meta['eot_token']
    predicted = []
    losses = []
    for start, stop in names['val_rows']:
        ends = is_end[start + 1:start + 17].nonzero()
        assert stop == start + (ends[-1].item() + 1 if len(ends) else 16)
        if start and not is_end[start]:  # inside of a document, which is longer than a row
            assert start >= 16 and not is_end[start - 15:start].any()
        predicted += range(start + 1, stop + 1)
        logits = names['model'].eval()(tokens[None, start:stop], tokens[None, start + 1:stop + 1])[0][0]
        losses.append(F.cross_entropy(logits, tokens[start + 1:stop + 1], reduction='none'))
    assert predicted == list(range(1, len(predicted) + 1))
    assert len(predicted) > len(tokens) - 18
    assert names['evaluate']() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_losses_in_reports(flags):
    """train_loss is the cross-entropy alone, balance_loss has no factor, and --recompute changes nothing."""
    flags = [*SHAPE, *flags, '--max_iters=2', '--log_interval=1']
    run('train.py', *flags, out_dir='a', router_aux_loss_coef=0)
    run('train.py', *flags, out_dir='b', router_aux_loss_coef=9)
    run('train.py', *flags, '--recompute', out_dir='c', router_aux_loss_coef=9, dropout=0)
    none, nine, recomputed = [read_metrics(out) for out in 'abc']
    for key in ('train_loss', 'balance_loss'):
        assert nine[1][key] == pytest.approx(none[1][key], abs=1e-5)
    assert nine[2]['balance_loss'] != none[2]['balance_loss']
    for row, again in zip(nine, recomputed, strict=True):
        assert all(row[key] == pytest.approx(again[key], rel=1e-5) for key in row)


def test_rates(fox, flags):
    """A model that is loaded, and adapters, get lower rates than one from scratch, which a run keeps."""
    rates = {}
    for name, more in dict(scratch=SHAPE, whole=[f'--init_from={fox}/out/best'],
                           adapters=[f'--init_from={fox}/out/best', '--lora_rank=2']).items():
        said = run('train.py', *flags, *more, out_dir=name, max_iters=1).out
        run('train.py', '--init_from=resume', out_dir=name, max_iters=2)
        settings = read_state(f'{name}/last')['settings']
        rates[name] = settings['learning_rate'], settings['muon_lr']
        assert f'AdamW {rates[name][0]:g}' in said
    assert rates == dict(scratch=(8e-3, 7e-3), whole=(8e-4, 7e-4), adapters=(1e-3, 7e-3))
    run('train.py', *flags, '--init_from=whole/best', '--learning_rate=5e-3', max_iters=1)
    assert read_state()['settings']['learning_rate'] == 5e-3
    wide = run('train.py', *SHAPE, *flags, out_dir='x', max_iters=1).names['choose_rates'](2880, True)
    assert wide['learning_rate'] == pytest.approx(2.1e-4, rel=0.01)


def test_counted_tokens_and_float16(flags):
    """resume starts a run where there is none. Tokens are counted on when batches change. float16 learns."""
    flags = [*SHAPE, *flags, '--log_interval=1']
    run('train.py', *flags, init_from='resume', max_iters=2)
    run('train.py', *flags, init_from='resume', max_iters=4, block_size=8, batch_size=2)
    assert {row['step']: row['tokens'] for row in read_metrics()} == {0: 0, 1: 64, 2: 128, 3: 144, 4: 160}
    run('train.py', *flags, '--overwrite', dtype='float16', max_iters=40)
    assert read_metrics()[-1]['val_loss'] < 2.7
    assert read_state()['scaler']['scale'] > 1


def test_not_finite(flags):
    """A step whose loss is not finite leaves the weights alone. Ten in a row end a run, a resumed one too."""
    gpt = make(vocab_size=29)
    gpt.model.norm.weight.data[:] = 3e38  # finite, but the loss is not
    gpt.lm_head.weight.data[:] = 3e38
    gpt.save_pretrained('bad')
    before = load_file('bad/model.safetensors')
    for init_from, steps in (('bad', 10), ('resume', 20)):
        refuse(['not finite', '10 steps'], 'train.py', *flags, init_from=init_from, max_iters=100)
        assert read_state()['step'] == read_state()['skipped'] == steps
        torch.testing.assert_close(load_file('out/last/model.safetensors'), before, rtol=0, atol=0)


def test_bugs_keep_their_traceback(flags, monkeypatch):
    """Only an error that a user can cause becomes one line."""
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *_: int('a bug'))
    with pytest.raises(ValueError, match='a bug'):
        run('train.py', *SHAPE, *flags)


def test_twice_in_a_process(flags, monkeypatch):
    """In a notebook a run, even one that failed, leaves no lock and no handlers. A bad plot costs a line."""
    monkeypatch.setitem(sys.modules, 'matplotlib', ModuleType('matplotlib'))
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = run('train.py', *SHAPE, *flags, max_iters=1)
    assert 'no loss.png' in first.out and 'done' in first.out
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', mock.Mock(side_effect=KeyError('a bug')))
        with pytest.raises(KeyError) as error:  # which keeps the globals, as a notebook does
            run('train.py', *flags, init_from='resume', max_iters=2)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    second = run('train.py', *flags, init_from='resume', max_iters=2)
    assert first.names['lock'] is not second.names['lock'] and error


def test_kept_checkpoints(flags):
    """keep_every keeps weights, which replace nothing and which a run that replaces this one removes."""
    run('train.py', *SHAPE, *flags, max_iters=9, eval_interval=2, keep_every=2)
    kept = {path.name for path in Path('out').glob('step-*')}
    assert kept == {'step-4', 'step-8'}
    assert read_state('out/step-4')['step'] == 4
    assert not Path('out/step-4/optimizer.safetensors').exists()
    refuse(['step-4', 'overwrite'], 'train.py', *flags, '--overwrite', init_from='out/step-4')
    loss = [row for row in read_metrics() if row['step'] == 4 and 'val_loss' in row][0]['val_loss']
    run('train.py', *flags, init_from='out/step-4', out_dir='b', max_iters=1)
    assert read_metrics('b')[0]['val_loss'] == pytest.approx(loss, abs=1e-5)
    for folder in ('out/best', 'out/last', 'out/last.old'):
        shutil.rmtree(folder)
    refuse(['out', 'resume', 'step-'], 'train.py', *flags, init_from='resume', max_iters=12)
    Path('out/step-4-notes').mkdir()
    run('train.py', *SHAPE, *flags, '--overwrite', max_iters=1)
    assert [path.name for path in Path('out').glob('step-*')] == ['step-4-notes']


def test_links(flags):
    """A run goes on where last and best are links, as to another disk."""
    run('train.py', *SHAPE, *flags, max_iters=1)
    for name in ('last', 'best'):
        Path('out', name).rename(f'disk-{name}')
        Path('out', name).symlink_to(Path(f'disk-{name}').resolve())
    run('train.py', *flags, init_from='resume', max_iters=6, eval_interval=1)
    assert read_state()['step'] == 6 and read_state('out/best')['step'] > 2


def test_frozen_process(flags):
    """A second SIGTERM ends a process that waits for one that does not answer."""
    started = begin(*SHAPE, *flags, processes=2, gradient_accumulation_steps=2, max_iters=10 ** 6)
    (waiting, _), (frozen, _) = started
    while not Path('out/last').exists():
        time.sleep(0.1)
        assert waiting.is_alive()
    os.kill(frozen.pid, signal.SIGSTOP)
    for _ in range(2):
        time.sleep(0.5)
        waiting.terminate()
    waiting.join(20)
    frozen.kill()
    assert waiting.exitcode == 128 + signal.SIGTERM


@pytest.mark.parametrize('trap', [
    ('step', 9), ('evaluation', 3), ('rename', 3), ('rename', 6), ('rename', 8), ('rename', 18)])
def test_stopped(trap, flags, fox):
    """A run stopped by a signal, then resumed, gives the numbers and bits of a run that was not."""
    killed = 'rename' in trap
    said = launch(*SHAPE, *flags, *SHORT, trap=trap, status=-9 if killed else 0)
    missing = [name for name in ('best', 'last') if not Path('out', name).exists()]
    assert len(missing) == killed  # its first time, or between the two renamings that replace it
    assert killed or 'SIGTERM' in said and read_state()['step'] in (9, 10, 13)
    finished = trap == ('rename', 18)  # only `best` of the last step was missing
    said = launch(init_from='resume', status=2 if finished else 0)  # the run remembers its other settings
    assert ('has done 24 steps' in said) == finished
    assert_same_run(fox / 'short')


@pytest.mark.parametrize('file', [
    'model.safetensors', 'state.json', 'config.json', 'optimizer.safetensors', 'meta.json'])
def test_damaged_checkpoint(file, fox):
    """The older checkpoint replaces a damaged one, of which a file is cut short or, here meta.json, gone."""
    shutil.copytree(fox / 'short', 'out')
    os.truncate(f'out/last/{file}', os.path.getsize(f'out/last/{file}') - 3)
    if file == 'meta.json':
        os.remove('out/last/meta.json')
    assert read_state('out/last.old')['step'] == 18
    shutil.copytree('out', 'killed')
    assert 'last is damaged' in run('train.py', init_from='resume').out
    assert_same_run(fox / 'short')
    if file == 'meta.json':  # where the damaged one would become last.old
        for number in (1, 2):
            launch('--init_from=resume', out_dir='killed', trap=('rename', number), status=-9)
        run('train.py', init_from='resume', out_dir='killed')
        assert_same_run('killed')


def test_windows(flags, monkeypatch):
    """Windows flushes only files that are open for writing, and no folders, which it cannot open."""
    flushed = []
    monkeypatch.delattr(os, 'O_DIRECTORY')
    monkeypatch.setattr(os, 'fsync', lambda file: flushed.append(os.write(file, b'')))  # fails for others
    run('train.py', *SHAPE, *flags, max_iters=2)
    assert len(flushed) > 5


@pytest.mark.parametrize('fsdp', [False, True], ids=['DDP', 'FSDP2'])
def test_processes(fsdp, flags):
    """Processes give the numbers of one, which resumes their run. They use last.old where last is damaged."""
    flags = [*SHAPE, *flags, '--max_iters=12', '--eval_interval=4', '--log_interval=1', '--warmup_iters=3',
             '--num_local_experts=3', '--tie_word_embeddings=True', '--gradient_accumulation_steps=4']
    launch(*flags, out_dir='one')
    launch(*flags, fsdp=fsdp, processes=2)  # they divide 3 experts
    assert_close_runs('out', 'one')
    launch(*flags, '--overwrite', fsdp=fsdp, processes=2, trap=('step', 7))
    assert 4 < read_state()['step'] < 12
    files = {'config.json', 'meta.json', 'model.safetensors', 'state.json', 'tokenizer.tiktoken'}
    assert set(os.listdir('out/best')) == files
    assert set(os.listdir('out/last')) == files | {'optimizer.safetensors'}
    shutil.copytree('out', 'damaged')
    launch(init_from='resume')
    assert_close_runs('out', 'one')
    os.truncate('damaged/last/optimizer.safetensors', 1000)
    assert 'last is damaged' in launch(out_dir='damaged', init_from='resume', fsdp=fsdp, processes=2)
    assert_close_runs('damaged', 'one')


def test_nodes(flags):
    """All processes end with one line if they cannot share the batches, or if a node has other files."""
    for node in 'ab':
        make_data(write(f'{node}/text.txt', FOX + node))
    flags = [*SHAPE, *flags, '--data_dir=data', '--max_iters=2', '--gradient_accumulation_steps=2']
    nodes = dict(processes=2, folders='ab')
    said = launch(*flags, **nodes, gradient_accumulation_steps=3, status=2)
    assert '--gradient_accumulation_steps=4' in said
    launch(*flags, **nodes, status=2)
    assert 'not hold the same data' in Path('b/log1').read_text()
    shutil.copytree('a/data', 'b/data', dirs_exist_ok=True)
    for seed, node in enumerate('ab'):
        write(f'{node}/mine.py', f'seed = {seed}')
    launch('mine.py', *flags, **nodes, status=2)
    assert 'other settings than rank 0' in Path('b/log1').read_text()
    launch(*flags, **nodes)
    launch(*flags, **nodes, init_from='resume', max_iters=3, status=2)
    assert 'nodes, which must share it' in Path('b/log1').read_text()
    Path('a/out').rename('b/out')  # only the second node has a run
    launch(*flags, **nodes, init_from='resume', max_iters=3, status=2)
    assert 'nodes, which must share it' in Path('b/log1').read_text()


def test_other_data(flags):
    """A run does not continue on data that has changed, if in its order alone, unless --data_dir names it."""
    make_data(write('a.txt', 'a fog and a dog. ' * 99))
    run('train.py', *SHAPE, *flags, data_dir='data', max_iters=1)
    before, _, _ = read_data()
    make_data(write('a.txt', 'a dog and a fog. ' * 99))
    after, _, _ = read_data()
    assert {key for key in after if after[key] != before[key]} == {'train_crc32', 'val_crc32'}
    refuse(['data', 'changed', '--data_dir'], 'train.py', init_from='resume', max_iters=2)
    run('train.py', init_from='resume', max_iters=2, data_dir='data')


@pytest.fixture(scope='session')
def chats(tmp_path_factory):
    """out of a run that learned to answer."""
    os.chdir(tmp_path_factory.mktemp('chats'))
    answers = dict(red='stop', green='go', yellow='wait')
    turns = [[user(color), assistant(answers[color], thinking='Hm.')] for color in answers]
    messages = [turn + other for turn in turns for other in turns] * 4
    make_data(write('chats.jsonl', messages), tokenizer='bpe', vocab_size=300)
    size = 2 * np.diff(find_ends('train')).max()
    launch(*SHAPE, *TUNE, data_dir='data', hidden_size=64, block_size=size, max_iters=150, warmup_iters=5)
    return Path('out').resolve()


def find_ends(split):
    """The positions of end of text, and -1."""
    _, encoder, tokens = read_data()
    return np.append(-1, np.flatnonzero(tokens[split] == encoder.eot_token))


def test_chat_goes_on(monkeypatch):
    """A chat goes on from its cache, past windows too, and answers as if the whole prompt were computed."""
    for name, value in dict(temperature=0, max_new_tokens=30, chat=True).items():
        monkeypatch.setattr(sample, name, value)
    encoder = prepare.encoding('byte', {bytes([byte]): byte for byte in range(256)})
    gpt = make(vocab_size=257).eval()
    for window in (0, 150):
        cache = sample.ChatCache(gpt, encoder, window)
        find_kept = cache.find_kept
        cache.find_kept = lambda prompt: kept.append(find_kept(prompt)) or kept[-1]
        kept = []
        prompt = []
        for new in (list(range(40)), [1, 2, 3], [5] * 25, [7], [6] * 70, [9] * 9):
            prompt = prompt + new
            assert list(cache.answer(prompt)) == list(sample.ChatCache(gpt, encoder, window).answer(prompt))
        prompt = prompt[50:]  # the oldest turn is left out
        assert list(cache.answer(prompt)) == list(sample.ChatCache(gpt, encoder, window).answer(prompt))
        assert kept == [0, 40, 43, 68, 0, 139, 0]  # 0: in caches of twice the size, and where it begins anew


def chat_with(words, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdin', io.StringIO(words))
        flags = ['--chat', '--temperature=0', '--dtype=float32', '--device=cpu', '--max_new_tokens=40']
        return run('sample.py', *flags, **settings).out


def test_chat(chats):
    """The model has learned to answer, and stops. It does not see a message that exceeds the context."""
    assert read_state(chats / 'best')['best_loss'] < 0.2
    answer = chat_with('red\n\ngreen\n', out_dir=chats)
    assert answer.startswith('[analysis]\nHm.\n[final]\nstop\n')
    assert answer.count('[final]') == 2
    assert chat_with('green ' * 60, out_dir=chats, context=20) == ''


def test_long_chats(flags):
    """A row begins with a chat and has a target. A line tells what does not fit, and which size takes all."""
    messages = [[user('word ' * (300 if i % 3 else 1)), assistant('ok')] for i in range(40)]
    make_data(write('chats.jsonl', messages), tokenizer='byte')
    _, _, tokens = read_data()
    flags = [*SHAPE, *flags, '--data_dir=data', '--max_iters=2', '--log_interval=1', '--overwrite']
    longest = max(np.diff(find_ends(split)).max() - 1 for split in tokens)
    for block_size in (512, longest):
        result = run('train.py', *flags, block_size=block_size)
        assert (f'--block_size={longest} takes all' in result.out) == (block_size == 512)
        assert all(row['train_loss'] > 0 for row in read_metrics() if 'train_loss' in row)
        for split, rows in (('train', result.names['chat_rows']), ('val', result.names['val_rows'])):
            assert set(rows[:, 0] - 1) <= set(find_ends(split))
            _, y = result.names['make_batch'](split, rows)
            assert (y >= 0).any(1).all()
            mask = np.fromfile(f'data/{split}_mask.bin', bool)
            assert (y[y >= 0].tolist() == tokens[split][mask].tolist()) == (block_size == longest)
    refuse([f'={longest}'], 'train.py', *flags, block_size=99)


def converse(monkeypatch, words, answers, longest=10_000, tokenizer='byte'):
    """The prompts of a conversation in which the model gives these answers."""
    ranks = {bytes([i]): i for i in range(128 if tokenizer == 'char' else 256)}
    encoder = prepare.encoding(tokenizer, ranks, (END, *prepare.HARMONY))
    prompts = []

    def answer(prompt):
        prompts.append(encoder.decode(prompt))
        return iter(prepare.encode_prompt(encoder, answers.pop(0))[:-1])

    monkeypatch.setattr(sys, 'stdin', io.StringIO(words))
    sample.converse(answer, encoder, longest)
    return prompts


def test_chat_beyond_the_context(monkeypatch):
    """The oldest turns are left out whole, and so is a message that is too long. The system message stays."""
    monkeypatch.setattr(sample, 'system', 'Be brief.')
    words = [letter * 500 for letter in 'abc'] + ['d' * 5000]
    answers = ['<|channel|>final<|message|>Yes.<|return|>'] * 3
    first, _, last = converse(monkeypatch, '\n'.join(words), answers, 1200)
    assert last == first.replace(words[0], words[2]) and 'Be brief.' in last


def test_chat_with_tools(monkeypatch, capsys):
    """A call of a function ends the answer, and the next line of input is its result."""
    monkeypatch.setattr(sample, 'tools', str(write('tools.json', json.dumps(TOOLS))))
    call = ' to=functions.find<|channel|>commentary json<|message|>{"what":"a"}<|call|>'
    final = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>'
    first, second = converse(monkeypatch, 'Find a.\nIt is here.\n', [call, final])
    assert capsys.readouterr().out == '[commentary to find]\n{"what":"a"}\n[analysis]\nHm.\n[final]\na\n'
    result = '<|start|>functions.find to=assistant<|channel|>commentary<|message|>It is here.<|end|>'
    assert 'type find = ' in first
    assert second == first + call + result + '<|start|>assistant'


@pytest.mark.parametrize('header, recipient, kind, constrain', [
    ('<|channel|>analysis to=python code', 'python', 'code', False),
    (' to=browser.search<|channel|>analysis code', 'browser.search', 'code', False),
    ('<|channel|>commentary to=get_a-b <|constrain|>json', 'get_a-b', 'json', True),
    ('<|channel|>commentary to=functions.f<|constrain|>json', 'functions.f', 'json', True),
    ('<|channel|>commentary to=f', 'f', '', False)])
def test_recipients(header, recipient, kind, constrain, monkeypatch, capsys):
    """A message to any tool is a call. The history keeps it as it was written. The next line answers it."""
    histories = []

    def keep(messages, *more):
        histories.append(copy.deepcopy(messages))
        return prepare.Chat(messages, *more)

    monkeypatch.setattr(sample, 'Chat', keep)
    answers = [f'{header}<|message|>1 + 1<|call|>', '<|channel|>final<|message|>2<|return|>']
    prompts = converse(monkeypatch, 'Q\n2\nQ\n', [*answers, *answers[1:]])
    name = recipient.removeprefix('functions.')
    channel = 'analysis' if 'analysis' in header else 'commentary'
    assert capsys.readouterr().out == f'[{channel} to {name}]\n1 + 1\n' + '[final]\n2\n' * 2
    call = dict(name=name, recipient=recipient, content_type=kind, constrain=constrain, arguments='1 + 1')
    called = dict(role='assistant', channel=channel, tool_calls=[call])
    assert histories[-1] == [user('Q'), called, dict(role='tool', content='2'),
                             assistant('2', channel='final'), user('Q')]
    assert prompts[1].count('<|start|>user') == 1
    assert prompts[2].count('<|start|>user') == 2
    form = (' ' + '<|constrain|>' * constrain + kind) if kind else ''
    turn = (f' to={recipient}<|channel|>{channel}{form}<|message|>1 + 1<|call|>'
            f'<|start|>{recipient} to=assistant<|channel|>{channel}<|message|>2<|end|><|start|>assistant')
    assert prompts[1] == prompts[0] + turn


HI = '<|start|>assistant<|channel|>final<|message|>Hi<|end|>'


@pytest.mark.parametrize('answer, shown, history', [
    ('Hi to=a<|return|>', 'Hi to=a\n', HI.replace('Hi', 'Hi to=a')),
    ('<|channel|>an<|return|>', '<|channel|>an\n', ''), (' to=a<|return|>', ' to=a\n', ''),
    ('Hi<|end|><|start|>assistant<|message|>Hi<|return|>', 'Hi\n[final]\nHi\n', HI + HI),
    ('<|channel|>other<|message|>Hi<|return|>', '[other]\nHi\n', HI),
    ('<|channel|>final to=user<|message|>Hi<|return|>', '[final]\nHi\n', HI)])
def test_answers_without_form(answer, shown, history, monkeypatch, capsys):
    """Text without a header or in an unknown channel is kept as an answer. A header that is cut is not."""
    first, second = converse(monkeypatch, 'Q\nQ\n', [answer, HI + '<|return|>'])
    assert capsys.readouterr().out == shown + '[final]\nHi\n'
    begin = '<|start|>assistant'
    assert second == first.removesuffix(begin) + history + '<|start|>user<|message|>Q<|end|>' + begin


def test_characters_of_a_chat(chats, monkeypatch, capsys):
    """A message that the tokenizer cannot encode is left out. Input in another encoding is refused."""
    prompts = converse(monkeypatch, 'a\nn\xe9\nb\n', [HI + '<|return|>'] * 2, tokenizer='char')
    assert len(prompts) == 2
    assert "left out: the char tokenizer has no 'é'" in capsys.readouterr().err
    flags = [f'--out_dir={chats}', '--device=cpu', '--chat']
    for errors in ('strict', 'surrogateescape'):  # the second in the locale C
        stdin = io.TextIOWrapper(io.BytesIO(b'n\xe9\n'), 'utf-8', errors)
        monkeypatch.setattr(sys, 'stdin', stdin)
        refuse(['input', 'utf-8', 'PYTHONIOENCODING'], 'sample.py', *flags)
    refuse(['system', 'UTF-8'], 'sample.py', *flags, system='\udce9')
    refuse(['max_new_tokens', '131072'], 'sample.py', *flags, max_new_tokens=131072)
    tools = write('tools.json', json.dumps([dict(name=5, description='x' * 5000)]))
    refuse(['tools', 'has no name'], 'sample.py', *flags, tools=tools)


def test_adapted_chat(flags, chats):
    """Adapters alone learn other answers. They are resumed, and exported with their base."""
    make_data(write('chats.jsonl', [[user('red'), assistant('go')]] * 16), tokenizer=chats / 'best')
    flags = [*flags, '--data_dir=data', '--block_size=200', '--lora_rank=4', f'--init_from={chats}/best']
    run('train.py', *flags, max_iters=40, warmup_iters=5)
    assert not list(Path('out/best').glob('model*'))
    assert Path('out/best/adapter_model.safetensors').stat().st_size < 120_000
    assert 'go' in chat_with('red\n')
    gpt = run('train.py', init_from='resume', max_iters=41).names['model']
    assert gpt.config.router_aux_loss_coef == 0  # frozen routers cannot be balanced; the base has 0.05
    run('sample.py', export='both', experts='mxfp4')
    assert GPT.from_pretrained('both', experts='mxfp4').lora is None


def test_base(fox):
    """--base finds a model that was moved away from its adapters. It can hold no adapters, such as these."""
    make().save_pretrained('base')
    adapt(GPT.from_pretrained('base', torch.float32)).save_adapter('adapters')
    expected = GPT.from_pretrained('adapters', torch.float32)
    expected.merge_lora()
    Path('base').rename('moved')
    flags = ['--init_from=adapters', f'--tokenizer_from={fox}/data', '--dtype=float32', '--device=cpu']
    words = ['adapters', os.path.abspath('base'), 'base_model_name_or_path', '--base']
    refuse(words, 'sample.py', *flags)
    refuse(['--base', 'nowhere'], 'sample.py', *flags, base='nowhere')
    refuse(['only adapters need a base'], 'sample.py', *flags, init_from='moved', base='moved')
    assert model.read_shape('adapters', base='moved') == (expected.config, dict(lora_rank=3, lora_alpha=6.0))
    run('sample.py', *flags, base='moved', export='merged')
    assert_same(expected, GPT.from_pretrained('merged', torch.float32))
    shutil.copytree('adapters', 'others')
    for folder, named in (('adapters', 'others'), ('others', 'adapters'), ('others', 'others')):  # circles
        raw = model.read_json(f'{folder}/adapter_config.json')
        model.write_json(Path(folder, 'adapter_config.json'), raw | dict(base_model_name_or_path=named))
        with pytest.raises(ValueError, match=f"'{named}': it holds adapters itself") as error:
            model.read_shape(folder)
        assert len(str(error.value)) < 300
        refuse([folder, f"'{named}': it holds adapters itself"], 'sample.py', *flags, init_from=folder)


@pytest.mark.parametrize('value, words', [
    ('8', ['8']), ('ox,dog', ['ox', 'dog']), ("'a'", ['a']), ("'. ','The'", ['. ', 'The']), ('None', None),
    ("['\\n']", ['\n']), ("('a', 'b')", ['a', 'b']), ('1,2', ['1', '2'])])
def test_lists_of_words(value, words):
    """A list on the command line is a list of Python, or words with commas between them."""
    assert config.convert('--stop', value, 'list[str] | None') == words


# --- on a GPU ---------------------------------------------------------------------------------------------

# 8 units of the format's last place; in fp32 more, for long sums in another order
GPU_FP32 = pytest.param(torch.float32, 1e-5, id='fp32')
GPU_BF16 = pytest.param(torch.bfloat16, 8 * 2 ** -7, id='bf16')
GPU_FP16 = pytest.param(torch.float16, 8 * 2 ** -10, id='fp16')
WIDE = SQUARE | dict(head_dim=32)  # the kernels take heads in multiples of 8


@pytest.mark.parametrize('dtype, tolerance', [GPU_BF16, GPU_FP16])
@pytest.mark.parametrize('hd', [32, 64, 128])
@pytest.mark.parametrize('KV', [6, 2, 1])
@pytest.mark.parametrize('T', [1, 129, 257, 1000])
def test_attention_on_gpu(T, KV, hd, dtype, tolerance, gpu):
    """CUDA's flash kernel with each head's own keys, with groups, and with one key head for all."""
    newer = torch.cuda.get_device_capability() >= (8, 0)
    assert model.can_flash(torch.empty(1, 1, 1, hd, dtype=dtype, device=gpu)) == newer
    for window in (None, 16, 128):
        check_attention(model.fast_attention, T, window, dtype, tolerance, KV, hd, gpu)


@pytest.mark.parametrize('dtype, T, window, KV, hd', [
    (torch.float16, 1, None, 6, 32), (torch.bfloat16, 129, 16, 2, 64),
    (torch.bfloat16, 257, None, 1, 128), (torch.float16, 1000, 128, 2, 64)], ids=str)
def test_compiled_attention_on_gpu(dtype, T, window, KV, hd, gpu):
    compiled = torch.compile(model.fast_attention, dynamic=False, fullgraph=True)
    check_attention(compiled, T, window, dtype, 8 * torch.finfo(dtype).eps, KV, hd, gpu)


@pytest.mark.parametrize('dtype, tolerance', [GPU_FP32, GPU_BF16, GPU_FP16])
@pytest.mark.parametrize('rows', [1, 3, 300])
@pytest.mark.parametrize('kind, way', [
    ('plain', 'defined'), ('plain', 'gathered'), ('plain', 'looped'), ('plain', 'cuda'),
    ('packed', 'gathered'), ('packed', 'looped'), ('packed', 'cuda'), ('adapted', 'cuda')])
def test_experts_on_gpu(kind, way, rows, dtype, tolerance, gpu):
    """Each way that CUDA takes. Experts without rows get no gradient."""
    with mock.patch.object(F, 'grouped_mm', wraps=F.grouped_mm) as grouped:
        check_experts(kind, way, rows, dtype, tolerance, gpu)
    assert grouped.called == (kind != 'packed' and way == 'cuda' and dtype == torch.bfloat16)


@pytest.mark.parametrize('dtype, options', [
    (torch.bfloat16, {}), (torch.bfloat16, dict(compiled=True)), (torch.bfloat16, dict(recompute=True)),
    (torch.float16, {})], ids=str)
def test_autocast_on_gpu(dtype, options, gpu):
    """Logits within 8 and gradients within 20 units of the format's last place. A CPU's are 4 and 12 off."""
    unit = torch.finfo(dtype).eps
    check_autocast(dtype, (8 * unit, 20 * unit), gpu, **options, **WIDE)


@pytest.mark.parametrize('kind', ['plain', 'packed', 'adapted'])
def test_decoding_on_gpu(kind, gpu):
    """In fp32 a step of one token, captured, compiled or not, draws what the whole forward pass does. Prompts
    of all lengths compile one graph for one row, and one for several rows."""
    make(**SQUARE).save_pretrained('model', experts='mxfp4')
    gpt = GPT.from_pretrained('model', torch.float32, gpu, experts='mxfp4' if kind == 'packed' else None)
    gpt = (adapt(gpt) if kind == 'adapted' else gpt).eval()
    torch._dynamo.utils.counters.clear()
    for size, length in itertools.product((1, 3), (1, 9, 20, 200, 600, 1100)):
        idx = torch.randint(97, (size, length)).to(gpu)
        expected = idx
        for _ in range(6):
            expected = torch.cat((expected, gpt(expected)[0].argmax(-1)), dim=1)
        for compile in (False, True):
            assert torch.equal(gpt.generate(idx, 6, temperature=0, compile=compile), expected)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2


@pytest.mark.parametrize('dtype, tolerance', [
    pytest.param(torch.float32, 1e-4, id='fp32'), pytest.param(torch.bfloat16, 20 * 2 ** -7, id='bf16')])
def test_packed_experts_on_gpu(dtype, tolerance, gpu):
    """MXFP4 unpacks to the bits that a CPU gets, and gives the logits of unpacked experts. Adapters on it get
    their gradients, though a packed model computes each layer again."""
    # every expert is chosen, because rounding decides where the router's choice is close
    make(num_experts_per_tok=5, **WIDE).save_pretrained('model', experts='mxfp4')
    packed, full = [GPT.from_pretrained('model', dtype, gpu, experts=kind) for kind in ('mxfp4', None)]
    expected = GPT.from_pretrained('model', dtype)
    unpack = torch.compile(MXFP4.__getitem__)
    for layer, one, other in zip(*(gpt.model.layers for gpt in (packed, full, expected))):
        for name in model.STACKS:
            stack, matrices, on_cpu = [getattr(each.mlp.experts, name) for each in (layer, one, other)]
            assert torch.equal(matrices.cpu(), on_cpu)
            assert torch.equal(stack.unpack().to(dtype), matrices)
            assert torch.equal(unpack(stack, torch.arange(5, device=gpu)).to(dtype), matrices)
    idx = torch.randint(97, (2, 100)).to(gpu)
    assert off(packed(idx, idx)[0], full(idx, idx)[0].float()) < tolerance
    for gpt in (packed, full):
        adapt(gpt)(idx, idx, return_logits=False)[1].backward()
    assert packed.recompute and not full.recompute
    assert_gradients(gradients(packed), gradients(full), tolerance)


def test_training_on_gpu(gpu):
    """20 steps of train.py in each dtype, compiled or not, by FSDP2 in one process of torchrun, and stopped
    and resumed. Losses are those of fp32, but for the rounding of the format."""
    dtypes = dict(float32=0.02, bfloat16=0.05, float16=0.05)  # nats; on a CPU 0, 0.012 and 0.011
    options = {f'{dtype} {compile}': dict(dtype=dtype, compile=compile)
               for dtype, compile in itertools.product(dtypes, (False, True))}
    options['float32 by TF32'] = dict(dtype='tf32')
    options['float32 stopped'] = dict(dtype='float32', trap=('step', 9))
    options['bfloat16 fsdp'] = dict(dtype='bfloat16', processes=1, fsdp=True)
    data = make_data(write('text.txt', FOX)).resolve()
    flags = [*SHAPE, *SHORT, '--max_iters=20', '--dropout=0', '--log_interval=1', '--eval_iters=2',
             '--block_size=64', '--sliding_window=16', '--batch_size=8', '--sample_tokens=0']
    started = {}
    for name, more in options.items():  # all at once, because compiling takes a minute
        Path(name).mkdir()
        started[name] = begin(*flags, data_dir=data, folders=[name], method='spawn', **more)
    for name in options:
        said = finish(started[name], seconds=200)
        assert gpu in said and ('by TF32' in said) == ('by TF32' in name)
    finish(begin('--init_from=resume', folders=['float32 stopped'], method='spawn'))
    runs = {name: read_metrics(f'{name}/out') for name in options}
    for name, rows in runs.items():
        for row, expected in zip(rows, runs['float32 False'], strict=True):
            for key in row.keys() & {'train_loss', 'val_loss'}:
                difference = row[key] - expected[key]
                assert abs(difference) < dtypes[name.split()[0]], (name, row, expected)


@pytest.mark.parametrize('dtype, more', [
    ('float32', {}), ('tf32', {}), ('bfloat16', {}), ('float16', {}), ('bfloat16', dict(compile=True)),
    ('bfloat16', dict(experts='mxfp4'))], ids=str)
def test_sample_on_gpu(dtype, more, fox, gpu):
    """A model samples what it has learned, in each dtype."""
    flags = [f'--out_dir={fox}/out', '--max_new_tokens=30', '--num_samples=2', f'--device={gpu}']
    result = run('sample.py', *flags, start='the quick', temperature=0, dtype=dtype, **more)
    assert result.out.count('the quick brown fox jumps') == 2
    assert result.err.count('tokens/s') == 1


# --- command lines ----------------------------------------------------------------------------------------

def test_oldest_python():
    """The sources use nothing that is newer than Python 3.10."""
    newer = re.compile(r'tomllib|ExceptionGroup|add_note|TaskGroup|contextlib\.chdir|itertools\.batched'
                       r'|StrEnum|\bUTC\b|file_digest|catch_warnings\([a-z]*=|(?<!ast)\.walk\(|sumprod'
                       r'|typing\.Self|sys\.exception\b')
    for file in [*ROOT.glob('*.py'), *ROOT.glob('config/*.py'), *ROOT.glob('.ci/*.py')]:
        source = file.read_text(encoding='utf-8')
        ast.parse(source, feature_version=(3, 10))
        assert file.name.startswith('test_') or not newer.search(source), newer.search(source)


def read_settings(*arguments, script='train.py'):
    with mock.patch.object(sys, 'argv', [script, *map(str, arguments)]):
        return config.read(ROOT / script, model=script == 'train.py')


def test_settings():
    read = read_settings
    values, given = read('config/tinystories.py', '--batch_size=32', '--start=a=b', '--max_iters=1e3')
    assert values | dict(batch_size=32, block_size=512, start='a=b', max_iters=1000) == values
    assert given >= {'batch_size', 'block_size', 'hidden_size'}
    assert 'grad_clip' not in given
    values, _ = read('config/gpt_oss_20b.py')
    with torch.device('meta'):  # published: 20.9 B parameters, 3.6 B active apart from the embedding
        gpt = GPT(GPTConfig(**{key: values[key] for key in GPTConfig.__dataclass_fields__}))
    assert gpt.num_parameters() == pytest.approx(20.91e9, rel=1e-3)
    assert gpt.num_parameters(active=True) - 201088 * 2880 == pytest.approx(3.61e9, rel=1e-2)
    assert gpt.flops_per_token(1) == pytest.approx(6 * 3.61e9, rel=1e-2)
    assert gpt.requires_grad_(False).flops_per_token(1) == pytest.approx(4 * 3.61e9, rel=1e-2)


def test_config_files(capsys):
    """A config is run as Python reads it. What does not look like one is refused before a line of it runs."""
    write('bom.py', b'\xef\xbb\xbfbatch_size = 7\r\n')
    write('code.py', 'import math\n_n = 3\ndef twice(x):\n    y = 2 * x\n    return y\n'
                     'block_size = sum(twice(i) for i in range(_n))\nexec(open("bom.py", "rb").read())')
    assert read_settings('bom.py')[0]['batch_size'] == 7
    values, given = read_settings('code.py')
    assert (values['batch_size'], values['block_size'], given) == (7, 6, {'batch_size', 'block_size'})
    assert read_settings('config/default.py')[1] == set()
    run = 'open("ran", "w")\n'
    files = {'rows.jsonl': run + 'seed = 1', 'seed': run + 'seed = 1', 'print.py': run, 'empty.py': '',
             'names.py': run + 'seed = 1\nx = 2', 'syntax.py': run + 'seed = (', 'nul.py': run + '\0'}
    for name, content in files.items():
        write(name, content)
        with pytest.raises(SystemExit):
            read_settings(name)
        line, = capsys.readouterr().err.splitlines()
        assert name in line and ('--dataset=' in line or 'x: there is no such setting' in line), line
    assert not Path('ran').exists()


@pytest.mark.parametrize('script', ['train.py', 'prepare.py', 'sample.py', 'bench.py'])
def test_home(script, monkeypatch, capsys):
    """~ is the home in every setting but texts: in flags, config files, and the settings of a resumed run."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('USERPROFILE', '/home/me')
    kinds = {key: kind for key, (kind, *_) in config.declared(script).items()}
    texts = {'start', 'system', 'text_column', 'wandb_project', 'wandb_run_name'}
    for key in [key for key in kinds if kinds[key] in ('str', 'text')]:
        write('home.py', f'{key} = "~/x"')
        expected = '~/x' if key in texts else '/home/me/x'
        assert read_settings(f'--{key}=~/x', script=script)[0][key] == expected
        assert read_settings('home.py', script=script)[0][key] == expected
        assert config.convert(f'state.json: {key}', '~/x', kinds[key]) == expected
        if key not in texts:
            assert read_settings(f'--{key}=./~', script=script)[0][key] == './~'
            with pytest.raises(SystemExit):
                read_settings(f'--{key}=~no one/x', script=script)
    if 'start' in kinds:
        for text, expected in (('FILE:~/x', 'FILE:/home/me/x'), ('~ once', '~ once'), ('a ~/x', 'a ~/x')):
            assert read_settings(f'--start={text}', script=script)[0]['start'] == expected


@pytest.mark.parametrize('encoding, expected', [('', 'Я €'), ('cp1252', '? €'), ('ascii', '? ?')])
def test_pipes(encoding, expected):
    """Pipes are UTF-8 in any locale. No text ends at a character that the chosen encoding lacks."""
    environment = dict(PYTHONIOENCODING=encoding, LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
    code = r'import config; print(input() or "\u042f \u20ac"); config.fail("\u042f")'
    for text in ('', '' if encoding else 'Я €'):
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, input=f'{text}\n'.encode(),
                              env=os.environ | environment, capture_output=True)
        assert done.stdout.decode(encoding or 'utf-8').strip() == expected
        assert done.returncode == 2 and b'Traceback' not in done.stderr


def test_help():
    """--help has a line for each setting, and does not mind a closed pipe."""
    for script in ('train.py', 'prepare.py', 'sample.py', 'bench.py'):
        text = run(script, '--help').out
        for key, (kind, default, _, heading) in config.declared(script).items():
            line, = re.findall(rf'^  --{key}={re.escape(repr(default))} .*', text, re.MULTILINE)
            assert kind in line and len(line.split()) > 2
            assert f'\n{heading}\n' in text
    command = f'PYTHONUNBUFFERED=1 {sys.executable} {ROOT}/train.py --help | head -3'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert not done.stderr and len(done.stdout.splitlines()) == 3


def test_bench():
    flags = [*SHAPE, *TUNE[:2], '--rounds=1', '--steps=1', '--new_tokens=4', '--device=cpu']
    run('bench.py', *flags, vocab_size=300, json_file='b.json')
    rows = json.loads(Path('b.json').read_text())['rows']
    assert [row['row'] for row in rows] == ['train', 'prefill', 'decode']
    assert rows[0]['MFU'] > 0
    assert all(row['tokens/s'] > 0 and row['peak GB'] > 0.05 for row in rows)
    assert '512 | 128 | True' in run('bench.py', *flags, '--scale').out


def test_bench_learning(fox, monkeypatch):
    """--learn draws rows from the whole text, and its validation loss is that of all of val.bin."""
    pytest.importorskip('transformers')
    flags = [*SHAPE, '--block_size=16', '--batch_size=4', '--device=cpu', '--dtype=float32', '--max_iters=2']
    flags += ['--learn', '--learning_rate=0', '--muon_lr=0', f'--data_dir={fox}/data']
    monkeypatch.setattr(sys, 'argv', ['bench.py', *flags])
    ours, _, dense = [SimpleNamespace(**job, seed=0) for job in bench.list_jobs(bench.read_settings())]
    tokens = read_data(fox / 'data')[2]
    rows = bench.open_rows('train', ours)
    assert len(rows) == len(tokens['train']) - 16
    assert np.array_equal(rows[-1], tokens['train'][-17:])
    result = bench.measure_learning(ours)
    count = (len(tokens['val']) - 1) // 16
    x, y = [torch.from_numpy(tokens['val'][i:i + count * 16].astype(int)).view(-1, 16) for i in (0, 1)]
    loss = bench.build_model(ours)[0].eval()(x, y)[1].item()
    assert result['val loss'] == pytest.approx(loss, abs=1e-5)
    assert bench.build_model(dense)[0].num_parameters() == pytest.approx(result['active parameters'], rel=0.1)


# bad input: a script, its flags, and the decisive words of the line that refuses them
USUAL = dict(
    train=[*SHAPE, *TUNE, '--data_dir=data', '--out_dir=new', '--max_iters=1'],
    prepare=['--dataset=text.txt', '--tokenizer=byte', '--data_dir=prepared'],
    sample=['--out_dir=short', '--max_new_tokens=3', '--device=cpu'], bench=['--device=cpu'])
BAD_INPUT = dict(
    train=[
        ('--learning_rat=1', 'learning_rat', 'learning_rate'), ('--batch_size=abc', 'batch_size', 'abc'),
        ('config/tinystorys.py', 'tinystories.py'), ('typo.py', 'learning_rat'), ('crash.py', 'line 2'),
        ('text.txt', 'ends in .py', '--dataset='), ('data', 'data', '--dataset=', '--data_dir='),
        ('--num_key_value_heads=3 --data_dir=data/builtin', '4', '3'), ('--layer_types=x,x', 'layer_types'),
        ('--batch_size=0 --data_dir=data/builtin', 'batch_size', '0'), ('--out_dir', '--out_dir='),
        ('--batch_size=1e17', 'batch_size', 'tokens'),
        ('--block_size=500', '221', '501'), ('--vocab_size=5', 'data/', '5'), ('--device=tpu9', 'tpu9'),
        ('--dtype=int4', 'int4'), ('--fsdp', 'torchrun'), ('--init_from=nowhere', 'nowhere'),
        ('--dtype=tf32', 'CUDA'), ('--min_lr=1', 'min_lr', 'learning_rate'),
        ('--lora_rank=4', 'lora_rank', 'init_from'), ('--init_from=short/best --experts=mxfp4', 'experts'),
        ('--init_from=short/best --hidden_size=64', 'short/best', 'embed_tokens'),
        ('--init_from=short/best --data_dir=upper', 'short/best', 'tokenizer'),
        ('--out_dir=short --overwrite --init_from=short/best', 'short/best', 'overwrite'),
        ('--out_dir=short', 'short', 'overwrite'), ('--out_dir=locked', 'locked', 'another run'),
        ('--out_dir=text.txt/out', 'text.txt/out'), ('--data_dir=none', 'none/meta.json'),
        ('--data_dir=empty', 'empty/meta.json'), ('--data_dir=cut', 'cut/train.bin', '1001'),
        ('--data_dir=strange', 'strange/train.bin', '65535')],
    prepare=[
        ('--dataset=none.txt', 'none.txt'), ('--dataset=no*.jsonl', 'no*.j'), ('--tokenizer=gtp2', 'gpt2'),
        ('text.txt', 'text.txt', '--dataset='),
        ('--val_dataset=none.txt', 'none.txt'), ('--val_dataset=text.txt', 'val_dataset'),
        ('--val_fraction=1.5', '1.5'), ('--tokenizer=bpe --vocab_size=100', '100', '257'),
        ('--tokenizer=bpe --vocab_size=1e9', '1000000000'), ('--max_docs=-1', 'max_docs', '-1'),
        ('--tokenizer=circle', "its meta.json names the tokenizer 'circle'")],
    sample=[
        ('--start=QUICK', "'C', 'I'"), ('--start=FILE:none.txt', 'none.txt'), ('--chat', '<|start|>'),
        ('--num_samples=0', 'num_samples', '0'), ('--context=-1', 'context', '-1'), ('--seed=1e20', 'seed'),
        ('--max_new_tokens=0', 'max_new_tokens', '0'), ('--temperature=nan', 'temperature', 'nan'),
        ('--experts=int4', 'experts', 'int4', 'mxfp4'), ('--reasoning_effort=max', 'max', 'low', 'high'),
        ('--chat --stop=8', 'stop', 'chat'), ('--system=x', 'system', '--chat'),
        ('--tools=x --start=a', 'tools', '--chat'),
        ('--chat --export=new', 'chat', 'export'), ('--init_from=negative', 'negative/meta.json', '-5'),
        ('--temperature=-1', 'temperature', '-1'), ('--top_p=0', 'top_p', '0'), ('--top_k=-1', 'top_k', '-1'),
        ('--min_p=2', 'min_p', '2'), ('--max_new_tokens=200000', 'prompt'), ('--out_dir=none', 'none'),
        ('--export=short', 'short'), ('--export=new.gguf', 'tokenizer char', 'bpe'),
        ('--init_from=untold', 'untold', 'tokenizer')],
    bench=[
        ('--parts=train,walk', 'walk'), ('--rounds=0', 'rounds', '0'), ('--scale --gpu=toaster', 'toaster'),
        ('--compare --learn', '--compare', '--learn'),
        ('--learn --data_dir=data --block_size=16 --works=toast', 'toast')])


@pytest.fixture(scope='session')
def playground(fox, tmp_path_factory):
    """A folder with text.txt, data, short (a run), and the broken files that BAD_INPUT names."""
    folder = tmp_path_factory.mktemp('playground')
    os.chdir(shutil.copytree(fox, folder, dirs_exist_ok=True))
    make_data(write('text.txt', FOX.upper())).rename('upper')
    for name in ('data', 'cut', 'strange', 'empty'):
        shutil.copytree(fox / 'data', name)
    train = Path('data/train.bin').read_bytes()
    write('cut/train.bin', train[:1001])
    write('strange/train.bin', b'\xff' * len(train))
    write('empty/meta.json', '{}')
    write('circle/meta.json', '{"tokenizer": "circle"}')
    shutil.copytree('short/best', 'untold')
    write('untold/tokenizer.tiktoken', 'YQ== 0\nYg== 5')
    shutil.copytree('short/best', 'negative')
    meta = json.loads(Path('negative/meta.json').read_text())
    write('negative/meta.json', json.dumps(meta | dict(block_size=-5)))
    write('typo.py', 'learning_rat = 1e-3')
    write('crash.py', 'seed = 1\n_y = seed / 0')
    with FileLock(write('locked/.lock', '')):
        yield folder


@pytest.mark.parametrize('row', [(script, *row) for script in BAD_INPUT for row in BAD_INPUT[script]],
                         ids=lambda row: ' '.join(row[:2]))
def test_bad_input(row, playground, monkeypatch):
    script, flags, *words = row
    monkeypatch.chdir(playground)
    refuse(words, f'{script}.py', *USUAL[script], *flags.split())
    assert not list(playground.glob('prepared/*'))
    assert not Path('data/builtin').exists()  # settings are checked before this corpus is made
