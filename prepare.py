"""
Turn text into train.bin, val.bin and meta.json: documents as token ids, each ended by the end-of-text token.

    python prepare.py                                                    # TinyStories from the Hugging Face hub
    python prepare.py --dataset='my/texts/*.txt' --tokenizer=gpt2        # local .txt .jsonl .json .csv .parquet
    python prepare.py --dataset=builtin --tokenizer=bpe --vocab_size=512 # made-up stories, needs no network
    python prepare.py --dataset=chats.jsonl                              # rows of messages, for fine-tuning on chats

Memory stays flat whatever the corpus's size: documents are streamed, tokenised on all cores, and written as they
come. Rows of messages become conversations in gpt-oss's harmony format, and train_mask.bin and val_mask.bin tell which
of their tokens are the assistant's, to be trained on.
"""

import config  # first, for it makes Ctrl-C quiet

import base64
import glob
import itertools
import json
import math
import os
import random
import re
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tiktoken
from tqdm.auto import tqdm

# -----------------------------------------------------------------------------
dataset = 'roneneldan/TinyStories'  # hub NAME[:SUBSET]; .txt .jsonl .json .csv .parquet file, glob or URL; builtin
tokenizer = 'o200k_harmony'  # any name of tiktoken's; byte, char, bpe (trained on the corpus); a folder that has one
vocab_size = 1024  # tokens that bpe learns, the 256 bytes and end of text included
data_dir = ''  # where the three files go; empty: data/ and the dataset's name
max_docs = 0  # read at most this many documents of each split, and fetch no more; 0: all
val_fraction = 0.1  # without a validation split, the last part of the documents (of the text, if fewer than ten)
text_column = 'text'  # the column that holds the text; where there is none, messages hold chats
megabytes = 8.0  # size of the built-in corpus
seed = 1337  # of the built-in corpus
num_proc = 0  # threads that tokenise; 0: one a core
# -----------------------------------------------------------------------------


# --- the built-in corpus: stories from a small grammar, with a known entropy --------------------------------------

CHILDREN = [
    ('girl', name, 'She', 'her') for name in 'Lily Mia Anna Zoe Rose Ella Nora Ruby Clara Alma'.split()] + [
    ('boy', name, 'He', 'his') for name in 'Tom Ben Max Sam Leo Finn Jack Hugo Oscar Theo'.split()]
FRIENDS = 'Pip Momo Bella Coco Dot Fuzzy Gus Hazel Jojo Kiki Luna Nutmeg Olive Poppy Rusty Tilly'.split()
ANIMALS = 'rabbit fox duck bear mouse frog turtle squirrel hedgehog cat puppy goat'.split()
TRAITS = 'little kind brave shy clever cheerful quiet funny'.split()
THINGS = 'ball kite hat drum boat lantern blanket bell cup basket ring book whistle scarf'.split()
PLACES = 'river forest hill meadow mill lake orchard beach market bridge'.split()
SKIES = 'sunny windy cloudy foggy warm cold'.split()
FOODS = 'bread soup cake cheese honey nuts berries plums'.split()
EVENTS = [  # what may happen to the child, its pal and their thing; {} are filled by `tell`
    '{pal} was hungry, so {child} put down the {thing} and gave {pal} some {food}.',
    'Suddenly it began to rain. {child} hid the {thing} under a {spot}, and {pal} sang about the {thing}.',
    'A {strong} wind took the {thing} over the {place}. {pal} jumped {count} times and caught the {thing} for {child}.',
    '{child} fell and hurt {his} {part}. {pal} put some {food} on the {part} and told a joke about the {thing}.',
    'They built a {size} castle of {stuff} for the {thing}. "I like to play with {stuff}," said {pal}.',
    'They raced to the {place} and back. {winner} won the {thing}, and {pal} laughed.',
    '{child} lost the {thing} near a {spot}. {pal} looked for it for {count} hours, and the {thing} was found.',
    '{pal} was {feeling}. "Take my {thing}," said {child}, and soon {pal} was happy.',
]


