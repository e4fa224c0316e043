"""
Open exports in other programs, and compare tokens and logits with those of our code. Not part of the tests.

    python .ci/exports.py                        # all programs: three quarters of an hour on two cores
    python .ci/exports.py mlx-lm llama.cpp       # these programs, with the models of an earlier call
    EXPORTS=FOLDER python .ci/exports.py         # in this folder, not among the system's temporary files

In a copy of the repository, small models are trained and exported. Each program has a virtual environment, in
which this file runs again and adds rows to a table. llama.cpp is built from sources, with cmake and a
compiler.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import traceback
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = Path(tempfile.gettempdir(), 'nano-gpt-oss-exports')
FOLDER = Path(os.environ.get('EXPORTS') or TEMPORARY).resolve()
WORK = FOLDER / 'work'
TABLE = FOLDER / 'table.md'
BINDING = FOLDER / 'llama_cpp_python-0.3.36'  # its source distribution holds llama.cpp
LLAMA = BINDING / 'vendor' / 'llama.cpp'
LENGTH = 60  # tokens of a greedy continuation

THOUGHT = 'A traffic light.'
CHATS = []
for light, answer in dict(red='stop', green='go', yellow='wait').items():
    question = dict(role='user', content=light)
    CHATS.append([question, dict(role='assistant', thinking=THOUGHT, content=answer)])
CHATS += [[dict(role='system', content='Be brief.'), *CHATS[0], *CHATS[1]],
          [CHATS[2][0], dict(role='assistant', content='wait')]]
QUESTION = CHATS[1][:1]  # its answer is 'go'
TEXT = ("It's 1234567 o'clock!  \u00dcbermut,\n\n\tna\u00efve \u65e5\u672c\u8a9e \U0001f642 "
        "don't... we'll x_1=2;   end ")

# The README's way from nothing to a story: RUNS[0], the export `story` to a file, and this
TELL = 'llama.cpp/build/bin/llama-simple -m story.gguf -n 200 "Once upon a time"'
# Programs other than transformers and onnxruntime-genai round the ends of YaRN's ramp, and so do the models
# that they are compared with.
TRAIN = 'train.py --rope_truncate=True --eval_interval=50 --eval_iters=2 --sample_tokens=0 --batch_size=4'
RUNS = [  # arguments of python
    'train.py',
    f'{TRAIN} --out_dir=out-exact --init_from=out/best --max_iters=50',
    f'{TRAIN} --out_dir=out-adapters --init_from=out-exact/best --max_iters=50 --lora_rank=4',
    f'{TRAIN} --out_dir=out-tied --max_iters=100 --tie_word_embeddings=True',
    'prepare.py --dataset=builtin --megabytes=1 --tokenizer=gpt2 --data_dir=data/gpt2',
    f'{TRAIN} --out_dir=out-gpt2 --max_iters=50 --data_dir=data/gpt2',
    'prepare.py --dataset=chats.jsonl --tokenizer=bpe --vocab_size=300',
    f'{TRAIN} --out_dir=out-chats --max_iters=150 --data_dir=data/chats --block_size=320']
EXPORTS = {  # name: (its data, flags of sample.py)
    'story': ('builtin', ''),
    'bf16': ('builtin', '--out_dir=out-exact'),
    'fp32': ('builtin', '--out_dir=out-exact --dtype=float32'),
    'mxfp4': ('builtin', '--out_dir=out-exact --dtype=float32 --experts=mxfp4'),
    'merged': ('builtin', '--out_dir=out-adapters --dtype=float32'),
    'tied': ('builtin', '--out_dir=out-tied --dtype=float32 --experts=mxfp4'),
    'gpt2': ('gpt2', '--out_dir=out-gpt2 --dtype=float32 --experts=mxfp4'),
    'chat': ('chats', '--out_dir=out-chats --dtype=float32 --experts=mxfp4')}


# --- the exports, and what our code makes of them -----------------------------------------------------------

def add_row(program, what, figure, good=None):
    """Add a row to the table. program: NAME==VERSION. Without a verdict, the figure says why there is
    none."""
    name, _, version = program.partition('==')
    verdict = {True: 'PASS', False: 'FAIL', None: 'not tried'}[good]
    figure = ' '.join(str(figure).replace('|', '/').split())[:160]
    row = ' | '.join((name, version, what, figure, verdict))
    print(f'| {row} |', flush=True)
    with open(TABLE, 'a') as table:
        table.write(f'| {row} |\n')


def command(line):
    """Run a command in the copy of the repository, with the Python that runs this, and return what it
    prints."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment = os.environ | dict(PATH=path)
    done = subprocess.run(line, shell=True, cwd=WORK, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f'{done.stderr.strip()[-300:]}')
    return done.stdout


