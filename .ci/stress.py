"""
The long checks: runs that are killed, that lose their disk or their data, that several processes share, and
input that is damaged or random. test_model.py holds the short ones.

    pytest -q .ci/stress.py                  # all, one to two hours on two cores
    pytest -q .ci/stress.py -k killed        # one part
    NUMBER=50 pytest -q .ci/stress.py        # 50 mutations and random commands of each kind instead of 1,000

A damaged file must be refused, with one line and exit status 2, or be harmless. There are no checksums, so a
changed value inside a tensor is harmless by this definition.
"""

import contextlib
import copy
import gc
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
os.environ['OMP_NUM_THREADS'] = '1'  # a second thread slows models this small
sys.modules['matplotlib'] = None  # a plot takes longer than the rest of a short run

import config

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from prepare import load_tokenizer, text_file

NUMBER = int(os.environ.get('NUMBER', 1000))  # mutations of each kind, random commands; a 40th of it: kills
MODEL = '''--hidden_size=32 --intermediate_size=32 --num_hidden_layers=2 --block_size=16
           --batch_size=4'''.split()
CPU = '--eval_iters=2 --sample_tokens=0 --device=cpu --dtype=float32'.split()
SHORT = [*MODEL, *CPU, '--max_iters=24', '--eval_interval=6', '--log_interval=4', '--dropout=0.1',
         '--warmup_iters=3']
SHARED = [*CPU, '--max_iters=50', '--eval_interval=4', '--log_interval=1', '--warmup_iters=3',
          '--batch_size=2', '--gradient_accumulation_steps=4']
FSDP = ['--fsdp=True']
TWO_BY_TWO = ['--fsdp=True', '--shard_size=2']


# --- scripts, in this process and in others -----------------------------------------------------------------

def run(script, *arguments):
    """Run a script in this process -> (exit status, stderr)."""
    err = io.StringIO()
    status = 0
    handlers = mock.patch('signal.signal')  # Ctrl-C and the alarm of `fuzz` keep theirs
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, contextlib.redirect_stderr(err), handlers:
        sys.argv = [script, *map(str, arguments)]
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as error:
            status = error.code or 0
    gc.collect()  # releases the lock on out_dir of a script that failed
    return status, err.getvalue()


def find_messages(script, printed):
    """The lines `script: message`, or `script (rank 1): message` under torchrun."""
    return [line for line in printed.splitlines() if f'{script}: ' in line or f'{script} (rank ' in line]


def assert_refused(script, status, err, *words):
    """Exit status 2 and one message, which holds the words."""
    messages = find_messages(script, err)
    assert status == 2 and 'Traceback' not in err and len(messages) == 1, err
    assert all(str(word) in messages[0] for word in words), err


def assert_harmless(script, status, err):
    """Refused, or done without an error."""
    if status or 'Traceback' in err:
        assert_refused(script, status, err)


def child(script, arguments, log, folder, environment, trap):
    """The main function of the processes of `start`."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgrp()  # signals to this group reach no other process
    os.chdir(folder)
    os.environ.update(environment)
    set_trap(*trap)
    sys.argv = [script, *map(str, arguments)]
    runpy.run_path(str(ROOT / script), run_name='__main__')


def set_trap(where=None, number=1, sent=signal.SIGTERM):
    """Send this process a signal right after the number-th optimizer step, forward pass of an evaluation,
    copy of the optimizers' state for a checkpoint, save of tensors, or change of a file. A file opened for
    writing is empty at that moment. sent=None: raise what a full disk raises."""
    count = itertools.count(1)
    save = [(safetensors.torch, 'save_file')]
    changes = [(os, name) for name in ('fsync', 'rename', 'replace', 'unlink', 'rmdir', 'mkdir')]
    changes += [(io, 'open'), (shutil, 'copyfile'), *save]
    functions = dict(step=[(torch.optim.AdamW, 'step')], evaluation=[(GPT, 'hidden_states')],
                     copy=[(torch.optim.AdamW, 'state_dict')], save=save, file=changes)
    for owner, name in functions.get(where, []):
        def trapped(*arguments, function=getattr(owner, name), **options):
            result = function(*arguments, **options)
            training = where == 'evaluation' and arguments[0].training
            if not training and next(count) == number:
                if sent is None:
                    raise OSError(28, 'No space left on device')
                os.kill(os.getpid(), sent)
            return result

        setattr(owner, name, trapped)


def start(log, script, *arguments, trap=(), folder='.', **environment):
    """Run a script in a process of its own, with its output in a file. A fork saves the seconds of the
    imports."""
    context = multiprocessing.get_context('forkserver')
    modules = ['stress', 'torch._dynamo', 'torch.distributed.checkpoint', 'torch.distributed.fsdp']
    context.set_forkserver_preload(modules)
    inputs = script, arguments, log, folder, environment, trap
    process = context.Process(target=child, args=inputs)
    process.start()
    process.log = log
    return process


def start_processes(number, log, *arguments, trap=(), trapped=-1, folders=()):
    """train.py in as many processes as torchrun would start, with output in log0, log1, ... The process of
    rank `trapped` has the trap; -1: the last. With folders each process runs in its own, as a node does on
    its own disk."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(number):
        environment = dict(RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        environment['LOCAL_RANK'] = '0' if folders else str(rank)
        processes.append(start(
            Path(f'{log}{rank}'), 'train.py', *arguments, trap=trap if rank == trapped % number else (),
            folder=folders[rank] if folders else '.', **environment))
    return processes


def ended(process):
    """(exit status, output) of a process that `start` gave. It is killed after ten minutes: torch.compile is
    slow."""
    process.join(600)
    process.kill()
    process.join()
    return process.exitcode, process.log.read_text()


def done(*processes):
    """The output of the first of these processes, once all have ended well."""
    results = [ended(process) for process in processes]
    for status, printed in results:
        assert status == 0 and 'Traceback' not in printed, results
    return results[0][1]


def assert_all_end(processes, killed=None):
    """All processes end within a minute of the first that ends, without a traceback. A killed one has status
    -9, the others have 2 and at most one message -> {rank: output}."""
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=600)
    began = time.time()
    results = [ended(process) for process in processes]
    assert time.time() - began < 60, results
    for rank, (status, printed) in enumerate(results):
        assert status == (-9 if rank == killed else 2), results
        assert 'Traceback' not in printed and len(find_messages('train.py', printed)) <= 1, results
    return {rank: printed for rank, (_, printed) in enumerate(results)}


