"""
Measure how fast a config trains and generates on this machine, and how much memory that takes.

    python bench.py                                                         # the default model
    python bench.py config/tinystories.py --batch_size=8 --profile
    python bench.py --compare                                               # beside transformers' GptOss and GPT-2
    python bench.py config/shakespeare_char_cpu.py --learn --max_iters=400  # losses and costs beside a dense GPT-2
    python bench.py config/gpt_oss_20b.py --block_size=2048 --scale         # an estimate for 8 to 512 GPUs

Each figure is the median of several rounds, each a fresh process with a peak memory of its own. The rows take turns.
"""

import config  # first: it sets up OpenMP and makes Ctrl-C quiet

import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from model import GPT, GPTConfig

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
profile = False  # print which operators take the time, in the first round of each row
json_file = 'bench.json'  # gets the numbers; empty: no file
# the machine
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 or float32; auto: bfloat16 where the device is fast in it
compile: bool | None = None  # torch.compile for train and decode; None: on cuda only
# the model; the other fields of GPTConfig keep their defaults
vocab_size = 0  # 0: the vocabulary of the tokenizer in data_dir, or 1024 without data
hidden_size = 128
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
router_aux_loss_coef = 0.05
# training
data_dir = 'data/builtin'  # what prepare.py wrote
batch_size = 16  # sequences in a batch
block_size = 256  # tokens in a sequence
gradient_accumulation_steps = 1  # batches in an optimizer step; --scale alone uses it
max_iters = 340  # optimizer steps of --learn
learning_rate = 8e-3  # peak learning rate of AdamW
muon_lr = 0.007  # peak learning rate of Muon; 0: AdamW trains all parameters
muon_interval = 1  # Muon moves every n-th step
warmup_iters = 30  # steps of linear warm-up
weight_decay = 0.1  # of matrices
# the GPUs of --scale
gpu = 'H100'  # a name in config/__init__.py's table of peak FLOP/s
gpu_memory = 80.0  # GB
assumed_mfu = 0.4  # part of the peak FLOP/s that computing reaches
nvlink = 300.0  # GB/s from a GPU to the others of its node of eight
network = 40.0  # GB/s from a GPU to other nodes
# -----------------------------------------------------------------------------
POSITIVE = ('rounds steps prompt_tokens new_tokens decode_batch batch_size block_size gradient_accumulation_steps '
            'max_iters muon_interval gpu_memory assumed_mfu nvlink network').split()
NO_DATA = dict(vocab_size=1024, dtype='', train_tokens=0, val_tokens=0)
MODELS = {'ours, compiled': 'ours', 'ours': 'ours', 'transformers GptOss': 'GptOss', 'transformers GPT-2': 'GPT-2'}
CHAR = dict(vocab_size=128, hidden_size=384, intermediate_size=384, num_attention_heads=6, num_key_value_heads=2)
WIDE = dict(vocab_size=50304, hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4,
            num_hidden_layers=8)
TIED = CHAR | dict(vocab_size=201088, tie_word_embeddings=True)
WORKS = {  # of --compare; the rest of a shape is GPTConfig's default: 6 layers, 8 experts, 2 of them for each token
    'train char': dict(part='train', shape=CHAR, batch_size=16, block_size=256),
    'train 50k': dict(part='train', shape=WIDE, batch_size=8, block_size=512),
    'train 201k': dict(part='train', shape=TIED, batch_size=4, block_size=512),
    'decode 1': dict(part='decode', shape=CHAR, decode_batch=1),
    'decode 8': dict(part='decode', shape=CHAR, decode_batch=8)}


def build(job):
    """The model of a job in fp32, on the job's device and in training mode, and its optimizers."""
    config.pick_device(job.device, job.dtype)  # on a CPU it makes malloc of this process keep freed memory
    torch.manual_seed(job.seed)
    if job.compare or job.learn:  # ours too, or the memory of the library would count against the peers alone
        from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM
    c = GPTConfig(**job.shape)
    if job.model == 'ours':
        model = GPT(c)
    elif job.model == 'GptOss':
        peer = GptOssConfig(**{key: value for key, value in vars(c).items() if key in GptOssConfig().to_dict()})
        model = GptOssForCausalLM._from_config(peer, experts_implementation='grouped_mm')  # its fastest
    else:
        peer = GPT2Config(
            vocab_size=c.vocab_size, n_embd=c.hidden_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
            n_positions=max(job.block_size, job.prompt_tokens + job.new_tokens), bos_token_id=0, eos_token_id=0,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.attention_dropout)
        model = GPT2LMHeadModel._from_config(peer, attn_implementation='sdpa')
    model = model.to(job.device).train()
    betas, decay = (0.9, 0.95), job.weight_decay
    if job.model == 'ours':
        return model, model.configure_optimizers(job.learning_rate, job.muon_lr, betas, decay, job.muon_interval)
    return model, [torch.optim.AdamW(model.parameters(), job.learning_rate, betas, weight_decay=decay, fused=True)]


