"""
Turn text into train.bin, val.bin and meta.json: token ids of documents, each with an end-of-text token.

    python prepare.py                                                # TinyStories from the Hugging Face hub
    python prepare.py --dataset='my/texts/*.txt' --tokenizer=gpt2    # local .txt .jsonl .json .csv .parquet
    python prepare.py --dataset=builtin --tokenizer=bpe              # generated stories, needs no network
    python prepare.py --dataset=chats.jsonl                          # rows of messages, to train on chats

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cache, cached_property, partial
from pathlib import Path

import fsspec
import jinja2
import numpy as np
import tiktoken
from tqdm.auto import tqdm

# -----------------------------------------------------------------------------
# the corpus
dataset = 'roneneldan/TinyStories'  # hub NAME[:SUBSET]; .txt .json[l] .csv .parquet file, glob, URL; builtin
text_column = ''  # column of the text; empty: messages, conversations, instruction and output, or text
max_docs = 0  # read at most this many documents of each split; 0 reads all
val_fraction = 0.1  # for validation: the last of the documents, or of the text where there are fewer than 10
megabytes = 8.0  # size of the built-in corpus
seed = 1337  # of the built-in corpus
# the tokens
tokenizer = 'o200k_harmony'  # a name that tiktoken knows; byte, char or bpe; a data folder or checkpoint
vocab_size = 1024  # tokens of bpe, with the 256 bytes and end of text; chats and special_tokens add 6
special_tokens = False  # encode <|endoftext|>, <|start|> ... in a text as special tokens, not as letters
data_dir = ''  # folder to write to; empty: data/ and the name of the dataset
num_proc = 0  # threads that tokenise; 0: one per core
# -----------------------------------------------------------------------------


# --- built-in corpus: stories from a small grammar, whose entropy is known ----------------------------------
GIRLS = 'Lily Mia Anna Zoe Rose Ella Nora Ruby Clara Alma'.split()
BOYS = 'Tom Ben Max Sam Leo Finn Jack Hugo Oscar Theo'.split()
CHILDREN = [dict(child=name, kind='girl', he='She', his='her') for name in GIRLS]
CHILDREN += [dict(child=name, kind='boy', he='He', his='his') for name in BOYS]
FRIENDS = 'Pip Momo Bella Coco Dot Fuzzy Gus Hazel Jojo Kiki Luna Nutmeg Olive Poppy Rusty Tilly'.split()
ANIMALS = 'rabbit fox duck bear mouse frog turtle squirrel hedgehog cat puppy goat'.split()
THINGS = 'ball kite hat drum boat lantern blanket bell cup basket ring book whistle scarf'.split()
PLACES = 'river forest hill meadow mill lake orchard beach market bridge'.split()
WORDS = dict(  # drawn anew for each line
    trait='little kind brave shy clever cheerful quiet funny', sky='sunny windy cloudy foggy warm cold',
    food='bread soup cake cheese honey nuts berries plums', when='morning afternoon evening',
    spot='stone tree wall log bush bench', strong='strong sudden warm', count='two three four five',
    part='knee hand foot nose', size='big small round tall', stuff='sand sticks snow mud',
    feeling='sad tired angry bored')
WORDS = {slot: words.split() for slot, words in WORDS.items()}
EVENTS = [  # what can happen to the child, the pal and the thing; `tell` fills the {}
    '{pal} was hungry, so {child} put down the {thing} and gave {pal} some {food}.',
    'Suddenly it began to rain. {child} hid the {thing} under a {spot}, and {pal} sang about the {thing}.',
    'A {strong} wind took the {thing} over the {place}. '
    '{pal} jumped {count} times and caught the {thing} for {child}.',
    '{child} fell and hurt {his} {part}. '
    '{pal} put some {food} on the {part} and told a joke about the {thing}.',
    'They built a {size} castle of {stuff} for the {thing}. "I like to play with {stuff}," said {pal}.',
    'They raced to the {place} and back. {winner} won the {thing}, and {pal} laughed.',
    '{child} lost the {thing} near a {spot}. '
    '{pal} looked for it for {count} hours, and the {thing} was found.',
    '{pal} was {feeling}. "Take my {thing}," said {child}, and soon {pal} was happy.']


def tell(pick):
    """One story. pick(options) makes each choice. The text shows all, so its probability is their product."""
    child = pick(CHILDREN)
    friend = pick(FRIENDS)
    kept = child | dict(pal=f'{friend} the {pick(ANIMALS)}', thing=pick(THINGS), place=pick(PLACES))
    drawn = WORDS | dict(winner=[child['child'], friend])

    def say(line):
        words = {slot: pick(options) for slot, options in drawn.items() if '{' + slot + '}' in line}
        return line.format(**kept, **words)

    events = [say(pick(EVENTS)) for _ in range(pick([3, 4, 5]))]
    opening = say('Once upon a time there was a {trait} {kind} named {child}. '
                  '{he} had a friend, {pal}, and a {thing}.')
    outing = say('One {sky} {when}, {child} and {pal} took the {thing} to the {place}.')
    ending = say('Then {child} and {pal} walked home from the {place} with the {thing}. '
                 'The {thing} had been to the {place}, and {child} and {pal} were happy.')
    return '\n\n'.join((opening, ' '.join((outing, *events)), ending))


def builtin_stories(megabytes, seed):
    """Yield (story, -ln of its probability) until the stories have this many megabytes."""
    rng = random.Random(seed)
    size = 0
    while size < megabytes * 1e6:
        nats = 0.0

        def pick(options):
            nonlocal nats
            nats += math.log(len(options))
            return rng.choice(options)

        story = tell(pick)
        size += len(story)
        yield story, nats


# --- sources: {split: [(name, function that yields parts of documents)]} ------------------------------------
# A document is a text or a Chat. Its parts are (text or Chat, whether it ends); a piece is (split, *part).
SUFFIXES = '.txt', '.jsonl', '.json', '.csv', '.parquet'
OFFLINE = ('; offline: --dataset=builtin or a .txt file, --tokenizer=byte, char or bpe, '
           'or set TIKTOKEN_CACHE_DIR')


class BadInput(ValueError):
    """What a user gave cannot be used: data, a tokenizer or a prompt. Any other ValueError is a bug."""


@contextmanager
def reading(name, hint=''):
    """Turn an error inside into a BadInput that names the source."""
    try:
        yield
    except Exception as error:  # datasets and the readers below it raise dozens of types
        raise BadInput(f'{name} cannot be read ({type(error).__name__}: {str(error)[:400]}){hint}') from error


def open_sources():
    """The sources of train and, where the dataset has a validation split, of val."""
    if dataset == 'builtin':
        read = lambda: ((story, True) for story, _ in builtin_stories(megabytes, seed))
        return {'train': [(dataset, read)]}
    files = find_files()
    if files:
        return {'train': [(file, partial(read_file, file)) for file in files]}
    import datasets  # slow to import
    name, _, subset = dataset.partition(':')
    with reading(f'{dataset} (no such file, so a Hugging Face dataset)', OFFLINE):
        splits = datasets.load_dataset(name, subset or None, streaming=max_docs > 0)
    check('train' in splits, f'{dataset} has no split named train; it has {", ".join(splits)}')
    sources = {'train': [(f'{dataset}, split train', partial(read_hub, splits['train']))]}
    if 'validation' in splits:
        sources['val'] = [(f'{dataset}, split validation', partial(read_hub, splits['validation']))]
    return sources


def find_files():
    """The files that `dataset` names: one, a URL, the matches of a pattern, or none."""
    check(not os.path.isdir(dataset), f'{dataset}: a folder; name its files: {Path(dataset, "*.txt")}')
    if '://' in dataset or os.path.isfile(dataset):
        files = [dataset]
    else:  # leading folders that exist are names, even with brackets in them
        folder = next((parent for parent in Path(dataset).parents if parent.exists()), Path())
        pattern = os.path.join(glob.escape(str(folder)), Path(dataset).relative_to(folder))
        files = sorted(filter(os.path.isfile, set(glob.glob(pattern, recursive=True))))
    for file in files:
        check(Path(file).suffix in SUFFIXES, f'{file}: its suffix must be one of {" ".join(SUFFIXES)}')
    a_file = glob.has_magic(dataset) or Path(dataset).suffix in SUFFIXES or os.path.exists(dataset)
    check(files or not a_file, f'{dataset}: no such file')
    return files


def read_pieces(sources, chats=None):
    """The pieces of the first max_docs documents of each split. All must be chats (True) or texts (False)."""
    for split, source in sources.items():
        left = max_docs or math.inf
        for document, ends in itertools.chain.from_iterable(read_source(*one) for one in source):
            same = chats in (None, isinstance(document, Chat))
            check(same, f'{dataset} holds texts and chats; prepare them one at a time')
            yield split, document, ends
            left -= ends
            if left == 0:
                break


def read_source(name, read):
    """Yield the parts of a source's documents. Raises BadInput, which names the source."""
    with reading(name):
        yield from read()


