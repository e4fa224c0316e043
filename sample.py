"""
Continue a text with a trained model, chat with it, or export it for other programs.

    python sample.py --start="Once upon a time"                                        # the run in out/
    python sample.py --init_from=openai/gpt-oss-20b --chat --experts=mxfp4
    python sample.py --export=exported                                                 # for transformers
    python sample.py --export=story.gguf                                               # for llama.cpp
"""

import config  # first, because it sets how OpenMP waits before torch loads it
from config import check, explain_torch, fail_on

import codecs
import itertools
import json
import os
import re
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
from torch.utils._triton import has_triton

from model import (GPT, MXFP4, SLIDING, STACKS, GPTConfig, find_checkpoint, read_json, replace_checkpoint,
                   stored_tensors, write_json)
from prepare import (END, HARMONY, PATTERNS, BadInput, Chat, byte_characters, encode_prompt, load_tokenizer,
                     make_splitter, reading)

# -----------------------------------------------------------------------------
# the model
out_dir = 'out'  # a run of train.py; its best checkpoint is used or, where there is none, its last
init_from = ''  # folder or hub id of a checkpoint, in place of out_dir
base = ''  # folder or hub id of the base model of adapters; empty: the one that they name
tokenizer_from = ''  # data folder, checkpoint or name of tiktoken; empty: the tokenizer in the model's folder
experts = ''  # mxfp4: keep the matrices of the experts at four bits a value, in exports too
device = 'auto'  # auto (cuda, then mps, then cpu) or a torch device such as cuda:1
dtype = 'auto'  # bfloat16, float16, float32 or, on CUDA, tf32; auto: the first that is fast on the device
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
stop: list[str] | None = None  # a text ends before the first of these, as --stop=ox,dog or --stop="['\n']"
logprobs = False  # print a table: each token, its probability, and the five likeliest tokens in its place
compile: bool | None = None  # None: on cuda with Triton, from 2000 tokens on, or 500 with experts=mxfp4
# chat
chat = False  # every line of input is a message of the user; needs a model with the chat tokens of gpt-oss
system = ''  # instructions that come first
tools = ''  # JSON file with a list of functions that the model can call
reasoning_effort = 'medium'  # low, medium or high
# export
export = ''  # folder, or FILE.gguf for llama.cpp, to write the model to, adapters merged; auto is bfloat16
# -----------------------------------------------------------------------------
BATCH = 8  # texts that are drawn together; GPT.stream captures CUDA graphs of at most 8


def main():
    check_settings()
    if export.lower().endswith('.gguf'):
        with fail_on(ImportError, '; pip install -U gguf'):
            from gguf.quants import MXFP4 as _  # versions before gpt-oss have none
    folders = [Path(out_dir, name) for name in ('best', 'last', 'last.old', '.')]
    found = [folder for folder in folders if any(folder.glob('*config.json'))]
    check(init_from or found, f'{out_dir} holds no checkpoint: python train.py writes one; '
                              '--out_dir or --init_from name another')
    place, precision = config.pick_device(device, 'bfloat16' if export and dtype == 'auto' else dtype)
    with fail_on(ValueError):
        folder = find_checkpoint(init_from or found[0])
        merges = (folder / 'adapter_config.json').exists() and (export or not experts)
        expert_format = None if merges else experts or None  # save_pretrained packs merged experts
        model = GPT.from_pretrained(folder, getattr(torch, precision), place, expert_format, base or None)
        meta = read_json(folder / 'meta.json') if (folder / 'meta.json').exists() else {}
        encoder = load_encoder(folder, model.config.vocab_size)
    if merges:
        model.merge_lora()
    window = context or meta.get('block_size') or 0  # 0: unknown
    check(window in range(2 ** 31), f'{folder}/meta.json: block_size is {window!r:.99}')
    torch.manual_seed(seed)  # after loading, because add_lora draws random numbers
    if export:
        write_export(model, encoder, folder)
    elif chat:
        longest = model.config.max_position_embeddings - max_new_tokens
        check(longest > 0, f'max_new_tokens ({max_new_tokens}) leaves no room for a prompt')
        converse(ChatCache(model, encoder, window).answer, encoder, min(window or longest, longest))
    else:
        print_samples(model, encoder, window)


