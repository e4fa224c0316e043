"""
GPT-OSS, the whole model in one file. Part one defines the model. With FAST = False it computes everything:
1. the shape     GPTConfig, with the names of the published config.json, which nests those of RoPE
2. the layers    norm, RoPE with YaRN, attention with sinks, mixture of experts, in the order data meets them
3. the model     GPT: forward pass, loss, generation
Part two makes it practical:
4. fast ways     attention, experts and loss by fast kernels, each equal to its definition in part one
5. optimizers    Muon for the matrices of the layers, AdamW for everything else
6. checkpoints   Hugging Face's, whose names and layout the parameters have, in full precision or MXFP4
7. adapters      LoRA, in PEFT's format

Shapes: B batch, T tokens, N = B * T rows, D hidden_size, H query heads, KV key and value heads, hd head_dim,
S keys, E experts, k experts per token, I intermediate_size, L layers, V vocab_size.

References: OpenAI's gpt_oss/torch/model.py (github.com/openai/gpt-oss) and model card (arXiv:2508.10925);
transformers' models/gpt_oss; YaRN (arXiv:2309.00071); attention sinks (arXiv:2309.17453); Switch Transformer
(arXiv:2101.03961).
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

FAST = True  # use the kernels of part two; False: compute by the definitions of part one

# -----------------------------------------------------------------------------
# 1. the shape

SLIDING = 'sliding_attention'
FULL = 'full_attention'


def require(good, message):
    if not good:
        raise ValueError(message)


@dataclass
class GPTConfig:
    vocab_size: int = 201088  # rows of the embedding; 201088 is o200k_harmony
    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 256  # width of one expert
    num_hidden_layers: int = 6  # each layer is attention, then a mixture of experts
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # key and value heads, each shared by a group of query heads
    head_dim: int = 64  # width of a head; heads * head_dim need not equal hidden_size
    num_local_experts: int = 8  # experts in a layer; 1, with num_experts_per_tok 1, is a dense model
    num_experts_per_tok: int = 2  # experts that process each token
    sliding_window: int = 128  # keys that a sliding layer sees, including the token itself
    layer_types: list[str] | None = None  # sliding_attention, full_attention; None alternates, sliding first
    max_position_embeddings: int = 131072  # the longest context, in tokens
    rms_norm_eps: float = 1e-5  # added to the mean square
    swiglu_limit: float = 7.0  # clamps the gate from above and the up projection on both sides
    rope_theta: float = 150000.0  # base of RoPE's frequencies
    rope_factor: float = 32.0  # YaRN: how many times longer the context becomes; 1 is plain RoPE
    rope_beta_fast: float = 32.0  # YaRN: pairs that turn more often than this in the original context stay
    rope_beta_slow: float = 1.0  # YaRN: pairs that turn less often turn rope_factor times slower
    rope_original_max_position_embeddings: int = 4096  # YaRN: the context before stretching
    rope_truncate: bool = False  # YaRN: round the ends of the ramp to whole pairs; gpt-oss does not
    initializer_range: float = 0.02  # standard deviation of the initial weights
    router_aux_loss_coef: float = 0.0  # weight of the load-balancing loss in training mode; Switch has 0.01
    tie_word_embeddings: bool = False  # one matrix for the embedding and the head
    dropout: float = 0.0  # after attention, after the experts, and on the attention weights
    attention_dropout: float | None = None  # on the attention weights; None: the same as dropout

    def __post_init__(self):
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        self.check()
        if self.layer_types is None:
            self.layer_types = [FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers)]

    def check(self):
        """Raise ValueError for a shape that cannot be. Part two replaces this by check_shape."""


# -----------------------------------------------------------------------------
# 2. the layers

class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input: fp32 parameters serve bf16 activations."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32. The scale is applied before the result returns to the dtype of the input."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


def rope_tables(config, positions, dtype=torch.float32):
    """cos and sin for `rotate`, each (T, 1, hd), at positions (T,). The first half of sin is negated.

    YaRN: pairs that turn often within the original context keep their frequency. Slow pairs turn rope_factor
    times slower, so that longer contexts bring no new angles. A linear ramp connects the two. cos and sin
    are multiplied by a concentration, because long contexts need sharper attention."""
    half = config.head_dim // 2
    theta = config.rope_theta
    original = config.rope_original_max_position_embeddings

    def pair_with(turns):  # the (fractional) pair that turns this many times in the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = pair_with(config.rope_beta_fast)
    high = pair_with(config.rope_beta_slow)
    if config.rope_truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, config.head_dim - 1)  # as in transformers, though the last pair is half - 1
    pair = torch.arange(half, device=positions.device)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: stays, 1: is slowed
    frequency = theta ** (-pair / half) * (1 - slowed + slowed / config.rope_factor)
    angle = positions[:, None, None].float() * frequency
    concentration = 0.1 * math.log(config.rope_factor) + 1  # from YaRN's paper
    cos = angle.cos() * concentration
    sin = angle.sin() * concentration
    # concatenated, so that the compiler stores both; otherwise it computes cos again in every layer
    return torch.cat((cos, cos, -sin, sin), dim=-1).to(dtype).chunk(2, dim=-1)


def rotate(x, cos, sin):
    """RoPE: turn the pairs (i, i + hd / 2) of x (B, T, heads, hd) by angles that grow with the position."""
    swapped = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)  # x * cos + swapped * sin


def visible_keys(T, S, window=None, device=None):
    """A mask (T, S): the last T of S tokens see themselves and those before, at most `window` keys."""
    position = torch.arange(S, device=device)
    distance = position[S - T:, None] - position
    return (distance >= 0) & (distance < (window or S))


def attention(q, k, v, sinks, visible, dropout=0.0):
    """Attention with sinks. q (B, T, H, hd), k, v (B, S, KV, hd), sinks (H,), visible ([T,] S) -> like q.

    A sink is a learned logit of each head. The softmax includes it as one more column, which is then
    dropped: the weights of the keys sum to less than 1, so that a head can attend to almost nothing."""
    B, T, H, hd = q.shape
    S, KV = k.size(1), k.size(2)
    q = q.transpose(1, 2).reshape(B, KV, -1, hd)  # stacks the H / KV query heads that share a key head
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    logits = (q @ k.mT * hd ** -0.5).view(B, H, T, S)
    logits = logits.masked_fill(~visible, -math.inf)
    sinks = sinks.to(logits.dtype)[:, None, None].expand(B, H, T, 1)
    weights = torch.cat((logits, sinks), dim=-1).softmax(-1)
    weights = F.dropout(weights[..., :-1], dropout)  # without the sink's column
    y = weights.reshape(B, KV, -1, S) @ v
    return y.view(B, H, T, hd).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with sinks. In sliding layers a token sees sliding_window keys."""

    def __init__(self, config, layer_type):
        super().__init__()
        D, hd = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(D, H * hd)
        self.k_proj = Linear(D, KV * hd)
        self.v_proj = Linear(D, KV * hd)
        self.o_proj = Linear(H * hd, D)
        self.sinks = nn.Parameter(torch.zeros(H))
        self.head_dim = hd
        self.window = config.sliding_window if layer_type == SLIDING else None
        self.dropout = config.attention_dropout

    def forward(self, x, cos, sin, cache=None):
        """x (B, T, D) -> (B, T, D). With a KVCache, the tokens of x follow those in it."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            k, v = cache.update(k, v)
        if cache is not None and T == 1:
            y = attention(q, k, v, self.sinks, cache.slots < cache.position)  # those in use
        elif FAST:
            y = fast_attention(q, k, v, self.sinks, self.window, dropout)
        else:
            visible = visible_keys(T, k.size(1), self.window, x.device)
            y = attention(q, k, v, self.sinks, visible, dropout)
        return self.o_proj(y.reshape(B, T, -1))


def swiglu(gate_up, limit):
    """gate * sigmoid(1.702 * gate) * (up + 1), both clamped. gate_up (..., 2I): gate 0, up 0, gate 1, ..."""
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    gate = F.hardtanh(gate, -math.inf, limit)  # a clamp whose backward is twice as fast on CPUs
    up = F.hardtanh(up, -limit, limit)
    # gate * sigmoid(a * gate) is silu(a * gate) / a; with a = 1.702 it is close to GELU
    return F.silu(1.702 * gate) * torch.add(1 / 1.702, up, alpha=1 / 1.702)  # ... * (up + 1) / 1.702


class Experts(nn.Module):
    """E SwiGLU experts. As in the published checkpoints, their matrices are (in, out), and the columns of
    gate_up_proj interleave gates and ups. A stack may also be an MXFP4, 4-bit weights, see chapter 6."""

    def __init__(self, config):
        super().__init__()
        E, D, I = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * I))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * I))
        self.down_proj = nn.Parameter(torch.empty(E, I, D))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.limit = config.swiglu_limit

    def forward(self, x, chosen, router_weights):
        """x (N, D) through the experts chosen (N, k), summed with router_weights (N, k) -> (N, D)."""
        if FAST:
            return fast_experts(self, x, chosen, router_weights)
        y = torch.zeros_like(x)
        for e in range(len(self.down_proj_bias)):  # E
            row, choice = torch.where(chosen == e)
            h = self.linear('gate_up_proj', x[row], e)
            h = self.linear('down_proj', swiglu(h, self.limit), e)
            y = y.index_add(0, row, h * router_weights[row, choice, None])
        return y

    def linear(self, name, x, e):
        """x (rows, in) through the matrix and the bias of expert e -> (rows, out)."""
        matrix = getattr(self, name)[e]
        bias = getattr(self, name + '_bias')[e]
        return torch.addmm(bias.to(x.dtype), x, matrix.to(x.dtype))  # bias + x @ matrix


class MoE(nn.Module):
    """A router picks k experts for each token. Their outputs are weighted by a softmax over the k logits."""

    def __init__(self, config):
        super().__init__()
        self.router = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)
        self.k = config.num_experts_per_tok

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and what GPT.balance_loss needs in training, or None."""
        rows = x.flatten(0, 1)
        logits = self.router(rows.float())  # (N, E), fp32
        best, chosen = logits.topk(self.k, dim=-1)
        y = self.experts(rows, chosen, best.softmax(-1).to(x.dtype)).view_as(x)
        if not self.training:
            return y, None
        probability = logits.softmax(-1).mean(0)  # (E,), which carries the gradient
        experts = torch.arange(logits.size(1), device=x.device)
        load = (chosen.flatten()[:, None] == experts).sum(0)  # (E,) tokens. bincount waits for the GPU
        return y, (probability, load)


