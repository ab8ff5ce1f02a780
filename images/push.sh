#!/usr/bin/env bash
# Push the three images to a registry: images/push.sh REGISTRY. Needs buildah; `buildah login HOST` stores the credentials.
#
#   VARIANT, ENGINE, TAG, REPOSITORY   which images, as for build.sh
#   INSECURE=1                         a registry without TLS, or with a certificate that this machine does not trust
set -euo pipefail
cd "$(dirname "$0")/.."
. images/names.sh
[ $# = 1 ] || { echo "usage: images/push.sh REGISTRY, such as images/push.sh registry.example.org/egm" >&2; exit 2; }
registry=${1%/}
if [[ ! $registry =~ ^[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9._/-]+)?$ ]]; then
  echo "error: expected REGISTRY=HOST[:PORT][/PATH] in lower case, such as REGISTRY=registry.example.org/egm, found '$registry'" >&2; exit 2
fi
host=${registry%%/*}
if [[ $host != localhost && $host != *[.:]* ]]; then # the rule of buildah and the kubelet
  echo "error: '$host' has neither a dot nor a port, so '$registry' would be docker.io/$registry; add the host, e.g. registry.example.com/egm" >&2; exit 2
fi
command -v buildah >/dev/null || { echo "error: buildah is not installed; on Debian: apt-get install buildah" >&2; exit 2; }
chosen="VARIANT=$variant$([ "$variant" = cpu ] || echo " ENGINE=$engine")$([ "$tag" = dev ] || echo " TAG=$tag")"
for what in operator train infer; do # before the first push, because each takes minutes
  buildah inspect --type image "${REPOSITORY:-localhost}/$(image $what)" >/dev/null 2>&1 && continue
  echo "error: there is no image ${REPOSITORY:-localhost}/$(image $what) on this machine; \`make images $chosen\` builds it" >&2; exit 2
done
for what in operator train infer; do
  echo "pushing $registry/$(image $what)"
  buildah push --quiet --tls-verify="$([ "${INSECURE:-}" = 1 ] && echo false || echo true)" \
    "${REPOSITORY:-localhost}/$(image $what)" "docker://$registry/$(image $what)" && continue
  echo "error: the push to $registry failed. Log in with \`buildah login $host\`; for a registry without TLS, add INSECURE=1." >&2; exit 1
done
values=image.registry=$registry,image.tag=$tag,image.variant=$variant$([ "$variant" = cpu ] || echo ",image.engine=$engine")
printf '\nInstall the operator with these images:\n  helm install egm charts/egm --namespace egm --create-namespace --set %s\n' "$values"
