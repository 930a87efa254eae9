{{- /* Name of everything that a release makes: the operator's Lease and the policies of jobs know it. */ -}}
{{- define "sonoforge.name" -}}sonoforge-operator{{- end -}}

{{- /* Labels that select the operator's pods. They never change: a Deployment's selector cannot. */ -}}
{{- define "sonoforge.selector" -}}
app.kubernetes.io/name: {{ include "sonoforge.name" . }}
{{- end -}}

{{- define "sonoforge.podLabels" -}}
{{ include "sonoforge.selector" . }}
app.kubernetes.io/part-of: sonoforge
{{- end -}}

{{- /* Labels of every object. Those that something selects by win over `commonLabels`. */ -}}
{{- define "sonoforge.labels" -}}
{{- $own := include "sonoforge.podLabels" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $own "app.kubernetes.io/instance" .Release.Name -}}
{{- $_ := set $own "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{ merge $own .Values.commonLabels | toYaml }}
{{- end -}}

{{- /* A list as JSON: namespaces whose jobs are served. Empty with clusterWide. */ -}}
{{- define "sonoforge.served" -}}
{{- if .Values.clusterWide -}}
[]
{{- else -}}
{{ .Values.watchNamespaces | default (list .Release.Namespace) | uniq | toJson }}
{{- end -}}
{{- end -}}

{{- /* A list as JSON: namespaces that get the default runtime and the extra CA. */ -}}
{{- define "sonoforge.jobNamespaces" -}}
{{- if .Values.jobNamespaces -}}
{{ .Values.jobNamespaces | uniq | toJson }}
{{- else -}}
{{ include "sonoforge.served" . }}
{{- end -}}
{{- end -}}

{{- /* Reference of an image: (dict "image" VALUES "root" $) */ -}}
{{- define "sonoforge.image" -}}
{{- $name := .image.repository -}}
{{- if .image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" .image.registry) $name -}}{{- end -}}
{{- if and .image.digest .image.tag -}}
{{ $name }}:{{ .image.tag }}@{{ .image.digest }}
{{- else if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* How the user that the operator is calls itself to the API server. */ -}}
{{- define "sonoforge.user" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "sonoforge.name" . }}
{{- end -}}

{{- /* What the schema cannot say, because it is about two values at once. */ -}}
{{- define "sonoforge.checked" -}}
{{- $jobNamespaces := include "sonoforge.jobNamespaces" . | fromJsonArray -}}
{{- if and .Values.clusterWide .Values.watchNamespaces -}}
{{- fail (printf "watchNamespaces: found %s together with clusterWide: true. Allowed: one of them; remove the other" (toJson .Values.watchNamespaces)) -}}
{{- end -}}
{{- if and .Values.podDisruptionBudget.enabled (lt (int .Values.replicas) 2) -}}
{{- fail (printf "podDisruptionBudget.enabled: found true with replicas: %d, where a drain would wait for ever. Allowed: with 2 replicas or more; raise replicas or set it to false" (int .Values.replicas)) -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled -}}
{{- fail "metrics.podMonitor.enabled: found true together with metrics.serviceMonitor.enabled: true, which counts everything twice. Allowed: one of them; set the other to false" -}}
{{- end -}}
{{- if and .Values.admissionPolicy.requireDigests (not .Values.trainerImage.digest) -}}
{{- fail "admissionPolicy.requireDigests: found true without trainerImage.digest. Allowed: together with it; give the digest of the trainer's image" -}}
{{- end -}}
{{- if and .Values.defaultRuntime.enabled (not $jobNamespaces) -}}
{{- fail "jobNamespaces: found [] with clusterWide and defaultRuntime.enabled. Allowed: the namespaces that get the runtime; list them" -}}
{{- end -}}
{{- if and .Values.extraCa.certificates (not $jobNamespaces) -}}
{{- fail "jobNamespaces: found [] with clusterWide and extraCa.certificates. Allowed: the namespaces that get the certificates; list them" -}}
{{- end -}}
{{- end -}}
