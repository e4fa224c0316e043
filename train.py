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
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
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
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
router_aux_loss_coef = 0.05
# optimizers and schedule
max_iters = 600  # optimizer steps in the whole run
learning_rate = 8e-3  # peak rate of AdamW
muon_lr = 0.007  # peak rate of Muon, which updates the matrices of the layers; 0: AdamW updates them too
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
compile: bool | None = None  # torch.compile; None: on cuda only
recompute = False  # activation checkpointing: less memory for a third more time
fsdp = False  # under torchrun: shard weights, gradients and moments over the processes
seed = 1337  # of weights, batches and dropout
# -----------------------------------------------------------------------------
settings, given = config.read(__file__, model=True)
out = Path(settings['out_dir'])


def check(good, message):
    if not good:
        config.fail(message)


def say(message):
    with suppress(OSError):  # stdout may be closed, as in `python train.py | head`
        if rank == 0:
            tqdm.write(message)


# --- processes: this one, or all that torchrun started ---------------------------------------------------------------

distributed, rank, world = 'RANK' in os.environ, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
check(distributed or not settings['fsdp'], '--fsdp=True shards the model over processes; start it with torchrun')
if distributed:
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')


def summed(tensor):
    """The sum of the tensors of all processes, in place."""
    if distributed:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    summed(torch.zeros(1))


# --- the run in out_dir: its newest checkpoints last/ and last.old/, best/, and metrics.jsonl ------------------------

FRESH = dict(step=0, sequences=0, tokens=0, skipped=0, skipped_in_a_row=0, best_loss=math.inf, best_step=0, losses=[],
             expert_load=[], wandb='', scaler={}, settings={})  # state.json of a run that has not started


def checkpoints():
    return [out / name for name in ('last', 'last.old', 'best') if (out / name).exists()]


def newest_state():
    """(folder, state) of the newest checkpoint whose files are all readable; (None, FRESH) where there is no run."""
    for folder in (folder for folder in checkpoints() if folder.name != 'best'):
        try:
            for file in (*folder.rglob('*.safetensors'), *folder.glob('*.json')):
                open_file(file) if file.suffix == '.safetensors' else read_json(file)
            raw = read_json(folder / 'state.json')
            state = SimpleNamespace(**{key: type(value)(raw[key]) for key, value in FRESH.items()})
            state.losses = np.array(state.losses, float).reshape(-1, 2).tolist()
            state.expert_load = np.array(state.expert_load, int).tolist()
            if min(state.step, state.sequences, state.tokens) < 0:
                raise ValueError('state.json has a negative counter')
            return folder, state
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            say(f'{folder} is damaged: {type(error).__name__}: {error}')
    check(not checkpoints(), f'{out} has no readable checkpoint to resume; --init_from={out}/best --out_dir=NEW starts '
                             'another run from its best weights')
    return None, SimpleNamespace(**FRESH)


def write_checkpoint(name):
    """Write out_dir/name atomically: to NAME.new, flushed to the disk, then renamed. last.old is the `last` before."""
    new, folder, old = (out / f'{name}{suffix}' for suffix in ('.new', '', '.old'))
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    state.expert_load = summed(model.expert_load.clone()).tolist()
    whole = gathered(model) if fsdp else model
    if rank == 0:
        whole.save_adapter(new) if model.lora else whole.save_pretrained(new)
        write_json(new / 'meta.json', meta | dict(block_size=trained_on))
        if (data / 'tokenizer.tiktoken').exists():
            shutil.copy(data / 'tokenizer.tiktoken', new)
        write_json(new / 'state.json', vars(state) | dict(scaler=scaler.state_dict(), settings=settings))
    if name == 'last' and fsdp:  # every process writes its own rows
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
        save(moments(), storage_writer=HuggingFaceStorageWriter(str(new / 'optimizer'), save_distributed=True))
    elif name == 'last' and rank == 0:
        (new / 'optimizer').mkdir()
        save_file(moments(), new / 'optimizer/moments.safetensors')
    barrier()
    if rank == 0:
        for path in (*new.rglob('*'), new):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        if name == 'best':
            shutil.rmtree(old, ignore_errors=True)


if rank == 0:
    lock = FileLock(out / '.lock')  # the system releases it when this process ends
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        config.fail(f'another run is writing to {out}; give this one an --out_dir of its own')
    except (OSError, NotImplementedError) as error:
        config.fail(f'cannot write to {out}: {error}')
