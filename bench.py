"""
Measure a config on this machine: training tokens/s and MFU, prefill and decoding tokens/s, peak memory.

    python bench.py                          # the default model
    python bench.py config/tinystories.py --batch_size=8 --profile
    python bench.py --compare                # and transformers' GptOss and GPT-2 on the same work, where installed
    python bench.py config/shakespeare_char_cpu.py --learn   # what it learns, beside a dense GPT-2, with parts changed
    python bench.py config/gpt_oss_20b.py --checkpoint=big   # load one of that size in MXFP4, and generate
    python bench.py config/gpt_oss_20b.py --scale    # on paper: memory a GPU and tokens/s of training on 1 to 512 GPUs

Each figure is the median of several rounds, each round a process of its own, so that peak memory is its own too;
with --compare the implementations take turns, so that a machine that slows down slows all of them. The numbers also
go to a JSON file.
"""

import config  # first, for it makes Ctrl-C quiet

import ctypes
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from model import FULL, MXFP4, GPT, GPTConfig, LinearCrossEntropy, read_config, read_json

# -----------------------------------------------------------------------------
rounds = 3  # processes whose median is taken
steps = 5  # training steps in a round, after two that are not counted
prompt_tokens = 64  # length of the prompt that prefill and decoding start from
new_tokens = 256  # tokens to decode
decode_batch = 1  # sequences decoded together
parts = 'train,prefill,decode'  # what to measure, divided by commas
profile = False  # print where the time of a training step and of decoding goes
compare = False  # the works of the README's table, ours beside its peers
learn = False  # train the model on data_dir, a dense GPT-2 of equal active parameters, and the model with parts changed
seeds = '1,2,3'  # with learn: each row is trained once with each
plot_file = 'learn.png'  # with learn: the training losses drawn, where matplotlib is installed; empty: not
checkpoint = ''  # a folder: write random weights of this shape there, experts in MXFP4, then load them and generate
scale = False  # compute, not measure, what training takes on many GPUs, each with batch_size sequences at a time
gpu = 'H100'  # with scale: which, of those whose peak is known
gpu_memory = 80.0  # with scale: its memory, GB
assumed_mfu = 0.4  # with scale: the share of the peak that computing alone would reach
nvlink = 300.0  # with scale: GB/s from each GPU to others of its node, of eight
network = 40.0  # with scale: GB/s from each GPU to other nodes
works = 'all'  # with compare or learn: which rows, divided by commas
json_file = 'bench.json'  # where the numbers go; empty: nowhere
# and every setting of train.py and GPTConfig: the model's shape, batch_size, block_size, device, dtype, compile ...
# -----------------------------------------------------------------------------

# dense bf16 (V100, T4: fp16) of the data sheets, by a part of the device's name; the first that fits counts
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'H800': 989e12, 'A100': 312e12,
    'A800': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A6000': 155e12, 'A10': 125e12, 'RTX 5090': 210e12,
    'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def pick_device(device, dtype):
    """The torch device and the name of the dtype to compute in, where they were left to us ('auto').

    On a CPU malloc is told, from here on, to keep freed memory.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        config.fail(f'device {device!r} cannot be used here: {str(error).splitlines()[0]}')
    if dtype == 'auto':
        if device.startswith('cuda'):
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        else:
            # on CPUs bf16 is fast where the hardware multiplies it,
            # and up to a hundred times slower than fp32 elsewhere
            units = '_is_amx_tile_supported', '_is_avx512_bf16_supported'
            fast = any(getattr(torch.cpu, unit, bool)() for unit in units)
            dtype = 'bfloat16' if device == 'cpu' and fast else 'float32'
    if dtype not in ('bfloat16', 'float16', 'float32'):
        config.fail(f'dtype is {dtype!r}; it is auto, bfloat16, float16 or float32')
    if device == 'cpu':
        keep_freed_memory()
    return device, dtype


def keep_freed_memory():
    """Tell Linux's malloc to keep what a step frees for the next step.

    By default it goes back to the kernel, to be had again page by page: 10 % of a training step on CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another system, another malloc
    mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: blocks below 32 MB, the most that it takes, come from the heap,
    mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: whose end stays


@cache
def peak_flops(device, dtype):
    """FLOP/s that MFU is measured against: by a GPU's data sheet (None if we do not know it), measured on a CPU."""
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
        peaks = (peak for part, peak in PEAK_FLOPS.items() if part in name)
        return next(peaks, None) if dtype != 'float32' else None
    if device != 'cpu':
        return None
    size, seconds = 256, 0.0
    while seconds < 0.05 and size < 4096:  # grow until the clock and the caches do not matter
        size *= 2
        a = torch.ones(size, size, dtype=getattr(torch, dtype))
        a @ a
        began = time.perf_counter()
        a @ a
        seconds = time.perf_counter() - began
    return 2 * size ** 3 / seconds


