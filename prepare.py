"""
Turn text into train.bin, val.bin and meta.json: documents as token ids, each followed by the end-of-text token.

    python prepare.py                                                     # TinyStories from the Hugging Face hub
    python prepare.py --dataset='my/texts/*.txt' --tokenizer=gpt2         # local .txt .jsonl .json .csv .parquet
    python prepare.py --dataset=builtin --tokenizer=bpe --vocab_size=512  # generated stories, needs no network
    python prepare.py --dataset=chats.jsonl                               # rows of messages, for training on chats

Chats are written in the harmony format of gpt-oss. train_mask.bin and val_mask.bin mark the tokens of the assistant.
"""

import config  # first: it sets variables that libraries read when they load

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
dataset = 'roneneldan/TinyStories'  # hub NAME[:SUBSET]; .txt .jsonl .json .csv .parquet file, glob or URL; builtin
text_column = ''  # column with the text; empty: messages, conversations, instruction and output, or else text
max_docs = 0  # read at most this many documents of each split; 0 reads all
val_fraction = 0.1  # for validation: the last of the documents, or of the text where there are fewer than 10
megabytes = 8.0  # size of the built-in corpus
seed = 1337  # of the built-in corpus
# the tokens
tokenizer = 'o200k_harmony'  # a name that tiktoken knows; byte, char or bpe; a data folder or checkpoint that has one
vocab_size = 1024  # tokens of bpe, with the 256 bytes and end of text; chats and special_tokens add 6
special_tokens = False  # encode <|endoftext|>, <|start|> ... in a text as special tokens, not as letters
data_dir = ''  # folder to write to; empty: data/ and the name of the dataset
num_proc = 0  # threads that tokenise; 0: one per core
# -----------------------------------------------------------------------------


# --- built-in corpus: stories from a small grammar, whose entropy is known ---
CHILDREN = [dict(child=name, kind=kind, he=he, his=his) for kind, he, his, names in (
    ('girl', 'She', 'her', 'Lily Mia Anna Zoe Rose Ella Nora Ruby Clara Alma'),
    ('boy', 'He', 'his', 'Tom Ben Max Sam Leo Finn Jack Hugo Oscar Theo')) for name in names.split()]
FRIENDS = 'Pip Momo Bella Coco Dot Fuzzy Gus Hazel Jojo Kiki Luna Nutmeg Olive Poppy Rusty Tilly'.split()
ANIMALS = 'rabbit fox duck bear mouse frog turtle squirrel hedgehog cat puppy goat'.split()
THINGS = 'ball kite hat drum boat lantern blanket bell cup basket ring book whistle scarf'.split()
PLACES = 'river forest hill meadow mill lake orchard beach market bridge'.split()
WORDS = {slot: words.split() for slot, words in dict(  # drawn anew for each line
    trait='little kind brave shy clever cheerful quiet funny', sky='sunny windy cloudy foggy warm cold',
    food='bread soup cake cheese honey nuts berries plums', when='morning afternoon evening',
    spot='stone tree wall log bush bench', strong='strong sudden warm', count='two three four five',
    part='knee hand foot nose', size='big small round tall', stuff='sand sticks snow mud',
    feeling='sad tired angry bored').items()}
EVENTS = [  # what can happen to the child, the pal and the thing; `tell` fills the {}
    '{pal} was hungry, so {child} put down the {thing} and gave {pal} some {food}.',
    'Suddenly it began to rain. {child} hid the {thing} under a {spot}, and {pal} sang about the {thing}.',
    'A {strong} wind took the {thing} over the {place}. {pal} jumped {count} times and caught the {thing} for {child}.',
    '{child} fell and hurt {his} {part}. {pal} put some {food} on the {part} and told a joke about the {thing}.',
    'They built a {size} castle of {stuff} for the {thing}. "I like to play with {stuff}," said {pal}.',
    'They raced to the {place} and back. {winner} won the {thing}, and {pal} laughed.',
    '{child} lost the {thing} near a {spot}. {pal} looked for it for {count} hours, and the {thing} was found.',
    '{pal} was {feeling}. "Take my {thing}," said {child}, and soon {pal} was happy.']