barrier()
source, state = newest_state() if settings['init_from'] == 'resume' else (None, SimpleNamespace(**FRESH))
if source:  # settings of the run; those given now take precedence
    known = config.declared('model.py') | config.declared('train.py')
    for key in state.settings.keys() & known.keys() - given - {'out_dir', 'init_from', 'overwrite', 'fsdp'}:
        settings[key] = config.convert(f'{source}/state.json: {key}', state.settings[key], known[key][0])
globals().update(settings)
check(init_from == 'resume' or overwrite or not checkpoints(), f'{out} holds a run; --init_from=resume continues it, '
      '--out_dir=NAME starts another elsewhere, --overwrite replaces it')
base = Path(init_from).resolve()
check(not {(out / name).resolve() for name in ('best', 'last', 'last.old')} & {base, *base.parents},
      f'init_from is {init_from}, which this run would overwrite; give another --out_dir')
positive = 'batch_size', 'block_size', 'gradient_accumulation_steps', 'max_iters', 'eval_interval', 'log_interval'
for key, value in settings.items():
    check(type(value) not in (int, float) or (key in positive) <= value < 2 ** 62,
          f'{key} is {value}; it must be at least {int(key in positive)}, and not too large')
check(learning_rate > 0, 'learning_rate must be above 0')
check(lr_schedule in ('cosine', 'linear', 'constant'), f'lr_schedule is {lr_schedule!r}; it must be cosine, linear or '
                                                       'constant')
scratch = not source and init_from in ('scratch', 'resume')
check(not scratch or not lora_rank and not experts, 'lora_rank and experts adapt a model: give --init_from=FOLDER')
check(not experts or not fsdp, 'experts=mxfp4 cannot be sharded; leave out --fsdp')
# The processes take the batches of a step in turn, and `sharing` processes divide each batch among them.
sharing = world // math.gcd(world, gradient_accumulation_steps)
micro_steps = gradient_accumulation_steps * sharing // world
check(batch_size % sharing == 0, f'{sharing} processes cannot share a batch of {batch_size} sequences evenly; make '
                                 f'--batch_size a multiple, or --gradient_accumulation_steps one of {world}')
if distributed and device != 'cpu':  # gloo does not reach mps
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if torch.cuda.is_available() else 'cpu'
device, dtype = config.pick_device(device, dtype)
device_type = torch.device(device).type
if distributed and device_type == 'cuda':
    torch.cuda.set_device(device)

# --- data ------------------------------------------------------------------------------------------------------------

data = Path(data_dir)
if not (data / 'meta.json').exists():
    check(data_dir == 'data/builtin', f'{data / "meta.json"} is missing; make the data first: '
                                      f'python prepare.py --data_dir={data_dir} --dataset=... (see --help)')
    if rank == 0:
        say('making the built-in corpus, once:')
        made = subprocess.run([sys.executable, config.ROOT / 'prepare.py', '--dataset=builtin', '--tokenizer=bpe'])
        check(made.returncode == 0, 'prepare.py could not make the built-in corpus')
barrier()
try:
    meta = read_json(data / 'meta.json')
    sizes, token_dtype = {split: int(meta[f'{split}_tokens']) for split in ('train', 'val')}, np.dtype(meta['dtype'])
    vocabulary, end_of_text, chats = int(meta['vocab_size']), int(meta['eot_token']), 'val_targets' in meta
    bytes_per_token = meta['val_bytes'] / meta['val_targets' if chats else 'val_tokens']
    perfect = float(meta.get('perfect_loss', 'nan'))
    if (min(*sizes.values(), bytes_per_token) <= 0 or not max(end_of_text, vocabulary) < 2 ** 31
            or token_dtype not in (np.uint16, np.uint32)):
        raise ValueError('a value is out of its range')
except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
    config.fail(f'{data / "meta.json"} is not what prepare.py writes ({type(error).__name__}: {error}); prepare again')


def open_bin(split, kind=token_dtype, suffix=''):
    """The tokens of a split, or its mask. Opened for each use, so that truncation during a run is detected."""
    path = data / f'{split}{suffix}.bin'
    found, expected = path.stat().st_size if path.is_file() else 'no file', sizes[split] * np.dtype(kind).itemsize
    check(found == expected, f'{path}: found {found}, expected {expected} bytes, from meta.json; prepare again')
    return np.memmap(path, kind, 'r')