def check_settings():
    allowed = dict(num_samples=range(1, 2 ** 31), max_new_tokens=range(1, 2 ** 31), context=range(2 ** 31),
                   top_k=range(2 ** 31), seed=range(-2 ** 63, 2 ** 64), experts=('', 'mxfp4'),
                   reasoning_effort=('low', 'medium', 'high'))
    for name, values in allowed.items():
        value = globals()[name]
        check(value in values, f'{name} is {value!r:.99}; it must be in {values}')
    check(chat or export or not system + tools, 'system and tools are for a chat; add --chat')
    check(all(stop or []), 'stop has an empty string, which would end every text at once')
    check(not (chat and export), 'chat and export are two tasks; give one of them')
    for_texts = stop or logprobs or num_samples > 1
    check(not (chat and for_texts), 'a chat takes no stop, logprobs or num_samples; leave out --chat')
    is_free = not os.path.exists(export)
    if os.path.isdir(export) and not export.lower().endswith('.gguf'):
        is_free = not os.listdir(export)
    check(is_free, f'{export} exists already; --export needs a new name or an empty folder')


def load_encoder(folder, vocab_size):
    """The tokenizer that tokenizer_from names, or else that of the checkpoint. Raises ValueError."""
    if tokenizer_from or (folder / 'meta.json').exists():
        return load_tokenizer(tokenizer_from or folder)
    if vocab_size == 201088:
        return load_tokenizer('o200k_harmony')
    return read_tokenizer(folder / 'tokenizer.json')