def read_hub(split):
    """Yield the documents of a split of a hub's dataset."""
    columns = columns_in_use(split.column_names or next(iter(split), {}))
    batches = split.select_columns(columns).with_format('arrow').iter(batch_size=1000)
    yield from read_documents(arrow_rows(batches))


def read_file(file):
    """Yield the parts of a local file or URL. A URL is first copied to a temporary folder."""
    suffix = Path(file).suffix
    remote = '://' in file and not os.path.isfile(file)
    with fsspec.open(f'simplecache::{file}') if remote else open(file, 'rb') as stream:
        if suffix == '.txt':
            yield from text_file(read_blocks(stream))
        elif suffix == '.parquet':
            from pyarrow import parquet
            table = parquet.ParquetFile(stream)
            batches = table.iter_batches(100, columns=columns_in_use(table.schema_arrow.names))
            yield from read_documents(arrow_rows(batches))
        else:
            blocks = (io.StringIO(block, newline='') for block in read_blocks(stream))
            lines = itertools.chain.from_iterable(blocks)
            yield from read_documents(csv_rows(lines) if suffix == '.csv' else json_rows(lines))


def read_blocks(stream):
    """Yield the text of a binary stream in blocks of whole lines."""
    number = 1  # of the block's first line
    while block := stream.read(PIECE) + stream.readline():
        start = block[:1000] if number == 1 else b''
        controls = sum(byte < 7 or 13 < byte < 27 for byte in start)  # every second byte of UTF-16
        if start[:2] in (b'\xff\xfe', b'\xfe\xff') or controls > 2 + len(start) / 3:
            raise ValueError('it is in UTF-16, not UTF-8; convert it: '
                             'iconv -f utf-16 -t utf-8 FILE > NEW_FILE')
        try:
            yield block.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
            number += error.object.count(b'\n', 0, error.start)
            raise ValueError(f'line {number} is not UTF-8 (UnicodeDecodeError: {error.reason})') from error
        number += block.count(b'\n')


