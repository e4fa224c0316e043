"""
Continue a text with a trained model, chat with it, or export it for other programs.

    python sample.py --start="Once upon a time"                                        # the run in out/
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

import tiktoken
import torch
from torch.utils._triton import has_triton

from model import GPT, GPTConfig, find_checkpoint, read_json, write_json
from prepare import END, HARMONY, PATTERNS, Chat, byte_characters, encode_prompt, load_tokenizer, reading

# -----------------------------------------------------------------------------
# the model
out_dir = 'out'  # a run of train.py; its best checkpoint is used or, where there is none, its last
init_from = ''  # folder or hub id of a checkpoint, in place of out_dir
tokenizer_from = ''  # data folder, checkpoint or name of tiktoken; empty: the tokenizer in the model's folder
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
compile: bool | None = None  # takes a minute; None: on cuda with Triton, if num_samples * max_new_tokens >= 2000
# chat
chat = False  # every line of input is a message of the user; needs a model with the chat tokens of gpt-oss
system = ''  # instructions that come first
tools = ''  # JSON file with a list of functions that the model can call
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
    meta = folder / 'meta.json'
    block_size = int(read_json(meta).get('block_size') or 0) if meta.exists() else 0
    if tokenizer_from or meta.exists():
        return model, load_tokenizer(tokenizer_from or folder), block_size
    if model.config.vocab_size == 201088:
        return model, load_tokenizer('o200k_harmony'), block_size
    return model, read_tokenizer(folder / 'tokenizer.json'), block_size


def read_tokenizer(path):
    """The encoding in a tokenizer.json that comes from an export, in a folder that another program wrote."""
    with reading(path, '; --tokenizer_from names data or a checkpoint that has the tokenizer'):
        from tokenizers import Tokenizer
        raw, byte_of = json.loads(Tokenizer.from_file(str(path)).to_str()), {c: b for b, c in byte_characters().items()}
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in raw['model']['vocab'].items()}
        pattern = raw['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
        name = 'bpe' if pattern != PATTERNS['char'] else 'byte' if b'\xff' in ranks else 'char'
        special = {token['content']: token['id'] for token in raw['added_tokens']}
        encoder = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        again = json.loads(tokenizer_json(encoder).to_str())
        if any(raw[key] != again[key] for key in ('model', 'normalizer', 'pre_tokenizer')):
            raise ValueError('it is not the tokenizer of an export')
        return encoder


def stop_tokens(encoder):
    """The tokens that end a continuation: end of text and, in a chat, the end of a turn or a call of a tool."""
    return [encoder.encode_single_token(token) for token in (END, '<|return|>', '<|call|>')
            if token in encoder.special_tokens_set]


def show(encoder, tokens):
    """Print the text of tokens as they come, and return it. Bytes of an incomplete character wait for the next."""
    text = ''
    for piece in codecs.iterdecode(map(encoder.decode_single_token_bytes, tokens), 'utf-8', 'replace'):
        print(piece, end='', flush=True)
        text += piece
    return text


def converse(answer, encoder, longest):
    """Read messages and print the answers, each channel under its name, until the input ends. The line after a call is
    the result of the tool. Where the chat has more than `longest` tokens, its oldest turns are left out."""
    if missing := [token for token in HARMONY if token not in encoder.special_tokens_set]:
        config.fail(f'the tokenizer {encoder.name} has no {missing[0]}; fine-tune a model on chats (README, Fine-tune)')
    message, end = map(encoder.encode_single_token, ('<|message|>', '<|end|>'))
    messages = [dict(role='system', content=system)] if system else []
    with reading(tools):
        functions = json.loads(Path(tools).read_text(encoding='utf-8-sig')) if tools else None
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '').strip('\ufeff \t\r\n')
        except EOFError:
            return
        if not line:
            continue
        messages.append(dict(role='tool' if messages and 'tool_calls' in messages[-1] else 'user', content=line))
        prompt, oldest = Chat(messages, functions).prompt(encoder, reasoning_effort), int(bool(system))
        while len(prompt) > longest and len(users := [i for i, m in enumerate(messages) if m['role'] == 'user']) > 1:
            del messages[oldest:users[1]]
            prompt = Chat(messages, functions).prompt(encoder, reasoning_effort)
            print(f'(the oldest turn is left out: the chat has more than {longest} tokens)', file=sys.stderr)
        if len(prompt) > longest:
            messages.pop()
            print(f'(the message is left out: {len(prompt)} tokens are more than {longest})', file=sys.stderr)
            continue
        tokens, header = answer(prompt), []  # header: what comes before the content of a message
        for token in tokens:
            header.append(token)
            if token != message:
                continue
            head, header = encoder.decode(header).rpartition('<|start|>')[2], []
            channel = (re.findall(r'<\|channel\|>(\w+)', head) or ['final'])[0]
            call = re.search(r' to=functions\.([\w.-]+)', head)
            print(f'[{channel}{" to " + call[1] if call else ""}]')
            text = show(encoder, itertools.takewhile(lambda token: token != end, tokens))
            print()
            if call:
                messages.append(dict(role='assistant', tool_calls=[dict(name=call[1], arguments=text)]))
            elif channel in ('analysis', 'commentary', 'final'):
                messages.append(dict(role='assistant', channel=channel, content=text))
        print(encoder.decode(header), end='')  # of a message without content


def tokenizer_json(encoder):
    """The tokenizer of the package tokenizers that equals an encoding of tiktoken."""
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
    return bpe


def write_tokenizer(encoder, folder):
    """Write tokenizer.json and its configurations for transformers, and add the ids of tokens to config.json."""
    tokenizer_json(encoder).save(str(folder / 'tokenizer.json'))
    options = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, eos_token=END,
                   pad_token=END, model_input_names=['input_ids', 'attention_mask'])  # 4.57 adds types otherwise
    if '<|start|>' in encoder.special_tokens_set:
        options['eos_token'] = '<|return|>'
        shutil.copy(config.ROOT / 'config/chat_template.jinja', folder)
    generation = dict(do_sample=True, eos_token_id=stop_tokens(encoder), pad_token_id=encoder.eot_token)
    ids = dict(eos_token_id=encoder.encode_single_token(options['eos_token']), pad_token_id=encoder.eot_token)
    write_json(folder / 'tokenizer_config.json', options)
    write_json(folder / 'generation_config.json', generation)
    write_json(folder / 'config.json', read_json(folder / 'config.json') | ids)


def write_export(model, encoder, folder):
    """Write a checkpoint with its tokenizer to the folder export. The folder appears whole or not at all."""
    if model.config.tie_word_embeddings:  # other programs want a head of its own: some fail, some leave it random
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    if encoder.n_vocab > model.config.vocab_size:
        config.fail(f'the tokenizer has {encoder.n_vocab} tokens, more than vocab_size ({model.config.vocab_size})')
    parent = Path(export).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as beside:
        new = Path(beside, 'new')
        model.save_pretrained(new, experts=experts or None)
        write_tokenizer(encoder, new)
        for file in ('meta.json', 'tokenizer.tiktoken'):  # for sample.py and train.py
            if (source := Path(tokenizer_from or folder) / file).exists():
                shutil.copy(source, new)
        new.replace(export)
    print(f'{export}: {model.num_parameters():,} parameters')
    usual = GPTConfig(num_hidden_layers=model.config.num_hidden_layers)
    if (model.config.layer_types, model.config.swiglu_limit) != (usual.layer_types, usual.swiglu_limit):
        print('llama.cpp, vLLM and mlx-lm compute wrong outputs: they ignore layer_types and swiglu_limit')
    if encoder.name in ('byte', 'char'):
        print(f'llama.cpp does not read the tokenizer {encoder.name}; bpe and those of tiktoken work there')


def main():
    for name, good, wanted in (
            ('max_new_tokens', max_new_tokens >= 1, 'at least 1'), ('context', context >= 0, 'at least 0'),
            ('experts', experts in ('', 'mxfp4'), 'mxfp4 or empty'),
            ('reasoning_effort', reasoning_effort in ('low', 'medium', 'high'), 'low, medium or high')):
        if not good:
            config.fail(f'{name} is {globals()[name]!r}; it must be {wanted}')
    if export and os.path.exists(export) and not (os.path.isdir(export) and not os.listdir(export)):
        config.fail(f'{export} exists already; --export needs a new folder')
    folders = [Path(out_dir, name) for name in ('best', 'last', 'last.old', '.')]
    found = [str(folder) for folder in folders if [*folder.glob('*config.json'), *folder.glob('adapter.json')]]
    if not init_from and not found:
        config.fail(f'{out_dir} holds no checkpoint: python train.py writes one; --out_dir or --init_from name another')
    folder = find_checkpoint(init_from or found[0])  # refuses adapter.json, the format of the past
    where, kind = config.pick_device(device, 'bfloat16' if export and dtype == 'auto' else dtype)
    model, encoder, block_size = load(folder, getattr(torch, kind), where)
    pays = where.startswith('cuda') and has_triton() and num_samples * max_new_tokens >= 2000
    torch.manual_seed(seed)  # after loading, because add_lora draws random numbers
    if export:
        return write_export(model, encoder, folder)

    def answer(prompt):
        """Yield the tokens (int) that continue a prompt, up to a stop token. Then print the speed."""
        began, stops, idx = time.perf_counter(), stop_tokens(encoder), torch.tensor([prompt], device=where)
        options = temperature, top_k or None, top_p, min_p, encoder.n_vocab, context or block_size or None
        tokens = model.stream(idx, max_new_tokens, *options, pays if compile is None else compile)
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
