"""
Measure how fast a config trains and generates on this machine, and how much memory that takes.

    python bench.py                                                  # the default model
    python bench.py config/tinystories.py --batch_size=8 --profile
    python bench.py --compare                                        # beside transformers' GptOss and GPT-2
    python bench.py config/shakespeare_char_cpu.py --learn --max_iters=400    # losses beside a dense GPT-2
    python bench.py config/gpt_oss_20b.py --block_size=2048 --scale  # an estimate for 8 to 512 GPUs

Each figure is the median of several rounds. A round measures all rows in turn, each in a fresh process with a
peak memory of its own. The process gets a job: all settings, with what the row changes in them.
"""

import config  # first, because it sets how OpenMP waits before torch loads it
from config import check, explain_torch, fail_on

import ctypes
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import GPT, GPTConfig, read_json

# -----------------------------------------------------------------------------
# what to measure
parts = 'train,prefill,decode'  # the rows without --compare, --learn or --scale, separated by commas
compare = False  # training and decoding of fixed models, beside GptOss and GPT-2 of transformers
learn = False  # train the config's model on data_dir, and a dense GPT-2 of equal active parameters
scale = False  # estimate memory and speed of training on many GPUs
works = 'all'  # the rows of --compare or --learn, separated by commas
rounds = 3  # fresh processes for each row; each has its own seed
steps = 5  # training steps, or generations, that are timed in a round, after two that are not
prompt_tokens = 64  # length of the prompt for prefill and decode
new_tokens = 256  # tokens to decode
decode_batch = 1  # sequences to prefill or decode together
compile: bool | None = None  # torch.compile for train and decode; None: on cuda only
profile = False  # print which operators take the time, in the first round of each row
json_file = 'bench.json'  # gets the numbers; empty: no file
# the GPUs of --scale
gpu = 'H100'  # a name in config/__init__.py's table of peak FLOP/s
gpu_memory = 80.0  # GB
assumed_mfu = 0.4  # part of the peak FLOP/s that computing reaches
nvlink = 300.0  # GB/s from a GPU to the others of its node of eight
network = 40.0  # GB/s from a GPU to other nodes
# -----------------------------------------------------------------------------
OF_TRAIN = '''data_dir batch_size block_size gradient_accumulation_steps max_iters learning_rate muon_lr
              warmup_iters cooldown weight_decay beta1 beta2 grad_clip device dtype'''.split()
MODELS = {'ours, compiled': 'ours', 'ours': 'ours',
          'transformers GptOss': 'GptOss', 'transformers GPT-2': 'GPT-2'}
CHAR = GPTConfig(vocab_size=128, hidden_size=384, intermediate_size=384, num_attention_heads=6)
WIDE = GPTConfig(vocab_size=50304, hidden_size=512, intermediate_size=512, num_attention_heads=8,
                 num_key_value_heads=4, num_hidden_layers=8)
TIED = replace(CHAR, vocab_size=201088, tie_word_embeddings=True)
WORKS = {  # of --compare, by each of MODELS
    'train char': dict(part='train', shape=CHAR, batch_size=16, block_size=256),
    'train 50k': dict(part='train', shape=WIDE, batch_size=8, block_size=512),
    'train 201k': dict(part='train', shape=TIED, batch_size=4, block_size=512),
    'decode 1': dict(part='decode', shape=CHAR, decode_batch=1),
    'decode 8': dict(part='decode', shape=CHAR, decode_batch=8)}


def build_model(job):
    """The model of a job in fp32, on its device and in training mode, and its optimizers."""
    config.pick_device(job.device, job.dtype)  # on a CPU it makes malloc of this process keep freed memory
    torch.manual_seed(job.seed)
    if job.compare or job.learn:  # ours too, or the memory of the library would count against the peers alone
        from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM
    c = job.shape
    options = dict(betas=(job.beta1, job.beta2), weight_decay=job.weight_decay)
    if job.model == 'ours':
        model = GPT(c).to(job.device)
        return model, model.configure_optimizers(job.learning_rate, job.muon_lr, **options)
    if job.model == 'GptOss':
        known = GptOssConfig().to_dict()
        peer = GptOssConfig(**{key: value for key, value in vars(c).items() if key in known})
        model = GptOssForCausalLM._from_config(peer, experts_implementation='grouped_mm')  # its fastest
    else:
        peer = GPT2Config(
            vocab_size=c.vocab_size, n_embd=c.hidden_size, n_layer=c.num_hidden_layers, bos_token_id=0,
            n_head=c.num_attention_heads, n_positions=max(job.block_size, job.prompt_tokens + job.new_tokens),
            eos_token_id=0, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.attention_dropout)
        model = GPT2LMHeadModel._from_config(peer, attn_implementation='sdpa')
    model = model.to(job.device).train()
    return model, [torch.optim.AdamW(model.parameters(), job.learning_rate, fused=True, **options)]