# --- on paper -----------------------------------------------------------------------------------------------------

def count_parameters(config):
    """Of a GPTConfig: (all parameters, those of one layer's experts, those of its other matrices), with nothing built.

    Raises ValueError where that is more than can be counted.
    """
    try:
        with torch.device('meta'):
            one = GPT(replace(config, num_hidden_layers=1, layer_types=[FULL]))
    except RuntimeError as error:
        raise ValueError(f'a model of these sizes is too large for any machine ({error})') from error
    layer, = one.model.layers
    size = lambda module: sum(p.numel() for p in module.parameters())
    matrices = sum(p.numel() for p in layer.self_attn.parameters() if p.dim() == 2) + layer.mlp.router.weight.numel()
    return size(one) + (config.num_hidden_layers - 1) * size(layer), size(layer.mlp.experts), matrices


def training_memory(config, batch_size, block_size, bytes_per_value, muon, one_kernel, gpus=1, fsdp=False):
    """Bytes that training takes on each of so many devices: {parameters, gradients, optimizer, activations,
    communication}.

    Activations are what model.py's autograd keeps, uncompiled, at 2 or 4 bytes a value; one_kernel: experts by
    grouped_mm, not by the loop. Weights, gradients and moments are in fp32; DDP has all of them on every device.
    """
    c, tokens, value, parts = config, batch_size * block_size, bytes_per_value, gpus if fsdp else 1
    total, experts, matrices = count_parameters(c)
    # FSDP2 divides stacks by experts, so that a GPU has one at least; what is gathered has as many for every GPU
    most = -(-c.num_local_experts // parts) / c.num_local_experts
    L, D, I, V, k = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size, c.num_experts_per_tok
    heads, cast = c.num_attention_heads * (c.head_dim + 16), (value < 4) * value
    moved = L * (experts * D / (D + 1) + matrices) if muon else 0  # by Muon, roughly: not the experts' biases
    per_choice = 2 * D + 6 * I if one_kernel else 2 * I
    per_layer = tokens * (value * (4 * D + 5 * heads + k * per_choice) + 4 * (D + c.num_local_experts * (3 + k)))
    head = tokens * D * value + V * D * 4 + min(tokens * V, 2 ** 25) * (8 + value)  # dx, dw, a chunk of the logits
    casts = (L * matrices + V * D + (0 if fsdp else L * experts * one_kernel)) * cast  # kept for backward, all layers'
    gathered = 2 * (experts * most * parts * value + matrices * 4) + 2 * V * D * 4  # two layers whole, and the root
    kept = (total - L * experts) / parts + L * experts * most  # parameters
    muon_matrices, muon_works_on = moved * kept / total, min(moved, max(2 ** 28, 2 / 3 * experts)) * kept / total
    return dict(parameters=4 * kept, gradients=4 * kept, optimizer=8 * kept - 4 * muon_matrices,
                activations=max(L * per_layer + head + casts, 16 * muon_works_on),  # the one is over before the other
                communication=gathered if fsdp and gpus > 1 else 0)


def scale_rows(config, peak):
    """A row for each number of GPUs, under DDP and FSDP2: memory a GPU in GB, and tokens/s of all of them."""
    rows, (total, experts, _) = [], count_parameters(config)
    tokens = batch_size * block_size
    with torch.device('meta'):
        flops = GPT(config).flops_per_token(block_size)
    for gpus in (1, 8, 64, 512):
        for way in ('DDP', 'FSDP2'):
            if gpus == 1 and way == 'FSDP2':
                continue
            memory = training_memory(config, batch_size, block_size, 2, bool(muon_lr), True, gpus, way == 'FSDP2')
            need = sum(memory.values()) / 1e9
            compute = gradient_accumulation_steps * tokens * flops / (peak * assumed_mfu)
            # Experts travel in bf16, the rest and all gradients in fp32. DDP sends and receives each gradient twice,
            # once a step; FSDP2, for every batch, each weight for forward and for backward and each gradient.
            padded = gpus * -(-config.num_local_experts // gpus) / config.num_local_experts
            stacks = config.num_hidden_layers * experts
            weights, gradients = (4 * (total - stacks) + size * stacks * padded for size in (2, 4))
            sent = 8 * total if way == 'DDP' else gradient_accumulation_steps * (2 * weights + gradients)
            seconds = sent * (1 - 1 / gpus) / (1e9 * (nvlink if gpus <= 8 else network))
            rows.append(dict(GPUs=gpus, way=way if gpus > 1 else 'alone') | {key: n / 1e9 for key, n in memory.items()})
            rows[-1]['total'] = need
            if need <= gpu_memory:  # and of computing and sending, one is hidden behind the other
                speed = gpus * gradient_accumulation_steps * tokens / max(compute, seconds)
                rows[-1]['tokens_per_second'] = round(speed, -3)
    return rows


# --- one measurement, in a process of its own ---------------------------------------------------------------------

def build(job):
    """The model of a job: ours, or a peer of the same shape from transformers. All give (logits or None, loss)."""
    shape = job['shape']
    torch.manual_seed(job.get('seed', 0))
    if job['model'].startswith('ours'):
        return GPT(GPTConfig(**shape))
    if job['model'] == 'transformers GptOss':
        from transformers import GptOssConfig, GptOssForCausalLM
        shape = {key: value for key, value in shape.items() if key in GptOssConfig().to_dict()}
        return GptOssForCausalLM._from_config(GptOssConfig(**shape), experts_implementation=job['experts'])
    from transformers import GPT2Config, GPT2LMHeadModel
    dropout = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), shape.get('dropout', 0))
    return GPT2LMHeadModel._from_config(GPT2Config(
        vocab_size=shape['vocab_size'], n_embd=shape['hidden_size'], n_layer=shape['num_hidden_layers'],
        n_head=shape['num_attention_heads'], n_positions=job['block_size'] + job['new_tokens'], bos_token_id=0,
        eos_token_id=0, **dropout), attn_implementation='sdpa')


