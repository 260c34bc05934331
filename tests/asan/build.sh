#!/bin/sh
# Builds the CPU kernel with the address and undefined-behaviour sanitizers and runs it over the
# grid of main.cpp, with each instruction set of this machine. Argument: a folder for the binary.
set -eu
out=${1:-build/asan}
cxx=${CXX:-c++}
here=$(dirname "$0")
csrc=$here/../../src/acmix/csrc
flags="-std=c++17 -O1 -g -ffp-contract=fast -fsanitize=address,undefined
 -fno-sanitize-recover=all -I$csrc"
kernels=$csrc/simd/kernels.cpp
mkdir -p "$out"
"$cxx" $flags -DACMIX_ISA=plain -c "$kernels" -o "$out/plain.o" &
variants=
case $(uname -m) in
x86_64)
  variants=-DACMIX_X86_VARIANTS
  "$cxx" $flags -mavx2 -mfma -mf16c -DACMIX_ISA=avx2 -c "$kernels" -o "$out/avx2.o" &
  "$cxx" $flags -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -DACMIX_ISA=avx512 \
    -c "$kernels" -o "$out/avx512.o" &
  ;;
esac
wait
others=$(find "$csrc" -name '*.cpp' ! -name kernels.cpp)
"$cxx" $flags $variants "$here/main.cpp" $others "$out"/*.o -pthread -o "$out/kernel"
for simd in plain avx2 avx512; do
  ACMIX_SIMD=$simd "$out/kernel"
done
