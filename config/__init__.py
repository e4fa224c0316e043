"""
What all scripts share: settings, errors, and the choice of a device.

A setting is declared once, as `name = value  # meaning` between the two rulers of a script, with the type of
its value. A config file is Python and may hold settings of several scripts, so one file serves them all. In
`python SCRIPT [config/NAME.py ...] [--key=value ...]` later ones win.
"""

import ast
import ctypes
import difflib
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

# GNU's OpenMP reads this variable when torch loads it, so scripts import this module first. With the default,
# waiting threads spin so long that training beside one busy process is 3 to 30 times slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

ROOT = Path(__file__).parent.parent
SETTING = re.compile(r'^(?:# (.+)| *([a-z]\w*)(?:: ([^=\n]+))? = (.+?)(?:  # (.*))?)$', re.MULTILINE)
TEXTS = 'start', 'system', 'text_column', 'wandb_project', 'wandb_run_name'  # elsewhere a first ~ is the home
PEAK_TFLOPS = {  # dense bf16 (T4: fp16) from the data sheets, by a word of the device's name; the first wins
    'GB200': 2500, 'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L40S': 362,
    'L4': 121, 'A10': 125, 'RTX 5090': 210, 'RTX 4090': 165, 'RTX 3090': 71, 'T4': 65}


def fail(message):
    """End the script with one line on stderr, which says what was wrong and what to do, and exit status 2."""
    write = sys.modules['tqdm'].tqdm.write if 'tqdm' in sys.modules else print  # not into a progress bar
    process = f' (rank {os.environ["RANK"]})' if 'RANK' in os.environ else ''  # set by torchrun
    with suppress(OSError):  # stderr may be closed
        write(f'{Path(sys.argv[0]).name}{process}: {" ".join(str(message).split())}', file=sys.stderr)
    raise SystemExit(2)


def check(good, message):
    """Fail with this message unless `good` is true."""
    if not good:
        fail(message)


@contextmanager
def fail_on(kinds, hint=''):
    """Turn an error of these kinds, which a user can cause, into one line. Others keep their traceback."""
    try:
        yield
    except kinds as error:
        fail(f'{error}{hint}')