def peak_memory(device):
    """Bytes, at the highest."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def synchronize(device):
    if device != 'cpu':
        getattr(torch, device.partition(':')[0]).synchronize()


def timed(function, device, times):
    """Median seconds of calls of function."""
    seconds = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(job):
    """Run a job and return its numbers. It must be picklable and starts in a fresh process."""
    device, dtype = job['device'], getattr(torch, job['dtype'])
    kind, ours = device.partition(':')[0], job['model'].startswith('ours')
    model, result = build(job).to(device), {}
    B, T, vocab = job['batch_size'], job['block_size'], job['shape']['vocab_size']
    if job['part'] in ('train', 'forward'):
        training = job['part'] == 'train'
        run = torch.compile(model) if job['compile'] else model
        if ours:
            optimizer = model.configure_optimizers(1e-4, 0, (0.9, 0.95), 0.1)[0]
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(vocab, (B, T + 1), device=device)
        x, y = tokens[:, :-1], tokens[:, 1:]

        def step():
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(training):
                if ours:
                    loss = run(x, y, return_logits=False)[1]
                else:
                    logits = run(x, use_cache=False).logits.flatten(0, 1).float()
                    loss = torch.nn.functional.cross_entropy(logits, y.flatten())
            if training:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        for _ in range(2 if job['steps'] > 1 else 1):
            step()
        result['tokens_per_second'] = B * T / timed(step, device, job['steps'])
        result['memory'] = peak_memory(device)
        if ours and training and (peak := peak_flops(device, job['dtype'])):
            result['mfu'] = model.flops_per_token(T) * result['tokens_per_second'] / peak
    else:
        model = model.eval().to(dtype)
        prompt = torch.randint(vocab, (B, job['prompt_tokens']), device=device)

        def decode(new):
            if ours:
                model.generate(prompt, new, temperature=0, compile=job['compile'])
            else:
                model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

        step = lambda: decode(job['new_tokens'])
        for new in (8, 16, job['new_tokens']) if job['compile'] else (8,):  # compiled for one length, then for any
            decode(new)
        prefill = timed(lambda: decode(1), device, 5)
        if job['part'] == 'prefill':
            result['tokens_per_second'] = prompt.numel() / prefill
        else:
            result['tokens_per_second'] = B * (job['new_tokens'] - 1) / (timed(step, device, 2) - prefill)
        result['memory'] = peak_memory(device)
    if job['profile'] and job['part'] != 'prefill':
        with torch.profiler.profile() as profiler:
            step()
        table = profiler.key_averages()
        device_time = lambda event: event.self_cpu_time_total if kind == 'cpu' else event.self_device_time_total
        total = sum(map(device_time, table))
        matmuls = sum(device_time(event) for event in table if event.key in MATMULS or 'gemm' in event.key)
        result['matmul_share'] = matmuls / total
        print(f'{job["part"]}: matmuls take {matmuls / total:.0%} of the time')
        print(table.table(sort_by=f'self_{"cpu" if kind == "cpu" else "device"}_time_total', row_limit=15,
                          max_name_column_width=40))
    return result


MATMULS = ['aten::' + name for name in ('mm', 'addmm', 'bmm', 'baddbmm', '_grouped_mm', 'mkldnn_linear')]


def measure_prepare(job):
    """Tokenise a file of stories of this many megabytes with o200k_harmony: prepare.py from file to bins, or
    tiktoken's own encode_ordinary_batch on documents that are in memory already."""
    import tempfile
    import datasets  # noqa: F401  this and the encoder are loaded before the clock starts, for both
    import tiktoken
    import prepare
    encoder, size = tiktoken.get_encoding('o200k_harmony'), 0
    texts = (story for story, _ in prepare.builtin_stories(job['megabytes'], 0))
    with tempfile.TemporaryDirectory() as folder:
        if job['model'] == 'ours':
            file = Path(folder, 'stories.jsonl')
            with open(file, 'w') as lines:
                for text in texts:
                    lines.write(json.dumps(dict(text=text)) + '\n')
                    size += len(text.encode())
            vars(prepare).update(dataset=str(file), data_dir=folder)
            work = prepare.main
        else:
            texts = list(texts)
            size = sum(len(text.encode()) for text in texts)
            work = lambda: encoder.encode_ordinary_batch(texts, num_threads=os.cpu_count())  # as many as prepare.py's
        began = time.perf_counter()
        work()
        return dict(bytes_per_second=size / (time.perf_counter() - began), memory=peak_memory('cpu'))


