"""
Continue a text with a trained model, chat with it, or export it for other programs.

    python sample.py --start="Once upon a time"                                        # the run in out/
    python sample.py --init_from=openai/gpt-oss-20b --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=openai/gpt-oss-20b --chat --experts=mxfp4
    python sample.py --export=exported                                                 # for transformers
"""

import config  # first: it sets variables that libraries read when they load

import codecs
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from model import GPT, find_checkpoint, read_json
from prepare import (END, HARMONY, SYSTEM, Chat, byte_characters, encode_prompt, encoding, load_tokenizer, reading,
                     stop_tokens)

# -----------------------------------------------------------------------------
# the model
out_dir = 'out'  # a run of train.py; its best checkpoint is used or, where there is none, its last
init_from = ''  # folder or hub id of a checkpoint, in place of out_dir
experts = ''  # mxfp4: keep, or export, the matrices of the experts at four bits a value
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16 or float32; auto: the first that is fast on the device
# the text
start = ''  # text to continue, or FILE:NAME to read it from a file; empty: the end-of-text token
num_samples = 1  # texts to draw
max_new_tokens = 500  # longest continuation, in tokens
context = 0  # tokens that the model looks back; 0: as many as it was trained on, or all if that is unknown
temperature = 0.8  # 0 is greedy: always the likeliest token
top_k = 0  # draw from the k likeliest tokens; 0: from all
top_p = 1.0  # draw from the likeliest tokens that together reach this probability
min_p = 0.0  # draw from the tokens at least this fraction as likely as the likeliest
seed = 1337  # of the draws
# chat
chat = False  # every line of input is a message of the user; needs a model with the chat tokens of gpt-oss
system = ''  # instructions that come first
reasoning_effort = 'medium'  # low, medium or high
# export
export = ''  # folder to write the model to, adapters merged, for transformers and others; dtype auto is bfloat16
# -----------------------------------------------------------------------------


def load(folder, dtype, device):
    """The model of a checkpoint, its tokenizer, and the block size of its training, or 0 if that is unknown."""
    merge_first = export and (folder / 'adapter_config.json').exists()  # save_pretrained packs the merged experts
    model = GPT.from_pretrained(folder, dtype, device, None if merge_first else experts or None)
    if model.lora and (merge_first or not experts):
        model.merge_lora()
    if (folder / 'meta.json').exists():
        return model, load_tokenizer(folder), int(read_json(folder / 'meta.json').get('block_size') or 0)
    if model.config.vocab_size == 201088:
        return model, encoding('o200k_harmony'), 0
    raise ValueError(f'{folder} has no meta.json, so no tokenizer; copy it and tokenizer.tiktoken from the data')


# --- text ---
def show(encoder, tokens):
    """Print the text of tokens as they come, and return it. Bytes of an incomplete character wait for the next."""
    utf8, text = codecs.getincrementaldecoder('utf-8')('replace'), ''
    for token in tokens:
        piece = utf8.decode(encoder.decode_single_token_bytes(token))
        print(piece, end='', flush=True)
        text += piece
    rest = utf8.decode(b'', final=True)
    print(rest, end='', flush=True)
    return text + rest


# --- chat ---
def converse(answer, encoder, longest):
    """Read messages and print the answers, each channel under its name, until the input ends. Where the chat has more
    than `longest` tokens, its oldest turns are left out."""
    if missing := [token for token in HARMONY if token not in encoder.special_tokens_set]:
        config.fail(f'this model was not trained on chats: its tokenizer {encoder.name} has no {missing[0]}; fine-tune '
                    'one on data from python prepare.py --dataset=CHATS.jsonl')
    message, channel, end = map(encoder.encode_single_token, ('<|message|>', '<|channel|>', '<|end|>'))
    messages = [dict(role='system', content=system)] if system else []
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '').strip()
        except EOFError:
            return
        if not line:
            continue
        messages.append(dict(role='user', content=line))
        prompt, oldest = Chat(messages).prompt(encoder, reasoning_effort), len(messages[:1] if system else [])
        while len(prompt) > longest and len(users := [i for i, m in enumerate(messages) if m['role'] == 'user']) > 1:
            del messages[oldest:users[1]]
            prompt = Chat(messages).prompt(encoder, reasoning_effort)
            print(f'(the oldest turn is left out, because the model looks back {longest} tokens)', file=sys.stderr)
        tokens = answer(prompt)
        header = None  # tokens of the channel's name, while they come
        for token in tokens:
            if token == channel:
                header = []
            elif token == message:
                name, header = encoder.decode(header or []) or 'final', None
                print(f'[{name}]')
                text = show(encoder, itertools.takewhile(lambda token: token != end, tokens))
                print()
                if name in ('analysis', 'commentary', 'final'):
                    messages.append(dict(role='assistant', channel=name, content=text))
            elif header is not None:
                header.append(token)