# --- rows of JSON, CSV and Arrow, as (where, row) -----------------------------------------------------------
BESIDE_A_CHAT = 'tools', 'system', 'history', 'functions', 'system_prompt'  # all but the first are refused


def json_rows(lines):
    """Yield the rows of JSON: an object a line, or one array or object of many lines."""
    numbered = enumerate(lines, 1)
    first = True
    for number, line in numbered:
        if line.isspace():
            continue
        whole = first and (line.lstrip().startswith('[') or line.strip() == '{')
        first = False
        if whole:
            line += ''.join(line for _, line in numbered)
        try:
            value = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            number += getattr(error, 'lineno', 1) - 1
            raise ValueError(f'line {number}: {getattr(error, "msg", error)}') from error
        rows = value if whole and isinstance(value, list) else [value]
        for i, row in enumerate(rows, 1):
            yield f'row {i}' if whole else f'line {number}', row


def csv_rows(lines):
    """Yield the rows of a CSV file with a header. Every cell is text."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = csv.DictReader(lines, strict=True)
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names):
            raise ValueError(f'its header names a column twice: {", ".join(names)}')
        for row in rows:
            if None in row:
                raise ValueError(f'line {rows.line_num}: it has more cells than the header')
            yield f'line {rows.line_num}', row
    except csv.Error as error:
        raise ValueError(f'the row that begins in line {rows.line_num + 1}: {error}') from error


def arrow_rows(batches):
    """Yield the rows of Arrow's batches, without the nulls that it adds to the objects of a chat."""
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, 1):
        if any(isinstance(value, list) for value in row.values()):
            row = json.loads(json.dumps(row), object_hook=lambda fields: {
                key: value for key, value in fields.items() if value is not None})
        yield f'row {number}', row


def columns_in_use(names):
    """The columns that hold the text or the chat, and those that belong to a chat. No others are read."""
    choices = [['messages'], ['conversations'], ['instruction', 'output'], ['text']]
    for columns in [[text_column]] if text_column else choices:
        if set(columns) <= set(names):
            beside = [name for name in ('input', *BESIDE_A_CHAT) if name in names]
            return columns if columns == ['text'] else columns + beside
    wanted = text_column or 'messages or text'
    raise ValueError(f'no column {wanted} among {", ".join(names)}; set --text_column')