def variants(shape):
    """The rows of --learn: what each changes, fields of GPTConfig and settings of train.py."""
    chosen, balances = shape['num_experts_per_tok'], (0.0, 0.01, 0.05, 0.3)
    return {
        # these two rates served best on shakespeare_char_cpu, of 1.5e-3, 3e-3, 6e-3 and 12e-3, for GPT-2 up to 6e-3
        'ours': {}, 'AdamW': dict(muon_lr=0.0, learning_rate=1.5e-3),
        'dense GPT-2': dict(model='transformers GPT-2', muon_lr=0.0, learning_rate=6e-3),
        'no sinks': dict(sinks=False), **{f'window {size}': dict(sliding_window=size) for size in (8, 32)},
        **{f'{number} experts': dict(num_local_experts=number) for number in (4, 8, 16)
           if chosen <= number != shape['num_local_experts']},
        # as wide as the chosen ones together, so that a token meets as many parameters
        '1 expert': dict(num_local_experts=1, num_experts_per_tok=1,
                         intermediate_size=chosen * shape['intermediate_size']),
        **{f'balance {weight}': dict(router_aux_loss_coef=weight) for weight in balances
           if weight != shape['router_aux_loss_coef']}}


def build_learner(job):
    """The model of a row of --learn on the job's device, its optimizers and their highest rates."""
    shape, ours, rates = job['shape'], job['model'] == 'ours', [job['learning_rate'], job['muon_lr']]
    if not ours:  # of the width that has our number of active parameters
        size = lambda width: build(job | dict(shape=shape | dict(hidden_size=width))).num_parameters()
        with torch.device('meta'):
            active, heads = GPT(GPTConfig(**shape)).num_parameters(active=True), shape['num_attention_heads']
            width = min(range(heads, 4 * shape['hidden_size'], heads), key=lambda width: abs(size(width) - active))
        job = job | dict(shape=shape | dict(hidden_size=width))
    model = build(job).to(job['device'])
    if not job['sinks']:
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e4)  # no share in the softmax, and so no gradient
    betas = job['beta1'], job['beta2']
    if ours:
        return model, model.configure_optimizers(*rates, betas, job['weight_decay']), rates
    matrices, rest = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices), dict(params=rest, weight_decay=0.0)]
    return model, [torch.optim.AdamW(groups, betas=betas, weight_decay=job['weight_decay'], fused=True)], rates


