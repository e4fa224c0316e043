"""
Open exports in other programs, and compare tokens and logits with ours. Not part of the tests.

    python .ci/exports.py                        # everything: over half an hour on two cores, 10 GB
    python .ci/exports.py mlx-lm llama.cpp       # these programs, with the models of an earlier call
    EXPORTS=FOLDER python .ci/exports.py         # not in the system's temporary folder

Small models are trained and exported in a copy of the repository. Each program has a virtual environment, where this
file runs again with the name of the program, and appends rows to a table. llama.cpp is built from sources.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
import urllib.request
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get('EXPORTS') or Path(tempfile.gettempdir(), 'nano-gpt-oss-exports')).resolve()
WORK, TABLE, LLAMA = FOLDER / 'work', FOLDER / 'table.md', FOLDER / 'llama.cpp'
SOURCES = 'llama-cpp-python==0.3.36'  # its source distribution holds llama.cpp
PORT = 8391  # of llama-server
LENGTH = 60  # tokens of a greedy continuation

LIGHTS = {'red': 'stop', 'green': 'go', 'yellow': 'wait'}
CHATS = [[dict(role='user', content=light), dict(role='assistant', thinking='A traffic light.', content=answer)]
         for light, answer in LIGHTS.items()]
QUESTION = CHATS[1][:1]
TRICKY = "It's 12345 o'clock!  Übermut,\n\n\tnaïve 日本語 🙂🙂 don't... x_1=2;   end "

# Others round the ends of YaRN's ramp, so this is set wherever logits are compared.
EXACT = 'python train.py --rope_truncate=True --eval_interval=50 --eval_iters=2 --sample_tokens=0'
MXFP4 = '--dtype=float32 --experts=mxfp4'
STORY = [  # from nothing to a story in llama.cpp, as the README has it
    'python train.py',
    'python sample.py --export=story',
    'python .ci/llama_cpp_convert.py llama.cpp gpt-2 story --outfile=story.gguf',
    'llama.cpp/build/bin/llama-completion -m story.gguf -p "Once upon a time" -n 200 -no-cnv --temp 0']
MODELS = {  # export: (its data, commands that make it)
    'story': ('builtin', STORY[:2]),
    'fp32': ('builtin', [f'{EXACT} --init_from=out/best --out_dir=exact --max_iters=50 --batch_size=4',
                         'python sample.py --out_dir=exact --export=fp32 --dtype=float32']),
    'bf16': ('builtin', ['python sample.py --out_dir=exact --export=bf16']),
    'mxfp4': ('builtin', [f'python sample.py --out_dir=exact --export=mxfp4 {MXFP4}']),
    'merged': ('builtin', [f'{EXACT} --init_from=exact/best --out_dir=adapters --lora_rank=4 --max_iters=50 --batch_size=4',
                           'python sample.py --out_dir=adapters --export=merged --dtype=float32']),
    'tied': ('builtin', [f'{EXACT} --tie_word_embeddings=True --out_dir=tied-run --max_iters=100 --batch_size=4',
                         f'python sample.py --out_dir=tied-run --export=tied {MXFP4}']),
    'gpt2': ('gpt2', ['python prepare.py --dataset=builtin --megabytes=1 --tokenizer=gpt2 --data_dir=data/gpt2',
                      f'{EXACT} --data_dir=data/gpt2 --out_dir=gpt2-run --max_iters=50 --batch_size=4',
                      f'python sample.py --out_dir=gpt2-run --export=gpt2 {MXFP4}']),
    'chat': ('lights', ['python prepare.py --dataset=chats.jsonl --tokenizer=bpe --vocab_size=300 '
                        '--data_dir=data/lights',
                        f'{EXACT} --data_dir=data/lights --out_dir=lights --block_size=320 --batch_size=4 '
                        '--max_iters=100',
                        f'python sample.py --out_dir=lights --export=chat {MXFP4}'])}


# --- the models and what our code makes of them ---

def add_row(program, what, figure, good=None):
    """Append a row to the table. Without a verdict, the check was not tried, and the figure says why."""
    verdict = {True: 'PASS', False: 'FAIL', None: 'not tried'}[good]
    row = ' | '.join((*program.split('=='), what, ' '.join(str(figure).split())[:150].replace('|', '/'), verdict))
    with open(TABLE, 'a') as table:
        table.write(f'| {row} |\n')
    print(f'| {row} |', flush=True)


def command(line, python=sys.executable):
    """Run a command of the README in the copy of the repository, and return what it prints."""
    path = f'{Path(python).parent}:{os.environ["PATH"]}'
    done = subprocess.run(line, shell=True, cwd=WORK, env=os.environ | dict(PATH=path), capture_output=True, text=True)
    with open(FOLDER / 'commands.log', 'a') as log:
        log.write(f'$ {line}\n{done.stdout}{done.stderr}\n')
    if done.returncode:
        raise ChildProcessError(f'{line}: {done.stderr.strip().splitlines()[-1:]}')
    return done.stdout


def make_models():
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(ROOT, WORK, ignore=shutil.ignore_patterns('.git', 'data', 'out*', '__pycache__'))
    (WORK / 'llama.cpp').symlink_to(LLAMA)
    (WORK / 'chats.jsonl').write_text(''.join(json.dumps(dict(messages=chat)) + '\n' for chat in CHATS * 20))
    for name, (data, lines) in MODELS.items():
        try:
            for line in lines:
                command(line)
            write_reference(name, WORK / 'data' / data)
        except (ChildProcessError, ValueError) as error:
            add_row('nano-gpt-oss==', name, error, False)


def write_reference(name, data):
    """What our code makes of an export: a greedy continuation and its logits, and tokens of texts and chats."""
    sys.path.insert(0, str(WORK))
    import torch
    from model import GPT, read_json
    from prepare import Chat, encode_text, load_tokenizer
    model, encoder = GPT.from_pretrained(WORK / name, torch.float32), load_tokenizer(WORK / name)
    tokens = np.fromfile(data / 'val.bin', read_json(data / 'meta.json')['dtype']).astype(np.int64)
    ends = np.flatnonzero(tokens == encoder.eot_token)
    begin = ends[ends > 110][0]  # of a document, which does not end in the continuation
    prompt = tokens[begin - 106:begin + 30]  # longer than the window
    everything = model.generate(torch.tensor(prompt)[None], LENGTH, temperature=0)
    logits = model(everything[:, :-1], everything[:, 1:])[0][0, len(prompt) - 1:]
    np.save(WORK / f'{name}.npy', logits.detach().numpy())
    ours = dict(prompt=prompt.tolist(), tokens=everything[0, len(prompt):].tolist(),
                tricky=encode_text(encoder, TRICKY))
    if '<|start|>' in encoder.special_tokens_set:
        ours['question'] = Chat(QUESTION).prompt(encoder)
        ours['examples'] = [example for chat in CHATS for example in Chat(chat).examples(encoder)]
    (WORK / f'{name}.json').write_text(json.dumps(ours))


# --- the programs: each function gets a folder and our results, and yields rows (what, figure, whether it is good) ---

def same(what, found, expected):
    """A row on lists of tokens or other values."""
    found, expected = list(found), list(expected)
    equal = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
    return what, f'{equal} of {len(expected)}', found == expected


def close(logits, ours, tolerance):
    """A row on the logits of the continuation, up to a constant."""
    a, b = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (np.asarray(logits, np.float64), ours.logits.astype(np.float64)))
    difference = np.abs(a - b).max()
    return 'largest difference of a log-probability', f'{difference:.1g} of {tolerance:g}', difference <= tolerance


def transformers(folder, ours):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = model.float()
    n = len(ours.prompt)
    found = model.generate(torch.tensor([ours.prompt]), max_new_tokens=LENGTH, do_sample=False)[0]
    yield same('greedy tokens', found[n:].tolist(), ours.tokens)
    logits = model(torch.tensor([ours.prompt + ours.tokens])).logits
    yield close(logits[0, n - 1:-1].detach(), ours, 1e-4)
    yield same('tokens of a text', tokenizer.encode(TRICKY), ours.tricky)
    text = tokenizer.decode(ours.prompt)
    answer = pipeline('text-generation', str(folder))(text, max_new_tokens=20, do_sample=False, return_full_text=False)
    expected = tokenizer.decode(ours.tokens[:20])
    yield 'pipeline', repr(answer[0]['generated_text'])[:40], answer[0]['generated_text'] == expected
    if 'question' in vars(ours):
        chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)
        yield same('chat template', chat['input_ids'], ours.question)
        answer = model.generate(torch.tensor([ours.question]), do_sample=False, max_new_tokens=60)[0]
        yield 'answer to a chat', tokenizer.decode(answer[-3:]), tokenizer.decode(answer).endswith('go<|return|>')


def mlx_lm(folder, ours):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    model, tokenizer = load(str(folder))
    steps = generate_step(mx.array(ours.prompt), model, max_tokens=LENGTH)
    yield same('greedy tokens', [int(token) for token, _ in steps], ours.tokens)
    logits = model(mx.array([ours.prompt + ours.tokens]))[0, len(ours.prompt) - 1:-1]
    yield close(np.array(logits.astype(mx.float32)), ours, 1e-3)
    yield same('tokens of a text', tokenizer.encode(TRICKY), ours.tricky)
    if 'question' in vars(ours):
        yield same('chat template', tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True), ours.question)


def onnxruntime_genai(folder, ours):
    import onnxruntime_genai as og
    onnx = FOLDER / 'onnx' / folder.name
    shutil.rmtree(onnx, ignore_errors=True)
    build = ['-m', 'onnxruntime_genai.models.builder', '-i', folder, '-o', onnx, '-c', FOLDER / 'onnx-cache']
    subprocess.run([sys.executable, *build, '-p', 'fp32', '-e', 'cpu'], check=True)
    model = og.Model(str(onnx))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ours.prompt) + LENGTH)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ours.prompt)
    logits = []
    for _ in range(LENGTH):
        logits.append(generator.get_logits()[0, -1])
        generator.generate_next_token()
    yield same('greedy tokens', generator.get_sequence(0)[len(ours.prompt):].tolist(), ours.tokens)
    yield close(np.stack(logits), ours, 1e-4)
    yield same('tokens of a text', og.Tokenizer(model).encode(TRICKY).tolist(), ours.tricky)


def peft(folder, ours):
    """The adapters that made `merged`, on their base; then adapters of PEFT, read by our code."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    from model import GPT
    tokens, n = torch.tensor([ours.prompt + ours.tokens]), len(ours.prompt)
    base = AutoModelForCausalLM.from_pretrained(WORK / 'exact' / 'best', torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(base, WORK / 'adapters' / 'best').eval()
    yield close(model(tokens).logits[0, n - 1:-1].detach(), ours, 1e-4)
    found = model.generate(tokens[:, :n], max_new_tokens=LENGTH, do_sample=False)[0, n:]
    yield same('greedy tokens', found.tolist(), ours.tokens)
    base = AutoModelForCausalLM.from_pretrained(WORK / 'fp32', torch_dtype=torch.float32)
    targets = dict(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
                   target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'])
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type='CAUSAL_LM',
                                            **targets)).eval()
    model.save_pretrained(WORK / 'peft')
    theirs = GPT.from_pretrained(WORK / 'peft', torch.float32).eval()(tokens[:, :-1], tokens[:, 1:])[0][0, n - 1:]
    ours.logits = theirs.detach().numpy()
    what, figure, good = close(model(tokens).logits[0, n - 1:-1].detach(), ours, 1e-4)
    yield f"PEFT's adapters here: {what}", figure, good