def read_documents(rows):
    """Yield the documents of rows, each in one part. Empty ones are skipped."""
    for where, row in rows:
        try:
            document = read_row(row)
            text = str(document)
            text.encode()  # raises for half of a surrogate pair
        except (ValueError, TypeError) as error:
            raise ValueError(f'{where}: {error}') from error
        if text:
            yield document, True


def read_row(row):
    """The text or the Chat of a row."""
    if not isinstance(row, dict):
        raise ValueError(f'it is no object with columns: {row!r:.40}')
    column = columns_in_use(row)[0]
    value = row[column]
    if column == 'instruction' and not text_column:  # alpaca
        question = '\n\n'.join(filter(None, (row['instruction'], row.get('input'))))
        value = [dict(role='user', content=question), dict(role='assistant', content=row['output'])]
    if isinstance(value, list):
        return read_chat(row, value)
    of_chats = column in ('messages', 'conversations') and not text_column
    if of_chats or not isinstance(value, str):
        raise ValueError(f'{value!r:.40} in the column {column!r} is no text; '
                         f'the columns are {", ".join(row)}')
    return value


def read_chat(row, messages):
    """The Chat of a row, which must have an answer. Nothing in the row may be lost."""
    for name in BESIDE_A_CHAT[1:]:
        if row.get(name) not in EMPTY:
            raise ValueError(f'the column {name} would be lost; move it into the messages, or into tools')
    chat = Chat(messages, row.get('tools'))
    if not chat.turns and all(message['role'] != 'assistant' for message in chat.messages):
        raise ValueError('the chat has no answer of the assistant')
    special = SPECIAL.search(json.dumps([chat.messages, chat.tools]))
    if special:
        raise ValueError(f'a message holds {special[0]}, but its content is text alone')
    return chat


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
    for block in itertools.chain(blocks, [None]):
        last = block is None
        block = END if last else block.replace('\r\n', '\n').replace('\r', '\n')
        *ended, rest = DIVIDER.split(block)
        for ending in ended:
            text += ending
            divided = divided or not last
            if divided:
                text = text.rstrip('\n') if begun else text.strip('\n')
            if text or begun:
                yield text, True
            text = ''
            enough = 2 * PIECE
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
ROLES = dict(human='user', gpt='assistant')  # ShareGPT's names
EMPTY = None, '', [], {}
SPECIAL = re.compile(r'<\|(start|message|channel|constrain|end|return|call'
                     r'|startoftext|endof\w+|reserved_\d+)\|>')
LEARNT = '<|generation|>'  # begins and ends what a rendered turn teaches
TOKEN = re.compile(r'(<\|\w+\|>)')
LETTERS = '<\ufdd0|'  # replaces <| in messages while the template renders: only its own <| become tokens


@cache
def chat_template():
    """The template. It writes LEARNT in place of the tags `generation`, which transformers alone knows."""
    def raise_exception(message):
        raise ValueError(message)

    environment = jinja2.Environment()
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = raise_exception
    source = Path(config.ROOT, 'config', 'chat_template.jinja').read_text(encoding='utf-8')
    source = re.sub(r'{%- (end)?generation -%}', "{{- '" + LEARNT + "' -}}", source)
    return environment.from_string(source)


class Chat:
    """A conversation: messages {role, content, ...} and tools. The head of config/chat_template.jinja says
    what they may hold; FIELDS has other names of the fields. Raises ValueError."""

    def __init__(self, messages, tools=None):
        self.tools = json.loads(tools or 'null') if isinstance(tools, str) else tools
        self.messages = [read_message(number, message) for number, message in enumerate(messages, 1)]

    @cached_property
    def turns(self):
        """A text for each final answer that is learnt, with all before it, and one for calls at the end."""
        ends = {len(self.messages)}
        for number, message in enumerate(self.messages, 1):
            final = message.get('channel', 'final') == 'final' and not message.get('tool_calls')
            if message['role'] == 'assistant' and final:
                ends.add(number)
        texts = [self.render(self.messages[:end]) for end in sorted(ends)]
        return [text for text in texts if LEARNT in text]

    def render(self, messages, **options):
        """The text of messages, in which TOKEN finds the special tokens and LETTERS stands for other <|."""
        given = json.dumps(dict(messages=messages, tools=self.tools)).replace('<|', '<\\ufdd0|')
        try:
            return chat_template().render(json.loads(given), **options)
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
    if not isinstance(message, dict):
        raise ValueError(f'message {number} is no object: {message!r:.100}')
    fields = {}
    for key, value in message.items():
        name = FIELDS.get(key)
        if value in EMPTY and (name, value) != ('content', ''):
            continue
        if not name:
            raise ValueError(f'message {number} has {key!r}, which is none of {", ".join(FIELDS)}')
        if fields.setdefault(name, value) != value:
            raise ValueError(f'message {number} has {key!r}, which differs from another {name} of it')
    role = fields.get('role')
    fields['role'] = ROLES.get(str(role), role)
    return fields


