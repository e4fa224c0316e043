"""
GPT-OSS, the whole model in one file:

1. the shape     GPTConfig, in the field names of the published config.json
2. the layers    norm, RoPE with YaRN, attention with sinks, mixture of experts, in the order of the forward pass
3. the model     GPT: forward pass, loss, generation
4. optimizers    Muon for the matrices of the layers, AdamW for everything else
5. checkpoints   Hugging Face's, OpenAI's and MXFP4 layouts, read and written; LoRA adapters

Shapes: B batch, T tokens, N = B * T rows, D hidden_size, H query heads, KV key and value heads, hd head_dim,
E experts, k experts per token, I intermediate_size, L layers, V vocab_size.

References: OpenAI's gpt_oss/torch/model.py (github.com/openai/gpt-oss) and model card (arXiv:2508.10925); transformers'
models/gpt_oss; YaRN (arXiv:2309.00071); attention sinks (arXiv:2309.17453); Switch Transformer (arXiv:2101.03961).
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# 1. the shape

SLIDING, FULL = 'sliding_attention', 'full_attention'


@dataclass
class GPTConfig:
    vocab_size: int = 201088  # rows of the embedding; 201088 is o200k_harmony
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 256  # width of one expert
    num_hidden_layers: int = 6  # each layer is attention, then a mixture of experts
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # key and value heads, each shared by a group of query heads
    head_dim: int = 64  # width of a head; heads * head_dim need not equal hidden_size
    num_local_experts: int = 8  # experts in a layer; 1 makes the model dense
    num_experts_per_tok: int = 2  # experts that process each token
    sliding_window: int = 128  # keys that a sliding layer sees, including the token itself
    layer_types: list[str] | None = None  # sliding_attention or full_attention; None alternates, sliding first
    max_position_embeddings: int = 131072  # the longest context, in tokens
    rms_norm_eps: float = 1e-5  # added to the mean square
    swiglu_limit: float = 7.0  # clamps the gate from above and the up projection on both sides
    rope_theta: float = 150000.0  # base of RoPE's frequencies
    rope_factor: float = 32.0  # YaRN: how far the context is stretched; 1 is plain RoPE
    rope_beta_fast: float = 32.0  # YaRN: pairs with more turns than this in the original context keep their frequency
    rope_beta_slow: float = 1.0  # YaRN: pairs with fewer turns than this have theirs divided by rope_factor
    rope_original_max_position_embeddings: int = 4096  # YaRN: the context before stretching
    rope_truncate: bool = False  # YaRN: round the ends of the ramp to whole pairs; gpt-oss does not
    initializer_range: float = 0.02  # standard deviation of the initial weights
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss in training mode; 0.01 is usual
    tie_word_embeddings: bool = False  # one matrix for the embedding and the head
    dropout: float = 0.0  # after attention, after the experts, and on the attention weights
    attention_dropout: float | None = None  # on the attention weights; None: the same as dropout

    def __post_init__(self):
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.layer_types is None:
            self.layer_types = [FULL if i % 2 else SLIDING for i in range(min(self.num_hidden_layers, 1000))]
        for field in fields(self):  # config.json may come from a stranger
            value, least = getattr(self, field.name), int(field.type is int)
            kinds = {int: (int,), bool: (bool,)}.get(field.type, (float, int))
            if field.name != 'layer_types' and not (type(value) in kinds and least <= value < 2 ** 31):
                raise ValueError(f'{field.name} is {value!r:.99}; it must be {kinds[0].__name__}, at least {least}')
        H, KV, L = self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers
        E, k = self.num_local_experts, self.num_experts_per_tok
        rules = {
            f'num_attention_heads ({H}) must be a multiple of num_key_value_heads ({KV})': H % KV == 0,
            f'num_experts_per_tok ({k}) must not exceed num_local_experts ({E})': k <= E,
            f'head_dim ({self.head_dim}) must be even, because RoPE rotates pairs': self.head_dim % 2 == 0,
            f'layer_types must have num_hidden_layers ({L}) names': len(self.layer_types) == L,
            f'layer_types may name {SLIDING} and {FULL}': {*self.layer_types} <= {SLIDING, FULL},
            'dropout must be below 1': max(self.dropout, self.attention_dropout) < 1,
            'rope_factor must be at least 1, and rope_theta above 1': self.rope_factor >= 1 and self.rope_theta > 1,
            'rope_beta_fast and rope_beta_slow must be above 0': min(self.rope_beta_fast, self.rope_beta_slow) > 0}
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)


# -----------------------------------------------------------------------------
# 2. the layers

class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, so that fp32 parameters serve bf16 activations."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.lora = None  # see GPT.add_lora

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if self.lora is None else y + self.lora(x)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32. The scale is applied before the result returns to the dtype of the input."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def rope_tables(config, positions, dtype=torch.float32):
    """cos and sin, each (T, 1, hd), for positions (T,). YaRN: pairs that turn often within the original context keep
    their frequency, that of slow pairs is divided by rope_factor, and a linear ramp connects the two. cos and sin are
    multiplied by YaRN's concentration, 0.1 ln(rope_factor) + 1."""
    c, half = config, config.head_dim // 2

    def pair_with(turns):  # the (fractional) index of the pair that turns this many times in the original context
        return half * math.log(c.rope_original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(c.rope_theta)

    low, high = pair_with(c.rope_beta_fast), pair_with(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    pair = torch.arange(half, device=positions.device)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = c.rope_theta ** (-pair / half) * (1 - slowed + slowed / c.rope_factor)
    angle = positions[:, None, None].float() * frequency
    concentration = 0.1 * math.log(c.rope_factor) + 1
    cos, sin = angle.cos() * concentration, angle.sin() * concentration
    # one tensor, which the compiler keeps; a cos alone it would compute again for every element of every layer
    return torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype).chunk(2, dim=-1)


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + hd / 2) of x (B, T, heads, hd)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def flash_takes(q):
    """Whether PyTorch's FlashAttention for CUDA takes queries like these: 16 bits, and sm80 or newer."""
    return (q.is_cuda and q.dtype != torch.float32 and q.size(-1) % 8 == 0 and q.size(-1) <= 192
            and torch.backends.cuda.is_flash_attention_available() and not torch.version.hip
            and torch.cuda.get_device_properties(q.device).major >= 8)


