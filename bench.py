"""
Measure how fast a config trains and generates on this machine, and how much memory that takes.

    python bench.py                                                  # the default model
    python bench.py config/tinystories.py --batch_size=8 --profile
    python bench.py --compare                                        # beside transformers' GptOss and GPT-2
    python bench.py config/shakespeare_char_cpu.py --learn --max_iters=400    # losses beside a dense GPT-2
    python bench.py config/gpt_oss_20b.py --block_size=2048 --scale  # an estimate for 8 to 512 GPUs
"""

import config  # first: it sets variables that libraries read
from config import check, explain_torch, fail_on

import ctypes
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import GPT, GPTConfig, read_json, write_json

# -----------------------------------------------------------------------------
# what to measure
parts = 'train,prefill,decode'  # rows without --compare, --learn or --scale
compare = False  # fixed models, beside GptOss and GPT-2 of transformers
learn = False  # train on data_dir, beside a dense GPT-2 of equal active parameters
scale = False  # estimate memory and speed of training on many GPUs
works = 'all'  # rows of --compare or --learn, separated by commas
rounds = 3  # fresh processes for each row, with a seed each
steps = 5  # timed steps or generations in a round, after two others
prompt_tokens = 64  # length of the prompts
new_tokens = 256  # tokens to decode
decode_batch = 1  # sequences to prefill or decode together
compile: bool | None = None  # torch.compile for train and decode; None: on cuda only
profile = False  # print which operators take the time in the first round
json_file = 'bench.json'  # gets the numbers; empty: no file
# the GPUs of --scale
gpu = 'H100'  # a name in config.PEAK_TFLOPS
gpu_memory = 80.0  # GB
assumed_mfu = 0.4  # part of the peak FLOP/s that is reached
nvlink = 300.0  # GB/s from a GPU to others in its node of 8
network = 40.0  # GB/s from a GPU to other nodes
# -----------------------------------------------------------------------------
POSITIVE = 'batch_size', 'block_size', 'gradient_accumulation_steps', 'max_iters'
OF_TRAIN = '''data_dir learning_rate muon_lr warmup_iters cooldown weight_decay beta1 beta2 grad_clip
              device dtype'''.split()
CHAR = GPTConfig(vocab_size=128, hidden_size=384, intermediate_size=384, num_attention_heads=6)
TIED = GPTConfig(**vars(CHAR) | dict(vocab_size=201088, tie_word_embeddings=True))
WIDE = GPTConfig(vocab_size=50304, hidden_size=512, intermediate_size=512, num_attention_heads=8,
                 num_key_value_heads=4, num_hidden_layers=8)
COMPARE = {  # the rows of --compare, for each of MODELS
    'train char': dict(part='train', shape=CHAR, batch_size=16, block_size=256),
    'train 50k': dict(part='train', shape=WIDE, batch_size=8, block_size=512),
    'train 201k': dict(part='train', shape=TIED, batch_size=4, block_size=512),
    'decode 1': dict(part='decode', shape=CHAR, decode_batch=1),
    'decode 8': dict(part='decode', shape=CHAR, decode_batch=8)}
PEERS = {'transformers GptOss': dict(model='GptOss'), 'transformers GPT-2': dict(model='GPT-2')}
MODELS = dict(train={'ours': {}, **PEERS},
              decode={'ours, compiled': dict(compile=True), 'ours': dict(compile=False), **PEERS})
# the rows of --learn. The rates are the best of 1.5e-3, 3e-3 and 6e-3 on config/shakespeare_char_cpu.py
LEARN = {'ours': {}, 'ours, AdamW': dict(muon_lr=0.0, learning_rate=1.5e-3),
         'dense GPT-2': dict(model='GPT-2', learning_rate=6e-3)}


def build_model(job):
    """The model of a job in fp32, on its device and in training mode, and its optimizers."""
    config.pick_device(job.device, job.dtype)  # for its effect on malloc
    torch.manual_seed(job.seed)
    c = job.shape
    options = dict(betas=(job.beta1, job.beta2), weight_decay=job.weight_decay)
    if job.compare or job.learn:  # ours too: the library takes memory
        from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM
    if job.model == 'ours':
        model = GPT(c).to(job.device)
        return model, model.configure_optimizers(job.learning_rate, job.muon_lr, **options)
    if job.model == 'GptOss':
        peer = GptOssConfig(**vars(c))
        model = GptOssForCausalLM._from_config(peer, experts_implementation='grouped_mm')  # its fastest
    else:
        width = match_width(c, job.block_size) if job.learn else c.hidden_size
        peer = GPT2Config(
            vocab_size=c.vocab_size, n_embd=width, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
            n_positions=max(job.block_size, job.prompt_tokens + job.new_tokens), bos_token_id=0,
            eos_token_id=0, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.attention_dropout)
        model = GPT2LMHeadModel._from_config(peer, attn_implementation='sdpa')
    model = model.to(job.device).train()
    return model, [torch.optim.AdamW(model.parameters(), job.learning_rate, fused=True, **options)]


