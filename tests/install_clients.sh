#!/bin/sh
# Clients of tests/serve/server/test_clients.py that do not go with the versions in constraints.txt, or are
# not Python: sh install_clients.sh PYTHON FOLDER [npm], into FOLDER/venv and FOLDER/node_modules.
set -eu

python=$1
folder=$2
# instructor wants an older jiter than openai has at its newest.
pip_packages="instructor==1.17.0 langchain-openai==1.7.4 litellm==1.110.2"
npm_packages="openai@6.49.0 zod@4.6.7 ai@6.0.326 @ai-sdk/openai-compatible@2.0.92 @ai-sdk/openai@3.0.141"

mkdir -p "$folder"

installed() { # NAME PACKAGES
    [ "$(cat "$folder/$1.installed" 2>/dev/null)" = "$2" ]
}

if ! installed pip "$pip_packages"; then
    "$python" -m venv --clear "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet --progress-bar off $pip_packages
    echo "$pip_packages" >"$folder/pip.installed"
fi
if [ "${3:-}" = npm ] && ! installed npm "$npm_packages"; then
    npm install --prefix "$folder" --no-save --no-fund --no-audit --loglevel=error $npm_packages
    echo "$npm_packages" >"$folder/npm.installed"
fi
