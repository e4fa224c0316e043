"""
Turn text into train.bin, val.bin and meta.json: token ids of documents, each with an end-of-text token.

    python prepare.py                                                # TinyStories from the Hugging Face hub
    python prepare.py --dataset='my/texts/*.txt' --tokenizer=gpt2    # .txt .jsonl .csv .parquet .txt.gz ...
    python prepare.py --dataset=builtin --tokenizer=bpe              # generated stories, needs no network
    python prepare.py --dataset=chats.jsonl                          # messages, or questions and answers

Chats are written in the harmony format of gpt-oss. train_mask.bin and val_mask.bin mark the answers' tokens.
"""

import config  # first: it sets variables that libraries read when they load
from config import check, fail_on

import base64
import csv
import glob
import io
import itertools
import json
import math
import os
import random
import re
import tempfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cache, cached_property, partial
from pathlib import Path

import fsspec
import jinja2
import numpy as np
import tiktoken
from tqdm.auto import tqdm

from config._stories import builtin_stories

# -----------------------------------------------------------------------------
# the corpus
dataset = 'roneneldan/TinyStories'  # hub NAME[:SUBSET]; a file (.txt .json[l] .csv ...), glob or URL; builtin
val_dataset = ''  # the same for validation; empty: files or a split named validation, val or dev, if any
text_column = ''  # column of the text; empty: messages, conversations, a question and its answer, or text
skip_bad_rows = False  # leave out rows that cannot be read, and count them
max_docs = 0  # read at most this many documents of each split; 0 reads all
val_fraction = 0.1  # else: of the documents, drawn by the seed; fewer than 10: the end of the text
megabytes = 8.0  # size of the built-in corpus
seed = 1337  # of the built-in corpus, and of which documents are for validation
# the tokens
tokenizer = 'o200k_harmony'  # a name that tiktoken knows; byte, char or bpe; a data folder or checkpoint
vocab_size = 1024  # tokens of bpe, with the 256 bytes and end of text; chats and special_tokens add 6
special_tokens = False  # encode <|endoftext|>, <|start|> ... in a text as special tokens, not as letters
data_dir = ''  # folder to write to; empty: data/ and the name of the dataset
num_proc = 0  # threads that tokenise; 0: one per core
# -----------------------------------------------------------------------------


# --- sources: {split: [(name, function that yields parts of documents)]} ------------------------------------
# A document is a text or a Chat. Its parts are (text or Chat, whether it ends); a piece is (split, *part).
SUFFIXES = '.txt', '.md', '.jsonl', '.ndjson', '.json', '.csv', '.parquet'
PACKED = {'.gz': 'gzip', '.bz2': 'bz2', '.zst': 'zstd'}  # a second suffix
FILE = re.compile(rf'(.+?)({"|".join(SUFFIXES)})({"|".join(PACKED)})?', re.IGNORECASE | re.DOTALL)
OFFLINE = '; offline: --dataset=builtin or FILE.txt, --tokenizer=byte, char or bpe, or set TIKTOKEN_CACHE_DIR'
SPLITS = dict(training='train', train='train', validation='val', validate='val', valid='val', val='val',
              evaluation='val', eval='val', dev='val', testing='test', test='test')
SPLIT = re.compile(rf'({"|".join(SPLITS)})(?=[-_.*?[\d]|$)', re.IGNORECASE)  # train-0.csv, not trainer.csv


class BadInput(ValueError):
    """What a user gave cannot be used: data, a tokenizer or a prompt. Any other ValueError is a bug."""


@contextmanager
def reading(name, hint=''):
    """Turn an error inside into a BadInput that names the source."""
    try:
        yield
    except Exception as error:  # datasets and the readers below it raise dozens of types
        raise BadInput(f'{name} cannot be read ({type(error).__name__}: {error!s:.400}){hint}') from error


class Null(ValueError):
    """A row has a null in place of a text. It is left out."""


def require(good, message):
    """Raise a ValueError with this message unless `good` is true."""
    if not good:
        raise ValueError(message)


def open_sources(downloads):
    """The sources of train and, where there are any, of val. Prints what is left out."""
    held_out = [source for _, source in list_sources(val_dataset, downloads)] if val_dataset else []
    hidden = {os.path.realpath(name) for name, _ in held_out}
    sources = {}
    for split, source in list_sources(dataset, downloads):
        if os.path.realpath(source[0]) not in hidden:
            sources.setdefault(split, []).append(source)
    rest = ', '.join(sources) or 'only files of val_dataset'
    check('train' in sources, f'{dataset} has no split named train, but {rest:.200}; name one: test*.txt')
    used = dict(train=sources['train'], val=held_out or sources.get('val', []))
    for split, others in (*sources.items(), ('val', held_out)):
        if others and others is not used['train']:
            role = 'is for validation' if others is used['val'] else 'is left out'
            print(f'{dataset}: {split} {role} ({others[0][0]}{", ..." if others[1:] else ""})')
    return {split: others for split, others in used.items() if others}


