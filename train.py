"""
Train a GPT-OSS. Without arguments it generates a corpus of small stories and trains on it, in minutes on a CPU:

    python train.py
    python train.py config/tinystories.py --batch_size=32
    python train.py --out_dir=out --init_from=resume
    python train.py --init_from=openai/gpt-oss-20b --data_dir=data/chats --lora_rank=8 --out_dir=out-chats
    torchrun --standalone --nproc_per_node=8 train.py config/gpt_oss_500m.py

Under torchrun the processes divide the batches of each step, and the losses match those of one process. Every setting
below is a flag, and so is every field of GPTConfig in model.py. --help lists them all.
"""

import config  # first, because it sets how OpenMP waits before torch loads it

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict  # dcp.state_dict
from filelock import FileLock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Shard
from torch.utils._triton import has_triton
from tqdm.auto import tqdm

from model import GPT, GPTConfig, find_checkpoint, open_file, read_json, save_file, write_json

# -----------------------------------------------------------------------------
# files
out_dir = 'out'  # gets the checkpoints best/ and last/, metrics.jsonl and loss.png
data_dir = 'data/builtin'  # what prepare.py wrote; the default is made on first use
init_from = 'scratch'  # scratch, resume (the run in out_dir, if there is one), or the folder or hub id of a checkpoint
overwrite = False  # replace the run in out_dir
# fine-tuning
lora_rank = 0  # train adapters of this rank on attention and experts instead of the model; 0: the whole model
lora_alpha = 16.0  # the output of an adapter is scaled by lora_alpha / lora_rank
experts = ''  # mxfp4: with lora_rank, keep the frozen experts at four bits a value
# batches, shared by the processes of torchrun
batch_size = 16  # sequences that go through the model together
block_size = 256  # tokens in a sequence
gradient_accumulation_steps = 1  # batches in an optimizer step
# the model's shape
vocab_size = 0  # 0: that of the tokenizer
hidden_size = 128
intermediate_size = 64
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
router_aux_loss_coef = 0.05
# optimizers and schedule
max_iters = 340  # optimizer steps in the whole run
learning_rate = 8e-3  # peak rate of AdamW
muon_lr = 0.007  # peak rate of Muon, which updates the matrices of the layers; 0: AdamW updates them too
muon_interval = 1  # Muon moves every n-th step, n times as far; 2 saves a small model a tenth of its time
min_lr = 0.0  # rate of AdamW at the end; Muon's falls in proportion
warmup_iters = 30  # steps of linear warm-up
lr_schedule = 'linear'  # after the warm-up: cosine, linear (flat, then down over the cooldown) or constant
cooldown = 0.7  # fraction of the steps after the warm-up over which the linear schedule falls
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # decay of the mean gradient, for AdamW and Muon
beta2 = 0.95  # decay of the mean squared gradient of AdamW
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# reports
eval_interval = 100  # steps between evaluations; each writes a checkpoint
eval_iters = 10  # validation batches, the same each time; 0: the whole validation set
log_interval = 10  # steps between rows of metrics.jsonl
start = 'Once upon a time'  # start of the sample at the end; empty: the end-of-text token
sample_tokens = 400  # length of that sample; 0: none
wandb_log = False  # log to Weights & Biases too
wandb_project = 'nano-gpt-oss'  # its project
wandb_run_name = ''  # its name of the run; empty: out_dir
# machine
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 (with loss scaling) or float32; auto: what the device is fast in
compile: bool | None = None  # torch.compile; None: on cuda with Triton, for runs of over 1e16 FLOPs a GPU
recompute = False  # activation checkpointing: less memory for a third more time
fsdp = False  # under torchrun: shard weights, gradients and moments over the processes
shard_size = 0  # with fsdp: processes that share one copy of them; 0: those of a node
seed = 1337  # of weights, batches and dropout
# -----------------------------------------------------------------------------
settings, given = config.read(__file__, model=True)
globals().update(settings)


def check(good, message):
    if not good:
        config.fail(message)


def say(message):
    with suppress(OSError):  # stdout may be closed, as in `python train.py | head`
        if rank == 0:
            tqdm.write(message)


