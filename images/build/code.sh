#!/bin/sh
# In a build stage: install the project's wheel from /src, and copy what it puts into /opt/egm to /code. With the argument `modules`, leave out
# the command line, which needs further packages. After a change of code, only this step runs again, which takes seconds.
set -eu
export PYTHONHASHSEED=0 SOURCE_DATE_EPOCH=315532800 # the earliest time that a zip archive can store
cd /src
/tools/bin/hatchling build -t wheel -d /tmp/wheel >/dev/null 2>&1
uv venv --quiet --no-project --python "$(command -v python3)" /opt/egm
uv pip install --quiet --no-config --offline --no-cache --python /opt/egm --no-deps /tmp/wheel/*.whl
site=$(echo /opt/egm/lib/python3.*/site-packages)
for note in direct_url.json uv_cache.json; do # files that record when and from where the package was installed
  rm -f "$site"/egm_grounding-*.dist-info/$note
  sed -i "\\|dist-info/$note,|d" "$site"/egm_grounding-*.dist-info/RECORD
done
/opt/egm/bin/python -m compileall -q --invalidation-mode unchecked-hash "$site/grounding" "$site/egm_operator"
mkdir -p "/code$site"
mv "$site/grounding" "$site/egm_operator" "$site"/egm_grounding-*.dist-info "/code$site/"
if [ "${1:-}" != modules ]; then
  mkdir -p /code/opt/egm/bin
  mv /opt/egm/bin/egm /code/opt/egm/bin/
fi