def match_width(c, T):
    """The width of a GPT-2 with about as many parameters as our model has active ones."""
    with torch.device('meta'):
        active = GPT(c).num_parameters(active=True)
    L = c.num_hidden_layers
    widths = range(c.num_attention_heads, 65536, c.num_attention_heads)
    return min(widths, key=lambda D: abs(12 * L * D ** 2 + (c.vocab_size + T + 13 * L + 2) * D - active))


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
    torch.nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip or float('inf'))
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def generate(model, prompt, count, job):
    """Continue a prompt greedily by this many tokens."""
    if job.model == 'ours':
        return model.generate(prompt, count, temperature=0, compile=job.compile)
    lengths = dict(max_new_tokens=count, min_new_tokens=count)
    return model.generate(prompt, **lengths, do_sample=False, pad_token_id=0)


def measure_time(job, calls, function, *arguments):
    """The mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    if not job.device.startswith('cpu'):
        torch.accelerator.synchronize(job.device)
    return (time.perf_counter() - start) / calls


def measure_memory(job):
    """The most memory that this process has used, in GB: on cuda that of the GPU, elsewhere all of it."""
    if job.device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(job.device) / 1e9
    if sys.platform == 'win32':
        counters = (ctypes.c_size_t * 9)()  # PROCESS_MEMORY_COUNTERS; 1 is the peak
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
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
    calls = dict(train=(train_step, model, optimizers, rows, job),
                 prefill=(generate, model, rows, 1, job),
                 decode=(generate, model, rows, 1 + job.new_tokens, job))
    tokens = dict(train=job.block_size, prefill=job.prompt_tokens, decode=job.new_tokens)  # of a row
    if not training:
        model.to(getattr(torch, job.dtype)).eval()
    elif job.compile:
        model.compile()
    measure_time(job, 2, *calls[job.part])  # these allocate and compile
    seconds = measure_time(job, job.steps, *calls[job.part])
    if job.part == 'decode':
        seconds -= measure_time(job, job.steps, *calls['prefill'])
    speed = len(rows) * tokens[job.part] / seconds
    result = {'tokens/s': speed, 'peak GB': measure_memory(job)}
    if job.profile and job.seed == 0:
        with torch.profiler.profile() as profiler:
            measure_time(job, 1, *calls[job.part])
        order = 'self_cpu_time_total' if job.device == 'cpu' else 'self_device_time_total'
        print(job.part, profiler.key_averages().table(order, row_limit=15), sep='\n')
    if training and job.model == 'ours':
        peak = config.peak_flops(job.device, job.dtype)
        if not peak:  # no data sheet: a large matmul's
            a = torch.ones(4096, 4096, dtype=getattr(torch, job.dtype), device=job.device)
            peak = 2 * 4096 ** 3 / measure_time(job, 2, torch.matmul, a, a)
        result['MFU'] = model.flops_per_token(job.block_size) * speed / peak
    return result


def open_rows(split, job):
    """All rows of block_size + 1 tokens in a split of data_dir, as a view: row i begins at token i."""
    path = Path(job.data_dir, f'{split}.bin')
    with fail_on((OSError, ValueError), f' ({path}); run prepare.py with the same config'):
        tokens = np.memmap(path, job.token_dtype, 'r')
    check(len(tokens) > job.block_size, f'{path} has {len(tokens)} tokens; lower --block_size')
    return np.lib.stride_tricks.sliding_window_view(tokens, job.block_size + 1)


def measure_learning(job):
    """Train on the tokens of data_dir. Returns losses in nats, and the costs of training and generating.
    The loop is simpler than train.py's: a row begins anywhere, and all its tokens are targets, in chats too.
    A step has one batch. The schedule is the linear one, to zero. Steps that are not finite count too."""
    model, optimizers = build_model(job)
    rows = open_rows('train', job)
    rng = np.random.default_rng(job.seed)
    losses = []
    seconds = []
    for step in range(job.max_iters):
        began = time.perf_counter()
        done = (step - job.warmup_iters) / max(1, job.max_iters - job.warmup_iters)
        rate = min(1, (step + 1) / (job.warmup_iters + 1), (1 - done) / max(job.cooldown, 1e-9))
        for optimizer, peak in zip(optimizers, (job.learning_rate, job.muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = peak * rate
        batch = rows[rng.integers(len(rows), size=job.batch_size)].astype(np.int64)
        loss = train_step(model, optimizers, torch.from_numpy(batch).to(job.device), job)
        if job.model == 'ours':
            loss -= model.config.router_aux_loss_coef * model.balance
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    active = model.num_parameters(active=True) if job.model == 'ours' else model.num_parameters()
    result = {'active parameters': active, 'MB of weights': sum(p.nbytes for p in model.parameters()) / 1e6,
              'train loss': statistics.mean(losses[-50:]), 'peak GB': measure_memory(job),
              'µs/token training': 1e6 * statistics.median(seconds) / (job.batch_size * job.block_size)}
    model.eval()
    rows = open_rows('val', job)[::job.block_size]  # they do not overlap
    total = 0
    with torch.no_grad():
        for i in range(0, len(rows), job.batch_size):
            batch = torch.from_numpy(rows[i:i + job.batch_size].astype(np.int64)).to(job.device)
            total += len(batch) * compute_loss(model, batch, job).item()
    result['val loss'] = total / len(rows)
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=job.device)
    generating = measure_time(job, 3, generate, model, prompt, job.new_tokens, job)
    return result | {'ms/token generating': 1e3 * generating / job.new_tokens}


def list_jobs(s):
    """The jobs that --works or --parts names. Their `cells` say in the table what a row is."""
    jobs = []
    if s.compare:
        for name, work in COMPARE.items():
            for title, changes in MODELS[work['part']].items():
                job = work | changes | dict(muon_lr=0.0, steps=2, dtype=s.dtype)
                if work['part'] == 'decode' and title in PEERS and s.device == 'cpu':
                    job['dtype'] = 'float32'  # GptOss: 154 tokens/s, in bf16 117
                job['cells'] = dict(row=name, model=title, dtype=job['dtype'])
                jobs.append(job)
    elif s.learn:
        of_all = dict(part='learn', compile=False, prompt_tokens=1, new_tokens=s.block_size - 1)
        jobs = [of_all | changes | dict(cells=dict(row=name)) for name, changes in LEARN.items()]
    else:
        jobs = [dict(part=part, cells=dict(row=part)) for part in ('train', 'prefill', 'decode')]
    names = dict.fromkeys(job['cells']['row'] for job in jobs)
    chosen = (s.works if s.compare or s.learn else s.parts).split(',')
    unknown = [name for name in chosen if name not in (*names, 'all')]
    check(not unknown, f'there is no row {", ".join(unknown)}; there are {", ".join(names)}')
    jobs = [job for job in jobs if 'all' in chosen or job['cells']['row'] in chosen]
    return [vars(s) | dict(model='ours') | job for job in jobs]


def run_jobs(jobs):
    """Run each job once in every round, in turn. Returns a row for each: what it is, and its medians."""
    context = multiprocessing.get_context('spawn' if sys.platform == 'win32' else 'forkserver')
    context.set_forkserver_preload(['model'])
    results = [[] for _ in jobs]
    for turn in range(jobs[0]['rounds']):
        for job, found in zip(jobs, results):
            print(f'round {turn + 1}', *job['cells'].values(), end=': ', file=sys.stderr, flush=True)
            measure = measure_learning if job['part'] == 'learn' else measure_speed
            with ProcessPoolExecutor(1, context) as pool:
                found.append(pool.submit(measure, SimpleNamespace(**job, seed=turn)).result())
            print(found[-1], file=sys.stderr)
    rows = []
    for job, found in zip(jobs, results):
        row = job['cells'] | {key: statistics.median(result[key] for result in found) for key in found[0]}
        if job['part'] == 'learn':
            row['highest - lowest'] = float(np.ptp([result['val loss'] for result in found]))
        elif job['model'] != 'ours':
            ours = next(other for other in rows if other['row'] == row['row'])  # the first
            row['ours is'] = ours['tokens/s'] / row['tokens/s']
        rows.append(row)
    return rows


def estimate(s, model, gpus, shard_size, recompute):
    """A row of --scale: roughly a GPU's memory in GB, without buffers of Muon and the loss, and the speed."""
    c = model.config
    D, I, L, k = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_experts_per_tok
    total = model.num_parameters() / 1e9
    kept = total / shard_size
    experts = L * c.num_local_experts * (3 * D * I + 2 * I + D) / 1e9
    tokens = s.batch_size * s.block_size
    # the 2-byte values that autograd keeps of a token and layer, fitted to its counts
    values = 16 * D + 4 * c.num_attention_heads * c.head_dim + k * (2 * D + 6 * I)
    memory = {
        'weights': 4 * kept, 'gradients': 4 * kept,
        'moments': 8 * kept - (4 * experts / shard_size if s.muon_lr else 0),  # Muon has one, AdamW two
        'bf16 copies': 2 * total * (min(1, 2 / L) if shard_size > 1 else 1),  # two layers at a time
        'activations': 2 * tokens * (L * D + values if recompute else L * values) / 1e9}
    row = dict(GPUs=gpus, shard_size=shard_size, recompute=recompute, **memory, total=sum(memory.values()))
    if row['total'] <= s.gpu_memory:
        batches = s.gradient_accumulation_steps
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


