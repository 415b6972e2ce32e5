{{/* Names and labels. Selectors hold name, instance, component and pool alone: they can never change. */}}

{{- define "depo-gateway.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "depo-gateway.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/*
The full name with a suffix: (dict "root" $ "suffix" "admin"), at most 63 characters as a Service's is, or "most". The
volumes' names have room and are never cut, because two releases may share their beginning.
*/}}
{{- define "depo-gateway.named" -}}
{{- $room := sub (default 63 .most | int) (len .suffix) | add -1 | int }}
{{- printf "%s-%s" (include "depo-gateway.fullname" .root | trunc $room | trimSuffix "-") .suffix }}
{{- end }}

{{- define "depo-gateway.learnerName" -}}
{{- include "depo-gateway.named" (dict "root" . "suffix" "learner" "most" 52) }}{{/* the most that a CronJob may have */}}
{{- end }}

{{- define "depo-gateway.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "depo-gateway.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/*
A volume's claim: (list NAME SECTION), where SECTION has existingClaim and accessMode. A claim's access mode can never
change, so each mode has its own claim: switching makes a new volume instead of failing the upgrade.
*/}}
{{- define "depo-gateway.claimName" -}}
{{- $section := index . 1 }}
{{- $suffix := get (dict "ReadWriteMany" "-shared" "ReadWriteOncePod" "-single") $section.accessMode }}
{{- default (printf "%s%s" (index . 0) $suffix) $section.existingClaim }}
{{- end }}

{{- define "depo-gateway.checkpointsClaim" -}}
{{- include "depo-gateway.claimName" (list (printf "%s-checkpoints" (include "depo-gateway.fullname" .)) .Values.checkpoints) }}
{{- end }}

{{- define "depo-gateway.recordsClaim" -}}
{{- include "depo-gateway.claimName" (list (printf "%s-records" (include "depo-gateway.fullname" .)) .Values.records.sqlite) }}
{{- end }}

{{/* The volume of a pool's weights: (dict "root" $ "pool" "small"). */}}
{{- define "depo-gateway.weightsClaim" -}}
{{- $weights := (include "depo-gateway.backend" . | fromYaml).weights }}
{{- include "depo-gateway.claimName" (list (printf "%s-weights-%s" (include "depo-gateway.fullname" .root) .pool) $weights) }}
{{- end }}

{{/* The environment variable with a backend's own key: (dict "pool" "small"). */}}
{{- define "depo-gateway.backendKeyEnv" -}}
DEPO_BACKEND_{{ .pool | upper | replace "-" "_" }}_API_KEY
{{- end }}

{{/* What selects pods: (dict "root" $ "component" "backend" "pool" "small"); pool is for backends. */}}
{{- define "depo-gateway.selectorLabels" -}}
app.kubernetes.io/name: {{ include "depo-gateway.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
depo-gateway/pool: {{ . }}
{{- end }}
{{- end }}

{{/* Labels of an object: (dict "root" $ "component" "gateway"); if wanted "labels". Pods have "depo-gateway.podLabels". */}}
{{- define "depo-gateway.labels" -}}
{{- $own := include "depo-gateway.selectorLabels" . | fromYaml }}
{{- $_ := set $own "app.kubernetes.io/part-of" "depo-gateway" }}
{{- $_ := set $own "app.kubernetes.io/managed-by" .root.Release.Service }}
{{- $_ := set $own "app.kubernetes.io/version" (.root.Chart.AppVersion | replace "+" "_" | trunc 63) }}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63) }}
{{- toYaml (merge $own (default dict .labels) .root.Values.commonLabels) }}
{{- end }}

{{/* An object's metadata: (dict "root" $ "name" NAME "component" COMPONENT); if wanted "pool", "labels", "annotations". */}}
{{- define "depo-gateway.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "depo-gateway.labels" . | nindent 2 }}
{{- with merge dict (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
