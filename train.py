"""
Train a GPT-OSS. Without arguments it makes up a corpus of small stories and learns it, in minutes on a CPU:

    python train.py
    python train.py config/tinystories.py --batch_size=32
    python train.py --out_dir=out --init_from=resume
    python train.py --init_from=openai/gpt-oss-20b --data_dir=data/chats --lora_rank=8 --out_dir=out-chats
    torchrun --standalone --nproc_per_node=8 train.py config/gpt_oss_500m.py

Under torchrun each of 8 processes takes every eighth batch of a step, so the losses are those of one process.
Every setting below is a flag, and so is every field of GPTConfig in model.py. --help lists them all.
"""

import config  # first, because it sets how OpenMP waits before torch loads it
from config import check, explain_torch, fail_on

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from filelock import FileLock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton
from tqdm.auto import tqdm

from model import (GPT, GPTConfig, find_checkpoint, open_file, put_in_place, read_json, read_shape,
                   remove_folder, save_file, write_json)

# -----------------------------------------------------------------------------
# files
out_dir = 'out'  # gets the checkpoints best/ and last/, metrics.jsonl and loss.png
data_dir = 'data/builtin'  # what prepare.py wrote; the default is made on first use
init_from = 'scratch'  # scratch, resume (the run in out_dir, if any), or the folder or hub id of a checkpoint
overwrite = False  # replace the run in out_dir
eval_only = False  # print the loss of init_from over the whole validation set, and end
# fine-tuning
lora_rank = 0  # train adapters of this rank on attention and experts, not the model; 0: the whole model
lora_alpha = 16.0  # the output of an adapter is scaled by lora_alpha / lora_rank
base = ''  # folder or hub id of the model of adapters, in place of the one that they name
experts = ''  # mxfp4: with lora_rank, keep the frozen experts at four bits a value
# batches
batch_size = 16  # sequences that go through the model together
block_size = 256  # tokens in a sequence
gradient_accumulation_steps = 1  # batches in an optimizer step; a multiple of the number of processes
# the model's shape
vocab_size = 0  # 0: that of the tokenizer
hidden_size = 128
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
sliding_window = 16  # with gpt-oss's 128, some seeds learn later
router_aux_loss_coef = 0.05
# optimizers and schedule
max_iters = 380  # optimizer steps in the whole run
learning_rate = 8e-3  # peak rate of AdamW; by default lower for a model that is loaded, see choose_rates
muon_lr = 0.007  # of Muon, which updates the matrices of the layers; 0: AdamW updates them too
min_lr = 0.0  # rate of AdamW at the end; Muon's falls in proportion
warmup_iters = 30  # steps of linear warm-up
lr_schedule = 'linear'  # after it: cosine, linear (flat, then down over the cooldown) or constant
cooldown = 0.7  # fraction of the steps after the warm-up over which the linear schedule falls
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # decay of the mean gradient, for AdamW and Muon
beta2 = 0.95  # decay of the mean squared gradient of AdamW
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# reports
eval_interval = 100  # steps between evaluations; each writes a checkpoint
eval_iters = 10  # validation batches, the same each time; 0: the whole validation set
keep_every = 0  # keep a copy of every n-th checkpoint, without the moments, as step-NUMBER/; 0: none
log_interval = 10  # steps between rows of metrics.jsonl
start = 'Once upon a time'  # start of the sample at the end; empty: the end-of-text token
sample_tokens = 400  # length of that sample; 0: none
wandb_log = False  # log to Weights & Biases too
wandb_project = 'nano-gpt-oss'  # its project
wandb_run_name = ''  # its name of the run; empty: out_dir
# machine
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 (with loss scaling), float32, on CUDA tf32; auto: the first that is fast
compile: bool | None = None  # torch.compile; None: on cuda with Triton, for runs of over 1e16 FLOPs a GPU
recompute = False  # activation checkpointing: less memory for a third more time
fsdp = False  # under torchrun: shard weights, gradients and moments over the processes
shard_size = 0  # with fsdp: processes that share one copy of them; 0: those of a node
seed = 1  # of weights, batches and dropout
# -----------------------------------------------------------------------------
# asked: all settings, before a checkpoint is looked at. given: those that a file or a flag named. settings,
# below: the final ones, in which a resumed run and a loaded model replace what was not given.
asked, names = config.read(__file__, model=True)
given = {key: asked[key] for key in names}

# --- processes: this one, or those that torchrun started ----------------------------------------------------

advice = 'try --recompute=True, or halve --batch_size and double --gradient_accumulation_steps'
distributed = 'RANK' in os.environ
rank = int(os.environ.get('RANK', 0))
world = int(os.environ.get('WORLD_SIZE', 1))
if distributed:
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may download or write for hours


def on_rank_0(function, *arguments):
    """Call a function on rank 0 alone, and return its result on all. If it fails there, all processes end."""
    result = [None, False]  # and whether there is one
    try:
        if rank == 0:
            result = [function(*arguments), True]
    finally:
        if distributed:
            with explain_torch(advice):
                dist.broadcast_object_list(result)
    if not result[1]:
        raise SystemExit(2)  # rank 0 says why
    return result[0]