class Block(nn.Module):
    """A layer: attention, then experts. Both read the normed residual stream (B, T, D) and add to it."""

    def __init__(self, config, layer_type):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_type)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, cache=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + self.dropout(y)
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y), routing


# -----------------------------------------------------------------------------
# 3. the model

class GPT(nn.Module):
    """The language model. model(idx, targets) -> (logits, loss). model.generate(idx, n) continues idx.

    Its state_dict has the names and the layout of the published checkpoints. Part two adds from_pretrained,
    save_pretrained, configure_optimizers, num_parameters, flops_per_token, add_lora, merge_lora and
    save_adapter."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: backward computes each layer again, to save memory
        self.base = None  # what from_pretrained loaded, for save_adapter
        self.lora = None  # rank and alpha of the adapters, if there are any
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
        """Reset what training reports: the tokens of each expert, and the last load-balancing loss."""
        shape = self.config.num_hidden_layers, self.config.num_local_experts
        load = torch.zeros(shape, dtype=torch.int64, device=device)
        self.register_buffer('expert_load', load, persistent=False)
        self.register_buffer('balance', torch.zeros((), device=device), persistent=False)

    def hidden_states(self, idx, caches=None, layers=None):
        """idx (B, T) -> the final normed states (B, T, D), and the routing of each layer for balance_loss.

        With a KVCache for each layer, idx follows the tokens in the caches. layers, such as compiled ones,
        replace self.model.layers."""
        x = self.model.embed_tokens(idx)
        device = idx.device.type
        # Under autocast, cast the embeddings once and turn it off: every Linear computes in the dtype of x,
        # while router, norms and loss ask for fp32. This is faster on CPUs.
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        positions = torch.arange(idx.size(1), device=idx.device)
        if caches:
            positions = positions + caches[0].position
        cos, sin = rope_tables(self.config, positions, x.dtype)
        routing = []
        with torch.autocast(device, enabled=False):
            for i, layer in enumerate(layers or self.model.layers):
                if self.recompute and torch.is_grad_enabled():
                    x, layer_routing = checkpoint(layer, x, cos, sin, use_reentrant=False)
                else:
                    x, layer_routing = layer(x, cos, sin, caches[i] if caches else None)
                routing.append(layer_routing)
            return self.model.norm(x), routing

    def balance_loss(self, routing):
        """Switch's E * sum(token share * probability), mean over layers, 1 at equal loads. Sets counters."""
        probability = torch.stack([layer[0] for layer in routing])  # both (L, E)
        load = torch.stack([layer[1] for layer in routing])
        self.expert_load += load
        share = load / load.sum(1, keepdim=True)
        balance = (probability * share).sum(1).mean() * self.config.num_local_experts
        self.balance.copy_(balance.detach())
        return balance

    def forward(self, idx, targets=None, return_logits=True, count=None):
        """idx, targets int64 (B, T), target -1 is ignored -> (logits, loss).

        Without targets: the logits of the last position (B, 1, V), and None. With targets: logits (B, T, V),
        None if not return_logits, and the cross-entropy in nats, summed and divided by count: the number of
        targets here, or in all batches of a step. Training mode adds router_aux_loss_coef * balance_loss."""
        T = idx.size(1)
        longest = self.config.max_position_embeddings
        require(T <= longest, f'{T} tokens exceed max_position_embeddings ({longest})')
        x, routing = self.hidden_states(idx)
        with torch.autocast(idx.device.type, enabled=False):
            if targets is None:
                return self.lm_head(x[:, -1:]), None
            logits = None
            if FAST and not return_logits:
                x, targets = x.flatten(0, 1), targets.flatten()
                loss = LinearCrossEntropy.apply(x, self.lm_head.weight, targets, torch.is_grad_enabled())
            else:
                logits = self.lm_head(x)
                flat = logits.flatten(0, 1).float()
                loss = F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction='sum')
            if count is None:
                count = (targets >= 0).sum().clamp(min=1)
            loss = loss / count
            if self.training:
                balance = self.balance_loss(routing)
                if self.config.router_aux_loss_coef:
                    loss = loss + self.config.router_aux_loss_coef * balance
        return (logits if return_logits else None), loss

    def next_logits(self, idx, caches, layers=None):
        """The logits (B, V) of the token after idx, which follows the tokens in the caches."""
        x, _ = self.hidden_states(idx, caches, layers)
        return self.lm_head(x[:, -1])

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
               vocab_size=None, context=None, compile=False, banned=(), caches=None, kept=0):
        """Continue idx (B, T), yielding each token (B,) as it is drawn. check_sampling raises ValueError.

        temperature 0 is greedy. top_k keeps the k likeliest tokens, then min_p those at least this fraction
        as likely as the likeliest, then top_p the likeliest that together reach this probability. Tokens from
        vocab_size on and those in banned, for which there is no text, are never drawn. context cuts
        the prompt, and what full attention sees. compile compiles the step of one token, which takes
        seconds to minutes, once. caches: of an earlier call, which hold the first `kept` tokens of idx."""
        if context:
            idx = idx[:, -context:]
        length = idx.size(1) + max_new_tokens
        check_sampling(self.config, idx, length, temperature, top_k, top_p, min_p)
        caches = caches or self.make_caches(idx, min(length, context or length))
        for cache in caches:
            cache.position.fill_(kept)
        idx = idx[:, kept:]
        banned = torch.tensor(list(banned), dtype=torch.int64, device=idx.device)
        step = self.next_logits
        training = self.training
        self.eval()
        try:
            for i in range(max_new_tokens):
                if FAST and i == 1:  # after the prompt
                    step = fast_step(self, idx, caches, compile)
                logits = step(idx, caches)[:, :vocab_size].float()
                logits.index_fill_(1, banned, -math.inf)
                idx = draw(logits, temperature, top_k, top_p, min_p)  # the newest token; caches hold the rest
                yield idx.squeeze(1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, *options, **more):
        """Continue idx (B, T) -> (B, T + max_new_tokens), with the options of `stream`."""
        new = list(self.stream(idx, max_new_tokens, *options, **more))
        return torch.cat((idx, torch.stack(new, dim=1)), dim=1) if new else idx

    def make_caches(self, idx, length):
        """An empty KVCache of this length for each layer, for prompts like idx (B, T)."""
        dtype = self.lm_head.weight.dtype
        if torch.is_autocast_enabled(idx.device.type):
            dtype = torch.get_autocast_dtype(idx.device.type)
        return [KVCache(self.config, layer_type, len(idx), length, dtype, idx.device)
                for layer_type in self.config.layer_types]