def compute_loss(model, rows, job):
    """The loss of predicting tokens 1 to T of rows (B, T + 1), in the job's precision."""
    with torch.autocast(rows.device.type, getattr(torch, job.dtype), enabled=job.dtype != 'float32'):
        if job.model == 'ours':
            return model(rows[:, :-1], rows[:, 1:], return_logits=False)[1]
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train_step(model, optimizers, rows, job):
    """One optimizer step on rows (B, T + 1). Returns the loss, a tensor."""
    loss = compute_loss(model, rows, job)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def generate(model, prompt, count, job):
    """Continue a prompt greedily by this many tokens."""
    if job.model == 'ours':
        return model.generate(prompt, count, temperature=0, compile=job.compile)
    return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)


def measure_time(device, calls, function, *arguments):
    """The mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    if not device.startswith('cpu'):
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / calls


def measure_memory(device):
    """The most memory that this process has used, in GB: on cuda that of the GPU, elsewhere all of it."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if hasattr(ctypes, 'windll'):  # Windows: the second word of PROCESS_MEMORY_COUNTERS is PeakWorkingSetSize
        counters = (ctypes.c_size_t * 9)()
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, ctypes.sizeof(counters))
        return counters[1] / 1e9
    import resource  # not on Windows
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure_speed(job):
    """Speed and peak memory of train, prefill or decode on random tokens, and the MFU of train."""
    model, optimizers = build_model(job)
    training = job.part == 'train'
    size = (job.batch_size, job.block_size + 1) if training else (job.decode_batch, job.prompt_tokens)
    rows = torch.randint(job.shape.vocab_size, size, device=job.device)
    prefill = generate, model, rows, 1, job
    if training:
        tokens = job.batch_size * job.block_size
        call = train_step, model, optimizers, rows, job
    elif job.part == 'prefill':
        tokens = job.decode_batch * job.prompt_tokens
        call = prefill
    else:
        tokens = job.decode_batch * job.new_tokens
        call = generate, model, rows, 1 + job.new_tokens, job
    if not training:
        model.to(getattr(torch, job.dtype)).eval()
    elif job.compile:
        model.compile()
    measure_time(job.device, 2, *call)  # these allocate memory and compile
    seconds = measure_time(job.device, job.steps, *call)
    if job.part == 'decode':
        seconds -= measure_time(job.device, job.steps, *prefill)
    result = {'tokens/s': tokens / seconds, 'peak GB': measure_memory(job.device)}
    if job.profile and job.seed == 0:
        with torch.profiler.profile() as profiler:
            measure_time(job.device, 1, *call)
        order = 'self_cpu_time_total' if job.device == 'cpu' else 'self_device_time_total'
        print(job.part)
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    if training and job.model == 'ours':
        peak = config.peak_flops(job.device, job.dtype)
        if peak is None:  # no data sheet: that of a large matmul
            a = torch.ones(4096, 4096, dtype=getattr(torch, job.dtype), device=job.device)
            peak = 2 * 4096 ** 3 / measure_time(job.device, 2, torch.matmul, a, a)
        result['MFU'] = model.flops_per_token(job.block_size) * result['tokens/s'] / peak
    return result


def open_tokens(split, job):
    """The tokens of a split of data_dir, more than block_size."""
    path = Path(job.data_dir, f'{split}.bin')
    with fail_on((OSError, ValueError), f' ({path}); run prepare.py with the same config'):
        tokens = np.memmap(path, job.token_dtype, 'r')
    T = job.block_size
    check(len(tokens) > T, f'{path} has {len(tokens)} tokens; lower --block_size ({T})')
    return tokens