def encode_turn(encoder, text):
    """(token ids, mask) of what Chat.render returns. The mask is 1 on what is learnt."""
    tokens = []
    mask = []
    learnt = 0
    for part in TOKEN.split(text):
        if part == LEARNT:
            learnt = 1 - learnt
        elif TOKEN.fullmatch(part):
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
        raise BadInput(f'{name} gives no tokenizer ({type(error).__name__}: {error}); it must be a folder '
                       f'with a meta.json or one of {", ".join([*PATTERNS, *names])}') from error


def read_tokenizer(folder):
    """The encoding that meta.json names, with the ranks in tokenizer.tiktoken if it is byte, char or bpe."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    name = meta['tokenizer']
    special = meta.get('special_tokens', [END])
    if name not in PATTERNS:
        return load_tokenizer(name)
    ranks = {}
    for line in (folder / 'tokenizer.tiktoken').read_text(encoding='utf-8').splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    expected = list(range(meta['vocab_size'] - len(special)))
    if END not in special or sorted(ranks.values()) != expected:
        raise ValueError('its tokens do not make up the vocabulary')
    return encoding(name, ranks, special)


def encode_text(encoder, text):
    """Token ids of a text. Special tokens in it are encoded as letters. Raises BadInput."""
    if encoder.name == 'char':
        unknown = set(text) - set(map(bytes.decode, encoder.token_byte_values()))
        if unknown:
            names = ', '.join(map(repr, sorted(unknown)))
            raise BadInput(f'the char tokenizer has no {names}; use bpe or byte')
    if not any(text[i:i + RUN].isspace() for i in range(0, len(text) - RUN + 1, RUN)):
        return encoder.encode_ordinary(text)
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
        if part in special:
            tokens.append(encoder.encode_single_token(part))
        else:
            tokens += encode_text(encoder, part)
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
        token = bytes(byte_of[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    return ranks


# --- from pieces to tokens ----------------------------------------------------------------------------------

def divide(sources, chats):
    """Give the last val_fraction of the documents to val, or of the text where there are fewer than 10."""
    documents = 0
    characters = 0
    for _, document, ends in tqdm(read_pieces(sources, chats), 'counting', leave=False):
        documents += ends
        characters += len(str(document))
    by_text = documents < 10 and not chats
    cut = documents - max(1, round(documents * val_fraction))
    if by_text:
        cut = int(characters * (1 - val_fraction))
    position = 0
    for _, document, ends in read_pieces(sources, chats):
        size = len(document) if by_text else ends
        split = 'train' if position < cut else 'val'
        if by_text and position < cut < position + size:
            yield 'train', document[:cut - position], False
            document = document[cut - position:]
            split = 'val'
        yield split, document, ends
        position += size


def encode_batch(batch, encoder, dtype):
    """[(split, ends, tokens, mask, bytes that are learnt, special tokens read as letters)] of pieces."""
    encode = encode_prompt if special_tokens else encode_text
    known = encoder.special_tokens_set if special_tokens else ()
    encoded = []
    for split, document, ends in batch:
        mask = []  # a text is learnt whole
        spelled = 0
        if isinstance(document, Chat):
            tokens, mask = encode_turn(encoder, ''.join(turn + END for turn in document.turns))
            size = len(encoder.decode_bytes(list(itertools.compress(tokens, mask))))
        else:
            tokens = encode(encoder, document) + [encoder.eot_token] * ends
            size = len(document.encode())
            spelled = sum(token[0] not in known for token in SPECIAL.finditer(document))
        encoded.append((split, ends, np.array(tokens, dtype), bytes(mask), size, spelled))
    return encoded


def encode_pieces(pieces, encoder, dtype):
    """Yield what encode_batch returns of pieces, from threads. Few pieces are in memory at once."""
    position = 0

    def number_batch(piece):
        nonlocal position
        position += len(str(piece[1]))
        return position // PIECE

    batches = (list(batch) for _, batch in itertools.groupby(pieces, number_batch))
    threads = num_proc or os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        while group := list(itertools.islice(batches, 4 * threads)):
            for encoded in pool.map(partial(encode_batch, encoder=encoder, dtype=dtype), group):
                yield from encoded


# --- the files of a data folder -----------------------------------------------------------------------------

def write_data(folder, pieces, encoder, chats):
    """Write the files of a data folder, each whole or not at all, and return what meta.json holds."""
    dtype = 'uint16' if encoder.max_token_value < 2 ** 16 else 'uint32'
    meta = dict(dataset=dataset, tokenizer=encoder.name, vocab_size=encoder.max_token_value + 1,
                eot_token=encoder.eot_token, dtype=dtype)
    for split in ('train', 'val'):
        meta |= {f'{split}_{count}': 0 for count in ('tokens', 'bytes', 'documents', 'crc32')}
    if chats:
        meta |= dict(train_targets=0, val_targets=0)
    meta['spelled_special_tokens'] = 0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        write_bins(Path(new), pieces, encoder, meta)
        documents = meta['train_documents'] + meta['val_documents']
        check(meta['train_tokens'] and meta['val_tokens'],
              f'{dataset} holds too little text to divide (documents: {documents})')
        if dataset == 'builtin' and documents >= 10:
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


def write_bins(folder, pieces, encoder, meta):
    """Write the tokens of each split, and for chats the masks. Count in meta what is written."""
    chats = 'val_targets' in meta
    names = ['train', 'val', 'train_mask', 'val_mask'] if chats else ['train', 'val']
    with ExitStack() as stack:
        bins = {name: stack.enter_context(open(folder / f'{name}.bin', 'wb')) for name in names}
        # closed in this thread, even where writing fails, because it waits for its own threads
        encoded = stack.enter_context(closing(encode_pieces(pieces, encoder, meta['dtype'])))
        for split, ends, tokens, mask, size, spelled in tqdm(encoded, 'tokenising', leave=False):
            bins[split].write(tokens)
            meta[f'{split}_tokens'] += len(tokens)
            meta[f'{split}_crc32'] = zlib.crc32(tokens, meta[f'{split}_crc32'])
            meta[f'{split}_bytes'] += size
            meta[f'{split}_documents'] += ends
            meta['spelled_special_tokens'] += spelled
            if chats:
                bins[f'{split}_mask'].write(mask)
                meta[f'{split}_targets'] += sum(mask)


def choose_folder():
    """data_dir, or else data/ and the name of the dataset: data/news for news/*.txt."""
    if data_dir:
        return Path(data_dir)
    suffix = Path(dataset).suffix
    stem = dataset.removesuffix(suffix) if suffix in SUFFIXES else dataset.partition(':')[0]
    folder = Path('data', Path(re.sub(r'[*?\[\]]', '', stem)).name or 'text')
    if (folder / 'meta.json').exists():
        with reading(folder / 'meta.json'):
            before = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['dataset']
        check(before == dataset, f'{folder} holds data of {before}; give --data_dir another folder')
    return folder


def main():
    check(0 < val_fraction < 1, f'--val_fraction={val_fraction} must be between 0 and 1')
    check(tokenizer != 'bpe' or vocab_size >= 257, f'--vocab_size={vocab_size} must be at least 257')
    check(num_proc >= 0, f'--num_proc={num_proc} must be at least 0')
    sources = open_sources()
    folder = choose_folder()
    encoder = None if tokenizer in PATTERNS else load_tokenizer(tokenizer)
    first = next(read_pieces(sources), None)
    check(first and first[0] == 'train', f'{dataset} holds no text')
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
    spelled = meta['spelled_special_tokens']
    if spelled:
        hint = '--special_tokens=True reads them as tokens'
        if special_tokens:
            hint = f'{encoder.name} does not have them'
        print(f'{spelled:,} spellings of special tokens, such as {END}, were read as letters; {hint}')
    print(f'{folder}: {meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} validation tokens')


if __name__ == '__main__':
    globals().update(config.read(__file__)[0])
    with fail_on((OSError, BadInput)):
        main()