@contextmanager
def one_line_errors():
    """End with one line when a file is unsuitable, the disk or memory is full, or another process ended."""
    try:
        yield
    except ValueError as error:
        config.fail(error)
    except OSError as error:
        writer.shutdown()  # waits for what is being written
        for name in ('last.new', 'best.new') if rank == 0 else ():  # they may fill the disk
            shutil.rmtree(out / name, ignore_errors=True)
        config.fail(f'{error}; the checkpoints in {out} are whole')
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search('out of memory|allocate memory', str(error)):
            config.fail(f'{device} is out of memory; try --recompute=True, or halve --batch_size and double '
                        '--gradient_accumulation_steps')
        check(not re.search('(closed|reset) by peer', str(error)), 'another process ended; its message says why')
        raise


# --- processes: this one, or all that torchrun started ---------------------------------------------------------------

distributed, rank, world = 'RANK' in os.environ, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
check(distributed or not fsdp, '--fsdp=True shards the model over processes; start it with torchrun')
if distributed:
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
    writers = dist.new_group(backend='gloo')  # the threads that write checkpoints
writer, writing = ThreadPoolExecutor(1), []  # this process's thread, and its job


def summed(tensor):
    """The sum of the tensors of all processes, in place."""
    if distributed:
        dist.all_reduce(tensor)
    return tensor


# --- the run in out_dir: a new one, or the one that its newest checkpoint continues ----------------------------------

NEW = dict(step=0, sequences=0, tokens=0, skipped=0, skipped_in_a_row=0, best_loss=math.inf, best_step=0, losses=[],
           wandb='', scaler={}, settings={})  # state.json of a run that has not started
out = Path(out_dir)
checkpoints = best, last, before_last = out / 'best', out / 'last', out / 'last.old'
held = any(folder.exists() for folder in checkpoints)


def newest_checkpoint():
    """(folder, state) of the newest checkpoint whose files are all readable; (None, NEW) where there is none."""
    for folder in filter(Path.exists, (last, before_last)):
        try:
            for file in (*folder.glob('*.safetensors'), *folder.glob('*.json')):
                open_file(file) if file.suffix == '.safetensors' else read_json(file)
            raw = read_json(folder / 'state.json')
            state = SimpleNamespace(**{key: type(value)(raw.get(key, value)) for key, value in NEW.items()})
            state.losses = np.array(state.losses, float).reshape(-1, 2).tolist()
            return folder, state
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            say(f'{folder} is damaged: {type(error).__name__}: {error}')
    check(not held, f'{out} has no readable checkpoint; --init_from={best} --out_dir=NEW starts from its best weights')
    return None, SimpleNamespace(**NEW)


if rank == 0:
    lock = FileLock(out / '.lock')  # the system releases it when this process ends
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:
        config.fail(f'cannot lock {out}, for example because another run is writing to it: {error}')
source, state = newest_checkpoint() if init_from == 'resume' else (None, SimpleNamespace(**NEW))
if source:  # the settings of the run win over the defaults above; flags and config files win over both
    known = config.declared('model.py') | config.declared('train.py')
    of_a_start = {'out_dir', 'init_from', 'overwrite', 'fsdp', 'shard_size'}
    for key in state.settings.keys() & known.keys() - given - of_a_start:
        settings[key] = config.convert(f'{source}/state.json: {key}', state.settings[key], known[key][0])
    globals().update(settings)
check(source or overwrite or not held, f'{out} holds a run: --init_from=resume continues it, --overwrite replaces it')
base = Path(init_from).resolve()
check(not {base, *base.parents} & {folder.resolve() for folder in checkpoints},
      f'init_from is {init_from}, which this run would overwrite; give another --out_dir')
scratch = not source and init_from in ('scratch', 'resume')
positive = ('batch_size', 'block_size', 'gradient_accumulation_steps', 'max_iters', 'eval_interval', 'log_interval',
            'muon_interval')
for key, value in settings.items():
    check(type(value) not in (int, float) or (key in positive) <= value < 2 ** 62,
          f'{key} is {value}; it must be at least {int(key in positive)}, and not too large')