def list_sources(name, downloads):
    """Yield (split, (name, function that yields parts of documents)) of all that a dataset holds."""
    files = find_files(name)
    for file, split in files.items():
        yield split, (file, partial(read_file, file, downloads))
    if name == 'builtin':
        yield 'train', (name, lambda: ((story, True) for story, _ in builtin_stories(megabytes, seed)))
    elif not files:
        import datasets  # slow to import
        with reading(f'{name} (no text file, so a Hugging Face dataset)', OFFLINE):
            if os.path.isdir(name):  # written by save_to_disk
                found = datasets.load_from_disk(name)
            else:
                path, _, subset = name.partition(':')
                found = datasets.load_dataset(path, subset or None, streaming=max_docs > 0)
        for split, rows in found.items() if isinstance(found, dict) else [('', found)]:
            yield SPLITS.get(split or 'train', split), (os.path.join(name, split), partial(read_hub, rows))


def find_files(name):
    """{file: split} of a file, a URL or a pattern. Empty for other datasets, and folders of save_to_disk."""
    if name == 'builtin' or any(Path(name, file).exists() for file in ('state.json', 'dataset_dict.json')):
        return {}
    check(not os.path.isdir(name), f'{name}: a folder; name its files, as in {Path(name, "*.txt")}')
    # Leading folders that exist are names, even with brackets in them.
    folder = next((parent for parent in Path(name).parents if parent.exists()), Path())
    pattern = Path(name).relative_to(folder)
    found = glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True)
    alone = '://' in name or os.path.isfile(name)
    chosen = alone or any(map(SPLIT.match, pattern.parts))  # a split that the user names is what to read
    files = {}
    for file in [name] if alone else sorted(filter(os.path.isfile, found)):
        check(match_file(file), f'{file}: its suffix must be one of {" ".join(SUFFIXES)} (.gz .bz2 .zst)')
        words = [] if chosen else filter(None, map(SPLIT.match, Path(file).relative_to(folder).parts))
        files[file] = next((SPLITS[word[1].lower()] for word in words), 'train')
    is_hub = not glob.has_magic(name) and not match_file(name)
    check(files or is_hub, f'{name}: no such file')
    return files


def match_file(name):
    """(stem, suffix, that of a packed file or None) of a file's name or URL, as a match. None for others."""
    return FILE.fullmatch(re.split('[?#]', name.partition('://')[2])[0] if '://' in name else name)


def read_pieces(sources, chats=None):
    """The pieces of the first max_docs documents of each split. All must be chats (True) or texts (False)."""
    skipped.clear()
    for split, source in sources.items():
        left = max_docs or math.inf
        for document, ends in itertools.chain.from_iterable(itertools.starmap(read_source, source)):
            same = chats in (None, isinstance(document, Chat))
            check(same, f'{dataset} holds texts and chats; prepare them one at a time')
            yield split, document, ends
            left -= ends
            if left == 0:
                break


def read_source(name, read):
    """Yield the parts of a source's documents. Raises BadInput, which names the source, or skips bad rows."""
    kinds = set()
    with reading(name):
        for document, ends in read():
            kinds.add(type(document))
            if not isinstance(document, Exception):
                yield document, ends
            elif skip_bad_rows or isinstance(document, Null):
                skipped.append(f'{name}, {ascii(str(document))[1:-1]:.200}' if len(skipped) < 3 else '')
            else:
                raise document
        if kinds == {LookupError}:  # no row has the columns
            raise document


def read_hub(split):
    """Yield the documents of a split of a hub's dataset."""
    columns = read_columns(split.column_names or next(iter(split), {}))
    batches = split.select_columns(columns).with_format('arrow').iter(batch_size=1000)
    yield from read_documents(arrow_rows(batches))


def read_file(file, downloads):
    """Yield the parts of a local file, or of a URL, which is copied to the folder `downloads` once."""
    _, suffix, packed = match_file(file.lower()).groups()
    require(suffix != '.parquet' or not packed, 'unpack it; parquet is compressed already')
    with open(download(file, downloads) if '://' in file else file, 'rb') as stream:
        if packed:
            import pyarrow  # finds what other readers of .zst do not: that the file was cut
            stream = io.BufferedReader(pyarrow.CompressedInputStream(stream, PACKED[packed]), PIECE)
        if suffix in ('.txt', '.md'):
            yield from text_file(read_blocks(stream))
        elif suffix == '.parquet':
            from pyarrow import parquet
            table = parquet.ParquetFile(stream)
            batches = table.iter_batches(100, columns=read_columns(table.schema_arrow.names))
            yield from read_documents(arrow_rows(batches))
        else:
            blocks = (io.StringIO(block, newline='') for block in read_blocks(stream))
            lines = itertools.chain.from_iterable(blocks)
            yield from read_documents(csv_rows(lines) if suffix == '.csv' else json_rows(lines))


