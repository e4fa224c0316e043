"""
Continue a text with a trained model, printed as it is drawn:

    python sample.py --start="Once upon a time"
    python sample.py --init_from=openai/gpt-oss-20b --start=FILE:prompt.txt --temperature=0
"""

import config  # first, for it makes Ctrl-C quiet

import codecs
import json
import sys
import time
from pathlib import Path

import torch

from bench import pick_device
from model import GPT
from prepare import encode_prompt, encoding, load_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out'  # a run of train.py; its best checkpoint speaks, or its last where there is no best
init_from = ''  # the folder or hub id of a checkpoint, instead of out_dir
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
# -----------------------------------------------------------------------------


def load(path, dtype, device):
    """The model of a checkpoint; its tokenizer, gpt-oss's if none is beside it; the block it was trained on."""
    model, meta = GPT.from_pretrained(path, dtype, device), Path(path, 'meta.json')
    if meta.exists():
        return model, load_tokenizer(path), json.loads(meta.read_text()).get('block_size')
    if model.config.vocab_size == 201088:
        return model, encoding('o200k_harmony'), None
    raise ValueError(f'{path} has no meta.json, so its tokenizer is unknown; '
                     'copy meta.json (and tokenizer.tiktoken) from its data')


def main():
    folders = (Path(out_dir, d) for d in ('best', 'last', 'last.old', '.'))
    path = init_from or next((str(p) for p in folders if (p / 'config.json').exists()), None)
    if path is None:
        config.fail(f'{out_dir} holds no checkpoint; train one with python train.py, or name another with '
                    '--out_dir or --init_from')
    for key, good in (('num_samples', num_samples >= 1), ('max_new_tokens', max_new_tokens >= 1),
                      ('top_k', top_k >= 0), ('context', context >= 0), ('seed', 0 <= seed < 2 ** 63)):
        if not good:
            config.fail(f'{key} is {globals()[key]}; num_samples and max_new_tokens are at least 1, '
                        'top_k and context at least 0')
    where, kind = pick_device(device, dtype)
    torch.manual_seed(seed)
    model, encoder, block_size = load(path, getattr(torch, kind), where)
    options = temperature, top_k or None, top_p, min_p, encoder.n_vocab, context or block_size
    text = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8') if start.startswith('FILE:') else start
    prompt = encode_prompt(encoder, text) or [encoder.eot_token]
    ends = {encoder.eot_token} | (
        {200002, 200012} if encoder.name == 'o200k_harmony' else set())  # and return, call
    idx = torch.tensor([prompt], device=where)
    for _ in range(num_samples):
        # A token may end within a character, so an incremental decoder holds incomplete bytes back.
        utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        print(text, end='', flush=True)
        began, drawn = time.perf_counter(), 0
        for token in model.stream(idx, max_new_tokens, *options):
            drawn += 1
            if token.item() in ends:
                break
            print(utf8.decode(encoder.decode_single_token_bytes(token.item())), end='', flush=True)
        print(utf8.decode(b'', final=True))
        print(f'--- {drawn} tokens, {drawn / (time.perf_counter() - began):.1f} tokens/s', file=sys.stderr)


if __name__ == '__main__':
    settings, _ = config.read(__file__)
    globals().update(settings)
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, or logits that are not finite
        config.fail(error)