check(learning_rate > 0, 'learning_rate must be above 0')
check(muon_interval <= max_iters, f'muon_interval ({muon_interval}) is more than max_iters: Muon would never move')
check(lr_schedule in ('cosine', 'linear', 'constant'), 'lr_schedule must be cosine, linear or constant')
check(not scratch or not lora_rank and not experts, 'lora_rank and experts adapt a model: give --init_from=FOLDER')
check(not experts or not fsdp, 'experts=mxfp4 cannot be sharded; leave out --fsdp')
# The processes form teams. The teams take the batches of a step in turn, and a team divides each of its batches among
# its processes. For example, 8 processes and 12 batches: 4 teams of 2, and a process takes half of each of 3 batches.
teams = math.gcd(world, gradient_accumulation_steps)
team_size, micro_steps = world // teams, gradient_accumulation_steps // teams
shard_size = shard_size or int(os.environ.get('LOCAL_WORLD_SIZE', world))
check(not fsdp or world % shard_size == 0, f'{world} processes cannot form groups of shard_size ({shard_size})')
check(batch_size % team_size == 0, f'{team_size} processes cannot divide a batch of {batch_size} sequences evenly')
if distributed and device != 'cpu':  # gloo does not reach mps
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if torch.cuda.is_available() else 'cpu'
device, dtype = config.pick_device(device, dtype)
device_type = torch.device(device).type
if distributed and device_type == 'cuda':
    torch.cuda.set_device(device)

# --- data ------------------------------------------------------------------------------------------------------------

data = Path(data_dir)
if rank == 0 and data_dir == 'data/builtin' and not (data / 'meta.json').exists():
    say('making the built-in corpus, once:')
    subprocess.run([sys.executable, config.ROOT / 'prepare.py', '--dataset=builtin', '--tokenizer=bpe'])
summed(torch.zeros(1))  # the other processes wait
check(not fsdp or (out / '.lock').exists(), f'{out} is not that of rank 0; with --fsdp all nodes must share it')
try:
    meta = read_json(data / 'meta.json')
    sizes, token_dtype = {split: int(meta[f'{split}_tokens']) for split in ('train', 'val')}, np.dtype(meta['dtype'])
    vocabulary, end_of_text, chats = int(meta['vocab_size']), np.uint32(meta['eot_token']), 'val_targets' in meta
    tokens_per_byte = meta['val_targets' if chats else 'val_tokens'] / meta['val_bytes']
    perfect = float(meta.get('perfect_loss', 'nan'))
except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
    config.fail(f'{data / "meta.json"} is missing or damaged ({type(error).__name__}: {error}); prepare the data: '
                f'python prepare.py --data_dir={data_dir} --dataset=... (see --help)')


def open_bin(split, kind=token_dtype, suffix=''):
    """The tokens of a split, or its mask. Opened for each use, so that truncation during a run is detected."""
    path = data / f'{split}{suffix}.bin'
    size, expected = path.stat().st_size if path.is_file() else 0, sizes[split] * np.dtype(kind).itemsize
    check(size == expected, f'{path} has {size} bytes, but {data / "meta.json"} says {expected}; prepare the data')
    return np.memmap(path, kind, 'r')


def batch_at(split, rows):
    """Rows (start, stop) of a split -> inputs and targets, int64 (B, block_size); targets after stop are -1."""
    tokens, mask = open_bin(split), open_bin(split, np.uint8, '_mask') if chats else None
    x = np.full((len(rows), block_size), end_of_text, np.int64)
    y = np.full_like(x, -1)
    for i, (start, stop) in enumerate(rows):
        inputs, targets = tokens[start:start + block_size], tokens[start + 1:stop + 1].astype(np.int64)
        x[i, :len(inputs)] = inputs  # the last chat may end before its row
        y[i, :len(targets)] = np.where(mask[start + 1:stop + 1], targets, -1) if chats else targets
    largest, V = max(x.max(), y.max()), model.config.vocab_size
    check(largest < V, f'{data / split}.bin holds the token id {largest}, but the model has vocab_size {V}')
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def cut_into_rows(split):
    """Rows (start, stop) that together predict every token once. A row stops at the last end of a document within
    block_size tokens, or is full where there is none. In texts the next row starts there, and the last incomplete row
    is dropped. In chats it starts after an end, so that each row begins with a whole chat: one that is longer than a
    row loses its end, and a row without a target is dropped."""
    tokens, start, rows = open_bin(split), 0, []
    ends = np.append(-1, np.flatnonzero(tokens == end_of_text))
    while start < len(tokens) - (0 if chats else block_size):
        following = np.searchsorted(ends, start + block_size, 'right')
        end = ends[following - 1]
        rows.append((start, end if end > start else start + block_size))
        start = (end if end > start else ends[following]) + 1 if chats else rows[-1][1]
    rows = np.array(rows)
    if chats:
        targets_before = np.append(0, np.cumsum(open_bin(split, np.uint8, '_mask'), dtype=np.int64))
        targets, total = targets_before[rows[:, 1] + 1] - targets_before[rows[:, 0] + 1], targets_before[-1]
        advice = f'--block_size={np.diff(ends).max() - 1} takes all'
        check(targets.any(), f'no answer of {data / split}.bin is within block_size ({block_size}) tokens; {advice}')
        if targets.sum() < total:
            longer = (np.diff(ends) > block_size + 1).sum()
            say(f'{data / split}.bin: {longer:,} chats are longer than block_size ({block_size}), so '
                f'{total - targets.sum():,} of {total:,} answer tokens are left out; {advice}')
        rows = rows[targets > 0]
    return rows