def make_exports():
    shutil.rmtree(WORK, ignore_errors=True)
    ignored = shutil.ignore_patterns('.git', 'data', 'out*', '__pycache__')
    shutil.copytree(ROOT, WORK, ignore=ignored)
    (WORK / 'llama.cpp').symlink_to(LLAMA)
    lines = [json.dumps(dict(messages=chat)) + '\n' for chat in CHATS * 12]
    (WORK / 'chats.jsonl').write_text(''.join(lines))
    exports = [f'sample.py --export={name} {flags}' for name, (_, flags) in EXPORTS.items()]
    for line in RUNS + exports:
        try:
            command(f'python {line}')
        except ChildProcessError as error:
            add_row('nano-gpt-oss', line, error, False)
    for name in EXPORTS:
        if (WORK / name).exists():
            write_reference(name)


def write_reference(name):
    """Write what our code makes of an export: a greedy continuation, or an answer, and its logits; the tokens
    of texts."""
    sys.path.insert(0, str(WORK))
    import torch
    from model import GPT, read_json
    from prepare import Chat, encode_text, encode_turn, load_tokenizer
    model = GPT.from_pretrained(WORK / name, torch.float32)
    encoder = load_tokenizer(WORK / name)
    data = WORK / 'data' / EXPORTS[name][0]
    ours = dict(text=encode_text(encoder, TEXT))
    if '<|start|>' in encoder.special_tokens_set:
        ours['prompt'] = Chat(QUESTION).prompt(encoder)
        ours['examples'] = [encode_turn(encoder, Chat(chat).turns[-1]) for chat in CHATS]
    else:  # longer than the window; the document that begins in the prompt does not end in the continuation
        tokens = np.fromfile(data / 'val.bin', read_json(data / 'meta.json')['dtype'])
        ends = np.flatnonzero(tokens == encoder.eot_token)
        begin = ends[ends > 110][0]
        ours['prompt'] = tokens[begin - 106:begin + 30].tolist()
    n = len(ours['prompt'])
    stops = read_json(WORK / name / 'generation_config.json')['eos_token_id']
    everything = model.generate(torch.tensor([ours['prompt']]), LENGTH, temperature=0)
    ours['tokens'] = everything[0, n:].tolist()
    stop = next((i for i, token in enumerate(ours['tokens'], 1) if token in stops), LENGTH)
    ours['tokens'] = ours['tokens'][:stop]
    logits = model(everything[:, :-1], everything[:, 1:])[0][0, n - 1:n - 1 + stop]
    np.save(WORK / f'{name}.npy', logits.detach().numpy())
    (WORK / f'{name}.json').write_text(json.dumps(ours))


# --- the programs: functions of an export and our results. They yield rows (what, figure, whether it is good)

def same(what, found, expected):
    """A row on lists that should be equal."""
    equal = 0
    while equal < min(len(found), len(expected)) and found[equal] == expected[equal]:
        equal += 1
    return what, f'{equal} of {len(expected)}', list(found) == list(expected)