@cache
def download(url, folder):
    """Copy a URL to a folder, once, and return the path of the copy."""
    files, path = fsspec.url_to_fs(url)
    copy = os.path.join(folder, str(len(os.listdir(folder))))
    files.get_file(path, copy)
    return copy


def read_blocks(stream):
    """Yield the text of a binary stream in blocks of whole lines."""
    number = 1  # of the block's first line
    while block := stream.read(PIECE) + stream.readline():
        start = block[:1000] if number == 1 else b''
        controls = sum(byte < 7 or 13 < byte < 27 for byte in start)  # every second byte of UTF-16
        wide = start[:2] in (b'\xff\xfe', b'\xfe\xff') or controls > 2 + len(start) / 3
        require(not wide, 'it is in UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8 FILE > NEW_FILE')
        try:
            yield block.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
            number += error.object.count(b'\n', 0, error.start)
            raise ValueError(f'line {number} is not UTF-8 (UnicodeDecodeError: {error.reason})') from error
        number += block.count(b'\n')


# --- rows of JSON, CSV and Arrow, as (where, row) -----------------------------------------------------------
QUESTIONS = 'instruction', 'prompt', 'question'
ANSWERS = 'output', 'completion', 'answer', 'response'
CHOICES = [('messages',), ('conversations',), *itertools.product(QUESTIONS, ANSWERS), ('text',)]
CONTEXTS = 'input', 'context'  # are appended to a question
OPTIONS = 'tools builtin_tools reasoning_effort model_identity chat_template_kwargs'.split()
UNREAD = '''system system_prompt system_message developer developer_message instructions history functions
    documents choices options thinking enable_thinking response_format knowledge_cutoff current_date
    conversation_start_date chat_template template_kwargs reasoningEffort image images audio audios video
    videos passage document article story background evidence examples hint persona reasoning rationale cot
    reasoning_content chain_of_thought weight train'''.split()  # would change what is learnt; refused
skipped = []  # what is wrong with each row that was left out; '' from the fourth on


def json_rows(lines):
    """Yield the rows of JSON: an object a line, or one array or object of many lines."""
    numbered = enumerate(lines, 1)
    number, line = next((one for one in numbered if not one[1].isspace()), (1, ''))
    if line.lstrip().startswith('[') or line.strip() == '{':
        value = json.loads('\n' * (number - 1) + line + ''.join(line for _, line in numbered))
        for i, row in enumerate(value if isinstance(value, list) else [value], 1):
            yield f'row {i}', row
        return
    for number, line in itertools.chain([(number, line)], numbered):
        try:
            if line.strip():
                yield f'line {number}', json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            yield f'line {number}', ValueError(getattr(error, 'msg', error))


def csv_rows(lines):
    """Yield the rows of a CSV file with a header. Every cell is text."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = csv.DictReader(lines, strict=True)
    try:
        names = rows.fieldnames or []
        require(len(set(names)) == len(names), f'its header names a column twice: {", ".join(names):.200}')
        for row in rows:
            if None in row:
                row = ValueError('it has more cells than the header')
            elif None in row.values():  # fewer cells: the others are not there, which is no null
                row = {name: cell for name, cell in row.items() if cell is not None}
            yield f'line {rows.line_num}', row
    except csv.Error as error:
        raise ValueError(f'the row that begins in line {rows.line_num + 1}: {error}') from error


def arrow_rows(batches):
    """Yield the rows of Arrow's batches, without the nulls with which it fills the objects of a list."""
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, 1):
        if any(isinstance(value, list) for value in row.values()):
            row = json.loads(json.dumps(row), object_hook=drop_nulls)
        yield f'row {number}', row


def drop_nulls(fields):
    """An object without its nulls, but for the text of a message."""
    texts = TEXT_OF_A_MESSAGE if fields.keys() & {'role', 'from'} else ()
    return {key: value for key, value in fields.items() if value is not None or key in texts}


def find_columns(names):
    """The column of a text or a chat, or the two of a question and its answer. Raises LookupError."""
    known = set(names)
    choices = [(text_column,)] if text_column else CHOICES
    found = [columns for columns in choices if known.issuperset(columns)]
    if not found:
        wanted = text_column or 'messages, text, or prompt and completion'
        raise LookupError(f'no column {wanted} among {", ".join(names):.200}; set --text_column')
    if len(found) > 1 and len(found[0]) == len(found[1]) == 2:
        raise LookupError(f'{" and ".join(found[0])}, or {" and ".join(found[1])}? Remove a column of one')
    return found[0]


