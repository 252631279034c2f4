#!/bin/sh
# Builds the kernels with address and undefined-behaviour sanitizers and runs their tests.
#   sh csrc/sanitize.sh [pytest arguments]
# CXXFLAGS=-DRAREFY_VECTOR_BYTES=64 tests the code for AVX-512 on a machine without it: the compiler splits the vectors.
# -DRAREFY_EMULATE_TILES tests the code for the matrix unit AMX on a machine without it, -DRAREFY_AS_INTEL what is chosen
# on Intel's processors alone.
# Uses `python3` (or $PYTHON), which must have torch, nanobind, pytest and hypothesis; builds in $BUILD (a temporary
# directory by default) and works on a copy of the package, so that an installed build is left alone.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')  # CMake ignores a relative path
build=${BUILD:-$(mktemp -d)}
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRAREFY_SANITIZE=ON -DRAREFY_REQUIRE_KERNELS=ON \
  -DPython_EXECUTABLE="$python"
cmake --build "$build" --parallel "$("$python" -c "import os; print(os.cpu_count())")"
mkdir -p "$build/package"
rm -rf "$build/package/rarefy"
cp -r "$root/src/rarefy" "$build/package/rarefy"
rm -f "$build"/package/rarefy/kernels/_C*.so
cp "$build"/_C*.so "$build/package/rarefy/kernels/"
# -S, because an editable install would put itself before the copy.
site=$("$python" -c 'import site; print(site.getsitepackages()[0])')
# The interpreter and torch are not instrumented: leaks are theirs, and their frames differ from ours.
# libstdc++ comes early, because the sanitizer looks for its exception functions when it starts.
sanitized() {
  LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:use_sigaltstack=0 \
  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  PYTHONPATH="$build/package:$site" "$python" -S "$@"
}
sanitized -c "import sys, torch, rarefy.kernels._C as c; sys.exit(c.__file__ + ' is not what was built' \
  if not c.__file__.startswith('$build') else 0)"
# -s, because a report is written right before the process ends, when captured output is lost.
sanitized -m pytest -s -p no:cacheprovider -o pythonpath="$root/tests" --rootdir "$root" "$root/tests/kernels" \
  -k "not compile and not contract" "$@"