def tell(pick):
    """One story. pick(options) chooses; the text gives every choice away, so its probability is the choices'."""
    kind, child, he, his = pick(CHILDREN)
    friend = pick(FRIENDS)
    kept = dict(kind=kind, child=child, he=he, his=his, pal=f'{friend} the {pick(ANIMALS)}', thing=pick(THINGS),
                place=pick(PLACES))
    free = dict(trait=TRAITS, sky=SKIES, food=FOODS, winner=[child, friend], **{
        slot: options.split() for slot, options in dict(
            when='morning afternoon evening', spot='stone tree wall log bush bench', strong='strong sudden warm',
            count='two three four five', part='knee hand foot nose', size='big small round tall',
            stuff='sand sticks snow mud', feeling='sad tired angry bored').items()})

    def say(line):
        return line.format(**kept, **{slot: pick(options) for slot, options in free.items() if f'{{{slot}}}' in line})

    events = [say(pick(EVENTS)) for _ in range(pick([3, 4, 5]))]
    return '\n\n'.join((
        say('Once upon a time there was a {trait} {kind} named {child}. {he} had a friend, {pal}, and a {thing}.'),
        ' '.join((say('One {sky} {when}, {child} and {pal} took the {thing} to the {place}.'), *events)),
        say('Then {child} and {pal} walked home from the {place} with the {thing}. '
            'The {thing} had been to the {place}, and {child} and {pal} were happy.')))


def builtin_stories(megabytes, seed):
    """Yield (story, -ln of its probability) until this many megabytes are told."""
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


# --- sources: the documents of a split, as (text, whether the document ends here), for long ones come in pieces ---

OFFLINE = ('with no network, --dataset=builtin needs none, --dataset=FILE reads your own .txt .jsonl .json .csv '
           '.parquet, and --tokenizer=byte, char or bpe need no vocabulary file')


@contextmanager
def reading(what, hint=''):
    try:
        yield
    except Exception as error:  # datasets and the readers behind it raise dozens of kinds
        config.fail(f'{what} cannot be read ({type(error).__name__}: {str(error)[:160]}); {hint}'.rstrip('; '))