def tell(pick):
    """One story. pick(options) makes each choice. The text shows them all, so its probability is their product."""
    child, friend = pick(CHILDREN), pick(FRIENDS)
    kept = child | dict(pal=f'{friend} the {pick(ANIMALS)}', thing=pick(THINGS), place=pick(PLACES))
    free = WORDS | dict(winner=[child['child'], friend])

    def say(line):
        return line.format(**kept, **{slot: pick(options) for slot, options in free.items() if f'{{{slot}}}' in line})

    events = [say(pick(EVENTS)) for _ in range(pick([3, 4, 5]))]
    return '\n\n'.join((
        say('Once upon a time there was a {trait} {kind} named {child}. {he} had a friend, {pal}, and a {thing}.'),
        ' '.join((say('One {sky} {when}, {child} and {pal} took the {thing} to the {place}.'), *events)),
        say('Then {child} and {pal} walked home from the {place} with the {thing}. '
            'The {thing} had been to the {place}, and {child} and {pal} were happy.')))


def builtin_stories(megabytes, seed):
    """Yield (story, -ln of its probability) until the stories have this many megabytes."""
    rng, size = random.Random(seed), 0
    while size < megabytes * 1e6:
        nats = 0.0

        def pick(options):
            nonlocal nats
            nats += math.log(len(options))
            return rng.choice(options)

        story = tell(pick)
        size += len(story)
        yield story, nats


# --- sources: lists of (name, function that yields pieces). A piece is (text or Chat, True where a document ends) ---
KINDS = '.txt', '.jsonl', '.json', '.csv', '.parquet'
BESIDE_A_CHAT = 'tools', 'system', 'history', 'functions', 'system_prompt'  # columns; all but the first are refused
OFFLINE = '; offline: --dataset=builtin or a .txt file, --tokenizer=byte, char or bpe, or set TIKTOKEN_CACHE_DIR'


@contextmanager
def reading(name, hint=''):
    """Turn an error inside into a ValueError that names the source."""
    try:
        yield
    except Exception as error:  # datasets and the readers below it raise dozens of types
        raise ValueError(f'{name} cannot be read ({type(error).__name__}: {str(error)[:400]}){hint}') from error


def open_sources():
    """{'train': its sources} and, where the dataset has a validation split, 'val' too."""
    if dataset == 'builtin':
        return {'train': [(dataset, lambda: ((story, True) for story, _ in builtin_stories(megabytes, seed)))]}
    # Leading folders that exist are names, even with brackets in them.
    folder = next((folder for folder in Path(dataset).parents if folder.exists()), Path())
    pattern = os.path.join(glob.escape(str(folder)), Path(dataset).relative_to(folder))
    local = '://' in dataset or os.path.isfile(dataset)
    files = [dataset] if local else sorted(set(filter(os.path.isfile, glob.glob(pattern, recursive=True))))
    if wrong := [file for file in files if Path(file).suffix not in KINDS]:
        config.fail(f'{wrong[0]}: its suffix must be one of {" ".join(KINDS)}')
    if files:
        return {'train': [(file, partial(read_file, file)) for file in files]}
    if glob.has_magic(dataset) or os.path.exists(dataset) or Path(dataset).suffix in KINDS:
        config.fail(f'{dataset}: ' + (f'a folder; name its files: {dataset}/*.txt' if folder == Path(dataset)
                                      else 'no such file'))
    import datasets  # slow to import
    name, _, subset = dataset.partition(':')
    with reading(f'{dataset} (no such file, so a Hugging Face dataset)', OFFLINE):
        splits = datasets.load_dataset(name, subset or None, streaming=max_docs > 0)
    if 'train' not in splits:
        config.fail(f'{dataset} has no split named train; it has {", ".join(splits)}')
    return {split: [(f'{dataset}, split {name}', lambda name=name: documents(table_rows(splits[name])))]
            for split, name in (('train', 'train'), ('val', 'validation')) if name in splits}


