"""
Continue a text with a trained model, printed as it is drawn; chat with it; or write it for other programs:

    python sample.py --start="Once upon a time"
    python sample.py --init_from=openai/gpt-oss-20b --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=openai/gpt-oss-20b --chat --experts=mxfp4
    python sample.py --export=exported --dtype=bfloat16
"""

import config  # first, for it makes Ctrl-C quiet

import codecs
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads of PyTorch's that wait leave the cores to others
import torch
from safetensors import SafetensorError

from bench import pick_device
from model import GPT, find_checkpoint, read_json
from prepare import HARMONY, Chat, encode_prompt, encoding, load_tokenizer, stop_tokens, write_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # a run of train.py; its best checkpoint speaks, or its last where there is no best
init_from = ''  # the folder or hub id of a checkpoint, instead of out_dir
chat = False  # talk: every line of input is a message, with the tokens that gpt-oss has for chats
system = ''  # with chat: instructions that come first
reasoning_effort = 'medium'  # with chat: low, medium or high
export = ''  # write the model to this folder instead, in bfloat16 unless dtype says otherwise, adapters merged
start = ''  # the text to continue, or FILE:NAME to read it from a file; empty: the end-of-text token
num_samples = 1  # texts to draw
max_new_tokens = 500  # the longest continuation, in tokens
context = 0  # how many tokens back the model looks; 0: as many as it was trained on (a model not ours: all)
temperature = 0.8  # 0 is greedy: always the likeliest token
top_k = 0  # draw from the k likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens that together reach this probability
min_p = 0.0  # draw from the tokens at least this fraction as likely as the likeliest
seed = 1337  # of the draws
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 or float32; auto: the first that the device is fast in
experts = ''  # mxfp4: keep, or export, the experts' matrices at four bits a value
# -----------------------------------------------------------------------------


def load(path, dtype, device):
    """The model of a checkpoint; its tokenizer, gpt-oss's if none is beside it; the block it was trained on."""
    folder = find_checkpoint(path)
    packed = '' if export and (folder / 'adapter.json').exists() else experts  # exporting packs what was merged
    model = GPT.from_pretrained(path, torch.bfloat16 if packed and not export else dtype, device, packed or None)
    model.compute_dtype, meta = dtype, folder / 'meta.json'
    if model.lora and not packed:
        model.merge_lora()
    if meta.exists():
        block_size = read_json(meta).get('block_size')
        if block_size is not None and (type(block_size) is not int or block_size < 1):
            raise ValueError(f'{meta} is damaged: block_size is {block_size!r}'[:200])
        return model, load_tokenizer(folder), block_size
    if model.config.vocab_size == 201088:
        return model, encoding('o200k_harmony'), None
    raise ValueError(f'{path} has no meta.json, so its tokenizer is unknown; '
                     'copy meta.json (and tokenizer.tiktoken) from its data')


def decoded(encoder, tokens):
    """Pieces of text as tokens come. A token may end within a character, so incomplete bytes are held back."""
    utf8 = codecs.getincrementaldecoder('utf-8')('replace')
    for token in tokens:
        yield utf8.decode(encoder.decode_single_token_bytes(token))
    yield utf8.decode(b'', final=True)


def show(pieces):
    """Print pieces as they come, and return the whole."""
    text = ''
    for piece in pieces:
        print(piece, end='', flush=True)
        text += piece
    return text


def converse(draw, encoder):
    """Read messages and print answers, each channel under its name, until the input ends."""
    if missing := [token for token in HARMONY if token not in encoder.special_tokens_set]:
        config.fail(f'this model was not made for chats: its tokenizer {encoder.name} has no {missing[0]}; fine-tune '
                    'one on data that python prepare.py --dataset=CHATS.jsonl made')
    message, channel, end = (encoder.encode_single_token(f'<|{name}|>') for name in ('message', 'channel', 'end'))
    if sys.stdin is None:
        config.fail('--chat reads messages from the keyboard or a pipe, but the standard input is closed')
    messages = [dict(role='system', content=system)] if system else []
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '').strip()
        except EOFError:
            return
        if not line:
            continue
        messages.append(dict(role='user', content=line))
        tokens = draw(Chat(messages).prompt(encoder, reasoning_effort))
        name = None  # of the channel whose header is being read
        for token in tokens:
            if token == channel:
                name = []
            elif token == message:
                name = encoder.decode(name or []) or 'final'
                print(f'[{name}]')
                text = show(decoded(encoder, itertools.takewhile(lambda token: token != end, tokens)))
                print()
                if name in ('analysis', 'commentary', 'final'):
                    messages.append(dict(role='assistant', channel=name, content=text))
                name = None
            elif name is not None:
                name.append(token)


