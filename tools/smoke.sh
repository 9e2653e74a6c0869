#!/usr/bin/env bash
# Installs the project into a fresh environment for each Python, asks the demo checkpoint from Python and by the installed
# command, prints a line each:
#   tools/smoke.sh [PYTHON...]     default: python3.9 to python3.13, those that are on the PATH
# Python 3.13 and newer must be refused in one line. With Python 3.12 the pair Paddle 2.6.2 + PaddleNLP 3.0.0b2 is run
# too, installed without its needs as on the GPU machine. Exit status: the number of failures.
set -uo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

# What the old pair needs to be imported; PaddleNLP's other requirements (data sets, metrics, services) are stood in for.
OLD_PAIR=(
    paddlepaddle==2.6.2 paddlenlp==3.0.0b2 numpy==1.26.4 protobuf==3.20.3 opt_einsum==3.3.0 astor==0.8.1
    huggingface_hub==0.36.2 tokenizers==0.21.4 "safetensors<0.8" "scipy<1.14" scipy-openblas32 sentencepiece regex jinja2
    markupsafe requests urllib3 certifi idna charset-normalizer httpx httpcore anyio h11 filelock fsspec packaging tqdm
    pyyaml pillow six setuptools wheel typing_extensions decorator colorlog colorama dill multiprocess rich
)

# Asks the demo checkpoint for a code hidden in 900 tokens of text; the prompt and its answer come with the tests.
GENERATE='
import json, sys
import paddle, paddlenlp
import paddle_qwen1m
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
checkpoint, oracle = sys.argv[1], json.load(open(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
inputs = tokenizer([oracle["text"]], return_tensors="pd")
ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, repetition_penalty=1.0)[0]
answer = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)[0].strip()
assert type(model).__name__ == "Qwen2OneMForCausalLM" and oracle["answer"] in answer, answer
print("ok: paddle", paddle.__version__, "paddlenlp", paddlenlp.__version__, "answers", repr(answer))
'

say() { printf '%-28s %s\n' "$1" "$2"; }

fail() {
    failures=$((failures + 1))
    say "$1" "FAILED: $2"
    tail -n 15 "$3" | sed 's/^/    /'
}

# run NAME LOG COMMAND...: run a step quietly; on failure print the end of its log.
run() {
    local name=$1 log=$2
    shift 2
    "$@" >"$log" 2>&1 || { fail "$name" "$*" "$log"; return 1; }
}

# The installed command, with no file of the project but the checkpoint.
ask() {
    local environment=$1 command
    for command in "$environment/bin/paddle-qwen1m" "$environment/bin/python -m paddle_qwen1m"; do
        $command generate --model "$project/checkpoints/needle" --greedy --question "What is the access code for jade?" \
            --prompt "The grass is green. The access code for jade is 64931. The sky is blue." |
            grep -x "The access code for jade is 64931." || return
    done
}

generate() {
    local name=$1 environment=$2 log=$3
    if (cd "$work" && "$environment/bin/python" -c "$GENERATE" \
        "$project/checkpoints/needle" "$project/tests/data/needle_oracle/oracle.json" && ask "$environment") >"$log" 2>&1
    then
        say "$name" "$(grep '^ok: ' "$log"), and so does the command"
    else
        fail "$name" generate "$log"
    fi
}

# A copy, so that builds of different Pythons do not meet in one build folder.
copy() {
    mkdir "$1" && (cd "$project" && tar --exclude=.git --exclude='.venv*' --exclude=build --exclude='*.so' -cf - .) | tar -xf - -C "$1"
}

refused() {
    local name=$1 environment=$2 log=$3
    if "$environment/bin/python" -m pip install --no-deps "$work/source" >"$log" 2>&1; then
        fail "$name" "was installed, should be refused" "$log"
    elif [ "$(grep -c 'paddle-qwen1m: .*3\.13' "$log")" -ge 1 ]; then
        say "$name" "refused: $(grep -m1 'paddle-qwen1m: .*3\.13' "$log" | sed 's/^ *//')"
    else
        fail "$name" "refused without the line that says why" "$log"
    fi
}

current_pair() {
    local name=$1 environment=$2 log=$3
    local pip=("$environment/bin/python" -m pip install -q)
    run "$name" "$log" "${pip[@]}" "setuptools>=61" wheel setuptools_scm scipy-openblas32 \
        paddlepaddle==3.3.1 || return
    run "$name" "$log" "${pip[@]}" --no-build-isolation "$work/source[cpu]" || return
    generate "$name" "$environment" "$log"
}

old_pair() {
    local name=$1 environment=$2 log=$3
    local pip=("$environment/bin/python" -m pip install -q --no-deps)
    run "$name" "$log" "${pip[@]}" "${OLD_PAIR[@]}" || return
    cat >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py" <<'PYTHON'
"""Importable nothings for what PaddleNLP imports at start-up and never uses to run a model."""
import importlib.machinery
import sys
import types

ABSENT = frozenset(
    "aistudio_sdk datasets fastapi flask_babel jieba onnx paddle2onnx paddlefsl pandas pyarrow pydantic seqeval sklearn "
    "starlette tool_helpers uvicorn visualdl".split()
)


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=Anything):
    """Can be subclassed, called, used as a decorator and asked for any attribute."""

    def __init__(self, *arguments, **options):
        pass

    def __init_subclass__(cls, **options):
        pass

    def __call__(self, *arguments, **options):
        return arguments[0] if arguments and callable(arguments[0]) else self

    def __getattr__(self, name):
        return Nothing()


class StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ABSENT or name.startswith("paddlenlp.server"):
            return importlib.machinery.ModuleSpec(name, cls, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.insert(0, Finder)
PYTHON
    export PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python
    run "$name" "$log" "${pip[@]}" --no-build-isolation "$work/source" && generate "$name" "$environment" "$log"
    unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION
}

# with_environment PYTHON NAME STEP: run a step in a fresh environment that is deleted afterwards.
with_environment() {
    local python=$1 name=$2 step=$3
    rm -rf "$work/environment" "$work/source"
    copy "$work/source"
    if run "$name" "$work/log" "$python" -m venv "$work/environment"; then
        "$step" "$name" "$work/environment" "$work/log"
    fi
}

[ $# -gt 0 ] || set -- python3.9 python3.10 python3.11 python3.12 python3.13
for python; do
    if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        say "$python" "skipped: not on the PATH"
        continue
    fi
    case $version in
        3.9 | 3.10 | 3.11) with_environment "$python" "Python $version" current_pair ;;
        3.12)
            with_environment "$python" "Python $version" current_pair
            with_environment "$python" "Python $version, Paddle 2.6.2" old_pair
            ;;
        *) with_environment "$python" "Python $version" refused ;;
    esac
done
exit "$failures"