def add_up(tensor):
    """Add up a tensor over all processes, in place, and return it."""
    if distributed:
        with explain_torch(advice):
            dist.all_reduce(tensor)
    return tensor


def check_same(value, message):
    """End all processes with this message unless each has the value of rank 0."""
    differs = value != on_rank_0(lambda: value)
    check(not add_up(torch.tensor(int(differs))), message)


def say(message):
    if rank == 0:
        with suppress(OSError):  # stdout may be closed, as in `python train.py | head`
            tqdm.write(message)


# --- resume or start: rank 0 decides where from and with which settings -------------------------------------

out = Path(asked['out_dir'])
checkpoints = best, last, last_old = out / 'best', out / 'last', out / 'last.old'
lock = FileLock(out / '.lock')  # rank 0 holds it while it writes
NEW = dict(step=0, sequences=0, tokens=0, skipped=0, best_loss=math.inf, best_step=0, wandb='', scaler={},
           settings={}, losses=[], sizes={})  # losses since the last row of metrics.jsonl; sizes of files
OF_A_START = {'out_dir', 'init_from', 'base', 'overwrite', 'eval_only', 'fsdp', 'shard_size'}  # not kept
POSITIVE = {'batch_size', 'block_size', 'gradient_accumulation_steps', 'max_iters', 'eval_interval',
            'log_interval'}
SHAPE = set(GPTConfig.__dataclass_fields__)
overrides = {key: value for key, value in given.items() if key in SHAPE}  # of a model that is loaded


def read_if_there(path):
    return path.read_bytes() if path.is_file() else b''


def read_state(folder):
    """Read the state of a checkpoint. Raises ValueError if one of its files is missing or damaged."""
    raw = read_json(folder / 'state.json')
    for file in folder.glob('*.safetensors'):
        open_file(file)
    for file in folder.glob('*.json'):
        read_json(file)
    try:
        values = {key: type(default)(raw.get(key, default)) for key, default in NEW.items()}
        values['losses'] = np.array(values['losses'], float).reshape(-1, 2).tolist()
        for name, size in values['sizes'].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f'{name} has not {size} bytes')
        return SimpleNamespace(**values)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        raise ValueError(f'{folder / "state.json"}: {error}') from error


def find_newest():
    """(folder, state) of the newest checkpoint that is whole; (None, a new state) where there is none."""
    for folder in (last, last_old):
        if folder.exists():
            try:
                return folder, read_state(folder)
            except ValueError as error:
                say(f'{folder} is damaged: {error}')
    kept = [folder for folder in (best, *find_kept()) if folder.exists()]
    hint = ''
    if kept:
        hint = f'; --init_from={kept[0]} --out_dir=NEW starts from its weights'
    check(not kept and not last.exists() and not last_old.exists(),
          f'{out} has no readable checkpoint to resume{hint}')
    check(not asked['eval_only'], f'{out} holds no run to evaluate')
    return None, SimpleNamespace(**NEW)