def close(logits, expected, limit=1e-4):
    """A row on logits (T, V), up to a constant. With a limit of 0 the loss is compared: llama.cpp rounds
    activations to 8 bits or bf16 there, which moves a log-probability by 0.02, so the mean of 60 by some
    thousandths."""
    logits = log_softmax(logits)
    expected = log_softmax(expected)
    if limit:
        worst = np.abs(logits - expected).max()
        return 'log-probabilities', f'{worst:.1g} apart at most (limit {limit:g})', worst <= limit
    best = np.arange(len(expected)), expected.argmax(-1)
    apart = abs((logits - expected)[best].mean())
    return 'loss of our tokens', f'{apart:.1g} nats apart (limit 0.01)', apart <= 0.01


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def transformers(folder, ours):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    model = AutoModelForCausalLM.from_pretrained(folder, dtype='float32')
    model = model.float()  # MXFP4 is unpacked to bf16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([ours.prompt])
    n = len(ours.prompt)
    options = dict(max_new_tokens=len(ours.tokens), do_sample=False)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, n:]
    yield same('greedy tokens', found.tolist(), ours.tokens)
    logits = model(torch.tensor([ours.prompt + ours.tokens])).logits[0, n - 1:-1]
    yield close(logits.detach(), ours.logits)
    yield same('tokens of a text', tokenizer.encode(TEXT), ours.text)
    tokens = model.generate(**tokenizer(TEXT, return_tensors='pt'), **options)[0]
    options['clean_up_tokenization_spaces'] = False  # 4.57 would drop spaces before full stops
    found = pipeline('text-generation', model, tokenizer=tokenizer)(TEXT, **options)
    yield same('characters of a pipeline', found[0]['generated_text'], tokenizer.decode(tokens, True))
    if hasattr(ours, 'examples'):
        options = dict(add_generation_prompt=True, return_dict=True)
        chat = tokenizer.apply_chat_template(QUESTION, **options)
        yield same('chat template', chat['input_ids'], ours.prompt)


def mlx_lm(folder, ours):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    model, tokenizer = load(str(folder))
    found = generate_step(mx.array(ours.prompt), model, max_tokens=len(ours.tokens))
    yield same('greedy tokens', [int(token) for token, _ in found], ours.tokens)
    logits = model(mx.array([ours.prompt + ours.tokens]))[0, len(ours.prompt) - 1:-1]
    yield close(np.array(logits.astype(mx.float32)), ours.logits, 1e-3)
    yield same('tokens of a text', tokenizer.encode(TEXT), ours.text)
    if hasattr(ours, 'examples'):
        found = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
        yield same('chat template', found, ours.prompt)


def onnxruntime_genai(folder, ours):
    import onnxruntime_genai as og
    onnx = FOLDER / 'onnx'
    shutil.rmtree(onnx, ignore_errors=True)
    build = ['-m', 'onnxruntime_genai.models.builder', '-i', folder, '-o', onnx]
    build += ['-c', FOLDER / 'onnx-cache', '-p', 'fp32', '-e', 'cpu']
    subprocess.run([sys.executable, *build], check=True)
    model = og.Model(str(onnx))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(ours.prompt + ours.tokens))
    generator = og.Generator(model, parameters)
    generator.append_tokens(ours.prompt)
    logits = []
    for _ in ours.tokens:
        logits.append(generator.get_logits()[0, -1])
        generator.generate_next_token()
    found = generator.get_sequence(0)[len(ours.prompt):].tolist()
    yield same('greedy tokens', found, ours.tokens)
    yield close(logits, ours.logits)
    yield same('tokens of a text', og.Tokenizer(model).encode(TEXT).tolist(), ours.text)


