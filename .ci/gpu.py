"""
Measure training and decoding of the large shapes on one GPU, for gpu.sh. One row of output for each figure.

    python .ci/gpu.py train ours config/gpt_oss_500m.py      # and a profile by kernel; or fused, for a trial
    python .ci/gpu.py train GptOss config/gpt_oss_500m.py    # transformers'
    python .ci/gpu.py decode ours config/gpt_oss_20b.py      # or packed, or GptOss

Weights are random and made on the GPU. bench.py's settings are flags, such as --batch_size=8.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config

import torch

import bench
from model import GPT, MXFP4, STACKS, parameter_sizes

PREPARING = 8  # tokens that are not timed, in which a step is captured or compiled


def build(job, dtype):
    """The model with parameters of this dtype, and its optimizers. It is never in the host's memory."""
    torch.set_default_dtype(dtype)
    with torch.device(job.device):
        model, optimizers = bench.build_model(job)
    torch.set_default_dtype(torch.float32)
    return model, optimizers


def train(job, fused):
    """Steps of one batch with one optimizer step each. transformers' model is not compiled."""
    model, optimizers = build(job, torch.float32)
    size = job.batch_size, job.block_size + 1
    rows = torch.randint(job.shape.vocab_size, size, device=job.device)
    if job.model == 'ours':
        options = {'realize_opcount_threshold': 64} if fused else None  # SwiGLU's backward as one kernel
        model.compile(dynamic=False, options=options)
    call = bench.train_step, model, optimizers, rows, job
    compiling = 2 * bench.measure_time(job, 2, *call)
    seconds = bench.measure_time(job, 2 * job.steps, *call)
    speed = job.batch_size * job.block_size / seconds
    with torch.device('meta'):
        flops = GPT(job.shape).flops_per_token(job.block_size)
    share = flops * speed / (config.peak_flops(job.device, job.dtype) or float('nan'))
    print(f'train {job.model}{", fused" if fused else ""}, {job.batch_size} x {job.block_size}, {job.dtype}: '
          f'{speed:,.0f} tokens/s, MFU {share:.1%}, {bench.measure_memory(job):.1f} GB, '
          f'first two steps {compiling:.0f} s')
    if job.model == 'ours':
        kind = torch.profiler.ProfilerActivity.CPU
        order = 'self_cpu_time_total'
        if job.device.startswith('cuda'):
            kind = torch.profiler.ProfilerActivity.CUDA
            order = 'self_device_time_total'
        with torch.profiler.profile(activities=[kind]) as profiler:
            bench.measure_time(job, 1, *call)
        print(profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=110))


def pack(model):
    """Keep the experts at four bits a value."""
    for layer in model.model.layers:
        for name in STACKS:
            stack = MXFP4.pack(getattr(layer.mlp.experts, name))
            delattr(layer.mlp.experts, name)
            setattr(layer.mlp.experts, name, stack)


def measure_bandwidth(job):
    """Bytes that a copy reads and writes in a second."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    bench.measure_time(job, 2, target.copy_, source)
    return 2 * len(source) / bench.measure_time(job, 10, target.copy_, source)


def bytes_of_a_token(model):
    """Bytes of weights that a decoded token reads."""
    total = 0
    for name, tensor, size in parameter_sizes(model, active=True):
        if 'embed_tokens' not in name:
            total += size * (17 / 32 if isinstance(tensor, MXFP4) else tensor.itemsize)
    return total


@torch.no_grad()
def step_by_step(model, prompt, count, job):
    """bench.generate by eager steps, whatever GPT.stream makes of them."""
    caches = model.make_caches(prompt, prompt.size(1) + count)
    for _ in range(count):
        prompt = model.next_logits(prompt, caches).argmax(-1, keepdim=True)


def decode(job, packed):
    """Batches of 1 and 8, in each way. compile=False is what sample.py does for few tokens."""
    model = build(job, getattr(torch, job.dtype))[0].eval()
    name = job.model
    if packed:
        pack(model)
        name = 'ours, MXFP4'
    bandwidth = measure_bandwidth(job)
    print(f'decode {name}, {job.dtype}; a copy moves {bandwidth / 1e9:,.0f} GB/s')
    ways = ['eager steps', 'compile=False', 'compile=True'] if job.model == 'ours' else ['generate']
    for size in (1, 8):
        for way in ways:
            row = measure_decoding(job, model, size, way)
            if job.model == 'ours' and size == 1:
                share = bytes_of_a_token(model) * row['tokens/s'] / bandwidth
                row['% of what a copy moves'] = 100 * share
            print(f'  batch {size}, {way}:', ', '.join(f'{row[key]:,.2f} {key}' for key in row))


def measure_decoding(job, model, size, way):
    """Speed after the first tokens, and how long these take."""
    torch._dynamo.reset()  # or the second batch size is compiled for every size
    if job.device.startswith('cuda'):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    job.compile = way == 'compile=True'
    function = step_by_step if way == 'eager steps' else bench.generate
    timed = 32 if way == 'eager steps' else 128
    prompt = torch.randint(job.shape.vocab_size, (size, job.prompt_tokens), device=job.device)
    seconds = []
    for count in (1, PREPARING, PREPARING, PREPARING + timed):
        seconds.append(bench.measure_time(job, 1, function, model, prompt, count, job))
    return {'tokens/s': size * timed / (seconds[3] - seconds[2]), 's for the first token': seconds[0],
            f's for {PREPARING} tokens the first time': seconds[1], 's the second': seconds[2],
            'GB': bench.measure_memory(job)}


def main():
    work, kind, *sys.argv[1:] = sys.argv[1:]
    job = bench.read_settings()
    job.seed = 0
    job.model = 'GptOss' if kind == 'GptOss' else 'ours'
    job.compare = kind == 'GptOss'  # imports transformers
    if work == 'train':
        train(job, kind == 'fused')
    else:
        decode(job, kind == 'packed')


if __name__ == '__main__':
    main()
