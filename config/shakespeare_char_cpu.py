"""
Tiny Shakespeare by character on a CPU: 2000 steps of 12 x 64 characters and 4 layers of width 128, as in nanoGPT's README.

    python prepare.py config/shakespeare_char_cpu.py
    python train.py config/shakespeare_char_cpu.py
    python sample.py config/shakespeare_char_cpu.py
"""

dataset = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
tokenizer = 'char'
data_dir = 'data/shakespeare_char'
out_dir = 'out-shakespeare-char-cpu'
start = '\n'

batch_size = 12
block_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
hidden_size = 128
intermediate_size = 96  # 518 thousand active parameters; nanoGPT's dense model has 804 thousand

max_iters = 2000
eval_interval = 500
eval_iters = 0  # the whole validation set
dtype = 'float32'  # matrices this small gain nothing from bf16
