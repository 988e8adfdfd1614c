#!/bin/sh
# Installs the server into folders that are only read afterwards: no compiler, no torch, no pip stays there.
# The Dockerfile's RUN lines are calls of it, and a test makes the same calls without a container engine.
#
#   install.sh dependencies LOCK FOLDER      a virtual environment with the wheels that LOCK names, hash by hash
#   install.sh application SOURCE FOLDER     the packages service, export and training of SOURCE
#
# Needs Python with venv and pip, and PyPI. Writes FOLDER and TMPDIR, nothing else; any user may run it.
set -eu

if [ $# -ne 3 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

pip() {
    python3 -m pip --quiet --no-input --no-cache-dir --disable-pip-version-check "$@"
}

case $1 in
dependencies)
    python3 -m venv --without-pip "$3"
    pip --python "$3/bin/python" install --require-hashes --only-binary :all: --requirement "$2"
    ;;
application)
    pip install --require-hashes --only-binary :all: --target "$scratch/build" \
        --requirement "$2/deploy/requirements-build.lock"
    # setuptools writes beside the sources, which may be read-only.
    mkdir "$scratch/source"
    (cd "$2" && cp -R pyproject.toml README.md LICENSE service export training "$scratch/source")
    PYTHONPATH="$scratch/build" pip install --no-index --no-deps --no-build-isolation --target "$3" "$scratch/source"
    ;;
*)
    echo "install.sh: the step is '$1'; allowed: dependencies, application" >&2
    exit 2
    ;;
esac