def trl(folder, ours):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    options = SFTConfig(str(WORK / 'trl'), assistant_only_loss=True, max_steps=1, use_cpu=True, bf16=False,
                        report_to='none', max_length=None)
    trainer = SFTTrainer(str(folder), options, Dataset.from_list([dict(messages=chat) for chat in CHATS]))
    found = [[row['input_ids'], row['assistant_masks']] for row in trainer.train_dataset]
    yield same("tokens and mask of prepare.py's examples", found, ours.examples)
    yield 'a step of SFT', f'loss {trainer.train().training_loss:.3f}', True
    trainer.save_model()
    text = command('echo green | python sample.py --init_from=trl --chat --temperature=0', os.environ['PYTHON'])
    yield "sample.py with TRL's folder", text.split()[-1], text.split()[-1] == 'go'


def llama_cpp(folder, ours):
    def post(path, **body):
        request = urllib.request.Request(f'http://127.0.0.1:{PORT}/{path}', json.dumps(body).encode())
        return json.load(urllib.request.urlopen(request))

    convert = STORY[2] if folder.name == 'story' else f'{STORY[2]} --outtype={"bf16" if folder.name == "bf16" else "f32"}'
    if folder.name == 'gpt2':
        convert = convert.replace('.ci/llama_cpp_convert.py llama.cpp gpt-2', 'llama.cpp/convert_hf_to_gguf.py')
    command(convert.replace('story', folder.name))
    if folder.name == 'story':
        yield 'the story of four commands', repr(command(STORY[3]))[:100], True
    options = '--host 127.0.0.1 -c 1024 -np 1 -t 2 -ctk f32 -ctv f32 -fa off --no-warmup'
    server = subprocess.Popen([LLAMA / 'build/bin/llama-server', '-m', f'{folder}.gguf', '--port', str(PORT),
                               *options.split()])
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{PORT}/health')
                break
            except OSError:
                time.sleep(0.5)
        V = ours.logits.shape[1]
        answer = post('completion', prompt=ours.prompt, n_predict=LENGTH, temperature=0, n_probs=V, return_tokens=True)
        yield same('greedy tokens', answer['tokens'], ours.tokens)
        found = np.full((LENGTH, V), -np.inf)
        for i, place in enumerate(answer['completion_probabilities']):
            for entry in place['top_logprobs']:
                found[i, entry['id']] = entry['logprob']
        yield close(found, ours, 0.02)
        yield same('tokens of a text', post('tokenize', content=TRICKY)['tokens'], ours.tricky)
        if 'question' in vars(ours):
            answer = post('v1/chat/completions', messages=QUESTION, temperature=0)['choices'][0]['message']
            yield 'answer to a chat', answer, answer['content'] == 'go'
    finally:
        server.kill()


