{{/* What the values mean: backends with their defaults, and the two files that the programs read. */}}

{{/* The second map over the first, as YAML: (list BELOW ABOVE). Unlike sprig's merge false and 0 count; null removes. */}}
{{- define "depo-gateway.merged" -}}
{{- $result := deepCopy (index . 0) }}
{{- range $key, $value := index . 1 }}
{{- if kindIs "invalid" $value }}
{{- $_ := unset $result $key }}
{{- else if and (kindIs "map" $value) (kindIs "map" (get $result $key)) }}
{{- $_ := set $result $key (include "depo-gateway.merged" (list (get $result $key) $value) | fromYaml) }}
{{- else }}
{{- $_ := set $result $key $value }}
{{- end }}
{{- end }}
{{- toYaml $result }}
{{- end }}

{{/* An entry of backends with its defaults, as YAML: (dict "root" $ "pool" "small"). */}}
{{- define "depo-gateway.backend" -}}
{{- $defaults := merge (dict "deploy" true "url" "" "model" "") .root.Values.backendDefaults }}
{{- include "depo-gateway.merged" (list $defaults (default dict (get .root.Values.backends .pool))) }}
{{- end }}

{{/* What a pool of config.pools costs. */}}
{{- define "depo-gateway.cost" -}}
{{- dig "cost" 1.0 (default dict .) }}
{{- end }}

{{/* The names of all pools, cheapest first (equal ones by name), as a JSON list. Maps have no order in Helm. */}}
{{- define "depo-gateway.pools" -}}
{{- $keyed := list }}
{{- range $name, $pool := .Values.config.pools }}
{{- $keyed = append $keyed (printf "%030.9f %s" (include "depo-gateway.cost" $pool | float64) $name) }}
{{- end }}
{{- $names := list }}
{{- range sortAlpha $keyed }}
{{- $names = append $names (splitList " " . | last) }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{/* The names of the pools whose vLLM this chart runs, as a JSON list. */}}
{{- define "depo-gateway.deployedPools" -}}
{{- $names := list }}
{{- range $pool := include "depo-gateway.pools" . | fromJsonArray }}
{{- if (include "depo-gateway.backend" (dict "root" $ "pool" $pool) | fromYaml).deploy }}
{{- $names = append $names $pool }}
{{- end }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{/* The backend's name for the model, which clients may use, too: (dict "root" $ "pool" "small"). */}}
{{- define "depo-gateway.servedModel" -}}
{{- $backend := include "depo-gateway.backend" . | fromYaml }}
{{- dig "model" "" (get .root.Values.config.pools .pool) | default $backend.model }}
{{- end }}

{{/* A pool's address: (dict "root" $ "pool" "small"). */}}
{{- define "depo-gateway.backendUrl" -}}
{{- $backend := include "depo-gateway.backend" . | fromYaml }}
{{- if $backend.deploy }}
{{- printf "http://%s:8000" (include "depo-gateway.named" (dict "root" .root "suffix" .pool)) }}
{{- else }}
{{- $backend.url }}
{{- end }}
{{- end }}

{{/* A pool's backends, as both files want them: (dict "root" $ "pool" "small"). */}}
{{- define "depo-gateway.backendList" -}}
{{- $backend := include "depo-gateway.backend" . | fromYaml -}}
- url: {{ include "depo-gateway.backendUrl" . | quote }}
  {{- if $backend.apiKey.existingSecret }}
  api_key_env: {{ include "depo-gateway.backendKeyEnv" . }}
  {{- end }}
{{- end }}

{{/* "true" where finished requests are written, where into SQLite, and where checkpoints have a volume; else "". */}}
{{- define "depo-gateway.keepsRecords" -}}
{{- if kindIs "map" .Values.config.records }}true{{ end }}
{{- end }}

{{- define "depo-gateway.usesSqlite" -}}
{{- if and (include "depo-gateway.keepsRecords" .) (eq .Values.records.kind "sqlite") }}true{{ end }}
{{- end }}

{{- define "depo-gateway.usesVolume" -}}
{{- if eq .Values.checkpoints.kind "pvc" }}true{{ end }}
{{- end }}

{{/*
"true" where gateway and learner share a volume that one node alone can mount, or a SQLite file, whose locks hold on one node:
network file systems are known to lose them, and then the file is damaged.
*/}}
{{- define "depo-gateway.onOneNode" -}}
{{- $checkpoints := and (include "depo-gateway.usesVolume" .) (ne .Values.checkpoints.accessMode "ReadWriteMany") }}
{{- if or $checkpoints (include "depo-gateway.usesSqlite" .) }}true{{ end }}
{{- end }}

