"""
TinyStories on one GPU, a GPT-OSS of 51 M parameters, 30 M of them active for a token:

    python prepare.py config/tinystories.py
    python train.py config/tinystories.py --batch_size=32
    python sample.py config/tinystories.py
"""

dataset = 'roneneldan/TinyStories'
tokenizer = 'gpt2'  # o200k_harmony's embedding and head would be most of so small a model
data_dir = 'data/tinystories'
out_dir = 'out-tinystories'

batch_size = 64
block_size = 512
num_hidden_layers = 8
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 64
sliding_window = 128
hidden_size = 384
intermediate_size = 384
tie_word_embeddings = True

max_iters = 10000
learning_rate = 4e-3
warmup_iters = 200
eval_interval = 500
eval_iters = 40
