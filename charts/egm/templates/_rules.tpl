{{/* Rights in the served namespaces. tests/cluster/test_chart_rbac.py fails if a right is missing or unused. */}}
{{- define "egm.rules" -}}
# the jobs: get reads the current state after a conflict, delete is for ttlSecondsAfterFinished
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs, groundingevaljobs]
  verbs: [get, list, watch, delete]
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs/status, groundingevaljobs/status]
  verbs: [patch]
# for blockOwnerDeletion in ownerReferences, if the cluster checks it (OwnerReferencesPermissionEnforcement)
- apiGroups: [grounding.egm.dev]
  resources: [groundingtrainjobs/finalizers, groundingevaljobs/finalizers]
  verbs: [update]
# gangs of both back ends, and the Jobs of prepare and client. patch: only to suspend them. get: to check the owner of an existing object with the same name
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# Services for the names of servers, and of the pods of a gang that is a Job
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
# the token with which a job's pods authenticate each other; the operator creates it and never reads it
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
{{- if .Values.networkPolicy.jobs.enabled }}
# one policy per job. get: to check the owner of an existing policy with the same name
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
{{- end }}
# list: events say why a controller cannot create a pod, or why a node cannot start it
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
# a Workload says why Kueue has not admitted a job
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- if eq .Values.settings.progressVia "proxy" }}
- apiGroups: [""]
  resources: [pods/proxy]
  verbs: [get]
{{- end }}
{{- end -}}
