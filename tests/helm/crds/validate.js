// Reads a JSON list of objects on stdin; writes a JSON list of what is wrong with each: null, or the complaint.
import { readFileSync } from "node:fs";

import * as gatewayApi from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as prometheus from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const groups = {
  "gateway.networking.k8s.io/v1": gatewayApi,
  "keda.sh/v1alpha1": keda,
  "monitoring.coreos.com/v1": prometheus,
};

function complaint(item) {
  const Kind = groups[item.apiVersion]?.[item.kind];
  if (Kind === undefined) return `no class for ${item.apiVersion} ${item.kind}`;
  try {
    new Kind(item).validate();
    return null;
  } catch (error) {
    return String(error.message);
  }
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(complaint)));