def peft(folder, ours):
    """Our adapters on their base there must equal their merged export here. Then adapters of PEFT are read
    here."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM
    from model import GPT
    tokens = torch.tensor([ours.prompt + ours.tokens])
    n = len(ours.prompt)
    base = AutoModelForCausalLM.from_pretrained(WORK / 'out-exact/best')
    model = PeftModel.from_pretrained(base, WORK / 'out-adapters/best')
    options = dict(max_new_tokens=len(ours.tokens), do_sample=False)
    found = model.generate(input_ids=tokens[:, :n], attention_mask=torch.ones(1, n), **options)[0, n:]
    yield same('greedy tokens', found.tolist(), ours.tokens)
    yield close(model(tokens).logits[0, n - 1:-1].detach(), ours.logits)
    options = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type='CAUSAL_LM',
        target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
        target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'])
    base = AutoModelForCausalLM.from_pretrained(WORK / 'fp32')
    model = get_peft_model(base, options).eval()
    model.save_pretrained(WORK / 'peft')
    read_here = GPT.from_pretrained(WORK / 'peft', torch.float32)
    logits, _ = read_here(tokens[:, :-1], tokens[:, 1:])
    found = model(tokens).logits[0, n - 1:-1].detach()
    what, *result = close(found, logits[0, n - 1:].detach())
    yield f"PEFT's adapters, read here: {what}", *result


def trl(folder, ours):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    options = SFTConfig(
        str(WORK / 'trl'), assistant_only_loss=True, max_length=None, max_steps=1, learning_rate=1e-6,
        use_cpu=True, bf16=False, report_to='none')
    chats = Dataset.from_list([dict(messages=chat) for chat in CHATS])
    trainer = SFTTrainer(str(folder), options, train_dataset=chats)
    found = []
    for row in trainer.train_dataset:
        mask = [int(label >= 0) for label in row['labels']]
        found.append([row['input_ids'], mask])
    yield same("chats with the tokens and mask of prepare.py's", found, ours.examples)
    loss = trainer.train().training_loss
    yield 'a step of SFT', f'loss {loss:.3f}', loss < 1
    trainer.save_model()
    sample = [os.environ['PYTHON'], 'sample.py', '--init_from=trl', '--chat', '--temperature=0']
    options = dict(cwd=WORK, input='green', capture_output=True, text=True)
    text = subprocess.run(sample, **options)
    good = THOUGHT in text.stdout and 'go' in text.stdout
    yield "sample.py with TRL's folder", text.stdout + text.stderr, good


def llama_cpp(folder, ours):
    sys.path.insert(0, str(BINDING))
    os.environ['LLAMA_CPP_LIB_PATH'] = str(LLAMA / 'build' / 'bin')
    from llama_cpp import GGML_TYPE_F32, Llama
    _, flags = EXPORTS[folder.name]
    Path(f'{folder}.gguf').unlink(missing_ok=True)  # of an earlier call
    command(f'python sample.py --export={folder.name}.gguf {flags}')
    if folder.name in ('story', 'fp32'):
        story = command(TELL.replace('story', folder.name))
        tell = f'python sample.py --init_from={folder} --device=cpu --dtype=float32 --temperature=0'
        again = command(f'{tell} --max_new_tokens=200 --start="Once upon a time"')
        yield 'greedy text', story, story == again and story.count('.') > 5
    options = dict(n_ctx=512, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    model = Llama(f'{folder}.gguf', **options, verbose=False)
    n = len(ours.prompt)
    model.eval(ours.prompt)
    for i in range(len(ours.tokens)):
        model.eval([int(model.scores[n + i - 1].argmax())])
    if folder.name != 'story':
        yield same('greedy tokens', model.input_ids[n:model.n_tokens].tolist(), ours.tokens)
    model.reset()
    model.eval(ours.prompt + ours.tokens)
    limit = 1e-4 if folder.name in ('fp32', 'merged') else 0
    yield close(model.scores[n - 1:model.n_tokens - 1], ours.logits, limit)
    yield same('tokens of a text', model.tokenize(TEXT.encode(), add_bos=False), ours.text)
    if hasattr(ours, 'examples'):
        found = model.create_chat_completion(QUESTION, temperature=0, max_tokens=60)
        answer = found['choices'][0]['message']['content']
        yield 'answer to a chat', answer, THOUGHT in answer and 'go' in answer


PROGRAMS = {  # name and version: (function, exports, packages)
    'transformers==4.57.6': (transformers, EXPORTS, 'transformers==4.57.6 accelerate'),
    'transformers==5.24.0': (transformers, EXPORTS, 'transformers==5.24.0 accelerate'),
    'peft==0.17.1': (peft, ['merged'], 'peft==0.17.1 transformers==4.57.6'),
    'peft==0.21.2': (peft, ['merged'], 'peft==0.21.2 transformers==5.24.0'),
    'trl==1.16.0': (trl, ['chat'], 'trl==1.16.0 transformers==5.24.0'),
    'mlx-lm==0.32.2': (mlx_lm, ['mxfp4', 'tied', 'gpt2', 'chat'], 'mlx-lm==0.32.2 mlx[cpu]'),
    'onnxruntime-genai==0.18.0': (
        onnxruntime_genai, ['story'],
        'onnxruntime-genai==0.18.0 onnx onnx-ir transformers==5.24.0'),
    'llama.cpp==llama-cpp-python 0.3.36': (llama_cpp, EXPORTS, 'diskcache jinja2')}
NOT_TRIED = {
    'mlx-lm==0.32.2': ('fp32, bf16', 'it reads experts in MXFP4 alone'),
    'vLLM': ('all', 'its loader was read'),
    'SGLang': ('all', 'its loader was read'),
    'Ollama': ('all', 'its loader was read')}


def inside(program):
    """Add the rows of a program. This runs in its environment."""
    check, exports, _ = PROGRAMS[program]
    sys.path.insert(0, str(WORK))
    for name in exports:
        try:
            ours = SimpleNamespace(**json.loads((WORK / f'{name}.json').read_text()))
            ours.logits = np.load(WORK / f'{name}.npy')
            for what, figure, good in check(WORK / name, ours):
                add_row(program, f'{name}: {what}', figure, bool(good))
        except Exception as error:  # each program raises its own
            traceback.print_exc()
            add_row(program, name, f'{type(error).__name__}: {error}', False)


def environment(program, packages):
    """The Python of the virtual environment of a program, which is made where it is missing."""
    folder = FOLDER / 'environments' / program.replace(' ', '-')
    if not (folder / 'complete').exists():
        venv.create(folder, clear=True, with_pip=True)
        site = next(folder.glob('lib/*/site-packages'))
        ours = sysconfig.get_path('purelib')
        (site / 'project.pth').write_text(ours)  # torch is not installed again
        pip = [folder / 'bin/pip', 'install', '-q', *packages.split()]
        subprocess.run(pip, check=True)
        (folder / 'complete').touch()
    return folder / 'bin' / 'python'


def build_llama_cpp():
    """Build what is used of llama.cpp, out of a source distribution: ten minutes on two cores."""
    if (LLAMA / 'build/bin/llama-simple').exists():
        return
    package = BINDING.name.replace('-', '==')
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary=:all:', '-d', FOLDER]
    subprocess.run([*pip, package], check=True)
    with tarfile.open(f'{BINDING}.tar.gz') as archive:
        archive.extractall(FOLDER)
    options = '-DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF'
    build = f'cmake --build build -j {os.cpu_count()} -t llama-simple'
    for line in (f'cmake -B build {options}', build):
        subprocess.run(line.split(), cwd=LLAMA, check=True)


def main():
    names = sys.argv[1:]
    if names[:1] == ['inside']:
        return inside(names[1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    TABLE.write_text('| program | version | what | figure | verdict |\n|---|---|---|---|---|\n')
    if not names:
        make_exports()
    for program, (check, _, packages) in PROGRAMS.items():
        if names and program.partition('==')[0] not in names:
            continue
        try:
            if check is llama_cpp:
                build_llama_cpp()
            python = environment(program, packages)
        except (subprocess.CalledProcessError, OSError) as error:
            add_row(program, 'installation', error)
            continue
        variables = os.environ | dict(PYTHON=sys.executable)
        with open(FOLDER / f'{program}.log', 'w') as log:
            again = [python, __file__, 'inside', program]
            subprocess.run(again, env=variables, stdout=log, stderr=log)
    for program, (what, why) in NOT_TRIED.items():
        add_row(program, what, why)
    print(TABLE.read_text())
    raise SystemExit('FAIL' in TABLE.read_text())


if __name__ == '__main__':
    main()