def pieces_of(sources):
    """The pieces of the first max_docs documents."""
    number = 0
    for name, read in sources:
        with reading(name):
            for text, ends in read():
                yield text, ends
                number += ends
                if number == max_docs > 0:
                    return


def read_file(file):
    """The pieces of a local file or URL. A URL is first copied to a temporary folder."""
    kind, remote = Path(file).suffix, '://' in file and not os.path.isfile(file)
    with fsspec.open(f'simplecache::{file}') if remote else open(file, 'rb') as stream:
        if kind == '.parquet':
            from pyarrow import parquet
            yield from documents(table_rows(parquet.ParquetFile(stream)))
        elif kind == '.txt':
            yield from text_file(blocks(stream))
        else:
            lines = itertools.chain.from_iterable(io.StringIO(block, newline='') for block in blocks(stream))
            yield from documents(csv_rows(lines) if kind == '.csv' else json_rows(lines))


def blocks(stream):
    """Yield the text of a binary stream in blocks of whole lines."""
    number = 1  # of the block's first line
    while block := stream.read(PIECE) + stream.readline():
        controls = sum(byte < 7 or 13 < byte < 27 for byte in block[:1000])  # every second byte of UTF-16
        if number == 1 and (block[:2] in (b'\xff\xfe', b'\xfe\xff') or controls > 2 + len(block[:1000]) / 3):
            raise ValueError('it is in UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8 FILE > NEW_FILE')
        try:
            yield block.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
            number += error.object.count(b'\n', 0, error.start)
            raise ValueError(f'line {number} is not UTF-8 (UnicodeDecodeError: {error.reason})') from error
        number += block.count(b'\n')


def json_rows(lines):
    """Yield (where, row) of JSON: an object a line, or one array or object of many lines."""
    lines, first = enumerate(lines, 1), True
    for number, line in lines:
        if line.isspace():
            continue
        if whole := first and (line.lstrip().startswith('[') or line.strip() == '{'):
            line += ''.join(line for _, line in lines)
        first = False
        try:
            value = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            number += getattr(error, 'lineno', 1) - 1
            raise ValueError(f'line {number}: {getattr(error, "msg", error)}') from error
        for i, row in enumerate(value if whole and isinstance(value, list) else [value], 1):
            yield f'row {i}' if whole else f'line {number}', row


def csv_rows(lines):
    """Yield (where, row) of a CSV file with a header. Every cell is text."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = csv.DictReader(lines, strict=True)
    try:
        if len(set(rows.fieldnames or ())) < len(rows.fieldnames or ()):
            raise ValueError(f'its header names a column twice: {", ".join(rows.fieldnames)}')
        for row in rows:
            if None in row:
                raise ValueError(f'line {rows.line_num}: it has more cells than the header')
            yield f'line {rows.line_num}', row
    except csv.Error as error:
        raise ValueError(f'the row that begins in line {rows.line_num + 1}: {error}') from error


def table_rows(table):
    """Yield (where, row) of a ParquetFile or a split of the hub: columns in use, less the nulls of Arrow's structs."""
    drop_nulls = lambda fields: {key: value for key, value in fields.items() if value is not None}
    if hasattr(table, 'iter_batches'):
        batches = table.iter_batches(100, columns=columns_in_use(table.schema_arrow.names))
    else:
        columns = columns_in_use(table.column_names or next(iter(table), {}))
        batches = table.select_columns(columns).with_format('arrow').iter(batch_size=1000)
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        chat = any(isinstance(value, list) for value in row.values())
        yield f'row {number}', json.loads(json.dumps(row), object_hook=drop_nulls) if chat else row


