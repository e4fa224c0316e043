"""
GPT-OSS, all of it in this single file: grouped-query attention with learned sinks, alternating sliding and full
attention, RoPE with YaRN, RMSNorm, and a mixture of SwiGLU experts. It needs only torch (safetensors to load and save).

Sources:
1) OpenAI's release, gpt_oss/torch/model.py and weights.py: https://github.com/openai/gpt-oss
2) its model card: arXiv:2508.10925
3) transformers, models/gpt_oss, whose parameter names and config.json this file uses
4) YaRN: arXiv:2309.00071; sinks: arXiv:2309.17453; the Switch Transformer's load-balancing loss: arXiv:2101.03961
"""

import ctypes
import json
import math
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLIDING, FULL = 'sliding_attention', 'full_attention'


@dataclass
class GPTConfig:
    """The shape of a GPT-OSS, in the published config.json's names. The sizes are a laptop's, the rest is gpt-oss's."""
    vocab_size: int = 201088  # rows of the embedding; 201088 is o200k_harmony
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 256  # width of one expert
    num_hidden_layers: int = 6  # each an attention and a mixture of experts
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # key and value heads, each shared by a group of query heads; 1 is multi-query
    head_dim: int = 64  # width of a head; heads * head_dim need not be hidden_size
    num_local_experts: int = 8  # experts in a layer; 1 makes the model dense
    num_experts_per_tok: int = 2  # experts that each token visits
    sliding_window: int = 128  # keys that a sliding layer sees, the token's own included
    layer_types: list[str] | None = None  # sliding_attention or full_attention; None alternates, sliding first
    max_position_embeddings: int = 131072  # the longest context, in tokens
    rms_norm_eps: float = 1e-5  # added to the mean square
    swiglu_limit: float = 7.0  # the experts' gate is clamped above, their up projection on both sides
    rope_theta: float = 150000.0  # base of RoPE's frequencies
    rope_factor: float = 32.0  # YaRN: how far the context is stretched; 1 is plain RoPE
    rope_beta_fast: float = 32.0  # YaRN: pairs turning oftener than this in the original context keep their frequency
    rope_beta_slow: float = 1.0  # YaRN: pairs turning less often than this are slowed by the factor
    rope_original_max_position_embeddings: int = 4096  # YaRN: the context before stretching
    rope_truncate: bool = False  # YaRN: round the ramp's ends to whole pairs; gpt-oss does not
    initializer_range: float = 0.02  # standard deviation of the initial weights
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss, added in training mode only; 0.01 is usual
    tie_word_embeddings: bool = False  # one matrix for the embedding and the head
    dropout: float = 0.0  # after attention and after the experts, and on the attention weights
    attention_dropout: float | None = None  # on the attention weights; None: the same as dropout
    qk_norm: bool = False  # RMSNorm on queries and keys; not in gpt-oss

    def __post_init__(self):
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if kind is bool:
                good, wanted = isinstance(value, bool), 'True or False'
            elif kind is int:
                most = 10 ** 4 if field.name == 'num_hidden_layers' else 2 ** 31  # a stranger's file may say anything
                good, wanted = number and 1 <= value < most, f'a whole number, at least 1 and below {most}'
            elif field.name != 'layer_types':
                good, wanted = number and 0 <= value < math.inf, '0 or more'
            if field.name != 'layer_types' and not good:
                raise ValueError(f'{field.name} is {value!r}; it must be {wanted}'[:200])
        if self.layer_types is None:
            self.layer_types = [FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers)]
        if not isinstance(self.layer_types, list):
            raise ValueError(f'layer_types is {self.layer_types!r:.60}; it must be a list')
        if unknown := [kind for kind in self.layer_types if kind not in (SLIDING, FULL)]:
            raise ValueError(f'layer_types holds {unknown!r:.60}; it takes {SLIDING} and {FULL}')
        for wrong, message in (
                (self.num_attention_heads % self.num_key_value_heads,
                 'num_attention_heads ({num_attention_heads}) must be a multiple of '
                 'num_key_value_heads ({num_key_value_heads})'),
                (self.num_experts_per_tok > self.num_local_experts,
                 'num_experts_per_tok ({num_experts_per_tok}) must not exceed num_local_experts ({num_local_experts})'),
                (self.head_dim % 2, 'head_dim is {head_dim}; it must be even, for RoPE turns pairs'),
                (len(self.layer_types) != self.num_hidden_layers,
                 f'layer_types has {len(self.layer_types)} entries for num_hidden_layers = {{num_hidden_layers}}'),
                (max(self.dropout, self.attention_dropout) >= 1,
                 'dropout ({dropout}) and attention_dropout ({attention_dropout}) must be below 1'),
                (self.rope_factor < 1 or self.rope_theta <= 1,
                 'rope_factor ({rope_factor}) must be at least 1 and rope_theta ({rope_theta}) above 1')):
            if wrong:
                raise ValueError(message.format(**vars(self)))


class Linear(nn.Linear):
    """nn.Linear in its input's dtype, whatever dtype the parameters are kept in."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.lora = None  # or a LoRA

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if narrow(x, self.weight):
            y = matvecs([(x.flatten(), self.weight)])[0].view(*x.shape[:-1], -1)
            y = y if bias is None else y + bias
        elif torch.compiler.is_compiling() and x.numel() == x.size(-1):
            y = product(x, self.weight.to(x.dtype))
            y = y if bias is None else y + bias
        else:
            y = F.linear(x, self.weight.to(x.dtype), bias)
        return y if self.lora is None else y + self.lora(x)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # where it would do nothing, after two seconds of imports
            super().reset_parameters()


class LoRA(nn.Module):
    """A low-rank adapter of a matrix (out, in), or of each of a stack: scale · B A, at first 0. arXiv:2106.09685."""

    def __init__(self, shape, rank, scale, device):
        super().__init__()
        *stack, rows, columns = shape
        self.a = nn.Parameter(torch.empty(*stack, rank, columns, device=device).uniform_(-1, 1) / columns ** 0.5)
        self.b = nn.Parameter(torch.zeros(*stack, rows, rank, device=device))
        self.scale = scale

    def forward(self, x):
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def grouped(self, x, counts):
        """Each expert's rows of x (M, in), sorted by expert, through its own adapter -> (M, out)."""
        return GroupedLinear.apply(GroupedLinear.apply(x, self.a, None, counts), self.b, None, counts) * self.scale


def product(x, w):
    """x (..., m, D) @ w (..., n, D) transposed -> (..., m, n), for decoding, which lasts as long as reading w takes.

    Compiled it is a loop that fuses with what is around it, instead of a call: a token takes 0.75 of the time on CPU.
    """
    return (x.unsqueeze(-2) * w.unsqueeze(-3)).sum(-1) if torch.compiler.is_compiling() else x @ w.mT


def cast(x, dtype):
    """x.to(dtype), for the end of a Function, where torch 2.11's compiler loses all gradients if it finds a `to` that
    changes nothing, or an operation in place."""
    return x if x.dtype == dtype else x.to(dtype)


class RMSNormFunction(torch.autograd.Function):
    """x (..., D) over its root mean square, times weight (D,); in fp32, the result in x's dtype.

    Autograd through the formula, or through F.rms_norm, passes over x three times as often: 7 % of a step on CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.float()
        scale = torch.rsqrt(torch.linalg.vecdot(y, y)[..., None] / x.size(-1) + eps)
        ctx.save_for_backward(x, weight, scale)
        y = y * scale
        return cast(y * weight if torch.compiler.is_compiling() else y.mul_(weight), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        aligned = grad * normed
        along = torch.linalg.vecdot(aligned, weight.float())[..., None] / x.size(-1)  # would only rescale x
        dx = normed.mul_(-along).addcmul_(grad, weight.float()).mul_(scale)  # in place: new memory costs more
        return dx.to(x.dtype), aligned.flatten(0, -2).sum(0).to(weight.dtype), None


class RMSNorm(nn.Module):
    """RMSNorm in fp32; the scale is applied before the result goes back to the input's dtype."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rope_tables(config, positions, dtype=torch.float32):
    """cos and sin, each (T, 1, head_dim), for `rotate` at positions (T,). RoPE stretched by YaRN, arXiv:2309.00071.

    Pairs that turn often within the original context keep their frequency, slow ones are slowed by the factor, and a
    linear ramp lies between. The tables also carry YaRN's concentration, 0.1 ln(factor) + 1, on queries and keys alike.
    """
    c, half = config, config.head_dim // 2
    pair = torch.arange(half, device=positions.device)

    def pair_that_turns(times):  # (fractional) index of the pair that turns this often in the original context
        return half * math.log(c.rope_original_max_position_embeddings / (times * 2 * math.pi)) / math.log(c.rope_theta)

    low, high = pair_that_turns(c.rope_beta_fast), pair_that_turns(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: as it was, 1: slowed by the whole factor
    frequency = c.rope_theta ** (-pair / half) * (1 - slowed + slowed / c.rope_factor)
    angle = positions[:, None, None].float() * frequency
    concentration = 0.1 * math.log(c.rope_factor) + 1
    cos, sin = angle.cos() * concentration, angle.sin() * concentration
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + head_dim / 2) of x (B, T, heads, head_dim)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def attention(q, k, v, sinks, window=None, dropout=0.0):
    """Causal attention with sinks: q (B, T, H, hd), k and v (B, T, KV, hd), sinks (H,) -> (B, T, H, hd).

    A sink is a logit that joins the softmax and takes its share of the weight to no value. A query sees its past; with
    a window, blocks of `window` queries see the block before theirs and their own: exact, and linear in T.
    """
    B, T, H, hd = q.shape
    blocks = 1 if window is None or window >= T else -(-T // window)
    mask = None
    if blocks > 1:
        def split(x, before=0):  # (B, before + T, heads, hd) -> (B, its blocks, window, heads, hd)
            return F.pad(x, (0, 0, 0, 0, before, blocks * window - T)).unflatten(1, (-1, window))

        q = split(q).flatten(0, 1)  # (B * blocks, window, H, hd); keys and values (B * blocks, 2 * window, KV, hd)
        k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (split(k, window), split(v, window)))
        distance = torch.arange(window, device=q.device)[:, None] - torch.arange(-window, window, device=q.device)
        mask = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1)
        mask[0, :, :window] = False  # before the first block there is nothing
        mask = mask.repeat(B, 1, 1)[:, None]  # (B * blocks, 1, window, 2 * window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == 'cpu' and not dropout:
        y = SinkAttention.apply(q, k, v, sinks, mask)
    else:
        y = attention_by_key(q, k, v, sinks, mask, dropout)
    return y.transpose(1, 2).reshape(B, -1, H, hd)[:, :T]