def read_tokenizer(path):
    """The encoding in a tokenizer.json of an export, which other programs keep. Raises ValueError."""
    with reading(path, '; --tokenizer_from names data or a checkpoint that has the tokenizer'):
        from tokenizers import Tokenizer
        raw = json.loads(Tokenizer.from_file(str(path)).to_str())
        byte_of = {character: byte for byte, character in byte_characters().items()}
        ranks = {bytes(map(byte_of.get, token)): rank for token, rank in raw['model']['vocab'].items()}
        pattern = raw['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
        special = {token['content']: token['id'] for token in raw['added_tokens']}
        name = 'bpe'
        if pattern == PATTERNS['char']:  # which is that of byte too
            name = 'byte' if b'\xff' in ranks else 'char'
        encoder = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        again = json.loads(convert_tokenizer(encoder).to_str())
        if any(raw[key] != again[key] for key in ('model', 'normalizer', 'pre_tokenizer')):
            raise ValueError('it is not the tokenizer of an export')
        return encoder


def print_samples(model, encoder, window):
    """Print the texts that continue `start`: a single one as it is drawn, several after their batch."""
    text = start
    with fail_on(ValueError):
        if start.startswith('FILE:'):
            with reading(start):
                text = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8-sig')
        prompt = encode_prompt(encoder, text) or [encoder.eot_token]
    for first in range(0, num_samples, BATCH):
        rows = [[] for _ in range(min(BATCH, num_samples - first))]
        drawn = draw_rows(model, encoder, window, prompt, rows)
        if is_live():
            print(text, end='', flush=True)
            show(encoder, drawn)
        else:
            list(drawn)
            for row in rows:
                print(text + decode_row(encoder, row))
        if logprobs:
            for row in rows:
                print_probabilities(model, encoder, window, prompt, row)


def is_live():
    """Whether tokens are printed as they are drawn."""
    return chat or num_samples == 1 and not stop


def draw_rows(model, encoder, window, prompt, rows, **cached):
    """Continue a prompt once for each list in rows, to which the tokens are appended, up to a stop token or a
    stop string. Yield the first row's tokens, without a stop token. Then print the speed."""
    began = time.perf_counter()
    stops = stop_tokens(encoder)
    idx = torch.tensor([prompt] * len(rows), device=model.lm_head.weight.device)
    # An uncompiled step copies the chosen experts of every text, so texts count, not steps.
    pays = idx.is_cuda and num_samples * max_new_tokens >= (500 if experts else 2000) and has_triton()
    gaps = find_gaps(encoder, model.config.vocab_size)
    tokens = model.stream(idx, max_new_tokens, temperature, top_k or None, top_p, min_p, encoder.n_vocab,
                          window or None, pays if compile is None else compile, gaps, **cached)
    ended = set()
    try:
        with fail_on(ValueError):  # a setting or the prompt is out of range
            for drawn in tokens:
                for i, token in enumerate(drawn.tolist()):
                    if i in ended:
                        continue
                    rows[i].append(token)
                    if token in stops or any(string in encoder.decode(rows[i]) for string in stop or []):
                        ended.add(i)
                    if i == 0 and token not in stops:
                        yield token
                if len(ended) == len(rows):
                    break
    except RuntimeError as error:
        check('probability tensor' not in str(error), f'the model is damaged or needs another dtype: {error}')
        raise
    seconds = time.perf_counter() - began
    count = sum(map(len, rows))
    reason = '' if len(ended) == len(rows) else ' (max_new_tokens)'
    if is_live():
        print(flush=True)
    print(f'--- {count} tokens{reason}, {count / seconds:.1f} tokens/s', file=sys.stderr)


@cache
def find_gaps(encoder, vocab_size):
    """Tokens below n_vocab that have no text, as in o200k_harmony. They are never drawn."""
    known = {*encoder._mergeable_ranks.values(), *encoder._special_tokens.values()}
    return sorted({*range(min(encoder.n_vocab, vocab_size))} - known)


def stop_tokens(encoder):
    """The tokens that end a continuation: end of text and, in a chat, end of turn and call of a tool."""
    names = [name for name in (END, '<|return|>', '<|call|>') if name in encoder.special_tokens_set]
    return [encoder.encode_single_token(name) for name in names]


def show(encoder, tokens):
    """Print the text of tokens as they come, and return it. Incomplete characters wait for the next token."""
    text = ''
    for piece in codecs.iterdecode(map(encoder.decode_single_token_bytes, tokens), 'utf-8', 'replace'):
        print(piece, end='', flush=True)
        text += piece
    return text


def decode_row(encoder, row):
    """The text of tokens, without a stop token and what follows a stop string."""
    text = encoder.decode(row[:-1] if row[-1] in stop_tokens(encoder) else row)
    for string in stop or []:
        text = text.partition(string)[0]
    return text


@torch.no_grad()
def print_probabilities(model, encoder, window, prompt, row):
    """Print the probability of each token, and the likeliest tokens in its place, at temperature 1."""
    model.eval()  # without dropout
    parts = [prompt[-window:], *([token] for token in row[:-1])]  # a window of 0 keeps all
    parts = [torch.tensor([part], device=model.lm_head.weight.device) for part in parts]
    caches = model.make_caches(parts[0], min(window or 2 ** 31, len(prompt) + len(row)))
    logits = torch.cat([model.next_logits(part, caches) for part in parts])[:, :encoder.n_vocab]
    gaps = find_gaps(encoder, model.config.vocab_size)
    logits[:, gaps] = -torch.inf
    probabilities = logits.float().softmax(-1)
    likeliest = probabilities.topk(min(5, logits.size(1) - len(gaps)))
    for token, p, best, likely in zip(row, probabilities, *likeliest):
        pairs = zip(likely.tolist(), best.tolist())
        others = [f'{encoder.decode([other])!r} {chance:.3f}' for other, chance in pairs]
        print(f'{encoder.decode([token])!r:20} {p[token]:.3f}   {"  ".join(others)}')


class ChatCache:
    """Keys and values of a chat. A prompt that begins with the one before goes on from its caches."""

    def __init__(self, model, encoder, window):
        self.model = model
        self.encoder = encoder
        self.window = window
        self.prompt = []  # which the caches hold, before its answer
        self.caches = []
        self.rings = []  # copies of those of sliding layers, in which the answer replaces the prompt

    def answer(self, prompt):
        """Yield the tokens that continue a prompt, up to a stop token."""
        kept = self.find_kept(prompt)
        row = []
        cached = dict(caches=self.caches, kept=kept)
        for token in draw_rows(self.model, self.encoder, self.window, prompt, [row], **cached):
            if len(row) == 1:
                self.prompt = prompt
                self.rings = [(ring.k.clone(), ring.v.clone()) for ring in self.sliding()]
            yield token

    def find_kept(self, prompt):
        """How many tokens of a prompt the caches hold. If they are too small for it, they are made anew."""
        longest = self.window or self.model.config.max_position_embeddings
        needed = min(len(prompt) + max_new_tokens, longest)
        fits = self.caches and needed <= self.size and self.caches[0].position.item() <= self.size
        if fits and self.prompt == prompt[:len(self.prompt)] != prompt:
            for ring, (k, v) in zip(self.sliding(), self.rings):
                ring.k.copy_(k)
                ring.v.copy_(v)
            return len(self.prompt)
        self.prompt = []
        self.rings = []
        self.size = min(longest, 2 ** needed.bit_length())
        idx = torch.tensor([prompt], device=self.model.lm_head.weight.device)
        self.caches = self.model.make_caches(idx, self.size)
        return 0

    def sliding(self):
        """The caches of sliding layers, which are rings."""
        pairs = zip(self.caches, self.model.config.layer_types)
        return [ring for ring, layer_type in pairs if layer_type == SLIDING]


def converse(answer, encoder, longest):
    """Read messages and print answers until the input ends. The line after a call is the tool's result."""
    check(encoder.special_tokens_set.issuperset(HARMONY),
          f'the tokenizer {encoder.name} has no <|start|>; fine-tune a model on chats (README, Fine-tune)')
    messages = [dict(role='system', content=system)] if system else []
    with fail_on(ValueError), reading('system or tools'):
        functions = json.loads(Path(tools).read_text(encoding='utf-8-sig')) if tools else None
        Chat(messages, functions).prompt(encoder)  # raises for functions of a wrong form
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '').strip('\ufeff \t\r\n')
        except EOFError:
            return
        if line:
            role = 'tool' if messages and 'tool_calls' in messages[-1] else 'user'
            line.encode()  # raises for hidden bytes, as they are in the locale C
            messages.append(dict(role=role, content=line))
            try:
                prompt = make_prompt(messages, functions, encoder, longest)
                messages += print_answer(answer(prompt), encoder)
            except BadInput as error:
                print(f'(the message is left out: {error!s:.300})', file=sys.stderr)
                messages.pop()