def read_columns(names):
    """The columns that a document may need. No others are read."""
    columns = find_columns(names)
    beside = () if columns == ('text',) else {*CONTEXTS, *OPTIONS, *UNREAD}.difference(columns)
    return [*columns, *(name for name in names if name in beside)]


def read_documents(rows):
    """Yield the document of each row, in one part, or an error. Empty ones are left out."""
    for where, row in rows:
        try:
            document = read_row(row)
            str(document).encode()  # raises for half of a surrogate pair
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            kind = type(error) if type(error) in (LookupError, Null) else ValueError
            document = kind(f'{where}: {error}')
        if str(document):
            yield document, True


def read_row(row):
    """The text or the Chat of a row. Raises ValueError, of which Null is one."""
    if isinstance(row, ValueError):
        raise row
    if row is None:
        raise Null('it is null')
    require(isinstance(row, dict), f'it is no object with columns: {type(row).__name__}')
    columns = find_columns(row)
    chats = columns[0] in ('messages', 'conversations') and not text_column
    for name in columns:
        if row[name] is None:
            raise Null(f'{name} is null')
        kind = type(row[name]).__name__
        fits = isinstance(row[name], list if chats else (str, list))
        require(fits, f'the column {name} must not hold {kind}; columns: {", ".join(row):.200}')
    prompt, *completion = [row[name] for name in columns]
    if not completion:
        return read_chat(row, prompt) if isinstance(prompt, list) else prompt
    for name in CONTEXTS:
        context = row.get(name)
        if isinstance(prompt, str) and isinstance(context, str):
            prompt = '\n\n'.join(filter(None, (prompt, context)))
        elif context not in EMPTY:
            raise ValueError(f'the column {name} would be lost; it and {columns[0]} must be texts')
    if isinstance(prompt, str):
        prompt = [dict(role='user', content=prompt)]
    if isinstance(completion[0], str):
        completion = [[dict(role='assistant', content=completion[0])]]
    return read_chat(row, prompt + completion[0], len(prompt))


def read_chat(row, messages, asked=0):
    """The Chat of a row, whose first `asked` messages are not learnt. Nothing in the row may be lost."""
    chat = Chat(messages, **read_options(row))
    texts = [message.get(name, '') for message in chat.messages for name in ('content', 'thinking')]
    lines = strip_lines('\n'.join(map(str, texts)))
    for name in UNREAD:
        value = row.get(name)
        kept = value in EMPTY or isinstance(value, str) and strip_lines(value) in lines
        require(kept, f'the column {name} would be lost; move it into the messages, or remove it')
    for message in chat.messages[:asked]:
        if message['role'] == 'assistant':
            message['weight'] = 0
    answered = any(message['role'] == 'assistant' for message in chat.messages[asked:])
    require(answered or chat.turns, 'the chat has no answer of the assistant')
    special = SPECIAL.search(json.dumps([chat.messages, chat.options]))
    require(not special, f'a message holds {special and special[0]}, but its content is text alone')
    return chat


def strip_lines(text):
    """A text with all lines stripped, between newlines, so that `in` compares whole lines."""
    return '\n'.join(['', *map(str.strip, text.strip().splitlines()), ''])


def read_options(row):
    """The variables of the template in the columns beside a chat and in chat_template_kwargs, JSON or not."""
    options = {}
    given = [(name, row[name]) for name in OPTIONS if row.get(name) not in EMPTY]
    for name, value in given:  # and those that are found in chat_template_kwargs
        if isinstance(value, str) and name not in ('reasoning_effort', 'model_identity'):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{name} is no JSON: {value!r:.40}') from error
        known = name in OPTIONS and options.setdefault(name, value) == value
        require(known, f'{name!r:.40} is unknown, or differs between a column and chat_template_kwargs')
        if name == 'chat_template_kwargs':
            require(isinstance(value, dict), f'{name} is no object but {type(value).__name__}')
            given += options.pop(name).items()
    return options


# --- text files ---------------------------------------------------------------------------------------------
PIECE = 2 ** 20  # characters that are tokenised together
DIVIDER = re.compile(r'^<\|endoftext\|>[ \t]*(?:\n|\Z)', re.MULTILINE)
SEAM = re.compile(r'(?<=[^\W_])(?=\s)|(?<=\S)(?= )')  # no token of any tokenizer here spans this position


def text_file(blocks):
    """Yield the parts of a text file, given blocks of whole lines. <|endoftext|> divides its documents."""
    text = ''  # of this document, not yet yielded
    enough = 2 * PIECE  # characters from which on it is cut
    begun = False  # whether a part of this document was yielded
    divided = False  # whether the text has an <|endoftext|>
    blocks = (block.replace('\r\n', '\n').replace('\r', '\n') for block in blocks)
    for block in itertools.chain(blocks, [None]):
        *ended, rest = DIVIDER.split(END if block is None else block)
        for ending in ended:
            text += ending
            divided = divided or block is not None
            if divided:
                text = text.rstrip('\n') if begun else text.strip('\n')
            if text or begun:
                yield text, True
            text = ''
            begun = False
        text += rest
        if len(text) > enough:
            start = 0
            while seam := SEAM.search(text, start + PIECE, len(text) - PIECE):
                yield text[start:seam.start()], False
                start = seam.start()
                begun = True
            text = text[start:]
            enough = 2 * max(PIECE, len(text))  # longer where no seam was found


