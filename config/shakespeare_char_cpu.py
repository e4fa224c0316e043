"""
Tiny Shakespeare by character on a CPU, as long as in nanoGPT's README: 2000 steps of 12 x 64 characters.

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
num_hidden_layers = 3  # 441 thousand active parameters; nanoGPT has 804 thousand in 4 layers of 128
hidden_size = 144
intermediate_size = 96
sliding_window = 128  # more than block_size: all layers see all
router_aux_loss_coef = 0.1  # 0.01 learns no more, the busiest expert at 1.9 times an equal share

max_iters = 2000
weight_decay = 0.0  # in one and a half epochs there is nothing to forget
eval_interval = 1000
eval_iters = 0  # the whole validation set
dtype = 'float32'  # matrices this small gain nothing from bf16
