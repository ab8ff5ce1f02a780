#!/bin/sh
# In a build stage: packages.sh -> /opt/egm, a Python environment with exactly what /src/requirements.txt says.
# What changes seldom and weighs most goes to /heavy, so that it is a layer of its own.
set -eu
export PYTHONHASHSEED=0
uv venv --quiet --no-project --python "$(command -v python3)" /opt/egm
# build constraints: the one package that comes as source is built by the locked setuptools
uv pip install --quiet --no-config --python /opt/egm --link-mode copy --require-hashes --no-deps --build-constraints /src/build.txt -r /src/requirements.txt
site=$(echo /opt/egm/lib/python3.*/site-packages)
if [ -f /src/leave-out.txt ]; then
  grep -v '^#' /src/leave-out.txt | while read -r pattern; do
    # shellcheck disable=SC2086 # the pattern is meant to be expanded
    (cd "$site" && rm $pattern)
  done
fi
# A model or API class of Kubernetes is loaded when it is asked for, which is seldom: compiled beforehand they would weigh as much again.
# Not by time stamps, which the image's layers do not keep
/opt/egm/bin/python -m compileall -q -j "${JOBS:-2}" --invalidation-mode unchecked-hash \
  -x '/kubernetes/(aio/)?client/(models|api)/[a-z]' "$site" >/dev/null || true # templates that are no Python
rm -rf "$site"/_virtualenv* /opt/egm/CACHEDIR.TAG /opt/egm/.lock /opt/egm/.gitignore /opt/egm/bin/activate* /opt/egm/bin/deactivate* /opt/egm/bin/pydoc.bat
find /opt/egm -perm /6000 -type f -exec chmod a-s {} +
mkdir -p "/heavy$site"
for name in torch nvidia triton; do
  [ ! -d "$site/$name" ] || mv "$site/$name" "/heavy$site/"
done