# --- chats, which config/chat_template.jinja writes in the harmony format of gpt-oss ------------------------
HARMONY = '<|start|>', '<|message|>', '<|channel|>', '<|end|>', '<|return|>', '<|call|>'
FIELDS = {name: name for name in 'role content channel weight thinking tool_calls tool_call_id name'.split()}
FIELDS |= dict(value='content', train='weight', reasoning='thinking', reasoning_content='thinking')
FIELDS['from'] = 'role'
TEXT_OF_A_MESSAGE = [key for key, name in FIELDS.items() if name == 'content']
ROLES = dict(human='user', gpt='assistant')  # ShareGPT's names
EMPTY = None, '', [], {}
SPECIAL = re.compile(r'<\|(start(oftext)?|message|channel|constrain|end(of\w+)?|return|call|reserved_\d+)\|>')
LEARNT = '<|generation|>'  # begins and ends what a rendered turn teaches
TOKEN = re.compile(r'(<\|\w+\|>)')
LETTERS = '<\ufdd0|'  # replaces <| in messages while the template renders: only its own <| become tokens


@cache
def chat_template():
    """The template. It writes LEARNT in place of the tags `generation`, which transformers alone knows."""
    def raise_exception(message):
        raise ValueError(f'{message:.300}')

    environment = jinja2.Environment()
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = raise_exception
    source = Path(config.ROOT, 'config', 'chat_template.jinja').read_text(encoding='utf-8')
    source = re.sub(r'{%- (end)?generation -%}', "{{- '" + LEARNT + "' -}}", source)
    return environment.from_string(source)


class Chat:
    """A conversation: messages {role, content, ...}, tools and other OPTIONS. config/chat_template.jinja says
    at its head what they may hold; FIELDS has other names of a message's fields. Raises ValueError."""

    def __init__(self, messages, tools=None, **options):
        self.options = options | dict(tools=tools)
        self.messages = [read_message(number, message) for number, message in enumerate(messages, 1)]

    @cached_property
    def turns(self):
        """Texts that teach the answers: up to each final one, and up to calls at the end. A text is left out
        if the next one begins with it, marks included. It stays if it ends in an answer and the next one does
        not, because only a text's last answer teaches where it ends."""
        ends = {}  # turn: how many messages there are up to its last one that is learnt
        turn = 0
        for i, one in enumerate(self.messages, 1):
            if one['role'] == 'assistant':
                ends |= {turn: i} if one.get('weight') != 0 else {}
                turn += not one.get('tool_calls') and one.get('channel', 'final') == 'final'
        rendered = {end: self.render(self.messages[:end]) for end in (*ends.values(), len(self.messages))}
        texts = []
        last = '<|return|>' + LEARNT  # ends an answer
        for end in reversed(ends.values()):
            text = rendered[end]
            begin = text.removesuffix(LEARNT).removesuffix('<|return|>') + LEARNT
            taught = texts and texts[0].startswith(begin)
            if not taught or text.endswith(last) and not texts[0].endswith(last):
                texts.insert(0, text)
        return texts

    def render(self, messages, **options):
        """The text of messages, in which TOKEN finds the special tokens and LETTERS stands for other <|."""
        given = json.dumps(self.options | dict(messages=messages)).replace('<|', '<\\ufdd0|')
        try:
            return chat_template().render(json.loads(given) | options)
        except (TypeError, jinja2.TemplateError) as error:
            raise ValueError(f'messages or tools have a value of the wrong type: {error}') from error

    def __str__(self):
        """All characters that are learnt from, to train a tokenizer on."""
        return TOKEN.sub('\n', '\n'.join(self.turns)).replace(LETTERS, '<|')

    def prompt(self, encoder, effort='medium'):
        """Token ids up to where the assistant answers. Analysis before a final answer is left out."""
        text = self.render(self.messages, add_generation_prompt=True, reasoning_effort=effort)
        return encode_turn(encoder, text)[0]


