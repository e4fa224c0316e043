"""
Tiny Shakespeare by character on a CPU, with the settings of nanoGPT's README for one: 2000 steps of 12 x 64 characters.

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
intermediate_size = 128
dropout = 0.0
initializer_range = 0.02

max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
lr_schedule = 'cosine'
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
eval_iters = 20