class SinkAttention(torch.autograd.Function):
    """q (B, H, T, hd), k and v (B, KV, S, hd), sinks (H,), mask bool (B, 1, T, S) or None: causal -> (B, H, T, hd).

    PyTorch's flash kernel for CPUs also tells the logarithm of every softmax's denominator, which the sink then joins.
    The sink's value is zero, so the kernel's own backward, told the outputs and denominators with the sink, has the
    gradients of q, k and v. A training step on CPU takes 0.93 of the time that it takes with attention_by_key.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask):
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=bias, scale=q.size(-1) ** -0.5)
        total = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        y = cast(y * (lse - total).exp()[..., None], q.dtype)
        ctx.save_for_backward(q, k, v, sinks, bias, y, total)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, sinks, bias, y, total = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, total, 0.0, bias is None, attn_mask=bias, scale=q.size(-1) ** -0.5)
        share = (sinks[:, None] - total).exp()  # of the sinks in the softmax
        dsinks = -(share * torch.linalg.vecdot(dy.float(), y.float())).sum((0, 2))
        return dq, dk, dv, dsinks.to(sinks.dtype), None


def attention_by_key(q, k, v, sinks, mask, dropout):
    """What SinkAttention computes, by any SDPA kernel and with dropout: the sink as one more key, with a zero value.

    Queries and keys get a few more features, and the sink's key is 1 in the first of them, where the queries hold the
    sink's logit (times √hd, which the scale takes away again).
    """
    B, H, T, hd = q.shape
    KV, extra = k.size(1), 8 + -hd % 8  # flash kernels want a multiple of 8
    mine = F.pad((sinks * hd ** 0.5).to(q.dtype)[:, None], (0, extra - 1))
    q = torch.cat((q, mine[:, None].expand(B, H, T, extra)), dim=-1)
    sink = F.pad(k.new_ones(1, 1, 1, 1), (hd, extra - 1)).expand(B, KV, 1, -1)
    k, v = torch.cat((sink, F.pad(k, (0, extra))), dim=2), F.pad(v, (0, extra, 1, 0))  # the sink is key 0
    if mask is None:
        q = F.pad(q, (0, 0, 1, 0))  # with a row in front of the queries too, what they see is the causal triangle
    else:
        mask = F.pad(mask, (1, 0), value=True)
    if q.is_cuda:  # where there is a mask, fp32 or an old GPU, the kernels that take groups of heads would not be used
        k, v, KV = k.repeat_interleave(H // KV, dim=1), v.repeat_interleave(H // KV, dim=1), H
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                       scale=hd ** -0.5, enable_gqa=H != KV)
    return y[:, :, -T:, :hd]


def swiglu(gate_up, limit):
    """gpt-oss's clamped SwiGLU, gate·sigmoid(1.702·gate)·(up + 1), of gate_up (..., 2I): the gates, then the ups."""
    gate, up = gate_up.chunk(2, dim=-1)
    # hardtanh is clamp, and twice as fast in backward; at the very limit its gradient is 0 and clamp's 1
    gate, up = F.hardtanh(gate, -math.inf, limit), F.hardtanh(up, -limit, limit)
    return F.silu(1.702 * gate) * torch.add(1 / 1.702, up, alpha=1 / 1.702)  # the latter is (up + 1) / 1.702


def grouped_mm_fits(x, w):
    """Whether F.grouped_mm takes rows x (N, D) and weights w (E, out, in): it wants bf16 and multiples of 16 bytes."""
    return (x.is_cuda and x.dtype == torch.bfloat16 and not isinstance(w, MXFP4)
            and w.size(1) % 8 == w.size(2) % 8 == 0)


class ExpertByExpert(torch.autograd.Function):
    """Experts one after the other, each at the number of rows that it got, for devices without F.grouped_mm.

    x (N, D); token (M,), the rows of x sorted by expert, share (M,) their weights and counts (E,) how many are each
    expert's; the experts' parameters as in Experts -> (N, D). Backward has only x and the first matmul's outputs to
    remember, and writes each expert's gradients into their place: a training step takes 0.75 of the memory and 0.9 of
    the time that it takes on CPU when autograd differentiates the same loop.
    """

    @staticmethod
    def forward(ctx, x, share, token, counts, w1, b1, w2, b2, limit, needs_grad):
        gate_up = grouped_linear(x.index_select(0, token), w1, b1, counts)
        out = grouped_linear(swiglu(gate_up, limit), w2, b2, counts)
        y = torch.zeros_like(x).index_add_(0, token, out.mul_(share[:, None]))
        if needs_grad:
            ctx.save_for_backward(x, share, token, gate_up, b1, b2, *(w for w in (w1, w2) if not isinstance(w, MXFP4)))
            ctx.packed, ctx.counts, ctx.limit = [w for w in (w1, w2) if isinstance(w, MXFP4)], counts, limit
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, share, token, gate_up, b1, b2, *weights = ctx.saved_tensors
        w1, w2 = weights or ctx.packed
        d, rows = dy.index_select(0, token), x.index_select(0, token)
        with torch.enable_grad():
            hidden = swiglu(gate_up.requires_grad_(), ctx.limit)
        dhidden = grouped_linear(d, w2, None, ctx.counts, back=True)  # but for the share
        dshare = torch.linalg.vecdot(dhidden, hidden.detach())
        dshare += grouped_linear(d, b2[:, None], None, ctx.counts)[:, 0]
        dgate_up, = torch.autograd.grad(hidden, gate_up, dhidden.mul_(share[:, None]))
        d.mul_(share[:, None])
        gradients = [torch.empty_like(p, dtype=x.dtype) if needed else None  # None: frozen
                     for p, needed in zip((w1, b1, w2, b2), ctx.needs_input_grad[4:8])]
        for (dw, db), dout, inputs in ((gradients[:2], dgate_up, rows), (gradients[2:], d, hidden.detach())):
            for e, (dout_e, inputs_e) in enumerate(zip(dout.split(ctx.counts), inputs.split(ctx.counts))):
                if dw is not None:
                    torch.mm(dout_e.T, inputs_e, out=dw[e])
                if db is not None:
                    torch.sum(dout_e, 0, out=db[e])
        gradients = [g if g is None else g.to(p.dtype) for g, p in zip(gradients, (w1, b1, w2, b2))]
        dx = torch.zeros_like(x).index_add_(0, token, grouped_linear(dgate_up, w1, None, ctx.counts, back=True))
        return dx, dshare, None, None, *gradients, None, None


def grouped_linear(x, w, b, counts, back=False):
    """Rows x (M, in), sorted by expert, through w (E, out, in) and b (E, out) or None; counts of rows -> (M, out).
    With back, rows (M, out) through the transposed matrices -> (M, in), as gradients go."""
    y = x.new_empty(len(x), w.size(2 if back else 1))
    for e, (xe, ye) in enumerate(zip(x.split(counts), y.split(counts))):
        if not len(xe):
            continue  # and what is packed stays so
        we = w.widened(e, x.dtype) if isinstance(w, MXFP4) else w[e].to(x.dtype)
        if b is None:
            torch.mm(xe, we if back else we.T, out=ye)
        else:
            torch.addmm(b[e].to(x.dtype), xe, we.T, out=ye)
    return y