EVERY = list(MODELS)
PROGRAMS = {  # name: (function, exports, packages of its environment, the program first)
    'transformers-4': (transformers, EVERY, 'transformers==4.57.6 accelerate'),
    'transformers-5': (transformers, EVERY, 'transformers==5.24.0 accelerate'),
    'peft-old': (peft, ['merged'], 'peft==0.17.1 transformers==4.57.6'),
    'peft-new': (peft, ['merged'], 'peft==0.21.2 transformers==5.24.0'),
    'trl': (trl, ['chat'], 'trl==1.16.0 transformers==5.24.0'),
    'mlx-lm': (mlx_lm, ['mxfp4', 'tied', 'gpt2', 'chat'], 'mlx-lm==0.32.2 mlx[cpu]'),
    'onnxruntime-genai': (onnxruntime_genai, ['fp32'], 'onnxruntime-genai==0.18.0 onnx onnx-ir transformers==4.57.6'),
    'llama.cpp': (llama_cpp, [name for name in EVERY if name != 'merged'], f'{SOURCES} transformers==4.57.6'),
}
NOT_TRIED = {'mlx-lm==0.32.2': ('fp32, bf16', 'it reads experts in MXFP4 alone'),
             'vLLM==': ('all', 'only its loader was read'), 'SGLang==': ('all', 'only its loader was read'),
             'Ollama==': ('all', 'only its loader was read')}