def make_prompt(messages, functions, encoder, longest):
    """The token ids of a chat. Oldest turns are removed if it exceeds `longest`. Raises BadInput."""
    while True:
        prompt = Chat(messages, functions).prompt(encoder, reasoning_effort)
        if len(prompt) <= longest:
            return prompt
        users = [i for i, message in enumerate(messages) if message['role'] == 'user']
        if len(users) == 1:
            raise BadInput(f'{len(prompt)} tokens are more than {longest}')
        print(f'(the oldest turn is left out: the chat has more than {longest} tokens)', file=sys.stderr)
        del messages[users[0]:users[1]]


def print_answer(tokens, encoder):
    """Print the messages of an answer, each under its channel and the tool that it calls, and return them."""
    content_begins = encoder.encode_single_token('<|message|>')
    content_ends = encoder.encode_single_token('<|end|>')
    messages = []
    header = []  # the tokens before the content of a message
    for token in itertools.chain(tokens, [content_ends]):
        if token not in (content_begins, content_ends):
            header.append(token)
            continue
        head = encoder.decode(header)
        header = []
        if token == content_ends:
            print(head, end='\n' if head else '')
            text = re.split(r'<\||^ to=', head)[0]  # without a header
            messages += [dict(role='assistant', content=text)] if text else []
            continue
        fields = dict(re.findall(r'(<\|channel\|>|<\|constrain\|>| to=| )([^\s<]+)', head))
        channel = fields.get('<|channel|>', 'final')
        recipient = fields.get(' to=', 'all')
        calls = recipient not in ('all', 'user', 'assistant')
        name = recipient.removeprefix('functions.')
        print(f'[{channel} to {name}]' if calls else f'[{channel}]')
        text = show(encoder, iter(partial(next, tokens), content_ends))  # up to <|end|>
        print()
        known = channel in ('analysis', 'commentary')
        message = dict(role='assistant', channel=channel if known else 'final')
        if calls:
            kind = fields.get('<|constrain|>', fields.get(' ', ''))
            call = dict(name=name, recipient=recipient, content_type=kind, arguments=text)
            message['tool_calls'] = [call | dict(constrain='<|constrain|>' in fields)]
        else:
            message['content'] = text
        messages.append(message)
    return messages


