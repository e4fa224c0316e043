"""
Train a GPT-OSS. With no arguments it makes up a corpus of small stories and learns to tell them, in minutes on a CPU:

    python train.py
    python train.py config/tinystories.py --batch_size=32
    python train.py --out_dir=out --init_from=resume
    python train.py --init_from=openai/gpt-oss-20b --data_dir=data/chats --lora_rank=8 --out_dir=out-chats
    torchrun --nproc_per_node=8 train.py config/gpt_oss_500m.py

Under torchrun the processes share every step's batches, so the numbers are those of one process; with --fsdp=True they
share weights, gradients and moments too. Every setting below is a flag, and so is every field of model.py's GPTConfig;
--help lists them all.
"""

import config  # first, for it makes Ctrl-C quiet

import errno
import hashlib
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
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
from safetensors import SafetensorError
from tqdm.auto import tqdm

from bench import peak_flops, pick_device, training_memory
from model import GPT, GPTConfig, Muon, find_checkpoint, memory_here, read_bytes, read_json, save_file

# -----------------------------------------------------------------------------
# where things are
out_dir = 'out'  # gets best/ and last/ (checkpoints that transformers loads too), metrics.jsonl and loss.png
data_dir = 'data/builtin'  # what prepare.py wrote; the default is made on first use
init_from = 'scratch'  # scratch, resume (the run in out_dir), or the folder or hub id of a checkpoint to start from
overwrite = False  # replace the run that is in out_dir
lora_rank = 0  # fine-tune by adapters of this rank on attention and experts, the model itself frozen; 0: all of it
lora_alpha = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
experts = ''  # mxfp4: with lora_rank, keep the frozen experts at four bits a value
# batches; under torchrun the processes share them
batch_size = 16  # sequences that go through the model together
block_size = 256  # tokens in a sequence
gradient_accumulation_steps = 1  # batches that make one step
# the model's shape; the other fields of GPTConfig keep their defaults
vocab_size = 0  # 0: the tokenizer's
hidden_size = 128
intermediate_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
router_aux_loss_coef = 0.05
# the optimizers and their schedule
max_iters = 600  # optimizer steps in the whole run
learning_rate = 8e-3  # AdamW's, at its highest
muon_lr = 0.007  # Muon's, on the layers' matrices, at its highest; 0: AdamW has them too
min_lr = 0.0  # AdamW's at the end; Muon's falls in proportion
warmup_iters = 30  # steps of linear warm-up
lr_schedule = 'linear'  # after the warm-up: cosine, linear (flat, then straight down over the cooldown) or constant
cooldown = 0.7  # share of the run over which the linear schedule comes down
weight_decay = 0.1  # on matrices only
beta1 = 0.9  # decay of the mean of the gradients, AdamW's and Muon's
beta2 = 0.95  # decay of AdamW's mean of the squared gradients
grad_clip = 1.0  # the gradient's norm is cut to this; 0: never
# reports
eval_interval = 100  # steps between evaluations, at which checkpoints are written
eval_iters = 10  # validation batches, the same ones each time; 0: the whole validation set
log_interval = 10  # steps between rows of metrics.jsonl
start = 'Once upon a time'  # what the sample at the end begins with; empty: the end-of-text token
sample_tokens = 400  # length of that sample; 0: none
wandb_log = False  # send the numbers to Weights & Biases too
wandb_project = 'nano-gpt-oss'  # its project
wandb_run_name = ''  # its name for the run; empty: out_dir
# the machine
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 (with loss scaling) or float32; auto: the first that the device is fast in
compile: bool | None = None  # torch.compile; None: on cuda only
fsdp = False  # under torchrun: spread weights, gradients and moments over the processes, for what one cannot hold
seed = 1337  # of the weights, the batches and dropout
# -----------------------------------------------------------------------------
settings, given = config.read(__file__, model=True)
out = Path(settings['out_dir'])


def check(good, message):
    if not good:
        config.fail(message)


def say(message):
    """Print from the first process. Where nobody reads on, as of a pipe whose reader is gone, training goes on."""
    try:
        if rank == 0:
            tqdm.write(message)
            sys.stdout.flush()
    except (OSError, AttributeError):
        sys.stdout = open(os.devnull, 'w')


# --- processes: this one, or all that torchrun started --------------------------------------------------------------

distributed, rank, world = 'RANK' in os.environ, 0, 1
if distributed:
    try:
        rank, world, restarts, local_rank = (int(os.environ.get(key, default)) for key, default in (
            ('RANK', 0), ('WORLD_SIZE', 0), ('TORCHELASTIC_RESTART_COUNT', 0), ('LOCAL_RANK', os.environ['RANK'])))
    except ValueError as error:
        config.fail(f'RANK, LOCAL_RANK, WORLD_SIZE or TORCHELASTIC_RESTART_COUNT is no number, {error}; torchrun sets '
                    'them')
    check(0 <= rank < world, f'RANK is {rank} and WORLD_SIZE {world}; start this with torchrun, which sets both, or '
                             'unset RANK')
check(distributed or not settings['fsdp'], '--fsdp=True spreads the model over processes: start it with '
                                           'torchrun --nproc_per_node=N train.py ...')
if distributed:
    try:
        store, *_ = next(dist.rendezvous('env://'))
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            # A place for each start, or gloo would look for processes that died. Several machines do not agree on how
            # many starts there were; for them see the README.
            store = dist.PrefixStore(f'start {restarts}', store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', rank=rank,
                                world_size=world, store=store)
    except (ValueError, TypeError, RuntimeError) as error:
        config.fail(f'RANK is {rank}, as if torchrun had started this, but its other processes cannot be had: {error}')


def left_alone(error):
    """End this process as one that cannot go on without another."""
    config.fail(f'another process of this run has ended; its message stands above or below ({str(error)[:100]})')


def together(collective, *arguments):
    """Do what all processes must do, if there are others."""
    try:
        if distributed:
            return collective(*arguments)
    except RuntimeError as error:
        left_alone(error)