def loss_of(model, rows, job):
    """The loss of predicting tokens 1 to T of rows (B, T + 1), in the job's precision."""
    with torch.autocast(rows.device.type, getattr(torch, job.dtype), enabled=job.dtype != 'float32'):
        if job.model == 'ours':
            return model(rows[:, :-1], rows[:, 1:], return_logits=False)[1]
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train_step(model, optimizers, rows, job):
    """One optimizer step on rows (B, T + 1). Returns the loss, a tensor."""
    loss = loss_of(model, rows, job)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def generate(model, prompt, new, job):
    """Continue a prompt greedily by `new` tokens."""
    if job.model == 'ours':
        return model.generate(prompt, new, temperature=0, compile=job.compile)
    return model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)


def peak_memory(device):
    """The most memory that this process has used, in GB: of the GPU on cuda, of the whole process elsewhere."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9


def timed(function, device, calls):
    """The mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if not device.startswith('cpu'):
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / calls


def measure(job):
    """Speed and peak memory of train, prefill or decode on random tokens, and the MFU of train."""
    (model, optimizers), training, decoding = build(job), job.part == 'train', job.part == 'decode'
    B, T, device = job.batch_size if training else job.decode_batch, job.block_size, job.device
    rows = torch.randint(job.shape['vocab_size'], (B, T + 1 if training else job.prompt_tokens), device=device)
    new = 1 + job.new_tokens if decoding else 1
    call = lambda: train_step(model, optimizers, rows, job) if training else generate(model, rows, new, job)
    if not training:
        model.to(getattr(torch, job.dtype)).eval()
    elif job.compile:
        model.compile()
    timed(call, device, 2)  # these allocate memory and compile
    tokens, seconds = B * T if training else rows.numel(), timed(call, device, job.steps)
    if decoding:
        tokens, seconds = B * job.new_tokens, seconds - timed(lambda: generate(model, rows, 1, job), device, job.steps)
    result = {'tokens/s': tokens / seconds, 'peak GB': peak_memory(device)}
    if job.profile and job.seed == 0:
        with torch.profiler.profile() as profiler:
            call()
        by = 'self_cpu_time_total' if device == 'cpu' else 'self_device_time_total'
        print(job.part, profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40), sep='\n')
    if training and job.model == 'ours':  # without a data sheet the peak is that of a large matmul
        a = torch.ones(4096, 4096, dtype=getattr(torch, job.dtype), device=device)
        peak = config.peak_flops(device, job.dtype) or 2 * 4096 ** 3 / timed(lambda: a @ a, device, 2)
        result['MFU'] = model.flops_per_token(T) * result['tokens/s'] / peak
    return result


def measure_learning(job):
    """Train on the tokens of data_dir. Returns the cross-entropy in nats, and the costs of training and generating."""
    model, optimizers = build(job)
    B, T, rng, losses, seconds = job.batch_size, job.block_size, np.random.default_rng(job.seed), [], []
    train, val = (np.memmap(Path(job.data_dir, f'{split}.bin'), job.data_dtype, 'r') for split in ('train', 'val'))

    def batch(data, starts):
        return torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64)).to(job.device)

    def schedule(step):  # a linear warm-up, and a linear fall to zero over the last 70 % of the run
        return min(1, (step + 1) / (job.warmup_iters + 1), (1 - step / job.max_iters) / 0.7)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    for _ in range(job.max_iters):
        start = time.perf_counter()
        loss = train_step(model, optimizers, batch(train, rng.integers(len(train) - T, size=B)), job)
        if job.model == 'ours':
            loss -= model.config.router_aux_loss_coef * model.balance
        losses.append(loss.item())
        for scheduler in schedulers:
            scheduler.step()
        seconds.append(time.perf_counter() - start)
    memory, blocks = peak_memory(job.device), np.arange(0, len(val) - T, T)
    model.eval()
    with torch.no_grad():
        batches = np.split(blocks, range(B, len(blocks), B))
        val_loss = sum(len(starts) * loss_of(model, batch(val, starts), job).item() for starts in batches) / len(blocks)
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=job.device)
        generating = timed(lambda: generate(model, prompt, T - 1, job), job.device, 3) / (T - 1)
    return {'val loss': val_loss, 'train loss': statistics.mean(losses[-50:]), 'peak GB': memory,
            'MB of weights': sum(p.nbytes for p in model.parameters()) / 1e6,
            'µs/token training': 1e6 * statistics.median(seconds) / (B * T), 'ms/token generating': 1e3 * generating}