class KVCache:
    """Keys (after RoPE) and values of one layer, (B, KV, size, hd). Once all slots are used, the newest token
    replaces the oldest: size is the window, without a mask, because softmax ignores the order. Full layers
    have `length` slots. Shapes stay the same, so that one compiled step serves every token."""

    def __init__(self, config, layer_type, batch_size, length, dtype, device):
        size = min(length, config.sliding_window) if layer_type == SLIDING else length
        shape = batch_size, config.num_key_value_heads, size, config.head_dim  # as matmuls read it
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.slots = torch.arange(size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # tokens seen so far

    def update(self, k, v):
        """Store k and v (B, T, KV, hd) of the next T tokens, of which the last `size` stay. Returns what the
        tokens can see: all slots if T is 1, else those stored before, in their order, and their own."""
        T, size = k.size(1), self.k.size(2)
        written = (self.position + torch.arange(T, device=k.device))[-size:] % size
        new_k, new_v = k[:, -size:].transpose(1, 2), v[:, -size:].transpose(1, 2)
        if T > 1:
            seen = self.position.item()
            before = torch.arange(max(0, seen - size), seen, device=k.device) % size
            k = torch.cat((self.k[:, :, before].transpose(1, 2), k), dim=1)
            v = torch.cat((self.v[:, :, before].transpose(1, 2), v), dim=1)
        self.k.index_copy_(2, written, new_k)
        self.v.index_copy_(2, written, new_v)
        self.position += T
        return (k, v) if T > 1 else (self.k.transpose(1, 2), self.v.transpose(1, 2))


def check_sampling(config, idx, length, temperature, top_k, top_p, min_p):
    """Raise ValueError unless the arguments of GPT.stream are valid. length includes the new tokens."""
    def check(name, value, least, most):
        good = value is None or least <= value <= most
        require(good, f'{name} is {value}; it must be between {least} and {most}')

    check('temperature', temperature or None, 1e-6, 1e9)  # 0 is greedy
    check('top_k', top_k, 1, math.inf)
    check('top_p', top_p, 1e-9, 1)
    check('min_p', min_p, 0, 1)
    check('the length of the prompt', idx.size(1), 1, math.inf)
    check('the length of the prompt plus max_new_tokens', length, 1, config.max_position_embeddings)
    good = 0 <= idx.min() and idx.max() < config.vocab_size
    require(good, 'the prompt has tokens outside of vocab_size; check the tokenizer')


def draw(logits, temperature, top_k, top_p, min_p):
    """Draw a token for each row of logits (B, V), fp32 -> (B, 1). See GPT.stream."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0, for min_p
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if min_p:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    if top_p is not None and top_p < 1:
        p, token = logits.softmax(-1).sort(dim=-1, descending=True)
        dropped = p.cumsum(-1) - p >= top_p  # the tokens before this one already reach top_p
        dropped = torch.zeros_like(dropped).scatter(1, token, dropped)
        logits = logits.masked_fill(dropped, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)


# =============================================================================
# Part two: what makes it practical
# -----------------------------------------------------------------------------
# 4. fast ways

def fast_attention(q, k, v, sinks, window, dropout):
    """attention to all visible keys, without all (T, T) weights in memory.

    CUDA's flash kernel knows windows, the CPU's does not. Without a kernel for the whole, queries are cut
    into blocks. A block attends to its own keys and all before, in a sliding layer to one block before."""
    T, S = q.size(1), k.size(1)
    window = None if window is None or window >= S else window
    flash = can_flash(q) and not dropout
    if flash and (q.is_cuda or window is None or T < S):
        return FlashAttention.apply(q, k, v, sinks, window)
    if T < S:  # a prompt goes on after cached tokens
        return attention(q, k, v, sinks, visible_keys(T, S, window, q.device))
    size = max(window, 128) if window else 512
    keys = k.split(size, dim=1)
    values = v.split(size, dim=1)
    outputs = []
    for i, block in enumerate(q.split(size, dim=1)):
        first = max(0, i - 1) if window else 0
        k = torch.cat(keys[first:i + 1], dim=1)
        v = torch.cat(values[first:i + 1], dim=1)
        if flash:
            y = FlashAttention.apply(block, k, v, sinks, window)
        else:  # fp32 on CUDA, older GPUs, MPS, dropout: backward computes the weights of a block again
            inputs = block, k, v, sinks, visible_keys(block.size(1), k.size(1), window, q.device), dropout
            redraws = dropout and q.device.type == 'mps'  # checkpoint does not restore MPS's random numbers
            y = attention(*inputs) if redraws else checkpoint(attention, *inputs, use_reentrant=False)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def can_flash(q):
    """Whether PyTorch has a flash kernel for queries like these. CUDA's takes 16 bits, on sm80 or newer."""
    if not q.is_cuda:
        return q.device.type == 'cpu'
    fits = q.dtype != torch.float32 and q.size(-1) % 8 == 0 and q.size(-1) <= 192
    there = torch.backends.cuda.is_flash_attention_available() and not torch.version.hip
    return fits and there and torch.cuda.get_device_properties(q.device).major >= 8


class FlashAttention(torch.autograd.Function):
    """attention by PyTorch's flash kernels, which know no sinks.

    They also return the logarithms of the softmax's denominators (lse). From these follows the weight that a
    sink leaves to the keys, by which outputs and their gradients are multiplied. The kernel's backward
    subtracts the product of the output and its gradient. Given the output with the sink, it computes
    gradients with the sink."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, window):
        T, S = q.size(1), k.size(1)
        ctx.options = dict(scale=q.size(-1) ** -0.5)
        if q.is_cuda:
            left = -1 if window is None else window - 1  # keys left of a query's own
            ctx.options |= dict(window_size_left=left, window_size_right=0)
            y, lse, *state, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, T, S, 0.0, True, False, **ctx.options)
        else:
            mask = None
            if S > T or window is not None and window < S:
                mask = torch.where(visible_keys(T, S, window, q.device), 0.0, -math.inf).to(q.dtype)
            ctx.options |= dict(attn_mask=mask)
            y, lse, *state = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, mask is None, **ctx.options)
            y = y.transpose(1, 2)
        kept = torch.sigmoid(lse - sinks.float()[:, None])  # (B, H, T)
        y = y * kept.mT[..., None]
        if y.dtype != q.dtype:  # torch 2.11 compiles a .to that changes nothing to a gradient of zero
            y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, y, lse, *state)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, sinks, y, lse, *state = ctx.saved_tensors
        # lse must be the kernel's own, because it ignores the strides that the compiler pads
        kept = torch.sigmoid(lse - sinks.float()[:, None])
        dsinks = -((1 - kept) * (dy.float() * y.float()).sum(-1).mT).sum((0, 2))
        dy = (dy * kept.mT[..., None]).to(dy.dtype)
        if q.is_cuda:
            gradients = torch.ops.aten._flash_attention_backward(
                dy, q, k, v, y, lse, None, None, q.size(1), k.size(1), 0.0, True, *state, **ctx.options)
        else:
            causal = ctx.options['attn_mask'] is None
            dy, q, k, v, y = (x.transpose(1, 2) for x in (dy, q, k, v, y))
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy, q, k, v, y, lse, 0.0, causal, **ctx.options)
            gradients = [x.transpose(1, 2) for x in gradients]
        return *gradients, dsinks.to(sinks.dtype), None


def fast_experts(experts, x, chosen, router_weights):
    """Experts.forward, in one of three ways: gathered, grouped or looped."""
    k = chosen.size(1)
    loop = loop_uncompiled if torch.compiler.is_compiling() else loop_experts
    if can_gather(experts, x):
        y = gather_experts(experts, x, chosen)
    elif len(x) == 1 and not experts.training:  # a decoded token: nothing to sort
        y = loop(experts, x.expand(k, -1), chosen[0], torch.ones_like(chosen[0]))[None]
    else:
        order = chosen.flatten().argsort(stable=True)  # the pairs of a row and an expert, sorted by expert
        which = torch.arange(len(experts.down_proj_bias), device=x.device)
        counts = (chosen.flatten()[:, None] == which).sum(0)
        if x.is_cuda:
            place = move_rows(torch.arange(len(order), device=x.device), order)  # of each pair in this order
            rows = move_rows(x.repeat_interleave(k, dim=0), place)
        else:
            rows = x.index_select(0, order // k)
        grouped = can_group(experts, rows)
        y = group_experts(experts, rows, counts) if grouped else loop(experts, rows, which, counts)
        y = move_rows(y, order).unflatten(0, (-1, k))
    return (y * router_weights[..., None]).sum(1)


def move_rows(x, place):
    """Move row i of x to row place[i]. Backward reads rows, that of indexing adds, on CUDA by atomics."""
    return torch.empty_like(x).index_copy_(0, place, x)


GATHERED = 8  # rows at most; more of them share experts, and reading each expert once is cheaper


def can_gather(experts, x):
    """Whether these are few rows outside of training, on a GPU or in compiled code. Sorted by expert, they
    would make the host wait for the number of rows of each."""
    few = len(x) <= GATHERED and not experts.training
    return few and (x.is_cuda or torch.compiler.is_compiling())


def gather_experts(experts, x, chosen):
    """Rows x (N, D), each with k matrices of its own -> (N, k, D)."""
    def multiply(x, matrices):  # (N, k, in), (N, k, in, out) -> (N, k, out)
        if torch.compiler.is_compiling():  # to one kernel, which reads the chosen matrices without a copy
            return (x[..., None] * matrices.to(x.dtype)).sum(2)
        return (x[..., None, :] @ matrices.to(x.dtype)).squeeze(2)

    def linear(x, name):
        y = multiply(x, getattr(experts, name)[chosen]) + getattr(experts, name + '_bias')[chosen].to(x.dtype)
        if isinstance(experts, LoRAExperts):
            a, b = experts.lora[name].matrices()
            y = y + multiply(multiply(x, a[chosen]), b[chosen]) * experts.lora[name].scale
        return y

    h = swiglu(linear(x[:, None], 'gate_up_proj'), experts.limit)
    return linear(h, 'down_proj')


def can_group(experts, rows):
    """Whether F.grouped_mm is the fastest: on CUDA in bf16, on CPUs for few rows in fp32. It takes widths,
    and ranks of adapters, in multiples of 8."""
    adapted = isinstance(experts, LoRAExperts)
    rank = experts.lora['down_proj'].rank if adapted else 8
    if isinstance(experts.gate_up_proj, MXFP4) or rank % 8 or adapted and not rows.is_cuda:
        return False
    _, I, D = experts.down_proj.shape
    few = len(rows) * 2 * I <= 2 ** 20 and not torch.compiler.is_compiling()  # it compiles bf16 alone
    fast = rows.dtype == torch.bfloat16 if rows.is_cuda else rows.dtype == torch.float32 and few
    return fast and rows.device.type != 'mps' and D % 8 == I % 8 == 0


def group_experts(experts, rows, counts):
    """Rows (M, D), sorted by expert, through their experts -> (M, D). counts (E,): the rows of each expert.

    It is one kernel on sm90 and sm100. Other GPUs loop over the experts and wait for the host."""
    ends = counts.cumsum(0)
    row = torch.arange(len(rows), device=rows.device)[:, None]
    member = ((ends - counts <= row) & (row < ends)).to(rows.dtype)  # (M, E): 1 where a row has this expert
    sm100 = rows.is_cuda and torch.cuda.get_device_properties(rows.device).major == 10

    def multiply(x, matrices):
        if sm100:  # there gradients of experts without rows are garbage (pytorch/pytorch#172439)
            matrices = torch.where((counts > 0)[:, None, None], matrices, 0)
        return F.grouped_mm(x, matrices.to(x.dtype), offs=ends.to(torch.int32))

    def linear(x, name):
        biases = getattr(experts, name + '_bias').to(x.dtype)
        y = torch.addmm(multiply(x, getattr(experts, name)), member, biases)  # biases[expert] needs atomics
        if isinstance(experts, LoRAExperts):
            a, b = experts.lora[name].matrices()
            y = y + multiply(multiply(x, a), b.contiguous()) * experts.lora[name].scale
        return y

    return linear(swiglu(linear(rows, 'gate_up_proj'), experts.limit), 'down_proj')


def loop_experts(experts, rows, which, counts):
    """Groups of rows (M, D), counts (G,) of them, through the experts which (G,), one by one -> (M, D)."""
    stacks = {}
    if torch.is_grad_enabled() and not isinstance(experts, LoRAExperts):
        stacks = {name: p.unbind() for name, p in experts.named_parameters(recurse=False)}

    def linear(name, x, e):
        if name not in stacks:
            return experts.linear(name, x, e)
        # the same; the backward of unbind is much faster than that of indexing
        return torch.addmm(stacks[name + '_bias'][e].to(x.dtype), x, stacks[name][e].to(x.dtype))

    outputs = []
    for e, x in zip(which.tolist(), rows.split(counts.tolist())):
        n = len(x)
        if n > 32 and x.dtype != torch.float32 and not x.is_cuda:
            x = F.pad(x, (0, 0, 0, -n % 256))  # CPUs compile a 16-bit kernel for each number of rows, in 3 ms
        if n > 0:
            h = swiglu(linear('gate_up_proj', x, e), experts.limit)
            outputs.append(linear('down_proj', h, e)[:n])
    return torch.cat(outputs)


# The compiler skips it, because numbers of rows are data. Its first call imports the compiler, in seconds.
loop_uncompiled = torch._disable_dynamo(loop_experts)


class LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of x @ weight.T, in nats, fp32. x (N, D), weight (V, D), targets (N,).

    Forward computes logits and gradients chunk by chunk, so that all (N, V) logits never exist. Target -1 is
    ignored. F.linear_cross_entropy exists from torch 2.13 on only, and the compiler cannot look into it."""

    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        w = weight.to(x.dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = []
        dw = None
        if needs_grad and weight.requires_grad:
            dw = torch.zeros_like(weight, dtype=torch.float32)
        rows = 2 ** 24 // len(w)  # 2^24 logits in fp32 are 64 MB
        if x.is_cuda:  # which is faster with more, and with multiples of 64
            rows = 2 ** 27 // len(w) // 64 * 64
        for xc, tc in zip(x.split(max(64, rows)), targets.split(max(64, rows))):
            logits = (xc @ w.T).float()
            valid = (tc >= 0)[:, None]
            tc = tc.clamp(min=0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            nats = torch.where(valid, lse - logits.gather(1, tc), 0)
            loss = loss + nats.sum()  # torch 2.11 compiles += to 0
            if needs_grad:  # d loss / d logits = softmax - one_hot; rounded first, so that no fp32 is stored
                grad = logits.sub_(lse).exp_().mul_(valid).to(x.dtype)
                grad = grad.scatter_(1, tc, torch.expm1(-nats).to(x.dtype))  # nats is 0 where ignored
                dx.append(grad @ w)
            if dw is not None and x.dtype == torch.bfloat16:
                dw = dw.add_(grad.T @ xc)
            elif dw is not None:  # in fp32: the sum over the rows would exceed float16
                dw = dw.addmm_(grad.T.float(), xc.float())
        if needs_grad:
            ctx.save_for_backward(torch.cat(dx), dw)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        if dw is not None:
            dw = (dw * grad).to(ctx.dtype)
        return (dx.float() * grad).to(dx.dtype), dw, None, None  # grad alone may exceed float16


def fast_step(model, idx, caches, compile):
    """GPT.next_logits for tokens like idx (B, 1). On CUDA its kernels are captured once and replayed."""
    captured = idx.is_cuda and len(idx) <= GATHERED
    step = compile_step(model, caches, by_layer=captured) if compile else model.next_logits
    if not captured:
        return step
    token = idx.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device_of(idx):
        step(token, caches)  # compiles and loads the kernels, which is not allowed during capture
        for cache in caches:
            cache.position -= 1  # the first replay stores this token again
        with torch.cuda.graph(graph, stream=capture_stream(idx.device)):
            logits = step(token, caches)

    def replay(idx, caches):
        token.copy_(idx)
        graph.replay()
        return logits

    return replay


@cache
def capture_stream(device):
    """One for each device. The default of torch.cuda.graph belongs to the device of the first capture."""
    return torch.cuda.Stream(device)


def compile_step(model, caches, by_layer):
    """GPT.next_logits, compiled for caches of every length. by_layer compiles one layer, whose graph serves
    all layers, in a tenth of the time. A step then makes one call for each layer, which costs the host time
    unless the step is captured."""
    for cache in caches:
        for tensor, dim in ((cache.k, 2), (cache.v, 2), (cache.slots, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    if by_layer:
        return partial(model.next_logits, layers=[torch.compile(layer) for layer in model.model.layers])
    return torch.compile(model.next_logits)


# -----------------------------------------------------------------------------
# 5. optimizers

def configure_optimizers(model, learning_rate, muon_lr, betas, weight_decay, mesh=None):
    """[AdamW, Muon]. Muon moves the matrices of the layers, with momentum betas[0]. AdamW moves the rest, or
    everything if muon_lr is 0. Only matrices decay. mesh: the processes of DDP, which share Muon's work."""
    decayed, rest, hidden = [], [], {}
    for name, p in model.named_parameters():
        matrix = p.dim() >= 2 and not name.endswith('bias')  # the biases of the experts are 2-D too
        if not p.requires_grad:
            continue
        if matrix and muon_lr and '.layers.' in name and 'lora.' not in name:
            pieces = 2 if name.endswith('gate_up_proj') else 1  # a gate and an up
            hidden.setdefault((p.shape, pieces), []).append(p)
        else:
            (decayed if matrix else rest).append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if hidden:
        groups = [dict(params=params, pieces=pieces) for (_, pieces), params in hidden.items()]
        optimizers.append(Muon(groups, muon_lr, betas[0], weight_decay, mesh))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon: orthogonalized momentum (kellerjordan.github.io/posts/muon). PyTorch's takes matrices only.

    The parameters of a group have one shape: (out, in) of a Linear, or (E, in, out) of experts, where
    `pieces` matrices (gate and up) take turns in the last dimension. Processes divide the matrices among
    them: the processes of mesh, which hold the same parameters, or those over which FSDP2 shards them."""

    def __init__(self, groups, lr, momentum, weight_decay, mesh=None):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, pieces=1))
        self.mesh = mesh

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            together = max(1, 2 ** 28 // group['params'][0].numel())  # bounds the memory of the update
            for i in range(0, len(params), together):
                self.move(params[i:i + together], group)

    def move(self, params, group):
        """Update parameters of one shape."""
        averages = self.average_gradients(params, group['momentum'])
        matrices = averages.flatten(0, -3).to(torch.bfloat16 if averages.is_cuda else torch.float32)
        matrices = orthogonalize_divided(matrices, params[0], self.mesh, group['pieces'])
        rows, columns = params[0].shape[-2:]
        tall = rows / columns  # out / in
        if params[0].dim() == 3:
            tall = columns / group['pieces'] / rows
        moves = matrices.to(averages.dtype) * group['lr'] * max(1, tall) ** 0.5
        weights = [take_local(p) for p in params]
        torch._foreach_mul_(weights, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_sub_(weights, moves.view_as(averages).unbind())

    def average_gradients(self, params, momentum):
        """Add the gradients to their running averages -> Nesterov's momentum, stacked (P, ..., m, n)."""
        for p in params:
            if not self.state[p]:
                self.state[p]['momentum'] = torch.zeros_like(p)
        gradients = [take_local(p.grad) for p in params]
        averages = [take_local(self.state[p]['momentum']) for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, averages, momentum))


def take_local(tensor):
    """This process's part of a DTensor. Other tensors stay as they are."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def orthogonalize_divided(matrices, param, mesh, pieces):
    """orthogonalize matrices (M, m, n) of parameters like param, each on one of the processes with parts."""
    if hasattr(param, 'placements'):
        mesh = param.device_mesh
    if mesh is None:
        return orthogonalize(matrices, pieces)
    from torch.distributed.tensor import DTensor, Replicate, Shard
    parts = [Replicate()]
    if hasattr(param, 'placements'):  # dimension 0 of a 2-D parameter is 1 in matrices
        parts = [Shard(p.dim + 3 - param.dim()) if p.is_shard() else p for p in param.placements]
    whole = [*parts[:-1], Shard(0)]
    if parts == whole:  # FSDP2 sharded the experts: each process has whole matrices
        return orthogonalize(matrices, pieces)
    shape = torch.Size((len(matrices), *param.shape[-2:]))
    layout = dict(shape=shape, stride=(shape[1] * shape[2], shape[2], 1), run_check=False)
    mine = DTensor.from_local(matrices, mesh, parts, **layout).redistribute(placements=whole).to_local()
    mine = orthogonalize(mine, pieces)
    return DTensor.from_local(mine, mesh, whole, **layout).redistribute(placements=parts).to_local()


def orthogonalize(x, pieces=1):
    """Roughly the nearest orthogonal matrices to x (M, m, n), or to `pieces` that take turns in the last
    dimension. Three Newton-Schulz iterations with the coefficients of Polar Express (arXiv:2505.16932) bring
    the singular values to between 0.18 and 1.9. More exact values train no better."""
    y = x.unflatten(-1, (-1, pieces)).movedim(-1, 1).flatten(0, 1)  # (M * pieces, m, n / pieces)
    tall = y.size(1) > y.size(2)
    y = y.mT if tall else y
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in ((8.1247, -22.2349, 15.6695), (4.0265, -2.7778, 0.4935), (3.8713, -2.7411, 0.4998)):
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    y = y.mT if tall else y
    return y.unflatten(0, (-1, pieces)).movedim(1, -1).flatten(2)


# -----------------------------------------------------------------------------
# 6. checkpoints

STACKS = 'gate_up_proj', 'down_proj'  # the matrices of the experts, which alone can be MXFP4


def from_pretrained(cls, path, dtype=torch.bfloat16, device='cpu', experts=None, base=None, **overrides):
    """Load a folder or a Hugging Face hub id: a model, or adapters and the model that they name.

    experts='mxfp4' keeps the matrices of the experts at four bits a value; they do not train. base replaces
    the model that adapters name, overrides replace fields of GPTConfig. A folder that is replaced meanwhile,
    such as a run's best/, is read again. Raises ValueError, which names the tensors that do not fit."""
    require(experts in (None, 'mxfp4'), f'experts is {experts!r}; it must be mxfp4 or None')
    for _ in range(10):
        before = stamp(path)
        model = error = None  # frees the model that was read before
        try:
            adapted = (find_checkpoint(path) / 'adapter_config.json').is_file()
            load = load_adapters if adapted else load_model
            model = load(cls, path, dtype, device, experts, base, overrides)
        except ValueError as caught:
            error = caught
        if stamp(path) == before:
            break
    else:
        error = ValueError(f'{path} was replaced ten times while it was read')
    if error:
        raise error
    return model


def stamp(path):
    """What changes when the files of a folder, or the folder itself, are replaced. None for a hub id."""
    with suppress(OSError, ValueError):
        return os.stat(path).st_ino, os.stat(path).st_mtime_ns


def load_model(cls, path, dtype, device, expert_format, base, overrides):
    """The model, without adapters, of a folder or hub id. Raises ValueError."""
    folder = find_checkpoint(path)
    config, _ = read_shape(folder, base, **overrides)
    overflows = dtype == torch.float16 and config.hidden_size == 2880
    require(not overflows, "gpt-oss's activations exceed the range of float16; use bfloat16 or float32")
    with torch.device('meta'):
        model = cls(config)
    load_weights(model, folder, dtype, device, expert_format)
    model.base = str(path), overrides
    return model


def load_weights(model, folder, dtype, device, expert_format):
    """Give a model on the meta device the tensors of a folder. Raises ValueError."""
    missing = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = []
    weights = {}
    for name, tensor in read_tensors(folder):
        expected = missing.pop(name, 'no such tensor')
        if tuple(tensor.shape) != expected:
            wrong.append(f'{name} is {tuple(tensor.shape)}, expected {expected}')
        elif expert_format and name.endswith(STACKS):
            module, _, leaf = name.rpartition('.')
            delattr(model.get_submodule(module), leaf)
            setattr(model.get_submodule(module), leaf, MXFP4.pack(tensor).to(device))
        else:
            tensor = tensor.to(device).unpack() if isinstance(tensor, MXFP4) else tensor
            weights[name] = tensor.to(device, dtype, copy=True)  # safetensors gives a view of the file
    wrong += [f'{name} is missing' for name in missing]
    require(not wrong, f'{folder} does not fit its config: {"; ".join(wrong[:10])} ({len(wrong)} in all)')
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.reset_counters(device)


def save_pretrained(model, path, dtype=None, experts=None, shard_size=5e9, weights=None):
    """Write config.json and safetensors that transformers' GptOssForCausalLM loads.

    dtype None keeps that of the parameters. experts='mxfp4' writes the matrices of the experts at four bits
    a value. A model larger than shard_size bytes gets one file for each layer. weights, a state_dict, are
    written in place of the model's own. The new checkpoint replaces an older one, see replace_checkpoint."""
    require(experts in (None, 'mxfp4'), f'experts is {experts!r}; it must be mxfp4 or None')
    require(not model.lora, 'the model has adapters: merge_lora first, or save_adapter to save them alone')
    dtype = dtype or model.lm_head.weight.dtype
    tensors = stored_tensors(model)
    shards = {}
    packed = any(isinstance(tensor, MXFP4) for tensor in tensors.values())
    require(not (weights and packed), 'weights cannot replace packed experts')
    large = model.num_parameters() * dtype.itemsize > shard_size
    for name in tensors:
        shard = name.split('.')[2] if large and '.layers.' in name else 'rest'
        shards.setdefault(shard, {})[name] = weights[name] if weights else tensors[name]
    with replace_checkpoint(path) as new:
        write_config(model.config, new, dtype, experts)
        write_shards(list(shards.values()), new, dtype, experts)


@contextmanager
def replace_checkpoint(path):
    """Yield an empty folder to write a checkpoint to, which in the end becomes `path`, whole or not at all.

    Files that are not of a checkpoint stay. Killed between two renamings, both checkpoints are whole in a
    folder NAME-RANDOM beside it. Where the folder cannot be renamed, files are replaced one by one, first
    without config.json, so that half of them are no checkpoint."""
    folder = Path(path).resolve()
    require(folder.is_dir() or not folder.exists(), f'{path} is a file; a checkpoint is a folder')
    in_use = os.path.ismount(folder) or Path.cwd().is_relative_to(folder)
    fixed = folder.exists() and (in_use or not os.access(folder.parent, os.W_OK))
    place = folder if fixed else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(dir=place, prefix=f'{folder.name}-'))
    new = temporary / 'new'
    old = temporary / 'old'
    try:
        new.mkdir()
        if folder.exists():
            shutil.copymode(folder, new)
        yield new
    except BaseException:
        remove_folder(temporary)
        raise
    if fixed:  # sorted, config.json comes before model.safetensors
        for file in sorted(filter(is_of_checkpoint, folder.iterdir())):
            file.unlink()
        for file in sorted(new.iterdir(), reverse=True):
            file.rename(folder / file.name)
    else:
        put_in_place(new, folder, old)
        for file in old.glob('*'):
            if not is_of_checkpoint(file):
                file.rename(folder / file.name)
    remove_folder(temporary)


def is_of_checkpoint(file):
    return file.is_file() and any(map(file.match, ('config.json', 'model*.safetensors*', 'adapter_*')))


def put_in_place(new, folder, old):
    """Flush a folder to the disk and rename it to `folder`. What had this name gets the name `old`."""
    for file in new.iterdir():
        with open(file, 'r+b') as stream:
            os.fsync(stream.fileno())
    if hasattr(os, 'O_DIRECTORY'):  # Windows opens no folders
        handle = os.open(new, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if os.path.lexists(folder):
        remove_folder(old)
        rename(folder, old)
    rename(new, folder)


def remove_folder(folder):
    """Remove a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def rename(folder, target):
    """Rename a folder. Windows refuses while a reader has a file open, so it is tried for five seconds."""
    for _ in range(10):
        with suppress(PermissionError):
            return folder.rename(target)
        time.sleep(0.5)
    folder.rename(target)


def write_shards(shards, folder, dtype, expert_format):
    """Write {name: tensor or MXFP4} to a file for each shard, and an index if there are several."""
    index = dict(metadata=dict(total_size=0), weight_map={})
    for i, shard in enumerate(shards, 1):
        file = f'model-{i:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else 'model.safetensors'
        tensors = {}
        for name, tensor in shard.items():
            if expert_format and name.endswith(STACKS):
                packed = MXFP4.pack(tensor)
                tensors |= {f'{name}_blocks': packed.blocks, f'{name}_scales': packed.scales}
            else:
                tensor = tensor.unpack() if isinstance(tensor, MXFP4) else tensor.detach()
                tensors[name] = tensor.to(dtype).contiguous()
        save_file(tensors, folder / file)
        index['metadata']['total_size'] += sum(tensor.nbytes for tensor in tensors.values())
        index['weight_map'] |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / 'model.safetensors.index.json', index)


def stored_tensors(model):
    """What a checkpoint holds, by name: parameters, and an MXFP4 for each packed stack, without adapters."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, MXFP4)}
    return {name: p for name, p in model.named_parameters() if 'lora.' not in name} | packed


def num_parameters(model, active=False):
    """The number of all parameters, or of those that one token uses."""
    return sum(size for _, _, size in parameter_sizes(model, active))


def parameter_sizes(model, active):
    """Yield (name, tensor or MXFP4, its number of values or, with active, of those that one token uses)."""
    E, k = model.config.num_local_experts, model.config.num_experts_per_tok
    for name, tensor in stored_tensors(model).items():
        size = tensor.shape.numel()
        yield name, tensor, size * k // E if active and '.experts.' in name else size


def flops_per_token(model, T):
    """Training FLOPs of a token among T: attention's, and for each active parameter outside the embedding 6,
    or 4 if it is frozen, because it needs no gradient."""
    c = model.config
    keys = 0  # that a token sees on average, summed over the layers
    for layer_type in c.layer_types:
        window = min(T, c.sliding_window) if layer_type == SLIDING else T
        keys += window - window * (window - 1) / (2 * T)
    flops = 12 * c.num_attention_heads * c.head_dim * keys
    for name, tensor, size in parameter_sizes(model, active=True):
        if c.tie_word_embeddings or 'embed_tokens' not in name:
            flops += size * (6 if getattr(tensor, 'requires_grad', False) else 4)
    return flops


def read_tensors(folder):
    """Yield (name, tensor) for the tensors of a folder, and one MXFP4 for each pair of blocks and scales."""
    files = locate_tensors(folder)

    def read(name):
        require(name in files, f'{folder} has no {name}')
        with open_file(files[name]) as file:  # anew, because an open file keeps in memory what was read
            require(name in file.keys(), f'{files[name]} has no {name}')
            return file.get_tensor(name)

    for name in files:
        if name.endswith('_blocks'):
            stack = name.removesuffix('_blocks')
            yield stack, MXFP4(read(name), read(f'{stack}_scales'))
        elif not name.endswith('_scales'):
            yield name, read(name)


def locate_tensors(folder):
    """{name: file} of model.safetensors, or of the index of shards, where there is one. Other files, such as
    shards of an older save, are not read."""
    single = folder / 'model.safetensors'
    index = folder / 'model.safetensors.index.json'
    weight_map = {}
    if index.is_file():
        weight_map = read_json(index).get('weight_map')
        require(isinstance(weight_map, dict), f'{index} has no weight_map')
    files = [file for file in weight_map.values() if isinstance(file, str) and Path(file).name == file]
    there = [file for file in files if (folder / file).is_file()]
    if single.is_file() or not index.is_file():  # an index without its shards is of an older save
        good = set(there) <= {single.name}
        require(good, f'{folder} holds two models, {single.name} and indexed shards; remove one')
        with open_file(single) as file:
            return dict.fromkeys(file.keys(), single)
    for file in weight_map.values():
        require(file in there, f'{index} names {file!r:.99}, which is not there; download it')
    return {name: folder / file for name, file in weight_map.items()}


class MXFP4(nn.Module):
    """A frozen stack of matrices (E, in, out) at four bits a value. [e] is one of them in bf16, exactly.

    The tensors are the published ones, transposed. blocks uint8 (E, out, in / 32, 16): two values a byte,
    the even one in the low nibble. scales uint8 (E, out, in / 32): exponents of two, biased by 127, of 32
    values each. OCP Microscaling Formats v1.0."""

    def __init__(self, blocks, scales):
        super().__init__()
        good = blocks.dim() == 4 and blocks.shape[:-1] == scales.shape and blocks.size(-1) == 16
        require(good, f'blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} are not MXFP4')
        self.register_buffer('blocks', blocks)
        self.register_buffer('scales', scales)
        self.shape = torch.Size((blocks.size(0), blocks.size(2) * 32, blocks.size(1)))

    def __getitem__(self, e):
        # A code is sign, two bits of exponent, one of mantissa. At bits 15, 10 to 11 and 9 these are an fp16
        # that is 2^14 times too small. Compiled, a table takes three times as long as this arithmetic.
        # The low nibble is shifted by 12, the high one by 8.
        shifts = torch.arange(12, 7, -4, dtype=torch.int16, device=self.blocks.device)
        bits = self.blocks[e].short()[..., None] << shifts >> 3 & -0x7200  # the mask is 0x8e00
        values = bits.flatten(-2).view(torch.float16).bfloat16() * 2 ** 13
        # the exponent's bits of an fp32; one more keeps 2^-127 from being subnormal, and leaves 2^13
        scales = (self.scales[e].int() + 1 << 23).view(torch.float32).bfloat16()
        return (values * scales[..., None]).flatten(-2).mT

    def unpack(self):
        """The whole stack in bf16."""
        return torch.stack([self[e] for e in range(len(self.blocks))])

    @classmethod
    @torch.no_grad()
    def pack(cls, stack):
        """Quantize a stack (E, in, out) to the nearest values, half-way to the even code. Raises ValueError.

        The scale brings the largest of 32 values to between 3.625 and 7.25: up to there, clamping it to 6
        costs less than a coarser grid for the others."""
        if isinstance(stack, MXFP4):
            return stack
        width = stack.size(1)
        require(width % 32 == 0, f'MXFP4 takes widths in multiples of 32; the experts have {width}')
        require(stack.isfinite().all(), 'there are weights that are not finite, which MXFP4 cannot hold')
        limits = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], device=stack.device)
        # bucketize puts a tie into the lower bin; every second one belongs into the upper, whose code is even
        limits[1::2] = limits[1::2].nextafter(limits.new_zeros(()))
        blocks = []
        scales = []
        for matrix in stack:  # one at a time, because this takes several times its memory
            x = matrix.mT.float().contiguous().unflatten(-1, (-1, 32))
            mantissa, exponent = x.abs().amax(-1, keepdim=True).frexp()
            exponent = (exponent - 3 + (mantissa > 7.25 / 8)).clamp(-127, 127)
            codes = torch.bucketize(torch.ldexp(x.abs(), -exponent), limits) | x.signbit().int() << 3
            blocks.append((codes[..., 0::2] | codes[..., 1::2] << 4).byte())
            scales.append((exponent + 127)[..., 0].byte())
        return cls(torch.stack(blocks), torch.stack(scales))


def check_shape(config):
    """GPTConfig.check. A config.json may come from an untrusted source."""
    for field in fields(config):
        if field.name != 'layer_types':
            check_number(field.name, getattr(config, field.name), field.type)
    c = config
    H, KV = c.num_attention_heads, c.num_key_value_heads
    E, k = c.num_local_experts, c.num_experts_per_tok
    L = c.num_hidden_layers
    require(L <= 1000, f'num_hidden_layers is {L}; it must be at most 1000')
    if c.layer_types is not None:
        require(len(c.layer_types) == L, f'layer_types must have num_hidden_layers ({L}) names')
        require(set(c.layer_types) <= {SLIDING, FULL}, f'layer_types may name {SLIDING} and {FULL}')
    require(H % KV == 0, f'num_attention_heads ({H}) must be a multiple of num_key_value_heads ({KV})')
    require(k <= E, f'num_experts_per_tok ({k}) must not exceed num_local_experts ({E})')
    require(c.head_dim % 2 == 0, f'head_dim ({c.head_dim}) must be even, because RoPE rotates pairs')
    require(c.dropout < 1 and c.attention_dropout < 1, 'dropout must be below 1')
    require(c.rope_factor >= 1, 'rope_factor must be at least 1')
    require(c.rope_theta > 1, 'rope_theta must be above 1')
    good = 0 < c.rope_beta_slow <= c.rope_beta_fast
    require(good, 'rope_beta_slow must be above 0, and at most rope_beta_fast')


def check_number(name, value, kind):
    kinds = [kind] if kind in (int, bool) else [float, int]  # a whole number is a float too
    minimum = 1 if kind is int else 0
    good = type(value) in kinds and minimum <= value < 2 ** 31
    require(good, f'{name} is {value!r:.99}; it must be {kinds[0].__name__}, {minimum} to 2^31 - 1')


def find_checkpoint(path):
    """The folder with config.json or adapter_config.json: path, or a hub id's download. Raises ValueError."""
    for name in ('adapter_config.json', 'config.json'):
        if os.path.isfile(Path(path, name)):  # Path.is_file raises OSError for names that are too long
            return Path(path)
    original = os.path.isfile(Path(path, 'original', 'config.json'))
    require(not original, f"{path} has only OpenAI's original/; the hub has the same weights at its root")
    is_id = str(path).count('/') == 1 and not os.path.exists(path)
    require(is_id, f'{str(path):.200} has no config.json, and it is no hub id such as openai/gpt-oss-20b')
    try:
        from huggingface_hub import snapshot_download
        patterns = ['*.json', 'model*', 'adapter*', 'tokenizer.tiktoken']
        return Path(snapshot_download(str(path), allow_patterns=patterns, ignore_patterns=['*/*']))
    except Exception as error:  # the hub's client raises many types
        raise ValueError(f'{path} is no folder, and the download failed ({type(error).__name__})') from error


def read_shape(path, base=None, **overrides):
    """(GPTConfig, settings of the adapters or {}) of a checkpoint, without its weights. Raises ValueError."""
    folder = find_checkpoint(path)
    if not (folder / 'adapter_config.json').is_file():
        require(not base, f'{folder} holds a whole model; only adapters need a base')
        if 'dropout' in overrides:
            overrides = dict(attention_dropout=None) | overrides
        return replace(read_config(folder), **overrides), {}
    raw = read_json(folder / 'adapter_config.json')
    base = find_base(folder, raw, base)
    try:
        overrides = raw.get('overrides', {}) | overrides
        config, _ = read_shape(base, **overrides)
        return config, dict(lora_rank=int(raw['r']), lora_alpha=float(raw['lora_alpha']))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{folder} cannot be loaded ({type(error).__name__}: {str(error):.300})') from error


def read_config(folder):
    """GPTConfig from config.json. Raises ValueError with the path."""
    path = folder / 'config.json'
    raw = read_json(path)
    try:
        check_config(raw)
        given = {key: value for key, value in raw.items() if value is not None}
        if not given.get('output_router_logits'):  # published coefficients, gpt-oss's 0.9, are not in use
            given['router_aux_loss_coef'] = given.get('training_router_aux_loss_coef', 0.0)
        if raw.get('sliding_window', 0) is None:  # null: no window
            given['layer_types'] = [FULL] * given['num_hidden_layers']
        given |= read_rope(given)
        names = {field.name for field in fields(GPTConfig)}
        return GPTConfig(**{name: given[name] for name in names & given.keys()})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f'{path}: {type(error).__name__}: {str(error):.300}') from error


def check_config(raw):
    """Raise ValueError for a config.json of another architecture, or where a size would be a silent guess."""
    original = 'num_experts' in raw and 'num_local_experts' not in raw
    require(not original, "it is of OpenAI's original/; the hub has the same weights at its root")
    for key, only in (('swiglu_alpha', 1.702), ('attention_bias', True), ('hidden_act', 'silu')):
        value = raw.get(key, only)
        require(value in (only, None), f'{key} is {value}; gpt-oss has {only}')
    for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                'num_key_value_heads', 'head_dim', 'num_local_experts', 'num_experts_per_tok'):
        require(raw.get(key) is not None, f'it has no {key}')