def summed(tensor):
    """The sum of all processes' tensors, in place."""
    together(dist.all_reduce, tensor)
    return tensor


def launchers():
    """What tells the torchrun processes that started this run's processes from all others, as a set of strings: one
    that is there again after a restart is what a restart is known by, for not all of several machines count one."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return set()
    mine = f'{os.environ["TORCHELASTIC_RUN_ID"]} {platform.node()} {os.getppid()}'
    with suppress(OSError):  # Linux tells when a process began, too, for containers number theirs alike
        mine += ' ' + Path(f'/proc/{os.getppid()}/stat').read_text().rpartition(')')[2].split()[19]
    everyone = [mine] * world
    together(dist.all_gather_object, everyone, mine)
    return set(everyone)


# --- the run that may be in out_dir ---------------------------------------------------------------------------------

def checksums(folder):
    """SHA256SUMS for the files in a folder, as sha256sum writes it. When this returns they are on the disk, and not
    only on their way there. The processes share the work."""
    lines = []
    files = [file for file in folder.iterdir() if not file.name.startswith(('.', 'SHA256SUMS'))]  # .DS_Store, .nfs...
    for file in sorted(files)[rank::world]:
        digest = hashlib.sha256()
        try:
            if not file.is_file():
                raise OSError(errno.EINVAL, 'no regular file')
            with open(file, 'rb') as content:
                for chunk in iter(lambda: content.read(2 ** 20), b''):
                    digest.update(chunk)
                os.fsync(content.fileno())
            lines.append(f'{digest.hexdigest()}  {file.name}\n')
        except OSError as error:  # of which all processes are to know
            lines.append(f'unreadable: {error.strerror}  {file.name}\n')
    everyone = [lines] * world
    together(dist.all_gather_object, everyone, lines)
    return ''.join(sorted(sum(everyone, []) if distributed else lines))


def read_state(folder):
    """What state.json of a checkpoint tells, as a namespace. Raises ValueError if anything in the folder is not as it
    was written, or tells what no run could."""
    try:
        found, written = checksums(folder), read_bytes(folder / 'SHA256SUMS').decode()
        changed = {line.split()[-1] for line in set(written.splitlines()) ^ set(found.splitlines()) if line.split()}
        if changed:
            raise ValueError(f'not as SHA256SUMS tells: {", ".join(sorted(changed))}'[:200])
        state = SimpleNamespace(**read_json(folder / 'state.json'))
        state.losses, state.entropy = torch.tensor(state.losses), torch.tensor(state.entropy)
        state.load, state.wandb = torch.tensor(state.load, dtype=torch.int64), str(getattr(state, 'wandb', ''))
        known = config.settings_of(__file__, model=True)
        state.settings = {key: config.convert(key, value, known[key][0])
                          for key, value in state.settings.items() if key in known}
        counters, scaling = [state.step, state.sequences, *state.bad_steps], list(state.scaler.values())
        if len(counters) != 4 or not all(type(counter) is int and 0 <= counter < 2 ** 62 for counter in counters):
            raise ValueError(f'step, sequences and bad_steps are {counters}')
        if not all(type(number) in (int, float) and 0 <= number < math.inf for number in scaling):
            raise ValueError(f'scaler is {state.scaler}')
        if type(state.owed) is not bool or not state.best_loss > -math.inf or state.losses.dim() != 1:
            raise ValueError(f'owed is {state.owed}, best_loss {state.best_loss}, losses {state.losses.tolist()}')
        return state
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f'{type(error).__name__}: {str(error):.300}') from error


def find_run():
    """The checkpoints in out_dir: the newest, the one before, the best."""
    return [folder for name in ('last', 'last.old', 'best') if (folder := out / name).exists()]


lock = FileLock(out / '.lock')  # the system lets go of it when the process ends, however it does
def lock_out_dir():
    """Keep out_dir for this run. Refuses one that another has, or in which something else has a checkpoint's name."""
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        say(f'(the file system of {out} has no locks: see to it that no other run writes there)')
    except Timeout:
        config.fail(f'another run is writing to {out}; give this one an --out_dir of its own')
    for name in ('last', 'last.old', 'last.new', 'last.damaged', 'best', 'best.old', 'best.new'):
        check((out / name).is_dir() and not (out / name).is_symlink() or not os.path.lexists(out / name),
              f'{out / name} is no folder of a run; move it away')


check(not config.enclosing_checkpoint(out), f'{out} is a checkpoint, or in one; out_dir is the folder that last/ and '
                                            'best/ are in, or a new one')
if rank == 0:
    try:
        if out.is_dir():
            lock_out_dir()
    except OSError as error:
        config.fail(f'cannot write to {out}: {error}')
together(dist.barrier)
checkpoints = [folder for folder in find_run() if folder.name != 'best']
agents = launchers()
again = False
if rank == 0:
    with suppress(OSError, ValueError):  # of what is no file of ours
        again = not agents.isdisjoint(read_bytes(out / '.launch').decode().splitlines())
if summed(torch.tensor(int(again))) and checkpoints:  # started anew by torchrun --max-restarts
    settings['init_from'] = 'resume'
check(checkpoints or settings['init_from'] != 'resume', f'{out} holds no run to resume')
if settings['init_from'] == 'resume':  # with the run's own settings, but for what is asked for now
    for source in checkpoints:
        try:
            state = read_state(source)
            break
        except ValueError as error:
            damage = f'{source} is damaged ({error})'
            check(source != checkpoints[-1], f'{damage}; start anew from the weights, if they are whole, with '
                                             f'--init_from={source} and another --out_dir')
            if rank == 0:
                print(f'{damage}; going on from {checkpoints[-1]}', file=sys.stderr)
    kept = settings.keys() - given - {'out_dir', 'init_from', 'overwrite', 'fsdp'}
    settings |= {key: value for key, value in state.settings.items() if key in kept}