def compare_jobs(common):
    """The jobs of --compare: every work by each implementation. All train with AdamW."""
    jobs = []
    for name, work in WORKS.items():
        decoding = work['part'] == 'decode'
        for title in list(MODELS)[0 if decoding else 1:]:
            job = common | work | dict(model=MODELS[title], muon_lr=0.0, steps=2)
            if decoding:
                job['compile'] = title == 'ours, compiled'
            if decoding and job['device'] == 'cpu' and job['model'] != 'ours':
                job['dtype'] = 'float32'  # GptOss decodes 154 tokens/s in fp32 and 117 in bf16
            jobs.append(job | dict(cells={'row': name, 'model': title, 'dtype': job['dtype']}))
    return jobs


def learn_jobs(common):
    """The jobs of --learn. All parameters of the dense GPT-2 are about as many as our active ones."""
    c, T = GPTConfig(**common['shape']), common['block_size']
    L, heads, active = c.num_hidden_layers, c.num_attention_heads, GPT(c).num_parameters(active=True)
    sizes = {D: 12 * L * D ** 2 + (c.vocab_size + T + 13 * L + 2) * D for D in range(heads, 65536, heads)}
    width = min(sizes, key=lambda D: abs(sizes[D] - active))
    common |= dict(work=measure_learning, part='learn', compile=False, prompt_tokens=1, new_tokens=T - 1)
    rows = [  # both learning rates are the best of 1.5e-3, 3e-3 and 6e-3 on config/shakespeare_char_cpu.py
        ('ours', active, {}),
        ('ours, AdamW', active, dict(muon_lr=0.0, learning_rate=1.5e-3)),
        ('dense GPT-2', sizes[width], dict(model='GPT-2', learning_rate=6e-3, shape=vars(c) | dict(hidden_size=width)))]
    return [common | change | dict(cells={'row': name, 'active parameters': size}) for name, size, change in rows]


def median_of_rounds(jobs):
    """Run each job once in every round, in turn. Returns a row for each: the medians of its numbers."""
    context, results, rows = multiprocessing.get_context('forkserver'), [[] for _ in jobs], []
    context.set_forkserver_preload(['model'])
    for turn in range(jobs[0]['rounds']):
        for job, found in zip(jobs, results):
            print(f'round {turn + 1}', *job['cells'].values(), end=': ', file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, context) as pool:
                found.append(pool.submit(job['work'], SimpleNamespace(**job, seed=turn)).result())
            print(found[-1], file=sys.stderr)
    for job, found in zip(jobs, results):
        row = job['cells'] | {key: statistics.median(result[key] for result in found) for key in found[0]}
        if job['part'] == 'learn':
            losses = [result['val loss'] for result in found]
            row['highest - lowest'] = max(losses) - min(losses)
        elif job['model'] != 'ours':  # the first row of a work is ours
            row['ours is'] = next(other['tokens/s'] for other in rows if other['row'] == row['row']) / row['tokens/s']
        rows.append(row)
    return rows