def open_source():
    """{split: function that yields its pieces, as often as called}: train, and validation if there is one."""
    if dataset == 'builtin':
        return {'train': lambda: limited((story, True) for story, _ in builtin_stories(megabytes, seed))}
    import datasets  # slow to import, so only where it is used
    kinds = {'.txt': 'text', '.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}
    if '://' in dataset or os.path.isfile(dataset):
        files = [dataset]
    else:
        files = sorted(f for f in glob.glob(dataset, recursive=True) if os.path.isfile(f))
    if (not files and not glob.has_magic(dataset) and not os.path.exists(dataset)
            and Path(dataset).suffix not in kinds):
        import huggingface_hub
        huggingface_hub.logging.set_verbosity_error()  # one line of ours says it, and not one for every attempt
        name, _, subset = dataset.partition(':')
        with reading(f'{dataset}, which is no file here, as a Hugging Face dataset', OFFLINE):
            splits = datasets.load_dataset(name, subset or None, streaming=bool(max_docs))
        if 'train' not in splits:
            config.fail(f'{dataset} has no split named train; it has {", ".join(splits)}')
        return {split: lambda split=split: limited(column(splits[split], f'{dataset}, split {split}'))
                for split in ('train', 'validation') if split in splits}
    if not files:
        config.fail(f'{dataset}: no such file (of a folder, name the files: {dataset}/*.txt)')
    for file in files:
        if Path(file).suffix not in kinds:
            config.fail(f'{file}: its suffix is none of {" ".join(kinds)}')
        if '://' not in file and not os.path.getsize(file):
            config.fail(f'{file} is empty')

    def pieces():
        for file in files:
            kind = kinds[Path(file).suffix]
            with reading(file):
                # as they stand: the lines of a text whole, and the cells of a CSV that say NA or null as text too
                options = dict(text=dict(keep_linebreaks=True, encoding='utf-8-sig'), csv=dict(keep_default_na=False))
                rows = datasets.load_dataset(kind, data_files=[file], split='train', streaming=True,
                                             **options.get(kind, {}))
                yield from text_file(rows) if kind == 'text' else column(rows, file)

    return {'train': lambda: limited(pieces())}


def limited(pieces):
    """The pieces of the first max_docs documents."""
    documents = 0
    for text, ends in pieces:
        yield text, ends
        documents += ends
        if documents == max_docs > 0:
            return


def column(rows, source):
    """The text column of a dataset's rows, each row a document: a text, or the Chat of a list of messages."""
    number = 0
    with reading(source):
        for batch in rows.iter(batch_size=1000):
            name = text_column if text_column in batch or 'messages' not in batch else 'messages'
            if not number and name == 'text' and 'messages' in batch:
                print(f'({source} has messages beside its text; --text_column=messages takes them)')
            for i, value in enumerate(batch.get(name) or [None] * len(next(iter(batch.values())))):
                if isinstance(value, list):
                    try:
                        value = Chat(value)
                    except ValueError as error:
                        config.fail(f'{source}: row {number + i}: {error}')
                    if not any(channel == 'final' for _, channel, _ in value.parts):
                        config.fail(f'{source}: row {number + i}: the chat has no final answer of the assistant')
                elif name == 'messages':
                    config.fail(f'{source}: row {number + i}: messages is {repr(value)[:40]}; it wants a list of '
                                '{role, content}')
                if not isinstance(value, str | Chat):
                    there = ', '.join(name for name, values in batch.items() if values[i] is not None) or 'nothing'
                    config.fail(f'{source}: row {number + i} has {"no text" if value is None else repr(value)[:40]} '
                                f'in column {text_column!r}; it has the columns {there} '
                                '(choose one with --text_column=NAME)')
                if value:
                    yield value, True
            number += i + 1


PIECE = 2 ** 20  # characters that are tokenised together
DIVIDER = re.compile(r'^<\|endoftext\|>[ \t]*(?:\n|\Z)', re.MULTILINE)
# no tokenizer here has a token across this, so a document may be cut there
SEAM = re.compile(r'(?<=[A-Za-z])(?= [A-Za-z])')


def text_file(rows):
    """A text file is one document, unless lines of <|endoftext|> divide it."""
    text, begun, divided = '', False, False  # text: of the current document, not yet yielded; begun: some of it was
    for batch in rows.iter(batch_size=5000):
        *ended, text = DIVIDER.split(text + ''.join(batch['text']))
        for document in ended:
            divided = True
            if begun or document.strip('\n'):
                yield document.strip('\n'), True
            begun = False
        while len(text) > 2 * PIECE:
            cuts = [seam.start() for seam in SEAM.finditer(text, PIECE, PIECE + 2 ** 16)]
            cut = cuts[0] if cuts else PIECE
            yield text[:cut], False
            text, begun = text[cut:], True
    if divided:
        text = text.strip('\n')
    if begun or text:
        yield text, True


# --- chats, in the harmony format of gpt-oss: https://github.com/openai/harmony ----------------------------------

HARMONY = '<|start|>', '<|message|>', '<|channel|>', '<|end|>', '<|return|>', '<|call|>'
SYSTEM = ('You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: {}\n\n'
          '# Valid channels: analysis, commentary, final. Channel must be included for every message.')


class Chat:
    """A conversation, parts [(role, channel, text)], from messages {role, content} as chat APIs have them.

    An assistant's message may have its reasoning as `thinking` or a `channel` of its own (analysis, commentary or
    final). A system message gives instructions, which in harmony are the developer's. Raises ValueError.
    """

    def __init__(self, messages):
        self.parts = []
        for number, message in enumerate(messages, 1):
            role, text = (message.get(key) if isinstance(message, dict) else None for key in ('role', 'content'))
            thinking = message.get('thinking') or '' if isinstance(message, dict) else ''
            if (role not in ('system', 'developer', 'user', 'assistant') or not isinstance(text, str)
                    or not isinstance(thinking, str)):
                raise ValueError(f'message {number} is {repr(message)[:80]}; it wants a role (system, developer, user '
                                 'or assistant) and a content that is text')
            if message.get('tool_calls') or message.get('recipient'):
                raise ValueError(f'message {number} calls a tool, which prepare.py cannot render')
            if role in ('system', 'developer'):
                role, text = 'developer', f'# Instructions\n\n{text}'
            if role == 'assistant' and thinking:
                self.parts.append((role, 'analysis', thinking))
            channel = (message.get('channel') or 'final') if role == 'assistant' else ''
            if channel not in ('', 'analysis', 'commentary', 'final'):
                raise ValueError(f'message {number} has the channel {channel!r}; it is analysis, commentary or final')
            self.parts.append((role, channel, text))

    def text(self):
        """All its characters, for tokenizers to learn from."""
        return '\n'.join((SYSTEM.format('medium'), 'system', *itertools.chain(*self.parts)))

    def prompt(self, encoder, effort='medium'):
        """Token ids of the conversation so far, up to where the assistant answers; its earlier analysis is dropped."""
        parts = [part for part in self.parts if part[1] != 'analysis']
        return render(encoder, [('system', '', SYSTEM.format(effort)), *parts]) + render(encoder, [('assistant',)])

    def examples(self, encoder):
        """(token ids, mask) of each turn of the assistant after what it saw then; 1 in the mask: to be trained on."""
        begin, seen = 0, Chat([])
        for end, (role, channel, _) in enumerate(self.parts, 1):
            if role != 'assistant':
                begin = end
            elif channel == 'final':
                seen.parts = self.parts[:begin]
                prompt, opening = seen.prompt(encoder), render(encoder, [('assistant',)])
                answer = render(encoder, self.parts[begin:end])[len(opening):]
                answer[-1] = encoder.encode_single_token('<|return|>')
                yield prompt + answer, [0] * len(prompt) + [1] * len(answer)
                begin = end


def render(encoder, parts):
    """Token ids of parts (role, channel, text), or of one that only begins: (role,). Texts hold no special tokens."""
    tokens = []
    for role, *rest in parts:
        tokens += [encoder.encode_single_token('<|start|>'), *encoder.encode_ordinary(role)]
        if rest:
            channel, text = rest
            check_characters(encoder, text)
            tokens += [encoder.encode_single_token('<|channel|>'), *encoder.encode_ordinary(channel)] if channel else []
            tokens += [encoder.encode_single_token('<|message|>'), *encoder.encode_ordinary(text),
                       encoder.encode_single_token('<|end|>')]
    return tokens


# --- tokenizers, each a tiktoken.Encoding -------------------------------------------------------------------------

END = '<|endoftext|>'
PATTERNS = {'byte': r'[\s\S]', 'char': r'[\s\S]', 'bpe': r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}


def encoding(name, ranks=None, special=(END,)):
    """The encoding of tiktoken's by that name, or one of ours made from its {bytes: rank} table and special tokens."""
    if name in PATTERNS:
        return tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks,
                                 special_tokens={token: len(ranks) + i for i, token in enumerate(special)})
    if name not in tiktoken.list_encoding_names():
        config.fail(f'there is no tokenizer {name!r}; '
                    f'there are {", ".join([*PATTERNS, *tiktoken.list_encoding_names()])}')
    with reading(f"tiktoken's vocabulary file of {name}",
                 f'{OFFLINE}; TIKTOKEN_CACHE_DIR may name a folder of files fetched before'):
        return tiktoken.get_encoding(name)