def cut_rows(tokens, starts, job):
    """The rows (B, T + 1) of tokens that begin at these places."""
    rows = np.stack([tokens[start:start + job.block_size + 1] for start in starts])
    return torch.from_numpy(rows.astype(np.int64)).to(job.device)


def measure_learning(job):
    """Train on the tokens of data_dir. Returns losses in nats, and the costs of training and generating.

    The loop is simpler than train.py's: a row begins anywhere, and all its tokens are targets, in chats too.
    A step has one batch. The schedule is the linear one, down to zero. Steps that are not finite count too.
    """
    model, optimizers = build_model(job)
    tokens = open_tokens('train', job)
    rng = np.random.default_rng(job.seed)
    losses = []
    seconds = []
    for step in range(job.max_iters):
        began = time.perf_counter()
        warmup = (step + 1) / (job.warmup_iters + 1)
        done = (step - job.warmup_iters) / max(1, job.max_iters - job.warmup_iters)
        rate = min(1, warmup, (1 - done) / max(job.cooldown, 1e-9))
        for optimizer, peak in zip(optimizers, (job.learning_rate, job.muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = peak * rate
        starts = rng.integers(len(tokens) - job.block_size, size=job.batch_size)
        loss = train_step(model, optimizers, cut_rows(tokens, starts, job), job)
        if job.model == 'ours':
            loss -= model.config.router_aux_loss_coef * model.balance
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    memory = measure_memory(job.device)
    val_loss = evaluate(model.eval(), job)
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=job.device)
    generating = measure_time(job.device, 3, generate, model, prompt, job.new_tokens, job) / job.new_tokens
    return {'val loss': val_loss, 'train loss': statistics.mean(losses[-50:]), 'peak GB': memory,
            'MB of weights': sum(p.nbytes for p in model.parameters()) / 1e6,
            'µs/token training': 1e6 * statistics.median(seconds) / (job.batch_size * job.block_size),
            'ms/token generating': 1e3 * generating}


@torch.no_grad()
def evaluate(model, job):
    """The mean cross-entropy of the validation tokens, in rows that do not overlap."""
    tokens = open_tokens('val', job)
    starts = np.arange(0, len(tokens) - job.block_size, job.block_size)
    total = 0
    for i in range(0, len(starts), job.batch_size):
        rows = cut_rows(tokens, starts[i:i + job.batch_size], job)
        total += len(rows) * compute_loss(model, rows, job).item()
    return total / len(starts)


def list_compare_jobs(common):
    """The jobs of --compare. All train with AdamW."""
    jobs = []
    for name, work in WORKS.items():
        for title, model in MODELS.items():
            job = common | work | dict(model=model, muon_lr=0.0, steps=2)
            if work['part'] == 'decode':
                job['compile'] = title == 'ours, compiled'
                if job['device'] == 'cpu' and model != 'ours':
                    job['dtype'] = 'float32'  # GptOss decodes 154 tokens/s in fp32 and 117 in bf16
            elif title == 'ours, compiled':
                continue
            jobs.append(job | dict(cells={'row': name, 'model': title, 'dtype': job['dtype']}))
    return jobs


def list_learn_jobs(common):
    """The jobs of --learn. All parameters of the dense GPT-2 are about as many as our active ones."""
    c = common['shape']
    T = common['block_size']
    L = c.num_hidden_layers
    with torch.device('meta'):
        active = GPT(c).num_parameters(active=True)
    sizes = {}
    for D in range(c.num_attention_heads, 65536, c.num_attention_heads):
        sizes[D] = 12 * L * D ** 2 + (c.vocab_size + T + 13 * L + 2) * D
    width = min(sizes, key=lambda D: abs(sizes[D] - active))
    common |= dict(part='learn', compile=False, prompt_tokens=1, new_tokens=T - 1)
    # both learning rates are the best of 1.5e-3, 3e-3 and 6e-3 on config/shakespeare_char_cpu.py
    adamw = dict(muon_lr=0.0, learning_rate=1.5e-3)
    dense = dict(model='GPT-2', learning_rate=6e-3, shape=replace(c, hidden_size=width))
    return [common | dict(cells={'row': 'ours', 'active parameters': active}),
            common | adamw | dict(cells={'row': 'ours, AdamW', 'active parameters': active}),
            common | dense | dict(cells={'row': 'dense GPT-2', 'active parameters': sizes[width]})]


def choose_jobs(settings):
    """The jobs that --works or --parts names."""
    common = vars(settings) | dict(model='ours')
    chosen = settings.works.split(',')
    if settings.compare:
        jobs = list_compare_jobs(common)
    elif settings.learn:
        jobs = list_learn_jobs(common)
    else:
        chosen = settings.parts.split(',')
        jobs = [common | dict(part=part, cells={'row': part}) for part in ('train', 'prefill', 'decode')]
    rows = list(dict.fromkeys(job['cells']['row'] for job in jobs))
    unknown = [name for name in chosen if name not in (*rows, 'all')]
    check(not unknown, f'there is no row {", ".join(unknown)}; there are {", ".join(rows)}')
    return [job for job in jobs if 'all' in chosen or job['cells']['row'] in chosen]


def run_jobs(jobs):
    """Run each job once in every round, in turn. Returns a row for each: what it is, and its medians."""
    context = multiprocessing.get_context('spawn')
    if 'forkserver' in multiprocessing.get_all_start_methods():  # faster, but not on Windows
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['model'])
    results = [[] for _ in jobs]
    for turn in range(jobs[0]['rounds']):
        for job, found in zip(jobs, results):
            print(f'round {turn + 1}', *job['cells'].values(), end=': ', file=sys.stderr, flush=True)
            function = measure_learning if job['part'] == 'learn' else measure_speed
            with ProcessPoolExecutor(1, context) as pool:
                found.append(pool.submit(function, SimpleNamespace(**job, seed=turn)).result())
            print(found[-1], file=sys.stderr)
    rows = []
    for job, found in zip(jobs, results):
        row = dict(job['cells'])
        for key in found[0]:
            row[key] = statistics.median(result[key] for result in found)
        if job['part'] == 'learn':
            losses = [result['val loss'] for result in found]
            row['highest - lowest'] = max(losses) - min(losses)
        elif job['model'] != 'ours':
            same_work = [other for other in rows if other['row'] == row['row']]
            row['ours is'] = same_work[0]['tokens/s'] / row['tokens/s']  # the first row of a work is ours
        rows.append(row)
    return rows