def measure_learning(job):
    """Train a model on the data of a job, and return what it learned and what that took.

    The loop is train.py's at its plainest, one for ours and for GPT-2: batches drawn at random, a linear schedule, no
    compiling, and a validation loss over the blocks of val.bin as they come.
    """
    import tempfile
    import numpy as np
    if importlib.util.find_spec('transformers'):
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401, in every process, for it counts as memory
    device, dtype, ours = job['device'], getattr(torch, job['dtype']), job['model'] == 'ours'
    B, T, job['new_tokens'] = job['batch_size'], job['block_size'], 0
    model, optimizers, rates = build_learner(job)
    meta = json.loads(Path(job['data_dir'], 'meta.json').read_text())
    tokens = {split: np.memmap(Path(job['data_dir'], f'{split}.bin'), meta['dtype'], 'r') for split in ('train', 'val')}

    def loss_of(split, starts):
        rows = np.stack([tokens[split][i:i + T + 1] for i in starts]).astype(np.int64)
        x, y = (part.to(device) for part in (torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])))
        with torch.autocast(device.partition(':')[0], dtype, enabled=dtype != torch.float32):
            if ours:
                hidden, balance = model.hidden_states(x)
                loss = LinearCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, y.flatten(),
                                                torch.tensor(y.numel(), device=y.device), model.training)
                return loss, model.config.router_aux_loss_coef * balance if model.training else None
            logits = model(x, use_cache=False).logits.flatten(0, 1).float()
            return torch.nn.functional.cross_entropy(logits, y.flatten()), 0.0

    model.train()
    rng, losses, seconds = np.random.default_rng(job['seed']), [], 0.0
    for step in range(job['max_iters']):
        began = time.perf_counter()
        done = max(0, step - job['warmup_iters']) / max(1, job['max_iters'] - job['warmup_iters'])
        share = min((step + 1) / (job['warmup_iters'] + 1), 1, (1 - done) / max(job['cooldown'], 1e-9))
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group['lr'] = rate * share
        loss, balancing = loss_of('train', rng.integers(len(tokens['train']) - T, size=B))
        (loss + balancing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job['grad_clip'] or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds += time.perf_counter() - began
    curve = [part.mean().item() for part in np.array_split(losses, min(100, len(losses)))]
    result = dict(curve=curve, train_loss=statistics.mean(curve[-5:]), memory=peak_memory(device))
    if ours:
        loads = torch.stack([layer.mlp.load for layer in model.model.layers]).double()
        result['busiest'] = (loads.amax(1) / loads.mean(1)).max().item()
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        starts = T * np.arange((len(tokens['val']) - 1) // T)  # all of the validation tokens
        batches = np.split(starts, range(B, len(starts), B))
        result['val_loss'] = sum(loss_of('val', batch)[0].item() * len(batch) for batch in batches) / len(starts)
        model.save_pretrained(folder)
        result['disk'] = sum(file.stat().st_size for file in Path(folder).glob('*.safetensors'))
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=device)
        options = dict(temperature=0) if ours else dict(do_sample=False, min_new_tokens=T - 1, pad_token_id=0)
        generate = lambda: model.generate(prompt, max_new_tokens=T - 1, **options)
        generate()
        result['generate_ms'] = 1e3 * timed(generate, device, 3) / (T - 1)
    result['train_us'] = 1e6 * seconds / (job['max_iters'] * B * T)
    result['active'] = model.num_parameters(active=True) if ours else model.num_parameters()
    return result


def write_random(shape, folder):
    """Write a checkpoint of this shape, experts in MXFP4, that never is in memory as a whole."""
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
        model.pack_experts()

    class Places(dict):
        def items(self):
            for name, place in super().items():
                if isinstance(place, MXFP4):
                    place = MXFP4(torch.randint(256, place.blocks.shape, dtype=torch.uint8),
                                  torch.randint(117, 121, place.scales.shape, dtype=torch.uint8))
                elif place.dim() == 1 or 'bias' in name:
                    place = torch.full(place.shape, float('norm' in name))
                else:
                    place = torch.randn(place.shape, dtype=torch.bfloat16).mul_(shape['initializer_range'])
                yield name, place

    places = Places(model.places())
    model.places = lambda: places
    model.save_pretrained(folder, torch.bfloat16, experts='mxfp4', shard_size=2e9)


def measure_checkpoint(job):
    """Load a checkpoint with its experts kept in MXFP4, all else in bf16, and generate."""
    device, vocab = job['device'], job['shape']['vocab_size']
    began = time.perf_counter()
    model = GPT.from_pretrained(job['folder'], torch.bfloat16, device, experts='mxfp4').eval()
    model.compute_dtype = getattr(torch, job['dtype'])
    synchronize(device)
    result = dict(load_s=time.perf_counter() - began, load_memory=peak_memory(device))
    prompt = torch.randint(vocab, (1, job['prompt_tokens']), device=device)
    result['prefill_s'] = timed(lambda: model.generate(prompt, 1, temperature=0), device, 1)
    stream = model.stream(prompt[:, :8], 4 + job['new_tokens'], temperature=0, compile=job['compile'])
    times = []
    for _ in stream:
        synchronize(device)
        times.append(time.perf_counter())
    result['tokens_per_second'] = 1 / statistics.median(b - a for a, b in zip(times[3:], times[4:]))
    result['memory'] = peak_memory(device)
    return result


# --- tables of measurements ---------------------------------------------------------------------------------------

SMALL = dict(num_local_experts=8, num_experts_per_tok=2, head_dim=64)
CHAR = SMALL | dict(vocab_size=128, num_hidden_layers=6, hidden_size=384, num_attention_heads=6,
                    num_key_value_heads=2, intermediate_size=384)
LONG = SMALL | dict(vocab_size=512, num_hidden_layers=2, hidden_size=128, num_attention_heads=2,
                    num_key_value_heads=1, intermediate_size=128)
PEERS = ['transformers GptOss', 'transformers GPT-2']
DECODERS = ['ours, compiled', 'ours', *PEERS]
WORKS = {  # what --compare measures, where `models` says so of others than ours and its peers
    'train char': dict(part='train', shape=CHAR, batch_size=16, block_size=256),
    'train 50k': dict(part='train', batch_size=8, block_size=512, steps=2, shape=SMALL | dict(
        vocab_size=50304, num_hidden_layers=8, hidden_size=512, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512)),
    'train 201k': dict(part='train', batch_size=4, block_size=512, steps=2, shape=SMALL | dict(
        vocab_size=201088, num_hidden_layers=6, hidden_size=384, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=384, tie_word_embeddings=True)),
    'decode 1': dict(part='decode', shape=CHAR, batch_size=1, models=DECODERS),
    'decode 8': dict(part='decode', shape=CHAR, batch_size=8, models=DECODERS),
    **{f'{part} {length}': dict(part=part, shape=LONG, batch_size=1, block_size=length, steps=1, compile=False,
                                models=['ours'])
       for part in ('forward', 'train') for length in (4096, 8192, 16384, 32768)},
    **{f'prepare {size} MB': dict(part='prepare', megabytes=size, models=['ours', 'tiktoken'])
       for size in (20, 80)},
}


def in_fresh_process(job):
    works = dict(prepare=measure_prepare, learn=measure_learning, checkpoint=measure_checkpoint)
    work = works.get(job['part'], measure)
    fresh = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
    context = multiprocessing.get_context(fresh)
    context.set_forkserver_preload(['torch._dynamo', 'model'])  # once, in the process that all others are copies of
    try:
        with ProcessPoolExecutor(1, context, keep_freed_memory) as pool:
            return pool.submit(work, job).result()
    except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
        config.fail(f'{job["model"]}, {job["part"]}: the memory here does not suffice ({type(error).__name__}); '
                    f'try a smaller --batch_size or --block_size')


def median_of_rounds(jobs):
    """The jobs in turn, as often as rounds says; the median of every number of each."""
    results = [[] for _ in jobs]
    for turn in range(rounds):
        for job, result in zip(jobs, results):
            try:
                result.append(in_fresh_process(job | dict(profile=job['profile'] and turn == 0)))
            except RuntimeError as error:  # no compiler for a compiled model, an operation that a peer lacks here
                print(f'{job["part"]}, {job["model"]}: failed: {str(error).strip().splitlines()[0]}', file=sys.stderr)
    return [result and {key: statistics.median(r[key] for r in result if key in r) for key in result[0]}
            for result in results]


def print_table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show = {'tokens_per_second': '{:,.1f}', 'memory': '{:.2f}', 'mfu': '{:.0%}', 'matmul_share': '{:.0%}',
            'ours_is': '{:.2f} x', 'bytes_per_second': '{:,.0f}', 'val_loss': '{:.3f}', 'train_loss': '{:.3f}',
            'spread': '{:.3f}', 'disk': '{:.1f}', 'active': '{:,.0f}', 'generate_ms': '{:.1f}', 'train_us': '{:.0f}',
            **dict.fromkeys('parameters gradients optimizer activations communication total'.split(), '{:,.1f}'),
            'busiest': '{:.2f}', 'load_s': '{:.1f}', 'prefill_s': '{:.1f}', 'load_memory': '{:.2f}'}
    head = {'tokens_per_second': 'tokens/s', 'memory': 'peak GB', 'ours_is': 'ours is', 'matmul_share': 'matmuls',
            'mfu': 'MFU', 'bytes_per_second': 'bytes/s', 'train_us': 'µs a token, training',
            'generate_ms': 'ms a token, generating', 'disk': 'MB on disk', 'active': 'active parameters',
            'load_s': 'loading, s', 'prefill_s': 'prefill, s', 'load_memory': 'peak GB, loading'}
    print('| ' + ' | '.join(head.get(c, c) for c in columns) + ' |\n|' + '---|' * len(columns))
    for row in rows:
        print('| ' + ' | '.join(show.get(c, '{}').format(row[c]) if c in row else '' for c in columns) + ' |')


def learning_rows(common):
    """A row for each chosen variant: means over the seeds, and the validation losses' spread, highest - lowest."""
    meta_file = Path(data_dir, 'meta.json')
    if not meta_file.exists():
        config.fail(f'{meta_file} is missing; make the data first, python prepare.py with the same config file')
    shape = {key: globals()[key] for key in GPTConfig.__dataclass_fields__}
    keys = 'learning_rate muon_lr beta1 beta2 weight_decay max_iters warmup_iters cooldown grad_clip'.split()
    common |= {key: globals()[key] for key in keys}
    common |= dict(part='learn', batch_size=batch_size, data_dir=data_dir, sinks=True)
    jobs, rows, curves = {}, [], {}
    try:
        meta = read_json(meta_file)
        shape['vocab_size'] = shape['vocab_size'] or meta['vocab_size']
        tokens, itemsize = [meta['train_tokens'], meta['val_tokens']], dict(uint16=2, uint32=4)[meta['dtype']]
        too_few = min(tokens) <= block_size + 1
        GPTConfig(**shape)
        for name, change in variants(shape).items():
            jobs[name] = common | change | dict(shape=shape | {key: change[key] for key in change if key in shape})
            GPTConfig(**jobs[name]['shape'])
        numbers = [config.convert('--seeds', number, 'int') for number in seeds.split(',')]
        bins = [Path(data_dir, f'{split}.bin') for split in ('train', 'val')]
        damaged = [path for path, number in zip(bins, tokens)
                   if not path.exists() or path.stat().st_size != number * itemsize]
    except (KeyError, TypeError) as error:
        config.fail(f'{meta_file} is not what prepare.py writes ({type(error).__name__}: {error}); prepare again')
    except (ValueError, OSError) as error:
        config.fail(error)
    if damaged:
        config.fail(f'{damaged[0]} is missing or not of the size that meta.json tells; prepare again')
    if too_few or max_iters < 1:
        config.fail(f'--learn wants max_iters of at least 1, and more data than one block ({block_size} tokens)')
    if common['dtype'] == 'float16':
        config.fail('--learn does not scale its loss, as float16 needs; take --dtype=float32 or bfloat16')
    chosen = list(jobs) if works == 'all' else works.split(',')
    if unknown := [name for name in chosen if name not in jobs]:
        config.fail(f'works has {", ".join(unknown)}; there are {", ".join(jobs)}')
    if importlib.util.find_spec('transformers') is None and 'dense GPT-2' in chosen:
        print('transformers is not installed, so there is no dense GPT-2: pip install transformers')
        chosen.remove('dense GPT-2')
    for name in chosen:
        results = [in_fresh_process(jobs[name] | dict(seed=number)) for number in numbers]
        curves[name] = [statistics.mean(losses) for losses in zip(*(result.pop('curve') for result in results))]
        row = dict(row=name) | {key: statistics.mean(result[key] for result in results) for key in results[0]}
        row['spread'] = max(r['val_loss'] for r in results) - min(r['val_loss'] for r in results)
        row['memory'] /= 1e9
        row['disk'] /= 1e6
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        if plot_file:
            draw(curves)
    return rows


def draw(curves):
    try:
        import matplotlib
    except ImportError:
        return print(f'(no {plot_file}: pip install matplotlib)')
    matplotlib.use('agg')
    from matplotlib import pyplot
    pyplot.figure(figsize=(8, 5))
    for name, losses in curves.items():
        tokens = [(i + 1) / len(losses) * max_iters * batch_size * block_size for i in range(len(losses))]
        pyplot.plot(tokens, losses, label=name, linewidth=1)
    pyplot.gca().set(xlabel='tokens', ylabel='training loss (nats a token)', yscale='log')
    pyplot.legend()
    try:
        pyplot.savefig(plot_file, dpi=120)
    except OSError as error:
        print(f'(no {plot_file}: {error})')
    pyplot.close()


def main():
    where, kind = pick_device(device, dtype)
    for key in 'rounds steps prompt_tokens new_tokens decode_batch batch_size block_size'.split():
        if globals()[key] < (least := 2 if key == 'new_tokens' else 1):
            config.fail(f'{key} is {globals()[key]}; it must be at least {least}')
    use_compile = where.startswith('cuda') if compile is None else compile
    common = dict(device=where, dtype=kind, compile=use_compile, steps=steps, profile=profile,
                  prompt_tokens=prompt_tokens, new_tokens=new_tokens, block_size=block_size,
                  model='ours', experts='grouped_mm')
    rows = []
    if scale:
        shape = {key: globals()[key] for key in GPTConfig.__dataclass_fields__}
        if not (peak := next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)):
            config.fail(f'gpu is {gpu!r}; there are {", ".join(PEAK_FLOPS)}')
        for key in 'assumed_mfu gpu_memory nvlink network gradient_accumulation_steps batch_size block_size'.split():
            if not 0 < globals()[key] <= (most := 1 if key == 'assumed_mfu' else 1e9):
                config.fail(f'{key} is {globals()[key]}; it must be above 0 and at most {most:g}')
        try:
            rows = scale_rows(GPTConfig(**shape | dict(vocab_size=shape['vocab_size'] or 1024)), peak)
        except ValueError as error:
            config.fail(error)
        print(f'on paper: {gpu}, {gpu_memory:g} GB, {assumed_mfu:.0%} of {peak / 1e12:.0f} TFLOP/s; {nvlink:g} GB/s '
              f'within a node, {network:g} between; {gradient_accumulation_steps} x {batch_size} x {block_size} '
              'tokens a GPU and step; memory in GB\n')
        return print_table(rows)
    if learn:
        rows = learning_rows(common)
    elif compare:
        chosen = WORKS if works == 'all' else {name: WORKS.get(name) for name in works.split(',')}
        if None in chosen.values():
            config.fail(f'works is {works!r}; there are {", ".join(WORKS)}')
        try:
            import transformers  # noqa: F401
        except ImportError:
            print('transformers is not installed, so ours stands alone: pip install transformers')
            PEERS.clear()
            DECODERS[2:] = []
        for name, work in chosen.items():
            jobs = [common | work | dict(model=model) for model in work.get('models', ['ours', *PEERS])]
            if work['part'] == 'decode':
                for job in jobs:
                    job['compile'] = job['model'] == 'ours, compiled'
                    if where == 'cpu' and job['model'] in PEERS:
                        job['dtype'] = 'float32'  # faster for GptOss than bf16: 71 against 46 tokens/s, 154 against 117
            results = median_of_rounds(jobs)
            for job, result in zip(jobs, results):
                if not result:
                    continue
                rows.append(dict(work=name, model=job['model'], dtype=job['dtype'], **result))
                speed = next(key for key in result if key.endswith('_per_second'))
                if results[0] and not job['model'].startswith('ours'):
                    rows[-1]['ours_is'] = results[0][speed] / result[speed]
                rows[-1]['memory'] /= 1e9
                print(rows[-1], file=sys.stderr, flush=True)
    else:
        shape = {key: globals()[key] for key in GPTConfig.__dataclass_fields__}
        if not {*parts.split(',')} <= {'train', 'prefill', 'decode'}:
            config.fail(f'parts is {parts!r}; it takes train, prefill and decode, divided by commas')
        try:
            if not shape['vocab_size']:  # the data's, as in train.py, if the data is there
                meta = Path(data_dir, 'meta.json')
                shape['vocab_size'] = read_json(meta).get('vocab_size') if meta.exists() else 1024
            GPTConfig(**shape)
        except ValueError as error:
            config.fail(error)
        if checkpoint:
            try:
                if not Path(checkpoint).exists():
                    print(f'writing {checkpoint} ...', file=sys.stderr)
                    write_random(shape, checkpoint)
                if not Path(checkpoint, 'config.json').exists():
                    config.fail(f'{checkpoint} is not a whole checkpoint; remove it, or name another')
                found = vars(read_config(Path(checkpoint, 'config.json')))
            except (ValueError, OSError) as error:
                config.fail(error)
            if other := [key for key in shape if key.startswith(('num_', 'hidden', 'inter', 'vocab')) and
                         shape[key] != found[key]]:
                config.fail(f'{checkpoint} is there and has {other[0]} = {found[other[0]]}, not {shape[other[0]]}')
            os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # as in sample.py
            job = common | dict(part='checkpoint', shape=shape, folder=checkpoint, profile=False)
            result, = median_of_rounds([job])
            if not result:
                sys.exit(1)
            size = sum(file.stat().st_size for file in Path(checkpoint).glob('*.safetensors'))
            rows.append(dict(disk=size / 1e6) | result)
            rows[0] |= {key: rows[0][key] / 1e9 for key in ('load_memory', 'memory')}
        for part in [] if checkpoint else parts.split(','):
            print(f'measuring {part} ...', file=sys.stderr)
            batch = batch_size if part == 'train' else decode_batch
            result, = median_of_rounds([common | dict(part=part, shape=shape, batch_size=batch)])
            if not result:
                sys.exit(1)
            rows.append(dict(part=part, **result))
            rows[-1]['memory'] /= 1e9
    cpu = platform.processor() or platform.machine()
    machine = (torch.cuda.get_device_name(where) if where.startswith('cuda')
               else f'{torch.get_num_threads()} threads of {cpu}')
    print(f'\n{machine}, torch {torch.__version__}, {kind}{", compiled" if use_compile and not learn else ""}, '
          + (f'means over the seeds {seeds}\n' if learn else f'median of {rounds}\n'))
    print_table(rows)
    if json_file:
        numbers = dict(machine=machine, torch=torch.__version__, dtype=kind, rows=rows)
        try:
            Path(json_file).write_text(json.dumps(numbers, indent=2) + '\n')
        except OSError as error:
            config.fail(f'cannot write {json_file}: {error}')


if __name__ == '__main__':
    settings, _ = config.read(__file__, model=True, also='train.py')
    globals().update(settings)
    main()