def load_tokenizer(folder):
    """The encoding that meta.json in a data folder or a checkpoint names, from the rank table beside it if ours."""
    from model import read_bytes, read_json  # here, for it takes torch along
    table = Path(folder, 'tokenizer.tiktoken')
    try:
        meta = read_json(Path(folder, 'meta.json'))
        name, special = meta['tokenizer'], meta.get('special_tokens', [END])
        if name not in PATTERNS:
            return encoding(name)
        if not isinstance(special, list) or not all(isinstance(token, str) for token in special) or END not in special:
            raise ValueError(f'special_tokens are not strings and {END} among them')
        lines = read_bytes(table).decode().splitlines()
        ranks = {base64.b64decode(line.split()[0], validate=True): int(line.split()[1]) for line in lines}
        if len(ranks) + len(special) != meta['vocab_size']:
            raise ValueError(f'{len(ranks)} tokens and {len(special)} special ones are not {meta["vocab_size"]!r:.99}')
        if sorted(ranks.values()) != list(range(len(lines))) or not all(ranks):
            raise ValueError('its ranks are not 0, 1, 2 ...')
        return encoding(name, ranks, special)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f'{folder}: meta.json or tokenizer.tiktoken is damaged ({type(error).__name__}: {error})')


def stop_tokens(encoder):
    """The tokens at which a continuation is over: the end of the text, in a chat of the turn, or a call of a tool."""
    return [encoder.encode_single_token(token) for token in (END, '<|return|>', '<|call|>')
            if token in encoder.special_tokens_set]


