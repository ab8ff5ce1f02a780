#!/usr/bin/env bash
# Create a base image from Debian packages only, for CI and sites without a registry: images/base/debian.sh KIND NAME[:TAG]
#
#   run    the base of our images: Python, CA certificates, tini
#   gpu    the same with a C compiler, with which Triton builds its launchers at the first use of a kernel
#   build  for installing wheels and compiling code; none of its files are copied into an image
#
# The release is Debian 12 (Python 3.11, glibc 2.36), because vLLM's and SGLang's wheels need glibc 2.34. SUITE=trixie selects another release,
# MIRROR=URL another mirror.
# Needs root, mmdebstrap and buildah.
set -euo pipefail
kind=${1:?run, gpu or build} name=${2:?the name of the image}
suite=${SUITE:-bookworm}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0} TMPDIR=${TMPDIR:-/var/tmp}
for program in mmdebstrap buildah; do
  command -v "$program" >/dev/null || { echo "error: $program is not installed; on Debian: apt-get install mmdebstrap buildah" >&2; exit 2; }
done
packages=python3-minimal,libpython3-stdlib,libstdc++6,ca-certificates,tini,usr-is-merged
case $kind in
  run) ;;
  gpu) packages+=,gcc,libc6-dev,libpython3-dev ;;
  build) packages+=,python3-venv,binutils ;;
  *) echo "error: expected run, gpu or build, found $kind" >&2; exit 2 ;;
esac
work=$(mktemp -d)
container=
trap '[ -z "$container" ] || buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT
leave_out=(/usr/share/{man,info,locale,lintian,doc}/'*')
options=()
for path in "${leave_out[@]}"; do options+=(--dpkgopt="path-exclude=$path"); done
options+=(--dpkgopt='path-include=/usr/share/doc/*/copyright')
# None of our programs changes its user, so setuid bits are removed. Files that identify the machine or the time are removed too.
# shellcheck disable=SC2016
options+=(
  # the package that merged /usr at the bootstrap, and Perl, which only that package needs
  --customize-hook='chroot "$1" dpkg --purge usrmerge $(chroot "$1" dpkg-query -W -f "\${Package}\n" | grep -E "^(perl|perl-modules-.*|libperl[0-9].*|lib.*-perl|libgdbm.*)$") >/dev/null'
  --customize-hook='find "$1" -xdev -perm /6000 -type f -exec chmod a-s {} +'
  --customize-hook='rm -rf "$1"/var/log/* "$1"/var/cache/ldconfig/* "$1"/var/cache/debconf/*-old "$1"/etc/machine-id "$1"/etc/hostname "$1"/etc/resolv.conf'
  --customize-hook='rm -rf "$1"/usr/lib/python3*/pydoc_data "$1"/usr/lib/python3*/turtledemo "$1"/usr/lib/python3*/idlelib'
  --customize-hook='find "$1"/usr/lib/python3* "$1"/usr/share -name __pycache__ -prune -exec rm -rf {} +'
  --customize-hook='ln -sf python3 "$1"/usr/bin/python'
)
mmdebstrap --quiet --variant=essential --mode=root --include="$packages" "${options[@]}" "$suite" "$work/root.tar" ${MIRROR:+"$MIRROR"}
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/root.tar" / >/dev/null
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 --cmd /bin/bash "$container"
buildah commit --quiet --timestamp "$SOURCE_DATE_EPOCH" "$container" "$name" >/dev/null
echo "$name: $(($(stat -c %s "$work/root.tar") / 1000000)) MB"
