{{/*
What all pods have in common. SECTION is a part of the values with the pod keys: gateway, learner, or a backend as
"depo-gateway.backend" gives it.
*/}}

{{/* (dict "image" SECTION.image "tag" what an empty tag means). A digest pins the image; then the tag is only informative. */}}
{{- define "depo-gateway.image" -}}
{{- $tag := default .tag .image.tag }}
{{- .image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/*
A pod template's metadata: (dict "root" $ "component" COMPONENT "section" SECTION); if wanted "pool", "annotations".
Without the chart's version: an upgrade that changes nothing in a pod must not restart it.
*/}}
{{- define "depo-gateway.podMetadata" -}}
{{- $own := include "depo-gateway.selectorLabels" . | fromYaml }}
{{- $_ := set $own "app.kubernetes.io/part-of" "depo-gateway" -}}
labels:
  {{- merge $own .section.podLabels .root.Values.commonLabels | toYaml | nindent 2 }}
{{- with merge dict (default dict .annotations) .section.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
A pod's settings but containers and volumes: (dict "root" $ "component" COMPONENT "section" SECTION); if wanted "pool",
"uid" (10001), "spread" (true: replicas over nodes and zones), "together" (true: on the node where the volumes are).
*/}}
{{- define "depo-gateway.podSettings" -}}
serviceAccountName: {{ include "depo-gateway.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "depo-gateway.podSecurityContext" . | nindent 2 }}
{{- with .section.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .section.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "depo-gateway.affinity" . | fromYaml }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .section.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- else }}
{{- if .spread }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "depo-gateway.selectorLabels" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end }}
{{- with .section.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .section.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", and more. The group is what makes volumes writable. */}}
{{- define "depo-gateway.podSecurityContext" -}}
{{- $uid := default 10001 .uid | int64 }}
{{- $own := dict "runAsNonRoot" true "runAsUser" $uid "runAsGroup" $uid "fsGroup" $uid }}
{{- $_ := set $own "fsGroupChangePolicy" "OnRootMismatch" }}
{{- $_ := set $own "seccompProfile" (dict "type" "RuntimeDefault") }}
{{- include "depo-gateway.merged" (list $own .section.podSecurityContext) }}
{{- end }}

{{/* (dict "section" SECTION). */}}
{{- define "depo-gateway.securityContext" -}}
{{- $own := dict "runAsNonRoot" true "allowPrivilegeEscalation" false "readOnlyRootFilesystem" true }}
{{- $_ := set $own "capabilities" (dict "drop" (list "ALL")) }}
{{- include "depo-gateway.merged" (list $own .section.securityContext) }}
{{- end }}

{{/*
The section's affinity. "together" adds that gateway and learner share a node, because only one node can mount the volume;
since each pod satisfies the term itself, whichever comes first is placed anywhere.
*/}}
{{- define "depo-gateway.affinity" -}}
{{- $affinity := deepCopy .section.affinity }}
{{- if .together }}
{{- $term := include "depo-gateway.besideTheVolumes" . | fromYaml }}
{{- $pods := default dict $affinity.podAffinity }}
{{- $required := default list $pods.requiredDuringSchedulingIgnoredDuringExecution }}
{{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" (append $required $term) }}
{{- $_ := set $affinity "podAffinity" $pods }}
{{- end }}
{{- toYaml $affinity }}
{{- end }}

{{- define "depo-gateway.besideTheVolumes" -}}
topologyKey: kubernetes.io/hostname
labelSelector:
  matchLabels:
    app.kubernetes.io/name: {{ include "depo-gateway.name" .root | quote }}
    app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
  matchExpressions:
    - {key: app.kubernetes.io/component, operator: In, values: [gateway, learner]}
{{- end }}

{{/* A variable from an existing Secret: (dict "name" NAME "secret" (dict "existingSecret" "..." "key" "...")). */}}
{{- define "depo-gateway.secretEnv" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret.existingSecret }}
      key: {{ .secret.key }}
{{- end }}

{{/* A container's variables, as YAML: (list OWN EXTRA), the chart's own as YAML; one of the same name replaces it. */}}
{{- define "depo-gateway.env" -}}
{{- $extra := index . 1 }}
{{- $names := list }}
{{- range $extra }}
{{- $names = append $names .name }}
{{- end }}
{{- $env := list }}
{{- range index . 0 | fromYamlArray }}
{{- if not (has .name $names) }}{{ $env = append $env . }}{{ end }}
{{- end }}
{{- with concat $env $extra }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{/* What gateway and learner read from Secrets: (dict "root" $). */}}
{{- define "depo-gateway.secretEnvs" -}}
{{- $records := .root.Values.records }}
{{- if and (include "depo-gateway.keepsRecords" .root) (eq $records.kind "postgresql") }}
{{ include "depo-gateway.secretEnv" (dict "name" "DEPO_DATABASE_URL" "secret" (pick $records.postgresql "existingSecret" "key")) }}
{{- end }}
{{- range $pool := include "depo-gateway.pools" .root | fromJsonArray }}
{{- $backend := include "depo-gateway.backend" (dict "root" $.root "pool" $pool) | fromYaml }}
{{- if $backend.apiKey.existingSecret }}
{{ include "depo-gateway.secretEnv" (dict "name" (include "depo-gateway.backendKeyEnv" (dict "pool" $pool)) "secret" $backend.apiKey) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volumes of gateway and learner, and where they are mounted: (dict "root" $ "section" SECTION "readOnly" BOOL). */}}
{{- define "depo-gateway.sharedVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if include "depo-gateway.usesVolume" .root }}
- name: checkpoints
  persistentVolumeClaim:
    claimName: {{ include "depo-gateway.checkpointsClaim" .root }}
{{- end }}
{{- if include "depo-gateway.usesSqlite" .root }}
- name: records
  persistentVolumeClaim:
    claimName: {{ include "depo-gateway.recordsClaim" .root }}
{{- end }}
{{- with .section.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "depo-gateway.sharedMounts" -}}
- name: tmp
  mountPath: /tmp
- name: config
  mountPath: /etc/depo-gateway
  readOnly: true
{{- if include "depo-gateway.usesVolume" .root }}
- name: checkpoints
  mountPath: /var/lib/depo-gateway/checkpoints
  {{- if .readOnly }}
  readOnly: true
  {{- end }}
{{- end }}
{{- if include "depo-gateway.usesSqlite" .root }}
- name: records
  mountPath: /var/lib/depo-gateway/records
{{- end }}
{{- with .section.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}
