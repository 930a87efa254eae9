#!/bin/sh
# Runs inside the build of an image: `install.sh dependencies [PRUNE]`, then `install.sh own`.
#
# Wheels come from the wheelhouse only, and with the digests of the lock. Byte code is compiled here, because the images
# run with a read-only root; it names no time, so that the same wheels make the same layer.
set -eu
# What is imported on the way would be compiled with the time of its source, and then be left as it is.
export PYTHONDONTWRITEBYTECODE=1

installer=$(echo /wheels/pip-*.whl)
pip() {
    python3 "$installer/pip" install --quiet --no-index --no-deps --no-compile \
        --no-cache-dir --disable-pip-version-check --root-user-action=ignore --break-system-packages "$@"
}

compile() {
    python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$1"
}

site=$(python3 -c 'import site; print(site.getsitepackages()[0])')
case "$1" in
dependencies)
    pip --find-links /wheels --require-hashes --requirement /lock
    if [ "${2:-false}" = true ]; then
        # Compilers and kernels for GPUs. What libtorch is linked with has to stay: it does not load without.
        rm -rf "$site"/triton "$site"/nvidia/nvshmem/lib/*.bc "$site"/nvidia/nvshmem/lib/*.a \
            "$site"/nvidia/cudnn/lib/libcudnn_* "$site"/nvidia/cu13/lib/libcusolver* \
            "$site"/nvidia/cu13/lib/libnvperf_* "$site"/nvidia/*/include
        rm -f "$site"/torch/lib/libtorch_cuda_linalg.so
    fi
    if [ -e "$site/torch" ]; then
        python3 -c 'import torch' \
            || { echo "BASE lacks a library that torch needs: glibc and libstdc++, see docs/images.md" >&2; exit 1; }
    fi
    # Some packages carry files of other versions of Python, which do not compile.
    compile "$site" || true
    ;;
own)
    pip /own/*.whl
    compile "$site/sonoforge_trainer"
    compile "$site/sonoforge_operator"
    ;;
*)
    echo "install.sh dependencies [PRUNE] or install.sh own, not: $*" >&2
    exit 2
    ;;
esac
