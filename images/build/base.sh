#!/bin/sh
# In a build stage, check that the image BASE has everything that the final image needs: base.sh cpu|gpu
set -eu
fail() { echo "error: BASE $1; docs/images.md says what a base needs" >&2; exit 1; }
command -v python3 >/dev/null || fail "has no python3"
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || fail "has $(python3 -V), 3.11 or 3.12 is wanted"
python3 -c 'import ctypes; ctypes.CDLL("libstdc++.so.6")' 2>/dev/null || fail "has no libstdc++"
command -v tini >/dev/null || fail "has no tini"
[ -s /etc/ssl/certs/ca-certificates.crt ] || fail "has no CA certificates"
[ -f /var/lib/dpkg/status ] || fail "is not Debian's or a descendant"
python3 -c 'import os, sys; sys.exit(tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split("."))) < (2, 34))' || fail "has a glibc older than 2.34"
if [ "$1" = gpu ]; then
  command -v cc >/dev/null || fail "has no C compiler, by which Triton builds its launchers"
  [ -f "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || fail "has no Python headers, by which Triton builds its launchers"
fi