{{/* The most gateways that can run at once. */}}
{{- define "depo-gateway.mostReplicas" -}}
{{- $gateway := .Values.gateway }}
{{- if $gateway.autoscaling.enabled }}
{{- $gateway.autoscaling.maxReplicas | int }}
{{- else if $gateway.keda.enabled }}
{{- $gateway.keda.maxReplicas | int }}
{{- else }}
{{- $gateway.replicas | int }}
{{- end }}
{{- end }}

{{- define "depo-gateway.learnerPort" -}}
{{- dig "listen" "port" 9100 .Values.learner.config | int }}
{{- end }}

{{/* gateway.yaml. */}}
{{- define "depo-gateway.gatewayYaml" -}}
{{- $config := deepCopy .Values.config }}
{{- if include "depo-gateway.usesVolume" . }}
{{- $_ := set $config "estimator" (merge (dict "path" "/var/lib/depo-gateway/checkpoints") (default dict $config.estimator)) }}
{{- end }}
{{- $routing := default dict $config.routing }}
{{- if and .Values.learner.enabled (not (or (hasKey $routing "threshold") (hasKey $routing "target"))) }}
{{- $_ := set $config "routing" (merge (dict "target" (dict "large_share" 0.3)) $routing) }}
{{- end }}
{{- if .Values.auth.existingSecret }}
{{- $keys := ternary $config.auth dict (kindIs "map" $config.auth) }}
{{- $_ := set $config "auth" (merge (dict "keys_file" "/etc/depo-gateway/keys/keys.yaml") $keys) }}
{{- end }}
{{- if include "depo-gateway.keepsRecords" . }}
{{- $_ := merge $config.records (include "depo-gateway.database" . | fromYaml) }}
{{- if .Values.records.hashKey.existingSecret }}
{{- $_ := set $config.records "hash_key_env" "DEPO_HASH_KEY" }}
{{- end }}
{{- end }}
{{- toYaml (omit $config "pools") }}
pools:
{{- range $pool := include "depo-gateway.pools" . | fromJsonArray }}
{{- $at := dict "root" $ "pool" $pool }}
{{- $own := dict "model" (include "depo-gateway.servedModel" $at) }}
{{- $_ := set $own "backends" (include "depo-gateway.backendList" $at | fromYamlArray) }}
  {{ $pool }}:
    {{- merge $own (default dict (get $config.pools $pool)) | toYaml | nindent 4 }}
{{- end }}
{{- end }}

{{/* learner.yaml. */}}
{{- define "depo-gateway.learnerYaml" -}}
{{- $config := deepCopy .Values.learner.config }}
{{- $_ := set $config "records" (include "depo-gateway.database" . | fromYaml) }}
{{- $_ := set $config "listen" (merge dict (default dict $config.listen) (dict "host" "0.0.0.0" "port" 9100)) }}
{{- $pools := include "depo-gateway.pools" . | fromJsonArray }}
{{- if and (eq (dig "judge" "kind" "none" $config) "model") (not $config.judge.pool) }}
{{- $_ := set $config.judge "pool" (last $pools) }}
{{- end }}
{{- toYaml $config }}
pools:
{{- range $pool := $pools }}
{{- $at := dict "root" $ "pool" $pool }}
  {{ $pool }}:
    model: {{ include "depo-gateway.servedModel" $at | quote }}
    cost: {{ include "depo-gateway.cost" (get $.Values.config.pools $pool) | float64 | toJson }}
    backends:
      {{- include "depo-gateway.backendList" $at | nindent 6 }}
{{- end }}
{{- end }}

{{- define "depo-gateway.database" -}}
{{- if eq .Values.records.kind "sqlite" -}}
url: sqlite:////var/lib/depo-gateway/records/records.db
{{- else -}}
url_env: DEPO_DATABASE_URL
{{- end }}
{{- end }}

{{/* What a quantity such as 20Gi or 500m means, as a number. */}}
{{- define "depo-gateway.quantity" -}}
{{- $units := dict "m" 1e-3 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 }}
{{- $factor := 1.0 }}
{{- range list "Ki" "Mi" "Gi" "Ti" "Pi" "Ei" }}
{{- $factor = mulf $factor 1024.0 }}
{{- $_ := set $units . $factor }}
{{- end }}
{{- $text := toString . }}
{{- mulf (regexFind "^[0-9.]+" $text | float64) (default 1.0 (get $units (regexFind "[A-Za-z]+$" $text))) }}
{{- end }}
