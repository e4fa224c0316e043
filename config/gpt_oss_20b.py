"""
The shape of openai/gpt-oss-20b: 20.9 B parameters, 3.6 B of them active for a token.

    python sample.py config/gpt_oss_20b.py --start="The capital of France is"

What is not named here (RoPE with YaRN, the SwiGLU's limit) is gpt-oss's in
GPTConfig too. It is there to sample from, to measure and to take apart. Training all of it takes many GPUs
and --fsdp=True. What each of them needs: python bench.py config/gpt_oss_20b.py --scale
"""

init_from = 'openai/gpt-oss-20b'  # a hub id, or the folder of a download
tokenizer = 'o200k_harmony'
out_dir = 'out-gpt-oss-20b'

vocab_size = 201088
num_hidden_layers = 24
num_local_experts = 32
num_experts_per_tok = 4
hidden_size = 2880
intermediate_size = 2880
num_attention_heads = 64
num_key_value_heads = 8
head_dim = 64
sliding_window = 128
initializer_range = 0.02

batch_size = 1
block_size = 4096
learning_rate = 1e-5
muon_lr = 0.0  # AdamW alone, as is usual for fine-tuning