def estimate(s, model, gpus, shard_size, recompute):
    """A row of --scale: roughly a GPU's memory in GB, without buffers of Muon and the loss, and the speed."""
    c = model.config
    D, I, L, k = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_experts_per_tok
    total = model.num_parameters() / 1e9
    kept = total / shard_size
    experts = L * c.num_local_experts * (3 * D * I + 2 * I + D) / 1e9
    batches = s.gradient_accumulation_steps
    tokens = s.batch_size * s.block_size
    # the 2-byte values that autograd keeps of a token and layer, fitted to its counts
    values = 16 * D + 4 * c.num_attention_heads * c.head_dim  # of norms and attention
    values += k * (2 * D + 6 * I)  # of the chosen experts
    memory = {
        'weights': 4 * kept, 'gradients': 4 * kept,
        'moments': 8 * kept - (4 * experts / shard_size if s.muon_lr else 0),  # Muon has one, AdamW two
        'bf16 copies': 2 * total * (min(1, 2 / L) if shard_size > 1 else 1),  # two layers at a time
        'activations': 2 * tokens * (L * D + values if recompute else L * values) / 1e9}
    row = {'GPUs': gpus, 'shard_size': shard_size, 'recompute': recompute, **memory}
    row['total'] = sum(memory.values())
    if row['total'] <= s.gpu_memory:
        flops = batches * tokens * model.flops_per_token(s.block_size) * (4 / 3 if recompute else 1)
        in_copy = 8 * total * (1 - 1 / shard_size) * batches  # bf16 weights twice, fp32 gradients once
        between = 8 * kept * (1 - shard_size / gpus)  # gradients, once a step
        seconds = {
            'compute': flops / (config.PEAK_TFLOPS[s.gpu] * 1e12 * s.assumed_mfu),
            'shards': in_copy / (s.nvlink if shard_size <= 8 else s.network),
            'copies': between / (s.nvlink if gpus <= 8 else s.network)}
        step = max(seconds['compute'], seconds['shards']) + seconds['copies']
        row['tokens/s'] = gpus * batches * tokens / step
        row['bound by'] = max(seconds, key=seconds.get)
    return row


