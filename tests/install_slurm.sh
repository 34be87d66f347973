#!/bin/sh
# Slurm's daemons, for the tests of slurm/. Does nothing where they are.
set -eu
for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null 2>&1 || missing=yes
done
[ -n "${missing:-}" ] || exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