class GroupedLinear(torch.autograd.Function):
    """grouped_linear with gradients, for experts that have adapters. What is packed is unpacked anew in backward."""

    @staticmethod
    def forward(ctx, x, w, b, counts):
        ctx.save_for_backward(x, *(() if isinstance(w, MXFP4) else (w,)))
        ctx.packed, ctx.counts = w if isinstance(w, MXFP4) else None, counts
        return grouped_linear(x, w, b, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weight = ctx.saved_tensors
        w, dw, db = weight[0] if weight else ctx.packed, None, None
        groups = list(zip(dy.split(ctx.counts), x.split(ctx.counts)))
        if ctx.needs_input_grad[1]:
            dw = torch.stack([dye.T @ xe for dye, xe in groups]).to(w.dtype)
        if ctx.needs_input_grad[2]:
            db = torch.stack([dye.sum(0) for dye, _ in groups])
        return grouped_linear(dy, w, None, ctx.counts, back=True), dw, db, None


@torch._disable_dynamo  # torch.compiler.disable, but for a second of imports; the counts of rows are the host's to know
def expert_by_expert(x, share, token, load, *rest):
    counts, share = load.tolist(), share.to(x.dtype)
    if x.dtype != torch.float32 and len(x) > 256:
        # In low precision every new shape costs the CPU's library a compilation of milliseconds, so counts of rows are
        # rounded up to few distinct ones, with rows of no share.
        padding = [-count % 256 for count in counts]
        token, share = (torch.cat([F.pad(part, (0, extra)) for part, extra in zip(v.split(counts), padding)])
                        for v in (token, share))
        counts = [count + extra for count, extra in zip(counts, padding)]
    return ExpertByExpert.apply(x, share, token, counts, *rest)


class Experts(nn.Module):
    """E SwiGLU experts, their weights stacked in nn.Linear's layout (E, out, in).

    The rows of gate_up are the gates, then the ups. The published checkpoints interleave them, which does not vectorise
    (forward and backward four times as slow on CPU), so from_pretrained and save_pretrained convert.
    """

    def __init__(self, config):
        super().__init__()
        E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_weight = nn.Parameter(torch.empty(E, 2 * I, D))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * I))
        self.down_weight = nn.Parameter(torch.empty(E, D, I))
        self.down_bias = nn.Parameter(torch.empty(E, D))
        self.gate_up_lora = self.down_lora = None  # or a LoRA each
        self.limit = config.swiglu_limit

    def forward(self, x, chosen, share):
        """x (N, D) through experts chosen (N, k), weighted by share (N, k) -> (N, D), and rows per expert (E,)."""
        w1, b1, w2, b2 = self.gate_up_weight, self.gate_up_bias, self.down_weight, self.down_bias
        kind = x.dtype
        few = not self.training and len(x) <= 8 and self.gate_up_lora is None
        if few and torch.compiler.is_compiling():  # decoding, compiled:
            # the compiler fuses gather, product and sum into one pass over the chosen weights; eager would copy them
            w1, b1, w2, b2 = (p[chosen].to(kind) for p in (w1, b1, w2, b2))
            hidden = swiglu(product(x[:, None, None], w1) + b1.unsqueeze(2), self.limit)  # (N, k, 1, I)
            outputs = product(hidden, w2).squeeze(2) + b2  # (N, k, D)
            return (outputs * share.to(kind)[:, :, None]).sum(1), None
        if few and (not x.is_cuda or isinstance(w1, MXFP4)):
            # decoding, eager: row by row, for on CPU products of 2 to 8 rows take 1.5 times as long as one at a time
            ids, rows = chosen.flatten().tolist(), x.repeat_interleave(chosen.size(1), dim=0).split(1)
            if isinstance(w1, MXFP4) and b1.dtype != kind and narrow(rows[0], w1):  # else bit by bit as if unpacked
                layer = lambda rows, w, b: torch.stack(matvecs([(r[0], (w.blocks[e], w.scales[e]))
                                                                for r, e in zip(rows, ids)])) + b[ids]
            else:
                layer = lambda rows, w, b: torch.cat([F.linear(r, w[e].to(kind), b[e].to(kind))
                                                      for r, e in zip(rows, ids)])
            hidden = swiglu(layer(rows, w1, b1), self.limit)
            outputs = layer(hidden.split(1), w2, b2).view(*chosen.shape, -1)
            return (share[:, None].to(kind) @ outputs).squeeze(1), None

        order = chosen.flatten().argsort(stable=True)  # from here on rows are (token, choice) pairs, sorted by expert
        expert, token = chosen.flatten()[order], order // chosen.size(1)
        share = share.flatten()[order]
        membership = expert[:, None] == torch.arange(len(self.down_bias), device=x.device)  # (N * k, E)
        load = membership.sum(0)  # not bincount, which waits for the device
        if self.gate_up_lora is not None:
            return self.adapted(x, share, token, load), load
        if grouped_mm_fits(x, w1) and grouped_mm_fits(x, w2):
            # All experts in one kernel, which takes no bias, and no wait until the counts reach the host.
            ends, membership = load.cumsum(0).to(torch.int32), membership.to(kind)
            w1, b1, w2, b2 = (p.to(kind) for p in (w1, b1, w2, b2))
            hidden = swiglu(F.grouped_mm(x.index_select(0, token), w1.mT, offs=ends) + membership @ b1, self.limit)
            rows = (F.grouped_mm(hidden, w2.mT, offs=ends) + membership @ b2) * share[:, None].to(kind)
            return torch.zeros_like(x).index_add(0, token, rows), load
        return expert_by_expert(x, share, token, load, w1, b1, w2, b2, self.limit, torch.is_grad_enabled()), load

    @torch._disable_dynamo
    def adapted(self, x, share, token, load):
        """The same with adapters: autograd through two layers, in which frozen weights leave nothing to remember."""
        counts, rows = load.tolist(), x.index_select(0, token)
        hidden = GroupedLinear.apply(rows, self.gate_up_weight, self.gate_up_bias, counts)
        hidden = swiglu(hidden + self.gate_up_lora.grouped(rows, counts), self.limit)
        out = GroupedLinear.apply(hidden, self.down_weight, self.down_bias, counts)
        out = (out + self.down_lora.grouped(hidden, counts)) * share[:, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, out)


class MoE(nn.Module):
    """Router and experts: a token goes to its k likeliest experts, whose outputs a softmax over the k weights."""

    def __init__(self, config):
        super().__init__()
        self.router = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)
        self.k = config.num_experts_per_tok
        self.group = None  # of torch.distributed: the processes that share a batch, which is to be balanced as one
        # of training since whoever reads them last set them to zero: (token, choice) pairs that each expert got, and
        # the entropy of the router's softmax over all experts, in nats, summed over the tokens
        self.register_buffer('load', torch.zeros(config.num_local_experts, dtype=torch.int64), persistent=False)
        self.register_buffer('entropy', torch.zeros(()), persistent=False)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and in training mode Switch's load-balancing loss, scaled so that balance is 1."""
        rows = x.flatten(0, 1)
        logits = self.router(rows.float())
        best, chosen = logits.topk(self.k, dim=-1)
        y, load = self.experts(rows, chosen, best.softmax(-1))
        balance = None
        if self.training:
            odds, everywhere = logits.softmax(-1), load
            if self.group is not None:
                everywhere = load.clone()
                torch.distributed.all_reduce(everywhere, group=self.group)
            balance = len(load) * (odds.mean(0) @ (everywhere / everywhere.sum()))
            self.load += load
            self.entropy += torch.special.entr(odds.detach()).sum().nan_to_num()
        return y.view_as(x), balance


class Attention(nn.Module):
    """Self-attention, x (B, T, D) -> (B, T, D); with a cache, of the prompt that fills it or of the newest token."""

    def __init__(self, config, layer_type):
        super().__init__()
        D, H, KV, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(D, H * hd)
        self.k_proj = Linear(D, KV * hd)
        self.v_proj = Linear(D, KV * hd)
        self.o_proj = Linear(H * hd, D)
        self.sinks = nn.Parameter(torch.empty(H))
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(hd, config.rms_norm_eps), RMSNorm(hd, config.rms_norm_eps)
        self.head_dim, self.qk_norm, self.dropout = hd, config.qk_norm, config.attention_dropout
        self.window = config.sliding_window if layer_type == SLIDING else None

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            remember(k, v, *cache)
        if cache is None or T > 1:
            y = attention(q, k, v, self.sinks, self.window, self.dropout if self.training else 0.0)
        else:
            y = attend_newest(q, self.sinks, *cache)
        return self.o_proj(y.reshape(B, T, -1))


class KVCache:
    """The keys and values that each layer still needs, (B, KV, size, hd): a ring of the window, or of `context` tokens.

    Shapes stay as they are from token to token and the position is a tensor, so one compiled step serves every token.
    """

    def __init__(self, config, batch_size, length, dtype, device, context=None):
        context = min(length, context or length)
        sizes = [min(context, config.sliding_window) if t == SLIDING else context for t in config.layer_types]
        shapes = [(batch_size, config.num_key_value_heads, size, config.head_dim) for size in sizes]
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in 'kv') for shape in shapes]
        self.rope = rope_tables(config, torch.arange(length, device=device), dtype)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # tokens seen so far

    def next(self, T):
        """For the next T tokens: RoPE's tables (T, 1, hd), and for each layer its keys, its values, the slots that
        these tokens take (at most T,), and which slots are empty even then (size,)."""
        positions = self.position + torch.arange(T, device=self.position.device)
        places = {}  # by size, for computing them once a layer would cost as much as the attention itself
        for size in {k.size(2) for k, _ in self.layers}:
            places[size] = positions[-size:] % size, torch.arange(size, device=positions.device) > positions[-1]
        return *(table[positions] for table in self.rope), [(k, v, *places[k.size(2)]) for k, v in self.layers]


def remember(k, v, keys, values, slots, _):
    """Store k and v (B, T, KV, hd) in their slots of a layer's keys and values; of a long prompt the end."""
    keys.index_copy_(2, slots, k[:, -len(slots):].transpose(1, 2))
    values.index_copy_(2, slots, v[:, -len(slots):].transpose(1, 2))