def columns_in_use(names):
    """The columns that hold the text or the chat, and those that belong to a chat. The others are not read."""
    kinds = [[text_column]] if text_column else [['messages'], ['conversations'], ['instruction', 'output'], ['text']]
    for columns in kinds:
        if set(columns) <= set(names):
            return columns + [name for name in ('input', *BESIDE_A_CHAT) if name in names and columns != ['text']]
    raise ValueError(f'no column {text_column or "messages or text"} among {", ".join(names)}; set --text_column')


def documents(rows):
    """Yield rows as pieces: a text, or the Chat of messages. Empty texts are skipped."""
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f'it is no object with columns: {row!r:.40}')
            column = columns_in_use(row)[0]
            value = row[column]
            if column == 'instruction' and not text_column:  # alpaca
                asked = '\n\n'.join(filter(None, (row['instruction'], row.get('input'))))
                value = [dict(role='user', content=asked), dict(role='assistant', content=row['output'])]
            if isinstance(value, list):
                if unread := [name for name in BESIDE_A_CHAT[1:] if row.get(name) not in EMPTY]:
                    raise ValueError(f'the column {unread[0]} would be lost; move it into the messages, or into tools')
                value = Chat(value, row.get('tools'))
                if not value.turns and all(message['role'] != 'assistant' for message in value.messages):
                    raise ValueError('the chat has no answer of the assistant')
                if found := SPECIAL.search(json.dumps([value.messages, value.tools])):
                    raise ValueError(f'a message holds {found[0]}, but its content is text alone')
            elif not isinstance(value, str) or column in ('messages', 'conversations') and not text_column:
                raise ValueError(f'{value!r:.40} in the column {column!r} is no text; the columns are {", ".join(row)}')
            text = str(value)
            text.encode()  # raises for half of a surrogate pair
        except (ValueError, TypeError) as error:
            raise ValueError(f'{where}: {error}') from error
        if text:
            yield value, True


PIECE = 2 ** 20  # characters that are tokenised together
DIVIDER = re.compile(r'^<\|endoftext\|>[ \t]*(?:\n|\Z)', re.MULTILINE)
SEAM = re.compile(r'(?<=[^\W_])(?=\s)|(?<=\S)(?= )')  # no token of any tokenizer here spans this position


def text_file(blocks):
    """Yield the pieces of a text file, given blocks of whole lines: one document, unless <|endoftext|> divides it."""
    text, searched, begun, divided = '', PIECE, False, False  # text: not yielded yet; no seam is before `searched`
    for block in itertools.chain(blocks, [None]):
        *ended, rest = DIVIDER.split(block.replace('\r\n', '\n').replace('\r', '\n')) if block else ('', '')
        for ending in ended:
            text += ending
            if divided := divided or bool(block):
                text = text.rstrip('\n') if begun else text.strip('\n')
            if text or begun:
                yield text, True
            text, searched, begun = '', PIECE, False
        text += rest
        start = 0
        while len(text) - start > 2 * PIECE and (seam := SEAM.search(text, searched)):
            yield text[start:seam.start()], False
            start, searched, begun = seam.start(), seam.start() + PIECE, True
        text, searched = text[start:], (len(text) if len(text) - start > 2 * PIECE else searched) - start


# --- chats, which config/chat_template.jinja writes in the harmony format of gpt-oss ---
HARMONY = '<|start|>', '<|message|>', '<|channel|>', '<|end|>', '<|return|>', '<|call|>'
FIELDS = {name: name for name in 'role content channel weight thinking tool_calls tool_call_id name'.split()}
FIELDS |= dict(value='content', train='weight', reasoning='thinking', reasoning_content='thinking') | {'from': 'role'}
EMPTY = None, '', [], {}
SPECIAL = re.compile(r'<\|(start|message|channel|constrain|end|return|call|startoftext|endof\w+|reserved_\d+)\|>')
LEARNT = '<|generation|>'  # begins and ends what a rendered turn teaches
TOKEN = re.compile(r'(<\|\w+\|>)')
LETTERS = '<\ufdd0|'  # stands for the <| of messages while the template renders, so that only its own <| make tokens