# --- data and runs to compare with --------------------------------------------------------------------------

def make_data(folder, text='the quick brown fox jumps over the lazy dog\n'):
    """A text, prepared by character in folder/data."""
    (folder / 'text.txt').write_text(text * 50)
    flags = [f'--dataset={folder}/text.txt', '--tokenizer=char', f'--data_dir={folder}/data']
    status, err = run('prepare.py', *flags)
    assert status == 0, err
    return folder / 'data'


def metrics(out):
    """The rows of metrics.jsonl, except for what depends on the clock."""
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    for row in rows:
        row.pop('tokens_per_second', None)
    return rows


def read_state(folder):
    return json.loads((folder / 'state.json').read_text())


def step_of(folder):
    return read_state(folder)['step']


def assert_same_run(out, other):
    """The same numbers, and the same weights and moments at the end, to the last bit."""
    assert metrics(out) == metrics(other)
    for file in ('model.safetensors', 'optimizer.safetensors'):
        ours = load_file(out / 'last' / file)
        theirs = load_file(other / 'last' / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close_runs(out, other, limit=1e-5):
    """The same rows, and numbers and parameters that differ by less than the limit."""
    ours = metrics(out)
    theirs = metrics(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for a, b in zip(ours, theirs):
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=limit), (key, a, b)
    ours, theirs = (GPT.from_pretrained(folder / 'last', torch.float32) for folder in (out, other))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < limit, name


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """(data, out_dir of a run of SHORT)."""
    folder = tmp_path_factory.mktemp('undisturbed')
    data = make_data(folder)
    done(start(folder / 'log', 'train.py', f'--data_dir={data}', f'--out_dir={folder}/out', *SHORT))
    return data, folder / 'out'


def test_short_lines():
    """Reading many short lines takes time in proportion to their characters."""
    seconds = {}
    for name, line in (('short', 'ab\n'), ('long', 'ab ' * 3000 + '\n')):
        blocks = [line * (2 ** 20 // len(line))] * 8
        began = time.process_time()
        assert ''.join(text for text, _ in text_file(blocks)) == ''.join(blocks)
        seconds[name] = time.process_time() - began
    assert seconds['short'] < 2 * seconds['long'] + 0.5


# --- killed, stopped, without disk or data ------------------------------------------------------------------

@pytest.mark.parametrize('by', ['time', 'file'])
def test_killed(by, undisturbed, tmp_path):
    """SIGKILL at a random time, or at a random change of a file. The same command again goes on to the same
    bits."""
    data, undisturbed_out = undisturbed
    rng = random.Random(by)
    log = tmp_path / 'log'
    resumed = 0
    for number in range(max(1, NUMBER // 40)):
        out = tmp_path / str(number)
        command = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT, '--init_from=resume']
        trap = ('file', rng.randint(1, 260), signal.SIGKILL) if by == 'file' else ()
        process = start(log, *command, trap=trap)
        if by == 'time':
            while not (out / 'metrics.jsonl').exists():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
        ended(process)
        resumed += any(out.glob('last*/state.json'))
        status, printed = ended(start(log, *command))
        finished = status == 2 and 'max_iters (24)' in printed  # the kill came after the last checkpoint
        assert status == 0 or finished, f'{trap}: {printed}'
        assert_same_run(out, undisturbed_out)
        shutil.rmtree(out)
    assert resumed > number // 3


@pytest.mark.parametrize('where, number, stopped_at', [
    ('step', 1, 2), ('step', 9, 10), ('step', 12, 13),
    ('evaluation', 1, 1), ('evaluation', 2, 7), ('evaluation', 5, 24),
    ('save', 1, 7), ('save', 2, 7), ('save', 3, 13), ('save', 4, 13), ('save', 8, 24)])
def test_sigterm(where, number, stopped_at, undisturbed, tmp_path):
    """SIGTERM ends a run with a checkpoint after the next gradient; its command resumes to the same bits."""
    data, undisturbed_out = undisturbed
    out = tmp_path / 'out'
    log = tmp_path / 'log'
    command = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT]
    printed = done(start(log, *command, trap=(where, number)))
    assert step_of(out / 'last') == stopped_at
    before = (stopped_at - 1) // 6 * 6
    assert (step_of(out / 'last.old') if before else 0) == before
    if stopped_at < 24:
        flags = [word for word in printed.split() if word.startswith(('--out_dir=', '--init_from='))]
        done(start(log, 'train.py', *flags))  # the run remembers its other settings
    assert_same_run(out, undisturbed_out)
    again = start(log, 'train.py', f'--out_dir={out}', '--init_from=resume')
    assert_refused('train.py', *ended(again), 'max_iters')


@pytest.fixture
def disk(tmp_path):
    """(an empty file system in memory, a function that changes its mount options)."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder]
        return subprocess.run(command).returncode

    def remount(options):
        return mount(f'remount,{options}')

    if not shutil.which('mount') or mount('rw'):
        pytest.skip('needs the right to mount a tmpfs')
    yield folder, remount
    subprocess.run(['umount', folder])


@pytest.mark.parametrize('size', ['500k', '1000k', '1500k', '2000k'])
def test_full_disk(size, undisturbed, disk, tmp_path):
    """A disk that fills up, or becomes read-only, and then has room again: one line each time, and nothing is
    lost."""
    data, undisturbed_out = undisturbed
    folder, remount = disk
    log = tmp_path / 'log'
    out = folder / 'out'
    command = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT]
    remount(f'size={size}')
    assert_refused('train.py', *ended(start(log, *command)), out)
    assert not any(out.glob('*.new')) and (size == '500k' or any(out.glob('last*')))
    for options in ('ro', 'rw'):
        remount(options)
        assert_refused('train.py', *ended(start(log, *command, '--init_from=resume')), out)
    remount('rw,size=50m')
    done(start(log, *command, '--init_from=resume'))
    assert_same_run(out, undisturbed_out)


@pytest.mark.parametrize('script, arguments', [
    ('prepare.py', '--dataset=builtin --tokenizer=byte --megabytes=4 --data_dir='),
    ('sample.py', '--out_dir={} --export=')])
def test_full_disk_of_other_scripts(script, arguments, undisturbed, disk, tmp_path):
    folder, remount = disk
    command = arguments.format(undisturbed[1]).split()
    command[-1] += f'{folder}/new'
    for options in ('rw,size=50k', 'ro'):
        remount(options)
        assert_refused(script, *ended(start(tmp_path / 'log', script, *command)))
        assert not [path for path in folder.rglob('*') if path.is_file()]


def cut_to_100(path):
    os.truncate(path, 100)


@pytest.mark.parametrize('change', [Path.unlink, cut_to_100])
def test_vanished_data(change, tmp_path):
    """Data that is cut short or removed while a run reads it ends the run with a line. Its checkpoint stays
    whole."""
    data = make_data(tmp_path)
    out = tmp_path / 'out'
    log = tmp_path / 'log'
    command = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT, '--max_iters=100000']
    process = start(log, *command)
    while not (out / 'last').exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    change(data / 'train.bin')
    assert_refused('train.py', *ended(process), 'train.bin')
    step = step_of(out / 'last')
    make_data(tmp_path)
    done(start(log, *command, '--init_from=resume', f'--max_iters={step + 1}'))


def test_several_runs_in_one_folder(undisturbed, tmp_path):
    """Of runs that start together in one folder, one trains and the others are refused."""
    data, undisturbed_out = undisturbed
    for number in range(max(1, NUMBER // 100)):
        out = tmp_path / f'out{number}'
        command = ['train.py', f'--data_dir={data}', f'--out_dir={out}', *SHORT]
        processes = [start(tmp_path / f'log{i}', *command) for i in range(3)]
        results = [ended(process) for process in processes]
        assert sorted(status for status, _ in results) == [0, 2, 2], results
        assert not any('Traceback' in printed for _, printed in results), results
        assert_same_run(out, undisturbed_out)


# --- several processes --------------------------------------------------------------------------------------

@pytest.mark.parametrize('number, changes', [
    (2, ''), (2, '--fsdp=True'), (2, '--dropout=0.1'),
    (2, '--fsdp=True --recompute=True --dropout=0.1'),
    (2, '--gradient_accumulation_steps=6'), (3, '--gradient_accumulation_steps=3 --num_local_experts=5'),
    (4, ''), (4, '--fsdp=True'),
    (2, '--compile=True'), (2, '--fsdp=True --compile=True'),
    (2, '--fsdp=True --num_local_experts=3 --tie_word_embeddings=True'),
    (2, '--muon_lr=0 --learning_rate=1e-3'), (2, '--fsdp=True --muon_lr=0 --learning_rate=1e-3'),
    (4, '--fsdp=True --shard_size=2 --num_local_experts=5'),
    # with the default seed and eight batches a step, differences of rounding grow tenfold every few steps
    (4, '--fsdp=True --shard_size=1 --gradient_accumulation_steps=8 --seed=3'),
    (4, '--fsdp=True --shard_size=2 --gradient_accumulation_steps=12 --recompute=True'),
    # 4 does not divide 30
    (4, '--fsdp=True --hidden_size=30 --head_dim=6 --gradient_accumulation_steps=12')])
def test_processes(number, changes, tmp_path):
    """One process or several, DDP, FSDP2 or HSDP: the same numbers, and each resumes what the other began."""
    log = tmp_path / 'log'
    changes = changes.split()
    fsdp = [change for change in changes if change.startswith(('--fsdp', '--shard'))]
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED]
    common += [change for change in changes if change not in fsdp]
    one, many, mixed = (tmp_path / name for name in ('one', 'many', 'mixed'))

    def by_one(*arguments, trap=()):
        return [start(log, 'train.py', *arguments, trap=trap)]

    def by_many(*arguments, trap=()):
        return start_processes(number, log, *arguments, *fsdp, trap=trap)

    done(*by_one(*common, f'--out_dir={one}'))
    done(*by_many(*common, f'--out_dir={many}'))
    assert_close_runs(many, one)
    for begin, resume in ((by_many, by_one), (by_one, by_many)):
        done(*begin(*common, f'--out_dir={mixed}', '--overwrite', trap=('step', 7)))
        assert step_of(mixed / 'last') == 8
        done(*resume(f'--out_dir={mixed}', '--init_from=resume'))
        assert_close_runs(mixed, one)


@pytest.mark.parametrize('number, flags', [
    (1, []), (2, []), (2, FSDP), (3, []), (3, FSDP), (4, []), (4, FSDP),
    (4, [*FSDP, '--shard_size=1'])])
def test_other_meshes(number, flags, tmp_path):
    """What 2 x 2 processes began, any number and mesh (1 x 4 and 4 x 1 too) resumes, and the other way
    round."""
    log = tmp_path / 'log'
    one = tmp_path / 'one'
    many = tmp_path / 'many'
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED, '--gradient_accumulation_steps=12',
              '--num_local_experts=5', '--max_iters=12']
    done(start(log, 'train.py', *common, f'--out_dir={one}'))
    layouts = [(4, TWO_BY_TWO), (number, flags)]
    for (begin, began_with), (resume, resumed_with) in (layouts, layouts[::-1]):
        flags = [*common, *began_with, f'--out_dir={many}', '--overwrite']
        done(*start_processes(begin, log, *flags, trap=('step', 6)))
        assert step_of(many / 'last') == 7
        flags = [*resumed_with, f'--out_dir={many}', '--init_from=resume']
        done(*start_processes(resume, log, *flags))
        assert_close_runs(many, one)


@pytest.mark.parametrize('where, number, rank', [
    ('step', 7, 3), ('copy', 2, 3), ('copy', 2, 0), ('save', 3, 0), ('save', 4, 0), ('file', 100, 0)])
@pytest.mark.parametrize('flags', [[], TWO_BY_TWO], ids=['ddp', 'fsdp'])
def test_killed_processes(flags, where, number, rank, tmp_path):
    """A process of four is killed in a step, or while a checkpoint is gathered or written. The others end
    within a minute, and four or two processes go on to the same numbers."""
    log = tmp_path / 'log'
    one = tmp_path / 'one'
    many = tmp_path / 'many'
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED, '--max_iters=16']
    done(start(log, 'train.py', *common, f'--out_dir={one}'))
    trap = where, number, signal.SIGKILL
    for resume, resumed_with in ((4, flags), (2, FSDP)):
        command = [*common, *flags, f'--out_dir={many}', '--overwrite']
        assert_all_end(start_processes(4, log, *command, trap=trap, trapped=rank), killed=rank)
        assert step_of(many / 'last') in (4, 8)
        command = [*resumed_with, f'--out_dir={many}', '--init_from=resume']
        done(*start_processes(resume, log, *command))
        assert_close_runs(many, one)


@pytest.mark.parametrize('file', ['model.safetensors', 'optimizer.safetensors', 'state.json', 'config.json'])
def test_damaged_by_turns(file, tmp_path):
    """DDP, FSDP2 and one process take turns in one run. Each is killed, and its newest checkpoint is damaged,
    so that the next goes on from the one before."""
    log = tmp_path / 'log'
    one = tmp_path / 'one'
    many = tmp_path / 'many'
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED]
    done(start(log, 'train.py', *common, f'--out_dir={one}'))
    begin = 0  # each turn starts here, and dies ten steps later
    for turn in ('ddp', 'fsdp', 'alone', 'ddp', 'alone', 'fsdp', 'ddp'):
        command = ['train.py', *common, f'--out_dir={many}', '--init_from=resume']
        steps = 10 + (begin > 0)  # torch takes one with zero gradients to make the moments that are loaded
        trap = 'step', steps, signal.SIGKILL
        if turn == 'alone':
            processes = [start(log, *command, trap=trap)]
        else:
            command += FSDP if turn == 'fsdp' else []
            processes = start_processes(2, log, *command[1:], trap=trap)
        printed = assert_all_end(processes, killed=len(processes) - 1)
        assert begin == 0 or 'last is damaged' in printed[0], printed
        assert step_of(many / 'last') == begin + 8 and step_of(many / 'last.old') == begin + 4
        path = many / 'last' / file
        os.truncate(path, path.stat().st_size // 2)
        begin += 4
    done(*start_processes(2, log, *FSDP, f'--out_dir={many}', '--init_from=resume'))
    assert_close_runs(many, one)


@pytest.mark.parametrize('fsdp', [[], FSDP, [*FSDP, '--shard_size=1']], ids=['ddp', 'fsdp', 'hsdp'])
def test_adapters_of_two_processes(fsdp, undisturbed, tmp_path):
    """Adapters, whose checkpoints do not hold the base model: stopped, resumed, and equal to those of one
    process."""
    data, base = undisturbed
    log = tmp_path / 'log'
    one = tmp_path / 'one'
    many = tmp_path / 'many'
    flags = [f'--data_dir={data}', f'--init_from={base}/best', '--block_size=16', *SHARED, '--lora_rank=2',
             '--dropout=0']
    done(start(log, 'train.py', *flags, f'--out_dir={one}'))
    done(*start_processes(2, log, *flags, *fsdp, f'--out_dir={many}', trap=('evaluation', 2)))
    assert step_of(many / 'last') == 5
    assert not (many / 'last/model.safetensors').exists()
    done(*start_processes(2, log, f'--out_dir={many}', '--init_from=resume', *fsdp))
    assert_close_runs(many, one)


@pytest.mark.parametrize('number', [3, 4])
@pytest.mark.parametrize('flags', [[], TWO_BY_TWO], ids=['ddp', 'fsdp'])
def test_unwritten_checkpoint(flags, number, tmp_path):
    """Rank 0 of four processes cannot write a file: all end, rank 0 says why, and the checkpoint before
    stays."""
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED, f'--out_dir={tmp_path}/out', *flags]
    trap = 'save', number, None
    printed = assert_all_end(start_processes(4, tmp_path / 'log', *common, trap=trap, trapped=0))
    assert 'No space left on device; the checkpoints in' in printed.pop(0), printed
    assert not any(find_messages('train.py', other) for other in printed.values()), printed
    assert step_of(tmp_path / 'out/last') == 4
    assert not any((tmp_path / 'out').glob('*.new'))


def test_float16(tmp_path):
    """float16 with a loss scale that overflows at first: FSDP2 skips the steps that DDP skips, and has the
    same scale."""
    log = tmp_path / 'log'
    ddp = tmp_path / 'ddp'
    fsdp = tmp_path / 'fsdp'
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED, '--dtype=float16']
    done(*start_processes(2, log, *common, f'--out_dir={ddp}', '--max_iters=4'))
    state = read_state(ddp / 'last')
    state['scaler']['scale'] = 1e7
    (ddp / 'last/state.json').write_text(json.dumps(state))
    shutil.copytree(ddp, fsdp)
    for out, flags in ((ddp, []), (fsdp, FSDP)):
        command = [f'--out_dir={out}', '--init_from=resume', '--max_iters=30', *flags]
        done(*start_processes(2, log, *command))
    skipped = [row['skipped'] for row in metrics(ddp) if 'skipped' in row]
    assert skipped[-1] > 2  # after ten in a row the run would have ended
    assert skipped == [row['skipped'] for row in metrics(fsdp) if 'skipped' in row]
    assert read_state(ddp / 'last')['scaler'] == read_state(fsdp / 'last')['scaler']
    for a, b in zip(metrics(ddp), metrics(fsdp), strict=True):
        for key in {'train_loss', 'val_loss'} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=0.02), (a, b)


# --- two nodes, each with its own disk ----------------------------------------------------------------------

@pytest.fixture
def nodes(tmp_path):
    """(folders of two nodes with the same data and the same run, flags that resume it)."""
    flags = ['--data_dir=data', '--out_dir=out', *MODEL, *SHARED, '--max_iters=12']
    first = tmp_path / 'node0'
    second = tmp_path / 'node1'
    first.mkdir()
    make_data(first)
    done(start(tmp_path / 'log', 'train.py', *flags, folder=first, trap=('step', 3)))
    shutil.copytree(first, second)
    return (first, second), [*flags, '--init_from=resume']


def set_ahead(node):
    path = node / 'out/last/state.json'
    path.write_text(json.dumps(read_state(path.parent) | dict(step=5)))


def remove_run(node):
    shutil.rmtree(node / 'out')


def change_data(node):
    make_data(node, 'the five boxing wizards jump quickly\n')


def remove_data(node):
    shutil.rmtree(node / 'data')


def cut_data(node):
    os.truncate(node / 'data/train.bin', 100)


@pytest.mark.parametrize('change, words', [
    (set_ahead, 'differs between nodes'), (remove_run, 'differs between nodes'),
    (change_data, 'the same data on all nodes'), (remove_data, 'is missing or damaged'),
    (cut_data, 'train.bin has 100 bytes')])
def test_nodes_that_differ(change, words, nodes, tmp_path):
    """The second of two nodes has another run or other data than the first: it says so, and both end."""
    folders, flags = nodes
    change(folders[1])
    printed = assert_all_end(start_processes(2, tmp_path / 'log', *flags, folders=folders))
    assert words in printed[1], printed


@pytest.mark.parametrize('change', [remove_data, cut_data])
def test_first_node_without_data(change, nodes, tmp_path):
    """The first node says what it lacks, and both end."""
    folders, flags = nodes
    change(folders[0])
    printed = assert_all_end(start_processes(2, tmp_path / 'log', *flags, folders=folders))
    assert 'data/' in find_messages('train.py', printed[0])[0], printed


def test_node_without_base(nodes, tmp_path):
    """The second node lacks the model to start from: it says so, and both end."""
    folders, flags = nodes
    remove_run(folders[1])
    flags = [*flags, '--init_from=out/last', '--out_dir=new']
    printed = assert_all_end(start_processes(2, tmp_path / 'log', *flags, folders=folders))
    assert 'out/last' in find_messages('train.py', printed[1])[0], printed


@pytest.mark.parametrize('change', [set_ahead, remove_run])
def test_first_node_counts(change, nodes, tmp_path):
    """With FSDP2 only rank 0 reads and writes checkpoints, so the second node needs none."""
    folders, flags = nodes
    change(folders[1])
    done(*start_processes(2, tmp_path / 'log', *flags, *FSDP, folders=folders))
    flags = [*flags, '--init_from=scratch', f'--out_dir={tmp_path}/one']
    done(start(tmp_path / 'log', 'train.py', *flags, folder=folders[0]))
    assert_close_runs(folders[0] / 'out', tmp_path / 'one')


def torchrun(nodes, number, restarts, out, *arguments):
    """train.py by the documented command, with `nodes` torchruns of `number` processes in all. Rank 1 is
    killed once, after the first checkpoint -> (exit statuses, stderr, seconds from the kill to the end)."""
    with socket.socket() as free:
        free.bind(('', 0))
        port = free.getsockname()[1]
    command = ['torchrun', f'--nnodes={nodes}', '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}',
               f'--nproc_per_node={number // nodes}', f'--max-restarts={restarts}', ROOT / 'train.py',
               f'--out_dir={out}', '--init_from=resume', *arguments]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                   env=os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'))
    agents = [subprocess.Popen(command, **options) for _ in range(nodes)]
    try:
        while not (out / 'last').exists() and all(agent.poll() is None for agent in agents):
            time.sleep(0.01)
        kill_rank_1(out)
        killed = time.time()
        errors = [agent.communicate(timeout=300)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], ''.join(errors), time.time() - killed


def kill_rank_1(out):
    """Kill the process of rank 1 that writes to this out_dir."""
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):  # it ended
            ours = str(out) in (process / 'cmdline').read_text()
            if ours and '\0RANK=1\0' in (process / 'environ').read_text():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.parametrize('nodes, number, fsdp', [(1, 2, []), (1, 2, FSDP), (2, 2, []), (2, 8, FSDP)])
def test_torchrun(nodes, number, fsdp, tmp_path):
    """A rank that dies ends the job within a minute. With --max-restarts the job goes on from the last
    checkpoint, to the numbers of an undisturbed run. Two nodes are two torchruns here."""
    one = tmp_path / 'one'
    many = tmp_path / 'many'
    common = [f'--data_dir={make_data(tmp_path)}', *MODEL, *SHARED, '--gradient_accumulation_steps=8',
              '--seed=3']  # as in test_processes
    done(start(tmp_path / 'log', 'train.py', *common, f'--out_dir={one}'))
    statuses, errors, seconds = torchrun(nodes, number, 0, many, *common, *fsdp)
    assert '-9' in errors and all(statuses) and seconds < 60, errors
    shutil.rmtree(many)
    statuses, errors, _ = torchrun(nodes, number, 1, many, *common, *fsdp)
    assert '-9' in errors and not any(statuses), errors
    assert_close_runs(many, one)


# --- damaged files and random commands ----------------------------------------------------------------------

def fuzz(work, number, folder, log):
    """Call work(rng, folder) so often, each with 20 seconds and 2 GB. The log gets a traceback for each that
    fails."""
    if sys.platform == 'linux':
        used = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
        most = used + 2 ** 31
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
    with open(log, 'w', buffering=1) as file:
        for i in range(number):
            signal.alarm(20)
            try:
                work(random.Random(i), folder)
            except BaseException:
                print(f'--- try {i}:', traceback.format_exc(limit=-4)[-4000:], file=file)
            finally:
                signal.alarm(0)


def mutated(rng, content):
    """Bytes of which a part is taken out, put in or replaced."""
    at = rng.randrange(len(content) + 1)
    size = rng.choice([1, 8, 100, len(content)])
    new = rng.choice([b'', rng.randbytes(size), b'[' * 100000])
    return content[:at] + new + content[at + rng.choice([0, size]):]


WILD = [None, True, -1, 0, 1, 3, 10 ** 9, 2 ** 63, 10 ** 40, 1e308, math.inf, math.nan, 0.5, '', 'x', 'F64',
        'I64', [], {}, [[]], [1, 2], {'a': 1}, '../../etc/passwd', 'x' * 10000, list(range(1000))]


def mutated_json(rng, value):
    """A value of which one part, at any depth, is replaced or taken out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(WILD)
    value = copy.copy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = mutated_json(rng, value[key])
    return value


def mutate(rng, path):
    """Change a file. Of safetensors change the header, the eight bytes of its length, or where the file
    ends."""
    content = path.read_bytes()
    tensors = path.suffix == '.safetensors'
    begin = 8 if tensors else 0
    end = begin + int.from_bytes(content[:8], 'little') if tensors else len(content)
    if path.suffix in ('.json', '.safetensors') and rng.random() < 0.6:
        part = json.dumps(mutated_json(rng, json.loads(content[begin:end]))).encode()
    else:
        part = mutated(rng, content[begin:end])
    near = [len(part) - 1, len(part) + 1, 0, rng.getrandbits(64)]
    length = rng.choice([len(part)] * 8 + near)
    prefix = max(length, 0).to_bytes(8, 'little') if tensors else b''
    content = prefix + part + content[end:]
    size = len(content) if rng.random() < 0.8 else rng.randrange(len(content) + 1)
    path.write_bytes(content[:size])


def load_mutated(rng, folder):
    """A checkpoint of each kind with one file changed: from_pretrained names the folder in a ValueError, or
    loads."""
    tried = folder / 'tried'
    for source in sorted(folder.glob('checkpoint*')):
        shutil.rmtree(tried, ignore_errors=True)
        shutil.copytree(source, tried)
        mutate(rng, rng.choice(sorted(tried.iterdir())))
        try:
            GPT.from_pretrained(tried, torch.float32)
        except ValueError as error:
            assert str(tried) in str(error), error


def train_mutated(rng, folder):
    """Data, or a run to resume, with one file changed."""
    tried = folder / 'tried'
    shutil.rmtree(tried, ignore_errors=True)
    shutil.copytree(folder / 'run', tried)
    options = [f'--out_dir={tried}/out', f'--data_dir={tried}/data', *CPU, '--batch_size=4',
               '--compile=False']
    if rng.random() < 0.5:
        files = ['train.bin', 'val.bin', 'meta.json', 'meta.json', 'tokenizer.tiktoken']
        path = tried / 'data' / rng.choice(files)
        options += ['--overwrite', *MODEL, '--eval_interval=2', '--max_iters=3']
    else:
        files = ['state.json', 'state.json', 'state.json', 'config.json', 'meta.json',
                 'optimizer.safetensors', 'model.safetensors']
        path = tried / 'out/last' / rng.choice(files)
        options += ['--init_from=resume', '--max_iters=26', '--gradient_accumulation_steps=1']
    mutate(rng, path)
    assert_harmless('train.py', *run('train.py', *options))


SCRIPTS = {
    'train.py': ['--data_dir=run/data', *MODEL, *CPU, '--max_iters=2', '--out_dir=random', '--overwrite'],
    'prepare.py': ['--dataset=text.txt', '--tokenizer=char', '--data_dir=prepared'],
    'sample.py': ['--out_dir=run/out', '--max_new_tokens=3', '--device=cpu', '--start=the'],
    'bench.py': ['--rounds=1', '--steps=1', '--prompt_tokens=4', '--new_tokens=2', *MODEL, '--device=cpu',
                 '--parts=decode', '--vocab_size=20', '--json_file=']}
VALUES = dict(
    int=['0', '1', '2', '3', '5', '64', '-1', '1e3', '1.5', '10' * 20, 'x', '', 'None', 'nan', '2**9'],
    float=['0', '1', '0.5', '-1', '1e-3', 'inf', 'nan', '1e400', 'x', '', 'None', '1e30', '3'],
    bool=['True', 'False', '1', 'x', '', 'None'],
    str=['', 'x', 'resume', '/dev/null', 'None', 'a=b', '\0', 'ä' * 300, '..', 'byte', 'bpe', 'builtin',
         'mxfp4', 'checkpoint', 'checkpoint-packed', 'checkpoint-adapter', 'cosine', 'bfloat16',
         'FILE:text.txt', 'train'])
VALUES['text'] = VALUES['str']
SLOW = {'device', 'learn', 'compare', 'profile', 'compile'}


def random_settings(rng, script):
    """(flags, lines of a config file) with the same random settings."""
    known = config.declared('model.py') | config.declared(script)
    flags = []
    lines = []
    for key in rng.sample(sorted(known.keys() - SLOW), rng.choice([1, 1, 2, 3])):
        kind, default, _, _ = known[key]
        values = VALUES.get(kind.partition(' ')[0], ['x', 'sliding_attention,full_attention', ''])
        value = rng.choice([*values, str(default)])
        flags.append(f'--{key}={value}')
        lines.append(f'{key} = {value if rng.random() < 0.5 else repr(value)}')
    return flags, lines


def random_command(rng, folder):
    """A script with random settings, as flags or in a config file."""
    script = rng.choice(['train.py'] * 5 + ['prepare.py'] * 2 + ['sample.py'] * 3 + ['bench.py'])
    flags, lines = random_settings(rng, script)
    if rng.random() < 0.1:
        odd = ['--', '-x', '--=', '=', '--overwrite', '--max_iters', 'config/none.py', '--LR=1', '.']
        flags.append(rng.choice(odd))
    if rng.random() < 0.3:
        lines.append(rng.choice(['', 'x = 1', '(', 'import nothing', '1 / 0']))
        (folder / 'settings.py').write_text('\n'.join(lines))
        flags = ['settings.py']
    os.chdir(folder)
    try:
        assert_harmless(script, *run(script, *SCRIPTS[script], *flags))
    except KeyboardInterrupt:
        return  # it asked for much work
    except BaseException as error:
        raise AssertionError(f'{script} {flags} {lines}') from error


@pytest.fixture(scope='session')
def samples(undisturbed, tmp_path_factory):
    """A folder with a checkpoint of each kind, a run, its data, and a text."""
    folder = tmp_path_factory.mktemp('samples')
    data, out = undisturbed
    shutil.copytree(data, folder / 'run/data')
    shutil.copytree(out, folder / 'run/out')
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8)
    model = GPT(GPTConfig(vocab_size=97, **sizes))
    model.save_pretrained(folder / 'checkpoint')
    model.save_pretrained(folder / 'checkpoint-packed', torch.bfloat16, 'mxfp4', shard_size=5e4)
    adapted = GPT.from_pretrained(folder / 'checkpoint', torch.float32)
    adapted.add_lora(2, 4)
    adapted.save_adapter(folder / 'checkpoint-adapter')
    shutil.copy(data.parent / 'text.txt', folder)
    return folder


@pytest.mark.parametrize('work', [load_mutated, train_mutated, random_command])
def test_hostile_input(work, samples, tmp_path):
    shutil.copytree(samples, tmp_path / 'here')
    context = multiprocessing.get_context('forkserver')
    inputs = work, NUMBER, tmp_path / 'here', tmp_path / 'log'
    process = context.Process(target=fuzz, args=inputs)
    process.start()
    process.join()
    failures = (tmp_path / 'log').read_text()
    good = process.exitcode == 0 and not failures
    assert good, f'exit status {process.exitcode}\n{failures:.20000}'


def cuts(path):
    """Cut the file in its beginning, its header, its body and before its last byte, then restore it."""
    content = path.read_bytes()
    size = len(content)
    header = 8 + int.from_bytes(content[:8], 'little') if path.suffix == '.safetensors' else 8
    ends = {0, 1, 7, 9, header // 2, header - 1, header, header + 1, size // 2, size - 1}
    for end in sorted(ends):
        if content[:end].strip() != content.strip():
            path.write_bytes(content[:end])
            yield end
    path.write_bytes(content)


def test_checkpoints_cut_short(samples, tmp_path):
    for source in samples.glob('checkpoint*'):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        for path in list(folder.iterdir()):
            for size in cuts(path):
                with pytest.raises(ValueError) as caught:
                    GPT.from_pretrained(folder, torch.float32)
                assert str(folder) in str(caught.value), (path, size)


def test_data_cut_short(undisturbed, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(undisturbed[0], data)
    for path in data.iterdir():
        for size in cuts(path):
            if path.suffix != '.bin':
                with pytest.raises(ValueError) as caught:
                    load_tokenizer(data)
                assert str(data) in str(caught.value), (path, size)
            if path.suffix != '.tiktoken':
                result = run('train.py', f'--data_dir={data}', f'--out_dir={tmp_path}/new', *SHORT)
                assert_refused('train.py', *result, path)


def test_runs_cut_short(undisturbed, tmp_path):
    """A file of last cut short: the run resumes from last.old, to the same bits. Without last.old it is
    refused."""
    source = tmp_path / 'source'
    out = tmp_path / 'out'
    shutil.copytree(undisturbed[1], source)
    resume = 'train.py', f'--out_dir={out}', '--init_from=resume'
    for path in list((source / 'last').iterdir()):
        for size in cuts(path):
            shutil.copytree(source, out)
            status, err = run(*resume)
            assert status == 0, f'{path}, {size}: {err}'
            assert_same_run(out, undisturbed[1])
            for name in ('last', 'last.old'):
                shutil.rmtree(out / name)
            shutil.copytree(source / 'last', out / 'last')
            assert_refused('train.py', *run(*resume, '--max_iters=25'), out)
            shutil.rmtree(out)


@pytest.mark.parametrize('kind', [
    'train ours', 'train fused', 'train GptOss', 'decode ours', 'decode packed'])
def test_measurements_of_a_gpu(kind):
    """What gpu.sh runs on a GPU runs on a CPU too."""
    flags = ['--device=cpu', '--dtype=float32', '--steps=1', *MODEL]
    command = [sys.executable, ROOT / '.ci/gpu.py', *kind.split(), ROOT / 'config/default.py', *flags]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and 'tokens/s' in said.stdout, said.stderr