def print_table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print('|', ' | '.join(columns), '|\n|' + '---|' * len(columns))
    for row in rows:
        cells = [row.get(column, '') for column in columns]
        for i, cell in enumerate(cells):
            if isinstance(cell, float):
                cells[i] = f'{cell:,.0f}' if cell >= 100 else f'{cell:,.3f}'
        print('|', ' | '.join(map(str, cells)), '|')


def read_settings():
    """All settings, with the model's shape, and the dtype of the tokens in data_dir."""
    values, _ = config.read(__file__, model=True, also=OF_TRAIN)
    s = SimpleNamespace(**values)
    positive = {*config.declared('bench.py'), 'batch_size', 'block_size', 'max_iters',
                'gradient_accumulation_steps'}
    for key, value in values.items():
        if type(value) in (int, float):
            check(value > 0 or value == 0 and key not in positive, f'{key} is {value}, which is too small')
    s.device, s.dtype = config.pick_device(s.device, s.dtype)
    s.compile = s.device.startswith('cuda') if s.compile is None else s.compile
    meta = dict(vocab_size=1024, dtype='')  # without data
    meta_file = Path(s.data_dir, 'meta.json')
    with fail_on((OSError, ValueError)):
        if meta_file.exists():
            meta = read_json(meta_file)
            check(meta.get('dtype') in ('uint16', 'uint32') and type(meta.get('vocab_size')) is int,
                  f'{meta_file} is damaged; run prepare.py again')
        fields = {key: values[key] for key in GPTConfig.__dataclass_fields__}
        s.shape = GPTConfig(**fields | dict(vocab_size=s.vocab_size or meta['vocab_size']))
    s.token_dtype = meta['dtype']
    longest = s.block_size
    if not s.learn and not s.scale:
        longest = max(longest, s.prompt_tokens + s.new_tokens)
    most = s.max_position_embeddings
    check(longest <= most, f'{longest} tokens exceed max_position_embeddings ({most})')
    check(max(s.beta1, s.beta2) < 1, 'beta1 and beta2 must be below 1')
    check(s.gpu in config.PEAK_TFLOPS, f'gpu is {s.gpu!r}; use {", ".join(config.PEAK_TFLOPS)}')
    if s.learn:
        check(s.token_dtype, f'{s.data_dir} has no data; run prepare.py with the same config')
        open_tokens('train', s)
        open_tokens('val', s)
        check(s.shape.vocab_size >= meta['vocab_size'], 'vocab_size is below the vocabulary of data_dir')
        check(s.dtype != 'float16', '--learn does not scale the loss; use --dtype=float32 or bfloat16')
    return s


def main():
    s = read_settings()
    if s.scale:
        title = f'estimate for {s.gpu}'
        with torch.device('meta'):
            model = GPT(s.shape)
        rows = []
        for gpus, shard_size in (8, 1), (8, 8), (64, 1), (64, 8), (64, 64), (512, 1), (512, 8), (512, 128):
            rows.append(estimate(s, model, gpus, shard_size, recompute=False))
            rows.append(estimate(s, model, gpus, shard_size, recompute=True))
    else:
        machine = f'{torch.get_num_threads()} CPU threads'
        if s.device.startswith('cuda'):
            machine = torch.cuda.get_device_name(s.device)
        title = f'{machine}, torch {torch.__version__}, {s.dtype}'
        advice = 'try a smaller model or --batch_size'
        with explain_torch(advice), fail_on(BrokenExecutor, f' If memory was too small, {advice}'), \
                fail_on(ImportError, '; pip install -r requirements-dev.txt'):
            rows = run_jobs(choose_jobs(s))
    with fail_on(OSError):
        print(title)
        print_table(rows)
        if s.json_file:
            Path(s.json_file).write_text(json.dumps(dict(title=title, rows=rows), indent=2) + '\n')


if __name__ == '__main__':
    main()