def read_rope(raw):
    """The rope_ fields of GPTConfig, which config.json nests. Missing ones have transformers' defaults."""
    rope = raw.get('rope_scaling') or raw.get('rope_parameters')
    if not rope:
        return {}
    found = {f'rope_{key.removeprefix("rope_")}': value for key, value in rope.items() if value is not None}
    kind = found.get('rope_type', 'default')
    usual = kind in ('yarn', 'default') and not rope.get('attention_factor') and not rope.get('mscale')
    require(usual, f'the rope is {rope}; this model has default, and yarn with its usual concentration')
    found.setdefault('rope_truncate', True)
    found.setdefault('rope_original_max_position_embeddings', raw.get('max_position_embeddings', 131072))
    return found | dict(rope_factor=1.0) if kind == 'default' else found


def write_config(config, folder, dtype, expert_format):
    raw = asdict(config)
    rope = {key.removeprefix('rope_'): raw.pop(key) for key in list(raw) if key.startswith('rope_')}
    raw['rope_theta'] = rope.pop('theta')
    raw['rope_scaling'] = dict(rope_type='yarn', **rope)
    raw |= dict(model_type='gpt_oss', architectures=['GptOssForCausalLM'], transformers_version='4.56.0')
    raw |= dict(hidden_act='silu', attention_bias=True, torch_dtype=str(dtype).removeprefix('torch.'))
    # transformers before 5.16 cannot generate with output_router_logits
    raw |= dict(output_router_logits=False, training_router_aux_loss_coef=config.router_aux_loss_coef)
    # Ollama reads two of OpenAI's names
    raw['experts_per_token'] = config.num_experts_per_tok
    raw['initial_context_length'] = config.rope_original_max_position_embeddings
    if expert_format:
        skipped = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']
        raw['quantization_config'] = dict(quant_method='mxfp4', modules_to_not_convert=skipped)
    write_json(folder / 'config.json', raw)


