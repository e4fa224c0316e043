"""
Convert an export to GGUF with a pre-tokenizer that you name, because llama.cpp's converter knows those of published
vocabularies alone. gpt-2 is right for the tokenizer bpe. Exports with a tokenizer of tiktoken need no such help.

    python .ci/llama_cpp_convert.py LLAMA_CPP_FOLDER gpt-2 EXPORT --outfile=FILE.gguf

The flags are those of convert_hf_to_gguf.py.
"""

import sys

if len(sys.argv) < 4:
    raise SystemExit(__doc__)
folder, pre_tokenizer = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, folder)

import convert_hf_to_gguf
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
convert_hf_to_gguf.main()
