{{- /* What our pods share: (dict "root" $ "component" "sidecar" "secrets" (list "name") "container" "...");
       "grace" replaces the sidecar's termination grace period. */ -}}
{{- define "agx-sidecar.pod" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $selector := merge (dict "app.kubernetes.io/component" .component) (include "agx-sidecar.selectorLabels" $root | fromYaml) }}
metadata:
  labels:
    {{- merge (dict) $selector $values.podLabels (include "agx-sidecar.labels" $root | fromYaml) | toYaml | nindent 4 }}
  {{- $checksums := include "agx-sidecar.checksums" (dict "root" $root "secrets" .secrets) | fromYaml }}
  {{- with merge (dict) $checksums $values.podAnnotations $values.commonAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "agx-sidecar.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ default $values.terminationGracePeriodSeconds .grace }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.hostAliases }}
  hostAliases:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.dnsPolicy }}
  dnsPolicy: {{ . }}
  {{- end }}
  {{- with $values.dnsConfig }}
  dnsConfig:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "agx-sidecar.withoutNulls" $values.podSecurityContext | nindent 4 }}
  {{- with $values.initContainers }}
  initContainers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - {{- .container | nindent 6 }}
    {{- with $values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with include "agx-sidecar.volumes" $root | fromYamlArray }}
  volumes:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $values.topologySpreadConstraints }}
    {{- toYaml $values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- toYaml $selector | nindent 10 }}
    {{- end }}
{{- end }}

{{- /* An annotation per secret, so that a changed secret restarts the pods at the next upgrade. The content is read from
       the cluster; without one (`helm template`) there is no annotation. */ -}}
{{- define "agx-sidecar.checksums" -}}
{{- range $name := without .secrets "" | uniq }}
{{- with get (default (dict) (lookup "v1" "Secret" (include "agx-sidecar.namespace" $.root) $name)) "data" }}
checksum/{{ $name | trunc 63 }}: {{ toJson . | sha256sum }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A dictionary as YAML, without the keys whose value is null or empty text. */ -}}
{{- define "agx-sidecar.withoutNulls" -}}
{{- $some := dict }}
{{- range $key, $value := . }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
{{- $_ := set $some $key $value }}
{{- end }}
{{- end }}
{{- toYaml $some }}
{{- end }}