class FlashAttention(torch.autograd.Function):
    """`attention` by CUDA's FlashAttention kernel, which takes windows and grouped heads, in memory linear in T.

    The kernel also returns the logarithms of the softmax's denominators (lse). From them follows the weight that a sink
    leaves to the keys, by which outputs and their gradients are multiplied. The kernel's backward subtracts the product
    of the output and its gradient; given the output with the sink, it computes the gradients with the sink.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, window):
        T, hd = q.size(1), q.size(-1)
        ctx.options = dict(scale=hd ** -0.5, window_size_left=(window or 0) - 1, window_size_right=0)  # -1: no window
        y, lse, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, T, T, 0.0, True, False, **ctx.options)
        kept = torch.sigmoid(lse - sinks.float()[:, None])  # (B, H, T)
        y = (y * kept.mT[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, y, lse, *state)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, sinks, y, lse, *state = ctx.saved_tensors
        T, kept = q.size(1), torch.sigmoid(lse - sinks.float()[:, None])
        # lse must be the kernel's own: the compiler pads the strides of what it computes, which the kernel ignores
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            (dy * kept.mT[..., None]).to(dy.dtype), q, k, v, y, lse, None, None, T, T, 0.0, True, *state, **ctx.options)
        dsinks = -((1 - kept) * (dy.float() * y.float()).sum(-1).mT).sum((0, 2))
        return dq, dk, dv, dsinks.to(sinks.dtype), None


def attention(q, k, v, sinks, window=None, dropout=0.0):
    """Causal attention with sinks. q (B, T, H, hd), k and v (B, T, KV, hd), sinks (H,) -> (B, T, H, hd).

    A sink is a logit that joins the softmax and adds no value. Where FlashAttention cannot be used, it is one more key,
    whose value is zero: queries and keys get a feature whose product is the logit, so every SDPA kernel supports it.
    With a window, blocks of `window` queries see their own block and the one before. This is exact and linear in T.
    """
    B, T, H, hd = q.shape
    if flash_takes(q) and not dropout:
        return FlashAttention.apply(q, k, v, sinks, window)
    extra = 8 - hd % 8 if q.is_cuda else 1  # CUDA's kernels want widths in multiples of 8
    logit = F.pad((sinks * hd ** 0.5).to(q.dtype)[:, None], (0, extra - 1))  # SDPA multiplies by hd ** -0.5
    q = torch.cat((q, logit.expand(B, T, H, extra)), dim=-1)
    if window is None or window >= T:
        mask = None
        # the sink is key 0; a dummy query 0 keeps the mask causal
        q, k, v = F.pad(q, (0, 0, 0, 0, 1, 0)), F.pad(k, (0, extra, 0, 0, 1, 0)), F.pad(v, (0, extra, 0, 0, 1, 0))
    else:
        blocks = -(-T // window)
        tail = blocks * window - T
        q = F.pad(q, (0, 0, 0, 0, 0, tail)) if tail else q
        q = q.unflatten(1, (blocks, window)).flatten(0, 1)  # (B * blocks, window, H, hd + extra)
        k, v = (F.pad(x, (0, extra, 0, 0, window, tail)).unflatten(1, (-1, window)) for x in (k, v))
        sink = k.new_zeros(1).expand(B, blocks, 1, *k.shape[3:])
        # the first key of the block before is outside of every window, so the sink takes its place
        k, v = (torch.cat((sink, x[:, :-1, 1:], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))
        distance = torch.arange(window, device=q.device)[:, None] - torch.arange(-window, window, device=q.device)
        mask = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1)
        mask[0, :, :window] = False  # no block comes before the first
        mask[:, :, 0] = True
        mask = mask.repeat(B, 1, 1)[:, None]  # (B * blocks, 1, window, 2 * window)
    with torch.no_grad():
        k[:, 0, :, hd] = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda:  # grouped heads need the flash kernel, which takes no mask, no fp32 and no old GPU
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                       scale=hd ** -0.5, enable_gqa=H != k.size(1)).transpose(1, 2)
    y = F.pad(y, (0, -extra, 0, 0, -1 if mask is None else 0, 0))  # cheaper in backward than two slices
    return y.reshape(B, -1, H, hd)[:, :T]


class KVCache:
    """Keys and values of one layer, (B, KV, size, hd). A sliding layer uses a ring of sliding_window slots. The
    position is a tensor and shapes stay the same, so one compiled step serves every token."""

    def __init__(self, config, layer_type, batch_size, length, dtype, device):
        size = min(length, config.sliding_window) if layer_type == SLIDING else length
        shape = batch_size, config.num_key_value_heads, size, config.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.slots = torch.arange(size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # tokens seen so far

    def update(self, k, v):
        """Store k and v (B, T, KV, hd) of the next T tokens. Only the last `size` tokens are kept."""
        size, T = self.k.size(2), k.size(1)
        slots = (self.position + torch.arange(T, device=k.device))[-size:] % size
        self.k.index_copy_(2, slots, k[:, -size:].transpose(1, 2))
        self.v.index_copy_(2, slots, v[:, -size:].transpose(1, 2))
        self.position += T

    def attend(self, q, sinks):
        """Attention of the newest token, q (B, 1, H, hd) -> (B, KV, H / KV, hd). The order of keys does not matter."""
        B, KV, _, hd = self.k.shape
        logits = (q.view(B, KV, -1, hd) @ self.k.mT * hd ** -0.5).masked_fill(self.slots >= self.position, -math.inf)
        sinks = sinks.to(logits.dtype).view(1, KV, -1, 1).expand(B, -1, -1, 1)
        return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1] @ self.v


class Attention(nn.Module):
    def __init__(self, config, layer_type):
        super().__init__()
        D, H, KV, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = Linear(D, H * hd), Linear(D, KV * hd), Linear(D, KV * hd)
        self.o_proj = Linear(H * hd, D)
        self.sinks = nn.Parameter(torch.zeros(H))
        self.head_dim, self.dropout = hd, config.attention_dropout
        self.window = config.sliding_window if layer_type == SLIDING else None

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, D) -> (B, T, D). With a cache, x is the prompt that fills it or the newest token."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.update(k, v)
        if cache is None or T > 1:
            y = attention(q, k, v, self.sinks, self.window, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(q, self.sinks)
        return self.o_proj(y.reshape(B, T, -1))


def swiglu(gate_up, limit):
    """gate * sigmoid(1.702 gate) * (up + 1), with both clamped. gate_up (..., 2I) holds the gates, then the ups."""
    gate, up = gate_up.chunk(2, dim=-1)
    # hardtanh is a clamp whose backward is twice as fast on CPUs
    gate, up = F.hardtanh(gate, -math.inf, limit), F.hardtanh(up, -limit, limit)
    return F.silu(1.702 * gate) * torch.add(1 / 1.702, up, alpha=1 / 1.702)


def grouped_linear(x, w, b, member):
    """Rows x (M, in), sorted by expert, through w (E, out, in) and b (E, out) -> (M, out). member (M, E): True where a
    row belongs to an expert. One kernel on sm90 and sm100; elsewhere PyTorch loops over the experts, and GPUs wait for
    the host. It needs bf16 on CUDA, and widths in multiples of 8."""
    if x.is_cuda and torch.cuda.get_device_properties(x.device).major == 10:
        # gradients of experts without rows are garbage there (pytorch/pytorch#172439); where makes them zero
        w = torch.where(member.any(0)[:, None, None], w, 0)
    y = F.grouped_mm(x, w.to(x.dtype).mT, offs=member.sum(0).cumsum(0).to(torch.int32))
    return torch.addmm(y, member.to(x.dtype), b.to(x.dtype))  # b[expert] would add its gradients by atomics


class Experts(nn.Module):
    """E SwiGLU experts, stacked in the layout of nn.Linear, (E, out, in). The rows of gate_up are the gates, then the
    ups. The published checkpoints interleave them, which does not vectorize, so loading and saving convert."""

    def __init__(self, config):
        super().__init__()
        E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_weight = nn.Parameter(torch.empty(E, 2 * I, D))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * I))
        self.down_weight = nn.Parameter(torch.empty(E, D, I))
        self.down_bias = nn.Parameter(torch.empty(E, D))
        self.gate_up_lora = self.down_lora = None  # see GPT.add_lora
        self.limit = config.swiglu_limit

    def forward(self, x, chosen, router_weights):
        """x (N, D) through the experts chosen (N, k), summed with router_weights (N, k) -> (N, D), and the number of
        rows of each expert (E,), or None in decoding."""
        w1, b1, w2, b2 = self.gate_up_weight, self.gate_up_bias, self.down_weight, self.down_bias
        k = chosen.size(1)
        if (len(x) <= 8 and not self.training and self.gate_up_lora is None
                and (x.is_cuda or torch.compiler.is_compiling())):
            # decoding without a wait for the host; compiled, it becomes one pass over the weights of the chosen experts
            w1, b1, w2, b2 = (p[chosen].to(x.dtype) for p in (w1, b1, w2, b2))
            h = swiglu((x[:, None, None] * w1).sum(-1) + b1, self.limit)  # (N, k, I)
            y = (h[:, :, None] * w2).sum(-1) + b2  # (N, k, D)
            return (y * router_weights[..., None]).sum(1), None
        if len(x) == 1 and not self.training:  # a decoded token: nothing to sort
            return router_weights @ self.one_by_one(x.expand(k, -1), torch.ones_like(chosen[0]), chosen[0]), None
        order = chosen.flatten().argsort(stable=True)  # (row, choice) pairs, sorted by expert
        member = chosen.flatten()[order, None] == torch.arange(len(b2), device=x.device)  # (N * k, E)
        counts = member.sum(0)
        if x.is_cuda:  # index_copy_'s backward only reads rows; index_select's adds them by atomics, in any order
            place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
            rows = x.new_empty(len(order), x.size(1)).index_copy_(0, place, x.repeat_interleave(k, dim=0))
        else:
            rows = x.index_select(0, order // k)
        # On CPUs grouped_mm is faster for few rows, the loop for many. torch.compile takes only bf16 there.
        small = (x.device.type == 'cpu' and x.dtype == torch.float32 and len(rows) * b1.size(1) <= 2 ** 20
                 and not torch.compiler.is_compiling())
        if ((small or x.is_cuda and x.dtype == torch.bfloat16) and self.gate_up_lora is None
                and not isinstance(w1, MXFP4) and w1.size(2) % 8 == w2.size(2) % 8 == 0):
            y = grouped_linear(swiglu(grouped_linear(rows, w1, b1, member), self.limit), w2, b2, member)
        else:
            y = self.one_by_one(rows, counts)
        y = torch.empty_like(y).index_copy_(0, order, y).unflatten(0, (-1, k))  # (N, k, D)
        return (y * router_weights[..., None]).sum(1), counts

    @torch._disable_dynamo  # the number of rows is data; torch.compiler.disable is the same, and imports for a second
    def one_by_one(self, x, counts, experts=None):
        """Groups of counts rows of x (M, D) through these experts, or through all -> (M, D)."""
        layers = ((self.gate_up_weight, self.gate_up_bias, self.gate_up_lora),
                  (self.down_weight, self.down_bias, self.down_lora))
        if experts is None:  # unbind has a much faster backward than indexing
            layers = [(w if isinstance(w, MXFP4) else w.unbind(), b.unbind(), lora) for w, b, lora in layers]
            experts = torch.arange(len(counts))

        def linear(x, e, w, b, lora):
            y = F.linear(x, w[e].to(x.dtype), b[e].to(x.dtype))
            return y if lora is None else y + lora(x, e)

        outputs = []
        for e, rows in zip(experts.tolist(), x.split(counts.tolist())):
            n = len(rows)
            if n > 32 and x.dtype != torch.float32 and not x.is_cuda:
                rows = F.pad(rows, (0, 0, 0, -n % 256))  # CPUs compile a 16-bit kernel for each number of rows, in 3 ms
            if n > 0:
                outputs.append(linear(swiglu(linear(rows, e, *layers[0]), self.limit), e, *layers[1])[:n])
        return torch.cat(outputs)


class MoE(nn.Module):
    """A router sends each token to its k best experts. A softmax over those k weights their outputs."""

    def __init__(self, config):
        super().__init__()
        self.router = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)
        self.k = config.num_experts_per_tok

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and for GPT.balance_loss each expert's mean probability and rows, both (E,)."""
        rows = x.flatten(0, 1)
        logits = self.router(rows.float())
        best, chosen = logits.topk(self.k, dim=-1)
        y, counts = self.experts(rows, chosen, best.softmax(-1).to(x.dtype))
        return y.view_as(x), (logits.softmax(-1).mean(0), counts) if self.training else None


