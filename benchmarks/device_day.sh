#!/usr/bin/env bash
# A day on a machine with an accelerator: everything that is unknown without one, in one go.
#
#   bash benchmarks/device_day.sh outputs/device_day          # the 19B model, on a GPU or TPU
#   bash benchmarks/device_day.sh outputs/device_day tiny     # the same at tiny size, on any machine
#
# Needs jax for the device and this package's own dependencies, no data and no weights. PYTHON names
# the interpreter (default python3), PARTS the parts to run (default all). Each part has ten minutes
# and a file NAME.log; summary.md grows as they end, whatever becomes of the others. Programs
# are compiled once for all parts (in FOLDER/xla).
set -u
cd "$(dirname "$0")/.." || exit 2
folder=${1:?usage: device_day.sh FOLDER [tiny]}
size=${2:-full}
python=${PYTHON:-python3}
mkdir -p "$folder"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/xla}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
summary=$folder/summary.md
date -u +"# %Y-%m-%d %H:%M UTC" >> "$summary"

case $size in
full) stream=(--size full) train=(--size full --layers 4 --height 512 --width 768 --batch-size 1
    --text-tokens 1024 --dtype bfloat16 --remat full)
    precisions=(int8 w8a8-fp8 w8a8-int8) ;;
tiny) stream=(--size tiny --height 64 --width 64 --text-tokens 128 --blocks 3 --dtype float32)
    train=(--size tiny --steps 2) precisions=(int8) ;;
*) echo "device_day.sh: the size is full or tiny, not $size" >&2; exit 2 ;;
esac

# part NAME COMMAND...: runs it, and puts the end of what it prints in the summary
part() {
    local name=$1 start=$SECONDS status
    shift
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    echo "$name: $*" >&2
    timeout --kill-after=10 600 "$@" > "$folder/$name.log" 2> "$folder/$name.err"
    status=$?
    {
        echo "## $name"
        echo
        echo "\`${*/#$python/python}\`: status $status after $((SECONDS - start)) s"
        echo
        cat "$folder/$name.log"
        [ $status -eq 0 ] || tail -n 15 "$folder/$name.err"
        echo
    } >> "$summary"
}

part machine "$python" -c '
import platform, jax, jaxlib
print("Python", platform.python_version(), "jax", jax.__version__, "jaxlib", jaxlib.__version__)
print(*(f"{d.device_kind}: {d.memory_stats()}" for d in jax.devices()), sep="\n")'
# attention against float32, what the step moves, its thirty longest kernels
for window in 7 3; do
    part kernels_$window "$python" -m benchmarks.kernels "${stream[@]}" --window $window
    part stream_$window "$python" -m benchmarks.stream "${stream[@]}" --window $window \
        --output "$folder/stream_$window"
done
# 8 bits; a device that lacks a product says so
for precision in "${precisions[@]}"; do
    part kernels_$precision "$python" -m benchmarks.kernels "${stream[@]}" --quantize $precision
    part stream_$precision "$python" -m benchmarks.stream "${stream[@]}" --quantize $precision \
        --cache-dtype int8 --output "$folder/stream_$precision"
done
# the other decoders, behind the same block step
for decode in causal tiny; do
    part decode_$decode "$python" -m benchmarks.stream "${stream[@]}" --window 3 --decode $decode \
        --output "$folder/decode_$decode"
done
part stage2 "$python" -m benchmarks.train --stage stage2 "${train[@]}"
echo "$summary"