@cache
def chat_template():
    """The template. It writes LEARNT in place of the tags `generation`, which transformers alone knows."""
    def raise_exception(message):
        raise ValueError(message)

    environment = jinja2.Environment()
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = raise_exception
    source = Path(config.ROOT, 'config', 'chat_template.jinja').read_text(encoding='utf-8')
    return environment.from_string(re.sub(r'{%- (end)?generation -%}', "{{- '" + LEARNT + "' -}}", source))


class Chat:
    """A conversation: messages {role, content, ...} and tools. The head of config/chat_template.jinja says what they
    may hold; FIELDS has other names of the fields. Raises ValueError."""

    def __init__(self, messages, tools=None):
        self.messages, self.tools = [], json.loads(tools or 'null') if isinstance(tools, str) else tools
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict):
                raise ValueError(f'message {number} is no object: {message!r:.100}')
            fields = {}
            for key, value in message.items():
                if value in EMPTY and (FIELDS.get(key), value) != ('content', ''):
                    continue
                if key not in FIELDS:
                    raise ValueError(f'message {number} has {key!r}, which is none of {", ".join(FIELDS)}')
                if fields.setdefault(FIELDS[key], value) != value:
                    raise ValueError(f'message {number} has {key!r}, which differs from another {FIELDS[key]} of it')
            role = fields.get('role')
            fields['role'] = dict(human='user', gpt='assistant').get(str(role), role)  # ShareGPT's names
            self.messages.append(fields)

    @cached_property
    def turns(self):
        """A text for each final answer that is learnt, with all before it, and one for calls at the end."""
        ends = [i for i, message in enumerate(self.messages, 1) if message['role'] == 'assistant'
                and not message.get('tool_calls') and message.get('channel', 'final') == 'final']
        texts = [self.render(self.messages[:end]) for end in sorted({*ends, len(self.messages)})]
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
        """Token ids up to the point where the assistant answers. Analysis before a final answer is left out."""
        return encode_turn(encoder, self.render(self.messages, add_generation_prompt=True, reasoning_effort=effort))[0]


def encode_turn(encoder, text):
    """(token ids, mask) of what Chat.render returns. The mask is 1 on what is learnt."""
    tokens, mask, learnt = [], [], 0
    for part in TOKEN.split(text):
        if part == LEARNT:
            learnt = 1 - learnt
        elif TOKEN.fullmatch(part):
            tokens.append(encoder.encode_single_token(part))
        else:
            tokens += encode_text(encoder, part.replace(LETTERS, '<|'))
        mask += [learnt] * (len(tokens) - len(mask))
    return tokens, mask


# --- tokenizers, each a tiktoken.Encoding ---
END = '<|endoftext|>'
PATTERNS = {'byte': r'[\s\S]', 'char': r'[\s\S]',  # GPT-2's for bpe, which other programs know as gpt-2
            'bpe': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
RUN = 2 ** 16  # characters of white space that tiktoken can split
UNBROKEN = re.compile(r'([^\W_]{1024}|(?:[^\w\s]|_){1024}|\s{1024})')


def encoding(name, ranks, special=(END,)):
    """The encoding byte, char or bpe with these {bytes: rank} and special tokens."""
    return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks,
                             special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


def load_tokenizer(name):
    """The encoding of tiktoken with this name, or that of a data folder or checkpoint. Raises ValueError."""
    if name in tiktoken.list_encoding_names():  # even where a folder has the same name
        with reading(f'the vocabulary file of {name}', OFFLINE):
            return tiktoken.get_encoding(name)
    try:
        meta = json.loads(Path(name, 'meta.json').read_text(encoding='utf-8'))
        kind, special = meta['tokenizer'], meta.get('special_tokens', [END])
        if kind not in PATTERNS:
            return load_tokenizer(kind)
        lines = Path(name, 'tokenizer.tiktoken').read_text(encoding='utf-8').splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(str.split, lines)}
        if END not in special or sorted(ranks.values()) != list(range(meta['vocab_size'] - len(special))):
            raise ValueError('its tokens do not make up the vocabulary')
        return encoding(kind, ranks, special)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{name} gives no tokenizer ({type(error).__name__}: {error}); it must be a folder with a '
                         f'meta.json or one of {", ".join([*PATTERNS, *tiktoken.list_encoding_names()])}') from error