# --- export ---
# Chat.prompt as a template of transformers. A message has role and content, the assistant's also channel or thinking.
CHAT_TEMPLATE = (
    "{{- '<|start|>system<|message|>" + SYSTEM.format("' + (reasoning_effort or 'medium') + '").replace('\n', '\\n')
    + "<|end|>' }}{%- for message in messages %}"
    "{%- if message.role in ('system', 'developer') %}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'assistant' and message.channel != 'analysis' %}"
    "{{- '<|start|>assistant<|channel|>' + (message.channel or 'final') + '<|message|>' }}{{- message.content }}"
    "{{- '<|end|>' }}{%- elif message.role != 'assistant' %}{{- raise_exception('no role ' + message.role) }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}")


def write_tokenizer(encoder, folder):
    """Write tokenizer.json, tokenizer_config.json and generation_config.json, which transformers reads."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    ranks, characters = encoder._mergeable_ranks, byte_characters()
    written = {token: ''.join(characters[byte] for byte in token) for token in ranks}
    merges = [(written[token[:i]], written[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    bpe = Tokenizer(models.BPE({written[token]: ranks[token] for token in ranks}, merges, ignore_merges=True))
    # Possessive repeats only save time, and other programs read them differently.
    pattern = re.sub(r'([+*?]|\{\d+,?\d*\})\+', r'\1', encoder._pat_str.replace('++$', r'+\z'))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    special = {number: token for token, number in reversed(encoder._special_tokens.items())}
    names = [special.get(number, f'<|unused_{number}|>') for number in range(len(ranks), encoder.n_vocab)]
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in names])  # numbered in this order
    bpe.save(str(folder / 'tokenizer.json'))
    options = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, eos_token=END,
                   pad_token=END)
    if '<|start|>' in encoder.special_tokens_set:
        options |= dict(eos_token='<|return|>', chat_template=CHAT_TEMPLATE)
    generation = dict(do_sample=True, eos_token_id=stop_tokens(encoder), pad_token_id=encoder.eot_token)
    for name, content in (('tokenizer_config', options), ('generation_config', generation)):
        (folder / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')


def write_export(model, encoder, folder):
    """Write a checkpoint with its tokenizer to the folder export. The folder appears whole or not at all."""
    parent = Path(export).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as beside:
        new = Path(beside, 'new')
        model.save_pretrained(new, experts=experts or None)
        write_tokenizer(encoder, new)
        for file in ('meta.json', 'tokenizer.tiktoken'):  # for sample.py and train.py
            if (source := folder / file).exists():
                shutil.copy(source, new)
        new.replace(export)
    print(f'{export}: {model.num_parameters():,} parameters')


def main():
    for name, good, wanted in (
            ('num_samples', num_samples >= 1, 'at least 1'), ('max_new_tokens', max_new_tokens >= 1, 'at least 1'),
            ('top_k', top_k >= 0, 'at least 0'), ('context', context >= 0, 'at least 0'),
            ('seed', 0 <= seed < 2 ** 63, 'between 0 and 2 ** 63'),
            ('experts', experts in ('', 'mxfp4'), 'mxfp4 or empty'),
            ('reasoning_effort', reasoning_effort in ('low', 'medium', 'high'), 'low, medium or high')):
        if not good:
            config.fail(f'{name} is {globals()[name]!r}; it must be {wanted}')
    if export and os.path.exists(export) and not (os.path.isdir(export) and not os.listdir(export)):
        config.fail(f'{export} exists already; --export needs a new folder')
    folders = [Path(out_dir, name) for name in ('best', 'last', 'last.old', '.')]
    found = [str(folder) for folder in folders for file in ('config.json', 'adapter_config.json') if (folder / file).exists()]
    if not init_from and not found:
        config.fail(f'{out_dir} holds no checkpoint: python train.py writes one; --out_dir or --init_from name another')
    folder = find_checkpoint(init_from or found[0])
    where, kind = config.pick_device(device, 'bfloat16' if export and dtype == 'auto' else dtype)
    model, encoder, block_size = load(folder, getattr(torch, kind), where)
    torch.manual_seed(seed)  # after loading, because add_lora draws random numbers
    if export:
        return write_export(model, encoder, folder)

    def answer(prompt):
        """Yield the tokens (int) that continue a prompt, up to a stop token. Then print the speed."""
        began, stops = time.perf_counter(), stop_tokens(encoder)
        options = temperature, top_k or None, top_p, min_p, encoder.n_vocab, context or block_size or None
        tokens = model.stream(torch.tensor([prompt], device=where), max_new_tokens, *options)
        for number, token in enumerate(map(int, tokens), 1):
            if token in stops:
                break
            yield token
        print(flush=True)
        speed = f'{number / (time.perf_counter() - began):.1f} tokens/s'
        print(f'--- {number} tokens{"" if token in stops else " (max_new_tokens)"}, {speed}', file=sys.stderr)

    if chat:
        return converse(answer, encoder, context or block_size or model.config.max_position_embeddings - max_new_tokens)
    text = start
    if start.startswith('FILE:'):
        with reading(start):
            text = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8-sig')
    prompt = encode_prompt(encoder, text) or [encoder.eot_token]
    for _ in range(num_samples):
        print(text, end='', flush=True)
        show(encoder, answer(prompt))


if __name__ == '__main__':
    globals().update(config.read(__file__)[0])
    try:
        main()
    except BrokenPipeError:  # the program that reads the output has ended, as in `python sample.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, or logits that are not finite
        config.fail(error)