def read_message(number, message):
    """The fields of a message under the names of the template, without empty ones."""
    require(isinstance(message, dict), f'message {number} is no object: {type(message).__name__}')
    fields = {}
    for key, value in message.items():
        name = FIELDS.get(key)
        if value in EMPTY and (name, value) != ('content', ''):
            continue
        require(name, f'message {number} has {key!r:.40}, which is none of {", ".join(FIELDS)}')
        same = fields.setdefault(name, value) == value
        require(same, f'message {number} has {key!r}, which differs from another {name} of it')
    is_null = any(name in message and message[name] is None for name in TEXT_OF_A_MESSAGE)
    if is_null and not fields.keys() & {'content', 'thinking', 'tool_calls'}:
        raise Null(f'the content of message {number} is null')
    return fields | dict(role=ROLES.get(str(fields.get('role')), fields.get('role')))


def encode_turn(encoder, text):
    """(token ids, mask) of what Chat.render returns. The mask is 1 on what is learnt."""
    tokens = []
    mask = []
    learnt = 0
    for part in TOKEN.split(text):
        if part == LEARNT:
            learnt = 1 - learnt
        elif part in encoder.special_tokens_set:
            tokens.append(encoder.encode_single_token(part))
        else:
            tokens += encode_text(encoder, part.replace(LETTERS, '<|'))
        mask += [learnt] * (len(tokens) - len(mask))
    return tokens, mask


# --- tokenizers, each a tiktoken.Encoding -------------------------------------------------------------------
END = '<|endoftext|>'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = dict(byte=r'[\s\S]', char=r'[\s\S]', bpe=GPT2)  # other programs know it as gpt-2
RUN = 2 ** 16  # characters of white space that tiktoken can split
UNBROKEN = re.compile(r'([^\W_]{1024}|(?:[^\w\s]|_){1024}|\s{1024})')


def encoding(name, ranks, special=(END,)):
    """The encoding byte, char or bpe with these {bytes: rank} and special tokens."""
    special_ids = {token: len(ranks) + i for i, token in enumerate(special)}
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special_ids)