def write_export(model, encoder, folder):
    """Write a model with its tokenizer to the folder or file export, which appears whole or not at all."""
    shape = model.config
    check(encoder.n_vocab <= shape.vocab_size,
          f'the tokenizer has {encoder.n_vocab} tokens, more than vocab_size ({shape.vocab_size})')
    if shape.tie_word_embeddings:  # some programs cannot load a tied head, others leave it random
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        shape.tie_word_embeddings = False
    to_gguf = export.lower().endswith('.gguf')
    if to_gguf:
        write_gguf(model, encoder)
    else:
        with replace_checkpoint(export) as new:
            with fail_on(ValueError):  # weights that MXFP4 cannot hold
                model.save_pretrained(new, experts=experts or None)
            write_tokenizer(encoder, new)
            files = [Path(tokenizer_from or folder, name) for name in ('meta.json', 'tokenizer.tiktoken')]
            for file in filter(Path.exists, files):  # for sample.py and train.py
                shutil.copy(file, new)
    print(f'{export}: {model.num_parameters():,} parameters')
    usual = GPTConfig(num_hidden_layers=shape.num_hidden_layers)
    for programs, names in (('llama.cpp, vLLM and mlx-lm', ('layer_types', 'swiglu_limit')),
                            ('llama.cpp', ('rope_beta_fast', 'rope_beta_slow'))):
        ignored = [name for name in names if getattr(shape, name) != getattr(usual, name)]
        if ignored:
            print(f'wrong outputs in {programs}, without support for {" and ".join(ignored)}')
    stretched = shape.rope_factor * shape.rope_original_max_position_embeddings
    if stretched != shape.max_position_embeddings and not to_gguf:
        print('transformers 4.55 computes wrong outputs: it replaces rope_factor by the ratio of contexts')
    if encoder.name in ('byte', 'char'):
        print(f'llama.cpp does not read the tokenizer {encoder.name}; bpe and those of tiktoken work there')


def write_tokenizer(encoder, folder):
    """Write tokenizer.json and its configurations for transformers, and add ids of tokens to config.json."""
    text = convert_tokenizer(encoder).to_str(pretty=True)
    (folder / 'tokenizer.json').write_bytes(text.encode())  # save() raises no OSError on a full disk
    end = END
    if '<|start|>' in encoder.special_tokens_set:
        end = '<|return|>'
        shutil.copy(config.ROOT / 'config/chat_template.jinja', folder)
    options = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                   eos_token=end, pad_token=END)
    options['model_input_names'] = ['input_ids', 'attention_mask']  # transformers 4.57 adds types otherwise
    write_json(folder / 'tokenizer_config.json', options)
    ids = dict(eos_token_id=encoder.encode_single_token(end), pad_token_id=encoder.eot_token)
    write_json(folder / 'config.json', read_json(folder / 'config.json') | ids)
    ids |= dict(do_sample=True, eos_token_id=stop_tokens(encoder))
    write_json(folder / 'generation_config.json', ids)