def read_settings():
    """All settings, with the model's shape, and the dtype of the tokens in data_dir."""
    s = SimpleNamespace(**config.read(__file__, model=True, also=[*POSITIVE, *OF_TRAIN])[0])
    positive = {*POSITIVE, *config.declared('bench.py')}
    for key, value in vars(s).items():
        if type(value) in (int, float):
            check(value > 0 or value == 0 and key not in positive, f'{key} is {value}, too small')
    s.device, s.dtype = config.pick_device(s.device, s.dtype)
    if s.compile is None:
        s.compile = s.device.startswith('cuda')
    meta_file = Path(s.data_dir, 'meta.json')
    with fail_on((OSError, ValueError)):
        meta = read_json(meta_file) if meta_file.exists() else dict(vocab_size=1024, dtype='')
        good = meta.get('dtype') in ('uint16', 'uint32', '') and type(meta.get('vocab_size')) is int
        check(good, f'{meta_file} is damaged; run prepare.py again')
        s.vocab_size = s.vocab_size or meta['vocab_size']
        s.shape = GPTConfig(**{key: getattr(s, key) for key in GPTConfig.__dataclass_fields__})
    s.token_dtype = meta['dtype']
    longest = max(s.block_size, 0 if s.learn or s.scale else s.prompt_tokens + s.new_tokens)
    check(longest <= s.max_position_embeddings, f'{longest} tokens exceed max_position_embeddings')
    check(max(s.beta1, s.beta2) < 1, 'beta1 and beta2 must be below 1')
    check(s.gpu in config.PEAK_TFLOPS, f'gpu is {s.gpu!r}; use {", ".join(config.PEAK_TFLOPS)}')
    check(s.compare + s.learn + s.scale < 2, 'give one of --compare, --learn and --scale')
    if s.learn:
        check(s.token_dtype, f'{s.data_dir} has no data; run prepare.py')
        open_rows('train', s)
        open_rows('val', s)
        check(s.shape.vocab_size >= meta['vocab_size'], 'vocab_size is below that of data_dir')
        check(s.dtype != 'float16', '--learn needs --dtype=float32 or bfloat16')
    return s


