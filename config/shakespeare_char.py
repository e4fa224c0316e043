"""
Tiny Shakespeare by character on one GPU, with the settings of nanoGPT's config/train_shakespeare_char.py:

    python prepare.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py
    python sample.py config/shakespeare_char.py
"""

dataset = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
tokenizer = 'char'
data_dir = 'data/shakespeare_char'
out_dir = 'out-shakespeare-char'
start = '\n'

batch_size = 64
block_size = 256
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 64
sliding_window = 128
hidden_size = 384
intermediate_size = 384  # two of 8 experts: a token meets fewer parameters than in nanoGPT
dropout = 0.2

max_iters = 2000  # of nanoGPT's 5000, the most of which it spends on overfitting
learning_rate = 4e-3
warmup_iters = 100
eval_interval = 200
eval_iters = 0  # the whole validation set
