{{/* Values that the schema can't refuse, because they contradict each other. One sentence each, with the remedy. */}}

{{- define "depo-gateway.refuse" -}}
{{- $parts := list "misplaced" "addresses" "names" "pools" "backends" "routing" "gateway" "records" "estimator" "learner" "monitoring" "resources" }}
{{- $refusals := list }}
{{- range $parts }}
{{- range include (printf "depo-gateway.refusals.%s" .) $ | splitList "\n" }}
{{- with trim . }}{{ $refusals = append $refusals . }}{{ end }}
{{- end }}
{{- end }}
{{- if $refusals }}
{{- fail (printf "\n%s" (join "\n" $refusals)) }}
{{- end }}
{{- end }}

{{/* Values that belong elsewhere. A secret's text is never repeated. */}}
{{- define "depo-gateway.refusals.misplaced" -}}
{{- $places := dict }}
{{- $_ := set $places "huggingFace.token" "is a secret: name an existing Secret that holds it in huggingFace.existingSecret" }}
{{- $_ := set $places "records.postgresql.url" "is a secret: name an existing Secret that holds it in records.postgresql.existingSecret" }}
{{- $_ := set $places "config.records.url" "is written by the chart: set records.kind, and for postgresql name an existing Secret in records.postgresql.existingSecret" }}
{{- $_ := set $places "config.auth.keys_file" "is written by the chart: name a Secret that holds the file in auth.existingSecret" }}
{{- $_ := set $places "auth.keys" "belongs elsewhere: write config.auth.keys, or name a Secret that holds a keys file in auth.existingSecret" }}
{{- range $pool := keys .Values.config.pools | sortAlpha }}
{{- $_ := set $places (printf "config.pools.%s.backends" $pool) (printf "is written by the chart: set backends.%s.url with backends.%s.deploy: false" $pool $pool) }}
{{- end }}
{{- range $path, $remedy := $places }}
{{- $found := $.Values }}
{{- range splitList "." $path }}
{{- if kindIs "map" $found }}{{ $found = index $found . }}{{ else }}{{ $found = "" }}{{ end }}
{{- end }}
{{- if $found }}
{{ $path }} {{ $remedy }}.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.addresses" -}}
{{- $addresses := dict "monitoring.prometheusAddress" .Values.monitoring.prometheusAddress }}
{{- $_ := set $addresses "monitoring.rules.runbookBaseUrl" .Values.monitoring.rules.runbookBaseUrl }}
{{- range $pool, $backend := .Values.backends }}
{{- $_ := set $addresses (printf "backends.%s.url" $pool) (default "" (default dict $backend).url) }}
{{- end }}
{{- range $where, $address := $addresses }}
{{- if regexMatch "^(https?://[^@\\s/]+[^@\\s]*)?$" $address }}
{{- else if contains "@" $address }}
{{ $where }} has credentials in it: remove them (a backend's key is named in its apiKey.existingSecret).
{{- else if regexMatch "://|\\s|^/" $address }}
{{ $where }} is not an address: write http://HOST:PORT, or https.
{{- else }}
{{ $where }} is {{ $address }}, without its scheme: write http://{{ $address }}, or https.
{{- end }}
{{- end }}
{{- end }}

{{/* Pools name objects, and clients may name them as a model. A name with two mistakes is reported once. */}}
{{- define "depo-gateway.refusals.names" -}}
{{- range $pool := concat (keys .Values.config.pools) (keys .Values.backends) | uniq | sortAlpha }}
{{- $where := ternary "config.pools" "backends" (hasKey $.Values.config.pools $pool) }}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$" $pool) }}
{{ $where }}.{{ $pool }} can't name objects of Kubernetes: call the pool something of up to 30 lower-case letters, digits and "-", a letter first.
{{- else if regexMatch "^auto(-.*)?$" $pool }}
{{ $where }}.{{ $pool }} is the model that requests routing: give the pool another name.
{{- else if regexMatch "^(admin|learner|checkpoints|records|test|.*-shared|.*-single)$" $pool }}
{{ $where }}.{{ $pool }} is a name that the chart uses for its own objects: give the pool another.
{{- else if regexMatch "^(true|false|yes|no|on|off|y|n|null)$" $pool }}
{{ $where }}.{{ $pool }} is not a name in YAML, which reads a word such as n, no or off as false: give the pool another.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.pools" -}}
{{- $pools := keys .Values.config.pools | sortAlpha }}
{{- if lt (len $pools) 2 }}
config.pools has {{ len $pools }} and routing needs two or more: add one there and, by the same name, in backends.
{{- end }}
{{- range $pools }}
{{- if not (hasKey $.Values.backends .) }}
config.pools.{{ . }} has no backend: add backends.{{ . }}, or remove the pool with config.pools.{{ . }}: null.
{{- end }}
{{- end }}
{{- range keys .Values.backends | sortAlpha }}
{{- if not (hasKey $.Values.config.pools .) }}
backends.{{ . }} is not a pool: add config.pools.{{ . }}, or remove the backend with backends.{{ . }}: null.
{{- end }}
{{- end }}
{{- $models := dict }}
{{- range $pools }}
{{- $model := include "depo-gateway.servedModel" (dict "root" $ "pool" .) }}
{{- if not $model }}
backends.{{ . }}.model is empty: name a Hugging Face model, or with deploy: false the server's name for it.
{{- else if hasKey $models $model }}
backends.{{ . }} serves {{ $model }} as {{ get $models $model }} does: give it another name in config.pools.{{ . }}.model.
{{- else if and (ne $model .) (has $model $pools) }}
backends.{{ . }} serves {{ $model }}, which is another pool's name: call it something else in config.pools.{{ . }}.model.
{{- else if regexMatch "^auto(-[0-9.]+)?$" $model }}
backends.{{ . }} serves {{ $model }}, the name that requests routing: call it something else in config.pools.{{ . }}.model.
{{- end }}
{{- $_ := set $models $model . }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.backends" -}}
{{- range $pool := keys .Values.backends | sortAlpha }}
{{- $backend := include "depo-gateway.backend" (dict "root" $ "pool" $pool) | fromYaml }}
{{- $weights := $backend.weights }}
{{- $most := ternary $backend.keda.maxReplicas $backend.replicas $backend.keda.enabled | int }}
{{- if and (not $backend.deploy) (not $backend.url) }}
backends.{{ $pool }} is not deployed and has no url: set backends.{{ $pool }}.url to the server that runs, or deploy: true.
{{- else if and $backend.deploy $backend.url }}
backends.{{ $pool }} has both deploy: true and a url: set backends.{{ $pool }}.deploy: false to use the server at the url.
{{- else if and $backend.deploy (gt $most 1) $weights.enabled (ne $weights.accessMode "ReadWriteMany") (not $weights.existingClaim) }}
backends.{{ $pool }} may run {{ $most }} replicas, which can't share a {{ $weights.accessMode }} volume from several nodes: set backends.{{ $pool }}.weights.accessMode: ReadWriteMany, or weights.enabled: false so that each pod downloads.
{{- end }}
{{- $rolling := default dict $backend.strategy.rollingUpdate }}
{{- $none := list "0" "0%" }}
{{- if and (eq (toString $backend.strategy.type) "RollingUpdate") (has (toString $rolling.maxSurge) $none) (has (toString $rolling.maxUnavailable) $none) }}
backends.{{ $pool }}.strategy.rollingUpdate has 0 for both maxSurge and maxUnavailable, so no pod could ever be replaced: set one of them to 1.
{{- end }}
{{- range $argument := ternary $backend.args list $backend.deploy }}
{{- $own := dict "port" "the gateway connects to 8000" "host" "the gateway connects to the pod" "scheduling-policy" "it puts the learner's requests last" }}
{{- $_ := set $own "served-model-name" (printf "set config.pools.%s.model" $pool) }}
{{- $_ := set $own "shutdown-timeout" (printf "set backends.%s.shutdownSeconds" $pool) }}
{{- $_ := set $own "api-key" (printf "name its Secret in backends.%s.apiKey.existingSecret" $pool) }}
{{- $flag := regexFind "^--[^= ]+" $argument | trimPrefix "--" | replace "_" "-" }}
{{- with get $own $flag }}
backends.{{ $pool }}.args has --{{ $flag }}, which the chart sets: remove it ({{ . }}).
{{- end }}
{{- end }}
{{- if and $backend.keda.enabled (gt (int $backend.keda.minReplicas) (int $backend.keda.maxReplicas)) }}
backends.{{ $pool }}.keda.minReplicas is above maxReplicas: lower it.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.gateway" -}}
{{- $gateway := .Values.gateway }}
{{- $scaling := $gateway.autoscaling }}
{{- $most := include "depo-gateway.mostReplicas" . | int }}
{{- $full := include "depo-gateway.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) }}
{{ $full }} can't be a Service's name: set fullnameOverride to one that begins with a letter and has letters, digits and "-".
{{- end }}
{{- if and $scaling.enabled $gateway.keda.enabled }}
gateway.autoscaling and gateway.keda are both enabled and would scale against each other: disable one.
{{- end }}
{{- if and $scaling.enabled (not $scaling.cpu) (not $scaling.inFlight) }}
gateway.autoscaling has nothing to scale by: set gateway.autoscaling.cpu or gateway.autoscaling.inFlight.
{{- end }}
{{- range $name, $section := pick $gateway "autoscaling" "keda" }}
{{- if and $section.enabled (gt (int $section.minReplicas) (int $section.maxReplicas)) }}
gateway.{{ $name }}.minReplicas is above maxReplicas: lower it.
{{- end }}
{{- end }}
{{- if and (gt $most 1) (include "depo-gateway.usesSqlite" .) }}
{{ $most }} gateways can't share SQLite: set records.kind: postgresql with records.postgresql.existingSecret, or run one (gateway.replicas: 1, without autoscaling).
{{- end }}
{{- if and (gt $most 1) (include "depo-gateway.usesVolume" .) (ne .Values.checkpoints.accessMode "ReadWriteMany") }}
{{ $most }} gateways can't share a {{ .Values.checkpoints.accessMode }} volume of checkpoints: set checkpoints.accessMode: ReadWriteMany, or checkpoints.kind: image (and learner.enabled: false).
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
httpRoute.enabled needs a Gateway to attach to: name it in httpRoute.parentRefs.
{{- end }}
{{- if not (or .Values.config.auth .Values.auth.existingSecret) }}
config.auth is absent or empty: name a keys file's Secret in auth.existingSecret, or write config.auth: none to serve without keys.
{{- end }}
{{- range $name := list "listen" "admin" }}
{{- if has (get $.Values.config $name).host (list "localhost" "127.0.0.1" "::1" "[::1]") }}
config.{{ $name }}.host is a loopback address, where neither probes nor clients reach the pod: set 0.0.0.0.
{{- end }}
{{- end }}
{{- if eq (int .Values.config.listen.port) (int .Values.config.admin.port) }}
config.listen and config.admin both name port {{ .Values.config.listen.port }}: give config.admin.port another.
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.routing" -}}
{{- $routing := default dict .Values.config.routing }}
{{- $pools := include "depo-gateway.pools" . | fromJsonArray }}
{{- if and $routing.target (hasKey $routing "threshold") }}
config.routing has both threshold and target: a target moves the threshold, so write one of them.
{{- end }}
{{- if hasKey (default dict $routing.target) "cost" }}
{{- $cheapest := include "depo-gateway.cost" (get .Values.config.pools (first $pools)) | float64 }}
{{- $dearest := include "depo-gateway.cost" (get .Values.config.pools (last $pools)) | float64 }}
{{- if lt (mulf $routing.target.cost $dearest) $cheapest }}
config.routing.target.cost is {{ $routing.target.cost }}, and with everything in pool {{ first $pools }} it is {{ divf $cheapest $dearest }}: set that or more.
{{- end }}
{{- end }}
{{- with $routing.on_overload }}
{{- if not (has . (append $pools "share")) }}
config.routing.on_overload is {{ . }}: set share or a pool's name ({{ join ", " $pools }}).
{{- end }}
{{- end }}
{{- with $routing.unfamiliar }}
{{- if not (has . (concat $pools (list "share" "explore"))) }}
config.routing.unfamiliar is {{ . }}: set share, explore or a pool's name ({{ join ", " $pools }}).
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.records" -}}
{{- if include "depo-gateway.keepsRecords" . }}
{{- $records := .Values.records }}
{{- if and (eq $records.kind "postgresql") (not $records.postgresql.existingSecret) }}
records.kind is postgresql without an address: name the Secret that holds it in records.postgresql.existingSecret.
{{- end }}
{{- if and (ne $records.kind "postgresql") $records.postgresql.existingSecret }}
records.postgresql.existingSecret is named while records.kind is {{ $records.kind }}, which uses no address: set records.kind: postgresql, or remove the Secret's name.
{{- end }}
{{- if and (eq (default "none" .Values.config.records.prompts) "hash") (not $records.hashKey.existingSecret) }}
config.records.prompts is hash without a key for it: name the Secret that holds one in records.hashKey.existingSecret.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.estimator" -}}
{{- $path := dig "estimator" "path" "builtin" .Values.config }}
{{- $pools := len .Values.config.pools }}
{{- if include "depo-gateway.usesVolume" . }}
{{- if ne $path "builtin" }}
config.estimator.path is the checkpoints volume while checkpoints.kind is pvc: leave it out, or set checkpoints.kind: image.
{{- end }}
{{- if and (gt $pools 2) (not .Values.checkpoints.existingClaim) }}
config.pools has {{ $pools }} and the shipped estimator scores two: name a volume with a checkpoint of yours in checkpoints.existingClaim.
{{- end }}
{{- else if and (gt $pools 2) (eq $path "builtin") }}
config.pools has {{ $pools }} and the shipped estimator scores two: set config.estimator.path to a checkpoint of yours, mounted by gateway.extraVolumes.
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.learner" -}}
{{- $learner := .Values.learner }}
{{- if $learner.enabled }}
{{- if not (and (include "depo-gateway.keepsRecords" .) (eq (default "none" .Values.config.records.prompts) "full")) }}
learner.enabled needs the prompts: set config.records.prompts: full, or learner.enabled: false.
{{- end }}
{{- if not (include "depo-gateway.usesVolume" .) }}
learner.enabled has no place to publish to with checkpoints.kind: image: set checkpoints.kind: pvc, or learner.enabled: false.
{{- end }}
{{- if and (include "depo-gateway.usesVolume" .) (eq .Values.checkpoints.accessMode "ReadWriteOncePod") }}
checkpoints.accessMode is ReadWriteOncePod, which excludes the learner: set ReadWriteOnce, or learner.enabled: false.
{{- end }}
{{- if and (include "depo-gateway.usesSqlite" .) (eq .Values.records.sqlite.accessMode "ReadWriteOncePod") }}
records.sqlite.accessMode is ReadWriteOncePod, which excludes the learner: set ReadWriteOnce, or learner.enabled: false.
{{- end }}
{{- if and (gt (len .Values.config.pools) 2) (eq $learner.base "builtin") }}
learner.base is builtin, which scores two pools of {{ len .Values.config.pools }}: set learner.base to a checkpoint of yours.
{{- end }}
{{- $judge := dig "judge" dict $learner.config }}
{{- $kind := default "none" $judge.kind }}
{{- if and (eq $kind "webhook") (not $judge.url) }}
learner.config.judge is a webhook without an address: set learner.config.judge.url, where answers are posted.
{{- end }}
{{- range $name, $of := dict "pool" "model" "rubric" "model" "max_tokens" "model" "url" "webhook" "api_key_env" "webhook" }}
{{- if and (get $judge $name) (ne $kind $of) }}
learner.config.judge.{{ $name }} is read by kind: {{ $of }} alone, and learner.config.judge.kind is {{ $kind }}: remove one.
{{- end }}
{{- end }}
{{- if and $judge.pool (not (hasKey .Values.config.pools $judge.pool)) }}
learner.config.judge.pool is {{ $judge.pool }}, which config.pools does not have: name one of {{ include "depo-gateway.pools" . | fromJsonArray | join ", " }}.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.monitoring" -}}
{{- $monitoring := .Values.monitoring }}
{{- if and .Values.gateway.keda.enabled (eq (toString $monitoring.serviceMonitor.enabled) "false") }}
gateway.keda needs metrics of the ServiceMonitor, which is off: set monitoring.serviceMonitor.enabled: auto, or gateway.keda.enabled: false.
{{- end }}
{{- range $pool := include "depo-gateway.deployedPools" . | fromJsonArray }}
{{- $backend := include "depo-gateway.backend" (dict "root" $ "pool" $pool) | fromYaml }}
{{- if and $backend.keda.enabled (eq (toString $monitoring.podMonitor.enabled) "false") }}
backends.{{ $pool }}.keda needs metrics of the PodMonitor, which is off: set monitoring.podMonitor.enabled: auto, or backends.{{ $pool }}.keda.enabled: false.
{{- end }}
{{- end }}
{{- end }}

{{- define "depo-gateway.refusals.resources" -}}
{{- $sections := dict "gateway" .Values.gateway.resources }}
{{- if .Values.learner.enabled }}
{{- $_ := set $sections "learner" .Values.learner.resources }}
{{- end }}
{{- range $pool := include "depo-gateway.deployedPools" . | fromJsonArray }}
{{- $_ := set $sections (printf "backends.%s" $pool) (include "depo-gateway.backend" (dict "root" $ "pool" $pool) | fromYaml).resources }}
{{- end }}
{{- range $where, $section := $sections }}
{{- $requests := default dict $section.requests | deepCopy }}
{{- $limits := default dict $section.limits | deepCopy }}
{{- range $part, $amounts := dict "requests" $requests "limits" $limits }}
{{- range $name, $amount := $amounts }}
{{- if not (regexMatch "^(cpu|memory|ephemeral-storage|hugepages-.+|.+/.+)$" $name) }}
{{ $where }}.resources.{{ $part }}.{{ $name }} is not a resource of Kubernetes: write cpu, memory, or a device's with its domain (nvidia.com/gpu).
{{- else if not (regexMatch "^[0-9]+([.][0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$" (toString (default 0 $amount))) }}
{{ $where }}.resources.{{ $part }}.{{ $name }} is {{ $amount }}, which is not a quantity of Kubernetes: write it like 500m, 2, 512Mi or 16Gi.
{{- $_ := unset $amounts $name }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name := list "cpu" "memory" "ephemeral-storage" }}
{{- $request := get $requests $name }}
{{- $limit := get $limits $name }}
{{- if and $request $limit (gt (include "depo-gateway.quantity" $request | float64) (include "depo-gateway.quantity" $limit | float64)) }}
{{ $where }}.resources.requests.{{ $name }} is {{ $request }}, above limits.{{ $name }}, which is {{ $limit }}: lower the request, or raise the limit.
{{- end }}
{{- end }}
{{- end }}
{{- end }}