def attend_newest(q, sinks, keys, values, _, empty):
    """Attention of the newest token, q (B, 1, H, hd) -> (B, KV, G, hd). To a softmax the ring's order is all one."""
    B, KV, _, hd = keys.shape
    logits = (product(q.view(B, KV, -1, hd), keys) * hd ** -0.5).masked_fill(empty, -math.inf)
    sinks = sinks.to(logits.dtype).view(1, KV, -1, 1).expand(B, -1, -1, 1)
    return product(torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1], values.mT)


class Block(nn.Module):
    """One layer: attention, then experts, each reading the normed residual stream x (B, T, D) and adding to it."""

    def __init__(self, config, layer_type):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_type)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), balance


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T, without ever holding all the (N, V) logits.

    Forward works through the rows in chunks and turns each chunk's logits into its gradients at once, so nothing is
    computed twice and backward only scales. x (N, D), weight (V, D), targets (N,) int64, -1 is ignored; the sum is
    divided by count -> scalar fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, count, needs_grad):
        w, loss = weight.to(x.dtype), x.new_zeros((), dtype=torch.float32)
        dx, trains = [], needs_grad and weight.requires_grad
        dw = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        rows = max(1, 2 ** 25 // len(w))  # 2^25 logits in fp32 are 128 MB
        for xc, tc in zip(x.split(rows), targets.split(rows)):
            logits = (xc @ w.T).float()
            valid, tc = (tc >= 0)[:, None], tc.clamp(min=0)[:, None]
            logits.sub_(logits.amax(-1, keepdim=True))
            right = logits.gather(1, tc)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += torch.where(valid, total.log() - right, 0).sum()
            if needs_grad:  # d loss / d logits = softmax - one_hot, in the logits' place
                grad = logits.mul_(valid / total).scatter_add_(1, tc, -valid.float()).to(x.dtype)
                dx.append(grad @ w)
                if trains:
                    dw = dw.addmm_(grad.T, xc) if grad.dtype == dw.dtype else dw.add_(grad.T @ xc)
        if needs_grad:
            ctx.save_for_backward(torch.cat(dx), dw, count)
            ctx.dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx * scale.to(dx.dtype), None if dw is None else (dw * scale).to(ctx.dtype), None, None, None


class Muon(torch.optim.Optimizer):
    """Muon, momentum whose singular values become about 1: Jordan et al., https://kellerjordan.github.io/posts/muon

    A group holds parameters of one shape (..., m, n): leading dimensions count matrices, experts for instance, and each
    is `pieces` matrices on top of one another, gate and up for instance. A step moves an m x n matrix by lr * max(1,
    m / n)^0.5 in every direction that its gradients point to, the rare ones too. One that never had a gradient, an
    expert without tokens for instance, stays; one that has none any more goes on as its momentum points. Parameters may
    be sharded over processes along their first dimension, by FSDP2.
    """

    def __init__(self, groups, lr, momentum, weight_decay):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, pieces=1))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            many = max(1, 2 ** 28 // params[0].numel()) if params else 1  # at a time, for memory's sake
            for i in range(0, len(params), many):
                settings = {key: group[key] for key in ('lr', 'momentum', 'weight_decay', 'pieces')}
                self.move(params[i:i + many], **settings)

    def move(self, params, lr, momentum, weight_decay, pieces):
        """A step of parameters of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        whole, grads, buffers = params[0], [p.grad for p in params], [self.state[p]['momentum'] for p in params]
        if hasattr(whole, 'to_local'):  # a DTensor; what follows is done by each process to its shards
            params, grads, buffers = ([t.to_local() for t in tensors] for tensors in (params, grads, buffers))
        if getattr(self, 'found_inf', None) is not None:  # then nothing moves, and the host need not know
            lr = lr * (1 - self.found_inf)
            grads = [torch.where(self.found_inf > 0, buffer, grad) for grad, buffer in zip(grads, buffers)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's momentum
        rows_apart = params[0] is not whole and whole.dim() == 2  # of a stack every shard has whole matrices
        if rows_apart:
            from torch.distributed.tensor import DTensor, Shard, distribute_tensor
            shape, mesh = torch.Size((len(params), *whole.shape)), whole.device_mesh
            ahead = DTensor.from_local(ahead, mesh, [Shard(1)], run_check=False, shape=shape,
                                       stride=torch.empty(shape, device='meta').stride()).full_tensor()
        matrices = ahead.view(-1, ahead.size(-2) // pieces, ahead.size(-1))
        size = lr * max(1, matrices.size(1) / matrices.size(2)) ** 0.5
        update = orthogonalize(matrices, torch.bfloat16 if matrices.is_cuda else torch.float32)
        update = update.mul_(size).reshape(ahead.shape)
        if rows_apart:
            update = distribute_tensor(update, mesh, [Shard(1)], src_data_rank=None).to_local()
        if weight_decay:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_sub_(params, update.unbind())


def orthogonalize(x, dtype):
    """The nearest orthogonal matrices to x (batch, m, n), roughly: of singular values above three thousandths of the
    norm come such between 0.18 and 1.9, and more trains no better. Zero stays zero.

    Three Newton-Schulz iterations in this dtype, with the coefficients of the Polar Express, arXiv:2505.16932, for
    values up to 1.02: with those for 1 bf16 diverges.
    """
    kind, tall = x.dtype, x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    spare = torch.empty_like(x)  # in turn with x, for new memory takes as long as the product
    for a, b, c in ((8.1247, -22.2349, 15.6695), (4.0265, -2.7778, 0.4935), (3.8713, -2.7411, 0.4998)):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        gram.diagonal(dim1=1, dim2=2).add_(a)
        x, spare = torch.bmm(gram, x, out=spare), x
    return (x.mT if tall else x).to(kind)


class GPT(nn.Module):
    """The language model: `model(idx, targets)` gives (logits, loss), `model.generate(idx, max_new_tokens)` goes on."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = self.lora = None  # what from_pretrained loaded, {base, overrides}; what add_lora was called with
        self.compute_dtype = None  # what to compute in, whatever the parameters are kept in; None: as they are
        self.model = nn.ModuleDict(dict(
            embed_tokens=Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, layer_type) for layer_type in config.layer_types),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if name.endswith(('bias', 'sinks')):
                nn.init.zeros_(p)
            elif 'norm' not in name and not p.is_meta:
                nn.init.normal_(p, std=config.initializer_range)

    def hidden_states(self, idx, cache=None):
        """idx (B, T) -> the final, normed states (B, T, D), and the load-balancing loss averaged over layers.

        With a KVCache idx goes on where the last call ended: first a whole prompt, then token by token.
        """
        x, kind = self.model.embed_tokens(idx), idx.device.type
        x = x.to(self.compute_dtype or x.dtype)
        # Under autocast the activations take its dtype here and the layers follow theirs, so autocast itself stays off
        # inside: casting by hand is faster on CPU, keeps router, norms and loss in fp32, and is alike in every torch.
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if cache:
            cos, sin, caches = cache.next(idx.size(1))
        else:
            cos, sin = rope_tables(self.config, torch.arange(idx.size(1), device=idx.device), x.dtype)
            caches = [None] * len(self.model.layers)
        balances = []
        with torch.autocast(kind, enabled=False):
            for layer, layer_cache in zip(self.model.layers, caches):
                x, balance = layer(x, cos, sin, layer_cache)
                balances.append(balance)
            return self.model.norm(x), torch.stack(balances).mean() if self.training else None

    def forward(self, idx, targets=None, return_logits=True, count=None):
        """idx, targets int64 (B, T), target -1 is ignored -> (logits, loss).

        With targets, logits are (B, T, V) and loss is the mean cross-entropy in nats, plus, in training mode, the load-
        balancing loss times its coefficient; return_logits=False gives (None, loss) and never holds all the logits.
        Without targets, logits are (B, 1, V), of the last position, and loss is None. The mean is over the targets that
        count, or, for a batch that is part of a larger one, the sum divided by `count`, a scalar tensor.
        """
        if idx.size(1) > (longest := self.config.max_position_embeddings):
            raise ValueError(f'{idx.size(1)} tokens exceed max_position_embeddings = {longest}')
        x, balance = self.hidden_states(idx)
        with torch.autocast(idx.device.type, enabled=False):
            if targets is None:
                return self.lm_head(x[:, -1:]), None
            targets = targets.flatten()
            count = (targets >= 0).sum().clamp(min=1) if count is None else count
            if return_logits:
                logits = self.lm_head(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1, reduction='sum') / count
            else:
                logits = None
                loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets, count,
                                                torch.is_grad_enabled())
        if self.training and self.config.router_aux_loss_coef:
            loss = loss + self.config.router_aux_loss_coef * balance
        return logits, loss

    def next_logits(self, idx, cache):
        """Logits (B, V) of the token after idx (B, T), which goes on where the cache's position is."""
        return self.lm_head(self.hidden_states(idx, cache)[0][:, -1])

    @cached_property
    def compiled_next_logits(self):
        mode = 'reduce-overhead' if next(self.parameters()).is_cuda else None  # CUDA graphs
        return torch.compile(self.next_logits, mode=mode)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, vocab_size=None,
               context=None, compile=False):
        """Continue idx (B, T) token by token, yielding each (B,) as it is drawn.

        temperature 0 is greedy. top_k keeps the k likeliest tokens (more than there are keeps all), top_p the likeliest
        that together reach that probability, min_p those at least that fraction as likely as the first; None is off.
        vocab_size keeps to the first so many tokens, where the model has more than its tokenizer. context is how far
        back full attention looks (None: to the beginning); a model trained on blocks of 256 gets lost beyond 256.
        compile makes one graph of the step to a token, which takes a minute once; worth it on GPUs above all.
        """
        idx = idx[:, -context:] if context else idx
        B, T = idx.shape
        if T < 1:
            raise ValueError('the prompt is empty; give at least one token, the end-of-text token for instance')
        if not 0 <= idx.min() <= idx.max() < self.config.vocab_size:
            raise ValueError(f'the prompt has token ids from {idx.min()} to {idx.max()}, but the model has vocab_size '
                             f'{self.config.vocab_size}; was it trained with this tokenizer?')
        if T + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(f'a prompt of {T} tokens and max_new_tokens = {max_new_tokens} exceed '
                             f'max_position_embeddings = {self.config.max_position_embeddings}')
        for name, value, good, wanted in (('temperature', temperature, 0 <= temperature < math.inf, 'at least 0'),
                                          ('top_k', top_k, top_k is None or top_k >= 1, 'at least 1'),
                                          ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'above 0 and at most 1'),
                                          ('min_p', min_p, min_p is None or 0 <= min_p <= 1, 'between 0 and 1')):
            if not good:
                raise ValueError(f'{name} is {value}; it must be {wanted}')
        kind, dtype = idx.device.type, self.compute_dtype or self.lm_head.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        cache = KVCache(self.config, B, T + max_new_tokens, dtype, idx.device, context)
        training = self.training
        self.eval()
        try:
            for i in range(max_new_tokens):
                step = self.compiled_next_logits if compile and i else self.next_logits  # i = 0: the prompt
                logits = step(idx, cache)
                cache.position += idx.size(1)
                idx = draw(logits[:, :vocab_size].float(), temperature, top_k, top_p, min_p)
                yield idx.squeeze(1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, vocab_size=None,
                 context=None, compile=False, stop=()):
        """Continue idx (B, T) -> (B, T + new), sampling as `stream` does.

        Ends early once every row has drawn a token of `stop`; a row that ended sooner is filled with what ended it.
        """
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        tokens = [idx]
        options = temperature, top_k, top_p, min_p, vocab_size, context, compile
        for new in self.stream(idx, max_new_tokens, *options):
            if stop:
                new = torch.where(ended, tokens[-1][:, -1], new)
                ended = torch.isin(new, torch.tensor(list(stop), device=idx.device))
            tokens.append(new[:, None])
            if stop and ended.all():
                break
        return torch.cat(tokens, dim=1)

    def flops_per_token(self, length):
        """FLOPs of training for a token of a sequence of this length: 6 for every active parameter but the embedding's
        (2 forward, 4 backward), and attention's, for the keys that the average token of each layer sees."""
        c = self.config
        active = self.num_parameters(active=True) - c.vocab_size * c.hidden_size * (not c.tie_word_embeddings)
        windows = [min(length, c.sliding_window) if t == SLIDING else length for t in c.layer_types]
        keys = sum(w - w * (w - 1) / (2 * length) for w in windows)
        return 6 * active + 12 * c.num_attention_heads * c.head_dim * keys

    def num_parameters(self, active=False):
        """All parameters, or those that one token meets."""
        sizes = {name: place.shape.numel() for name, place in self.places().items()}
        experts = sum(size for name, size in sizes.items() if '.experts.' in name)
        unused = 1 - self.config.num_experts_per_tok / self.config.num_local_experts if active else 0
        return sum(sizes.values()) - round(experts * unused)

    def configure_optimizers(self, learning_rate, muon_lr, betas, weight_decay):
        """[AdamW, Muon]: Muon moves the matrices of the layers (q, k, v, o, router, gate, up, down), AdamW all else.

        Muon's momentum is betas[0]. With muon_lr 0 AdamW has all, and is alone. Only matrices decay: no norm, no sink,
        and no bias, though the experts' biases are 2-D.
        """
        decay, rest, hidden = [], [], {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if muon_lr and p.dim() >= 2 and '.layers.' in name and name.endswith('weight'):
                hidden.setdefault((p.shape, 2 if 'gate_up' in name else 1), []).append(p)
            else:
                (decay if p.dim() >= 2 and not name.endswith('bias') else rest).append(p)
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
        if hidden:
            groups = [dict(params=params, pieces=pieces) for (_, pieces), params in hidden.items()]
            optimizers.append(Muon(groups, muon_lr, betas[0], weight_decay))
        return optimizers

    def places(self):
        """{name: parameter} of all that a checkpoint holds; {name: MXFP4} where that is how the experts are kept."""
        packed = {name: module for name, module in self.named_modules() if isinstance(module, MXFP4)}
        return {name: p for name, p in self.named_parameters() if 'lora.' not in name} | packed

    def pack_experts(self):
        """Keep the experts' matrices in MXFP4 from now on, at four bits a value. They train no more."""
        check_packing('mxfp4', self.config)
        for layer in self.model.layers:
            for key in ('gate_up_weight', 'down_weight'):
                p = getattr(layer.mlp.experts, key)
                packed = MXFP4.empty(*p.shape, device=p.device)
                if not p.is_meta:
                    fill(packed, p)
                delattr(layer.mlp.experts, key)
                setattr(layer.mlp.experts, key, packed)

    def add_lora(self, rank, alpha):
        """Freeze the model, and give each matrix of attention and experts an adapter of this rank to train instead.

        What it adds is scaled by alpha / rank; nothing at first. The adapters' parameters are in fp32.
        """
        if not 1 <= rank <= self.config.hidden_size or not 0 < alpha < math.inf:
            raise ValueError(f'lora_rank is {rank} and lora_alpha {alpha}; they must be at least 1 and above 0, '
                             f'and the rank at most hidden_size ({self.config.hidden_size})')
        if self.lora:
            raise ValueError('the model has adapters; merge_lora() first')
        self.requires_grad_(False)
        self.lora = dict(lora_rank=rank, lora_alpha=alpha)
        for layer in self.model.layers:
            for module, weight, name in adapted_matrices(layer):
                p = getattr(module, weight)
                device = p.blocks.device if isinstance(p, MXFP4) else p.device
                setattr(module, name, LoRA(p.shape, rank, alpha / rank, device))

    @torch.no_grad()
    def merge_lora(self):
        """Add the adapters to their matrices: the same model, and whole again. Raises ValueError for MXFP4."""
        for layer in self.model.layers:
            for module, weight, name in adapted_matrices(layer):
                p, lora = getattr(module, weight), getattr(module, name)
                if isinstance(p, MXFP4):
                    raise ValueError('four bits a value are too few to merge adapters into; load without '
                                     "experts='mxfp4'")
                for matrix, a, b in zip(p, lora.a, lora.b) if p.dim() == 3 else [(p, lora.a, lora.b)]:
                    matrix.copy_(matrix + lora.scale * (b @ a))
                setattr(module, name, None)
        self.source = self.lora = None
        self.requires_grad_(True)

    def save_adapter(self, path):
        """Write adapter.safetensors and adapter.json: from them from_pretrained has what this was loaded from, adapted.

        Raises ValueError where that is nothing.
        """
        if not self.lora or not self.source:
            raise ValueError('there are no adapters of a saved model: from_pretrained(folder), then add_lora()')
        folder = Path(path)
        if (folder / 'config.json').exists():
            raise ValueError(f'{folder} holds a whole model; adapters want a folder of their own')
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach() for name, p in self.named_parameters() if 'lora.' in name}
        save_file(tensors, folder / 'adapter.safetensors')
        self.save_config(folder)

    @classmethod
    def from_adapter(cls, folder, dtype, device, experts, overrides):
        """from_pretrained of a folder that save_adapter wrote."""
        raw = read_json(folder / 'adapter.json')
        try:
            base, rank, alpha = Path(raw['base']), int(raw['lora_rank']), float(raw['lora_alpha'])
            overrides = dict(raw['overrides']) | overrides
            if strange := overrides.keys() - GPTConfig.__dataclass_fields__.keys():
                raise ValueError(f'overrides has {sorted(strange)[:3]}')
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f'{folder / "adapter.json"} is damaged ({type(error).__name__}: {error})') from error
        try:
            if (find_checkpoint(base) / 'adapter.json').exists():
                raise ValueError('that holds adapters itself')
            model = cls.from_pretrained(base, dtype, device, experts, **overrides)
        except ValueError as error:
            raise ValueError(f'{folder / "adapter.json"} adapts {str(base):.200}: {error}') from error
        stored = Stored([*folder.glob('adapter.safetensors'), *folder.glob('shard-*.safetensors')], folder)
        try:
            model.add_lora(rank, alpha)
        except ValueError as error:
            raise ValueError(f'{folder / "adapter.json"}: {error}') from error
        places = {name: p for name, p in model.named_parameters() if 'lora.' in name}
        wrong = [name for name in {*places, *stored.parts} if name not in places or name not in stored.parts
                 or places[name].shape != stored.get(name, shape_only=True).shape]
        if wrong:
            raise ValueError(f'{folder} does not fit {base}: {", ".join(sorted(wrong)[:10])}')
        for name, p in places.items():
            fill(p, stored.get(name))
        return model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device='cpu', experts=None, **overrides):
        """Load a folder, or a Hugging Face hub id, into parameters of this dtype on this device, tensor by tensor.

        Reads Hugging Face's layout, in bf16, fp16, fp32 or MXFP4, and OpenAI's original/. experts='mxfp4' keeps the
        experts' matrices at four bits a value (rounded to that, if the files have more) and cannot train them. A load-
        balancing coefficient that the checkpoint holds but leaves switched off (output_router_logits false; published:
        0.9) stays off. Overrides are fields of GPTConfig that are to differ, dropout for instance. Raises ValueError
        for what it cannot load, with the names of all tensors that do not fit.
        """
        folder = find_checkpoint(path)
        if (folder / 'adapter.json').is_file():
            return cls.from_adapter(folder, dtype, device, experts, overrides)
        if 'dropout' in overrides:
            overrides.setdefault('attention_dropout', None)
        config = replace(read_config(folder / 'config.json'), **overrides)
        check_packing(experts, config)
        # what the files' headers tell comes first, so that memory is taken only for what is there
        shapes = {name: tuple(tensor.shape) for name, tensor, _ in read_tensors(folder, config, shapes_only=True)}
        if config.num_hidden_layers > len(shapes):
            raise ValueError(f'{folder} has {len(shapes)} tensors, too few for {config.num_hidden_layers} layers')
        with torch.device('meta'):
            model = cls(config)
            if experts:
                model.pack_experts()
        places, tied = model.places(), config.tie_word_embeddings
        if tied:
            places['lm_head.weight'] = model.lm_head.weight  # which files may have, too
        wrong = [f'{name} is {shape}, expected {tuple(places[name].shape) if name in places else "no such tensor"}'
                 for name, shape in shapes.items() if name not in places or shape != tuple(places[name].shape)]
        wrong += [f'{name} is missing' for name in sorted(places.keys() - shapes.keys() - {tied and 'lm_head.weight'})]
        if wrong:
            raise ValueError(f'{folder} does not fit the config: {"; ".join(wrong[:10])}'
                             + (f'; and {len(wrong) - 10} more' if len(wrong) > 10 else ''))
        for p in model.parameters():
            p.data = p.data.to(dtype)
        need = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        if torch.device(device).type == 'cpu' and need > (there := memory_here()):  # or the system ends the process
            raise ValueError(f'{folder} takes {need / 1e9:,.0f} GB of memory in {dtype}, and here are '
                             f"{there / 1e9:,.0f}; experts='mxfp4' takes least")
        model.to_empty(device=device)
        for layer in model.model.layers:  # counters, which no checkpoint has
            layer.mlp.load.zero_(), layer.mlp.entropy.zero_()
        places, model.source = model.places(), dict(base=str(path), overrides=overrides)
        on_meta = torch.device(device).type == 'meta'
        for name, tensor, by_turns in [] if on_meta else read_tensors(folder, config):
            fill(places[name], tensor, by_turns)
        if tied:
            head, model.lm_head.weight = model.lm_head.weight, model.model.embed_tokens.weight
            if 'lm_head.weight' in shapes and not on_meta and not torch.equal(head, model.lm_head.weight):
                raise ValueError(f'{folder} has a head of its own, so tie_word_embeddings cannot be True')
        return model

    def save_pretrained(self, path, dtype=None, experts=None, portable=True, shard_size=5e9):
        """Write config.json and safetensors in Hugging Face's layout, for transformers' GptOssForCausalLM and others.

        In dtype, or None for the parameters' own; with experts='mxfp4' the experts' matrices at four bits a value, as
        published. What exceeds shard_size bytes is divided into files with an index. Raises ValueError for a model
        that the format cannot express, unless portable is False: then only from_pretrained reads it.
        """
        check_packing(experts, self.config)
        if self.lora:
            raise ValueError('the model has adapters: merge_lora() first, or save_adapter() saves them apart')
        if portable and self.config.qk_norm:
            raise ValueError("qk_norm is not in gpt-oss's format: others would load the rest and be silently wrong")
        folder, shard, where = Path(path), {}, {}
        dtype = dtype or self.lm_head.weight.dtype
        folder.mkdir(parents=True, exist_ok=True)
        file = lambda number: folder / f'new-{number:05}.safetensors'  # until all is written
        for left in folder.glob('new-*.safetensors'):
            left.unlink()

        def write():
            number = len(set(where.values())) + 1
            save_file(shard, file(number))
            where.update(dict.fromkeys(shard, number))
            shard.clear()

        size = total = 0
        for name, place in self.places().items():
            tensors = published(name, place, dtype, experts)
            more = sum(tensor.nbytes for tensor in tensors.values())
            if shard and size + more > shard_size:
                write()
                size = 0
            shard |= tensors
            size, total = size + more, total + more
        write()
        count = max(where.values())
        names = {n: 'model.safetensors' if count == 1 else f'model-{n:05}-of-{count:05}.safetensors'
                 for n in range(1, count + 1)}
        for number in names:
            with open(file(number), 'rb') as new:
                os.fsync(new.fileno())  # the disk has it before what was there goes
        for old in (*folder.glob('model*.safetensors*'), *folder.glob('shard-*'), *folder.glob('adapter.*')):
            old.unlink()
        for number, name in names.items():
            file(number).rename(folder / name)
        if count > 1:
            index = dict(metadata=dict(total_size=total), weight_map={key: names[n] for key, n in where.items()})
            (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
        self.save_config(folder, dtype, experts)

    def save_config(self, folder, dtype=torch.float32, experts=None):
        """Write what there is beside the tensors: adapter.json, or, for weights of this dtype, config.json and
        generation_config.json."""
        if self.lora:
            base = self.source['base']
            known = self.source | self.lora | dict(base=str(Path(base).resolve() if Path(base).exists() else base))
            (folder / 'adapter.json').write_text(json.dumps(known, indent=2) + '\n')
            return
        raw = asdict(self.config)
        rope = {key.removeprefix('rope_'): raw.pop(key) for key in list(raw) if key.startswith('rope_')}
        raw['rope_theta'] = rope.pop('theta')
        if not self.config.qk_norm:
            raw |= dict(model_type='gpt_oss', architectures=['GptOssForCausalLM'])
        if experts:
            skipped = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']
            raw['quantization_config'] = dict(quant_method='mxfp4', modules_to_not_convert=skipped)
        raw |= dict(hidden_act='silu', attention_bias=True, rope_scaling=dict(rope_type='yarn', **rope),
                    output_router_logits=raw['router_aux_loss_coef'] > 0, torch_dtype=str(dtype).removeprefix('torch.'))
        (folder / 'config.json').write_text(json.dumps(raw, indent=2) + '\n')
        stops = dict(eos_token_id=[200002, 199999, 200012], pad_token_id=199999) if raw['vocab_size'] == 201088 else {}
        (folder / 'generation_config.json').write_text(json.dumps(dict(do_sample=True, **stops), indent=2) + '\n')


def adapted_matrices(layer):
    """(module, its matrix or stack, the place of that one's LoRA) of a Block."""
    attention = [(getattr(layer.self_attn, f'{name}_proj'), 'weight', 'lora') for name in 'qkvo']
    return attention + [(layer.mlp.experts, f'{name}_weight', f'{name}_lora') for name in ('gate_up', 'down')]


def check_packing(experts, config):
    if experts not in (None, 'mxfp4'):
        raise ValueError(f"experts is {experts!r}; it takes 'mxfp4', or None for the parameters' dtype")
    if experts and (config.hidden_size % 32 or config.intermediate_size % 32):
        raise ValueError(f'MXFP4 takes 32 values of a row together; hidden_size ({config.hidden_size}) and '
                         f'intermediate_size ({config.intermediate_size}) must be multiples of 32')


class MXFP4(nn.Module):
    """A stack of matrices (E, out, in) at four bits a value, which do not train; [e] is one of them in bf16, exactly.

    blocks uint8 (E, out, in / 32, 16) hold two values a byte, the even one in the low nibble, and scales uint8 (E, out,
    in / 32) the exponents of two, biased by 127, of 32 values each. OCP Microscaling Formats, v1.0.
    """

    def __init__(self, blocks, scales):
        super().__init__()
        if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape or blocks.size(-1) != 16:
            raise ValueError(f'blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} are no MXFP4')
        self.register_buffer('blocks', blocks)
        self.register_buffer('scales', scales)
        self.shape = torch.Size((*blocks.shape[:2], blocks.size(2) * 32))

    @classmethod
    def empty(cls, number, rows, columns, **options):
        new = lambda *shape: torch.empty(number, rows, columns // 32, *shape, dtype=torch.uint8, **options)
        return cls(new(16), new())

    def size(self, dim):
        return self.shape[dim]

    def __getitem__(self, e):
        return dequantize_mxfp4(self.blocks[e], self.scales[e])

    def widened(self, e, dtype):
        """[e] in this dtype, without a detour on CPUs that have kernels."""
        blocks, scales = self.blocks[e], self.scales[e]
        if dtype != torch.float32 or blocks.device.type != 'cpu' or torch.compiler.is_compiling() or kernels() is None:
            return self[e].to(dtype)
        matrix = torch.empty(self.shape[1:], dtype=dtype)
        on_all_cores([('unpack', (blocks, scales), (POWERS,), matrix)], [scales.size(1)])
        return matrix

    def __setitem__(self, e, matrix):
        self.blocks[e], self.scales[e] = quantize_mxfp4(matrix)


# What PyTorch does too, but by widening whole matrices in several passes: one row through a matrix that is kept
# narrower than what is computed in, nearly as fast as memory can be read, and the unpacking of MXFP4.
KERNELS = r'''
#include <immintrin.h>
#define WIDE(v) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v))
typedef unsigned char byte;

static inline void doubled(const __m128i *block, __m256 w[4]) {  // a block's 32 values, twice as large
    const __m128i values = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    __m128i codes = _mm_loadu_si128(block), low = _mm_set1_epi8(15);
    __m128i even = _mm_shuffle_epi8(values, codes & low);
    __m128i odd = _mm_shuffle_epi8(values, _mm_srli_epi16(codes, 4) & low);
    __m128i first = _mm_unpacklo_epi8(even, odd), last = _mm_unpackhi_epi8(even, odd);
    w[0] = WIDE(first), w[1] = WIDE(_mm_srli_si128(first, 8));
    w[2] = WIDE(last), w[3] = WIDE(_mm_srli_si128(last, 8));
}

void unpack(const __m128i *blocks, const byte *scales, const float *power, float *y, long rows, long groups) {
    __m256 w[4];
    for (long g = 0; g < rows * groups; g++) {
        doubled(blocks++, w);
        for (int i = 0; i < 4; i++, y += 8) _mm256_storeu_ps(y, w[i] * power[scales[g]]);
    }
}

static float total(__m256 v) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += v[i];
    return sum;
}

void mxfp4(const __m128i *blocks, const byte *scales, const float *power, const float *x, float *y, long rows,
           long groups) {
    for (long r = 0; r < rows; r++) {
        __m256 sum = {0}, part, w[4];
        for (long g = 0; g < groups; g++, sum += part * power[*scales++]) {
            doubled(blocks++, w);
            part = w[0] * _mm256_loadu_ps(x + 32 * g);
            for (int i = 1; i < 4; i++) part += w[i] * _mm256_loadu_ps(x + 32 * g + 8 * i);
        }
        y[r] = total(sum);
    }
}

void bf16(const __m128i *w, const float *x, float *y, long rows, long groups) {
    for (long r = 0; r < rows; r++) {
        __m256 sum = {0};
        for (long g = 0; g < 4 * groups; g++) {
            __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(w++)), 16);
            sum += _mm256_castsi256_ps(wide) * _mm256_loadu_ps(x + 8 * g);
        }
        y[r] = total(sum);
    }
}'''
POWERS = torch.tensor([2.0 ** (scale - 128) for scale in range(256)])  # for values that are doubled


@cache
def kernels():
    """KERNELS, compiled at first use, and threads to run them; None where there is no C compiler or no AVX2."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, 'kernels.c'), Path(folder, 'kernels.so')
            source.write_text(KERNELS)
            flags = '-O3', '-march=native', '-shared', '-fPIC', '-o', library
            subprocess.run([os.environ.get('CC', 'cc'), source, *flags], check=True, capture_output=True)
            return ctypes.CDLL(str(library)), ThreadPoolExecutor(max(1, torch.get_num_threads() - 1))
    except (OSError, subprocess.SubprocessError):
        return None


LARGE = 2 ** 16  # values in a matrix; below, PyTorch's own way takes no longer


def narrow(x, w):
    """Whether matvecs takes x, of one row, and w: on a CPU, in fp32 through bf16 or MXFP4, large, with no gradients."""
    return (x.dtype == torch.float32 and x.numel() == x.size(-1) and x.device.type == 'cpu'
            and (isinstance(w, MXFP4) or w.dtype == torch.bfloat16 and w.is_contiguous()) and w.shape.numel() >= LARGE
            and x.size(-1) % 32 == 0 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and kernels() is not None)


def matvecs(pairs):
    """[w @ x] of pairs of x (in,) in fp32 and w (out, in) in bf16, or its (blocks, scales), see MXFP4."""
    results, jobs = [x.new_empty(len(w[0] if isinstance(w, tuple) else w)) for x, w in pairs], []
    for y, (x, w) in zip(results, pairs):
        jobs.append(('mxfp4', w, (POWERS, x), y) if isinstance(w, tuple) else ('bf16', (w,), (x,), y))
    on_all_cores(jobs, [len(x) // 32 for x, _ in pairs])
    return results


def on_all_cores(jobs, groups):
    """Run kernels (name, what is divided by rows, what is not, the result, divided too), with groups of 32 in a row."""
    library, pool = kernels()
    shares = [[] for _ in range(pool._max_workers + 1)]  # of the pool's threads, and of this one
    for (name, divided, whole, y), number in zip(jobs, groups):
        whole, part = [tensor.contiguous() for tensor in whole], -(-len(y) // len(shares))
        for share, i in zip(shares, range(0, len(y), part)):
            rows = slice(i, i + part)
            tensors = *(tensor[rows] for tensor in divided), *whole, y[rows]
            share.append((getattr(library, name), tensors, len(tensors[-1]), number))

    def run(share):
        for function, tensors, *sizes in share:  # ctypes lets other threads go on meanwhile
            function(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_long, sizes))

    others = [pool.submit(run, share) for share in shares[1:]]
    run(shares[0])
    for other in others:
        other.result()


@torch.no_grad()
def fill(target, source, interleaved=False):
    """Copy source, a tensor or an MXFP4, into target, one or the other; gates and ups by turns become halves."""
    halves = (lambda rows: torch.cat((rows[0::2], rows[1::2]))) if interleaved else (lambda rows: rows)
    if isinstance(target, MXFP4) and isinstance(source, MXFP4):
        fill(target.blocks, source.blocks, interleaved)
        fill(target.scales, source.scales, interleaved)
    elif interleaved or isinstance(target, MXFP4) or isinstance(source, MXFP4):
        for e in range(source.shape[0]):  # one expert at a time, for memory's sake
            target[e] = halves(source[e])
    else:
        target.copy_(source)


def published(name, place, dtype, experts):
    """{name: tensor} in Hugging Face's layout of a parameter or an MXFP4 of ours: the inverse of read_tensors."""
    if '.experts.' not in name:
        return {name: place.detach().to(dtype)}
    turns = (lambda halves: torch.stack(halves.chunk(2), dim=1).flatten(0, 1)) if '.gate_up_' in name else (lambda x: x)
    name = name.replace('_weight', '_proj').replace('_bias', '_proj_bias')
    if name.endswith('bias'):
        return {name: torch.stack([turns(row) for row in place.detach().to(dtype)])}
    if not experts:
        return {name: torch.stack([turns(place[e].detach().to(dtype)).T for e in range(place.size(0))])}
    if isinstance(place, MXFP4):
        pairs = zip(place.blocks, place.scales)
    else:
        pairs = (quantize_mxfp4(matrix) for matrix in place.detach())
    blocks, scales = (torch.stack([turns(row) for row in rows]) for rows in zip(*pairs))
    return {f'{name}_blocks': blocks, f'{name}_scales': scales}


def memory_here():
    """Bytes of memory that this machine has, as far as the system tells."""
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):
        return math.inf


def find_checkpoint(path):
    """The local folder of a checkpoint, with config.json, original/config.json or adapter.json; a hub id's download."""
    for file in (Path(path, 'adapter.json'), Path(path, 'config.json'), Path(path, 'original', 'config.json')):
        if os.path.isfile(file):  # of names that are none, too
            return file.parent
    if os.path.exists(path) or str(path).count('/') != 1:
        raise ValueError(f'{str(path):.200} is no checkpoint: no config.json in it, nor is it a hub id like '
                         'openai/gpt-oss-20b')
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path), allow_patterns=[
            'config.json', 'model*.safetensors', 'model.safetensors.index.json', 'shard-*.safetensors', 'adapter.json',
            'adapter.safetensors', 'meta.json', 'tokenizer.tiktoken']))
    except Exception as error:  # the hub's client raises many kinds; each means that the checkpoint cannot be had
        raise ValueError(f'{path} is no folder here and could not be had from the Hugging Face hub '
                         f'({type(error).__name__}); download it elsewhere and give its folder') from error


