{{/* Name of the objects: contains "steervit", which alerts and dashboards look for. */}}
{{- define "steervit.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "steervit" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-steervit" (.Release.Name | trunc 41 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "steervit.selector" -}}
app.kubernetes.io/name: steervit
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "steervit.labels" -}}
{{ include "steervit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Not empty, unless the models are those of the image. */}}
{{- define "steervit.models" -}}
{{- with .Values.models }}{{ if or .claim .pull.reference .volume }}mounted{{ end }}{{ end -}}
{{- end -}}

{{- define "steervit.image" -}}
{{- $flavour := ternary "cuda" (include "steervit.models" . | eq "" | ternary "demo" "cpu") .Values.gpu.enabled -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion $flavour) }}
{{- end -}}
{{- end -}}

{{/* Settings of the server: those of files/settings.env, those of the other values, and .Values.settings. */}}
{{- define "steervit.settings" -}}
{{- $all := dict -}}
{{- range .Files.Lines "files/settings.env" -}}
{{- if and . (not (hasPrefix "#" .)) -}}
{{- $pair := splitn "=" 2 . -}}
{{- $_ := set $all $pair._0 $pair._1 -}}
{{- end -}}
{{- end -}}
{{- if .Values.gpu.enabled }}{{ $_ := set $all "STEERVIT_PROVIDER" "cuda" }}{{ end -}}
{{- if or .Values.models.claim .Values.models.volume.persistentVolumeClaim }}{{ $_ := set $all "STEERVIT_MODEL_CONTROL" "poll" }}{{ end -}}
{{- if .Values.profiles }}{{ $_ := set $all "STEERVIT_PROFILES_DIR" "/etc/steervit/profiles" }}{{ end -}}
{{- if .Values.clientLimits }}{{ $_ := set $all "STEERVIT_CLIENT_LIMITS" "/etc/steervit/client-limits/limits.json" }}{{ end -}}
{{- if .Values.tls.secretName -}}
{{- $_ := set $all "STEERVIT_TLS_CERTIFICATE" "/etc/steervit/tls/tls.crt" -}}
{{- $_ := set $all "STEERVIT_TLS_KEY" "/etc/steervit/tls/tls.key" -}}
{{- if .Values.tls.clientCA }}{{ $_ := set $all "STEERVIT_TLS_CLIENT_CA" "/etc/steervit/tls/ca.crt" }}{{ end -}}
{{- end -}}
{{- with .Values.tracing -}}
{{- if .service }}{{ $_ := set $all "STEERVIT_OTLP_ENDPOINT" (printf "http://%s.%s:%v" .service .namespace .port) }}{{ end -}}
{{- end -}}
{{- range $name, $value := .Values.settings -}}
{{- $_ := set $all (printf "STEERVIT_%s" (upper $name)) (kindIs "string" $value | ternary $value (toJson $value)) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{- define "steervit.volumes" -}}
{{- $name := include "steervit.name" . -}}
{{- with .Values.models -}}
{{- if .claim }}
- name: models
  persistentVolumeClaim:
    claimName: {{ $name }}-models
    readOnly: true
{{- else if .pull.reference }}
- name: models
  emptyDir:
    sizeLimit: 10Gi
- name: credentials
  projected:
    sources:
      - secret:
          name: {{ .pull.registrySecret }}
          optional: true
          items:
            - {key: .dockerconfigjson, path: config.json}
      - secret:
          name: {{ .pull.storeSecret }}
          optional: true
{{- else if .volume }}
- name: models
  {{- toYaml .volume | nindent 2 }}
{{- end }}
{{- end }}
{{- if .Values.profiles }}
- name: profiles
  configMap:
    name: {{ $name }}-profiles
{{- end }}
{{- if .Values.clientLimits }}
- name: client-limits
  configMap:
    name: {{ $name }}-client-limits
{{- end }}
{{- with .Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ . }}
    # Readable through fsGroup.
    defaultMode: 0440
{{- end }}
{{- if .Values.gpu.enabled }}
- name: cuda-cache
  emptyDir:
    sizeLimit: 1Gi
{{- end }}
{{- end -}}

{{- define "steervit.mounts" -}}
{{- if include "steervit.models" . }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if .Values.profiles }}
- {name: profiles, mountPath: /etc/steervit/profiles, readOnly: true}
{{- end }}
{{- if .Values.clientLimits }}
- {name: client-limits, mountPath: /etc/steervit/client-limits, readOnly: true}
{{- end }}
{{- if .Values.tls.secretName }}
- {name: tls, mountPath: /etc/steervit/tls, readOnly: true}
{{- end }}
{{- if .Values.gpu.enabled }}
- {name: cuda-cache, mountPath: /var/cache/cuda}
{{- end }}
{{- end -}}

{{- define "steervit.resources" -}}
{{- $sizes := ternary (dict "cpu" "4" "memory" "8Gi") (dict "cpu" "2" "memory" "2Gi") .Values.gpu.enabled -}}
{{- $all := .Values.resources | default (dict "requests" $sizes "limits" $sizes) | deepCopy -}}
{{- if .Values.gpu.enabled -}}
{{- range list "requests" "limits" -}}
{{- $_ := set $all . (set (get $all . | default dict | deepCopy) $.Values.gpu.resource "1") -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}
