{{/* What the values mean: backends with their defaults, and the two files that the programs read. */}}

{{/* The second map over the first, as YAML: (list BELOW ABOVE). Unlike sprig's merge false and 0 count; null takes away. */}}
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

{{/* The names of all pools, cheapest first (equal ones by name), as a JSON list. Maps have no order in Helm. */}}
{{- define "depo-gateway.pools" -}}
{{- $keyed := list }}
{{- range $name, $pool := .Values.config.pools }}
{{- $keyed = append $keyed (printf "%030.9f %s" (dig "cost" 1.0 (default dict $pool) | float64) $name) }}
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

{{/* What the backend calls the model, and clients may: (dict "root" $ "pool" "small"). */}}
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
