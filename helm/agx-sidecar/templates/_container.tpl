{{- /* The sidecar as a container and its volumes: in our Deployment, or in your own pod (README). */ -}}
{{- define "agx-sidecar.container" -}}
name: agx-sidecar
image: {{ include "agx-sidecar.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
ports:
  - { name: http, containerPort: 9464, protocol: TCP }
env:
  {{- include "agx-sidecar.redisEnv" . | trim | nindent 2 }}
  - { name: AGX_HTTP_HOST, value: 0.0.0.0 }
  - { name: AGX_HTTP_PORT, value: "9464" }
  {{- with .Values.sinks }}
  - { name: AGX_SINKS, value: {{ join "," . | quote }} }
  {{- end }}
  {{- include "agx-sidecar.otlpEnv" . | trim | nindent 2 }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
startupProbe:
  httpGet: { path: /healthz, port: http }
  {{- toYaml .Values.startupProbe | nindent 2 }}
livenessProbe:
  httpGet: { path: /healthz, port: http }
  {{- toYaml .Values.livenessProbe | nindent 2 }}
readinessProbe:
  httpGet: { path: /readyz, port: http }
  {{- toYaml .Values.readinessProbe | nindent 2 }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  {{- include "agx-sidecar.withoutNulls" .Values.securityContext | nindent 2 }}
{{- with include "agx-sidecar.volumeMounts" . | fromYamlArray }}
volumeMounts:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.redisEnv" -}}
{{- $keys := .Values.redis.secretKeys }}
{{- $secret := .Values.redis.existingSecret }}
{{- if and $secret $keys.url }}
- name: AGX_REDIS_URL
  valueFrom: { secretKeyRef: { name: {{ $secret }}, key: {{ $keys.url }} } }
{{- else if and $secret $keys.cert }}
{{- $files := "ssl_certfile=/etc/agx/redis/cert.pem&ssl_keyfile=/etc/agx/redis/key.pem" }}
- { name: AGX_REDIS_URL, value: {{ printf "%s%s%s" .Values.redis.url (ternary "&" "?" (contains "?" .Values.redis.url)) $files | quote }} }
{{- else }}
- { name: AGX_REDIS_URL, value: {{ .Values.redis.url | quote }} }
{{- end }}
{{- if and $secret $keys.password }}
- name: AGX_REDIS_PASSWORD
  valueFrom: { secretKeyRef: { name: {{ $secret }}, key: {{ $keys.password }}, optional: {{ ne $keys.url "" }} } }
{{- end }}
{{- if and $secret $keys.ca }}
- { name: AGX_REDIS_CA, value: /etc/agx/redis/ca.pem }
{{- end }}
- { name: AGX_KEY_PREFIX, value: {{ .Values.redis.keyPrefix | quote }} }
- { name: AGX_SEMCONV, value: {{ .Values.semconv }} }
- { name: AGX_LOG_LEVEL, value: {{ .Values.logLevel }} }
- { name: AGX_LOG_FORMAT, value: {{ .Values.logFormat }} }
{{- end }}

{{- define "agx-sidecar.otlpEnv" -}}
{{- $keys := .Values.otlp.secretKeys }}
{{- $secret := .Values.otlp.existingSecret }}
{{- if .Values.otlp.endpoint }}
- { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.otlp.endpoint | quote }} }
- { name: OTEL_EXPORTER_OTLP_PROTOCOL, value: {{ .Values.otlp.protocol }} }
- { name: OTEL_EXPORTER_OTLP_TIMEOUT, value: {{ .Values.otlp.timeout | quote }} }
- { name: OTEL_EXPORTER_OTLP_COMPRESSION, value: {{ .Values.otlp.compression }} }
{{- if and $secret $keys.headers }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: { secretKeyRef: { name: {{ $secret }}, key: {{ $keys.headers }} } }
{{- end }}
{{- if and $secret $keys.ca }}
- { name: OTEL_EXPORTER_OTLP_CERTIFICATE, value: /etc/agx/otlp/ca.pem }
{{- end }}
{{- if and $secret $keys.cert }}
- { name: OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE, value: /etc/agx/otlp/cert.pem }
- { name: OTEL_EXPORTER_OTLP_CLIENT_KEY, value: /etc/agx/otlp/key.pem }
{{- end }}
{{- end }}
{{- end }}

{{- /* The files of a secret: (dict "name" "redis" "of" .Values.redis) -> items of a volume; nothing without files. */ -}}
{{- define "agx-sidecar.secretItems" -}}
{{- $keys := .secretKeys }}
{{- if .existingSecret }}
{{- range list "ca" "cert" "key" }}
{{- if get $keys . }}
- { key: {{ get $keys . }}, path: {{ . }}.pem }
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.volumeMounts" -}}
{{- range $name := list "redis" "otlp" }}
{{- if include "agx-sidecar.secretItems" (get $.Values $name) }}
- { name: agx-{{ $name }}, mountPath: /etc/agx/{{ $name }}, readOnly: true }
{{- end }}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "agx-sidecar.volumes" -}}
{{- range $name := list "redis" "otlp" }}
{{- $of := get $.Values $name }}
{{- with include "agx-sidecar.secretItems" $of }}
- name: agx-{{ $name }}
  secret:
    secretName: {{ $of.existingSecret }}
    defaultMode: 0440
    items:
      {{- trim . | nindent 6 }}
{{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}