def load_tokenizer(name):
    """The encoding of tiktoken with this name, or of a data folder or checkpoint. Raises BadInput."""
    names = tiktoken.list_encoding_names()
    if name in names:  # even where a folder has the same name
        with reading(f'the vocabulary file of {name}', OFFLINE):
            return tiktoken.get_encoding(name)
    try:
        return read_tokenizer(Path(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f'{name!s:.99} gives no tokenizer ({type(error).__name__}: {error!s:.200}); it must '
                       f'be a folder with a meta.json or one of {", ".join([*PATTERNS, *names])}') from error


def read_tokenizer(folder):
    """The encoding that meta.json names, with the ranks in tokenizer.tiktoken if it is byte, char or bpe."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    name = meta['tokenizer']
    special = meta.get('special_tokens', [END])
    if name in tiktoken.list_encoding_names():
        return load_tokenizer(name)
    require(name in PATTERNS, f'its meta.json names the tokenizer {name!r:.40}')  # a folder, even in a circle
    ranks = {}
    for line in (folder / 'tokenizer.tiktoken').read_text(encoding='utf-8').splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    whole = len(ranks) + len(special) == meta['vocab_size'] and sorted(ranks.values()) == [*range(len(ranks))]
    require(END in special and whole, 'its tokens do not make up the vocabulary')
    return encoding(name, ranks, special)


def encode_text(encoder, text, convert=np.ndarray.tolist):
    """Token ids of a text, in which special tokens are letters. Raises BadInput."""
    if encoder.name == 'char':
        unknown = set(text) - set(map(bytes.decode, encoder.token_byte_values()))
        if unknown:
            names = ', '.join(map(repr, sorted(unknown)[:10]))
            raise BadInput(f'the char tokenizer has no {names} (characters: {len(unknown)}); use bpe or byte')
    if not any(text[i:i + RUN].isspace() for i in range(0, len(text) - RUN + 1, RUN)):
        return convert(encoder.encode_to_numpy(text, disallowed_special=()))
    # In long runs of white space, tiktoken's regular expressions overflow their stack; tokenizers' do not.
    words = make_splitter(encoder).pre_tokenize_str(text)
    return list(itertools.chain.from_iterable(encoder._encode_single_piece(word) for word, _ in words))


def make_splitter(encoder):
    """What cuts a text into words as an encoding of tiktoken does, by the package tokenizers."""
    from tokenizers import Regex, pre_tokenizers
    # Possessive repeats only save time, and other programs read them differently.
    pattern = encoder._pat_str.replace('++$', r'+\z')
    pattern = re.sub(r'([+*?]|\{\d+,?\d*\})\+', r'\1', pattern)
    return pre_tokenizers.Split(Regex(pattern), 'isolated')


def encode_prompt(encoder, text):
    """Token ids of a text. Special tokens in it, such as <|endoftext|>, are encoded as special tokens."""
    special = encoder.special_tokens_set
    tokens = []
    for part in re.split(f'({"|".join(map(re.escape, special))})', text):
        tokens += [encoder.encode_single_token(part)] if part in special else encode_text(encoder, part)
    return tokens


def byte_characters():
    """{byte: character}: how GPT-2 and tokenizer.json print bytes. A printable one is its own character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def train_tokenizer(texts):
    """{bytes: rank} of the byte, char or bpe tokenizer for these texts."""
    if tokenizer == 'char':
        characters = sorted(set(itertools.chain.from_iterable(texts)))
        return {character.encode(): rank for rank, character in enumerate(characters)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    if tokenizer == 'byte':
        return ranks
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    words = pre_tokenizers.Split(Regex(PATTERNS['bpe']), 'isolated')
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # Merging takes quadratic time in a run without a boundary, so long ones are cut. Ordinary text has none.
    bpe.train_from_iterator(itertools.chain.from_iterable(map(UNBROKEN.split, texts)), trainer)
    byte_of = {character: byte for byte, character in byte_characters().items()}
    for left, right in json.loads(bpe.to_str())['model']['merges']:
        ranks.setdefault(bytes(map(byte_of.get, left + right)), len(ranks))
    return ranks


# --- from pieces to tokens ----------------------------------------------------------------------------------
def divide(sources, chats):
    """Give val_fraction of the documents to val, or of the text where there are fewer than 10."""
    documents = 0
    characters = 0
    for _, document, ends in tqdm(read_pieces(sources, chats), 'counting', leave=False):
        documents += ends
        characters += len(str(document))
        if documents >= max(10, 1 / val_fraction) and dataset != 'builtin':
            break
    if documents < 10 and not chats:
        left = int(characters * (1 - val_fraction))  # for train
        for _, document, ends in read_pieces(sources, chats):
            if 0 < left < len(document):
                yield 'train', document[:left], False
                document = document[left:]
                left = 0
            yield 'train' if left > 0 else 'val', document, ends
            left -= len(document)
        return
    splits = draw_splits(documents)
    split = next(splits)
    for _, document, ends in read_pieces(sources, chats):
        yield split, document, ends
        split = next(splits) if ends else split


def draw_splits(documents):
    """Yield each document's split. Of each 1 / val_fraction in a row, or of all, one is drawn for val."""
    if dataset == 'builtin':  # its stories are independent, so the last are as good
        held_out = max(1, round(documents * val_fraction))
        yield from itertools.chain(['train'] * (documents - held_out), itertools.repeat('val'))
    rng = random.Random(seed)
    size = min(1 / val_fraction, documents)
    for i in itertools.count():
        group = range(int(i * size), int((i + 1) * size))
        drawn = rng.choice(group)
        yield from ('val' if position == drawn else 'train' for position in group)


def encode_batch(batch, encoder, dtype):
    """[(split, ends, tokens, mask, bytes that are learnt, special tokens read as letters)] of pieces."""
    encode = encode_prompt if special_tokens else partial(encode_text, convert=np.asarray)
    known = encoder.special_tokens_set if special_tokens else ()
    encoded = []
    for split, document, ends in batch:
        if isinstance(document, Chat):
            tokens, mask = encode_turn(encoder, ''.join(turn + END for turn in document.turns))
        else:
            tokens = np.append(encode(encoder, document), np.full(int(ends), encoder.eot_token))
            mask = []  # all of it is learnt
        learnt = encoder.decode_bytes(list(itertools.compress(tokens, mask))) if mask else document.encode()
        spelled = sum(token[0] not in known for token in SPECIAL.finditer(str(document)))
        encoded.append((split, ends, np.asarray(tokens, dtype), bytes(mask), len(learnt), spelled))
    return encoded


def encode_pieces(pieces, encoder, dtype):
    """Yield what encode_batch returns of pieces, from threads, while this one reads on. Few are in memory."""
    pieces, same = itertools.tee(pieces)
    sizes = itertools.accumulate(len(str(document)) for _, document, _ in same)
    threads = num_proc or os.cpu_count()
    running = deque()
    with ThreadPoolExecutor(threads) as pool:
        for _, batch in itertools.groupby(pieces, lambda _: next(sizes) // PIECE):
            running.append(pool.submit(encode_batch, list(batch), encoder, dtype))
            if len(running) > 2 * threads:
                yield from running.popleft().result()
        for future in running:
            yield from future.result()


# --- the files of a data folder -----------------------------------------------------------------------------
def write_data(folder, pieces, encoder, chats):
    """Write the files of a data folder, each whole or not at all, and return what meta.json holds."""
    dtype = 'uint16' if encoder.max_token_value < 2 ** 16 else 'uint32'
    meta = dict(dataset=dataset, tokenizer=encoder.name, vocab_size=encoder.max_token_value + 1,
                eot_token=encoder.eot_token, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        meta |= write_bins(Path(new), encode_pieces(pieces, encoder, dtype), chats)
        documents = meta['train_documents'] + meta['val_documents']
        check(meta['train_tokens'] and meta['val_tokens'],
              f'{dataset} {val_dataset} holds too little text to train and validate (documents: {documents})')
        if dataset == 'builtin' and not val_dataset and documents >= 10:
            # loss on val.bin, nats a token, of a model that knows the grammar and sees whole stories
            stories = itertools.islice(builtin_stories(megabytes, seed), meta['train_documents'], documents)
            meta['perfect_loss'] = sum(nats for _, nats in stories) / meta['val_tokens']
        if encoder.name in PATTERNS:
            tokens = map(encoder.decode_single_token_bytes, range(encoder.eot_token))
            lines = [b'%s %d\n' % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
            Path(new, 'tokenizer.tiktoken').write_bytes(b''.join(lines))
            meta['special_tokens'] = sorted(encoder._special_tokens, key=encoder._special_tokens.get)
        Path(new, 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        for name in ('meta.json', 'train_mask.bin', 'val_mask.bin', 'tokenizer.tiktoken'):
            (folder / name).unlink(missing_ok=True)  # of an earlier corpus
        for file in sorted(Path(new).iterdir(), key=lambda file: file.name == 'meta.json'):  # meta.json last
            file.replace(folder / file.name)
    return meta


def write_bins(folder, encoded, chats):
    """Write the tokens of each split, and for chats the masks. Returns a Counter of what is written."""
    counts = Counter(train_tokens=0, val_tokens=0, train_documents=0, val_documents=0)
    names = ['train', 'val', 'train_mask', 'val_mask'] if chats else ['train', 'val']
    with ExitStack() as stack:
        bins = {name: stack.enter_context(open(folder / f'{name}.bin', 'wb')) for name in names}
        stack.enter_context(closing(encoded))  # in this thread, because it waits for its own threads
        for split, ends, tokens, mask, size, spelled in tqdm(encoded, 'tokenising', leave=False):
            bins[split].write(tokens)
            counts[f'{split}_crc32'] = zlib.crc32(tokens, counts[f'{split}_crc32'])
            counts.update({f'{split}_tokens': len(tokens), f'{split}_bytes': size, f'{split}_documents': ends,
                           'spelled_special_tokens': spelled})
            if chats:
                bins[f'{split}_mask'].write(mask)
                counts[f'{split}_targets'] += sum(mask)
    return counts


def choose_folder():
    """data_dir, or else data/ and the name of the dataset: data/news for news/*.txt."""
    if data_dir:
        return Path(data_dir)
    file = match_file(dataset)
    stem = file[1] if file else dataset.partition(':')[0]
    folder = Path('data', Path(re.sub(r'[*?\[\]]', '', stem)).name.strip(' .~') or 'text')  # of ../*.txt
    if (folder / 'meta.json').exists():
        with reading(folder / 'meta.json'):
            before = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['dataset']
        check(before == dataset, f'{folder} holds data of {before}; give --data_dir another folder')
    return folder


def main(downloads):
    check(0 < val_fraction < 1, f'--val_fraction={val_fraction} must be between 0 and 1')
    check(tokenizer != 'bpe' or 257 <= vocab_size <= 1e7, f'--vocab_size={vocab_size} must be 257 to 1e7')
    least = min(num_proc, max_docs, megabytes)
    check(least >= 0, f'num_proc, max_docs and megabytes must not be negative; one of them is {least}')
    sources = open_sources(downloads)
    folder = choose_folder()
    encoder = None if tokenizer in PATTERNS else load_tokenizer(tokenizer)
    first = next(read_pieces(sources), None)
    check(first and first[0] == 'train', '; '.join([f'{dataset} holds no text', *skipped[:3]]))
    chats = isinstance(first[1], Chat)
    if not encoder:
        texts = (str(document) for _, document, _ in read_pieces(sources, chats))
        ranks = train_tokenizer(tqdm(texts, 'reading', leave=False))
        special = (END, *HARMONY) if chats or special_tokens else (END,)
        encoder = encoding(tokenizer, ranks, special)
    check(not chats or encoder.special_tokens_set.issuperset(HARMONY),
          f'{dataset} holds chats, but {encoder.name} has no token <|start|>; use o200k_harmony, bpe or byte')
    pieces = read_pieces(sources, chats) if 'val' in sources else divide(sources, chats)
    meta = write_data(folder, pieces, encoder, chats)
    if skipped:
        print(f'rows left out: {len(skipped):,} ({"; ".join(skipped[:3])})')
    spelled = meta['spelled_special_tokens']
    if spelled:
        hint = f'{encoder.name} does not have them' if special_tokens else '--special_tokens=True reads them'
        print(f'{spelled:,} spellings of special tokens, such as {END}, were read as letters; {hint}')
    print(f'{folder}: {meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} validation tokens')


if __name__ == '__main__':
    globals().update(config.read(__file__)[0])
    with fail_on((OSError, BadInput)), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as downloads:
        main(downloads)
