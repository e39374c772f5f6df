{{- /* Names, labels and the image: what every object of the chart shares. */ -}}
{{- define "agx-sidecar.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "agx-sidecar.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "agx-sidecar.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "agx-sidecar.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride }}
{{- end }}

{{- define "agx-sidecar.selectorLabels" -}}
app.kubernetes.io/name: {{ include "agx-sidecar.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "agx-sidecar.labels" -}}
{{- $own := include "agx-sidecar.selectorLabels" . | fromYaml }}
{{- $about := dict
      "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_")
      "app.kubernetes.io/version" .Chart.AppVersion
      "app.kubernetes.io/managed-by" .Release.Service }}
{{- merge (dict) $own $about .Values.commonLabels | toYaml }}
{{- end }}

{{- /* The metadata of an object: (dict "root" $ "suffix" "-console" "labels" {...} "annotations" {...} "namespace" "").
       All but the first two may be left out. */ -}}
{{- define "agx-sidecar.metadata" -}}
name: {{ include "agx-sidecar.fullname" .root }}{{ .suffix }}
namespace: {{ default (include "agx-sidecar.namespace" .root) .namespace }}
labels:
  {{- $labels := include "agx-sidecar.labels" .root | fromYaml }}
  {{- merge (dict) (default (dict) .labels) $labels | toYaml | nindent 2 }}
{{- with merge (dict) (default (dict) .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "agx-sidecar.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- /* The labels by which the PodMonitor finds pods that have the sidecar as a container. */ -}}
{{- define "agx-sidecar.podLabels" -}}
agx-sidecar/scrape: "true"
{{- end }}
