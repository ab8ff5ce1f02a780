#!/usr/bin/env bash
# Build one image: images/build.sh operator|train|infer. Needs buildah (no daemon) and root.
#
#   VARIANT=cpu|gpu  ENGINE=sglang|vllm   which train or infer image (default: cpu)
#   TAG=dev          its tag, to which train and infer add -cpu, -gpu, -sglang or -vllm
#   REPOSITORY=localhost   its prefix
#   BASE, BUILDER    base image and builder image; if not given and missing, they are created from Debian packages (images/base/debian.sh)
#   NO_CACHE=1       build every step again
#   CACHE=FOLDER     uv's cache of wheels; default: that of this user
#
# Time stamps in layers are those of SOURCE_DATE_EPOCH (default: 0), so that the same sources and packages give the same layers.
set -euo pipefail
cd "$(dirname "$0")/.."
. images/names.sh
what=${1:?operator, train or infer}
case $what in
  operator) file=images/Dockerfile.operator variant=cpu ;;
  train | infer) file=Dockerfile.$what ;;
  *) echo "error: expected operator, train or infer, found $what" >&2; exit 2 ;;
esac
command -v buildah >/dev/null || { echo "error: buildah is not installed; on Debian: apt-get install buildah" >&2; exit 2; }
suite=${SUITE:-bookworm}
wanted() { # IMAGE KIND: create the image if it does not exist
  buildah inspect --type image "$1" >/dev/null 2>&1 || images/base/debian.sh "$2" "$1" >&2
}
if [ -z "${BASE:-}" ]; then
  if [ "$variant" = gpu ]; then BASE=localhost/egm-base-gpu:$suite; wanted "$BASE" gpu
  else BASE=localhost/egm-base:$suite; wanted "$BASE" run; fi
fi
if [ -z "${BUILDER:-}" ]; then BUILDER=localhost/egm-builder:$suite; wanted "$BUILDER" build; fi
name=${REPOSITORY:-localhost}/$(image "$what")
cache=${CACHE:-${UV_CACHE_DIR:-$HOME/.cache/uv}}
mkdir -p "$cache"
scripts=$(cat images/build/{base.sh,packages.sh,sbom.py,requirements.txt} "$([ "$what" = operator ] && echo images/operator/leave-out.txt || echo /dev/null)" | sha256sum | cut -c1-16)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
arguments=(${NO_CACHE:+--no-cache} --build-arg "BASE=$BASE" --build-arg "BUILDER=$BUILDER")
[ "$what" = operator ] || arguments+=(--build-arg "VARIANT=$variant")
[ "$what" != infer ] || arguments+=(--build-arg "ENGINE=$engine")
# the build's steps use this machine's certificates and wheels; they are mounted, so neither is stored in a layer
buildah build --isolation chroot --layers --pull-never --format oci --timestamp "${SOURCE_DATE_EPOCH:-0}" --ignorefile .dockerignore \
  --volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro --volume "$cache:/media" \
  --build-arg UV_NO_CACHE=false --build-arg UV_CACHE_DIR=/media --build-arg "SCRIPTS=$scripts" --build-arg "REVISION=$revision" --build-arg "VERSION=$version" \
  "${arguments[@]}" --file "$file" --tag "$name" .
echo "$name"
