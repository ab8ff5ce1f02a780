{{/* Rights in the namespaces that are served. Every line is used, and tests/cluster/test_chart_rbac.py fails where one is missing or too much. */}}
{{- define "egm.rules" -}}
# the jobs themselves: get for a fresh view after a conflict, delete for ttlSecondsAfterFinished
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs, groundingevaljobs]
  verbs: [get, list, watch, delete]
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs/status, groundingevaljobs/status]
  verbs: [patch]
# blockOwnerDeletion in ownerReferences, where the cluster enforces it (OwnerReferencesPermissionEnforcement)
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs/finalizers, groundingevaljobs/finalizers]
  verbs: [update]
# gangs of either back end; prepare and client Jobs: patched for suspension alone. get: to judge whose it is where a name is taken
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# names of servers, and of the pods of a gang that is a Job
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
# the token by which pods of a job know each other, which its servers ask for: made, never read
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
{{- if .Values.networkPolicy.jobs.enabled }}
# one a job; get: to judge whose it is where a name is taken
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
{{- end }}
# list: why a controller cannot create a pod, or a node cannot start one
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
# why Kueue has not admitted a job
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- if eq .Values.settings.progressVia "proxy" }}
- apiGroups: [""]
  resources: [pods/proxy]
  verbs: [get]
{{- end }}
{{- end -}}