@contextmanager
def explain_torch(hint):
    """Turn two RuntimeErrors of torch into one line: no memory (the hint helps), and the end of a process."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if re.search('MemoryError|(out of|not enough|allocate) memory', repr(error)):
            fail(f'out of memory; {hint}')
        if re.search('(closed|reset) by peer', repr(error)):
            fail('another process ended; its message says why')
        raise


def excepthook(kind, error, trace):
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print('\ninterrupted', file=sys.stderr)


def set_encodings():
    """Give pipes and files UTF-8, on Windows too, unless PYTHONIOENCODING is set. stdout replaces what it
    lacks."""
    for stream, errors in (sys.stdin, 'strict'), (sys.stdout, 'replace'), (sys.stderr, 'backslashreplace'):
        with suppress(AttributeError, OSError, ValueError):  # it is closed, in use, or a notebook's
            given = stream.isatty() or os.environ.get('PYTHONIOENCODING')
            stream.reconfigure(encoding=stream.encoding if given else 'utf-8', errors=errors)


sys.excepthook = excepthook  # no traceback for Ctrl-C
set_encodings()


def read(script, model=False, also=()):
    """The settings of a script (its __file__) as {name: value}, and the names that a file or a flag gave.
    With model=True they include the fields of GPTConfig, and those of train.py that `also` names."""
    script = Path(script).name
    scripts = 'model.py', 'prepare.py', 'sample.py', 'bench.py', 'train.py', script  # the last one's wins
    known = {key: setting for name in scripts for key, setting in declared(name).items()}
    fields = declared('model.py')
    names = {*declared(script), *also, *(fields if model else ())}
    own = {key: known[key] for key in declared(script) | declared('train.py') | fields if key in names}
    values = {key: convert(key, default, kind) for key, (kind, default, _, _) in known.items()}
    given = {}
    for argument in sys.argv[1:]:
        if argument in ('--help', '-h'):
            print_help(script, own, fields)
        if argument.startswith('--'):
            key, equals, text = argument[2:].partition('=')
            found = {key.replace('-', '_'): text if equals else True}  # --overwrite is --overwrite=True
            where = '--'
            check_names(found, own, where)
        else:
            found = run_file(argument, values | given)
            where = f'{argument}: '
        for key, value in found.items():
            given[key] = convert(where + key, value, known[key][0])
    return {key: given.get(key, values[key]) for key in own}, given.keys() & own.keys()


def declared(script):
    """{name: (type, default, meaning, heading)} of a script's settings; of GPTConfig's fields in model.py."""
    text = (ROOT / script).read_text(encoding='utf-8')
    ruler = 'class GPTConfig:' if script == 'model.py' else '# ' + 77 * '-'
    heading = 'GPTConfig'
    found = {}
    for title, name, kind, default, meaning in SETTING.findall(text.split(ruler)[1].partition('    def ')[0]):
        heading = title or heading
        if name:
            default = eval(default, {})  # a value such as 5 * 8
            kind = 'text' if name in TEXTS else kind or type(default).__name__
            found[name] = kind, default, meaning, heading
    return found


def convert(name, value, kind):
    """value, the text of a flag or an object from a config file, as the type that `kind` names."""
    base, _, optional = kind.partition(' | ')
    result = value
    if isinstance(value, str) and base not in ('str', 'text'):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            result = ast.literal_eval(value.capitalize() if value.isalpha() else value)  # true is True
        if base == 'list[str]' and isinstance(result, tuple) and all(isinstance(one, str) for one in result):
            result = list(result)
        elif base == 'list[str]' and result is not None and not isinstance(result, list):
            result = (result if isinstance(result, str) else value).split(',')
    if result is None and optional:
        return None
    number = type(result) in (int, float) and abs(result) <= sys.float_info.max
    words = isinstance(result, list) and all(isinstance(word, str) for word in result)
    string = isinstance(result, str) and '\0' not in result
    good = {'int': number and result == int(result), 'float': number, 'bool': type(result) is bool,
            'list[str]': words, 'str': string, 'text': string}
    check(good[base], f'{name}={value!r:.200} must be of type {kind}')
    if base == 'text' and result.startswith('FILE:'):
        return 'FILE:' + convert(name, result.removeprefix('FILE:'), 'str')
    if base == 'text':  # Python hides bytes of another encoding
        with fail_on(UnicodeError, f'; {name} must be in UTF-8'):
            result.encode()
    if base == 'str':
        result = os.path.expanduser(result)
        check(not result.startswith('~'), f'{name}={value}: no user has this home; ./{value} is a name here')
    return dict(int=int, float=float).get(base, type(result))(result)


def check_names(names, valid, where):
    for name in sorted(set(names) - set(valid)):
        close = difflib.get_close_matches(name, valid, n=1, cutoff=0)[0]
        fail(f'{where}{name}: there is no such setting; did you mean {close}? (see --help)')


def run_file(path, values):
    """Run a config file with the settings so far as its globals, and return what it assigned.
    A file that assigns something else, or nothing, may be anything, and is not run."""
    found = [file for file in (os.path.expanduser(path), ROOT / path) if os.path.isfile(file)]
    close = difflib.get_close_matches(path, map(str, ROOT.glob('config/[!_]*.py')), n=1, cutoff=0)[0]
    no_config = (f'{path} is not a config, a file that ends in .py and assigns settings, such as {close}. '
                 'Data has flags: prepare.py --dataset= reads it, --data_dir= names what prepare.py wrote')
    check(found and path.endswith('.py'), no_config)
    with fail_on((OSError, SyntaxError, ValueError, RecursionError, MemoryError), f'; {no_config}'):
        tree = ast.parse(Path(found[0]).read_bytes(), path)
        code = compile(tree, path, 'exec')
    stored = {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    assigned = [name for name in code.co_names if name in stored and not name.startswith('_')]
    check_names(assigned, values, f'{path}: ')
    is_comment = len(tree.body) == 1 and ast.get_docstring(tree)  # as config/default.py
    check(assigned or is_comment, no_config)
    names = dict(values)
    try:
        exec(code, names)
    except (Exception, SystemExit) as error:  # a file can raise anything
        fail(f'{path}, line {error.__traceback__.tb_next.tb_lineno}: {type(error).__name__}: {error}')
    return {key: names.get(key) for key in values if key in assigned or names.get(key) is not values[key]}


def print_help(script, settings, fields):
    """Print every setting under its heading, with its default, type and meaning, and exit."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    print(f'python {script} [config/NAME.py ...] [--key=value ...]')
    for heading, rows in groupby(settings.items(), lambda row: row[1][3]):
        print(f'\n{heading}')
        for key, (kind, default, meaning, _) in rows:
            meaning = meaning or fields.get(key, ('', '', ''))[2]
            print(f'  --{key}={default!r}'.ljust(44), kind.ljust(16), meaning)
    raise SystemExit(0)


def pick_device(device, dtype):
    """The torch device and the name of the dtype to compute in, chosen here where they are 'auto'."""
    import torch
    there = torch.cuda.is_available()
    if 'LOCAL_RANK' in os.environ and device != 'cpu':  # torchrun: each process has a GPU; gloo knows no mps
        device = f'cuda:{os.environ["LOCAL_RANK"]}' if there else 'cpu'
    if device == 'auto':
        device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        device = 'cuda' if there else device
    try:
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f'device {device!r} cannot be used here: {str(error).splitlines()[0]}')
    if dtype == 'auto' and device.startswith('cuda'):
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':  # a CPU without bf16 units emulates bf16, up to a hundred times slower than fp32
        units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        dtype = 'bfloat16' if device == 'cpu' and units else 'float32'
    known = 'bfloat16', 'float16', 'float32', 'tf32'
    check(dtype in known, f'dtype {dtype!r} is none of {", ".join(known)}')
    if dtype == 'tf32':  # fp32 tensors; products of matrices round their inputs to 10 bits of mantissa
        newer = device.startswith('cuda') and torch.cuda.get_device_properties(device).major >= 8
        good = newer and not torch.version.hip
        check(good, f'dtype tf32 needs an NVIDIA GPU with CUDA, sm80 or newer; the device is {device}')
        torch.set_float32_matmul_precision('high')
        dtype = 'float32'
    if device == 'cpu':  # let malloc reuse the memory that a step frees, which saves 10 % of a step on Linux
        with suppress(AttributeError, OSError, TypeError):  # other systems have no mallopt
            ctypes.CDLL(None).mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD: smaller blocks come from a heap
            ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    return device, dtype


def peak_flops(device, dtype):
    """The FLOP/s that MFU is measured against; None for fp32 and for a device that is not in PEAK_TFLOPS."""
    import torch
    if device.startswith('cuda') and dtype != 'float32':
        for word, peak in PEAK_TFLOPS.items():
            if re.search(rf'\b{word}\b', torch.cuda.get_device_name(device)):
                return peak * 1e12