def batch_at(split, starts):
    """Rows of a split at these start offsets -> inputs and targets, int64 (B, block_size); target -1 is ignored."""
    tokens = open_bin(split)
    rows = np.full((len(starts), block_size + 1), end_of_text, np.int64)  # the last chat may end before its row
    trained = np.full(rows.shape, not chats)
    for i, start in enumerate(starts):
        piece = tokens[start:start + block_size + 1]
        rows[i, :len(piece)] = piece
        if chats:
            trained[i, :len(piece)] = open_bin(split, np.uint8, '_mask')[start:start + block_size + 1]
    check(rows.max() < model.config.vocab_size, f'{data / split}.bin holds the token id {rows.max()}, but the model '
                                                f'has vocab_size {model.config.vocab_size}')
    if split in row_starts:  # tokens after the last whole document of a row belong to another row
        is_end = rows[:, 1:] == end_of_text
        after_end = is_end[:, ::-1].cumsum(1)[:, ::-1] == 0
        trained[:, 1:] &= ~(after_end & is_end.any(1, keepdims=True))
    x, y = torch.from_numpy(rows[:, :-1]), torch.from_numpy(np.where(trained, rows, -1)[:, 1:])
    if device_type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def cut_into_rows(split):
    """Starts of rows that together predict every token once. A row begins where a document does, or continues one that
    is longer than a row. In texts the last incomplete row is dropped."""
    tokens = np.append(open_bin(split), [end_of_text] * block_size) if chats else open_bin(split)
    ends = np.append(0, np.flatnonzero(tokens == end_of_text) + chats)  # a chat begins after the end of the one before
    starts = [0]
    while starts[-1] + block_size < len(tokens):
        last = ends[np.searchsorted(ends, starts[-1] + block_size + chats, 'right') - 1]
        starts.append(last if last > starts[-1] else starts[-1] + block_size)
    return np.array(starts[:-1])


for split in sizes:
    check(len(open_bin(split)) > block_size or chats,
          f'{data / split}.bin has {sizes[split]} tokens, fewer than block_size + 1 = {block_size + 1}; take more text '
          'or a smaller --block_size')