def save_file(tensors, path):
    """Write {name: tensor} as a safetensors file, which others may read as they may what else is written here."""
    from safetensors.torch import save_file
    save_file(tensors, path, {'format': 'pt'})
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # of file systems that have no such rights
        os.chmod(path, 0o666 & ~umask)


def read_bytes(path, limit=2 ** 26):
    """What is in a file. Raises ValueError for a pipe or device, which may never end, and for more bytes than that."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f'{path} is no regular file')
    if os.stat(path).st_size > limit:
        raise ValueError(f'{path} is larger than {limit >> 20} MB')
    return Path(path).read_bytes()


def read_json(path):
    """The object in a JSON file, a dict. Raises ValueError, for files larger than 64 MB too, which are none of ours."""
    try:
        found = json.loads(read_bytes(path).decode())
        if not isinstance(found, dict):
            raise ValueError(f'it holds a {type(found).__name__}, not an object')
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged, not a JSON object ({type(error).__name__}: {error})') from error
    return found


def read_config(path):
    """GPTConfig from the config.json of Hugging Face (rope_scaling or rope_parameters) or OpenAI (flat, own names).

    Raises ValueError.
    """
    found = read_json(path)
    try:
        return config_from({key: value for key, value in found.items() if value is not None})
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f'{path}: {str(error)[:300]}') from error


def config_from(raw):
    openai = dict(num_experts='num_local_experts', experts_per_token='num_experts_per_tok',
                  initial_context_length='rope_original_max_position_embeddings', rope_scaling_factor='rope_factor',
                  rope_ntk_alpha='rope_beta_slow', rope_ntk_beta='rope_beta_fast')
    transformers = dict(vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
                        num_attention_heads=64, num_key_value_heads=8, num_local_experts=128, num_experts_per_tok=4)
    flat = transformers | {openai.get(key, key): value for key, value in raw.items()}
    rope = raw.get('rope_parameters') or raw.get('rope_scaling')
    if rope:
        kind = rope.get('rope_type', rope.get('type', 'default'))
        if kind not in ('yarn', 'default') or rope.get('attention_factor') or rope.get('mscale'):
            raise ValueError(f'it asks for the rope {rope}; this model has default, and yarn with its usual scale')
        # what transformers takes where these are missing; gpt-oss's files have both
        flat.update(rope_truncate=True)
        flat.update(rope_original_max_position_embeddings=flat.get('max_position_embeddings', 131072))
        flat.update({f'rope_{key.removeprefix("rope_")}': value for key, value in rope.items() if value is not None})
        if kind == 'default':
            flat.update(rope_factor=1.0)
    for key, only in (('swiglu_alpha', 1.702), ('attention_bias', True), ('hidden_act', 'silu')):
        if raw.get(key, only) != only:
            raise ValueError(f'{key} is {raw[key]}; gpt-oss has {only}')
    if not raw.get('output_router_logits'):
        flat.update(router_aux_loss_coef=0.0)
    known = [field.name for field in fields(GPTConfig)]
    config = GPTConfig(**{key: flat[key] for key in known if key in flat})
    if 'sliding_window' not in raw:  # null: no window
        config.layer_types = [FULL] * config.num_hidden_layers
    return config


# OpenAI's names, piece by piece, and the published Hugging Face names of the experts, to ours
RENAMES = (('unembedding.', 'lm_head.'), ('embedding.', 'model.embed_tokens.'), ('block.', 'model.layers.'),
           ('attn.norm.scale', 'input_layernorm.weight'), ('mlp.norm.scale', 'post_attention_layernorm.weight'),
           ('norm.scale', 'model.norm.weight'), ('.attn.out.', '.self_attn.o_proj.'), ('.attn.', '.self_attn.'),
           ('mlp.gate.', 'mlp.router.'), ('mlp.mlp1_', 'mlp.experts.gate_up_'), ('mlp.mlp2_', 'mlp.experts.down_'),
           ('_proj_bias', '_bias'), ('experts.gate_up_proj', 'experts.gate_up_weight'),
           ('experts.down_proj', 'experts.down_weight'))


class Stored:
    """The tensors of safetensors files: parts {name: [(first row, path, shape)]}: FSDP's ranks write some rows each.

    Headers are checked by the safetensors package: their length, and that the tensors fill the file. A file is opened
    anew for each tensor, for what was read from it stays in memory as long as it is open. Raises ValueError.
    """

    def __init__(self, paths, folder):
        self.parts = {}
        for path in sorted(paths):
            with self.opened(path) as file:
                rows = json.loads((file.metadata() or {}).get('DCP_SHARDING_INFO', '{}'))  # torch.distributed's
                for name in file.keys():
                    if '/' in name:
                        continue  # an optimizer's
                    first, *_ = (rows[name]['saved_offsets'] if name in rows else None) or [0]
                    if type(first) is not int:
                        raise ValueError(f'{name} begins at {first!r:.40}')
                    kind = file.get_slice(name).get_dtype()
                    packed = kind == 'U8' and name.endswith(('scales', 'blocks'))
                    if kind not in ('F64', 'F32', 'F16', 'BF16') and not packed:
                        raise ValueError(f'{name} holds {kind}, which is no weight')
                    self.parts.setdefault(name, []).append((first, path, tuple(file.get_slice(name).get_shape())))
        if not self.parts:
            raise ValueError(f'{folder} has no model*.safetensors, or no tensors in them')
        for name, parts in self.parts.items():
            self.parts[name] = sorted(parts)

    @contextmanager
    def opened(self, path):
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, 'pt') as file:
                yield file
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f'{path} is not a whole safetensors file: {error}') from error

    def get(self, name, shape_only=False):
        """The tensor of this name, or one on meta that has its shape."""
        parts, rows = [], 0
        for first, path, shape in self.parts[name]:
            if first != rows or shape[1:] != self.parts[name][0][2][1:]:
                raise ValueError(f'{path}: {name} {shape} begins at row {first}, but {rows} rows come before, of '
                                 f'{self.parts[name][0][2]}')
            rows += shape[0] if shape else 0
            if shape_only:
                parts.append(torch.empty(shape, device='meta'))
            else:
                with self.opened(path) as file:
                    parts.append(file.get_tensor(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_tensors(folder, config, shapes_only=False):
    """Yield (name, tensor or MXFP4, whether gates and ups take turns), by our names, for each in the folder's files.

    Expert matrices are (E, out, in) in OpenAI's files and in MXFP4, (E, in, out) in Hugging Face's bf16 and fp32 files.
    down_proj is square in gpt-oss, so only the name and the format tell, never the shape. What FSDP's ranks wrote in
    parts, shard-*, is as we keep it.
    """
    paths = [path for kind in ('model*', 'shard-*') for path in folder.glob(f'{kind}.safetensors')]
    index = folder / 'model.safetensors.index.json'
    if index.is_file():
        try:
            paths = [folder / Path(name).name for name in set(read_json(index)['weight_map'].values())]
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f'{index} is no index of tensors ({type(error).__name__}: {error})') from error
    stored = Stored(paths, folder)
    for theirs in stored.parts:
        if theirs.endswith('scales') and theirs.removesuffix('scales') + 'blocks' in stored.parts:
            continue
        tensor, name = stored.get(theirs, shapes_only), theirs
        for old, new in RENAMES:
            name = name.replace(old, new)
        by_turns = '.gate_up_' in name and name != theirs
        if theirs.endswith('blocks'):
            scales = theirs.removesuffix('blocks') + 'scales'
            if scales not in stored.parts:
                raise ValueError(f'{folder} has {theirs} but no {scales}')
            tensor, name = MXFP4(tensor, stored.get(scales, shapes_only)), name.removesuffix('blocks')[:-1]
        elif theirs.endswith(('gate_up_proj', 'down_proj')):
            tensor = tensor.mT
        if '.qkv.' in name:
            queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            sizes = queries, keys, keys
            parts = tensor.split(sizes) if len(tensor) == sum(sizes) else [tensor] * 3
            for part, rows in zip('qkv', parts):
                yield name.replace('qkv', f'{part}_proj'), rows, False
        else:
            yield name, tensor, by_turns


def dequantize_mxfp4(blocks, scales):
    """blocks uint8 (..., G, 16) and scales uint8 (..., G), see MXFP4 -> bf16 (..., G * 32), exactly."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=blocks.device)
    values = torch.cat((values, -values))
    pairs = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1)  # (..., G, 16, 2)
    return torch.ldexp(pairs.flatten(-2), scales[..., None].int() - 127).flatten(-2).to(torch.bfloat16)


