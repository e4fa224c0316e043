"""
A GPT-OSS of 515 M parameters, 119 M of them active for a token, for one GPU of 80 GB:

    python prepare.py config/gpt_oss_500m.py
    python train.py config/gpt_oss_500m.py
"""

dataset = 'HuggingFaceFW/fineweb-edu:sample-10BT'
tokenizer = 'gpt2'
data_dir = 'data/fineweb_edu'
out_dir = 'out-500m'
start = 'The history of'
val_fraction = 0.001

vocab_size = 50304  # gpt2's 50257, rounded up to a multiple of 64, which matrix units like
num_hidden_layers = 12
num_local_experts = 16
num_experts_per_tok = 2
hidden_size = 768
intermediate_size = 1024
num_attention_heads = 16  # wider than hidden_size together, as in gpt-oss
num_key_value_heads = 4
head_dim = 64
sliding_window = 128
tie_word_embeddings = True

batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16  # half a million tokens a step

max_iters = 19000  # one pass over ten billion tokens
learning_rate = 2e-3
warmup_iters = 500
eval_interval = 500
eval_iters = 20
