"""Ways to install the chart that must all come out right."""

from tests.helm.chart import Values, merged, nested

TOKEN = nested("huggingFace.existingSecret", "hf")
POSTGRESQL = {"records": {"kind": "postgresql", "postgresql": {"existingSecret": "depo-database"}}}
SHARED = nested("checkpoints.accessMode", "ReadWriteMany")
KEYS = nested("auth.existingSecret", "depo-keys")
MANY = merged(merged(POSTGRESQL, SHARED), {"gateway": {"replicas": 3}})
UNRECORDED = {"config": {"records": None}, "learner": {"enabled": False}}
POD_KEYS = {
    "podLabels": {"team": "search"},
    "podAnnotations": {"example.com/scrape": "false"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "topology.kubernetes.io/zone", "labelSelector": {"matchLabels": {"app": "cache"}}}
            ]
        }
    },
    "topologySpreadConstraints": [
        {
            "maxSkew": 2,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "depo-gateway"}},
        }
    ],
    "priorityClassName": "serving",
    "runtimeClassName": "gvisor",
    "podSecurityContext": {"runAsUser": 20001, "fsGroup": 20001, "supplementalGroups": [4]},
    "securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": "depo.json"}},
    "extraEnv": [
        {"name": "HTTPS_PROXY", "value": "http://proxy:3128"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ],
    "extraEnvFrom": [{"secretRef": {"name": "more"}}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
}
OPENSHIFT = {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}
EVERY_SETTING = {
    "listen": {"host": "0.0.0.0", "port": 8080},
    "admin": {"host": "0.0.0.0", "port": 9090, "key_sha256": "ab" * 32},
    "pools": {
        "small": {"model": "tiny", "cost": 0.25, "context_tokens": 1000000, "max_in_flight": 20000000},
        "large": {"cost": 1, "context_tokens": None, "accepts": ["text", "tools", "image"]},
    },
    "routing": {
        "rule": "difficulty",
        "target": {"cost": 0.5},
        "sticky": False,
        "explore": 0.01,
        "on_overload": "small",
        "unfamiliar": "large",
        "group": {"from": "header:X-Task"},
        "expose_scores": True,
    },
    "estimator": {"deadline_ms": 75.5, "watch": True, "candidate": "/var/lib/depo-gateway/checkpoints/candidate"},
    "timeouts": {"connect_s": 1, "first_token_s": 120, "idle_s": 45.5, "total_s": 1200, "drain_s": 120},
    "retries": {"budget": 0.1, "per_second": 5},
    "limits": {"body_bytes": 33554432, "header_bytes": 131072, "max_queue": 1024, "queue_timeout_s": 2.5},
    "auth": {"keys": [{"name": "team", "sha256": "cd" * 32, "requests_per_minute": 60, "large_share": 0.5}]},
    "records": {"prompts": "full", "retention_days": 1000000},
}
EVERY_LEARNER_SETTING = {
    "shadow": {
        "share": 0.5,
        "max_concurrent": 2,
        "priority": None,
        "max_tokens": 4096,
        "cost_per_hour": 5000000,
        "cost_per_day": 60000000,
        "tokens_per_day": 40000000,
        "records_per_day": 20000,
        "busy_waiting": None,
        "timeout_s": 60,
        "max_age_hours": 2,
        "confidence_of_served": True,
    },
    "judge": {
        "kind": "webhook",
        "pool": None,
        "url": "https://judge.example.com:8443/verdict",
        "api_key_env": "JUDGE_KEY",
        "timeout_s": 10,
    },
    "refresh": {
        "every_labels": 50,
        "every_minutes": 30,
        "keep": 3,
        "learn": {
            "min_labels": 200,
            "newest": 5000000,
            "held_out": 0.25,
            "held_out_least": 500,
            "recent": 200,
            "folds": 4,
            "epochs": 10,
            "batch_size": 64,
            "learning_rate": 0.1,
            "wide_learning_rate": 0.02,
            "weight_decay": 0.001,
            "gain_weight": 0.1,
            "distillation_weight": 0.5,
            "seed": 7,
            "traffic": {
                "clip": 5, "key_share": 0.1, "burst": 10, "burst_seconds": 60, "near": 0.9, "lying": 3,
            },
            "gate": {"least": 100, "calibration_error": 0.1, "spread": 0.05, "resamples": 500},
        },
    },
    "gate": {"max_cost_increase": 0.05},
    "reference": "/etc/reference/outcomes.jsonl",
}  # fmt: skip

CASES = {
    "defaults": Values(),
    "token": Values(TOKEN),
    "no-operators": Values(TOKEN, custom_kinds=False),
    "cpu": Values(presets=("cpu",)),
    "cpu-no-operators": Values(presets=("cpu",), custom_kinds=False),
    "existing-vllm": Values(presets=("existing-vllm",)),
    "production": Values(presets=("production",)),
    "production-no-operators": Values(presets=("production",), custom_kinds=False),
    "long-release-name": Values(release="r" + "elease-name" * 4 + "12345678"),
    "release-of-the-chart's-name": Values(release="depo-gateway"),
    "names": Values({"nameOverride": "router", "commonLabels": {"team": "a"}, "commonAnnotations": {"owner": "b"}}),
    "full-name": Values({"fullnameOverride": "llm", "imagePullSecrets": [{"name": "regcred"}]}),
    "every-setting": Values({"config": EVERY_SETTING}),
    "every-learner-setting": Values(
        {
            "learner": {
                "config": EVERY_LEARNER_SETTING,
                "extraEnv": [
                    {"name": "JUDGE_KEY", "valueFrom": {"secretKeyRef": {"name": "judge", "key": "token"}}}
                ],
            }
        }
    ),
    "keys": Values(merged(KEYS, {"test": {"apiKey": {"existingSecret": "depo-test-key"}}})),
    "no-records": Values(UNRECORDED),
    "hashed-prompts": Values(
        {
            "config": {"records": {"prompts": "hash"}},
            "records": {"hashKey": {"existingSecret": "depo-hash"}},
            "learner": {"enabled": False},
        }
    ),
    "postgresql": Values(POSTGRESQL),
    "three-replicas": Values(MANY),
    "two-replicas-of-the-shipped-estimator": Values(
        merged(
            POSTGRESQL,
            {"checkpoints": {"kind": "image"}, "learner": {"enabled": False}, "gateway": {"replicas": 2}},
        )
    ),
    "stateless": Values(merged(UNRECORDED, {"checkpoints": {"kind": "image"}, "gateway": {"replicas": 2}})),
    "own-checkpoint": Values(
        {
            "checkpoints": {"kind": "image"},
            "config": {"estimator": {"path": "/models/estimator"}},
            "learner": {"enabled": False},
            "gateway": {
                "extraVolumes": [{"name": "estimator", "persistentVolumeClaim": {"claimName": "estimator"}}],
                "extraVolumeMounts": [{"name": "estimator", "mountPath": "/models"}],
            },
        }
    ),
    "autoscaling": Values(
        merged(MANY, {"gateway": {"autoscaling": {"enabled": True, "cpu": 60, "inFlight": 50, "maxReplicas": 20}}})
    ),
    "autoscaling-by-in-flight": Values(
        merged(MANY, {"gateway": {"autoscaling": {"enabled": True, "cpu": None, "inFlight": 50}}})
    ),
    "keda": Values(
        merged(
            MANY,
            {
                "gateway": {"keda": {"enabled": True}},
                "backends": {"small": {"keda": {"enabled": True}, "weights": {"accessMode": "ReadWriteMany"}}},
            },
        )
    ),
    "cron": Values({"learner": {"kind": "CronJob", "schedule": "@daily"}}),
    "cron-postgresql": Values(merged(merged(POSTGRESQL, SHARED), {"learner": {"kind": "CronJob"}})),
    "no-learner": Values({"learner": {"enabled": False}}),
    "ingress": Values(
        {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "host": "llm.example.com",
                "annotations": {"cert-manager.io/cluster-issuer": "letsencrypt"},
                "tls": [{"secretName": "llm-tls", "hosts": ["llm.example.com"]}],
            },
            "config": {"limits": {"body_bytes": 33554432}, "timeouts": {"total_s": 1800}},
        }
    ),
    "http-route": Values(
        {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "edge", "namespace": "infra", "sectionName": "https"}],
                "hostnames": ["llm.example.com"],
            }
        }
    ),
    "pod-keys": Values({"gateway": POD_KEYS, "learner": POD_KEYS, "backendDefaults": POD_KEYS}),
    "openshift": Values({"gateway": OPENSHIFT, "learner": OPENSHIFT, "backendDefaults": OPENSHIFT}),
    "digests": Values(
        {
            "gateway": {
                "image": {"repository": "registry.example.com:5000/depo/gateway", "digest": "sha256:" + "0" * 64},
            },
            "learner": {"image": {"tag": "2.0.0", "pullPolicy": "Always"}},
            "backendDefaults": {"image": {"tag": "", "digest": "sha256:" + "1" * 64}},
        }
    ),
    "one-deployed": Values(
        {
            "backends": {
                "large": {
                    "deploy": False,
                    "url": "https://llm.example.com/v1",
                    "apiKey": {"existingSecret": "vendor"},
                    "model": "vendor/large",
                }
            }
        }
    ),
    "three-pools": Values(
        {
            "config": {"pools": {"mid-size": {"cost": 2.5}, "large": {"cost": 20}}},
            "backends": {"mid-size": {"model": "Qwen/Qwen2.5-3B-Instruct"}},
            "checkpoints": {"existingClaim": "of-three-pools"},
            "learner": {"base": "/var/lib/depo-gateway/checkpoints/first"},
        }
    ),
    "other-pools": Values(
        {
            "config": {"pools": {"small": None, "large": None, "a": {"cost": 10}, "b": {"cost": 9.5}}},
            "backends": {
                "small": None,
                "large": None,
                "a": {"deploy": False, "url": "http://a:8000", "model": "a-model"},
                "b": {"deploy": False, "url": "http://b.models.svc.cluster.local:8000/v1", "model": "b-model"},
            },
            "learner": {"config": {"judge": {"pool": "a"}}},
        }
    ),
    "backend-keys": Values(
        {
            "backends": {
                "small": {"apiKey": {"existingSecret": "vllm-key"}, "args": ["--max-model-len=8192", "--dtype=half"]},
                "large": {"replicas": 2, "weights": {"accessMode": "ReadWriteMany", "storageClass": "nfs"}},
            }
        }
    ),
    "no-weights-volume": Values({"backendDefaults": {"weights": {"enabled": False}}}),
    "existing-claims": Values(
        {
            "checkpoints": {"existingClaim": "my-checkpoints"},
            "records": {"sqlite": {"existingClaim": "my-records"}},
            "backends": {"small": {"weights": {"existingClaim": "my-weights"}}},
        }
    ),
    "no-service-account": Values({"serviceAccount": {"create": False, "name": "mine"}, "test": {"enabled": False}}),
    "load-balancer": Values(
        {
            "gateway": {
                "service": {
                    "type": "LoadBalancer",
                    "port": 443,
                    "annotations": {"service.beta.kubernetes.io/aws-load-balancer-type": "nlb"},
                    "loadBalancerClass": "example.com/lb",
                    "loadBalancerSourceRanges": ["10.0.0.0/8"],
                    "externalTrafficPolicy": "Local",
                }
            }
        }
    ),
    "open-network": Values({"networkPolicy": {"enabled": False}}),
    "closed-network": Values(
        {
            "networkPolicy": {
                "ingressFrom": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
                "egressExtra": [
                    {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 3128, "protocol": "TCP"}]}
                ],
            }
        }
    ),
    "no-monitoring": Values(
        {
            "monitoring": {
                "serviceMonitor": {"enabled": False},
                "podMonitor": {"enabled": False},
                "rules": {"enabled": False},
                "dashboards": {"enabled": False},
            }
        }
    ),
    "forced-monitoring": Values(
        {
            "monitoring": {
                "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
                "podMonitor": {"enabled": True, "interval": "30s"},
                "rules": {"enabled": True, "runbookBaseUrl": "https://runbooks.example.com/"},
            }
        },
        custom_kinds=False,
    ),
    "extra-objects": Values(
        {
            "extraObjects": [
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": "{{ .Release.Name }}-extra"},
                    "data": {"namespace": "{{ .Release.Namespace }}"},
                }
            ]
        }
    ),
    "subchart": Values({"global": {"imageRegistry": "example.com"}}),
}  # fmt: skip
