"""
The one reader of settings, for all scripts: plain assignments near a script's top, then config files, then flags.

    python SCRIPT [config/NAME.py ...] [--key=value ...]

Later wins. A setting is declared once, by a top-level `name = value  # meaning` above the script's first def, and
its default's type is its type; the fields of GPTConfig are declared the same way in model.py. A config file is
Python, run with the settings so far in sight. It may hold settings of any of the scripts, so that one file serves
prepare, train, sample and bench.
"""

import ast
import difflib
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = 'prepare.py', 'train.py', 'sample.py', 'bench.py'


def excepthook(kind, error, trace):
    """Ctrl-C, wherever it comes, is no reason for a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print('\ninterrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = excepthook


def fail(message):
    """End the script as a user's mistake does: one line that says what was wrong and what to do, exit status 2."""
    if 'tqdm' in sys.modules:
        for bar in list(sys.modules['tqdm'].tqdm._instances):  # it would share its line with the message
            bar.close()
    line = ' '.join(str(message).split())
    process = f' (process {os.environ["RANK"]})' if 'RANK' in os.environ else ''  # of those that torchrun started
    with suppress(OSError):  # where nobody reads any more
        print(f'{Path(sys.argv[0]).name}{process}: {line}', file=sys.stderr, flush=True)
    raise SystemExit(2)


def sync(*paths):
    """Return when what these files hold, or which files these folders hold, is on the disk to stay."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def enclosing_checkpoint(path):
    """The checkpoint of a run that a path is, or lies in; what is written there would count as damage."""
    path = Path(os.path.realpath(path))
    return next((folder for folder in (path, *path.parents)
                 if all(os.path.exists(folder / file) for file in ('SHA256SUMS', 'meta.json'))), None)


def declared(path, class_name=None):
    """{name: (type, default, meaning)} of the assignments at the top of a script, or of a dataclass in it."""
    source = path.read_text(encoding='utf-8')
    lines, body = source.splitlines(), ast.parse(source).body
    if class_name:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name).body
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            break
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            name = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if not isinstance(name, ast.Name) or name.id.isupper():
                continue  # unpacking, or a constant
            try:
                default = ast.literal_eval(node.value)
            except ValueError:
                continue  # computed, so no setting
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else type(default).__name__
            found[name.id] = annotation, default, lines[node.end_lineno - 1].partition('  # ')[2]
    return found


def convert(key, value, kind):
    """value, a flag's text or a config file's object, as the type named kind. Raises ValueError if it is none."""
    wanted, _, optional = kind.partition(' | ')
    if wanted == 'str' and isinstance(value, str) and '\0' not in value:  # of which no name of a file can be
        return value
    result = value
    if isinstance(value, str):
        if wanted.startswith('list') and not value.startswith('['):
            result = value.split(',')
        else:
            try:
                result = ast.literal_eval(
                    {'true': 'True', 'false': 'False', 'none': 'None'}.get(value.lower(), value))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass  # and is none of what follows
    if result is None and optional:
        return None
    number = isinstance(result, int | float) and not isinstance(result, bool) and abs(result) <= sys.float_info.max
    if wanted == 'float' and number:
        return float(result)
    if wanted == 'int' and number and result == int(result):  # 1e5 is a whole number too
        return int(result)
    if wanted == 'bool' and isinstance(result, bool):
        return result
    if wanted.startswith('list') and isinstance(result, list) and all(isinstance(item, str) for item in result):
        return result
    raise ValueError(f'{key} is {value!r:.200}; it wants {article(kind)}')


def article(kind):
    example = {'int': 'a whole number', 'float': 'a number', 'bool': 'True or False', 'str': 'a string'}
    return (example.get(kind.partition(' | ')[0], 'names divided by commas')
            + (', or None' if kind.endswith('None') else ''))


def nearest(key, valid):
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0)
    return f'did you mean {close[0]}?' if close else ''


def settings_of(script, model=False, also=None):
    """{name: (type, default, meaning)} of all settings of a script (its __file__).

    With model=True every field of GPTConfig is a setting too, unless the script declares it with a default of its
    own, and with `also` so is what another script declares.
    """
    own = declared(Path(script))
    for more in (declared(ROOT / also) if also else {}, declared(ROOT / 'model.py', 'GPTConfig') if model else {}):
        own |= {key: entry for key, entry in more.items() if key not in own}
    return own


def read(script, model=False, also=None):
    """The settings of a script as {name: value}, see settings_of, and the set of names that a file or a flag gave."""
    own, fields = settings_of(script, model, also), declared(ROOT / 'model.py', 'GPTConfig')
    known = {key: entry for name in SCRIPTS for key, entry in declared(ROOT / name).items()} | own | fields
    values, given = {key: default for key, (_, default, _) in own.items()}, set()
    for argument in sys.argv[1:]:
        if argument in ('--help', '-h'):
            print(f'python {Path(script).name} [config/NAME.py ...] [--key=value ...]\n')
            for key, (_, default, meaning) in own.items():
                print(f'  --{key}={default!r}'.ljust(44) + f'  {meaning or known[key][2]}')
            raise SystemExit(0)
        try:
            if argument.startswith('--'):
                key, equals, value = argument[2:].partition('=')
                key = key.replace('-', '_')
                if key not in own:
                    raise ValueError(f'there is no setting {key!r}; {nearest(key, own)} (--help lists all)')
                if not equals and own[key][0] == 'bool':  # --overwrite is --overwrite=True
                    equals, value = True, 'True'
                if not equals:
                    raise ValueError(f'--{key} needs a value: --{key}={own[key][1]!r}, for instance')
                given.add(key)
                values[key] = convert('--' + key, value, own[key][0])
            else:
                for key, value in run_file(argument, values).items():
                    if key not in known:
                        raise ValueError(f'{argument}: there is no setting {key!r}; {nearest(key, known)}')
                    value = convert(f'{argument}: {key}', value, known[key][0])
                    if key in own:
                        given.add(key)
                        values[key] = value
        except ValueError as error:
            fail(error)
    return values, given


def run_file(path, values):
    """Run a config file with `values` in sight and return what it assigned."""
    if not Path(path).is_file():
        files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('config/[!_]*.py'))
        fail(f'{path}: no such file; {nearest(path, files)}')
    names = dict(values)
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8'), path)
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as error:  # whatever a file can raise, the user wants to know the place
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, 'lineno', None) or frames and frames[-1].lineno
        fail(f'{path}{f", line {line}" if line else ""}: {type(error).__name__}: {error}')
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {key: names[key] for key in names if key in stored and not key.startswith('_')}
