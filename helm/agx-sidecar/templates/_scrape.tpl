{{- /* One endpoint of a monitor: (dict "monitor" .Values.serviceMonitor). */ -}}
{{- define "agx-sidecar.endpoint" -}}
port: http
path: /metrics
# `service` is a label of ours; the operator's target label of that name must not push it aside.
honorLabels: true
{{- with .monitor.interval }}
interval: {{ . }}
{{- end }}
{{- with .monitor.scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
{{- with .monitor.relabelings }}
relabelings:
  {{- toYaml . | nindent 2 }}
{{- end }}
metricRelabelings:
  {{- .root.Files.Get "files/fleet-relabelings.yaml" | nindent 2 }}
  {{- with .monitor.metricRelabelings }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