def encode_text(encoder, text):
    """Token ids of a text. Special tokens in it are encoded as letters. Raises ValueError."""
    if encoder.name == 'char' and (unknown := set(text) - set(map(bytes.decode, encoder.token_byte_values()))):
        raise ValueError(f'the char tokenizer has no {", ".join(map(repr, sorted(unknown)))}; use bpe or byte')
    if not any(text[i:i + RUN].isspace() for i in range(0, len(text) - RUN + 1, RUN)):
        return encoder.encode_ordinary(text)
    # The regular expressions of tiktoken overflow their stack in long runs of white space, those of tokenizers do not.
    from tokenizers import Regex, pre_tokenizers
    pattern = re.sub(r'([+*?]|\{\d+,?\d*\})\+', r'\1', encoder._pat_str.replace('++$', r'+\z'))  # as in an export
    split = pre_tokenizers.Split(Regex(pattern), 'isolated')
    pieces = (encoder._encode_single_piece(piece) for piece, _ in split.pre_tokenize_str(text))
    return list(itertools.chain.from_iterable(pieces))


def encode_prompt(encoder, text):
    """Token ids of a text. Special tokens in it, such as <|endoftext|>, are encoded as special tokens."""
    special = encoder.special_tokens_set
    parts = re.split(f'({"|".join(map(re.escape, special))})', text)
    ids = ([encoder.encode_single_token(part)] if part in special else encode_text(encoder, part) for part in parts)
    return list(itertools.chain.from_iterable(ids))


def byte_characters():
    """{byte: character}: how GPT-2 and tokenizer.json print bytes. A printable byte is its own character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def train_tokenizer(texts):
    """{bytes: rank} of the byte, char or bpe tokenizer for these texts."""
    ranks = {bytes([i]): i for i in range(256)}
    if tokenizer == 'byte':
        return ranks
    if tokenizer == 'char':
        return {c.encode(): i for i, c in enumerate(sorted(set(itertools.chain.from_iterable(texts))))}
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS['bpe']), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # Merging takes quadratic time in a run without a boundary, so long ones are cut. Ordinary text has none.
    parts = itertools.chain.from_iterable(map(UNBROKEN.split, texts))
    bpe.train_from_iterator(parts, trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_of = {character: byte for byte, character in byte_characters().items()}
    for left, right in json.loads(bpe.to_str())['model']['merges']:
        ranks.setdefault(bytes(byte_of[c] for c in left + right), len(ranks))
    return ranks


# --- writing ---
def divide(source, chats):
    """Yield (split, text, ends). val is the last val_fraction of the documents, or of the text if they are under 10."""
    documents = characters = position = 0
    for text, ends in tqdm(pieces_of(source), 'counting', leave=False):
        documents += ends
        characters += len(str(text))
    by_text = documents < 10 and not chats
    cut = int(characters * (1 - val_fraction)) if by_text else documents - max(1, round(documents * val_fraction))
    for text, ends in pieces_of(source):
        if by_text and position < cut < position + len(text):
            yield 'train', text[:cut - position], False
            yield 'val', text[cut - position:], ends
        else:
            yield 'train' if position < cut else 'val', text, ends
        position += len(text) if by_text else ends


def batches(pieces, chats):
    """Lists of pieces with PIECE characters or more; the last one may have fewer."""
    batch, size = [], 0
    for split, text, ends in pieces:
        if isinstance(text, Chat) != chats:
            raise ValueError(f'{dataset} holds texts and chats; prepare them one at a time')
        batch.append((split, text, ends))
        size += len(str(text))
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    yield batch


def encode(batch, encoder, dtype):
    """[(split, ends, token ids, mask, bytes, spelled)] of pieces. A text has no mask; a chat has targets' bytes."""
    rows, as_tokens = [], encoder.special_tokens_set if special_tokens else ()
    for split, text, ends in batch:
        tokens, mask, size, spelled = [], None, 0, 0
        if isinstance(text, Chat):
            mask = []
            for ids, targets in (encode_turn(encoder, turn) for turn in text.turns):
                tokens += [*ids, encoder.eot_token]
                mask += [*targets, 0]
                size += len(encoder.decode_bytes(list(itertools.compress(ids, targets))))
        else:
            tokens = (encode_prompt if special_tokens else encode_text)(encoder, text) + [encoder.eot_token] * ends
            size, spelled = len(text.encode()), sum(token[0] not in as_tokens for token in SPECIAL.finditer(text))
        rows.append((split, ends, np.array(tokens, dtype), mask, size, spelled))
    return rows