def convert_tokenizer(encoder):
    """The tokenizer of the package tokenizers that equals an encoding of tiktoken."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    ranks = encoder._mergeable_ranks
    characters = byte_characters()
    written = {token: ''.join(map(characters.get, token)) for token in ranks}
    special = {number: name for name, number in reversed(encoder._special_tokens.items())}  # first name wins
    others = sorted({*range(encoder.n_vocab)} - {*ranks.values()})
    names = {special.get(i, f'<|unused_{i}|>'): i for i in others}
    vocabulary = {written[token]: ranks[token] for token in ranks}
    last = max(ranks.values())
    vocabulary |= {name: i for name, i in names.items() if i < last}  # p50k_base has a gap
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [(written[a], written[b]) for a, b in pairs if a in ranks and b in ranks]
    bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([make_splitter(encoder), spell])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in names])  # numbered in this order
    return bpe


# --- GGUF, the file of llama.cpp ----------------------------------------------------------------------------
# llama.cpp's name of a pattern that cuts text into words, by a part of the pattern; the first match wins
SPLITTERS = {r'\p{Lu}': 'gpt-4o', r'\p{N}{1,3}': 'dbrx', r' ?\p{L}+': 'gpt-2'}
GGML_TYPES = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16', torch.uint8: 'MXFP4'}
pack = cache(MXFP4.pack)  # it is slow


def write_gguf(model, encoder):
    """Write the file export. Tensors are converted twice, so that only one at a time is in both forms."""
    from gguf import GGUFWriter
    metadata = gguf_metadata(model, encoder)
    file = Path(export).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=file.name) as folder:
        new = Path(folder, 'new')
        writer = GGUFWriter(new, 'gpt-oss')
        for name, value in metadata.items():
            getattr(writer, f'add_{name}')(value)
        with fail_on(ValueError):  # weights that MXFP4 cannot hold
            for name, array, kind in gguf_tensors(model):
                writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
        with fail_on(OSError, f'; is there space for {export}?'):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, array, _ in gguf_tensors(model):
                writer.write_tensor_data(array)
            writer.close()
        with open(new, 'r+b') as stream:
            os.fsync(stream.fileno())
        new.rename(file)


def gguf_metadata(model, encoder):
    """What llama.cpp reads beside the tensors, by the names of GGUFWriter's methods."""
    from gguf import RopeScalingType, TokenType
    splitters = [name for part, name in SPLITTERS.items() if part in encoder._pat_str]
    check(splitters, f'llama.cpp does not read the tokenizer {encoder.name}; bpe and those of tiktoken work')
    c = model.config
    raw = json.loads(convert_tokenizer(encoder).to_str())
    tokens = {i: (f'<|unused_{i}|>', TokenType.UNUSED) for i in range(c.vocab_size)}
    for token, i in raw['model']['vocab'].items():
        tokens[i] = token, TokenType.NORMAL
    for token in raw['added_tokens']:
        tokens[token['id']] = token['content'], TokenType.CONTROL
    texts, kinds = zip(*tokens.values())
    end = encoder.eot_token
    found = dict(
        tokenizer_model='gpt2', tokenizer_pre=splitters[0], token_list=texts, token_types=kinds,
        token_merges=list(map(' '.join, raw['model']['merges'])), add_bos_token=False,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, name=Path(export).stem,
        block_count=c.num_hidden_layers, embedding_length=c.hidden_size,
        context_length=c.max_position_embeddings, layer_norm_rms_eps=c.rms_norm_eps,
        head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
        key_length=c.head_dim, value_length=c.head_dim, sliding_window=c.sliding_window,
        expert_count=c.num_local_experts, expert_used_count=c.num_experts_per_tok,
        feed_forward_length=c.intermediate_size,
        expert_feed_forward_length=c.intermediate_size,
        rope_freq_base=c.rope_theta, rope_scaling_type=RopeScalingType.YARN,
        rope_scaling_factor=c.rope_factor,
        rope_scaling_orig_ctx_len=c.rope_original_max_position_embeddings,
        rope_scaling_yarn_beta_fast=c.rope_beta_fast,
        rope_scaling_yarn_beta_slow=c.rope_beta_slow)
    types = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # 38: MXFP4
    found['file_type'] = 38 if experts else types[model.lm_head.weight.dtype]
    if '<|start|>' in encoder.special_tokens_set:
        found['eos_token_id'] = encoder.encode_single_token('<|return|>')
        template = Path(config.ROOT, 'config/chat_template.jinja')
        found['chat_template'] = template.read_text(encoding='utf-8')
    return found


def gguf_tensors(model):
    """Yield (name, bytes, type). There, matrices of experts are (E, out, in), and gate and up are apart."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    names = get_tensor_name_map(MODEL_ARCH.GPT_OSS, model.config.num_hidden_layers)
    for name, tensor in stored_tensors(model).items():
        if name.endswith(STACKS):
            tensor = ggml_blocks(pack(tensor)) if experts else tensor.mT
        suffix = '.bias' if name.endswith('bias') else '.weight'
        if tensor.dim() == 1 or 'router' in name or suffix == '.bias':
            tensor = tensor.float()  # llama.cpp takes no other type
        parts = dict(gate_up=tensor)
        if 'gate_up' in name:  # they alternate
            parts = dict(gate=tensor[:, 0::2], up=tensor[:, 1::2])
        for part, tensor in parts.items():
            stem = re.sub('[._](weight|bias)$', '', name.replace('gate_up', part))
            kind = GGMLQuantizationType[GGML_TYPES[tensor.dtype]]
            tensor = tensor.detach().cpu().contiguous()
            yield names.get_name(stem) + suffix, tensor.view(torch.uint8).numpy(), kind


def ggml_blocks(packed):
    """The bytes of an MXFP4 as ggml has them, (E, out, in / 32 * 17): for 32 values the scale, then 16 bytes
    with value i in the low and value i + 16 in the high nibble."""
    values = torch.stack((packed.blocks & 15, packed.blocks >> 4), dim=-1).flatten(-2)
    low, high = values.chunk(2, dim=-1)
    return torch.cat((packed.scales[..., None], low | high << 4), dim=-1).flatten(-2)


if __name__ == '__main__':
    globals().update(config.read(__file__)[0])
    try:
        with explain_torch('try --experts=mxfp4, --dtype=bfloat16 or a smaller --context'):
            main()
    except BrokenPipeError:  # the program that reads the output has ended, as in `python sample.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UnicodeError as error:
        config.fail(f'input or output: {error}; PYTHONIOENCODING names their encoding')
    except (OSError, ImportError) as error:
        config.fail(error)