for split in sizes:
    check(len(open_bin(split)) > block_size or chats, f'{data / split}.bin has {sizes[split]} tokens, fewer than '
          f'block_size + 1 = {block_size + 1}; take more text or a smaller --block_size')
val_rows, chat_rows = cut_into_rows('val'), cut_into_rows('train') if chats else None
rows_per_epoch = len(chat_rows) if chats else max(1, (sizes['train'] - block_size) // block_size)


@lru_cache(maxsize=2)
def epoch_rows(epoch):
    """The rows of an epoch, shuffled. Each epoch cuts the text into blocks at another offset."""
    rng = np.random.default_rng((seed, epoch))
    if chats:
        return chat_rows[rng.permutation(rows_per_epoch)]
    offset = rng.integers(min(block_size, sizes['train'] - rows_per_epoch * block_size))
    starts = offset + block_size * rng.permutation(rows_per_epoch)
    return np.stack((starts, starts + block_size), axis=1)


def train_parts():
    """This process's parts of the batches of a step. The seed and the number of sequences seen determine them, so that
    a resumed run draws the same ones, with any number of processes."""
    size = batch_size // team_size
    for number in range(rank // team_size, gradient_accumulation_steps, teams):
        first = state.sequences + number * batch_size + rank % team_size * size
        rows = [epoch_rows(i // rows_per_epoch)[i % rows_per_epoch] for i in range(first, first + size)]
        yield batch_at('train', rows)


# --- model and optimizers --------------------------------------------------------------------------------------------

def load_model():
    """The model, new or from a checkpoint with the tokenizer of the data, and the longest block_size of its training,
    or None where that is unknown."""
    place = 'meta' if fsdp and rank else 'cpu' if fsdp else device  # FSDP2 takes the weights from rank 0
    shape = {key: settings[key] for key in GPTConfig.__dataclass_fields__}
    if scratch:
        with torch.device('meta' if place == 'meta' else 'cpu'):  # the same weights on every device
            return GPT(GPTConfig(**shape)).to(place), block_size
    folder = find_checkpoint(source or init_from)
    frozen = lora_rank or (folder / 'adapter_config.json').exists()
    overrides = {key: shape[key] for key in shape.keys() & given}
    model = GPT.from_pretrained(source or init_from, getattr(torch, dtype) if frozen else torch.float32, place,
                                experts or None, **overrides)
    if lora_rank and not model.lora:
        model.add_lora(lora_rank, lora_alpha)
    if model.lora:
        found = dict(lora_rank=model.lora['r'], lora_alpha=float(model.lora['lora_alpha']))
        check(all(found[key] == settings[key] for key in found.keys() & given),
              f'{folder} has adapters of {found}; leave out --lora_rank and --lora_alpha')
        settings.update(found)
    if frozen and 'router_aux_loss_coef' not in given:  # frozen routers cannot be balanced
        model.config.router_aux_loss_coef = shape['router_aux_loss_coef'] if source else 0.0
    check(not experts or model.lora, '--experts=mxfp4 needs --lora_rank, because packed experts do not train')
    if not (folder / 'meta.json').exists():
        say(f'{folder} has no meta.json: whether its tokenizer is that of {data_dir} is not checked')
        return model, None
    theirs, tables = read_json(folder / 'meta.json'), [where / 'tokenizer.tiktoken' for where in (folder, data)]
    same = all(theirs.get(key) == meta.get(key) for key in ('tokenizer', 'vocab_size', 'special_tokens'))
    same = same and len({table.read_bytes() if table.exists() else b'' for table in tables}) == 1
    check(same, f'{folder} has another tokenizer than {data_dir}; prepare the data with --tokenizer={folder}')
    check(not source or 'data_dir' in given or all(theirs.get(key) == meta[key] for key in meta),
          f'{data_dir} has changed since {source} was written; give --data_dir to continue with it nonetheless')
    return model, max(theirs.get('block_size') or 0, block_size)


def shard(model):
    """Divide the model of rank 0 by FSDP2, layer by layer. Each shard_size processes hold a whole copy: weights travel
    among them, and gradients between the copies once a step."""
    mesh = init_device_mesh(device_type, (world // shard_size, shard_size), mesh_dim_names=('copies', 'parts'))

    def placement(p):  # the first dimension that divides evenly, or else the first, which is padded
        return Shard(next((dim for dim, size in enumerate(p.shape) if size % shard_size == 0), 0))

    spread = partial(fully_shard, mesh=mesh, shard_placement_fn=placement)
    weights = {} if rank else model.state_dict()  # keeps the tensors
    model.to('meta').tie_weights()
    for layer in model.model.layers:
        if dtype != 'float32' and not model.lora:  # experts compute in 16 bits, so they are gathered in them
            policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
            spread(layer.mlp.experts, mp_policy=policy)
        spread(layer)
    spread(model).to_empty(device=device).reset_counters(device)
    options = dcp.state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp.state_dict.set_model_state_dict(model, weights, options=options)


def gathered():
    """A copy of what is trained, whole in the memory of rank 0. All processes must call this."""
    with torch.device('meta'):
        whole = GPT(model.config)
    if model.lora:
        whole.add_lora(*model.lora.values())
        whole.source = model.source
    weights = {}
    for name, tensor in model.state_dict().items():
        if not model.lora or 'lora.' in name:
            weights[name] = (tensor.full_tensor() if fsdp else tensor).to('meta' if rank else 'cpu', copy=True)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    return whole


def optimizer_state():
    """{name: tensor} of the state of the optimizers and of the rows of each expert: what a resumed run needs beside the
    weights. They are the tensors themselves, with FSDP2 DTensors."""
    options = dcp.state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    found = dcp.state_dict.get_optimizer_state_dict(model, optimizers, options=options)
    tensors = {name: value for name, value in found.items() if torch.is_tensor(value)}
    return tensors | dict(expert_load=model.expert_load)


def load_optimizer_state(folder):
    """Load what any number of processes wrote. Each process reads its parts."""
    warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # that is meant: each reads for itself
    reader = dcp.HuggingFaceStorageReader(folder)
    try:
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            if sum(chunk.sizes.numel() for chunk in saved.chunks) != saved.size.numel():
                raise ValueError(f'parts of {name} are missing')
        dcp.load(optimizer_state(), storage_reader=reader, no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:  # damaged headers raise many types
        config.fail(f'{folder} does not fit these optimizers ({type(error).__name__}); --init_from={folder} '
                    '--out_dir=NEW starts another run from the weights')
    if rank > 0:
        model.expert_load.zero_()  # rank 0 has the rows of all


torch.manual_seed(seed)
settings['vocab_size'] = vocab_size or vocabulary
with one_line_errors():
    model, trained_on = load_model()
    settings.update(vars(model.config))
    model.recompute |= recompute
    if team_size > 1:
        model.group, _ = dist.new_subgroups(team_size)
    if fsdp:
        shard(model)
    optimizers = model.configure_optimizers(learning_rate, muon_lr, (beta1, beta2), weight_decay, muon_interval)
    if source:
        written = (best / 'state.json').exists() and read_json(best / 'state.json').get('step') == state.best_step
        check(state.step < max_iters or state.best_step == state.step and not written,
              f'{source} has done {state.step} steps of max_iters ({max_iters}); enlarge it')
        load_optimizer_state(source)
scaler = (ShardedGradScaler if fsdp else torch.amp.GradScaler)(device_type, enabled=dtype == 'float16')
if state.scaler:
    scaler.load_state_dict(state.scaler)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
flops, peak_flops = model.flops_per_token(block_size), config.peak_flops(device, dtype)
tokens_per_step = batch_size * gradient_accumulation_steps * block_size
pays = device_type == 'cuda' and has_triton() and max_iters * tokens_per_step * flops / world > 1e16
use_compile = pays if compile is None else compile
if use_compile:
    for module in model.model.layers if fsdp else [model]:
        module.compile(dynamic=False)  # one graph for training, one for evaluation
run = model
if distributed and not fsdp:
    run = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

# --- evaluate, save, log, plot ---------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate():
    """Report the mean loss in nats per token over eval_iters batches, spread over the validation rows, or over all of
    them. Report also the fraction of rows that each expert got since the last evaluation. Return the loss.
    """
    rows, total, load = val_rows, torch.zeros(2, device=device), summed(model.expert_load.clone()).cpu()
    if 0 < eval_iters * batch_size < len(rows):
        rows = rows[np.linspace(0, len(rows), eval_iters * batch_size, endpoint=False).astype(int)]
    size = max(batch_size, 2 ** 13 // block_size)  # without gradients there is room for more
    size = min(size, -(-len(rows) // world))
    # whole batches, as many for each process; the row (0, 0) is empty
    rows = np.pad(rows, ((0, -len(rows) % (size * world)), (0, 0)))[rank::world]
    model.eval()
    for i in range(0, len(rows), size):
        x, y = batch_at('val', rows[i:i + size])
        with autocast:
            total += torch.stack((run(x, y, return_logits=False, count=1)[1], (y >= 0).sum()))  # count=1: the sum
    model.train()
    loss, count = summed(total).tolist()
    row = dict(val_loss=loss / count, val_bpb=loss / count / math.log(2) * tokens_per_byte)
    best_possible = '' if math.isnan(perfect) else f' (perfect: {perfect:.3f})'
    line = f'step {state.step}: val loss {row["val_loss"]:.4f}{best_possible}, {row["val_bpb"]:.4f} bits per byte'
    if state.step > 0:
        fraction, dead = load / load.sum(1, keepdim=True).clamp(min=1), (load == 0).sum(1)
        row |= dict(expert_load_max=fraction.amax(1).tolist(), expert_load_min=fraction.amin(1).tolist(),
                    dead_experts=dead.tolist())
        if (busiest := fraction.max() * load.size(1)) > 1.5:
            line += f', the busiest expert has {busiest:.1f} x the mean load'
        if dead.any():
            line += f', {dead.sum()} experts get no token'
        model.expert_load.zero_()
    log(**row)
    say(line)
    return loss / count


def write_checkpoint(*folders):
    """Copy the run to the memory of the CPU, then write it to best or last, or both, while training goes on."""
    for job in writing:  # one at a time
        job.result()
    for folder in folders if rank == 0 else ():
        shutil.rmtree(folder.with_suffix('.new'), ignore_errors=True)
        folder.with_suffix('.new').mkdir()
    whole, tensors = gathered(), optimizer_state() | dict(expert_load=summed(model.expert_load.clone()))
    held = last in folders and (fsdp or rank == 0)
    moments = {name: tensor.detach().to('cpu', copy=True) for name, tensor in tensors.items() if held}
    run_state = json.dumps(vars(state) | dict(scaler=scaler.state_dict(), settings=settings), indent=2)
    writing[:] = [writer.submit(write_files, folders, whole, moments, run_state)]


def write_files(folders, whole, moments, run_state):
    """Write folders atomically: to NAME.new, flushed to the disk, then renamed. last.old is the `last` before."""
    if fsdp and last in folders:  # a file for each process; it returns when all are written
        if device_type == 'cuda':
            torch.cuda.set_device(device)  # a thread begins with the first GPU
        storage = dcp.HuggingFaceStorageWriter(out / 'last.new', save_distributed=True)  # with threads it loses errors
        try:
            dcp.save(moments, storage_writer=storage, process_group=writers)
        except dcp.api.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
    for folder in folders if rank == 0 else ():
        new, old = folder.with_suffix('.new'), folder.with_suffix('.old')
        whole.save_adapter(new) if whole.lora else whole.save_pretrained(new)
        write_json(new / 'meta.json', meta | dict(block_size=trained_on))
        if (data / 'tokenizer.tiktoken').exists():
            shutil.copy(data / 'tokenizer.tiktoken', new)
        (new / 'state.json').write_text(run_state)
        if folder == last and not fsdp:
            save_file(moments, new / 'optimizer.safetensors')
        for path in (*new.iterdir(), *([new] if hasattr(os, 'O_DIRECTORY') else [])):  # Windows opens no folders
            handle = os.open(path, os.O_RDONLY if path == new else os.O_RDWR)
            os.fsync(handle)
            os.close(handle)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        if folder == best:
            shutil.rmtree(old, ignore_errors=True)


def log(**row):
    if rank == 0:
        bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        row |= dict.fromkeys(bad)  # to None, because JSON has no NaN
        with open(out / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps(dict(step=state.step, tokens=state.tokens, **row)) + '\n')
        if wandb_log:
            wandb.log(row, step=state.step)


def logged_rows():
    with suppress(OSError, ValueError):  # no file yet, or a line that a crash cut short
        for line in open(out / 'metrics.jsonl'):
            yield json.loads(line)


def plot():
    """Draw metrics.jsonl as loss.png."""
    try:
        import matplotlib.figure
    except ImportError:
        return say('(pip install matplotlib, and the next run draws loss.png)')
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.subplots()
    for key, label, style in (('train_loss', 'training', '-'), ('val_loss', 'validation', 'o-')):
        points = np.array([(row['step'], row[key]) for row in logged_rows() if row.get(key)]).reshape(-1, 2)
        axes.plot(*points.T, style, label=label, markersize=4, linewidth=1.2)
    if not math.isnan(perfect):
        axes.axhline(perfect, color='gray', linestyle=':')
        axes.text(0, perfect, f'perfect model: {perfect:.3f}', va='bottom')
    total, active = (f'{model.num_parameters(active) / 1e6:,.1f} M' for active in (False, True))
    axes.set(title=f'{data.name}: {total} parameters, {active} active', xlabel='step', ylabel='loss (nats per token)',
             yscale='log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.legend()
    figure.savefig(out / 'loss.png', dpi=120)


def schedule(step):
    """The learning rates of a step as a fraction of their peaks: linear warm-up, then lr_schedule."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    done = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    fraction = dict(cosine=0.5 * (1 + math.cos(math.pi * done)), linear=min(1, (1 - done) / max(cooldown, 1e-9)),
                    constant=1)[lr_schedule]
    return fraction + (1 - fraction) * min_lr / learning_rate


def stop(number, frame):
    """Finish the step, save, and end. A second Ctrl-C ends at once, except under torchrun, which repeats the first."""
    global stopped_by
    if stopped_by and number == signal.SIGINT and not distributed:
        raise KeyboardInterrupt
    stopped_by = signal.Signals(number).name


# --- the loop --------------------------------------------------------------------------------------------------------

if rank == 0:
    with one_line_errors():
        rows = [row for row in logged_rows() if source and row['step'] <= state.step]  # later ones will be logged again
        (out / 'metrics.new').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        (out / 'metrics.new').replace(out / 'metrics.jsonl')
    for folder in () if source else checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    if wandb_log:
        try:
            import wandb
            wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=settings, id=state.wandb or None,
                       resume='allow')
            state.wandb = wandb.run.id
        except Exception as error:  # it is not installed, or raises one of many types without a key or a network
            config.fail(f'wandb cannot start ({type(error).__name__}: {error}); pip install wandb, or drop --wandb_log')
say(f'{model.num_parameters():,} parameters, {model.num_parameters(active=True):,} of them active for a token; '
    f'{sizes["train"]:,} training tokens; {f"{world} x " if distributed else ""}{device}, {dtype}'
    f'{", compiled" if use_compile else ""}')
stopped_by, stopping, seconds = None, False, []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
progress = tqdm(total=max_iters, initial=state.step, unit='step', dynamic_ncols=True, disable=rank > 0)
model.train()
with one_line_errors():
    if state.step == 0:
        evaluate()
    elif state.best_step == state.step:  # the run may have been killed before it wrote this one
        write_checkpoint(best)
    while state.step < max_iters and not stopping:
        began, rate = time.perf_counter(), schedule(state.step)
        for optimizer, peak in zip(optimizers, (learning_rate, muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = peak * rate
        torch.manual_seed(seed + state.step + (rank << 40))  # dropout follows from the step, in a resumed run too
        parts, totals = list(train_parts()), torch.zeros(3, device=device)
        # the mean number of targets in a part of a batch; dividing by it gives every target of the step equal weight
        count = summed(sum((y >= 0).sum() for _, y in parts)).clamp(min=1) / (micro_steps * world)
        for micro_step, (x, y) in enumerate(parts, 1):
            if fsdp:
                model.set_requires_all_reduce(micro_step == micro_steps)  # between copies, once a step
            elif distributed:
                run.require_backward_grad_sync = micro_step == micro_steps
            with autocast:
                loss = run(x, y, return_logits=False, count=count)[1]
            scaler.scale(loss / micro_steps).backward()
            totals += torch.stack((loss.detach(), model.balance, loss.new_tensor(stopped_by is not None)))
        loss, balance, stopping = (summed(totals) / (micro_steps * world)).tolist()  # one stopped process stops all
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        norm = (norm.full_tensor() if fsdp else norm).item()
        finite = math.isfinite(loss + norm)
        if finite:
            for optimizer in optimizers:  # not scaler.step, because steps in bf16 and fp32 are skipped too
                optimizer.step()
        scaler.update()
        model.zero_grad(set_to_none=True)

        state.step += 1
        state.sequences += batch_size * gradient_accumulation_steps
        state.tokens += tokens_per_step
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        state.losses.append((loss - model.config.router_aux_loss_coef * balance, balance))
        seconds.append(time.perf_counter() - began)
        if state.step % log_interval == 0 or state.step == max_iters:
            train_loss, balance_loss = np.mean(state.losses, axis=0).tolist()
            row = dict(train_loss=train_loss, balance_loss=balance_loss, lr=learning_rate * rate, grad_norm=norm,
                       skipped=state.skipped, tokens_per_second=len(seconds) * tokens_per_step / sum(seconds))
            if peak_flops:
                row['mfu'] = flops * row['tokens_per_second'] / peak_flops / world
            log(**row)
            progress.set_postfix(dict(loss=f'{train_loss:.3f}', tokens_per_s=f'{row["tokens_per_second"]:,.0f}'), False)
            state.losses, seconds = [], []
        stopping = stopping or state.skipped_in_a_row == 10
        evaluated = state.step % eval_interval == 0 or state.step == max_iters
        if evaluated and (val_loss := evaluate()) < state.best_loss:
            state.best_loss, state.best_step = val_loss, state.step
        if evaluated or stopping:
            write_checkpoint(*((last, best) if state.best_step == state.step else (last,)))
        elif writing and writing[0].done():
            writing.pop().result()  # raises what went wrong in the thread
        with suppress(OSError):  # stderr may be closed
            progress.update()
    for job in writing:
        job.result()
check(state.skipped_in_a_row < 10, 'the loss or its gradient was not finite in 10 steps in a row, which were skipped; '
                                   f'{last} holds the weights. Try a lower --learning_rate')
progress.close()
if state.step < max_iters:
    say(f'{stopped_by or "another process"} stopped the run after step {state.step}; --out_dir={out_dir} '
        '--init_from=resume continues it')
elif rank == 0:
    plot()
    say(f'done: best val loss {state.best_loss:.4f}; {best} and {last} hold the model, {out}/metrics.jsonl the numbers')
    if sample_tokens:
        command = [sys.executable, config.ROOT / 'sample.py', f'--out_dir={out_dir}', f'--device={device}',
                   f'--max_new_tokens={sample_tokens}', '--chat' if chats else f'--start={start}']
        subprocess.run(command, input=start, text=True)
if distributed:
    dist.destroy_process_group()
