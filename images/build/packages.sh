#!/bin/sh
# In an image, install exactly the packages of /opt/egm/lock/PART.txt into the Python environment /opt/egm: packages.sh heavy|rest.
# Tools, locks and scripts are mounted at /mnt. The packages are therefore written only once, into the layer of this step, and a later build
# can reuse that layer without reading them.
set -eu
part=$1 tools=/mnt/tools/bin
export PYTHONHASHSEED=0 SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
if [ -f /mnt/etc/uv/uv.toml ]; then config="--config-file /mnt/etc/uv/uv.toml"; else config=--no-config; fi # the builder's package index
[ -x /opt/egm/bin/python ] || "$tools/uv" venv --quiet --no-project --allow-existing --python "$(command -v python3)" /opt/egm
site=$(echo /opt/egm/lib/python3.*/site-packages)
rm -rf "$site"/_virtualenv* /opt/egm/CACHEDIR.TAG /opt/egm/.gitignore /opt/egm/bin/activate* /opt/egm/bin/deactivate* /opt/egm/bin/pydoc.bat
before=$(ls "$site")
# build constraints: the only package without a wheel is built by the locked setuptools
# shellcheck disable=SC2086 # an option and its value
"$tools/uv" pip install --quiet $config --python /opt/egm --link-mode copy --require-hashes --no-deps --build-constraints /mnt/src/build.txt -r "/opt/egm/lock/$part.txt"
if [ -f /mnt/src/leave-out.txt ]; then
  grep -v '^#' /mnt/src/leave-out.txt | while read -r pattern; do
    # shellcheck disable=SC2086 # the pattern is meant to be expanded
    (cd "$site" && rm $pattern)
  done
fi
# only compile the packages of this step; the others are compiled in an earlier layer
set --
for entry in "$site"/*; do
  printf '%s\n' "$before" | grep -qxF "${entry##*/}" || set -- "$@" "$entry"
done
# Model and API classes of Kubernetes are rarely loaded, so they are not compiled: that would double their size.
# Validate bytecode by hash, because the image's layers do not keep time stamps
/opt/egm/bin/python -m compileall -q -j "${JOBS:-2}" --invalidation-mode unchecked-hash \
  -x '/kubernetes/(aio/)?client/(models|api)/[a-z]' "$@" >/dev/null || true # some files are templates and not valid Python
rm -rf /opt/egm/.lock /tmp/* /tmp/.[!.]*
find /opt/egm -perm /6000 -type f -exec chmod a-s {} +