def inside(name):
    """Add the rows of a program, in its environment."""
    check, exports, packages = PROGRAMS[name]
    sys.path.insert(0, str(WORK))
    for export in exports:
        program = packages.split()[0]
        try:
            ours = SimpleNamespace(**json.loads((WORK / f'{export}.json').read_text()))
            ours.logits = np.load(WORK / f'{export}.npy')
            for what, figure, good in check(WORK / export, ours):
                add_row(program, f'{export}: {what}', figure, good)
        except Exception as error:  # each program raises its own
            traceback.print_exc()
            add_row(program, export, f'{type(error).__name__}: {error}', False)


def environment(name, packages):
    """The Python of a virtual environment with these packages, which is made where it is missing."""
    folder = FOLDER / 'environments' / name
    if not (folder / 'complete').exists():
        venv.create(folder, clear=True, with_pip=True)
        packages_of = next(folder.glob('lib/*/site-packages'))
        (packages_of / 'project.pth').write_text(sysconfig.get_path('purelib'))  # torch is installed there
        subprocess.run([folder / 'bin' / 'pip', 'install', '-q', *packages.split()], check=True)
        (folder / 'complete').touch()
    return folder / 'bin' / 'python'


def build_llama_cpp():
    """Take llama.cpp's sources out of a package, and compile what is used here: a quarter of an hour on two cores."""
    if (LLAMA / 'build/bin/llama-server').exists():
        return
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary=:all:', '-d', FOLDER, SOURCES]
    subprocess.run(pip, check=True)
    with tarfile.open(next(FOLDER.glob('llama_cpp_python-*.tar.gz'))) as archive:
        archive.extractall(FOLDER / 'sources', filter='data')
    next(FOLDER.glob('sources/*/vendor/llama.cpp')).rename(LLAMA)
    cmake = f'cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF'
    subprocess.run(cmake.split(), cwd=LLAMA, check=True)
    targets = ['llama-completion', 'llama-server']
    subprocess.run(['cmake', '--build', 'build', '-j', str(os.cpu_count()), '-t', *targets], cwd=LLAMA, check=True)


def main():
    names = sys.argv[1:]
    if names[:1] == ['inside']:
        return inside(names[1])
    if unknown := set(names) - PROGRAMS.keys():
        raise SystemExit(f'no program {unknown}; there are {", ".join(PROGRAMS)}')
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text('| program | version | what | figure | verdict |\n|---|---|---|---|---|\n')
    if not names:
        make_models()
    for name in names or PROGRAMS:
        check, exports, packages = PROGRAMS[name]
        try:
            python = environment(name, packages)
            if check is llama_cpp:
                build_llama_cpp()
            with open(FOLDER / f'{name}.log', 'w') as log:
                subprocess.run([python, __file__, 'inside', name], env=os.environ | dict(PYTHON=sys.executable),
                               stdout=log, stderr=log)
        except (subprocess.CalledProcessError, OSError) as error:
            add_row(packages.split()[0], 'installation', error)
    for program, (what, why) in NOT_TRIED.items():
        add_row(program, what, why)
    print(TABLE.read_text())
    raise SystemExit('FAIL' in TABLE.read_text())


if __name__ == '__main__':
    main()