def main():
    folders = (Path(out_dir, d) for d in ('best', 'last', 'last.old', '.'))
    there = (str(p) for p in folders for file in ('config.json', 'adapter.json') if (p / file).exists())
    path = init_from or next(there, None)
    if path is None:
        config.fail(f'{out_dir} holds no checkpoint; train one with python train.py, or name another with '
                    '--out_dir or --init_from')
    for key, good in (('num_samples', num_samples >= 1), ('max_new_tokens', max_new_tokens >= 1),
                      ('top_k', top_k >= 0), ('context', context >= 0), ('seed', 0 <= seed < 2 ** 63)):
        if not good:
            config.fail(f'{key} is {globals()[key]}; num_samples and max_new_tokens are at least 1, '
                        'top_k and context at least 0')
    if reasoning_effort not in ('low', 'medium', 'high'):
        config.fail(f'reasoning_effort is {reasoning_effort!r}; it is low, medium or high')
    if experts not in ('', 'mxfp4'):
        config.fail(f'experts is {experts!r}; it is mxfp4, or empty')
    if export:
        if os.path.exists(export) and not (os.path.isdir(export) and not os.listdir(export)):
            config.fail(f'{export} is there already; --export wants a new folder')
        if inside := config.enclosing_checkpoint(export):
            config.fail(f'{export} is in the checkpoint {inside}, which it would damage; export to elsewhere')
    where, kind = pick_device(device, 'bfloat16' if export and dtype == 'auto' else dtype)
    torch.manual_seed(seed)
    model, encoder, block_size = load(path, getattr(torch, kind), where)
    if export:
        parent = Path(export).resolve().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent) as beside:  # so that export is there whole or not at all
                new = Path(beside) / 'new'
                model.save_pretrained(new, experts=experts or None)
                write_tokenizer(encoder, new)
                for file in ('meta.json', 'tokenizer.tiktoken'):  # with which it is at home here, too
                    if (source := find_checkpoint(path) / file).exists():
                        shutil.copy(source, new)
                config.sync(*new.iterdir(), new)
                new.replace(export)
                config.sync(parent)
        except (OSError, SafetensorError) as error:
            config.fail(f'cannot write to {export}: {error}')
        return print(f'{export}: {model.num_parameters():,} parameters, {kind}{", experts mxfp4" if experts else ""}')
    options = temperature, top_k or None, top_p, min_p, encoder.n_vocab, context or block_size
    ends = set(stop_tokens(encoder))

    def draw(prompt):
        """Yield tokens until one of ends comes, then tell how long it took."""
        began, drawn = time.perf_counter(), 0
        for token in model.stream(torch.tensor([prompt], device=where), max_new_tokens, *options):
            drawn += 1
            if token.item() in ends:
                break
            yield token.item()
        cut = ' (max_new_tokens)' if drawn == max_new_tokens and token.item() not in ends else ''
        print(flush=True)
        print(f'--- {drawn} tokens{cut}, {drawn / (time.perf_counter() - began):.1f} tokens/s', file=sys.stderr)

    if chat:
        return converse(draw, encoder)
    try:
        text = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8') if start.startswith('FILE:') else start
    except (OSError, UnicodeDecodeError) as error:
        config.fail(f'--start={start} cannot be read: {error}')
    prompt = encode_prompt(encoder, text) or [encoder.eot_token]
    for _ in range(num_samples):
        print(text, end='', flush=True)
        show(decoded(encoder, draw(prompt)))


if __name__ == '__main__':
    settings, _ = config.read(__file__)
    globals().update(settings)
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, or logits that are not finite
        config.fail(error)
