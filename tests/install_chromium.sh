#!/bin/sh
# The browser of tests/serve/server/test_playground.py: Debian's own, where there is none.
set -eu

if command -v chromium >/dev/null; then
    exit 0
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
    as_root="sudo --non-interactive"
fi
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update --quiet
# Without fonts a page has no text to look at.
$as_root apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core