def find_kept():
    """The folders of keep_every, the newest first."""
    found = [path for path in filter(Path.is_dir, out.glob('step-*')) if re.fullmatch(r'step-\d+', path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def copy_last(name):
    """Copy `last`, without the moments, to a folder of this name."""
    new = out / f'{name}.new'
    old = out / f'{name}.old'
    remove_folder(new)
    shutil.copytree(last, new, ignore=shutil.ignore_patterns('optimizer.safetensors'))
    put_in_place(new, out / name, old)
    remove_folder(old)


def keep_best(state):
    """Copy `last` to `best`, if it is the best and not there yet."""
    is_there = read_if_there(best / 'state.json') == read_if_there(last / 'state.json')
    if state.best_step == state.step and not is_there:
        copy_last('best')


def take_lock():
    """Lock out_dir, and remove what a run that was killed was writing."""
    with fail_on((OSError, NotImplementedError), f'; is another run writing to {out}?'):
        held = lock.acquire(timeout=0)
    remove_unfinished()
    return held


def remove_unfinished():
    for folder in out.glob('*.new'):
        if re.fullmatch(r'(last|best|step-\d+)\.new', folder.name):
            remove_folder(folder)


def check_out_dir():
    """Refuse to overwrite a run, unless --overwrite asks for it."""
    with fail_on(OSError):
        out.mkdir(parents=True, exist_ok=True)
    runs = {path.resolve() for path in (*checkpoints, *find_kept()) if path.exists()}
    init_from = asked['init_from']
    check(not runs or init_from == 'resume' or asked['overwrite'],
          f'{out} holds a run: --init_from=resume continues it, --overwrite replaces it')
    needed = [Path(init_from).resolve(), Path(asked['base'] or init_from).resolve()]
    with suppress(ValueError, KeyError, TypeError):  # the base of adapters
        needed.append(Path(read_json(needed[0] / 'adapter_config.json')['base_model_name_or_path']).resolve())
    check(not any(runs & {path, *path.parents} for path in needed),
          f'this run would overwrite a model that it starts from ({init_from}); give another --out_dir')


def choose_rates(width, adapters):
    """Peak rates for a model that is loaded. Trials on a model of width 128 chose them. Wider models, whose
    outputs are sums of more numbers, get lower ones."""
    factor = min(1, 128 / width) ** 0.5
    if adapters:
        return dict(learning_rate=1e-3 * factor)
    return dict(learning_rate=8e-4 * factor, muon_lr=7e-4 * factor)


def decide():
    """(folder, state, all settings) of this run. What a file or a flag gave wins over what a resumed run or a
    loaded model dictates, and that over the defaults."""
    if not asked['eval_only']:
        check_out_dir()
    folder, state = None, SimpleNamespace(**NEW)
    if asked['init_from'] == 'resume':
        folder, state = find_newest()
        if folder == last and not asked['eval_only']:
            with take_lock(), fail_on(OSError):
                keep_best(state)  # a run that was killed may not have done it
    elif asked['init_from'] != 'scratch':
        with fail_on(ValueError):
            folder = find_checkpoint(asked['init_from'])
    declared = config.declared('model.py') | config.declared('train.py')
    of_run = {key: config.convert(f'{folder}/state.json: {key}', state.settings[key], declared[key][0])
              for key in (state.settings.keys() & declared.keys()) - OF_A_START}
    of_model = {}
    if folder:
        with fail_on(ValueError):
            shape, adapters = read_shape(folder, asked['base'] or None, **overrides)
        check(all(given.get(key, value) == value for key, value in adapters.items()),
              f'{folder} has adapters of {adapters}; leave out --lora_rank and --lora_alpha')
        of_model = asdict(shape) | adapters
    rates = {}
    if folder and not of_run:
        rates = choose_rates(of_model['hidden_size'], of_model.get('lora_rank') or asked['lora_rank'])
    settings = asked | rates | of_run | of_model | given  # later wins
    if settings['lora_rank'] and 'router_aux_loss_coef' not in given:  # frozen routers cannot be balanced
        settings['router_aux_loss_coef'] = of_run.get('router_aux_loss_coef', 0.0)
    return folder, state, settings


def check_settings():
    for key, value in settings.items():
        least = 1 if key in POSITIVE else 0
        good = type(value) not in (int, float) or least <= value < 2 ** 62
        check(good, f'{key} is {value}; it must be at least {least}, and not too large')
    with fail_on(ValueError):
        GPTConfig(**shape | dict(vocab_size=vocab_size or 1))
    check(learning_rate > 0, 'learning_rate must be above 0')
    check(min_lr <= learning_rate, f'min_lr ({min_lr:g}) exceeds learning_rate ({learning_rate:g})')
    check(max(beta1, beta2) < 1, 'beta1 and beta2 must be below 1')
    check(lr_schedule in ('cosine', 'linear', 'constant'), 'lr_schedule must be cosine, linear or constant')
    check(block_size <= max_position_embeddings,
          f'block_size ({block_size}) exceeds max_position_embeddings ({max_position_embeddings})')
    check(folder or not lora_rank and not experts, 'lora_rank and experts adapt a model: give --init_from')
    check(folder or not base, 'base is the model of adapters: give --init_from')
    check(experts in ('', 'mxfp4'), f'experts is {experts!r}; it must be mxfp4 or empty')
    check(not experts or lora_rank, '--experts=mxfp4 needs --lora_rank, because packed experts do not train')
    check(not experts or not fsdp, 'experts=mxfp4 cannot be sharded; leave out --fsdp')
    check(distributed or not fsdp, '--fsdp=True shards the model over processes; start it with torchrun')
    check(not fsdp or world % shard_size == 0,
          f'{world} processes cannot form groups of shard_size ({shard_size})')
    batches = gradient_accumulation_steps
    check(tokens_per_step < 2 ** 31, f'a step has {tokens_per_step} tokens, over 2^31; lower --batch_size')
    check(batches % world == 0 or eval_only, f'{world} processes cannot share {batches} batches evenly; give '
          f'--gradient_accumulation_steps={math.ceil(batches / world) * world}')
    check(eval_only or state.step < max_iters,
          f'{folder} has done {state.step} steps of max_iters ({max_iters}); enlarge it')


folder, state, settings = on_rank_0(decide)
resumed = state.step > 0
state.settings = settings  # with 'auto' and 0, which can mean something else on the next machine
globals().update(settings)  # this defines every field of GPTConfig too, such as max_position_embeddings
shape = {key: settings[key] for key in SHAPE}
device, dtype = config.pick_device(device, dtype)
shard_size = shard_size or int(os.environ.get('LOCAL_WORLD_SIZE', world))
tokens_per_step = batch_size * gradient_accumulation_steps * block_size
on_rank_0(check_settings)
# from here on no setting changes
device_type = torch.device(device).type
check_same(given, 'this process was given other settings than rank 0')
if asked['init_from'] == 'resume' and not fsdp:  # each process reads the checkpoint
    state_file = (folder or last) / 'state.json'
    check_same(read_if_there(state_file), f'{state_file} differs between nodes, which must share it')

# --- data ---------------------------------------------------------------------------------------------------

data = Path(data_dir)

def make_corpus():
    """Write the built-in corpus where it is wanted and not there yet."""
    if data_dir == 'data/builtin' and not (data / 'meta.json').exists():
        say('making the built-in corpus, once:')
        subprocess.run([sys.executable, config.ROOT / 'prepare.py', '--dataset=builtin', '--tokenizer=bpe'])


on_rank_0(make_corpus)
try:
    meta = read_json(data / 'meta.json')
    sizes = {split: int(meta[f'{split}_tokens']) for split in ('train', 'val')}
    token_dtype = dict(uint16=np.uint16, uint32=np.uint32)[meta['dtype']]
    vocabulary = int(meta['vocab_size'])
    end_of_text = np.uint32(meta['eot_token'])
    chats = 'val_targets' in meta
    tokens_per_byte = meta['val_targets' if chats else 'val_tokens'] / meta['val_bytes']
    perfect = float(meta.get('perfect_loss', 'nan'))
except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
    config.fail(f'{data / "meta.json"} is missing or damaged ({type(error).__name__}: {error}); prepare the '
                f'data: python prepare.py --data_dir={data_dir} --dataset=... (see --help)')
check_same(meta, f'{data} does not hold the same data on all nodes')


def open_bin(split, kind=token_dtype, suffix=''):
    """The tokens of a split, or its mask. Opened for each use, to notice when a run's data is cut short."""
    path = data / f'{split}{suffix}.bin'
    size = path.stat().st_size if path.is_file() else 0
    expected = sizes[split] * np.dtype(kind).itemsize
    check(size == expected, f'{path} has {size} bytes, not {expected} as in meta.json; prepare the data')
    return np.memmap(path, kind, 'r')


def cut_text(split):
    """Rows (start, stop) that together predict every token of a text once. A row stops at the last end of a
    document within block_size tokens, or is full where there is none. The last incomplete row is dropped."""
    tokens = open_bin(split)
    rows = []
    start = 0
    while start + block_size < len(tokens):
        ends = np.flatnonzero(tokens[start + 1:start + block_size + 1] == end_of_text)
        stop = start + (ends[-1] + 1 if len(ends) else block_size)
        rows.append((start, stop))
        start = stop
    return np.array(rows)


def cut_chats(split):
    """Rows (start, stop) of as many whole chats as fit. A chat longer than a row loses its end, and a row
    without an answer is dropped."""
    ends = np.flatnonzero(open_bin(split) == end_of_text)
    starts = np.append(0, ends[:-1] + 1)
    rows = []
    for start, end in zip(starts.tolist(), ends.tolist()):
        if rows and end <= rows[-1][0] + block_size:
            rows[-1][1] = end
        else:
            rows.append([start, min(end, start + block_size)])
    rows = np.array(rows)
    answers_before = np.append(0, np.cumsum(open_bin(split, np.uint8, '_mask'), dtype=np.int64))
    answers = answers_before[rows[:, 1] + 1] - answers_before[rows[:, 0] + 1]
    lost = answers_before[-1] - answers.sum()
    remedy = f'--block_size={(ends - starts).max()} takes all'
    check(answers.any(), f'no answer in {data / split}.bin is within block_size ({block_size}); {remedy}')
    if lost:
        longer = (ends - starts > block_size).sum()
        say(f'{data / split}.bin: {longer:,} chats are longer than block_size ({block_size}), so {lost:,} of '
            f'{answers_before[-1]:,} answer tokens are left out; {remedy}')
    return rows[answers > 0]


if chats:
    chat_rows = cut_chats('train')
    val_rows = cut_chats('val')
    rows_per_epoch = len(chat_rows)
else:
    for split in sizes:
        size = len(open_bin(split))
        check(size > block_size, f'{data / split}.bin has {size} tokens, fewer than block_size + 1 = '
                                 f'{block_size + 1}; take more text or a smaller --block_size')
    val_rows = cut_text('val')
    rows_per_epoch = max(1, (sizes['train'] - block_size) // block_size)


@lru_cache(maxsize=2)
def shuffle_epoch(epoch):
    """The rows of an epoch, shuffled. Each epoch cuts a text into blocks at another offset."""
    rng = np.random.default_rng((seed, epoch))
    if chats:
        rows = chat_rows
    else:
        offset = rng.integers(min(block_size, sizes['train'] - rows_per_epoch * block_size))
        starts = offset + block_size * np.arange(rows_per_epoch)
        rows = np.stack((starts, starts + block_size), axis=1)
    return rows[rng.permutation(rows_per_epoch)]


def make_batch(split, rows):
    """Rows (start, stop) of a split -> inputs and targets, int64 (B, block_size); -1 is no target."""
    tokens = open_bin(split)
    mask = open_bin(split, np.uint8, '_mask') if chats else None
    x = np.full((len(rows), block_size), end_of_text, np.int64)
    y = np.full_like(x, -1)
    for i, (start, stop) in enumerate(rows):
        x[i, :len(tokens) - start] = tokens[start:start + block_size]  # the last chat may end before its row
        y[i, :stop - start] = tokens[start + 1:stop + 1]
        if chats:
            y[i, :stop - start][mask[start + 1:stop + 1] == 0] = -1
    largest = max(x.max(), y.max())
    V = model.config.vocab_size
    check(largest < V, f'{data / split}.bin holds the token id {largest}, but the model has vocab_size {V}')
    batch = torch.from_numpy(np.stack((x, y)))
    if device_type == 'cuda':  # from pinned memory, so that nothing waits for the copy
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def draw_batch(number):
    """A batch of this step. Only seed and state.sequences determine it, so a resumed run draws the same."""
    first = state.sequences + number * batch_size
    rows = [shuffle_epoch(i // rows_per_epoch)[i % rows_per_epoch] for i in range(first, first + batch_size)]
    return make_batch('train', rows)


# --- model and optimizers -----------------------------------------------------------------------------------

def check_tokenizer():
    """Check that checkpoint and data fit together. Returns the longest block_size so far, None if unknown."""
    if not folder:
        return block_size
    if not (folder / 'meta.json').exists():
        say(f'{folder} has no meta.json: whether its tokenizer is that of {data_dir} is not checked')
        return None
    with fail_on(ValueError):
        theirs = read_json(folder / 'meta.json')
    same = all(theirs.get(key) == meta.get(key) for key in ('tokenizer', 'vocab_size', 'special_tokens'))
    files = [read_if_there(path / 'tokenizer.tiktoken') for path in (folder, data)]
    check(same and files[0] == files[1],
          f'{folder} has another tokenizer than {data_dir}; prepare the data with --tokenizer={folder}')
    changed = any(theirs.get(key) != meta[key] for key in meta)
    check(not resumed or not changed or 'data_dir' in given,
          f'{data_dir} has changed since {folder} was written; give --data_dir to continue with it anyway')
    return theirs.get('block_size') and max(theirs['block_size'], block_size)


def check_host_memory(model_shape):
    """Fail where the memory of rank 0's machine is too small for fsdp: it holds all weights to load them, and
    all moments too while it saves or resumes."""
    with torch.device('meta'):
        needed = GPT(model_shape).num_parameters() * (8 if muon_lr else 12)  # fp32, with one moment or two
    if lora_rank:
        needed /= 4  # frozen weights of 16 bits
    with suppress(OSError, TypeError):  # Linux alone has this file
        free = 1024 * int(re.search(r'MemAvailable: +(\d+)', Path('/proc/meminfo').read_text())[1])
        check(needed < free, f'rank 0 needs {needed / 1e9:,.0f} GB of memory for all weights and moments; '
                             f'{free / 1e9:,.0f} GB are free. --lora_rank needs less')


def load_model(model_shape):
    """The model, with the weights of a checkpoint or new ones. With fsdp only rank 0 has them, on the CPU."""
    kind = getattr(torch, dtype) if lora_rank else torch.float32  # of frozen weights; all others are fp32
    place = 'cpu' if fsdp else device
    if fsdp and rank > 0:
        with torch.device('meta'):
            model = GPT(model_shape).to(kind)
    elif folder:
        path = folder if resumed else init_from  # adapters name their base as it was given
        model = GPT.from_pretrained(path, kind, place, experts or None, base or None, **overrides)
    else:
        model = GPT(model_shape).to(place)  # made on the CPU: the same on every device
    if lora_rank and not model.lora:
        model.add_lora(lora_rank, lora_alpha)
    model.config.router_aux_loss_coef = router_aux_loss_coef
    model.recompute |= recompute
    return model


# With fsdp, `shard` divides the model over the processes, `gather` puts it together for a checkpoint, and
# `load_moments` divides the moments in it again. The last two serve one process and DDP too.

def shard(model):
    """Divide the model of rank 0 by FSDP2, layer by layer. Each shard_size processes hold a whole copy:
    weights travel among them, and gradients between the copies once a step."""
    def placement(p):  # the first dimension that divides evenly, or else the first, which is padded
        even = [dim for dim, size in enumerate(p.shape) if size % shard_size == 0]
        return Shard(even[0] if even else 0)

    grid = world // shard_size, shard_size
    mesh = init_device_mesh(device_type, grid, mesh_dim_names=('copies', 'parts'))
    spread = partial(fully_shard, mesh=mesh, shard_placement_fn=placement)
    weights = model.state_dict() if rank == 0 else {}
    model.to('meta').tie_weights()  # `weights` keeps the tensors
    for layer in model.model.layers:
        if dtype != 'float32' and not lora_rank:  # experts compute in 16 bits, so they are gathered in them
            policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
            spread(layer.mlp.experts, mp_policy=policy)
        spread(layer)
    spread(model).to_empty(device=device).reset_counters(device)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.set_model_state_dict(model, weights, options=options)


def name_moments(**options):
    """{name: tensor} of the state of the optimizers."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True, **options)
    found = dcp.get_optimizer_state_dict(model, optimizers, options=options)
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def gather():
    """(weights, moments and expert_load) by name, with fsdp whole, on the CPU of rank 0. All must call it."""
    options = dict(full_state_dict=fsdp, cpu_offload=fsdp, ignore_frozen_params=lora_rank > 0)
    weights = dcp.get_model_state_dict(model, options=dcp.StateDictOptions(**options))
    return weights, name_moments(**options) | dict(expert_load=add_up(model.expert_load.clone()))


def load_moments(path):
    """Load the moments that `gather` returned. With fsdp rank 0 reads the file and sends out the parts."""
    moments = name_moments() | dict(expert_load=model.expert_load)  # dcp makes them by a step of rate 0
    stored = {}
    if rank == 0 or not fsdp:
        with open_file(path) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
        fits = {name: x.shape for name, x in stored.items()} == {name: x.shape for name, x in moments.items()}
        check(fits, f'{path} does not fit these optimizers; --init_from={path.parent} --out_dir=NEW starts '
                    'another run from the weights')
    for name, tensor in moments.items():
        whole = stored[name] if stored else torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole.to(device), tensor.device_mesh, tensor.placements)
        elif fsdp:
            dist.broadcast(whole, src=0)
        tensor.copy_(whole)
    if rank > 0:
        model.expert_load.zero_()  # rank 0 has that of all processes


torch.manual_seed(seed)
trained_on = on_rank_0(check_tokenizer)
model_shape = GPTConfig(**shape | dict(vocab_size=vocab_size or vocabulary))
if fsdp:
    on_rank_0(check_host_memory, model_shape)
with explain_torch(advice):
    with fail_on(ValueError):
        model = load_model(model_shape)
    net = model
    mesh = None  # with DDP: the processes that share Muon's work
    if fsdp:
        shard(model)
    elif distributed:
        mesh = init_device_mesh(device_type, (world,))
        net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizers = model.configure_optimizers(learning_rate, muon_lr, (beta1, beta2), weight_decay, mesh)
    if resumed and not eval_only:
        load_moments(folder / 'optimizer.safetensors')
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
if state.scaler:
    scaler.load_state_dict(state.scaler)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
flops = model.flops_per_token(block_size)
peak_flops = config.peak_flops(device, dtype)
pays = device_type == 'cuda' and has_triton() and max_iters * tokens_per_step * flops / world > 1e16
use_compile = pays if compile is None else compile
if use_compile:
    for module in model.model.layers if fsdp else [model]:
        module.compile(dynamic=False)  # one graph for training, one for evaluation

# --- evaluate, save, log, plot ------------------------------------------------------------------------------

@torch.no_grad()
def evaluate():
    """The mean loss in nats per token, of eval_iters batches spread over the validation rows, or of all."""
    rows = val_rows
    if 0 < eval_iters * batch_size < len(rows) and not eval_only:
        rows = rows[np.linspace(0, len(rows), eval_iters * batch_size, endpoint=False).astype(int)]
    size = max(batch_size, 2 ** 13 // block_size)  # without gradients there is room for more
    size = min(size, math.ceil(len(rows) / world))
    empty = -len(rows) % (size * world)  # rows (0, 0), so that every process has as many batches
    rows = np.pad(rows, ((0, empty), (0, 0)))[rank::world]
    total = torch.zeros(2, device=device)  # the summed loss, and the number of targets
    net.eval()
    for i in range(0, len(rows), size):
        x, y = make_batch('val', rows[i:i + size])
        with autocast:
            loss = net(x, y, return_logits=False, count=1)[1]  # count=1: the sum
        total += torch.stack((loss, (y >= 0).sum()))
    net.train()
    loss, count = add_up(total).tolist()
    return loss / count


def report(val_loss):
    """Log and print a validation loss, and the share of rows that each expert got since the last report."""
    bits = val_loss / math.log(2) * tokens_per_byte
    goal = '' if math.isnan(perfect) else f' (perfect: {perfect:.3f})'
    line = f'step {state.step}: val loss {val_loss:.4f}{goal}, {bits:.4f} bits per byte'
    row = dict(val_loss=val_loss, val_bpb=bits)
    load = add_up(model.expert_load.clone()).cpu()
    model.expert_load.zero_()
    if load.any():  # there was a step
        fraction = load / load.sum(1, keepdim=True).clamp(min=1)
        dead = (load == 0).sum(1)
        row |= dict(expert_load_max=fraction.amax(1).tolist(), expert_load_min=fraction.amin(1).tolist(),
                    dead_experts=dead.tolist())
        busiest = fraction.max() * load.size(1)
        if busiest > 1.5:
            line += f', the busiest expert has {busiest:.1f} x the mean load'
        if dead.any():
            line += f', {dead.sum()} experts get no token'
    log(row)
    say(line)


def write_checkpoint(weights, moments):
    """Write last.new, which becomes `last` when it is whole. The `last` before becomes last.old. So one of
    the two is whole whenever the process is killed."""
    new = out / 'last.new'
    remove_folder(new)
    state.scaler = scaler.state_dict()
    try:
        save = model.save_adapter if lora_rank else model.save_pretrained
        save(new, weights=weights)
        save_file(moments, new / 'optimizer.safetensors')
        write_json(new / 'meta.json', meta | dict(block_size=trained_on))
        if (data / 'tokenizer.tiktoken').exists():
            shutil.copyfile(data / 'tokenizer.tiktoken', new / 'tokenizer.tiktoken')  # not its permissions
        state.sizes = {file.name: file.stat().st_size for file in new.iterdir()}
        write_json(new / 'state.json', vars(state))
        put_in_place(new, last, last_old)
        keep_best(state)
        if keep_every and state.step % (keep_every * eval_interval) == 0:
            copy_last(f'step-{state.step}')
    except OSError as error:
        remove_unfinished()  # it may fill the disk
        config.fail(f'{error}; the checkpoints in {out} are whole')


def log(row):
    """Add a row to metrics.jsonl, and to Weights & Biases."""
    if rank > 0 or eval_only:
        return
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[key] = None  # JSON has no NaN
    with fail_on(OSError), open(out / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps(dict(step=state.step, tokens=state.tokens) | row) + '\n')
    if wandb_log:
        import wandb
        wandb.log(row, step=state.step)


def read_metrics():
    with suppress(OSError, ValueError):  # no file yet, or a line that a crash cut short
        for line in open(out / 'metrics.jsonl'):
            yield json.loads(line)


def plot():
    """Draw metrics.jsonl as loss.png."""
    os.environ.pop('MPLBACKEND', None)  # a notebook's; a file needs none
    import matplotlib.figure
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.subplots()
    rows = list(read_metrics())
    for key, label, style in (('train_loss', 'training', '-'), ('val_loss', 'validation', 'o-')):
        points = [(row['step'], row[key]) for row in rows if row.get(key)]
        axes.plot(*np.reshape(points, (-1, 2)).T, style, label=label, markersize=4, linewidth=1.2)
    if not math.isnan(perfect):
        axes.axhline(perfect, color='gray', linestyle=':')
        axes.text(0, perfect, f'perfect model: {perfect:.3f}', va='bottom')
    axes.set_title(f'{data.name}: {parameters / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M active')
    axes.set(xlabel='step', ylabel='loss (nats per token)', yscale='log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.legend()
    figure.savefig(out / 'loss.png', dpi=120)


def start_writing():
    """Lock out_dir. Start wandb, cut metrics.jsonl to the step of the checkpoint, and remove a run that is
    replaced."""
    take_lock()
    same = asked['overwrite'] or not any(path.exists() for path in checkpoints)
    if resumed:
        same = read_state(folder).step == state.step
    check(same, f'another run has written to {out} meanwhile')
    if wandb_log:
        with fail_on(Exception, '; pip install wandb, or drop --wandb_log'):  # it raises many types
            import wandb
            wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=settings,
                       id=state.wandb or None, resume='allow')
            state.wandb = wandb.run.id
    rows = [row for row in read_metrics() if resumed and row['step'] <= state.step]  # others are logged again
    # those of a run that is replaced, or the damaged `last`, which must not become the only last.old
    replaced = [last] if folder == last_old else []
    if not resumed:
        replaced = [*checkpoints, *find_kept()]
    for old in replaced:
        remove_folder(old)
    with fail_on(OSError):
        (out / 'metrics.new').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        (out / 'metrics.new').replace(out / 'metrics.jsonl')


# --- the loop -----------------------------------------------------------------------------------------------

def schedule(step):
    """The learning rates of a step as a fraction of their peaks: linear warm-up, then lr_schedule."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    done = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    fraction = 1
    if lr_schedule == 'cosine':
        fraction = 0.5 * (1 + math.cos(math.pi * done))
    if lr_schedule == 'linear':
        fraction = min(1, (1 - done) / max(cooldown, 1e-9))
    return fraction + (1 - fraction) * min_lr / learning_rate


def note_signal(number, frame):
    """Finish the step, save, and end."""
    global stopped_by
    if stopped_by and not distributed:
        raise KeyboardInterrupt
    stopped_by = signal.Signals(number).name


def end_at_second(signals, written):
    """End this process at its second signal, even where it waits for a frozen process and handles none.
    written is the other end of signals, which stays open as long as something refers to it."""
    signals.recv(1)
    os._exit(128 + signals.recv(1)[0])


@contextmanager
def handle_signals():
    """Let note_signal handle Ctrl-C and SIGTERM. In a notebook the process outlives the run, so the
    handlers and the lock are given back."""
    caught = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note_signal) for number in caught]
    if distributed and 'TORCHELASTIC_RUN_ID' not in os.environ:  # torchrun sends each twice, then kills
        signals, written = socket.socketpair()
        written.setblocking(False)
        signal.set_wakeup_fd(written.fileno())
        Thread(target=end_at_second, args=[signals, written], daemon=True).start()
    try:
        yield
    finally:
        for number, handler in zip(caught, before):
            signal.signal(number, handler)
        lock.release()


parameters = model.num_parameters()
active = model.num_parameters(active=True)
peaks = learning_rate, muon_lr
rates = ', '.join(f'{type(optimizer).__name__} {peak:g}' for optimizer, peak in zip(optimizers, peaks))
precision = dtype
if device_type == 'cuda' and dtype == 'float32' and torch.get_float32_matmul_precision() != 'highest':
    precision = 'float32 by TF32'  # by --dtype=tf32 or by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
say(f'{parameters:,} parameters, {active:,} of them active for a token; {sizes["train"]:,} training tokens; '
    f'{world} x {device}, {precision}{", compiled" if use_compile else ""}; peak rates: {rates}')
if eval_only:
    with explain_torch(advice):
        report(evaluate())
    if distributed:
        dist.destroy_process_group()
    sys.exit()
stopped_by = None
progress = tqdm(total=max_iters, initial=state.step, unit='step', dynamic_ncols=True, disable=rank > 0)
seconds = []  # of each step since the last row of metrics.jsonl
bad_steps = 0  # in a row
stopping = False
net.train()
with handle_signals(), explain_torch(advice):
    on_rank_0(start_writing)
    if not resumed:
        report(evaluate())
    while state.step < max_iters and not stopping:
        began = time.perf_counter()
        rate = schedule(state.step)
        for optimizer, peak in zip(optimizers, peaks):  # AdamW, and Muon where it is used
            for group in optimizer.param_groups:
                group['lr'] = peak * rate

        # forward and backward: this process has every world-th batch of the step
        numbers = range(rank, gradient_accumulation_steps, world)
        batches = [draw_batch(number) for number in numbers]
        # the mean number of targets in a batch; dividing by it gives every target of the step equal weight
        count = add_up(sum((y >= 0).sum() for _, y in batches)).clamp(min=1) / gradient_accumulation_steps
        totals = torch.zeros(3, device=device)
        for number, (x, y) in zip(numbers, batches):
            torch.manual_seed(seed + state.sequences + number)  # dropout follows from the batch
            ends_step = number == numbers[-1]  # only this backward has to average over the processes
            if fsdp:
                model.set_requires_all_reduce(ends_step)  # among copies; shards are reduced each time
            elif distributed:
                net.require_backward_grad_sync = ends_step
            with autocast:
                loss = net(x, y, return_logits=False, count=count)[1]
            scaler.scale(loss / len(batches)).backward()  # DDP and FSDP2 divide by the number of processes
            totals[:2] += torch.stack((loss.detach(), model.balance))
        totals[2] = stopped_by is not None  # one stopped process stops all

        # the step, unless a number is not finite. scaler.step would skip it in float16 only
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        norm = norm.full_tensor() if fsdp else norm
        loss, balance, stopping = (add_up(totals) / gradient_accumulation_steps).tolist()
        norm = norm.item()
        finite = math.isfinite(loss + norm)
        if finite:
            for optimizer in optimizers:
                optimizer.step()
        scaler.update(None if finite else scaler.get_scale() / 2)  # on all processes together
        model.zero_grad(set_to_none=True)

        state.step += 1
        state.sequences += batch_size * gradient_accumulation_steps
        state.tokens += tokens_per_step
        state.skipped += not finite
        state.losses.append((loss - router_aux_loss_coef * balance, balance))
        bad_steps = 0 if finite else bad_steps + 1
        stopping = stopping > 0 or bad_steps == 10
        seconds.append(time.perf_counter() - began)
        if state.step % log_interval == 0 or state.step == max_iters:
            train_loss, balance_loss = np.mean(state.losses, axis=0).tolist()
            speed = len(seconds) * tokens_per_step / sum(seconds)
            row = dict(train_loss=train_loss, balance_loss=balance_loss, lr=learning_rate * rate,
                       grad_norm=norm, skipped=state.skipped, tokens_per_second=speed)
            if peak_flops:
                row['mfu'] = flops * speed / peak_flops / world
            log(row)
            progress.set_postfix_str(f'loss={train_loss:.3f}, tokens_per_s={speed:,.0f}', refresh=False)
            state.losses = []
            seconds = []
        evaluated = state.step % eval_interval == 0 or state.step == max_iters
        if evaluated:
            val_loss = evaluate()
            report(val_loss)
            if val_loss < state.best_loss:
                state.best_loss = val_loss
                state.best_step = state.step
        if evaluated or stopping:
            on_rank_0(write_checkpoint, *gather())  # all processes gather
        try:
            progress.update()
        except OSError:  # stderr is closed
            progress.disable = True
progress.close()
check(bad_steps < 10, 'the loss or its gradient was not finite in 10 steps in a row, which were skipped; '
                      f'{last} holds the weights. Try a lower --learning_rate')
if state.step < max_iters:
    say(f'{stopped_by or "another process"} stopped the run after step {state.step}; --out_dir={out_dir} '
        '--init_from=resume continues it')
elif rank == 0:
    try:
        plot()
    except Exception as error:  # matplotlib raises many types
        say(f'(no loss.png, which matplotlib draws: {error})')
    say(f'done: best val loss {state.best_loss:.4f}; {best} and {last} hold the model, {out}/metrics.jsonl '
        'the numbers')
    if sample_tokens and not fsdp:  # a model that was divided may not fit on one device
        del model, net, optimizers, optimizer, group  # or there would be two models in memory
        if device_type == 'cuda':
            torch.cuda.empty_cache()
        command = [sys.executable, config.ROOT / 'sample.py', f'--out_dir={out_dir}', f'--device={device}',
                   f'--dtype={dtype}', f'--experts={experts}', f'--max_new_tokens={sample_tokens}',
                   '--chat' if chats else f'--start={start}']
        subprocess.run(command, input=start, encoding='utf-8', env=os.environ | {'PYTHONIOENCODING': ''})
if distributed:
    dist.destroy_process_group()
