"""
What all scripts share: settings, errors, and the choice of a device.

    python SCRIPT [config/NAME.py ...] [--key=value ...]      # later wins

A setting is declared once, as `name = value  # meaning` between the two rulers of a script, with the type of
its value. A config file is Python and may hold settings of several scripts, so one file serves them all.
"""

import ast
import ctypes
import difflib
import itertools
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

# GNU's OpenMP reads this variable when torch loads it, so scripts import this module first. With the default,
# waiting threads spin so long that training beside one busy process is 3 to 30 times slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

ROOT = Path(__file__).parent.parent
RULER = '# ' + '-' * 77 + '\n'
SETTING = re.compile(r' *(?P<name>[a-z]\w*)(: (?P<kind>[^=]+))? = (?P<default>.+?)(  # (?P<meaning>.*))?')
SPELLED = dict(true='True', false='False', none='None')
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
        full = re.search('out of memory|not enough memory|allocate memory', str(error))
        check(not full and not isinstance(error, MemoryError), f'out of memory; {hint}')
        lost = re.search('(closed|reset) by peer', str(error))
        check(not lost, 'another process ended; its message says why')
        raise


def excepthook(kind, error, trace):
    if kind is KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = excepthook  # no traceback for Ctrl-C


def read(script, model=False, also=()):
    """The settings of a script (its __file__) as {name: value}, and the names that a file or a flag gave.

    With model=True the fields of GPTConfig are settings too, and so are those of train.py that `also` names.
    """
    script = Path(script).name
    fields = declared('model.py')
    known = dict(fields)
    for other in ('prepare.py', 'sample.py', 'bench.py', 'train.py', script):  # later wins
        known |= declared(other)
    order = declared(script) | declared('train.py') | fields
    names = {*declared(script), *also, *(fields if model else ())}
    own = {key: known[key] for key in order if key in names}
    values = {key: default for key, (_, default, _, _) in known.items()}
    given = set()
    for argument in sys.argv[1:]:
        if argument in ('--help', '-h'):
            print_help(script, own, fields)
        if argument.startswith('--'):
            found = read_flag(argument)
            where = '--'
        else:
            found = run_file(argument, values)
            where = f'{argument}: '
        valid = own if where == '--' else known
        for key, value in found.items():
            check(key in valid, f'{where}{key}: there is no such setting; {nearest(key, valid)} (see --help)')
            values[key] = convert(where + key, value, known[key][0])
            given.add(key)
    return {key: values[key] for key in own}, given & own.keys()


def read_flag(argument):
    """{name: text} of --name=text. --overwrite is short for --overwrite=True."""
    key, equals, text = argument[2:].partition('=')
    return {key.replace('-', '_'): text if equals else True}


def declared(script):
    """{name: (type, default, meaning, heading)} of a script's settings; of GPTConfig's fields in model.py."""
    text = (ROOT / script).read_text(encoding='utf-8')
    block = text.split('class GPTConfig:\n' if script == 'model.py' else RULER)[1]
    heading = 'GPTConfig'
    found = {}
    for line in block.partition('    def ')[0].splitlines():
        setting = SETTING.fullmatch(line)
        if line.startswith('# '):
            heading = line[2:]
        elif setting:
            default = eval(setting['default'], {})  # a value such as 5 * 8
            kind = setting['kind'] or type(default).__name__
            found[setting['name']] = kind, default, setting['meaning'], heading
    return found


def convert(name, value, kind):
    """value, the text of a flag or an object from a config file, as the type that `kind` names."""
    kind, _, optional = kind.partition(' | ')
    result = value
    if isinstance(value, str) and kind != 'str':
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            result = ast.literal_eval(SPELLED.get(value.lower(), value))
        if kind == 'list[str]' and isinstance(result, str):
            result = result.split(',')
    if result is None and optional:
        return None
    number = type(result) in (int, float) and abs(result) <= sys.float_info.max
    words = isinstance(result, list) and all(isinstance(word, str) for word in result)
    wanted, good = {
        'int': ('a whole number', number and result == int(result)),  # 1e5 is one too
        'float': ('a number', number),
        'bool': ('True or False', type(result) is bool),
        'str': ('a string', isinstance(result, str) and '\0' not in result),
        'list[str]': ('comma-separated names', words),
    }[kind]
    check(good, f'{name}={value!r:.200} must be {wanted}{", or None" if optional else ""}')
    return dict(int=int, float=float).get(kind, lambda same: same)(result)


def nearest(key, valid):
    return f'did you mean {difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]}?'


def run_file(path, values):
    """Run a config file with the settings so far as its globals, and return what it assigned."""
    if not Path(path).is_file():
        path = str(ROOT / path)  # from another folder
    configs = map(str, ROOT.glob('config/[!_]*.py'))
    check(Path(path).is_file(), f'{path}: no such file; {nearest(path, configs)}')
    names = dict(values)
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8'), path)
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as error:  # a file can raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [1, *(frame.lineno for frame in frames if frame.filename == path)]
        fail(f'{path}, line {getattr(error, "lineno", lines[-1])}: {type(error).__name__}: {error}')
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return {key: names[key] for key in names if key in stored and not key.startswith('_')}


def print_help(script, settings, fields):
    """Print every setting under its heading, with its default, type and meaning, and exit."""
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    print(f'python {script} [config/NAME.py ...] [--key=value ...]')
    for heading, rows in itertools.groupby(settings.items(), lambda row: row[1][3]):
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
        device = 'cuda' if there else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f'device {device!r} cannot be used here: {str(error).splitlines()[0]}')
    if dtype == 'auto' and device.startswith('cuda'):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = 'bfloat16' if native else 'float16'
    elif dtype == 'auto':  # a CPU without bf16 units emulates bf16, up to a hundred times slower than fp32
        units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        dtype = 'bfloat16' if device == 'cpu' and units else 'float32'
    known = dtype in ('bfloat16', 'float16', 'float32')
    check(known, f'dtype is {dtype!r}; it must be auto, bfloat16, float16 or float32')
    if device == 'cpu':
        keep_freed_memory()
    return device, dtype


def keep_freed_memory():
    """Let malloc reuse the memory that a step frees, which saves 10 % of a step on Linux. Blocks below 32 MB
    (M_MMAP_THRESHOLD) come from a heap that does not shrink (M_TRIM_THRESHOLD)."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2 ** 25)
        mallopt(-1, 2 ** 31 - 1)


def peak_flops(device, dtype):
    """The FLOP/s that MFU is measured against; None for fp32 and for a device that is not in PEAK_TFLOPS."""
    import torch
    if not device.startswith('cuda') or dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak * 1e12 for word, peak in PEAK_TFLOPS.items() if re.search(rf'\b{word}\b', name)]
    return peaks[0] if peaks else None