else:
    state = SimpleNamespace(step=0, sequences=0, best_loss=math.inf, owed=True, losses=[], bad_steps=[0, 0], wandb='')
globals().update(settings)

for key in 'batch_size block_size gradient_accumulation_steps max_iters eval_interval log_interval'.split():
    check(settings[key] >= 1, f'{key} is {settings[key]}; it must be at least 1')
for key in 'muon_lr min_lr eval_iters warmup_iters weight_decay grad_clip sample_tokens seed vocab_size'.split():
    check(0 <= settings[key] < 2 ** 62, f'{key} is {settings[key]}; it must be 0 or more')
check(0 < learning_rate < math.inf, f'learning_rate is {learning_rate}; it must be above 0')
for key in ('beta1', 'beta2', 'cooldown'):
    check(0 <= settings[key] < 1 or settings[key] == 1 and key == 'cooldown',
          f'{key} is {settings[key]}; it must be at least 0 and below 1')
check(lr_schedule in ('cosine', 'linear', 'constant'),
      f'lr_schedule is {lr_schedule!r}; it is cosine, linear or constant')
check(lora_rank >= 0 and lora_alpha > 0,
      f'lora_rank is {lora_rank} and lora_alpha {lora_alpha}; they must be at least 0, and above 0')
check(not lora_rank or init_from != 'scratch', 'lora_rank adapts a model that there is: give --init_from=FOLDER')
check(experts in ('', 'mxfp4'), f'experts is {experts!r}; it is mxfp4, or empty')
check(not experts or init_from != 'scratch', 'experts=mxfp4 keeps those of a checkpoint: give --init_from=FOLDER')
if distributed and device == 'auto' and not torch.cuda.is_available():
    device = 'cpu'  # for which gloo works, as for mps it does not
device, dtype = pick_device(device, dtype)
device_type = torch.device(device).type
if distributed and device_type == 'cuda':
    gpus = torch.cuda.device_count()
    check(local_rank < gpus, f'this machine has {gpus} GPUs; start as many processes, --nproc_per_node={gpus}')
    device = f'cuda:{local_rank}'
    torch.cuda.set_device(device)
holds_run = (f'{out_dir} holds a run; --init_from=resume goes on with it, --out_dir=NAME starts another elsewhere, '
             '--overwrite replaces it')
check(init_from == 'resume' or overwrite or not find_run(), holds_run)
weights, replaced = Path(init_from).resolve(), ('last', 'last.old', 'last.damaged', 'best', 'best.old')
check(not {(out / name).resolve() for name in replaced} & {weights, *weights.parents},
      f'init_from is {init_from}, which this run would overwrite; give another --out_dir')
# A step has gradient_accumulation_steps batches. Groups of processes take them in turn, and the `sharing` processes of
# a group divide each of theirs among them.
sharing = world // math.gcd(world, gradient_accumulation_steps)
check(batch_size % sharing == 0, f'{sharing} processes cannot share a batch of {batch_size} sequences evenly; take a '
                                 f'multiple as --batch_size, or of {world} as --gradient_accumulation_steps')
check(not (fsdp and experts), 'experts at four bits a value cannot be spread over processes: leave out --fsdp')


def no_memory(error, instead):
    """End this run if the error says that memory has; raise it otherwise."""
    if not isinstance(error, MemoryError) and 'out of memory' not in str(error) and 'allocate memory' not in str(error):
        raise error
    config.fail(f'{device} has too little memory; {instead}')


# --- data and model -------------------------------------------------------------------------------------------------

data = Path(data_dir)
if not os.path.exists(data / 'meta.json'):
    check(data_dir == 'data/builtin', f'{data / "meta.json"} is missing; make the data first: '
                                      f'python prepare.py --data_dir={data_dir} --dataset=... (--help tells more)')
    if rank == 0:
        say('making the built-in corpus, once:')
        made = subprocess.run([sys.executable, config.ROOT / 'prepare.py', f'--data_dir={data_dir}',
                               '--dataset=builtin', '--tokenizer=bpe'])
        check(made.returncode == 0, 'prepare.py could not make the built-in corpus')
together(dist.barrier)
try:
    meta = read_json(data / 'meta.json')
    sizes = {split: meta[f'{split}_tokens'] for split in ('train', 'val')}
    token_dtype, vocabulary = np.dtype(dict(uint16='uint16', uint32='uint32')[meta['dtype']]), meta['vocab_size']
    end_of_text, chats = meta.get('eot_token', -1), 'val_targets' in meta  # chats: with masks of what to train on
    bytes_per_token = meta['val_bytes'] / meta['val_targets' if chats else 'val_tokens']
    perfect = float(meta.get('perfect_loss', 'nan'))
    numbers = [*sizes.values(), vocabulary, meta['val_bytes'], end_of_text + 2]  # -1: no token ends a text
    numbers += [meta[f'{split}_targets'] for split in sizes if chats]
    if not all(isinstance(n, int) and 0 < n < 2 ** 62 for n in numbers) or vocabulary >= 2 ** 31:
        raise ValueError(f'sizes {numbers}')
except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
    config.fail(f'{data / "meta.json"} is not what prepare.py writes ({type(error).__name__}: {error}); prepare again')