def check_characters(encoder, text):
    """Raise ValueError for characters that a char tokenizer has not; the others know every byte."""
    if encoder.name == 'char':
        if unknown := sorted(set(text) - set(map(bytes.decode, encoder.token_byte_values()))):
            raise ValueError(f'the corpus of this char tokenizer never had {", ".join(map(repr, unknown))}; byte and '
                             'bpe know every character')


def encode_prompt(encoder, text):
    """Token ids of a prompt, in which special tokens such as <|endoftext|> count as such."""
    check_characters(encoder, re.sub('|'.join(map(re.escape, encoder.special_tokens_set)), '', text))
    return encoder.encode(text, allowed_special='all')


def train_tokenizer(texts):
    """Ranks of the byte, char or bpe tokenizer for these texts."""
    if tokenizer == 'byte':
        return {bytes([i]): i for i in range(256)}
    if tokenizer == 'char':
        characters = set()
        for text in texts:
            characters.update(text)
        return {c.encode(): i for i, c in enumerate(sorted(characters))}
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        config.fail('the bpe tokenizer is trained by the tokenizers package: pip install tokenizers')
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERNS['bpe']), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_of = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([i]): i for i in range(256)}
    for left, right in json.loads(bpe.to_str())['model']['merges']:
        ranks.setdefault(bytes(byte_of[c] for c in left + right), len(ranks))
    return ranks


# what Chat.prompt does, for apply_chat_template; messages come with {role, content}, an assistant's with its thinking
CHAT_TEMPLATE = (
    "{{- '<|start|>system<|message|>" + SYSTEM.format("' + (reasoning_effort or 'medium') + '").replace('\n', '\\n')
    + "<|end|>' }}"
    "{%- for message in messages %}"
    "{%- if message.role in ('system', 'developer') %}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'assistant' and message.channel != 'analysis' %}"
    "{{- '<|start|>assistant<|channel|>' + (message.channel or 'final') + '<|message|>' }}{{- message.content }}"
    "{{- '<|end|>' }}{%- elif message.role != 'assistant' %}{{- raise_exception('no role ' + message.role) }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}")