def read_json(path):
    """The object in a JSON file. Raises ValueError with the path."""
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
        require(isinstance(found, dict), f'it holds a {type(found).__name__}')
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not a JSON object ({type(error).__name__}: {error})') from error


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')


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


# -----------------------------------------------------------------------------
# 7. adapters

class LoRA(nn.Module):
    """A trainable low-rank product beside a frozen matrix, or beside each of E matrices. arXiv:2106.09685.

    The tensors are PEFT's: lora_A.weight (E * rank, in), expert by expert; lora_B.weight (out, rank * E),
    where the expert runs fastest."""

    def __init__(self, experts, columns, rows, rank, scale):
        super().__init__()
        self.lora_A = Linear(columns, experts * rank, bias=False)
        self.lora_B = Linear(experts * rank, rows, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.count = experts
        self.rank = rank
        self.scale = scale

    def matrices(self):
        """A (E, in, rank) and B (E, rank, out)."""
        a = self.lora_A.weight.unflatten(0, (self.count, -1)).mT
        b = self.lora_B.weight.unflatten(1, (-1, self.count)).permute(2, 1, 0)
        return a, b

    def forward(self, x, e=0):
        a = self.lora_A.weight.unflatten(0, (self.count, -1))[e]
        b = self.lora_B.weight.unflatten(1, (-1, self.count))[..., e]
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scale

    def product(self, e=0):
        """What it adds to matrix e, (in, out)."""
        return self(torch.eye(self.lora_A.in_features, device=self.lora_A.weight.device), e)


class LoRALinear(Linear):
    """A Linear with an adapter, `lora`."""

    def forward(self, x):
        return super().forward(x) + self.lora(x)


class LoRAExperts(Experts):
    """Experts with an adapter for each stack of matrices, `lora`, by its name."""

    def linear(self, name, x, e):
        return super().linear(name, x, e) + self.lora[name](x, e)


def add_lora(model, rank, alpha):
    """Freeze the model and add trainable fp32 adapters to the matrices of attention and experts. Outputs
    are scaled by alpha / rank. Raises ValueError."""
    E, I, D = model.config.num_local_experts, model.config.intermediate_size, model.config.hidden_size
    require(not model.lora, 'the model has adapters already')
    require(1 <= rank <= D, f'lora_rank is {rank}; it must be 1 to hidden_size ({D})')
    require(0 < alpha < math.inf, f'lora_alpha is {alpha}; it must be above 0')
    model.requires_grad_(False)
    model.lora = dict(r=rank, lora_alpha=alpha)
    device, scale = model.lm_head.weight.device, alpha / rank
    for layer in model.model.layers:
        for linear in layer.self_attn.children():
            linear.__class__ = LoRALinear  # keeps its parameters and their names, as FSDP2 does
            linear.lora = LoRA(1, linear.in_features, linear.out_features, rank, scale).to(device)
        experts = layer.mlp.experts
        experts.__class__ = LoRAExperts
        adapters = dict(gate_up_proj=LoRA(E, D, 2 * I, rank, scale), down_proj=LoRA(E, I, D, rank, scale))
        experts.lora = nn.ModuleDict(adapters).to(device)
        if isinstance(experts.gate_up_proj, MXFP4):
            model.recompute = True  # or autograd stores all unpacked experts until backward


@torch.no_grad()
def merge_lora(model):
    """Add each adapter to its matrix and remove it. Raises ValueError for MXFP4."""
    packed = any(isinstance(module, MXFP4) for module in model.modules())
    require(model.lora, 'the model has no adapters')
    require(not packed, "MXFP4 experts cannot hold merged adapters; load without experts='mxfp4'")
    for layer in model.model.layers:
        for linear in layer.self_attn.children():
            linear.weight += linear.lora.product().mT
            linear.__class__ = Linear
            del linear.lora
        experts = layer.mlp.experts
        for name, lora in experts.lora.items():
            for e, matrix in enumerate(getattr(experts, name)):
                matrix += lora.product(e)
        experts.__class__ = Experts
        del experts.lora
    model.base = model.lora = None
    model.requires_grad_(True)


def peft_name(name):
    """PEFT's name of an adapter's tensor. It wraps experts twice: gate_up_proj inside, down_proj outside."""
    name = name.replace('.lora.gate_up_proj.', '.base_layer.').replace('.lora.down_proj.', '.')
    return 'base_model.model.' + name.replace('.lora.', '.')


def save_adapter(model, path, weights=None):
    """Write adapter_model.safetensors and adapter_config.json, which names the base model, in PEFT's format.
    weights, a state_dict, are written in place of the model's own. Raises ValueError."""
    folder = Path(path)
    require(not (folder / 'config.json').exists(), f'{folder} holds a whole model')
    good = model.lora and model.base
    require(good, 'there are no adapters of a saved model: from_pretrained, then add_lora, makes them')
    base, overrides = model.base
    raw = dict(peft_type='LORA', task_type='CAUSAL_LM', inference_mode=True, **model.lora)
    raw['base_model_name_or_path'] = str(Path(base).resolve()) if os.path.exists(base) else base  # a hub id
    raw['target_modules'] = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    raw['target_parameters'] = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
    if overrides:
        raw['overrides'] = overrides
    tensors = weights or model.state_dict()
    tensors = {peft_name(name): tensors[name].contiguous() for name in tensors if 'lora.' in name}
    with replace_checkpoint(folder) as new:
        write_json(new / 'adapter_config.json', raw)
        save_file(tensors, new / 'adapter_model.safetensors')


def find_base(folder, raw, base):
    """The model, a folder or hub id, that adapter_config.json names or that `base` is. Raises ValueError."""
    base = base or raw.get('base_model_name_or_path') or None
    try:
        adapted = (find_checkpoint(base) / 'adapter_config.json').is_file()
        require(not adapted, 'it holds adapters itself')
        return base
    except (ValueError, TypeError) as error:
        raise ValueError(f'the adapters in {folder} need their base model, {base!r:.200}: {error}; --base, '
                         'a folder or hub id, replaces base_model_name_or_path') from error


def load_adapters(cls, path, dtype, device, expert_format, base, overrides):
    """Load the model that adapter_config.json names, then the adapters. Those not in the file stay zero."""
    folder = find_checkpoint(path)
    raw = read_json(folder / 'adapter_config.json')
    base = find_base(folder, raw, base)
    try:
        check_peft_options(raw)
        overrides = raw.get('overrides', {}) | overrides
        model = cls.from_pretrained(base, dtype, device, expert_format, **overrides)
        model.add_lora(raw['r'], raw['lora_alpha'])
        ours = {peft_name(name): name for name, _ in model.named_parameters() if 'lora.' in name}
        if 'down_proj' not in str(raw.get('target_parameters')):  # then PEFT wraps once
            ours |= {name.replace('base_layer.', ''): ours[name] for name in ours if 'base_layer' in name}
        with open_file(folder / 'adapter_model.safetensors') as file:
            found = {ours[name]: file.get_tensor(name) for name in file.keys()}
        pairs = {name.replace('lora_B', 'lora_A') for name in found}
        require(found and len(found) == 2 * len(pairs), 'its file lacks lora_A or lora_B of an adapter')
        for name, tensor in found.items():
            shape = tuple(model.get_parameter(name).shape)
            require(tensor.shape == shape, f'{name} is {tuple(tensor.shape)}, expected {shape}')
        model.load_state_dict(found, strict=False)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{folder} cannot be loaded ({type(error).__name__}: {str(error):.300})') from error
    return model


def check_peft_options(raw):
    """Raise ValueError for an option of PEFT that would change what the adapters compute."""
    harmless = ('auto_mapping base_model_name_or_path exclude_modules inference_mode layers_to_transform '
                'lora_alpha lora_dropout megatron_core overrides peft_version qalora_group_size r revision '
                'target_modules target_parameters task_type').split()
    usual = dict(peft_type='LORA', bias='none', init_lora_weights=True)
    for key, value in raw.items():
        empty = value in (usual.get(key), 'gaussian', None, False, [], {})
        require(key in harmless or empty, f'{key} is {value!r:.99}, an option of PEFT that is not supported')


# The methods that part two adds
GPTConfig.check = check_shape
GPT.configure_optimizers = configure_optimizers
GPT.from_pretrained = classmethod(from_pretrained)
GPT.save_pretrained = save_pretrained
GPT.num_parameters = num_parameters
GPT.flops_per_token = flops_per_token
GPT.add_lora = add_lora
GPT.merge_lora = merge_lora
GPT.save_adapter = save_adapter
