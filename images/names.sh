# Sourced by build.sh and push.sh: check VARIANT and ENGINE, and name an image.

variant=${VARIANT:-cpu} engine=${ENGINE:-sglang} tag=${TAG:-dev}
case $variant in cpu | gpu) ;; *) echo "error: expected VARIANT=cpu or gpu, found $variant" >&2; exit 2 ;; esac
if [ ! -f "images/infer-$engine/requirements.txt" ]; then
  echo "error: expected ENGINE=sglang or vllm, found $engine" >&2; exit 2
fi

# image operator|train|infer: name and tag. Variants and engines have tags of their own, so that no build or push replaces another.
# The chart makes the same names from its values (charts/egm/templates/_helpers.tpl).
image() {
  case $1 in
    operator) echo "egm-operator:$tag" ;;
    train) echo "egm-train:$tag-$variant" ;;
    infer) echo "egm-infer:$tag-$([ "$variant" = cpu ] && echo cpu || echo "$engine")" ;;
  esac
}