def byte_characters():
    """{byte: character} by which tokenizer.json writes bytes, as GPT-2 did: printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(other)}


def write_tokenizer(encoder, folder):
    """Write what transformers and others read: tokenizer.json, tokenizer_config.json and generation_config.json."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return print('(pip install tokenizers, and there will be a tokenizer.json for transformers too)')
    ranks, characters = encoder._mergeable_ranks, byte_characters()
    written = lambda token: ''.join(characters[byte] for byte in token)
    merges = [(written(token[:i]), written(token[i:])) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    bpe = Tokenizer(models.BPE({written(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    pattern = encoder._pat_str.replace('++$', r'+\z')  # possessive repeats only save time; others read them otherwise
    pattern = re.sub(r'([+*?]|\{\d+,?\d*\})\+', r'\1', pattern)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    special = {number: token for token, number in reversed(encoder._special_tokens.items())}
    names = [special.get(number, f'<|unused_{number}|>') for number in range(len(ranks), encoder.n_vocab)]
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in names])  # numbered as they come
    bpe.save(str(folder / 'tokenizer.json'))
    options = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, eos_token=END,
                   pad_token=END)
    if '<|start|>' in encoder.special_tokens_set:
        options |= dict(eos_token='<|return|>', chat_template=CHAT_TEMPLATE)
    (folder / 'tokenizer_config.json').write_text(json.dumps(options, indent=2) + '\n')
    (folder / 'generation_config.json').write_text(json.dumps(dict(
        do_sample=True, eos_token_id=stop_tokens(encoder), pad_token_id=encoder.eot_token), indent=2) + '\n')


# --- from pieces to files -----------------------------------------------------------------------------------------

def divide(pieces, documents, characters):
    """Split off the last val_fraction for validation: of the documents, or of the text if fewer than ten."""
    document, character = 0, 0
    first = documents - max(1, round(documents * val_fraction))
    cut = int(characters * (1 - val_fraction))
    for text, ends in pieces:
        if documents >= 10 or isinstance(text, Chat):
            yield 'train' if document < first else 'val', text, ends
        else:
            here = min(max(cut - character, 0), len(text))  # how much of this piece comes before the cut
            if here:
                yield 'train', text[:here], ends and here == len(text)
            if here < len(text) or not text:
                yield 'val', text[here:], ends
        document, character = document + ends, character + len(plain(text))


def batches(pieces):
    """Group (split, text, ends) into (split, [(text, ends), ...]) of about PIECE characters, a thread's worth."""
    for split, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        batch, size = [], 0
        for _, text, ends in group:
            batch.append((text, ends))
            size += len(plain(text))
            if size >= PIECE:
                yield split, batch
                batch, size = [], 0
        if batch:
            yield split, batch


def plain(document):
    return document.text() if isinstance(document, Chat) else document


def write_bins(pieces, encoder, dtype, folder, chats):
    """Tokenise (split, text, ends) on all cores, write folder/train.bin and val.bin in order, and return the counts.

    Of chats also train_mask.bin and val_mask.bin, a byte a token: 1 where it is to be trained on; and the counts of
    these tokens are the targets, those of bytes are theirs.
    """
    counts = {f'{split}_{what}': 0 for split in ('train', 'val') for what in ('tokens', 'bytes', 'documents')}

    def encode(batch):
        tokens, mask, size = [], [], 0
        for text, ends in batch:
            if isinstance(text, Chat) != chats:
                raise ValueError(f'{dataset} holds texts and chats; prepare them one at a time')
            if chats:
                for ids, trained in text.examples(encoder):
                    tokens.append([*ids, encoder.eot_token])
                    mask += [*trained, 0]
                    size += len(encoder.decode_bytes(list(itertools.compress(ids, trained))))
                continue
            check_characters(encoder, text)
            tokens += [encoder.encode_to_numpy(text, disallowed_special=()), *([[encoder.eot_token]] if ends else [])]
            size += len(text.encode())
        return np.concatenate(tokens).astype(dtype), np.array(mask, np.uint8), size, sum(ends for _, ends in batch)

    with ExitStack() as stack:
        bins = {split: stack.enter_context(open(folder / f'{split}.bin', 'wb')) for split in ('train', 'val')}
        pool = stack.enter_context(ThreadPoolExecutor(num_proc or os.cpu_count()))
        progress = stack.enter_context(tqdm(desc='tokenising', unit=' tokens', unit_scale=True, leave=False))

        def write(split, result):
            tokens, mask, size, documents = result.result()
            bins[split].write(tokens)
            if len(mask):
                if f'{split}_mask' not in bins:
                    bins[f'{split}_mask'] = stack.enter_context(open(folder / f'{split}_mask.bin', 'wb'))
                bins[f'{split}_mask'].write(mask)
                counts[f'{split}_targets'] = counts.get(f'{split}_targets', 0) + int(mask.sum())
            progress.update(len(tokens))
            for what, more in (('tokens', len(tokens)), ('bytes', size), ('documents', documents)):
                counts[f'{split}_{what}'] += more

        waiting = deque()
        for split, batch in batches(pieces):
            waiting.append((split, pool.submit(encode, batch)))
            if len(waiting) > 2 * pool._max_workers:  # so that no more than this is ever in memory
                write(*waiting.popleft())
        while waiting:
            write(*waiting.popleft())
    return counts


def main():
    for key, good, wanted in (('val_fraction', 0 < val_fraction < 1, 'between 0 and 1'),
                              ('max_docs', max_docs >= 0, '0 or more'), ('num_proc', num_proc >= 0, '0 or more'),
                              ('megabytes', 0 < megabytes < 1e9, 'above 0'),
                              ('vocab_size', vocab_size >= 257 or tokenizer != 'bpe', 'at least 257')):
        if not good:
            config.fail(f'--{key}={globals()[key]} must be {wanted}')
    name = Path(dataset if '://' in dataset else dataset.partition(':')[0]).stem
    folder = Path(data_dir or Path('data') / (name.replace('*', '') or 'text'))
    encoder, source = None, open_source()
    if Path(tokenizer, 'meta.json').is_file():
        encoder = load_tokenizer(tokenizer)
    elif Path(tokenizer).is_dir():
        config.fail(f'{tokenizer} holds no meta.json; name a data folder or a checkpoint such as {tokenizer}/best')
    elif tokenizer not in PATTERNS:
        encoder = encoding(tokenizer)
    chats = any(isinstance(text, Chat) for text, _ in itertools.islice(source['train'](), 1))
    if chats and encoder and not encoder.special_tokens_set.issuperset(HARMONY):
        config.fail(f"{dataset} holds chats, and {encoder.name} has none of harmony's tokens such as <|start|>; take "
                    '--tokenizer=o200k_harmony, or bpe, byte or char')

    # First pass, where the split or the tokenizer asks for one: count, and learn the tokenizer.
    counts = dict(documents=0, characters=0)

    def counted():
        for text, ends in tqdm(itertools.chain(*(pieces() for pieces in source.values())), 'reading',
                               unit=' documents', leave=False):
            counts['documents'] += ends
            counts['characters'] += len(plain(text))
            yield plain(text)

    if not encoder or 'validation' not in source:
        texts = counted()
        ranks = train_tokenizer(texts) if encoder is None else None
        deque(texts, maxlen=0)  # what the tokenizer did not ask for
        if not counts['characters']:
            config.fail(f'{dataset} holds no text')
        encoder = encoder or encoding(tokenizer, ranks, (END, *(HARMONY if chats else ())))

    # Second pass: tokenise and write. Files get their names when all is well, meta.json last.
    if 'validation' in source:
        pieces = ((name, *piece) for name, split in (('train', 'train'), ('val', 'validation'))
                  for piece in source[split]())
    else:
        pieces = divide(source['train'](), **counts)
    dtype = np.dtype(np.uint16 if encoder.max_token_value < 2 ** 16 else np.uint32)
    meta = dict(dataset=dataset, tokenizer=encoder.name, vocab_size=encoder.max_token_value + 1,
                eot_token=encoder.eot_token, dtype=dtype.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder, pieces, encoder, dtype, chats, meta, counts)
    except OSError as error:
        config.fail(f'{folder} cannot be written: {error}')
    tokens, size = (sum(meta[f'{split}_{what}'] for split in ('train', 'val')) for what in ('tokens', 'bytes'))
    print(f'{folder}: {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens of '
          f'{meta["vocab_size"]:,} ({dtype}), {size / tokens:.2f} bytes a token')


def write_data(folder, pieces, encoder, dtype, chats, meta, counts):
    """Write the files of a data folder, whole or not at all, and what is known then into meta."""
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        partial = Path(partial)
        meta |= write_bins(pieces, encoder, dtype, partial, chats)
        for split in ('train', 'val'):
            if not meta[f'{split}_tokens']:
                documents = meta['train_documents'] + meta['val_documents']
                config.fail(f'{dataset} leaves nothing for {split}.bin; it has {documents} documents, and wants more')
        if dataset == 'builtin' and counts['documents'] >= 10:
            # what a perfect model would score on val.bin, in nats a token, if it saw every story from its beginning
            nats = [nats for _, nats in builtin_stories(megabytes, seed)][:max_docs or None]
            meta['perfect_loss'] = sum(nats[meta['train_documents']:]) / meta['val_tokens']
        if encoder.name in PATTERNS:
            table = (f'{base64.b64encode(encoder.decode_single_token_bytes(rank)).decode()} {rank}\n'
                     for rank in range(encoder.eot_token))
            (partial / 'tokenizer.tiktoken').write_text(''.join(table))
            meta['special_tokens'] = sorted(encoder._special_tokens, key=encoder._special_tokens.get)
        (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
        config.sync(*partial.iterdir())
        files = 'train.bin', 'train_mask.bin', 'val.bin', 'val_mask.bin', 'tokenizer.tiktoken', 'meta.json'
        for file in reversed(files):
            if file not in ('train.bin', 'val.bin'):
                (folder / file).unlink(missing_ok=True)
        for file in files:
            if (partial / file).exists():
                (partial / file).replace(folder / file)
        config.sync(folder)


if __name__ == '__main__':
    settings, _ = config.read(__file__)
    globals().update(settings)
    try:
        main()
    except (OSError, ValueError) as error:
        config.fail(error)