class Block(nn.Module):
    """One layer: attention, then the experts. Each reads the normed residual stream (B, T, D) and adds to it."""

    def __init__(self, config, layer_type):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_type)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), routing


class LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of x @ weight.T, in nats. Forward computes logits and gradient chunk by chunk, so all
    (N, V) logits never exist at once. x (N, D), weight (V, D), targets (N,) with -1 ignored -> fp32 scalar."""

    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        w, loss, dx = weight.to(x.dtype), x.new_zeros((), dtype=torch.float32), []
        dw = torch.zeros_like(weight, dtype=torch.float32) if needs_grad and weight.requires_grad else None
        # 2^24 logits in fp32 are 64 MB; GPUs are faster with more, and with a multiple of 64 rows
        chunk = max(64, 2 ** 27 // len(w) // 64 * 64) if x.is_cuda else max(1, 2 ** 24 // len(w))
        for xc, tc in zip(x.split(chunk), targets.split(chunk)):
            logits = (xc @ w.T).float()
            valid, tc = (tc >= 0)[:, None], tc.clamp(min=0)[:, None]
            logits -= logits.amax(-1, keepdim=True)
            target_logit = logits.gather(1, tc)
            total = logits.exp_().sum(-1, keepdim=True)
            loss = loss + torch.where(valid, total.log() - target_logit, 0).sum()  # with +=, torch 2.11 compiles zeros
            if needs_grad:  # d loss / d logits = softmax - one_hot. Rounded first: compiled code keeps no fp32 logits
                grad = logits.mul_(valid / total).to(x.dtype)
                grad.scatter_(1, tc, ((target_logit.exp() / total - 1) * valid).to(x.dtype))
                dx.append(grad @ w)
                if dw is not None:
                    dw = dw.addmm_(grad.T, xc) if grad.dtype == dw.dtype else dw.add_(grad.T @ xc)
        if needs_grad:
            ctx.save_for_backward(torch.cat(dx), dw)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), None if dw is None else (dw * grad).to(ctx.dtype), None, None


# -----------------------------------------------------------------------------
# 3. the model

class GPT(nn.Module):
    """The language model. model(idx, targets) -> (logits, loss); model.generate(idx, max_new_tokens) continues idx."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: backward computes each block again instead of keeping it
        self.group = None  # torch.distributed: the processes that share a batch sum their expert counts
        self.source = None  # what from_pretrained loaded, and its overrides for adapter_config.json
        self.lora = None  # the arguments of add_lora
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, layer_type) for layer_type in config.layer_types),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        for name, p in self.named_parameters():
            if name.endswith(('bias', 'sinks')):
                nn.init.zeros_(p)
            elif 'norm' not in name:
                nn.init.normal_(p, std=config.initializer_range)
        self.reset_counters()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_counters(self, device=None):
        """Reset what training reports: the rows of each expert, and the load-balancing loss of the last batch."""
        shape = self.config.num_hidden_layers, self.config.num_local_experts
        load = torch.zeros(shape, dtype=torch.int64, device=device)
        self.register_buffer('expert_load', load, persistent=False)
        self.register_buffer('balance', torch.zeros((), device=device), persistent=False)

    def hidden_states(self, idx, caches=None):
        """idx (B, T) -> the final normed states (B, T, D), and in training mode the load-balancing loss. With a KVCache
        for each layer, the first call takes a whole prompt, and each later call takes the next token."""
        x, device = self.model.embed_tokens(idx), idx.device.type
        # Under autocast the embeddings take its dtype, and the layers compute in the dtype of their input. Autocast is
        # off inside: this is faster on CPUs, and it keeps router, norms and loss in fp32.
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        start = caches[0].position if caches else 0
        cos, sin = rope_tables(self.config, start + torch.arange(idx.size(1), device=idx.device), x.dtype)
        routing = []
        with torch.autocast(device, enabled=False):
            for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers)):
                if self.recompute and torch.is_grad_enabled():
                    x, layer_routing = checkpoint(layer, x, cos, sin, use_reentrant=False)
                else:
                    x, layer_routing = layer(x, cos, sin, cache)
                routing.append(layer_routing)
            return self.model.norm(x), self.balance_loss(routing) if self.training else None

    def balance_loss(self, routing):
        """The load-balancing loss of Switch Transformer, averaged over the layers: 1 when experts get equal loads. Adds
        the rows of each expert to expert_load."""
        probabilities, counts = (torch.stack(values) for values in zip(*routing))  # both (L, E)
        self.expert_load += counts
        if self.group is not None:
            torch.distributed.all_reduce(counts, group=self.group)
        balance = counts.size(1) * (probabilities * counts / counts.sum(1, keepdim=True)).sum(1).mean()
        self.balance.copy_(balance.detach())
        return balance

    def forward(self, idx, targets=None, return_logits=True, count=None):
        """idx, targets int64 (B, T), target -1 is ignored -> (logits, loss).

        Without targets: the logits of the last position (B, 1, V), and None. With targets: logits (B, T, V) and the
        mean cross-entropy in nats. With return_logits=False the logits are None and are never stored whole. Training
        mode adds router_aux_loss_coef times the load-balancing loss. count replaces the number of targets as divisor.
        """
        if idx.size(1) > (longest := self.config.max_position_embeddings):
            raise ValueError(f'{idx.size(1)} tokens exceed max_position_embeddings ({longest})')
        x, balance = self.hidden_states(idx)
        with torch.autocast(idx.device.type, enabled=False):
            if targets is None:
                return self.lm_head(x[:, -1:]), None
            targets, logits = targets.flatten(), None
            if return_logits:
                logits = self.lm_head(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1, reduction='sum')
            else:
                loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets, torch.is_grad_enabled())
            loss = loss / ((targets >= 0).sum().clamp(min=1) if count is None else count)
        if self.training and self.config.router_aux_loss_coef:
            loss = loss + self.config.router_aux_loss_coef * balance
        return logits, loss

    def next_logits(self, idx, caches):
        """The logits (B, V) of the token after idx (B, T), which continues what the caches hold."""
        return self.lm_head(self.hidden_states(idx, caches)[0][:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, vocab_size=None,
               context=None, compile=False):
        """Continue idx (B, T) token by token, yielding each (B,) as it is drawn. Raises ValueError.

        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the likeliest that together reach this
        probability, min_p those at least this fraction as likely as the likeliest. vocab_size keeps the first tokens
        only, where the model has more than its tokenizer. context limits how far back full attention looks. compile
        makes one graph of the step, which takes a minute the first time.
        """
        idx = idx[:, -context:] if context else idx
        (B, T), c, training = idx.shape, self.config, self.training
        for name, value, least, most in (
                ('temperature', temperature, 0, 1e9), ('top_k', top_k, 1, math.inf), ('top_p', top_p, 1e-9, 1),
                ('min_p', min_p, 0, 1), ('the length of the prompt', T, 1, math.inf),
                ('the length of the prompt plus max_new_tokens', T + max_new_tokens, 1, c.max_position_embeddings)):
            if value is not None and not least <= value <= most:
                raise ValueError(f'{name} is {value}; it must be between {least} and {most}')
        if not 0 <= idx.min() <= idx.max() < c.vocab_size:
            raise ValueError(f'the prompt has token ids outside of vocab_size ({c.vocab_size}); check the tokenizer')
        dtype, length = self.lm_head.weight.dtype, T + max_new_tokens
        if torch.is_autocast_enabled(idx.device.type):
            dtype = torch.get_autocast_dtype(idx.device.type)
        if compile:
            length = -(-length // 512) * 512  # another length is compiled anew
        length = min(length, context or length)
        caches = [KVCache(c, layer_type, B, length, dtype, idx.device) for layer_type in c.layer_types]
        for tensor in (tensor for cache in caches if compile for tensor in vars(cache).values()):
            torch._dynamo.mark_static_address(tensor, guard=False)  # CUDA graphs change no other inputs
        compiled = torch.compile(self.next_logits, mode='reduce-overhead' if idx.is_cuda else None)
        self.eval()
        try:
            for i in range(max_new_tokens):
                step = compiled if compile and i else self.next_logits  # i = 0: the prompt
                idx = draw(step(idx, caches)[:, :vocab_size].float(), temperature, top_k, top_p, min_p)
                yield idx.squeeze(1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, *options, **more):
        """Continue idx (B, T) -> (B, T + max_new_tokens), with the options of `stream`."""
        return torch.cat((idx, *(new[:, None] for new in self.stream(idx, max_new_tokens, *options, **more))), dim=1)

    def stored(self):
        """The parameters of a checkpoint by name. Packed experts appear as MXFP4. Adapters are not included."""
        packed = {name: module for name, module in self.named_modules() if isinstance(module, MXFP4)}
        return {name: p for name, p in self.named_parameters() if 'lora.' not in name} | packed

    def num_parameters(self, active=False):
        """All parameters, or those that one token uses."""
        sizes = {name: tensor.shape.numel() for name, tensor in self.stored().items()}
        experts = sum(size for name, size in sizes.items() if '.experts.' in name)
        unused = 1 - self.config.num_experts_per_tok / self.config.num_local_experts if active else 0
        return sum(sizes.values()) - round(experts * unused)

    def flops_per_token(self, T):
        """Training FLOPs of an average token: 6 for each active parameter outside the embedding, and attention's."""
        c = self.config
        active = self.num_parameters(active=True) - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
        windows = [min(T, c.sliding_window) if t == SLIDING else T for t in c.layer_types]
        keys = sum(w - w * (w - 1) / (2 * T) for w in windows)
        return 6 * active + 12 * c.num_attention_heads * c.head_dim * keys

    def configure_optimizers(self, learning_rate, muon_lr, betas, weight_decay, muon_interval=1):
        """[AdamW, Muon]. Muon moves the matrices of the layers every muon_interval steps, with momentum betas[0]. AdamW
        moves the rest, or everything if muon_lr is 0. Only matrices decay. The biases of the experts are 2-D too, so
        the name decides."""
        decay, rest, hidden = [], [], {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if muon_lr and not self.lora and p.dim() >= 2 and '.layers.' in name and name.endswith('weight'):
                hidden.setdefault((p.shape, 2 if 'gate_up' in name else 1), []).append(p)
            else:
                (decay if p.dim() >= 2 and not name.endswith('bias') else rest).append(p)
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
        if hidden:
            groups = [dict(params=params, pieces=pieces) for (_, pieces), params in hidden.items()]
            optimizers.append(Muon(groups, muon_lr, betas[0], weight_decay, muon_interval))
        return optimizers

    def adapted(self):
        """(module, the name of its matrix or stack, the name of its adapter) for all that add_lora adapts."""
        for layer in self.model.layers:
            for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
                yield getattr(layer.self_attn, name), 'weight', 'lora'
            yield layer.mlp.experts, 'gate_up_weight', 'gate_up_lora'
            yield layer.mlp.experts, 'down_weight', 'down_lora'

    def add_lora(self, rank, alpha):
        """Freeze the model and add trainable fp32 low-rank adapters to the matrices of attention and experts."""
        if self.lora or not 1 <= rank <= self.config.hidden_size or not 0 < alpha < math.inf:
            raise ValueError(f'lora_rank is {rank} and lora_alpha {alpha}; the rank must be 1 to hidden_size, alpha '
                             'above 0, and the model without adapters')
        self.requires_grad_(False)
        self.lora = dict(r=rank, lora_alpha=alpha)
        for module, weight, name in self.adapted():
            matrix = getattr(module, weight)
            lora = LoRA(matrix.shape, rank, alpha / rank, name == 'gate_up_lora')
            setattr(module, name, lora.to(self.lm_head.weight.device))
            self.recompute |= isinstance(matrix, MXFP4)  # or autograd stores all unpacked experts until backward

    @torch.no_grad()
    def merge_lora(self):
        """Add each adapter to its matrix and remove it. Raises ValueError for MXFP4."""
        if any(isinstance(module, MXFP4) for module in self.modules()):
            raise ValueError("MXFP4 experts cannot hold merged adapters; load without experts='mxfp4'")
        for module, weight, name in self.adapted():
            lora, matrices = getattr(module, name), getattr(module, weight)
            for e, matrix in enumerate(matrices.view(-1, *matrices.shape[-2:])):
                matrix.add_(lora(torch.eye(matrix.size(1), device=matrix.device), e).mT)
            setattr(module, name, None)
        self.source = self.lora = None
        self.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device='cpu', experts=None, **overrides):
        """Load a folder or a Hugging Face hub id: Hugging Face's layout, OpenAI's original/, or adapters.

        experts='mxfp4' keeps the matrices of the experts at four bits a value; they do not train. overrides replace
        fields of GPTConfig. Raises ValueError, which names the tensors that do not fit.
        """
        folder = find_checkpoint(path)
        if (folder / 'adapter_config.json').is_file():
            return load_adapter(cls, folder, dtype, device, experts, overrides)
        if 'dropout' in overrides:
            overrides.setdefault('attention_dropout', None)
        config = replace(read_config(folder), **overrides)
        if dtype == torch.float16 and config.hidden_size == 2880:
            raise ValueError("gpt-oss's activations exceed the range of float16; use bfloat16 or float32")
        with torch.device('meta'):
            model = cls(config)
        missing, wrong = {name: tuple(p.shape) for name, p in model.named_parameters()}, []
        for name, tensor in read_tensors(folder, config):
            if (expected := missing.pop(name, 'no such tensor')) != tuple(tensor.shape):
                wrong.append(f'{name} is {tuple(tensor.shape)}, expected {expected}')
                continue
            module, leaf = model.get_submodule(name.rpartition('.')[0]), name.rpartition('.')[2]
            if experts and name.endswith(('gate_up_weight', 'down_weight')):
                delattr(module, leaf)
                setattr(module, leaf, (tensor if isinstance(tensor, MXFP4) else MXFP4.pack(tensor, experts)).to(device))
            else:
                tensor = tensor.to(device).dense() if isinstance(tensor, MXFP4) else tensor
                tensor = tensor.to(device, dtype, copy=True)  # safetensors gives a view of the file
                setattr(module, leaf, nn.Parameter(tensor.contiguous()))
        wrong += [f'{name} is missing' for name in missing]
        if wrong:
            raise ValueError(f'{folder} does not fit its config: {"; ".join(wrong[:10])} ({len(wrong)} in all)')
        model.tie_weights()
        model.reset_counters(device)
        model.source = str(path), dict(overrides=overrides) if overrides else {}
        return model

    def save_pretrained(self, path, dtype=None, experts=None, shard_size=5e9):
        """Write config.json and safetensors that transformers' GptOssForCausalLM loads. A model larger than shard_size
        bytes gets one file for each layer. dtype None keeps that of the parameters. experts='mxfp4' writes the matrices
        of the experts at four bits a value. The new files replace the folder's old ones after all are written."""
        if self.lora:
            raise ValueError('the model has adapters: merge_lora() first, or save_adapter() to save them alone')
        folder, dtype, stored, shards = Path(path), dtype or self.lm_head.weight.dtype, self.stored(), {}
        large = self.num_parameters() * dtype.itemsize > shard_size
        for name in stored:
            shards.setdefault(name.split('.')[2] if large and '.layers.' in name else 'rest', []).append(name)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as new:
            write_config(self.config, Path(new), dtype, experts)
            index = dict(metadata=dict(total_size=0), weight_map={})
            for i, names in enumerate(shards.values(), 1):
                file = f'model-{i:05}-of-{len(shards):05}.safetensors' if large else 'model.safetensors'
                tensors = {}
                for name in names:
                    tensors |= published(name, stored[name], dtype, experts)
                save_file(tensors, Path(new, file))
                index['metadata']['total_size'] += sum(tensor.nbytes for tensor in tensors.values())
                index['weight_map'] |= dict.fromkeys(tensors, file)
            if large:
                write_json(Path(new, 'model.safetensors.index.json'), index)
            for old in (*folder.glob('model*.safetensors*'), *folder.glob('adapter_*')):
                old.unlink()
            for file in Path(new).iterdir():
                file.replace(folder / file.name)

    def save_adapter(self, path):
        """Write adapter_model.safetensors and adapter_config.json, which names the base model, in PEFT's format."""
        folder = Path(path)
        if not self.lora or not self.source or (folder / 'config.json').exists():
            raise ValueError(f'{folder} holds a whole model, or there are no adapters of a saved model to write: '
                             'from_pretrained(folder), then add_lora()')
        folder.mkdir(parents=True, exist_ok=True)
        base, overrides = self.source
        base = str(Path(base).resolve() if os.path.exists(base) else base)  # a hub id stays as it is
        write_json(folder / 'adapter_config.json', dict(
            peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, inference_mode=True, **self.lora,
            target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
            target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'], **overrides))
        save_file({peft_name(name): p.detach() for name, p in self.named_parameters() if 'lora.' in name},
                  folder / 'adapter_model.safetensors')


def draw(logits, temperature, top_k, top_p, min_p):
    """Draw a token for each row of logits (B, V), fp32 -> (B, 1). See GPT.stream."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if min_p:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    if top_p is not None and top_p < 1:
        p, token = logits.softmax(-1).sort(dim=-1, descending=True)
        dropped = p.cumsum(-1) - p >= top_p  # the tokens before this one already reach top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, token, dropped), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)


# -----------------------------------------------------------------------------
# 4. optimizers

class Muon(torch.optim.Optimizer):
    """Muon: orthogonalized momentum (kellerjordan.github.io/posts/muon). torch.optim.Muon takes 2-D parameters only.
    Here the parameters of a group have one shape (..., m, n), and each matrix has `pieces` parts (gate and up). They
    move every `interval` steps, `interval` times as far."""

    def __init__(self, groups, lr, momentum, weight_decay, interval):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, interval=interval, pieces=1))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            chunk = max(1, 2 ** 28 // params[0].numel()) if params else 1  # bounds the memory of the update
            for i in range(0, len(params), chunk):
                self.move(params[i:i + chunk], **{key: group[key] for key in self.defaults})

    def move(self, params, lr, momentum, weight_decay, interval, pieces):
        """Update parameters of one shape. Processes that share matrices each get some of them whole."""
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
            if interval > 1:
                self.state[p]['step'] = self.state[p].get('step', torch.zeros(())) + 1
        first, grads, buffers = params[0], [p.grad for p in params], [self.state[p]['momentum'] for p in params]
        dim = 0  # how FSDP2 divides matrices (M, m, n): into whole ones, rows or columns
        if hasattr(first, 'to_local'):  # a DTensor
            dim, group = max(0, first.placements[-1].dim + 3 - first.dim()), first.device_mesh.get_group(-1)
            params, grads, buffers = ([t.to_local() for t in tensors] for tensors in (params, grads, buffers))
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        if interval > 1 and self.state[first]['step'] % interval:
            return
        update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's momentum
        matrices, dtype = update.flatten(0, -3), torch.bfloat16 if update.is_cuda else torch.float32
        shape = matrices.shape
        if dim > 0:
            matrices = exchange(matrices.to(dtype), dim, 0, first.size(dim - 3), group)
        scale = interval * lr * max(1, matrices.size(1) / pieces / matrices.size(2)) ** 0.5
        moved = orthogonalize(matrices.unflatten(1, (pieces, -1)).flatten(0, 1), dtype).reshape(matrices.shape)
        if dim > 0:
            moved = exchange(moved, 0, dim, shape[0], group).narrow(dim, 0, shape[dim]).to(update.dtype)
        torch._foreach_mul_(params, 1 - interval * lr * weight_decay)
        torch._foreach_sub_(params, moved.mul_(scale).view_as(update).unbind())


def exchange(x, old, new, size, group):
    """Divide a tensor, of which each process of a group has a part x, along dimension `new` instead of `old`, where the
    whole has `size`. What does not divide evenly is padded with zeros, along `new` in the result too."""
    n = group.size()
    for dim, missing in ((old, -(-size // n) - x.size(old)), (new, -x.size(new) % n)):
        x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
    sent = torch.stack(x.chunk(n, new))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), old).narrow(old, 0, size)


def orthogonalize(x, dtype):
    """Roughly the nearest orthogonal matrices to x (batch, m, n), by three Newton-Schulz iterations with the
    coefficients of Polar Express (arXiv:2505.16932). Singular values end between 0.18 and 1.9, which suffices."""
    tall = x.size(1) > x.size(2)
    y = (x.mT if tall else x).to(dtype)
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in ((8.1247, -22.2349, 15.6695), (4.0265, -2.7778, 0.4935), (3.8713, -2.7411, 0.4998)):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


# -----------------------------------------------------------------------------
# 5. checkpoints

class LoRA(nn.Module):
    """A low-rank adapter, scale * B A, of a matrix (out, in) or of each of a stack (E, out, in). arXiv:2106.09685.

    The tensors are PEFT's: lora_A.weight (E * r, in), expert by expert; lora_B.weight (out, r * E), where the expert
    runs fastest. interleaved: the rows of B are a gate and an up in turn, as in the published gate_up_proj.
    """

    def __init__(self, shape, rank, scale, interleaved):
        super().__init__()
        self.experts, rows, columns = (1, *shape)[-3:]
        self.lora_A = Linear(columns, self.experts * rank, bias=False)
        self.lora_B = Linear(self.experts * rank, rows, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.interleaved = scale, interleaved

    def forward(self, x, expert=0):
        a = self.lora_A.weight.unflatten(0, (self.experts, -1))[expert]
        b = self.lora_B.weight.unflatten(1, (-1, self.experts))[..., expert]
        b = torch.cat((b[0::2], b[1::2])) if self.interleaved else b
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scale


def peft_name(name):  # PEFT wraps the experts twice: for gate_up_proj inside, in base_layer, and for down_proj outside
    name = name.replace('gate_up_lora.', 'base_layer.').replace('down_lora.', '').replace('.lora.', '.')
    return f'base_model.model.{name}'


def load_adapter(cls, folder, dtype, device, experts, overrides):
    """Load the base model that adapter_config.json names, then its adapters. Those that the file lacks stay zero."""
    raw, usual = read_json(folder / 'adapter_config.json'), dict(peft_type='LORA', bias='none', init_lora_weights=True)
    harmless = ('auto_mapping base_model_name_or_path exclude_modules inference_mode layers_to_transform lora_alpha '
                'lora_dropout megatron_core overrides peft_version qalora_group_size r revision target_modules '
                'target_parameters task_type')
    try:
        for key in raw.keys() - harmless.split():
            if raw[key] not in (usual.get(key), 'gaussian', None, False, [], {}):
                raise ValueError(f'{key} is {raw[key]!r:.99}, an option of PEFT that is not supported')
        overrides = raw.get('overrides', {}) | overrides
        model = cls.from_pretrained(raw['base_model_name_or_path'], dtype, device, experts, **overrides)
        model.add_lora(raw['r'], raw['lora_alpha'])
        ours = {peft_name(name): name for name, _ in model.named_parameters() if 'lora.' in name}
        if not any('down_proj' in name for name in raw.get('target_parameters') or ()):  # then PEFT wraps once
            ours |= {theirs.replace('base_layer.', ''): name for theirs, name in ours.items() if 'base_layer' in theirs}
        with open_file(folder / 'adapter_model.safetensors') as file:
            found = {ours[name]: file.get_tensor(name) for name in file.keys()}
        a, b = ({name.replace(part, '') for name in found if part in name} for part in ('lora_A', 'lora_B'))
        if a != b or not found:
            raise ValueError('its file lacks lora_A or lora_B of an adapter')
        model.load_state_dict(found, strict=False)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f'{folder} cannot be loaded ({type(error).__name__}: {error})') from error
    return model


def find_checkpoint(path):
    """The folder with (adapter_)config.json: path, its original/, or a download by hub id. Raises ValueError."""
    for file in (Path(path, 'adapter_config.json'), Path(path, 'config.json'), Path(path, 'original', 'config.json')):
        if os.path.isfile(file):  # Path.is_file raises OSError for names that are too long
            return file.parent
    if os.path.exists(path) or str(path).count('/') != 1:
        old = '; the version that wrote its adapter.json can --export it' if Path(path, 'adapter.json').exists() else ''
        raise ValueError(f'{str(path):.200} has no config.json, and it is no hub id such as openai/gpt-oss-20b{old}')
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(str(path), allow_patterns=['*.json', 'model*', 'adapter*', 'tokenizer.tiktoken']))
    except Exception as error:  # the hub's client raises many types
        raise ValueError(f'{path} is no folder, and the download failed ({type(error).__name__})') from error


def read_json(path):
    """The object in a JSON file. Raises ValueError with the path."""
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        if isinstance(found, dict):
            return found
        raise ValueError(f'it holds a {type(found).__name__}')
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a JSON object ({type(error).__name__}: {error})') from error


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')


def read_config(folder):
    """GPTConfig from the config.json of Hugging Face (rope nested) or OpenAI (flat, other names). Raises ValueError."""
    found = read_json(folder / 'config.json')
    raw = {key: value for key, value in found.items() if value is not None}
    openai = dict(num_experts='num_local_experts', experts_per_token='num_experts_per_tok',
                  initial_context_length='rope_original_max_position_embeddings', rope_scaling_factor='rope_factor',
                  rope_ntk_alpha='rope_beta_slow', rope_ntk_beta='rope_beta_fast')
    flat = {openai.get(key, key): value for key, value in raw.items()} | raw
    try:
        if rope := raw.get('rope_parameters') or raw.get('rope_scaling'):
            # transformers' defaults for missing keys; gpt-oss's files have all keys
            context = flat.get('max_position_embeddings', 131072)
            flat |= dict(rope_truncate=True, rope_original_max_position_embeddings=context)
            flat |= {f'rope_{key.removeprefix("rope_")}': value for key, value in rope.items() if value is not None}
            kind = rope.get('rope_type', rope.get('type', 'default'))
            if kind not in ('yarn', 'default') or rope.get('attention_factor') or rope.get('mscale'):
                raise ValueError(f'the rope is {rope}; this model has default, and yarn with its usual concentration')
            if kind == 'default':
                flat['rope_factor'] = 1.0
        for key, only in (('swiglu_alpha', 1.702), ('attention_bias', True), ('hidden_act', 'silu')):
            if raw.get(key, only) != only:
                raise ValueError(f'{key} is {raw[key]}; gpt-oss has {only}')
        if not raw.get('output_router_logits'):  # then published coefficients, such as gpt-oss's 0.9, are not in use
            flat['router_aux_loss_coef'] = raw.get('training_router_aux_loss_coef', 0.0)
        if found.get('sliding_window', 0) is None:  # null: no window
            flat['layer_types'] = [FULL] * flat['num_hidden_layers']
        return GPTConfig(**{field.name: flat[field.name] for field in fields(GPTConfig) if field.name in flat})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f'{folder / "config.json"}: {str(error):.300}') from error


def write_config(config, folder, dtype, experts):
    raw = asdict(config)
    rope = {key.removeprefix('rope_'): raw.pop(key) for key in list(raw) if key.startswith('rope_')}
    # transformers before 5.16 cannot generate with output_router_logits; Ollama reads two of OpenAI's names
    raw |= dict(hidden_act='silu', attention_bias=True, output_router_logits=False, transformers_version='4.55.0',
                training_router_aux_loss_coef=config.router_aux_loss_coef, rope_theta=rope.pop('theta'),
                rope_scaling=dict(rope_type='yarn', **rope), experts_per_token=config.num_experts_per_tok,
                initial_context_length=config.rope_original_max_position_embeddings,
                torch_dtype=str(dtype).removeprefix('torch.'), model_type='gpt_oss',
                architectures=['GptOssForCausalLM'])
    if experts:
        skipped = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']
        raw['quantization_config'] = dict(quant_method='mxfp4', modules_to_not_convert=skipped)
    write_json(folder / 'config.json', raw)


def save_file(tensors, path):
    """Write {name: tensor} to a safetensors file, which gets the permissions of the JSON file beside it."""
    try:
        from safetensors import SafetensorError, torch as safetensors
    except ImportError:
        raise ImportError('checkpoints are safetensors files: pip install safetensors') from None
    try:
        safetensors.save_file(tensors, path, {'format': 'pt'})
    except SafetensorError as error:  # a full disk
        raise OSError(f'cannot write {path}: {error}') from error
    for neighbour in path.parent.glob('*.json'):
        shutil.copymode(neighbour, path)


def open_file(path):
    """An open safetensors file. The package checks header and size. Raises ValueError with the path."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, 'pt')
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{path} is incomplete or not a safetensors file: {error}') from error


# Parts of names: OpenAI's, then the published ones of the experts -> ours. The order matters.
RENAMES = (('unembedding.', 'lm_head.'), ('embedding.', 'model.embed_tokens.'), ('block.', 'model.layers.'),
           ('attn.norm.scale', 'input_layernorm.weight'), ('mlp.norm.scale', 'post_attention_layernorm.weight'),
           ('norm.scale', 'model.norm.weight'), ('.attn.out.', '.self_attn.o_proj.'), ('.attn.', '.self_attn.'),
           ('mlp.gate.', 'mlp.router.'), ('mlp.mlp1_', 'mlp.experts.gate_up_'), ('mlp.mlp2_', 'mlp.experts.down_'),
           ('_proj_bias', '_bias'), ('experts.gate_up_proj', 'experts.gate_up_weight'),
           ('experts.down_proj', 'experts.down_weight'))


def read_tensors(folder, config):
    """Yield (our name, tensor or MXFP4 in our layout) for each tensor in the folder's files. Raises ValueError.

    The matrices of the experts are (E, out, in) in OpenAI's files and in MXFP4, (E, in, out) in Hugging Face's other
    files. down_proj is square in gpt-oss, so only the name and the format tell, never the shape.
    """
    where = {}
    for path in sorted(folder.glob('model*.safetensors')):
        with open_file(path) as file:
            where |= dict.fromkeys(file.keys(), path)

    def get(name):
        if name not in where:
            raise ValueError(f'{folder} has no {name}')
        with open_file(where[name]) as file:  # for each tensor, because an open file keeps what was read in memory
            return file.get_tensor(name)

    for theirs in where:
        if theirs.endswith('scales'):
            continue  # read with their blocks
        name, tensor, halves = theirs, get(theirs), lambda x: x
        for old, new in RENAMES:
            name = name.replace(old, new)
        if '.gate_up_' in name:  # theirs are interleaved, ours are all gates, then all ups
            halves = lambda x: torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)
        if theirs.endswith('blocks'):
            scales = get(theirs.removesuffix('blocks') + 'scales')
            yield name[:-len('_blocks')], MXFP4(halves(tensor), halves(scales))
        elif '.qkv.' in name:
            queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            for part, start, size in (('q', 0, queries), ('k', queries, keys), ('v', queries + keys, len(tensor))):
                yield name.replace('qkv', f'{part}_proj'), tensor[start:start + size]
        else:
            yield name, halves(tensor.mT if theirs.endswith(('gate_up_proj', 'down_proj')) else tensor)


def published(name, tensor, dtype, experts):
    """{name: tensor} in Hugging Face's layout: the inverse of read_tensors."""
    if '.experts.' not in name:
        return {name: tensor.detach().to(dtype)}
    in_turn = lambda x: torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2) if '.gate_up_' in name else x
    theirs = name.replace('_weight', '_proj').replace('_bias', '_proj_bias')
    if experts and not name.endswith('bias'):
        packed = tensor if isinstance(tensor, MXFP4) else MXFP4.pack(tensor.detach(), experts)
        return {f'{theirs}_{part}': in_turn(getattr(packed, part)).contiguous() for part in ('blocks', 'scales')}
    tensor = in_turn((tensor.dense() if isinstance(tensor, MXFP4) else tensor.detach()).to(dtype))
    return {theirs: (tensor if name.endswith('bias') else tensor.mT).contiguous()}


class MXFP4(nn.Module):
    """A frozen stack of matrices (E, out, in) at four bits a value. [e] is one of them in bf16, exactly.

    blocks uint8 (E, out, in / 32, 16): two values a byte, the even one in the low nibble.
    scales uint8 (E, out, in / 32): exponents of two, biased by 127, of 32 values each. OCP Microscaling Formats v1.0.
    """

    def __init__(self, blocks, scales):
        super().__init__()
        if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape or blocks.size(-1) != 16:
            raise ValueError(f'blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} are not MXFP4')
        self.register_buffer('blocks', blocks)
        self.register_buffer('scales', scales)
        self.shape = torch.Size((*blocks.shape[:2], blocks.size(2) * 32))

    def __getitem__(self, e):
        # A code is sign, two bits of exponent, one of mantissa. At bits 15, 10 to 11 and 9 these are an fp16 that is
        # 2^14 times too small. Such arithmetic takes a third of the time of a table in compiled decoding.
        shifts = torch.arange(12, 7, -4, dtype=torch.int16, device=self.blocks.device)  # for low and high nibble
        bits = (self.blocks[e].short()[..., None] << shifts >> 3 & -0x7200).flatten(-2)  # the mask is 0x8e00
        # the exponent's bits of an fp32; one more keeps 2^-127 from being subnormal, and leaves 2^13
        scales = (self.scales[e].int() + 1 << 23).view(torch.float32).bfloat16()
        return (bits.view(torch.float16).bfloat16() * 2 ** 13 * scales[..., None]).flatten(-2)

    def dense(self):
        """The whole stack in bf16."""
        return torch.stack([self[e] for e in range(len(self.blocks))])

    @classmethod
    def pack(cls, stack, experts='mxfp4'):
        """Quantize a stack (E, out, in) to the nearest values, half-way to the even code. The scale brings the largest
        of 32 values to between 3.625 and 7.25: up to there, clamping it to 6 costs less than a coarser grid for the
        others. Raises ValueError."""
        if experts != 'mxfp4' or stack.size(-1) % 32:
            raise ValueError(f'experts={experts!r}, rows of {stack.size(-1)}; it must be mxfp4, with a multiple of 32')
        if not stack.isfinite().all():
            raise ValueError('there are weights that are not finite, which MXFP4 cannot hold')
        limits = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], device=stack.device)
        # bucketize puts a tie into the lower bin; every second one belongs into the upper, whose code is even
        limits[1::2] = limits[1::2].nextafter(limits.new_zeros(()))
        packed = []
        for matrix in stack:  # one at a time, because this takes several times its memory
            x = matrix.float().contiguous().unflatten(-1, (-1, 32))
            mantissa, exponent = x.abs().amax(-1, keepdim=True).frexp()
            exponent = (exponent - 3 + (mantissa > 7.25 / 8)).clamp(-127, 127)
            codes = torch.bucketize(torch.ldexp(x.abs(), -exponent), limits) | x.signbit().int() << 3
            packed.append(((codes[..., 0::2] | codes[..., 1::2] << 4).byte(), (exponent + 127)[..., 0].byte()))
        return cls(*map(torch.stack, zip(*packed)))