def main():
    s = read_settings()
    if s.scale:
        title = f'estimate for {s.gpu}'
        with torch.device('meta'):
            model = GPT(s.shape)
        layouts = (8, 1), (8, 8), (64, 1), (64, 8), (64, 64), (512, 1), (512, 8), (512, 128)
        rows = [estimate(s, model, *layout, recompute) for layout in layouts for recompute in (False, True)]
    else:
        machine = f'{torch.get_num_threads()} CPU threads'
        if s.device.startswith('cuda'):
            machine = torch.cuda.get_device_name(s.device)
        title = f'{machine}, torch {torch.__version__}, {s.dtype}'
        advice = 'try a smaller model or --batch_size'
        with explain_torch(advice), fail_on(BrokenExecutor, f' If memory was too small, {advice}'), \
                fail_on(ImportError, '; pip install -r requirements-dev.txt'):
            rows = run_jobs(list_jobs(s))
    with fail_on(OSError):
        columns = dict.fromkeys(key for row in rows for key in row)
        print(title, '| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns), sep='\n')
        for row in rows:
            cells = [row.get(column, '') for column in columns]
            for i, cell in enumerate(cells):
                if isinstance(cell, float):
                    cells[i] = f'{cell:,.0f}' if cell >= 100 else f'{cell:,.3f}'
            print('|', ' | '.join(map(str, cells)), '|')
        if s.json_file:
            write_json(Path(s.json_file), dict(title=title, rows=rows))


if __name__ == '__main__':
    main()
