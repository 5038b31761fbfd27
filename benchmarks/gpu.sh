#!/usr/bin/env bash
# The whole set of benchmarks on one machine, without a network:
#
#     benchmarks/gpu.sh [--device cuda|cpu] [--tiny] [--output DIRECTORY]
#
# Members have the shapes of Llama-2 (13B with 7B; as many layers of 70B as one GPU of 80 GB holds),
# random weights, vLLM's defaults: on a GPU Model Runner V2 and full CUDA graphs. Drafts and one pass
# want weights that were trained, and get SmolLM2's. Every script's tables and its JSON line, which
# names the card, go to a file of DIRECTORY. --tiny runs all but these two on members of a few
# thousand weights, to see that it runs.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "gpu.sh: $1" >&2
    exit 2
}

device=cuda tiny= output=.cache/bench/results
while (($#)); do
    case $1 in
    --device | --output) [[ $# -ge 2 ]] || fail "$1: a value is missing" ;;&
    --device) device=$2 && shift 2 ;;
    --output) output=$2 && shift 2 ;;
    --tiny) tiny=1 && shift ;;
    *) fail "$1: unknown; the options are --device cuda|cpu, --tiny and --output DIRECTORY" ;;
    esac
done
[[ $device == cuda || $device == cpu ]] || fail "--device $device: use cuda or cpu"
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || fail "$python: not there; run \`make setup\` first"

export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
mkdir -p "$output"

run() { # run NAME SCRIPT [OPTION …]: its standard output goes to NAME.txt as well
    local name=$1 script=$2
    shift 2
    echo "== $name: benchmarks/measurements/$script $*"
    "$python" "benchmarks/measurements/$script" "$@" --device "$device" | tee "$output/$name.txt"
}

if [[ -n $tiny ]]; then
    few=(--repeats 1 --eager --dtype float32)
    run throughput throughput.py --models tiny "${few[@]}" --at-once 2 --output-tokens 4 8
    run latency latency.py --models tiny "${few[@]}" --at-once 1 --prompt-tokens 8 --tokens 4
    run budget budget.py --models tiny "${few[@]}" --at-once 2 --tokens 8
    run serve serve.py --models tiny "${few[@]}" --at-once 2 --requests 4
    run control control.py --models tiny "${few[@]}" --at-once 2 --tokens 4
    run start start.py --models tiny "${few[@]}"
    run plan plan.py --models tiny "${few[@]}" --at-once 2 --prompt-tokens 16 --tokens 4
    run growth growth.py "${few[@]}" --at-once 1 --context 64 --vocabulary 8192 --ranks 1
else
    for models in llama-2-13b llama-2-70b; do
        run "throughput-$models" throughput.py --models "$models" --at-once 1 16 64 256
        run "latency-$models" latency.py --models "$models" --prompt-tokens 16 512 1900 --tokens 128
        run "budget-$models" budget.py --models "$models"
        run "plan-$models" plan.py --models "$models" --at-once 1 16 64 256 --tokens 64
        run "serve-$models" serve.py --models "$models" --at-once 1 64 --requests 256 \
            --prompt-tokens 512 --output-tokens 128
    done
    run control control.py --models llama-2-13b --at-once 1 64 --tokens 128
    run start start.py --models llama-2-13b
    run growth growth.py --ranks 1 --plot "$output/growth.png"
    run one_pass one_pass.py
    run memory memory.py
    for models in profiles profiles-5x profiles-10x; do
        run "drafting-$models" drafting.py --models "$models" --drafts 4 6 --adapt
    done
    echo "== head: benchmarks/measurements/head.py"
    "$python" benchmarks/measurements/head.py | tee "$output/head.txt"
fi
echo "== done: $output"