def quantize_mxfp4(x):
    """x (..., in) -> blocks and scales, see MXFP4: to the nearest values, half-way to the even code, at the one of two
    scales that errs less: the largest value between 4 and 8 there, of which 6 holds the most, or between 2 and 4."""
    x = x.float().contiguous().unflatten(-1, (-1, 32))
    top = x.abs().amax(-1, keepdim=True)
    if not top.isfinite().all():
        raise ValueError('there are weights that are not finite, which MXFP4 does not have')
    limits = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], device=x.device)
    limits[1::2] = limits[1::2].nextafter(limits.new_zeros(()))  # what is half-way goes down, but here up

    def rounded(exponent):
        codes = torch.bucketize(torch.ldexp(x.abs(), -exponent), limits) | x.signbit().int() << 3
        blocks, scales = codes[..., 0::2] | codes[..., 1::2] << 4, exponent + 127
        off = dequantize_mxfp4(blocks, scales[..., 0]).view_as(x) - x
        return off.square().sum(-1, keepdim=True), blocks, scales

    exponent = top.frexp().exponent - 3
    (error, *small), (other, *large) = (rounded((exponent + more).clamp(-127, 127)) for more in (0, 1))
    blocks, scales = (torch.where(other < error, b, a).to(torch.uint8) for a, b in zip(small, large))
    return blocks, scales[..., 0]


def draw(logits, temperature, top_k, top_p, min_p):
    """Draw a token for each row of logits (B, V), fp32 -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    if top_p is not None and top_p < 1:
        share, token = logits.softmax(-1).sort(dim=-1, descending=True)
        dropped = share.cumsum(-1) - share >= top_p  # what stands before a token already reaches top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, token, dropped), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)