def scale_rows(s, shape, peak):
    """Rough estimates of the memory of a GPU in GB, without buffers of Muon and the loss, and of all GPUs' tokens/s."""
    c, rows = GPTConfig(**shape), []
    D, I, L, k, E = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_experts_per_tok, c.num_local_experts
    with torch.device('meta'):
        model = GPT(c)
    total, experts = model.num_parameters() / 1e9, L * E * (3 * D * I + 2 * I + D) / 1e9
    tokens, batches = s.batch_size * s.block_size, s.gradient_accumulation_steps
    # the 2-byte values that autograd keeps of a token and layer, fitted to its counts: norms, attention, chosen experts
    values = 16 * D + 4 * c.num_attention_heads * c.head_dim + k * (2 * D + 6 * I)
    sizes = (8, 1), (8, 8), (64, 1), (64, 8), (64, 64), (512, 1), (512, 8), (512, 128)
    for (gpus, shard_size), recompute in itertools.product(sizes, (False, True)):
        held, gathered = total / shard_size, min(1, 2 / L) if shard_size > 1 else 1  # two layers at a time
        moments = 8 * held - (4 * experts / shard_size if s.muon_lr else 0)  # Muon has one, AdamW two
        memory = {'weights': 4 * held, 'gradients': 4 * held, 'moments': moments, 'bf16 copies': 2 * total * gathered,
                  'activations': 2 * tokens * (L * D + values if recompute else L * values) / 1e9}
        row = {'GPUs': gpus, 'shard_size': shard_size, 'recompute': recompute, **memory, 'total': sum(memory.values())}
        if row['total'] <= s.gpu_memory:
            # in a copy, for each batch: bf16 weights twice, fp32 gradients once; between copies, once a step: gradients
            flops, batch = batches * tokens * model.flops_per_token(s.block_size), 8 * total * (1 - 1 / shard_size)
            times = dict(compute=flops * (4 / 3 if recompute else 1) / (peak * s.assumed_mfu),
                         shards=batch * batches / (s.nvlink if shard_size <= 8 else s.network),
                         copies=8 * held * (1 - shard_size / gpus) / (s.nvlink if gpus <= 8 else s.network))
            row['tokens/s'] = gpus * batches * tokens / (max(times['compute'], times['shards']) + times['copies'])
            row['bound by'] = max(times, key=times.get)
        rows.append(row)
    return rows


def print_table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print('|', ' | '.join(columns), '|\n|' + '---|' * len(columns))
    for row in rows:
        cells = [row.get(column, '') for column in columns]
        cells = [f'{x:,.{0 if x >= 100 else 3}f}' if isinstance(x, float) else str(x) for x in cells]
        print('|', ' | '.join(cells), '|')


def main(settings):
    settings['device'], settings['dtype'] = config.pick_device(settings['device'], settings['dtype'])
    s, meta_file = SimpleNamespace(**settings), Path(settings['data_dir'], 'meta.json')
    meta = NO_DATA | (json.loads(meta_file.read_text()) if meta_file.exists() else {})
    shape = {key: settings[key] for key in GPTConfig.__dataclass_fields__}
    shape['vocab_size'] = s.vocab_size or meta['vocab_size']
    for wrong, message in (
            *((type(value) in (int, float) and (value < 0 or value == 0 and key in POSITIVE),
               f'{key} is {value}, which is too small') for key, value in settings.items()),
            (s.gpu not in config.PEAK_TFLOPS, f'gpu is {s.gpu!r}; use {", ".join(config.PEAK_TFLOPS)}'),
            (s.learn and min(meta['train_tokens'], meta['val_tokens']) <= s.block_size,
             f'{s.data_dir} has no data for block_size = {s.block_size}; run prepare.py with the same config'),
            (s.learn and shape['vocab_size'] < meta['vocab_size'], 'vocab_size is below the vocabulary of data_dir'),
            (s.learn and s.dtype == 'float16', '--learn does not scale the loss; use --dtype=float32 or bfloat16')):
        if wrong:
            config.fail(message)
    common = settings | dict(work=measure, model='ours', shape=shape, data_dtype=meta['dtype'])
    common['compile'] = s.device.startswith('cuda') if s.compile is None else s.compile
    if s.scale:
        rows = scale_rows(s, shape, config.PEAK_TFLOPS[s.gpu] * 1e12)
    else:
        jobs = compare_jobs(common) if s.compare else learn_jobs(common) if s.learn else [
            common | dict(part=part, cells={'row': part}) for part in ('train', 'prefill', 'decode')]
        names = list(dict.fromkeys(job['cells']['row'] for job in jobs))
        chosen = set((s.works if s.compare or s.learn else s.parts).split(','))
        if unknown := chosen - {'all', *names}:
            config.fail(f'there is no row {", ".join(unknown)}; there are {", ".join(names)}')
        rows = median_of_rounds([job for job in jobs if {job['cells']['row'], 'all'} & chosen])
    machine = torch.cuda.get_device_name() if s.device.startswith('cuda') else f'{torch.get_num_threads()} CPU threads'
    print(title := f'estimate for {s.gpu}' if s.scale else f'{machine}, torch {torch.__version__}, {s.dtype}')
    print_table(rows)
    if s.json_file:
        Path(s.json_file).write_text(json.dumps(dict(title=title, rows=rows), indent=2) + '\n')


if __name__ == '__main__':
    try:
        main(config.read(__file__, model=True)[0])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        config.fail(error)