def encoded(pieces, encoder, dtype, chats):
    """Yield what `encode` returns, from threads that take a batch each. Few batches are in memory at a time."""
    work, threads = batches(pieces, chats), num_proc or os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        while group := list(itertools.islice(work, 4 * threads)):
            for rows in pool.map(partial(encode, encoder=encoder, dtype=dtype), group):
                yield from rows


def write_data(folder, pieces, encoder, chats):
    """Write the files of a data folder and return what meta.json holds. Each file appears whole or not at all."""
    dtype = np.dtype(np.uint16 if encoder.max_token_value < 2 ** 16 else np.uint32)
    meta = dict(dataset=dataset, tokenizer=encoder.name, vocab_size=encoder.max_token_value + 1,
                eot_token=encoder.eot_token, dtype=dtype.name)
    meta |= {f'{split}_{what}': 0 for split in ('train', 'val') for what in ('tokens', 'bytes', 'documents', 'crc32')}
    meta |= dict(train_targets=0, val_targets=0) if chats else {}
    meta['spelled_special_tokens'] = 0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new, ExitStack() as stack:
        new, names = Path(new), ['train', 'val', 'train_mask', 'val_mask'] if chats else ['train', 'val']
        bins = {name: stack.enter_context(open(new / f'{name}.bin', 'wb')) for name in names}
        # closed in this thread, even where writing fails, because it waits for its own threads
        rows = stack.enter_context(closing(encoded(pieces, encoder, dtype, chats)))
        for split, ends, tokens, mask, size, spelled in tqdm(rows, 'tokenising', leave=False):
            bins[split].write(tokens)
            meta[f'{split}_tokens'] += len(tokens)
            meta[f'{split}_crc32'] = zlib.crc32(tokens, meta[f'{split}_crc32'])
            meta[f'{split}_bytes'] += size
            meta[f'{split}_documents'] += ends
            meta['spelled_special_tokens'] += spelled
            if chats:
                bins[f'{split}_mask'].write(bytes(mask))
                meta[f'{split}_targets'] += sum(mask)
        stack.close()  # the bins are complete
        documents = meta['train_documents'] + meta['val_documents']
        if not meta['train_tokens'] or not meta['val_tokens']:
            raise ValueError(f'{dataset} holds too little text to divide (documents: {documents})')
        if dataset == 'builtin' and documents >= 10:
            # loss on val.bin, in nats per token, of a model that knows the grammar and sees each story from its start
            nats = [nats for _, nats in itertools.islice(builtin_stories(megabytes, seed), documents)]
            meta['perfect_loss'] = sum(nats[meta['train_documents']:]) / meta['val_tokens']
        if encoder.name in PATTERNS:
            lines = [b'%s %d\n' % (base64.b64encode(encoder.decode_single_token_bytes(rank)), rank)
                     for rank in range(encoder.eot_token)]
            (new / 'tokenizer.tiktoken').write_bytes(b''.join(lines))
            meta['special_tokens'] = sorted(encoder._special_tokens, key=encoder._special_tokens.get)
        (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        for file in ('meta.json', 'train_mask.bin', 'val_mask.bin', 'tokenizer.tiktoken'):
            (folder / file).unlink(missing_ok=True)  # of an earlier corpus
        for file in sorted(new.iterdir(), key=lambda file: file.name == 'meta.json'):  # meta.json last
            file.replace(folder / file.name)
    return meta


def main():
    if not 0 < val_fraction < 1:
        config.fail(f'--val_fraction={val_fraction} must be between 0 and 1')
    if tokenizer == 'bpe' and vocab_size < 257:
        config.fail(f'--vocab_size={vocab_size} must be at least 257')
    sources = open_sources()
    stem = dataset.removesuffix(Path(dataset).suffix) if Path(dataset).suffix in KINDS else dataset.partition(':')[0]
    folder = Path(data_dir or Path('data', Path(re.sub(r'[*?[\]]', '', stem)).name or 'text'))  # news/*.txt: data/news
    if not data_dir and (folder / 'meta.json').exists():
        with reading(folder / 'meta.json'):
            before = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['dataset']
        if before != dataset:
            config.fail(f'{folder} holds data of {before}; give --data_dir another folder')
    encoder = None if tokenizer in PATTERNS else load_tokenizer(tokenizer)
    first = next(pieces_of(sources['train']), None)
    if not first:
        config.fail(f'{dataset} holds no text')
    chats = isinstance(first[0], Chat)
    if chats and encoder and not encoder.special_tokens_set.issuperset(HARMONY):
        config.fail(f'{dataset} holds chats, but {encoder.name} has no token <|start|>; use o200k_harmony, bpe or byte')
    if not encoder:  # it is trained on the corpus
        texts = (str(text) for source in sources.values() for text, _ in pieces_of(source))
        ranks = train_tokenizer(tqdm(texts, 'reading', leave=False))
        encoder = encoding(tokenizer, ranks, (END, *HARMONY) if chats or special_tokens else (END,))
    pieces = ((split, *piece) for split in sources for piece in pieces_of(sources[split]))
    if 'val' not in sources:
        pieces = divide(sources['train'], chats)
    meta = write_data(folder, pieces, encoder, chats)
    if number := meta['spelled_special_tokens']:
        hint = f'{encoder.name} does not have them' if special_tokens else '--special_tokens=True reads them as tokens'
        print(f'{number:,} spellings of special tokens, such as {END}, were read as letters; {hint}')
    if chats:
        tokens = np.concatenate([np.fromfile(folder / f'{split}.bin', meta['dtype']) for split in ('train', 'val')])
        lengths = np.diff(np.flatnonzero(tokens == encoder.eot_token), prepend=-1) - 1
        sizes = [size for size in (256, 512, 1024, 2048, 4096, 8192, 16384) if size < lengths.max()]
        print(f'{len(lengths):,} answers, each with the chat before it: median {np.median(lengths):,.0f} tokens, '
              f'longest {lengths.max():,}', *(f'{(lengths > size).sum():,} over {size:,}' for size in sizes), sep=', ')
    print(f'{folder}: {meta["train_tokens"]:,} training tokens, {meta["val_tokens"]:,} validation tokens')


if __name__ == '__main__':
    globals().update(config.read(__file__)[0])
    try:
        main()
    except (OSError, ValueError) as error:
        config.fail(error)