row_starts = {split: cut_into_rows(split) for split in (['train', 'val'] if chats else ['val'])}
blocks = len(row_starts['train']) if chats else max(1, (sizes['train'] - block_size) // block_size)  # in an epoch


@lru_cache(maxsize=2)
def block_starts(epoch):
    """Each epoch cuts the training tokens into blocks at another offset, chats into rows, and shuffles them."""
    rng = np.random.default_rng((seed, epoch))
    if chats:
        return row_starts['train'][rng.permutation(blocks)]
    return rng.integers(min(block_size, sizes['train'] - blocks * block_size)) + block_size * rng.permutation(blocks)


def train_batches():
    """This process's part of the batches of a step. The seed and the number of sequences seen determine them, so that a
    resumed run draws the same ones, with any number of processes."""
    size = batch_size // sharing
    for number in range(rank // sharing, gradient_accumulation_steps, world // sharing):
        first = state.sequences + number * batch_size + rank % sharing * size
        yield batch_at('train', [block_starts(i // blocks)[i % blocks] for i in range(first, first + size)])


# --- model and optimizers, fresh or resumed --------------------------------------------------------------------------

def check_tokenizer(folder):
    """Refuse a checkpoint whose tokenizer differs from that of the data. Return its block_size, if known."""
    if not (folder / 'meta.json').exists():
        return None
    theirs, tables = read_json(folder / 'meta.json'), [where / 'tokenizer.tiktoken' for where in (folder, data)]
    same = all(theirs.get(key) == meta.get(key) for key in ('tokenizer', 'vocab_size', 'special_tokens'))
    same = same and len({table.read_bytes() if table.exists() else b'' for table in tables}) == 1
    check(same, f'{folder} was trained with another tokenizer than that of {data_dir}; prepare the data with '
                f'--tokenizer={folder}')
    return max(theirs.get('block_size') or 0, block_size)


def load_model():
    """The model, new or from a checkpoint, and the longest block_size that it was trained with."""
    place = 'meta' if fsdp and rank else 'cpu' if fsdp else device  # FSDP2 takes the weights from rank 0
    shape = {key: settings[key] for key in GPTConfig.__dataclass_fields__}
    if scratch:
        with torch.device('meta' if place == 'meta' else 'cpu'):  # the same weights on every device
            return GPT(GPTConfig(**shape)).to(place), block_size
    folder = find_checkpoint(source or init_from)
    frozen = lora_rank or (folder / 'adapter.json').exists()
    if frozen and not source and 'router_aux_loss_coef' not in given:
        settings['router_aux_loss_coef'] = shape['router_aux_loss_coef'] = 0.0  # frozen routers cannot be balanced
    overrides = {key: shape[key] for key in shape.keys() & given | {'router_aux_loss_coef'}}
    model = GPT.from_pretrained(source or init_from, getattr(torch, dtype) if frozen else torch.float32, place,
                                experts or None, **overrides)
    if lora_rank and not model.lora:
        model.add_lora(lora_rank, lora_alpha)
    check(not experts or model.lora, '--experts=mxfp4 needs --lora_rank, because packed experts do not train')
    return model, check_tokenizer(folder)


def shard(model):
    """Divide the model of rank 0 over the processes by FSDP2, layer by layer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    weights = {} if rank else model.state_dict()
    model.to('meta').tie_weights()
    for layer in model.model.layers:
        if dtype != 'float32' and not model.lora:  # experts compute in the dtype of their input, so they travel in it
            policy = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
            fully_shard(layer.mlp.experts, mp_policy=policy)
        fully_shard(layer)
    fully_shard(model).to_empty(device=device).reset_counters(device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def gathered(model):
    """A whole copy of a sharded model in the memory of rank 0. All processes must call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device('meta'):
        whole = GPT(model.config)
    if model.lora:
        whole.add_lora(*model.lora.values())
        whole.source = model.source
    if rank == 0:
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
    return whole


def moments():
    """{name: tensor} of the state of the optimizers; zeros before their first step."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    state = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def load_moments(folder):
    """Load the state that any number of processes wrote into the optimizers."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load
    logging.disable()  # it logs a traceback for each process, and warns where there is only one
    warnings.filterwarnings('ignore', 'torch.distributed is disabled')
    try:
        load(moments(), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not distributed)
    except (CheckpointException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointException):
            error = error.failures[min(error.failures)][0]  # of the first process that failed
        config.fail(f'{folder} does not fit these optimizers ({type(error).__name__}: {error}); '
                    f'--init_from={folder.parent} --out_dir=NEW starts another run from the weights')
    logging.disable(logging.NOTSET)


def out_of_memory(error):
    """End with one line when memory is exhausted; raise other errors."""
    if not isinstance(error, MemoryError) and 'out of memory' not in str(error) and 'allocate memory' not in str(error):
        raise error
    config.fail(f'{device} has too little memory; try --recompute=True, or a smaller --batch_size with more '
                '--gradient_accumulation_steps')


# --- evaluate, log, plot ---------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate():
    """Mean loss in nats per token over eval_iters batches, spread over the validation rows, or over all of them."""
    model.eval()
    starts, total = row_starts['val'], torch.zeros(2, device=device)  # the sum of the losses, and their number
    if 0 < eval_iters * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts), eval_iters * batch_size, endpoint=False).astype(int)]
    mine = np.arange(rank, -(-len(starts) // world) * world, world)  # as many for each process; some are repeated
    size = max(batch_size, 2 ** 13 // block_size)  # without gradients there is room for more
    for part in np.split(mine, range(size, len(mine), size)):
        x, y = batch_at('val', starts[part % len(starts)])
        y[torch.from_numpy(part >= len(starts)).to(device)] = -1
        with autocast:
            loss = run(x, y, return_logits=False)[1]
        total += torch.stack((loss * (y >= 0).sum(), (y >= 0).sum()))
    model.train()
    loss, count = summed(total).tolist()
    check(count > 0, f'the validation rows hold no target; are the chats longer than block_size ({block_size})?')
    return loss / count


def evaluate_and_report():
    """Log the validation loss and, since the last report, the part of the rows that each layer's experts got."""
    val_loss = evaluate()
    bits, load = val_loss / math.log(2) / bytes_per_token, summed(model.expert_load.clone()).cpu()
    model.expert_load.zero_()
    fraction, dead = load / load.sum(1, keepdim=True).clamp(min=1), (load == 0).sum(1)
    experts = dict(expert_load_max=fraction.amax(1).tolist(), expert_load_min=fraction.amin(1).tolist(),
                   dead_experts=dead.tolist())
    log(val_loss=val_loss, val_bpb=bits, **(experts if state.step else {}))
    line, busiest = '' if math.isnan(perfect) else f' (perfect: {perfect:.3f})', fraction.max().item() * load.size(1)
    if state.step and busiest > 1.5:
        line += f', the busiest expert has {busiest:.1f} x the mean load'
    if state.step and dead.any():
        line += f', {dead.sum()} experts get no token'
    say(f'step {state.step}: val loss {val_loss:.4f}, {bits:.4f} bits per byte{line}')
    return val_loss


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
        import matplotlib
    except ImportError:
        return say('(pip install matplotlib, and the next run draws loss.png)')
    matplotlib.use('agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout='constrained')
    for key, label, style in (('train_loss', 'training', '-'), ('val_loss', 'validation', 'o-')):
        points = [(row['step'], row[key]) for row in logged_rows() if row.get(key)]
        axes.plot(*zip(*points), style, label=label, markersize=4, linewidth=1.2)
    if not math.isnan(perfect):
        axes.axhline(perfect, color='gray', linestyle=':')
        axes.annotate(f'perfect model: {perfect:.3f}', (0, perfect), xytext=(4, 4), textcoords='offset points')
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
    done, fraction = (step - warmup_iters) / max(1, max_iters - warmup_iters), 1
    if lr_schedule == 'cosine':
        fraction = 0.5 * (1 + math.cos(math.pi * done))
    elif lr_schedule == 'linear' and cooldown:
        fraction = min(1, (1 - done) / cooldown)
    return fraction + (1 - fraction) * min_lr / learning_rate


def stop(number, frame):
    """Finish the step, write a checkpoint, and end. A second Ctrl-C ends at once; torchrun repeats the first one."""
    global stopped_by
    if stopped_by and number == signal.SIGINT and not distributed:
        raise KeyboardInterrupt
    stopped_by = signal.Signals(number).name


# --- the loop --------------------------------------------------------------------------------------------------------

torch.manual_seed(seed)
settings['vocab_size'] = vocab_size or vocabulary
try:
    model, trained_on = load_model()
    check(block_size <= model.config.max_position_embeddings,
          f'block_size ({block_size}) exceeds max_position_embeddings ({model.config.max_position_embeddings})')
    model.recompute |= recompute
    if sharing > 1:
        model.group, _ = dist.new_subgroups(sharing)
    if fsdp:
        shard(model)
    optimizers = model.configure_optimizers(learning_rate, muon_lr, (beta1, beta2), weight_decay)
    if source:
        check(state.step < max_iters, f'{source} has done {state.step} steps of max_iters ({max_iters}); continue with '
                                      'a larger --max_iters')
        load_moments(source / 'optimizer')
        if rank == 0:  # has the counts of all processes
            load = torch.tensor(state.expert_load, device=device)
            check(load.shape == model.expert_load.shape, f'{source}/state.json has the expert_load of another model')
            model.expert_load += load
except (ValueError, OSError) as error:
    config.fail(error)
except (MemoryError, RuntimeError) as error:
    out_of_memory(error)
GradScaler = torch.amp.GradScaler
if fsdp:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as GradScaler
scaler = GradScaler(device_type, enabled=dtype == 'float16')
if scaler.is_enabled() and state.scaler:
    scaler.load_state_dict(state.scaler)
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
use_compile = device_type == 'cuda' if compile is None else compile
if use_compile and fsdp:
    for layer in model.model.layers:
        layer.compile()
run = torch.compile(model) if use_compile and not fsdp else model
if distributed and not fsdp:
    run = torch.nn.parallel.DistributedDataParallel(run, broadcast_buffers=False, gradient_as_bucket_view=True)
if rank == 0:
    rows = [row for row in logged_rows() if source and row['step'] <= state.step]  # later steps will be logged again
    (out / 'metrics.new').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (out / 'metrics.new').replace(out / 'metrics.jsonl')
    for folder in () if source else checkpoints():
        shutil.rmtree(folder)
    if wandb_log:
        try:
            import wandb
            wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=settings, id=state.wandb or None,
                       resume='allow')
            state.wandb = wandb.run.id
        except Exception as error:  # it is not installed, or raises one of many types without a key or a network
            config.fail(f'wandb cannot start ({type(error).__name__}: {error}); pip install wandb, or drop --wandb_log')
flops, peak_flops = model.flops_per_token(block_size), config.peak_flops(device, dtype)
say(f'{model.num_parameters():,} parameters, {model.num_parameters(active=True):,} of them active for a token; '
    f'{sizes["train"]:,} training tokens; {f"{world} x " if distributed else ""}{device}, {dtype}'
    f'{", compiled" if use_compile else ""}')
stopped_by, stopping, seconds, tokens_per_step = None, False, [], batch_size * gradient_accumulation_steps * block_size
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
progress = tqdm(total=max_iters, initial=state.step, unit='step', dynamic_ncols=True, disable=rank > 0)
model.train()
try:
    if state.step == 0:
        evaluate_and_report()
    elif state.best_step == state.step:  # the run may have been killed before it wrote this one
        write_checkpoint('best')
    while state.step < max_iters and not stopping:
        began, rate = time.perf_counter(), schedule(state.step)
        for optimizer, peak in zip(optimizers, (learning_rate, muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = peak * rate
        torch.manual_seed(seed + state.step + (rank << 40))  # dropout follows from the step, in a resumed run too
        batches, count, totals = list(train_batches()), None, torch.zeros(3, device=device)
        if chats:  # every target counts the same, whichever batch it is in
            count = summed(sum((y >= 0).sum() for _, y in batches)).clamp(min=1) / (micro_steps * world)
        for micro_step, (x, y) in enumerate(batches, 1):
            if distributed and not fsdp:
                run.require_backward_grad_sync = micro_step == micro_steps  # DDP sums gradients once a step
            with autocast:
                loss = run(x, y, return_logits=False, count=count)[1]
            scaler.scale(loss / micro_steps).backward()
            totals += torch.stack((loss.detach(), model.balance, loss.new_tensor(stopped_by is not None)))
        loss, balance, stopping = (summed(totals) / (micro_steps * world)).tolist()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        norm = (norm.full_tensor() if fsdp else norm).item()
        finite = math.isfinite(loss + norm)
        if finite:
            for optimizer in optimizers:
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
                       tokens_per_second=len(seconds) * tokens_per_step / sum(seconds))
            if peak_flops:
                row['mfu'] = flops * row['tokens_per_second'] / peak_flops / world
            log(**row, **(dict(skipped=state.skipped) if state.skipped else {}))
            with suppress(OSError):  # stderr may be closed
                progress.set_postfix(loss=f'{train_loss:.3f}', tokens_per_s=f'{row["tokens_per_second"]:,.0f}')
            state.losses, seconds = [], []
        evaluated = state.step % eval_interval == 0 or state.step == max_iters
        if evaluated and (val_loss := evaluate_and_report()) < state.best_loss:
            state.best_loss, state.best_step = val_loss, state.step
        if evaluated or stopping or state.skipped_in_a_row == 10:
            write_checkpoint('last')
        if evaluated and state.best_step == state.step:
            write_checkpoint('best')
        check(state.skipped_in_a_row < 10, f'the loss or its gradient was not finite for 10 steps in a row, which were '
                                           f'skipped; {out / "last"} holds the weights. Try a lower --learning_rate')
        with suppress(OSError):
            progress.update()
except OSError as error:
    for name in ('last.new', 'best.new'):  # they may fill the disk
        shutil.rmtree(out / name, ignore_errors=True)
    config.fail(f'{error}; the checkpoints in {out} are whole')
except (MemoryError, RuntimeError) as error:
    out_of_memory(error)
progress.close()
if state.step < max_iters:
    say(f'{stopped_by or "another process"} stopped the run after step {state.step}; --out_dir={out_dir} '
        '--init_from=resume continues it')
elif rank == 0:
    plot()
    say(f'done: best val loss {state.best_loss:.4f}; {out / "best"} and {out / "last"} hold the model, '
        f'{out / "metrics.jsonl"} the numbers')
    if sample_tokens:
        command = [sys.executable, config.ROOT / 'sample.py', f'--out_dir={out_dir}', f'--device={device}',
                   f'--max_new_tokens={sample_tokens}', '--chat' if chats else f'--start={start}']
        subprocess.run(command, input=start, text=True)
if distributed:
    dist.destroy_process_group()