def check_memory(shape, frozen=False):
    """Refuse what surely does not fit on a CPU, whose end of memory hits others too; a GPU just says so."""
    need = training_memory(shape, batch_size // sharing, block_size, 4, muon_lr and not frozen, False, world, fsdp)
    need = need['activations'] if frozen else sum(need.values())
    check(device_type != 'cpu' or need < 1.2 * memory_here(),
          f'training this model, with its vocab_size of {shape.vocab_size:,}, takes about {need / 1e9:,.0f} GB, and '
          f'here are {memory_here() / 1e9:,.0f}; take a smaller model or --batch_size')


def check_tokenizer(folder):
    """Refuse a checkpoint that numbers tokens otherwise than the data does; the largest block_size it was trained with,
    or None if it is not ours: then it sees farther than any block_size here."""
    if not (folder / 'meta.json').exists():
        return None
    theirs = read_json(folder / 'meta.json')
    same = all(theirs.get(key, default) == meta.get(key, default) for key, default in (
        ('tokenizer', None), ('special_tokens', ['<|endoftext|>'])))
    if same and (folder / 'tokenizer.tiktoken').exists():
        same = read_bytes(folder / 'tokenizer.tiktoken') == table
    check(same, f'{folder} was trained with another tokenizer than that of {data_dir}; prepare the data with '
                f'--tokenizer={folder}')
    before = theirs.get('block_size')
    check(before is None or type(before) is int, f'{folder / "meta.json"} is damaged: block_size is {before!r:.99}')
    return before and max(before, block_size)


torch.manual_seed(seed)
settings['vocab_size'] = vocab_size or vocabulary
shape = {key: settings[key] for key in GPTConfig.__dataclass_fields__}
in_shards = (fsdp and init_from == 'resume' and any(source.glob('shard-*'))  # of which each process reads its own
             and not (source / 'adapter.json').exists())  # which are not all of the model
place = 'meta' if fsdp and (rank or in_shards) else None  # of the weights of a model that is spread; the first has all
try:
    table = data / 'tokenizer.tiktoken'  # of our own tokenizers
    table = read_bytes(table) if table.exists() else None
    if init_from == 'scratch':
        check_memory(GPTConfig(**shape))
        with torch.device(place or 'cpu'):
            model, trained_on = GPT(GPTConfig(**shape)), block_size
    else:
        source = source if init_from == 'resume' else init_from
        asked = given & shape.keys() | {'router_aux_loss_coef', *(['attention_dropout'] if 'dropout' in given else [])}
        folder = find_checkpoint(source)
        frozen = lora_rank or (folder / 'adapter.json').exists()
        changes = {key: shape[key] for key in asked}
        if frozen and init_from != 'resume' and 'router_aux_loss_coef' not in given:
            settings['router_aux_loss_coef'] = changes['router_aux_loss_coef'] = 0.0  # for routers do not move then
        model = GPT.from_pretrained(source, getattr(torch, dtype) if frozen else torch.float32,
                                    place or ('cpu' if fsdp else device), experts or None, **changes)
        check_memory(model.config, frozen)
        if lora_rank and not model.lora:
            model.add_lora(lora_rank, lora_alpha)
        check(not experts or model.lora, 'experts at four bits a value do not train: --experts=mxfp4 wants --lora_rank')
        check(not lora_rank or lora_rank == model.lora['lora_rank'],
              f'{source} has adapters of lora_rank {(model.lora or settings)["lora_rank"]}, not {lora_rank}')
        check(not model.lora or out.resolve() not in Path(model.source['base']).resolve().parents,
              f'{out_dir} holds what the adapters adapt, {(model.source or {}).get("base")}; give another --out_dir')
        trained_on = check_tokenizer(folder)
except (ValueError, TypeError, OSError, KeyError, AttributeError) as error:
    config.fail(error)
except (MemoryError, RuntimeError) as error:
    no_memory(error, '--lora_rank with --experts=mxfp4 takes least for a model')
vocab_size = model.config.vocab_size
check(block_size <= model.config.max_position_embeddings,
      f'block_size ({block_size}) exceeds max_position_embeddings ({model.config.max_position_embeddings})')


def spread():
    """Divide the model over the processes by FSDP2, layer by layer, its weights from the first or yet to be loaded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    whole = {} if place else model.state_dict()
    model.to('meta')
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        # Experts take their input's dtype, so they may travel in it; the rest must not: router and norms are in fp32.
        if dtype != 'float32' and not model.lora:
            fully_shard(layer.mlp.experts, mp_policy=MixedPrecisionPolicy(
                getattr(torch, dtype), torch.float32, cast_forward_inputs=False))
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device=device)
    for layer in model.model.layers:
        layer.mlp.load.zero_(), layer.mlp.entropy.zero_()
    register_fsdp_forward_method(model, 'next_logits')
    if not in_shards:
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


try:
    spread() if fsdp else model.to(device)
    optimizers = model.configure_optimizers(learning_rate, muon_lr, (beta1, beta2), weight_decay)
    for optimizer in optimizers:  # their state is there from the beginning, for the first step may be one to skip
        for p in (p for group in optimizer.param_groups for p in group['params']):
            optimizer.state[p] = {key: torch.zeros_like(p) for key in (
                ['momentum'] if isinstance(optimizer, Muon) else ['exp_avg', 'exp_avg_sq'])}
            if not isinstance(optimizer, Muon):
                optimizer.state[p]['step'] = torch.zeros((), device=device if optimizer.defaults['fused'] else 'cpu')
except (MemoryError, RuntimeError) as error:
    no_memory(error, '--fsdp=True spreads a model over several, --lora_rank trains a small part of it')
if sharing > 1:
    group, _ = together(dist.new_subgroups, sharing)
    for layer in model.model.layers:
        layer.mlp.group = group
names = {p: name for name, p in model.named_parameters()}
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')


def quietly(save_or_load, *arguments, **options):
    """One of torch.distributed.checkpoint's, which logs tracebacks and raises several at once. Raises OSError."""
    from torch.distributed.checkpoint import CheckpointException
    logging.disable()
    try:
        with warnings.catch_warnings(action='ignore'):  # one process need not be told that it is the only one
            save_or_load(*arguments, **options)
    except CheckpointException as error:
        raise OSError(f'process {(failed := min(error.failures))}: {error.failures[failed][0]}') from error
    finally:
        logging.disable(logging.NOTSET)


def moments():
    """{name: tensor} of what the optimizers remember."""
    return {f'{names[p]}/{key}': value for optimizer in optimizers for p, state in optimizer.state.items()
            for key, value in state.items()}


step, sequences, best_loss, owed = state.step, state.sequences, state.best_loss, state.owed
if init_from == 'resume':
    check(step < max_iters or step == max_iters and owed,
          f'{source} has done {step} steps of max_iters = {max_iters}; a larger --max_iters goes on')
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    saved = moments() | ({name: p for name, p in model.named_parameters() if p.requires_grad} if in_shards else {})
    try:
        if state.scaler and scaler.is_enabled():
            scaler.load_state_dict(state.scaler)
        quietly(load, saved, storage_reader=HuggingFaceStorageReader(str(source)), no_dist=not distributed)
        for value in moments().values():
            if not (value.to_local() if hasattr(value, 'to_local') else value).isfinite().all():
                raise ValueError('not all of it is finite')
        if rank == 0:  # who alone has what all have counted
            for layer, chosen, entropy in zip(model.model.layers, state.load, state.entropy):
                layer.mlp.load.copy_(chosen), layer.mlp.entropy.copy_(entropy)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        config.fail(f'{source} does not hold what these optimizers remember ({type(error).__name__}: {error}); start '
                    f'anew from the weights with --init_from={source} and another --out_dir')
losses = [loss.to(device) for loss in state.losses]  # of the steps since the last row of metrics.jsonl
skipped, skipped_in_a_row = torch.tensor(state.bad_steps, device=device).float()  # on the device, so that no step waits


masks = {}  # of chats


def check_size(split):
    path = data / f'{split}.bin'
    found, expected = path.stat().st_size if path.exists() else 'no file', sizes[split] * token_dtype.itemsize
    check(found == expected, f'{path}: found {found} bytes, expected {expected} (meta.json: {sizes[split]} tokens of '
                             f'{token_dtype}); prepare again')
    return path


def open_bin(split):
    path = check_size(split)
    check(sizes[split] > block_size or chats,
          f'{path} has {sizes[split]} tokens, but one block takes block_size + 1 = {block_size + 1}; take a smaller '
          '--block_size or more text')
    tokens = np.memmap(path, token_dtype, 'r')
    if chats:
        file = data / f'{split}_mask.bin'
        size, targets = file.stat().st_size if file.is_file() else 0, meta[f'{split}_targets']
        mask = np.fromfile(file, np.uint8) if size == len(tokens) else np.zeros(1)
        check(mask.sum() == targets and mask.max() == 1, f'{file}: found {size} bytes, {mask.sum():.0f} of them 1, '
                                                         f'expected {len(tokens)} and {targets}; prepare again')
        masks[split] = np.pad(mask, (0, block_size))  # so that the last chat has a whole row
        tokens = np.pad(tokens, (0, block_size), constant_values=end_of_text)
    pieces = range(rank * 2 ** 24, len(tokens), world * 2 ** 24)  # between them the processes look at all
    largest = max((int(tokens[i:i + 2 ** 24].max()) for i in pieces), default=0)
    check(largest < vocab_size, f'{path} holds the token id {largest}, but the model has vocab_size {vocab_size}')
    return tokens


def cut_into_rows(tokens):
    """Starts of rows of block_size that begin at the end of a document, to foretell all of the next, or go on in a
    longer one: a document that does not end in its row, though another does, has the next row. What is left and less
    than a row stays out, but of chats nothing is."""
    ends = np.append(0, np.flatnonzero(tokens == end_of_text) + chats)  # a chat begins after what ended the last one
    starts = [0]
    while starts[-1] + block_size < len(tokens):
        last = ends[np.searchsorted(ends, starts[-1] + block_size + chats, 'right') - 1]  # the last one in this row
        starts.append(last if last > starts[-1] else starts[-1] + block_size)
    return np.array(starts[:-1])


tokens = {split: open_bin(split) for split in ('train', 'val')}
rows = {split: cut_into_rows(tokens[split]) for split in (['train', 'val'] if chats else ['val'])}
blocks = len(rows['train']) if chats else max(1, (sizes['train'] - block_size) // block_size)  # in an epoch


@lru_cache(maxsize=2)
def block_starts(epoch):
    """Every epoch cuts the training tokens into blocks at another offset, chats into rows, and draws each one once."""
    rng = np.random.default_rng((seed, epoch))
    if chats:
        return rows['train'][rng.permutation(blocks)]
    offset = rng.integers(min(block_size, sizes['train'] - blocks * block_size))
    return offset + block_size * rng.permutation(blocks)


def to_device(split, starts):
    """The blocks of a split's tokens at these starts -> inputs and targets, int64 (B, T); target -1 does not count."""
    check_size(split)  # for what was mapped and is no longer there would end the process without a word
    block = torch.from_numpy(np.stack([tokens[split][i:i + block_size + 1] for i in starts]).astype(np.int64))
    check(block.max() < vocab_size, f'{data / split}.bin has changed: it holds the token id {block.max()} now')
    if chats:
        trained = torch.from_numpy(np.stack([masks[split][i + 1:i + block_size + 1] for i in starts]))
        block = torch.cat((block, trained), dim=1)
    if device_type == 'cuda':
        block = block.pin_memory()
    block = block.to(device, non_blocking=True)
    x, y = block[:, :block_size], block[:, 1:block_size + 1]
    if split in rows:  # what comes after the last whole document of a row begins another row
        is_end = y == end_of_text
        y = y.masked_fill((is_end.flip(1).cumsum(1).flip(1) == 0) & is_end.any(1, keepdim=True), -1)
    if chats:
        y = y.masked_fill(block[:, block_size + 1:] == 0, -1)
    return x, y


def train_batches():
    """This process's part of the next step's batches. Their order follows from the seed and from how many sequences
    were seen, so a resumed run goes on where it stopped, with any number of processes."""
    for number in range(rank // sharing, gradient_accumulation_steps, world // sharing):
        first = sequences + number * batch_size + rank % sharing * (batch_size // sharing)
        numbers = range(first, first + batch_size // sharing)
        yield to_device('train', [block_starts(i // blocks)[i % blocks] for i in numbers])


# --- what happens at intervals --------------------------------------------------------------------------------------

def asked_to_stop():
    """Whether any process was, in which all agree."""
    asked = torch.tensor(float(stopped_by is not None))
    return bool(summed(asked))


@torch.no_grad()
def evaluate():
    """Mean loss in nats a token of eval_iters batches spread over the validation rows, or of all of them, shared by the
    processes; None if asked to stop meanwhile."""
    model.eval()
    starts, kind = rows['val'], torch.float32 if device_type == 'mps' else torch.float64
    total = torch.zeros(2, dtype=kind, device=device)  # the sum of the losses, and how many
    if 0 < eval_iters * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts), eval_iters * batch_size, endpoint=False).astype(int)]
    together = max(batch_size, 2 ** 13 // block_size)  # more than train together, for there are no gradients to keep
    mine = np.arange(rank, -(-len(starts) // world) * world, world)  # as many for each; what is too much is repeated
    for batch in np.split(mine, range(together, len(mine), together)):
        x, y = to_device('val', starts[batch % len(starts)])
        y = y.masked_fill(torch.from_numpy(batch >= len(starts)).to(device)[:, None], -1)
        with autocast:
            loss = run(x, y, return_logits=False)[1]
        total += torch.stack((loss * (y >= 0).sum(), (y >= 0).sum()))
        if asked_to_stop():
            return None
    model.train()
    loss, count = summed(total).tolist()
    check(count > 0, f'the validation rows hold nothing to learn: the chats are longer than block_size ({block_size})')
    return loss / count


def counted_experts():
    """Of training since the last report: how many (token, choice) pairs each layer's experts got (layers, experts), and
    the summed entropies of its router (layers,)."""
    return [summed(torch.stack([getattr(layer.mlp, key) for layer in model.model.layers]))
            for key in ('load', 'entropy')]


def expert_report():
    """Of training since the last call, layer by layer: the busiest and the idlest expert's share of the load, how many
    experts got no token at all, and the entropy of the router's softmax as a part of what an even one has."""
    load, entropy = (counted.cpu().double() for counted in counted_experts())
    for layer in model.model.layers:
        layer.mlp.load.zero_(), layer.mlp.entropy.zero_()
    experts, chosen, total = load.size(1), model.config.num_experts_per_tok, load.sum(1).clamp(min=1)
    share, entropy = load / total[:, None], entropy / (total / chosen) / math.log(max(experts, 2))
    return dict(expert_load_max=share.amax(1).tolist(), expert_load_min=share.amin(1).tolist(),
                dead_experts=(load == 0).sum(1).tolist(), router_entropy=entropy.tolist())


def evaluate_and_report():
    """What is owed every eval_interval steps, and the best checkpoint; False if asked to stop meanwhile: then a resumed
    run owes it still."""
    global owed, best_loss
    if (val_loss := evaluate()) is None:
        return False
    row = dict(val_loss=val_loss, val_bpb=val_loss / math.log(2) / bytes_per_token)
    goal, health = '' if math.isnan(perfect) else f' (perfect: {perfect:.3f})', ''
    report = expert_report() if step else {}
    log(**row, **report)
    if step and (busiest := max(report['expert_load_max']) * model.config.num_local_experts) > 1.5:
        health += f', the busiest expert gets {busiest:.1f} times an equal share'
    if step and any(report['dead_experts']):
        health += f', {sum(report["dead_experts"])} experts get no token'
    say(f'step {step}: val loss {val_loss:.4f}{goal}, {row["val_bpb"]:.4f} bits a byte{health}')
    owed = False
    if step and val_loss < best_loss:
        best_loss = val_loss
        write_checkpoint('best')
    return True


@lru_cache
def tokenizer_files():
    """{name: content} of the files by which transformers has the tokenizer too, if it can be had."""
    from prepare import load_tokenizer, write_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_tokenizer(load_tokenizer(data), Path(folder))
        except ValueError as error:
            say(f'(no tokenizer.json: {error})')
        except SystemExit:
            pass  # its message is out
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def write_checkpoint(name):
    """Write out_dir/name, whole or not at all, for from_pretrained and sample.py; but for FSDP's, for transformers too.
    What was there becomes name.old: of `last` two are kept."""
    new, old, folder = (out / f'{name}{suffix}' for suffix in ('.new', '.old', ''))
    load, entropy = counted_experts()
    if fsdp:
        model.reshard()  # what the last evaluation gathered
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    together(dist.barrier)
    if fsdp:  # every process writes its own shards
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
        tensors = {key: p for key, p in model.named_parameters() if p.requires_grad}
        tensors |= moments() if name == 'last' else {}
        files = {key: 1 + i // 200 for i, key in enumerate(tensors)}  # several, for each is in memory once more
        quietly(save, tensors, storage_writer=HuggingFaceStorageWriter(str(new), files, save_distributed=True))
    elif rank == 0 and name == 'last':
        save_file(moments(), new / 'optimizer.safetensors')
    if rank == 0:
        if fsdp:
            model.save_config(new)
        elif model.lora:
            model.save_adapter(new)
        else:
            model.save_pretrained(new, portable=False)
        for file, content in tokenizer_files().items():
            (new / file).write_bytes(content)
        (new / 'meta.json').write_text(json.dumps(meta | dict(block_size=trained_on), indent=2))
        if table is not None:
            (new / 'tokenizer.tiktoken').write_bytes(table)
        if name == 'last':
            (new / 'state.json').write_text(json.dumps(dict(
                step=step, sequences=sequences, best_loss=best_loss, owed=owed, scaler=scaler.state_dict(),
                losses=[loss.item() for loss in losses], bad_steps=[int(skipped), int(skipped_in_a_row)],
                load=load.tolist(), entropy=entropy.tolist(), wandb=wandb.run.id if wandb_log else state.wandb,
                settings=settings), indent=2))
    together(dist.barrier)
    sums = checksums(new)
    if 'unreadable' in sums:
        raise OSError(sums)
    if rank == 0:
        (new / 'SHA256SUMS').write_text(sums)
        config.sync(new / 'SHA256SUMS', new, out / 'metrics.jsonl')
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        config.sync(out)
        if name != 'last':
            shutil.rmtree(old, ignore_errors=True)
    together(dist.barrier)


def log(**row):
    if rank:
        return
    with open(out / 'metrics.jsonl', 'a') as file:
        bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        row |= dict.fromkeys(bad)  # to None, for JSON has no NaN
        file.write(json.dumps(dict(step=step, tokens=sequences * block_size, **row)) + '\n')
    if wandb_log:
        wandb.log(row, step=step)


def plot():
    try:
        import matplotlib
    except ImportError:
        return say('(pip install matplotlib, and the next run draws loss.png)')
    matplotlib.use('agg')
    from matplotlib import pyplot
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]

    def curve(axes, key, label, style='-', pick=float):
        points = [(row['step'], pick(row[key])) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)

    _, (losses, experts) = pyplot.subplots(2, sharex=True, figsize=(8, 8), height_ratios=(5, 3))
    curve(losses, 'train_loss', 'train_loss (with the load-balancing loss)')
    curve(losses, 'val_loss', 'val_loss', 'o-')
    if not math.isnan(perfect):
        losses.axhline(perfect, color='gray', linestyle=':', label='perfect, given the whole story')
    losses.set(ylabel='loss (nats a token)', yscale='log')
    number = model.config.num_local_experts
    curve(experts, 'expert_load_max', 'busiest expert (1: an equal share)', 'o-', lambda load: max(load) * number)
    curve(experts, 'expert_load_min', 'idlest expert', 'o-', lambda load: min(load) * number)
    curve(experts, 'router_entropy', 'entropy of the routers (1: even)', 'o-', statistics.mean)
    experts.set(xlabel='step', ylim=(0, None))
    for axes in (losses, experts):
        axes.legend()
    (out / 'loss.new').unlink(missing_ok=True)
    pyplot.savefig(out / 'loss.new', format='png', dpi=120)
    (out / 'loss.new').replace(out / 'loss.png')


def schedule(step):
    """The learning rates of a step, as a share of their highest: linear warm-up, then lr_schedule."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    done = (step - warmup_iters) / max(1, max_iters - warmup_iters)  # in [0, 1)
    if lr_schedule == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        share = min(1, (1 - done) / cooldown) if lr_schedule == 'linear' and cooldown else 1
    return share + (1 - share) * min_lr / learning_rate


# --- the loop -------------------------------------------------------------------------------------------------------

if wandb_log and rank == 0:
    try:
        import wandb
        wandb.init(project=wandb_project, name=wandb_run_name or out_dir, config=settings, id=state.wandb or None,
                   resume='allow')
    except ImportError:
        config.fail('wandb_log needs wandb: pip install wandb')
    except Exception as error:  # of a dozen kinds: no key, no network
        config.fail(f'wandb cannot start ({type(error).__name__}: {error}); see to it, or --wandb_log=False')
if rank == 0:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_out_dir()
        check(init_from == 'resume' or overwrite or not find_run(), holds_run)  # as yet
        kept = []
        if init_from != 'resume':
            for leftover in replaced:
                shutil.rmtree(out / leftover, ignore_errors=True)
        elif (out / 'metrics.jsonl').exists():  # what was logged after the checkpoint will be logged again
            for line in read_bytes(out / 'metrics.jsonl', 2 ** 32).decode(errors='replace').splitlines(keepends=True):
                try:
                    row = json.loads(line)
                    kept += [line] if (row['step'], 'val_loss' in row) <= (step, not owed) else []
                except (ValueError, KeyError, TypeError):
                    pass  # a line that a crash cut short
        if not (out / 'best').exists() and (out / 'best.old').exists() and init_from == 'resume':
            (out / 'best.old').rename(out / 'best')  # it was being replaced
        if init_from == 'resume' and source != checkpoints[0]:
            shutil.rmtree(out / 'last.damaged', ignore_errors=True)
            checkpoints[0].rename(out / 'last.damaged')
        for name, content in (('.launch', '\n'.join(agents)), ('metrics.jsonl', ''.join(kept))):
            new = out / f'{name}.new'
            new.unlink(missing_ok=True)  # through a link it would be another file that is written
            new.write_text(content)
            config.sync(new)
            new.replace(out / name)
    except (OSError, ValueError) as error:
        config.fail(f'cannot write to {out_dir}: {error}')
together(dist.barrier)

stopped_by = None
def stop(number, frame):
    global stopped_by
    if stopped_by and number == signal.SIGINT and not distributed:  # Ctrl-C again; torchrun passes the first one on
        raise KeyboardInterrupt
    stopped_by = signal.Signals(number).name
    with suppress(OSError, AttributeError):  # not by print, amid which this may come
        os.write(sys.stderr.fileno(), f'\n{stopped_by}: stopping when this step is done\n'.encode() * (rank == 0))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)

use_compile = device_type == 'cuda' if compile is None else compile
if fsdp and use_compile:
    for layer in model.model.layers:
        layer.compile()
run = torch.compile(model) if use_compile and not fsdp else model
if distributed and not fsdp:
    warnings.filterwarnings('ignore', '.*broadcast_buffers')  # which newer releases of torch call otherwise
    run = torch.nn.parallel.DistributedDataParallel(run, broadcast_buffers=False, gradient_as_bucket_view=True)
flops, peak = model.flops_per_token(block_size), peak_flops(device, dtype)
say(f'{model.num_parameters():,} parameters, {model.num_parameters(active=True):,} of them active for a token; '
    f'{sizes["train"]:,} training tokens; {f"{world} x " if distributed else ""}{device}, {dtype}'
    f'{", compiled" if use_compile else ""}')
progress = tqdm(total=max_iters, initial=step, unit='step', dynamic_ncols=True, disable=rank > 0)
first, busy, finished = step, 0.0, False  # busy: seconds spent training since the last row
micro_steps = gradient_accumulation_steps * sharing // world
try:
    while True:
        stopping = asked_to_stop()
        if step > first and (stopping or owed):
            write_checkpoint('last')
        if stopping or owed and not evaluate_and_report():
            break
        if step == max_iters:
            write_checkpoint('last')
            finished = True
            break

        began = time.perf_counter()
        for optimizer, highest in zip(optimizers, (learning_rate, muon_lr)):
            for group in optimizer.param_groups:
                group['lr'] = highest * schedule(step)
        torch.manual_seed(seed + step + (rank << 40))  # what dropout draws follows from the step, resumed or not
        loss, count, batches = torch.zeros((), device=device), None, train_batches()
        if chats:  # a token counts the same whichever batch it is in, though they differ in how many are trained on
            batches = list(batches)
            count = summed(sum((y >= 0).sum() for _, y in batches)).clamp(min=1) / (micro_steps * world)
        for micro_step, (x, y) in enumerate(batches, 1):
            if distributed and not fsdp:  # the last backward alone adds up; FSDP's all do, to have but shards to keep
                run.require_backward_grad_sync = micro_step == micro_steps
            with autocast:
                batch_loss = run(x, y, return_logits=False, count=count)[1] / micro_steps
            scaler.scale(batch_loss).backward()
            loss += batch_loss.detach()
        loss = summed(loss) / world
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        norm = norm.full_tensor() if fsdp else norm
        # A step whose loss or gradient is not finite must not touch the weights, and with float16's scaling no
        # optimizer may move where another does not, as by scaler.step. On CUDA fused AdamW and Muon skip it on the
        # device, by the attribute through which GradScaler tells them, so that no step waits.
        bad = ~(loss.isfinite() & norm.isfinite())
        skipped += bad
        skipped_in_a_row = (skipped_in_a_row + bad) * bad
        for optimizer in optimizers:
            if device_type == 'cuda':
                optimizer.found_inf, optimizer.grad_scale = bad.float(), None
            if device_type == 'cuda' or not bad:
                optimizer.step()
        scaler.update()
        model.zero_grad(set_to_none=True)
        sequences += batch_size * gradient_accumulation_steps
        step += 1
        owed = step % eval_interval == 0 or step == max_iters
        losses.append(loss)

        if step % log_interval == 0 or step == max_iters:
            train_loss = torch.stack(losses).mean().item()  # waits for the device, so this is the whole time
            busy += time.perf_counter() - began
            speed = min(len(losses), step - first) * gradient_accumulation_steps * batch_size * block_size / busy
            shown = dict(loss=f'{train_loss:.3f}', tokens_per_s=f'{speed:,.0f}')
            row = dict(train_loss=train_loss, lr=learning_rate * schedule(step - 1), grad_norm=norm.item(),
                       tokens_per_second=speed)
            if peak:
                row['mfu'] = flops * speed / peak / world
                shown['mfu'] = f'{row["mfu"]:.0%}'
            if skipped:
                row['skipped'] = shown['skipped'] = int(skipped)
            log(**row)
            progress.set_postfix(shown, refresh=False)
            losses, busy = [], 0.0
        else:
            busy += time.perf_counter() - began
        if step % 10 == 0 and skipped_in_a_row >= 10:
            write_checkpoint('last')
            config.fail(f'the loss or its gradient was not finite for {int(skipped_in_a_row)} steps in a row, which '
                        f'were skipped; {out / "last"} holds the weights from before. Try a lower --learning_rate')
        with suppress(OSError):  # if nobody reads it
            progress.update()
except (OSError, SafetensorError) as error:
    for name in ('last.new', 'best.new'):  # may be what fills the disk
        shutil.rmtree(out / name, ignore_errors=True)
    config.fail(f'cannot write to {out_dir}: {error}')
except (MemoryError, RuntimeError) as error:
    if distributed and ('gloo' in str(error) or isinstance(error, dist.DistBackendError)):
        left_alone(error)
    no_memory(error, 'try a smaller --batch_size with more --gradient_accumulation_steps')
finally:
    with suppress(OSError):
        progress.close()
    lock.release(force=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

if not finished:
    how = f'torchrun --standalone --nproc_per_node={world}' if distributed else 'python'
    say(f'{stopped_by or "another process"}: stopped after step {step}; ' + (
        f'to go on:\n{how} {shlex.quote(sys.argv[0])} {shlex.quote(f"--out_dir={out_dir}")} --init_from=resume'
        f'{" --fsdp=True" if fsdp else ""}' if step else 'there is nothing yet to go on from'))
    raise SystemExit(0)
if rank == 0:
    try:
        plot()
    except (OSError, ValueError, TypeError, KeyError) as error:  # of rows that are none, too
        say(f'(no loss.png: {error})')
folders = f'{out / "best"} and {out / "last"} hold' if best_loss < math.inf else f'{out / "last"} holds'
say(f'done: best val loss {best_loss:.4f}; {folders} the model, {out / "metrics.jsonl"} the numbers')
if sample_tokens and (rank == 0 or fsdp):
    from prepare import Chat, encode_prompt, load_tokenizer, stop_tokens
    try:
        encoder = load_tokenizer(data)
        if chats:
            prompt = Chat([dict(role='user', content=start)]).prompt(encoder)
        else:
            prompt = encode_prompt(encoder, start) or [encoder.eot_token]
        torch.manual_seed(seed)
        text = model.generate(torch.tensor([prompt], device=device), sample_tokens, temperature=0.8,
                              vocab_size=encoder.n_vocab, context=block_size,
                              stop=() if fsdp else stop_tokens(encoder))  # FSDP's processes must all do as many steps
        text, stops = text[0].tolist(), stop_tokens(encoder)
        end = next((i for i, token in enumerate(text, 1) if i > len(prompt) and token in stops), None)
        say(f'\n{encoder.decode(text[:end]).removesuffix("<|endoftext|>")}')
    except (ValueError, RuntimeError, SystemExit) as error:  # the training is done all the same
        say(f'no sample: {error}')
if distributed:
    dist.destroy_process_group()
