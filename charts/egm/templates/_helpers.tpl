{{/* Name of the release's objects: the release's name if it contains the chart's, otherwise both. 40 characters leave space for suffixes within 63. */}}
{{- define "egm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of the operator's objects. */}}
{{- define "egm.operator" -}}
{{- include "egm.fullname" . }}-operator
{{- end -}}

{{- define "egm.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "egm.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is required if serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods; they cannot change during the life of a release. */}}
{{- define "egm.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "egm.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "egm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: egm
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "egm.tag" -}}
{{- default .Chart.AppVersion .Values.image.tag -}}
{{- end -}}

{{/* The registry of all images. A name without a dot and without a port would be a path on docker.io; images/push.sh has the same rule. */}}
{{- define "egm.registry" -}}
{{- $registry := trimSuffix "/" .Values.image.registry -}}
{{- if and $registry (not (regexMatch "^(localhost|[^/]*[.:][^/]*)(/|$)" $registry)) -}}
{{- fail (printf "\n\nimage.registry: the host of %q has neither a dot nor a port, so nodes would pull from docker.io/%s. Write the host, such as image.registry=docker.io/%s.\n" $registry $registry $registry) -}}
{{- end -}}
{{- $registry -}}
{{- end -}}

{{- define "egm.image" -}}
{{- $image := printf "%s/%s" (include "egm.registry" .) .Values.image.repository | trimPrefix "/" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $image .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image (include "egm.tag" .) -}}
{{- end -}}
{{- end -}}

{{/* Images of jobs' pods, named as by images/names.sh. */}}
{{- define "egm.trainImage" -}}
{{- printf "%s/egm-train:%s-%s" (include "egm.registry" .) (include "egm.tag" .) .Values.image.variant | trimPrefix "/" -}}
{{- end -}}

{{- define "egm.inferImage" -}}
{{- $suffix := ternary "cpu" .Values.image.engine (eq .Values.image.variant "cpu") -}}
{{- printf "%s/egm-infer:%s-%s" (include "egm.registry" .) (include "egm.tag" .) $suffix | trimPrefix "/" -}}
{{- end -}}

{{/* The settings as environment: `gpuResource` is EGM_OPERATOR_GPU_RESOURCE. As JSON, because a template would print 1000000 as 1e+06. */}}
{{- define "egm.settings" -}}
{{- $images := dict "trainImage" (include "egm.trainImage" .) "inferImage" (include "egm.inferImage" .) }}
{{- range $key, $value := .Values.settings }}
{{- $text := ternary $value (toJson $value) (kindIs "string" $value) }}
{{- $text = ternary (get $images $key) $text (and (eq $text "") (hasKey $images $key)) }}
{{- if not (has $text (list "" "null")) }}
- name: EGM_OPERATOR_{{ $key | snakecase | upper }}
  value: {{ $text | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The settings about NetworkPolicies of jobs as environment. */}}
{{- define "egm.jobNetwork" -}}
{{- if .Values.networkPolicy.jobs.enabled -}}
- name: EGM_OPERATOR_NETWORK_POLICIES
  value: "true"
{{- if eq .Values.settings.progressVia "pod" }}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) }}
{{- $pod := dict "matchLabels" (include "egm.selector" . | fromYaml) }}
- name: EGM_OPERATOR_NETWORK_TELEMETRY_FROM
  value: {{ list (dict "namespaceSelector" $namespace "podSelector" $pod) | toJson | quote }}
{{- else if eq .Values.settings.progressVia "proxy" }}
# allows all sources, because the API server sends these requests, and its address is unknown here
- name: EGM_OPERATOR_NETWORK_TELEMETRY_FROM
  value: {{ list (dict "ipBlock" (dict "cidr" "0.0.0.0/0")) (dict "ipBlock" (dict "cidr" "::/0")) | toJson | quote }}
{{- end }}
{{- if .Values.networkPolicy.from }}
- name: EGM_OPERATOR_NETWORK_SCRAPE_FROM
  value: {{ .Values.networkPolicy.from | toJson | quote }}
{{- else if .Values.metrics.podMonitor.enabled }}
- name: EGM_OPERATOR_NETWORK_SCRAPE_FROM
  value: {{ list (dict "namespaceSelector" dict) | toJson | quote }}
{{- end }}
{{- with .Values.networkPolicy.jobs.egress }}
- name: EGM_OPERATOR_NETWORK_EGRESS
  value: {{ toJson . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Namespaces of jobs' pods, in the format of a monitor's selector. */}}
{{- define "egm.namespaces" -}}
{{- if .Values.watchNamespaces -}}
matchNames:
{{- range .Values.watchNamespaces }}
- {{ . }}
{{- end }}
{{- else -}}
any: true
{{- end -}}
{{- end -}}

{{/* Only a real cluster (or --api-versions) lists kinds; `helm template` and `helm lint` only list versions. */}}
{{- define "egm.pytorchjobMissing" -}}
{{- if and (.Capabilities.APIVersions.Has "v1/Pod") (not (.Capabilities.APIVersions.Has "kubeflow.org/v1/PyTorchJob")) -}}
true
{{- end -}}
{{- end -}}

{{/* Service accounts that pods of jobs may have, as a list of CEL. */}}
{{- define "egm.jobsAccounts" -}}
[{{ .Values.settings.serviceAccount | default "default" | squote }}, '']
{{- end -}}
