"""
The default run, `python train.py`: a small GPT-OSS learns the built-in stories on a CPU.

This file sets nothing: the values of the default run are at the top of train.py. Copy this file to start a
config of your own. Assign what is to differ, any setting of prepare.py, train.py, sample.py, bench.py or
GPTConfig, and give the file to a script: `python train.py config/mine.py`. For instance, wider layers:
"""

# out_dir = 'out-wider'
# hidden_size = intermediate_size = 256
