"""
Convert an export to GGUF with a pre-tokenizer that you name, because llama.cpp's converter knows only those
of published vocabularies. gpt-2 is right for the tokenizer bpe. Exports with a tokenizer of tiktoken need no
such help.

    python .ci/llama_cpp_convert.py LLAMA_CPP_FOLDER gpt-2 EXPORT --outfile=FILE.gguf

The flags are those of convert_hf_to_gguf.py.
"""

import sys

if len(sys.argv) < 4:
    raise SystemExit(__doc__)
folder = sys.argv.pop(1)
pre_tokenizer = sys.argv.pop(1)
sys.path.insert(0, folder)

import convert_hf_to_gguf
from conversion.base import TextModel


def name_pre_tokenizer(self, tokenizer):
    return pre_tokenizer


TextModel.get_vocab_base_pre = name_pre_tokenizer
convert_hf_to_gguf.main()
